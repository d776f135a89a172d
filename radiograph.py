"""From files to 8-bit gray images: finding files, reading one, and a pool of processes for many.

    found = find_files(folder)
    reading = load_image(folder / found.files[0], read_image, ImageSettings(size=256))

load_image gives an image, and notes on what had to be decided about it, or a DataError whose one
sentence says why there is none. read_image
reads the common image formats; dicom.read_dicom, for DICOM files, is called in the same way.
Whatever the format, an image ends as Pillow's mode L, (H, W) of 0 to 255, whose shorter side is
`size` pixels at most. A smaller image keeps its size: enlarging adds bytes and no information.
"""
import ctypes
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

from common import DataError

# The formats that Pillow may try to open, and the suffixes by which their files are found.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".tif", ".tiff", ".bmp",
              ".pgm", ".ppm", ".pnm", ".webp")
# What else pictures and radiographs are kept in, and what files are packed by.
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jxl", ".tga", ".psd", ".dcm", ".dicom", ".nii",
          ".nrrd", ".mha", ".mhd", ".img", ".npy")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")

TIFF_TAGS = {"BitsPerSample": 258, "Compression": 259, "PhotometricInterpretation": 262,
             "SamplesPerPixel": 277, "SampleFormat": 339}
SAMPLE_FORMATS = {2: "signed", 3: "of floating point", 5: "of complex integers", 6: "complex"}

MIN_SIDE = 32           # pixels; anything smaller is an icon
MIN_RANGE = 16          # gray levels; an image with fewer is blank, or 12-bit data taken for 16

# Errors of the operating system that say nothing against the file that was read.
MACHINE_ERRORS = {
    errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.EINTR,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED,
    errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENOLINK, errno.EREMOTEIO, errno.ESHUTDOWN}

# A mask or a map of labels: so few gray levels make up so much of it. A radiograph has hundreds.
# The rest is for the blurred edges of a JPEG.
MASK_LEVELS, MASK_SHARE = 8, 0.95
MASK_FLAT = 0.8         # of neighbouring pixels, so many are equal
# Or so much of it lies near two levels, a sixteenth of its range to both sides, and most of that
# at these levels: so a small JPEG of a mask looks, whose edges ring in most of its blocks.
TWO_LEVELS_SHARE, TWO_LEVELS_CORE = 0.93, 0.75

# Most pixels (5th to 95th percentile) of an image share fewer of its 256 gray levels: a marker, or
# the border, has the others.
NARROW = 48

# A pixel whose Cb or Cr is so far from gray is in a strong colour; a blue or brown film's is not.
STRONG_COLOUR = 48
COLOUR_NOTE = "strong colours not kept: of most of the image only the brightness was taken"

MASK = f"a mask or a drawing: {MASK_LEVELS} gray levels or fewer make up {MASK_SHARE:.0%} of it"
NARROW_NOTE = ("little contrast: a marker, a border or a few other pixels take most of the gray "
               "levels (--stretch may take them away)")

# Percentiles that become black and white where 9 to 16 bits come without a window.
DEEP_PERCENTILES = (0.5, 99.5)
BORDER_NOTE = ("one level at an end of the range cut off: as a border, a marker or NoData it would "
               "have taken most of the gray levels")
BORDER_SHARE = 0.05     # of the pixels; so many of 8 bits at one end are a border


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

# Folders of these names are hidden, of macOS, or of a NAS: its thumbnails, bins and snapshots.
SYSTEM_FOLDERS = (".", "__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle",
                  "#snapshot", "@tmp")


class Found(NamedTuple):
    """The files below a folder as sorted relative paths."""
    files: list[str]
    special: list[str]              # named pipes, sockets and devices, which are never opened
    links: list[tuple[str, str]]    # a folder that has its files under another name, and that
    hidden: list[str] = []          # files and folders that do not count, by their names


def find_files(folder: Path) -> Found:
    """All files below a folder.

    Hidden files and folders (.DS_Store, ._x.png) and those of SYSTEM_FOLDERS do not count. Links
    are followed; a link to nowhere counts as a file, so that it is missed. OSError where a folder
    cannot be read."""
    files, special, links, hidden = [], [], [], []
    seen: dict[str, str] = {}       # by its real path, the name of each folder that was read
    folders = [""]                  # those still to be read, relative to `folder`
    while folders:
        parent = folders.pop()
        # A link back to a folder above would give the same files other names.
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
    """The suffix, .gif or .png.gz, of a picture that is not read by its name; "" for others."""
    stem, suffix = os.path.splitext(file.lower())
    inner = os.path.splitext(stem)[1] if suffix in PACKED else ""
    return inner + suffix if suffix in UNREAD or inner in (*EXTENSIONS, *UNREAD) else ""


def leads_to_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one. A link to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def read_image(file: Path, settings: ImageSettings) -> Reading:
    """An image file of any common format: mode L, or F where it has more than 8 bits.

    Alpha is dropped where all of it is opaque. A TIFF whose white is 0 is inverted. DataError where
    the image is of another format, has several frames, is transparent in part, or does not say
    which end of its gray levels is white."""
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

        # Of colours of 16 bits Pillow reads the upper 8.
        is_cut = ";16" in str(image.tile) and not image.mode.startswith("I")
        # A JPEG is decoded at 1/2, 1/4 or 1/8 where that is still twice the size wanted, to luma
        # and colour, of which the luma is taken. Other formats ignore this.
        luma = "YCbCr" if image.mode == "RGB" else "L"
        image.draft(luma, (2 * settings.size, 2 * settings.size))
        ImageOps.exif_transpose(image, in_place=True)

        # I;16, I;16B, I and F: Pillow's own conversion to L would clip at 255.
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image)                                  # (H, W)
            if image.mode == "I" and is_unsigned:
                pixels = pixels.view(np.uint32)     # of 32 bits, which Pillow takes for signed
            levels = pixels.astype(np.float32)
            if not np.isfinite(levels).all():
                raise DataError("some of its gray levels are infinite or no number")
            # Pillow inverts such an image of 8 bits, and no other.
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
        if is_cut and np.asarray(gray).max() < 128:       # 12 bits in 16, say
            raise DataError("colours or transparency of 16 bits, of which only the upper 8 can be "
                            "read, and they hold next to nothing: save it in gray")
        return Reading(gray, (COLOUR_NOTE,) if is_colourful(image) else ())


def is_colourful(image: Image.Image) -> bool:
    """Whether most of an image is in strong colours, as no radiograph is, on tinted film or not."""
    if image.mode in ("L", "LA", "1"):
        return False
    small = image.resize((64, 64), Image.Resampling.NEAREST)
    tints = np.asarray(small.convert("YCbCr"), int)[..., 1:] - 128          # (64, 64, 2)
    return bool((np.abs(tints).max(2) > STRONG_COLOUR).mean() > 0.5)


def is_white_zero(image) -> bool:
    """Whether the gray levels of a TIFF run from white to black; DataError where it is unknown."""
    photometric = tiff_values(image, "PhotometricInterpretation")
    if not photometric:
        raise DataError("PhotometricInterpretation is missing: white may be 0 or the highest level")
    # Pillow would take -1 for 255.
    if 2 in tiff_values(image, "SampleFormat") and 8 in tiff_values(image, "BitsPerSample"):
        raise DataError("signed gray levels of 8 bits")
    return photometric == (0,)


def tiff_values(image, name: str) -> tuple:
    """The values of a TIFF's tag; () where it is missing."""
    value = image.tag_v2.get(TIFF_TAGS[name], ())
    return value if isinstance(value, tuple) else (value,)


def what_it_is(file: Path) -> str:
    """Why Pillow does not know a file that has the suffix of an image, by its first bytes."""
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
    """What a TIFF says of its pixels, for a message: ` (16 bits signed, white is 0)`; "" where it
    cannot be told."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(8)
            head += stream.read(8) if head[2:4] in (b"+\0", b"\0+") else b""      # a BigTIFF
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            stream.seek(tags.next)
            tags.load(stream)
            bits, packed, photometric, samples, form = map(tags.get, TIFF_TAGS.values())
    except Exception:                   # a damaged one may raise anything
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
    """(H, W) of any numbers -> mode L, where the two percentiles are 0 and 255."""
    low, high = np.percentile(levels, percentiles)
    if not low < high:              # also where the levels are NaN
        raise DataError(f"blank: gray levels {low:g} to {high:g} only")
    scaled = (levels - low).clip(0, high - low) * (255 / (high - low))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def without_border(levels: np.ndarray) -> np.ndarray:
    """(H, W) of any numbers without one level far from all others at an end of their range, as a
    border or NoData has: it becomes as dark or bright as what is next to it. The same array where
    the others have half of the range, as a radiograph's do that is black beside the body."""
    step = max(1, min(levels.shape) // 256)         # some 256 rows tell, and 256 columns
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


def refuse_mask(image: Image.Image) -> None:
    """DataError where an image of mode L or F seems to be a mask or a map of labels."""
    step = max(1, min(image.size) // 512)           # some 512 rows tell, and 512 columns
    rows = np.asarray(image)[::step]                                    # (H / step, W)
    if image.mode == "L":                           # without sorting, which would take longest
        counts = np.bincount(rows[:, ::step].ravel(), minlength=256)
        levels, counts = np.flatnonzero(counts), counts[counts > 0]
    else:
        levels, counts = np.unique(rows[:, ::step], return_counts=True)
    share = np.sort(counts)[::-1].cumsum() / counts.sum()
    few = int(np.searchsorted(share, MASK_SHARE)) + 1
    # What has hardly any range is blank, and will be called that. Two levels may be dithering: then
    # they are not flat.
    is_flat = (rows[:, 1:] == rows[:, :-1]).mean() > MASK_FLAT
    is_mask = few <= MASK_LEVELS and is_flat or image.mode == "L" and has_two_levels(rows)
    if is_mask and levels[-1] - levels[0] >= MIN_RANGE:
        raise DataError(MASK)


def has_two_levels(levels: np.ndarray) -> bool:
    """Whether (H, W) uint8 are two levels, as a mask has, and what JPEG made of its edges.

    A narrow radiograph inside a black border has such a share, too, but is spread around its own
    commonest level."""
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
        around[:] = 0                           # in counts, too
    if near < TWO_LEVELS_SHARE * levels.size:
        return False
    steps = np.abs(np.diff(levels.astype(np.int16)))                    # (H, W - 1)
    return bool((steps <= 2 * reach).mean() > MASK_FLAT)                # else it is dithering


def narrow_note(image: Image.Image) -> tuple[str, ...]:
    """A note where few pixels or the border of an image of mode L take most of its gray levels."""
    levels = np.asarray(image)                      # (H, W) uint8
    for end, border in ((levels.min(), levels <= int(levels.min()) + 8),
                        (levels.max(), levels >= int(levels.max()) - 8)):
        if (levels == end).mean() > BORDER_SHARE and not border.all():
            levels = levels[~border]
            break
    low, high = np.percentile(levels, (5, 95))
    return (NARROW_NOTE,) if high - low < NARROW else ()


def blank_reason(image: Image.Image) -> str:
    """Why an image of mode L shows nothing, or "" where it shows something."""
    levels = np.asarray(image)                      # (H, W) uint8
    low, high = int(levels.min()), int(levels.max())
    return f"blank: gray levels {low} to {high} only" if high - low < MIN_RANGE else ""


# --------------------------------------------------------------------------------------------------
# One image, whatever it is.

def load_image(file: Path, read: Reader, settings: ImageSettings) -> Reading:
    """Read a file by `read` and finish its image. DataError says why a file cannot be used.

    A decoder may raise anything on a broken file, and must not stop a run over 100,000 others.
    OSError where the machine failed and not the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A header that claims more pixels than this is a decompression bomb: Pillow warns
            # before it decodes, and the warning is made an exception.
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

    OSError, with the file's name, where the machine failed: for want of memory, or because
    storage does not answer. The file may be good, and without it the data would be fewer for no
    reason."""
    is_machine = isinstance(error, OSError) and error.errno in MACHINE_ERRORS
    if is_machine or isinstance(error, MemoryError):
        number = error.errno if isinstance(error, OSError) else errno.ENOMEM
        raise OSError(number, f"{os.strerror(number or 0)} (once that is over, the same command "
                      "goes on)", str(file) if file else None) from error
    if isinstance(error, DataError):
        return plain_words(error)
    if isinstance(error, OSError) and error.strerror:       # without the path on this machine
        return error.strerror
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        pixels = re.search(r"\d+ pixels", str(error))
        return f"{pixels[0] if pixels else 'its pixels'} are more than --max-megapixels"
    return f"damaged, or of a kind that cannot be read: {plain_words(error)}"


def plain_words(error: Exception) -> str:
    """What an exception says, in one line. One that says nothing is named."""
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------
# Many files: a pool of processes.

def in_parallel(function: Callable, items: list, workers: int, title: str) -> list:
    """function(item) of all items, in their order, by `workers` processes under a progress bar.

    An exception in a worker is raised here, after the images in work. DataError where a worker
    dies. The function and the results are pickled. Where a pool cannot have its locks, one worker
    is this process."""
    tqdm.monitor_interval = 0       # no thread: fork, which shares what is imported, wants none
    try:
        pool = ProcessPoolExecutor(workers, get_context("fork"), die_with_parent)
    except OSError:
        if workers > 1:
            raise
        return [function(item) for item in tqdm(items, title, unit=" images")]
    pieces, results = [items[i:i + 8] for i in range(0, len(items), 8)], []
    try:
        # Ctrl-C reaches all processes of a terminal and is for this one only. A signal that is
        # blocked here when the workers are started stays blocked in them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with tqdm(None, title, len(items), unit=" images", dynamic_ncols=True) as bar:
            # Not pool.map, which cancels what waits where a worker has died. That may stop the
            # thread by which Python 3.11 then ends the other workers.
            futures = [pool.submit(_of_each, function, piece) for piece in pieces]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for future in futures:
                of_piece = _result(future, workers)
                results += of_piece
                bar.update(len(of_piece))
        return results
    except BrokenProcessPool:
        for worker in active_children():        # nothing waits for those that are left
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
    """Of a piece; BrokenProcessPool where a worker has died, also where Python 3.11 misses it: its
    thread that would see that stops where pieces are added at this moment."""
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            if future.done():               # or storage that timed out has raised it in the worker
                return future.result()
            if len(active_children()) < workers:
                raise BrokenProcessPool from None


def die_with_parent() -> None:
    """Called in a worker: let it not outlive its parent, or it would keep the folder locked."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
