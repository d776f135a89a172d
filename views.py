"""Which images form a batch, and what makes their views: pure functions of the seed.

A view is a function, not a stream. Its random numbers follow from the seed, the position in
the run, the image and the view, and not from what was drawn before: Philox maps a key, which is
seed and purpose, and a counter, which is (view, image, position), to numbers. So a run that
is resumed at any step, or runs on any number of processes, sees the very same views.

A new augmentation needs a field of Augmentation and a flag of that name in pretrain.Config, a
number in NUMBERS, a parameter from view_parameters, and a line in dali_pipeline._graph.
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

    images: (n,) indices of all images that are trained on.
    order(epoch): (n,) places in `images`, in the order of that epoch.
    A position counts all images that the run has shown before. Epochs follow each other
    without a gap: of 10 images in batches of 4, step 2 takes the last 2 of epoch 0 and the
    first 2 of epoch 1."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)[part]
    epochs, within_epoch = np.divmod(positions, len(images))
    drawn = np.empty_like(positions)
    for epoch in range(epochs[0], epochs[-1] + 1):  # one, or two where they meet
        here = epochs == epoch
        drawn[here] = images[order(epoch)[within_epoch[here]]]
    return positions, drawn


def shuffled_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,): a permutation of 0 to n - 1."""
    return generator(seed, SHUFFLE, epoch).permutation(n)


# --------------------------------------------------------------------------------------------------
# What makes their views.

# What each random number of a view is for. Only append: then the others, and so the views of
# older runs, stay as they were.
NUMBERS = ("area", "aspect", "top", "left", "angle", "sigma", "mirror",
           "brightness", "contrast", "gamma", "equalize")


@dataclass(frozen=True)
class Augmentation:
    """How far two views of one radiograph may differ.

    The published recipe has crop_area (0.8, 1.0), and brightness and contrast of 0.4;
    docs/results.md says why the defaults differ. Its hue, saturation and random grayscale do
    nothing to a gray image."""
    crop_area: tuple[float, float] = (0.5, 1.0)  # share of the image's area
    rotation: float = 10.0                       # degrees to either side, at most
    blur: tuple[float, float] = (0.1, 2.0)       # sigma of the Gaussian, pixels of the view
    flip: float = 0.5                            # probability of a mirror image
    brightness: float = 0.2                      # factor drawn from 1 - this to 1 + this
    contrast: float = 0.2                        # likewise
    gamma: tuple[float, float] = (1.0, 1.0)      # exponent of gray levels, log-uniform
    equalize: float = 0.0                        # probability of histogram equalisation


def view_parameters(augmentation: Augmentation, seed: int, positions: np.ndarray,
                    images: np.ndarray, views: int) -> dict[str, np.ndarray]:
    """The parameters of V views of each of B images.

    positions, images: (B,) each, from `batch_at`; images are image indices.

    Returns arrays (V, B), named mostly as DALI's arguments. angle, sigma, gamma and equalize
    are missing if that augmentation is switched off.
    roi_start, roi_end, (V, B, 2): corners of the crop window, (y, x) as shares of the sides.
    angle: degrees, counter-clockwise.
    sigma: of the blur, in pixels of the view.
    mirror: 0 or 1.
    gamma: exponent of the gray levels, these in [0, 1].
    equalize: 0 or 1.
    mean, std: brightness, contrast and normalisation in one, (x - mean) / std for gray levels
        x from 0 to 255."""
    view = np.arange(views)[:, None]                            # (V, 1)
    numbers = uniform_numbers((seed, VIEW), len(NUMBERS), view, images, positions)
    u = dict(zip(NUMBERS, numbers))                             # (V, B) each, in [0, 1)

    # The window is sqrt(area / aspect) high and sqrt(area * aspect) wide, in shares of the sides.
    # For both to be at most 1, |ln aspect| may be at most -ln area. SimCLR's limit is ln 4/3.
    # (The view is square whatever the window's shape; so is the whole image in evaluation.)
    area = _between(augmentation.crop_area, u["area"])
    limit = np.minimum(np.log(4 / 3), -np.log(area))
    aspect = np.exp(_around(0, limit, u["aspect"]))
    window = np.sqrt(np.stack([area / aspect, area * aspect], axis=-1))  # (V, B, 2)
    start = (1 - window) * np.stack([u["top"], u["left"]], axis=-1)      # (V, B, 2)

    # For a gray level x in [0, 1], with m, s = MEAN, STD:
    #     y = c (b x - m) + m                         brightness b, then contrast c about m
    #     (y - m) / s = (x - m / b) / (s / (b c))     what the network gets
    # This is one linear map, because nothing is clipped and m is fixed; torchvision's ColorJitter
    # clips, and takes the image's mean. DALI's gray levels go to 255: both numbers times 255.
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
    # DALI takes no array of bool.
    return {name: np.ascontiguousarray(value, np.int32 if value.dtype == bool else np.float32)
            for name, value in parameters.items()}


def _between(limits: tuple | np.ndarray, u: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * u


def _around(middle: float, reach: float | np.ndarray, u: np.ndarray) -> np.ndarray:
    return _between((middle - reach, middle + reach), u)
