"""DICOM radiographs: which files are taken, who they are of, and how they are meant to be seen.

prepare.py hands nothing of a header on but a keyed hash of who and which image it is. The hash
is made here (`coder`), so that all that touches an identity stands in one file.
"""
import hmac
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from manifest import DataError
from radiograph import ImageSettings, eight_bits, reason


class Identity(NamedTuple):
    """The elements that say who, which examination and which image, by their DICOM keywords."""
    PatientID: str
    StudyInstanceUID: str
    SOPInstanceUID: str


# --------------------------------------------------------------------------------------------------
# Headers.

def read_identity(file: Path, modalities: Sequence[str], max_megapixels: float) -> Identity | str:
    """The Identity of a radiograph, or the reason why the file is not taken.

    The pixels are not read. A reason is returned and not raised, because a folder of DICOM files
    holds much that is no radiograph."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        _check_header(header, modalities, max_megapixels)
        identity = Identity(*(str(header.get(name) or "").strip() for name in Identity._fields))
        if not identity.SOPInstanceUID or not (identity.PatientID or identity.StudyInstanceUID):
            raise DataError("SOPInstanceUID is missing, or both PatientID and StudyInstanceUID are")
        return identity
    except InvalidDicomError:
        return "not a DICOM file"
    except Exception as error:          # a damaged header may make pydicom raise anything
        return reason(error)


def _check_header(header, modalities: Sequence[str], max_megapixels: float) -> None:
    """DataError for whatever is not one gray radiograph of moderate size without writing in it."""
    if "Rows" not in header:
        raise DataError(f"not an image ({header.file_meta.MediaStorageSOPClassUID.name})")
    if header.get("Modality") not in modalities:
        raise DataError(f"modality {header.get('Modality')}, not {' or '.join(modalities)}")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise DataError(f"{header.NumberOfFrames} frames")
    if header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(f"in colour ({header.PhotometricInterpretation})")
    if header.Rows * header.Columns > max_megapixels * 1e6:
        raise DataError(f"{header.Columns} x {header.Rows} pixels are more than --max-megapixels")
    if header.get("BurnedInAnnotation") == "YES":
        raise DataError("BurnedInAnnotation is YES: a name may be written into the image")


# --------------------------------------------------------------------------------------------------
# Pixels.

def read_dicom(file: Path, settings: ImageSettings) -> Image.Image:
    """A DICOM radiograph as it is meant to be seen, bone white.

    Mode L where the file brings its window, else F. `settings` decides nothing here; it is there
    because all readers are called alike."""
    dataset = pydicom.dcmread(file)
    raw = dataset.pixel_array                                           # (H, W) as stored
    levels = apply_modality_lut(raw, dataset).astype(np.float32)        # (H, W)

    # The window, as a table or as centre and width. Twice around pydicom 3.0: a negative slope,
    # by now applied, would turn the image into its negative once more; and the index into a
    # table of 8-bit values would wrap at 256.
    tables = dataset.get("VOILUTSequence") or []
    window = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    windowed = bool(tables) or None not in window
    if windowed:
        dataset.RescaleSlope = 1
        for table in tables:
            table.LUTDescriptor = [*table.LUTDescriptor[:2], 16]
        levels = apply_voi_lut(levels, dataset)

    if dataset.PhotometricInterpretation == "MONOCHROME1":              # stored bone black
        levels = levels.max() - levels
    # The padding around the radiograph becomes as black as its darkest pixel.
    if "PixelPaddingValue" in dataset:
        padding = raw == dataset.PixelPaddingValue
        levels[padding] = levels[~padding].min()
    return eight_bits(levels, (0, 100)) if windowed else Image.fromarray(levels)


# --------------------------------------------------------------------------------------------------
# De-identification.

def coder(salt: Path) -> Callable[[str], str]:
    """text -> 16 hex digits that tell nothing to anyone without the file `salt`.

    A plain hash of a PatientID, a number of a few digits, is undone by trying them all. The secret
    is a file and not a flag, so that no list of processes shows it. It lies beside the data folder,
    so as not to be handed on with it. It is made where it is missing and has to stay: with another
    one the same patient is another patient, and a run cannot be continued."""
    if not salt.exists():
        with open(os.open(salt, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(os.urandom(32))
    secret = salt.read_bytes()
    # A full disk may have left the file empty, and a hash without a secret is no secret.
    if len(secret) < 16:
        raise DataError(f"{salt} holds no secret: restore it, or delete it where no data folder "
                        "was made with it")
    return lambda text: hmac.new(secret, text.encode(), "sha256").hexdigest()[:16]
