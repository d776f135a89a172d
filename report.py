"""How results are shown: tables in Markdown, figures, and the files that hold them.

scores.py computes the numbers of stage 2, cluster_eval.py those of stage 3, whose table and
figures use parts from here. Test labels decide nothing: `report` sees them only after everything
is trained and chosen.
"""
import contextlib
import functools
import itertools
import json
import logging
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import color_sequences, font_manager, rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from common import valid_unicode, write_text
from scores import (
    OVERALL, REPLICATES, Block, GroundTruth, auroc, calibration_error, comparisons, interval,
    means, nan_mean, patient_counts, score_blocks, score_folds)


# --------------------------------------------------------------------------------------------------
# Tables.

def cells(values: np.ndarray, bold: bool = True) -> list[list[str]]:
    """values (I, S, C) -> I rows of C cells: mean ± deviation over the S draws, the best of
    each column in bold, a dash if there is no value."""
    mean = nan_mean(values, 1)                                              # (I, C)
    spread = values.std(1, ddof=min(1, values.shape[1] - 1))
    best = np.fmax.reduce(mean)                                             # ignores NaN
    texts = np.full(mean.shape, "–", dtype=object)
    for where in zip(*np.nonzero(~np.isnan(mean))):
        text = f"{mean[where]:.3f}"
        # No ± if nothing varies: at 100 % of the labels all draws are the same images, and
        # `linear` fits the same classifier to them.
        if spread[where] > 1e-9:
            text += f" ± {spread[where]:.3f}"
        if bold and len(mean) > 1 and mean[where] == best[where[1]]:
            text = f"**{text}**"
        texts[where] = text
    return texts.tolist()


def markdown_table(rows: Iterable[list[str]]) -> str:
    """A table in Markdown, the header first. Characters that would end a cell or line are escaped
    or replaced."""
    header, *others = ([" ".join(cell.replace("|", r"\|").split()) for cell in row]
                       for row in rows)
    lines = [header, ["---"] * len(header), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def block_table(heading: str, columns: list[str], block: Block, rows: list[list[str]]) -> str:
    """A heading and a table, a row for each initialisation."""
    table = [["", *columns], *([init, *row] for init, row in zip(block.inits, rows))]
    return f"\n{heading}\n\n{markdown_table(table)}"


def auroc_table(block: Block, names: list[str], heading: str) -> str:
    """AUROC of each label and their mean, a row for each initialisation."""
    table = cells(np.stack([row.areas for row in block.rows]))
    for row, mean in zip(table, means(block)):
        row.append("–" if math.isnan(mean.low) else f"{mean.low:.3f} to {mean.high:.3f}")
    return block_table(heading, [*names, "mean", "95 % interval"], block, table)


def differences(block: Block, names: list[str]) -> str:
    """A line for each pair of initialisations: the difference of their means."""
    text, per_pair = "\n", len(names) + 1       # one record for each label, the mean's is last
    for pair in comparisons(block, names)[per_pair - 1::per_pair]:
        text += f"{pair.init} − {pair.against}: mean AUROC {pair.difference:+.3f} "
        if math.isnan(pair.low):
            text += "(no interval)\n"
        else:
            text += f"(95 % {pair.low:+.3f} to {pair.high:+.3f}, p = {pair.p:.2g})\n"
    return text


def block_text(block: Block, draws: list[str], truth: GroundTruth) -> str:
    """A block's tables and comparisons; draws: a sentence for each draw."""
    share = f"{100 * block.fraction:g} % of the labels"
    text = f"\n## {block.mode}, {share}\n\n{'; '.join(draws)}\n"
    text += auroc_table(block, truth.names, "AUROC on test")

    peaks = np.stack([row.peaks for row in block.rows])                     # (I, S, L + 1)
    if not np.isnan(peaks).all():
        heading = ("Peak test accuracy over the epochs, the published protocol: optimistic, as "
                   "test chooses the epoch")
        text += block_table(heading, [*truth.names, "mean"], block, cells(peaks))

    heading = "Means over the labels, thresholds chosen on val"
    if truth.exclusive:
        heading += ("; accuracy and majority of all classes together, the most probable one "
                    "called")
    overall = np.stack([row.overall for row in block.rows])                 # (I, S, 6)
    columns = [name.replace("_", " ") for name in OVERALL]
    text += block_table(heading, columns, block, cells(overall, bold=False))
    return text + differences(block, truth.names)


# --------------------------------------------------------------------------------------------------
# The text above the tables.

def preface(title: str, about: dict[str, Any], names: list[str], *sentences: str) -> str:
    """Title and first paragraph: data, labels, and an explanation of the numbers below."""
    labels = f"{len(names)} labels: {about['labels']}; -1 is never scored."
    return f"# {title}: {about['data']}\n\n{' '.join([labels, *sentences])}\n"


def intervals_sentence(blocks: list[Block], what: str = "test ") -> str:
    """How the intervals were computed."""
    # Which replicates have a mean depends only on the truth, and with folds on which patients are
    # in which fold. Both are the same for all rows, so look at the first one.
    mean = blocks[0].rows[0].pooled[-1]                                     # (1 + R,)
    if len(mean) == 1:
        return f"One {what}patient has no intervals and no p."
    complete = (~np.isnan(mean[1:])).sum()
    return (f"Intervals and p: the {what}patients drawn anew {REPLICATES} times, for all rows "
            f"alike; of the mean, the {complete} times that every label had both classes.")


# --------------------------------------------------------------------------------------------------
# Names as figures can write them.

LONGEST = 50            # letters of a name; longer ones would leave no room for the panel


class FigureText(NamedTuple):
    """Names as figures can write them."""
    style: dict[Any, Any]               # for rc_context: fonts that have all their characters
    written: dict[str, str]             # how figures write each name
    legend: str                         # the names that became numbers, for results.md, or ""


def figure_text(**names: list[str]) -> FigureText:
    """How figures write these names; the keyword says what they are: `label`, `row`.

    matplotlib's own font lacks Chinese, for example. Other fonts of this system are used for the
    characters that it lacks. A name becomes a number if no font has all of its characters,
    because it would be a row of empty boxes, or if it is longer than LONGEST letters."""
    families, drawable = list(rcParams["font.family"]), set()
    characters = {c for name in itertools.chain(*names.values()) for c in name}
    missing = {c for c in characters if not c.isspace()}
    for family in (None, *_other_fonts(missing)):
        if not missing:
            break
        found = missing & _characters(family)
        if found and family:
            families.append(family)
        drawable, missing = drawable | found, missing - found
    # Without a further library, matplotlib would write Arabic and Hebrew from left to right.
    drawable -= {c for c in drawable if unicodedata.bidirectional(c) in ("R", "AL")}

    written, numbers = {}, []
    for what, group in names.items():
        for number, name in enumerate(group, 1):
            words = name.split()
            if len(name) <= LONGEST and drawable >= set("".join(words)):
                # A dollar would begin a formula, and legends omit names that begin with _.
                text = " ".join(words).replace("$", r"\$")
                written[name] = f" {text}" if text.startswith("_") else text
            else:
                written[name] = f"{what} {number}"
                numbers.append(f"{what} {number} is {' '.join(words)}")
    legend = f"\nIn the figures {', '.join(numbers)}.\n" if numbers else ""
    return FigureText({"font.family": families}, written, legend)


def _other_fonts(characters: set[str]) -> Iterator[str]:
    """Font families of this system that have one of the characters, plain fonts first."""
    default = _characters(None)
    if characters <= default:
        return
    codes = {ord(c) for c in characters - default}
    entries = sorted(font_manager.fontManager.ttflist,
                     key=lambda entry: (entry.style != "normal", entry.weight != 400))
    for entry in entries:
        # Last Resort is a font of boxes.
        if not entry.name.startswith(("Last Resort", ".LastResort")):
            with contextlib.suppress(RuntimeError, OSError):        # a font that cannot be read
                if codes & FT2Font(entry.fname).get_charmap().keys():
                    yield entry.name


@functools.cache
def _characters(family: str | None) -> set[str]:
    """The characters of the font that matplotlib uses for a family; None: by default."""
    properties = font_manager.FontProperties(family=family)
    logger = logging.getLogger("matplotlib.font_manager")
    logger.disabled = True              # it would warn if a family has no plain weight
    try:
        file = font_manager.findfont(properties, fallback_to_default=family is None)
    except ValueError:
        return set()
    finally:
        logger.disabled = False
    return {chr(code) for code in FT2Font(file).get_charmap() if code < 0x110000}


# --------------------------------------------------------------------------------------------------
# Figures of stage 2.

# A panel with more lines has no legend: nobody could read it, and the picture would be too high.
MOST_ENTRIES = 100


def panels(rows: list[str], columns: list[str], entries: int,
           **style) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), in the common style of these figures.

    entries: how many lines the legend below each panel will have."""
    height = 5 + 0.18 * min(entries, MOST_ENTRIES)                          # inches
    figure = Figure((5 * len(columns), height * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for ax, (row, column) in zip(axes.flat, itertools.product(rows, columns)):
        ax.set(title=" ".join(filter(None, (row, column))), **style)
        ax.grid(alpha=0.3)
    return figure, axes


def legend_below(ax) -> None:
    """Put the legend under the label of the x axis, where even long names hide nothing."""
    if 0 < len(ax.lines) <= MOST_ENTRIES:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5, fontsize=8,
                  frameon=False)


def efficiency_figure(blocks: list[Block], written: dict[str, str]) -> Figure:
    """Mean AUROC against the share of the labels, a panel for each mode; written: see FigureText.

    The band is the test patients' 95 % interval; a dot is one draw of the labelled images."""
    modes = list(dict.fromkeys(block.mode for block in blocks))
    figure, axes = panels([""], modes, len(blocks[0].inits), xscale="log",
                          xlabel="share of the labels", ylabel="mean AUROC on test")
    for ax, mode in zip(axes[0], modes):
        points = sorted((block for block in blocks if block.mode == mode),
                        key=lambda block: block.fraction)
        x = np.array([block.fraction for block in points])                  # (F,)
        for i, init in enumerate(blocks[0].inits):
            dots = np.array([block.rows[i].areas[:, -1] for block in points])       # (F, S)
            low, high = zip(*(interval(block.rows[i].pooled[-1, 1:]) for block in points))
            ax.plot(x, nan_mean(dots, 1), "-o", color=f"C{i}", label=written[init])
            ax.plot(x, dots, ".", color=f"C{i}", alpha=0.5)
            ax.fill_between(x, low, high, color=f"C{i}", alpha=0.15)
        ax.set_xticks(x, [f"{100 * fraction:g} %" for fraction in x])
        ax.minorticks_off()
        legend_below(ax)
    return figure


def calibration_figure(blocks: list[Block], truth: np.ndarray,
                       written: dict[str, str]) -> Figure:
    """How often labels are present, against their predicted probability: a panel for each block, a
    line for each initialisation, all labels and draws together. truth (n, L)."""
    modes = list(dict.fromkeys(block.mode for block in blocks))
    fractions = list(dict.fromkeys(block.fraction for block in blocks))
    figure, axes = panels(modes, [f"{100 * fraction:g} %" for fraction in fractions],
                          1 + len(blocks[0].inits))
    for ax, block in zip(axes.flat, blocks):
        for row in block.rows:
            p = np.stack([scores.probabilities for scores in row.combinations])     # (S, n, L)
            y = np.broadcast_to(truth, p.shape)
            p, y = p[~np.isnan(y)], y[~np.isnan(y)]
            name = f"{written[row.init]}, error {calibration_error(p, y):.3f}"
            CalibrationDisplay.from_predictions(y, p, n_bins=15, ax=ax, name=name)
        ax.set(xlabel="probability", ylabel="share of positives")
        legend_below(ax)
    return figure


def curves_figure(probabilities: np.ndarray, truth: np.ndarray, names: list[str],
                  seed: int) -> Figure:
    """ROC and precision-recall curves, a line for each of L labels that has both classes.

    probabilities, truth (n, L); seed: of the draw, for the title."""
    figure, axes = panels([f"draw {seed}:"], ["ROC", "precision-recall"], len(names))
    roc, precision_recall = axes[0]
    for p, y, name in zip(probabilities.T, truth.T, names):
        p, y = p[~np.isnan(y)], y[~np.isnan(y)]
        if 0 < y.sum() < len(y):
            false_rate, true_rate, _ = roc_curve(y, p)
            roc.plot(false_rate, true_rate, label=f"{name}, area {auroc(p, y)[0]:.2f}")
            precision, recall, _ = precision_recall_curve(y, p)
            area = average_precision_score(y, p)
            precision_recall.plot(recall, precision, drawstyle="steps-post",
                                  label=f"{name}, area {area:.2f}")
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    precision_recall.set(xlabel="recall", ylabel="precision")
    for ax in axes.flat:
        legend_below(ax)
    return figure


# --------------------------------------------------------------------------------------------------
# Figures of stage 3. A cluster has the number of its class; clusters without a class come after.

@dataclass(frozen=True)
class Legend:
    """Names and colours of K clusters; the first C are those of the classes."""
    classes: int                        # C
    names: list[str]                    # (K,)
    colours: list                       # (K,); gray for clusters without a class


def cluster_legend(names: list[str], clusters: int) -> Legend:
    """names: of the C classes; clusters: their number K, at least C."""
    # Ten strong colours, then ten pale ones.
    hues = [*color_sequences["tab10"], *color_sequences["tab20"][1::2]]
    classes = range(len(names))
    extra = range(len(names), clusters)
    return Legend(len(names), [*names, *(f"cluster {c}" for c in extra)],
                  [*(hues[c % 20] for c in classes), *("lightgray" for _ in extra)])


def draw_map(axes: Axes, points: np.ndarray, values: np.ndarray, legend: Legend,
             what: str) -> None:
    """Draw points (m, 2) in the colours of their classes or clusters `values` (m,)."""
    # Clusters without a class share one entry in the legend.
    without_class = values[values >= legend.classes].min(initial=len(legend.names))
    for c in np.unique(values):
        name = None
        if c < legend.classes:
            name = legend.names[c]
        elif c == without_class:
            name = "other clusters"
        axes.scatter(*points[values == c].T, s=14, linewidths=0, alpha=0.8,
                     color=legend.colours[c], label=name)
    axes.set(title=f"t-SNE of {len(points):,} images, by {what}", xticks=[], yticks=[])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=8,
                frameon=False, markerscale=2)


def draw_table(axes: Axes, table: np.ndarray, legend: Legend) -> None:
    """Draw the contingency table (C, K), shaded by the share of the class."""
    axes.imshow(table / table.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1.5,
                aspect="auto")
    # With more columns there is no room for numbers and names.
    readable = table.shape[1] <= 30
    if readable:
        for (row, column), n in np.ndenumerate(table):
            axes.text(column, row, f"{n:.0f}", ha="center", va="center")
    axes.set(title="images of class and cluster", xlabel="cluster, named by its class",
             yticks=range(legend.classes), yticklabels=legend.names[:legend.classes])
    axes.set_xticks(range(len(legend.names)), legend.names, rotation=45, ha="right",
                    rotation_mode="anchor")
    axes.tick_params(axis="x", labelbottom=readable)


def draw_sheet(axes: Axes, pictures: Tensor, classes: np.ndarray, numbers: np.ndarray,
               legend: Legend) -> None:
    """Draw a row of eight pictures for each of R clusters: pictures (8 R, 1, S, S) in [0, 1], their
    classes (8 R,), and the clusters' numbers (R,)."""
    size = pictures.shape[-1] + 2               # make_grid puts 2 pixels between them
    row, column = np.divmod(np.arange(len(pictures)), 8)
    axes.imshow(make_grid(pictures, nrow=8)[0].numpy(), cmap="gray", vmin=0, vmax=1)
    axes.scatter(column * size + 16, row * size + 16, s=40,
                 c=[legend.colours[c] for c in classes])
    axes.set(title="nearest to each centre; the dot is the class", xticks=[],
             yticks=np.arange(len(numbers)) * size + size / 2,
             yticklabels=[legend.names[c] for c in numbers])


def sweep_figure(curves: dict[str, dict[str, list]], classes: int,
                 written: dict[str, str]) -> Figure:
    """Silhouette and inertia against k, a line for each row; written: see FigureText."""
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("silhouette", "inertia")):
        for init, curve in curves.items():
            axes.plot(curve["k"], curve[score], "o-", label=written[init])
        axes.set(xlabel=f"k, clusters (there are {classes} classes)", title=score)
        if score == "inertia":
            axes.set_yscale("log")              # inertias of different rows differ a lot
        legend_below(axes)
    return figure


# --------------------------------------------------------------------------------------------------
# Files.

def write_json(path: Path, results: dict) -> None:
    """Replace a results.json as a whole. NaN becomes null, because JSON has no NaN."""
    results = json.loads(json.dumps(results), parse_constant=lambda constant: None)
    write_text(path, json.dumps(results, indent=1) + "\n")


def write_results(out: Path, about: dict, text: str, blocks: list[Block],
                  names: list[str]) -> None:
    """Print `text`, which has the tables, and write it to results.md. Write the numbers to
    results.json."""
    print("\n" + text)
    write_text(out / "results.md", text)
    rows = [row for block in blocks for row in block.rows]
    write_json(out / "results.json", about | {
        "results": [label for row in rows for scores in row.combinations
                    for label in scores.rows],
        "means": [asdict(mean) for block in blocks for mean in means(block)],
        "comparisons": [asdict(pair) for block in blocks
                        for pair in comparisons(block, names)]})


def write_figures(out: Path, text: str, blocks: list[Block], truth: np.ndarray,
                  labels: list[str], for_figures: FigureText) -> None:
    """Write the figures of all combinations as PNG; and these, the text and each row's curves to
    TensorBoard. truth (n, L); labels: L names as figures write them."""
    written = for_figures.written
    with (SummaryWriter(str(out / "tensorboard/table")) as writer,
          rc_context(for_figures.style)):
        writer.add_text("results", valid_unicode(text))
        for name, figure in (("efficiency", efficiency_figure(blocks, written)),
                             ("calibration", calibration_figure(blocks, truth, written))):
            figure.savefig(out / f"{name}.png", dpi=150)
            writer.add_figure(name, figure)
        for block in blocks:
            for row in block.rows:
                tag = f"curves/{block.mode} {block.fraction:g}/{valid_unicode(row.init)}"
                first = row.combinations[0]
                seed = first.rows[0]["seed"]
                writer.add_figure(tag, curves_figure(first.probabilities, truth, labels, seed))


def report_folds(out: Path, about: dict, predictions: dict[tuple, dict], names: list[str],
                 truth: np.ndarray, patients: np.ndarray) -> None:
    """Write results.json and results.md of a cross-validation, and print the table.

    about: `data`, `labels` and the number of `folds`. predictions: for every combination (mode,
    fraction, init, seed) the `predictions` (n, L) and the `fold` (n,) of all images; each image
    is predicted by the regression that has not seen its fold. names: of the L labels.
    truth (n, L), patients (n,)."""
    counts = patient_counts(patients, REPLICATES)
    ground_truth = GroundTruth(names, False, truth, truth, counts)
    blocks = score_blocks(predictions, ground_truth, score_folds)
    text = preface(
        "Cross-validated", about, names,
        f"{len(truth)} images of {len(set(patients))} patients, train and val together; no "
        f"image of test was read. Each seed deals the patients to {about['folds']} folds. A "
        "fold is predicted by a logistic regression on frozen features that has not seen it: "
        "the next fold chose the regularisation, and the share of the labels was drawn from "
        "the patients of the others, with one more patient for each class of a label that the "
        "share lacked. AUROC compares images of the same fold. Mean ± deviation over the "
        "seeds.", intervals_sentence(blocks, ""))
    for block in blocks:
        text += auroc_table(block, names, f"## {100 * block.fraction:g} % of the labels")
        text += differences(block, names)
    write_results(out, about, text, blocks, names)


def report(out: Path, about: dict, predictions: dict[tuple, dict], names: list[str],
           val_truth: np.ndarray, truth: np.ndarray, patients: np.ndarray) -> None:
    """Write results.json, results.md and the figures, and print the table. Only here, after all is
    trained and chosen, are predictions compared with test labels.

    about: results.json's facts about all combinations: `data`, `kind`, `labels`, and `draws`,
    which has a sentence about each draw for each fraction.
    predictions: for every combination (mode, fraction, init, seed) the probabilities `val`
    (n_val, L) and `test` (n, L); with --peak also `peaks` (E, n, L), those of test after each
    epoch; and for each label `n_train` and `positives`, how many training images it had.
    names: of the L labels. val_truth (n_val, L); truth (n, L) and patients (n,), of test."""
    counts = patient_counts(patients, REPLICATES)
    ground_truth = GroundTruth(names, about["kind"] == "exclusive", val_truth, truth, counts)
    blocks = score_blocks(predictions, ground_truth)
    text = preface(
        "What pre-training buys", about, names,
        f"{len(truth)} test images of {len(set(patients))} patients. Epoch, regularisation and "
        f"thresholds are chosen on val: {len(val_truth)} labelled images beyond the fraction. "
        "Mean ± deviation over the draws.", intervals_sentence(blocks))
    for block in blocks:
        text += block_text(block, about["draws"][block.fraction], ground_truth)
    for_figures = figure_text(label=names, row=blocks[0].inits)
    text += for_figures.legend
    write_results(out, about, text, blocks, names)
    labels = [for_figures.written[name] for name in names]
    write_figures(out, text, blocks, truth, labels, for_figures)
