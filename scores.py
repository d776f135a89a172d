"""Scores of the predictions of stage 2, their intervals and comparisons. report.py makes a table
of them.

LabelScore has the scores of one label, CombinationScores those of one training's L labels and
their mean. A Row holds the CombinationScores of all draws of an initialisation, a Block the rows
of one table. `means` and `comparisons` turn a block into Mean and Comparison, the records of
results.json.

The bootstrap draws test patients, the same ones for every row, so differences between rows are
paired. Epochs, regularisation and thresholds are chosen on val. Truth is 1, 0 or NaN, which is
left out. A score is NaN if the class that it needs is missing.
"""
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, roc_curve

REPLICATES = 1000                       # of the bootstrap


# --------------------------------------------------------------------------------------------------
# Scores of one label.

def auroc(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve in each of R replicates of the images, (R,).

    scores (n,); truth (n,): 1, 0, and NaN, which is left out. counts (R, n): how often each
    image is in each replicate (default: one replicate, each image once). A tie counts half, as
    in Mann and Whitney's statistic. NaN if a replicate has one class only."""
    order = np.argsort(scores, kind="stable")
    order = order[~np.isnan(truth[order])]
    counts = np.ones((1, len(scores)), np.int16) if counts is None else counts
    if not 0 < truth[order].sum() < len(order):
        return np.full(len(counts), np.nan)
    # From the lowest score to the highest, in groups of equal scores: each positive beats the
    # negatives of lower groups, and half of those in its own.
    truth = truth[order]
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))        # of the groups
    areas = []
    for batch in np.split(counts, range(100, len(counts), 100)):            # to save memory
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
    """Area under the ROC curve in each of R replicates, (R,). A positive is compared only with
    negatives of its own fold. scores, truth, counts: see `auroc`; fold (n,).

    Folds are not mixed, because each is predicted by a regression of its own, and the scores of
    two regressions may differ in scale."""
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
    patient has no replicates: all would equal the test set, and the interval would be a point."""
    names, patient = np.unique(patients, return_inverse=True)
    if len(names) < 2:
        return np.ones((1, len(patients)), np.int16)
    uniform = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(0).multinomial(len(names), uniform, replicates)
    counts = np.concatenate([np.ones((1, len(names)), int), drawn])         # of patients
    return counts.astype(np.int16)[:, patient]


def nan_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean without NaN values; NaN, without a warning, if all values are NaN."""
    count = (~np.isnan(values)).sum(axis)
    return np.nansum(values, axis) / np.where(count, count, np.nan)


class Interval(NamedTuple):
    """A 95 % interval; both ends are NaN if there is none."""
    low: float
    high: float


def interval(replicates: np.ndarray) -> Interval:
    """The middle 95 % of the replicates of a score or a difference, without NaN."""
    finite = replicates[~np.isnan(replicates)]
    if not len(finite):
        return Interval(math.nan, math.nan)
    return Interval(*np.percentile(finite, [2.5, 97.5]).tolist())


def p_value(differences: np.ndarray) -> float:
    """Two-sided p for no difference, from the replicates (R,) of a paired difference.

    It is twice the share of replicates on the rarer side of 0. NaN if there are no replicates."""
    finite = differences[~np.isnan(differences)]
    tail = min((finite <= 0).sum(), (finite >= 0).sum()) + 1
    return min(1.0, 2 * float(tail) / (len(finite) + 1)) if len(finite) else math.nan


def youden(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold at which sensitivity + specificity is largest (Youden 1950): images are called
    positive from this score on. 0.5 if one class is missing.

    scores (n,); truth (n,) of 1, 0 and NaN, which is left out."""
    scores, truth = scores[~np.isnan(truth)], truth[~np.isnan(truth)]
    if not 0 < truth.sum() < len(truth):
        return 0.5
    false_rate, true_rate, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    gain = true_rate - false_rate
    return float(thresholds[1:][gain[1:].argmax()])             # the first threshold is infinite


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): the mean distance between probability and
    frequency, in bins of equal width. probabilities (n,); truth (n,) of 1 and 0."""
    if not len(truth):
        return math.nan
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of, probabilities - truth)).sum() / len(truth))


def val_score(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The score by which everything is chosen, larger is better; probabilities and truth (n, L).

    It is the mean AUROC over the labels, or minus the Brier score if no label has both classes.
    FloatingPointError if a prediction that is scored is not finite, because an AUROC would not
    show it: NaN is sorted like any other score."""
    if not np.isfinite(probabilities[~np.isnan(truth)]).all():
        raise FloatingPointError("some predictions for val are not finite; --precision fp32 may "
                                 "help")
    areas = [auroc(p, y) for p, y in zip(probabilities.T, truth.T)]
    mean = nan_mean(np.concatenate(areas))
    return float(mean if not np.isnan(mean) else -nan_mean((probabilities - truth).ravel() ** 2))


class LabelScore(NamedTuple):
    """How well one label was predicted."""
    columns: dict[str, float]           # its columns in results.json
    areas: np.ndarray                   # (1 + R,) AUROC, in the test set and in each replicate


def score(p: np.ndarray, y: np.ndarray, threshold: float, counts: np.ndarray) -> LabelScore:
    """All scores of one label; a score is NaN if the class that it needs is missing.

    p, y: (n,), NaN in y left out; counts: (1 + R, n) from patient_counts."""
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
# Scores of a combination, of a row and of a block. A combination is a mode, a fraction, an
# initialisation and a draw of the labelled images. A row of a table pools all draws of an
# initialisation. A block is a table: one mode, one fraction, all initialisations.

# The scores beside AUROC, in the order of the table's columns.
OVERALL = ("average_precision", "accuracy", "majority", "sensitivity", "specificity",
           "calibration_error")


@dataclass(frozen=True)
class GroundTruth:
    """What predictions are compared with."""
    names: list[str]                    # L labels
    exclusive: bool                     # whether the labels exclude each other
    val: np.ndarray                     # (n_val, L)
    test: np.ndarray                    # (n, L)
    counts: np.ndarray                  # (1 + R, n), see patient_counts


@dataclass(frozen=True)
class CombinationScores:
    """The scores of one combination on test, for L labels."""
    rows: list[dict[str, Any]]          # L rows of results.json
    areas: np.ndarray                   # (L + 1, 1 + R) AUROC of each label, and their mean
    peaks: np.ndarray                   # (L + 1,) best accuracy over the epochs, and the mean
    overall: dict[str, float]           # one number for each name in OVERALL
    probabilities: np.ndarray           # (n, L)


def score_combination(about: dict[str, Any], predictions: dict[str, Any],
                      truth: GroundTruth) -> CombinationScores:
    """All scores of one combination on test.

    about: its init, mode, fraction and seed; predictions: its entry in those of `report`."""
    val = predictions["val"].numpy()                                        # (n_val, L)
    test = predictions["test"].numpy()                                      # (n, L)
    epochs = None
    if "peaks" in predictions:
        epochs = predictions["peaks"].numpy()                               # (E, n, L)
    rows, areas = [], []
    for i, label in enumerate(truth.names):
        threshold = youden(val[:, i], truth.val[:, i])
        result = score(test[:, i], truth.test[:, i], threshold, truth.counts)
        peak = math.nan if epochs is None else peak_accuracy(epochs[..., i], truth.test[:, i])
        rows.append(about
                    | {"label": label, "n_train": predictions["n_train"][i],
                       "positives": predictions["positives"][i]}
                    | result.columns | {"peak_accuracy": peak})
        areas.append(result.areas)

    # Labels that exclude each other are also one question with one answer. The scores of that
    # question replace the means over the labels.
    overall = {name: label_mean(rows, name) for name in (*OVERALL, "peak_accuracy")}
    if truth.exclusive:
        overall |= class_scores(test, epochs, truth.test)
    peaks = [*(row["peak_accuracy"] for row in rows), overall.pop("peak_accuracy")]
    return CombinationScores(rows, with_mean(np.array(areas)), np.array(peaks), overall, test)


def score_folds(about: dict[str, Any], predictions: dict[str, Any],
                truth: GroundTruth) -> CombinationScores:
    """AUROC of a combination that was cross-validated; other scores are NaN.

    about: see `score_combination`. predictions: its entry in those of `report_folds`.
    truth.test: of all images, because each of them was predicted in one fold."""
    p, fold = predictions["predictions"].numpy(), predictions["fold"].numpy()   # (n, L), (n,)
    areas = np.array([auroc_in_folds(p[:, i], truth.test[:, i], truth.counts, fold)
                      for i in range(len(truth.names))])                    # (L, 1 + R)
    rows = []
    for label, area, y in zip(truth.names, areas, truth.test.T):
        low, high = interval(area[1:])
        rows.append(about | {
            "label": label, "n": int((~np.isnan(y)).sum()), "positives": int((y == 1).sum()),
            "auroc": float(area[0]), "auroc_low": low, "auroc_high": high})
    return CombinationScores(
        rows, with_mean(areas), peaks=np.full(len(areas) + 1, np.nan),
        overall={name: math.nan for name in OVERALL}, probabilities=p)


def peak_accuracy(epochs: np.ndarray, y: np.ndarray) -> float:
    """The best accuracy of E epochs: epochs (E, n) probabilities, y (n,) with NaN left out."""
    scored = ~np.isnan(y)
    return float(nan_mean((epochs[:, scored] >= 0.5) == y[scored], 1).max())


def label_mean(rows: list[dict[str, Any]], name: str) -> float:
    """The mean of a score over the labels that have it."""
    return float(nan_mean(np.array([row[name] for row in rows], float)))


def class_scores(test: np.ndarray, epochs: np.ndarray | None,
                 truth: np.ndarray) -> dict[str, float]:
    """Scores of C exclusive classes together; the prediction is the most probable class.

    test, truth (n, C), epochs (E, n, C). Only images that certainly belong to one class count."""
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
    """Append the mean to the AUROC of L labels: (L, 1 + R) -> (L + 1, 1 + R).

    The mean is over the labels that the test set can score, the same ones in every replicate. If
    a replicate lacks a class of one of them, its mean is NaN and the interval leaves it out."""
    scorable = ~np.isnan(areas[:, 0])
    mean = areas[scorable].mean(0) if scorable.any() else np.full(areas.shape[1], np.nan)
    return np.concatenate([areas, mean[None]])


@dataclass(frozen=True)
class Row:
    """An initialisation in a block: S combinations, which differ only in the draw."""
    init: str
    combinations: list[CombinationScores]

    @property
    def areas(self) -> np.ndarray:
        """(S, L + 1) AUROC of each draw on the test set."""
        return np.array([scores.areas[:, 0] for scores in self.combinations])

    @property
    def peaks(self) -> np.ndarray:
        """(S, L + 1) best accuracy of each draw over its epochs."""
        return np.array([scores.peaks for scores in self.combinations])

    @property
    def overall(self) -> np.ndarray:
        """(S, 6) the scores in OVERALL of each draw."""
        return np.array([[scores.overall[name] for name in OVERALL]
                         for scores in self.combinations])

    @functools.cached_property
    def pooled(self) -> np.ndarray:
        """(L + 1, 1 + R) AUROC in the test set and in each replicate, averaged over the draws.

        Because of this average the interval shows the effect of other test patients, and not of
        other training images."""
        return np.stack([scores.areas for scores in self.combinations]).mean(0)


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
    """A row's means over labels and draws, as in results.json; the interval is that of AUROC."""
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


def score_blocks(predictions: dict[tuple, dict], truth: GroundTruth,
                 score_of: Callable = score_combination) -> list[Block]:
    """All combinations in the order of the report; the keys are (mode, fraction, init, seed)."""
    modes, fractions, inits, seeds = (list(dict.fromkeys(axis)) for axis in zip(*predictions))

    def row(mode, fraction, init):
        return Row(init, [
            score_of({"init": init, "mode": mode, "fraction": fraction, "seed": seed},
                     predictions[mode, fraction, init, seed], truth)
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
