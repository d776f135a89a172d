"""What labels mean and how they are learned: policies, weights, loss, and draws of the patients;
and the classes that clusters are compared with.

Pure functions of arrays. A task asks G questions about each of N images, with K answers each.
A network has G * K logits, which give L probabilities, one for each label.
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
# Policies: what -1 and an empty cell mean in training. -1 is never scored; an empty cell is scored
# only if it counts as absent.

@dataclass(frozen=True)
class Task:
    """The questions about N images, and the L labels by which the answers are scored.

    binary: a sigmoid for each label, so that G = L and K = 1.
    three-way: a softmax over absent, present and uncertain for each label (Irvin et al. 2019),
    so that G = L and K = 3.
    exclusive: one softmax over all labels, so that G = 1 and K = L."""
    kind: str                           # binary, three-way or exclusive
    targets: np.ndarray                 # (N, G, K) float32, one-hot if K > 1
    mask: np.ndarray                    # (N, G) bool: False where there is nothing to learn
    truth: np.ndarray                   # (N, L) float32: 1, 0, or NaN, which is not scored

    @property
    def training_labels(self) -> np.ndarray:
        """Each label as training sees it, (N, L): 1, 0, or NaN if there is nothing to learn. A
        three-way task also has -1, a class of its own that is neither positive nor negative."""
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
    """The task that labels (N, L) of 1, 0, -1 and NaN make.

    train: rows of the train split. The labels are exclusive if each of these rows has exactly
    one 1 and is otherwise 0.
    uncertain: what -1 means in training: `ones`, `zeros`, `ignore`, or `multiclass`, a class of
    its own. It is never scored.
    blank: what NaN means: `zeros` or `ignore`."""
    if blank == "zeros":
        labels = np.where(np.isnan(labels), 0, labels)
    labels = labels.astype(np.float32)
    truth = np.where(labels == -1, np.nan, labels)                          # (N, L)

    # A row with a NaN never counts as exclusive, because its sum is NaN.
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


# The values of --uncertain and --blank in words.
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
    """Weights (n, G) of the loss: 1 on average, and 0 where there is nothing to learn.

    targets (n, G, K), mask (n, G): rows of a Task. balance: all answers to a question get the
    same sum of weights, however rare some of them are."""
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

    names: `patient` gives all patients the same sum of weights. The name of a label gives its
    present and its absent cells the same sum, and an image whose cell is -1 or empty weighs 1.
    With several names an image has the mean of its weights. DataError if there is no such name,
    or if all known cells of a label are the same.
    patients (N,), labels (N, L)."""
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

    logits, targets: (B, G, K). For K = 1 it is the binary cross-entropy of a sigmoid for each
    label; otherwise it is the cross-entropy of a softmax, and targets are one-hot.
    weights: (B, G) of cell_weights. The sum is divided by B * G and not by the weights, so that
    the mean over processes is the loss of their common batch."""
    logits = logits.float()
    if logits.shape[2] == 1:
        cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")[:, :, 0]
    else:
        cells = -(targets * logits.log_softmax(2)).sum(2)
    return (weights * cells).mean()


def to_probabilities(logits: Tensor, kind: str) -> np.ndarray:
    """Logits (n, G * K) -> probability of each label, (n, L) float64.

    For a three-way label it is the probability of present against absent, without uncertain."""
    logits = logits.double().cpu()
    if kind == "exclusive":
        return logits.softmax(1).numpy()
    if kind == "three-way":
        absent, present, _ = logits.view(len(logits), -1, 3).unbind(2)      # (n, L) each
        logits = present - absent
    return logits.sigmoid().numpy()


# --------------------------------------------------------------------------------------------------
# Draws of the training images. A larger draw contains the smaller ones, so a curve over the
# fractions shows the effect of more labels and not of other patients.

class Draw(NamedTuple):
    """The images of some of the patients."""
    rows: np.ndarray                    # (m,) the rows that were drawn, of n; rising
    extra_patients: int                 # beyond the fraction, see `draw`


def draw(patients: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> Draw:
    """Draw a fraction of the patients, with all of their images.

    patients (n,), labels (n, L) of Task.training_labels. The seed puts the patients in an order,
    and a fraction takes the first of them. If none of these has a positive (or a negative) of
    some label, the first patient in the order who has one is added. So a larger fraction contains
    the smaller ones. DataError if the fraction is less than half a patient."""
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
    """Each image's fold, (n,) of 0 to folds - 1. Folds differ by one patient at most.

    patients (n,). DataError if a fold would have none."""
    names, patient = np.unique(patients, return_inverse=True)
    if len(names) < folds:
        raise DataError(f"--folds {folds} are too many for {len(names)} labelled patients")
    return np.random.default_rng([seed, folds]).permutation(len(names))[patient] % folds


# --------------------------------------------------------------------------------------------------
# Classes that exclude each other, with which clusters are compared.

# The column for images without findings in NIH and CheXpert; VinBigData has "No finding".
NO_FINDING = "No Finding"


def choose_classes(labels: np.ndarray, names: list[str], rule: str,
                   no_finding: str) -> tuple[np.ndarray, list[str]]:
    """Each image's class (n,) int64, -1 if it is left out, and the classes' names.

    labels (n, L) as in the manifest. rule: `single` takes images with one positive finding and
    no uncertain one. `dominant` takes every image with a positive finding; its class is the
    rarest of them. `binary:LABEL` takes all images except those where LABEL is uncertain. An
    empty cell counts as absent, but a row of empty cells is left out.

    The label "No Finding" is not a finding. With no_finding `keep`, images without a positive
    or uncertain finding are a class; in `binary` they belong to the rest.
    DataError if there is no such LABEL."""
    findings = np.array([name.casefold() != NO_FINDING.casefold() for name in names], bool)
    present = (labels == 1)[:, findings]                # (n, F)
    uncertain = (labels == -1)[:, findings]             # (n, F)
    # Healthy images have No Finding or, without such a column, a finding that is marked absent.
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

    # No Finding is one more class, in the last column.
    present = np.c_[present, healthy & (no_finding == "keep")]      # (n, F + 1)
    rarest = np.where(present, present.sum(0), np.inf).argmin(1)
    if rule == "dominant":
        chosen = present.any(1)
    else:
        chosen = (present.sum(1) == 1) & ~uncertain.any(1)
    names = [name for name, finding in zip(names, findings) if finding] + [NO_FINDING]
    return np.where(chosen, rarest, -1), names


# --------------------------------------------------------------------------------------------------
# How many labelled images the training of an encoder has used: a column of the tables.

LABELLED = {"random": 0, "imagenet": 1_281_167}     # for names of --init


def labels_required(init: str, checkpoint: dict) -> int | str:
    """How many images' labels were used to train an encoder, or "unknown".

    init: a name in LABELLED, or a path. checkpoint: what the file at the path holds; {} for a name.
    Trainings that follow each other are added up: an image that two of them used counts twice."""
    if init in LABELLED:
        return LABELLED[init]
    total = checkpoint.get("labels_required")
    if total is None:
        # An encoder.pt, whose own training used no labels, or a classifier.pt that counts only its
        # own. Labels behind its --init count too; they are known if that is a name and no path.
        config = checkpoint.get("config", {})
        own = checkpoint.get("n_train") if "classifier" in checkpoint else 0
        return add_labels(LABELLED.get(str(config.get("init"))), own)
    return add_labels(total, 0)


def add_labels(earlier: object, own: object) -> int | str:
    """The sum of two numbers of images; "unknown" if one is not a number from 0 on."""
    if type(earlier) is int and type(own) is int and min(earlier, own) >= 0:
        return earlier + own
    return "unknown"
