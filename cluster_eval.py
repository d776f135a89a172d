"""Stage 3: what structure the features have, without labels in training. Encoder and data folder in, one table out.

    python cluster_eval.py                                      the last pre-training, beside random weights and pixels
    python cluster_eval.py --init random imagenet runs/pretrain/encoder.pt runs/finetune/classifier.pt
    python cluster_eval.py --classes binary:Effusion            one finding against the rest
    python cluster_eval.py --k sweep                            how many clusters do the features themselves suggest?
    tensorboard --logdir runs                                   tables, figures, and the features in the projector

k-means never sees a label; labels only judge what it found. They have to be exclusive for that, so --classes says which
images take part and as what. The test split is used unless --split says otherwise: the encoder has seen every image of
train, a classifier its labels too, and clusters found there could be remembered ones. The run folder (--out) gets
results.json, results.md, a confusion matrix, a map and a contact sheet for each row, and TensorBoard's files.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances, silhouette_score
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from dali_pipeline import SPLITS, DataError, Manifest, Preprocessing, eval_loader, read_manifest
from model import ARCHITECTURES, MEAN, STD, CheckpointError, build_encoder, cached_features, load_checkpoint

SCORES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "nmi": "NMI", "ari": "ARI",
          "purity": "purity", "silhouette": "silhouette", "cosine_within": "cosine within classes",
          "cosine_between": "cosine between classes", "knn_accuracy": "k-NN accuracy", "knn_auroc": "k-NN AUROC"}
NAMED = ("random", "imagenet", "pixels")            # what --init may be other than a file
MINIBATCH_ABOVE = 20_000                            # images; beyond, k-means works on batches of 4,096
PIXELS, COMPONENTS = 32, 50                         # `pixels`: images of 32 x 32, reduced to 50 principal components
NO_FINDING = "No Finding"                           # NIH's and CheXpert's name of the column that says so
WRITTEN = ("results.*", "map_*.png", "confusion_*.png", "nearest_*.png", "sweep.png", "events.out.tfevents.*",
           "projector_config.pbtxt")                # what a run leaves beside its config.json, and the folder 00000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("features, data and run folder")
    group.add_argument("--init", nargs="+", metavar="random|imagenet|pixels|PATH", help="rows of the table; a PATH is an "
                       "encoder.pt or classifier.pt (default: random, pixels and the last pre-training's encoder.pt)")
    group.add_argument("--data", help="data folder (default: the one that the first checkpoint was trained on)")
    group.add_argument("--split", choices=(*SPLITS, "all"), default="test", help="images to cluster (default "
                       "%(default)s, which no training has seen)")
    group.add_argument("--out", default="runs/cluster", help="run folder (default %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="give up the results that the run folder holds")
    group.add_argument("--export", metavar="FILE.npz", help="write the last row's features, index, path, patient, labels "
                       "of the whole split")

    group = parser.add_argument_group("network and preprocessing (default: each checkpoint's own; the first one's for "
                                      "rows without)")
    group.add_argument("--arch", choices=ARCHITECTURES, help="encoder (without any checkpoint: resnet50)")
    group.add_argument("--image-size", type=int, help="side of the input, pixels (without any checkpoint: 224)")
    group.add_argument("--normalize", choices=("fixed", "image"), help="as in pretrain.py")
    group.add_argument("--clahe", action=argparse.BooleanOptionalAction, default=None, help="as in pretrain.py")

    group = parser.add_argument_group("classes")
    group.add_argument("--classes", default="single", metavar="single|dominant|binary:LABEL", help="images with one "
                       "finding only, all by their rarest finding, or LABEL against the rest (default %(default)s)")
    group.add_argument("--no-finding", choices=("keep", "drop"), help="images without any finding: a class of their own, "
                       "or in binary part of the rest (default: drop; for binary keep)")

    group = parser.add_argument_group("clustering and scores")
    group.add_argument("--k", default="classes", metavar="classes|sweep|N", help="clusters: as many as classes, N, or "
                       "as many as classes and silhouette and inertia against k (default %(default)s)")
    group.add_argument("--seeds", type=int, default=5, help="k-means runs a row, each the best of 10 initialisations "
                       "(default %(default)s)")
    group.add_argument("--algorithm", choices=("auto", "kmeans", "minibatch"), default="auto", help="auto: minibatch "
                       f"above {MINIBATCH_ABOVE:,} images")
    group.add_argument("--l2", action=argparse.BooleanOptionalAction, default=True, help="bring every feature vector to "
                       "length 1 first (default: yes)")
    group.add_argument("--neighbours", type=int, default=20, help="of the k-NN scores (default %(default)s)")
    group.add_argument("--bootstrap", type=int, default=1000, help="draws of patients for the intervals (default "
                       "%(default)s)")
    group.add_argument("--sample", type=int, default=5000, help="at most so many images, drawn once, for silhouette and "
                       "as k-NN queries (default %(default)s)")
    group.add_argument("--map-images", type=int, default=2000, help="at most, on the map and in the projector (default "
                       "%(default)s)")

    group = parser.add_argument_group("how it computes")
    group.add_argument("--batch-size", type=int, default=128, help="of feature extraction (default %(default)s)")
    group.add_argument("--threads", type=int, help="of the loader (default: cores, at most 8)")
    args = parser.parse_args(argv)
    for flag in ("image_size", "seeds", "neighbours", "bootstrap", "batch_size", "threads"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be positive")
    for flag in ("sample", "map_images"):
        if getattr(args, flag) < 10:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be 10 at least")
    if args.k not in ("classes", "sweep") and not (args.k.isdecimal() and int(args.k) > 1):
        parser.error(f"--k {args.k} is none of classes, sweep or a number from 2")
    if args.classes not in ("single", "dominant") and not args.classes.startswith("binary:"):
        parser.error(f"--classes {args.classes} is none of single, dominant or binary:LABEL")
    if args.init and len(set(args.init)) < len(args.init):
        parser.error(f"--init {' '.join(args.init)} names a row twice")
    args.no_finding = args.no_finding or ("keep" if args.classes.startswith("binary:") else "drop")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# From findings, of which an image may have many, to classes, of which it has one.

def choose_classes(labels: np.ndarray, names: list[str], rule: str, no_finding: str) -> tuple[np.ndarray, list[str]]:
    """Each image's class (n,) int64, -1 where it is left out, and the classes' names. labels (n, L) as in the manifest.

    rule: `single` takes images with one positive finding and no uncertain one; `dominant` every image with a positive
    one, the rarest of `labels` where it has several; `binary:LABEL` all but those where LABEL is uncertain. An empty
    cell counts as absent, a row of nothing else is left out. "No Finding" is no finding: with no_finding `keep`, images
    without a positive or uncertain finding are a class, or in `binary` belong to the rest. DataError: no such LABEL."""
    findings = np.array([name != NO_FINDING for name in names])
    present, uncertain = (labels == 1)[:, findings], (labels == -1)[:, findings]                        # (n, F) bool
    healthy = labels[:, names.index(NO_FINDING)] == 1 if NO_FINDING in names else (labels == 0).any(1)
    healthy &= ~(present | uncertain).any(1)
    if rule.startswith("binary:"):
        label = rule.removeprefix("binary:")
        if label not in names:
            raise DataError(f"--classes {rule}: there is no label {label}, only {', '.join(names)}")
        column = labels[:, names.index(label)]
        out = (column == -1) | np.isnan(labels).all(1) | (healthy & (column != 1) & (no_finding == "drop"))
        return np.where(out, -1, column == 1), [f"not {label}", label]
    if rule == "single":
        chosen, truth = (present.sum(1) == 1) & ~uncertain.any(1), present.argmax(1)
    else:
        chosen, truth = present.any(1), np.where(present, present.sum(0), len(labels) + 1).argmin(1)
    truth = np.where(chosen, truth, np.where(healthy & (no_finding == "keep"), findings.sum(), -1))
    return truth, [name for name in names if name != NO_FINDING] + [NO_FINDING]


# ----------------------------------------------------------------------------------------------------------------------
# Scores. Each is a function of the images' weights: all one for the estimate; for the bootstrap, by which the interval
# is found, how often the image's patient was drawn.

def contingency(truth: np.ndarray, clusters: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """How many images (or what weight of them) each class has in each cluster, (C, K) float64."""
    shape = truth.max() + 1, clusters.max() + 1
    return np.bincount(truth * shape[1] + clusters, weights, minlength=math.prod(shape)).reshape(shape).astype(float)


def agreement(table: np.ndarray) -> dict[str, float]:
    """How well clusters fit classes, from their contingency table (C, K) of counts.

    accuracy: share of images in the cluster that their class was given by the best one-to-one assignment (Hungarian
    method, Kuhn 1955), so an unassigned cluster's images count as wrong. balanced_accuracy: under the same assignment,
    the mean over the classes. purity: every cluster takes its majority class; grows with K. nmi: mutual information
    over the mean of both entropies. ari: the Rand index adjusted for chance (Hubert and Arabie 1985)."""
    n, classes, clusters = table.sum(), table.sum(1), table.sum(0)
    rows, columns = linear_sum_assignment(table, maximize=True)
    found = np.zeros(len(classes))
    found[rows] = table[rows, columns]

    def entropy(counts):
        p = counts[counts > 0] / n
        return -(p * np.log(p)).sum()

    mean_entropy = (entropy(classes) + entropy(clusters)) / 2
    pairs, class_pairs, cluster_pairs = [(x * (x - 1)).sum() / 2 for x in (table, classes, clusters)]
    chance, most = 2 * class_pairs * cluster_pairs / max(n * (n - 1), 1), (class_pairs + cluster_pairs) / 2
    return {"accuracy": found.sum() / n,
            "balanced_accuracy": (found[classes > 0] / classes[classes > 0]).mean(),
            "nmi": (2 * mean_entropy - entropy(table)) / mean_entropy if mean_entropy else 1.0,
            "ari": (pairs - chance) / (most - chance) if most != chance else 1.0,
            "purity": table.max(0).sum() / n}


def class_cosines(features: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Mean cosine over all pairs of two images of one class, and of two classes. features (n, D), of any length.

    No pair is formed: with s_c the sum of class c's unit vectors, all its pairs' cosines add up to |s_c|^2."""
    count = np.bincount(truth).astype(float)                                                            # (C,)
    pick = np.zeros((len(count), len(truth)), features.dtype)
    pick[truth, np.arange(len(truth))] = 1 / np.linalg.norm(features, axis=1).clip(1e-12)
    sums = (pick @ features).astype(float)                                                              # (C, D)
    own, every = (sums ** 2).sum(), (sums.sum(0) ** 2).sum()
    same, other = (count * (count - 1)).sum(), count.sum() ** 2 - (count ** 2).sum()                    # ordered pairs
    return (own - len(truth)) / same if same else math.nan, (every - own) / other if other else math.nan


def knn_votes(features: np.ndarray, truth: np.ndarray, patients: np.ndarray, queries: np.ndarray,
              k: int = 20) -> np.ndarray:
    """Share (m, C) of each class in the votes of the k nearest images of other patients. features (n, D), queries (m,).

    Leave-one-patient-out on the one split: no second split is needed, and a patient's other images, nearly copies, do
    not vote. A vote weighs exp(cosine / 0.07) (Wu et al. 2018)."""
    x, classes, who = torch.from_numpy(features), torch.from_numpy(truth), torch.from_numpy(patients)
    norm = x.norm(dim=1).clamp(min=1e-12)
    votes = torch.zeros(len(queries), int(classes.max()) + 1)
    for block in torch.arange(len(queries)).split(256):                         # 256 x 112,120 cosines are 115 MB
        q = torch.from_numpy(queries)[block]
        cosine = (x[q] / norm[q, None]) @ x.T / norm                                                    # (256, n)
        cosine, nearest = cosine.masked_fill_(who[q, None] == who, -math.inf).topk(min(k, len(x) - 1))
        votes[block] = votes[block].scatter_add(1, classes[nearest], ((cosine - cosine[:, :1]) / 0.07).exp())
    return (votes / votes.sum(1, keepdim=True)).numpy()


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties half. All (m,); NaN where one is missing."""
    order = np.unique(score, return_inverse=True)[1]
    up, down = (np.bincount(order, weights * side) for side in (positive, ~positive))
    total = up.sum() * down.sum()
    return float((up * (down.cumsum() - down / 2)).sum() / total) if total else math.nan


def k_means(features: np.ndarray, k: int, seed: int, minibatch: bool) -> KMeans | MiniBatchKMeans:
    """The best of 10 initialisations (k-means++). Fewer than k clusters where images are the same: no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if minibatch:
            return MiniBatchKMeans(k, n_init=10, batch_size=4096, random_state=seed).fit(features)
        return KMeans(k, n_init=10, random_state=seed).fit(features)


def silhouette(distances: np.ndarray, clusters: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw 1987) from distances (m, m); NaN where it is not defined: one cluster, or m of them."""
    found = len(np.unique(clusters))
    return float(silhouette_score(distances, clusters, metric="precomputed")) if 1 < found < len(clusters) else math.nan


def sample_distances(features: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Euclidean distances (m, m) float32 of the sampled images, the diagonal exactly 0."""
    distances = pairwise_distances(features[sample])
    np.fill_diagonal(distances, 0)
    return distances


def evaluate(features: np.ndarray, truth: np.ndarray, patients: np.ndarray, k: int, seeds: int, minibatch: bool,
             neighbours: int, bootstrap: int, sample: np.ndarray) -> tuple[dict, KMeans | MiniBatchKMeans]:
    """One row of the table, and the k-means of lowest inertia. features (n, D) float32; truth, patients (n,) int64.

    For each score of SCORES: mean and spread (standard deviation) over the seeds; low and high, the 95 % interval of
    that mean when patients are drawn anew, the clusters kept and assigned to classes again. Cosines have neither,
    silhouette has no interval."""
    runs = [k_means(features, k, seed, minibatch) for seed in range(seeds)]
    clusterings = [run.labels_.astype(np.int64) for run in runs]
    votes, classes = knn_votes(features, truth, patients, sample, neighbours), np.arange(truth.max() + 1)
    right = votes.argmax(1) == truth[sample]

    def scores(weights):
        """{score: one value a seed, or one}"""
        tables = [agreement(contingency(truth, clusters, weights)) for clusters in clusterings]
        w = weights[sample]
        values = {name: [table[name] for table in tables] for name in tables[0]}
        values["knn_accuracy"] = [(w * right).sum() / w.sum() if w.sum() else math.nan]
        values["knn_auroc"] = [auroc(votes[:, c], truth[sample] == c, w) for c in classes]
        values["knn_auroc"] = [np.nanmean(values["knn_auroc"]) if np.isfinite(values["knn_auroc"]).any() else math.nan]
        return values

    distances, cosines = sample_distances(features, sample), class_cosines(features, truth)
    values = scores(np.ones(len(truth))) | {"cosine_within": cosines[:1], "cosine_between": cosines[1:],
                                            "silhouette": [silhouette(distances, c[sample]) for c in clusterings]}
    rng, n_patients = np.random.default_rng(0), patients.max() + 1          # the same draws for every row
    draws = [{name: np.mean(v) for name, v in scores(np.bincount(
        rng.integers(n_patients, size=n_patients), minlength=n_patients)[patients].astype(float)).items()}
        for _ in range(bootstrap)]
    row = {}
    for name in SCORES:
        v = np.array(values[name], float)
        low, high = np.nanpercentile([d[name] for d in draws], (2.5, 97.5)) if name in draws[0] else (math.nan,) * 2
        row[name] = {"mean": v.mean(), "spread": v.std(ddof=1) if len(v) > 1 else math.nan, "low": low, "high": high,
                     "seeds": v.tolist()}
    return row, min(runs, key=lambda run: run.inertia_)


# ----------------------------------------------------------------------------------------------------------------------
# Figures. A class has a colour, and so has the cluster that the assignment gave it; clusters too many are gray.

def assign(table: np.ndarray) -> dict[int, int]:
    """{cluster: class} of the best one-to-one assignment, in the order of the classes."""
    rows, columns = linear_sum_assignment(table, maximize=True)
    return dict(zip(columns.tolist(), rows.tolist()))


def draw_confusion(table: np.ndarray, names: list[str], title: str) -> Figure:
    """Classes against clusters; the assigned cells come first, as a diagonal. Shade: share of the class."""
    order = [*assign(table), *np.setdiff1d(np.arange(table.shape[1]), list(assign(table)))]
    share = table / table.sum(1, keepdims=True)
    figure = Figure(figsize=(3.5 + 0.6 * len(order), 1.8 + 0.4 * len(names)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(share[:, order], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(table.shape):
        axes.text(column, row, f"{table[row, order[column]]:.0f}", ha="center", va="center", fontsize=9,
                  color="white" if share[row, order[column]] > 0.5 else "black")
    axes.set_xticks(range(len(order)), order)
    axes.set_yticks(range(len(names)), [f"{name} ({n:.0f})" for name, n in zip(names, table.sum(1))])
    axes.set_xlabel("cluster, below the class that it was assigned to on the diagonal")
    figure.suptitle(f"{title}: images of each class in each cluster", fontsize=10)
    return figure


def draw_map(points: np.ndarray, truth: np.ndarray, clusters: np.ndarray, names: list[str], assigned: dict[int, int],
             title: str) -> Figure:
    """Points (m, 2) twice: coloured by class (m,), and by cluster (m,)."""
    figure = Figure(figsize=(13, 6.6), dpi=110, layout="constrained")
    palette = [matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"](c) for c in range(20)]
    by_cluster = {c: f"{c}: {names[assigned[c]]}" if c in assigned else f"{c}" for c in range(clusters.max() + 1)}
    for axes, values, labels, what in zip(figure.subplots(1, 2), (truth, clusters), (dict(enumerate(names)), by_cluster),
                                          ("class", "k-means cluster, and the class assigned to it")):
        for value, label in labels.items():
            kind = value if values is truth else assigned.get(value)
            axes.scatter(*points[values == value].T, s=12, linewidths=0, alpha=0.8, label=label,
                         color="lightgray" if kind is None else palette[kind % 20])
        axes.set(title=f"by {what}", xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=8, frameon=False, markerscale=2)
    figure.suptitle(f"{title}: t-SNE of {len(points)} images")
    return figure


def draw_nearest(images: np.ndarray, captions: list[list[tuple[str, bool]]], sides: list[str], title: str) -> Figure:
    """Contact sheet: images (K, M, S, S) in [0, 1], each with (its class, whether its cluster was assigned to it)."""
    rows, columns, size, _ = images.shape
    figure = Figure(figsize=(2 + 1.1 * columns, 0.8 + 1.3 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, image, (caption, right) in zip(grid.flat, images.reshape(-1, size, size), sum(captions, [])):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title(caption, fontsize=8, color="darkgreen" if right else "firebrick", pad=2)
        axes.set(xticks=[], yticks=[])
    for axes, side in zip(grid[:, 0], sides):
        axes.set_ylabel(side, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{title}: the images nearest to each centre, green where the class is the cluster's", fontsize=10)
    return figure


def draw_sweep(curves: dict[str, list[dict]], n_classes: int) -> Figure:
    """Silhouette, and inertia over that of k = 2, against k, a curve a row of the table."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("silhouette", "inertia")):
        for name, curve in curves.items():
            values = np.array([point[what] for point in curve])
            axes.plot([point["k"] for point in curve], values / values[0] if what == "inertia" else values, "o-",
                      markersize=4, label=name)
        axes.axvline(n_classes, color="gray", linestyle=":", label=f"{n_classes} classes")
        axes.set(xlabel="k, clusters", title="mean silhouette: higher is better separated" if what == "silhouette" else
                 "inertia / inertia at k = 2: look for the bend")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Rows, run folder, the story.

def read_row(init: str) -> dict:
    """What a row is before its features are there: its `name`, the `labels` that its training used (None: unknown), and
    of a checkpoint `arch` and `config` as the file has them. CheckpointError where there is no such file."""
    if init in NAMED:
        return {"name": init, "labels": 1_281_167 if init == "imagenet" else 0, "config": {}}
    state = load_checkpoint(init)
    config = state.get("config", {})
    labels = state.get("n_train") if "classifier" in state else {"imagenet": 1_281_167, "random": 0}.get(
        config.get("init"))                 # what an encoder.pt or classifier.pt began from may have used labels, too
    return {"name": "/".join(Path(init).with_suffix("").parts[-2:]), "labels": labels, "config": config} | (
        {"arch": state["arch"]} if "arch" in state else {})


def extract(init: str, arch: str, preprocessing: Preprocessing, manifest: Manifest, images: np.ndarray,
            args: argparse.Namespace) -> np.ndarray:
    """A row's features (n, D) float32 of `images`, computed or found in the folder `features` beside --out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if device.type == "cpu" else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    torch.manual_seed(0)
    if init == "pixels":                            # to the loader and the store of features, an encoder like others
        encoder, dtype = nn.Flatten(), None
        encoder.num_features, preprocessing = PIXELS ** 2, dataclasses.replace(preprocessing, image_size=PIXELS)
    else:
        encoder = build_encoder(arch, init).to(device, memory_format=torch.channels_last)
    loader = eval_loader(manifest, images, args.batch_size, preprocessing, device, half=dtype is not None,
                         threads=args.threads or min(8, os.cpu_count()))
    features = cached_features(encoder, loader, len(images), Path(args.out).parent / "features", dtype).numpy()
    bad = np.flatnonzero(~np.isfinite(features.sum(1)))
    if len(bad):
        raise DataError(f"{init}: the features of {len(bad)} images are not finite, the first of them "
                        f"{manifest.folder / manifest.paths[images[bad[0]]]}")
    if init == "pixels":
        features = PCA(min(COMPONENTS, *features.shape), random_state=0).fit_transform(features)
    return features


def thumbnails(manifest: Manifest, images: np.ndarray, size: int) -> torch.Tensor:
    """(m, 1, size, size) float32 in [0, 1] on the CPU."""
    batches = [x for x, _ in eval_loader(manifest, images, 64, Preprocessing(size), "cpu")]
    return (torch.cat(batches) * STD + MEAN).clamp(0, 1)


def open_run(args: argparse.Namespace, config: dict) -> bool:
    """Make the run folder, or recognise this very run in it: True if it is complete. DataError if it holds others."""
    out, file = Path(args.out), Path(args.out, "config.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    if out.is_dir() and any(out.iterdir()) and before.get("script") != config["script"]:
        raise DataError(f"{out} is not empty and holds no run of cluster_eval.py; choose another --out")
    if (out / "results.json").exists() and not args.overwrite:
        differ = [f"{key} ({before.get(key)} there, {config.get(key)} here)" for key in config
                  if before.get(key) != config[key]]
        if differ:
            raise DataError(f"{out} holds a run with other flags or input: {', '.join(differ)}; choose another --out, "
                            "or give up that run with --overwrite")
        return True
    for old in [path for pattern in WRITTEN for path in out.glob(pattern)]:
        old.unlink()
    shutil.rmtree(out / "00000", ignore_errors=True)                            # the projector's
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=1) + "\n")
    return False


def markdown(results: dict) -> str:
    """results.md from results.json's content."""
    def cell(score):
        if score["mean"] is None:
            return "–"
        return (f"{score['mean']:.3f}" + (f" ± {score['spread']:.3f}" if score["spread"] is not None else "")
                + (f" [{score['low']:.3f}, {score['high']:.3f}]" if score["low"] is not None else ""))

    config, classes = results["config"], results["classes"]
    lines = [f"# Clusters of {config['data']}, {config['split']} split", "",
             f"{sum(classes.values())} of {results['images']} images, {results['patients']} patients; classes "
             f"`{config['classes']}`, images without a finding: {config['no_finding']}. "
             + ", ".join(f"{name} {n}" for name, n in classes.items()) + ".", "",
             f"| init | labels required | {' | '.join(SCORES.values())} |", "|---|---:|" + "---|" * len(SCORES)]
    for name, row in results["rows"].items():
        labels = "unknown" if row["labels_required"] is None else f"{row['labels_required']:,}"
        lines.append(f"| {name} | {labels} | {' | '.join(cell(row['scores'][score]) for score in SCORES)} |")
    lines.append("| *majority class* | | " + " | ".join(
        f"{results['majority'][s]:.3f}" if s in results["majority"] else "–" for s in SCORES) + " |")
    return "\n".join(lines) + f"""

Mean ± standard deviation over {config['seeds']} seeds of {results['algorithm']} with k = {results['k']}, each the best
of 10 initialisations, on {'L2-normalised' if config['l2'] else 'raw'} features; in brackets the 95 % interval of the
mean over {config['bootstrap']} bootstrap draws of patients. *labels required*: images whose labels the row's training
used (imagenet: photographs). All rows use the labels here to judge: accuracy, by the best one-to-one assignment of
clusters to classes; k-NN, by the {config['neighbours']} nearest images of other patients in this split. Silhouette
(of the clusters) and k-NN (of the classes, AUROC one against the rest, mean over classes) are those of
{results['sampled']} images. *pixels*: {COMPONENTS} principal components of the images at {PIXELS} x {PIXELS}.
"""


def finite(value):
    """The same for JSON: NaN becomes null, NumPy's numbers become Python's."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        cluster_eval(args)
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(f"cluster_eval.py: {error}")


def cluster_eval(args: argparse.Namespace) -> None:
    # ------------------------------------------------------------------------------------------------- rows and data
    inits = args.init
    if not inits:
        trained = [path for path in ("runs/pretrain/encoder.pt", "runs/demo/encoder.pt") if Path(path).exists()]
        if not trained:
            raise CheckpointError("there is no runs/pretrain/encoder.pt: train one with pretrain.py (python pretrain.py "
                                  "--demo takes minutes), or name the rows of the table with --init")
        inits = ["random", "pixels", trained[0]]
    rows = {init: read_row(init) for init in inits}
    if len({row["name"] for row in rows.values()}) < len(rows):
        rows = {init: row | {"name": init} for init, row in rows.items()}
    first = next((init for init in inits if rows[init]["config"]), None)
    for init, row in rows.items():
        source = row if row["config"] else rows.get(first, row)
        row["arch"] = args.arch or row.get("arch") or source.get("arch", "resnet50")
        wanted = {f.name: source["config"].get(f.name, f.default) for f in dataclasses.fields(Preprocessing)}
        row["preprocessing"] = Preprocessing(**{name: value if getattr(args, name) is None else getattr(args, name)
                                                for name, value in wanted.items()})
    folder = args.data or rows.get(first, {"config": {}})["config"].get("data")
    if not folder:
        raise DataError("--data is needed: no --init is a checkpoint that knows its data folder")
    if first:
        print(f"inherited from {first}: " + ("" if args.data else f"data folder {folder}, ")
              + f"{rows[first]['arch']}, {rows[first]['preprocessing']}")
    manifest = read_manifest(folder)
    if not manifest.label_names:
        raise DataError(f"{manifest.folder / 'manifest.csv'} has no label column: there is nothing to judge clusters by")
    images = np.arange(len(manifest.paths)) if args.split == "all" else manifest.images(args.split)

    # ------------------------------------------------------------------------------------------------------- classes
    labels = manifest.labels[images]
    choices = [(rule, none) for rule in ("single", "dominant") for none in ("drop", "keep")]
    kept = {f"{rule}, {none} {NO_FINDING}": int((choose_classes(labels, manifest.label_names, rule, none)[0] >= 0).sum())
            for rule, none in choices + [(args.classes, args.no_finding)]}
    truth, names = choose_classes(labels, manifest.label_names, args.classes, args.no_finding)
    chosen = np.flatnonzero(truth >= 0)                                         # places in the split, (n,)
    present, truth = np.unique(truth[chosen], return_inverse=True)
    names = [names[c] for c in present]
    patients = np.unique(manifest.patients[images[chosen]], return_inverse=True)[1]
    print(f"images kept of {len(images)} in {args.split}: " + "; ".join(f"{k}: {n}" for k, n in kept.items()))
    what = f"--classes {args.classes} with --no-finding {args.no_finding} leaves"
    if len(names) < 2:
        raise DataError(f"{what} {f'one class only, {names[0]}' if names else 'no image'}, of {len(images)} images of "
                        f"the {args.split} split: nothing to tell apart")
    k = len(names) if args.k in ("classes", "sweep") else int(args.k)
    if len(chosen) < k:
        raise DataError(f"--k {args.k}: {k} clusters of {len(chosen)} images; {what} no more")
    if patients.max() == 0:
        raise DataError(f"{what} images of one patient only: no neighbours of other patients, no interval")
    minibatch = args.algorithm == "minibatch" or args.algorithm == "auto" and len(chosen) > MINIBATCH_ABOVE
    algorithm = "MiniBatchKMeans" if minibatch else "KMeans"
    classes = dict(zip(names, np.bincount(truth).tolist()))
    print(f"classes {args.classes}: {', '.join(f'{name} {n}' for name, n in classes.items())}; {len(chosen)} images of "
          f"{patients.max() + 1} patients; scikit-learn's {algorithm}, k = {k}"
          + (f" (more than {MINIBATCH_ABOVE:,} images)" if minibatch and args.algorithm == "auto" else ""))
    draw = np.random.default_rng(0)                                             # places in `chosen`, for scores and map
    sample, shown = (np.sort(draw.permutation(len(chosen))[:size]) for size in (args.sample, args.map_images))

    # ---------------------------------------------------------------------------------------------------- run folder
    digest = hashlib.sha256((manifest.folder / "manifest.csv").read_bytes())
    for init in inits:
        digest.update(b"" if init in NAMED else Path(init).read_bytes())
    config = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite", "export", "threads")}
    config |= {"script": "cluster_eval.py", "init": inits, "data": str(folder), "content": digest.hexdigest()[:16]}
    out = Path(args.out)
    if open_run(args, config) and not args.export:
        print(f"{out} is complete; --overwrite computes it anew\n\n{(out / 'results.md').read_text()}")
        return
    writer = SummaryWriter(out)
    sprite = thumbnails(manifest, images[chosen[shown]], PIXELS)

    # ---------------------------------------------------------------------------------------------------------- rows
    one_cluster = agreement(contingency(truth, np.zeros_like(truth)))
    results = {"config": config, "images": len(images), "kept": kept, "classes": classes, "k": k, "sampled": len(sample),
               "patients": int(patients.max()) + 1, "algorithm": algorithm, "rows": {}, "sweep": {},
               "majority": one_cluster | {"knn_accuracy": one_cluster["accuracy"], "knn_auroc": 0.5}}
    for init, row in rows.items():
        clock, name = time.perf_counter(), row["name"]
        slug = re.sub(r"[^\w.-]+", "_", name)
        everything = extract(init, row["arch"], row["preprocessing"], manifest, images, args)           # (split, D)
        seconds = time.perf_counter() - clock
        if args.export and init == inits[-1]:
            np.savez(args.export, features=everything, index=images, path=np.array(manifest.paths)[images],
                     patient=manifest.patients[images], labels=labels, label_names=np.array(manifest.label_names))
            print(f"{args.export}: features {everything.shape} of {init}, as the encoder gives them")
        features = everything if len(chosen) == len(images) else everything[chosen]                     # (n, D)
        del everything
        if args.l2:
            features /= np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)         # in place: there may be GBs
        scores, best = evaluate(features, truth, patients, k, args.seeds, minibatch, args.neighbours, args.bootstrap,
                                sample)
        clusters = best.labels_.astype(np.int64)
        table = contingency(truth, clusters)
        found = len(np.unique(clusters))
        if found < k:
            print(f"{name}: only {found} of {k} clusters hold images; features that are the same cannot be parted")
        results["rows"][name] = {"init": init, "labels_required": row["labels"], "scores": scores, "clusters": found,
                                 "features": features.shape[1], "arch": None if init == "pixels" else row["arch"],
                                 "preprocessing": dataclasses.asdict(row["preprocessing"])}
        for score, values in scores.items():
            for seed, value in enumerate(values["seeds"]):
                writer.add_scalar(f"{score}/{name}", value, seed)

        # ---------------------------------------------------------------------------------------------------- figures
        reduced = PCA(min(COMPONENTS, features.shape[1], len(shown)), random_state=0).fit_transform(features[shown])
        points = TSNE(perplexity=min(30, (len(shown) - 1) / 3), init="pca", random_state=0).fit_transform(reduced)
        assigned = assign(table)
        distance = best.transform(features)                                                             # (n, k)
        near = np.stack([np.argsort(np.where(clusters == c, distance[:, c], math.inf))[:8] for c in range(min(found, 20))])
        sides = [f"{c}: {names[assigned[c]] if c in assigned else '–'}\n{(clusters == c).sum()} images"
                 for c in range(len(near))]
        captions = [[(names[truth[i]] if clusters[i] == c else "", assigned.get(c) == truth[i]) for i in near[c]]
                    for c in range(len(near))]
        sheet = thumbnails(manifest, images[chosen[near.ravel()]], 96).view(*near.shape, 96, 96).numpy()
        sheet[clusters[near] != np.arange(len(near))[:, None]] = 1              # a cluster of fewer than 8 images
        for kind, figure in {"confusion": draw_confusion(table, names, name),
                             "map": draw_map(points, truth[shown], clusters[shown], names, assigned, name),
                             "nearest": draw_nearest(sheet, captions, sides, name)}.items():
            figure.savefig(out / f"{kind}_{slug}.png")
            writer.add_figure(f"{kind}/{name}", figure)
        # Four decimals: the file that the browser loads is a third as large, the neighbours are the same.
        writer.add_embedding(torch.from_numpy(features[shown].astype(float).round(4)), tag=slug, label_img=sprite,
                             metadata_header=["class", "cluster", "patient", "path"], metadata=[
                                 [names[truth[i]], str(clusters[i]), manifest.patients[images[chosen[i]]],
                                  manifest.paths[images[chosen[i]]]] for i in shown])

        if args.k == "sweep":
            distances, curve = sample_distances(features, sample), []
            for n_clusters in range(2, min(max(10, 2 * len(names)), len(chosen) - 1) + 1):
                run = k_means(features, n_clusters, 0, minibatch)
                curve.append({"k": n_clusters, "silhouette": silhouette(distances, run.labels_[sample]),
                              "inertia": float(run.inertia_)})
                for score in ("silhouette", "inertia"):
                    writer.add_scalar(f"sweep_{score}/{name}", curve[-1][score], n_clusters)
            results["sweep"][name] = curve
        line = " | ".join(f"{title} {scores[score]['mean']:.3f}" for score, title in SCORES.items())
        print(f"{name}: {line} "
              f"({seconds:.0f} s for features, {time.perf_counter() - clock - seconds:.0f} s for the rest)", flush=True)

    # --------------------------------------------------------------------------------------------------------- table
    if results["sweep"]:
        figure = draw_sweep(results["sweep"], len(names))
        figure.savefig(out / "sweep.png")
        writer.add_figure("sweep", figure)
    results = finite(results)
    text = markdown(results)
    writer.add_text("results", text)
    writer.close()
    (out / "results.md").write_text(text)
    (out / "results.json.tmp").write_text(json.dumps(results, indent=1) + "\n")
    os.replace(out / "results.json.tmp", out / "results.json")                  # last: where it is, all is there
    print(f"\n{text}\ndone: {out / 'results.md'}")


if __name__ == "__main__":
    main()
