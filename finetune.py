"""Stage 2: what pre-training buys at 1 %, 10 % and all of the labels. Encoder and labels in, classifier and table out.

    python finetune.py --fraction 0.01                          the encoder of pretrain.py, its data, 1 % of the labels
    python finetune.py --init random runs/pretrain/encoder.pt --fraction 0.01 0.1 1 --mode linear full --seeds 0 1 2
    torchrun --nproc_per_node=8 finetune.py --mode full         eight GPUs: the same batches, the same views, faster
    python finetune.py --predict runs/finetune/classifier.pt --data DIR --explain 8

`linear` fits a logistic regression to the frozen encoder's features; `full` trains the encoder, too. Thresholds, epochs
and regularisation are chosen on val. Test labels meet nothing but predictions that already lie on disk.

The run folder (--out) gets results.json, results.md and plots; classifier.pt, the best on val of all combinations; and
for each combination its predictions, from which an interrupted table goes on.
"""
import argparse
import collections
import contextlib
import csv
import datetime
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from dali_pipeline import (
    Augmentation, DataError, ImageError, Manifest, Preprocessing, eval_loader, read_manifest, train_loader)
from loss import masked_cross_entropy
from model import (
    ARCHITECTURES, FORMAT, MEAN, STD, CheckpointError, Classifier, build_encoder, cached_features, extract_features,
    load_checkpoint, load_classifier, save_checkpoint)

ENCODERS = ("runs/pretrain/encoder.pt", "runs/demo/encoder.pt")         # the first that exists is --init's default
INHERITED = {"data": "data/nih", "arch": "resnet50", "image_size": 224, "normalize": "fixed", "clahe": False}
IMAGES = (".jpg", ".jpeg", ".png")
AUGMENTATION = Augmentation(crop_area=(0.6, 1.0), blur=(0.0, 0.0), brightness=0.2, contrast=0.2)    # of full training
STRENGTHS = 10.0 ** np.arange(-4, 3)                    # of the linear probe's regularisation, see fit_logistic
# Flags that say where and how a run computes, not what: they may differ when it goes on.
NOT_THE_RUN = {"out", "overwrite", "features", "bootstrap", "predict", "explain", "threads", "precision"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("data and run folder")
    group.add_argument("--data", help="data folder, made by prepare.py (default: the encoder's)")
    group.add_argument("--out", default="runs/finetune", help="run folder (default %(default)s)")
    group.add_argument("--features", default="runs/features", help="where features are kept (default %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="begin anew in a run folder that holds a run")

    group = parser.add_argument_group("what is compared: every combination")
    group.add_argument("--init", nargs="+", metavar="random|imagenet|PATH", help=f"encoders (default {ENCODERS[0]}, "
                       f"else {ENCODERS[1]})")
    group.add_argument("--mode", nargs="+", choices=("linear", "full"), default=["full"], help="(default full)")
    group.add_argument("--fraction", nargs="+", type=float, default=[1.0], help="of the labelled patients (default 1)")
    group.add_argument("--seeds", nargs="+", type=int, default=[0], help="draws of patients and of heads (default 0)")

    group = parser.add_argument_group("labels")
    group.add_argument("--labels", nargs="+", metavar="NAME", help="columns of the manifest (default: all)")
    group.add_argument("--uncertain", choices=("ones", "zeros", "ignore", "multiclass"), default="ignore",
                       help="what -1 is in training: present, absent, left out, a third class (default %(default)s)")
    group.add_argument("--blank", choices=("zeros", "ignore"), default="zeros", help="what an empty cell is in a row "
                       "that has labels: absent, or left out (default %(default)s)")
    group.add_argument("--balance", action="store_true", help="weigh the classes of each label alike")

    group = parser.add_argument_group("preprocessing (default: the encoder's)")
    group.add_argument("--arch", choices=ARCHITECTURES, help="of random and imagenet")
    group.add_argument("--image-size", type=int, help="side of the input, pixels")
    group.add_argument("--normalize", choices=("fixed", "image"), help="by a fixed mean and deviation, or per image")
    group.add_argument("--clahe", action=argparse.BooleanOptionalAction, help="adaptive histogram equalisation")

    group = parser.add_argument_group("full fine-tuning")
    group.add_argument("--epochs", type=int, default=20, help="(default %(default)s)")
    group.add_argument("--min-steps", type=int, default=10, help="an epoch; few images are shown several times in one "
                       "(default %(default)s)")
    group.add_argument("--batch-size", type=int, default=64, help="images over all processes (default %(default)s)")
    group.add_argument("--lr-encoder", type=float, default=2e-4, help="peak, AdamW (default %(default)s)")
    group.add_argument("--lr-head", type=float, default=2e-3, help="peak, AdamW (default %(default)s)")
    group.add_argument("--weight-decay", type=float, default=0.01, help="(default %(default)s)")
    group.add_argument("--warmup-epochs", type=float, default=2, help="of linear warm-up (default %(default)s)")
    group.add_argument("--freeze-bn", action="store_true", help="keep the batch norm statistics of the initialisation")

    group = parser.add_argument_group("scores")
    group.add_argument("--bootstrap", type=int, default=1000, help="replicates over patients (default %(default)s)")
    group.add_argument("--peak", action="store_true", help="add the best test accuracy over epochs (optimistic)")

    group = parser.add_argument_group("using a classifier")
    group.add_argument("--predict", metavar="CLASSIFIER.pt", help="probabilities for --data, a data folder or another "
                       "folder of images, as predictions.csv in --out (default: beside the classifier)")
    group.add_argument("--explain", type=int, default=0, metavar="N", help="Grad-CAM overlays of N images")

    group = parser.add_argument_group("how it computes")
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: bf16 on a "
                       "GPU that has it, fp16 on others, fp32 on a CPU")
    group.add_argument("--threads", type=int, help="of the loader, a process (default: cores / processes, at most 8)")

    if any(arg.split("=")[0] == "--predict" for arg in (sys.argv[1:] if argv is None else argv)):
        parser.set_defaults(out=None)
    args = parser.parse_args(argv)
    for flag in ("epochs", "min_steps", "batch_size", "bootstrap", "image_size", "threads", "lr_encoder", "lr_head"):
        value = getattr(args, flag)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{flag.replace('_', '-')} {value} must be positive")
    for flag in ("weight_decay", "warmup_epochs", "explain"):
        value = getattr(args, flag)
        if not (value >= 0 and math.isfinite(value)):
            parser.error(f"--{flag.replace('_', '-')} {value} must not be negative")
    if not all(0 < fraction <= 1 for fraction in args.fraction):
        parser.error(f"--fraction {' '.join(f'{f:g}' for f in args.fraction)} must lie in 0 to 1, 0 left out")
    if min(args.seeds) < 0:
        parser.error(f"--seeds {min(args.seeds)} must not be negative")
    for flag in ("init", "mode", "fraction", "seeds", "labels"):
        values = getattr(args, flag) or []
        if len(set(values)) < len(values):
            parser.error(f"--{flag} names something twice: {' '.join(map(str, values))}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}")
    if args.peak and "full" not in args.mode:
        parser.error("--peak is over epochs and needs --mode full")
    if args.predict and not args.data:
        parser.error("--predict needs --data, a data folder or a folder of images")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Labels and draws, as pure functions.

@dataclass(frozen=True)
class Task:
    """What is asked of each image: G questions of K answers each, as arrays over the manifest's N rows."""
    names: list[str]            # L labels
    kind: str                   # binary: G = L, K = 1; three-way: G = L, K = 3; exclusive: G = 1, K = L
    targets: np.ndarray         # (N, G, K) float32, one-hot where K > 1
    known: np.ndarray           # (N, G) float32: 0 where there is nothing to learn from
    truth: np.ndarray           # (N, L) float32, to score by: 1, 0, or NaN to be left out


def make_task(labels: np.ndarray, names: list[str], train: np.ndarray, uncertain: str, blank: str) -> Task:
    """Labels (N, L) of 1, 0, -1 and NaN, read by the policies --uncertain and --blank.

    Where every one of the rows `train` has exactly one 1 and otherwise 0, the labels exclude each other: one softmax.
    `multiclass` makes absent, present and uncertain three classes of each label (Irvin et al. 2019). Whatever the
    policy, a -1 is never scored, neither on val nor on test."""
    rows = labels[train]
    exclusive = len(names) > 1 and ((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all()
    blanks_filled = np.where(np.isnan(labels) & (blank == "zeros"), 0, labels).astype(np.float32)
    truth = np.where(blanks_filled == -1, np.nan, blanks_filled).astype(np.float32)
    if exclusive:
        return Task(names, "exclusive", np.nan_to_num(truth)[:, None], (np.nansum(truth, 1) == 1).astype("f4")[:, None],
                    truth)
    if uncertain == "multiclass":
        one_hot = np.stack([blanks_filled == value for value in (0, 1, -1)], axis=2).astype(np.float32)
        return Task(names, "three-way", one_hot, one_hot.sum(2), truth)
    learned = np.where(blanks_filled == -1, {"ones": 1, "zeros": 0, "ignore": np.nan}[uncertain], blanks_filled)
    return Task(names, "binary", np.nan_to_num(learned).astype("f4")[:, :, None], (~np.isnan(learned)).astype("f4"),
                truth)


def to_probabilities(logits: Tensor, kind: str) -> np.ndarray:
    """Logits (n, G * K) -> probability of each label, (n, L) float64. A three-way label's is that of present against
    absent, without the uncertain class."""
    logits = logits.double().cpu()
    if kind == "exclusive":
        return logits.softmax(1).numpy()
    if kind == "three-way":
        absent, present, _ = logits.view(len(logits), -1, 3).unbind(2)
        logits = present - absent
    return logits.sigmoid().numpy()


def draw(patients: np.ndarray, truth: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, int, int]:
    """Rows (m,) of a fraction of the patients, how many patients were asked for, and how many they became.

    patients (n,), truth (n, L). The seed puts the patients in an order; a fraction is the front of it, so the smaller
    lies in the larger. For a label without a positive (or a negative) there, the first patient in that order who has
    one comes in addition, which keeps the nesting. DataError where the fraction is no patient."""
    names, patient = np.unique(patients, return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(names))[patient]                # (n,) in the seed's order
    asked = round(fraction * len(names))
    if not asked:
        raise DataError(f"--fraction {fraction:g} of {len(names)} labelled training patients is none; "
                        f"from {0.5 / len(names):.2g} on it is one")
    front, chosen = place < asked, place < asked
    for column, value in itertools.product(truth.T, (1, 0)):
        has = column == value
        if has.any() and not (has & front).any():
            chosen = chosen | (place == place[has].min())
    return np.flatnonzero(chosen), asked, len(np.unique(place[chosen]))


def cell_weights(targets: np.ndarray, known: np.ndarray, balance: bool) -> np.ndarray:
    """Weights (n, G), 0 for unknown cells, 1 on average; with `balance`, each class of a label has the same sum."""
    weights = known.astype(np.float64)
    if balance:
        classes = np.concatenate([1 - targets, targets], axis=2) if targets.shape[2] == 1 else targets
        count = (classes * known[:, :, None]).sum(0)                                                # (G, classes)
        weights *= (classes / count.clip(min=1)).sum(2)
        weights *= known.sum(0) / weights.sum(0).clip(min=1e-12)                        # a label's total stays
    return weights * (weights.size / weights.sum().clip(min=1e-12))


# ----------------------------------------------------------------------------------------------------------------------
# The linear probe: all labels and all strengths of regularisation in one go.

def fit_logistic(x: Tensor, targets: Tensor, weights: Tensor, strengths: Tensor, tolerance: float = 1e-6,
                 max_steps: int = 500) -> tuple[Tensor, Tensor]:
    """Logistic regressions (softmax where K > 1), one for each of R strengths and G questions, at their optimum.

    x (n, D) float64, standardised; targets (n, G, K); weights (n, G). Each minimises its weighted mean cross-entropy +
    strength / 2 * |w|^2, the intercept free: scikit-learn's with C = 1 / (n * strength). Returns coefficients
    (D, R, G, K) and intercepts (R, G, K).

    Conjugate gradients in the rows' principal axes, where the Hessian is nearly diagonal and known beforehand (the
    optimum lies in the rows' span, so nothing is lost when n < D). A step needs two products with x for all problems
    together; the search along the line needs none, and its Newton steps are damped so that each is sure to descend
    (self-concordance, Bach 2010). The end is where no gradient promises more than `tolerance` of loss."""
    few = len(x) < x.shape[1]
    squares, axes = torch.linalg.eigh(x @ x.T if few else x.T @ x)
    keep = squares > 1e-10 * squares[-1].clamp(min=1e-300)
    squares, axes = squares[keep], axes[:, keep]
    axes = x.T @ axes / squares.sqrt() if few else axes                                             # (D, d)
    x = torch.cat([x @ axes, torch.ones_like(x[:, :1])], dim=1)                                     # (n, d + 1)
    shape = x.shape[1], len(strengths), *targets.shape[1:]                                          # (d + 1, R, G, K)
    weights = (weights / weights.sum(0).clamp(min=1e-300))[:, None, :, None]                        # (n, 1, G, 1)
    targets = targets[:, None]                                                                      # (n, 1, G, K)
    penalty = strengths.view(1, -1, 1, 1).repeat(shape[0], 1, 1, 1)                                 # (d + 1, R, 1, 1)
    penalty[-1] = 0
    curvature = torch.cat([squares / len(x), squares.new_ones(1)]).view(-1, 1, 1, 1) / 4 + penalty

    def predict(logits):
        return logits.sigmoid() if shape[3] == 1 else logits.softmax(3)

    def inner(a, b):
        return (a * b).sum((0, 3), keepdim=True)                                                    # (1, R, G, 1)

    beta, logits = x.new_zeros(shape), x.new_zeros(len(x), *shape[1:])
    direction, before, promise_before = 0, 0, torch.inf
    for _ in range(max_steps):
        gradient = (x.T @ (weights * (predict(logits) - targets)).flatten(1)).view(shape) + penalty * beta
        promise = inner(gradient, gradient / curvature)                     # twice what a quadratic would still lose
        if promise.max() < 2 * tolerance:
            break
        turn = (promise - inner(gradient, before / curvature)) / promise_before if torch.is_tensor(before) else 0.0
        direction = -gradient / curvature + torch.as_tensor(turn).clamp(min=0) * direction          # Polak-Ribiere+
        before, promise_before = gradient, promise.clamp(min=1e-300)
        along = (x @ direction.flatten(1)).view(logits.shape)                                       # (n, R, G, K)
        reach = 2 * along.abs().amax((0, 3), keepdim=True).clamp(min=1e-300)
        cross, square, t = inner(penalty * beta, direction), inner(penalty * direction, direction), 0.0
        for _ in range(4):
            p = predict(logits + t * along)
            slope = inner(weights * (p - targets), along) + cross + t * square
            bend = inner(weights * p * along, along) - (weights * (p * along).sum(3, keepdim=True) ** 2).sum(0) + square
            newton = slope / bend.clamp(min=1e-300)
            t = t - newton.sign() * (reach * newton.abs()).log1p() / reach
        beta, logits = beta + t * direction, logits + t * along
    return (axes @ beta[:-1].flatten(1)).view(-1, *shape[1:]), beta[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Scores.

def auroc(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, ties half: scores (n,), truth (n,) of 1 and 0, counts (R, n) of how often each image
    is in each of R replicates (default: once, in one). Returns (R,), NaN where a replicate has one class."""
    counts = np.ones((1, len(scores)), np.int64) if counts is None else counts
    order = np.argsort(scores, kind="stable")
    truth, ties = truth[order], np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)     # first of equal scores
    areas = []
    for some in range(0, len(counts), 100):                                             # for memory's sake
        present = counts[some:some + 100, order].astype(np.float64)
        positive = np.add.reduceat(present * truth, ties, axis=1) if len(ties) else present
        negative = np.add.reduceat(present * (1 - truth), ties, axis=1) if len(ties) else present
        below = negative.cumsum(1) - negative / 2                                       # Mann and Whitney's count
        with np.errstate(invalid="ignore"):
            areas.append((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))
    return np.concatenate(areas)


def patient_counts(patients: np.ndarray, replicates: int, seed: int = 0) -> np.ndarray:
    """Bootstrap over patients: how often each of n images is in each replicate, (replicates, n)."""
    names, patient = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), replicates)
    return drawn.astype(np.int16)[:, patient]


def nan_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of what is not NaN, silently NaN where that is nothing."""
    count = (~np.isnan(values)).sum(axis)
    return np.nansum(values, axis) / np.where(count, count, np.nan)


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the replicates that are not NaN."""
    finite = replicates[~np.isnan(replicates)]
    return tuple(np.percentile(finite, [2.5, 97.5]).tolist()) if len(finite) else (math.nan, math.nan)


def paired_test(difference: np.ndarray) -> tuple[float, float, float]:
    """From the replicates of a difference: 95 % interval and two-sided p of there being none."""
    finite = difference[~np.isnan(difference)]
    tail = min((finite <= 0).sum(), (finite >= 0).sum()) + 1
    return *interval(finite), min(1.0, 2 * tail / (len(finite) + 1)) if len(finite) else math.nan


def youden(scores: np.ndarray, truth: np.ndarray) -> float:
    """The score from which on to call an image positive, so that sensitivity + specificity is largest (Youden 1950);
    0.5 where one class is missing. scores (n,), truth (n,) of 1, 0 and NaN."""
    scores, truth = scores[~np.isnan(truth)], truth[~np.isnan(truth)]
    if not 0 < truth.sum() < len(truth):
        return 0.5
    false, true, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    return float(thresholds[1:][(true - false)[1:].argmax()])                           # the first is infinite


def reliability(probabilities: np.ndarray, truth: np.ndarray, bins: int = 15) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean probability and frequency in each of the equal bins that are not empty, and the expected calibration error
    (Guo et al. 2017): the images' mean distance of the two."""
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = count > 0
    claimed, found = (np.bincount(which, values, bins)[filled] / count[filled] for values in (probabilities, truth))
    return claimed, found, float((np.abs(claimed - found) * count[filled]).sum() / max(1, len(truth)))


def val_score(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """What everything is chosen by: mean AUROC over the labels; where none has both classes, minus the Brier score."""
    known = ~np.isnan(truth)
    areas = [auroc(p[k], y[k])[0] for p, y, k in zip(probabilities.T, truth.T, known.T)]
    mean = nan_mean(np.array(areas))
    return float(mean if not np.isnan(mean) else -nan_mean((probabilities - truth).ravel() ** 2))


def score(probabilities: np.ndarray, truth: np.ndarray, thresholds: list[float],
          counts: np.ndarray) -> tuple[dict, np.ndarray]:
    """The columns of results.json, each a list of L, and the bootstrap replicates of the AUROC, (L, R).

    probabilities, truth: (n, L), NaN in truth left out; counts: (R, n). NaN where a score lacks the class it needs."""
    columns, replicates = collections.defaultdict(list), []
    for p, y, threshold, known in zip(probabilities.T, truth.T, thresholds, (~np.isnan(truth)).T):
        p, y, weights = p[known], y[known], counts[:, known]
        both, called, positives = 0 < y.sum() < len(y), p >= threshold, int(y.sum())
        replicates.append(auroc(p, y, weights) if both else np.full(len(counts), np.nan))
        low, high = interval(replicates[-1])
        for key, value in {
                "n_test": len(y), "test_positives": positives, "auroc": auroc(p, y)[0] if both else np.nan,
                "auroc_low": low, "auroc_high": high,
                "average_precision": average_precision_score(y, p) if both else np.nan,
                "accuracy": (called == y).mean() if len(y) else np.nan,
                "majority": max(positives, len(y) - positives) / len(y) if len(y) else np.nan,
                "sensitivity": called[y == 1].mean() if positives else np.nan,
                "specificity": 1 - called[y == 0].mean() if positives < len(y) else np.nan,
                "threshold": threshold, "calibration_error": reliability(p, y)[2]}.items():
            columns[key].append(value if isinstance(value, int) else float(value))
    return columns, np.array(replicates)


# ----------------------------------------------------------------------------------------------------------------------
# The table and its figures, from scores[init, mode, fraction][key], which are (S, L) for S draws and L labels.

def tables(scores: dict, comparisons: list[dict], draws: dict, names: list[str], peak: bool) -> str:
    """Markdown: for each mode and fraction a table of initialisations against labels and their mean, mean ± deviation
    over the draws, the best in each column bold; with `peak` a second one; then what else there is to know."""
    text = []

    def table(heading: str, columns: list[str], values: dict[str, np.ndarray]):                 # {init: (S, columns)}
        means, bests = {init: nan_mean(v) for init, v in values.items()}, []
        for column in zip(*means.values()):
            bests.append(max([m for m in column if not np.isnan(m)], default=None))
        text.extend(["", heading, "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"])
        for init, v in values.items():
            cells = ["–" if np.isnan(m) else f"{m:.3f}" + (f" ± {d:.3f}" if len(v) > 1 else "")
                     for m, d in zip(means[init], np.std(v, axis=0, ddof=min(1, len(v) - 1)))]
            cells = [f"**{cell}**" if m == best and "AUROC" in heading and len(values) > 1 else cell
                     for cell, m, best in zip(cells, means[init], bests)]
            text.append(f"| {init} | {' | '.join(cells)} |")

    for mode, fraction in dict.fromkeys(key[1:] for key in scores):
        block = {key[0]: columns for key, columns in scores.items() if key[1:] == (mode, fraction)}
        text += ["", f"## {mode}, {100 * fraction:g} % of the labels", "", "; ".join(dict.fromkeys(draws[fraction]))]

        def with_mean(key, block=block):
            return {init: np.c_[columns[key], nan_mean(columns[key], 1)] for init, columns in block.items()}

        table("AUROC on test", [*names, "mean"], with_mean("auroc"))
        if peak and mode == "full":
            table("Peak test accuracy over the epochs, the published protocol: optimistic, as test chooses the epoch",
                  [*names, "mean"], with_mean("peak_accuracy"))
        keys = ("average_precision", "accuracy", "majority", "sensitivity", "specificity", "calibration_error")
        table("Means over the labels, thresholds chosen on val", [key.replace("_", " ") for key in keys], {
            init: np.stack([nan_mean(columns[key], 1) for key in keys], 1) for init, columns in block.items()})
        text += ["", *(f"{c['init']} − {c['against']}: mean AUROC {c['difference']:+.3f} (95 % {c['low']:+.3f} to "
                       f"{c['high']:+.3f}, p = {c['p']:.2g})" for c in comparisons
                       if c["p"] is not None and (c["mode"], c["fraction"], c["label"]) == (mode, fraction, "mean"))]
    return "\n".join(text) + "\n"


def efficiency_figure(scores: dict, replicates: dict) -> Figure:
    """Mean AUROC against the fraction of the labels: a panel for each mode, a line for each initialisation, with the
    patients' 95 % interval, and a dot for each draw."""
    inits, modes, fractions = (list(dict.fromkeys(values)) for values in zip(*scores))
    figure = Figure((5 * len(modes), 4), layout="constrained")
    for mode, axes in zip(modes, np.atleast_1d(figure.subplots(1, len(modes), sharey=True))):
        for i, init in enumerate(inits):
            dots = np.array([nan_mean(scores[init, mode, f]["auroc"], 1) for f in sorted(fractions)])           # (F, S)
            bounds = [interval(nan_mean(nan_mean(replicates[init, mode, f]))) for f in sorted(fractions)]
            axes.plot(sorted(fractions), dots, ".", color=f"C{i}", alpha=0.5)
            axes.plot(sorted(fractions), nan_mean(dots, 1), "-o", color=f"C{i}", label=init)
            axes.fill_between(sorted(fractions), *zip(*bounds), color=f"C{i}", alpha=0.15)
        axes.set(xscale="log", xlabel="share of the labels", title=mode, xticks=sorted(fractions),
                 xticklabels=[f"{100 * f:g} %" for f in sorted(fractions)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean AUROC on test")
    figure.axes[0].legend()
    return figure


def calibration_figure(predictions: dict, truth: np.ndarray) -> Figure:
    """How often a label is there when it was given a probability, all labels and draws together; a panel for each mode
    and fraction, a line for each initialisation."""
    panels = list(dict.fromkeys((mode, fraction) for _, mode, fraction, _ in predictions))
    columns = min(3, len(panels))
    figure = Figure((3.5 * columns, 3.5 * math.ceil(len(panels) / columns)), layout="constrained")
    for i, (mode, fraction) in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, i + 1)
        axes.plot([0, 1], [0, 1], "k:", linewidth=1)
        for init in dict.fromkeys(key[0] for key in predictions):
            drawn = [p for key, p in predictions.items() if key[:3] == (init, mode, fraction)]
            known = ~np.isnan(truth)
            claimed, found, error = reliability(np.concatenate([p[known] for p in drawn]),
                                                np.concatenate([truth[known]] * len(drawn)))
            axes.plot(claimed, found, "-o", markersize=3, label=f"{init}, error {error:.3f}")
        axes.set(title=f"{mode}, {100 * fraction:g} % of the labels", xlabel="probability given",
                 ylabel="frequency found", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.legend(fontsize=7)
    return figure


def curves_figure(probabilities: np.ndarray, truth: np.ndarray, names: list[str]) -> Figure:
    """ROC and precision-recall curves, a line for each label that has both classes."""
    figure = Figure((9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for p, y, name in zip(probabilities.T, truth.T, names):
        p, y = p[~np.isnan(y)], y[~np.isnan(y)]
        if 0 < y.sum() < len(y):
            false, true, _ = roc_curve(y, p)
            left.plot(false, true, label=f"{name} {auroc(p, y)[0]:.3f}")
            precision, recall, _ = precision_recall_curve(y, p)
            right.step(recall, precision, where="post", label=f"{name} {average_precision_score(y, p):.3f}")
    left.set(xlabel="1 − specificity", ylabel="sensitivity", title="ROC, area")
    right.set(xlabel="recall", ylabel="precision", title="precision-recall, average precision")
    for axes in (left, right):
        if axes.lines:
            axes.legend(fontsize=7)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Using a classifier.

def grad_cam(net: Classifier, x: Tensor, outputs: Tensor) -> Tensor:
    """Where in the images x (B, 1, S, S) the outputs (B,) come from: (B, S, S), 0 to 1 (Selvaraju et al. 2017)."""
    kept = []
    hook = net.encoder.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = net(x)
    hook.remove()
    gradient, = torch.autograd.grad(logits.gather(1, outputs[:, None]).sum(), kept[0])              # (B, C, h, w)
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True))              # (B, 1, h, w)
    cam = F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)).detach()


def explain(net: Classifier, state: dict, manifest: Manifest, images: np.ndarray, preprocessing: Preprocessing,
            folder: Path, where: dict) -> None:
    """Write a Grad-CAM overlay of each of `images`, for the label most above its threshold, named in the file."""
    folder.mkdir(parents=True, exist_ok=True)
    answers, present = (3, 1) if state["kind"] == "three-way" else (1, 0)       # logits a label, and which says present
    for x, index in eval_loader(manifest, images, 16, preprocessing, **where):
        x = x.float()
        with torch.no_grad():
            probabilities = to_probabilities(net(x), state["kind"])
        target = torch.from_numpy((probabilities - state["thresholds"]).argmax(1)).to(x.device)
        gray = (x[:, 0] * STD + MEAN).clamp(0, 1).cpu()[..., None]                                  # (B, S, S, 1)
        heat = grad_cam(net, x, target * answers + present).cpu()[..., None]
        colour = torch.from_numpy(colormaps["jet"](heat[..., 0].numpy())[..., :3])                  # (B, S, S, 3)
        overlay = ((gray * (1 - 0.5 * heat) + colour * 0.5 * heat) * 255).to(torch.uint8)
        both = torch.cat([(gray * 255).to(torch.uint8).expand_as(overlay), overlay], dim=2)         # side by side
        for i, label, p, picture in zip(index.tolist(), target.tolist(), probabilities, both):
            name = re.sub(r"[^\w.-]+", "-", f"{Path(manifest.paths[i]).stem}_{state['labels'][label]}_{p[label]:.2f}")
            Image.fromarray(picture.numpy()).save(folder / f"{i:06d}_{name}.png")


def predict(args: argparse.Namespace, where: dict, dtype: torch.dtype | None) -> None:
    """--predict: probabilities of every image of a data folder, or of any folder of images, as a CSV file."""
    net, state = load_classifier(args.predict)
    net = net.to(where["device"], memory_format=torch.channels_last)
    folder, out = Path(args.data), Path(args.out or Path(args.predict).parent)
    if (folder / "manifest.csv").exists():
        manifest = read_manifest(folder)
    else:
        paths = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
        if not paths:
            raise DataError(f"--data {folder} has no manifest.csv and no image ({', '.join(IMAGES)})")
        nobody = np.full(len(paths), "")
        manifest = Manifest(folder, paths, nobody, nobody, np.empty((len(paths), 0), np.float32), [])
    if (out / "predictions.csv").exists() and not args.overwrite:
        raise DataError(f"{out / 'predictions.csv'} exists; choose another --out, or --overwrite it")
    config = state["config"]
    preprocessing = Preprocessing(config["image_size"], config["normalize"], config["clahe"])
    images = np.arange(len(manifest.paths))
    loader = eval_loader(manifest, images, args.batch_size, preprocessing, **where)
    probabilities = to_probabilities(extract_features(net, loader, len(images), dtype=dtype), state["kind"])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "predictions.csv.tmp", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *state["labels"]])
        table.writerows([path, *(f"{p:.6f}" for p in row)] for path, row in zip(manifest.paths, probabilities))
    os.replace(out / "predictions.csv.tmp", out / "predictions.csv")
    print(f"{out / 'predictions.csv'}: {len(images)} images, {', '.join(state['labels'])}")
    if args.explain:
        explain(net, state, manifest, images[:args.explain], preprocessing, out / "explained", where)
        print(f"{out / 'explained'}: Grad-CAM of {min(args.explain, len(images))} images")


# ----------------------------------------------------------------------------------------------------------------------

def open_run(args: argparse.Namespace, config: dict, held: contextlib.ExitStack) -> None:
    """Make the run folder, or recognise the run in it, and lock its config.json until `held` closes. DataError if the
    folder holds something else, for a folder with results is not written over."""
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise DataError(f"{out} is not empty and holds no run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    file = held.enter_context(open(out / "config.json", "a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is at work in {out}; choose another --out") from None
    file.seek(0)
    before = json.loads(file.read() or "{}")
    if before and "fraction" not in before:
        raise DataError(f"{out} holds a run of another stage; choose another --out")
    differ = [f"--{k.replace('_', '-')} ({before.get(k, 'not given')} there, {config.get(k, 'not given')} here)"
              for k in sorted(before.keys() | config.keys()) if before.get(k) != config.get(k)]
    if before and differ and not args.overwrite:
        raise DataError(f"{out} holds a run with other flags: {', '.join(differ)}; choose another --out, "
                        "or give up that run with --overwrite")
    if args.overwrite:
        for folder in ("combinations", "explained"):
            shutil.rmtree(out / folder, ignore_errors=True)
        for name in ("results.json", "results.md", "classifier.pt", "last.pt", "log.jsonl"):
            (out / name).unlink(missing_ok=True)
    file.truncate(0)                            # in place, to keep the lock; nothing is lost if this is cut short
    file.write(json.dumps(config, indent=1) + "\n")
    file.flush()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        with contextlib.ExitStack() as held:
            finetune(args, rank, local_rank, world_size, held)
    except KeyboardInterrupt:
        sys.exit("finetune.py: interrupted; the same command goes on from the last whole epoch" if rank == 0 else 1)
    except FloatingPointError as error:
        sys.exit(f"finetune.py: {error}; a lower --lr-encoder or --lr-head may help" if rank == 0 else 1)
    except (DataError, CheckpointError, OSError) as error:
        # Whatever is wrong with the input is wrong for every process, and told once; a bad image is met by one alone.
        sys.exit(f"finetune.py: {error}" if rank == 0 or isinstance(error, ImageError) else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def finetune(args: argparse.Namespace, rank: int, local_rank: int, world_size: int, held: contextlib.ExitStack) -> None:
    # ------------------------------------------------------------------------------------------------ processes, device
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world_size > 1:                          # the others wait while one extracts features and fits linear probes
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    threads = args.threads or max(1, min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    precision = args.precision
    if precision == "auto":
        precision = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    alone = dict(device=device, threads=threads, half=dtype is not None)
    shared = alone | dict(rank=rank, world_size=world_size)

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    if args.predict:
        if rank == 0:
            predict(args, alone, dtype)
        return

    # -------------------------------------------------------------------------------------------------- initialisations
    inits = args.init or [next((path for path in ENCODERS if os.path.exists(path)), None)]
    if inits == [None]:
        raise DataError(f"{ENCODERS[0]} does not exist: pre-train first (`python pretrain.py --demo` takes minutes), "
                        "or name another encoder, random or imagenet with --init")
    paths = [init for init in inits if init not in ("random", "imagenet")]
    setting, shown, inherited = {}, {}, {}
    for path in paths:
        state = load_checkpoint(path)
        config = state.get("config", {})
        setting[path] = {key: config[key] for key in INHERITED if key in config} | (
            {"arch": state["arch"]} if "arch" in state else {})
        shown[path] = ("SimCLR" if len(paths) == 1 else f"SimCLR ({path})") if state.get("format") == FORMAT else path
        say(f"inherited from {path}: " + (", ".join(f"{k} {v}" for k, v in setting[path].items()) or "nothing"))
        inherited = inherited or setting[path]
    for init in inits:                          # random and imagenet take after the first path, so that rows compare
        given = {key: getattr(args, key) for key in INHERITED if getattr(args, key) is not None}
        setting[init] = INHERITED | inherited | setting.get(init, {}) | given
    shown |= {"random": "Scratch", "imagenet": "ImageNet"}
    data = setting[inits[0]]["data"]

    # ------------------------------------------------------------------------------------------------------------- data
    manifest = read_manifest(data)
    if not manifest.label_names:
        raise DataError(f"{manifest.folder / 'manifest.csv'} has no label column: there is nothing to fine-tune on")
    unknown = [name for name in args.labels or [] if name not in manifest.label_names]
    if unknown:
        raise DataError(f"--labels {unknown[0]}: {data}/manifest.csv has {', '.join(manifest.label_names)}")
    has_labels = ~np.isnan(manifest.labels).all(1)                      # an all-empty row is an image without labels
    train, val, test = (images[has_labels[images]] for images in map(manifest.images, ("train", "val", "test")))
    for split, images in zip(("train", "val", "test"), (train, val, test)):
        if not len(images):
            raise DataError(f"{manifest.folder / 'manifest.csv'}: no image of the {split} split has a label")
    asked = args.labels or manifest.label_names
    columns = [column for column in map(manifest.label_names.index, asked) if {0, 1} <= set(
        np.nan_to_num(manifest.labels[train, column], nan=0 if args.blank == "zeros" else -1).tolist())]
    names = [manifest.label_names[column] for column in columns]
    if not names:
        raise DataError(f"{manifest.folder / 'manifest.csv'}: no label has a positive and a negative in train")
    if len(names) < len(asked):
        say("left out, without both a positive and a negative in the train split: "
            + ", ".join(name for name in asked if name not in names))
    task = make_task(manifest.labels[:, columns], names, train, args.uncertain, args.blank)
    if np.isnan(task.truth[val]).all():
        raise DataError(f"{manifest.folder / 'manifest.csv'}: the val split has only uncertain or empty cells in "
                        f"{', '.join(names)}")
    for name, y in zip(names, task.truth[val].T):
        if not {0, 1} <= set(y.tolist()):
            say(f"{name} has one class only in val: its threshold is 0.5, and it has no say in what is chosen there")
    policy = {"exclusive": "exclusive labels, softmax, AUROC one against the rest",
              "binary": f"independent labels; in training -1 counts as {args.uncertain}, blank as {args.blank}",
              "three-way": f"independent labels, uncertain a class of its own; blank counts as {args.blank}"}
    policy = policy[task.kind] + ("; classes balanced" if args.balance else "")
    say(f"{data}: {len(train)} train, {len(val)} val, {len(test)} test images with labels\n"
        f"{len(names)} labels ({', '.join(names)}): {policy}; -1 is never scored")
    samples, drawn = {}, {}
    for fraction, seed in itertools.product(args.fraction, args.seeds):
        rows, asked, taken = draw(manifest.patients[train], task.truth[train], fraction, seed)
        samples[fraction, seed] = train[rows]
        line = f"draw {seed}: {len(rows)} images of {taken} patients"
        if taken > asked:
            line += f", {taken - asked} more than the fraction for labels that lacked a class"
        drawn.setdefault(fraction, []).append(line if fraction < 1 else "every draw: all images")
    if args.batch_size % world_size:
        raise DataError(f"--batch-size {args.batch_size} is global and must divide by the {world_size} processes")

    # ------------------------------------------------------------------------------------------------------- run folder
    out = Path(args.out)
    config = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN} | {"init": inits, "data": data}
    config["encoders"] = [hashlib.sha256(Path(i).read_bytes()).hexdigest()[:16] if i in paths else "" for i in inits]
    config["manifest"] = hashlib.sha256((manifest.folder / "manifest.csv").read_bytes()).hexdigest()[:16]
    if rank == 0:
        open_run(args, config, held)
    if world_size > 1:
        dist.barrier()

    def folder_of(init, mode, fraction, seed):
        return out / "combinations" / re.sub(r"[^\w.-]+", "-", f"{shown[init]}_{mode}_{fraction:g}_seed{seed}")

    def log(writer, line):
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps({k: None if isinstance(v, float) and math.isnan(v) else v
                                   for k, v in line.items()}) + "\n")
        for key, value in line.items():
            if writer and isinstance(value, float):
                writer.add_scalar(key, value, line["epoch"])

    best_on_val = max((load_checkpoint(file)["val_score"] for file in out.glob("combinations/*/predictions.pt")),
                      default=-math.inf)

    def finish(init, mode, fraction, seed, net, val_p, test_p, extra):
        """Keep a combination's predictions and, if it is the best on val up to now, its classifier."""
        nonlocal best_on_val
        folder, name = folder_of(init, mode, fraction, seed), f"{shown[init]}, {mode}, {fraction:g}, seed {seed}"
        value = val_score(val_p, task.truth[val])
        if value > best_on_val:
            best_on_val = value
            save_checkpoint(out / "classifier.pt", {
                "format": FORMAT, "arch": setting[init]["arch"], "encoder": net.encoder.state_dict(),
                "classifier": net.head.state_dict(), "labels": names, "kind": task.kind, "val_score": value,
                "thresholds": [youden(p, y) for p, y in zip(val_p.T, task.truth[val].T)],
                "config": config | setting[init] | {"mean": MEAN, "std": STD, "what": name}})
        sample = task.truth[samples[fraction, seed]]
        save_checkpoint(folder / "predictions.pt", {
            "val": torch.from_numpy(val_p), "test": torch.from_numpy(test_p), "val_score": value, **extra,
            "n_train": (~np.isnan(sample)).sum(0).tolist(), "positives": np.nansum(sample, 0).astype(int).tolist()})
        say(f"{name}: {'AUROC' if value >= 0 else 'minus Brier score'} on val {abs(value):.4f} "
            f"({', '.join(f'{k} {v:g}' for k, v in extra.items() if isinstance(v, float))})")

    # ----------------------------------------------------------------------------------------------------- linear probe
    everything = np.concatenate([train, val, test])
    row_of = np.empty(len(manifest.paths), np.int64)
    row_of[everything] = np.arange(len(everything))

    def linear(init):
        """All fractions and draws of one initialisation, from features that are extracted once and kept."""
        folders = [folder_of(init, "linear", *draw) for draw in itertools.product(args.fraction, args.seeds)]
        if all((folder / "predictions.pt").exists() for folder in folders):
            return
        torch.manual_seed(0)                                            # one untrained encoder stands for all
        encoder = build_encoder(setting[init]["arch"], init).to(device, memory_format=torch.channels_last)
        say(f"{shown[init]}: features of {len(everything)} images, from {args.features} where they are kept")
        loader = eval_loader(manifest, everything, args.batch_size, preprocessing(init), **alone)
        features = cached_features(encoder, loader, len(everything), Path(args.features), dtype)             # (n, D)
        # All of train, labelled or drawn or not, says how large a feature is; some are constant on a few images.
        mean, deviation = features[row_of[train]].mean(0), features[row_of[train]].std(0).clamp(min=1e-6)
        features, fitted = (features - mean) / deviation, {}

        def probabilities(images, coefficients, intercepts):                                    # (D, G, K), (G, K)
            logits = features[row_of[images]].double() @ coefficients.flatten(1) + intercepts.flatten()
            return to_probabilities(logits, task.kind)

        for fraction, seed in itertools.product(args.fraction, args.seeds):
            folder, sample = folder_of(init, "linear", fraction, seed), samples[fraction, seed]
            if (folder / "predictions.pt").exists():
                continue
            if sample.tobytes() not in fitted:                          # all of the labels are the same in every draw
                x, targets, known = features[row_of[sample]], task.targets[sample], task.known[sample]
                weights = cell_weights(targets, known, args.balance)
                fitted[sample.tobytes()] = [a.cpu() for a in fit_logistic(*(
                    torch.as_tensor(a, dtype=torch.float64, device=device) for a in (x, targets, weights, STRENGTHS)))]
            coefficients, intercepts = fitted[sample.tobytes()]                                # (D, R, G, K), (R, G, K)
            scores = [val_score(probabilities(val, coefficients[:, r], intercepts[r]), task.truth[val])
                      for r in range(len(STRENGTHS))]
            r = len(STRENGTHS) - 1 - int(np.argmax(scores[::-1]))       # among equals the strongest
            weight = coefficients[:, r].flatten(1) / deviation[:, None]                             # (D, G * K)
            bias = intercepts[r].flatten() - mean.double() @ weight
            net = Classifier(encoder, len(bias))
            net.head.load_state_dict({"weight": weight.T.float(), "bias": bias.float()})
            folder.mkdir(parents=True, exist_ok=True)
            finish(init, "linear", fraction, seed, net, *(
                probabilities(images, coefficients[:, r], intercepts[r]) for images in (val, test)),
                {"strength": float(STRENGTHS[r])})

    def preprocessing(init):
        return Preprocessing(*(setting[init][key] for key in ("image_size", "normalize", "clahe")))

    # ------------------------------------------------------------------------------------------------- full fine-tuning
    targets_all = torch.from_numpy(task.targets).to(device)                                             # (N, G, K)

    def full(init, fraction, seed):
        """Train encoder and head on one draw; the epoch that is best on val counts."""
        folder, last, sample = folder_of(init, "full", fraction, seed), out / "last.pt", samples[fraction, seed]
        torch.manual_seed(seed)
        net = Classifier(build_encoder(setting[init]["arch"], init), targets_all[0].numel())
        net = net.to(device, memory_format=torch.channels_last)
        if world_size > 1 and cuda:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)          # PyTorch has none on a CPU
        groups = [dict(params=[p for p in module.parameters() if (p.ndim > 1) == decayed], peak=peak,
                       weight_decay=args.weight_decay if decayed else 0.0)
                  for module, peak in ((net.encoder, args.lr_encoder), (net.head, args.lr_head))
                  for decayed in (True, False)]
        optimizer = torch.optim.AdamW(groups, fused=cuda)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        weights = torch.zeros(task.known.shape, device=device)                                              # (N, G)
        weights[sample] = torch.from_numpy(cell_weights(task.targets[sample], task.known[sample],
                                                        args.balance)).float().to(device)
        epoch, best, peaks = 0, {"val_score": -math.inf}, []
        state = load_checkpoint(last) if last.exists() else {}
        if state.get("folder") == str(folder):
            net.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            epoch, best, peaks = state["epoch"], state["best"], state["peaks"]
            say(f"going on from {last}, epoch {epoch} of {folder.name}")
        del state
        model = net if world_size == 1 else DistributedDataParallel(net, device_ids=[local_rank] if cuda else None)
        writer = SummaryWriter(folder, purge_step=epoch + 1 if epoch else None) if rank == 0 else None
        if rank == 0 and (out / "log.jsonl").exists():          # lines of epochs that will be run once more
            lines = (out / "log.jsonl").read_text().splitlines(True)
            (out / "log.jsonl").write_text("".join(line for line in lines if line.endswith("\n") and not (
                (entry := json.loads(line))["combination"] == folder.name and entry["epoch"] > epoch)))

        def evaluate(images):
            loader = eval_loader(manifest, images, args.batch_size, preprocessing(init), **shared)
            return to_probabilities(extract_features(net, loader, len(images), rank, world_size, dtype), task.kind)

        epoch_steps = max(args.min_steps, math.ceil(len(sample) / args.batch_size))
        total_steps, warmup_steps = args.epochs * epoch_steps, math.ceil(args.warmup_epochs * epoch_steps)
        batches = iter(train_loader(manifest, sample, args.batch_size, range(epoch * epoch_steps, total_steps), 1,
                                    AUGMENTATION, preprocessing(init), seed, **shared))
        while epoch < args.epochs:
            net.train()
            if args.freeze_bn:
                for module in net.modules():
                    module.train(not isinstance(module, nn.modules.batchnorm._BatchNorm))
            loss_sum, clock = torch.zeros((), device=device), time.perf_counter()
            for step in range(epoch * epoch_steps, (epoch + 1) * epoch_steps):
                factor = ((step + 1) / warmup_steps if step < warmup_steps else
                          (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2)
                for group in optimizer.param_groups:
                    group["lr"] = factor * group["peak"]
                x, index = next(batches)                                                            # (B, 1, S, S)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    logits = model(x.contiguous(memory_format=torch.channels_last))                 # (B, G * K)
                index = index.to(device)
                loss = masked_cross_entropy(logits.view(-1, *targets_all.shape[1:]), targets_all[index], weights[index])
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                loss_sum += loss.detach()
            epoch += 1
            if world_size > 1:
                dist.all_reduce(loss_sum)
                for buffer in net.buffers():                    # one set of batch norm statistics, or rows would differ
                    dist.broadcast(buffer, 0)
            loss = loss_sum.item() / epoch_steps / world_size
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is not finite in epoch {epoch} of {folder.name}")
            seconds = time.perf_counter() - clock
            val_p = evaluate(val)
            value = val_score(val_p, task.truth[val])
            if args.peak:
                peaks.append(torch.from_numpy(evaluate(test)).float())                              # (n_test, L)
            if value > best["val_score"]:
                best = {"val_score": value, "epoch": epoch, "val": torch.from_numpy(val_p),
                        "model": {key: v.cpu().clone() for key, v in net.state_dict().items()}}
            if rank == 0:
                save_checkpoint(last, {
                    "folder": str(folder), "model": net.state_dict(), "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(), "epoch": epoch, "best": best, "peaks": peaks})
                log(writer, {"combination": folder.name, "epoch": epoch, "loss": loss, "val_score": value,
                             "lr_encoder": optimizer.param_groups[0]["lr"], "lr_head": optimizer.param_groups[2]["lr"],
                             "images_per_second": epoch_steps * args.batch_size / seconds})
                say(f"{folder.name} epoch {epoch:03d}/{args.epochs} | loss {loss:.4f} | val AUROC {value:.4f} | "
                    f"{epoch_steps * args.batch_size / seconds:.0f} img/s")
        net.load_state_dict(best["model"])
        test_p = evaluate(test)
        if rank == 0:
            extra = {"epoch": float(best["epoch"])} | ({"peaks": torch.stack(peaks)} if peaks else {})
            finish(init, "full", fraction, seed, net, best["val"].numpy(), test_p, extra)
            writer.close()
            last.unlink()
        if world_size > 1:
            dist.barrier()

    # ------------------------------------------------------------------------------------------------- all combinations
    for init in inits if "linear" in args.mode and rank == 0 else ():
        linear(init)
    for fraction, seed, init in itertools.product(args.fraction, args.seeds, inits) if "full" in args.mode else ():
        if not (folder_of(init, "full", fraction, seed) / "predictions.pt").exists():
            full(init, fraction, seed)
    if rank:
        return
    (out / "last.pt").unlink(missing_ok=True)                   # of a run killed between its end and its tidying up

    # -------------------------------------------------------------------------------------- scores, by the test labels
    scores, replicates, predictions, comparisons, rows = {}, {}, {}, [], []
    counts, truth = patient_counts(manifest.patients[test], args.bootstrap), task.truth[test]
    for mode, fraction, init in itertools.product(args.mode, args.fraction, inits):
        draws = []
        for seed in args.seeds:
            kept = load_checkpoint(folder_of(init, mode, fraction, seed) / "predictions.pt")
            predictions[shown[init], mode, fraction, seed] = kept["test"].numpy()
            thresholds = [youden(p, y) for p, y in zip(kept["val"].numpy().T, task.truth[val].T)]
            draws.append(score(kept["test"].numpy(), truth, thresholds, counts))
            columns = {"n_train": kept["n_train"], "positives": kept["positives"]} | draws[-1][0]
            if "peaks" in kept:                                                                     # (epochs, n, L)
                right = np.where(np.isnan(truth), np.nan, (kept["peaks"].numpy() >= 0.5) == truth)
                columns["peak_accuracy"] = draws[-1][0]["peak_accuracy"] = nan_mean(right, 1).max(0).tolist()
            rows += [{"init": shown[init], "mode": mode, "fraction": fraction, "seed": seed, "label": name} |
                     {key: None if math.isnan(v[i]) else v[i] for key, v in columns.items()}
                     for i, name in enumerate(names)]
        here = shown[init], mode, fraction
        scores[here] = {key: np.array([columns[key] for columns, _ in draws], float) for key in draws[0][0]}
        replicates[here] = np.array([areas for _, areas in draws])                                  # (S, L, R)
        # The draws' mean, on the same patients for both: what another test set would show, not other training sets.
        for against in (key for key in scores if key[1:] == here[1:] and key != here):
            difference = nan_mean(replicates[here]) - nan_mean(replicates[against])                 # (L, R)
            point = nan_mean(scores[here]["auroc"]) - nan_mean(scores[against]["auroc"])            # (L,)
            for label, some, value in [("mean", nan_mean(difference), nan_mean(point)), *zip(names, difference, point)]:
                result = dict(zip(("difference", "low", "high", "p"), (float(value), *paired_test(some))))
                comparisons.append({"mode": mode, "fraction": fraction, "init": shown[init], "against": against[0],
                                    "label": label} | {k: None if math.isnan(v) else v for k, v in result.items()})
    text = (f"# What pre-training buys: {data}\n\n{len(names)} labels: {policy}; -1 is never scored. {len(test)} test "
            f"images of {len(set(manifest.patients[test]))} patients. Epoch, regularisation and thresholds are chosen "
            f"on val ({len(val)} images). Mean ± deviation over {len(args.seeds)} draws. Intervals and p by "
            f"{args.bootstrap} bootstrap replicates over the test patients, the same for all rows.\n"
            + tables(scores, comparisons, drawn, names, args.peak))
    print("\n" + text)
    for name, content in ("results.md", text), ("results.json", json.dumps(
            {"labels": policy, "draws": drawn, "results": rows, "comparisons": comparisons}, indent=1) + "\n"):
        (out / f"{name}.tmp").write_text(content)
        os.replace(out / f"{name}.tmp", out / name)
    with SummaryWriter(out / "combinations") as writer:
        writer.add_text("results", text)
        for name, figure in (("efficiency", efficiency_figure(scores, replicates)),
                             ("calibration", calibration_figure(predictions, truth))):
            figure.savefig(out / f"{name}.png", dpi=150)
            writer.add_figure(name, figure)
        for (init, mode, fraction, seed), p in predictions.items():
            if seed == args.seeds[0]:
                writer.add_figure(f"curves/{mode} {fraction:g}/{init}", curves_figure(p, truth, names))
    if args.explain:
        net, state = load_classifier(out / "classifier.pt")
        best = state["config"]
        explain(net.to(device), state, manifest, test[::max(1, len(test) // args.explain)][:args.explain],
                Preprocessing(best["image_size"], best["normalize"], best["clahe"]), out / "explained", alone)
    say(f"done: {out / 'results.md'}, {out / 'results.json'}, {out / 'classifier.pt'}")


if __name__ == "__main__":
    main()
