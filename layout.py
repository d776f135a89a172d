"""What the folders above an image say of it: its split, its class, its patient.

A layout is written as a path of words, one for each level of folders from --src down:

    split/class         train/NORMAL/1.png
    */*/split/class     archive/chest_xray/train/NORMAL/1.png
    class/split         NORMAL/train/1.png
    class/patient       NORMAL/p17/1.png
    none                no folder says anything

`*` is a level that says nothing. find_layout recognises the layout by the folders'
names: a folder that holds all images says nothing, as what is the same for all of them
teaches nothing. Where the names can be read in two ways it refuses to guess.
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

SPLIT_NAMES = {             # names of folders and cells of tables -> the manifest's
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "test": "test", "tests": "test", "testing": "test",
    "entrenamiento": "train", "treino": "train", "treinamento": "train", "entrainement": "train",
    "apprentissage": "train", "addestramento": "train",
    "validacion": "val", "validacao": "val", "validierung": "val", "validazione": "val",
    "prueba": "test", "pruebas": "test", "teste": "test"}
# Short ones may as well be classes: folders are called so where all of their level are splits.
SHORT_SPLITS = {"tr": "train", "trn": "train", "va": "val", "te": "test", "ts": "test",
                "tst": "test"}
PACKED = re.compile(r"(\.tar)?\.(zip|tar|gz|tgz|bz2|xz|rar|7z)$", re.IGNORECASE)    # NORMAL.zip/
LEVELS = ("split", "class", "patient", "*")


class Place(NamedTuple):
    """What the folders around a file say of it."""
    split: str | None           # "" where no level is split; None for a file beside those folders
    class_name: str             # without .zip; "" for a file that is in no class folder
    patient: str                # "" where no level is patient


def split_name(name: str) -> str:
    """train, val or test, whichever a folder's or a cell's name says; "" if it says none.

    Case, digits, punctuation and a word such as "set" after it do not matter."""
    word = split_word(name)
    return SPLIT_NAMES.get(word) or SHORT_SPLITS.get(word, "")


def split_word(name: str) -> str:
    """What split_name looks up: `train` for train_set, trainset or Train images.

    Letters count without their accents."""
    name = PACKED.sub("", name)
    words = re.sub(r"[\W\d_]+", " ", without_accents(name.casefold())).split()
    if len(words) > 1 and words[-1] in ("set", "data", "split", "images"):
        words.pop()
    return "".join(words).removesuffix("set").removesuffix("data")


def without_accents(text: str) -> str:
    """Validacion for Validación: letters without the signs above and below them."""
    return re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))


def layout_text(text: str) -> str:
    """A --layout as it was given. ValueError, as argparse wants it, for what is none."""
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
    """The levels of the folders above these images. DataError where they can mean two things."""
    parents = [PurePosixPath(image).parts[:-1] for image in images]
    start = first_telling(parents, 0)
    levels = ["*"] * start
    if not names_at(parents, start):
        return levels

    # train, val and test at the top, the classes below; any other folder beside them is left out.
    if are_splits(names_at(parents, start)):
        inside = [folders for folders in parents if split_name("".join(folders[start:start + 1]))]
        below = first_telling(inside, start + 1)
        levels += ["split", *["*"] * (below - start - 1)]
        return [*levels, "class"] if names_at(inside, below) else levels

    # train, val and test inside each class, or nowhere.
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

    A single folder that holds all images is passed through."""
    while True:
        names = names_at(parents, level)
        if len(names) != 1 or any(len(folders) <= level for folders in parents):
            return level
        if are_splits(names):
            return level
        level += 1


def are_splits(names: set[str]) -> bool:
    """Whether folders of one level are splits: any by a full name, or all by short ones."""
    splits = {split_name(name) for name in names}
    by_full_name = any(split_word(name) in SPLIT_NAMES for name in names)
    return by_full_name or len(splits) > 1 and "train" in splits and "" not in splits


def names_at(parents: list[tuple[str, ...]], level: int) -> set[str]:
    """The names of the folders at a level."""
    return {folders[level] for folders in parents if len(folders) > level}


def place_of(image: str, levels: list[str]) -> Place:
    """What the folders above an image say where the levels mean this."""
    folders = PurePosixPath(image).parts[:-1]
    at = dict(zip(levels, folders))
    split = "" if "split" not in levels else split_name(at.get("split", "")) or None
    return Place(split, PACKED.sub("", at.get("class", "")), at.get("patient", ""))


def outside_splits(images: list[str], levels: list[str]) -> dict[str, int]:
    """{folder beside the split folders, or above them, as a path: how many images of no split
    lie in it}."""
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
    """Whether a file is below a folder, or has a name, that one of the patterns matches.

    A pattern is the name of a file or folder at any depth, or a path from --src down. One that is
    the name, letter by letter, matches it, whatever its wildcards would mean."""
    plain = [unicodedata.normalize("NFC", pattern) for pattern in patterns]

    def excluded(file: str) -> bool:
        parts = PurePosixPath(unicodedata.normalize("NFC", file)).parts
        paths = ["/".join(parts[:end + 1]) for end in range(len(parts))]
        return any(name == pattern or fnmatch.fnmatchcase(name, pattern)
                   for pattern in plain for name in (*parts, *paths))
    return excluded


def pattern_below(src: Path, pattern: str) -> str:
    """A pattern as `excluder` takes it: without ./ and a last slash, and without --src where it is
    a path that begins with that, as the shell completes it, and is not there below --src."""
    plain = os.path.normpath(pattern)
    there = "/" not in plain or glob.glob(plain, root_dir=src) or (src / plain).exists()
    if there and not os.path.isabs(plain):
        return plain
    for way in (os.path.abspath, os.path.realpath):
        below = os.path.relpath(way(plain), way(src))
        if below.split("/")[0] not in (".", ".."):
            return below
    return plain
