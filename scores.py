"""From predictions to a table that can be trusted: scores of stage 2, their intervals, comparisons and figures.

Test images are drawn anew by patient, the same draws for every row, so that a difference between two rows is a paired
one. What is chosen (epochs, regularisation, thresholds) is chosen on val; `report` is where the test labels come in.
Truth is 1, 0 or NaN, which is left out; a score that lacks the class it needs is NaN, too.
"""
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay, average_precision_score, roc_curve
from torch.utils.tensorboard import SummaryWriter

REPLICATES = 1000                       # of the bootstrap


def auroc(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, ties half: scores (n,), truth (n,) of 1, 0 and NaN, left out, counts (R, n) of how
    often each image is in each of R replicates (default: once, in one). Returns (R,), NaN where there is one class."""
    order = np.argsort(scores, kind="stable")
    order = order[~np.isnan(truth[order])]
    counts = np.ones((1, len(scores)), np.int16) if counts is None else counts
    if not 0 < truth[order].sum() < len(order):
        return np.full(len(counts), np.nan)
    truth, ties = truth[order], np.flatnonzero(np.diff(scores[order], prepend=-np.inf))         # first of equal scores
    areas = []
    for some in np.split(counts, range(100, len(counts), 100)):                                 # for memory's sake
        positive = np.add.reduceat(some[:, order] * truth, ties, axis=1, dtype=np.float64)
        negative = np.add.reduceat(some[:, order] * (1 - truth), ties, axis=1, dtype=np.float64)
        below = negative.cumsum(1) - negative / 2                                               # Mann and Whitney's
        with np.errstate(invalid="ignore"):
            areas.append((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))
    return np.concatenate(areas)


def patient_counts(patients: np.ndarray, replicates: int) -> np.ndarray:
    """Bootstrap over patients: how often each of n images counts in the test set itself, once, and in each replicate,
    (1 + replicates, n)."""
    names, patient = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), replicates)
    return np.concatenate([np.ones((1, len(names)), int), drawn]).astype(np.int16)[:, patient]


def nan_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of what is not NaN, silently NaN where that is nothing."""
    count = (~np.isnan(values)).sum(axis)
    return np.nansum(values, axis) / np.where(count, count, np.nan)


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of a score's or a difference's replicates, those left out that are NaN."""
    finite = replicates[~np.isnan(replicates)]
    return tuple(np.percentile(finite, [2.5, 97.5]).tolist()) if len(finite) else (math.nan, math.nan)


def p_value(differences: np.ndarray) -> float:
    """Of there being no difference, two-sided: how often the replicates of a paired difference (R,) lie beyond 0."""
    finite = differences[~np.isnan(differences)]
    tail = min((finite <= 0).sum(), (finite >= 0).sum()) + 1
    return min(1.0, 2 * float(tail) / (len(finite) + 1)) if len(finite) else math.nan


def youden(scores: np.ndarray, truth: np.ndarray) -> float:
    """The score from which on to call an image positive, so that sensitivity + specificity is largest (Youden 1950);
    0.5 where one class is missing. scores (n,), truth (n,) of 1, 0 and NaN."""
    scores, truth = scores[~np.isnan(truth)], truth[~np.isnan(truth)]
    if not 0 < truth.sum() < len(truth):
        return 0.5
    false, true, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    return float(thresholds[1:][(true - false)[1:].argmax()])                           # the first is infinite


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): the mean distance of probability and frequency in equal bins."""
    if not len(truth):
        return math.nan
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(which, probabilities - truth)).sum() / len(truth))


def val_score(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """What everything is chosen by: mean AUROC over the labels; where none has both classes, minus the Brier score."""
    mean = nan_mean(np.concatenate([auroc(p, y) for p, y in zip(probabilities.T, truth.T)]))
    return float(mean if not np.isnan(mean) else -nan_mean((probabilities - truth).ravel() ** 2))


def score(p: np.ndarray, y: np.ndarray, threshold: float, counts: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """One label's part of a row of results.json, and its AUROC in the test set and in each replicate, (1 + R,).

    p, y: (n,), NaN in y left out; counts: (1 + R, n) of patient_counts. NaN where a score lacks the class it needs."""
    areas, known = auroc(p, y, counts), ~np.isnan(y)
    low, high = interval(areas[1:])
    p, y = p[known], y[known]
    called, share = p >= threshold, float(nan_mean(y))
    return {"n_test": len(y), "test_positives": int(y.sum()), "auroc": float(areas[0]), "auroc_low": low,
            "auroc_high": high,
            "average_precision": float(average_precision_score(y, p)) if 0 < share < 1 else math.nan,
            "accuracy": float(nan_mean(called == y)), "majority": max(share, 1 - share),
            "sensitivity": float(nan_mean(called[y == 1])), "specificity": float(nan_mean(~called[y == 0])),
            "threshold": threshold, "calibration_error": calibration_error(p, y)}, areas


# ----------------------------------------------------------------------------------------------------------------------
# Tables and figures.

def cells(values: np.ndarray, bold: bool = True) -> list[list[str]]:
    """values (I, S, C) -> the text of I rows: mean ± deviation over the S draws, the best of each column in bold."""
    means = nan_mean(values, 1)
    spread, best = values.std(1, ddof=min(1, values.shape[1] - 1)), np.fmax.reduce(means)       # fmax passes over NaN
    texts = np.full(means.shape, "–", dtype=object)
    for where in zip(*np.nonzero(~np.isnan(means))):
        text = f"{means[where]:.3f}"
        if spread[where] > 1e-9:                        # draws of all labels are the same; a linear probe of them, too
            text += f" ± {spread[where]:.3f}"
        texts[where] = f"**{text}**" if bold and len(means) > 1 and means[where] == best[where[1]] else text
    return texts.tolist()


def markdown(heading: str, columns: list[str], inits: list[str], rows: list[list[str]]) -> str:
    table = [["", *columns], ["---"] * (len(columns) + 1), *([init, *row] for init, row in zip(inits, rows))]
    return f"\n{heading}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)


def panels(rows: list[str], columns: list[str], **style) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), in the one style of all figures."""
    figure = Figure((5 * len(columns), 5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for ax, (row, column) in zip(axes.flat, itertools.product(rows, columns)):
        ax.set(title=" ".join(filter(None, (row, column))), **style)
        ax.grid(alpha=0.3)
    return figure, axes


def legend_below(ax) -> None:
    """Where it hides nothing, however long the names."""
    if ax.lines:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8, frameon=False)


def efficiency_figure(areas: np.ndarray, replicates: np.ndarray, modes: list, fractions: list, inits: list) -> Figure:
    """Mean AUROC against the share of the labels, with the patients' 95 % interval and a dot for each draw: areas
    (M, F, I, S), replicates (M, F, I, R), both means over the labels."""
    figure, axes = panels([""], modes, xscale="log", xlabel="share of the labels", ylabel="mean AUROC on test")
    order = np.argsort(fractions)
    for (m, ax), (i, init) in itertools.product(enumerate(axes[0]), enumerate(inits)):
        x, dots = np.array(fractions)[order], areas[m, order, i]                                            # (F, S)
        low, high = np.array([interval(some) for some in replicates[m, order, i]]).T
        ax.plot(x, nan_mean(dots, 1), "-o", color=f"C{i}", label=init)
        ax.plot(x, dots, ".", color=f"C{i}", alpha=0.5)
        ax.fill_between(x, low, high, color=f"C{i}", alpha=0.15)
        ax.set_xticks(x, [f"{100 * fraction:g} %" for fraction in x])
        ax.minorticks_off()
        legend_below(ax)
    return figure


def calibration_figure(kept: dict[tuple, dict], truth: np.ndarray, modes: list, fractions: list, inits: list) -> Figure:
    """How often a label is there when it was given a probability, all labels and draws together."""
    figure, axes = panels(modes, [f"{100 * f:g} %" for f in fractions])
    for ax, (mode, fraction) in zip(axes.flat, itertools.product(modes, fractions)):
        for init in inits:
            p = np.stack([run["test"] for key, run in kept.items() if key[:3] == (mode, fraction, init)])   # (S, n, L)
            known = np.broadcast_to(~np.isnan(truth), p.shape)
            p, y = p[known], np.broadcast_to(truth, p.shape)[known]
            name = f"{init}, error {calibration_error(p, y):.3f}"
            CalibrationDisplay.from_predictions(y, p, n_bins=15, ax=ax, name=name)
        ax.set(xlabel="probability", ylabel="share of positives")
        legend_below(ax)
    return figure


def curves_figure(probabilities: np.ndarray, truth: np.ndarray, names: list[str]) -> Figure:
    """ROC and precision-recall curves, a line for each label that has both classes."""
    figure, axes = panels([""], ["ROC", "precision-recall"])
    for p, y, name in zip(probabilities.T, truth.T, names):
        p, y = p[~np.isnan(y)], y[~np.isnan(y)]
        if 0 < y.sum() < len(y):
            RocCurveDisplay.from_predictions(y, p, name=name, ax=axes[0, 0])
            PrecisionRecallDisplay.from_predictions(y, p, name=name, ax=axes[0, 1])
    for ax in axes.flat:
        legend_below(ax)
    return figure


def report(out: Path, about: dict, kept: dict[tuple, dict], names: list[str], val_truth: np.ndarray,
           truth: np.ndarray, patients: np.ndarray) -> None:
    """Where the test labels come in, once all is trained and chosen: results.json, results.md and the figures.

    kept: for each (mode, fraction, init, seed) what `finetune` kept, of it predictions `val` and `test` (n, L). names:
    of the L labels; val_truth, truth (n, L), patients (n,) of test; about: what results.json says of the whole."""
    modes, fractions, inits, seeds = (list(dict.fromkeys(axis)) for axis in zip(*kept))
    exclusive, certain = about["kind"] == "exclusive", np.nansum(truth, 1) == 1             # images of one class only
    classes = np.nan_to_num(truth[certain]).argmax(1)

    def right(p):
        """(E, n, L) -> (E,): the share of the images whose most probable class is theirs."""
        return nan_mean(p[:, certain].argmax(2) == classes, 1)

    # --------------------------------------------------------------------- a row for each combination and label
    rows, areas, whole, counts = [], [], [], patient_counts(patients, REPLICATES)
    for mode, fraction, init, seed in itertools.product(modes, fractions, inits, seeds):
        run = kept[mode, fraction, init, seed]
        val_p, p, peaks = (run[key].numpy() if key in run else None for key in ("val", "test", "peaks"))
        for i, label in enumerate(names):
            result, area = score(p[:, i], truth[:, i], youden(val_p[:, i], val_truth[:, i]), counts)
            known = ~np.isnan(truth[:, i])
            peak = math.nan if peaks is None else nan_mean((peaks[:, known, i] >= 0.5) == truth[known, i], 1).max()
            rows.append({"init": init, "mode": mode, "fraction": fraction, "seed": seed, "label": label,
                         "n_train": run["n_train"][i], "positives": run["positives"][i]} | result
                        | {"peak_accuracy": float(peak)})
            areas.append(area)
        whole.append({"accuracy": right(p[None])[0], "majority": nan_mean(np.eye(len(names))[classes]).max(),
                      "peak_accuracy": math.nan if peaks is None else right(peaks).max()})
    shape = len(modes), len(fractions), len(inits), len(seeds), len(names)                          # (M, F, I, S, L)

    def column(key):
        """A key of all rows, (M, F, I, S, L + 1): the labels, and their mean, or what stands for all classes."""
        values = np.array([row[key] for row in rows], float).reshape(shape)
        mean = nan_mean(values, -1)
        if exclusive and key in whole[0]:
            mean = np.reshape([x[key] for x in whole], shape[:-1])
        return np.concatenate([values, mean[..., None]], -1)

    # The mean is over the labels that test can score, in every replicate the same ones or none. Over the draws it is
    # taken on the same patients: what another test set would show, not other training sets.
    areas = np.reshape(areas, (*shape, -1))                                                 # (M, F, I, S, L, 1 + R)
    scored = ~np.isnan(areas[0, 0, 0, 0, :, 0])
    mean = areas[..., scored, :].mean(4) if scored.any() else np.full_like(areas[..., 0, :], np.nan)
    areas = np.concatenate([areas, mean[..., None, :]], 4)                                  # (M, F, I, S, L + 1, 1 + R)
    pooled = areas.mean(3)                                                                  # (M, F, I, L + 1, 1 + R)
    complete = int((~np.isnan(mean[0, 0, 0, 0, 1:])).sum())

    # ----------------------------------------------------------------------------------------------------- the text
    keys = ("average_precision", "accuracy", "majority", "sensitivity", "specificity", "calibration_error")
    overall = np.stack([column(key)[..., -1] for key in keys], -1)                                  # (M, F, I, S, 6)
    peaks = column("peak_accuracy")
    text = (f"# What pre-training buys: {about['data']}\n\n{len(names)} labels: {about['labels']}; -1 is never scored. "
            f"{len(truth)} test images of {len(set(patients))} patients. Epoch, regularisation and thresholds are "
            f"chosen on val: {len(val_truth)} labelled images beyond the fraction. Mean ± deviation over the draws. "
            f"Intervals and p: the test patients drawn anew {REPLICATES} times, for all rows alike; of the mean, the "
            f"{complete} times that every label had both classes.\n")
    means, comparisons = [], []
    for (m, mode), (f, fraction) in itertools.product(enumerate(modes), enumerate(fractions)):
        here, labels = {"mode": mode, "fraction": fraction}, [*names, "mean"]
        text += f"\n## {mode}, {100 * fraction:g} % of the labels\n\n{'; '.join(about['draws'][fraction])}\n"
        table = cells(areas[m, f, ..., 0])
        for init, row, some in zip(inits, table, pooled[m, f, :, -1]):
            low, high = interval(some[1:])
            means.append(here | {"init": init, "auroc": float(some[0]), "low": low, "high": high})
            means[-1] |= {key: float(v) for key, v in zip(keys, nan_mean(overall[m, f, inits.index(init)]))}
            row.append("–" if np.isnan(low) else f"{low:.3f} to {high:.3f}")
        text += markdown("AUROC on test", [*labels, "95 % interval"], inits, table)
        if not np.isnan(peaks[m, f]).all():
            text += markdown("Peak test accuracy over the epochs, the published protocol: optimistic, as test chooses "
                             "the epoch", labels, inits, cells(peaks[m, f]))
        heading = "Means over the labels, thresholds chosen on val"
        if exclusive:
            heading += "; accuracy and majority of all classes together, the most probable one called"
        text += markdown(heading, [key.replace("_", " ") for key in keys], inits, cells(overall[m, f], False)) + "\n"
        for (a, against), (b, init) in itertools.combinations(enumerate(inits), 2):
            for label, some in zip(labels, pooled[m, f, b] - pooled[m, f, a]):                              # (1 + R,)
                low, high = interval(some[1:])
                comparisons.append(here | {"init": init, "against": against, "label": label, "difference": float(
                    some[0]), "low": low, "high": high, "p": p_value(some[1:])})
            text += (f"{init} − {against}: mean AUROC {some[0]:+.3f} (95 % {low:+.3f} to {high:+.3f}, "
                     f"p = {comparisons[-1]['p']:.2g})\n")
    print("\n" + text)

    # ------------------------------------------------------------------------------------------ files and TensorBoard
    (out / "results.md").write_text(text)
    found = about | {"results": rows, "means": means, "comparisons": comparisons}
    (out / "results.json").write_text(re.sub(r"\bNaN\b", "null", json.dumps(found, indent=1)) + "\n")
    with SummaryWriter(out / "tensorboard/table") as writer:
        writer.add_text("results", text)
        figures = {"efficiency": efficiency_figure(areas[..., -1, 0], pooled[..., -1, 1:], modes, fractions, inits),
                   "calibration": calibration_figure(kept, truth, modes, fractions, inits)}
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png", dpi=150)
            writer.add_figure(name, figure)
        for mode, fraction, init in itertools.product(modes, fractions, inits):
            p = kept[mode, fraction, init, seeds[0]]["test"].numpy()
            writer.add_figure(f"curves/{mode} {fraction:g}/{init}", curves_figure(p, truth, names))
