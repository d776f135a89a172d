"""Stage 3: what structure the features have, without labels in training. Encoder and data folder in, one table out.

    python cluster_eval.py                                      the last pre-training, beside random weights and pixels
    python cluster_eval.py --init random imagenet runs/pretrain/encoder.pt runs/finetune/classifier.pt
    python cluster_eval.py --classes binary:Effusion            one finding against the rest
    python cluster_eval.py --k sweep                            how many clusters do the features themselves suggest?
    tensorboard --logdir runs                                   table, figures, and the features in the projector

k-means never sees a label; labels only judge what it found. They have to be exclusive for that: --classes says which
images take part, and as what. It is done on test, for an encoder may remember the images of train, a classifier their
labels too. The run folder (--out) gets results.json, results.md, and in cluster_figures/ PNGs and TensorBoard's files.
"""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from dali_pipeline import SPLITS, DataError, Manifest, Preprocessing, eval_loader, read_manifest
from model import MEAN, STD, CheckpointError, build_encoder, cached_features, load_checkpoint

SCORES = ("accuracy", "balanced_accuracy", "NMI", "ARI", "purity", "silhouette", "cosine_within", "cosine_between",
          "kNN_accuracy", "kNN_AUROC")              # the table's columns and the keys of results.json
NO_CHECKPOINT = {"random": 0, "pixels": 0, "imagenet": 1_281_167}       # and how many labels went into them
ENCODERS = ("runs/pretrain/encoder.pt", "runs/demo/encoder.pt")         # the first there is makes a default row
NO_FINDING = "No Finding"           # what NIH and CheXpert call the column of images without any
MINIBATCH_ABOVE = 20_000            # images; beyond, k-means works on batches of 4,096
SAMPLED, MAPPED = 5_000, 2_000      # images at most: for silhouette, cosines and k-NN; on the map, in the projector
PIXELS, COMPONENTS = 32, 50         # the row `pixels`: images of 32 x 32, reduced to 50 principal components


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--init", nargs="+", metavar="NAME|PATH", help="rows: random, imagenet, pixels, checkpoints")
    parser.add_argument("--data", help="data folder (default: the one that the first checkpoint was trained on)")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="test", help="images (default %(default)s)")
    parser.add_argument("--classes", default="single", metavar="single|dominant|binary:LABEL", help="images of one "
                        "finding, all by their rarest, or LABEL against the rest (default %(default)s)")
    parser.add_argument("--no-finding", choices=("keep", "drop"), help="images without (drop; in binary keep)")
    parser.add_argument("--k", default="classes", metavar="classes|sweep|N", help="clusters (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="k-means runs a row (default %(default)s)")
    parser.add_argument("--l2", action=argparse.BooleanOptionalAction, default=True, help="bring features to length 1")
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws for the intervals (default %(default)s)")
    parser.add_argument("--export", metavar="FILE.npz", help="the last row's features, index, path, patient and labels")
    parser.add_argument("--out", default="runs/cluster", help="run folder (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="give up the results that the run folder holds")
    args = parser.parse_args(argv)
    if min(args.seeds, args.bootstrap) < 1:
        parser.error(f"--seeds {args.seeds} and --bootstrap {args.bootstrap} must be positive")
    if args.k not in ("classes", "sweep") and not (args.k.isdecimal() and int(args.k) > 1):
        parser.error(f"--k {args.k} is none of classes, sweep or a number from 2")
    if args.classes not in ("single", "dominant") and not args.classes.startswith("binary:"):
        parser.error(f"--classes {args.classes} is none of single, dominant or binary:LABEL")
    if args.export and not (args.export.endswith(".npz") and Path(args.export).parent.is_dir()):
        parser.error(f"--export {args.export} must be a .npz file in a folder that exists")
    args.no_finding = args.no_finding or ("keep" if args.classes.startswith("binary:") else "drop")
    return args


def choose_classes(labels: np.ndarray, names: list[str], rule: str, no_finding: str) -> tuple[np.ndarray, list[str]]:
    """Each image's class (n,) int64, -1 where it is left out, and the classes' names. labels (n, L) as in the manifest.

    rule: `single` takes images with one positive finding and no uncertain one; `dominant` every image with a positive
    one, as the rarest where it has several; `binary:LABEL` all but those where LABEL is uncertain. An empty cell counts
    as absent, but a row of nothing else is left out. "No Finding" is no finding: with no_finding `keep`, images without
    a positive or uncertain one are a class, or in `binary` belong to the rest. DataError: no such LABEL."""
    findings = np.array([name != NO_FINDING for name in names], bool)
    present, uncertain = (labels == 1)[:, findings], (labels == -1)[:, findings]                        # (n, F) bool
    healthy = labels[:, names.index(NO_FINDING)] == 1 if NO_FINDING in names else (labels == 0).any(1)
    healthy = healthy & ~(present | uncertain).any(1)
    if rule not in ("single", "dominant"):
        label = rule.removeprefix("binary:")
        if label not in names:
            raise DataError(f"--classes {rule}: there is no label {label!r}, only {', '.join(names)}")
        column = labels[:, names.index(label)]
        out = (column == -1) | np.isnan(labels).all(1) | (healthy & (column != 1) & (no_finding == "drop"))
        return np.where(out, -1, column == 1), [f"not {label}", label]
    present = np.c_[present, healthy & (no_finding == "keep")]                                          # (n, F + 1)
    rarest = np.where(present, present.sum(0), np.inf).argmin(1)
    chosen = present.any(1) if rule == "dominant" else (present.sum(1) == 1) & ~uncertain.any(1)
    return np.where(chosen, rarest, -1), [name for name in names if name != NO_FINDING] + [NO_FINDING]


def agreement(truth: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """How well clusters (n,) fit classes (n,). accuracy: share of the images in the cluster assigned to their class,
    one to one (Kuhn 1955). balanced_accuracy: the same in each class, and the mean. NMI: mutual information over the
    mean entropy. ARI: Hubert and Arabie 1985. purity: every cluster takes its majority class; grows with k."""
    table = metrics.cluster.contingency_matrix(truth, clusters)                 # (C, K), of those that occur
    classes, assigned = linear_sum_assignment(table, maximize=True)
    found = np.zeros(len(table))
    found[classes] = table[classes, assigned]
    return {"accuracy": found.sum() / len(truth), "balanced_accuracy": (found / table.sum(1)).mean(),
            "NMI": metrics.normalized_mutual_info_score(truth, clusters),
            "ARI": metrics.adjusted_rand_score(truth, clusters), "purity": table.max(0).sum() / len(truth)}


def knn_votes(cosine: np.ndarray, truth: np.ndarray, patients: np.ndarray, k: int = 20) -> np.ndarray:
    """Share (m, C) of each class in the votes of an image's k nearest of other patients, from all cosines (m, m).

    A vote weighs exp(cosine / 0.07) (Wu et al. 2018). Without the own patient, whose images are nearly copies, the own
    class is rarer, and features that say nothing would fall below chance: votes are scaled back to all frequencies.
    On average that mends it; a class of very few patients still starts from an AUROC below 0.5."""
    one_hot, others = np.eye(truth.max() + 1)[truth], patients[:, None] != patients             # (m, C), (m, m)
    near, index = torch.from_numpy(np.where(others, cosine, -np.inf)).topk(min(k, len(truth) - 1))      # (m, k)
    votes = (((near - near[:, :1]) / 0.07).exp().numpy()[:, :, None] * one_hot[index]).sum(1)
    votes *= one_hot.sum(0) / (others @ one_hot).clip(1)
    return votes / votes.sum(1, keepdims=True)


def k_means(features: np.ndarray, k: int, seed: int, sample: np.ndarray) -> tuple[KMeans | MiniBatchKMeans, float]:
    """The best of 10 initialisations, and its mean silhouette on `sample` (Rousseeuw 1987), NaN for one cluster or
    one an image. scikit-learn warns where equal images leave clusters empty."""
    method = MiniBatchKMeans(k, n_init=10, batch_size=4096, random_state=seed)
    fit = (method if len(features) > MINIBATCH_ABOVE else KMeans(k, n_init=10, random_state=seed)).fit(features)
    parted = 1 < len(np.unique(fit.labels_[sample])) < len(sample)
    return fit, float(metrics.silhouette_score(features[sample], fit.labels_[sample])) if parted else np.nan


def evaluate(features: np.ndarray, truth: np.ndarray, patients: np.ndarray, k: int, seeds: int, bootstrap: int,
             sample: np.ndarray) -> tuple[dict, KMeans | MiniBatchKMeans]:
    """A row's {score: {mean, spread, low, high}}, NaN where there is none, and its k-means of lowest inertia.

    features (n, D) float32; truth, patients (n,) int64; sample (m,) int64: images for silhouette, cosines and k-NN.
    spread: standard deviation over the seeds. low, high: 95 % interval of the mean when patients are drawn anew and
    the clusters, kept, are assigned again. A patient drawn twice agrees with itself, which lifts all agreement: the
    draws are moved until their mean is the estimate (a percentile interval, recentred)."""
    runs, silhouettes = zip(*(k_means(features, k, seed, sample) for seed in range(seeds)))
    known, unit = truth[sample], normalize(features[sample])                                    # (m,), (m, D)
    cosine, same = unit @ unit.T, known[:, None] == known                                       # (m, m)
    votes = knn_votes(cosine, known, patients[sample])                                          # (m, C)

    def scores(counts):
        """{score: a value a seed, or one where seeds play no part}, each image counted counts (n,) times"""
        every, asked = np.repeat(np.arange(len(truth)), counts), np.repeat(np.arange(len(sample)), counts[sample])
        tables = [agreement(truth[every], run.labels_[every]) for run in runs]
        areas = [metrics.roc_auc_score(known[asked] == c, votes[asked, c]) for c in np.unique(known[asked])
                 if (known[asked] != c).any()]                                  # a draw may hold one class only
        return {name: [table[name] for table in tables] for name in tables[0]} | {
            "kNN_accuracy": [np.mean(votes[asked].argmax(1) == known[asked])],
            "kNN_AUROC": [np.mean(areas) if areas else np.nan]}

    rng, n_patients = np.random.default_rng(0), patients.max() + 1                  # the same draws for every row
    draws = [scores(np.bincount(rng.integers(n_patients, size=n_patients), minlength=n_patients)[patients])
             for _ in range(bootstrap)]
    values = scores(np.ones(len(truth), int)) | {
        "silhouette": silhouettes, "cosine_between": [cosine[~same].mean()],
        "cosine_within": [cosine[same & ~np.eye(len(same), dtype=bool)].mean()]}            # the diagonal is no pair
    row = {}
    for name in SCORES:
        mean, spread = np.mean(values[name]), np.std(values[name], ddof=1) if len(values[name]) > 1 else np.nan
        drawn = np.array([np.mean(draw.get(name, np.nan)) for draw in draws])
        drawn = drawn[np.isfinite(drawn)] if np.isfinite(drawn).any() else drawn
        low, high = np.percentile(drawn - drawn.mean() + mean, (2.5, 97.5)).clip(-1 if name == "ARI" else 0, 1)
        row[name] = {"mean": float(mean), "spread": float(spread), "low": float(low), "high": float(high)}
    return row, min(runs, key=lambda run: run.inertia_)


def draw(points: np.ndarray, truth: np.ndarray, clusters: np.ndarray, table: np.ndarray, sheet: torch.Tensor,
         dots: np.ndarray, sides: list[int], names: list[str], title: str) -> Figure:
    """A row in four panels: map of points (m, 2), by truth (m,) and by clusters (m,); contingency table (C, K); contact
    sheet (8 R, 1, S, S) of the images nearest to the centres `sides` (R,), with dots (8 R,) for their classes. Cluster
    c is the one assigned to class c; those from C on are too many, and gray."""
    hues = [*colormaps["tab10"].colors, *colormaps["tab20"].colors[1::2]]           # ten strong ones, ten pale ones
    colours = [hues[c % 20] if c < len(names) else "lightgray" for c in range(table.shape[1])]
    labels = [*names, *(f"cluster {c}" for c in range(len(names), table.shape[1]))]
    figure = Figure(figsize=(14, 13), dpi=90, layout="constrained")
    figure.suptitle(title)
    by_class, by_cluster, confusion, nearest = figure.subplots(2, 2).flat
    for axes, values, what in ((by_class, truth, "class"), (by_cluster, clusters, "cluster, named by its class")):
        others = values[values >= len(names)].min(initial=len(labels))          # one entry in the legend for them all
        for c in np.unique(values):
            name = labels[c] if c < len(names) else "other clusters" if c == others else None
            axes.scatter(*points[values == c].T, s=14, linewidths=0, alpha=0.8, color=colours[c], label=name)
        axes.set(title=f"t-SNE of {len(points):,} images, by {what}", xticks=[], yticks=[])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=8, frameon=False, markerscale=2)
    confusion.imshow(table / table.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
    few = table.shape[1] <= 30                                                  # more have no room for their numbers
    for (row, column), n in np.ndenumerate(table if few else table[:0]):
        confusion.text(column, row, f"{n:.0f}", ha="center")
    confusion.set(title="images of class and cluster", yticks=range(len(names)), yticklabels=names,
                  xlabel="cluster, named by its class", xticks=range(len(labels)), xticklabels=labels)
    confusion.tick_params(axis="x", labelrotation=30, labelbottom=few)
    size, places = sheet.shape[-1] + 2, np.arange(len(sheet))                       # make_grid adds 2 pixels
    nearest.imshow(make_grid(sheet, nrow=8)[0], cmap="gray", vmin=0, vmax=1)
    nearest.scatter(places % 8 * size + 10, places // 8 * size + 10, s=40, c=[colours[c] for c in dots])
    nearest.set(title="nearest to each centre; the dot is the class", xticks=[],
                yticks=np.arange(len(sides)) * size + size / 2, yticklabels=[labels[c] for c in sides])
    return figure


def thumbnails(manifest: Manifest, images: np.ndarray, size: int) -> torch.Tensor:
    """(m, 1, size, size) float32 in [0, 1] on the CPU."""
    x = torch.cat([x for x, _ in eval_loader(manifest, images, 64, Preprocessing(size), "cpu")])
    return (x * STD + MEAN).clamp(0, 1)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        cluster_eval(args)
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(f"cluster_eval.py: {error}")


def cluster_eval(args: argparse.Namespace) -> None:
    # ------------------------------------------------------------------------------------- rows, and what they inherit
    trained = next((path for path in ENCODERS if Path(path).exists()), ENCODERS[0])
    inits = args.init or ["random", "pixels", trained]
    if not args.init and not Path(trained).exists():
        raise DataError(f"{trained} does not exist: run pretrain.py first (--demo brings its own data), or name --init")
    states = {init: {} if init in NO_CHECKPOINT else load_checkpoint(init) for init in inits}
    lender = next((state for state in states.values() if "config" in state), {"config": {}})    # to rows without one
    for init, state in states.items():              # what cannot be built is told before any result is given up
        if init != "pixels":
            build_encoder((state if "arch" in state else lender).get("arch", "resnet50"), init)
    data = args.data or lender["config"].get("data", "data/nih")

    # ------------------------------------------------------------------------------------------------- images, classes
    manifest = read_manifest(data)
    images = np.arange(len(manifest.paths)) if args.split == "all" else manifest.images(args.split)
    labels = manifest.labels[images]
    kept = {f"{rule}, {none}": int((choose_classes(labels, manifest.label_names, rule, none)[0] >= 0).sum())
            for rule in ("single", "dominant", args.classes) for none in ("drop", "keep")}
    truth, names = choose_classes(labels, manifest.label_names, args.classes, args.no_finding)
    chosen = np.flatnonzero(truth >= 0)                                             # places in `images`, (n,)
    present, truth = np.unique(truth[chosen], return_inverse=True)
    names = [names[c] for c in present]
    k = int(args.k) if args.k.isdecimal() else len(names)
    who, patients = np.unique(manifest.patients[images[chosen]], return_inverse=True)
    what = (f"--classes {args.classes} --no-finding {args.no_finding} keeps {len(chosen):,} of {len(images):,} images "
            f"of {data}, {args.split}, {len(who):,} patients: {dict(zip(names, np.bincount(truth).tolist()))}")
    print(f"images kept by --classes and --no-finding: {kept}")
    if len(names) < 2 or len(who) < 2 or len(chosen) < k:
        raise DataError(f"{what}: it takes two classes, two patients and no fewer images than --k {k} clusters; "
                        f"--no-finding keep, or binary: and one of {', '.join(manifest.label_names)}, may help")
    algorithm = "MiniBatchKMeans" if len(chosen) > MINIBATCH_ABOVE else "KMeans"
    print(f"{what}\nk = {k}, {algorithm} (up to {MINIBATCH_ABOVE:,} images KMeans, beyond MiniBatchKMeans)")
    sample, shown = (np.sort(np.random.default_rng(0).permutation(len(chosen))[:size]) for size in (SAMPLED, MAPPED))

    # ------------------------------------------------------------------------------------------------------ run folder
    out = Path(args.out)
    if (out / "config.json").exists():
        raise DataError(f"{out} is the run folder of another stage; choose another --out")
    files = [manifest.folder / "manifest.csv", *(states.keys() - NO_CHECKPOINT)]
    run = {key: value for key, value in vars(args).items() if key not in ("out", "overwrite")}
    run |= {"init": list(states), "data": str(data), "written": sorted(os.stat(file).st_mtime_ns for file in files)}
    if (out / "results.json").exists() and not args.overwrite:
        try:
            before = dict(json.loads((out / "results.json").read_text())["config"])
            table = (out / "results.md").read_text()
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            raise DataError(f"{out} holds a results.json that is none of ours, or no results.md beside it; choose "
                            "another --out, or --overwrite them") from None
        differ = [f"{key} ({before.get(key)} there, {run[key]} here)" for key in run if run[key] != before.get(key)]
        if args.export and not Path(args.export).exists():
            differ.append(f"{args.export} is gone")
        if differ:
            raise DataError(f"{out} holds other results: {', '.join(differ)}; choose another --out or --overwrite")
        print(f"{out} is complete; --overwrite does it again\n\n{table}")
        return
    for old in (out / "results.json", out / "results.md"):
        old.unlink(missing_ok=True)
    shutil.rmtree(out / "cluster_figures", ignore_errors=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None
    if device.type == "cuda":                                           # finetune.py's rule, to share its features
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    writer, rows, curves = SummaryWriter(out / "cluster_figures"), {}, {}

    for init, state in states.items():
        # ---------------------------------------------------------------------------------------------------- features
        settings = state.get("config", lender["config"])
        settings = {key: settings[key] for key in ("image_size", "normalize", "clahe") if key in settings}
        arch = "PCA" if init == "pixels" else (state if "arch" in state else lender).get("arch", "resnet50")
        first = init if init in NO_CHECKPOINT else state.get("config", {}).get("init")          # what it started from
        known = NO_CHECKPOINT.get(first, "unknown")
        if "classifier" in state:
            known = state["n_train"] + (known if first == "imagenet" else 0) if "n_train" in state else "unknown"
        torch.manual_seed(0)
        if init == "pixels":                            # an encoder like others, to the loader and the kept features
            encoder, settings["image_size"] = nn.Flatten(), PIXELS
            encoder.num_features = PIXELS ** 2
        else:
            encoder = build_encoder(arch, init).to(device, memory_format=torch.channels_last)
        loader = eval_loader(manifest, images, 128, Preprocessing(**settings), device, half=dtype is not None,
                             threads=min(8, len(os.sched_getaffinity(0))))
        features = cached_features(encoder, loader, len(images), out.parent / "features", dtype).numpy()
        bad = images[~(np.abs(features) < 1e18).all(1)]                 # squares must be finite, too
        if len(bad):
            raise DataError(f"{init}: features of {len(bad)} images are not finite, or huge, of "
                            f"{manifest.paths[bad[0]]} first")
        if init == "pixels":
            features = PCA(min(COMPONENTS, *features.shape), random_state=0).fit_transform(features)
        if args.export and init == list(states)[-1]:
            np.savez(args.export, features=features, index=images, path=np.array(manifest.paths)[images],
                     patient=manifest.patients[images], labels=labels, label_names=np.array(manifest.label_names))
        features = features[chosen]                                                                     # (n, D)
        features = normalize(features, copy=False) if args.l2 else features

        # ------------------------------------------------------------------------------------------------------ scores
        scores, best = evaluate(features, truth, patients, k, args.seeds, args.bootstrap, sample)
        rows[init] = {"labels_required": known, "arch": arch, **settings, "scores": scores}
        print(f"{init} ({arch}, {settings}): "
              + ", ".join(f"{score} {value['mean']:.3f}" for score, value in scores.items()), flush=True)
        if args.k == "sweep":
            sizes = list(range(2, min(max(10, 2 * k), len(chosen)) + 1))
            fits, silhouettes = zip(*(k_means(features, size, 0, sample) for size in sizes))
            curves[init] = {"k": sizes, "silhouette": silhouettes, "inertia": [float(fit.inertia_) for fit in fits]}

        # ----------------------------------------------------------------------------------------------------- figures
        # Number each cluster as the class assigned to it, and those that got none from len(names) on.
        table = metrics.confusion_matrix(truth, best.labels_, labels=range(max(k, len(names))))         # (K, K)
        order = linear_sum_assignment(table, maximize=True)[1]
        number = np.argsort(order)
        clusters, sides = number[best.labels_], np.argsort(number[:k])[:12]             # twelve fit on the sheet
        points = PCA(min(COMPONENTS, features.shape[1], len(shown)), random_state=0).fit_transform(features[shown])
        points = TSNE(perplexity=min(30, (len(shown) - 1) / 3), random_state=0).fit_transform(points)
        nearest = best.transform(features)[:, sides].argsort(0)                                         # (n, R)
        nearest = nearest[np.arange(8).clip(max=len(nearest) - 1)].T.ravel()                            # (8 R,)
        figure = draw(points, truth[shown], clusters[shown], table[:len(names), order],
                      thumbnails(manifest, images[chosen[nearest]], 96), truth[nearest], number[sides], names, init)
        slug = f"{len(rows)}_{init.replace('/', '_')}"                  # two rows may end in the same name
        figure.savefig(f"{writer.log_dir}/{slug}.png")
        writer.add_figure(slug, figure)
        index = images[chosen[shown]]
        writer.add_embedding(
            torch.from_numpy(features[shown]), list(zip(clusters[shown], np.array(names)[truth[shown]],
                                                        manifest.patients[index], np.array(manifest.paths)[index])),
            thumbnails(manifest, index, PIXELS), tag=slug, metadata_header=["cluster", "class", "patient", "path"])

    # ----------------------------------------------------------------------------------------------------------- table
    if curves:
        figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
        for axes, score in zip(figure.subplots(1, 2), ("silhouette", "inertia")):
            for init, curve in curves.items():
                axes.plot(curve["k"], curve[score], "o-", label=init)
            axes.set(xlabel=f"k, clusters (there are {len(names)} classes)", title=score,
                     yscale="log" if score == "inertia" else "linear")              # rows differ by far
            axes.legend()
        figure.savefig(f"{writer.log_dir}/sweep.png")
        writer.add_figure("sweep", figure)
    majority = agreement(truth, np.zeros_like(truth)) | {"kNN_AUROC": 0.5}                      # all in one cluster
    majority["kNN_accuracy"] = majority["accuracy"]
    rows["*majority class*"] = {"labels_required": 0, "scores": {score: dict.fromkeys(
        ("spread", "low", "high"), np.nan) | {"mean": majority.get(score, np.nan)} for score in SCORES}}
    lines = [["init", "labels required", *(score.replace("_", " ") for score in SCORES)], ["---"] * (len(SCORES) + 2)]
    lines += [[init, str(row["labels_required"]), *(
        f"{score['mean']:.3f} ± {score['spread']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
        for score in row["scores"].values())] for init, row in rows.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = text.replace(" ± nan", "").replace(" [nan, nan]", "").replace("| nan", "| –") + f"""

{what}; {algorithm}, k = {k}. Mean ± standard deviation over the seeds [95 % interval over patients]. Labels required: \
images whose labels the row's training used (imagenet: photographs). Silhouette, cosines, k-NN: among {len(sample):,}.
"""
    writer.add_text("results", text)
    writer.close()
    (out / "results.md").write_text(text)
    results = {"config": run, "images": what, "kept": kept, "k": k, "algorithm": algorithm,
               "rows": rows, "sweep": curves}
    results = json.loads(json.dumps(results), parse_constant=lambda nan: None)                  # JSON has no NaN
    (out / "results.tmp").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.tmp").replace(out / "results.json")                             # last: where it is, all is there
    print(f"\n{text}\ndone: {out / 'results.md'}")


if __name__ == "__main__":
    main()
