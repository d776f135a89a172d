"""From files to 8-bit gray images: finding files, reading one, and a pool of processes for many.

    found = find_files(folder)
    reading = load_image(folder / found.files[0], read_image, ImageSettings(size=256))

load_image gives an image and notes on what had to be decided about it, or a DataError that says in
one sentence why there is none. read_image reads the common image formats. dicom.read_dicom, for
DICOM files, is called in the same way. For every format the result is Pillow's mode L, (H, W) of 0
to 255, whose shorter side is at most `size` pixels. A smaller image keeps its size: enlarging it
would add bytes and no information.
"""
import errno
import os
import re
import signal
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin
from tqdm import tqdm

from common import DataError, end_with_parent

# The formats that Pillow may try to open, and the suffixes of their files.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".tif", ".tiff", ".bmp",
              ".pgm", ".ppm", ".pnm", ".webp")
# Other suffixes of pictures and radiographs, and suffixes of packed files.
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jxl", ".tga", ".psd", ".dcm", ".dicom", ".nii",
          ".nrrd", ".mha", ".mhd", ".img", ".npy")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")

TIFF_TAGS = {"BitsPerSample": 258, "Compression": 259, "PhotometricInterpretation": 262,
             "SamplesPerPixel": 277, "SampleFormat": 339}
SAMPLE_FORMATS = {2: "signed", 3: "of floating point", 5: "of complex integers", 6: "complex"}

MIN_SIDE = 32           # pixels; anything smaller is an icon
MIN_RANGE = 16          # gray levels; an image with fewer is blank, or 12-bit data taken for 16

# Errors of the operating system that are not the file's fault.
MACHINE_ERRORS = {
    errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.EINTR,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED,
    errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENOLINK, errno.EREMOTEIO, errno.ESHUTDOWN}

# A mask or a map of labels has very few gray levels in most of it, while a radiograph has hundreds.
# The other 5 % are for edges that JPEG has blurred.
MASK_LEVELS, MASK_SHARE = 8, 0.95
MASK_FLAT = 0.8         # share of neighbouring pixels that are equal
# A small JPEG of a mask, with ringing in most of its blocks: this share of it lies near two levels
# (within a sixteenth of its range), and most of that share almost at these levels.
TWO_LEVELS_SHARE, TWO_LEVELS_CORE = 0.93, 0.75

# An image has little contrast if its 5th and 95th percentile are fewer of the 256 gray levels
# apart. A marker or the border then takes up the others.
NARROW = 48

# A colour is strong if Cb or Cr is further from gray. Blue or brown film stays below.
STRONG_COLOUR = 48
COLOUR_NOTE = "strong colours not kept: of most of the image only the brightness was taken"

MASK = f"a mask or a drawing: {MASK_LEVELS} gray levels or fewer make up {MASK_SHARE:.0%} of it"
NARROW_NOTE = ("little contrast: a marker, a border or a few other pixels take most of the gray "
               "levels (--stretch may take them away)")

# Percentiles that become black and white in images of more than 8 bits without a window.
DEEP_PERCENTILES = (0.5, 99.5)
BORDER_NOTE = ("one level at an end of the range cut off: as a border, a marker or NoData it would "
               "have taken most of the gray levels")
BORDER_SHARE = 0.05     # of the pixels; that many of one level at an end are a border


@dataclass(frozen=True)
class ImageSettings:
    """How an image is read, made smaller and stored; the same for all images of a data folder."""
    size: int = 256                                 # of the shorter side, pixels
    quality: int = 95                               # of the JPEG, 1 to 100
    stretch: tuple[float, float] | None = None      # percentiles that become black and white
    max_megapixels: float = 100                     # larger images are not decoded
    masks: bool = False                             # take what seems to be a mask


class Reading(NamedTuple):
    """An image that was read, and what had to be decided about it.

    A note is `what was done: why`, in the same words for all images, so that it can be counted."""
    image: Image.Image
    notes: tuple[str, ...] = ()


Reader = Callable[[Path, ImageSettings], Reading]


# --------------------------------------------------------------------------------------------------
# Files.

# Prefixes of folders that are hidden, or made by macOS or a NAS (thumbnails, bins, snapshots).
SYSTEM_FOLDERS = (".", "__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle",
                  "#snapshot", "@tmp")


class Found(NamedTuple):
    """The files below a folder as sorted relative paths."""
    files: list[str]
    special: list[str]              # named pipes, sockets and devices, which are never opened
    links: list[tuple[str, str]]    # a folder whose files are also found elsewhere, and where
    hidden: list[str] = []          # files and folders that are passed over, by their names


def find_files(folder: Path) -> Found:
    """All files below a folder.

    Hidden files and folders (.DS_Store, ._x.png) and SYSTEM_FOLDERS are passed over. Links are
    followed; a broken link counts as a file, so that reading it fails and is reported. OSError if a
    folder cannot be read."""
    files, special, links, hidden = [], [], [], []
    seen: dict[str, str] = {}       # {real path: name} of the folders that were read
    folders = [""]                  # still to be read, relative to `folder`
    while folders:
        parent = folders.pop()
        # Without this, a link to a folder above would repeat its files under other names.
        real = os.path.realpath(os.path.join(folder, parent))
        if real in seen:
            if not f"{parent}/".startswith(os.path.join(seen[real], "")):
                links.append((parent, seen[real]))
            continue
        seen[real] = parent
        with os.scandir(os.path.join(folder, parent)) as entries:
            below = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in below:
            path = os.path.join(parent, entry.name)
            is_folder = leads_to_folder(entry)
            if entry.name.startswith(SYSTEM_FOLDERS if is_folder else "."):
                hidden.append(path)
            elif is_folder:
                folders.append(path)
            else:
                regular = not os.path.exists(entry.path) or entry.is_file()
                (files if regular else special).append(path)
    return Found(sorted(files), sorted(special), sorted(links), sorted(hidden))


def unread_suffix(file: str) -> str:
    """The suffix of a picture whose format is not read, such as .gif or .png.gz; else ""."""
    stem, suffix = os.path.splitext(file.lower())
    inner = os.path.splitext(stem)[1] if suffix in PACKED else ""
    return inner + suffix if suffix in UNREAD or inner in (*EXTENSIONS, *UNREAD) else ""


def leads_to_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one. A link to itself is not."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def read_image(file: Path, settings: ImageSettings) -> Reading:
    """An image file of any common format: mode L, or F if it has more than 8 bits.

    A fully opaque alpha channel is dropped. A TIFF in which 0 is white is inverted. DataError if
    the image is of another format, has several frames, is partly transparent, or does not say which
    end of its gray levels is white."""
    if not file.is_file() and file.exists():
        raise DataError("no file, but a named pipe, a socket, a device or a folder")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise DataError(f"cannot identify the image: {what_it_is(file)}") from error
    with image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":    # an MPO is a photo with its preview
            raise DataError(f"{frames} frames")
        white_is_zero = image.format == "TIFF" and is_white_zero(image)
        is_unsigned = image.format == "TIFF" and tiff_values(image, "SampleFormat") in ((), (1,))

        # Pillow reads only the upper 8 of 16 bits per colour.
        is_cut = ";16" in str(image.tile) and not image.mode.startswith("I")
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still twice the size wanted,
        # and without conversion to RGB, as only the luma is used. Other formats ignore this.
        luma = "YCbCr" if image.mode == "RGB" else "L"
        image.draft(luma, (2 * settings.size, 2 * settings.size))
        ImageOps.exif_transpose(image, in_place=True)

        # I;16, I;16B, I and F: Pillow's own conversion to L would clip at 255.
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image)                                  # (H, W)
            if image.mode == "I" and is_unsigned:
                pixels = pixels.view(np.uint32)     # Pillow reads 32 unsigned bits as signed
            levels = pixels.astype(np.float32)
            if not np.isfinite(levels).all():
                raise DataError("some of its gray levels are infinite or no number")
            # Pillow itself inverts only images of 8 bits.
            return Reading(Image.fromarray(levels.max() - levels if white_is_zero else levels))
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (
                image.mode == "P" and "transparency" in image.info):
            if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise DataError("transparent in part: what is to be seen there is unknown")
        if image.mode in ("LAB", "HSV"):
            raise DataError(f"in the colours {image.mode}, which are not read: save it in gray")
        # 1, P, RGB, RGBA, LA and CMYK become luma.
        if image.mode == "YCbCr":
            gray = image.getchannel("Y")
        else:
            gray = image if image.mode == "L" else image.convert("L")
        if is_cut and np.asarray(gray).max() < 128:       # for example 12 bits stored in 16
            raise DataError("colours or transparency of 16 bits, of which only the upper 8 can be "
                            "read, and they hold next to nothing: save it in gray")
        return Reading(gray, (COLOUR_NOTE,) if is_colourful(image) else ())


def is_colourful(image: Image.Image) -> bool:
    """Whether most of an image is in strong colours. No radiograph is, even on tinted film."""
    if image.mode in ("L", "LA", "1"):
        return False
    small = image.resize((64, 64), Image.Resampling.NEAREST)
    tints = np.asarray(small.convert("YCbCr"), int)[..., 1:] - 128          # (64, 64, 2)
    return bool((np.abs(tints).max(2) > STRONG_COLOUR).mean() > 0.5)


def is_white_zero(image) -> bool:
    """Whether 0 is white in a TIFF. DataError if that is unknown."""
    photometric = tiff_values(image, "PhotometricInterpretation")
    if not photometric:
        raise DataError("PhotometricInterpretation is missing: white may be 0 or the highest level")
    # Pillow would read -1 as 255.
    if 2 in tiff_values(image, "SampleFormat") and 8 in tiff_values(image, "BitsPerSample"):
        raise DataError("signed gray levels of 8 bits")
    return photometric == (0,)


def tiff_values(image, name: str) -> tuple:
    """The values of a TIFF's tag; () if it is missing."""
    value = image.tag_v2.get(TIFF_TAGS[name], ())
    return value if isinstance(value, tuple) else (value,)


def what_it_is(file: Path) -> str:
    """Why Pillow does not recognise a file with the suffix of an image, by its first bytes."""
    with open(file, "rb") as stream:
        head = stream.read(132)
    if not head:
        return "an empty file"
    known = {b"GIF8": "a GIF", b"%PDF": "a PDF", b"<": "a page of HTML or XML",
             b"version https://git-lfs": "a pointer of Git LFS (git lfs pull brings the image)",
             b"PK\3\4": "a zip file", b"\x1f\x8b": "a gzip file"}
    name = next((name for start, name in known.items() if head.startswith(start)), "")
    if head[128:] == b"DICM":
        name = "a DICOM file (prepare.py dicom reads them)"
    if not name and head.startswith((b"II", b"MM", b"\x89PNG", b"\xff\xd8")):
        return f"damaged, or of a kind of TIFF, PNG or JPEG that cannot be read{kind_of_tiff(file)}"
    return f"{name or 'unknown'}, none of {', '.join(FORMATS)}"


def kind_of_tiff(file: Path) -> str:
    """What a TIFF says about its pixels, for a message: ` (16 bits signed, white is 0)`; "" if it
    cannot be read."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(8)
            head += stream.read(8) if head[2:4] in (b"+\0", b"\0+") else b""      # a BigTIFF
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            stream.seek(tags.next)
            tags.load(stream)
            bits, packed, photometric, samples, form = map(tags.get, TIFF_TAGS.values())
    except Exception:                   # a damaged file may raise anything
        return ""
    bits, form = (value[0] if isinstance(value, tuple) else value for value in (bits, form))
    words = ["" if samples in (None, 1) else f"{samples} samples a pixel",
             f"{bits} bits {SAMPLE_FORMATS.get(form or 1, '')}".strip() if bits else "",
             "white is 0" if photometric == 0 else "",
             "" if packed in (None, 1) else f"compression {packed}",
             "big-endian" if head.startswith(b"M") else ""]
    says = ", ".join(filter(None, words))
    return f" (a TIFF of {says}): save it as PNG" if says else ""


# --------------------------------------------------------------------------------------------------
# Size and gray levels.

def eight_bits(levels: np.ndarray, percentiles: tuple[float, float]) -> Image.Image:
    """(H, W) of any numbers -> mode L; the two percentiles become 0 and 255."""
    low, high = np.percentile(levels, percentiles)
    if not low < high:              # true for NaN, too
        raise DataError(f"blank: gray levels {low:g} to {high:g} only")
    scaled = (levels - low).clip(0, high - low) * (255 / (high - low))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def without_border(levels: np.ndarray) -> np.ndarray:
    """Cut off one level at an end of the range that is far from all others, such as a border or
    NoData: it becomes as dark or bright as the next level. levels: (H, W) of any numbers. Returned
    as it is if the others span half of the range, as in a radiograph with black beside the body."""
    step = max(1, min(levels.shape) // 256)         # about 256 rows and columns are enough
    seen = levels[::step, ::step].ravel()
    low, high = whole = np.percentile(seen, DEEP_PERCENTILES)
    for end in (np.min, np.max, np.min, np.max):    # NoData may lie beside a border
        rest = seen[seen != end(seen)]
        inner = np.percentile(rest, DEEP_PERCENTILES) if rest.size else whole
        if 0 < 2 * (inner[1] - inner[0]) < high - low and len(np.unique(rest)) >= MIN_RANGE:
            seen, (low, high) = rest, inner
    return levels if (low, high) == tuple(whole) else levels.clip(float(low), float(high))


def finish(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Mode L or F of any size -> mode L, shorter side at most settings.size.

    DataError if the image is an icon or is blank."""
    if min(image.size) < MIN_SIDE:
        raise DataError(f"{image.width} x {image.height} pixels are too small")

    # Shrink with antialiasing. A first reduction to twice the size, by a whole factor, saves time.
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


def refuse_mask(image: Image.Image) -> None:
    """DataError if an image of mode L or F seems to be a mask or a map of labels."""
    step = max(1, min(image.size) // 512)           # about 512 rows and columns are enough
    rows = np.asarray(image)[::step]                                    # (H / step, W)
    if image.mode == "L":                           # faster, because it does not sort
        counts = np.bincount(rows[:, ::step].ravel(), minlength=256)
        levels, counts = np.flatnonzero(counts), counts[counts > 0]
    else:
        levels, counts = np.unique(rows[:, ::step], return_counts=True)
    share = np.sort(counts)[::-1].cumsum() / counts.sum()
    few = int(np.searchsorted(share, MASK_SHARE)) + 1
    # An image with hardly any range is reported as blank, later. An image of two levels that is not
    # flat may be dithered.
    is_flat = (rows[:, 1:] == rows[:, :-1]).mean() > MASK_FLAT
    is_mask = few <= MASK_LEVELS and is_flat or image.mode == "L" and has_two_levels(rows)
    if is_mask and levels[-1] - levels[0] >= MIN_RANGE:
        raise DataError(MASK)


def has_two_levels(levels: np.ndarray) -> bool:
    """Whether (H, W) uint8 has the two levels of a mask, and near them what JPEG made of its edges.

    In a narrow radiograph inside a black border, as many pixels lie near two levels, but they are
    spread around the second level."""
    counts = np.bincount(levels.ravel(), minlength=256)
    low, high = np.searchsorted(counts.cumsum(), (0.01 * levels.size, 0.99 * levels.size))
    reach, near = max(2, round((high - low) / 16)), 0
    for _ in range(2):
        level = int(counts.argmax())
        around = counts[max(0, level - reach):level + reach + 1]
        core = counts[max(0, level - 2):level + 3]
        if core.sum() < TWO_LEVELS_CORE * around.sum():
            return False
        near += around.sum()
        around[:] = 0                           # a view: sets counts to 0
    if near < TWO_LEVELS_SHARE * levels.size:
        return False
    steps = np.abs(np.diff(levels.astype(np.int16)))                    # (H, W - 1)
    return bool((steps <= 2 * reach).mean() > MASK_FLAT)                # else dithered


def narrow_note(image: Image.Image) -> tuple[str, ...]:
    """A note if few pixels, or the border, take most gray levels of an image of mode L."""
    levels = np.asarray(image)                      # (H, W) uint8
    for end, border in ((levels.min(), levels <= int(levels.min()) + 8),
                        (levels.max(), levels >= int(levels.max()) - 8)):
        if (levels == end).mean() > BORDER_SHARE and not border.all():
            levels = levels[~border]
            break
    low, high = np.percentile(levels, (5, 95))
    return (NARROW_NOTE,) if high - low < NARROW else ()


def blank_reason(image: Image.Image) -> str:
    """Why an image of mode L is blank, or "" if it is not."""
    levels = np.asarray(image)                      # (H, W) uint8
    low, high = int(levels.min()), int(levels.max())
    return f"blank: gray levels {low} to {high} only" if high - low < MIN_RANGE else ""


# --------------------------------------------------------------------------------------------------
# One image, whatever it is.

def load_image(file: Path, read: Reader, settings: ImageSettings) -> Reading:
    """Read a file by `read` and finish its image. DataError says why a file cannot be used.

    A decoder may raise anything on a broken file; that must not stop a run over 100,000 others.
    OSError if the machine failed, and not the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Decompression bombs: Pillow warns before it decodes more pixels than this, and the
            # warning becomes an exception.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.MAX_IMAGE_PIXELS = int(settings.max_megapixels * 1e6)
            image, notes = read(file, settings)
            if not settings.masks:
                refuse_mask(image)
            if image.mode == "F" and not settings.stretch:
                levels = np.asarray(image)
                inner = without_border(levels)
                if inner is not levels:
                    image, notes = Image.fromarray(inner), (*notes, BORDER_NOTE)
            image = finish(image, settings)
            return Reading(image, (*notes, *narrow_note(image)))
    except Exception as error:
        raise DataError(reason(error, file)) from error


def reason(error: Exception, file: Path | None = None) -> str:
    """Why a file cannot be used, in one line, from the exception that it raised.

    OSError, with the file's name, if the machine failed: it lacks memory, or its storage does not
    answer. The file may be good, and must not be left out for that."""
    is_machine = isinstance(error, OSError) and error.errno in MACHINE_ERRORS
    if is_machine or isinstance(error, MemoryError):
        number = error.errno if isinstance(error, OSError) else errno.ENOMEM
        raise OSError(number, f"{os.strerror(number or 0)} (once that is over, the same command "
                      "goes on)", str(file) if file else None) from error
    if isinstance(error, DataError):
        return plain_words(error)
    if isinstance(error, OSError) and error.strerror:       # leaves out the path on this machine
        return error.strerror
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        pixels = re.search(r"\d+ pixels", str(error))
        return f"{pixels[0] if pixels else 'its pixels'} are more than --max-megapixels"
    return f"damaged, or of a kind that cannot be read: {plain_words(error)}"


def plain_words(error: Exception) -> str:
    """The message of an exception in one line, or else its type."""
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------
# Many files: a pool of processes.

def in_parallel(function: Callable, items: list, workers: int, title: str) -> list:
    """[function(item) for item in items], computed by `workers` processes, with a progress bar.

    An exception in a worker is raised here, once the images in work are done. DataError if a worker
    dies. The function and the results are pickled. If the system denies a pool its locks, a single
    worker is replaced by this process."""
    tqdm.monitor_interval = 0       # no monitor thread: forking with threads is not safe
    try:
        # A worker whose parent was killed would wait for work forever and keep the folder locked.
        pool = ProcessPoolExecutor(workers, get_context("fork"), end_with_parent,
                                   (signal.SIGKILL, os.getpid()))
    except OSError:
        if workers > 1:
            raise
        return [function(item) for item in tqdm(items, title, unit=" images")]
    pieces, results = [items[i:i + 8] for i in range(0, len(items), 8)], []
    try:
        # Ctrl-C reaches all processes of a terminal, but only this one must act on it. The workers
        # inherit that the signal is blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with tqdm(None, title, len(items), unit=" images", dynamic_ncols=True) as bar:
            # pool.map would cancel the pieces that wait when a worker dies. That may stop the very
            # thread by which Python 3.11 ends the other workers.
            futures = [pool.submit(_of_each, function, piece) for piece in pieces]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for future in futures:
                of_piece = _result(future, workers)
                results += of_piece
                bar.update(len(of_piece))
        return results
    except BrokenProcessPool:
        for worker in active_children():        # the pool does not wait for them
            worker.kill()
            worker.join()
        raise DataError("a worker process died, most likely for want of memory; the same command "
                        "goes on where this one stopped, with fewer --workers if it happens "
                        "again") from None
    finally:
        # However the loop ended, the workers finish the few images that they have begun.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pool.shutdown(cancel_futures=True)


def _of_each(function: Callable, items: list) -> list:
    return [function(item) for item in items]


def _result(future: Future, workers: int) -> list:
    """The result of a piece. BrokenProcessPool if a worker has died, even if Python 3.11 misses it:
    its thread that watches the workers may stop if pieces are added at that moment."""
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            if future.done():               # it may be the worker's TimeoutError
                return future.result()
            if len(active_children()) < workers:
                raise BrokenProcessPool from None
