"""What cannot be meant: counts and names that are almost always a mistake in the source.

Each Doubt has a name, and `--allow NAME` is how a user says that it is meant. Splits and constant
labels are not doubted where there are fewer than three images, which cannot fill three splits;
prepare.py says so.
"""
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from common import DataError
from manifest_csv import SPLITS
from tables import form_key, most_classes

ALLOW = {
    "empty-split": "train, val or test is empty",
    "constant-label": "a label is the same for every image",
    "mixed-letters": "a column holds y or n beside t or f",
    "similar-labels": "labels differ in case or blanks only",
    "many-classes": "a column holds more classes than its images can teach",
    "similar-patients": "patients differ in case, blanks or leading zeros only",
    "masks": "images seem to be masks, segmentations or other drawings",
    "many-left-out": "more than a tenth of the images are damaged, or missing",
    "other-folders": "images lie beside the split folders, and are left out",
    "untrained-class": "a class stands in the given val or test split, and not in train",
    "unknown-patients": "folders or columns seem to name patients, and are not used, or some "
                        "DICOM files have no PatientID",
    "unused-splits": "a column seems to name the splits, and is not used",
    "odd-classes": "class folders are named images, part1, normal_train and the like, or lie one "
                   "in another"}
FEW = 3                         # images; fewer are not doubted
FEW_LOST = 5                    # images; so many may be lost of whatever number


class Doubt(NamedTuple):
    """Something in a source that its user has to say is meant."""
    name: str                   # one of ALLOW
    sentence: str


def refuse_doubts(doubts: Iterable[Doubt], allowed: list[str]) -> None:
    """DataError for the doubts whose names are not among the allowed ones."""
    # All of them at once: a user who mends one after the other waits for each.
    open_doubts = [doubt for doubt in doubts if doubt.name not in allowed]
    if open_doubts:
        sentences = "; ".join(doubt.sentence for doubt in open_doubts)
        names = " ".join(dict.fromkeys(doubt.name for doubt in open_doubts))
        raise DataError(f"{sentences} (if that is meant: --allow {names})")


def allow_flag(flag: Callable) -> None:
    flag("--allow", nargs="+", action="extend", choices=ALLOW, default=[], metavar="DOUBT",
         help="what is meant although it looks like a mistake: "
              + "; ".join(f"{name} ({meaning})" for name, meaning in ALLOW.items()))


def many_left_out(images: int, lost: list[tuple[str, str]]) -> list[Doubt]:
    """A doubt where many images are lost: damaged, say, or in a table only, by another name.

    images: how many are not. lost: the others, each with the reason."""
    total = images + len(lost)
    if len(lost) <= max(FEW_LOST, total / 10):
        return []
    # Reasons that differ in numbers only, as in `gray levels 0 to 9 only`, are one.
    files_of: dict[str, list[tuple[str, str]]] = {}
    for file, why in lost:
        files_of.setdefault(re.sub(r"\d+", "0", why), []).append((file, why))
    commonest = max(files_of.values(), key=len)
    why, count = commonest[0][1], len(commonest)
    examples = " and ".join(file for file, _ in commonest[:2])
    return [Doubt("many-left-out", f"{len(lost):,} of {total:,} images would be left out, "
                  f"{'all' if count == len(lost) else f'{count:,}'} of them for one reason: {why}, "
                  f"such as {examples}")]


def empty_splits(splits: list[str], patients: int, fractions: dict[str, float],
                 found: int = 0) -> list[Doubt]:
    """Doubts for splits that are empty although nobody asked for that.

    splits: of all images. patients: how many there are. fractions: of val and
    test, if they are to be carved where the source does not give them; a
    fraction of 0 asks for an empty split. found: images before some were left out."""
    counts, doubts = Counter(splits), []
    # A fraction of 0 asks for an empty split, and says so in the command.
    for split in SPLITS if max(found, len(splits)) >= FEW else ():
        if counts[split] or fractions.get(split) == 0:
            continue
        ask = f"; --{split}-fraction 0 asks for that" if split in fractions else ""
        doubts.append(Doubt("empty-split", f"the {split} split is empty: {len(splits):,} images of "
                            f"{patients:,} patient{'s' if patients > 1 else ''}{ask}"))
    return doubts


def constant_labels(names: list[str], rows: list[tuple[str, ...]], classes: bool,
                    found: int = 0) -> list[Doubt]:
    """Doubts for labels that say the same of every image of which they say anything.

    rows: the labels of each image. classes: whether the labels are names of classes.
    found: images before some were left out."""
    doubts = []
    for place, name in enumerate(names) if max(found, len(rows)) >= FEW else ():
        # A blank cell is no negative: x and blank, or positive and blank, teach nothing.
        counts = Counter(row[place] for row in rows)
        blank = counts.pop("", 0)
        if len(counts) > 1:
            continue
        value = "".join(counts)
        says = f"is {value} for every image" if value else "is not mentioned for any image"
        why = ""
        if value and blank:
            says += " that has a class" if classes else " that mentions it"
            why = f" ({blank:,} are blank, which does not mean absent: write 0 for that)"
        doubts.append(Doubt("constant-label", f"label {name!r} {says} and teaches nothing{why}"))
    return doubts


def untrained_classes(names: list[str], splits: list[str],
                      rows: list[tuple[str, ...]]) -> list[Doubt]:
    """A doubt for each class that stands in the val or test split of a source, but not in train.

    splits: as the source gives them; "" may become train."""
    places: dict[str, set[str]] = {}                    # the splits in which each class stands
    for split, row in zip(splits, rows):
        for name, value in zip(names, row):
            if value == "1":
                places.setdefault(name, set()).add(split or "train")
    if not {"", "train"} & set(splits):
        return []
    return [Doubt("untrained-class", f"class {name!r} stands in {' and '.join(sorted(found))} and "
                  "not in train, where it would have to be learned")
            for name, found in sorted(places.items()) if "train" not in found]


def many_classes(classes: int, images: int) -> list[Doubt]:
    """A doubt where there are more class folders than images can teach."""
    if classes <= most_classes(images):
        return []
    return [Doubt("many-classes", f"{classes:,} class folders are more than {images:,} images "
                  "can teach: --layout says what each level of folders is")]


def similar_labels(names: list[str]) -> list[Doubt]:
    """Doubts for labels that differ in case, blanks, "-" and "_" only, as COVID19 and COVID-19."""
    return [Doubt("similar-labels", f"labels {one!r} and {other!r} differ in form only")
            for one, other in pairs_alike(names, lambda name: form_key(name).replace(" ", ""))]


def similar_patients(patients: Iterable[str]) -> list[Doubt]:
    """Doubts for patients that differ in form only, and might come into different splits."""
    alike = pairs_alike(patients, patient_key)
    more = f", and {len(alike) - 1:,} more pairs" if len(alike) > 1 else ""
    return [Doubt("similar-patients",
                  f"patients {one!r} and {other!r} differ in form only{more}: write each patient "
                  "in one way")
            for one, other in alike[:1]]


def patient_key(patient: str) -> str:
    """What is equal for 7, 007, 7. and 7.0, for 1000, 1e3 and 1,000, for P7, p07 and P 7."""
    # Large numbers as spreadsheets write them.
    if re.fullmatch(r"\d+(\.\d+)?e\+?\d{1,3}", patient.casefold()):
        patient = f"{float(patient):.0f}"
    if re.fullmatch(r"\d{1,3}(,\d{3})+", patient):
        patient = patient.replace(",", "")
    # A blank between a letter and a number, ".0" as spreadsheets append it, leading zeros.
    text = re.sub(r"(?<=[a-z]) (?=\d)", "", form_key(patient))
    text = re.sub(r"^(\d+)\.0*$", r"\1", text)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def pairs_alike(names: Iterable[str], key: Callable[[str], str]) -> list[tuple[str, str]]:
    """(a name, a later one) for each different name whose key an earlier one has."""
    first: dict[str, str] = {}          # by the key, the first name that has it
    pairs = []
    for name in dict.fromkeys(names):
        known = first.setdefault(key(name), name)
        if known != name:
            pairs.append((known, name))
    return pairs
