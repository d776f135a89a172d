"""The data folder, which is the contract between the stages.

It holds images/ and manifest.csv. The columns are path, patient and split; study and view, if they
are known; and one for each label: 1 present, 0 absent, -1 uncertain, empty not mentioned. An
images.tar may replace images/, see archive.py.

    path,patient,split,study,view,Cardiomegaly,Lung Opacity
    images/p00001/s1.jpg,p00001,train,s1,PA,1,-1
"""
import functools
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archive import Archive, check_against_folder, open_archive, sizes_on_disk
from common import DataError
from manifest_csv import manifest_table


@dataclass(frozen=True)
class Manifest:
    """The images of a data folder's manifest.csv, by image index i from 0, as in all the project.

    predict.py also makes one of a plain folder of images, with paths and nothing else."""
    folder: Path
    paths: list[str]                # N of them, relative to the folder
    patients: np.ndarray            # (N,) str
    splits: np.ndarray              # (N,) str: train, val or test
    labels: np.ndarray              # (N, L) float32: 1, 0, -1, or NaN for an empty cell
    label_names: list[str]          # L of them; none in an unlabelled folder
    studies: np.ndarray | None = None   # (N,) str: what tells a patient's examinations apart, or ""
    view_positions: np.ndarray | None = None     # (N,) str: PA, AP, Lateral or another word, or ""
    listed: bool = True             # False for a plain folder, which has no manifest.csv
    sizes: np.ndarray | None = None     # (N,) int64 bytes, by which a run recognises its images
    archive: Archive | None = None      # images.tar, if the folder has one

    def images(self, split: str) -> np.ndarray:
        """Image indices of a split, (n,) int64, in manifest order; DataError if it is empty."""
        index = np.flatnonzero(self.splits == split)
        if not len(index):
            raise DataError(f"{self.folder / 'manifest.csv'} has no image in the {split} split")
        return index

    def patient_numbers(self) -> np.ndarray:
        """A number for each image, (N,) int64: the same for all images of a patient."""
        return np.unique(self.patients, return_inverse=True)[1]

    # How to find image i: for DALI, for Pillow, and for the reader of a message.

    def dali_inputs(self, images: np.ndarray) -> list[np.ndarray]:
        """What DALI reads of each image, as an array of uint8: the content of the file if it is
        in images.tar, or else the full path."""
        if self.archive:
            return self.archive.contents(images)
        folder, paths = os.fsencode(self.folder) + b"/", self.path_bytes
        return [np.frombuffer(folder + paths[i], np.uint8) for i in images.tolist()]

    def open(self, i: int) -> bytes | io.BytesIO:
        """An argument for Pillow's Image.open. DataError if images.tar is damaged there."""
        if self.archive:
            return io.BytesIO(self.archive.member(i).read_bytes())
        return os.path.join(os.fsencode(self.folder), self.path_bytes[i])

    def name_in_message(self, i: int) -> str:
        """The file of image i and its row in the manifest."""
        where = f"{self.archive.file}, {self.paths[i]}" if self.archive else \
            str(self.folder / self.paths[i])
        return where + (f" (row {i + 2} of manifest.csv)" if self.listed else "")

    @functools.cached_property
    def path_bytes(self) -> list[bytes]:
        """The paths for the operating system. In a manifest they are UTF-8 in any locale."""
        return as_bytes(self.paths) if self.listed else [os.fsencode(path) for path in self.paths]


def as_bytes(paths: Iterable[str]) -> list[bytes]:
    """A manifest's paths for the operating system."""
    return [path.encode("utf-8", "surrogateescape") for path in paths]


def read_manifest(folder: str | Path, use_tar: bool = True, check_files: bool = True) -> Manifest:
    """Read and check `folder`/manifest.csv, and that every image in it is there.

    use_tar: read the images from images.tar if there is one, or else from their own files.
    check_files: whether to look for each of these files; False leaves that to the caller.
    DataError names the file, the row (the header is row 1) and the column."""
    file = Path(folder) / "manifest.csv"
    if not file.is_file():
        raise DataError(f"{folder} is not a data folder: {file} is missing "
                        "(`python prepare.py nih --src DIR --out DIR`, or another source, makes "
                        "one; --data names another; `python pretrain.py --demo` brings its own)")
    table = manifest_table(file, folder)
    path_bytes, sizes = as_bytes(table.paths), None
    archive = open_archive(file.parent, table.paths, path_bytes) if use_tar else None
    if archive:
        # The images may be newer than the tar: compare a hundred of those that are still there.
        sample = np.unique(np.linspace(0, len(table.paths) - 1, 100).astype(int))
        check_against_folder(archive, file.parent, path_bytes, sample)
        sizes = archive.table["size"]
    elif check_files:
        sizes = sizes_on_disk(file.parent, table.paths, path_bytes)
    # The table's fields are Manifest's, from paths to view_positions.
    return Manifest(file.parent, **table._asdict(), archive=archive, sizes=sizes)
