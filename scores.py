"""From predictions to a table that can be trusted: scores of stage 2, their
intervals, comparisons and figures.

Test images are drawn anew by patient, the same draws for every row, so that a difference
between two rows is a paired one. What is chosen (epochs, regularisation, thresholds) is
chosen on val; `report`, at the end, is where the test labels come in.

The file has four parts, and each needs only those before it: numbers, text, figures, files.
Truth is 1, 0 or NaN, which is left out; a score that lacks the class it needs is NaN, too.
"""
import contextlib
import functools
import itertools
import json
import logging
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve
from torch.utils.tensorboard import SummaryWriter

from common import valid_unicode, write_text

REPLICATES = 1000                       # of the bootstrap


# --------------------------------------------------------------------------------------------------
# Numbers: one score of one label.

def auroc(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve in each of R replicates of the images, (R,).

    scores (n,); truth (n,): 1, 0, and NaN, which is left out. counts (R, n): how often each
    image is in each replicate (default: once, in one). A tie counts half, as in Mann and
    Whitney's statistic. NaN where a replicate has one class only."""
    order = np.argsort(scores, kind="stable")
    order = order[~np.isnan(truth[order])]
    counts = np.ones((1, len(scores)), np.int16) if counts is None else counts
    if not 0 < truth[order].sum() < len(order):
        return np.full(len(counts), np.nan)
    # From the lowest score to the highest, equal scores together: each positive beats the
    # negatives below it and half of those beside it.
    truth = truth[order]
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))        # of equal scores
    areas = []
    for batch in np.split(counts, range(100, len(counts), 100)):            # for memory's sake
        counts_in_order = batch[:, order]
        positive = np.add.reduceat(counts_in_order * truth, starts, axis=1, dtype=np.float64)
        negative = np.add.reduceat(counts_in_order * (1 - truth), starts, axis=1,
                                   dtype=np.float64)
        beaten = negative.cumsum(1) - negative / 2
        with np.errstate(invalid="ignore"):
            areas.append((positive * beaten).sum(1) / (positive.sum(1) * negative.sum(1)))
    return np.concatenate(areas)


def auroc_in_folds(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray,
                   fold: np.ndarray) -> np.ndarray:
    """The same, (R,), where only images of the same fold are compared; fold (n,).

    Each fold is predicted by a regression of its own, and the scores of two regressions need not
    be on one scale."""
    areas, pairs = [], []
    for k in np.unique(fold):
        y, counts_in_fold = truth[fold == k], counts[:, fold == k]
        areas.append(auroc(scores[fold == k], y, counts_in_fold))
        pairs.append((counts_in_fold @ (y == 1.0).astype(float))
                     * (counts_in_fold @ (y == 0.0).astype(float)))
    weights = np.array(pairs)                                               # (K, R)
    with np.errstate(invalid="ignore"):
        return np.nansum(areas * weights, 0) / weights.sum(0)


def patient_counts(patients: np.ndarray, replicates: int) -> np.ndarray:
    """How often each of n images counts in a bootstrap over patients, (1 + replicates, n).

    The first row is the test set itself, every image once; then come the replicates. A single
    patient has none: its replicates would all be the test set, and their interval a point."""
    names, patient = np.unique(patients, return_inverse=True)
    if len(names) < 2:
        return np.ones((1, len(patients)), np.int16)
    uniform = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(0).multinomial(len(names), uniform, replicates)
    counts = np.concatenate([np.ones((1, len(names)), int), drawn])         # of patients
    return counts.astype(np.int16)[:, patient]


def nan_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of what is not NaN; NaN, without a warning, where everything is."""
    count = (~np.isnan(values)).sum(axis)
    return np.nansum(values, axis) / np.where(count, count, np.nan)


class Interval(NamedTuple):
    """A 95 % interval; NaN and NaN where there is none."""
    low: float
    high: float


def interval(replicates: np.ndarray) -> Interval:
    """The middle 95 % of a score's or a difference's replicates, those left out that are NaN."""
    finite = replicates[~np.isnan(replicates)]
    if not len(finite):
        return Interval(math.nan, math.nan)
    return Interval(*np.percentile(finite, [2.5, 97.5]).tolist())


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of there being no difference, from the replicates (R,) of a paired difference.

    It is how often they lie on the other side of 0. NaN where there is no replicate."""
    finite = differences[~np.isnan(differences)]
    tail = min((finite <= 0).sum(), (finite >= 0).sum()) + 1
    return min(1.0, 2 * float(tail) / (len(finite) + 1)) if len(finite) else math.nan


def youden(scores: np.ndarray, truth: np.ndarray) -> float:
    """The score from which on to call an image positive, so that sensitivity + specificity is
    largest (Youden 1950); 0.5 where one class is missing.

    scores (n,); truth (n,) of 1, 0 and NaN, which is left out."""
    scores, truth = scores[~np.isnan(truth)], truth[~np.isnan(truth)]
    if not 0 < truth.sum() < len(truth):
        return 0.5
    false_rate, true_rate, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    gain = true_rate - false_rate
    return float(thresholds[1:][gain[1:].argmax()])             # the first threshold is infinite


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017) of n images, truth (n,) of 1 and 0.

    It is the mean distance of probability and frequency in bins of equal width."""
    if not len(truth):
        return math.nan
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of, probabilities - truth)).sum() / len(truth))


def val_score(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """What everything is chosen by, larger is better; probabilities and truth (n, L).

    Mean AUROC over the labels; minus the Brier score where no label has both classes."""
    areas = [auroc(p, y) for p, y in zip(probabilities.T, truth.T)]
    mean = nan_mean(np.concatenate(areas))
    return float(mean if not np.isnan(mean) else -nan_mean((probabilities - truth).ravel() ** 2))


class LabelScore(NamedTuple):
    """How well one label was predicted."""
    columns: dict[str, float]           # its part of a row of results.json
    areas: np.ndarray                   # (1 + R,) AUROC, in the test set and in each replicate


def score(p: np.ndarray, y: np.ndarray, threshold: float, counts: np.ndarray) -> LabelScore:
    """All scores of one label, NaN where one lacks the class it needs.

    p, y: (n,), NaN in y left out; counts: (1 + R, n) of patient_counts."""
    areas = auroc(p, y, counts)
    low, high = interval(areas[1:])
    p, y = p[~np.isnan(y)], y[~np.isnan(y)]
    called, prevalence = p >= threshold, float(nan_mean(y))
    both_classes = 0 < prevalence < 1
    return LabelScore({
        "n_test": len(y), "test_positives": int(y.sum()),
        "auroc": float(areas[0]), "auroc_low": low, "auroc_high": high,
        "average_precision": float(average_precision_score(y, p)) if both_classes else math.nan,
        "accuracy": float(nan_mean(called == y)),
        "majority": max(prevalence, 1 - prevalence),
        "sensitivity": float(nan_mean(called[y == 1])),
        "specificity": float(nan_mean(~called[y == 0])),
        "threshold": threshold,
        "calibration_error": calibration_error(p, y)}, areas)


# --------------------------------------------------------------------------------------------------
# Numbers of a run, of a row and of a block. A run is one combination of mode, fraction,
# initialisation and draw of the labelled images; a row of a table pools an initialisation's
# draws; a block is a table: one mode at one fraction, all initialisations.

# The scores beside AUROC, in the order of the table's columns.
OVERALL = ("average_precision", "accuracy", "majority", "sensitivity", "specificity",
           "calibration_error")


@dataclass(frozen=True)
class GroundTruth:
    """What predictions are compared with."""
    names: list[str]                    # L labels
    exclusive: bool                     # whether they exclude each other
    val: np.ndarray                     # (n_val, L)
    test: np.ndarray                    # (n, L)
    counts: np.ndarray                  # (1 + R, n), see patient_counts


@dataclass(frozen=True)
class RunScores:
    """What one run achieved on test, for L labels."""
    rows: list[dict[str, Any]]          # L rows of results.json
    areas: np.ndarray                   # (L + 1, 1 + R) AUROC of each label, and their mean
    peaks: np.ndarray                   # (L + 1,) best accuracy of all epochs, and the mean
    overall: dict[str, float]           # one number for each name in OVERALL
    probabilities: np.ndarray           # (n, L)


def score_run(about: dict[str, Any], run: dict[str, Any], truth: GroundTruth) -> RunScores:
    """All scores of one run on test.

    about: its init, mode, fraction and seed; run: what `report` is given of it."""
    val, test = run["val"].numpy(), run["test"].numpy()                     # (n_val, L), (n, L)
    epochs = run["peaks"].numpy() if "peaks" in run else None               # (E, n, L)
    rows, areas = [], []
    for i, label in enumerate(truth.names):
        threshold = youden(val[:, i], truth.val[:, i])
        result = score(test[:, i], truth.test[:, i], threshold, truth.counts)
        peak = math.nan if epochs is None else peak_accuracy(epochs[..., i], truth.test[:, i])
        rows.append(about
                    | {"label": label, "n_train": run["n_train"][i],
                       "positives": run["positives"][i]}
                    | result.columns | {"peak_accuracy": peak})
        areas.append(result.areas)

    # Labels that exclude each other are also one question with one answer: where that has a
    # score, it stands for the mean over the labels.
    means = {name: label_mean(rows, name) for name in (*OVERALL, "peak_accuracy")}
    if truth.exclusive:
        means |= class_scores(test, epochs, truth.test)
    peaks = [*(row["peak_accuracy"] for row in rows), means.pop("peak_accuracy")]
    return RunScores(rows, with_mean(np.array(areas)), np.array(peaks), means, test)


def peak_accuracy(epochs: np.ndarray, y: np.ndarray) -> float:
    """The best of E epochs' accuracies: epochs (E, n) probabilities, y (n,) with NaN left out."""
    scored = ~np.isnan(y)
    return float(nan_mean((epochs[:, scored] >= 0.5) == y[scored], 1).max())


def label_mean(rows: list[dict[str, Any]], name: str) -> float:
    """A score's mean over the labels that have it."""
    return float(nan_mean(np.array([row[name] for row in rows], float)))


def class_scores(test: np.ndarray, epochs: np.ndarray | None,
                 truth: np.ndarray) -> dict[str, float]:
    """Scores of C exclusive classes together, the most probable one called.

    test, truth (n, C), epochs (E, n, C). Only images count that belong to one class for
    certain."""
    certain = np.nansum(truth, 1) == 1
    classes = np.nan_to_num(truth[certain]).argmax(1)

    def accuracies(p):
        """p (E, n, C) -> (E,)"""
        return nan_mean(p[:, certain].argmax(2) == classes, 1)

    frequencies = nan_mean(np.eye(truth.shape[1])[classes])                 # (C,)
    return {"accuracy": float(accuracies(test[None])[0]),
            "majority": float(frequencies.max()),
            "peak_accuracy": math.nan if epochs is None else float(accuracies(epochs).max())}


def with_mean(areas: np.ndarray) -> np.ndarray:
    """AUROC of L labels, (L, 1 + R), and after them their mean, (L + 1, 1 + R).

    The mean is over the labels that the test set can score, the same ones in every replicate.
    A replicate that lacks a class of any of them has no mean, and so no say in its interval."""
    scorable = ~np.isnan(areas[:, 0])
    mean = areas[scorable].mean(0) if scorable.any() else np.full(areas.shape[1], np.nan)
    return np.concatenate([areas, mean[None]])


@dataclass(frozen=True)
class Row:
    """An initialisation in a block: its runs, which differ in the draw of the labelled images."""
    init: str
    runs: list[RunScores]               # S of them

    @property
    def draws(self) -> np.ndarray:
        """(S, L + 1) AUROC on the test set of each draw."""
        return np.array([run.areas[:, 0] for run in self.runs])

    @property
    def peaks(self) -> np.ndarray:
        """(S, L + 1) best accuracy of all epochs of each draw."""
        return np.array([run.peaks for run in self.runs])

    @property
    def overall(self) -> np.ndarray:
        """(S, 6) the scores OVERALL of each draw."""
        return np.array([[run.overall[name] for name in OVERALL] for run in self.runs])

    @functools.cached_property
    def pooled(self) -> np.ndarray:
        """(L + 1, 1 + R) AUROC in the test set and in each replicate, averaged over the draws.

        The average comes before the interval, which therefore says what other test patients
        would show, and not what other training images would."""
        return np.stack([run.areas for run in self.runs]).mean(0)


@dataclass(frozen=True)
class Block:
    """One mode at one fraction of the labels: the table that compares initialisations."""
    mode: str
    fraction: float
    rows: list[Row]

    @property
    def inits(self) -> list[str]:
        return [row.init for row in self.rows]


@dataclass(frozen=True)
class Mean:
    """A row's means over labels and draws, as in results.json; the interval is AUROC's."""
    mode: str
    fraction: float
    init: str
    auroc: float
    low: float
    high: float
    average_precision: float
    accuracy: float
    majority: float
    sensitivity: float
    specificity: float
    calibration_error: float


@dataclass(frozen=True)
class Comparison:
    """AUROC of one initialisation minus another's, on the same patients, as in results.json."""
    mode: str
    fraction: float
    init: str
    against: str
    label: str                          # a label, or "mean"
    difference: float
    low: float
    high: float
    p: float


def score_folds(about: dict[str, Any], run: dict[str, Any], truth: GroundTruth) -> RunScores:
    """AUROC of a run that was cross-validated, and no other score; arguments as of `score_run`,
    and `truth.test` is of the images that were predicted in turn."""
    p, fold = run["predictions"].numpy(), run["fold"].numpy()               # (n, L), (n,)
    areas = np.array([auroc_in_folds(p[:, i], truth.test[:, i], truth.counts, fold)
                      for i in range(len(truth.names))])                    # (L, 1 + R)
    rows = []
    for label, area, y in zip(truth.names, areas, truth.test.T):
        low, high = interval(area[1:])
        rows.append(about | {
            "label": label, "n": int((~np.isnan(y)).sum()), "positives": int((y == 1).sum()),
            "auroc": float(area[0]), "auroc_low": low, "auroc_high": high})
    return RunScores(rows, with_mean(areas), peaks=np.full(len(areas) + 1, np.nan),
                     overall={name: math.nan for name in OVERALL}, probabilities=p)


def score_blocks(runs: dict[tuple, dict], truth: GroundTruth,
                 score_of: Callable = score_run) -> list[Block]:
    """All runs in the order of the report; the keys are (mode, fraction, init, seed)."""
    modes, fractions, inits, seeds = (list(dict.fromkeys(axis)) for axis in zip(*runs))

    def row(mode, fraction, init):
        return Row(init, [
            score_of({"init": init, "mode": mode, "fraction": fraction, "seed": seed},
                     runs[mode, fraction, init, seed], truth)
            for seed in seeds])

    return [Block(mode, fraction, [row(mode, fraction, init) for init in inits])
            for mode, fraction in itertools.product(modes, fractions)]


def means(block: Block) -> list[Mean]:
    """One record for each initialisation."""
    records = []
    for row in block.rows:
        area = row.pooled[-1]                                               # (1 + R,)
        overall = [float(value) for value in nan_mean(row.overall)]
        records.append(Mean(block.mode, block.fraction, row.init, float(area[0]),
                            *interval(area[1:]), **dict(zip(OVERALL, overall))))
    return records


def comparisons(block: Block, names: list[str]) -> list[Comparison]:
    """One record for each pair of initialisations and each label, the pair's mean last."""
    records = []
    for other, row in itertools.combinations(block.rows, 2):
        for label, difference in zip((*names, "mean"), row.pooled - other.pooled):     # (1 + R,)
            records.append(Comparison(
                block.mode, block.fraction, row.init, other.init, label, float(difference[0]),
                *interval(difference[1:]), p_value(difference[1:])))
    return records


# --------------------------------------------------------------------------------------------------
# Text: results.md.

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
    """What the numbers below it are."""
    return (
        f"# What pre-training buys: {about['data']}\n\n"
        f"{len(truth.names)} labels: {about['labels']}; -1 is never scored. "
        f"{len(truth.test)} test images of {len(set(patients))} patients. "
        "Epoch, regularisation and thresholds are chosen on val: "
        f"{len(truth.val)} labelled images beyond the fraction. "
        f"Mean ± deviation over the draws. {intervals}\n")


def folds_preface(about: dict[str, Any], truth: GroundTruth, patients: np.ndarray,
                  intervals: str) -> str:
    """The same where there is cross-validation."""
    return (
        f"# Cross-validated: {about['data']}\n\n"
        f"{len(truth.names)} labels: {about['labels']}; -1 is never scored. "
        f"{len(truth.test)} images of {len(set(patients))} patients, train and val together; no "
        f"image of test was read. Each seed deals the patients to {about['folds']} folds. A fold "
        "is predicted by a logistic regression on frozen features that has not seen it: the next "
        "fold chose the regularisation, and the share of the labels was drawn from the patients "
        "of the others, with one more patient for each class of a label that the share lacked. "
        "AUROC compares images of the same fold. "
        f"Mean ± deviation over the seeds. {intervals}\n")


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
# Figures.

class FigureText(NamedTuple):
    """Names as figures can write them."""
    style: dict[Any, Any]               # for rc_context: fonts that have all their characters
    written: dict[str, str]             # what stands in figures for each name
    legend: str                         # the names behind numbers, for results.md, or nothing


def figure_text(**names: list[str]) -> FigureText:
    """How figures write these names; the keyword says what they are: `label`, `row`.

    The font that matplotlib brings has no Chinese, to name one. Where another font of this
    system has the characters, it writes them; a name for which none has them would be a row of
    empty boxes, and becomes a number."""
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
    # Without a library for it, matplotlib would write Arabic and Hebrew from the left.
    drawable -= {c for c in drawable if unicodedata.bidirectional(c) in ("R", "AL")}

    written, numbers = {}, []
    for what, group in names.items():
        for number, name in enumerate(group, 1):
            words = name.split()
            if drawable >= set("".join(words)):
                # A dollar would begin a formula, and a legend leaves out what begins with _.
                text = " ".join(words).replace("$", r"\$")
                written[name] = f" {text}" if text.startswith("_") else text
            else:
                written[name] = f"{what} {number}"
                numbers.append(f"{what} {number} is {' '.join(words)}")
    legend = f"\nIn the figures {', '.join(numbers)}.\n" if numbers else ""
    return FigureText({"font.family": families}, written, legend)


def _other_fonts(characters: set[str]) -> Iterator[str]:
    """Families of this system's fonts that have one of the characters, plain ones first."""
    default = _characters(None)
    if characters <= default:
        return
    codes = {ord(c) for c in characters - default}
    entries = sorted(font_manager.fontManager.ttflist,
                     key=lambda entry: (entry.style != "normal", entry.weight != 400))
    for entry in entries:
        # The last resort is a font of boxes.
        if not entry.name.startswith(("Last Resort", ".LastResort")):
            with contextlib.suppress(RuntimeError, OSError):        # not a font that can be read
                if codes & FT2Font(entry.fname).get_charmap().keys():
                    yield entry.name


@functools.cache
def _characters(family: str | None) -> set[str]:
    """What the font has that matplotlib takes for a family, or by default."""
    properties = font_manager.FontProperties(family=family)
    logger = logging.getLogger("matplotlib.font_manager")
    logger.disabled = True              # it would report that a family has no plain weight
    try:
        file = font_manager.findfont(properties, fallback_to_default=family is None)
    except ValueError:
        return set()
    finally:
        logger.disabled = False
    return {chr(code) for code in FT2Font(file).get_charmap() if code < 0x110000}


# A panel of more lines has no legend: nobody could read it, and no picture is that high.
MOST_ENTRIES = 100


def panels(rows: list[str], columns: list[str], entries: int,
           **style) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), in the one style of all figures.

    entries: how many lines the legend below each panel will have."""
    height = 5 + 0.18 * min(entries, MOST_ENTRIES)                          # inches
    figure = Figure((5 * len(columns), height * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for ax, (row, column) in zip(axes.flat, itertools.product(rows, columns)):
        ax.set(title=" ".join(filter(None, (row, column))), **style)
        ax.grid(alpha=0.3)
    return figure, axes


def legend_below(ax) -> None:
    """Where it hides nothing, however long the names: under the label of the x axis."""
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
            dots = np.array([block.rows[i].draws[:, -1] for block in points])       # (F, S)
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
    """How often a label is present when it was given a probability: a panel for each block, a
    line for each initialisation, all labels and draws together. truth (n, L)."""
    modes = list(dict.fromkeys(block.mode for block in blocks))
    fractions = list(dict.fromkeys(block.fraction for block in blocks))
    figure, axes = panels(modes, [f"{100 * fraction:g} %" for fraction in fractions],
                          1 + len(blocks[0].inits))
    for ax, block in zip(axes.flat, blocks):
        for row in block.rows:
            p = np.stack([run.probabilities for run in row.runs])           # (S, n, L)
            y = np.broadcast_to(truth, p.shape)
            p, y = p[~np.isnan(y)], y[~np.isnan(y)]
            name = f"{written[row.init]}, error {calibration_error(p, y):.3f}"
            CalibrationDisplay.from_predictions(y, p, n_bins=15, ax=ax, name=name)
        ax.set(xlabel="probability", ylabel="share of positives")
        legend_below(ax)
    return figure


def curves_figure(probabilities: np.ndarray, truth: np.ndarray, names: list[str]) -> Figure:
    """ROC and precision-recall curves, a line for each of L labels that has both classes.

    probabilities, truth (n, L)."""
    figure, axes = panels([""], ["ROC", "precision-recall"], len(names))
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
    text = folds_preface(about, ground_truth, patients, intervals_sentence(blocks, ""))
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
