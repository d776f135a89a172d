"""Stage 0: any source of chest radiographs -> one data folder, the only thing that the later stages read.

    python prepare.py folder   --src chest_xray --out data/kermany          # class folders, and an optional CSV
    python prepare.py nih      --src NIH --out data/nih                     # ChestX-ray14 as downloaded and unpacked
    python prepare.py chexpert --src CheXpert-v1.0-small --out data/chexpert
    python prepare.py dicom    --src archive --out data/hospital            # de-identified on the way
    python prepare.py verify   data/nih                                     # decode all of it once more

A source is a function that says which image becomes which row of the manifest: patient, split, labels. From there on
all sources are alike. Every image is decoded once, by a pool of processes, and becomes an 8-bit gray JPEG whose shorter
side is --size (a smaller image keeps its size: enlarging adds bytes and no information). What cannot be decoded, or has
no sure label, is left out and listed in rejected.csv with the reason. manifest.csv is written last: a folder that has
one is complete. An interrupted run is continued by the same command.
"""
import argparse
import csv
import ctypes
import fcntl
import hashlib
import hmac
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import numpy as np
import pydicom
from PIL import Image, ImageOps
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from tqdm import tqdm

from dali_pipeline import LABEL_VALUES, SPLITS, DataError, read_manifest

FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP", "GIF")             # all that Pillow may try to open
EXTENSIONS = {".png", ".jpg", ".jpeg", ".jp2", ".tif", ".tiff", ".bmp", ".pgm", ".ppm", ".webp", ".gif"}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CELLS = {cell: cell.removesuffix(".0") for cell in LABEL_VALUES}    # as found in CSV files -> as the manifest has them
DEEP = (0.5, 99.5)      # percentiles that become black and white where 9 to 16 bits come without a window
NIH_FINDINGS = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
                "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", "No Finding")
CHEXPERT_OBSERVATIONS = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
                         "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
                         "Pleural Other", "Fracture", "Support Devices")
DICOM_KEYS = ("path", "SOPInstanceUID", "StudyInstanceUID", "PatientID")    # what --labels may go by, the finest first
MIN_SIDE = 32           # pixels; anything smaller is an icon
MIN_RANGE = 16          # gray levels; an image with fewer is blank, or 12-bit data taken for 16


@dataclass(slots=True)
class Item:
    """One image on its way into the data folder, and its row of the manifest."""
    source: str                     # what the source's `read` is given: a file below --src
    path: str                       # images/….jpg in the data folder
    patient: str
    split: str                      # train, val, test, or "" where the source does not say
    labels: tuple[str, ...] = ()    # "1", "0", "-1" or "", one for each of Source.label_names


@dataclass
class Source:
    """What a source found."""
    label_names: list[str]
    items: list[Item] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)      # source file, reason
    notes: list[str] = field(default_factory=list)                     # sentences that the reader has to know


# ----------------------------------------------------------------------------------------------------------------------
# Files and tables.

def find_files(src: Path) -> list[str]:
    """All files below `src` as sorted relative paths; hidden ones (.DS_Store, ._x.png, __MACOSX) do not count."""
    def fail(error):
        raise error                 # os.walk would pass over a folder that cannot be read

    files = []
    for folder, folders, names in os.walk(src, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        folder = os.path.relpath(folder, src)
        files += [os.path.normpath(os.path.join(folder, name)) for name in names if not name.startswith(".")]
    return sorted(files)


def read_table(file: Path, columns: list[str] | None = None) -> Iterator[tuple[int, list[str]]]:
    """Yield (row, cells of `columns`, or all cells) of a CSV file, the header's row 1 first where all are wanted.

    Blanks around a cell, a byte-order mark and CRLF do not matter. DataError names the file and the row or column."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            rows = csv.reader(f)
            header = [name.strip() for name in next(rows, [])]
            for name in columns or []:
                if header.count(name) != 1:
                    raise DataError(f"{file} must have one column {name!r}, its header is {','.join(header)!r}")
            if columns is None:
                yield 1, header
            places = range(len(header)) if columns is None else [header.index(name) for name in columns]
            for number, row in enumerate(rows, 2):
                if row and len(row) != len(header):
                    raise DataError(f"{file}, row {number}: {len(row)} cells where the header has {len(header)}")
                if row:
                    yield number, [row[place].strip() for place in places]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a CSV file in UTF-8 ({error})") from None


def jpeg_path(file: str) -> str:
    """Where a source's file goes in the data folder. A name in another encoding must not break the manifest's UTF-8."""
    return "images/" + os.fsencode(PurePosixPath(file).with_suffix(".jpg")).decode(errors="replace")


def write(file: Path, data: str | bytes) -> None:
    """All of `data` or nothing: into a temporary file first, which then takes the name."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def csv_text(rows: Iterable) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="backslashreplace").decode()


# ----------------------------------------------------------------------------------------------------------------------
# Source: class folders, with an optional CSV.

def folder_items(args: argparse.Namespace, files: list[str]) -> Source:
    """[train|val|test/]class/….png -> items; with --csv its rows decide about patient, split and labels.

    DataError for a CSV whose columns, splits or labels cannot be understood."""
    images = [file for file in files if PurePosixPath(file).suffix.lower() in EXTENSIONS]
    others = Counter(PurePosixPath(file).suffix or PurePosixPath(file).name for file in set(files) - set(images))
    with_splits = any(PurePosixPath(file).parts[0].lower() in SPLIT_NAMES for file in images)
    splits, classes = {}, {}
    for file in images:
        folders, splits[file] = list(PurePosixPath(file).parts[:-1]), ""
        if with_splits:             # None: beside the split folders, so in none of them
            splits[file] = SPLIT_NAMES.get(folders.pop(0).lower()) if folders else None
        classes[file] = folders[0] if folders else ""
    shared = Counter(map(jpeg_path, images))        # x.png beside x.jpg: both keep the suffix, as x.png.jpg
    source = Source(sorted(set(classes.values()) - {""}))
    if others:
        source.notes.append(f"Not images: {', '.join(f'{count} {kind}' for kind, count in sorted(others.items()))}.")

    table = read_labels(args, source) if args.csv else dict.fromkeys(images, (None, None, None))
    if not any(patient for patient, _, _ in table.values()):
        source.notes.append("No patient is known: every image counts as a patient of its own.")
    for file in images:
        if file not in table:
            source.rejected.append((file, f"not in {args.csv.name}"))
            continue
        patient, split, labels = table[file]
        if labels is None:          # one class, all others absent; unknown for an image in no class folder
            labels = one_hot(classes[file], source.label_names)
        if split is None and splits[file] is None:
            source.rejected.append((file, "outside the folders train, val and test"))
        else:
            path = jpeg_path(file if shared[jpeg_path(file)] == 1 else file + ".jpg")
            source.items.append(Item(file, path, patient or path, splits[file] if split is None else split, labels))
    source.rejected += [(file, f"named in {args.csv.name}, missing on disk") for file in table.keys() - set(images)]
    return source


def read_labels(args: argparse.Namespace, source: Source) -> dict[str, tuple]:
    """--csv as {file: (patient, split, labels)}, each None where there is no such column; sets source.label_names."""
    _, header = next(read_table(args.csv))
    patient_column = args.patient_column or ("patient" if "patient" in header else None)
    split_column = args.split_column or ("split" if "split" in header else None)
    extra = [column for column in (patient_column, split_column) if column]
    rows, table = read_keyed(args.csv, args.path_column, extra + args.label_columns), {}
    labels = {}
    if args.label_columns:
        source.label_names, labels = label_columns(args.csv, args.label_columns, {
            number: cells[len(extra):] for number, cells in rows.values()})
    for file, (number, cells) in rows.items():
        row = dict(zip(extra, cells, strict=False))
        patient, split = row.get(patient_column), row.get(split_column)
        if patient == "":
            raise DataError(f"{args.csv}, row {number}, column {patient_column}: empty, so he may be in two splits")
        if split and split.lower() not in SPLIT_NAMES:
            raise DataError(f"{args.csv}, row {number}, column {split_column}: {split!r} is none of {', '.join(SPLITS)}")
        file = os.path.normpath(file.replace("\\", "/"))
        table[file] = patient, split and SPLIT_NAMES[split.lower()], labels.get(number)
    return table


def read_keyed(file: Path, key: str, columns: list[str]) -> dict[str, tuple[int, list[str]]]:
    """A CSV as {cell of the key column: (row, cells of `columns`)}; DataError where a key comes twice."""
    rows = {}
    for number, (value, *cells) in read_table(file, [key, *columns]):
        if value in rows:
            raise DataError(f"{file}, row {number}, column {key}: {value} is already in row {rows[value][0]}")
        rows[value] = number, cells
    return rows


def label_columns(file: Path, columns: list[str], rows: dict[int, list[str]]) -> tuple[list[str], dict[int, tuple]]:
    """{row: cells of label columns} -> manifest label names, and {row: manifest cells}.

    A column of 1, 0, -1 and blanks is a label. A column of names, say of diseases, becomes one label a name, where a
    blank leaves them all open. A column that mixes both has a typing error in it: DataError names the row."""
    label_names, labels = [], dict.fromkeys(rows, ())
    for place, column in enumerate(columns):
        values = {cells[place] for cells in rows.values()} - {""}
        strange = values - CELLS.keys()
        if strange and strange != values:
            number, value = next((number, cells[place]) for number, cells in rows.items() if cells[place] in strange)
            raise DataError(f"{file}, row {number}, column {column}: {value!r} among values of 1, 0, -1 and blank")
        names = sorted(strange)
        label_names += (names if len(columns) == 1 else [f"{column} {name}" for name in names]) or [column]
        for number, cells in rows.items():
            labels[number] += one_hot(cells[place], names) if names else (CELLS[cells[place]],)
    return label_names, labels


def one_hot(name: str, names: list[str]) -> tuple[str, ...]:
    """Present for the one, absent for the others; all open where there is none."""
    return tuple(("1" if name == other else "0") if name else "" for other in names)


# ----------------------------------------------------------------------------------------------------------------------
# Source: NIH ChestX-ray14.

def nih_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Data_Entry_2017*.csv, the two official lists, and PNGs anywhere below --src (images/, images_001/images/, …)."""
    tables = list(args.src.glob("Data_Entry_2017*.csv"))
    if len(tables) != 1:
        raise DataError(f"{args.src} must hold one Data_Entry_2017*.csv, it holds {len(tables)}")
    splits = {}
    for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        for image in (args.src / name).read_text().split():
            if splits.setdefault(image, split) != split:
                raise DataError(f"{image} is in both train_val_list.txt and test_list.txt of {args.src}")
    on_disk = {PurePosixPath(file).name: file for file in files if file.endswith(".png")}
    source, known = Source(list(NIH_FINDINGS)), set()
    for number, (image, findings, patient) in read_table(tables[0], ["Image Index", "Finding Labels", "Patient ID"]):
        present = set(findings.split("|"))
        if not present <= set(NIH_FINDINGS) or image in known:
            raise DataError(f"{tables[0]}, row {number}: {image} {'again' if image in known else findings!r}")
        known.add(image)
        if image not in on_disk:
            source.rejected.append((image, f"named in {tables[0].name}, missing on disk"))
        elif image not in splits:
            source.rejected.append((on_disk[image], "neither in train_val_list.txt nor in test_list.txt"))
        else:
            labels = tuple("1" if name in present else "0" for name in NIH_FINDINGS)
            source.items.append(Item(on_disk[image], jpeg_path(image), patient, splits[image], labels))
    source.rejected += [(on_disk[image], f"not in {tables[0].name}") for image in on_disk.keys() - known]
    return source


# ----------------------------------------------------------------------------------------------------------------------
# Source: CheXpert.

def chexpert_items(args: argparse.Namespace, files: list[str]) -> Source:
    """train.csv and valid.csv of CheXpert-v1.0 or -small; valid is the test split, as the real one is not public.

    1, 0, -1 and blank stay what they are; what to make of -1 is for the training to decide."""
    on_disk = {file for file in files if PurePosixPath(file).suffix.lower() in EXTENSIONS}
    source, known, lateral = Source(list(CHEXPERT_OBSERVATIONS)), set(), 0
    for name, split in (("train.csv", "train"), ("valid.csv", "test")):
        table = args.src / name
        for number, (path, view, *cells) in read_table(table, ["Path", "Frontal/Lateral", *CHEXPERT_OBSERVATIONS]):
            # CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
            match = re.fullmatch(r"[^/]+/((?:train|valid)/(patient\d+)/.+)", path)
            if not match or match[1] in known or not CELLS.keys() >= set(cells):
                raise DataError(f"{table}, row {number}: {path} comes twice, or has another form of path or labels")
            known.add(match[1])
            if view != "Frontal" and not args.all_views:
                lateral += 1
            elif match[1] not in on_disk:
                source.rejected.append((path, f"named in {name}, missing on disk"))
            else:
                labels = tuple(CELLS[cell] for cell in cells)
                source.items.append(Item(match[1], jpeg_path(match[1]), match[2], split, labels))
    source.rejected += [(file, "neither in train.csv nor in valid.csv") for file in on_disk - known]
    if lateral:
        source.notes.append(f"{lateral:,} lateral views were left out (--all-views takes them).")
    return source


# ----------------------------------------------------------------------------------------------------------------------
# Source: DICOM. Nothing that names a person may enter the data folder: no header field, no file name, no path.

def dicom_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Every DICOM radiograph below --src; patient and file name are keyed hashes. Labels come from --labels."""
    label_names, table, key = read_dicom_labels(args) if args.labels else ([], {}, "path")
    source, known, labelled, code = Source(label_names), set(), set(), coder(args.salt)
    headers = in_parallel(partial(read_header, args=args), files, args.workers, "headers")
    for file, header in zip(files, headers, strict=True):
        if isinstance(header, dict) and header["SOPInstanceUID"] in known:
            header = "the same SOPInstanceUID as an earlier file"
        if isinstance(header, str):
            source.rejected.append((file, header))
            continue
        known.add(header["SOPInstanceUID"])
        # A study is of one person. Where the PatientID was blanked that is all there is to go by.
        patient = code(header["PatientID"] or header["StudyInstanceUID"] or header["SOPInstanceUID"])
        if header[key] in table:
            labelled.add(header[key])
        labels = table.get(header[key], ("",) * len(label_names))
        source.items.append(Item(file, f"images/{patient}/{code(header['SOPInstanceUID'])}.jpg", patient, "", labels))
    source.rejected += [(f"{key} {value}", f"named in {args.labels.name}, found in no file") for value in
                        table.keys() - labelled]
    if args.labels and not labelled:
        raise DataError(f"{args.labels}: no {key} of it is that of a DICOM file in {args.src}")
    return source


def read_header(file: str, args: argparse.Namespace) -> dict[str, str] | str:
    """What identifies a DICOM file, by DICOM_KEYS, or why it is not taken."""
    try:
        header = pydicom.dcmread(args.src / file, stop_before_pixels=True)
        if "Rows" not in header:
            raise DataError(f"not an image ({header.file_meta.MediaStorageSOPClassUID.name})")
        if header.get("Modality") not in args.modality:
            raise DataError(f"modality {header.get('Modality')}, not {' or '.join(args.modality)}")
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise DataError(f"{header.NumberOfFrames} frames")
        if header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
            raise DataError(f"in colour ({header.PhotometricInterpretation})")
        if header.Rows * header.Columns > args.max_megapixels * 1e6:
            raise DataError(f"{header.Columns} x {header.Rows} pixels are more than --max-megapixels")
        if header.get("BurnedInAnnotation") == "YES":
            raise DataError("BurnedInAnnotation is YES: a name may be written into the image")
        return {"path": file} | {key: str(header.get(key) or "").strip() for key in DICOM_KEYS[1:]}
    except InvalidDicomError:
        return "not a DICOM file"
    except Exception as error:
        return reason(error)


def read_dicom_labels(args: argparse.Namespace) -> tuple[list[str], dict[str, tuple], str]:
    """--labels as label names, {key: cells}, and which of DICOM_KEYS the key is."""
    _, header = next(read_table(args.labels))
    key = next((name for name in DICOM_KEYS if name in header), None)
    if not key:
        raise DataError(f"{args.labels} has none of the columns {', '.join(DICOM_KEYS)}")
    columns = args.label_columns or [name for name in header if name not in DICOM_KEYS]
    rows = read_keyed(args.labels, key, columns)
    label_names, labels = label_columns(args.labels, columns, dict(rows.values()))
    return label_names, {value: labels[number] for value, (number, _) in rows.items()}, key


def coder(salt: Path) -> Callable[[str], str]:
    """text -> 16 hex digits that tell nothing about it to anyone without the `salt` file, made here where it is missing.

    A plain hash of a PatientID, a number of a few digits, is undone by trying them all. The secret is a file and not a
    flag so that no process list shows it, and lies outside the data folder so that it is not handed on with it."""
    if not salt.exists():
        with open(os.open(salt, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(os.urandom(32))
    secret = salt.read_bytes()
    return lambda text: hmac.new(secret, text.encode(), "sha256").hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Splits, by patient.

def assign_splits(source: Source, args: argparse.Namespace) -> None:
    """Fill in the splits that the source does not give; those it gives stay as they are.

    A missing val or test split is carved, by patient, from what is in no split or in train. The order is by a hash of
    the patient, so that a folder which grows keeps nearly all its patients where they were. DataError for a patient in
    two given splits: his images would be learned in one and tested in the other."""
    given = {}
    for item in source.items:
        if args.source == "folder" and args.patients_per_split and item.split:
            item.patient = f"{item.split}-{item.patient}"
        split = item.split or "train"
        if given.setdefault(item.patient, split) != split:
            hint = " (--patients-per-split where the numbering restarts in each)" if args.source == "folder" else ""
            raise DataError(f"patient {item.patient} is in {split} and in {given[item.patient]}{hint}")
    pool = [patient for patient, split in given.items() if split == "train"]
    pool.sort(key=lambda patient: hashlib.sha256(f"{args.seed} {patient}".encode()).digest())
    total = len(pool)
    for split in ("test", "val"):
        fraction = vars(args).get(f"{split}_fraction", 0)
        if fraction and split not in given.values():
            count = min(max(1, round(fraction * total)), len(pool) - 1)         # one patient at least stays for train
            for patient in pool[:count]:
                given[patient] = split
            del pool[:count]
            source.notes.append(f"{split} was carved from train by patient: {count} of {total}, seed {args.seed}.")
    for item in source.items:
        item.split = given[item.patient]


def check(source: Source, args: argparse.Namespace) -> None:
    """What read_manifest will insist on, found before hours of decoding; DataError names the culprit."""
    if not source.items:
        reasons = Counter(reason for _, reason in source.rejected).most_common(1)
        raise DataError(f"no image found in {args.src}" + (f"; {reasons[0][1]} × {reasons[0][0]}" if reasons else ""))
    for name in source.label_names:
        if not name or source.label_names.count(name) > 1 or name in ("path", "patient", "split"):
            raise DataError(f"{name!r} cannot be the name of a label, or is the name of two")
    first = {}
    for item in source.items:
        if first.setdefault(item.path, item) is not item:
            raise DataError(f"{item.source} and {first[item.path].source} would both become {item.path}")


# ----------------------------------------------------------------------------------------------------------------------
# One image: read, make it small, gray and 8 bits deep, write.

def read_image(source: str, args: argparse.Namespace) -> Image.Image:
    """An image file of any common format, as gray: mode L, or F where it has more than 8 bits."""
    with Image.open(os.path.join(args.src, source), formats=FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise DataError(f"{image.n_frames} frames")
        # A JPEG is decoded at 1/2, 1/4 or 1/8 where that is still twice the size wanted, and as luma only.
        image.draft("L", (2 * args.size, 2 * args.size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):       # I;16, I;16B, I, F: Pillow's own conversion would clip at 255
            return Image.fromarray(np.asarray(image, np.float32))
        return image.convert("L")                   # from 1, P, RGB, RGBA, LA, CMYK, …; alpha is dropped


def read_dicom(source: str, args: argparse.Namespace) -> Image.Image:
    """A DICOM radiograph as it is meant to be seen, bone white: mode L where it tells its window, else F."""
    dataset = pydicom.dcmread(args.src / source)
    raw = dataset.pixel_array
    levels = apply_modality_lut(raw, dataset).astype(np.float32)
    windowed = bool(dataset.get("VOILUTSequence")) or None not in (dataset.get("WindowCenter"), dataset.get("WindowWidth"))
    if windowed:
        # Twice around pydicom 3.0: under a negative slope, already applied, it would turn the image into its negative;
        # and an index into a table of 8-bit values would wrap at 256.
        dataset.RescaleSlope = 1
        for lut in dataset.get("VOILUTSequence") or []:
            lut.LUTDescriptor = [*lut.LUTDescriptor[:2], 16]
        levels = apply_voi_lut(levels, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        levels = levels.max() - levels
    if "PixelPaddingValue" in dataset:              # around the image; as black as its darkest pixel
        padding = raw == dataset.PixelPaddingValue
        levels[padding] = levels[~padding].min()
    return eight_bits(levels, (0, 100)) if windowed else Image.fromarray(levels)


def eight_bits(levels: np.ndarray, percentiles: tuple[float, float]) -> Image.Image:
    """(H, W) of any numbers -> mode L, where the two percentiles are 0 and 255."""
    low, high = np.percentile(levels, percentiles)
    if not low < high:              # NaN, too
        raise DataError(f"blank: gray levels {low:g} to {high:g} only")
    return Image.fromarray(np.rint((levels - low).clip(0, high - low) * (255 / (high - low))).astype(np.uint8))


def finish(image: Image.Image, args: argparse.Namespace) -> Image.Image:
    """Mode L or F in, any size -> mode L, shorter side at most --size; DataError where there is nothing to see."""
    if min(image.size) < MIN_SIDE:
        raise DataError(f"{image.width} x {image.height} pixels are too small")
    scale = args.size / min(image.size)
    if scale < 1:
        size = [round(scale * side) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)      # antialiased
    if image.mode == "F" or args.stretch:
        image = eight_bits(np.asarray(image), args.stretch or DEEP)
    low, high = image.getextrema()
    if high - low < MIN_RANGE:
        raise DataError(f"blank: gray levels {low} to {high} only")
    return enhanced(image) if args.enhance else image


def enhanced(image: Image.Image) -> Image.Image:
    """Contrast-limited adaptive histogram equalisation, the same that --clahe does on the fly in the later stages."""
    import nvidia.dali.experimental.dynamic as dali  # here, as only --enhance needs it

    levels = dali.tensor(np.asarray(image)[..., None])      # (H, W, 1) uint8
    return Image.fromarray(np.asarray(dali.clahe(levels, tiles_x=8, tiles_y=8, clip_limit=2.0))[..., 0])


def convert(item: Item, args: argparse.Namespace) -> str:
    """Read one item and write its JPEG; "" or the reason why there is none. OSError for a target that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A header that claims more pixels than this is a decompression bomb: Pillow raises before it decodes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.MAX_IMAGE_PIXELS = int(args.max_megapixels * 1e6)
            image = finish(args.read(item.source, args), args)
    except Exception as error:      # a decoder may raise anything on a broken file, and 100,000 others wait
        return reason(error)
    image.info.clear()              # or Pillow copies the source's comment and resolution
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=args.quality)
    target = args.out / item.path
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, jpeg.getvalue())
    return ""


def reason(error: Exception) -> str:
    return " ".join(str(error if isinstance(error, DataError) else f"{type(error).__name__}: {error}").split())


# ----------------------------------------------------------------------------------------------------------------------
# All images: a pool of processes, and a folder that is consistent whenever the run ends.

def in_parallel(function: Callable, items: list, workers: int, title: str) -> Iterator:
    """Yield function(item) in the order of the items, computed by `workers` processes, under a progress bar."""
    try:
        # fork: the workers share what is imported here. Nothing has started a thread yet; tqdm comes after them.
        with ProcessPoolExecutor(workers, get_context("fork"), follow_parent) as pool:
            results = pool.map(function, items, chunksize=8)
            yield from tqdm(results, title, len(items), unit=" images", dynamic_ncols=True)
    except BrokenProcessPool:
        raise DataError("a worker process died, most likely of too little memory; the same command goes on where this "
                        "one stopped, with fewer --workers if it happens again") from None


def follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it: it would hold the lock on the data folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where it is missing, for one process; DataError where another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder} is being written by another run of prepare.py") from None
        yield


def settings_of(args: argparse.Namespace) -> dict:
    """The flags that shape the data folder, as prepare.json keeps them."""
    settings = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()
                if name not in ("out", "workers", "overwrite") and not callable(value)}
    if args.source == "dicom":      # these paths may name patients
        code = coder(args.salt)
        settings |= {name: f"hidden-{code(settings[name] or '')}" for name in ("src", "labels")}
        settings["salt"] = f"hidden-{code('salt')}"
    return json.loads(json.dumps(settings))


def rejected_file(args: argparse.Namespace) -> Path:
    """rejected.csv; beside the data folder where the names of the source's files are nobody's business."""
    return Path(f"{args.out}.rejected.csv") if args.source == "dicom" else args.out / "rejected.csv"


def check_settings(args: argparse.Namespace) -> None:
    """DataError where --out holds something else than an earlier part of this very run, unless --overwrite says so."""
    there = {path.name for path in args.out.iterdir()} - {".lock", "prepare.json.tmp"}
    if there and "prepare.json" not in there:
        raise DataError(f"{args.out} is not empty and was not made by prepare.py")
    if there and not args.overwrite:
        old, new = json.loads((args.out / "prepare.json").read_text()), settings_of(args)
        differ = [f"--{name.replace('_', '-')} {old.get(name)} (now {new.get(name)})"
                  for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if differ:
            raise DataError(f"{args.out} was made with {', '.join(differ)}: choose another --out, or --overwrite it")


def prepare(args: argparse.Namespace) -> int:
    """A source -> the data folder --out."""
    if "src" in args:
        src, out = args.src.resolve(), args.out.resolve()
        if not src.is_dir():
            raise DataError(f"--src {args.src} is not a folder")
        if src == out or src in out.parents or out in src.parents:
            raise DataError(f"--src {args.src} and --out {args.out} must not lie one inside the other")
    with lock(args.out):
        check_settings(args)
        source = args.items(args, find_files(args.src) if "src" in args else [])
        assign_splits(source, args)
        check(source, args)
        if args.overwrite:
            for name in ("manifest.csv", "DATA.md", "rejected.csv", "prepare.json"):    # the manifest first
                (args.out / name).unlink(missing_ok=True)
            shutil.rmtree(args.out / "images", ignore_errors=True)
        write(args.out / "prepare.json", json.dumps(settings_of(args), indent=1) + "\n")
        write_images(source, args)
        if not source.items:
            raise DataError(f"no image of {args.src} could be decoded: see {rejected_file(args)}")
        card = data_card(source, args)
        write(args.out / "DATA.md", card)
        rows = [(item.path, item.patient, item.split, *item.labels) for item in source.items]
        write(args.out / "manifest.csv", csv_text([("path", "patient", "split", *source.label_names), *rows]))
    print(card)
    return 0


def write_images(source: Source, args: argparse.Namespace) -> None:
    """Write the images that are not there yet, and rejected.csv; the rejected leave source.items."""
    def there(item):                # written under this name only when whole; of no bytes only if the machine went down
        file = args.out / item.path
        return file.is_file() and file.stat().st_size > 0

    todo = [item for item in source.items if not there(item)]
    if len(todo) < len(source.items):
        print(f"{len(source.items) - len(todo):,} of {len(source.items):,} images are there already")
    reasons = in_parallel(partial(convert, args=args), todo, args.workers, f"{args.source} -> {args.out}")
    rejected = {item.source: reason for item, reason in zip(todo, reasons, strict=True) if reason}
    source.items = [item for item in source.items if item.source not in rejected]
    source.rejected = sorted(source.rejected + list(rejected.items()))
    write(rejected_file(args), csv_text([("source", "reason"), *source.rejected]))


def data_card(source: Source, args: argparse.Namespace) -> str:
    """DATA.md: what is in the folder, counted, and where it comes from."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {shlex.join(map(str, np.atleast_1d(value)))}")
             for name, value in settings_of(args).items() if name != "source" and value not in (None, False, [])]
    lines = [f"# {args.out.name}", "", f"    python prepare.py {args.source} --out {args.out} {' '.join(flags)}", "",
             "| split | images | patients |", "|---|---:|---:|"]
    for split in SPLITS:
        items = [item for item in source.items if item.split == split]
        lines.append(f"| {split} | {len(items):,} | {len({item.patient for item in items}):,} |")
    lines += [f"| all | {len(source.items):,} | {len({item.patient for item in source.items}):,} |", ""]
    if source.label_names:
        lines += ["| label | train, present | val, present | test, present | absent | uncertain | empty |",
                  "|---|---:|---:|---:|---:|---:|---:|"]
        sizes = Counter(item.split for item in source.items)
        for place, name in enumerate(source.label_names):
            cells = Counter((item.split, item.labels[place]) for item in source.items)
            present = [f"{cells[split, '1']:,} ({cells[split, '1'] / max(1, sizes[split]):.1%})" for split in SPLITS]
            rest = [f"{sum(cells[split, value] for split in SPLITS):,}" for value in ("0", "-1", "")]
            lines.append(f"| {name} | {' | '.join(present + rest)} |")
        lines.append("")
    lines += [*source.notes, f"Rejected: {len(source.rejected):,}{f', see {rejected_file(args).name}' if source.rejected else ''}."]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# A data folder, looked at once more.

def verify(args: argparse.Namespace) -> int:
    """Decode every image of a data folder; 1 where something is wrong and stays so, 0 where nothing is or --drop."""
    file = args.folder / "manifest.csv"
    rows = list(read_table(file, ["path", "split"]))
    made = args.folder / "prepare.json"
    size = json.loads(made.read_text())["size"] if made.exists() else None
    # Of two equal images the one in test stays, then the one in val: a test set is not to shrink by what train holds.
    rows.sort(key=lambda row: -SPLITS.index(row[1][1]) if row[1][1] in SPLITS else 0)
    found = in_parallel(partial(look_at, size=size), [args.folder / path for _, (path, _) in rows], args.workers, "verify")
    problems, first = {}, {}
    for (number, (path, split)), (problem, digest) in zip(rows, found, strict=True):
        twin, its_split = first.setdefault(digest, (path, split)) if digest else (path, split)
        if twin != path:
            problem = f"duplicate: of {twin}" + (f", a leak from {its_split} into {split}" if split != its_split else "")
        if problem:
            problems[number] = problem
            print(f"{path}: {problem}")
    kinds = Counter(problem.split(":")[0] for problem in problems.values())
    print(f"{len(rows):,} images: " + (", ".join(f"{count:,} {kind}" for kind, count in kinds.items()) or "all good"))
    if args.drop and problems:
        drop(args.folder, set(problems))
    if args.drop or not kinds["missing"]:
        read_manifest(args.folder)  # patients, splits and labels, too
    return int(bool(problems) and not args.drop)


def look_at(file: Path, size: int | None) -> tuple[str, bytes]:
    """What is wrong with an image of a data folder ("" if nothing), and a digest of its pixels (b"" if there are none)."""
    try:
        with Image.open(file) as image:
            image.load()
    except FileNotFoundError:
        return "missing", b""
    except Exception as error:
        return f"unreadable: {reason(error)}", b""
    digest = hashlib.blake2b(image.tobytes() + repr(image.size).encode()).digest()
    low, high = image.convert("L").getextrema()
    if high - low < MIN_RANGE:
        return f"blank: gray levels {low} to {high} only", digest
    if image.mode != "L" or min(image.size) < MIN_SIDE or size and min(image.size) > size:
        return f"unexpected size or mode: {image.width} x {image.height} {image.mode}", digest
    return "", digest


def drop(folder: Path, numbers: set[int]) -> None:
    """Rewrite the manifest without these rows; the old one is kept as manifest.1.csv, .2 and so on."""
    file = folder / "manifest.csv"
    rows = [cells for number, cells in read_table(file) if number not in numbers]
    if len(rows) == 1:
        raise DataError(f"--drop would leave no image in {file}")
    with lock(folder):
        kept = next(path for n in range(1, 10**6) if not (path := folder / f"manifest.{n}.csv").exists())
        shutil.copy2(file, kept)
        write(file, csv_text(rows))
        with open(folder / "DATA.md", "a") as card:
            card.write(f"\nverify --drop took out {len(numbers):,} images, {len(rows) - 1:,} stay; before: {kept.name}.\n")


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of one source, or of verify; the namespace also has the functions `run`, `items` and `read`."""
    parser = argparse.ArgumentParser(description="Any source of radiographs -> one data folder.", allow_abbrev=False)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("every source")
    group.add_argument("--out", type=Path, required=True, help="the data folder to make")
    group.add_argument("--size", type=int, default=256, help="shorter side of the images, pixels (default: 256)")
    group.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100 (default: 95)")
    group.add_argument("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"),
                       help="percentiles of each image that become black and white (default: only beyond 8 bits)")
    group.add_argument("--enhance", action="store_true", help="bake in contrast enhancement (CLAHE)")
    group.add_argument("--max-megapixels", type=float, default=100, help="reject larger images (default: 100)")
    group.add_argument("--val-fraction", type=float, default=0.1, help="of the patients, where no val is given (0.1)")
    group.add_argument("--seed", type=int, default=0, help="of the splits (default: 0)")
    group.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    group.add_argument("--overwrite", action="store_true", help="replace what prepare.py wrote into --out before")

    def add_source(name, help, items, read):
        source = sources.add_parser(name, parents=[common], help=help, description=help, allow_abbrev=False)
        source.set_defaults(run=prepare, items=items, read=read)
        return source

    folder = add_source("folder", "class folders, in train/val/test folders or not; optionally a CSV", folder_items,
                        read_image)
    folder.add_argument("--src", type=Path, required=True, help="folder of the class folders")
    folder.add_argument("--csv", type=Path, help="table of images; only these are taken")
    folder.add_argument("--path-column", default="path", help="its column of paths below --src (default: path)")
    folder.add_argument("--patient-column", help="its column of patients (default: patient, if there)")
    folder.add_argument("--split-column", help="its column of train, val, test (default: split, if there)")
    folder.add_argument("--label-columns", nargs="+", default=[], metavar="COLUMN",
                        help="its columns of 1, 0, -1 or blank, or of class names (default: the class folders)")
    folder.add_argument("--patients-per-split", action="store_true", help="patient numbers restart in each split")
    folder.add_argument("--test-fraction", type=float, default=0.2, help="of the patients, where no test is given (.2)")

    nih = add_source("nih", "NIH ChestX-ray14 as downloaded and unpacked", nih_items, read_image)
    nih.add_argument("--src", type=Path, required=True, help="folder with Data_Entry_2017*.csv, the lists and the images")

    chexpert = add_source("chexpert", "CheXpert-v1.0 or CheXpert-v1.0-small", chexpert_items, read_image)
    chexpert.add_argument("--src", type=Path, required=True, help="folder with train.csv and valid.csv")
    views = chexpert.add_mutually_exclusive_group()
    views.add_argument("--frontal-only", dest="all_views", action="store_false", help="no lateral views (the default)")
    views.add_argument("--all-views", action="store_true", help="lateral views, too")

    dicom = add_source("dicom", "DICOM radiographs, de-identified on the way", dicom_items, read_dicom)
    dicom.add_argument("--src", type=Path, required=True, help="folder of DICOM files, at any depth")
    dicom.add_argument("--modality", nargs="+", default=["CR", "DX"], help="modalities to take (default: CR DX)")
    dicom.add_argument("--salt", type=Path, help="file of the secret that identities are hashed with; made where it is "
                       "missing (default: OUT.salt)")
    dicom.add_argument("--labels", type=Path, help=f"CSV with one of the columns {', '.join(DICOM_KEYS)}, and of labels")
    dicom.add_argument("--label-columns", nargs="+", default=[], metavar="COLUMN", help="its labels (default: all others)")
    dicom.add_argument("--test-fraction", type=float, default=0.2, help="of the patients (default: 0.2)")

    check = sources.add_parser("verify", help="decode a data folder once more", allow_abbrev=False)
    check.add_argument("folder", type=Path, help="the data folder")
    check.add_argument("--drop", action="store_true", help="take what is wrong out of the manifest")
    check.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    check.set_defaults(run=verify)

    args = parser.parse_args(argv)
    if args.source == "dicom" and args.salt is None:
        args.salt = Path(f"{args.out}.salt")
    check_flags(args, sources.choices[args.source].error)
    return args


def check_flags(args: argparse.Namespace, error: Callable) -> None:
    if args.workers < 1:
        error("--workers must be at least 1")
    if args.source == "verify":
        return
    if args.size < MIN_SIDE:
        error(f"--size must be at least {MIN_SIDE}")
    if not 1 <= args.quality <= 100:
        error("--quality must be from 1 to 100")
    if args.stretch and not 0 <= args.stretch[0] < args.stretch[1] <= 100:
        error("--stretch takes two percentiles, 0 <= LOW < HIGH <= 100")
    if not args.max_megapixels > 0:
        error("--max-megapixels must be positive")
    fractions = [args.val_fraction, vars(args).get("test_fraction", 0)]
    if min(fractions) < 0 or sum(fractions) >= 1:
        error("--val-fraction and --test-fraction must leave something for train")
    if args.source == "dicom" and args.out.resolve() in args.salt.resolve().parents:
        error("--salt must not lie inside --out, which may be handed on")
    if args.source == "folder" and not args.csv and (args.patient_column or args.split_column or args.label_columns):
        error("--patient-column, --split-column and --label-columns are columns of --csv")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return args.run(args)
    except DataError as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:        # a full disk, a target that may not be written, a CSV that is not there
        sys.exit(f"prepare.py: {error.strerror or error}: {error.filename or args.out}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command goes on where this one stopped")


if __name__ == "__main__":
    sys.exit(main())
