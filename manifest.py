"""The data folder, which is the contract between the stages.

It holds images/ and manifest.csv, whose columns are path, patient and split, then one column a
label: 1 present, 0 absent, -1 uncertain, empty not mentioned.

    path,patient,split,Cardiomegaly,Lung Opacity
    images/p00001/s1.jpg,p00001,train,1,-1
"""
import csv
import dataclasses
import functools
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

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

    def file(self, i: int) -> bytes:
        """The path of image i for the operating system.

        A manifest is UTF-8, whatever encoding the locale has for the names of files."""
        name = self.paths[i]
        return os.path.join(
            os.fsencode(self.folder),
            name.encode("utf-8", "surrogateescape") if self.listed else os.fsencode(name))

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

    def encoded_paths(self, images: np.ndarray) -> list[np.ndarray]:
        """The full paths of some images as the bytes that the file system knows, uint8."""
        text, start = self._encoded
        return [text[i:j] for i, j in zip(start[images].tolist(), start[images + 1].tolist())]

    @functools.cached_property
    def _encoded(self) -> tuple[np.ndarray, np.ndarray]:
        """All paths in one array, and where each of them starts in it, (N + 1,)."""
        paths = [self.file(i) for i in range(len(self.paths))]
        start = np.concatenate([[0], np.cumsum([len(path) for path in paths])])
        return np.frombuffer(b"".join(paths), np.uint8), start


def read_manifest(folder: str | Path, images_on_disk: bool = True) -> Manifest:
    """Read and check `folder`/manifest.csv, and that every image in it is on disk.

    DataError names the file, the row (the header is row 1) and the column. images_on_disk:
    False leaves it to the caller to look for the images."""
    file = Path(folder) / "manifest.csv"
    if not file.is_file():
        raise DataError(f"{folder} is not a data folder: {file} is missing "
                        "(python prepare.py --help makes one; --data names another)")
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

    paths = [row[0] for row in rows]
    patients, splits = (np.array([row[column] for row in rows]) for column in (1, 2))
    manifest = Manifest(Path(folder), paths, patients, splits, labels, label_names)
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
    """Bytes of each image's file, (N,) int64; DataError where one is missing or is no file.

    A folder or a pipe in an image's place is no image: nothing would come of reading it."""
    sizes, unusable = np.zeros(len(manifest.paths), np.int64), []
    for i in range(len(sizes)):
        try:
            found = os.stat(manifest.file(i))
        except (OSError, ValueError):                   # a name may also hold a NUL
            unusable.append((i, "is missing on disk"))
            continue
        sizes[i] = found.st_size
        if stat.S_ISDIR(found.st_mode):
            unusable.append((i, "is a folder, where a file is needed"))
        elif not stat.S_ISREG(found.st_mode):           # reading a pipe would wait for ever
            unusable.append((i, "is no regular file"))
    if unusable:
        i, problem = unusable[0]
        others = f", and {len(unusable) - 1} more" if len(unusable) > 1 else ""
        raise DataError(f"{manifest.folder / 'manifest.csv'}, row {i + 2}: {manifest.paths[i]} "
                        f"{problem}{others}")
    return sizes


def _digest(*parts: bytes) -> str:
    """16 hexadecimal digits that differ where the parts do."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


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
