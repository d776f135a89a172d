"""Sources: which image becomes which row of the manifest.

A source is a function `…_items(args, files)`: it gets the files below --src and returns a Source,
which holds patient, split and labels of each image. A source with flags of its own has a function
`…_flags(flag)` as well. From there on all sources are treated alike (prepare.py). This file has
what sources have in common, and the demo, NIH, CheXpert and MIMIC; folders.py and dicom.py have one
source each. tables.py says what the cells of a table mean.
"""
import argparse
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

import phantom
from common import DataError, read_text
from doubts import (
    Doubt, classes_of_splits, patient_key, seem_splits, untrained_classes)
from flags import Several, number_within
from layout import split_name
from radiograph import EXTENSIONS, ImageSettings, Reading
from tables import LabelRules, Table, read_labels, read_table, value_of

NIH_FINDINGS = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia", "No Finding"]
NIH_NAME = re.compile(r"(\d{8})_\d{3}\b")      # patient and follow-up number, in an image's name
CHEXPERT_OBSERVATIONS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices"]


# --------------------------------------------------------------------------------------------------
# What a source finds.

@dataclass(slots=True)
class Item:
    """One image on its way into the data folder, and its row of the manifest."""
    source: str                     # the file, below --src; for a phantom, its seed and numbers
    path: str                       # images/….jpg, below --out
    patient: str                    # any text that tells patients apart
    split: str                      # train, val, test, or "" if the source does not say
    labels: tuple[str, ...]         # "1", "0", "-1" or "", one for each of Source.label_names
    study: str = ""                 # the patient's examination that the image is from, if known
    view: str = ""                  # PA, AP, Lateral or another word, if known


@dataclass
class Source:
    """The images that a source offers, those that it does not, and what the user has to know."""
    label_names: list[str]                                              # as in the manifest
    items: list[Item] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)       # file, reason
    notes: list[str] = field(default_factory=list)                      # sentences for DATA.md
    passed_over: str = ""               # one of the notes: files that were not asked for
    doubts: list[Doubt] = field(default_factory=list)                   # what may not be meant
    asked_for: set[str] = field(default_factory=set)    # reasons that lose no image
    official_labels: bool = False       # the same for all users of this source, rare ones included
    classes: set[str] = field(default_factory=set)      # labels that are classes
    patients_known: bool = True         # False: every image counts as a patient of its own


# --------------------------------------------------------------------------------------------------
# What sources have in common.

def label_flags(flag: Callable, default: str) -> None:
    """Declare the flags on a table's labels. default: what the labels are without these flags."""
    flag("--label-columns", nargs="+", action=Several, default=[], metavar="COLUMN",
         help="its columns of values as listed below, or of class names "
              f"(default: {default})")
    flag("--class-columns", nargs="+", action=Several, default=[], metavar="COLUMN",
         help="its columns of class names, whatever these look like: 0, 1, 2; yes, no, other")
    flag("--not-mentioned", nargs="*", action=Several, metavar="WORD",
         help="words of --class-columns that name no class, as blank cells do "
              "(default: nan, null, <na>, #n/a; none, na, n/a and - are refused)")
    flag("--label-separator", default="", metavar="TEXT",
         help="what separates the findings in one cell; none: a cell is one finding "
              "(default: | or ;, or a list in brackets)")
    flag("--several-rows", choices=("any", "majority"), default="",
         help="an image may have several rows: a finding counts if any row names it, or if more "
              "than half do (default: an error)")
    flag("--rater-column", default="",
         help="its column that says whose a row is, for --several-rows (default: every row counts)")


def label_rules(args: argparse.Namespace) -> LabelRules:
    """The rules that label_flags and --allow give for the labels of a table."""
    words = None if args.not_mentioned is None else tuple(args.not_mentioned)
    return LabelRules(tuple(args.class_columns), words, args.label_separator, args.several_rows,
                      args.rater_column, "many-classes" in args.allow,
                      "mixed-letters" in args.allow)


def jpeg_path(file: str) -> str:
    """The path of a source's file in the data folder."""
    return "images/" + text_of(str(PurePosixPath(file).with_suffix(".jpg")))


def text_of(name: str) -> str:
    """A name as UTF-8 text, as the manifest needs it. Bytes that are not UTF-8 become replacement
    characters."""
    return os.fsencode(name).decode(errors="replace")


def in_table_and_on_disk(table: Table, files: dict[str, str], source: Source,
                         wanted: Callable[[str], bool] = lambda key: True) -> Iterator[str]:
    """Yield the keys of a table's rows that are also in {key: file on disk}.

    What is in only one of the two is rejected, except rows that are not wanted."""
    for key in table.rows:
        if key in files:
            yield key
        elif wanted(key):
            source.rejected.append((key, f"named in {table.file.name}, missing on disk"))
    source.rejected += [(file, f"not in {table.file.name}")
                        for key, file in files.items() if key not in table.rows]


def plain_path(path: str) -> str:
    """A path in the form in which paths are compared: with slashes, without ./, accented letters as
    one character."""
    return unicodedata.normalize("NFC", os.path.normpath(path.replace("\\", "/")))


def unique(images: list[str], plain: Callable[[str], str]) -> dict[str, str]:
    """{plain(image): image}. DataError if two images have the same plain form."""
    found: dict[str, str] = {}
    for image in images:
        if found.setdefault(plain(image), image) != image:
            ways = ", written in two ways" if plain_path(image) == plain_path(
                found[plain(image)]) else ""
            raise DataError(f"{image!r} and {found[plain(image)]!r} have the same name{ways}: "
                            "rename one of them")
    return found


def without_suffix(path: str) -> str:
    """A path without the suffix of an image file. Any other dot belongs to the name."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in (*EXTENSIONS, ".dcm", ".dicom") else path


def that_end_alike(paths: Iterable[str], others: dict[str, str]) -> dict[str, list[str]]:
    """{path: the names of those `others` whose path ends with it, or with which it ends}.

    others: {name: its path}. Only whole folders and file names count."""
    found: dict[str, list[str]] = {path: [] for path in paths}
    named: dict[str, list[str]] = {}                    # the names by whole path
    for name, other in others.items():
        named.setdefault(other, []).append(name)
        for end in ends(other):
            if end in found:
                found[end].append(name)
    for path, names in found.items():
        for end in ends(path)[1:]:
            names += named.get(end, ())
    return found


def ends(path: str) -> list[str]:
    """A path, and what is left of it without its first folder, its first two and so on."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def check_patients_and_splits(table: Table, keys: list[str], patients: str, splits: str) -> None:
    """DataError for the first row of `keys` whose patient is missing or whose split is unknown.

    patients, splits: their columns. The rows of one image must agree in both."""
    for name in (patients, splits):
        if name not in table.columns:
            continue
        place = table.columns.index(name)
        for key in keys:
            for row in table.all_rows(key):
                cell, where = row.cells[place], f"{table.file}, row {row.number}, column {name}"
                if name == patients:
                    check_patient(cell, where)
                if name == splits and not split_name(cell) and value_of(cell) != "":
                    raise DataError(f"{where}: {cell!r} is no split: write train, val or test, or "
                                    "name another column by --split-column")
                if cell != table.rows[key].cells[place]:
                    raise DataError(f"{where}: {cell!r}, but {table.rows[key].cells[place]!r} in "
                                    f"row {table.rows[key].number} of the same image")


def check_patient(cell: str, where: str) -> None:
    """DataError if a cell names no patient: all such images would count as one person's.

    where: file, row and column of the cell."""
    if value_of(cell) == "":
        raise DataError(f"{where}: {cell!r} is no patient" if cell else f"{where}: empty")


def doubt_classes(source: Source, said: bool) -> None:
    """Add doubts for splits in the names of classes, and for classes without an image in train.

    said: whether the user has said which folders are the classes."""
    if not source.classes:
        return
    twins = None if said else classes_of_splits(sorted(source.classes))
    if twins:
        one, other = twins
        source.doubts.append(Doubt(
            "odd-classes", f"the classes {one} and {other} seem to be of two splits by their "
            "names: sort the images into folders such as train/NORMAL, or name the splits in a "
            "column"))
    source.doubts += untrained_classes(
        source.label_names, source.classes, [item.split for item in source.items],
        [item.labels for item in source.items])


def doubt_unused_splits(source: Source, table: Table, key: str, names: list[str],
                        keys: list[str], normalise: Callable[[str], str]) -> None:
    """Note the columns `names` of a table by `key`, which are not used, and doubt those that seem
    to name splits."""
    if names:
        source.notes.append(unused_note(table, names))
    further = read_table(table.file, key, names, normalise=normalise, several=True)
    columns = {name: [cell for cell in map(further.column(name).get, keys)
                      if cell and value_of(cell) != ""] for name in names}
    if not any(item.split for item in source.items):
        source.doubts += unused_splits(table, columns)


def unused_splits(table: Table, columns: dict[str, list[str]]) -> list[Doubt]:
    """A doubt for each column of {name: its cells} that seems to name the splits."""
    doubts = []
    for name in [name for name, cells in columns.items() if seem_splits(name, cells)]:
        words = any(map(split_name, columns[name]))
        write = "" if words else ", once train, val or test is written into it"
        doubts.append(Doubt(
            "unused-splits", f"column {name!r} of {table.file.name} seems to name the splits: "
            f"--split-column {name} takes them{write}"))
    return doubts


def unused_note(table: Table, names: list[str]) -> str:
    """A sentence on columns of a table that are not used."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"Columns of {table.file.name} that are not used: {', '.join(names[:10])}{more}."


def passed_over(others: Counter) -> str:
    """How many files of each suffix were passed over, as text."""
    texts = [f"{count:,} {suffix}" for suffix, count in sorted(others.items())]
    more = f", and {len(texts) - 20:,} suffixes more" if len(texts) > 20 else ""
    return text_of(", ".join(texts[:20]) + more)


# --------------------------------------------------------------------------------------------------
# The demo: phantoms, which are computed.

def demo_flags(flag: Callable) -> None:
    flag("--patients", type=number_within(int, 3, 99_999), default=500, help="(default: 500)")
    flag("--images-per-patient", type=number_within(int, 1, 99), default=4, help="(default: 4)")


def demo_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Phantoms of --patients people, --images-per-patient each, with their true findings."""
    source = Source([*phantom.FINDINGS, "No Finding"], official_labels=True)
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
    """Compute the phantom named by seed/patient/image. No such file exists."""
    seed, patient, image = map(int, file.parts)
    return Reading(Image.fromarray(phantom.phantom(seed, patient, image, settings.size)))


# --------------------------------------------------------------------------------------------------
# NIH ChestX-ray14.

def nih_items(args: argparse.Namespace, files: list[str]) -> Source:
    """ChestX-ray14, by Data_Entry_2017*.csv and the two official lists.

    The images may be in any folder below, as the PNG files that are distributed, or in another
    format under the same names."""
    tables = list(args.src.glob("Data_Entry_2017*.csv"))
    if len(tables) != 1:
        raise DataError(f"{args.src} must hold one Data_Entry_2017*.csv, it holds {len(tables)}")

    # The official lists of images for training and for testing.
    train = set(read_text(args.src / "train_val_list.txt").split())
    test = set(read_text(args.src / "test_list.txt").split())
    if train & test:
        raise DataError(f"{min(train & test)} is in both train_val_list.txt and test_list.txt "
                        f"of {args.src}")

    # The table and the lists name an image without its folder.
    images = {}
    for file in files:
        path = PurePosixPath(file)
        name = path.with_suffix(".png").name
        if path.suffix.lower() in EXTENSIONS and images.setdefault(name, file) != file:
            raise DataError(f"{file} and {images[name]} of {args.src} have the same name")

    optional = ["Follow-up #", "View Position"]
    table = read_table(tables[0], "Image Index", ["Finding Labels", "Patient ID", *optional],
                       optional)
    studies, views = map(table.column, optional)
    source = Source(NIH_FINDINGS, official_labels=True)
    for image in in_table_and_on_disk(table, images, source):
        number, (findings, patient, *_) = table.rows[image]
        where = f"{table.file}, row {number}, column Patient ID"
        check_patient(patient, where)
        named = NIH_NAME.match(image)
        # patient_key is slow, and nearly all of a hundred thousand names agree as they are.
        if named and patient not in (named[1], named[1].lstrip("0")) and (
                patient_key(patient) != patient_key(named[1])):
            raise DataError(f"{where}: {patient!r}, and the name of {image} says {named[1]}: a "
                            "column may have been sorted alone; folder --csv --patient-column "
                            "takes any")
        present = set(findings.split("|"))
        if not present <= set(NIH_FINDINGS):
            raise DataError(f"{table.file}, row {number}, column Finding Labels: {findings!r} "
                            "has an unknown finding")
        labels = tuple("1" if finding in present else "0" for finding in NIH_FINDINGS)
        if image in train or image in test:
            split = "train" if image in train else "test"
            source.items.append(Item(images[image], jpeg_path(image), patient, split, labels,
                                     studies.get(image, ""), views.get(image, "")))
        else:
            source.rejected.append(
                (images[image], "neither in train_val_list.txt nor in test_list.txt"))
    return source


# --------------------------------------------------------------------------------------------------
# CheXpert.

def chexpert_flags(flag: Callable) -> None:
    flag("--all-views", action="store_true", help="take lateral views, too")


def chexpert_items(args: argparse.Namespace, files: list[str]) -> Source:
    """CheXpert-v1.0, with the folders of the full size or of -small, or CheXphoto: train.csv, and
    valid.csv as the test split; -1 stays -1.

    The patient's folder is called patient…, at any depth; or it is the first below `part`."""
    source, laterals = Source(CHEXPERT_OBSERVATIONS, official_labels=True), 0
    used: set[str] = set()
    for part, split in (("train", "train"), ("valid", "test")):
        place = partial(path_from, part)
        images = unique([file for file in files if file.lower().endswith(EXTENSIONS)
                         and place(file).startswith(f"{part}/")], place)
        used |= set(images.values())
        table = read_table(chexpert_table(args.src, f"{part}.csv", files), "Path",
                           ["Frontal/Lateral", "AP/PA", *CHEXPERT_OBSERVATIONS], ["AP/PA"],
                           normalise=place)
        positions, labels = table.column("AP/PA"), observations(table)
        views = {image: chexpert_view(table, image) for image in table.rows}
        frontal = {image for image, view in views.items() if args.all_views or view == "Frontal"}
        for image in in_table_and_on_disk(table, images, source, frontal.__contains__):
            if image not in frontal:
                laterals += 1
                continue
            *above, patient, study, _ = "", "", *PurePosixPath(image).parts
            named = [name.casefold().startswith("patient") for name in (patient, study)]
            if named != [True, False] and (any(named) or above != ["", "", part]):
                raise DataError(f"{table.file}, row {table.rows[image].number}, column Path: "
                                f"{image!r} is not {part}/patient00001/study1/IMAGE; folder --csv "
                                "takes any path")
            position = positions.get(image) if views[image] == "Frontal" else ""
            source.items.append(Item(images[image], jpeg_path(image), patient, split,
                                     labels[image], study, position or views[image]))
    source.passed_over = f"Lateral views left out: {laterals:,} (--all-views takes them)."
    source.notes.append(source.passed_over)
    others = sum(file.lower().endswith(EXTENSIONS) for file in files) - len(used)
    if others:
        source.notes.append(f"Images outside train and valid, which are not used: {others:,}.")
    return source


def chexpert_table(src: Path, name: str, files: list[str]) -> Path:
    """train.csv or valid.csv in --src, or else the only one in a folder below. DataError if there
    is none, or if there are several below."""
    found = [src / file for file in files if PurePosixPath(file).name == name]
    if (src / name).exists() or len(found) == 1:
        return src / name if (src / name).exists() else found[0]
    raise DataError(f"{src} must hold one {name}, it holds {len(found)}")


def chexpert_view(table: Table, image: str) -> str:
    """Frontal or Lateral, in whatever case it is written. DataError for anything else."""
    cell = table.rows[image].cells[table.columns.index("Frontal/Lateral")]
    if cell.capitalize() not in ("Frontal", "Lateral"):
        raise DataError(f"{table.file}, row {table.rows[image].number}, column Frontal/Lateral: "
                        f"{cell!r} is neither Frontal nor Lateral")
    return cell.capitalize()


def path_from(part: str, path: str) -> str:
    """An image's path from the folder `part` on: train/patient00001/study1/view1_frontal.jpg for
    CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg.

    The full size comes in folders such as "CheXpert-v1.0 batch 2 (train 1)", which count as
    `part`."""
    path = re.sub(rf"[^/]*\({part} \d+\)/", f"{part}/", path.replace("\\", "/"))
    start = f"/{path}".rfind(f"/{part}/")
    return path[start:] if start >= 0 else path


def observations(table: Table) -> dict[str, tuple[str, ...]]:
    """The 14 observations, by the table's key. DataError if one of their columns holds words."""
    return read_labels(table, CHEXPERT_OBSERVATIONS).cells


# --------------------------------------------------------------------------------------------------
# MIMIC-CXR-JPG.

def mimic_items(args: argparse.Namespace, files: list[str]) -> Source:
    """MIMIC-CXR-JPG: the CheXpert labels of each study, the official splits, frontal views.

    The three tables are those of MIMIC-CXR-JPG, as .csv or .csv.gz; the images lie at any depth."""
    split_file = one_file(args.src, "mimic-cxr-*-split.csv*")
    label_file = one_file(args.src, "mimic-cxr-*-chexpert.csv*")
    view_file = one_file(args.src, "mimic-cxr-*-metadata.csv*")
    images = unique([file for file in files if file.lower().endswith((".jpg", ".jpeg", ".png"))],
                    lambda file: without_suffix(PurePosixPath(file).name))
    rows = read_table(split_file, "dicom_id", ["subject_id", "study_id", "split"])
    views = read_table(view_file, "dicom_id", ["ViewPosition"]).column("ViewPosition")
    check_shared(rows, images.keys() & rows.rows.keys(), views, "dicom_id", view_file)
    table = read_table(label_file, "study_id", CHEXPERT_OBSERVATIONS)
    labels = observations(table)
    studies = {rows.rows[image].cells[1] for image in images if image in rows.rows}
    check_shared(rows, studies, labels, "study_id", label_file)

    source, laterals, unlabelled = Source(CHEXPERT_OBSERVATIONS, official_labels=True), 0, 0
    frontal = {image for image in rows.rows if args.all_views or views.get(image) in ("PA", "AP")}
    for image in in_table_and_on_disk(rows, images, source, frontal.__contains__):
        number, (patient, study, split) = rows.rows[image]
        check_patient(patient, f"{split_file}, row {number}, column subject_id")
        if not split_name(split):
            raise DataError(f"{split_file}, row {number}, column split: {split!r} is no split")
        if image not in frontal:
            laterals += 1
            continue
        unlabelled += study not in labels
        source.items.append(Item(
            images[image], jpeg_path(images[image]), patient, split_name(split),
            labels.get(study, ("",) * len(CHEXPERT_OBSERVATIONS)), study, views.get(image, "")))
    source.passed_over = (f"Lateral and unknown views left out: {laterals:,} (--all-views takes "
                          "them).")
    source.notes.append(f"{source.passed_over} Images whose study is not in {label_file.name}: "
                        f"{unlabelled:,}; nothing is mentioned for them. Images not in "
                        f"{view_file.name}: "
                        f"{len(images.keys() & rows.rows.keys() - views.keys()):,}. Studies of "
                        f"{label_file.name} without an image: {len(labels.keys() - studies):,}.")
    return source


def check_shared(rows: Table, ours: Collection[str], theirs: Collection[str], column: str,
                 file: Path) -> None:
    """DataError if another table has none of the ids of our images.

    rows: the table that has both kinds of ids. ours: the ids of the images on disk. theirs: the ids
    in `column` of the other table, `file`."""
    ids = sorted(ours)
    if ids and not any(id_ in theirs for id_ in ids):
        raise DataError(f"{file}, column {column}: none of the {len(ids):,} ids of the images "
                        f"is in it, such as {ids[0]} of {rows.file.name}")


def one_file(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches a pattern. DataError if there is none, or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder} must hold one {pattern}, it holds {len(found)}")
    return found[0]
