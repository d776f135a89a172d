"""Which images form a batch, and what makes their views: pure functions of the seed.

A view is a function, not a stream. The images of batch `step`, and every augmentation
parameter of every image in it, follow from (seed, epoch, image index, view) alone. Philox
maps (key, counter) to numbers: the key holds the seed and the purpose, the counter says
whose numbers they are, and nothing depends on what was drawn before. So a run can be
resumed at any step, or spread over any number of processes, and sees the very same views.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model import MEAN, STD
from philox import uniform_numbers

SHUFFLE, VIEW, RESAMPLE, PARTNER = range(4)  # purposes, so that no two of them share a number
SWITCHES = {"mirror", "equalize"}            # parameters of a view that are 0 or 1


# --------------------------------------------------------------------------------------------------
# Which images.

def batch_at(step: int, batch_size: int, images: np.ndarray, seed: int,
             part: slice = slice(None), order: Callable[[int], np.ndarray] | None = None,
             ) -> tuple[np.ndarray, np.ndarray]:
    """The global batch at `step`, or a part of it: times (B,) and image indices (B,).

    An image has other views each time that it is shown. Batches are cut from the endless
    sequence of the epochs' shuffles: every epoch shows each of `images` once, whatever
    the batch size, and a batch across two epochs belongs to both. So the time is the
    epoch.

    order(epoch): another sequence, (n,) places in `images`, which may have one of them
    several times. Then the time is the place in the endless sequence."""
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
    # So many places on, 1 to size - 1, and behind the last image comes the first.
    ahead = 1 + (u * (size - 1)).astype(int)
    return groups.members[first + (groups.place[images] - first + ahead) % size]


# --------------------------------------------------------------------------------------------------
# Which views of them.

@dataclass(frozen=True)
class Augmentation:
    """How far two views of one radiograph may differ; the defaults are the published recipe's.

    Its hue, saturation and random grayscale do nothing to a gray image and are
    left out."""
    crop_area: tuple[float, float] = (0.8, 1.0)  # share of the image's area in the view
    rotation: float = 10.0                       # degrees, to either side
    blur: tuple[float, float] = (0.1, 2.0)       # sigma of the Gaussian, pixels of the view
    flip: float = 0.5                            # probability of a mirror image
    brightness: float = 0.4                      # factor drawn from 1 - this to 1 + this
    contrast: float = 0.4                        # likewise
    gamma: tuple[float, float] = (1.0, 1.0)      # exponent of gray levels, log-uniform
    equalize: float = 0.0                        # probability of histogram equalisation


def view_parameters(augmentation: Augmentation, seed: int, times: np.ndarray, images: np.ndarray,
                    view: int | np.ndarray) -> dict[str, np.ndarray]:
    """What makes view number `view` of each of B images, by the names of DALI's arguments.

    roi_start, roi_end (B, 2): the crop window, (y, x) as fractions of the image.
    angle (B,): degrees, counter-clockwise; left out where nothing is rotated.
    sigma (B,): of the blur, pixels; left out where nothing is blurred.
    mirror (B,): 0 or 1.
    gamma (B,): the exponent of the gray levels in [0, 1]; left out where it is always 1.
    equalize (B,): 0 or 1; left out where it is always 0.
    mean, std (B,): gray levels, 0 to 255, that normalise an image and on the way apply
    brightness b and contrast c. With m, s = MEAN, STD and x in [0, 1]:

        brightness, then contrast about m:  y = c (b x - m) + m
        normalised:                         (y - m) / s = (x - m / b) / (s / (b c))

    torchvision's contrast pivots on the image's own mean and clips; this one does neither."""
    # A new number goes to the end, so that those before it stay what they are.
    u = uniform_numbers((seed, VIEW), 11, view, images, times)  # (11, B) in [0, 1)

    # The window's aspect ratio is log-uniform in 3/4 to 4/3, as far as the window fits. It is
    # relative to the image's own, because evaluation maps the whole image onto the square, too,
    # tall or wide: nothing at the lungs' edges is cut off.
    area = _between(augmentation.crop_area, u[0])
    widest = np.minimum(np.log(4 / 3), -np.log(area))
    aspect = np.exp(_between((-widest, widest), u[1]))
    window = np.sqrt([area / aspect, area * aspect])  # (2, B): height, width
    start = (1 - window) * u[2:4]                     # (2, B): top, left

    b = _between((1 - augmentation.brightness, 1 + augmentation.brightness), u[7])
    c = _between((1 - augmentation.contrast, 1 + augmentation.contrast), u[8])
    parameters = {
        "roi_start": start.T,
        "roi_end": (start + window).T.clip(max=1),
        "angle": _between((-augmentation.rotation, augmentation.rotation), u[4]),
        "sigma": _between(augmentation.blur, u[5]),
        "mirror": u[6] < augmentation.flip,
        "gamma": np.exp(_between(np.log(augmentation.gamma), u[9])),
        "equalize": u[10] < augmentation.equalize,
        "mean": 255 * MEAN / b,
        "std": 255 * STD / (b * c)}
    return {name: np.ascontiguousarray(
                parameters[name], np.int32 if name in SWITCHES else np.float32)
            for name in parameter_names(augmentation)}


def parameter_names(augmentation: Augmentation) -> list[str]:
    """What `view_parameters` gives: nothing of a step that no view takes."""
    optional = {
        "angle": augmentation.rotation,
        "sigma": max(augmentation.blur),
        "gamma": augmentation.gamma != (1, 1),
        "equalize": augmentation.equalize}
    return ["roi_start", "roi_end", "mirror", "mean", "std", *filter(optional.get, optional)]


def _between(limits: tuple | np.ndarray, u: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * u
