"""What a study leaves: results.md, results.json, figures, and the curves of TensorBoard.

The test labels come in here, in `report`; what is chosen was chosen on val before.
"""
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from torch.utils.tensorboard import SummaryWriter

from common import valid_unicode, write_text
from figures import calibration_figure, curves_figure, efficiency_figure, figure_text
from scores import (
    OVERALL, REPLICATES, Block, GroundTruth, comparisons, means, nan_mean, patient_counts,
    score_blocks, score_folds)


def cells(values: np.ndarray, bold: bool = True) -> list[list[str]]:
    """values (I, S, C) -> I rows of C cells: mean ± deviation over the S draws, the best of
    each column in bold, a dash where there is no value."""
    means = nan_mean(values, 1)                                             # (I, C)
    spread = values.std(1, ddof=min(1, values.shape[1] - 1))
    best = np.fmax.reduce(means)                                            # passes over NaN
    texts = np.full(means.shape, "–", dtype=object)
    for where in zip(*np.nonzero(~np.isnan(means))):
        text = f"{means[where]:.3f}"
        # Without a ± at 100 % of the labels: all draws are the same images, so nothing varies.
        if spread[where] > 1e-9:
            text += f" ± {spread[where]:.3f}"
        if bold and len(means) > 1 and means[where] == best[where[1]]:
            text = f"**{text}**"
        texts[where] = text
    return texts.tolist()


def markdown_table(rows: Iterable[list[str]]) -> str:
    """A table in Markdown, the header first. Names may hold what would end a cell or a line."""
    header, *others = ([" ".join(cell.replace("|", r"\|").split()) for cell in row]
                       for row in rows)
    table = [header, ["---"] * len(header), *others]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def block_table(heading: str, columns: list[str], inits: list[str],
                rows: list[list[str]]) -> str:
    """A heading and a table, a row for each initialisation."""
    table = [["", *columns], *([init, *row] for init, row in zip(inits, rows))]
    return f"\n{heading}\n\n{markdown_table(table)}"


def intervals_sentence(blocks: list[Block], what: str = "test ") -> str:
    """How the intervals came about."""
    # Whether a replicate has a mean depends on the truth alone, so that any row tells.
    mean = blocks[0].rows[0].pooled[-1]                                     # (1 + R,)
    if len(mean) == 1:
        return f"One {what}patient has no intervals and no p."
    complete = (~np.isnan(mean[1:])).sum()
    return (f"Intervals and p: the {what}patients drawn anew {REPLICATES} times, for all rows "
            f"alike; of the mean, the {complete} times that every label had both classes.")


def preface(about: dict[str, Any], truth: GroundTruth, patients: np.ndarray,
            intervals: str) -> str:
    """What the numbers below it are: on test, or by cross-validation."""
    title = "What pre-training buys"
    images = f"{len(truth.test)} test images of {len(set(patients))} patients. "
    how = (f"Epoch, regularisation and thresholds are chosen on val: {len(truth.val)} labelled "
           "images beyond the fraction. Mean ± deviation over the draws.")
    if about.get("folds"):
        title = "Cross-validated"
        images = (f"{len(truth.test)} images of {len(set(patients))} patients, train and val "
                  "together; no image of test was read. ")
        how = (f"Each seed deals the patients to {about['folds']} folds. A fold is predicted by a "
               "logistic regression on frozen features that has not seen it: the next fold chose "
               "the regularisation, and the share of the labels was drawn from the patients of "
               "the others, with one more patient for each class of a label that the share "
               "lacked. AUROC compares images of the same fold. Mean ± deviation over the seeds.")
    return (f"# {title}: {about['data']}\n\n{len(truth.names)} labels: {about['labels']}; -1 is "
            f"never scored. {images}{how} {intervals}\n")


def auroc_table(block: Block, names: list[str], heading: str) -> str:
    """AUROC of each label and their mean, a row for each initialisation."""
    table = cells(np.stack([row.draws for row in block.rows]))
    for row, mean in zip(table, means(block)):
        row.append("–" if math.isnan(mean.low) else f"{mean.low:.3f} to {mean.high:.3f}")
    return block_table(heading, [*names, "mean", "95 % interval"], block.inits, table)


def differences(block: Block, names: list[str]) -> str:
    """A line for each pair of initialisations: how their means differ."""
    text = "\n"
    # The last comparison of each pair is that of the mean; a label may be called "mean", too.
    for pair in comparisons(block, names)[len(names)::len(names) + 1]:
        text += f"{pair.init} − {pair.against}: mean AUROC {pair.difference:+.3f} "
        text += ("(no interval)\n" if math.isnan(pair.low) else
                 f"(95 % {pair.low:+.3f} to {pair.high:+.3f}, p = {pair.p:.2g})\n")
    return text


def block_text(block: Block, draws: list[str], truth: GroundTruth) -> str:
    """A block's tables and comparisons; draws: a sentence about each."""
    text = f"\n## {block.mode}, {100 * block.fraction:g} % of the labels\n\n{'; '.join(draws)}\n"
    text += auroc_table(block, truth.names, "AUROC on test")

    peaks = np.stack([row.peaks for row in block.rows])                     # (I, S, L + 1)
    if not np.isnan(peaks).all():
        heading = ("Peak test accuracy over the epochs, the published protocol: optimistic, as "
                   "test chooses the epoch")
        text += block_table(heading, [*truth.names, "mean"], block.inits, cells(peaks))

    heading = "Means over the labels, thresholds chosen on val"
    if truth.exclusive:
        heading += ("; accuracy and majority of all classes together, the most probable one "
                    "called")
    overall = np.stack([row.overall for row in block.rows])                 # (I, S, 6)
    text += block_table(heading, [name.replace("_", " ") for name in OVERALL], block.inits,
                        cells(overall, bold=False))
    return text + differences(block, truth.names)


# --------------------------------------------------------------------------------------------------
# Files.

def write_json(path: Path, results: dict) -> None:
    """Replace a results.json as a whole. JSON has no NaN: a number that is none becomes null."""
    results = json.loads(json.dumps(results), parse_constant=lambda constant: None)
    write_text(path, json.dumps(results, indent=1) + "\n")


def write_results(out: Path, about: dict, text: str, blocks: list[Block],
                  names: list[str]) -> None:
    """results.md, which holds `text`, and results.json."""
    write_text(out / "results.md", text)
    write_json(out / "results.json", about | {
        "results": [label for block in blocks for row in block.rows for run in row.runs
                    for label in run.rows],
        "means": [asdict(mean) for block in blocks for mean in means(block)],
        "comparisons": [asdict(pair) for block in blocks for pair in comparisons(block, names)]})


def report_folds(out: Path, about: dict, runs: dict[tuple, dict], names: list[str],
                 truth: np.ndarray, patients: np.ndarray) -> None:
    """Write results.json and results.md of a cross-validation, and print the table.

    about: `data`, `labels` and the number of `folds`. runs: for every combination (mode,
    fraction, init, seed) the `predictions` (n, L) for all images, each by the regression that
    has not seen its `fold` (n,). names: of the L labels. truth (n, L), patients (n,)."""
    ground_truth = GroundTruth(names, False, truth, truth, patient_counts(patients, REPLICATES))
    blocks = score_blocks(runs, ground_truth, score_folds)
    text = preface(about, ground_truth, patients, intervals_sentence(blocks, ""))
    for block in blocks:
        text += auroc_table(block, names, f"## {100 * block.fraction:g} % of the labels")
        text += differences(block, names)
    print("\n" + text)
    write_results(out, about, text, blocks, names)


def report(out: Path, about: dict, runs: dict[tuple, dict], names: list[str],
           val_truth: np.ndarray, truth: np.ndarray, patients: np.ndarray) -> None:
    """Write results.json, results.md and the figures, and print the table. The test labels come
    in here, once all is trained and chosen, and nowhere earlier.

    about: what results.json says of the whole: `data`, `kind`, `labels`, and as `draws` for
    each fraction a sentence about each draw.
    runs: for every combination (mode, fraction, init, seed) the probabilities `val`
    (n_val, L) and `test` (n, L); if there are any, `peaks` (E, n, L), those of test after
    each epoch; and for each label `n_train` and `positives`, how many images it had.
    names: of the L labels. val_truth (n_val, L); truth (n, L) and patients (n,), of test."""
    # --- numbers
    ground_truth = GroundTruth(names, about["kind"] == "exclusive", val_truth, truth,
                               patient_counts(patients, REPLICATES))
    blocks = score_blocks(runs, ground_truth)

    # --- text
    text = preface(about, ground_truth, patients, intervals_sentence(blocks))
    text += "".join(block_text(block, about["draws"][block.fraction], ground_truth)
                    for block in blocks)
    for_figures = figure_text(label=names, row=blocks[0].inits)
    text += for_figures.legend
    print("\n" + text)
    write_results(out, about, text, blocks, names)

    # --- figures
    written = for_figures.written
    labels = [written[name] for name in names]
    with SummaryWriter(str(out / "tensorboard/table")) as writer, rc_context(for_figures.style):
        writer.add_text("results", valid_unicode(text))
        for name, figure in (("efficiency", efficiency_figure(blocks, written)),
                             ("calibration", calibration_figure(blocks, truth, written))):
            figure.savefig(out / f"{name}.png", dpi=150)
            writer.add_figure(name, figure)
        for block in blocks:
            for row in block.rows:
                tag = f"curves/{block.mode} {block.fraction:g}/{valid_unicode(row.init)}"
                writer.add_figure(tag, curves_figure(row.runs[0].probabilities, truth, labels))
