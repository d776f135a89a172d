"""manifest.csv, read in two ways: with arrays, in seconds, if nothing is unusual; or row by row."""
import csv
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from common import DataError, open_text

SPLITS = ("train", "val", "test")
FIRST_COLUMNS = ["path", "patient", "split"]
OPTIONAL_COLUMNS = ["study", "view"]    # each may be missing; in this order, before the labels
LABEL_VALUES = {
    "1": 1.0, "1.0": 1.0,
    "0": 0.0, "0.0": 0.0,
    "-1": -1.0, "-1.0": -1.0,
    "": np.nan,
}


class Table(NamedTuple):
    """The columns of a manifest.csv; see Manifest."""
    paths: list[str]
    patients: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    studies: np.ndarray | None = None
    view_positions: np.ndarray | None = None


def optional_columns(header: list[str]) -> list[str]:
    """The optional columns that follow the first three, each in its place."""
    choices = OPTIONAL_COLUMNS, OPTIONAL_COLUMNS[:1], OPTIONAL_COLUMNS[1:]
    return next((found for found in choices if header[3:3 + len(found)] == found), [])


def manifest_table(file: Path, folder: str | Path) -> Table:
    """The fast way returns None if anything is unusual. Then the slow one reads the file, or says
    which row and column is wrong."""
    return table_at_once(file) or table_by_rows(file, folder)


def table_at_once(file: Path) -> Table | None:
    """A million rows in three seconds; None if anything is unusual or may be wrong.

    A text without quotes or carriage returns is a table if every line has as many commas as the
    first one. All commas are found in one array."""
    try:
        with open_text(file) as f:
            text = f.read().replace("\r\n", "\n").removesuffix("\n") + "\n"
    except ValueError:
        return None
    lines = text.split("\n")[:-1]
    names = lines[0].split(",")
    special = any(character in text for character in '"\r\0')
    optional = optional_columns(names)
    first_label = 3 + len(optional)
    if special or names[:3] != FIRST_COLUMNS or len(lines) < 2 \
            or not set(OPTIONAL_COLUMNS).isdisjoint(names[first_label:]) \
            or len(set(names)) < len(names) or not all(names) or max(map(len, lines)) > 10**5:
        return None

    # The positions of all commas and line ends, (rows, columns): where each cell ends.
    characters = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
    ends = np.flatnonzero((characters == ord(",")) | (characters == ord("\n")))
    if len(ends) != len(lines) * len(names):
        return None
    ends = ends.reshape(len(lines), len(names))
    if (characters[ends[:, -1]] != ord("\n")).any():
        return None

    # The columns of text, and what must be true of them.
    # A list of lists would keep Python's garbage collector busy for seconds.
    paths, patients, splits, *texts = (
        [line.split(",", column + 1)[column] for line in lines[1:]]
        for column in range(first_label))
    together = "\n".join(["", *paths])
    if ".." in together or "\n/" in together or len(set(paths)) < len(paths):
        return None
    split_of = dict(zip(patients, splits))
    if not (all(paths) and all(patients) and set(splits) <= set(SPLITS)
            and list(map(split_of.get, patients)) == splits):
        return None

    # The labels, column by column: each cell must be one of LABEL_VALUES.
    labels = np.full((len(paths), len(names) - first_label), np.nan, np.float32)
    for column in range(first_label, len(names)):
        starts = ends[1:, column - 1] + 1
        lengths = ends[1:, column] - starts
        recognised = np.count_nonzero(lengths == 0)
        for cell, value in LABEL_VALUES.items():
            if not cell:                                # they are NaN already
                continue
            rows = np.flatnonzero(lengths == len(cell))
            for place, character in enumerate(cell):
                rows = rows[characters[starts[rows] + place] == ord(character)]
            labels[rows, column - first_label] = value
            recognised += len(rows)
        if recognised < len(paths):
            return None
    extra = dict(zip(optional, map(np.array, texts)))
    return Table(paths, np.array(patients), np.array(splits), labels, names[first_label:],
                 extra.get("study"), extra.get("view"))


def table_by_rows(file: Path, folder: str | Path) -> Table:
    """The same for any CSV file; DataError names the first row and column that is wrong."""
    header, rows = _read_rows(file)
    optional = optional_columns(header)
    first_label = 3 + len(optional)
    label_names = header[first_label:]

    row_of, split_of = {}, {}           # row of each path, split of each patient seen so far
    labels = np.empty((len(rows), len(label_names)), np.float32)
    for i, row in enumerate(rows):
        where = f"{file}, row {i + 2}"
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} cells where the header has {len(header)}")
        path, patient, split = row[:3]
        parts = PurePosixPath(path).parts
        if not path or PurePosixPath(path).is_absolute() or ".." in parts:
            raise DataError(f"{where}, column path: {path!r} must be a path inside {folder}")
        if row_of.setdefault(path, i + 2) != i + 2:
            raise DataError(f"{where}, column path: {path} is already in row {row_of[path]}")
        if not patient:
            raise DataError(f"{where}, column patient: empty")
        if split not in SPLITS:
            raise DataError(f"{where}, column split: {split!r} is none of {', '.join(SPLITS)}")
        if split_of.setdefault(patient, split) != split:
            raise DataError(f"{where}, column patient: {patient} is in {split} and in "
                            f"{split_of[patient]}")
        for column, cell in enumerate(row[first_label:]):
            if cell not in LABEL_VALUES:
                raise DataError(f"{where}, column {label_names[column]}: {cell!r} is none of "
                                "1, 0, -1 or empty")
            labels[i, column] = LABEL_VALUES[cell]
    patients, splits = (np.array([row[column] for row in rows]) for column in (1, 2))
    extra = {name: np.array([row[column] for row in rows])
             for column, name in enumerate(optional, 3)}
    return Table([row[0] for row in rows], patients, splits, labels, label_names,
                 extra.get("study"), extra.get("view"))


def _read_rows(file: Path) -> tuple[list[str], list[list[str]]]:
    """The header, checked, and the rows of a manifest.csv."""
    try:
        with open_text(file) as f:
            header, *rows = [*csv.reader(f, strict=True)] or [[]]
    except (ValueError, csv.Error) as error:        # not UTF-8, or an open quote
        raise DataError(f"{file} is empty or not a CSV file ({error})") from None
    if not header and not any(rows):
        raise DataError(f"{file} is empty")
    for column, name in enumerate(FIRST_COLUMNS):
        if header[column:column + 1] != [name]:
            raise DataError(f"{file}, row 1: column {column + 1} must be '{name}', "
                            f"the header is {','.join(header)!r}")
    for name in header[3 + len(optional_columns(header)):]:
        if not name:
            raise DataError(f"{file}, row 1: label column '' is without a name")
        if name in OPTIONAL_COLUMNS:
            raise DataError(f"{file}, row 1: column {name!r} is no label and must stand once, "
                            "right after split, study before view")
        if header.count(name) > 1:
            raise DataError(f"{file}, row 1: label column {name!r} is there twice")
    while rows and not rows[-1]:                    # blank lines at the end
        rows.pop()
    if not rows:
        raise DataError(f"{file} lists no image")
    return header, rows
