"""Stage 3: how well clusters of features agree with labels. Encoder and data folder in, table out.

    python cluster_eval.py                              runs/pretrain's encoder, and controls
    python cluster_eval.py --init imagenet runs/pretrain/encoder.pt runs/finetune/classifier.pt
    python cluster_eval.py --classes binary:Effusion    one finding against the rest
    python cluster_eval.py --k sweep                    how many clusters do the features suggest?
    tensorboard --logdir runs                           table, figures, and the projector

k-means never sees a label; labels only judge the clusters. For that each image needs one
class: --classes says which images take part, and in which class. The images are those of
test by default, because an encoder may remember the images of train, and a classifier their
labels too. The run folder (--out) gets results.json, results.md, and in cluster_figures/ a
PNG for each row, one of the sweep, and TensorBoard's files. --export writes one more file.
"""
import contextlib
import dataclasses
import functools
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import launch  # first: it answers Ctrl-C while PyTorch loads
import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import run_folder
from checkpoint import load_checkpoint, settings_of
from common import DataError, valid_unicode, whole_file, write_text
from dali_pipeline import Preprocessing, eval_loader
from flags import ENCODERS, PRECISION, THREADS, default_encoder, flag
from labels import choose_classes, labels_required
from manifest import Manifest, read_manifest
from manifest_csv import SPLITS
from model import MEAN, STD, build_encoder, num_features
from probe import cached_features, knn_class_shares
from report import (
    FigureText, cluster_legend, draw_map, draw_sheet, draw_table, figure_text, markdown_table,
    sweep_figure, write_json)
from run import Compute

# A run is complete if these exist; the first is written last.
RESULTS = ("results.json", "results.md")
# The table's columns and the keys of results.json.
SCORES = ("accuracy", "balanced_accuracy", "NMI", "ARI", "purity", "silhouette",
          "cosine_within", "cosine_between", "kNN_accuracy", "kNN_AUROC")
# Rows that need no checkpoint.
NO_CHECKPOINT = ("random", "pixels", "imagenet")

# With more images than this, k-means works on batches of 4,096.
MINIBATCH_ABOVE = 20_000
# The most images for silhouette, cosines and neighbours; and on the map.
SAMPLE, MAP = 5_000, 2_000
# The row `pixels`: images of 32 x 32, reduced to 50 principal components.
PIXELS, COMPONENTS = 32, 50


# --------------------------------------------------------------------------------------------------
# Flags.

@dataclass
class Config:
    """The defaults compare a pre-trained encoder with random weights and raw pixels."""

    init: tuple[str, ...] = flag(
        (), "rows: random, imagenet, pixels, checkpoints (default: random, pixels and "
        f"{' or '.join(ENCODERS)})", metavar="NAME|PATH", section="rows, images and classes")
    data: str | None = flag(
        None, "data folder (default: the one that the first checkpoint was trained on)")
    split: str = flag("test", "images", choices=(*SPLITS, "all"))
    classes: str = flag(
        "single", "images of one finding, all by their rarest, or LABEL against the rest",
        metavar="single|dominant|binary:LABEL")
    no_finding: str | None = flag(
        None, "images without a finding (default: drop; in binary keep)",
        choices=("keep", "drop"))

    k: str = flag("classes", "clusters", metavar="classes|sweep|N",
                  section="clusters and scores")
    seeds: int = flag(5, "k-means runs a row", 1)
    l2: bool | None = flag(None, "bring features to length 1 (default: yes)")
    bootstrap: int = flag(1000, "draws of the patients for the intervals", 1)

    export: str | None = flag(
        None, "the last row's features, index, path, patient and labels",
        metavar="FILE.npz", section="output")
    out: str = flag("runs/cluster", "run folder", may_differ=True)
    overwrite: bool = flag(False, "give up the results that the run folder holds",
                           may_differ=True)

    precision: str = flag(**PRECISION, section="how it computes")
    threads: int | None = flag(**THREADS)

    def __post_init__(self):
        binary = self.classes.startswith("binary:")
        self.l2 = True if self.l2 is None else self.l2
        self.no_finding = self.no_finding or ("keep" if binary else "drop")
        number = int(self.k) if self.k.isdecimal() else 0
        if self.k not in ("classes", "sweep") and number < 2:
            raise ValueError(f"--k {self.k} is none of classes, sweep or a number from 2")
        if self.classes not in ("single", "dominant") and not binary:
            raise ValueError(f"--classes {self.classes} is none of single, dominant or "
                             "binary:LABEL")
        file = Path(self.export or "features.npz")
        if file.suffix != ".npz" or not file.parent.is_dir():
            raise ValueError(f"--export {file} must be a .npz file in a folder that "
                             "exists")


# --------------------------------------------------------------------------------------------------
# Rows: what is compared.

@dataclass(frozen=True)
class Row:
    """One encoder of the table, and how its images are prepared."""
    init: str                           # a name in NO_CHECKPOINT, or a path
    arch: str                           # "PCA" for pixels
    preprocessing: dict[str, Any]       # arguments of Preprocessing
    labels_required: int | str          # images, or "unknown"


def read_checkpoints(inits: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The checkpoint of each row, {} for rows that need none; DataError if one cannot be read."""
    inits = inits or ("random", "pixels", default_encoder())
    return {init: {} if init in NO_CHECKPOINT else load_checkpoint(init)
            for init in inits}


def inherit(checkpoints: dict[str, dict[str, Any]]) -> tuple[list[Row], str]:
    """The rows, and the data folder of the first checkpoint that has any settings.

    A row's architecture and preprocessing are those of its checkpoint. What this lacks is
    taken from the first checkpoint that has any settings."""
    first: dict[str, Any] = next(filter(None, map(settings_of, checkpoints.values())), {})
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    rows = []
    for init, state in checkpoints.items():
        settings = first | settings_of(state)
        arch = settings.get("arch", "resnet50")
        preprocessing = {name: settings[name] for name in names if name in settings}
        if init == "pixels":
            arch, preprocessing["image_size"] = "PCA", PIXELS
        needed = 0 if init == "pixels" else labels_required(init, state)
        rows.append(Row(init, arch, preprocessing, needed))
    return rows, first.get("data", "data/nih")


# --------------------------------------------------------------------------------------------------
# Images, and the classes that clusters are compared with.

@dataclass(frozen=True)
class Selection:
    """The images of the split, and which of them have a class."""
    manifest: Manifest
    images: np.ndarray                  # (N,) image indices of the split
    chosen: np.ndarray                  # (n,) places in `images` of those with a class
    truth: np.ndarray                   # (n,) int64: their classes
    names: list[str]                    # C classes
    patients: np.ndarray                # (n,) int64: their patients
    k: int                              # clusters to look for
    available: dict[str, int]           # how many images other flags would choose
    description: str                    # all this in one sentence

    @property
    def index(self) -> np.ndarray:
        """(n,) image indices of those that have a class."""
        return self.images[self.chosen]

    @property
    def algorithm(self) -> str:
        return "MiniBatchKMeans" if len(self.chosen) > MINIBATCH_ABOVE else "KMeans"

    def subset(self, most: int) -> np.ndarray:
        """(m,) places in `chosen`, rising: all, or `most` at random, the same in every call."""
        return np.sort(np.random.default_rng(0).permutation(len(self.chosen))[:most])


def select(config: Config, data: str) -> Selection:
    """The images that --split, --classes and --no-finding choose.

    DataError if they are too few, or all of one class or patient."""
    manifest = read_manifest(data)
    if config.split == "all":
        images = np.arange(len(manifest.paths))
    else:
        images = manifest.images(config.split)
    labels, label_names = manifest.labels[images], manifest.label_names

    # How many images would other flags choose? This is printed before anything is refused,
    # because it helps to find better flags.
    available = {}
    for rule in ("single", "dominant", config.classes):
        for no_finding in ("drop", "keep"):
            classes, _ = choose_classes(labels, label_names, rule, no_finding)
            available[f"{rule}, {no_finding}"] = int((classes >= 0).sum())
    print(f"images kept by --classes and --no-finding: {available}", flush=True)

    # Only classes that occur count.
    assert config.no_finding is not None                # set by __post_init__
    classes, names = choose_classes(labels, label_names, config.classes,
                                    config.no_finding)
    chosen = np.flatnonzero(classes >= 0)               # (n,)
    present, truth = np.unique(classes[chosen], return_inverse=True)
    names = [names[c] for c in present]
    patient_names, patients = np.unique(manifest.patients[images[chosen]],
                                        return_inverse=True)

    k = int(config.k) if config.k.isdecimal() else len(names)
    description = (
        f"--classes {config.classes} --no-finding {config.no_finding} keeps "
        f"{len(chosen):,} of {len(images):,} images of {data}, {config.split}, "
        f"{len(patient_names):,} patients: "
        f"{dict(zip(names, np.bincount(truth).tolist()))}")
    if len(names) < 2 or len(patient_names) < 2 or len(chosen) < k:
        raise DataError(
            f"{description}: it takes two classes, two patients and no fewer images than "
            f"--k {k} clusters; --no-finding keep, or binary: and one of "
            f"{', '.join(label_names)}, may help")
    return Selection(manifest, images, chosen, truth, names, patients, k, available,
                     description)


# --------------------------------------------------------------------------------------------------
# Features.

def features_of(row: Row, selection: Selection, compute: Compute, folder: Path) -> np.ndarray:
    """A row's features of the split, (N, D) float32, kept in `folder`. DataError if some are not
    finite."""
    torch.manual_seed(0)
    if row.init == "pixels":
        # Flatten returns the raw pixels, so loader and cache need no special case.
        encoder, width = nn.Flatten(), PIXELS ** 2
    else:
        encoder = compute.prepare(build_encoder(row.arch, row.init))
        width = num_features(encoder)
    loader = eval_loader(selection.manifest, selection.images, 128,
                         Preprocessing(**row.preprocessing), **compute.loader_arguments())
    features = cached_features(encoder, width, loader, folder, compute.dtype).numpy()
    # Huge features are refused as well, because distances square them.
    bad = selection.images[~(np.abs(features) < 1e18).all(1)]
    if len(bad):
        raise DataError(f"{row.init}: features of {len(bad)} images are not finite, or "
                        f"huge, of {selection.manifest.paths[bad[0]]} first")
    if row.init == "pixels":
        components = min(COMPONENTS, *features.shape)
        features = PCA(components, random_state=0).fit_transform(features)
    return features


def export(file: str, features: np.ndarray, selection: Selection) -> None:
    """Write features (N, D) and the manifest's entries of their images, for other programs."""
    manifest, images = selection.manifest, selection.images
    with whole_file(file) as output:
        np.savez(output, features=features, index=images,
                 path=np.array(manifest.paths)[images], patient=manifest.patients[images],
                 labels=manifest.labels[images],
                 label_names=np.array(manifest.label_names))


# --------------------------------------------------------------------------------------------------
# Scores.

def agreement(truth: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """How well clusters (n,) fit classes (n,).

    accuracy: share of images whose cluster is assigned to their class, one to one (Kuhn
    1955). balanced_accuracy: the mean of this share over the classes. NMI: mutual
    information, divided by the mean entropy. ARI: Hubert and Arabie 1985. purity: share of
    images in the majority class of their cluster; it grows with k."""
    # (C, K), only classes and clusters that occur.
    counts: Any = metrics.cluster.contingency_matrix(truth, clusters)
    classes, assigned = linear_sum_assignment(counts, maximize=True)
    correct = np.zeros(len(counts))                     # images of each class
    correct[classes] = counts[classes, assigned]
    return {"accuracy": correct.sum() / len(truth),
            "balanced_accuracy": (correct / counts.sum(1)).mean(),
            "NMI": metrics.normalized_mutual_info_score(truth, clusters),
            "ARI": metrics.adjusted_rand_score(truth, clusters),
            "purity": counts.max(0).sum() / len(truth)}


class Clustering(NamedTuple):
    """The best of 10 initialisations of k-means."""
    fit: Any                            # a KMeans or MiniBatchKMeans
    silhouette: float                   # NaN for one cluster, or as many as images


def k_means(features: np.ndarray, k: int, seed: int, sample: np.ndarray) -> Clustering:
    """Clusters of features (n, D), and their mean silhouette on `sample` (Rousseeuw 1987).

    scikit-learn warns if equal images leave clusters empty."""
    method: Any = KMeans
    if len(features) > MINIBATCH_ABOVE:
        method = functools.partial(MiniBatchKMeans, batch_size=4096)
    fit = method(k, n_init=10, random_state=seed).fit(features)
    clusters = fit.labels_[sample]                      # (m,)
    silhouette = math.nan
    if 1 < len(np.unique(clusters)) < len(sample):
        silhouette = float(metrics.silhouette_score(features[sample], clusters))
    return Clustering(fit, silhouette)


class Estimate(TypedDict):
    """A score in results.json. NaN stands for a missing number, and becomes null there."""
    mean: float                         # over the seeds
    spread: float                       # standard deviation over the seeds
    low: float                          # 95 % interval of the mean over the patients
    high: float


class Evaluation(NamedTuple):
    """A row's scores."""
    scores: dict[str, Estimate]
    best: Any                           # the k-means of lowest inertia


def evaluate(features: np.ndarray, truth: np.ndarray, patients: np.ndarray, k: int,
             seeds: int, bootstrap: int, sample: np.ndarray) -> Evaluation:
    """All scores of features (n, D) float32.

    truth, patients (n,) int64; sample (m,) int64: images for silhouette, cosines and
    nearest neighbours. The interval is a bootstrap over patients: each draw keeps the
    clusters, but assigns them to classes again."""
    clusterings = [k_means(features, k, seed, sample) for seed in range(seeds)]
    clusters = [clustering.fit.labels_ for clustering in clusterings]
    unit = np.asarray(normalize(features[sample]))      # (m, D)
    cosine = unit @ unit.T                              # (m, m)
    shares = knn_class_shares(cosine, truth[sample], patients[sample])      # (m, C)

    # Scores of the images themselves. An image with itself is not a pair.
    once = np.ones(len(truth), int)
    values = resampled_scores(once, truth, clusters, sample, shares)
    same_class = truth[sample][:, None] == truth[sample]
    pairs = ~np.eye(len(sample), dtype=bool)
    within, between = cosine[same_class & pairs], cosine[~same_class]
    values |= {"silhouette": [clustering.silhouette for clustering in clusterings],
               "cosine_within": [within.mean() if len(within) else math.nan],
               "cosine_between": [between.mean() if len(between) else math.nan]}

    # Draws of patients with replacement, the same for every row.
    rng, n = np.random.default_rng(0), patients.max() + 1
    draws = []
    for _ in range(bootstrap):
        times = np.bincount(rng.integers(n, size=n), minlength=n)           # (patients,)
        draws.append(resampled_scores(times[patients], truth, clusters, sample, shares))

    scores = {}
    for name in SCORES:
        # Silhouette and cosines are not in the draws: their replicates and intervals are NaN.
        replicates = np.array([np.mean(draw.get(name, math.nan)) for draw in draws])
        lowest = -1 if name == "ARI" else 0
        scores[name] = estimate(values[name], replicates, lowest)
    best = min(clusterings, key=lambda clustering: clustering.fit.inertia_)
    return Evaluation(scores, best.fit)


def resampled_scores(counts: np.ndarray, truth: np.ndarray, clusters: list[np.ndarray],
                     sample: np.ndarray, shares: np.ndarray) -> dict[str, list]:
    """Scores if image i counts counts[i] times: {score: [a value for each seed]}. k-NN scores
    have one value, because they do not depend on k-means.

    counts, truth (n,); clusters: (n,) for each seed; sample (m,); shares (m, C) of the
    classes among the neighbours of `sample`."""
    images = np.repeat(np.arange(len(truth)), counts)
    found = [agreement(truth[images], labels[images]) for labels in clusters]
    scores: dict[str, list] = {name: [one[name] for one in found] for name in found[0]}

    # A draw may have no image of the sample. Votes are NaN if the sample has only one patient.
    queries = np.repeat(np.arange(len(sample)), counts[sample])     # rows of `shares`
    classes, votes = truth[sample][queries], shares[queries]
    if not len(votes) or np.isnan(votes).any():
        return scores | {"kNN_accuracy": [math.nan], "kNN_AUROC": [math.nan]}
    areas = [metrics.roc_auc_score(classes == c, votes[:, c])
             for c in np.unique(classes)
             if (classes != c).any()]                   # a draw may have one class only
    scores["kNN_accuracy"] = [np.mean(votes.argmax(1) == classes)]
    scores["kNN_AUROC"] = [np.mean(areas) if areas else math.nan]
    return scores


def estimate(values: list[float], replicates: np.ndarray, lowest: float) -> Estimate:
    """Mean and spread of a score's values over the seeds, and its interval from the draws.

    A patient that is drawn twice agrees with itself, so agreement is too high in all draws.
    They are therefore shifted until their mean is the estimate (a recentred percentile
    interval). Scores lie in `lowest` to 1."""
    mean = np.mean(values)
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    finite = replicates[np.isfinite(replicates)]
    replicates = finite if len(finite) else replicates
    shifted = replicates - replicates.mean() + mean
    low, high = np.percentile(shifted, (2.5, 97.5)).clip(lowest, 1)
    return Estimate(mean=float(mean), spread=float(spread), low=float(low),
                    high=float(high))


def majority_row(truth: np.ndarray) -> dict[str, Any]:
    """The row of results.json without any features: all images are in one cluster."""
    scores = agreement(truth, np.zeros_like(truth)) | {"kNN_AUROC": 0.5}
    scores["kNN_accuracy"] = scores["accuracy"]
    nothing = dict(spread=math.nan, low=math.nan, high=math.nan)
    return {"labels_required": 0,
            "scores": {name: {"mean": scores.get(name, math.nan)} | nothing
                       for name in SCORES}}


def sweep(features: np.ndarray, selection: Selection) -> dict[str, list]:
    """Silhouette and inertia of 2 to 10 clusters, or to twice the number of classes if more."""
    most = min(max(10, 2 * selection.k), len(features))
    sizes = list(range(2, most + 1))
    sample = selection.subset(SAMPLE)
    clusterings = [k_means(features, k, 0, sample) for k in sizes]
    return {"k": sizes,
            "silhouette": [clustering.silhouette for clustering in clusterings],
            "inertia": [float(clustering.fit.inertia_) for clustering in clusterings]}


# --------------------------------------------------------------------------------------------------
# Figures, made from parts in report.py.

def cluster_numbers(clusters: np.ndarray, k: int, truth: np.ndarray,
                    classes: int) -> np.ndarray:
    """The number (k,) by which figures name each cluster: the number of the class to which it is
    assigned. Clusters without a class have numbers after the classes.

    clusters (n,), below k; truth (n,), below `classes`."""
    counts = metrics.confusion_matrix(truth, clusters, labels=range(max(k, classes)))
    cluster_of_number = linear_sum_assignment(counts, maximize=True)[1]
    return np.argsort(cluster_of_number)[:k]


def map_points(features: np.ndarray) -> np.ndarray:
    """(m, D) -> (m, 2) by t-SNE, from at most 50 principal components."""
    m, width = features.shape
    components = PCA(min(COMPONENTS, width, m), random_state=0).fit_transform(features)
    return TSNE(perplexity=min(30, (m - 1) / 3), random_state=0).fit_transform(components)


def thumbnails(manifest: Manifest, images: np.ndarray, size: int) -> Tensor:
    """Small pictures of images (m,): (m, 1, size, size) float32 in [0, 1] on the CPU."""
    loader = eval_loader(manifest, images, 64, Preprocessing(size), "cpu")
    return (torch.cat([x for x, _ in loader]) * STD + MEAN).clamp(0, 1)


def tag_of(number: int, init: str) -> str:
    """The name of a row's figure, as a file and in TensorBoard."""
    # Only the end of a path, because file systems allow 255 bytes. A number comes first, because
    # two paths may end alike.
    end = valid_unicode(init.replace("/", "_")).encode()[-200:]
    return f"{number}_{end.decode(errors='ignore')}"


def figures(title: str, tag: str, features: np.ndarray, best: Any, selection: Selection,
            text: FigureText, writer: SummaryWriter) -> None:
    """Show one row in four panels, as a PNG and in TensorBoard, and its features in the projector.

    tag: the file's name; features (n, D); best: the row's k-means; text: the classes' names."""
    truth, images, classes = selection.truth, selection.index, len(selection.names)
    number = cluster_numbers(best.labels_, selection.k, truth, classes)     # (k,)
    clusters = number[best.labels_]                                         # (n,)
    columns = max(selection.k, classes)
    names = [text.written[name] for name in selection.names]
    legend = cluster_legend(names, columns)
    figure = Figure(figsize=(14, 13), dpi=90, layout="constrained")
    figure.suptitle(title)
    by_class, by_cluster, contingency, sheet = figure.subplots(2, 2).flat

    # The map, coloured by class and by cluster.
    on_map = selection.subset(MAP)                      # (m,)
    points = map_points(features[on_map])
    draw_map(by_class, points, truth[on_map], legend, "class")
    draw_map(by_cluster, points, clusters[on_map], legend, "cluster, named by its class")

    # Which class is in which cluster.
    counts = metrics.confusion_matrix(truth, clusters, labels=range(columns))
    draw_table(contingency, counts[:classes], legend)

    # The eight images nearest to each cluster's centre; if there are fewer images, the last one is
    # repeated. Twelve clusters fit on the sheet.
    centres = number.argsort()[:12]                                         # (R,)
    nearest = best.transform(features)[:, centres].argsort(0)               # (n, R)
    eight = np.arange(8).clip(max=len(nearest) - 1)
    nearest = nearest[eight].T.ravel()                                      # (8 R,)
    pictures = thumbnails(selection.manifest, images[nearest], 96)
    draw_sheet(sheet, pictures, truth[nearest], number[centres], legend)
    figure.savefig(f"{writer.log_dir}/{tag}.png")
    writer.add_figure(tag, figure)

    # TensorBoard's projector shows the features themselves in three dimensions. Its table has a
    # line for each image and tabs between cells, so names must not have line ends or tabs.
    manifest, mapped = selection.manifest, images[on_map]
    cells = (clusters[on_map], np.array(selection.names)[truth[on_map]],
             manifest.patients[mapped], np.array(manifest.paths)[mapped])
    metadata = [[" ".join(str(cell).split()) for cell in line] for line in zip(*cells)]
    writer.add_embedding(
        torch.from_numpy(features[on_map]), metadata,
        thumbnails(manifest, mapped, PIXELS), tag=tag,
        metadata_header=["cluster", "class", "patient", "path"])


# --------------------------------------------------------------------------------------------------
# The table.

def cell(score: Estimate) -> str:
    """`mean ± spread [low, high]`, without the parts that are NaN; a dash without a mean."""
    if math.isnan(score["mean"]):
        return "–"
    text = f"{score['mean']:.3f}"
    if not math.isnan(score["spread"]):
        text += f" ± {score['spread']:.3f}"
    if not math.isnan(score["low"]):
        text += f" [{score['low']:.3f}, {score['high']:.3f}]"
    return text


def table(rows: dict[str, dict[str, Any]], selection: Selection) -> str:
    """results.md: rows as in results.json, and a paragraph that explains the numbers."""
    lines = [["init", "labels required", *(name.replace("_", " ") for name in SCORES)]]
    for init, row in rows.items():
        lines.append([init, str(row["labels_required"]),
                      *(cell(row["scores"][name]) for name in SCORES)])
    return markdown_table(lines) + (
        f"\n{selection.description}; {selection.algorithm}, k = {selection.k}. "
        "Mean ± standard deviation over the seeds [95 % interval over patients]. "
        "Labels required: images whose labels the row's trainings used, one after the other "
        "(imagenet: photographs). "
        f"Silhouette, cosines, k-NN: among {len(selection.subset(SAMPLE)):,}.\n")


# --------------------------------------------------------------------------------------------------
# The stage.

def open_run_folder(config: Config, inits: list[str], data: str, selection: Selection,
                    resources: contextlib.ExitStack) -> None:
    """Make the run folder, or recognise the run in it.

    --init and --data are compared by the content of the files that they name, because the same
    path may hold another training tomorrow."""
    run_folder.open_run(
        config, "cluster_eval", RESULTS, resources,
        contents={"init": {init: run_folder.content_of_file(init) for init in inits},
                  "data": {data: run_folder.content_of_data(selection.manifest)}},
        init=inits, data=data)


def is_complete(config: Config) -> bool:
    """Whether all results of the run are there."""
    files = [Path(config.out, name) for name in RESULTS]
    if config.export:
        files.append(Path(config.export))
    return all(file.exists() for file in files)


def clear(out: Path) -> None:
    """Delete what an interrupted or abandoned run left."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "cluster_figures", ignore_errors=True)


def write_table(config: Config, results: dict[str, dict[str, Any]], curves: dict[str, dict],
                selection: Selection, text: FigureText, writer: SummaryWriter) -> None:
    """Write the table of all rows, and the sweep's figure. results.json comes last: if it is there,
    everything is."""
    out = Path(config.out)
    if curves:
        figure = sweep_figure(curves, len(selection.names), text.written)
        figure.savefig(f"{writer.log_dir}/sweep.png")
        writer.add_figure("sweep", figure)
    results = results | {"*majority class*": majority_row(selection.truth)}
    markdown = table(results, selection) + text.legend
    writer.add_text("results", valid_unicode(markdown))
    writer.flush()
    write_text(out / "results.md", markdown)
    write_json(out / "results.json", {
        "config": dataclasses.asdict(config), "images": selection.description,
        "kept": selection.available, "k": selection.k, "algorithm": selection.algorithm,
        "rows": results, "sweep": curves})
    print(f"\n{markdown}\ndone: {out / 'results.md'}")


def cluster_eval(config: Config, compute: Compute, resources: contextlib.ExitStack) -> None:
    """Features, scores and figures of every row, then the table."""
    if compute.world_size > 1:
        raise DataError("this stage runs in one process: start it with python, not with "
                        "torchrun")

    # What is compared, and on which images. Checkpoints that do not fit and images that are too
    # few are refused here, before any older result is deleted.
    checkpoints = read_checkpoints(config.init)
    rows, trained_on = inherit(checkpoints)
    for row in rows:
        if row.init != "pixels":
            build_encoder(row.arch, row.init, print)
    data = config.data or trained_on
    selection = select(config, data)
    print(f"{selection.description}\nk = {selection.k}, {selection.algorithm} (up to "
          f"{MINIBATCH_ABOVE:,} images KMeans, beyond MiniBatchKMeans)", flush=True)

    # Where the results go, unless they are there already.
    out = Path(config.out)
    open_run_folder(config, list(checkpoints), data, selection, resources)
    if is_complete(config):
        finished = (out / "results.md").read_text("utf-8", errors="surrogateescape")
        print(f"{out} is complete; --overwrite does it again\n\n{finished}")
        return
    clear(out)
    writer = SummaryWriter(str(out / "cluster_figures"))
    resources.callback(writer.close)
    text = figure_text(**{"class": selection.names, "row": [row.init for row in rows]})
    resources.enter_context(rc_context(text.style))

    # Row by row: features ...
    results, curves = {}, {}
    for number, row in enumerate(rows, 1):
        features = features_of(row, selection, compute, out.parent / "features")    # (N, D)
        if config.export and row is rows[-1]:
            export(config.export, features, selection)
        features = features[selection.chosen]                                       # (n, D)
        if config.l2:
            features = np.asarray(normalize(features, copy=False))

        # ... scores ...
        evaluation = evaluate(
            features, selection.truth, selection.patients, selection.k, config.seeds,
            config.bootstrap, selection.subset(SAMPLE))
        results[row.init] = {
            "labels_required": row.labels_required, "arch": row.arch, **row.preprocessing,
            "scores": evaluation.scores}
        scores = [f"{name} {score['mean']:.3f}" for name, score in evaluation.scores.items()]
        print(f"{row.init} ({row.arch}, {row.preprocessing}): {', '.join(scores)}", flush=True)
        if config.k == "sweep":
            curves[row.init] = sweep(features, selection)

        # ... and figures.
        figures(text.written[row.init], tag_of(number, row.init), features, evaluation.best,
                selection, text, writer)

    settings = dataclasses.replace(
        config, init=tuple(checkpoints), data=data, precision=compute.precision)
    write_table(settings, results, curves, selection, text, writer)


def main(argv: list[str] | None = None) -> None:
    launch.main(cluster_eval, Config, argv,
                afterwards="begins anew, with the features that are kept")


if __name__ == "__main__":
    main()
