"""Sources: which image becomes which row of the manifest.

A source is a function `…_items(args, files)`: the files below --src in, a Source out, which holds
patient, split and labels of each image. Beside it stands `…_flags(flag)` where it has flags of its
own. From there on all sources are alike (prepare.py). DICOM is a source, too, in dicom.py.
"""
import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

import phantom
from manifest import LABEL_VALUES, DataError, number_within
from radiograph import EXTENSIONS, ImageSettings, Reading

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
    source: str                     # the file, below --src; of a phantom, what it is made from
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
# The demo: phantoms, which are computed and not read.

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


def read_phantom(file: Path, settings: ImageSettings) -> Reading:
    """The phantom that seed/patient/image names. There is no such file: it is computed."""
    seed, patient, image = map(int, file.parts)
    return Reading(Image.fromarray(phantom.phantom(seed, patient, image, settings.size)))


# --------------------------------------------------------------------------------------------------
# Folders of classes, and a table.

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
    places = dict(zip(images, places_of(images), strict=True))
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
    split: str | None           # "" where there are no split folders; None for a file beside them
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


# --------------------------------------------------------------------------------------------------
# NIH ChestX-ray14.

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


# --------------------------------------------------------------------------------------------------
# CheXpert.

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
