"""images.tar: all images of a data folder in one file.

`python prepare.py pack` writes it. If it is there, every stage reads it, and images/ may be
deleted. It is a plain tar: each image is a member under the manifest's path, where `tar x` and
WebDataset find it. A job that starts asks the file system for one file instead of a hundred
thousand, a batch opens none, and only one file is copied to a node's own disk.

The first member, __index__, says where the others begin, so that nobody has to walk through the
whole file from header to header. It is in the tar and not beside it, because two files may come
from two different times. (WebDataset skips a name of this form.) It holds

    a line of JSON, 512 bytes: the number of members, the size of the whole tar, checksums
    a table of the members in the manifest's order: MEMBER for each
    their paths in UTF-8, separated by zero bytes
"""
import functools
import json
import mmap
import os
import signal
import stat
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from common import DataError, whole_file

NAME = "images.tar"
INDEX = "__index__"
BLOCK = 512                             # of a tar: everything in it begins at a multiple of it
MEMBER = np.dtype([("start", "<i8"), ("size", "<i8"), ("checksum", "<u4")])
REMEDY = "make it again with `python prepare.py pack`, or delete it"


class Member(NamedTuple):
    """Where the bytes of one image are, for a process that has nothing else of the archive."""
    archive: Path
    path: str                           # in the manifest
    start: int                          # bytes from the beginning of the tar
    size: int
    checksum: int                       # CRC-32

    def read_bytes(self) -> bytes:
        """The image's file; DataError if its bytes are not those that were packed."""
        with open(self.archive, "rb") as tar:
            content = os.pread(tar.fileno(), self.size, self.start)
        if zlib.crc32(content) != self.checksum:
            raise DataError("its bytes are not those that were packed")
        return content


@dataclass(frozen=True)
class Archive:
    """An images.tar. Its member i is the manifest's image i."""
    file: Path
    paths: list[str]                    # N of them
    table: np.ndarray                   # (N,) MEMBER

    def member(self, i: int) -> Member:
        return Member(self.file, self.paths[i], *self.table[i].tolist())

    def contents(self, images: np.ndarray) -> list[np.ndarray]:
        """The files of some images, uint8, as views of the tar that is mapped into memory.

        Nothing is copied or read here: DALI's threads wait for the bytes when they use them. (To
        tell the kernel to fetch them took longer than everything else here.)"""
        starts = self.table["start"][images]
        ends = starts + self.table["size"][images]
        return [self._bytes[start:end] for start, end in zip(starts.tolist(), ends.tolist())]

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        """The whole tar, (its size,) uint8; the kernel reads a part when it is used."""
        with open(self.file, "rb") as opened:
            tar = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        _say_when_lost(self.file)
        return np.frombuffer(tar, np.uint8)


def _say_when_lost(file: Path) -> None:
    """End the process with a sentence if bytes that are mapped into memory are gone from disk.

    Then the file was cut short, or its disk or server failed, and whoever uses the bytes gets a
    SIGBUS, which would end the process without a word. All that Python does at that moment is to
    write the signal's number into a pipe; a thread reads it there."""
    if threading.current_thread() is not threading.main_thread():
        return                          # Python sets signal handlers only there
    outlet, inlet = os.pipe()
    os.set_blocking(inlet, False)
    signal.signal(signal.SIGBUS, lambda number, frame: None)
    signal.set_wakeup_fd(inlet, warn_on_full_buffer=False)

    def wait():
        while signal.SIGBUS not in os.read(outlet, 4096):
            pass                        # another signal: Python handles it as usual
        print(f"{Path(sys.argv[0]).name}: {file} can no longer be read: it was cut short, or its "
              "disk failed", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --------------------------------------------------------------------------------------------------
# Writing.

def write_archive(folder: Path, paths: list[str], names: list[bytes]) -> Path:
    """Pack the images `paths` of a data folder as images.tar. names: their paths as bytes.

    The file gets its name when it is complete. The same images make the same tar, to the bit.
    DataError if an image changes while it is packed."""
    file, encoded = folder / NAME, b"\0".join(names)
    table = np.zeros(len(names), MEMBER)
    index_size = BLOCK + table.nbytes + len(encoded)
    with whole_file(file) as tar:
        # Leave room for the index: its size is known, its content is not yet.
        _write_member(tar, INDEX, bytes(index_size))
        for i, name in enumerate(names):
            image = os.path.join(os.fsencode(folder), name)
            with open(image, "rb") as opened:
                content = opened.read()
            if len(content) != os.stat(image).st_size:
                raise DataError(f"{folder / paths[i]} changed while it was packed")
            start = _write_member(tar, name.decode(errors="surrogateescape"), content)
            table[i] = start, len(content), zlib.crc32(content)
        tar.write(bytes(2 * BLOCK))                             # the end of a tar

        # Now the index. Its first line says what the rest of the tar must be.
        rest = table.tobytes() + encoded
        line = json.dumps({"members": len(names), "bytes": tar.tell(), "index": len(rest),
                           "checksum": zlib.crc32(rest)})
        tar.seek(BLOCK)
        tar.write(line.ljust(BLOCK - 1).encode() + b"\n" + rest)
    return file


def _write_member(tar: BinaryIO, name: str, content: bytes) -> int:
    """Write one file with its header, padded to whole blocks. Returns where its content starts."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    start = tar.tell()
    tar.write(content + bytes(-len(content) % BLOCK))
    return start


# --------------------------------------------------------------------------------------------------
# Reading.

def open_archive(folder: Path, paths: list[str], names: list[bytes]) -> Archive | None:
    """The images.tar of a data folder, for its images `paths`; None if there is none.

    DataError if it is damaged or cut short, or lacks one of the images."""
    file = folder / NAME
    if not file.exists():
        return None
    table, encoded = _read_index(file)
    if encoded != b"\0".join(names) or len(table) != len(names):
        # Rows were removed or moved since. An image that was added later is not in the tar.
        place = {name: i for i, name in enumerate(encoded.split(b"\0"))}
        places = [place.get(name, -1) for name in names]
        if -1 in places:
            i = places.index(-1)
            raise DataError(f"{folder / 'manifest.csv'}, row {i + 2}: {paths[i]} is not in {file}, "
                            f"which was packed before: {REMEDY}")
        table = table[places]
    return Archive(file, paths, table)


def _read_index(file: Path) -> tuple[np.ndarray, bytes]:
    """The table of all members and their joined names; DataError if the tar is not complete."""
    with open(file, "rb") as tar:
        tar.seek(BLOCK)
        try:
            line = json.loads(tar.read(BLOCK))
            members, size, length = line["members"], line["bytes"], line["index"]
            rest = tar.read(length)
            whole = (zlib.crc32(rest) == line["checksum"] and len(rest) == length
                     and type(members) is int and 0 < members * MEMBER.itemsize <= length)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError):
            raise DataError(f"{file} has no index as prepare.py writes it: {REMEDY}") from None
        found = os.fstat(tar.fileno()).st_size
    if found != size:
        raise DataError(f"{file} has {found:,} bytes and its index says {size:,}: the copy is not "
                        f"whole, so copy it again; or {REMEDY}")
    if not whole:
        raise DataError(f"the index of {file} is damaged: {REMEDY}")
    return np.frombuffer(rest, MEMBER, members), rest[members * MEMBER.itemsize:]


def check_against_folder(archive: Archive, folder: Path, names: list[bytes],
                         images: np.ndarray) -> None:
    """DataError if one of `images` is still in the folder and has another size there."""
    others = [i for i, size in _sizes_in_folder(folder, names, images)
              if size != archive.table["size"][i]]
    if others:
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise DataError(f"{folder / archive.paths[others[0]]} is not as it was when {archive.file} "
                        f"was packed{more}: {REMEDY}")


def _sizes_in_folder(folder: Path, names: list[bytes],
                     images: np.ndarray) -> Iterator[tuple[int, int]]:
    """(image, bytes) for the images that are in the folder."""
    for i in images.tolist():
        try:
            yield i, os.stat(os.path.join(os.fsencode(folder), names[i])).st_size
        except (OSError, ValueError):
            continue


# --------------------------------------------------------------------------------------------------
# Images in files of their own.

def sizes_on_disk(folder: Path, paths: list[str], path_bytes: list[bytes]) -> np.ndarray:
    """Bytes of each image's file, (N,) int64; DataError if one is missing or is no regular file."""
    sizes, unusable = np.zeros(len(paths), np.int64), []
    for i, found in enumerate(_stats(folder, path_bytes)):
        # A folder or a pipe in place of an image: to read a pipe might never end.
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
        raise DataError(f"{folder / 'manifest.csv'}, row {i + 2}: {paths[i]} "
                        f"{problem}{others}")
    return sizes


def _stats(data: Path, path_bytes: list[bytes]) -> Iterator[os.stat_result | None]:
    """What the file system says of each image; None if that fails.

    Consecutive images are often in one folder. It is opened once, because looking it up from the
    root again for each image would take twice as long."""
    current, opened = None, None
    try:
        for name in path_bytes:
            folder, _, file = name.rpartition(b"/")
            try:
                if folder != current:
                    if opened is not None:
                        os.close(opened)
                    current = opened = None
                    opened = os.open(os.path.join(os.fsencode(data), folder), os.O_PATH)
                    current = folder
                yield os.stat(file or b".", dir_fd=opened)
            except (OSError, ValueError):               # ValueError: a name with a NUL
                yield None
    finally:
        if opened is not None:
            os.close(opened)
