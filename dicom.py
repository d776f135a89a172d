"""DICOM radiographs: which files are taken, who they are of, and how they are meant to be seen.

Nothing of a header goes on into a data folder but a keyed hash of who and which image it is. All
that touches an identity stands in this file.
"""
import argparse
import hmac
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from manifest import DataError
from radiograph import ImageSettings, eight_bits, in_parallel, reason
from sources import Item, Source, read_labels, read_table


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
        check_header(header, modalities, max_megapixels)
        identity = Identity(*(str(header.get(name) or "").strip() for name in Identity._fields))
        if not identity.SOPInstanceUID or not (identity.PatientID or identity.StudyInstanceUID):
            raise DataError("SOPInstanceUID is missing, or both PatientID and StudyInstanceUID are")
        return identity
    except InvalidDicomError:
        return "not a DICOM file"
    except Exception as error:          # a damaged header may make pydicom raise anything
        return reason(error)


def check_header(header, modalities: Sequence[str], max_megapixels: float) -> None:
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


# --------------------------------------------------------------------------------------------------
# The source.

def dicom_flags(flag: Callable) -> None:
    flag("--modality", nargs="+", default=["CR", "DX"], help="modalities to take (default: CR DX)")
    flag("--salt", type=Path,
         help="file of the secret for hashing identities, made if missing (default: OUT.salt)")
    flag("--labels", type=Path, help="CSV of labels")
    flag("--key", choices=Identity._fields, default="PatientID",
         help="its column that says whose (default: PatientID)")
    flag("--label-columns", nargs="+", default=[], metavar="COLUMN",
         help="its labels (default: all other columns)")


def dicom_items(args: argparse.Namespace, files: list[str]) -> Source:
    """DICOM radiographs, de-identified.

    Nothing that names a person may enter the data folder: no header field, file name or path."""
    source, code = Source([]), coder(args.salt)

    # The labels, by PatientID or another of the keys.
    label_keys, labels = set(), {}
    if args.labels:
        table = read_table(args.labels, args.key, args.label_columns or None)
        label_keys = set(table.rows)
        source.label_names, labels = read_labels(table, table.columns)
        if source.label_names != table.columns:         # a column of words might be one of names
            raise DataError(f"{args.labels} must hold 1, 0, -1 or blanks: choose such columns "
                            "by --label-columns")

    # The headers. A file that is not taken has a reason in place of an identity.
    identities = in_parallel(
        partial(read_identity, modalities=args.modality, max_megapixels=args.max_megapixels),
        [args.src / file for file in files], args.workers, "headers")
    images, keys = set(), set()
    for file, identity in zip(files, identities, strict=True):
        if isinstance(identity, str):
            source.rejected.append((file, identity))
            continue
        if identity.SOPInstanceUID in images:
            source.rejected.append((file, "SOPInstanceUID of an earlier file"))
            continue
        images.add(identity.SOPInstanceUID)
        key = getattr(identity, args.key)
        keys.add(key)
        # A study is of one person. Where the PatientID was blanked that is all there is to go by.
        patient = code(identity.PatientID or identity.StudyInstanceUID)
        source.items.append(Item(
            file, f"images/{patient}/{code(identity.SOPInstanceUID)}.jpg", patient, split="",
            labels=labels.get(key, ("",) * len(source.label_names))))

    # Labels of images that are not there. If that is all of them, the key is the wrong one.
    if label_keys and not keys & label_keys:
        raise DataError(f"{args.labels}: no {args.key} in it is that of a DICOM file in {args.src}")
    source.rejected += [(key, f"{args.key} in {args.labels.name}, in no DICOM file")
                        for key in label_keys - keys]
    return source
