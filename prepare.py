"""Stage 0: any source of chest radiographs -> one data folder, all that the later stages read.

    python prepare.py demo     --out data/demo                      # synthetic, from nothing
    python prepare.py folder   --src chest_xray --out data/kermany  # class folders, optional CSV
    python prepare.py nih      --src NIH --out data/nih             # ChestX-ray14 as unpacked
    python prepare.py chexpert --src CheXpert-v1.0-small --out data/chexpert
    python prepare.py dicom    --src archive --out data/hospital    # de-identified on the way
    python prepare.py verify   data/nih                             # decode all of it once more

A source is a function that says which image becomes which row of the manifest: patient, split and
labels. From there on all sources are alike. A pool of processes decodes every image once and makes
it an 8-bit gray JPEG whose shorter side is --size (radiograph.py). What cannot be decoded, or has
no sure label, is left out and listed in rejected.csv with the reason. manifest.csv is written last:
a folder that has one is complete. An interrupted run is continued by the same command; --overwrite
starts over, for example after the source's images have changed.
"""
import argparse
import csv
import ctypes
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

from PIL import Image
from tqdm import tqdm

import phantom
from dicom import Identity, coder, read_dicom, read_identity
from manifest import (
    LABEL_VALUES, SPLITS, DataError, differing_flags, errors_in_one_sentence, lock, number_within,
    read_manifest, whole_file, write_text)
from radiograph import (
    EXTENSIONS, MIN_SIDE, ImageSettings, Reader, blank_reason, find_files, load_image, read_image,
    reason)

NIH_FINDINGS = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia", "No Finding"]
CHEXPERT_OBSERVATIONS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices"]
SPLIT_NAMES = {             # names of folders and cells of tables, in any case -> the manifest's
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test"}
# The cells of a column of labels as CSV files have them -> as the manifest has them.
CELLS = {cell: cell.removesuffix(".0") for cell in LABEL_VALUES}


# --------------------------------------------------------------------------------------------------
# What a source finds.

@dataclass(slots=True)
class Item:
    """One image on its way into the data folder, and its row of the manifest."""
    source: str                     # the file, below --src
    path: str                       # images/….jpg, below --out
    patient: str                    # whatever tells one patient from another
    split: str                      # train, val, test, or "" where the source does not say
    labels: tuple[str, ...]         # "1", "0", "-1" or "", one for each of Source.label_names


@dataclass
class Source:
    """The images that a source offers, those that it does not, and what its user has to know."""
    label_names: list[str]                                              # as in the manifest
    items: list[Item] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)       # file, reason
    notes: list[str] = field(default_factory=list)                      # sentences for DATA.md


# --------------------------------------------------------------------------------------------------
# Tables.

class Row(NamedTuple):
    """A line of a CSV file; the header is row 1."""
    number: int
    cells: list[str]                # one for each of Table.columns


class Table(NamedTuple):
    """The columns of a CSV file that were asked for, and its rows by their key."""
    file: Path
    columns: list[str]              # without the key's
    rows: dict[str, Row]            # by the cell of the key's column

    def column(self, name: str) -> dict[str, str]:
        """{key: cell} of one column; nothing where it was optional and is not there."""
        if name not in self.columns:
            return {}
        place = self.columns.index(name)
        return {key: row.cells[place] for key, row in self.rows.items()}


def read_table(file: Path, key: str, columns: list[str] | None = None,
               optional: Collection[str] = (),
               normalise: Callable[[str], str] = str) -> Table:
    """A CSV file by its column `key`, whose cells pass through `normalise` and come once each.

    columns: those to read; None for all but `key`. One that is `optional` may be missing.
    A byte-order mark, CRLF and blanks around a cell do not matter. DataError names the file, the
    row and the column where a column is missing, a row is short, or a key comes twice."""
    rows = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            lines = csv.reader(f)

            # The header: where is each of the columns?
            header = [name.strip() for name in next(lines, [])]
            columns = [name for name in header if name != key] if columns is None else columns
            for name in (key, *columns):
                if header.count(name) != 1 and (name in header or name not in optional):
                    raise DataError(f"{file} must have one column {name!r}, "
                                    f"its header is {','.join(header)!r}")
            columns = [name for name in columns if name in header]      # without optional ones
            places = [header.index(name) for name in (key, *columns)]

            # The rows, by their keys.
            for number, line in enumerate(lines, 2):
                if not line:                                            # a blank line
                    continue
                if len(line) != len(header):
                    raise DataError(f"{file}, row {number}: {len(line)} cells where the header "
                                    f"has {len(header)}")
                # The same few words fill most columns: interned, each is in memory once.
                value, *cells = [sys.intern(line[place].strip()) for place in places]
                value = normalise(value)
                if value in rows:
                    raise DataError(f"{file}, row {number}, column {key}: {value} is already in "
                                    f"row {rows[value].number}")
                rows[value] = Row(number, cells)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a CSV file in UTF-8 ({error})") from None
    return Table(file, columns, rows)


def read_labels(table: Table, names: list[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Columns `names` of a table as the manifest's label names, and {key: the manifest's cells}.

    A column of 1, 0, -1 and blanks is a label. A column of words, for example of diseases, becomes
    one label for each word, and a blank in it leaves them all open. A column that mixes both has a
    typing error in it: DataError names the row."""
    label_names: list[str] = []
    labels: dict[str, tuple[str, ...]] = dict.fromkeys(table.rows, ())
    for name in names:
        # Every cell is a value of a label, or every cell that is not blank is a word.
        column = table.column(name)
        words = sorted(set(column.values()) - CELLS.keys())
        if words and not {"", *words} >= set(column.values()):
            key, word = next((key, cell) for key, cell in column.items() if cell in words)
            raise DataError(f"{table.file}, row {table.rows[key].number}, column {name}: {word!r} "
                            "among values of 1, 0, -1 and blank")

        # Equal words of two columns must not become one label: then the column's name goes first.
        if not words:
            label_names.append(name)
        elif len(names) == 1:
            label_names += words
        else:
            label_names += [f"{name} {word}" for word in words]
        for key, cell in column.items():
            labels[key] += one_hot(cell, words) if words else (CELLS[cell],)
    return label_names, labels


def one_hot(word: str, words: list[str]) -> tuple[str, ...]:
    """Present for the word, absent for all others; all open where there is no word."""
    if not word:
        return ("",) * len(words)
    return tuple("1" if word == other else "0" for other in words)


def in_table_and_on_disk(table: Table, files: dict[str, str], source: Source) -> Iterator[str]:
    """Yield the keys of a table's rows that are also in {key: file on disk}.

    What is in only one of the two is rejected."""
    for key in table.rows:
        if key in files:
            yield key
        else:
            source.rejected.append((key, f"named in {table.file.name}, missing on disk"))
    source.rejected += [(file, f"not in {table.file.name}")
                        for key, file in files.items() if key not in table.rows]


def jpeg_path(file: str) -> str:
    """Where a source's file goes in the data folder.

    A name that is not in UTF-8 gets replacement characters, as the manifest is in UTF-8."""
    return "images/" + os.fsencode(PurePosixPath(file).with_suffix(".jpg")).decode(errors="replace")


# --------------------------------------------------------------------------------------------------
# Sources. Each has a function `…_items(args, files)`, from the files below --src to a Source, and
# one `…_flags(flag)` for the flags that it alone has. SOURCES, further down, lists them.

def demo_flags(flag: Callable) -> None:
    flag("--patients", type=number_within(int, 3, 99_999), default=500, help="(default: 500)")
    flag("--images-per-patient", type=number_within(int, 1, 99), default=4, help="(default: 4)")


def demo_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Phantoms: --patients people, --images-per-patient radiographs of each, and the truth."""
    source = Source([*phantom.FINDINGS, "No Finding"])
    for patient in range(args.patients):
        for image in range(args.images_per_patient):
            findings = phantom.findings(args.seed, patient, image)
            labels = ["1" if present else "0" for present in (*findings, not findings.any())]
            source.items.append(Item(
                source=f"{args.seed}/{patient}/{image}",        # for read_phantom
                path=f"images/{patient:05d}/{image}.jpg",
                patient=f"{patient:05d}", split="", labels=tuple(labels)))
    return source


def read_phantom(file: Path, settings: ImageSettings) -> Image.Image:
    """The phantom that seed/patient/image names. There is no such file: it is computed."""
    seed, patient, image = map(int, file.parts)
    return Image.fromarray(phantom.phantom(seed, patient, image, settings.size))


def folder_flags(flag: Callable) -> None:
    flag("--csv", type=Path, help="table of the images to take")
    flag("--path-column", default="path",
         help="its column of paths below --src (default: path)")
    flag("--patient-column", default="patient",
         help="its column of patients (default: patient, if there is one)")
    flag("--split-column", default="split",
         help="its column of train, val, test (default: split, if there is one)")
    flag("--label-columns", nargs="+", default=[], metavar="COLUMN",
         help="its columns of 1, 0, -1 and blank, or of class names "
              "(default: the class folders are the labels)")
    flag("--patients-per-split", action="store_true",
         help="the numbers of the patients restart in each split")


def folder_items(args: argparse.Namespace, files: list[str]) -> Source:
    """[train|val|test/]class/….png. Where --csv and the folders disagree, --csv wins."""
    # What the folders say.
    images = [file for file in files if file.lower().endswith(EXTENSIONS)]
    places = {file: place for file, place in zip(images, places_of(images), strict=True)}
    splits = {file: place.split for file, place in places.items()}
    patients = {}
    source = Source(sorted({place.class_name for place in places.values()} - {""}))
    labels = {file: one_hot(place.class_name, source.label_names)
              for file, place in places.items()}

    # What the table says.
    if args.csv:
        table = read_table(
            args.csv, args.path_column,
            [args.patient_column, args.split_column, *args.label_columns],
            optional={"patient", "split"} - set(args.label_columns),
            normalise=lambda path: os.path.normpath(path.replace("\\", "/")))
        images = list(in_table_and_on_disk(table, {file: file for file in images}, source))
        check_patients_and_splits(table, images, args.patient_column, args.split_column)
        patients = table.column(args.patient_column)
        splits |= {file: SPLIT_NAMES.get(split.lower(), "")
                   for file, split in table.column(args.split_column).items()}
        if args.label_columns:
            source.label_names, labels = read_labels(table, args.label_columns)

    # One item an image. Where x.png lies beside x.jpg both keep their suffix, as x.png.jpg.
    sharing = Counter(map(jpeg_path, images))
    for file in images:
        split = splits[file]
        if split is None:
            source.rejected.append((file, "outside the folders train, val and test"))
            continue
        path = jpeg_path(file if sharing[jpeg_path(file)] == 1 else file + ".jpg")
        patient = patients.get(file, path)
        if args.patients_per_split and split:
            patient = f"{split}-{patient}"
        source.items.append(Item(file, path, patient, split, labels[file]))

    # What the user has to know.
    if not patients:
        source.notes.append("No patient is known: every image counts as a patient of its own.")
    others = Counter(PurePosixPath(file).suffix or "without suffix"
                     for file in files if file not in places)
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in others.items())
    source.notes.append(f"Files passed over: {counts or 'none'}.")
    return source


class Place(NamedTuple):
    """What the folders around a file say of it."""
    split: str | None           # "": there are no split folders; None: there are, it is in none
    class_name: str             # "" for a file that is in no class folder


def places_of(images: list[str]) -> Iterator[Place]:
    """The Place of each image. One folder train, val or test at the top makes all split folders."""
    parents = [PurePosixPath(file).parts[:-1] for file in images]
    with_splits = any(folders and folders[0].lower() in SPLIT_NAMES for folders in parents)
    for folders in parents:
        split = ""
        if with_splits:
            split = SPLIT_NAMES.get(folders[0].lower()) if folders else None
            folders = folders[1:]
        yield Place(split, folders[0] if folders else "")


def check_patients_and_splits(table: Table, images: list[str], patient_column: str,
                              split_column: str) -> None:
    """DataError for the first of the images whose patient is blank or whose split is unknown."""
    patients, splits = table.column(patient_column), table.column(split_column)
    for file in images:
        where = f"{table.file}, row {table.rows[file].number}"
        if patients.get(file) == "":
            raise DataError(f"{where}, column {patient_column}: empty")
        split = splits.get(file)
        if split and split.lower() not in SPLIT_NAMES:
            raise DataError(f"{where}, column {split_column}: {split!r} is no split")


def nih_items(args: argparse.Namespace, files: list[str]) -> Source:
    """ChestX-ray14: Data_Entry_2017*.csv and the two official lists; PNGs in any folder below."""
    tables = list(args.src.glob("Data_Entry_2017*.csv"))
    if len(tables) != 1:
        raise DataError(f"{args.src} must hold one Data_Entry_2017*.csv, it holds {len(tables)}")

    # Official lists of the images to train on and to test on.
    train = set((args.src / "train_val_list.txt").read_text().split())
    test = set((args.src / "test_list.txt").read_text().split())
    if train & test:
        raise DataError(f"{min(train & test)} is in both train_val_list.txt and test_list.txt "
                        f"of {args.src}")

    # The table and the lists go by an image's name, whichever folder it was unpacked into.
    images = {}
    for file in files:
        name = PurePosixPath(file).name
        if file.endswith(".png") and images.setdefault(name, file) != file:
            raise DataError(f"{file} and {images[name]} of {args.src} have the same name")

    table = read_table(tables[0], "Image Index", ["Finding Labels", "Patient ID"])
    source = Source(NIH_FINDINGS)
    for image in in_table_and_on_disk(table, images, source):
        number, (findings, patient) = table.rows[image]
        present = set(findings.split("|"))
        if not present <= set(NIH_FINDINGS):
            raise DataError(f"{table.file}, row {number}, column Finding Labels: {findings!r} "
                            "has an unknown finding")
        labels = tuple("1" if finding in present else "0" for finding in NIH_FINDINGS)
        if image in train or image in test:
            split = "train" if image in train else "test"
            source.items.append(Item(images[image], jpeg_path(image), patient, split, labels))
        else:
            source.rejected.append(
                (images[image], "neither in train_val_list.txt nor in test_list.txt"))
    return source


def chexpert_flags(flag: Callable) -> None:
    flag("--all-views", action="store_true", help="take lateral views, too")


def chexpert_items(args: argparse.Namespace, files: list[str]) -> Source:
    """CheXpert-v1.0 or -small: train.csv, and valid.csv as the test split; -1 stays -1."""
    source, laterals = Source(CHEXPERT_OBSERVATIONS), 0
    for part, split in (("train", "train"), ("valid", "test")):
        images = {file: file for file in files
                  if file.startswith(f"{part}/") and file.lower().endswith(EXTENSIONS)}
        # CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg: the first part is --src.
        table = read_table(args.src / f"{part}.csv", "Path",
                           ["Frontal/Lateral", *CHEXPERT_OBSERVATIONS],
                           normalise=lambda path: path.partition("/")[2])
        views = table.column("Frontal/Lateral")
        _, labels = read_labels(table, CHEXPERT_OBSERVATIONS)
        for image in in_table_and_on_disk(table, images, source):
            if not args.all_views and views[image] != "Frontal":
                laterals += 1
                continue
            patient = image.split("/")[1]
            source.items.append(Item(image, jpeg_path(image), patient, split, labels[image]))
    source.notes.append(f"Lateral views left out: {laterals:,} (--all-views takes them).")
    return source


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


@dataclass(frozen=True)
class SourceKind:
    """What the command line and the pool of processes need to know of a source."""
    help: str
    items: Callable[[argparse.Namespace, list[str]], Source]
    read: Reader                                        # makes an image of an Item's source
    src_help: str = ""                                  # of --src; "": the source reads no files
    flags: Callable[[Callable], None] | None = None     # declares those that it alone has
    carves_test: bool = True                            # where the source gives no test split


SOURCES = {
    "demo": SourceKind(
        "synthetic chest radiographs with a known truth",
        demo_items, read_phantom, flags=demo_flags),
    "folder": SourceKind(
        "class folders, in train/val/test folders or not; optionally a CSV",
        folder_items, read_image, "folder of the class folders", folder_flags),
    "nih": SourceKind(
        "NIH ChestX-ray14 as downloaded and unpacked",
        nih_items, read_image,
        "folder of Data_Entry_2017*.csv, train_val_list.txt, test_list.txt and the images",
        carves_test=False),
    "chexpert": SourceKind(
        "CheXpert-v1.0 or CheXpert-v1.0-small",
        chexpert_items, read_image, "folder of train.csv, valid.csv, train/ and valid/",
        chexpert_flags, carves_test=False),
    "dicom": SourceKind(
        "DICOM radiographs, de-identified on the way",
        dicom_items, read_dicom, "folder of DICOM files, at any depth", dicom_flags),
}


# --------------------------------------------------------------------------------------------------
# Splits.

def assign_splits(source: Source, args: argparse.Namespace) -> None:
    """Fill in the splits that the source does not give, by patient; those it gives stay.

    A missing test or val split is carved from the patients in train or in none. They are ordered by
    a hash, so that in a folder that grows nearly all stay where they were. DataError for a patient
    in two given splits: what is learned from one image would be tested on another of the same
    chest."""
    # The splits that the source gives; a patient without one may go to any.
    split_of = {}                               # by patient
    for item in source.items:
        split = item.split or "train"
        if split_of.setdefault(item.patient, split) != split:
            hint = ""
            if "patients_per_split" in args:
                hint = " (--patients-per-split if its numbering restarts in each)"
            raise DataError(f"patient {item.patient} is in {split} and in {split_of[item.patient]} "
                            f"of {args.src}{hint}")

    # The missing ones, each from what the one before it left.
    pool = [patient for patient, split in split_of.items() if split == "train"]
    pool.sort(key=lambda patient: hashlib.sha256(f"{args.seed} {patient}".encode()).digest())
    total = len(pool)
    for split in ("test", "val"):
        fraction = getattr(args, f"{split}_fraction", 0)
        if not fraction or split in split_of.values():
            continue
        count = max(1, round(fraction * total))
        count = max(0, min(count, len(pool) - 1))               # somebody stays in train
        split_of |= dict.fromkeys(pool[:count], split)
        del pool[:count]
        source.notes.append(f"The {split} split was carved by patient: {count:,} of {total:,}, "
                            f"seed {args.seed}.")
    for item in source.items:
        item.split = split_of[item.patient]


# --------------------------------------------------------------------------------------------------
# Images: a pool of processes that read, finish and write them.

@dataclass(frozen=True)
class Conversion:
    """From where to where, and how, the images of a run are converted."""
    read: Reader
    src: Path
    out: Path
    settings: ImageSettings


def convert(item: Item, conversion: Conversion) -> str:
    """Read one item and write its JPEG; "" or the reason why there is none.

    OSError where --out cannot be written: that ends the run."""
    try:
        image = load_image(conversion.src / item.source, conversion.read, conversion.settings)
    except DataError as error:
        return str(error)
    image.info.clear()              # or Pillow copies the source's comment and resolution
    jpeg = io.BytesIO()             # whole in memory before the first byte is written to disk
    image.save(jpeg, "JPEG", quality=conversion.settings.quality)
    target = conversion.out / item.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target, sync=False) as file:
        file.write(jpeg.getvalue())
    return ""


def in_parallel(function: Callable, items: list, workers: int, title: str) -> list:
    """function(item) of all items, in their order, by `workers` processes under a progress bar."""
    tqdm.monitor_interval = 0       # no thread: fork, which shares what is imported, wants none
    pool = ProcessPoolExecutor(workers, get_context("fork"), die_with_parent)
    try:
        # Ctrl-C reaches all processes of a terminal and is for this one only. A signal that is
        # blocked here when the workers are started stays blocked in them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        results = pool.map(function, items, chunksize=8)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return list(tqdm(results, title, len(items), unit=" images", dynamic_ncols=True))
    except BrokenProcessPool:
        raise DataError("a worker process died, most likely for want of memory; the same command "
                        "goes on where this one stopped, with fewer --workers if it happens "
                        "again") from None
    finally:
        # Whatever ended the loop, the workers finish the few images that they have begun.
        pool.shutdown(cancel_futures=True)


def die_with_parent() -> None:
    """Called in a worker: let it not outlive its parent, or it would keep the folder locked."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def write_images(source: Source, args: argparse.Namespace) -> None:
    """Write the images that are not there yet, and the list of what was rejected.

    What cannot be converted leaves source.items. DataError where nothing is left."""
    # An earlier run of the same command may have written a part of them.
    todo = [item for item in source.items if not is_written(args.out / item.path)]
    if len(todo) < len(source.items):
        print(f"{len(source.items) - len(todo):,} of {len(source.items):,} images "
              "are there already")
    conversion = Conversion(
        SOURCES[args.source].read, src_folder(args), args.out, image_settings(args))
    reasons = in_parallel(partial(convert, conversion=conversion), todo, args.workers,
                          f"{args.source} -> {args.out}")

    # What could not be converted joins what the source had rejected.
    failed = {item.source: why for item, why in zip(todo, reasons, strict=True) if why}
    source.items = [item for item in source.items if item.source not in failed]
    source.rejected = sorted([*source.rejected, *failed.items()])

    # The names of a hospital's files are for the hospital only: there the list lies beside the
    # data folder, which may be handed on.
    file = args.out / "rejected.csv"
    if args.source == "dicom":
        file = Path(f"{args.out}.rejected.csv")
    write_csv(file, [("file", "reason"), *source.rejected])
    see = f", see {file.name}" if source.rejected else ""
    source.notes.append(f"Rejected: {len(source.rejected):,}{see}.")
    if not source.items:
        raise DataError(f"none of the {len(failed):,} images could be decoded, see {file}")


def is_written(file: Path) -> bool:
    """Whether an image is there. Only a whole one gets its name, but a power cut may empty it."""
    return file.exists() and file.stat().st_size > 0


# --------------------------------------------------------------------------------------------------
# The data folder: consistent whenever the run ends.

def prepare(args: argparse.Namespace) -> None:
    """Make the data folder --out of a source, or finish it where an earlier run was interrupted.

    Whatever is wrong with the source is found before anything is written."""
    check_out(args)
    with lock_folder(args.out):
        files = find_files(args.src) if "src" in args else []
        source = SOURCES[args.source].items(args, files)
        check_source(source, args)
        assign_splits(source, args)

        # Remove what another run made, its manifest first: a folder that has one is complete.
        if args.overwrite:
            for name in ("manifest.csv", "DATA.md", "rejected.csv", "prepare.json"):
                (args.out / name).unlink(missing_ok=True)
            shutil.rmtree(args.out / "images", ignore_errors=True)

        # Say what is being made, make it, and only then write the manifest.
        write_text(args.out / "prepare.json", json.dumps(settings_of(args), indent=1))
        write_images(source, args)
        card = data_card(source, args)
        write_text(args.out / "DATA.md", card)
        rows = [(item.path, item.patient, item.split, *item.labels) for item in source.items]
        write_csv(args.out / "manifest.csv",
                  [("path", "patient", "split", *source.label_names), *rows])
    print(card)


def check_out(args: argparse.Namespace) -> None:
    """DataError where --out may not be written.

    It may be where it is empty, or holds an earlier part of this very run, or of another one that
    --overwrite gives up."""
    # Images that are written into the source would be found there by the next run.
    if "src" in args:
        src, out = args.src.resolve(), args.out.resolve()
        if not src.is_dir():
            raise DataError(f"--src {args.src} is not a folder")
        if src == out or src in out.parents or out in src.parents:
            raise DataError(f"--src {args.src} and --out {args.out} must not lie one inside "
                            "the other")

    # Whose folder is it? A run that was killed early may have left no more than these two.
    names = {path.name for path in args.out.glob("*")} - {".lock", "prepare.json.tmp"}
    if not names:
        return
    if "prepare.json" not in names:
        raise DataError(f"{args.out} is not empty and was not made by prepare.py")
    if not args.overwrite:
        before = read_settings(args.out / "prepare.json")
        now = json.loads(json.dumps(settings_of(args)))         # as if it had been read, too
        differing = differing_flags(before, now)
        if differing:
            raise DataError(f"{args.out} was made with other flags: {differing}; choose another "
                            "--out, or give it up with --overwrite")


def lock_folder(folder: Path) -> TextIO:
    """A file that holds a folder, made where it is missing, until it is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    if not lock(file):
        file.close()
        raise DataError(f"{folder} is being written by another run of prepare.py")
    return file


def check_source(source: Source, args: argparse.Namespace) -> None:
    """DataError where a source has no image, a label without a proper name, or a path twice."""
    # Most often the wrong --src was given, and the commonest reasons say so.
    if not source.items:
        reasons = Counter(why for _, why in source.rejected).most_common(3)
        raise DataError(f"no image found in {args.src}"
                        + "".join(f"; {count:,} files: {why}" for why, count in reasons))
    for name in source.label_names:
        taken = name in ("path", "patient", "split") or source.label_names.count(name) > 1
        if not name or taken:
            raise DataError(f"{name!r} cannot be the name of a label, or is that of two")
    # x.png, x.jpg and x.png.jpg in one folder: one image would replace another.
    path, count = Counter(item.path for item in source.items).most_common(1)[0]
    if count > 1:
        raise DataError(f"two files of {args.src} would both become {path}: rename one of them")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that shape the data folder, for prepare.json and DATA.md.

    Those of DICOM that may hold names are left out."""
    left_out = {"out", "workers", "overwrite"}
    if args.source == "dicom":
        left_out |= {"src", "labels", "salt"}
    return {name: str(value.absolute()) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name not in left_out}


def read_settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise DataError(f"{file} is damaged, and says no more how its folder was made") from None


def write_csv(file: Path, rows: Iterable) -> None:
    """Replace a CSV file as a whole.

    Bytes of file names that are not in UTF-8 are escaped: the list of what was rejected must be
    readable as text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with whole_file(file) as f:
        f.write(text.getvalue().encode(errors="backslashreplace"))


def data_card(source: Source, args: argparse.Namespace) -> str:
    """DATA.md: the command that made the folder, and what is in it, counted."""
    # The command. Flags without a value are left out; 0 is a value.
    command = ["python", "prepare.py", args.source, "--out", str(args.out)]
    for name, value in settings_of(args).items():
        if name == "source" or value is None or value is False or value == []:
            continue
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command += map(str, value if isinstance(value, list) else [value])

    # The table: a column for each split, a row for images, for patients and for each label.
    splits = [[item for item in source.items if item.split == split] for split in SPLITS]
    rows = [("images", [f"{len(items):,}" for items in splits]),
            ("patients", [f"{len({item.patient for item in items}):,}" for items in splits])]
    for place, name in enumerate(source.label_names):
        counts = [Counter(item.labels[place] for item in items) for items in splits]
        rows.append((name, [label_cell(count) for count in counts]))
    table = ["| | train | val | test |", "|---|---:|---:|---:|",
             *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]
    return "\n".join([f"# {args.out.name}", "", f"    {shlex.join(command)}", "",
                      *table, "", *source.notes, ""])


def label_cell(counts: Counter) -> str:
    """`present of present and absent`, and the uncertain ones."""
    text = f"{counts['1']:,} of {counts['1'] + counts['0']:,}"
    return text + (f", {counts['-1']:,} uncertain" if counts["-1"] else "")


# --------------------------------------------------------------------------------------------------
# A data folder, decoded once more.

def verify(args: argparse.Namespace) -> int:
    """Decode every image of a data folder and print what is wrong.

    The exit code is 1 where something is wrong and stays so; 0 where nothing is, or --drop."""
    table = read_table(args.folder / "manifest.csv", "path", ["split"])
    problems = find_problems(args.folder, table.column("split"), args.workers)
    for path, problem in problems.items():
        print(f"{path}: {problem}")
    kinds = Counter(problem.split()[0].rstrip(":") for problem in problems.values())
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    print(f"{len(table.rows):,} images: {counts or 'all good'}")

    if args.drop and problems:
        drop(args.folder, set(problems))
    if args.drop or "missing" not in kinds:
        read_manifest(args.folder)      # the patients, splits and labels are checked, too
    return 1 if problems and not args.drop else 0


def find_problems(folder: Path, split_of: dict[str, str], workers: int) -> dict[str, str]:
    """{path: what is wrong with it} of the images {path: split} of a data folder."""
    made = folder / "prepare.json"      # not there in a folder that someone made by hand
    size = read_settings(made)["size"] if made.exists() else None
    # Of two identical images test's stays, or else val's: the test set must not shrink.
    order = {"test": 0, "val": 1}
    paths = sorted(split_of, key=lambda path: order.get(split_of[path], 2))
    looks = in_parallel(partial(look_at, size=size), [folder / path for path in paths], workers,
                        "verify")
    problems, first = {}, {}            # first: the path with which each digest was met first
    for path, look in zip(paths, looks, strict=True):
        problem = look.problem
        twin = first.setdefault(look.digest, path) if look.digest else path
        if twin != path:
            problem = f"duplicate of {twin}"
            if split_of[twin] != split_of[path]:
                problem += f": {split_of[twin]} leaks into {split_of[path]}"
        if problem:
            problems[path] = problem
    return problems


class Look(NamedTuple):
    """What was seen of an image."""
    problem: str                        # "" where nothing is wrong
    digest: bytes = b""                 # of its pixels; b"" where something is wrong


def look_at(file: Path, size: int | None) -> Look:
    """Decode an image of a data folder whose images were made with --size, if that is known."""
    try:
        with Image.open(file) as image:
            image.load()
    except FileNotFoundError:
        return Look("missing")
    except Exception as error:          # a decoder may raise anything
        return Look(f"unreadable: {reason(error)}")
    blank = blank_reason(image.convert("L"))
    if blank:
        return Look(blank)
    side = min(image.size)
    if image.mode != "L" or side < MIN_SIDE or size and side > size:
        return Look(f"unexpected size or mode: {image.width} x {image.height} {image.mode}")
    pixels = image.tobytes() + repr(image.size).encode()
    return Look("", hashlib.blake2b(pixels).digest())


def drop(folder: Path, paths: set[str]) -> None:
    """Rewrite the manifest without these images; the old one stays as manifest.1.csv, .2, …"""
    file = folder / "manifest.csv"
    with lock_folder(folder):
        with open(file, newline="") as f:
            header, *rows = csv.reader(f)
        # The first free number: no manifest that was put away is ever overwritten.
        remaining = [row for row in rows if row[0] not in paths]
        number = 1
        while (folder / f"manifest.{number}.csv").exists():
            number += 1
        old = folder / f"manifest.{number}.csv"
        shutil.copy2(file, old)
        write_csv(file, [header, *remaining])
        with open(folder / "DATA.md", "a") as card:
            card.write(f"\nverify --drop left {len(remaining):,} images of {len(rows):,}; "
                       f"before: {old.name}.\n")


# --------------------------------------------------------------------------------------------------
# The command line.

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of one source, whose name is args.source, or of verify."""
    parser = argparse.ArgumentParser(
        description="Any source of radiographs -> one data folder.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, kind in SOURCES.items():
        command = commands.add_parser(
            name, help=kind.help, description=kind.help, allow_abbrev=False)
        source_flags(command.add_argument, kind)
        if kind.flags:
            kind.flags(command.add_argument)
    command = commands.add_parser("verify", help="decode a data folder once more",
                                  allow_abbrev=False)
    verify_flags(command.add_argument)

    args = parser.parse_args(argv)
    if args.source == "dicom" and not args.salt:
        args.salt = Path(f"{args.out}.salt")
    if args.source != "verify":
        check_flags(args, commands.choices[args.source].error)
    return args


def source_flags(flag: Callable, kind: SourceKind) -> None:
    """The flags that all sources have."""
    flag("--out", type=Path, required=True, help="the data folder to make")
    if kind.src_help:
        flag("--src", type=Path, required=True, help=kind.src_help)
    flag("--size", type=number_within(int, MIN_SIDE, 9999), default=ImageSettings.size,
         help="shorter side of the images, pixels (default: %(default)s)")
    flag("--quality", type=number_within(int, 1, 100), default=ImageSettings.quality,
         help="of the JPEGs, 1 to 100 (default: %(default)s)")
    flag("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"),
         help="percentiles that become black and white")
    flag("--max-megapixels", type=number_within(float, 1, 999),
         default=ImageSettings.max_megapixels, help="reject larger images (default: %(default)s)")
    flag("--val-fraction", type=float, default=0.1,
         help="of the patients, if no val is given (default: %(default)s)")
    if kind.carves_test:
        flag("--test-fraction", type=float, default=0.2,
             help="of the patients, if no test is given (default: %(default)s)")
    flag("--seed", type=number_within(int, 0, 2**63 - 1), default=0,
         help="of the splits, and of the demo's people (default: %(default)s)")
    workers_flag(flag)
    flag("--overwrite", action="store_true",
         help="replace what prepare.py wrote into --out before")


def workers_flag(flag: Callable) -> None:
    flag("--workers", type=number_within(int, 1, 999), default=len(os.sched_getaffinity(0)),
         help="processes (default: cores)")


def verify_flags(flag: Callable) -> None:
    flag("folder", type=Path, help="the data folder")
    flag("--drop", action="store_true",
         help="take what is wrong out of the manifest; keep the old one")
    workers_flag(flag)


def check_flags(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Report flags of a source that do not go together by `error`, which ends the script."""
    fractions = args.val_fraction, getattr(args, "test_fraction", 0)
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        error("--val-fraction and --test-fraction must leave something for train")
    low, high = args.stretch or (0, 100)
    if not 0 <= low < high <= 100:
        error("--stretch takes two percentiles, 0 <= LOW < HIGH <= 100")
    if args.source == "dicom" and args.out.resolve() in args.salt.resolve().parents:
        error("--salt must not lie inside --out, which may be handed on")
    table = {"folder": "csv", "dicom": "labels"}.get(args.source)
    if table and args.label_columns and not getattr(args, table):
        error(f"--label-columns are columns of --{table}, which is missing")


def image_settings(args: argparse.Namespace) -> ImageSettings:
    return ImageSettings(args.size, args.quality, args.stretch, args.max_megapixels)


def src_folder(args: argparse.Namespace) -> Path:
    """--src, or for a source that reads no files what leaves a path below it as it is."""
    return args.src if "src" in args else Path()


def main(argv: list[str] | None = None) -> int:
    """The exit code, where no error ends the script with a sentence."""
    args = parse_args(argv)
    if args.source == "verify":
        with errors_in_one_sentence("prepare.py", args.folder):
            return verify(args)
    with errors_in_one_sentence("prepare.py", args.out):
        prepare(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
