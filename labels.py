"""What is asked of each image: labels read by a policy, a draw of the patients, weights, loss,
and for clusters the class that it belongs to.

Pure functions of arrays. A task asks G questions of K answers each about N images; L
probabilities, one for each label, are read from a network's G * K logits.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.utils.class_weight import compute_sample_weight
import torch.nn.functional as F
from torch import Tensor

from common import DataError

# --------------------------------------------------------------------------------------------------
# Policies: what -1 and an empty cell mean in training. Neither changes what is scored, except that
# an empty cell may count as absent.

@dataclass(frozen=True)
class Task:
    """What is asked of N images, and what their L labels are scored by.

    binary: a sigmoid for each label, so that G = L and K = 1.
    three-way: absent, present and uncertain are three classes of each label (Irvin et
    al. 2019), so that G = L and K = 3.
    exclusive: one softmax over all labels, so that G = 1 and K = L."""
    kind: str                           # binary, three-way or exclusive
    targets: np.ndarray                 # (N, G, K) float32, one-hot where K > 1
    mask: np.ndarray                    # (N, G) bool: is there something to learn from?
    truth: np.ndarray                   # (N, L) float32: 1, 0, or NaN: not scored

    @property
    def training_labels(self) -> np.ndarray:
        """Each label as training sees it, (N, L): 1, 0, or NaN for nothing; of a three-way task
        also -1, which is a class to be learned and neither a positive nor a negative."""
        if self.kind == "exclusive":
            values = self.targets[:, 0]
        elif self.kind == "three-way":
            _, present, uncertain = np.moveaxis(self.targets, 2, 0)         # (N, L) each
            values = present - uncertain
        else:
            values = self.targets[:, :, 0]
        return np.where(self.mask, values, np.nan)

    @property
    def outputs(self) -> int:
        """G * K, the width of the classifier's output."""
        return self.targets.shape[1] * self.targets.shape[2]


def make_task(labels: np.ndarray, train: np.ndarray, uncertain: str, blank: str) -> Task:
    """The task that labels (N, L) of 1, 0, -1 and NaN ask.

    train: rows of the train split. Where each of them has exactly one 1 and otherwise
    0, the labels are exclusive.
    uncertain: what -1 is in training: `ones`, `zeros`, `ignore`, or `multiclass`, a
    class of its own. It is never scored.
    blank: what NaN is: `zeros` or `ignore`."""
    if blank == "zeros":
        labels = np.where(np.isnan(labels), 0, labels)
    labels = labels.astype(np.float32)
    truth = np.where(labels == -1, np.nan, labels)                          # (N, L)

    # A sum with a NaN in it is not 1.
    one_class_each = (truth[train].sum(1) == 1).all()
    if labels.shape[1] > 1 and one_class_each:
        one_class = (truth == 1).sum(1, keepdims=True) == 1                 # (N, 1)
        targets = np.nan_to_num(truth)[:, None]                             # (N, 1, L)
        return Task("exclusive", targets, one_class, truth)

    if uncertain == "multiclass":
        classes = np.array([0, 1, -1])
        one_hot = (labels[:, :, None] == classes).astype(np.float32)        # (N, L, 3)
        return Task("three-way", one_hot, ~np.isnan(labels), truth)

    value = np.float32({"ones": 1, "zeros": 0, "ignore": np.nan}[uncertain])
    labels = np.where(labels == -1, value, labels)
    targets = np.nan_to_num(labels)[:, :, None]                             # (N, L, 1)
    return Task("binary", targets, ~np.isnan(labels), truth)


# The same values of --uncertain and --blank in words.
UNCERTAIN = {"ones": "counts as present", "zeros": "counts as absent", "ignore": "is left out",
             "multiclass": "is a class of its own"}
BLANK = {"zeros": "counts as absent", "ignore": "is left out"}


def policy_sentence(kind: str, uncertain: str, blank: str, balance: bool) -> str:
    """How labels were read, for the log and the report."""
    if kind == "exclusive":
        sentence = "exclusive labels, softmax, AUROC one against the rest"
    else:
        sentence = (f"independent labels; in training uncertain (-1) {UNCERTAIN[uncertain]}, an "
                    f"empty cell {BLANK[blank]}")
    return sentence + ("; classes balanced" if balance else "")


def cell_weights(targets: np.ndarray, mask: np.ndarray, balance: bool) -> np.ndarray:
    """Weights (n, G) of the loss, 0 where there is nothing to learn from, 1 on average.

    targets (n, G, K), mask (n, G): rows of a Task. balance: the answers of a question
    get the same sum of weights, however rare some of them are."""
    one_hot = targets.shape[2] > 1
    answers = targets.argmax(2) if one_hot else targets[:, :, 0]            # (n, G)
    class_weight = "balanced" if balance else None
    weights = np.zeros(mask.shape)                                          # (n, G)
    for g, rows in enumerate(mask.T):
        weights[rows, g] = compute_sample_weight(class_weight, answers[rows, g])
    return weights / weights.mean()


def image_weights(names: tuple[str, ...], patients: np.ndarray, labels: np.ndarray,
                  label_names: list[str], rows: np.ndarray) -> np.ndarray:
    """How much each of N images counts in pre-training, (N,): 1 on average over `rows`, else 0.

    names: `patient` gives every patient (N,) the same sum of weights. A label gives its
    present and its absent cells (N, L) the same sum; an unknown one, -1 or empty, leaves
    its image at 1. With several names an image has the mean of its weights. DataError
    where a name is none of these, or where all known cells of a label say the same."""
    total = np.zeros(len(rows))
    for name in names:
        if name == "patient":
            answers = patients[rows]
            known = np.ones(len(rows), bool)
        elif name in label_names:
            answers = labels[rows, label_names.index(name)]
            known = np.isin(answers, (0, 1))
        else:
            choice = ", ".join(["patient", *label_names])
            raise DataError(f"--balance {name}: there is no such label; the choice is {choice}")
        if len(np.unique(answers[known])) < 2:
            raise DataError(
                f"--balance {name}: there is nothing to balance in the train split, where "
                f"{known.sum()} of {len(rows)} images say it, and all of these the same")
        total[known] += compute_sample_weight("balanced", answers[known])
        total[~known] += 1
    weights = np.zeros(len(labels))
    weights[rows] = total / len(names)
    return weights


# --------------------------------------------------------------------------------------------------
# From logits to the loss, and to probabilities.

def masked_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The loss of B images, for G questions of K answers each; scalar, float32.

    logits, targets: (B, G, K). With K = 1 it is binary cross-entropy, one sigmoid a label;
    otherwise the targets are one-hot and it is that of a softmax. weights: (B, G) of
    cell_weights. The sum is divided by B * G and not by the weights, so that the mean over
    processes is the loss of their common batch."""
    logits = logits.float()
    if logits.shape[2] == 1:
        cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")[:, :, 0]
    else:
        cells = -(targets * logits.log_softmax(2)).sum(2)
    return (weights * cells).mean()


def to_probabilities(logits: Tensor, kind: str) -> np.ndarray:
    """Logits (n, G * K) -> probability of each label, (n, L) float64.

    A three-way label's is that of present against absent, without the uncertain class."""
    logits = logits.double().cpu()
    if kind == "exclusive":
        return logits.softmax(1).numpy()
    if kind == "three-way":
        absent, present, _ = logits.view(len(logits), -1, 3).unbind(2)      # (n, L) each
        logits = present - absent
    return logits.sigmoid().numpy()


# --------------------------------------------------------------------------------------------------
# Draws of the training images. Small draws lie in larger ones, so that a curve over the fractions
# shows what more labels bring and not what other patients bring.

class Draw(NamedTuple):
    """The images of some of the patients."""
    rows: np.ndarray                    # (m,) of the n rows that were drawn from, rising
    extra_patients: int                 # beyond the fraction, see `draw`


def draw(patients: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> Draw:
    """Draw a fraction of the patients, with all of their images.

    patients (n,), labels (n, L) of Task.training_labels. The seed puts the patients in an
    order, and a fraction is the front of it, so that the smaller fraction lies in the
    larger one. A label without a positive (or a negative) there gets the first
    patient in that order who has one, which keeps the nesting. DataError where the
    fraction comes to no patient."""
    names, patient = np.unique(patients, return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(names))[patient]    # (n,) in the order
    count = math.floor(fraction * len(names) + 0.5)
    if not count:
        raise DataError(f"--fraction {fraction:g} of {len(names)} labelled training patients is "
                        "none")
    firsts = {place[labels[:, column] == value].min()
              for column in range(labels.shape[1]) for value in (1, 0)
              if (labels[:, column] == value).any()}
    extra = [first for first in firsts if first >= count]
    rows = np.flatnonzero((place < count) | np.isin(place, extra))
    return Draw(rows, len(extra))


def deal(patients: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal the patients of n images to folds of equal size, (n,) of 0 to folds - 1.

    patients (n,). DataError where a fold gets nobody."""
    names, patient = np.unique(patients, return_inverse=True)
    if len(names) < folds:
        raise DataError(f"--folds {folds} are too many for {len(names)} labelled patients")
    return np.random.default_rng([seed, folds]).permutation(len(names))[patient] % folds


# --------------------------------------------------------------------------------------------------
# Classes that exclude each other, with which clusters are compared.

# What NIH and CheXpert call the column of images without any; VinBigData has "No finding".
NO_FINDING = "No Finding"


def choose_classes(labels: np.ndarray, names: list[str], rule: str,
                   no_finding: str) -> tuple[np.ndarray, list[str]]:
    """Each image's class (n,) int64, -1 where it is left out, and the classes' names.

    labels (n, L) as in the manifest. rule: `single` takes images with one positive
    finding and no uncertain one; `dominant` every image with a positive one, as the
    rarest where it has several; `binary:LABEL` all but those where LABEL is
    uncertain. An empty cell counts as absent, but a row of nothing else is left out.

    The label "No Finding" is not a finding: with no_finding `keep`, images without a
    positive or uncertain finding are a class, or in `binary` belong to the rest.
    DataError: no such LABEL."""
    findings = np.array([name.casefold() != NO_FINDING.casefold() for name in names], bool)
    present = (labels == 1)[:, findings]                # (n, F)
    uncertain = (labels == -1)[:, findings]             # (n, F)
    # Healthy is who is said to be; where no column says so, who lacks some finding.
    if not findings.all():
        healthy = (labels[:, ~findings] == 1).any(1)
    else:
        healthy = (labels == 0).any(1)
    healthy = healthy & ~(present | uncertain).any(1)   # (n,)

    if rule not in ("single", "dominant"):
        label = rule.removeprefix("binary:")
        if label not in names:
            raise DataError(f"--classes {rule}: there is no label {label!r}, only "
                            f"{', '.join(names)}")
        column = labels[:, names.index(label)]
        excluded = (column == -1) | np.isnan(labels).all(1)
        if no_finding == "drop":
            excluded |= healthy & (column != 1)
        return np.where(excluded, -1, column == 1), [f"not {label}", label]

    # The last column is No Finding, as one class more.
    present = np.c_[present, healthy & (no_finding == "keep")]      # (n, F + 1)
    rarest = np.where(present, present.sum(0), np.inf).argmin(1)
    if rule == "dominant":
        chosen = present.any(1)
    else:
        chosen = (present.sum(1) == 1) & ~uncertain.any(1)
    names = [name for name, finding in zip(names, findings) if finding] + [NO_FINDING]
    return np.where(chosen, rarest, -1), names


# --------------------------------------------------------------------------------------------------
# How many labelled images the training of an encoder has used, by which tables compare encoders.

LABELLED = {"random": 0, "imagenet": 1_281_167}     # images behind the names that --init knows


def labels_required(init: str, checkpoint: dict) -> int | str:
    """Images whose labels the trainings that led to an encoder used, or "unknown".

    init: a name in LABELLED, or the path of the checkpoint, which is {} for a name. The trainings
    of a chain, each from the one before it, are added up: an image that two of them used counts
    twice."""
    if init in LABELLED:
        return LABELLED[init]
    total = checkpoint.get("labels_required")
    if total is None:
        # An encoder.pt, whose own training used none, or a classifier.pt that only tells of its
        # own. What either started from is known by name, and not by a path.
        config = checkpoint.get("config", {})
        own = checkpoint.get("n_train") if "classifier" in checkpoint else 0
        return add_labels(LABELLED.get(str(config.get("init"))), own)
    return add_labels(total, 0)


def add_labels(earlier: object, own: object) -> int | str:
    """The sum of two such numbers of images; "unknown" where one is."""
    if type(earlier) is int and type(own) is int and min(earlier, own) >= 0:
        return earlier + own
    return "unknown"
