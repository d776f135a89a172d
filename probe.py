"""Frozen features, judged by labels that their training never saw.

Pre-training classifies by nearest neighbours every few epochs, because they need no
fitting. The cluster stage does the same among test images. Fine-tuning fits logistic
regressions, for all labels and all strengths of regularisation at once.
"""
import contextlib
import hashlib
import math
import os
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchvision.models import ResNet

from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dali_pipeline import Loader, Preprocessing, eval_loader
from manifest import Manifest
from model import num_features
from run import Compute
from run_folder import rows_digest, sizes_digest

# Temperature of the neighbours' votes.
TEMPERATURE = 0.07
# Strengths of the regularisation, see fit_logistic.
STRENGTHS = 10.0 ** np.arange(-4, 3)
# The most bytes of kept features. ResNet-50's of NIH's 112,120 images take 0.9 GB.
KEPT_FEATURES = 8 * 2**30


# --------------------------------------------------------------------------------------------------
# Features of the images of a data folder.

@torch.no_grad()
def extract_features(net: nn.Module, width: int, loader: Loader,
                     dtype: torch.dtype | None = None) -> Tensor:
    """Outputs (n, width) of a network for the loader's n images, float32 on the loader's device.

    They are in the loader's order, and the same on every process: process `rank` fills the
    rows of its images rank, rank + world_size, ..., and a sum over the processes fills the
    others, exactly, because it only adds zeros. dtype: for autocast, None for float32. The
    network's mode is restored."""
    training = net.training
    net.eval()
    features = torch.zeros(len(loader.images), width, device=loader.device)
    row = loader.rank
    for x, _ in loader:
        with torch.autocast(loader.device.type, dtype, enabled=dtype is not None):
            y = net(x)                                                          # (b, width)
        end = row + loader.world_size * len(y)
        features[row:end:loader.world_size] = y.float()
        row = end
    if loader.world_size > 1:
        dist.all_reduce(features)
    net.train(training)
    return features


# --------------------------------------------------------------------------------------------------
# Nearest neighbours. A neighbour's vote has the weight exp(cosine / 0.07) (Wu et al. 2018).

class Neighbours(NamedTuple):
    """The k nearest rows of a bank for each of M queries, nearest first."""
    index: np.ndarray   # (M, k) rows of the bank
    weight: np.ndarray  # (M, k) weights of their votes, 1 for the nearest


def nearest(cosine: Tensor, k: int) -> Neighbours:
    """The k nearest by cosine similarities (M, N); -inf excludes a pair."""
    near, index = cosine.topk(min(k, cosine.shape[1]))
    weight = ((near - near[:, :1]) / TEMPERATURE).exp()
    return Neighbours(index.cpu().numpy(), weight.cpu().numpy())


def knn_auroc(bank: Tensor, bank_labels: np.ndarray, queries: Tensor,
              query_labels: np.ndarray, k: int = 20) -> list[float]:
    """AUROC of each of L labels on M queries, scored by each query's k nearest of N in the bank.

    bank (N, D), queries (M, D): features, of any norm. bank_labels (N, L), query_labels
    (M, L): 1, 0, NaN for not mentioned, which counts as absent, and -1 for uncertain,
    which neither votes nor is scored. The AUROC is NaN if the queries have one class only."""
    neighbours = nearest(F.normalize(queries) @ F.normalize(bank).T, k)
    votes = np.nan_to_num(bank_labels)[neighbours.index]                # (M, k, L)
    weights = neighbours.weight[:, :, None] * (votes >= 0)              # (M, k, L)
    scores = (weights * votes).sum(1) / weights.sum(1).clip(min=1e-12)  # (M, L)
    auroc = []
    for score, label in zip(scores.T, np.nan_to_num(query_labels).T):
        certain = label >= 0
        score, label = score[certain], label[certain]
        area = math.nan
        if 0 < label.sum() < len(label):
            area = float(roc_auc_score(label, score))
        auroc.append(area)
    return auroc


def knn_class_shares(cosine: np.ndarray, truth: np.ndarray, patients: np.ndarray,
                     k: int = 20) -> np.ndarray:
    """Shares (m, C) of C exclusive classes in the votes of each image's k nearest.

    cosine (m, m), truth (m,) and patients (m,) of the same images. An image's own patient
    does not vote, because images of one patient are nearly copies. That makes the image's
    own class rarer among the voters, and uninformative features would score below chance.
    So a class's votes are multiplied by how often the class occurs with the patient,
    divided by how often without. On average that repairs it, but a class of very few
    patients still starts from an AUROC below 0.5. NaN if all images are of one patient."""
    others = patients[:, None] != patients    # (m, m)
    if not others.any():
        return np.full((len(truth), truth.max() + 1), np.nan)
    neighbours = nearest(torch.from_numpy(np.where(others, cosine, -np.inf)), k)
    one_hot = np.eye(truth.max() + 1)[truth]  # (m, C)
    votes = (neighbours.weight[:, :, None] * one_hot[neighbours.index]).sum(1)
    votes *= one_hot.sum(0) / (others @ one_hot).clip(1)
    return votes / votes.sum(1, keepdims=True)


# --------------------------------------------------------------------------------------------------
# The probe during pre-training.

# A mean over labels leaves out those with fewer positives or negatives than this: the AUROC of one
# or two images varies so much that it would dominate the mean.
PROBE_CELLS = 10


def counted_labels(truth: np.ndarray) -> np.ndarray:
    """Which labels the mean includes, (L,) bool. truth (n, L): 1, 0, others are not scored.

    If all labels are rare, it includes the least rare."""
    fewest = np.minimum((truth == 1).sum(0), (truth == 0).sum(0))           # (L,)
    return fewest >= min(PROBE_CELLS, fewest.max())


class Probe:
    """Labelled images that judge features while these are learned without labels."""

    def __init__(self, manifest: Manifest, most: int, seed: int, preprocessing: Preprocessing):
        """most: how many images of train are the bank, and how many of val are the queries."""
        self.manifest, self.preprocessing = manifest, preprocessing
        # The same random images every time, so that the points of the curve can be compared.
        self.bank, self.queries = (
            np.sort(np.random.default_rng(seed).permutation(manifest.images(split))[:most])
            for split in ("train", "val"))
        self.counted = counted_labels(np.nan_to_num(manifest.labels[self.queries]))     # (L,)

    def scores(self, encoder: ResNet, batch_size: int, compute: Compute) -> dict[str, float]:
        """{name: AUROC} on val, or {} if a feature is not finite.

        Each label is predicted by the nearest neighbours in train, see `knn_auroc`. The first
        item is `probe/auroc`, the mean over the labels that count."""
        features = []
        for images in (self.bank, self.queries):
            loader = eval_loader(self.manifest, images, batch_size, self.preprocessing,
                                 **compute.loader_arguments())
            features.append(extract_features(
                encoder, num_features(encoder), loader, compute.dtype))     # (n, D)
            if not features[-1].isfinite().all():
                return {}
        auroc = np.array(knn_auroc(features[0], self.manifest.labels[self.bank],
                                   features[1], self.manifest.labels[self.queries]))
        known = auroc[self.counted & ~np.isnan(auroc)]
        mean = {"probe/auroc": float(known.mean()) if len(known) else math.nan}
        names = [f"probe/{name}" for name in self.manifest.label_names]
        # The mean is first in order, and given last again because a label may be called auroc.
        return mean | dict(zip(names, auroc.tolist())) | mean

    def __str__(self) -> str:
        counted, labels = self.counted.sum(), len(self.counted)
        rest = f"; the others have fewer than {PROBE_CELLS} positives or negatives in val"
        return (f"probe on {len(self.queries)} images of {self.manifest.folder}: mean AUROC of "
                f"{counted} of {labels} labels{rest if counted < labels else ''}")


def probe_sentence(scores: dict[str, float]) -> str:
    """A probe's scores for the terminal: the mean, and the first labels."""
    labels = [f"{name.removeprefix('probe/')} {value:.3f}" for name, value in scores.items()][1:]
    labels = labels[:15] + ["..."] * (len(labels) > 15)
    return f"probe AUROC {scores['probe/auroc']:.4f} ({', '.join(labels)})"


# --------------------------------------------------------------------------------------------------
# Logistic regression.

def fit_logistic(x: Tensor, targets: Tensor, weights: Tensor, strengths: Tensor,
                 tolerance: float = 1e-6, max_steps: int = 5000) -> tuple[Tensor, Tensor]:
    """Logistic regressions for G questions, each with R strengths of regularisation.

    x (n, D) float64; targets (n, G, K), K = 1 for a sigmoid, one-hot for a softmax of K
    answers; weights (n, G); strengths (R,). Each regression minimises its weighted mean
    cross-entropy + strength / 2 * |w|^2 with a free intercept, as scikit-learn's does
    with C = 1 / (n * strength). Returns coefficients (D, R, G, K) and intercepts
    (R, G, K).

    It stops when no step is guaranteed to lower a loss by `tolerance`. With weak
    regularisation and few rows a loss may end about 1e-4 above its optimum.

    The method: along the principal axes of the rows, x'x is diagonal, and so is an upper
    bound of the Hessian (Böhning 1992). Gradient steps divided by that bound are guaranteed
    to descend. Nesterov's momentum makes this fast; a regression whose momentum points
    uphill resets it (O'Donoghue and Candès 2015)."""
    # Principal axes. With fewer rows than features, the axes of the rows' span are enough,
    # because the optimum lies in it.
    center = x.mean(0)
    x = x - center
    few = len(x) < x.shape[1]
    squares, axes = torch.linalg.eigh(x @ x.T if few else x.T @ x)
    relevant = squares > 1e-10 * squares[-1]
    squares, axes = squares[relevant], axes[:, relevant]
    if few:
        axes = x.T @ axes / squares.sqrt()                           # (D, d)
    x = torch.cat([x @ axes, torch.ones_like(x[:, :1])], dim=1)      # (n, d + 1)

    # One problem for each strength, question and answer. The last row of a solution is the
    # intercept, which is not regularised.
    shape = x.shape[1], len(strengths), *targets.shape[1:]           # (d + 1, R, G, K)
    sigmoid = shape[3] == 1
    weights = (weights / weights.sum(0))[:, None, :, None]           # (n, 1, G, 1)
    targets = targets[:, None]                                       # (n, 1, G, K)
    penalty = strengths.view(1, -1, 1, 1)
    penalty = penalty.repeat(shape[0], 1, 1, 1)                      # (d + 1, R, 1, 1)
    penalty[-1] = 0
    steepest = weights.amax(0, keepdim=True) * (0.25 if sigmoid else 0.5)
    squares = torch.cat([squares, squares.new_tensor([len(x)])])
    bound = squares.view(-1, 1, 1, 1) * steepest + penalty           # (d + 1, R, G, 1)

    # Accelerated descent. `ahead` is the point to which momentum carries a solution; `age`
    # grows with the steps since the momentum of that regression was last reset.
    solution, ahead = x.new_zeros(shape), x.new_zeros(shape)
    age = x.new_ones(1)
    for _ in range(max_steps):
        logits = (x @ ahead.flatten(1)).view(len(x), *shape[1:])  # (n, R, G, K)
        answers = logits.sigmoid() if sigmoid else logits.softmax(3)
        error = weights * (answers - targets)
        gradient = (x.T @ error.flatten(1)).view(shape)
        gradient = gradient + penalty * ahead
        surely = gradient.square() / bound
        if surely.sum((0, 3)).max() < 2 * tolerance:
            break
        before, solution = solution, ahead - gradient / bound
        uphill = (gradient * (solution - before)).sum((0, 3), keepdim=True) > 0
        age = torch.where(uphill, 1.0, age)  # (1, R, G, 1)
        older = (1 + (1 + 4 * age ** 2).sqrt()) / 2
        ahead = solution + (age - 1) / older * (solution - before)
        age = older

    # Back to the features' own axes and origin.
    coefficients = (axes @ ahead[:-1].flatten(1)).view(-1, *shape[1:])
    shift = torch.tensordot(center, coefficients, 1)
    return coefficients, ahead[-1] - shift


# --------------------------------------------------------------------------------------------------
# Features that are kept on disk, because the later stages need the same ones again and again.

def cached_features(net: nn.Module, width: int, loader: Loader, folder: Path,
                    dtype: torch.dtype | None = None) -> Tensor:
    """The result of `extract_features` on the CPU, kept in `folder` and read from there next time.

    A file's name is a digest of the weights, the preprocessing and the images. If the kept
    files exceed KEPT_FEATURES bytes, the least recently used are deleted."""
    digest = hashlib.sha256(f"{fingerprint(loader)} {dtype}".encode())
    for name, value in net.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    file = folder / f"{digest.hexdigest()[:16]}.pt"
    # If the file is missing or damaged, the features are extracted.
    with contextlib.suppress(CheckpointError):
        features = load_checkpoint(file)["features"]
        os.utime(file)                  # the time of the last use
        return features
    features = extract_features(net, width, loader, dtype).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    # Another run may write the same features, so each run writes a file with a name of its own.
    # If it is killed, the next run on the same machine deletes the unfinished file.
    host = platform.node()
    for part in folder.glob(f"{host}-*.part*"):
        process = part.name.removeprefix(f"{host}-").split(".")[0]
        # node-1234.part belongs to the machine `node`, but node-2-1234.part to another one.
        if process.isdecimal() and not Path("/proc", process).exists():
            part.unlink(missing_ok=True)
    own = folder / f"{host}-{os.getpid()}.part"
    save_checkpoint(own, {"features": features})
    os.replace(own, file)
    _delete_oldest(folder, file)
    return features


def fingerprint(loader: Loader) -> str:
    """Changes if the images or their preprocessing do, but not if the folder is moved."""
    own = loader.images[loader.rank::loader.world_size]
    return (f"{rows_digest(loader.manifest)} {sizes_digest(loader.manifest, own)} "
            f"{loader.preprocessing} {own.tolist()}")


def _delete_oldest(folder: Path, newest: Path) -> None:
    """Keep the features in `folder` below KEPT_FEATURES bytes. `newest` is never deleted."""
    # Another run may delete the same files.
    with contextlib.suppress(FileNotFoundError):
        files = sorted(folder.glob("*.pt"), key=lambda file: file.stat().st_mtime)
        excess = sum(file.stat().st_size for file in files) - KEPT_FEATURES
        for file in files:
            if excess > 0 and file != newest:
                excess -= file.stat().st_size
                file.unlink()
