"""Which images form a batch, and which of them are compared: pure functions of the seed.

Without flags every epoch is one shuffle of the train split, and images of one patient are
not each other's negatives. The rest is for flags.
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from labels import image_weights
from manifest import Manifest
from philox import PARTNER, RESAMPLE, SHUFFLE, generator, uniform_numbers


def batch_at(step: int, batch_size: int, images: np.ndarray, order: Callable[[int], np.ndarray],
             part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """The global batch at `step`, or a part of it: positions and image indices, (B,) each.

    A position counts the images of the whole run, and so tells the showings of an image
    apart. Epochs follow each other without a gap: of 10 images in batches of 4, step 2
    takes the last 2 of epoch 0 and the first 2 of epoch 1.
    order(epoch): (n,) places in `images` (n,)."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)[part]
    epochs, places = np.divmod(positions, len(images))
    index = np.empty_like(places)
    for epoch in range(epochs[0], epochs[-1] + 1):  # mostly one
        here = epochs == epoch
        index[here] = images[order(epoch)[places[here]]]
    return positions, index


def shuffled_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, SHUFFLE, epoch).permutation(n)


# --------------------------------------------------------------------------------------------------
# What the flags change.

class Sampling(NamedTuple):
    """What the flags make of all N images of the manifest, (N,) each."""
    draw_weights: np.ndarray | None  # --balance: how often it is drawn, in proportion; else None
    loss_weights: Tensor | None      # --weigh-loss: of its anchors in the loss; else None
    pair_group: np.ndarray | None    # --positives: images of one number may be a pair; else None
    patients: Tensor                 # images of one number are not each other's negatives


def choose_sampling(manifest: Manifest, train: np.ndarray, balance: tuple[str, ...],
                    weigh_loss: bool, positives: str, same_patient: bool) -> Sampling:
    """By the flags of these names. DataError where the manifest lacks a column."""
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
    # Another image of the same patient may well show the same, so it is no negative. With
    # --same-patient it is one: each image counts as a patient of its own.
    if same_patient:
        patients = np.arange(len(patients))
    return Sampling(draw_weights, loss_weights, pair_group, torch.from_numpy(patients))


def weighted_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch of n draws among n images of these weights (n,): places (n,), shuffled.

    Systematic resampling: the images lie along a line, each as long as n times its
    share of the weight, and every point u, 1 + u, 2 + u, … is a draw of the image that
    it lies in. So each is drawn as often as that expectation says, rounded down or up:
    of weights 1, 1 and 2 the expectations are 0.75, 0.75 and 1.5."""
    n = len(weights)
    random = generator(seed, RESAMPLE, epoch)
    # Another order in each epoch, so that neighbours do not always go together.
    places, u = random.permutation(n), random.random()
    ends = np.cumsum(weights[places])
    ends = ends / ends[-1] * n                          # (n,) where each image ends on the line
    before = np.ceil(ends - u)                          # how many draws lie before each end
    before[-1] = n                                      # rounding could lose the last one
    draws = np.diff(before, prepend=0).astype(int)
    return np.repeat(places, draws)[shuffled_order(n, seed, epoch)]


def partners_drawn(pair_group: np.ndarray, may_be_drawn: np.ndarray, seed: int,
                   ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """partners(positions, images), (B,) for B images: another image of the same group
    for each, all equally likely; the image itself where there is no other.

    pair_group: (N,) of Sampling. may_be_drawn: (n,) image indices."""
    # One group after another, and each in the order of the manifest.
    members = may_be_drawn[np.lexsort((may_be_drawn, pair_group[may_be_drawn]))]    # (n,)
    groups = pair_group[members]                                                    # (n,)

    def partners(positions: np.ndarray, images: np.ndarray) -> np.ndarray:
        own_group = pair_group[images]                                      # (B,)
        first = np.searchsorted(groups, own_group, "left")                  # place in members
        others = np.searchsorted(groups, own_group, "right") - first - 1    # how many
        u = uniform_numbers((seed, PARTNER), 1, 0, images, positions)[0]    # (B,) in [0, 1)
        place = first + (u * others).astype(int)
        # Pass over the image itself: from its own place on, take the next one.
        place += (members[place] >= images) & (others > 0)
        return members[place]

    return partners
