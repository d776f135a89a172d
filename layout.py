"""What the folders above an image say about it: its split, its class, its patient.

A layout is written as a path of words, one for each level of folders from --src down:

    split/class         train/NORMAL/1.png
    */*/split/class     archive/chest_xray/train/NORMAL/1.png
    class/split         NORMAL/train/1.png
    class/patient       NORMAL/p17/1.png
    none                no folder says anything

`*` is a level that says nothing. find_layout recognises the layout by the folders' names: a folder
that holds all images says nothing, as it tells no image from another. If the names can be read in
two ways, it refuses to guess.
"""
import fnmatch
import glob
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common import DataError

SPLIT_NAMES = {             # names of folders, and cells of tables -> the manifest's
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "test": "test", "tests": "test", "testing": "test",
    "entrenamiento": "train", "treino": "train", "treinamento": "train", "entrainement": "train",
    "apprentissage": "train", "addestramento": "train",
    "validacion": "val", "validacao": "val", "validierung": "val", "validazione": "val",
    "prueba": "test", "pruebas": "test", "teste": "test"}
# Short names may also be classes: they are splits only if all folders of their level are.
SHORT_SPLITS = {"tr": "train", "trn": "train", "va": "val", "te": "test", "ts": "test",
                "tst": "test"}
PACKED = re.compile(r"(\.tar)?\.(zip|tar|gz|tgz|bz2|xz|rar|7z)$", re.IGNORECASE)    # NORMAL.zip/
LEVELS = ("split", "class", "patient", "*")


class Place(NamedTuple):
    """What the folders above a file say about it."""
    split: str | None           # "" if no level is split; None for a file beside the split folders
    class_name: str             # without .zip; "" if the file is in no class folder
    patient: str                # "" if no level is patient


def split_name(name: str) -> str:
    """train, val or test, as the name of a folder or a cell says; "" if it says none of them.

    Case, digits, punctuation and a word such as "set" at the end do not matter."""
    word = split_word(name)
    return SPLIT_NAMES.get(word) or SHORT_SPLITS.get(word, "")


def split_word(name: str) -> str:
    """The key for split_name: `train` for train_set, trainset or Train images; without accents."""
    name = PACKED.sub("", name)
    words = re.sub(r"[\W\d_]+", " ", without_accents(name.casefold())).split()
    if len(words) > 1 and words[-1] in ("set", "data", "split", "images"):
        words.pop()
    return "".join(words).removesuffix("set").removesuffix("data")


def without_accents(text: str) -> str:
    """Letters without the signs above and below them: Validacion for Validación."""
    return re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))


def layout_text(text: str) -> str:
    """A --layout, unchanged. ValueError, which argparse expects, if it is not valid."""
    levels = levels_of(text)
    names = [level for level in levels if level != "*"]
    if not set(levels) <= set(LEVELS) or len(set(names)) < len(names):
        raise ValueError(text)
    return text


layout_text.__name__ = "layout"         # argparse writes "invalid layout value" from this


def levels_of(text: str) -> list[str]:
    """The levels of a layout."""
    return [] if text == "none" else text.split("/")


def find_layout(images: list[str]) -> list[str]:
    """The levels of the folders above these images. DataError if they are ambiguous."""
    parents = [PurePosixPath(image).parts[:-1] for image in images]
    start = first_telling(parents, 0)
    levels = ["*"] * start
    if not names_at(parents, start):
        return levels

    # Splits at the top, classes below them. Any other folder beside the splits is left out.
    if are_splits(names_at(parents, start)):
        inside = [folders for folders in parents if split_name("".join(folders[start:start + 1]))]
        below = first_telling(inside, start + 1)
        levels += ["split", *["*"] * (below - start - 1)]
        return [*levels, "class"] if names_at(inside, below) else levels

    # Splits inside each class, or none at all.
    depths = {depth for depth in range(start + 1, max(map(len, parents)))
              if are_splits(names_at(parents, depth))}
    if not depths:
        return [*levels, "class"]
    depth = min(depths)
    if depths != {start + 1} or any(len(folders) != start + 2 or not split_name(folders[-1])
                                    for folders in parents):
        file = next(image for image, folders in zip(images, parents)
                    if depth < len(folders) and split_name(folders[depth]))
        raise DataError(f"the folders of {file} can be read in two ways: is "
                        f"{PurePosixPath(file).parts[depth]} a split? Say what each level is, for "
                        f"example --layout {'/'.join([*['*'] * depth, 'split', 'class'])}, or "
                        "--layout none")
    return [*levels, "class", "split"]


def first_telling(parents: list[tuple[str, ...]], level: int) -> int:
    """The first level from `level` on that tells images apart, or that is a split.

    A single folder that holds all images is skipped."""
    while True:
        names = names_at(parents, level)
        if len(names) != 1 or any(len(folders) <= level for folders in parents):
            return level
        if are_splits(names):
            return level
        level += 1


def are_splits(names: set[str]) -> bool:
    """Whether folders of one level are splits: one has a full name, or all have short names, which
    stand for train and another split."""
    splits = {split_name(name) for name in names}
    by_full_name = any(split_word(name) in SPLIT_NAMES for name in names)
    return by_full_name or len(splits) > 1 and "train" in splits and "" not in splits


def names_at(parents: list[tuple[str, ...]], level: int) -> set[str]:
    """The names of the folders at a level."""
    return {folders[level] for folders in parents if len(folders) > level}


def place_of(image: str, levels: list[str]) -> Place:
    """What the folders above an image say, if the levels mean this."""
    folders = PurePosixPath(image).parts[:-1]
    at = dict(zip(levels, folders))
    split = "" if "split" not in levels else split_name(at.get("split", "")) or None
    return Place(split, PACKED.sub("", at.get("class", "")), at.get("patient", ""))


def outside_splits(images: list[str], levels: list[str]) -> dict[str, int]:
    """{folder: how many images in it are in no split}, for folders beside the split folders or
    above them, as paths."""
    counts: dict[str, int] = {}
    if "split" not in levels:
        return counts
    level = levels.index("split")
    for image in images:
        folders = PurePosixPath(image).parts[:-1]
        if not split_name("".join(folders[level:level + 1])):
            folder = "/".join(folders[:level + 1])
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def excluder(patterns: list[str]) -> Callable[[str], bool]:
    """A function excluded(file): whether a pattern matches the file, or a folder above it.

    A pattern is the name of a file or folder at any depth, or a path below --src. A name that is
    equal to a pattern matches, whatever its wildcards would mean."""
    plain = [unicodedata.normalize("NFC", pattern) for pattern in patterns]

    def excluded(file: str) -> bool:
        parts = PurePosixPath(unicodedata.normalize("NFC", file)).parts
        paths = ["/".join(parts[:end + 1]) for end in range(len(parts))]
        return any(name == pattern or fnmatch.fnmatchcase(name, pattern)
                   for pattern in plain for name in (*parts, *paths))
    return excluded


def pattern_below(src: Path, pattern: str) -> str:
    """A pattern as `excluder` takes it: without ./ and a last slash. If it is a path that begins
    with --src, as the shell completes it, and is not found below --src, then without --src, too."""
    plain = os.path.normpath(pattern)
    there = "/" not in plain or glob.glob(plain, root_dir=src) or (src / plain).exists()
    if there and not os.path.isabs(plain):
        return plain
    for way in (os.path.abspath, os.path.realpath):
        below = os.path.relpath(way(plain), way(src))
        if below.split("/")[0] not in (".", ".."):
            return below
    return plain
