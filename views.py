"""Which images form a batch, and what makes their views: pure functions of the seed.

A view is a function, not a stream. Every augmentation parameter follows from (seed,
position in the run, image index, view) alone. Philox maps (key, counter) to numbers: the
key holds the seed and the purpose, the counter says whose numbers they are, and nothing
depends on what was drawn before. So a run can be resumed at any step, or spread over
any number of processes, and sees the very same views.

A new augmentation is a field of Augmentation with a flag of its name in pretrain.Config, a
number in NUMBERS, a parameter of view_parameters, and a line of dali_pipeline._graph.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from model import MEAN, STD
from philox import SHUFFLE, VIEW, generator, uniform_numbers


# --------------------------------------------------------------------------------------------------
# Which images form a batch.

def batch_at(step: int, batch_size: int, images: np.ndarray, order: Callable[[int], np.ndarray],
             part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """The global batch at `step`, or a part of it: positions and image indices, (B,) each.

    order(epoch): in which order an epoch shows `images` (n,), as indices into it, (n,).
    A position counts the images of the whole run, and so tells the showings of an image
    apart. Epochs follow each other without a gap: of 10 images in batches of 4, step 2
    takes the last 2 of epoch 0 and the first 2 of epoch 1."""
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
# What makes their views.

# What each random number of a view is for. One more at the end leaves the others, and so the
# views of old runs, as they were.
NUMBERS = ("area", "aspect", "top", "left", "angle", "sigma", "mirror",
           "brightness", "contrast", "gamma", "equalize")


@dataclass(frozen=True)
class Augmentation:
    """How far two views of one radiograph may differ. The published recipe has crop_area
    (0.8, 1.0), brightness and contrast 0.4, and hue, saturation and random grayscale, which
    do nothing to a gray image; docs/results.md has why the defaults differ."""
    crop_area: tuple[float, float] = (0.5, 1.0)  # share of the image's area in the view
    rotation: float = 10.0                       # degrees, to either side
    blur: tuple[float, float] = (0.1, 2.0)       # sigma of the Gaussian, pixels of the view
    flip: float = 0.5                            # probability of a mirror image
    brightness: float = 0.2                      # factor drawn from 1 - this to 1 + this
    contrast: float = 0.2                        # likewise
    gamma: tuple[float, float] = (1.0, 1.0)      # exponent of gray levels, log-uniform
    equalize: float = 0.0                        # probability of histogram equalisation


def view_parameters(augmentation: Augmentation, seed: int, positions: np.ndarray,
                    images: np.ndarray, views: int) -> dict[str, np.ndarray]:
    """What makes each of V views of each of B images.

    positions, images: (B,) of `batch_at`.

    Returns, most of them under the names of DALI's arguments:
    roi_start, roi_end (V, B, 2): the crop window, (y, x) as fractions of the image.
    angle (V, B): degrees, counter-clockwise; left out where nothing is rotated.
    sigma (V, B): of the blur, pixels; left out where nothing is blurred.
    mirror (V, B): 0 or 1.
    gamma (V, B): the exponent of the gray levels in [0, 1]; left out where it is always 1.
    equalize (V, B): 0 or 1; left out where it is always 0.
    mean, std (V, B): for gray levels x of 0 to 255, (x - mean) / std is brightness, contrast
    and normalisation in one."""
    # Numbers in [0, 1), each counted by its view, image and position.
    view = np.arange(views)[:, None]                            # (V, 1)
    numbers = uniform_numbers((seed, VIEW), len(NUMBERS), view, images, positions)
    u = dict(zip(NUMBERS, numbers))                             # (V, B) each

    # A window sqrt(area / aspect) high and sqrt(area * aspect) wide, as shares of the image's own
    # sides. Both are at most 1 if area <= aspect <= 1 / area; and, as in SimCLR, the aspect lies
    # within 3/4 to 4/3. (Evaluation squeezes the whole image onto the square as well.)
    area = _between(augmentation.crop_area, u["area"])
    widest = np.minimum(np.log(4 / 3), -np.log(area))
    aspect = np.exp(_around(0, widest, u["aspect"]))
    window = np.sqrt(np.stack([area / aspect, area * aspect], axis=-1))  # (V, B, 2)
    start = (1 - window) * np.stack([u["top"], u["left"]], axis=-1)      # (V, B, 2)

    # Of a gray level x in [0, 1], with m, s = MEAN, STD:
    #     y = c (b x - m) + m                         brightness b, then contrast c about m
    #     (y - m) / s = (x - m / b) / (s / (b c))     what the network gets
    # DALI's gray levels go to 255, so that both numbers are 255 times as large. Unlike in
    # torchvision's ColorJitter nothing is clipped and m is not the image's mean: one linear map.
    b = _around(1, augmentation.brightness, u["brightness"])
    c = _around(1, augmentation.contrast, u["contrast"])
    parameters = {
        "roi_start": start,
        "roi_end": (start + window).clip(max=1),
        "mirror": u["mirror"] < augmentation.flip,
        "mean": 255 * MEAN / b,
        "std": 255 * STD / (b * c)}
    if augmentation.rotation:
        parameters["angle"] = _around(0, augmentation.rotation, u["angle"])
    if max(augmentation.blur):
        parameters["sigma"] = _between(augmentation.blur, u["sigma"])
    if augmentation.gamma != (1, 1):
        parameters["gamma"] = np.exp(_between(np.log(augmentation.gamma), u["gamma"]))
    if augmentation.equalize:
        parameters["equalize"] = u["equalize"] < augmentation.equalize
    return {name: np.ascontiguousarray(value, np.int32 if value.dtype == bool else np.float32)
            for name, value in parameters.items()}


def _between(limits: tuple | np.ndarray, u: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * u


def _around(middle: float, reach: float | np.ndarray, u: np.ndarray) -> np.ndarray:
    return _between((middle - reach, middle + reach), u)
