"""The source `folder`: images in folders of classes, a table of them, or both.

layout.py says what folders mean, tables.py what the cells of a table mean, and doubts.py what looks
like a mistake.
"""
import argparse
import os
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from common import DataError, printable
from doubts import (
    Doubt, copies_of_unknown, drawings, folders_of_persons, lone_images, many_classes,
    names_without_meaning, parts_of_persons, persons_in_names, repeated_below, same_pictures,
    say_no_finding, seem_patients, seem_studies, seem_views, splits_in_names, strayed_copies)
from flags import Several
from layout import (
    Place, excluder, find_layout, layout_text, levels_of, outside_splits, place_of, split_name)
from radiograph import EXTENSIONS, unread_suffix
from sources import (
    Item, Source, check_patients_and_splits, doubt_classes, jpeg_path, label_flags, label_rules,
    passed_over, plain_path, text_of, that_end_alike, unique, unused_note, unused_splits,
    without_suffix)
from tables import (
    MOST_CELLS, Table, merged, names_of_others, read_table, small, spellings, understand,
    value_of)


def folder_flags(flag: Callable) -> None:
    flag("--layout", type=layout_text, metavar="LEVELS",
         help="what the folders below --src say, level by level: split, class, patient, or * for "
              "nothing, for example */split/class; none (default: recognised by their names)")
    flag("--exclude", nargs="+", action=Several, default=[], metavar="NAME",
         help="files and folders to pass over, by name or by path below --src; * is a wildcard")
    flag("--csv", type=Path, help="table of the images to take; may be a .gz")
    flag("--path-column",
         help="its column of paths below --src, or of file names (default: path)")
    flag("--patient-column",
         help="its column of patients (default: patient, if there is one)")
    flag("--split-column",
         help="its column of train, val, test (default: split, if there is one)")
    flag("--where", nargs="+", action=Several, default=[], type=condition,
         metavar="COLUMN=VALUE,VALUE",
         help="take only rows in which a column has one of the values, such as Projection=PA,AP")
    label_flags(flag, "the class folders are the labels")
    flag("--patients-per-split", action="store_true",
         help="the numbers of the patients restart in each split")


def condition(text: str) -> str:
    """A --where, unchanged. ValueError, which argparse expects, if it is not valid."""
    column, _, values = text.partition("=")
    if not column or not values:
        raise ValueError(text)
    return text


def folder_items(args: argparse.Namespace, files: list[str]) -> Source:
    """Images in folders, a table of them, or both. If the two disagree, the table wins."""
    source, excluded = Source([]), excluder(args.exclude)
    images = [file for file in files
              if file.lower().endswith(EXTENSIONS) and not excluded(file)]
    others = Counter("excluded" if excluded(file) else suffix_of(file)
                     for file in set(files) - set(images))

    # The table says which images there are, their patients and their splits.
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

    # The folders say what the table does not.
    levels = find_layout(images) if args.layout is None else levels_of(args.layout)
    if splits:
        doubt_other_splits(source, splits, levels)
        levels = ["*" if level == "split" else level for level in levels]
    columns = [*args.label_columns, *args.class_columns]
    named = levels                  # what the folders' names say, even if it is not used
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
        # A folder that contains the split folders cannot be excluded.
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

    # One item per image. If x.png lies beside x.jpg, both keep their suffix, as x.png.jpg.
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
        if file in pictures:        # copies stay together, unless the source splits them
            patient = pictures[file] + (f" {split}" if split else "")
        if args.patients_per_split and split:
            patient = f"{split}-{patient}"
        source.items.append(Item(file, path, text_of(patient), split, labels[file]))

    doubt_classes(source, said=not columns and args.layout is not None)

    # What the user has to know.
    source.patients_known = bool(patients)
    if not patients:
        say_no_patients(source, images, pictures)
    elif person := parts_of_persons(patients.values()):
        source.notes.append(f"Some patients, such as {person}, seem to be parts of one person by "
                            "their names: images of each may come into several splits.")
    source.passed_over = f"Files passed over: {passed_over(others) or 'none'}."
    source.notes.append(source.passed_over)
    return source


# --------------------------------------------------------------------------------------------------
# What the table says.

def read_image_table(args: argparse.Namespace) -> Table:
    """--csv, its rows named by the column of paths, with the columns that other flags name."""
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


def rows_of_files(table: Table, images: list[str], src: Path, source: Source) -> dict[str, str]:
    """{file: its key in the table} for the images that the table names.

    A row names a file by its path below --src, under any name that links give it; case and blanks
    may differ if only one file fits. If no row does so, paths count as equal if one ends with the
    other, and if that finds nothing either, the same without suffixes; a note says so. What is in
    only one of the two is rejected. DataError if two rows name one file, or one row two files."""
    # By the path, or else by a path that differs only in case or blanks, if one file alone has it.
    by_path = unique(images, plain_path)
    file_of = {key: by_path[key] for key in table.rows if key in by_path}
    alike = Counter(map(loose_path, by_path))
    by_form = {loose_path(path): file for path, file in by_path.items()
               if alike[loose_path(path)] == 1}
    for key in table.rows:
        if key not in file_of and loose_path(key) in by_form:
            file_of[key] = by_form[loose_path(key)]
    # By another name of the same file: if links give it several, find_files has only one of them.
    missing = [key for key in table.rows
               if key not in file_of and os.path.exists(src / key)]
    if missing:
        real = {os.path.realpath(src / image): image for image in images}
        for key in missing:
            if os.path.realpath(src / key) in real:
                file_of[key] = real[os.path.realpath(src / key)]

    refuse_mixed_names(table, images, file_of)

    # By the end of the path, if no row was found at all. Folders, where given, must agree.
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

    # No file may be named twice, and none is left out silently.
    key_of: dict[str, str] = {}
    for key, file in file_of.items():
        if key_of.setdefault(file, key) != key:
            one, other = sorted((table.rows[key_of[file]].number, table.rows[key].number))
            raise DataError(f"{table.file}, rows {one} and {other}: both name {file}")
    source.rejected += [(key, f"named in {table.file.name}, missing on disk")
                        for key in table.rows if key not in file_of]
    # The table may cover only a part of the images. Then all its rows are found.
    other, missed = f"not in {table.file.name}", len(file_of) < len(table.rows)
    source.asked_for |= set() if missed else {other}
    source.rejected += [(file, other) for file in images if file not in key_of]
    return key_of


def refuse_mixed_names(table: Table, images: list[str], file_of: dict[str, str]) -> None:
    """DataError if a row names a file that is not there while a file of the same name has no row.

    file_of: the rows that were found by their path. If there are none, names are good enough."""
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


def loose_path(path: str) -> str:
    """A path as `small` writes it, with each run of blanks as one: equal for paths that look
    alike."""
    return " ".join(small(path).split())


def take_where(table: Table, key_of: dict[str, str], conditions: list[str],
               source: Source) -> None:
    """Keep only the rows that meet every condition, and reject files without any such row."""
    for text in conditions:         # COLUMN=VALUE,VALUE
        column, _, values = text.partition("=")
        values = [value.strip() for value in values.split(",")]
        place = table.columns.index(column)
        # A row whose file is missing is no loss if --where would not take the row.
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


def doubt_unused_columns(source: Source, args: argparse.Namespace, table: Table,
                         levels: list[str], keys: list[str]) -> None:
    """Add doubts for columns that seem to name patients or splits, if no column is used for that.

    keys: the rows of the images. Only their cells are looked at."""
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
    # A column "patient" with another value in each row has this name by chance, and is none.
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


# --------------------------------------------------------------------------------------------------
# What the folders say.

def doubt_other_splits(source: Source, splits: dict[str, str], levels: list[str]) -> None:
    """Add a doubt for files whose folder says another split than the table.

    splits: {file: its cell in the table}."""
    others = [file for file, cell in splits.items()
              if split_name(cell) and place_of(file, levels).split not in ("", None)
              and place_of(file, levels).split != split_name(cell)]
    if others:
        source.doubts.append(Doubt(
            "unused-splits", f"{len(others):,} images, such as {text_of(others[0])}, lie in the "
            f"folder of another split than the table says, here {splits[others[0]]}, which would "
            "be used"))


def doubt_folders(source: Source, images: list[str], levels: list[str], guessed: bool) -> None:
    """Add the doubts that names of folders raise."""
    # A network would learn the outlines of masks, and their labels would look right.
    masks = drawings(images)
    if masks:
        source.doubts.append(Doubt(
            "masks", f"{len(masks):,} of the images, such as {text_of(masks[0])}, seem to be masks "
            "or other drawings: --exclude, followed by the name of their folder or by '*_mask*', "
            "leaves them out"))
    # A user who gives the layout has looked at the folders.
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
        own = next(PurePosixPath(file).parts[levels.index("class")]         # images.zip for images
                   for file, name in zip(images, classes) if name == odd[0])
        source.doubts.append(Doubt(
            "odd-classes", f"the folder {text_of(own)} does not look like a class: --exclude "
            f"{shlex.quote(text_of(own))} leaves it out, {ask}"))
    elif twice:
        name, one, other = map(text_of, twice)
        source.doubts.append(Doubt("odd-classes", f"{name} lies both below {one} and below "
                                   f"{other}, and either may be the class: {ask}"))


def doubt_unknown_patients(source: Source, images: list[str], levels: list[str],
                           labelled: bool) -> None:
    """Add a doubt for folders that seem to be patients while every image would count as one.

    labelled: whether the labels come from a table, so that folders taken for classes may be
    patients."""
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


def doubt_splits_in_names(source: Source, images: list[str]) -> None:
    """Note that names of files seem to name splits, which are not used; if two splits are named,
    doubt it."""
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


def reject_unread(source: Source, files: list[str], places: dict[str, Place], levels: list[str],
                  excluded: Callable[[str], bool]) -> None:
    """Reject pictures in formats that are not read, unless the same folder has an image with that
    name. Doubt it if a class has no other pictures. places: {image: its Place}."""
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


def suffix_of(file: str) -> str:
    """The suffix of a file, or "without suffix". The last part of 1.2.840.17 is no suffix."""
    suffix = PurePosixPath(file).suffix
    return "without suffix" if not suffix or suffix[1:].isdigit() else suffix


def class_folders(source: Source, places: dict[str, Place]) -> dict[str, tuple[str, ...]]:
    """{file: its labels}, by the class folder it lies in. The labels' names go to the source.

    Folders that differ only in form, such as train/NORMAL and test/Normal, are one class."""
    names = {file: text_of(place.class_name) for file, place in places.items()}
    counts = Counter((name, name) for name in names.values() if name)
    spelling = spellings(counts)
    source.label_names = sorted(set(spelling.values()))
    source.classes = set(source.label_names)
    if len(source.label_names) * len(places) > MOST_CELLS:
        raise DataError(f"{len(source.label_names):,} class folders of {len(places):,} images are "
                        "more than fit into memory: --layout says what each level of folders is")
    source.doubts += many_classes(source.label_names, len(places))
    for name in names_of_others(source.label_names)[:1]:
        source.doubts.append(Doubt(
            "odd-classes", f"the class folder {name} seems to name several findings that other "
            "folders name as well, and which would be absent in its images: a column of lists, "
            "such as A|B, in a table by --csv says both"))
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


def one_hot(word: str, words: list[str]) -> tuple[str, ...]:
    """"1" for the word and "0" for all others; all "" if there is no word."""
    if not word:
        return ("",) * len(words)
    return tuple("1" if word == other else "0" for other in words)


def say_no_patients(source: Source, images: list[str], pictures: dict[str, str]) -> None:
    """Add notes on images without known patients, and a doubt for copies in folders of their own.
    pictures: from same_pictures."""
    source.notes.append("No patient is known: every image counts as a patient of its own.")
    if pictures:
        first, count = min(pictures.values()), len(set(pictures.values()))
        one, *_, other = (text_of(file) for file in pictures if pictures[file] == first)
        source.notes.append(
            f"By their names {len(pictures):,} images, such as {one} and {other}, are changed "
            f"copies or views of one another: they count as {count:,} patients.")
    # The splits from which val and test are carved; "" alone if the source gives both.
    given = {item.split for item in source.items}
    carved = {"", "train"} if not {"val", "test"} <= given else {""}
    copies = copies_of_unknown(
        [item.source for item in source.items if item.split in carved], pictures)
    if copies:
        folder = text_of(str(PurePosixPath(copies[0]).parent))
        source.doubts.append(Doubt(
            "unknown-patients", f"{len(copies):,} images, such as {text_of(copies[0])}, are "
            "changed copies of others by their folder, and would come into other splits than "
            f"these, as their names do not say of which: --exclude {shlex.quote(folder)} leaves "
            "that folder out"))
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
