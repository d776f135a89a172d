"""The data folder, which is the contract between the stages.

It holds images/ and manifest.csv, whose columns are path, patient and split, then one column a
label: 1 present, 0 absent, -1 uncertain, empty not mentioned. images.tar may stand for images/, see
archive.py.

    path,patient,split,Cardiomegaly,Lung Opacity
    images/p00001/s1.jpg,p00001,train,1,-1
"""
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from archive import Archive, check_against_folder, open_archive
from common import DataError, open_text

SPLITS = ("train", "val", "test")
LABEL_VALUES = {
    "1": 1.0, "1.0": 1.0,
    "0": 0.0, "0.0": 0.0,
    "-1": -1.0, "-1.0": -1.0,
    "": np.nan,
}


@dataclass(frozen=True)
class Manifest:
    """The rows of a data folder's manifest.csv; row i is image index i everywhere in the project.

    A plain folder of images, which predict.py takes too, has paths and nothing else: no
    patients, no splits and no labels (`listed` is False)."""
    folder: Path
    paths: list[str]                # N of them, relative to the folder
    patients: np.ndarray            # (N,) str
    splits: np.ndarray              # (N,) str: train, val or test
    labels: np.ndarray              # (N, L) float32: 1, 0, -1, or NaN for an empty cell
    label_names: list[str]          # L of them; none in an unlabelled folder
    listed: bool = True             # whether there is a manifest.csv
    sizes: np.ndarray | None = None     # (N,) int64: bytes of each image's file
    archive: Archive | None = None      # where the folder has an images.tar

    def file(self, i: int) -> bytes:
        """The path of image i for the operating system."""
        return os.path.join(os.fsencode(self.folder), self.names[i])

    def open(self, i: int) -> bytes | io.BytesIO:
        """What Pillow opens image i by. DataError where its bytes in images.tar are damaged."""
        return io.BytesIO(self.archive.member(i).read_bytes()) if self.archive else self.file(i)

    def full_name(self, i: int) -> str:
        """Image i in a message: where it lies, and which row of the manifest it is."""
        where = f"{self.archive.file}, {self.paths[i]}" if self.archive else \
            str(self.folder / self.paths[i])
        return where + (f" (row {i + 2} of manifest.csv)" if self.listed else "")

    def rows_digest(self) -> str:
        """Changes with every change of the table, and not with where it lies."""
        columns = self.paths, self.patients, self.splits, self.label_names
        return _digest(*("\n".join(column).encode("utf-8", "surrogateescape")
                         for column in columns), self.labels.tobytes())

    def paths_digest(self, images: np.ndarray) -> str:
        """The same for nothing but which images these are, and in which order."""
        return _digest(*(self.paths[i].encode("utf-8", "surrogateescape") for i in images))

    def sizes_digest(self, images: np.ndarray) -> str:
        """Changes where one of the images was written anew, if not to the same number of bytes."""
        return _digest(b"" if self.sizes is None else self.sizes[images].tobytes())

    def images(self, split: str) -> np.ndarray:
        """Image indices of a split, (n,) int64, in manifest order; DataError where it is empty."""
        index = np.flatnonzero(self.splits == split)
        if not len(index):
            raise DataError(f"{self.folder / 'manifest.csv'} has no image in the {split} split")
        return index

    def patient_numbers(self) -> np.ndarray:
        """A number for each image, (N,) int64, the same for images of one patient."""
        return np.unique(self.patients, return_inverse=True)[1]

    def files(self, images: np.ndarray) -> list[np.ndarray]:
        """What DALI gets of some images, uint8: from images.tar what is in their files,
        else their full paths as the bytes that the file system knows."""
        if self.archive:
            return self.archive.contents(images)
        text, start = self._full_paths
        return [text[i:j] for i, j in zip(start[images].tolist(), start[images + 1].tolist())]

    @functools.cached_property
    def names(self) -> list[bytes]:
        """The paths for the operating system; a manifest's are UTF-8, whatever the locale is."""
        return encoded(self.paths) if self.listed else [os.fsencode(path) for path in self.paths]

    @functools.cached_property
    def _full_paths(self) -> tuple[np.ndarray, np.ndarray]:
        """All of them in one array, and where each of them starts in it, (N + 1,)."""
        folder = os.path.join(os.fsencode(self.folder), b"")
        lengths = np.fromiter(map(len, self.names), np.int64, len(self.names)) + len(folder)
        text = b"".join([part for name in self.names for part in (folder, name)])
        return np.frombuffer(text, np.uint8), np.concatenate([[0], np.cumsum(lengths)])


def encoded(paths: Iterable[str]) -> list[bytes]:
    """Paths of a manifest for the operating system."""
    return [path.encode("utf-8", "surrogateescape") for path in paths]


def read_manifest(folder: str | Path, packed: bool = True, images_on_disk: bool = True) -> Manifest:
    """Read and check `folder`/manifest.csv, and that every image in it is there.

    packed: take the images from images.tar if there is one, and else from their own files.
    images_on_disk: False leaves it to the caller to look for the files.
    DataError names the file, the row (the header is row 1) and the column."""
    file = Path(folder) / "manifest.csv"
    if not file.is_file():
        raise DataError(f"{folder} is not a data folder: {file} is missing "
                        "(python prepare.py --help makes one; --data names another)")
    # The second way is slow, and says what the first one has doubts about.
    table = _table_at_once(file) or _table_by_rows(file, folder)
    manifest = Manifest(Path(folder), *table)
    if archive := packed and open_archive(manifest.folder, manifest.paths, manifest.names):
        # A hundred of the images tell whether all of them were made anew since.
        sample = np.unique(np.linspace(0, len(manifest.paths) - 1, 100).astype(int))
        check_against_folder(archive, manifest.folder, manifest.names, sample)
        return dataclasses.replace(manifest, archive=archive, sizes=archive.table["size"])
    if images_on_disk:
        manifest = dataclasses.replace(manifest, sizes=_image_sizes(manifest))
    return manifest


def image_flags(folder: str | Path) -> dict[str, Any]:
    """The flags that shaped the images of a data folder, {name: value} as prepare.py wrote them;
    {} where nothing says it: the folder was not made by prepare.py."""
    try:
        made = json.loads((Path(folder) / "prepare.json").read_text("utf-8"))
        return {name: made[name] for name in ("size", "quality", "stretch")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _image_sizes(manifest: Manifest) -> np.ndarray:
    """Bytes of each image's file, (N,) int64; DataError where one is missing or is no file."""
    sizes, unusable = np.zeros(len(manifest.paths), np.int64), []
    for i, found in enumerate(_stats(manifest)):
        # A folder or a pipe in an image's place is no image: reading a pipe would wait for ever.
        if found is None:
            unusable.append((i, "is missing on disk"))
        elif stat.S_ISREG(found.st_mode):
            sizes[i] = found.st_size
        elif stat.S_ISDIR(found.st_mode):
            unusable.append((i, "is a folder, where a file is needed"))
        else:
            unusable.append((i, "is no regular file"))
    if unusable:
        i, problem = unusable[0]
        others = f", and {len(unusable) - 1} more" if len(unusable) > 1 else ""
        raise DataError(f"{manifest.folder / 'manifest.csv'}, row {i + 2}: {manifest.paths[i]} "
                        f"{problem}{others}")
    return sizes


def _stats(manifest: Manifest) -> Iterator[os.stat_result | None]:
    """What the file system says of each image, or None where it says nothing.

    Consecutive images often lie in one folder. It is opened once, since to walk to
    it from the root again for each image would take twice as long."""
    current, opened = None, None
    try:
        for name in manifest.names:
            folder, _, file = name.rpartition(b"/")
            try:
                if folder != current:
                    if opened is not None:
                        os.close(opened)
                    current = opened = None
                    opened = os.open(os.path.join(os.fsencode(manifest.folder), folder), os.O_PATH)
                    current = folder
                yield os.stat(file or b".", dir_fd=opened)
            except (OSError, ValueError):               # a name may also hold a NUL
                yield None
    finally:
        if opened is not None:
            os.close(opened)


def _digest(*parts: bytes) -> str:
    """16 hexadecimal digits that differ where the parts do."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# The table, read in two ways: by arrays in seconds where nothing is wrong, or row by row.

class Table(NamedTuple):
    """The columns of a manifest.csv; a Manifest explains them."""
    paths: list[str]
    patients: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    label_names: list[str]


def _table_at_once(file: Path) -> Table | None:
    """A million rows in three seconds; None where anything may be wrong, or is out of the ordinary.

    A text without quotes or carriage returns is a table where every line has as many
    commas as the first one. All of them are found in one array."""
    try:
        with open_text(file) as f:
            text = f.read().replace("\r\n", "\n").removesuffix("\n") + "\n"
    except ValueError:
        return None
    lines = text.split("\n")[:-1]
    names = lines[0].split(",")
    special = any(character in text for character in '"\r\0')
    if special or names[:3] != ["path", "patient", "split"] or len(lines) < 2 \
            or len(set(names)) < len(names) or not all(names) or max(map(len, lines)) > 10**5:
        return None

    # The places of all commas and line ends, (rows, columns): where each cell ends.
    characters = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
    ends = np.flatnonzero((characters == ord(",")) | (characters == ord("\n")))
    if len(ends) != len(lines) * len(names):
        return None
    ends = ends.reshape(len(lines), len(names))
    if (characters[ends[:, -1]] != ord("\n")).any():
        return None

    # The first three columns as text, and what has to hold of them.
    # A list of lists would keep Python's garbage collector busy for seconds.
    paths, patients, splits = (
        [line.split(",", column + 1)[column] for line in lines[1:]] for column in range(3))
    together = "\n".join(["", *paths])
    if ".." in together or "\n/" in together or len(set(paths)) < len(paths):
        return None
    split_of = dict(zip(patients, splits))
    if not (all(paths) and all(patients) and set(splits) <= set(SPLITS)
            and list(map(split_of.get, patients)) == splits):
        return None

    # The labels, column by column: what stands between two commas is one of LABEL_VALUES.
    labels = np.full((len(paths), len(names) - 3), np.nan, np.float32)
    for column in range(3, len(names)):
        starts = ends[1:, column - 1] + 1
        lengths = ends[1:, column] - starts
        recognised = np.count_nonzero(lengths == 0)
        for cell, value in LABEL_VALUES.items():
            rows = np.flatnonzero(lengths == len(cell)) if cell else starts[:0]
            for place, character in enumerate(cell):
                rows = rows[characters[starts[rows] + place] == ord(character)]
            labels[rows, column - 3] = value
            recognised += len(rows)
        if recognised < len(paths):
            return None
    return Table(paths, np.array(patients), np.array(splits), labels, names[3:])


def _table_by_rows(file: Path, folder: str | Path) -> Table:
    """The same for every CSV file; DataError names the first row and column that is wrong."""
    header, rows = _read_rows(file)
    label_names = header[3:]

    row_of, split_of = {}, {}           # row of each path, split of each patient seen so far
    labels = np.empty((len(rows), len(label_names)), np.float32)
    for i, row in enumerate(rows):
        where = f"{file}, row {i + 2}"
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} cells where the header has {len(header)}")
        path, patient, split, *cells = row
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
        for column, cell in enumerate(cells):
            if cell not in LABEL_VALUES:
                raise DataError(f"{where}, column {label_names[column]}: {cell!r} is none of "
                                "1, 0, -1 or empty")
            labels[i, column] = LABEL_VALUES[cell]
    patients, splits = (np.array([row[column] for row in rows]) for column in (1, 2))
    return Table([row[0] for row in rows], patients, splits, labels, label_names)


def _read_rows(file: Path) -> tuple[list[str], list[list[str]]]:
    """The header, checked, and the rows of a manifest.csv."""
    try:
        with open_text(file) as f:
            header, *rows = csv.reader(f, strict=True)
    except (ValueError, csv.Error) as error:        # no line at all, no text, an open quote
        raise DataError(f"{file} is empty or not a CSV file ({error})") from None
    for column, name in enumerate(("path", "patient", "split")):
        if header[column:column + 1] != [name]:
            raise DataError(f"{file}, row 1: column {column + 1} must be '{name}', "
                            f"the header is {','.join(header)!r}")
    for name in header[3:]:
        if not name:
            raise DataError(f"{file}, row 1: label column '' is without a name")
        if header.count(name) > 1:
            raise DataError(f"{file}, row 1: label column {name!r} is there twice")
    while rows and not rows[-1]:                    # blank lines at the end
        rows.pop()
    if not rows:
        raise DataError(f"{file} lists no image")
    return header, rows
