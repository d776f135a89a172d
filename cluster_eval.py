"""Stage 3: what structure the features have, without labels in training. Encoder and data folder in, one table out.

    python cluster_eval.py                                      the last pre-training, beside random weights and pixels
    python cluster_eval.py --init random imagenet runs/pretrain/encoder.pt runs/finetune/classifier.pt
    python cluster_eval.py --classes binary:Effusion            one finding against the rest
    python cluster_eval.py --k sweep                            how many clusters do the features themselves suggest?
    tensorboard --logdir runs                                   table, figures, and the features in the projector

k-means never sees a label; labels only judge what it found. They have to be exclusive for that, so --classes says which
images take part, and as what. It is done on test, unless --split says otherwise: the encoder was trained on the images
of train, a classifier on their labels too, and clusters found there could be remembered ones. The run folder (--out)
gets results.json, results.md, TensorBoard's files, and a map, a confusion matrix and a contact sheet for each row.
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
MINIBATCH_ABOVE = 20_000            # images; beyond, k-means works on batches of 4,096
NEIGHBOURS = 20                     # of the k-NN scores
SAMPLED, MAPPED = 5_000, 2_000      # images at most, for silhouette and as k-NN queries; on the map, in the projector
PIXELS, COMPONENTS = 32, 50         # the row `pixels`: images of 32 x 32, reduced to 50 principal components
NO_FINDING = "No Finding"           # what NIH and CheXpert call the column of images without any


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("features, data and run folder")
    group.add_argument("--init", nargs="+", metavar="NAME|PATH", help="rows: random, imagenet, pixels, encoder.pt or "
                       "classifier.pt (default: random, pixels and the last pre-training's encoder.pt)")
    group.add_argument("--data", help="data folder (default: the one that the first checkpoint was trained on)")
    group.add_argument("--split", choices=(*SPLITS, "all"), default="test", help="images to cluster (default test)")
    group.add_argument("--out", default="runs/cluster", help="run folder (default %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="give up the results that the run folder holds")
    group.add_argument("--export", metavar="FILE.npz", help="the last row's features, index, path, patient and labels")
    group = parser.add_argument_group("network; a checkpoint brings its own, and the first one's serve the other rows")
    group.add_argument("--arch", choices=ARCHITECTURES, help="encoder (without a checkpoint: resnet50)")
    group.add_argument("--image-size", type=int, help="side of the input, pixels (without a checkpoint: 224)")
    group = parser.add_argument_group("classes")
    group.add_argument("--classes", default="single", metavar="single|dominant|binary:LABEL", help="images with just "
                       "one finding, all by their rarest finding, or LABEL against the rest (default %(default)s)")
    group.add_argument("--no-finding", choices=("keep", "drop"), help="images without any finding: a class of their "
                       "own, or in binary part of the rest (default: drop; for binary keep)")
    group = parser.add_argument_group("clustering")
    group.add_argument("--k", default="classes", metavar="classes|sweep|N", help="clusters: as many as classes, the "
                       "same and silhouette and inertia against k, or N (default %(default)s)")
    group.add_argument("--seeds", type=int, default=5, help="k-means runs a row (default %(default)s)")
    group.add_argument("--l2", action=argparse.BooleanOptionalAction, default=True, help="bring features to length 1")
    group.add_argument("--bootstrap", type=int, default=1000, help="draws for the intervals (default %(default)s)")
    args = parser.parse_args(argv)
    for flag in ("image_size", "seeds", "bootstrap"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be positive")
    if args.k not in ("classes", "sweep") and not (args.k.isdecimal() and int(args.k) > 1):
        parser.error(f"--k {args.k} is none of classes, sweep or a number from 2")
    if args.classes not in ("single", "dominant") and not args.classes.startswith("binary:"):
        parser.error(f"--classes {args.classes} is none of single, dominant or binary:LABEL")
    if len(set(args.init or [])) < len(args.init or []):
        parser.error(f"--init {' '.join(args.init)} names a row twice")
    if args.export and not args.export.endswith(".npz"):
        parser.error(f"--export {args.export} must end in .npz")
    args.no_finding = args.no_finding or ("keep" if args.classes.startswith("binary:") else "drop")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# From findings, of which an image may have many, to classes, of which it has one.

def choose_classes(labels: np.ndarray, names: list[str], rule: str, no_finding: str) -> tuple[np.ndarray, list[str]]:
    """Each image's class (n,) int64, -1 where it is left out, and the classes' names. labels (n, L) as in the manifest.

    rule: `single` takes images with one positive finding and no uncertain one; `dominant` every image with a positive
    one, as the rarest where it has several; `binary:LABEL` all but those where LABEL is uncertain. An empty cell counts
    as absent, but a row of nothing else is left out. "No Finding" is no finding: with no_finding `keep`, images without
    a positive or uncertain one are a class, or in `binary` belong to the rest. DataError: no such LABEL."""
    findings = np.array([name != NO_FINDING for name in names])
    present, uncertain = (labels == 1)[:, findings], (labels == -1)[:, findings]                        # (n, F) bool
    healthy = labels[:, names.index(NO_FINDING)] == 1 if NO_FINDING in names else (labels == 0).any(1)
    healthy = healthy & ~(present | uncertain).any(1)
    if rule.startswith("binary:"):
        label = rule.removeprefix("binary:")
        if label not in names:
            raise DataError(f"--classes {rule}: there is no label {label!r}, only {', '.join(names)}")
        column = labels[:, names.index(label)]
        out = (column == -1) | np.isnan(labels).all(1) | (healthy & (column != 1) & (no_finding == "drop"))
        return np.where(out, -1, column == 1), [f"not {label}", label]
    if rule == "single":
        chosen, truth = (present.sum(1) == 1) & ~uncertain.any(1), present.argmax(1)
    else:
        chosen, truth = present.any(1), np.where(present, present.sum(0), math.inf).argmin(1)
    truth = np.where(chosen, truth, np.where(healthy & (no_finding == "keep"), findings.sum(), -1))
    return truth, [name for name in names if name != NO_FINDING] + [NO_FINDING]


# ----------------------------------------------------------------------------------------------------------------------
# Scores. Each is a function of the images' weights: all one for the estimate; for the bootstrap, which gives the
# interval, how often the image's patient was drawn.

def contingency(truth: np.ndarray, clusters: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """How many images (or what weight of them) each class has in each cluster, (C, K) float64."""
    shape = truth.max() + 1, clusters.max() + 1
    return np.bincount(truth * shape[1] + clusters, weights, math.prod(shape)).reshape(shape).astype(float)


def assign(table: np.ndarray) -> dict[int, int]:
    """{cluster: class}, in the classes' order: the one-to-one assignment that fits most images (Kuhn 1955)."""
    classes, clusters = linear_sum_assignment(table, maximize=True)
    return dict(zip(clusters.tolist(), classes.tolist()))


def agreement(table: np.ndarray) -> dict[str, float]:
    """How well clusters fit classes, from their contingency table (C, K) of counts.

    accuracy: share of the images that are in the cluster assigned to their class, so those of clusters too many are
    wrong. balanced_accuracy: the same for each class, and the mean over classes. purity: every cluster takes its
    majority class; grows with K. nmi: mutual information over the mean of both entropies. ari: the share of pairs
    treated alike, adjusted for chance (Hubert and Arabie 1985)."""
    n, by_class, by_cluster = table.sum(), table.sum(1), table.sum(0)
    found = np.zeros(len(by_class))
    for cluster, label in assign(table).items():
        found[label] = table[label, cluster]

    def entropy(counts):
        p = counts[counts > 0] / n
        return -(p * np.log(p)).sum()

    entropies = entropy(by_class) + entropy(by_cluster)
    pairs, class_pairs, cluster_pairs = [(x * (x - 1)).sum() / 2 for x in (table, by_class, by_cluster)]
    expected, most = 2 * class_pairs * cluster_pairs / max(n * (n - 1), 1), (class_pairs + cluster_pairs) / 2
    return {"accuracy": found.sum() / n,
            "balanced_accuracy": (found[by_class > 0] / by_class[by_class > 0]).mean(),
            "nmi": 2 * (entropies - entropy(table)) / entropies if entropies else 1.0,
            "ari": (pairs - expected) / (most - expected) if most != expected else 1.0,
            "purity": table.max(0).sum() / n}


def class_cosines(features: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Mean cosine over all pairs of images of one class, and of two classes. features (n, D), of any length.

    No pair is formed: with s_c the sum of class c's unit vectors, the cosines of its pairs add up to |s_c|^2."""
    count = np.bincount(truth).astype(float)                                                            # (C,)
    pick = np.zeros((len(count), len(truth)), features.dtype)
    pick[truth, np.arange(len(truth))] = 1 / np.linalg.norm(features, axis=1).clip(1e-12)
    sums = (pick @ features).astype(float)                                                              # (C, D)
    within, all_pairs = (sums ** 2).sum(), (sums.sum(0) ** 2).sum()
    return ((within - len(truth)) / max((count * (count - 1)).sum(), 1),            # the diagonal is no pair
            (all_pairs - within) / (count.sum() ** 2 - (count ** 2).sum()))


def knn_votes(features: np.ndarray, truth: np.ndarray, patients: np.ndarray, queries: np.ndarray,
              k: int = NEIGHBOURS) -> np.ndarray:
    """Share (m, C) of each class in the votes of the k nearest images of other patients. features (n, D), queries (m,).

    Leave-one-patient-out within the split: it needs no other split's features, and images of the same patient, nearly
    copies, do not vote. That alone would push features that say nothing below chance, for among the others the own
    class is rarer: its votes are scaled back to the split's frequencies. A vote weighs exp(cosine / 0.07) (Wu et al.
    2018)."""
    x, classes, who = (torch.from_numpy(a) for a in (features, truth, patients))
    norm = x.norm(dim=1).clamp(min=1e-12)
    votes = torch.zeros(len(queries), int(truth.max()) + 1)
    for rows in torch.arange(len(queries)).split(256):                          # 256 x 112,120 cosines are 115 MB
        q = torch.from_numpy(queries)[rows]
        cosine = ((x[q] / norm[q, None]) @ x.T).div_(norm).masked_fill_(who[q, None] == who, -math.inf)  # (256, n)
        cosine, nearest = cosine.topk(min(k, len(x) - 1))                                                # (256, k)
        votes[rows] = votes[rows].scatter_add(1, classes[nearest], ((cosine - cosine[:, :1]) / 0.07).exp())
    by_patient = contingency(patients, truth)                                                           # (P, C)
    n = by_patient.sum(0)
    votes = votes.numpy() * (n / (n - by_patient[patients[queries]]).clip(1))
    return votes / votes.sum(1, keepdims=True)


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """P(a positive scores above a negative), ties half; all (m,). NaN where there is none of either."""
    rank = np.unique(score, return_inverse=True)[1]
    hits, others = (np.bincount(rank, weights * side) for side in (positive, ~positive))
    total = hits.sum() * others.sum()
    return (hits * (others.cumsum() - others / 2)).sum() / total if total else math.nan


def k_means(features: np.ndarray, k: int, seed: int) -> KMeans | MiniBatchKMeans:
    """The best of 10 initialisations. Where images are the same there may be fewer clusters than k, and no warning."""
    method = MiniBatchKMeans(k, n_init=10, batch_size=4096, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return (method if len(features) > MINIBATCH_ABOVE else KMeans(k, n_init=10, random_state=seed)).fit(features)


def silhouettes(features: np.ndarray, clusterings: list[np.ndarray]) -> list[float]:
    """Mean silhouette (Rousseeuw 1987) of each clustering (m,) of features (m, D); NaN for 1 cluster, or m of them."""
    distances = pairwise_distances(features)                        # once for all; 100 MB for 5,000 images
    np.fill_diagonal(distances, 0)
    return [float(silhouette_score(distances, c, metric="precomputed")) if 1 < len(np.unique(c)) < len(c) else math.nan
            for c in clusterings]


def number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def evaluate(features: np.ndarray, truth: np.ndarray, patients: np.ndarray, k: int, seeds: int, bootstrap: int,
             sample: np.ndarray) -> tuple[dict, KMeans | MiniBatchKMeans]:
    """One row of the table, and the k-means of lowest inertia. features (n, D) float32; truth, patients (n,) int64;
    sample (m,) int64, the images for silhouette and k-NN.

    Of each score: mean and spread (standard deviation) over the seeds; low and high, the 95 % interval of that mean
    when patients are drawn anew and the clusters, kept, are assigned again. A patient drawn twice agrees with itself,
    which lifts all agreement, so the interval is moved by as much as the mean of the draws lies off (bias-corrected
    bootstrap, Efron and Tibshirani 1993). Cosines and silhouette have none."""
    runs = [k_means(features, k, seed) for seed in range(seeds)]
    clusterings = [run.labels_.astype(np.int64) for run in runs]
    votes = knn_votes(features, truth, patients, sample)                                                # (m, C)

    def scores(weights):
        """{score: a value for each seed}, or one value where no seed plays a part"""
        tables = [agreement(contingency(truth, clusters, weights)) for clusters in clusterings]
        areas = [auroc(vote, truth[sample] == c, weights[sample]) for c, vote in enumerate(votes.T)]
        areas = [area for area in areas if not math.isnan(area)]
        return {name: [table[name] for table in tables] for name in tables[0]} | {
            "knn_accuracy": [np.average(votes.argmax(1) == truth[sample], weights=weights[sample])],
            "knn_auroc": [np.mean(areas) if areas else math.nan]}

    rng, n_patients = np.random.default_rng(0), patients.max() + 1                  # the same draws for every row
    drawn = [scores(np.bincount(rng.integers(n_patients, size=n_patients), minlength=n_patients)[patients])
             for _ in range(bootstrap)]
    within, between = class_cosines(features, truth)
    values = scores(np.ones(len(truth))) | {"cosine_within": [within], "cosine_between": [between], "silhouette":
                                            silhouettes(features[sample], [c[sample] for c in clusterings])}
    row = {}
    for name in SCORES:
        row[name] = {"mean": number(np.mean(values[name])), "seeds": [number(value) for value in values[name]]}
        if len(values[name]) > 1:
            row[name]["spread"] = number(np.std(values[name], ddof=1))
        if name in drawn[0]:
            means = np.array([np.mean(draw[name]) for draw in drawn])
            interval = np.nanpercentile(means - np.nanmean(means), (2.5, 97.5)) + np.mean(values[name])
            row[name]["low"], row[name]["high"] = map(number, interval.clip(-1 if name == "ari" else 0, 1))
    return row, min(runs, key=lambda run: run.inertia_)


# ----------------------------------------------------------------------------------------------------------------------
# Figures. A class has a colour, and so has the cluster that the assignment gave it; clusters too many are gray.

def draw(table: np.ndarray, points: np.ndarray, truth: np.ndarray, clusters: np.ndarray, sheet: np.ndarray,
         captions: np.ndarray, names: list[str], title: str) -> dict[str, Figure]:
    """A row's figures. `confusion` of table (C, K): the assigned cells come first, as a diagonal, the shade is the
    share of the class. `map` of points (m, 2), coloured by truth (m,), and by clusters (m,). `nearest`: contact sheet
    of the images (K, M, S, S) in [0, 1] nearest to the centres, with their classes' names (K, M)."""
    assigned, sizes = assign(table), table.sum(0)
    sides = [f"{c}: {names[assigned[c]]}" if c in assigned else f"{c}" for c in range(len(sizes))]

    order = [*assigned, *(c for c in range(len(sizes)) if c not in assigned)]
    share = (table / table.sum(1, keepdims=True))[:, order]
    confusion = Figure(figsize=(3.8 + 0.6 * len(sizes), 1.8 + 0.4 * len(names)), dpi=110, layout="constrained")
    axes = confusion.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(share.shape):
        axes.text(column, row, f"{table[row, order[column]]:.0f}", ha="center", va="center", fontsize=9,
                  color="white" if share[row, column] > 0.5 else "black")
    axes.set_xticks(range(len(sizes)), order)
    axes.set_yticks(range(len(names)), [f"{name} ({n:.0f})" for name, n in zip(names, table.sum(1))])
    axes.set_xlabel("cluster (diagonal: assigned)")
    confusion.suptitle(f"{title}: images of class and cluster", fontsize=10)

    plane = Figure(figsize=(13, 6.6), dpi=110, layout="constrained")
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    for axes, values, legend in zip(plane.subplots(1, 2), (truth, clusters), (names, sides)):
        for value, label in enumerate(legend):
            kind = value if values is truth else assigned.get(value)
            axes.scatter(*points[values == value].T, s=14, linewidths=0, alpha=0.8, label=label,
                         color="lightgray" if kind is None else palette[kind % len(palette)])
        axes.set(title="by class" if values is truth else "by k-means cluster, and the class assigned to it",
                 xticks=[], yticks=[])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=8, frameon=False, markerscale=2)
    plane.suptitle(f"{title}: t-SNE of {len(points):,} images")

    nearest = Figure(figsize=(2 + 1.1 * captions.shape[1], 0.8 + 1.3 * len(captions)), dpi=110, layout="constrained")
    for place, axes in np.ndenumerate(nearest.subplots(*captions.shape, squeeze=False)):
        axes.imshow(sheet[place], cmap="gray", vmin=0, vmax=1)
        axes.set_title(captions[place].replace(" ", "\n"), fontsize=7, pad=2)
        axes.set(xticks=[], yticks=[])
        if place[1] == 0:
            axes.set_ylabel(f"{sides[place[0]]}\n{sizes[place[0]]:.0f} images", rotation=0, ha="right", fontsize=9)
    nearest.suptitle(f"{title}: the images nearest to each cluster's centre, and their classes", fontsize=10)
    return {"confusion": confusion, "map": plane, "nearest": nearest}


def draw_sweep(curves: dict[str, dict], n_classes: int) -> Figure:
    """Silhouette, and inertia over that of the smallest k, against k: a curve for each row of the table."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("silhouette", "inertia")):
        for name, curve in curves.items():
            values = np.array(curve[score], float)
            axes.plot(curve["k"], values / values[0] if score == "inertia" else values, "o-", markersize=4, label=name)
        axes.axvline(n_classes, color="gray", linestyle=":", label=f"{n_classes} classes")
        axes.set(xlabel="k, clusters", title="mean silhouette (higher: better parted)" if score == "silhouette" else
                 f"inertia, relative to k = {curve['k'][0]}", xticks=curve["k"])
        axes.legend(fontsize=8)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Rows, run folder, the story.

def read_row(init: str) -> dict:
    """A row's `name`, how many `labels` its training used (None: unknown), its checkpoint's `config` and `arch`."""
    outside = {"random": 0, "pixels": 0, "imagenet": 1_281_167}         # ImageNet's are of photographs
    if init in outside:
        return {"name": init, "labels": outside[init], "config": {}, "arch": None}
    state = load_checkpoint(init)
    config = state.get("config", {})                    # which a plain state dict of somebody else's does not have
    labels = state.get("n_train") if "classifier" in state else outside.get(config.get("init"))
    return {"name": "/".join(Path(init).with_suffix("").parts[-2:]), "labels": labels, "config": config,
            "arch": state.get("arch")}


def extract(init: str, arch: str, preprocessing: Preprocessing, manifest: Manifest, images: np.ndarray,
            folder: Path) -> np.ndarray:
    """A row's features (n, D) float32 of `images`, computed or found in `folder`; DataError where not finite."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if device.type == "cpu" else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    torch.manual_seed(0)
    if init == "pixels":                                # an encoder like others, to the loader and the kept features
        encoder, dtype, preprocessing = nn.Flatten(), None, dataclasses.replace(preprocessing, image_size=PIXELS)
        encoder.num_features = PIXELS ** 2
    else:
        encoder = build_encoder(arch, init).to(device, memory_format=torch.channels_last)
    loader = eval_loader(manifest, images, 128, preprocessing, device, threads=min(8, os.cpu_count()),
                         half=dtype is not None)
    features = cached_features(encoder, loader, len(images), folder, dtype).numpy()
    bad = np.flatnonzero(~np.isfinite(features.sum(1)))
    if len(bad):
        raise DataError(f"{init}: the features of {len(bad)} images are not finite, the first of them of "
                        f"{manifest.folder / manifest.paths[images[bad[0]]]}")
    if init == "pixels":
        features = PCA(min(COMPONENTS, *features.shape), random_state=0).fit_transform(features)
    return features


def thumbnails(manifest: Manifest, images: np.ndarray, size: int) -> torch.Tensor:
    """(m, 1, size, size) float32 in [0, 1] on the CPU."""
    batches = [x for x, _ in eval_loader(manifest, images, 64, Preprocessing(size), "cpu")]
    return (torch.cat(batches) * STD + MEAN).clamp(0, 1)


def open_run(args: argparse.Namespace, config: dict) -> bool:
    """Make the run folder; True where it holds this very run, complete, DataError where it holds anything else."""
    out, file = Path(args.out), Path(args.out, "config.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    if out.is_dir() and any(out.iterdir()) and before.get("script") != "cluster_eval.py":
        raise DataError(f"{out} is not empty and holds no run of cluster_eval.py; choose another --out")
    if (out / "results.json").exists() and not args.overwrite:
        differ = [f"{key} ({before.get(key)} there, {value} here)" for key, value in config.items()
                  if before.get(key) != value]
        if differ:
            raise DataError(f"{out} holds results of other flags or input: {', '.join(differ)}; choose another --out, "
                            "or give them up with --overwrite")
        return True
    for pattern in ("results.*", "confusion_*.png", "map_*.png", "nearest_*.png", "sweep.png", "events.out.tfevents.*",
                    "projector_config.pbtxt"):
        for old in out.glob(pattern):
            old.unlink()
    shutil.rmtree(out / "00000", ignore_errors=True)                                # the projector's
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=1) + "\n")
    return False


def markdown(results: dict) -> str:
    """results.md from results.json."""
    def cell(score):
        spread, low, high = (score.get(key) for key in ("spread", "low", "high"))
        return "–" if score.get("mean") is None else f"{score['mean']:.3f}" + (
            "" if spread is None else f" ± {spread:.3f}") + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    config, classes = results["config"], results["classes"]
    lines = [f"| init | labels required | {' | '.join(SCORES.values())} |", "|---|---:|" + "---|" * len(SCORES)]
    for name, row in results["rows"].items():
        labels = "unknown" if row["labels_required"] is None else f"{row['labels_required']:,}"
        lines.append(f"| {name} | {labels} | {' | '.join(cell(row['scores'].get(score, {})) for score in SCORES)} |")
    return f"""# Clusters of {config['data']}, {config['split']} split

`--classes {config['classes']} --no-finding {config['no_finding']}` keeps {sum(classes.values()):,} of \
{results['images']:,} images, of {results['patients']:,} patients: \
{', '.join(f'{name} {n:,}' for name, n in classes.items())}.

{chr(10).join(lines)}

{results['algorithm']}, k = {results['k']}, on {'L2-normalised' if config['l2'] else 'raw'} features: mean ± standard \
deviation over {config['seeds']} seeds [bias-corrected 95 % interval of that mean, {config['bootstrap']:,} draws of \
patients]. *labels required*: images whose labels the row's training used (imagenet: photographs); every row is judged \
by the labels of the images above. Accuracy: best one-to-one assignment of clusters to classes. k-NN: {NEIGHBOURS} \
nearest images of other patients; AUROC of one class against the rest, mean over classes. Silhouette and k-NN are for \
{results['sampled']:,} images. *pixels*: {COMPONENTS} principal components of the images at {PIXELS} x {PIXELS}. \
*majority class*: all images in one cluster.
"""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        cluster_eval(args)
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(f"cluster_eval.py: {error}")


def cluster_eval(args: argparse.Namespace) -> None:
    # ------------------------------------------------------------------------------------- rows, and what they inherit
    inits = args.init
    if not inits:
        trained = [path for path in ("runs/pretrain/encoder.pt", "runs/demo/encoder.pt") if Path(path).exists()]
        if not trained:
            raise CheckpointError("there is no runs/pretrain/encoder.pt: train one (python pretrain.py --demo takes "
                                  "minutes), or name the rows of the table with --init")
        inits = ["random", "pixels", trained[0]]
    rows = {init: read_row(init) for init in inits}
    if len({row["name"] for row in rows.values()}) < len(rows):
        rows = {init: row | {"name": init} for init, row in rows.items()}
    first = next((init for init in inits if rows[init]["config"]), None)
    lender = rows[first] if first else {"config": {}, "arch": None}
    data = args.data or lender["config"].get("data")
    if not data:
        raise DataError("--data is needed: no --init is a checkpoint that knows its data folder")
    for row in rows.values():
        row["arch"] = args.arch or row["arch"] or lender["arch"] or "resnet50"
        config = row["config"] or lender["config"]
        row["preprocessing"] = Preprocessing(args.image_size or config.get("image_size", 224),
                                             config.get("normalize", "fixed"), config.get("clahe", False))
        if row["config"]:
            print(f"{row['name']}: {row['arch']}, {row['preprocessing']}"
                  + (f", and the data folder, {data}" if row is lender and not args.data else ""))

    # ------------------------------------------------------------------------------------------------ images, classes
    manifest = read_manifest(data)
    if not manifest.label_names:
        raise DataError(f"{manifest.folder / 'manifest.csv'} has no label column: nothing to judge clusters by")
    images = np.arange(len(manifest.paths)) if args.split == "all" else manifest.images(args.split)
    labels = manifest.labels[images]
    choices = [(rule, none) for rule in ("single", "dominant", args.classes) for none in ("drop", "keep")]
    kept = {f"{rule}, {none}": int((choose_classes(labels, manifest.label_names, rule, none)[0] >= 0).sum())
            for rule, none in choices}
    truth, names = choose_classes(labels, manifest.label_names, args.classes, args.no_finding)
    chosen = np.flatnonzero(truth >= 0)                                             # places in `images`, (n,)
    present, truth = np.unique(truth[chosen], return_inverse=True)
    names = [names[c] for c in present]
    patients = np.unique(manifest.patients[images[chosen]], return_inverse=True)[1]
    classes = dict(zip(names, np.bincount(truth).tolist()))
    k = len(names) if args.k in ("classes", "sweep") else int(args.k)
    what = f"--classes {args.classes} --no-finding {args.no_finding} keeps"
    if len(names) < 2:
        raise DataError(f"{what} {f'one class only, {names[0]}' if names else 'none'} of the {len(images)} images of "
                        f"{args.split}: there is nothing to tell apart")
    if len(chosen) < k:
        raise DataError(f"{what} {len(chosen)} images of {args.split}, fewer than --k {k} clusters")
    if patients.max() == 0:
        raise DataError(f"{what} images of one patient only: k-NN and the intervals need several")
    algorithm = "MiniBatchKMeans" if len(chosen) > MINIBATCH_ABOVE else "KMeans"
    print(f"images kept of {len(images)} in {args.split}, by --classes and --no-finding: {kept}")
    print(f"{what} {len(chosen)} images of {patients.max() + 1} patients: {classes}; scikit-learn's {algorithm} "
          f"({'more' if len(chosen) > MINIBATCH_ABOVE else 'not more'} than {MINIBATCH_ABOVE:,} images), k = {k}")
    rng = np.random.default_rng(0)
    sample, shown = (np.sort(rng.permutation(len(chosen))[:size]) for size in (SAMPLED, MAPPED))

    # ---------------------------------------------------------------------------------------------------- run folder
    content = hashlib.sha256((manifest.folder / "manifest.csv").read_bytes())
    for init in inits:
        content.update(Path(init).read_bytes() if Path(init).is_file() else b"")
    config = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite")}
    config |= {"script": "cluster_eval.py", "init": inits, "data": str(data), "content": content.hexdigest()[:16]}
    out = Path(args.out)
    if open_run(args, config):
        print(f"{out} is complete; --overwrite does it again\n\n{(out / 'results.md').read_text()}")
        return
    writer = SummaryWriter(out)
    sprite = thumbnails(manifest, images[chosen[shown]], PIXELS)
    metadata = [[names[truth[i]], manifest.patients[j], manifest.paths[j]]
                for i, j in zip(shown, images[chosen[shown]])]
    one_cluster = agreement(contingency(truth, np.zeros_like(truth)))
    one_cluster |= {"knn_accuracy": one_cluster["accuracy"], "knn_auroc": 0.5}
    results = {"config": config, "images": len(images), "kept": kept, "patients": int(patients.max()) + 1,
               "classes": classes, "k": k, "algorithm": algorithm, "sampled": len(sample), "rows": {}, "sweep": {}}

    for init, row in rows.items():
        # --------------------------------------------------------------------------------------------------- features
        name, slug = row["name"], re.sub(r"[^\w.-]+", "_", row["name"])
        features = extract(init, row["arch"], row["preprocessing"], manifest, images, out.parent / "features")
        if args.export and init == inits[-1]:
            np.savez(args.export, features=features, index=images, path=np.array(manifest.paths)[images],
                     patient=manifest.patients[images], labels=labels, label_names=np.array(manifest.label_names))
            print(f"{args.export}: {features.shape[0]} x {features.shape[1]} features of {name}, as they come")
        features = features if len(chosen) == len(images) else features[chosen]                         # (n, D)
        if args.l2:
            features /= np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)         # in place: there may be GBs

        # ----------------------------------------------------------------------------------------------------- scores
        scores, best = evaluate(features, truth, patients, k, args.seeds, args.bootstrap, sample)
        results["rows"][name] = {"init": init, "labels_required": row["labels"], "arch": row["arch"], "scores": scores,
                                 "width": features.shape[1], "preprocessing": dataclasses.asdict(row["preprocessing"])}
        print(f"{name}: " + ", ".join(f"{SCORES[score]} {value['mean']:.3f}" for score, value in scores.items()
                                      if value["mean"] is not None), flush=True)
        for score, value in scores.items():
            for seed, x in enumerate(value["seeds"]):
                writer.add_scalar(f"{score}/{name}", math.nan if x is None else x, seed)        # step: the seed
        if args.k == "sweep":
            sizes = list(range(2, min(max(10, 2 * k), len(chosen)) + 1))
            runs = [k_means(features, size, 0) for size in sizes]
            widths = [number(s) for s in silhouettes(features[sample], [run.labels_[sample] for run in runs])]
            results["sweep"][name] = {"k": sizes, "silhouette": widths, "inertia": [float(r.inertia_) for r in runs]}

        # ---------------------------------------------------------------------------------------------------- figures
        clusters = best.labels_.astype(np.int64)
        if len(np.unique(clusters)) < k:
            print(f"{name}: {len(np.unique(clusters))} of {k} clusters hold images; equal features cannot be parted")
        points = PCA(min(COMPONENTS, features.shape[1], len(shown)), random_state=0).fit_transform(features[shown])
        points = TSNE(perplexity=min(30, (len(shown) - 1) / 3), random_state=0).fit_transform(points)
        nearest = best.transform(features).argsort(0)[:8, :min(clusters.max() + 1, 20)].T       # (K, 8) images
        sheet = thumbnails(manifest, images[chosen[nearest.ravel()]], 96).view(*nearest.shape, 96, 96).numpy()
        for kind, figure in draw(contingency(truth, clusters), points, truth[shown], clusters[shown], sheet,
                                 np.array(names)[truth[nearest]], names, name).items():
            figure.savefig(out / f"{kind}_{slug}.png")
            writer.add_figure(f"{kind}/{name}", figure)
        # Four decimals: a third of the text for the browser to load, and the same neighbours.
        writer.add_embedding(torch.from_numpy(features[shown].astype(float).round(4)), [
            [str(cluster), *line] for cluster, line in zip(clusters[shown], metadata)], sprite, tag=slug,
            metadata_header=["cluster", "class", "patient", "path"])

    # ---------------------------------------------------------------------------------------------------------- table
    if results["sweep"]:
        figure = draw_sweep(results["sweep"], len(names))
        figure.savefig(out / "sweep.png")
        writer.add_figure("sweep", figure)
    results["rows"]["*majority class*"] = {"labels_required": 0,
                                           "scores": {score: {"mean": v} for score, v in one_cluster.items()}}
    text = markdown(results)
    writer.add_text("results", text)
    writer.close()
    (out / "results.md").write_text(text)
    (out / "results.json.tmp").write_text(json.dumps(results, indent=1) + "\n")
    os.replace(out / "results.json.tmp", out / "results.json")                      # last: where it is, all is there
    print(f"\n{text}\ndone: {out / 'results.md'}")


if __name__ == "__main__":
    main()
