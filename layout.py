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
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

from common import DataError
from tables import form_key

SPLIT_NAMES = {             # names of folders and cells of tables -> the manifest's
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "test": "test", "tests": "test", "testing": "test"}
LEVELS = ("split", "class", "patient", "*")

# Names of folders that hold drawings of radiographs, and names that are no class.
DRAWINGS = {"mask", "masks", "segmentation", "segmentations", "annotation", "annotations",
            "contour", "contours", "heatmap", "heatmaps", "overlay", "overlays", "groundtruth",
            "seg", "segs", "annot", "annots", "gt", "label", "labels", "roi", "rois", "bbox",
            "bboxes", "outline", "outlines", "saliency", "gradcam", "drawing", "drawings"}
CODE = re.compile(r"[A-Za-z]{1,3}[ _-]?\d{2,}")        # A17
NO_CLASSES = {"image", "images", "img", "imgs", "png", "jpg", "jpeg", "dicom", "data", "dataset",
              "batch", "part", "chunk", "fold", "folder", "file", "files", "patient", "study",
              "series", "case", "subject", "subj", "sub", "scan", "scans", "pat", "unlabeled",
              "unlabelled", "unsorted", "person", "participant", "unknown"}
PERSONS = {"p", "s", "id", "pt", "pid", "mrn"}          # with a number after them
PERSON_WORDS = {"patient", "subject", "subj", "sub", "pat", "pt", "case", "person", "participant"}
# Columns of a table that seem to tell one patient from another, or the splits.
PATIENT_COLUMN = re.compile(
    r"(patient|subject|person|participant|pat|pt)( ?(id|nr|no|number|key|code))?|pid|mrn")
# What a column says of a patient, and not who it is.
ATTRIBUTES = {"age", "sex", "gender", "birth", "birthday", "birthdate", "dob", "year", "date",
              "weight", "height", "size", "bmi", "race", "ethnicity", "position", "orientation",
              "view", "type", "class", "status", "group", "control", "history", "smoker", "count",
              "comment", "comments", "diagnosis", "label", "outcome", "survival", "location"}
SPLIT_COLUMN = re.compile(r"(data ?)?(split|subset|partition|set)( ?name)?|phase|usage")
MOST_OF_A_PATIENT = 20          # images, on average; folders of more are sites or kinds of disease
MANY = 10                       # more folders of one name and a number are no grades of a disease


class Place(NamedTuple):
    """What the folders around a file say of it."""
    split: str | None           # "" where no level is split; None for a file beside those folders
    class_name: str             # "" for a file that is in no class folder
    patient: str                # "" where no level is patient


def split_name(name: str) -> str:
    """train, val or test, whichever a folder's or a cell's name says; "" if it says none.

    Case, digits, punctuation and a word such as "set" after it do not matter."""
    # "train_set", "Test images" and "trainset" are the same kind of name.
    words = re.sub(r"[\W\d_]+", " ", name.casefold()).split()
    if len(words) > 1 and words[-1] in ("set", "data", "split", "images"):
        words.pop()
    word = "".join(words)
    return SPLIT_NAMES.get(word.removesuffix("set").removesuffix("data"), "")


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
    if any(split_name(name) for name in names_at(parents, start)):
        inside = [folders for folders in parents if split_name("".join(folders[start:start + 1]))]
        below = first_telling(inside, start + 1)
        levels += ["split", *["*"] * (below - start - 1)]
        return [*levels, "class"] if names_at(inside, below) else levels

    # train, val and test inside each class, or nowhere.
    depths = {depth for folders in parents for depth, name in enumerate(folders)
              if depth > start and split_name(name)}
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
        if split_name(*names):
            return level
        level += 1


def names_at(parents: list[tuple[str, ...]], level: int) -> set[str]:
    """The names of the folders at a level."""
    return {folders[level] for folders in parents if len(folders) > level}


def place_of(image: str, levels: list[str]) -> Place:
    """What the folders above an image say where the levels mean this."""
    folders = PurePosixPath(image).parts[:-1]
    at = dict(zip(levels, folders))
    split = "" if "split" not in levels else split_name(at.get("split", "")) or None
    return Place(split, at.get("class", ""), at.get("patient", ""))


# --------------------------------------------------------------------------------------------------
# Doubts.

def outside_splits(images: list[str], levels: list[str]) -> dict[str, int]:
    """{folder beside the split folders, as a path: how many images it holds}."""
    counts: dict[str, int] = {}
    if "split" not in levels:
        return counts
    level = levels.index("split")
    for image in images:
        folders = PurePosixPath(image).parts[:-1]
        if len(folders) > level and not split_name(folders[level]):
            folder = "/".join(folders[:level + 1])
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def drawings(images: list[str]) -> list[str]:
    """Those images whose name, or a folder above them, says mask, segmentation or the like.

    A folder that holds all images may have such a word among others, as with_annotations does."""
    shared = os.path.commonprefix([PurePosixPath(image).parts[:-1] for image in images])

    def is_drawing(image: str) -> bool:
        # masks2 is one of masks, but what stands between digits is a random name.
        parts = PurePosixPath(image).with_suffix("").parts[len(shared):]
        words = {word.rstrip("0123456789") for part in parts
                 for word in re.split(r"[\W_]+", part.casefold())}
        whole = {re.sub(r"[\W_]+", "", part.casefold()) for part in (*shared, *parts)}
        return bool(DRAWINGS & (words | whole)) or any("mask" in word for word in words)

    return [image for image in images if is_drawing(image)]


def names_without_meaning(classes: list[str]) -> list[str]:
    """Those names of class folders that name a kind of file, a portion, a person or a day.

    images_001 does, and p017; so do 00017, 2020-01-31, and JPCLN001 beside JPCLN002."""
    letters = {name: "".join(re.findall(r"[^\W\d_]+", name.casefold())) for name in classes}
    numbered = Counter(letters[name] for name in classes if re.search(r"\d", name))
    return [name for name in classes
            if {letters[name], letters[name].removesuffix("s")} & NO_CLASSES
            or letters[name].startswith(("image", "img"))
            or letters[name] in PERSONS and name.casefold() not in PERSONS
            or numbered[letters[name]] > MANY or is_number_of(name, numbered[letters[name]])
            or bool(CODE.fullmatch(name)) and sum(map(bool, map(CODE.fullmatch, classes))) > 2]


def is_number_of(name: str, alike: int) -> bool:
    """Whether a folder's name seems to be the number of a person, an examination or a day.

    alike: how many folders have the same letters and a number."""
    digits = len(re.findall(r"\d", name))
    return digits >= 5 or digits >= 3 and (alike > 1 or not re.search(r"[^\W\d_]", name))


def split_in_name(name: str) -> tuple[str, str]:
    """(what is left of a name, train or val or test) for normal_train, trainA; split "" for others.
    """
    text = form_key(name).replace(" ", "")
    for word in sorted(SPLIT_NAMES, key=len, reverse=True):
        if text.startswith(word):
            return text.removeprefix(word), SPLIT_NAMES[word]
        if text.endswith(word):
            return text.removesuffix(word), SPLIT_NAMES[word]
    return text, ""


def classes_of_splits(names: list[str]) -> tuple[str, str] | None:
    """Two classes that differ by the name of a split only, as normal_train and normal_test do, or
    normal and normal_test; or by that among other things, where all classes have one. None where
    there are none."""
    first: dict[str, tuple[str, str]] = {}              # by what is left of a name: name, split
    found = {name: split_in_name(name) for name in names}
    for name, (rest, split) in found.items():
        other, known = first.setdefault(rest, (name, split))
        if known != split:
            return other, name
    # By a word of its own: a device and a contest are of no split.
    separate = [name for name in names if SPLIT_NAMES.keys() & set(words_of(name))]
    for name in separate if len(separate) == len(names) else ():
        if found[name][1] != found[names[0]][1]:
            return names[0], name
    return None


def words_of(name: str) -> list[str]:
    """The words of a name in small letters: of patient_hash, MRN-anon, PatientName, trainA."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return [word.casefold() for word in words]


def may_name_patients(column: str) -> bool:
    """Whether a column's name has a word for a patient in it, and none for what a patient has:
    PatientName, id_patient, Case ID and MRN_anon do, Patient Age does not."""
    words = words_of(column)
    words += [word.removeprefix("patient") for word in words]
    return not ATTRIBUTES & set(words) and any(
        word.startswith(("patient", "subject", "participant"))
        or word.endswith("patient") and word not in ("inpatient", "outpatient")
        or word in PERSONS - {"p", "s", "id"} or word.removesuffix("id") in PERSON_WORDS
        for word in words)


def seem_patients(cells: list[str]) -> bool:
    """Whether cells repeat as patients do: fewer than there are images, and yet many."""
    return 2 <= len(set(cells)) < len(cells) <= 50 * len(set(cells))


def folders_of_persons(images: list[str], levels: list[str], by_word: bool = False) -> str:
    """A folder of several images below those that `levels` tell of, whose name is a person's by its
    form, or its place; "" where there is none. It may be of one level only, as NORMAL/p17.

    by_word: only those of a few images that have a word such as patient, or p, and a number."""
    inner: dict[str, set[str]] = {}         # name of the folder: names of its siblings
    counts: Counter[str] = Counter()
    for image in images:
        folders = PurePosixPath(image).parts[:-1]
        if len(folders) > len(levels):
            path = "/".join(folders[:len(levels) + 1])
            inner.setdefault("/".join(folders[:len(levels)]), set()).add(folders[len(levels)])
            counts[path] += 1
    few = counts.total() <= MOST_OF_A_PATIENT * len(counts)
    for above, names in sorted(inner.items()):
        for name in sorted(names):
            path = f"{above}/{name}".lstrip("/")
            letters = "".join(re.findall(r"[^\W\d_]+", name.casefold()))
            numbered = bool(re.search(r"\d", name))
            person = numbered and (letters in PERSON_WORDS or letters in PERSONS
                                   or not by_word and is_number_of(name, len(names)))
            if person and 1 < counts[path] and (not by_word or few):
                return path
    return "" if by_word else small_folders(images, levels)


def small_folders(images: list[str], levels: list[str]) -> str:
    """A folder below the classes that is one patient's by its place: each folder of that level
    lies in one class only, and they hold a few images each; "" where there is none."""
    deepest = max((len(PurePosixPath(image).parts) - 1 for image in images), default=0)
    for depth in range(len(levels), deepest) if "class" in levels else ():
        counts: Counter[str] = Counter()
        classes: dict[str, set[str]] = {}           # that a name lies in
        for image in images:
            folders = PurePosixPath(image).parts[:-1]
            if len(folders) > depth:
                counts["/".join(folders[:depth + 1])] += 1
                classes.setdefault(form_key(folders[depth]), set()).add(
                    form_key(place_of(image, levels).class_name))
        own = all(len(names) == 1 for names in classes.values())
        few = counts.total() <= MOST_OF_A_PATIENT * len(counts)
        if own and few and len(counts) > 2 and max(counts.values()) > 1:
            return min(counts)
    return ""


def repeated_below(images: list[str], levels: list[str]) -> tuple[str, str, str] | None:
    """A folder's name that is found below two classes, and these two; None where there is none.

    siteA/NORMAL and siteB/NORMAL: the classes may be the inner folders."""
    if levels[-1:] != ["class"]:
        return None
    # Folders for images and for drawings lie below each class, and are no classes.
    level = len(levels) - 1
    first: dict[str, tuple[str, str]] = {}          # inner name: key and name of the folder above
    for image in images:
        folders = PurePosixPath(image).parts[:-1]
        if len(folders) > level + 1:
            above, name = form_key(folders[level]), folders[level + 1]
            if names_without_meaning([name]) or drawings([name]):
                continue
            known, shown = first.setdefault(form_key(name), (above, folders[level]))
            if known != above:
                return name, shown, folders[level]
    return None


def excluder(patterns: list[str]) -> Callable[[str], bool]:
    """Whether a file is below a folder, or has a name, that one of the patterns matches.

    A pattern is the name of a file or folder at any depth, or a path from --src down."""
    def excluded(file: str) -> bool:
        parts = PurePosixPath(file).parts
        paths = ["/".join(parts[:end + 1]) for end in range(len(parts))]
        return any(fnmatch.fnmatchcase(name, pattern.rstrip("/"))
                   for pattern in patterns for name in (*parts, *paths))
    return excluded
