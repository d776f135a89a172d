"""One file -> an 8-bit gray image of moderate size, or one sentence that says why there is none.

    files = find_files(folder)
    image = load_image(folder / files[0], read_image, ImageSettings(size=256))

read_image reads the common image formats; dicom.read_dicom and the demo's phantoms are read by
functions of the same form. Whatever the format, an image ends as Pillow's mode L, (H, W) of 0 to
255, whose shorter side is `size` pixels at most. A smaller image keeps its size: enlarging adds
bytes and no information.
"""
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from manifest import DataError

# The formats that Pillow may try to open, and the suffixes by which their files are found.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jp2", ".tif", ".tiff", ".bmp", ".pgm", ".ppm", ".webp")

MIN_SIDE = 32           # pixels; anything smaller is an icon
MIN_RANGE = 16          # gray levels; an image with fewer is blank, or 12-bit data taken for 16

# Percentiles that become black and white where 9 to 16 bits come without a window.
DEEP_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class ImageSettings:
    """How an image is read, made smaller and stored; the same for all images of a data folder."""
    size: int = 256                                 # of the shorter side, pixels
    quality: int = 95                               # of the JPEG, 1 to 100
    stretch: tuple[float, float] | None = None      # percentiles that become black and white
    max_megapixels: float = 100                     # larger images are not decoded


Reader = Callable[[Path, ImageSettings], Image.Image]


# --------------------------------------------------------------------------------------------------
# Files.

def find_files(folder: Path) -> list[str]:
    """All files below a folder as sorted relative paths.

    Hidden files and folders (.DS_Store, ._x.png) and __MACOSX do not count. Links are followed.
    OSError where a folder cannot be read."""
    def fail(error):
        raise error                 # os.walk would silently pass over a folder that it cannot read

    files, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        # A link back to a folder above would give the same files other names.
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        files += [os.path.relpath(os.path.join(parent, name), folder)
                  for name in names if not name.startswith(".")]
    return sorted(files)


def read_image(file: Path, settings: ImageSettings) -> Image.Image:
    """An image file of any common format: mode L, or F where it has more than 8 bits."""
    with Image.open(file, formats=FORMATS) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":    # an MPO is a photo with its preview
            raise DataError(f"{frames} frames")

        # A JPEG is decoded as luma only, and at 1/2, 1/4 or 1/8 where that is still twice the
        # size wanted. Other formats ignore this.
        image.draft("L", (2 * settings.size, 2 * settings.size))
        ImageOps.exif_transpose(image, in_place=True)

        # I;16, I;16B, I and F: Pillow's own conversion to L would clip at 255.
        if image.mode.startswith(("I", "F")):
            return Image.fromarray(np.asarray(image, np.float32))
        # 1, P, RGB, RGBA, LA and CMYK become luma; alpha is dropped.
        return image if image.mode == "L" else image.convert("L")


# --------------------------------------------------------------------------------------------------
# Size and gray levels.

def eight_bits(levels: np.ndarray, percentiles: tuple[float, float]) -> Image.Image:
    """(H, W) of any numbers -> mode L, where the two percentiles are 0 and 255."""
    low, high = np.percentile(levels, percentiles)
    if not low < high:              # also where the levels are NaN
        raise DataError(f"blank: gray levels {low:g} to {high:g} only")
    scaled = (levels - low).clip(0, high - low) * (255 / (high - low))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def finish(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Mode L or F of any size -> mode L, shorter side at most settings.size.

    DataError where the image is an icon or shows nothing."""
    if min(image.size) < MIN_SIDE:
        raise DataError(f"{image.width} x {image.height} pixels are too small")

    # Made smaller with antialiasing; first by a whole factor to twice the size, which is fast.
    scale = settings.size / min(image.size)
    if scale < 1:
        width, height = (round(scale * side) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)

    if image.mode == "F" or settings.stretch:
        image = eight_bits(np.asarray(image), settings.stretch or DEEP_PERCENTILES)
    blank = blank_reason(image)
    if blank:
        raise DataError(blank)
    return image


def blank_reason(image: Image.Image) -> str:
    """Why an image of mode L shows nothing, or "" where it shows something."""
    levels = np.asarray(image)                      # (H, W) uint8
    low, high = int(levels.min()), int(levels.max())
    return f"blank: gray levels {low} to {high} only" if high - low < MIN_RANGE else ""


# --------------------------------------------------------------------------------------------------
# Both, safely.

def load_image(file: Path, read: Reader, settings: ImageSettings) -> Image.Image:
    """Read a file by `read` and finish it. DataError says why a file cannot be used.

    A decoder may raise anything on a broken file, and must not stop a run over 100,000 others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A header that claims more pixels than this is a decompression bomb: Pillow warns
            # before it decodes, and the warning is made an exception.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.MAX_IMAGE_PIXELS = int(settings.max_megapixels * 1e6)
            return finish(read(file, settings), settings)
    except Exception as error:
        raise DataError(reason(error)) from error


def reason(error: Exception) -> str:
    """An exception in one line; the type is named unless its text was written for the user."""
    text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
