"""Which images form a batch, and which of them are compared: pure functions of the seed.

Without flags every epoch is one shuffle of the train split, and `batch_at` is all
that matters here. With --balance some images are drawn more often than others;
--positives pairs an image with another of its patient or study; --weigh-loss and
--same-patient change what the loss makes of a batch.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from labels import image_weights
from manifest import Manifest
from philox import PARTNER, RESAMPLE, SHUFFLE, generator, uniform_numbers


def batch_at(step: int, batch_size: int, images: np.ndarray, seed: int,
             part: slice = slice(None), order: Callable[[int], np.ndarray] | None = None,
             ) -> tuple[np.ndarray, np.ndarray]:
    """The global batch at `step`, or a part of it: times and image indices, (B,) each.

    Epochs follow each other without a gap: of 10 images in batches of 4, step 2 takes
    the last 2 of epoch 0 and the first 2 of epoch 1.

    times: what tells two showings of one image apart, so that they get other views. It
    is the epoch, or with `order` the position in the sequence of all epochs, because an
    epoch may then show an image twice.
    order(epoch): (n,) places in `images`, instead of a shuffle."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)[part]
    epochs, places = np.divmod(positions, len(images))
    index = np.empty_like(places)
    for epoch in range(epochs[0], epochs[-1] + 1):
        same = epochs == epoch
        of_epoch = order(epoch) if order else shuffled_order(len(images), seed, epoch)
        index[same] = images[of_epoch[places[same]]]
    times = positions if order else epochs
    return times, index


@functools.lru_cache(maxsize=4)
def shuffled_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, SHUFFLE, epoch).permutation(n)


# --------------------------------------------------------------------------------------------------
# What the flags change.

class Sampling(NamedTuple):
    """What the flags make of the manifest's N images, (N,) each."""
    draw_weights: np.ndarray | None  # how often it is drawn, in proportion; None: once an epoch
    loss_weights: Tensor | None      # of its anchors in the loss; None: all the same
    pair_group: np.ndarray | None    # images of one number may be a pair; None: two views of one
    negative_group: Tensor           # images of one number are not each other's negatives


def choose_sampling(manifest: Manifest, train: np.ndarray, balance: tuple[str, ...],
                    weigh_loss: bool, positives: str, patients_are_negatives: bool) -> Sampling:
    """By the flags of these names; patients_are_negatives is --same-patient. DataError
    where the manifest lacks a column."""
    patients = manifest.patient_numbers()
    draw_weights = loss_weights = pair_group = None
    if balance:
        weights = image_weights(balance, patients, manifest.labels, manifest.label_names, train)
        if weigh_loss:
            loss_weights = torch.from_numpy(weights)
        else:
            draw_weights = weights
    if positives == "patient":
        pair_group = patients
    elif positives == "study":
        pair_group = manifest.study_numbers()
    # Another image of the same patient may well show the same, so it is no negative.
    negative_group = np.arange(len(patients)) if patients_are_negatives else patients
    return Sampling(draw_weights, loss_weights, pair_group, torch.from_numpy(negative_group))


def weighted_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch of n draws among n images of these weights (n,): places (n,), shuffled.

    Systematic resampling: the images lie along a line, each as long as n times its
    share of the weight, and every point u, 1 + u, 2 + u, … is a draw of the image that
    it lies in. So each is drawn as often as that expectation says, rounded down or up:
    of weights 1, 1 and 2 the expectations are 0.75, 0.75 and 1.5."""
    n = len(weights)
    random = generator(seed, RESAMPLE, epoch)
    # Another order in each epoch, so that neighbours do not always go together.
    images, u = random.permutation(n), random.random()
    ends = np.cumsum(weights[images])                                   # (n,)
    points = np.ceil(ends / ends[-1] * n - u)                           # up to each end
    draws = np.diff(points, prepend=0).astype(int)
    return np.repeat(images, draws)[shuffled_order(n, seed, epoch)]


class Groups(NamedTuple):
    """n of N images sorted by their group, so that the others of a group are found at once."""
    members: np.ndarray  # (n,) image indices, one group after another
    place: np.ndarray    # (N,) of an image among the members
    first: np.ndarray    # (N,) place of the first image of its group
    size: np.ndarray     # (N,) images in its group


def group_table(pair_group: np.ndarray, images: np.ndarray) -> Groups:
    """pair_group: (N,) of Sampling. images: (n,) those that may be drawn."""
    members = images[np.argsort(pair_group[images], kind="stable")]
    first, end = (np.searchsorted(pair_group[members], pair_group, side)
                  for side in ("left", "right"))
    place = np.zeros(len(pair_group), int)
    place[members] = np.arange(len(members))
    return Groups(members, place, first, end - first)


def draw_partners(groups: Groups, seed: int, times: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Another image of the same group for each of B images, (B,), all equally likely;
    the image itself where there is no other."""
    u = uniform_numbers((seed, PARTNER), 1, 0, images, times)[0]        # (B,) in [0, 1)
    first, size = groups.first[images], groups.size[images]
    # Go 1 to size - 1 places on in the group, cyclically; in a group of one, 1 place on is
    # the image itself.
    ahead = 1 + (u * (size - 1)).astype(int)
    place = groups.place[images] - first                                # in its group
    return groups.members[first + (place + ahead) % size]
