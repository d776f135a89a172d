"""DICOM radiographs: which files are taken, who they are of, and how they are meant to be seen.

Only this of a header enters a data folder: the view, as one of a few words; keyed hashes of the
patient, the study and the image; and counts of views and body parts, in DATA.md. All code that
touches an identity is in this file.
"""
import argparse
import hashlib
import hmac
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from common import DataError
from doubts import Doubt, names_without_meaning, patient_key, patients_alike
from flags import Several
from layout import are_splits, first_telling, names_at, split_name
from radiograph import (
    EXTENSIONS, PACKED, ImageSettings, Reading, eight_bits, in_parallel, load_image,
    plain_words, reason)
from sources import (
    Item, Source, check_patients_and_splits, doubt_classes, doubt_unused_splits, label_flags,
    label_rules, plain_path, that_end_alike, unused_splits)
from tables import FINDINGS, Table, read_labels, read_table, understand, value_of


SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")       # of DICOM files, if they have one
NO_DICOM = "not a DICOM file"                       # the commonest reason why a file is not taken
BROKEN = "not a DICOM file, though it is called so"

# ViewPosition enters the manifest as one of these; any other text might name a person.
VIEWS = {"AP", "PA", "LATERAL", "LL", "RL", "LLD", "RLD", "LLO", "RLO", "OBLIQUE"}
SIDE_VIEWS = VIEWS - {"AP", "PA"}
# BodyPartExamined is reported as one of these. A text with CHEST, THORA or LUNG in it is CHEST.
BODY_PARTS = {"CHEST", "ABDOMEN", "ANKLE", "ARM", "BREAST", "CSPINE", "ELBOW", "EXTREMITY", "FEMUR",
              "FINGER", "FOOT", "HAND", "HEAD", "HIP", "JAW", "KNEE", "LEG", "LSPINE", "NECK",
              "PELVIS", "SHOULDER", "SKULL", "SPINE", "TSPINE", "WRIST"}

# Why a file is not taken if another file has its SOPInstanceUID.
COPY = "SOPInstanceUID of an earlier file"
DAMAGED_COPY = "damaged, and another file of its SOPInstanceUID is not"
OTHER_IMAGE = "SOPInstanceUID of an earlier file, which shows another image"


class Identity(NamedTuple):
    """The elements that identify patient, study and image, under their DICOM keywords."""
    PatientID: str
    StudyInstanceUID: str
    SOPInstanceUID: str
    AccessionNumber: str = ""           # a hospital's tables may use it
    ViewPosition: str = ""              # this and the next are no identity, but read with it
    BodyPartExamined: str = ""


KEYS = Identity._fields[:4]             # the elements that --labels may be keyed by


# --------------------------------------------------------------------------------------------------
# Headers.

# Pixels cannot be read without these. Some have likely values, but a wrong guess would turn the
# radiograph into a negative or into noise, and nobody would notice.
NEEDED = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored",
          "PixelRepresentation", "PhotometricInterpretation")
# PhotometricInterpretation of colours begins with one of these.
COLOURS = ("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK")


def open_dicom(file: Path, pixels: bool = True) -> pydicom.FileDataset:
    """A DICOM file, with its pixel data or without. InvalidDicomError if it is none.

    A file that has lost its first 132 bytes (a blank and the word DICM) is read all the same if it
    holds an image."""
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=not pixels)
    except InvalidDicomError:
        try:
            dataset = pydicom.dcmread(file, stop_before_pixels=not pixels, force=True)
            is_image = "Rows" in dataset and "BitsAllocated" in dataset
        except Exception:               # not DICOM: it may have been read as anything
            is_image = False
        if not is_image:
            raise
    # The encoding of the pixels was lost with those bytes. The elements show it.
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit
            else ExplicitVRLittleEndian if little else ExplicitVRBigEndian)
    # pydicom and the code here compare it in capital letters.
    if isinstance(dataset.get("PhotometricInterpretation"), str):
        dataset.PhotometricInterpretation = dataset.PhotometricInterpretation.strip().upper()
    return dataset


def read_identity(file: Path, modalities: Sequence[str], max_megapixels: float,
                  patient_from: str = "header") -> Identity | str:
    """The Identity of a radiograph, or the reason why the file is not taken.

    The pixels are not read. A reason is returned and not raised, because a folder of DICOM files
    holds much that is no radiograph. Elements may be empty, except those that identify the patient
    if `patient_from` is header."""
    try:
        header = open_dicom(file, pixels=False)
        check_header(header, modalities, max_megapixels)
        identity = Identity(*(str(header.get(name) or "").strip() for name in Identity._fields))
        named = identity.SOPInstanceUID and (identity.PatientID or identity.StudyInstanceUID)
        if patient_from == "header" and not named:
            raise DataError("SOPInstanceUID is missing, or both PatientID and StudyInstanceUID are "
                            "(--patient-from folder or file takes such files)")
        return identity
    except InvalidDicomError:
        inner, suffix = (name.lower() for name in ["", "", *file.suffixes][-2:])
        if suffix in PACKED and inner in SUFFIXES:
            return f"packed ({inner}{suffix}): unpack it first"
        return BROKEN if suffix in SUFFIXES else NO_DICOM
    except Exception as error:          # a damaged header may make pydicom raise anything
        return reason(error, file)


def is_dicom(file: Path) -> bool:
    """Whether a file is to be read as DICOM, by its suffix or its first bytes. Only a regular file
    is opened."""
    if file.suffix.lower() in SUFFIXES:
        return True
    if not file.is_file():
        return False
    try:
        with open(file, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:                     # whoever needs the file will report that
        return False


def read_radiograph(file: Path, settings: ImageSettings, modalities: Sequence[str]) -> Reading:
    """read_dicom after the checks of a data folder, without an identity.

    Notes say which images may be of another kind than those that a classifier was trained on."""
    try:
        header = open_dicom(file, pixels=False)
        check_header(header, modalities, settings.max_megapixels)
    except InvalidDicomError as error:
        raise DataError("not a DICOM file") from error
    reading, notes = read_dicom(file, settings), []
    view, part = view_of(header.get("ViewPosition")), body_part(header.get("BodyPartExamined"))
    if view in SIDE_VIEWS:
        notes.append(f"no frontal view: ViewPosition says {view}")
    if part not in ("CHEST", ""):
        notes.append(f"no chest: BodyPartExamined says {part}")
    return Reading(reading.image, (*reading.notes, *notes))


def view_of(text: object) -> str:
    """ViewPosition as one of VIEWS, or "" for another text."""
    word = str(text or "").strip().upper()
    return word if word in VIEWS else ""


def body_part(text: object) -> str:
    """BodyPartExamined as one of BODY_PARTS, OTHER for another text, "" for none."""
    word = str(text or "").strip().upper()
    if any(part in word for part in ("CHEST", "THORA", "LUNG")):
        return "CHEST"
    return word if word in BODY_PARTS or not word else "OTHER"


def check_header(header, modalities: Sequence[str], max_megapixels: float) -> None:
    """DataError for anything but one gray radiograph of moderate size that is meant for viewing and
    has no writing in it.

    modalities: those to take; `none`, in any case, stands for a file without Modality."""
    if "Rows" not in header:
        kind = UID(str(header.file_meta.get("MediaStorageSOPClassUID") or "")).name
        raise DataError(f"not an image ({kind or 'of an unknown kind'})")
    modality = str(header.get("Modality") or "").strip()
    if (modality.lower() or "none") not in [name.lower() or "none" for name in modalities]:
        if not modality:
            raise DataError("Modality is missing (--modality none takes such files)")
        raise DataError(f"modality {modality}, not {' or '.join(modalities)} (--modality "
                        f"{' '.join(modalities)} {modality} takes it, too)")
    for keyword in NEEDED:
        if header.get(keyword) in (None, ""):
            raise DataError(f"{keyword} is missing")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise DataError(f"{header.NumberOfFrames} frames")
    photometric = str(header.PhotometricInterpretation)
    if photometric.startswith(COLOURS):
        raise DataError(f"in colour ({photometric})")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(f"PhotometricInterpretation is {photometric}, and neither MONOCHROME1 nor "
                        "MONOCHROME2: white may be the lowest or the highest level")
    if header.BitsAllocated == 1:
        raise DataError("1 bit a pixel: a mask and no radiograph")
    check_shape(header)
    kind = UID(str(header.get("SOPClassUID") or "")).name
    intent = str(header.get("PresentationIntentType") or "").strip().upper()
    if intent == "FOR PROCESSING" or kind.endswith("For Processing"):
        raise DataError("FOR PROCESSING: raw data of the detector, in which bone may be black")
    if header.Rows * header.Columns > max_megapixels * 1e6:
        raise DataError(f"{header.Columns} x {header.Rows} pixels are more than --max-megapixels")
    burned_in = str(header.get("BurnedInAnnotation") or "").strip()
    if burned_in and value_of(burned_in) != "0":        # Y, TRUE, 1, UNKNOWN
        raise DataError(f"BurnedInAnnotation is {burned_in.upper()}: a name may be written into "
                        "the image")


def check_shape(header) -> None:
    """DataError for an element whose value no gray image can have."""
    side, allocated = range(1, 2**16), header.BitsAllocated
    possible = {"Rows": side, "Columns": side, "SamplesPerPixel": (1,),
                "BitsAllocated": range(8, 65, 8), "PixelRepresentation": (0, 1),
                "BitsStored": range(1, allocated + 1) if isinstance(allocated, int) else ()}
    for keyword, values in possible.items():
        if header[keyword].value not in values:
            beside = f" and BitsAllocated {allocated}" if keyword == "BitsStored" else ""
            raise DataError(f"{keyword} is {header[keyword].value}{beside}, as of no gray image")


# --------------------------------------------------------------------------------------------------
# Numbers of a header.

def number(dataset, keyword: str) -> float | None:
    """The first number of an element; None if it is missing, empty, or not a finite number.

    A decimal comma, from a machine with another locale, is read as a point."""
    try:
        value = dataset.get(keyword)
    except Exception:                   # pydicom could not convert the text
        value = dataset.get_item(keyword).value
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    elif value is None or isinstance(value, str | int | float):
        value = [value]
    try:
        first = float(str(list(value)[0]).strip(" \0").replace(",", "."))
    except (ValueError, IndexError, TypeError):
        return None
    return first if math.isfinite(first) else None


def is_filled(dataset, keyword: str) -> bool:
    """Whether an element is present and not empty, readable or not."""
    element = dataset.get_item(keyword)
    return element is not None and element.value not in (None, b"", "")


# --------------------------------------------------------------------------------------------------
# Pixels. The decisions about an image are appended to `notes`.

# A window is not used if it would make more than these shares of the image white, black, or either.
# Padding and the image's own darkest and brightest pixels do not count.
MOST_WHITE, MOST_BLACK, MOST_EITHER = 0.4, 0.6, 0.8


def read_dicom(file: Path, settings: ImageSettings) -> Reading:
    """A DICOM radiograph as it is meant to be seen, bone white.

    Mode L if the file has a window that can be used, else F. `settings` is not used; all readers
    have this signature. The rules, each with its note:

    - Bits above BitsStored are an overlay and are removed. But if the lower bits compensate for
      their changes, BitsStored is wrong, and they are part of the image.
    - Pixels that PixelRepresentation calls signed are unsigned if the image is smoother so.
    - An empty RescaleSlope is 1 and an empty RescaleIntercept 0. If one is no number, or the slope
      is 0, the pixels stay as they are stored.
    - The first VOI LUT is applied, or if there is none or it cannot be applied, the first window.
      A window needs a centre and a width of at least 1, or above 0 if its function is not LINEAR;
      an empty function is LINEAR.
    - A VOI LUT or window is not used if it would make most of the image white or black (MOST_WHITE
      and so on): it was made for other data.
    - MONOCHROME1 is stored bone black and is inverted. PresentationLUTShape does not count.
    - An image that PatientOrientation calls turned or mirrored is taken as it is stored.
    - Padding, which is PixelPaddingValue or lies between it and PixelPaddingRangeLimit, becomes as
      black as the darkest other pixel, unless it lies inside the image and not around it.

    DataError if everything is padding, or if the Modality LUT cannot be applied. Damaged pixel data
    may raise other exceptions, too."""
    dataset = open_dicom(file)
    if not dataset.get("PixelData") and not dataset.get("FloatPixelData"):
        raise DataError("there is no pixel data in it")
    notes: list[str] = []

    # The pixels of the radiograph, without overlays and padding.
    stored = stored_pixels(dataset)                                     # (H, W)
    stored = with_right_sign(stored, dataset, notes)                    # (H, W)
    raw = without_overlay(stored, dataset, notes)                       # (H, W)
    padding = padding_of(stored, raw, dataset, notes)                   # (H, W) bool
    if padding.all():
        raise DataError("all of it is padding")

    # The usual view has the patient's left on the right or is from the side, with the feet below.
    ways = [str(way)[:1].upper() for way in dataset.get("PatientOrientation") or ()]
    if len(ways) == 2 and all(ways) and not (ways[0] in "LAP" and ways[1] == "F"):
        notes.append("PatientOrientation not used: the image is turned or mirrored by it")

    # Which end is white. If two elements contradict, take the one that all programs read.
    inverse = dataset.PhotometricInterpretation == "MONOCHROME1"
    if dataset.get("PresentationLUTShape") == ("IDENTITY" if inverse else "INVERSE"):
        notes.append("PresentationLUTShape not used: it contradicts PhotometricInterpretation")
    levels = rescaled(raw, dataset, notes)                              # (H, W) float32
    plain = as_seen(levels, inverse, padding)                           # (H, W) float32

    # The first of table and window that can be used; else radiograph.finish uses percentiles.
    for name, apply in (("VOI LUT", apply_table), ("window", apply_window)):
        try:
            windowed = apply(levels, dataset)
            if windowed is None:
                continue
            seen = as_seen(windowed, inverse, padding)
            if not seen.min() < seen.max():
                raise DataError("it would have made all of the image one gray level")
            image = eight_bits(seen, (0, 100))
            check_saturation(np.asarray(image), plain, padding)
            return Reading(image, tuple(notes))
        except DataError as error:
            notes.append(f"{name} not used: {error}")
    return Reading(Image.fromarray(plain), tuple(notes))


def stored_pixels(dataset) -> np.ndarray:
    """The pixels (H, W) of a file as they are stored. DataError if they cannot be decoded."""
    there = len(dataset.get("PixelData") or b"")
    needed = dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8
    try:
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            check_frame(next(generate_frames(dataset.PixelData, number_of_frames=1)), dataset)
        elif 0 < there < needed:
            raise DataError(f"its pixels cannot be decoded: {there:,} of {needed:,} bytes are "
                            "there")
        pixels = pixel_array(dataset, correct_unused_bits=False)
        if pixels.ndim != 2:
            raise DataError(f"its pixels cannot be decoded: {there:,} bytes are there, and an "
                            f"image takes {needed:,}")
        return pixels
    except (AttributeError, NotImplementedError, RuntimeError, StopIteration, TypeError,
            ValueError) as error:
        raise DataError(f"its pixels cannot be decoded: {plain_words(error)}") from error


def check_frame(frame: bytes, dataset) -> None:
    """DataError if a compressed image itself says that it is in colour, or has another size than
    the header says: it would be decoded to noise."""
    try:
        with Image.open(io.BytesIO(frame)) as image:
            size, bands = image.size, len(image.getbands())
    except Image.UnidentifiedImageError:        # for example lossless JPEG, which Pillow lacks
        return
    if bands > 1:
        raise DataError("in colour, although its header says that it is gray")
    if size != (dataset.Columns, dataset.Rows):
        raise DataError(f"its image has {size[0]} x {size[1]} pixels, and its header says "
                        f"{dataset.Columns} x {dataset.Rows}")


def with_right_sign(stored: np.ndarray, dataset, notes: list[str]) -> np.ndarray:
    """Stored pixels (H, W), unsigned if PixelRepresentation wrongly calls them signed: the levels
    above the middle would become the darkest. `dataset` is corrected, too."""
    if stored.dtype.kind != "i" or stored.min() >= 0:
        return stored
    unsigned = stored.view(stored.dtype.str.replace("i", "u"))
    # If BitsStored is less than the bits allocated, the sign fills the bits above: nothing to tell.
    if dataset.BitsStored < 8 * stored.itemsize or roughness(unsigned) >= roughness(stored):
        return stored
    notes.append("PixelRepresentation not believed: without a sign the image is smoother")
    dataset.PixelRepresentation = 0
    return unsigned


def without_overlay(stored: np.ndarray, dataset, notes: list[str]) -> np.ndarray:
    """The stored pixels (H, W) without what is in bits that are not theirs."""
    bits, high = int(dataset.BitsStored), int(dataset.get("HighBit") or dataset.BitsStored - 1)
    if stored.dtype.kind not in "iu" or not 0 < bits <= high + 1 <= 8 * stored.itemsize:
        return stored
    # Shift up to the type's highest bit and down again, so that a signed number keeps its sign.
    total = 8 * stored.itemsize
    own = np.left_shift(stored, total - 1 - high) >> (total - bits)
    # With the bits in their usual place, anything above them may belong to the image.
    if high == bits - 1:
        if np.array_equal(own, stored):
            return stored
        if belong_together(stored, own):
            notes.append("BitsStored not believed: the image needs more bits")
            return stored
    notes.append("bits outside BitsStored removed: they hold no gray levels")
    return own


def belong_together(stored: np.ndarray, low: np.ndarray) -> bool:
    """Whether the high bits of the stored pixels (H, W) belong to the same image as the low bits.
    If so, the low bits compensate for a change of the high bits between neighbours, as from 255 to
    256. They do not for the graphics of an overlay."""
    both = stored.astype(np.float32)
    high = both - low
    steps_of_high = steps_of_both = 0.0
    for axis in (0, 1):
        steps = np.abs(np.diff(high, axis=axis))
        steps_of_high += float(steps.sum())
        steps_of_both += float(np.abs(np.diff(both, axis=axis))[steps > 0].sum())
    return steps_of_both < 0.8 * steps_of_high


def roughness(levels: np.ndarray) -> float:
    """The mean difference between neighbouring pixels in rows, plus that in columns."""
    levels = levels.astype(np.float32)
    return float(np.abs(np.diff(levels)).mean() + np.abs(np.diff(levels, axis=0)).mean())


def padding_of(stored: np.ndarray, raw: np.ndarray, dataset, notes: list[str]) -> np.ndarray:
    """Which pixels (H, W) are padding around the radiograph, by the header."""
    # One value, or a range whose ends may be in either order.
    first = number(dataset, "PixelPaddingValue")
    if first is None:
        return np.zeros(raw.shape, bool)
    last = number(dataset, "PixelPaddingRangeLimit")
    low, high = sorted([first, first if last is None else last])
    # A negative value may be written as an unsigned one, and the other way round.
    bits = int(dataset.BitsAllocated)
    ends = np.array([low, high])
    if dataset.PixelRepresentation == 1:
        ends = np.where(ends >= 2 ** (bits - 1), ends - 2**bits, ends)
    else:
        ends = np.where(ends < 0, ends + 2**bits, ends)
    # A value that does not fit into BitsStored bits is compared with the pixels as stored.
    pixels = raw if abs(ends).max() < 2 ** int(dataset.BitsStored) else stored
    padding = (pixels >= ends.min()) & (pixels <= ends.max())
    if padding.all() or not padding.any():
        return padding
    # Real padding has a larger share of the outermost pixels than of the others. A single level
    # below or above all others is believed wherever it is.
    outer = np.concatenate([padding[[0, -1]].ravel(), padding[:, [0, -1]].ravel()]).mean()
    inner = padding[1:-1, 1:-1].mean()
    others = pixels[~padding]
    at_an_end = low == high and (others.min() > ends.max() or others.max() < ends.min())
    if outer > inner or at_an_end:
        return padding
    notes.append("padding not believed: it lies inside the image")
    return np.zeros(raw.shape, bool)


def rescaled(raw: np.ndarray, dataset, notes: list[str]) -> np.ndarray:
    """Stored pixels (H, W) after the Modality LUT, or after slope and intercept, float32."""
    if dataset.get("ModalityLUTSequence"):
        try:
            return apply_modality_lut(raw, dataset).astype(np.float32)
        except Exception as error:      # a damaged table may make pydicom raise anything
            raise DataError("the Modality LUT cannot be applied") from error
    keywords = ("RescaleSlope", "RescaleIntercept")
    if not any(is_filled(dataset, keyword) for keyword in keywords):
        return raw.astype(np.float32)
    slope, intercept = (number(dataset, keyword) if is_filled(dataset, keyword) else default
                        for keyword, default in zip(keywords, (1.0, 0.0)))
    if not slope or intercept is None:
        notes.append("rescale not used: slope or intercept is no number, or the slope 0")
        return raw.astype(np.float32)
    return (raw.astype(np.float64) * slope + intercept).astype(np.float32)


def as_seen(levels: np.ndarray, inverse: bool, padding: np.ndarray) -> np.ndarray:
    """Gray levels (H, W) with bone white, and the padding as black as the darkest other pixel."""
    levels = levels.max() - levels if inverse else levels.copy()
    levels[padding] = levels[~padding].min()
    return levels


def apply_table(levels: np.ndarray, dataset) -> np.ndarray | None:
    """Levels (H, W) after the first VOI LUT, or None if there is none.

    DataError if it cannot be applied. Two workarounds for pydicom 3.0: the index into a table of
    8-bit values would wrap at 256, and a level beyond the table's end at 65536."""
    if not dataset.get("VOILUTSequence"):
        return None
    try:
        table = dataset.VOILUTSequence[0]
        entries, first, _ = table.LUTDescriptor
        table.LUTDescriptor = [entries, first, 16]
        return apply_voi(levels.clip(max=first + (entries or 2**16) - 1), dataset)
    except Exception as error:          # a damaged table may make pydicom raise anything
        raise DataError("it cannot be applied") from error


def apply_window(levels: np.ndarray, dataset) -> np.ndarray | None:
    """Levels (H, W) after the first window, float64, or None if there is none.

    DataError if it cannot be applied."""
    keywords = ("WindowCenter", "WindowWidth")
    if not any(is_filled(dataset, keyword) for keyword in keywords):
        return None
    # Half a window is not used: the number that was lost may have been any.
    center, width = (number(dataset, keyword) for keyword in keywords)
    if center is None or width is None:
        raise DataError("its centre or width is missing or no number")
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError("its VOI LUT Function is unknown")
    if width < 1 if function == "LINEAR" else width <= 0:
        raise DataError("its width is too small")

    # Only what pydicom's function needs. With a negative slope, which has been applied already, it
    # would invert the image once more.
    window = pydicom.Dataset()
    window.WindowCenter, window.WindowWidth, window.VOILUTFunction = center, width, function
    window.PhotometricInterpretation = dataset.PhotometricInterpretation
    window.PixelRepresentation, window.BitsStored = dataset.PixelRepresentation, dataset.BitsStored
    if dataset.get("ModalityLUTSequence"):
        window.ModalityLUTSequence = dataset.ModalityLUTSequence
    window.RescaleSlope, window.RescaleIntercept = 1, number(dataset, "RescaleIntercept") or 0
    return apply_windowing(levels, window)


def check_saturation(image: np.ndarray, plain: np.ndarray, padding: np.ndarray) -> None:
    """DataError if a window leaves most of an image (H, W) uint8 white or black.

    plain: (H, W), the levels without the window."""
    # The darkest and the brightest pixels may be black and white under any window.
    inner = ~padding & (plain > plain.min()) & (plain < plain.max())
    if not inner.any():
        return
    white, black = (image[inner] == 255).mean(), (image[inner] == 0).mean()
    if white > MOST_WHITE:
        raise DataError("it would have made most of the image white")
    if black > MOST_BLACK:
        raise DataError("it would have made most of the image black")
    if white + black > MOST_EITHER:
        raise DataError("it would have made most of the image white or black")


# --------------------------------------------------------------------------------------------------
# De-identification.

def coder(salt: Path) -> Callable[[str], str]:
    """A function text -> 16 hex digits, which say nothing to anyone without the file `salt`.

    A plain hash of a PatientID, a number of a few digits, is undone by trying all numbers. The
    secret is a file and not a flag, so that no list of processes shows it. It lies beside the data
    folder, so that it is not handed on with it. It is made if it is missing, and must be kept: with
    another secret the same patient becomes another one, and a run cannot be continued."""
    if not salt.exists():
        with open(os.open(salt, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(os.urandom(32))
    if not salt.is_file():                  # to read a pipe might never end
        raise DataError(f"--salt {salt} is no file")
    secret = salt.read_bytes()
    # A full disk may have left the file empty, and without a secret the hash can be undone.
    if len(secret) < 16:
        raise DataError(f"{salt} holds no secret: restore it, or delete it where no data folder "
                        "was made with it")
    return lambda text: hmac.new(secret, text.encode(), "sha256").hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# The source.

def dicom_flags(flag: Callable) -> None:
    flag("--modality", nargs="+", action=Several, default=["CR", "DX"],
         help="modalities to take; none: files without one (default: CR DX)")
    flag("--patient-from", choices=("header", "folder", "file"), default="header",
         help="one patient for each PatientID (or else StudyInstanceUID), folder, or file "
              "(default: header)")
    flag("--view", nargs="+", action=Several, metavar="VIEW",
         help="take only these, such as PA AP; none: files that say none (default: all)")
    flag("--body-part", nargs="+", action=Several, metavar="PART",
         help="take only these, such as CHEST; none: files that say none (default: all)")
    flag("--salt", type=Path,
         help="file of the secret for hashing identities, made if missing (default: OUT.salt)")
    flag("--labels", type=Path, help="CSV of labels")
    flag("--key", choices=(*KEYS, "file"),
         help="whose they are, by a header element or the file's name or path (default: "
              "PatientID)")
    flag("--key-column", metavar="COLUMN", help="its column of that (default: named as --key)")
    flag("--split-column", metavar="COLUMN",
         help="its column of train, val, test (default: split, if there is one)")
    label_flags(flag, "all other columns, which must hold values then")


def dicom_items(args: argparse.Namespace, files: list[str]) -> Source:
    """DICOM radiographs, de-identified.

    Nothing that names a person may enter the data folder: no header field, file name or path."""
    source, code = Source([]), coder(args.salt)
    table = read_label_table(args) if args.labels else None

    # The headers. A file that is not taken has a reason instead of an identity.
    identities = in_parallel(
        partial(read_identity, modalities=args.modality, max_megapixels=args.max_megapixels,
                patient_from=args.patient_from),
        [args.src / file for file in files], args.workers, "headers")
    # A study is of one person: a PatientID in one of its images is valid for those without.
    person_of = {identity.StudyInstanceUID: identity.PatientID for identity in identities
                 if isinstance(identity, Identity) and identity.PatientID}
    taken: dict[str, Identity] = {}                     # {file: its identity}
    rejected: dict[str, str] = {}                       # {file: reason}
    views, parts = Counter(), Counter()                 # of the images that are taken
    copies = reject_copies(dict(zip(files, identities, strict=True)), args)
    source.asked_for |= {COPY, DAMAGED_COPY}            # no image is lost
    for file, identity in zip(files, identities, strict=True):
        if isinstance(identity, str):
            rejected[file] = identity
            if is_no_radiograph(identity):
                source.asked_for.add(identity)
            continue
        if file in copies:
            source.rejected.append((file, copies[file]))
            continue
        view, part = view_of(identity.ViewPosition), body_part(identity.BodyPartExamined)
        why = not_asked_for(view, part, args)
        if why:
            rejected[file] = why
            source.asked_for.add(why)
            continue
        views[view or "none"] += 1
        parts[part or "none"] += 1
        if identity.StudyInstanceUID and not identity.PatientID:
            person = person_of.get(identity.StudyInstanceUID, "")
            identity = identity._replace(PatientID=person)
        image = identity.SOPInstanceUID or f"file {file}"
        taken[file] = identity
        patient = code(patient_text(identity, file, args.patient_from))
        study = identity.StudyInstanceUID
        source.items.append(Item(
            file, f"images/{patient}/{code(image)}.jpg", patient, split="", labels=(),
            study=code(study) if study else "", view=view))
    source.rejected += rejected.items()
    for what, flag_name, counts in (("Views", "view", views), ("Body parts", "body-part", parts)):
        if len(counts) > 1 or not counts.keys() <= {"AP", "PA", "CHEST", "none"}:
            texts = [f"{word} {count:,}" for word, count in counts.most_common()]
            source.notes.append(f"{what} by the headers: {', '.join(texts)}. --{flag_name} takes "
                                "some of them.")

    if table and taken:                                 # without any, check_source says why
        label_items(source, args, table, taken, rejected)
    if args.patient_from == "header":
        source.doubts += similar_ids(taken, table if args.key == "PatientID" else None)
        say_unnamed(source, taken)
    else:
        source.notes.append(patient_note(taken, args.patient_from))
    doubt_folders(source, args)
    return source


def doubt_folders(source: Source, args: argparse.Namespace) -> None:
    """Add notes and doubts about folders whose names seem to say splits, labels or patients. They
    are not read."""
    folders = {PurePosixPath(item.source).parent for item in source.items}
    words = {word for folder in folders for word in folder.parts}
    splits = sorted(word for word in words if split_name(word))
    if len(set(map(split_name, splits))) > 1 and not any(item.split for item in source.items):
        source.doubts.append(Doubt(
            "unused-splits", f"folders of {args.src} are called {' and '.join(splits[:3])}, and "
            "are not read: a column split of --labels takes the splits"))
    findings = [word for word in words if FINDINGS.search(word.casefold()) and word not in splits]
    groups = folders_of_groups(source.items)
    if len(findings) > 1 and not args.labels:
        source.notes.append("Folders that are named by findings, as it seems, are not taken for "
                            f"labels: {len(findings):,}. --labels takes a table of them.")
    elif groups and not args.labels:
        source.notes.append("Folders that hold several patients each, as classes do, are not taken "
                            f"for labels: {groups:,}. --labels takes a table of them.")
    names = {folder.name for folder in folders}
    if args.patient_from == "folder" and 2 * len(names) <= len(folders):
        one = min(map(str, folders))
        source.doubts.append(Doubt(
            "unknown-patients", f"{len(folders):,} folders have {len(names):,} names, as though "
            f"they were studies of the folders above them, and --patient-from folder takes each, "
            f"such as {one}, for a patient"))


def folders_of_groups(items: list[Item]) -> int:
    """How many names of folders may be classes: those of the first level, below splits, that tells
    images apart, if most hold several patients each and none is a portion such as part1."""
    parents = [PurePosixPath(item.source).parts[:-1] for item in items]
    level = first_telling(parents, 0)
    if are_splits(names_at(parents, level)):
        level = first_telling(parents, level + 1)
    patients_of: dict[tuple[str, ...], set[str]] = {}   # by folder
    for folders, item in zip(parents, items, strict=True):
        if len(folders) > level:
            patients_of.setdefault(folders[:level + 1], set()).add(item.patient)
    several = sum(len(patients) > 1 for patients in patients_of.values())
    names = sorted({folders[-1] for folders in patients_of})
    odd = names_without_meaning(names)
    return len(names) if len(names) > 1 and 2 * several > len(patients_of) and not odd else 0


def not_asked_for(view: str, part: str, args: argparse.Namespace) -> str:
    """Why an image is not taken by --view or --body-part, or ""."""
    for what, word, wanted in (("view", view, args.view), ("body part", part, args.body_part)):
        words = [name.upper() for name in wanted or ()]
        if wanted and (word or "NONE") not in words:
            return f"{what} {word or 'not said'}, not {' or '.join(words)}"
    return ""


def is_no_radiograph(why: str) -> bool:
    """Whether a reason to leave a file out means that it is not an image that was asked for."""
    return why == NO_DICOM or why.startswith(("modality ", "not an image", "FOR PROCESSING"))


def reject_copies(identities: dict[str, Identity | str],
                  args: argparse.Namespace) -> dict[str, str]:
    """{file: reason} of the files that are not taken because another file has their SOPInstanceUID.

    Of such files the first whose pixels can be read is taken."""
    files_of: dict[str, list[str]] = {}                 # by SOPInstanceUID
    for file, identity in identities.items():
        if isinstance(identity, Identity) and identity.SOPInstanceUID:
            files_of.setdefault(identity.SOPInstanceUID, []).append(file)
    several = [files for files in files_of.values() if len(files) > 1]
    if not several:
        return {}
    # Only these files are decoded here, to compare them.
    files = [file for files in several for file in files]
    settings = ImageSettings(stretch=args.stretch and tuple(args.stretch),
                             max_megapixels=args.max_megapixels, masks="masks" in args.allow)
    digests = dict(zip(files, in_parallel(
        partial(pixel_digest, settings=settings), [args.src / file for file in files],
        args.workers, "copies"), strict=True))
    rejected = {}
    for files in several:
        best = next((file for file in files if digests[file]), files[0])
        for file in files:
            if file != best:
                same = digests[file] == digests[best]
                rejected[file] = COPY if same else OTHER_IMAGE if digests[file] else DAMAGED_COPY
    return rejected


def pixel_digest(file: Path, settings: ImageSettings) -> bytes:
    """A digest of the image; b"" if it cannot be read. Runs in a process of a pool."""
    try:
        image = load_image(file, read_dicom, settings).image
    except DataError:
        return b""
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes()).digest()


def read_label_table(args: argparse.Namespace) -> Table:
    """--labels, its rows named by the column of keys."""
    columns = [*args.label_columns, *args.class_columns]
    if columns:
        columns += filter(None, [args.rater_column, args.split_column or "split"])
    table = read_table(args.labels, args.key_column or args.key,
                       list(dict.fromkeys(columns)) or None,
                       () if args.split_column else {"split"},
                       normalise=plain_name_of if args.key == "file" else str,
                       several=bool(args.several_rows),
                       hint="; --several-rows says how several rows become one",
                       flag="--key-column")
    for name in filter(None, [args.rater_column, args.split_column]):
        if name not in table.columns:
            raise DataError(f"{args.labels} must have one column {name!r}, "
                            f"its header is {','.join(table.header)!r}")
    return table


def label_items(source: Source, args: argparse.Namespace, table: Table,
                taken: dict[str, Identity], rejected: dict[str, str]) -> None:
    """Give each item of the source the labels of its row in the table.

    DataError if no row has the key of a file, or if a name for --key file fits several files."""
    if args.key == "file":
        key_of = keys_by_path(table, list(taken))
    else:
        key_of = {file: getattr(identity, args.key) for file, identity in taken.items()}
    files_of: dict[str, list[str]] = {}                 # by key
    for file, key in key_of.items():
        files_of.setdefault(key, []).append(file)

    # Rows without an image are rejected. If that is all rows, the key is the wrong one.
    found = [key for key in table.rows if key in files_of]
    if not found:
        alike = set(map(patient_key, table.rows)) & set(map(patient_key, files_of))
        form = ", though some differ in form only, as 7.0 and 007 do" if alike else ""
        raise DataError(f"{args.labels}: no {args.key} in it is that of a DICOM file in {args.src}"
                        f"{form}")
    elsewhere = f"{args.key} in {args.labels.name}, in no DICOM file"
    source.rejected += [(key, elsewhere) for key in table.rows if key not in files_of]
    source.asked_for.add(elsewhere)
    if args.key == "file":
        refuse_namesakes(args, found, files_of, rejected)

    # Unless the user names the column, words might be names of persons.
    columns, split_column = [*args.label_columns, *args.class_columns], args.split_column or "split"
    if columns:
        source.label_names, labels, notes = understand(table, columns, found, label_rules(args))
        source.classes = set(source.label_names) - set(columns)
    else:
        columns = [name for name in table.columns if name not in (args.rater_column, split_column)]
        source.label_names, labels, notes = read_labels(
            table, columns, args.several_rows, args.rater_column,
            hint="; choose such columns by --label-columns, columns of classes by --class-columns, "
                 "and that of the splits by --split-column", shown=False)
        source.doubts += unused_splits(table, {
            name: [cell for cell in table.column(name).values() if cell] for name in columns})
    source.notes += notes
    nothing = ("",) * len(source.label_names)
    splits = table.column("" if split_column in columns else split_column)
    check_patients_and_splits(table, found, "", split_column if splits else "")
    for item in source.items:
        key = key_of[item.source]
        item.labels, item.split = labels.get(key, nothing), split_name(splits.get(key, ""))
    doubt_classes(source, said=False)
    key_column = args.key_column or args.key
    used = {*columns, args.rater_column, key_column, split_column if splits else ""}
    doubt_unused_splits(source, table, key_column,
                        [name for name in table.header if name and name not in used], found,
                        plain_name_of if args.key == "file" else str)
    source.notes.append(rows_note(taken, key_of, set(found), args.key))


def refuse_namesakes(args: argparse.Namespace, found: list[str], files_of: dict[str, list[str]],
                     rejected: dict[str, str]) -> None:
    """DataError if a row's file name fits two files, as IM0001.dcm may be in every folder.

    files_of: the files that are taken, by key. A rejected file counts as well if it may be meant,
    such as a CT or a damaged file of this name, but not a text file."""
    others = that_end_alike(found, {
        file: plain_name_of(file) for file, why in rejected.items() if why != NO_DICOM})
    for key in sorted(found):
        other = next(iter(others[key]), "")
        count = len(files_of[key]) + bool(other)
        if count > 1:
            also = ""
            if other:
                also = f", also from {other}, which is not taken: {rejected[other]}"
            raise DataError(f"{args.labels}: {count:,} files in {args.src} are called {key}: "
                            f"--key file needs names that differ{also}")


def rows_note(taken: dict[str, Identity], key_of: dict[str, str], found: set[str],
              key: str) -> str:
    """How many images have no row, and which rows label several images, for DATA.md."""
    without = sum(key_of[file] not in found for file in taken)
    note = f"Images without a row of labels: {without:,}; nothing is mentioned for them."
    studies_of: dict[str, list[str]] = {}               # by row, the studies of its images
    for file, identity in taken.items():
        if key_of[file] in found:
            studies_of.setdefault(key_of[file], []).append(identity.StudyInstanceUID)
    several = sum(len(studies) > 1 for studies in studies_of.values())
    if several:
        article = "an" if key.startswith("A") else "a"
        note += (f" A row is of {article} {key} and labels all its images: {several:,} rows label "
                 "several")
        if key == "PatientID":
            apart = sum(len(set(studies)) > 1 for studies in studies_of.values())
            note += f", {apart:,} of them several studies, whose findings may differ"
        note += "."
    return note


def say_unnamed(source: Source, taken: dict[str, Identity]) -> None:
    """Add a note on images without a PatientID, and a doubt if other images have one."""
    unnamed = [file for file, identity in taken.items() if not identity.PatientID]
    if not unnamed:
        return
    source.notes.append(f"Images without a PatientID: {len(unnamed):,} of {len(taken):,}. There "
                        "each study (StudyInstanceUID) counts as a patient.")
    if len(unnamed) < len(taken):
        source.doubts.append(Doubt(
            "unknown-patients", f"{len(unnamed):,} of {len(taken):,} images, such as {unnamed[0]}, "
            "have no PatientID, where each study would count as a patient: one person may come "
            "into two splits; --patient-from folder takes one patient a folder"))


def similar_ids(taken: dict[str, Identity], table: Table | None) -> list[Doubt]:
    """A doubt if PatientIDs, or those of a table of labels, differ in form only.

    It names files and rows, because an identity must not get into a log."""
    places: dict[str, str] = {}                         # by PatientID
    for file, identity in taken.items():
        if identity.PatientID:
            places.setdefault(identity.PatientID, file)
    # Of the table, only the PatientIDs that may be meant for one of the files.
    if table:
        forms = set(map(patient_key, places))
        for key, row in table.rows.items():
            if patient_key(key) in forms:
                places.setdefault(key, f"{table.file.name}, row {row.number}")
    alike = patients_alike(places)
    more = f", and {len(alike) - 1:,} more pairs" if len(alike) > 1 else ""
    return [Doubt("similar-patients", f"the PatientIDs of {places[one]} and {places[other]} differ "
                  f"in form only, as 7 and 007 do{more}: write each patient in one way")
            for one, other in alike[:1]]


def keys_by_path(table: Table, files: list[str]) -> dict[str, str]:
    """{file: its key} for --key file: the row's if one path ends with the other, else its own path.
    DataError if two rows may mean one file."""
    path_of, key_of = {file: plain_name_of(file) for file in files}, {}
    keys_of = that_end_alike(path_of.values(), {key: key for key in table.rows})
    for file, path in path_of.items():
        keys = keys_of[path]
        if len(keys) > 1:
            numbers = " and ".join(str(table.rows[key].number) for key in keys[:2])
            raise DataError(f"{table.file}, rows {numbers}: both may name {file}")
        key_of[file] = keys[0] if keys else path
    return key_of


def plain_name_of(file: str) -> str:
    """A path in the form that --key file compares: with slashes, without the suffix of an image."""
    path = PurePosixPath(plain_path(file)) if file else PurePosixPath()
    return str(path.with_name(without_suffix(str(path)))) if path.name else ""


def without_suffix(file: str) -> str:
    """The name of a file without folders and suffix. `1.2.840.5` is a name without a suffix."""
    name = PurePosixPath(file).name
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in (*SUFFIXES, *EXTENSIONS) else name


def patient_text(identity: Identity, file: str, patient_from: str) -> str:
    """The text that tells one patient from another, before hashing. file: relative to --src."""
    if patient_from == "folder":
        return f"folder {PurePosixPath(file).parent}"
    if patient_from == "file":
        return f"file {file}"
    # A study is of one person. It is all that is left if the PatientID was blanked.
    return identity.PatientID or identity.StudyInstanceUID


def patient_note(taken: dict[str, Identity], patient_from: str) -> str:
    """What --patient-from did, for DATA.md."""
    patients_of: dict[str, set[str]] = {}               # by PatientID
    for file, identity in taken.items():
        patient = patient_text(identity, file, patient_from)
        patients_of.setdefault(identity.PatientID, set()).add(patient)
    parted = sum(len(patients) > 1 for name, patients in patients_of.items() if name)
    note = f"A patient is a {patient_from} (--patient-from {patient_from})"
    if parted:
        note += (f". PatientIDs of headers that are several patients now: {parted:,}. If they name "
                 "real persons, one and the same may be in two splits")
    return note + "."
