"""images.tar: all images of a data folder in one file.

`python prepare.py pack` writes it, and every stage reads it where it is there; images/ may be
deleted then. It is a plain tar: each image is a member under the manifest's path, where `tar x`
and WebDataset find it. A job that starts asks the file system for one file instead of a hundred
thousand, a batch opens none, and one file is copied to a node's own disk.

The first member, __index__, says where the others begin, so that nobody has to walk from header
to header through the whole file. It lies in the tar and not beside it, because two files can be
of two different times. (WebDataset passes over a name of this form.) It holds

    a line of JSON, 512 bytes: the number of members, the size of the whole tar, checksums
    a table of the members in the manifest's order: MEMBER for each
    their paths, UTF-8, with a zero byte between two of them
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
BLOCK = 512                             # of a tar: all that is in it begins at a multiple of it
MEMBER = np.dtype([("start", "<i8"), ("size", "<i8"), ("checksum", "<u4")])
REMEDY = "make it again with `python prepare.py pack`, or delete it"


class Member(NamedTuple):
    """Where the bytes of one image stand, for a process that has nothing else of the archive."""
    archive: Path
    path: str                           # in the manifest
    start: int                          # bytes from the beginning of the tar
    size: int
    checksum: int                       # CRC-32

    def read_bytes(self) -> bytes:
        """The image's file; DataError where it is not what was packed."""
        with open(self.archive, "rb") as tar:
            content = os.pread(tar.fileno(), self.size, self.start)
        if zlib.crc32(content) != self.checksum:
            raise DataError("its bytes are not those that were packed")
        return content


@dataclass(frozen=True)
class Archive:
    """An images.tar; its member i is the manifest's image i."""
    file: Path
    paths: list[str]                    # N of them
    table: np.ndarray                   # (N,) MEMBER

    def member(self, i: int) -> Member:
        return Member(self.file, self.paths[i], *self.table[i].tolist())

    def contents(self, images: np.ndarray) -> list[np.ndarray]:
        """The files of some images, uint8, in the memory where the kernel keeps the tar.

        Nothing is copied, or read yet: whoever looks at the bytes waits for them, which are DALI's
        threads. (Telling the kernel to fetch them took longer than all else here.)"""
        starts = self.table["start"][images]
        ends = starts + self.table["size"][images]
        return [self._bytes[start:end] for start, end in zip(starts.tolist(), ends.tolist())]

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        """The whole tar, (its size,) uint8; the kernel reads what is looked at."""
        with open(self.file, "rb") as opened:
            tar = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        _say_when_lost(self.file)
        return np.frombuffer(tar, np.uint8)


def _say_when_lost(file: Path) -> None:
    """End the process with a sentence, should bytes that are mapped into memory be gone from disk.

    Whoever looks at them gets a SIGBUS, of which the process would die without a word: the file
    was cut short, or its disk or server failed. Python does no more in that moment than to write
    the signal's number into a pipe, and a thread waits at its end."""
    if threading.current_thread() is not threading.main_thread():
        return                          # only there Python lets signals be arranged
    outlet, inlet = os.pipe()
    os.set_blocking(inlet, False)
    signal.signal(signal.SIGBUS, lambda number, frame: None)
    signal.set_wakeup_fd(inlet, warn_on_full_buffer=False)

    def wait():
        while signal.SIGBUS not in os.read(outlet, 4096):
            pass                        # another signal, which Python answers in its own way
        print(f"{Path(sys.argv[0]).name}: {file} can no longer be read: it was cut short, or its "
              "disk failed", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --------------------------------------------------------------------------------------------------
# Writing.

def write_archive(folder: Path, paths: list[str], names: list[bytes]) -> Path:
    """Pack the images `paths` of a data folder, `names` for the operating system, as images.tar.

    It gets its name when it is whole. The same images make the same tar, to the bit.
    DataError where an image changes while it is packed."""
    file, encoded = folder / NAME, b"\0".join(names)
    table = np.zeros(len(names), MEMBER)
    index_size = BLOCK + table.nbytes + len(encoded)
    with whole_file(file) as tar:
        # Leave room for the index, whose size is known. What is in it is not, yet.
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
    """Write one file with its header, filled up to whole blocks; where its content starts."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    start = tar.tell()
    tar.write(content + bytes(-len(content) % BLOCK))
    return start


# --------------------------------------------------------------------------------------------------
# Reading.

def open_archive(folder: Path, paths: list[str], names: list[bytes]) -> Archive | None:
    """The images.tar of a data folder, for its images `paths`; None where there is none.

    DataError where it is damaged or cut short, or lacks one of the images."""
    file = folder / NAME
    if not file.exists():
        return None
    table, encoded = _read_index(file)
    if encoded != b"\0".join(names) or len(table) != len(names):
        # Rows were dropped or moved since. An image that came later is in no tar.
        place = {name: i for i, name in enumerate(encoded.split(b"\0"))}
        places = [place.get(name, -1) for name in names]
        if -1 in places:
            i = places.index(-1)
            raise DataError(f"{folder / 'manifest.csv'}, row {i + 2}: {paths[i]} is not in {file}, "
                            f"which was packed before: {REMEDY}")
        table = table[places]
    return Archive(file, paths, table)


def _read_index(file: Path) -> tuple[np.ndarray, bytes]:
    """The table of all members and their joined names; DataError where the tar is not whole."""
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
    """DataError where one of `images`, if it is still in the folder, has another size there."""
    others = [i for i, size in _sizes_in_folder(folder, names, images)
              if size != archive.table["size"][i]]
    if others:
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise DataError(f"{folder / archive.paths[others[0]]} is not as it was when {archive.file} "
                        f"was packed{more}: {REMEDY}")


def _sizes_in_folder(folder: Path, names: list[bytes],
                     images: np.ndarray) -> Iterator[tuple[int, int]]:
    """Of the images that are there: (image, bytes)."""
    for i in images.tolist():
        try:
            yield i, os.stat(os.path.join(os.fsencode(folder), names[i])).st_size
        except (OSError, ValueError):
            continue


# --------------------------------------------------------------------------------------------------
# Images in files of their own.

def sizes_on_disk(folder: Path, paths: list[str], path_bytes: list[bytes]) -> np.ndarray:
    """Bytes of each image's file, (N,) int64; DataError where one is missing or is no file."""
    sizes, unusable = np.zeros(len(paths), np.int64), []
    for i, found in enumerate(_stats(folder, path_bytes)):
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
        raise DataError(f"{folder / 'manifest.csv'}, row {i + 2}: {paths[i]} "
                        f"{problem}{others}")
    return sizes


def _stats(data: Path, path_bytes: list[bytes]) -> Iterator[os.stat_result | None]:
    """What the file system says of each image, or None where it says nothing.

    Consecutive images often lie in one folder. It is opened once, since to walk to
    it from the root again for each image would take twice as long."""
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
            except (OSError, ValueError):               # a name may also hold a NUL
                yield None
    finally:
        if opened is not None:
            os.close(opened)
