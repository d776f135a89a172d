"""Stage 0: any source of chest radiographs -> one data folder, the only thing that the later stages read.

    python prepare.py demo     --out data/demo                              # synthetic radiographs, from nothing
    python prepare.py folder   --src chest_xray --out data/kermany          # class folders, and an optional CSV
    python prepare.py nih      --src NIH --out data/nih                     # ChestX-ray14 as downloaded and unpacked
    python prepare.py chexpert --src CheXpert-v1.0-small --out data/chexpert
    python prepare.py dicom    --src archive --out data/hospital            # de-identified on the way
    python prepare.py verify   data/nih                                     # decode all of it once more

A source is a function that says which image becomes which row of the manifest: patient, split, labels. From there on
all sources are alike. Every image is decoded once, by a pool of processes, and becomes an 8-bit gray JPEG whose shorter
side is --size (a smaller image keeps its size: enlarging adds bytes and no information). What cannot be decoded, or has
no sure label, is left out and listed in rejected.csv with the reason. manifest.csv is written last: a folder that has
one is complete. An interrupted run is continued by the same command; --overwrite starts over, say after the source's
images have changed.
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
import shlex
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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

import phantom
from dali_pipeline import LABEL_VALUES, SPLITS, DataError, read_manifest

NIH_FINDINGS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
                "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
                "No Finding"]
CHEXPERT_OBSERVATIONS = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
                         "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
                         "Pleural Other", "Fracture", "Support Devices"]
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CELLS = {cell: cell.removesuffix(".0") for cell in LABEL_VALUES}        # as CSV files have them -> as the manifest does
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP")     # all that Pillow may try to open
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jp2", ".tif", ".tiff", ".bmp", ".pgm", ".ppm", ".webp")
DICOM_KEYS = ("PatientID", "StudyInstanceUID", "SOPInstanceUID")        # who, which examination, which image
DEEP = (0.5, 99.5)      # percentiles that become black and white where 9 to 16 bits come without a window
MIN_SIDE = 32           # pixels; anything smaller is an icon
MIN_RANGE = 16          # gray levels; an image with fewer is blank, or 12-bit data taken for 16


@dataclass(slots=True)
class Item:
    """One image on its way into the data folder, and its row of the manifest."""
    source: str                     # what args.read is given: a file below --src
    path: str                       # images/….jpg in the data folder
    patient: str
    split: str                      # train, val, test, or "" where the source does not say
    labels: tuple[str, ...]         # "1", "0", "-1" or "", one for each of Source.label_names


@dataclass
class Source:
    """What a source found."""
    label_names: list[str]
    items: list[Item] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)      # file, reason
    notes: list[str] = field(default_factory=list)                     # sentences that the reader has to know


# ----------------------------------------------------------------------------------------------------------------------
# Files and tables.

def find_files(src: Path) -> list[str]:
    """All files below `src` as sorted relative paths; hidden ones (.DS_Store, ._x.png, __MACOSX/) do not count."""
    def fail(error):
        raise error                 # os.walk would silently pass over a folder that it cannot read

    files = []
    for folder, folders, names in os.walk(src, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        files += [os.path.relpath(os.path.join(folder, name), src) for name in names if not name.startswith(".")]
    return sorted(files)


def read_table(file: Path, key: str, columns: list[str] | None = None, optional: tuple = (),
               normalise: Callable[[str], str] = str) -> tuple[list[str], dict[str, tuple]]:
    """A CSV as its columns (None: all but `key`) and {key: (row, their cells)}; row 1 is the header.

    A byte-order mark, CRLF and blanks around a cell do not matter; an `optional` column that is not there is full of
    None. DataError names file, row and column where a column is missing, a row is short, or a key comes twice."""
    rows = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            lines = csv.reader(f)
            header = [name.strip() for name in next(lines, [])]
            columns = [name for name in header if name != key] if columns is None else columns
            for name in (key, *columns):
                if header.count(name) != 1 and (name in header or name not in optional):
                    raise DataError(f"{file} must have one column {name!r}, its header is {','.join(header)!r}")
            places = [header.index(name) if name in header else None for name in (key, *columns)]
            for number, line in enumerate(lines, 2):
                if not line:
                    continue
                if len(line) != len(header):
                    raise DataError(f"{file}, row {number}: {len(line)} cells where the header has {len(header)}")
                value, *cells = [None if place is None else sys.intern(line[place].strip()) for place in places]
                value = normalise(value)
                if value in rows:
                    raise DataError(f"{file}, row {number}, column {key}: {value} is already in row {rows[value][0]}")
                rows[value] = number, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a CSV file in UTF-8 ({error})") from None
    return columns, rows


def read_labels(file: Path, names: list[str], columns: list[str], rows: dict) -> tuple[list[str], dict[str, tuple]]:
    """Columns `names` of read_table's `columns` and `rows` -> manifest label names, and {key: manifest cells}.

    A column of 1, 0, -1 and blanks is a label. A column of words, say of diseases, becomes one label a word, where a
    blank leaves them all open. A column that mixes both has a typing error in it: DataError names the row."""
    label_names, labels = [], dict.fromkeys(rows, ())
    for name in names:
        column = {key: cells[columns.index(name)] for key, (_, cells) in rows.items()}
        words = sorted(set(column.values()) - CELLS.keys())
        if words and not {"", *words} >= set(column.values()):
            key, word = next((key, cell) for key, cell in column.items() if cell in words)
            raise DataError(f"{file}, row {rows[key][0]}, column {name}: {word!r} among values of 1, 0, -1 and blank")
        label_names += (words if len(names) == 1 else [f"{name} {word}" for word in words]) or [name]
        for key, cell in column.items():
            labels[key] += one_hot(cell, words) if words else (CELLS[cell],)
    return label_names, labels


def one_hot(word: str, words: list[str]) -> tuple[str, ...]:
    """Present for the one, absent for the others; all open where there is none."""
    return tuple(("1" if word == other else "0") if word else "" for other in words)


def on_both(table: Path, rows: dict, files: dict[str, str], source: Source) -> Iterator[str]:
    """Yield what is in `rows` of the table and in {key: file on disk}; what is in only one of them is rejected."""
    for key in rows:
        if key in files:
            yield key
        else:
            source.rejected.append((key, f"named in {table.name}, missing on disk"))
    source.rejected += [(files[key], f"not in {table.name}") for key in files if key not in rows]


def jpeg_path(file: str) -> str:
    """Where a source's file goes in the data folder. A name in another encoding must not break the manifest's UTF-8."""
    return "images/" + os.fsencode(PurePosixPath(file).with_suffix(".jpg")).decode(errors="replace")


def write(file: Path, data: bytes | Iterable) -> None:
    """Bytes, or rows of a CSV: all or nothing, into a temporary file that then takes the name."""
    if not isinstance(data, bytes):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(data)
        data = text.getvalue().encode(errors="backslashreplace")
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Sources: --src and its files in, items out.

def demo_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Phantoms: --patients people, --images-per-patient radiographs of each, with what is truly to be seen in them."""
    source = Source([*phantom.FINDINGS, "No Finding"])
    for patient in range(args.patients):
        for image in range(args.images_per_patient):
            found = phantom.findings(args.seed, patient, image)
            labels = tuple("1" if present else "0" for present in (*found, not found.any()))
            source.items.append(Item(f"{patient} {image}", f"images/{patient:05d}/{image}.jpg", f"{patient:05d}", "",
                                     labels))
    return source


def read_phantom(source: str, args: argparse.Namespace) -> Image.Image:
    patient, image = map(int, source.split())
    return Image.fromarray(phantom.phantom(args.seed, patient, image, args.size))


def folder_items(args: argparse.Namespace, files: list[str]) -> Source:
    """[train|val|test/]class/….png; of what --csv says of patient, split and labels, --csv is right."""
    images = {file: file for file in files if file.lower().endswith(EXTENSIONS)}
    with_splits = any(PurePosixPath(file).parts[0].lower() in SPLIT_NAMES for file in images)
    splits, classes = {}, {}
    for file in images:
        folders = list(PurePosixPath(file).parts[:-1])
        # None: beside the folders train, val and test, so in none of them.
        splits[file] = SPLIT_NAMES.get(folders.pop(0).lower() if folders else "") if with_splits else ""
        classes[file] = folders[0] if folders else ""
    source = Source(sorted(set(classes.values()) - {""}))
    patients, labels = {}, {file: one_hot(classes[file], source.label_names) for file in images}
    if args.csv:
        columns, rows = read_table(
            args.csv, args.path_column, [args.patient_column, args.split_column, *args.label_columns],
            optional=("patient", "split"), normalise=lambda path: os.path.normpath(path.replace("\\", "/")))
        images = {file: file for file in on_both(args.csv, rows, images, source)}
        for file in images:
            number, (patients[file], split, *_) = rows[file]
            if patients[file] == "":
                raise DataError(f"{args.csv}, row {number}, column {args.patient_column}: empty")
            if split and split.lower() not in SPLIT_NAMES:
                raise DataError(f"{args.csv}, row {number}, column {args.split_column}: {split!r} is no split")
            splits[file] = splits[file] if split is None else SPLIT_NAMES.get(split.lower(), "")
        if args.label_columns:
            source.label_names, labels = read_labels(args.csv, args.label_columns, columns, rows)
    shared = Counter(map(jpeg_path, images))        # x.png beside x.jpg: both keep the suffix, as x.png.jpg
    for file in images:
        if splits[file] is None:
            source.rejected.append((file, "outside the folders train, val and test"))
            continue
        path = jpeg_path(file if shared[jpeg_path(file)] == 1 else file + ".jpg")
        source.items.append(Item(file, path, patients.get(file) or path, splits[file], labels[file]))
    if not any(patients.values()):
        source.notes.append("No patient is known: every image counts as a patient of its own.")
    others = Counter(PurePosixPath(file).suffix or "without suffix" for file in files if file not in classes)
    source.notes.append(f"Files passed over: {', '.join(f'{n:,} {suffix}' for suffix, n in others.items()) or 'none'}.")
    return source


def nih_items(args: argparse.Namespace, files: list[str]) -> Source:
    """ChestX-ray14: Data_Entry_2017*.csv, the two official lists, PNGs in images/ or images_001/images/ and so on."""
    tables = list(args.src.glob("Data_Entry_2017*.csv"))
    if len(tables) != 1:
        raise DataError(f"{args.src} must hold one Data_Entry_2017*.csv, it holds {len(tables)}")
    train, test = (set((args.src / name).read_text().split()) for name in ("train_val_list.txt", "test_list.txt"))
    if train & test:
        raise DataError(f"{min(train & test)} is in both train_val_list.txt and test_list.txt of {args.src}")
    images = {PurePosixPath(file).name: file for file in files if file.endswith(".png")}
    _, rows = read_table(tables[0], "Image Index", ["Finding Labels", "Patient ID"])
    source = Source(NIH_FINDINGS)
    for image in on_both(tables[0], rows, images, source):
        number, (findings, patient) = rows[image]
        present = set(findings.split("|"))
        if not present <= set(NIH_FINDINGS):
            raise DataError(f"{tables[0]}, row {number}, column Finding Labels: {findings!r} has an unknown finding")
        labels = tuple("1" if finding in present else "0" for finding in NIH_FINDINGS)
        if image in train or image in test:
            split = "train" if image in train else "test"
            source.items.append(Item(images[image], jpeg_path(image), patient, split, labels))
        else:
            source.rejected.append((images[image], "neither in train_val_list.txt nor in test_list.txt"))
    return source


def chexpert_items(args: argparse.Namespace, files: list[str]) -> Source:
    """CheXpert-v1.0 or -small: train.csv, and valid.csv as the test split; -1 stays -1."""
    source, lateral = Source(CHEXPERT_OBSERVATIONS), 0
    for part, split in (("train", "train"), ("valid", "test")):
        table = args.src / f"{part}.csv"
        images = {file: file for file in files if file.startswith(f"{part}/") and file.lower().endswith(EXTENSIONS)}
        # CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg, of which the first part is --src
        columns, rows = read_table(table, "Path", ["Frontal/Lateral", *CHEXPERT_OBSERVATIONS],
                                   normalise=lambda path: path.partition("/")[2])
        _, labels = read_labels(table, CHEXPERT_OBSERVATIONS, columns, rows)
        for image in on_both(table, rows, images, source):
            if args.all_views or rows[image][1][0] == "Frontal":
                source.items.append(Item(image, jpeg_path(image), image.split("/")[1], split, labels[image]))
            else:
                lateral += 1
    source.notes.append(f"Lateral views left out: {lateral:,} (--all-views takes them).")
    return source


def dicom_items(args: argparse.Namespace, files: list[str]) -> Source:
    """DICOM radiographs. Nothing that names a person may enter the data folder: no header field, file name or path."""
    source, rows, labels, code = Source([]), {}, {}, coder(args.salt)
    if args.labels:
        columns, rows = read_table(args.labels, args.key, args.label_columns or None)
        source.label_names, labels = read_labels(args.labels, columns, columns, rows)
        if source.label_names != columns:           # a column of words might be one of names
            raise DataError(f"{args.labels} must hold 1, 0, -1 or blanks: choose such columns by --label-columns")
    headers = in_parallel(partial(read_header, args=args), files, args.workers, "headers")
    images, found = set(), set()
    for file, header in zip(files, headers, strict=True):
        if isinstance(header, str) or header["SOPInstanceUID"] in images:
            source.rejected.append((file, header if isinstance(header, str) else "SOPInstanceUID of an earlier file"))
            continue
        images.add(header["SOPInstanceUID"])
        found.add(header[args.key])
        # A study is of one person. Where the PatientID was blanked that is all there is to go by.
        patient = code(header["PatientID"] or header["StudyInstanceUID"])
        source.items.append(Item(file, f"images/{patient}/{code(header['SOPInstanceUID'])}.jpg", patient, "",
                                 labels.get(header[args.key], ("",) * len(source.label_names))))
    if rows and not found & rows.keys():
        raise DataError(f"{args.labels}: no {args.key} in it is that of a DICOM file in {args.src}")
    source.rejected += [(key, f"{args.key} in {args.labels.name}, in no DICOM file") for key in rows.keys() - found]
    return source


def read_header(file: str, args: argparse.Namespace) -> dict[str, str] | str:
    """The DICOM_KEYS of a file, or the reason why it is not taken."""
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
        return {key: str(header.get(key) or "").strip() for key in DICOM_KEYS}
    except InvalidDicomError:
        return "not a DICOM file"
    except Exception as error:
        return reason(error)


def coder(salt: Path) -> Callable[[str], str]:
    """text -> 16 hex digits that tell nothing to anyone without the `salt` file, which is made where it is missing.

    A plain hash of a PatientID, a number of a few digits, is undone by trying them all. The secret is a file and not
    a flag, so that no list of processes shows it, and lies beside the data folder, so as not to be handed on with it.
    It has to stay: with another one the same patient is another patient, and a run cannot be continued."""
    if not salt.exists():
        with open(os.open(salt, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(os.urandom(32))
    secret = salt.read_bytes()
    return lambda text: hmac.new(secret, text.encode(), "sha256").hexdigest()[:16]


def assign_splits(source: Source, args: argparse.Namespace) -> None:
    """Fill in the splits that the source does not give, by patient; those it gives stay as they are.

    A missing test or val split is carved from the patients in train or in none. They are ordered by a hash, so that
    in a folder that grows nearly all stay where they were. DataError for a patient in two given splits: what is
    learned from one image would be tested on another of the same chest."""
    given, flags = {}, vars(args)
    for item in source.items:
        if flags.get("patients_per_split") and item.split:
            item.patient = f"{item.split}-{item.patient}"
        split = item.split or "train"
        if given.setdefault(item.patient, split) != split:
            hint = " (--patients-per-split if its numbering restarts in each)" if args.source == "folder" else ""
            raise DataError(f"patient {item.patient} is in {split} and in {given[item.patient]} of {args.src}{hint}")
    pool = [patient for patient, split in given.items() if split == "train"]
    pool.sort(key=lambda patient: hashlib.sha256(f"{args.seed} {patient}".encode()).digest())
    total = len(pool)
    for split in ("test", "val"):
        fraction = flags.get(f"{split}_fraction", 0)
        if fraction and split not in given.values():
            count = max(0, min(max(1, round(fraction * total)), len(pool) - 1))        # somebody stays in train
            given |= dict.fromkeys(pool[:count], split)
            del pool[:count]
            source.notes.append(f"The {split} split was carved by patient: {count:,} of {total:,}, seed {args.seed}.")
    for item in source.items:
        item.split = given[item.patient]


# ----------------------------------------------------------------------------------------------------------------------
# One image: read, gray, small, 8 bits deep, written.

def read_image(source: str, args: argparse.Namespace) -> Image.Image:
    """An image file of any common format: mode L, or F where it has more than 8 bits."""
    with Image.open(args.src / source, formats=FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise DataError(f"{image.n_frames} frames")
        # A JPEG is decoded as luma only, and at 1/2, 1/4 or 1/8 where that is still twice the size wanted.
        image.draft("L", (2 * args.size, 2 * args.size))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):       # I;16, I;16B, I, F: Pillow's own conversion would clip at 255
            return Image.fromarray(np.asarray(image, np.float32))
        return image if image.mode == "L" else image.convert("L")       # 1, P, RGB, RGBA, LA, CMYK; alpha is dropped


def read_dicom(source: str, args: argparse.Namespace) -> Image.Image:
    """A DICOM radiograph as it is meant to be seen, bone white: mode L where it tells its window, else F."""
    dataset = pydicom.dcmread(args.src / source)
    raw = dataset.pixel_array
    levels = apply_modality_lut(raw, dataset).astype(np.float32)
    tables = dataset.get("VOILUTSequence") or []
    windowed = bool(tables) or None not in (dataset.get("WindowCenter"), dataset.get("WindowWidth"))
    if windowed:
        # Twice around pydicom 3.0: a negative slope, by now applied, would turn the image into its negative once more;
        # and the index into a table of 8-bit values would wrap at 256.
        dataset.RescaleSlope = 1
        for table in tables:
            table.LUTDescriptor = [*table.LUTDescriptor[:2], 16]
        levels = apply_voi_lut(levels, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        levels = levels.max() - levels
    if "PixelPaddingValue" in dataset:              # around the radiograph: as black as its darkest pixel
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
    if scale < 1:                   # antialiased; first by a whole factor to twice the size, which is fast
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC, reducing_gap=2.0)
    if image.mode == "F" or args.stretch:
        image = eight_bits(np.asarray(image), args.stretch or DEEP)
    low, high = image.getextrema()
    if high - low < MIN_RANGE:
        raise DataError(f"blank: gray levels {low} to {high} only")
    if args.enhance:                # the CLAHE that --clahe does on the fly in the later stages
        import nvidia.dali.experimental.dynamic as dali
        levels = dali.tensor(np.asarray(image)[..., None])              # (H, W, 1) uint8
        image = Image.fromarray(np.asarray(dali.clahe(levels, tiles_x=8, tiles_y=8, clip_limit=2.0))[..., 0])
    return image


def convert(item: Item, args: argparse.Namespace) -> str:
    """Read one item and write its JPEG; "" or the reason why there is none. OSError where --out cannot be written."""
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
        tqdm.monitor_interval = 0   # no thread: fork, by which the workers share what is imported, wants none
        with ProcessPoolExecutor(workers, get_context("fork"), follow_parent) as pool:
            results = pool.map(function, items, chunksize=8)
            yield from tqdm(results, title, len(items), unit=" images", dynamic_ncols=True)
    except BrokenProcessPool:
        raise DataError("a worker process died, most likely for want of memory; the same command goes on where this "
                        "one stopped, with fewer --workers if it happens again") from None


def follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it: it would hold the lock on the data folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lock(folder: Path) -> io.IOBase:
    """A file that holds `folder`, made where it is missing, until it is closed; DataError where another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{folder} is being written by another run of prepare.py") from None
    return file


def settings_of(args: argparse.Namespace) -> dict:
    """The flags that shape the data folder, for prepare.json and DATA.md, less those of DICOM that may hold names."""
    apart = {"out", "workers", "overwrite", *(("src", "labels", "salt") if args.source == "dicom" else ())}
    return {name: str(value.absolute()) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name not in apart and not callable(value)}


def check_out(args: argparse.Namespace) -> None:
    """DataError where --out holds something else than an earlier part of this very run, unless --overwrite says so."""
    if "src" in args:
        src, out = args.src.resolve(), args.out.resolve()
        if not src.is_dir():
            raise DataError(f"--src {args.src} is not a folder")
        if src == out or src in out.parents or out in src.parents:
            raise DataError(f"--src {args.src} and --out {args.out} must not lie one inside the other")
    there = {path.name for path in args.out.glob("*")} - {".lock", "prepare.json.tmp"}
    if there and "prepare.json" not in there:
        raise DataError(f"{args.out} is not empty and was not made by prepare.py")
    if there and not args.overwrite:
        old, new = json.loads((args.out / "prepare.json").read_text()), json.loads(json.dumps(settings_of(args)))
        differ = [f"--{name.replace('_', '-')} {old.get(name)} (now {new.get(name)})"
                  for name in sorted(old | new) if old.get(name) != new.get(name)]
        if differ:
            raise DataError(f"{args.out} was made with {', '.join(differ)}: choose another --out, or --overwrite it")


def prepare(args: argparse.Namespace) -> int:
    """A source -> the data folder --out. Whatever is wrong with the source is found before anything is written."""
    check_out(args)
    with lock(args.out):
        source = args.items(args, find_files(args.src) if "src" in args else [])
        if not source.items:
            reasons = Counter(reason for _, reason in source.rejected).most_common(3)
            raise DataError(f"no image found in {args.src}" + "".join(f"; {n:,} files: {why}" for why, n in reasons))
        for name in source.label_names:
            if not name or source.label_names.count(name) > 1 or name in ("path", "patient", "split"):
                raise DataError(f"{name!r} cannot be the name of a label, or is that of two")
        assign_splits(source, args)
        if args.overwrite:
            for name in ("manifest.csv", "DATA.md", "rejected.csv", "prepare.json"):    # the manifest first
                (args.out / name).unlink(missing_ok=True)
            shutil.rmtree(args.out / "images", ignore_errors=True)
        write(args.out / "prepare.json", json.dumps(settings_of(args), indent=1).encode())
        write_images(source, args)
        card = data_card(source, args)
        write(args.out / "DATA.md", card.encode())
        rows = [(item.path, item.patient, item.split, *item.labels) for item in source.items]
        write(args.out / "manifest.csv", [("path", "patient", "split", *source.label_names), *rows])
    print(card)
    return 0


def write_images(source: Source, args: argparse.Namespace) -> None:
    """Write the images that are not there yet, and rejected.csv; what is rejected leaves source.items."""
    def there(item):                # only a whole image gets its name; without bytes it is one that a power cut left
        return os.path.exists(args.out / item.path) and os.path.getsize(args.out / item.path) > 0

    todo = [item for item in source.items if not there(item)]
    if len(todo) < len(source.items):
        print(f"{len(source.items) - len(todo):,} of {len(source.items):,} images are there already")
    reasons = in_parallel(partial(convert, args=args), todo, args.workers, f"{args.source} -> {args.out}")
    rejected = {item.source: reason for item, reason in zip(todo, reasons, strict=True) if reason}
    source.items = [item for item in source.items if item.source not in rejected]
    source.rejected = sorted([*source.rejected, *rejected.items()])
    # The names of a hospital's files are for the hospital only: there the list stays beside the data folder.
    file = Path(f"{args.out}.rejected.csv") if args.source == "dicom" else args.out / "rejected.csv"
    write(file, [("file", "reason"), *source.rejected])
    source.notes.append(f"Rejected: {len(source.rejected):,}{f', see {file.name}' if source.rejected else ''}.")
    if not source.items:
        raise DataError(f"none of the {len(rejected):,} images could be decoded, see {file}")


def data_card(source: Source, args: argparse.Namespace) -> str:
    """DATA.md: what is in the folder, counted, and the command that made it."""
    command = ["python", "prepare.py", args.source, "--out", str(args.out)]
    for name, value in settings_of(args).items():
        if name != "source" and value is not None and value is not False and value != []:      # 0 is a value
            command += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, np.atleast_1d(value)))]
    lines = [f"# {args.out.name}", "", f"    {shlex.join(command)}", "",
             "| | train | val | test |", "|---|---:|---:|---:|"]
    items = [[item for item in source.items if item.split == split] for split in SPLITS]
    lines.append(f"| images | {' | '.join(f'{len(group):,}' for group in items)} |")
    lines.append(f"| patients | {' | '.join(f'{len({item.patient for item in group}):,}' for group in items)} |")
    for place, name in enumerate(source.label_names):
        counts = [Counter(item.labels[place] for item in group) for group in items]
        cells = [f"{n['1']:,} of {n['1'] + n['0']:,}" + (f", {n['-1']:,} uncertain" if n["-1"] else "") for n in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *source.notes, ""])


# ----------------------------------------------------------------------------------------------------------------------
# A data folder, looked at once more.

def verify(args: argparse.Namespace) -> int:
    """Decode every image of a data folder; 1 where something is wrong and stays so, 0 where nothing is, or --drop."""
    file, made = args.folder / "manifest.csv", args.folder / "prepare.json"
    size = json.loads(made.read_text())["size"] if made.exists() else None
    _, rows = read_table(file, "path", ["split"])
    # Of two equal images the one in test stays, then the one in val: what train holds must not shrink a test set.
    paths = sorted(rows, key=lambda path: {"test": 0, "val": 1}.get(rows[path][1][0], 2))
    results = in_parallel(partial(look_at, size=size), [args.folder / path for path in paths], args.workers, "verify")
    problems, first = {}, {}
    for path, (problem, digest) in zip(paths, results, strict=True):
        twin = first.setdefault(digest, path) if digest else path
        if twin != path:
            leak = rows[twin][1] != rows[path][1]
            problem = f"duplicate of {twin}" + (f": {rows[twin][1][0]} leaks into {rows[path][1][0]}" if leak else "")
        if problem:
            problems[path] = problem
            print(f"{path}: {problem}")
    kinds = Counter(problem.split()[0].rstrip(":") for problem in problems.values())
    print(f"{len(rows):,} images: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items()) or 'all good'}")
    if args.drop and problems:
        drop(args.folder, set(problems))
    if args.drop or "missing" not in kinds:
        read_manifest(args.folder)  # patients, splits and labels, too
    return int(bool(problems) and not args.drop)


def look_at(file: Path, size: int | None) -> tuple[str, bytes]:
    """What is wrong with an image of a data folder ("": nothing), and a digest of its pixels (b"": there are none)."""
    try:
        with Image.open(file) as image:
            image.load()
    except FileNotFoundError:
        return "missing", b""
    except Exception as error:
        return f"unreadable: {reason(error)}", b""
    low, high = image.convert("L").getextrema()
    if high - low < MIN_RANGE:
        return f"blank: gray levels {low} to {high} only", b""
    if image.mode != "L" or min(image.size) < MIN_SIDE or size and min(image.size) > size:
        return f"unexpected size or mode: {image.width} x {image.height} {image.mode}", b""
    return "", hashlib.blake2b(image.tobytes() + repr(image.size).encode()).digest()


def drop(folder: Path, paths: set[str]) -> None:
    """Rewrite the manifest without these images; the old one is kept as manifest.1.csv, .2 and so on."""
    file = folder / "manifest.csv"
    with lock(folder):
        with open(file, newline="") as f:
            header, *rows = csv.reader(f)
        kept = [row for row in rows if row[0] not in paths]
        old = next(path for n in range(1, 10**6) if not (path := folder / f"manifest.{n}.csv").exists())
        shutil.copy2(file, old)
        write(file, [header, *kept])
        with open(folder / "DATA.md", "a") as card:
            card.write(f"\nverify --drop left {len(kept):,} images of {len(rows):,}; before: {old.name}.\n")


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of one source, or of verify, and the functions `run`, `items` and `read` that serve it."""
    parser = argparse.ArgumentParser(description="Any source of radiographs -> one data folder.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def add_source(name, help, items, read, src=None, test_fraction=False):
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(run=prepare, items=items, read=read)
        flag = command.add_argument
        flag("--out", type=Path, required=True, help="the data folder to make")
        if src:
            flag("--src", type=Path, required=True, help=src)
        flag("--size", type=int, default=256, help="shorter side of the images, pixels (default: 256)")
        flag("--quality", type=int, default=95, help="of the JPEGs, 1 to 100 (default: 95)")
        flag("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"), help="percentiles that become black and white")
        flag("--enhance", action="store_true", help="bake in contrast enhancement (CLAHE)")
        flag("--max-megapixels", type=float, default=100, help="reject larger images (default: 100)")
        flag("--val-fraction", type=float, default=0.1, help="of the patients, if no val is given (default: 0.1)")
        if test_fraction:
            flag("--test-fraction", type=float, default=0.2, help="of the patients, if no test is given (default: 0.2)")
        flag("--seed", type=int, default=0, help="of the splits, and of the demo's people (default: 0)")
        flag("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
        flag("--overwrite", action="store_true", help="replace what prepare.py wrote into --out before")
        return flag

    flag = add_source("demo", "synthetic chest radiographs with a known truth", demo_items, read_phantom,
                      test_fraction=True)
    flag("--patients", type=int, default=500, help="(default: 500)")
    flag("--images-per-patient", type=int, default=4, help="(default: 4)")
    flag = add_source("folder", "class folders, in train/val/test folders or not; optionally a CSV", folder_items,
                      read_image, "folder of the class folders", test_fraction=True)
    flag("--csv", type=Path, help="table of the images to take")
    flag("--path-column", default="path", help="its column of paths below --src (default: path)")
    flag("--patient-column", default="patient", help="its column of patients (default: patient, if there is one)")
    flag("--split-column", default="split", help="its column of train, val, test (default: split, if there is one)")
    flag("--label-columns", nargs="+", default=[], metavar="COLUMN",
         help="its columns of 1, 0, -1 and blank, or of class names (default: the class folders are the labels)")
    flag("--patients-per-split", action="store_true", help="the numbers of the patients restart in each split")
    add_source("nih", "NIH ChestX-ray14 as downloaded and unpacked", nih_items, read_image,
               "folder of Data_Entry_2017*.csv, train_val_list.txt, test_list.txt and the images")
    flag = add_source("chexpert", "CheXpert-v1.0 or CheXpert-v1.0-small", chexpert_items, read_image,
                      "folder of train.csv, valid.csv, train/ and valid/")
    flag("--all-views", action="store_true", help="take lateral views, too")
    flag("--frontal-only", dest="all_views", action="store_false", default=False, help="leave them out (the default)")
    flag = add_source("dicom", "DICOM radiographs, de-identified on the way", dicom_items, read_dicom,
                      "folder of DICOM files, at any depth", test_fraction=True)
    flag("--modality", nargs="+", default=["CR", "DX"], help="modalities to take (default: CR DX)")
    flag("--salt", type=Path, help="file of the secret for hashing identities, made if missing (default: OUT.salt)")
    flag("--labels", type=Path, help="CSV of labels")
    flag("--key", choices=DICOM_KEYS, default="PatientID", help="its column that says whose (default: PatientID)")
    flag("--label-columns", nargs="+", default=[], metavar="COLUMN", help="its labels (default: all other columns)")

    command = commands.add_parser("verify", help="decode a data folder once more", allow_abbrev=False)
    command.set_defaults(run=verify)
    command.add_argument("folder", type=Path, help="the data folder")
    command.add_argument("--drop", action="store_true", help="take what is wrong out of the manifest; keep the old one")
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")

    args = parser.parse_args(argv)
    if args.source == "dicom" and not args.salt:
        args.salt = Path(f"{args.out}.salt")
    check_flags(args, commands.choices[args.source].error)
    return args


def check_flags(args: argparse.Namespace, error: Callable) -> None:
    flags = vars(args)
    limits = {"patients": (3, 99_999), "images_per_patient": (1, 99), "size": (MIN_SIDE, 9999), "quality": (1, 100),
              "max_megapixels": (1, 999), "workers": (1, 999)}
    for name, (low, high) in limits.items():
        if not low <= flags.get(name, low) <= high:
            error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    fractions = [flags.get("val_fraction", 0), flags.get("test_fraction", 0)]
    if min(fractions) < 0 or sum(fractions) >= 1:
        error("--val-fraction and --test-fraction must leave something for train")
    low, high = flags.get("stretch") or (0, 100)
    if not 0 <= low < high <= 100:
        error("--stretch takes two percentiles, 0 <= LOW < HIGH <= 100")
    if args.source == "dicom" and args.out.resolve() in args.salt.resolve().parents:
        error("--salt must not lie inside --out, which may be handed on")
    if flags.get("label_columns") and not (flags.get("csv") or flags.get("labels")):
        error(f"--label-columns are columns of {'--csv' if args.source == 'folder' else '--labels'}, which is missing")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return args.run(args)
    except DataError as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:        # a full disk, a folder that may not be written, a CSV that is not there
        sys.exit(f"prepare.py: {error.strerror or error}: {error.filename or args.out}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command goes on where this one stopped")


if __name__ == "__main__":
    sys.exit(main())
