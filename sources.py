"""Sources: which image becomes which row of the manifest.

A source is a function `…_items(args, files)`: the files below --src in, a
Source out, which holds patient, split and labels of each image. Beside it
stands `…_flags(flag)` where it has flags of its own. From there on all sources
are alike (prepare.py). DICOM is a source, too, in dicom.py. What the cells of a
table say is written in tables.py, what folders say in layout.py.
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
from common import DataError, printable, read_text
from doubts import (
    Doubt, classes_of_splits, drawings, folders_of_persons, lone_images, many_classes,
    names_without_meaning, persons_in_names, repeated_below, same_pictures, say_no_finding,
    seem_patients, seem_splits, seem_studies, seem_views, splits_in_names, strayed_copies,
    untrained_classes)
from flags import number_within
from layout import (
    Place, excluder, find_layout, layout_text, levels_of, outside_splits, place_of, split_name)
from radiograph import EXTENSIONS, ImageSettings, Reading, unread_suffix
from tables import (
    MOST_CELLS, LabelRules, Table, merged, read_labels, read_table, spellings, understand, value_of)

NIH_FINDINGS = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia", "No Finding"]
CHEXPERT_OBSERVATIONS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices"]


# --------------------------------------------------------------------------------------------------
# What a source finds.

@dataclass(slots=True)
class Item:
    """One image on its way into the data folder, and its row of the
    manifest."""
    source: str                     # the file, below --src; of a phantom, what it is made from
    path: str                       # images/….jpg, below --out
    patient: str                    # whatever tells one patient from another
    split: str                      # train, val, test, or "" where the source does not say
    labels: tuple[str, ...]         # "1", "0", "-1" or "", one for each of Source.label_names
    study: str = ""                 # which of the patient's examinations it is of, if known
    view: str = ""                  # PA, AP, Lateral or another word, if known


@dataclass
class Source:
    """The images that a source offers, those that it does not, and what its
    user has to know."""
    label_names: list[str]                                              # as in the manifest
    items: list[Item] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)       # file, reason
    notes: list[str] = field(default_factory=list)                      # sentences for DATA.md
    passed_over: str = ""               # of the notes, the one on files that are not asked for
    doubts: list[Doubt] = field(default_factory=list)                   # what may not be meant
    asked_for: set[str] = field(default_factory=set)    # reasons by which no image is lost
    official_labels: bool = False       # the same for all who use this source, rare ones included
    classes: set[str] = field(default_factory=set)      # labels of classes, by folder or by cell
    patients_known: bool = True         # False: every image counts as a patient of its own


# --------------------------------------------------------------------------------------------------
# What sources have in common.

def one_hot(word: str, words: list[str]) -> tuple[str, ...]:
    """Present for the word, absent for all others; all open where there is no
    word."""
    if not word:
        return ("",) * len(words)
    return tuple("1" if word == other else "0" for other in words)


def in_table_and_on_disk(table: Table, files: dict[str, str], source: Source,
                         wanted: Callable[[str], bool] = lambda key: True) -> Iterator[str]:
    """Yield the keys of a table's rows that are also in {key: file on disk}.

    What is in only one of the two is rejected; rows that are not wanted are
    not missed."""
    for key in table.rows:
        if key in files:
            yield key
        elif wanted(key):
            source.rejected.append((key, f"named in {table.file.name}, missing on disk"))
    source.rejected += [(file, f"not in {table.file.name}")
                        for key, file in files.items() if key not in table.rows]


def jpeg_path(file: str) -> str:
    """Where a source's file goes in the data folder."""
    return "images/" + text_of(str(PurePosixPath(file).with_suffix(".jpg")))


def text_of(name: str) -> str:
    """A name as text. What is not in UTF-8 in it becomes replacement
    characters, as the manifest is in UTF-8."""
    return os.fsencode(name).decode(errors="replace")


# --------------------------------------------------------------------------------------------------
# The demo: phantoms, which are computed and not read.

def demo_flags(flag: Callable) -> None:
    flag("--patients", type=number_within(int, 3, 99_999), default=500, help="(default: 500)")
    flag("--images-per-patient", type=number_within(int, 1, 99), default=4, help="(default: 4)")


def demo_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Phantoms: --patients people, --images-per-patient radiographs of each,
    and the truth."""
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
    """The phantom that seed/patient/image names. There is no such file: it is
    computed."""
    seed, patient, image = map(int, file.parts)
    return Reading(Image.fromarray(phantom.phantom(seed, patient, image, settings.size)))


# --------------------------------------------------------------------------------------------------
# Folders of classes, and a table.

def folder_flags(flag: Callable) -> None:
    flag("--layout", type=layout_text, metavar="LEVELS",
         help="what the folders below --src say, level by level: split, class, patient, or * for "
              "nothing, for example */split/class; none (default: recognised by their names)")
    flag("--exclude", nargs="+", default=[], metavar="NAME",
         help="files and folders to pass over, by name or by path below --src; * is a wildcard")
    flag("--csv", type=Path, help="table of the images to take; may be a .gz")
    flag("--path-column",
         help="its column of paths below --src, or of file names (default: path)")
    flag("--patient-column",
         help="its column of patients (default: patient, if there is one)")
    flag("--split-column",
         help="its column of train, val, test (default: split, if there is one)")
    flag("--where", nargs="+", default=[], type=condition, metavar="COLUMN=VALUE,VALUE",
         help="take only rows in which a column has one of the values, such as Projection=PA,AP")
    label_flags(flag, "the class folders are the labels")
    flag("--patients-per-split", action="store_true",
         help="the numbers of the patients restart in each split")


def label_flags(flag: Callable, default: str) -> None:
    """The flags on the labels of a table. default: what the labels are
    without any."""
    flag("--label-columns", nargs="+", default=[], metavar="COLUMN",
         help="its columns of values as listed below, or of class names "
              f"(default: {default})")
    flag("--class-columns", nargs="+", default=[], metavar="COLUMN",
         help="its columns of class names, whatever these look like: 0, 1, 2; yes, no, other")
    flag("--not-mentioned", nargs="*", metavar="WORD",
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
    """What label_flags and --allow say of the labels of a table."""
    words = None if args.not_mentioned is None else tuple(args.not_mentioned)
    return LabelRules(tuple(args.class_columns), words, args.label_separator, args.several_rows,
                      args.rater_column, "many-classes" in args.allow,
                      "mixed-letters" in args.allow)


def condition(text: str) -> str:
    """A --where as it was given. ValueError, as argparse wants it, for what
    is none."""
    column, _, values = text.partition("=")
    if not column or not values:
        raise ValueError(text)
    return text


def folder_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Images in folders, a table of them, or both. Where they disagree, the
    table wins."""
    source, excluded = Source([]), excluder(args.exclude)
    images = [file for file in files
              if file.lower().endswith(EXTENSIONS) and not excluded(file)]
    others = Counter("excluded" if excluded(file) else suffix_of(file)
                     for file in set(files) - set(images))

    # What the table says: of which images, of which patients, in which splits.
    patients, splits, table, key_of = {}, {}, None, {}
    if args.csv:
        table = read_image_table(args)
        key_of = rows_of_files(table, images, args.src, source)
        take_where(table, key_of, args.where, source)
        images = list(key_of)
        check_patients_and_splits(
            table, list(key_of.values()), args.patient_column, args.split_column)
        for column, cells in ((args.patient_column, patients), (args.split_column, splits)):
            column = table.column(column)
            cells |= {file: column[key] for file, key in key_of.items() if column}

    # What the folders say, as far as the table is silent.
    levels = find_layout(images) if args.layout is None else levels_of(args.layout)
    if splits:
        doubt_other_splits(source, splits, levels)
        levels = ["*" if level == "split" else level for level in levels]
    columns = [*args.label_columns, *args.class_columns]
    named = levels                  # as the folders' names say, whether that is used or not
    if columns:
        levels = ["*" if level == "class" else level for level in levels]
    places = {file: place_of(file, levels) for file in images}
    splits = ({file: split_name(cell) for file, cell in splits.items()}
              or {file: place.split for file, place in places.items()})
    patients = patients or {file: place.patient for file, place in places.items() if place.patient}
    source.notes.append(f"Layout of the folders: {'/'.join(levels) or 'none'}"
                        f"{' (recognised)' if args.layout is None else ''}.")
    doubt_folders(source, [file for file in images if splits[file] is not None], levels,
                  guessed=args.layout is None)
    if not patients and args.layout is None:
        doubt_unknown_patients(source, images, named, labelled=bool(columns))
    if not any(splits.values()):
        doubt_splits_in_names(source, images)
    if table:
        doubt_unused_columns(source, args, table, levels, list(key_of.values()))
    for folder, count in outside_splits(images, levels).items():
        # A folder that has the split folders in it cannot be excluded.
        beside = len(PurePosixPath(folder).parts) > levels.index("split")
        ask = f"rename it, or --exclude {text_of(folder)}" if beside else "move them into one"
        source.doubts.append(Doubt(
            "other-folders", f"{count:,} images {'' if beside else 'directly '}in "
            f"{text_of(folder) or '--src'} lie beside the split folders and would be left out: "
            f"{ask}"))

    if not table:
        reject_unread(source, files, places, levels, excluded)

    # The labels.
    if table and columns:
        source.label_names, by_key, notes = understand(
            table, columns, list(key_of.values()), label_rules(args))
        labels = {file: by_key[key] for file, key in key_of.items()}
        source.notes += notes
        source.classes = set(source.label_names) - set(columns)
    else:
        labels = class_folders(source, {file: place for file, place in places.items()
                                        if splits[file] is not None})

    # One item an image. Where x.png lies beside x.jpg both keep their suffix, as x.png.jpg.
    sharing = Counter(map(jpeg_path, images))
    pictures = {} if patients else same_pictures(images)
    for file in images:
        split = splits[file]
        if split is None:
            why = "outside the folders train, val and test"
            source.rejected.append((file, why))
            source.asked_for.add(why)
            continue
        path = jpeg_path(file if sharing[jpeg_path(file)] == 1 else file + ".jpg")
        patient = patients.get(file, path)
        if file in pictures:        # in one split, unless the source gives them several
            patient = pictures[file] + (f" {split}" if split else "")
        if args.patients_per_split and split:
            patient = f"{split}-{patient}"
        source.items.append(Item(file, path, text_of(patient), split, labels[file]))

    doubt_classes(source, said=not columns and args.layout is not None)

    # What the user has to know.
    source.patients_known = bool(patients)
    if not patients:
        say_no_patients(source, images, pictures)
    elif person := persons_in_names(patients.values()):
        source.notes.append(f"Some patients, such as {person}, seem to be parts of one person by "
                            "their names: images of each may come into several splits.")
    source.passed_over = f"Files passed over: {passed_over(others) or 'none'}."
    source.notes.append(source.passed_over)
    return source


def reject_unread(source: Source, files: list[str], places: dict[str, Place], levels: list[str],
                  excluded: Callable[[str], bool]) -> None:
    """Reject pictures of kinds that are not read: they are lost, unless the same folder has an
    image of their name. Doubt it where they are all that a class has. places: of the images."""
    stems = {os.path.splitext(image)[0] for image in places}
    lost = {file: place_of(file, levels) for file in files if unread_suffix(file)
            and file[:-len(unread_suffix(file))] not in stems and not excluded(file)}
    for file in drawings([*lost]):
        del lost[file]
    lost = {file: place for file, place in lost.items() if place.split is not None}
    source.rejected += [
        (file, f"{unread_suffix(file)} is not read: save it as PNG, or --exclude it")
        for file in lost]
    missed = {place.class_name: file for file, place in reversed(lost.items())}
    for name in sorted(missed.keys() - {"", *(place.class_name for place in places.values())}):
        if not names_without_meaning([name]):
            source.doubts.append(Doubt(
                "many-left-out", f"class {text_of(name)} has no image that can be read, only such "
                f"as {text_of(missed[name])}: save them as PNG, or --exclude {text_of(name)}"))


def doubt_classes(source: Source, said: bool) -> None:
    """Add doubts for splits in the names of classes, and for classes that no
    image of train shows.

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


def say_no_patients(source: Source, images: list[str], pictures: dict[str, str]) -> None:
    """Add notes for images of which no patient is known. pictures: those of
    same_pictures."""
    source.notes.append("No patient is known: every image counts as a patient of its own.")
    if pictures:
        first, count = min(pictures.values()), len(set(pictures.values()))
        one, *_, other = (text_of(file) for file in pictures if pictures[file] == first)
        source.notes.append(
            f"By their names {len(pictures):,} images, such as {one} and {other}, are changed "
            f"copies or views of one another: they count as {count:,} patients.")
    strayed = strayed_copies([item.source for item in source.items],
                             [(item.split, item.labels) for item in source.items])
    if strayed:
        source.notes.append(
            f"By their names {len(strayed):,} images, such as {text_of(strayed[0])}, are "
            "changed copies or views of images that the source gives to another split.")
    person = persons_in_names(images)
    if person:
        source.notes.append(f"The names of files seem to say the patient, such as {person}: a "
                            "column of patients in a table would keep each in one split.")


def passed_over(others: Counter) -> str:
    """How many files of each suffix were passed over, as text."""
    texts = [f"{count:,} {suffix}" for suffix, count in sorted(others.items())]
    more = f", and {len(texts) - 20:,} suffixes more" if len(texts) > 20 else ""
    return text_of(", ".join(texts[:20]) + more)


def suffix_of(file: str) -> str:
    """The suffix of a file, in words if it has none: the last part of
    1.2.840.17 is none."""
    suffix = PurePosixPath(file).suffix
    return "without suffix" if not suffix or suffix[1:].isdigit() else suffix


def class_folders(source: Source, places: dict[str, Place]) -> dict[str, tuple[str, ...]]:
    """The labels of each file by the class folder it lies in; their names go
    to the source.

    Folders that differ in form only, as train/NORMAL and test/Normal do, are
    one class."""
    names = {file: text_of(place.class_name) for file, place in places.items()}
    counts = Counter((name, name) for name in names.values() if name)
    spelling = spellings(counts)
    source.label_names = sorted(set(spelling.values()))
    source.classes = set(source.label_names)
    if len(source.label_names) * len(places) > MOST_CELLS:
        raise DataError(f"{len(source.label_names):,} class folders of {len(places):,} images are "
                        "more than fit into memory: --layout says what each level of folders is")
    source.doubts += many_classes(source.label_names, len(places))
    if merged(spelling):
        source.notes.append(f"Class folders.{merged(spelling)}")
    if say_no_finding(source.label_names):
        source.notes.append(f"No class folder, such as {source.label_names[0]}, is called as a "
                            "finding is: if they are persons, --layout says patient there; if "
                            "they are hospitals or views, --layout none and a table of labels.")
    outside = sum(not name for name in names.values())
    if source.label_names and outside:
        source.notes.append(f"Images in no class folder: {outside:,}; nothing is mentioned for "
                            "them.")
    cells = {name: one_hot(label, source.label_names) for name, label in spelling.items()}
    nothing = one_hot("", source.label_names)
    return {file: cells.get(name, nothing) for file, name in names.items()}


def doubt_folders(source: Source, images: list[str], levels: list[str], guessed: bool) -> None:
    """Add the doubts that names of folders raise to the source."""
    # A mask would teach the network outlines, and its label would be right all the same.
    masks = drawings(images)
    if masks:
        source.doubts.append(Doubt(
            "masks", f"{len(masks):,} of the images, such as {text_of(masks[0])}, seem to be masks "
            "or other drawings: --exclude, followed by the name of their folder or by '*_mask*', "
            "leaves them out"))
    # A user who says what the levels are has looked at them.
    if not guessed:
        return
    slashes = [file for file in images if "\\" in file]
    if 2 * len(slashes) > len(images):
        source.doubts.append(Doubt(
            "odd-classes", f"{len(slashes):,} names of files, such as {text_of(slashes[0])}, hold "
            "\\ in place of folders, as an archive that Windows packed gives: unpack it by unzip "
            "or 7z"))
    if "class" not in levels:
        return
    ask = "--layout says what each level of folders is, --layout none that none is a class"
    classes = [place_of(file, levels).class_name for file in images]
    source.doubts += lone_images(map(text_of, classes))
    odd = names_without_meaning(sorted({*classes}))
    twice = repeated_below(images, levels)
    if odd:
        source.doubts.append(Doubt(
            "odd-classes", f"the folder {text_of(odd[0])} does not look like a class: {ask}"))
    elif twice:
        name, one, other = map(text_of, twice)
        source.doubts.append(Doubt("odd-classes", f"{name} lies both below {one} and below "
                                   f"{other}, and either may be the class: {ask}"))


def doubt_unknown_patients(source: Source, images: list[str], levels: list[str],
                           labelled: bool) -> None:
    """Add a doubt for folders that seem to be patients, where every image
    would be one.

    labelled: the labels come from a table, and what would be class folders
    may be patients."""
    folder = folders_of_persons(images, levels)
    if labelled and "class" in levels:
        above = levels[:levels.index("class")]
        folder = folders_of_persons(images, above, by_word=True) or folder
        levels = ["*" if level == "class" else level for level in levels]
    if folder:
        between = folder.count("/") - len(levels)
        layout = "/".join([*levels[:folder.count("/")], *["*"] * between, "patient"])
        source.doubts.append(Doubt(
            "unknown-patients", f"the folder {text_of(folder)} seems to be of one patient, whose "
            f"images would come into several splits: --layout {layout}"))


def doubt_other_splits(source: Source, splits: dict[str, str], levels: list[str]) -> None:
    """Add a doubt for files whose folder says another split than the table:
    {file: its cell}."""
    others = [file for file, cell in splits.items()
              if split_name(cell) and place_of(file, levels).split not in ("", None)
              and place_of(file, levels).split != split_name(cell)]
    if others:
        source.doubts.append(Doubt(
            "unused-splits", f"{len(others):,} images, such as {text_of(others[0])}, lie in the "
            f"folder of another split than the table says, here {splits[others[0]]}, which would "
            "be used"))


def doubt_splits_in_names(source: Source, images: list[str]) -> None:
    """Say that names of files name splits, of images that have none, and
    doubt it where two splits are named."""
    found = splits_in_names(images)
    count = sum(map(len, found.values()))
    says = (f"{count:,} names of files, such as "
            f"{' and '.join(text_of(named[0]) for named in found.values())}, seem to name the "
            f"split, {' or '.join(found)}")
    if len(found) > 1 and 20 * count >= len(images):
        source.doubts.append(Doubt(
            "unused-splits", f"{says}, which is not used: sort the images into folders of these "
            "names, or write the splits into a column of --csv"))
    elif found:
        source.notes.append(f"{says}; that is not used.")


def doubt_unused_columns(source: Source, args: argparse.Namespace, table: Table,
                         levels: list[str], keys: list[str]) -> None:
    """Add doubts for columns that seem to name patients or splits, where none
    is used for that.

    keys: the rows of the images. Columns are judged by their cells in
    these."""
    used = {args.path_column, *args.label_columns, *args.class_columns, args.rater_column,
            *(text.partition("=")[0] for text in args.where)}
    names = [name for name in table.header if name and name not in used]
    unused = [name for name in names if name not in table.columns]
    if unused:
        source.notes.append(unused_note(table, unused))
    further = read_table(table.file, args.path_column, names, normalise=plain_path, several=True)
    columns = {name: [cell for cell in map(further.column(name).get, keys)
                      if cell and value_of(cell) != ""] for name in names}
    for name in [name for name in names if seem_views(name, columns[name])]:
        counts = [f"{cell} ({count:,})" for cell, count in Counter(columns[name]).most_common(8)]
        source.notes.append(f"Column {name} is not used and holds {', '.join(counts)}: --where "
                            f"{name}=VALUE,VALUE takes some of them.")
    # A column that is called so by chance, of another patient in each row, is none.
    patients = table.column(args.patient_column)
    by_chance = args.patient_column == "patient" and len(set(patients.values())) == len(patients)
    if (not patients or by_chance) and "patient" not in levels:
        others = [name for name in names if name != args.patient_column]
        found = [(name, "patients") for name in others if seem_patients(name, columns[name])]
        found += [(name, "examinations") for name in others if seem_studies(name, columns[name])]
        for name, what in found[:1]:
            source.doubts.append(Doubt(
                "unknown-patients", f"column {name!r} of {table.file.name} seems to name the "
                f"{what}, whose images would come into several splits: --patient-column {name}"))
    if args.split_column not in table.columns and "split" not in levels:
        source.doubts += unused_splits(table, columns)


def doubt_unused_splits(source: Source, table: Table, key: str, names: list[str],
                        keys: list[str], normalise: Callable[[str], str]) -> None:
    """Say which columns `names` of a table by `key` are not used, and doubt
    those of splits."""
    if names:
        source.notes.append(unused_note(table, names))
    further = read_table(table.file, key, names, normalise=normalise, several=True)
    columns = {name: [cell for cell in map(further.column(name).get, keys)
                      if cell and value_of(cell) != ""] for name in names}
    if not any(item.split for item in source.items):
        source.doubts += unused_splits(table, columns)


def unused_splits(table: Table, columns: dict[str, list[str]]) -> list[Doubt]:
    """A doubt for each column, {name: its cells}, that seems to name the
    splits."""
    doubts = []
    for name in [name for name, cells in columns.items() if seem_splits(name, cells)]:
        words = any(map(split_name, columns[name]))
        write = "" if words else ", once train, val or test is written into it"
        doubts.append(Doubt(
            "unused-splits", f"column {name!r} of {table.file.name} seems to name the splits: "
            f"--split-column {name} takes them{write}"))
    return doubts


def unused_note(table: Table, names: list[str]) -> str:
    """A sentence on the columns of a table that are used for nothing."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"Columns of {table.file.name} that are not used: {', '.join(names[:10])}{more}."


def read_image_table(args: argparse.Namespace) -> Table:
    """--csv by its column of paths, with the columns that the other flags
    name."""
    labels = [*args.label_columns, *args.class_columns]
    columns = [args.patient_column, args.split_column, *labels,
               *(text.partition("=")[0] for text in args.where)]
    if args.rater_column:
        columns.append(args.rater_column)
    return read_table(
        args.csv, args.path_column, list(dict.fromkeys(columns)),
        optional={"patient", "split"} - set(labels) - {text.partition("=")[0]
                                                       for text in args.where},
        normalise=plain_path,
        several=bool(args.several_rows),
        hint="; --several-rows says how several rows of an image become one", flag="--path-column")


def take_where(table: Table, key_of: dict[str, str], conditions: list[str],
               source: Source) -> None:
    """Keep only the rows that meet every condition, and reject the files that
    have none left."""
    for text in conditions:         # COLUMN=VALUE,VALUE
        column, _, values = text.partition("=")
        values = [value.strip() for value in values.split(",")]
        place = table.columns.index(column)
        # A row that is missing on disk is no loss if --where would not have taken it.
        source.rejected = [
            (key, why) for key, why in source.rejected if key not in table.rows
            or any(row.cells[place] in values for row in table.all_rows(key))]
        for file, key in list(key_of.items()):
            rows = table.all_rows(key)
            kept = [row for row in rows if row.cells[place] in values]
            if kept:
                table.rows[key], table.further[key] = kept[0], kept[1:]
            else:
                cell = rows[0].cells[place] or "blank"
                why = f"{column} is {cell} in {table.file.name}"
                source.rejected.append((file, why))
                source.asked_for.add(why)
                del key_of[file]


def plain_path(path: str) -> str:
    """A path as it is compared: with slashes, without ./, accented letters as
    one character."""
    return unicodedata.normalize("NFC", os.path.normpath(path.replace("\\", "/")))


def loose_path(path: str) -> str:
    """What is the same for paths that look alike: in small letters, each run of blanks of any kind
    as one, without characters of no width."""
    path = path.casefold()
    if not path.isascii():
        path = unicodedata.normalize("NFKC", path).casefold()
        path = "".join(letter for letter in path if unicodedata.category(letter) != "Cf")
    return " ".join(path.split())


def rows_of_files(table: Table, images: list[str], src: Path, source: Source) -> dict[str, str]:
    """{file: its key in the table} of those images that the table names.

    A row names a file by its path below --src, under any name that links give
    it, and if it is the only one also in other case or blanks. Where no row does, all
    rows are taken to end like their file's path, or to go on before it, and
    then the same without suffixes; that is noted. What is only in one of the
    two is rejected. DataError where two rows name one file or two files have
    the name of one row."""
    # By the path, or by what differs from it in case or blanks only, where that is one file.
    by_path = unique(images, plain_path)
    file_of = {key: by_path[key] for key in table.rows if key in by_path}
    alike = Counter(map(loose_path, by_path))
    by_form = {loose_path(path): file for path, file in by_path.items()
               if alike[loose_path(path)] == 1}
    for key in table.rows:
        if key not in file_of and loose_path(key) in by_form:
            file_of[key] = by_form[loose_path(key)]
    # By another name of the same file: below a link, find_files has only one of the two.
    missing = [key for key in table.rows
               if key not in file_of and os.path.exists(src / key)]
    if missing:
        real = {os.path.realpath(src / image): image for image in images}
        for key in missing:
            if os.path.realpath(src / key) in real:
                file_of[key] = real[os.path.realpath(src / key)]

    refuse_mixed_names(table, images, file_of)

    # By the name alone, if no row was found at all. A path beside it must not contradict.
    for way, plain in (("name", str), ("name without suffix", without_suffix)):
        if file_of:
            break
        path_of = {key: loose_path(plain(key)) for key in table.rows}
        files_of = that_end_alike(
            path_of.values(), {image: loose_path(plain(plain_path(image))) for image in images})
        for key in table.rows:
            found = files_of[path_of[key]]
            if len(found) > 1:
                raise DataError(printable(f"{table.file}, row {table.rows[key].number}: {key} may "
                                          f"be {found[0]} or {found[1]}"))
            if found:
                file_of[key] = found[0]
        if file_of:
            source.notes.append(f"The rows of {table.file.name} name files by their {way}.")

    # No file twice, and none in silence.
    key_of: dict[str, str] = {}
    for key, file in file_of.items():
        if key_of.setdefault(file, key) != key:
            one, other = sorted((table.rows[key_of[file]].number, table.rows[key].number))
            raise DataError(f"{table.file}, rows {one} and {other}: both name {file}")
    source.rejected += [(key, f"named in {table.file.name}, missing on disk")
                        for key in table.rows if key not in file_of]
    # The table may be of a part of the images; then all its rows are found.
    other, missed = f"not in {table.file.name}", len(file_of) < len(table.rows)
    source.asked_for |= set() if missed else {other}
    source.rejected += [(file, other) for file in images if file not in key_of]
    return key_of


def refuse_mixed_names(table: Table, images: list[str], file_of: dict[str, str]) -> None:
    """DataError where a row names a file that is not there, and one of its
    name has no row.

    file_of: the rows that were found by their path. Where there are none,
    names are as good."""
    found = set(file_of.values())
    path_of = {key: loose_path(key) for key in table.rows if file_of and key not in file_of}
    files_of = that_end_alike(path_of.values(), {
        file: loose_path(plain_path(file)) for file in images if file not in found})
    for key, path in path_of.items():
        if files_of[path]:
            row, file = table.rows[key], files_of[path][-1]
            other, known = next(iter(file_of.items()))
            raise DataError(f"{table.file}, row {row.number}: there is no {key}, but {file}, and "
                            f"row {table.rows[other].number} names {known} by its path: write all "
                            "rows in one way")


def unique(images: list[str], plain: Callable[[str], str]) -> dict[str, str]:
    """{plain(image): image}. DataError where two images become one."""
    found: dict[str, str] = {}
    for image in images:
        if found.setdefault(plain(image), image) != image:
            ways = ", written in two ways" if plain_path(image) == plain_path(
                found[plain(image)]) else ""
            raise DataError(f"{image!r} and {found[plain(image)]!r} have the same name{ways}: "
                            "rename one of them")
    return found


def without_suffix(path: str) -> str:
    """A path without the suffix of an image file. Other dots belong to the
    name."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in (*EXTENSIONS, ".dcm", ".dicom") else path


def that_end_alike(paths: Iterable[str], others: dict[str, str]) -> dict[str, list[str]]:
    """{path: those of `others` whose path ends with the whole of it, or it
    with theirs}.

    others: {name: its path}."""
    found: dict[str, list[str]] = {path: [] for path in paths}
    named: dict[str, list[str]] = {}                    # by the whole path
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
    """A path, and what is left of it without its first folder, its first two
    and so on."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def check_patients_and_splits(table: Table, keys: list[str], patients: str, splits: str) -> None:
    """DataError for the first row of `keys` whose patient is missing or whose
    split is unknown.

    patients, splits: the columns of them. The rows of one image must agree in
    both."""
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
                    raise DataError(f"{where}: {cell!r} is no split")
                if cell != table.rows[key].cells[place]:
                    raise DataError(f"{where}: {cell!r}, but {table.rows[key].cells[place]!r} in "
                                    f"row {table.rows[key].number} of the same image")


def check_patient(cell: str, where: str) -> None:
    """DataError where a cell names no patient: all images without one would
    be of one person.

    where: file, row and column of the cell."""
    if value_of(cell) == "":
        raise DataError(f"{where}: {cell!r} is no patient" if cell else f"{where}: empty")


# --------------------------------------------------------------------------------------------------
# NIH ChestX-ray14.

def nih_items(args: argparse.Namespace, files: list[str]) -> Source:
    """ChestX-ray14: Data_Entry_2017*.csv and the two official lists; the
    images in any folder below, PNG as they are distributed or of another
    format under the same names."""
    tables = list(args.src.glob("Data_Entry_2017*.csv"))
    if len(tables) != 1:
        raise DataError(f"{args.src} must hold one Data_Entry_2017*.csv, it holds {len(tables)}")

    # Official lists of the images to train on and to test on.
    train = set(read_text(args.src / "train_val_list.txt").split())
    test = set(read_text(args.src / "test_list.txt").split())
    if train & test:
        raise DataError(f"{min(train & test)} is in both train_val_list.txt and test_list.txt "
                        f"of {args.src}")

    # The table and the lists go by an image's name, whichever folder it was unpacked into.
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
        check_patient(patient, f"{table.file}, row {number}, column Patient ID")
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
    """CheXpert-v1.0, as it is unpacked or as -small is, or CheXphoto: train.csv,
    and valid.csv as the test split; -1 stays -1.

    A patient's folder is the one called so, whatever is above it, or else the first."""
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
    """train.csv or valid.csv, in --src or in a folder below. DataError where there is none, or
    more."""
    found = [src / file for file in files if PurePosixPath(file).name == name]
    if (src / name).exists() or len(found) == 1:
        return src / name if (src / name).exists() else found[0]
    raise DataError(f"{src} must hold one {name}, it holds {len(found)}")


def chexpert_view(table: Table, image: str) -> str:
    """Frontal or Lateral, however it is written. DataError for anything else."""
    cell = table.rows[image].cells[table.columns.index("Frontal/Lateral")]
    if cell.capitalize() not in ("Frontal", "Lateral"):
        raise DataError(f"{table.file}, row {table.rows[image].number}, column Frontal/Lateral: "
                        f"{cell!r} is neither Frontal nor Lateral")
    return cell.capitalize()


def path_from(part: str, path: str) -> str:
    """The path of an image from the folder `part` on; what is before it is
    --src, wherever it was:
    CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg.

    The full size comes in folders such as "CheXpert-v1.0 batch 2 (train 1)"."""
    path = re.sub(rf"[^/]*\({part} \d+\)/", f"{part}/", path.replace("\\", "/"))
    start = f"/{path}".rfind(f"/{part}/")
    return path[start:] if start >= 0 else path


def observations(table: Table) -> dict[str, tuple[str, ...]]:
    """The 14 observations by a table's key. DataError where a column of them
    holds words."""
    labels = read_labels(table, CHEXPERT_OBSERVATIONS)
    if labels.names != CHEXPERT_OBSERVATIONS:
        raise DataError(f"{table.file}: the observations must be 1, 0, -1 or blank, one column "
                        "holds something else")
    return labels.cells


# --------------------------------------------------------------------------------------------------
# MIMIC-CXR-JPG.

def mimic_items(args: argparse.Namespace, files: list[str]) -> Source:
    """MIMIC-CXR-JPG: the CheXpert labels of each study, the official splits,
    frontal views.

    Its three tables are those of MIMIC-CXR-JPG, packed or not; the images lie
    at any depth."""
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
    """DataError where another table has none of the ids of our images.

    rows: the table that has both kinds of ids. ours: ids of the images on
    disk."""
    ids = sorted(ours)
    if ids and not any(id_ in theirs for id_ in ids):
        raise DataError(f"{file}, column {column}: none of the {len(ids):,} ids of the images "
                        f"is in it, such as {ids[0]} of {rows.file.name}")


def one_file(folder: Path, pattern: str) -> Path:
    """The one file of a folder that a pattern matches. DataError where there
    is none, or more."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder} must hold one {pattern}, it holds {len(found)}")
    return found[0]
