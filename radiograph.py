"""From files to 8-bit gray images: finding files, reading one, and a pool of processes for many.

    files = find_files(folder)
    image = load_image(folder / files[0], read_image, ImageSettings(size=256))

load_image gives an image, or a DataError whose one sentence says why there is none. read_image
reads the common image formats; dicom.read_dicom, for DICOM files, is called in the same way.
Whatever the format, an image ends as Pillow's mode L, (H, W) of 0 to 255, whose shorter side is
`size` pixels at most. A smaller image keeps its size: enlarging adds bytes and no information.
"""
import ctypes
import os
import signal
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

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
# One image, whatever it is.

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


# --------------------------------------------------------------------------------------------------
# Many files: a pool of processes.

def in_parallel(function: Callable, items: list, workers: int, title: str) -> list:
    """function(item) of all items, in their order, by `workers` processes under a progress bar.

    An exception in a worker is raised here, after the images in work. DataError where a worker
    dies. The function and the results are pickled."""
    tqdm.monitor_interval = 0       # no thread: fork, which shares what is imported, wants none
    pool = ProcessPoolExecutor(workers, get_context("fork"), die_with_parent)
    try:
        # Ctrl-C reaches all processes of a terminal and is for this one only. A signal that is
        # blocked here when the workers are started stays blocked in them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with tqdm(pool.map(function, items, chunksize=8), title, len(items),
                  unit=" images", dynamic_ncols=True) as results:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            return list(results)
    except BrokenProcessPool:
        raise DataError("a worker process died, most likely for want of memory; the same command "
                        "goes on where this one stopped, with fewer --workers if it happens "
                        "again") from None
    finally:
        # However the loop ended, the workers finish the few images that they have begun.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pool.shutdown(cancel_futures=True)


def die_with_parent() -> None:
    """Called in a worker: let it not outlive its parent, or it would keep the folder locked."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
