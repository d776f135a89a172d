"""Variants, by flags, of which images an epoch draws, which form a pair, and which are compared.

Without flags an epoch is one shuffle of the train split, both views show the same image, and
images of one patient are not each other's negatives.
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import DataError
from labels import image_weights
from manifest import Manifest
from philox import PARTNER, RESAMPLE, generator, uniform_numbers
from views import shuffled_order


class Sampling(NamedTuple):
    """What the flags say of each image of the manifest, (N,) each; None without the flag."""
    draw_weights: np.ndarray | None  # --balance: how often it is drawn, in proportion
    loss_weights: Tensor | None      # --weigh-loss: weight of its anchors in the loss
    pair_group: np.ndarray | None    # --positives: images with equal numbers may form a pair
    patients: Tensor                 # images with equal numbers are not each other's negatives


def choose_sampling(manifest: Manifest, train: np.ndarray, balance: tuple[str, ...],
                    weigh_loss: bool, positives: str, same_patient: bool) -> Sampling:
    """The arguments are flags. DataError if the manifest lacks a column."""
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
        pair_group = study_numbers(manifest)
    # Another image of the same patient may well show the same, and is no negative. With
    # --same-patient it is one: each image counts as a patient of its own.
    if same_patient:
        patients = np.arange(len(patients))
    return Sampling(draw_weights, loss_weights, pair_group, torch.from_numpy(patients))


def study_numbers(manifest: Manifest) -> np.ndarray:
    """A number for each image, (N,) int64: the same for all images of a study. An image without a
    study has a number of its own."""
    if manifest.studies is None:
        raise DataError(f"{manifest.folder / 'manifest.csv'} has no column study, which "
                        "--positives study needs")
    # Two patients may have studies of the same name: number pairs of patient and study.
    names, study = np.unique(manifest.studies, return_inverse=True)
    number = manifest.patient_numbers() * len(names) + study
    # Images without a study get -1, -2, ...: no other number is negative.
    return np.where(manifest.studies == "", -1 - np.arange(len(study)), number)


def weighted_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch of n draws among n images with these weights: places (n,), shuffled.

    Systematic resampling: the images lie along a line of length n, each as long as its share of
    the weight. Each of the points u, 1 + u, 2 + u, … draws the image in which it lies. So an
    image is drawn as often as its length says, rounded down or up; for weights 1, 1 and 2 the
    lengths are 0.75, 0.75 and 1.5."""
    n = len(weights)
    random = generator(seed, RESAMPLE, epoch)
    # The order along the line changes with the epoch, so that it favours no neighbours.
    places, u = random.permutation(n), random.random()
    ends = np.cumsum(weights[places])
    ends = ends / ends[-1] * n                          # (n,) where each image ends on the line
    before = np.ceil(ends - u)                          # how many of u, 1 + u, … lie before it
    before[-1] = n                                      # rounding could lose the last one
    draws = np.diff(before, prepend=0).astype(int)
    return np.repeat(places, draws)[shuffled_order(n, seed, epoch)]


def partners_drawn(pair_group: np.ndarray, may_be_drawn: np.ndarray, seed: int,
                   ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function partners(positions, images) of B images, which returns (B,) image indices:
    another image of the same group for each, all equally likely, or itself if there is none.

    pair_group: (N,), see Sampling. may_be_drawn: (n,) image indices."""
    # Sorted by group, and within a group by image index.
    members = may_be_drawn[np.lexsort((may_be_drawn, pair_group[may_be_drawn]))]    # (n,)
    groups = pair_group[members]                                                    # (n,)

    def partners(positions: np.ndarray, images: np.ndarray) -> np.ndarray:
        own_group = pair_group[images]                                      # (B,)
        first = np.searchsorted(groups, own_group, "left")                  # place in members
        others = np.searchsorted(groups, own_group, "right") - first - 1    # how many
        u = uniform_numbers((seed, PARTNER), 1, 0, images, positions)[0]    # (B,) in [0, 1)
        place = first + (u * others).astype(int)
        # Skip the image itself: from its own place on, take the next one.
        place += (members[place] >= images) & (others > 0)
        return members[place]

    return partners
