"""Which images form a batch, and which of them are compared: pure functions of the seed.

Without flags every epoch is one shuffle of the train split, and `batch_at` is all that
matters here. With --balance some images are drawn more often than others; --positives pairs an
image with another of its patient or study; --weigh-loss and --same-patient change what the
loss makes of a batch.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from labels import image_weights
from manifest import Manifest
from philox import uniform_numbers

SHUFFLE, VIEW, RESAMPLE, PARTNER = range(4)  # purposes, so that no two of them share a number


def batch_at(step: int, batch_size: int, images: np.ndarray, seed: int,
             part: slice = slice(None), order: Callable[[int], np.ndarray] | None = None,
             ) -> tuple[np.ndarray, np.ndarray]:
    """The global batch at `step`, or a part of it: times and image indices, (B,) each.

    Epochs follow each other without a gap, and batches are cut from that sequence: of 10
    images in batches of 4, step 2 takes the last 2 of epoch 0 and the first 2 of epoch 1.

    A time tells one showing of an image from the next, so that each has other views. It
    is the epoch, in which an image comes once. With `order`, by which it may come several
    times, it is the place in the sequence.
    order(epoch): (n,) places in `images`, instead of a shuffle."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)[part]
    epochs, places = np.divmod(positions, len(images))
    index = np.empty_like(places)
    for epoch in range(epochs[0], epochs[-1] + 1):
        same = epochs == epoch
        of_epoch = order(epoch) if order else _shuffle(len(images), seed, epoch)
        index[same] = images[of_epoch[places[same]]]
    return positions if order else epochs, index


@functools.lru_cache(maxsize=4)
def _shuffle(n: int, seed: int, epoch: int) -> np.ndarray:
    philox = np.random.Philox(key=[seed, SHUFFLE], counter=[0, 0, 0, epoch])
    return np.random.Generator(philox).permutation(n)


# --------------------------------------------------------------------------------------------------
# What the flags change.

class Sampling(NamedTuple):
    """What the flags make of the manifest's N images, (N,) each."""
    draw_weights: np.ndarray | None  # how often it is drawn, in proportion; None: once an epoch
    groups: np.ndarray | None        # equal for those that may be a pair; None: only its own views
    patients: Tensor                 # equal for those that are not each other's negatives
    loss_weights: Tensor | None      # of its anchors in the loss; None: all the same


def choose_sampling(manifest: Manifest, train: np.ndarray, balance: tuple[str, ...],
                    weigh_loss: bool, positives: str, same_patient: bool) -> Sampling:
    """By the flags of these names. DataError where the manifest lacks a column."""
    patients = manifest.patient_numbers()
    weights = groups = None
    if balance:
        weights = image_weights(balance, patients, manifest.labels, manifest.label_names, train)
    if positives != "image":
        groups = patients if positives == "patient" else manifest.study_numbers()
    # An image of the same patient is no negative: what it shows may well be the same.
    together = np.arange(len(patients)) if same_patient else patients
    return Sampling(None if weigh_loss else weights, groups, torch.from_numpy(together),
                    torch.from_numpy(weights) if weigh_loss else None)


def resampled(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch of n draws among n images of these weights (n,): places (n,), shuffled.

    Systematic resampling: the images lie along a line, each as long as n times its
    share of the weight, and every point u, 1 + u, 2 + u, … is a draw of the image that
    it lies in. So each is drawn as often as that expectation says, rounded down or up:
    of weights 1, 1 and 2 the expectations are 0.75, 0.75 and 1.5."""
    n = len(weights)
    philox = np.random.Philox(key=[seed, RESAMPLE], counter=[0, 0, 0, epoch])
    random = np.random.Generator(philox)
    # Another order in each epoch, so that neighbours do not always go together.
    images, u = random.permutation(n), random.random()
    ends = np.cumsum(weights[images])                                   # (n,)
    points = np.ceil(ends / ends[-1] * n - u)                           # up to each end
    draws = np.diff(points, prepend=0).astype(int)
    return np.repeat(images, draws)[_shuffle(n, seed, epoch)]


class Groups(NamedTuple):
    """n of N images by patient or study, so that another of the same is found at once."""
    members: np.ndarray  # (n,) image indices, one group after another
    place: np.ndarray    # (N,) of an image among the members
    first: np.ndarray    # (N,) place of the first image of its group
    size: np.ndarray     # (N,) images in its group


def grouped(numbers: np.ndarray, images: np.ndarray) -> Groups:
    """numbers: (N,), equal for images of one group. images: (n,) those that may be drawn."""
    members = images[np.argsort(numbers[images], kind="stable")]
    first, end = (np.searchsorted(numbers[members], numbers, side) for side in ("left", "right"))
    place = np.zeros(len(numbers), int)
    place[members] = np.arange(len(members))
    return Groups(members, place, first, end - first)


def partners(groups: Groups, seed: int, times: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Another image of the same group for each of B images, (B,), each with the same
    probability; the image itself where there is no other."""
    u = uniform_numbers((seed, PARTNER), 1, 0, images, times)[0]       # (B,) in [0, 1)
    first, size = groups.first[images], groups.size[images]
    # A group's images stand in a row: go 1 to size - 1 places on, and from the last to the first.
    own = groups.place[images] - first
    ahead = 1 + (u * (size - 1)).astype(int)  # alone, 1 place on leads back to itself
    return groups.members[first + (own + ahead) % size]
