"""Counts and names that are almost always a mistake in the source.

Each Doubt has a name, and with `--allow NAME` a user says that it is meant. Empty splits and
constant labels are not doubted with fewer than three images, which cannot fill three splits;
prepare.py says so.
"""
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple
from unicodedata import category, decimal

from common import DataError
from flags import Several
from layout import (
    SHORT_SPLITS, SPLIT_NAMES, place_of, split_name, split_word, without_accents)
from manifest_csv import SPLITS
from tables import FINDINGS, form_key, is_garbled, most_classes, small, value_of

ALLOW = {
    "empty-split": "train, val or test is empty",
    "constant-label": "a label is the same for every image",
    "mixed-letters": "a column holds y or n beside t or f",
    "similar-labels": "labels differ in form only, or hardly in spelling",
    "many-classes": "a column holds more classes than its images can teach",
    "similar-patients": "patients differ in form only, seem to be two examinations of one, or are "
                        "numbers that a spreadsheet has shortened",
    "masks": "images seem to be masks, segmentations or other drawings",
    "many-left-out": "more than a tenth of the images are damaged, missing or of a kind that is "
                     "not read, or all of a class are",
    "other-folders": "images lie beside the split folders, and are left out, or two folders are "
                     "one by a link",
    "untrained-class": "a class stands in the given val or test split, and not in train",
    "unknown-patients": "folders or columns seem to name patients, and are not used, folders to "
                        "hold changed copies, or some DICOM files have no PatientID",
    "unused-splits": "a column, or the names of files, seem to name the splits, and are not used",
    "odd-classes": "class folders are named images, part1, normal_train and the like, or lie one "
                   "in another"}
FEW = 3                         # images; fewer are not doubted
FEW_LOST = 5                    # images; this many may always be lost
# Letters of Cyrillic and Greek that look like Latin ones.
LOOKALIKES = str.maketrans("авекмнорстухіјѕαβεικνορτυχ", "abekmhopctyxijsabeikvoptux")
MARKS = r"[\s_/\\|&,;.:()'?-]"     # these do not make another label
BESIDE = "[*#†‡§]+"                 # nor do these beside a word: Mass*


class Doubt(NamedTuple):
    """Something in a source that may be a mistake, unless the user says that it is meant."""
    name: str                   # one of ALLOW
    sentence: str


def refuse_doubts(doubts: Iterable[Doubt], allowed: list[str]) -> None:
    """DataError for the doubts whose names are not allowed."""
    # All of them at once: a user who mends one after the other would wait for each.
    open_doubts = [doubt for doubt in doubts if doubt.name not in allowed]
    if open_doubts:
        sentences = "; ".join(doubt.sentence for doubt in open_doubts)
        names = " ".join(dict.fromkeys(doubt.name for doubt in open_doubts))
        raise DataError(f"{sentences} (if that is meant: --allow {names})")


def allow_flag(flag: Callable) -> None:
    flag("--allow", nargs="+", action=Several, choices=ALLOW, default=[], metavar="DOUBT",
         help="what is meant although it looks like a mistake: "
              + "; ".join(f"{name} ({meaning})" for name, meaning in ALLOW.items()))


def many_left_out(images: int, lost: list[tuple[str, str]]) -> list[Doubt]:
    """A doubt if many images are lost, for example damaged, or named otherwise in a table.

    images: how many are not lost. lost: the others, (file, reason) each."""
    total = images + len(lost)
    if len(lost) <= max(FEW_LOST, total / 10):
        return []
    # Reasons that differ only in numbers, as in `gray levels 0 to 9 only`, count as one.
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

    splits: of all images. patients: how many there are. fractions: of val and test, if they are to
    be carved when the source does not give them. found: images before some were left out."""
    counts, doubts = Counter(splits), []
    # A fraction of 0 asks for an empty split, and says so in the command.
    for split in SPLITS if max(found, len(splits)) >= FEW else ():
        if counts[split] or fractions.get(split) == 0:
            continue
        ask = f"; --{split}-fraction 0 asks for that" if split in fractions else ""
        doubts.append(Doubt("empty-split", f"the {split} split is empty: {len(splits):,} images of "
                            f"{patients:,} patient{'s' if patients > 1 else ''}{ask}"))
    return doubts


def constant_labels(names: list[str], rows: list[tuple[str, ...]], classes: set[str],
                    found: int = 0) -> list[Doubt]:
    """Doubts for labels that say the same about every image for which they say anything.

    rows: the labels of each image. classes: the labels that are classes. found: images before some
    were left out."""
    doubts = []
    for place, name in enumerate(names) if max(found, len(rows)) >= FEW else ():
        # A blank cell does not mean absent: x and blank, or positive and blank, teach nothing.
        counts = Counter(row[place] for row in rows)
        blank = counts.pop("", 0)
        # Uncertain means neither. But 1 and -1 alone are often meant as 1 and 0.
        uncertain = counts.pop("-1", 0) if len(counts) > 1 else 0
        if len(counts) > 1:
            continue
        value = "".join(counts)
        says = f"is {value} for every image" if value else "is not mentioned for any image"
        why = ""
        if value and blank:
            says += " that has a class" if name in classes else " that mentions it"
        if uncertain:
            says += f", or uncertain (-1, {uncertain:,}),"
        if value and blank:
            why = f" ({blank:,} are blank, which does not mean absent: write 0 for that)"
        doubts.append(Doubt("constant-label", f"label {name!r} {says} and teaches nothing{why}"))
    return doubts


def untrained_classes(names: list[str], classes: set[str], splits: list[str],
                      rows: list[tuple[str, ...]]) -> list[Doubt]:
    """A doubt for each class that a source has in val or test, but not in train.

    classes: the labels that are classes. splits: from the source; "" may become train."""
    places: dict[str, set[str]] = {}                    # the splits that have each class
    for split, row in zip(splits, rows):
        for name, value in zip(names, row):
            if value == "1" and name in classes:
                places.setdefault(name, set()).add(split or "train")
    if not {"", "train"} & set(splits):
        return []
    return [Doubt("untrained-class", f"class {name!r} stands in {' and '.join(sorted(found))} and "
                  "not in train, where it would have to be learned")
            for name, found in sorted(places.items()) if "train" not in found]


def many_classes(names: list[str], images: int) -> list[Doubt]:
    """A doubt if there are more class folders than the images can teach, or if each seems to be of
    one person. names: of the classes."""
    if seem_persons(names, images):
        return [Doubt("many-classes", f"the {len(names):,} class folders, such as {names[0]}, seem "
                      f"to be of one person each, with {images:,} images in all, which cannot "
                      "teach so many classes: --layout says what each level of folders is, "
                      "--layout patient that these are patients")]
    if len(names) <= most_classes(images):
        return []
    return [Doubt("many-classes", f"{len(names):,} class folders are more than {images:,} images "
                  "can teach: --layout says what each level of folders is")]


def lone_images(classes: Iterable[str]) -> list[Doubt]:
    """A doubt for a class folder with a single image beside one with ten or more: the image may be
    a figure from a text. classes: of each image."""
    counts = Counter(classes)
    lone = [name for name, count in sorted(counts.items()) if count == 1 and name]
    if not lone or max(counts.values()) < FEW_OF_A_PERSON:
        return []
    more = f", as have {len(lone) - 1:,} more" if len(lone) > 1 else ""
    return [Doubt("odd-classes", f"class folder {lone[0]} has one image only{more}, which teaches "
                  f"nothing: --exclude {lone[0]}")]


def similar_labels(names: list[str]) -> list[Doubt]:
    """Doubts for labels with the same letters and numbers in the same order: COVID19 and COVID-19,
    MassNodule and Mass/Nodule, Mass and Mass*. Signs with a meaning of their own, such as +, still
    count, and so does * alone."""
    def letters(name: str) -> str:
        # Between digits a mark counts: 1.5 is not 15. But 1.0 is 1.
        name = re.sub(r"(\d)\.0+(?!\d)", r"\1", without_accents(name))
        name = re.sub(rf"(?<!\d){MARKS}+|{MARKS}+(?!\d)", "", form_key(name))
        name = re.sub(rf"(?<=\w){BESIDE}(?!\d)|(?<!\d){BESIDE}(?=\w)", "", name)
        return name.translate(LOOKALIKES)

    in_form = pairs_alike(names, letters)
    doubts = [f"labels {one!r} and {other!r} differ in form only" for one, other in in_form]
    doubts += [f"labels {one!r} and {other!r} are spelled almost alike: write a class in one way"
               for one, other in pairs_misspelled(names) if (one, other) not in in_form]
    return [Doubt("similar-labels", sentence) for sentence in doubts]


def pairs_misspelled(names: list[str]) -> list[tuple[str, str]]:
    """Pairs of names that may be one: nodule and nodules, Pneumonia and Pnuemonia, Mass and Mass.1,
    which pandas calls a second column Mass. Only one word may differ."""
    pairs = []
    groups: dict[tuple[str, ...], list[tuple[str, list[str], list[str]]]] = {}
    for name in names:
        second = re.fullmatch(r"(.+)\.\d+", name)
        if second and second[1] in names:
            pairs.append((second[1], name))
        # Only names whose words begin with the same two letters are compared.
        words = form_key(name).split()
        plain = [plain_word(word) for word in words]
        group = groups.setdefault(tuple(word[:2] for word in plain), [])
        for other, known, known_plain in group:
            apart = [i for i in range(len(words)) if plain[i] != known_plain[i]]
            if not apart or len(apart) == 1 and are_one_word(words[apart[0]], known[apart[0]]):
                pairs.append((other, name))
        group.append((name, words, plain))
    return pairs


def are_one_word(one: str, other: str) -> bool:
    """Whether two words that begin with the same two letters differ by one letter that is missing
    or another, or by two that are swapped. Short words do not count."""
    short, long = sorted((one, other), key=len)
    if len(short) < 5 or not (one.isalpha() and other.isalpha()):
        return False
    if len(long) == len(short) + 1:
        return any(long[:i] + long[i + 1:] == short for i in range(2, len(long)))
    apart = [i for i in range(len(short)) if one[i] != other[i]]
    if len(long) > len(short) or len(apart) > 2:
        return False
    if len(apart) == 1:
        return len(short) > 7
    i, j = apart
    swapped = one[i] + one[j] == other[j] + other[i]
    return len(short) > 5 and j == i + 1 and swapped


def plain_word(word: str) -> str:
    """A word without an English plural ending; with e for ae and oe, as in edema and hemo-."""
    plural = r"(?<=[sxz])es$|(?<=[cs]h)es$|(?<=[^\W\d_]{2}[^\W\d_siu])s$"
    word = re.sub(plural, "", word)
    return re.sub("[ao]e", "e", word)


def similar_patients(patients: Iterable[str]) -> list[Doubt]:
    """Doubts for patients that may be one and come into different splits: they differ in form only,
    or by an examination. And for numbers whose last digits a spreadsheet has dropped, so that
    several patients have become one."""
    names = list(dict.fromkeys(patients))
    doubts = []
    for alike, what, how in ((patients_alike(names), "differ in form only",
                              "write each patient in one way"),
                             (pairs_alike(names, without_visit),
                              "seem to be two examinations of one person",
                              "the patient alone keeps them in one split")):
        more = f", and {len(alike) - 1:,} more pairs" if len(alike) > 1 else ""
        doubts += [f"patients {one!r} and {other!r} {what}{more}: {how}"
                   for one, other in alike[:1]]
    doubts += [f"patient {name!r} is a number that a spreadsheet has shortened, so that others may "
               "have become the same: save the column as text" for name in names
               if SHORTENED.fullmatch(name)][:1]
    return [Doubt("similar-patients", sentence) for sentence in doubts]


def large_patients(patients: list[str]) -> list[Doubt]:
    """A doubt for a patient with a third of all images and five times as many as any other: a name
    such as 0 may stand for all unknown patients. patients: of all images."""
    counts = Counter(patients).most_common(2)
    if len(counts) < 2:
        return []
    (name, most), (_, next_most) = counts
    if most < max(6, 5 * next_most) or 3 * most < len(patients):
        return []
    return [Doubt("unknown-patients", f"{most:,} of {len(patients):,} images are of patient "
                  f"{name!r}, and of any other {next_most:,} at most: it may stand for patients "
                  "that are not known")]


def patients_alike(patients: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of patients that differ in form only: by patient_key, or in the marks between letters
    or digits, as 12-34-56 and 123456, or DOE JOHN and DOEJOHN.

    One of the two must be without marks: 1-12 and 11-2 are two patients. So are short ones such as
    P1-2 and P12."""
    keys = {name: patient_key(name) for name in patients}
    marked = [name for name in keys if re.search(r"\w[\W_]+\w", name)]
    whole = {keys[name]: name for name in keys.keys() - {*marked}}
    pairs = pairs_alike(keys, keys.__getitem__)
    for name in marked if whole else ():
        for text in (keys[name], small(without_accents(name))):
            joined = re.sub(r"[\W_]+|^0+", "", text)
            if len(joined) > 4 and joined != keys[name] and joined in whole:
                pairs.append((name, whole[joined]))
                break
    return pairs


def patient_key(patient: str) -> str:
    """Equal for 7, 007, 7. and 7.0; for 1000, 1e3, 1,000 and 1 000; for P7, p07 and P 7; for '7, #7
    and patient007; for 1/2 and 1-2; for Müller and Muller."""
    # Large numbers as spreadsheets write them; digits of other scripts, such as ١ for 1.
    if not patient.isascii():
        patient = re.sub(r"\d", lambda digit: str(decimal(digit[0])), patient)
    if re.fullmatch(r"\d+(\.\d+)?e\+?\d{1,3}", patient.casefold()):
        patient = f"{float(patient):.0f}"
    if re.fullmatch(r"\d{1,3}([,.'’\s]\d{3})+", patient) and not re.search(r"\.0+$", patient):
        patient = re.sub(r"\D", "", patient)
    # Marks and accents do not count, lookalike letters are equal. DOE^JANE^^ is Doe, Jane.
    text = small(without_accents(patient)).translate(LOOKALIKES)
    text = "".join(" " if letter != "." and category(letter)[0] in "PS" else letter
                   for letter in text)
    text = form_key(re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text))
    # Nor do a blank between a letter and a number, ".0" from a spreadsheet, and leading zeros.
    text = re.sub(r"(?<=[a-z]) (?=\d)", "", text)
    text = BEFORE_NUMBER.sub("", text)
    if not re.search(r"\d", text):                          # Jane Doe is Doe, Jane
        text = " ".join(sorted(text.split()))
    text = re.sub(r"^(\d+)\.0*$", r"\1", text)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def without_visit(patient: str) -> str:
    """P001 of P001_visit2, P001-scan1, P001_T0, P001_2020-01-31 and P001_lateral."""
    return VISIT.sub("", small(patient))


def pairs_alike(names: Iterable[str], key: Callable[[str], str]) -> list[tuple[str, str]]:
    """(the first name with the same key, a later one) for each name whose key is not new."""
    first: dict[str, str] = {}          # the first name with each key
    pairs = []
    for name in dict.fromkeys(names):
        known = first.setdefault(key(name), name)
        if known != name:
            pairs.append((known, name))
    return pairs


# --------------------------------------------------------------------------------------------------
# Names of folders and columns that seem to mean something for which they are not used.

# Names of folders with drawings of radiographs, and names that are no class.
DRAWINGS = {"mask", "masks", "segmentation", "segmentations", "annotation",
            "annotations", "contour", "contours", "heatmap", "heatmaps", "overlay",
            "overlays", "groundtruth", "seg", "segs", "annot", "annots", "gt",
            "label", "labels", "roi", "rois", "bbox", "bboxes", "outline",
            "outlines", "saliency", "gradcam", "cam", "cams", "segmented",
            "drawing", "drawings"}
NUMBERED_LABEL = re.compile(r"labels?[\W_]*\d+")     # label_0, label_1: classes
CODE = re.compile(r"[A-Za-z]{1,3}[ _-]?\d{2,}|(?=.*\d)(?=.*[a-f])[0-9a-f]{6,}")   # A17, a3f9c2
NO_CLASSES = {"image", "images", "img", "imgs", "png", "jpg", "jpeg", "dicom",
              "data", "dataset", "batch", "part", "chunk", "fold", "folder", "file",
              "files", "patient", "study", "series", "case", "subject", "subj",
              "sub", "scan", "scans", "pat", "unlabeled", "unlabelled", "unsorted",
              "person", "participant", "unknown", "all", "thumbnail", "thumb",
              "recyclebin", "lostfound", "trash", "tmp", "temp", "backup", "misc",
              "doc", "docs", "document", "documentation", "figure", "fig", "screenshot",
              "preview", "icon", "logo", "supplement", "readme",
              # Views are no findings.
              "pa", "ap", "lateral", "lat", "frontal", "ll", "view", "projection",
              # Steps of work on the images.
              "error", "failed", "failure", "invalid", "damaged", "broken", "removed", "discard",
              "exclude", "skip", "skipped", "ignore", "ignored", "dup", "check", "result",
              "output", "prediction", "raw", "original", "processed", "preprocessing", "resized",
              "cropped", "converted", "enhanced", "augmented", "augmentation", "cleaned",
              "export", "exported", "upload", "download", "downloaded", "extracted", "unzipped",
              "archive", "zip", "sample", "example", "demo", "final", "selected", "copy", "copie",
              "cache", "log", "report", "metadata", "csv", "xml", "json",
              "novapasta", "nieuwemap", "новаяпапка", "新建文件夹", "新しいフォルダー", "새폴더"}
# A name with any of these words is no class: New folder (2), to_review, Uncertain cases.
NO_CLASS_WORDS = {"folder", "ordner", "dossier", "carpeta", "cartella", "untitled", "reject",
                  "rejects", "rejected", "excluded", "discarded", "deleted", "duplicate",
                  "duplicates", "duplicated", "dups", "review", "recheck", "todo", "unreadable",
                  "unusable", "corrupt", "corrupted", "quality", "preprocessed", "unlabeled",
                  "unlabelled", "unsorted", "uncertain", "unsure"}
# If a class is left when these are removed, the folder is a copy of it: A - Copy, A_augmented.
COPIES = ("copy", "copie", "copia", "kopie", "augmented", "augmentation", "aug", "backup",
          "resized", "cropped", "new", "old")
COPY_OF = ("copyof", "copiede", "copiade", "kopievon")
# A number that may mark a copy. Stage 1-2 is no copy of Stage 1, nor SARS-CoV-2 of SARS-CoV.
NUMBERED_FOLDER = re.compile(r"(.+?) ?\(\d\)|(.+) \d|(.*(?:\D|\d\d)(?<!cov))[_-]0?\d")
PERSONS = {"p", "s", "id", "pt", "pid", "mrn"}          # before a number
PERSON_WORDS = {"patient", "subject", "subj", "sub", "pat", "pt", "case", "person", "participant"}
# Words before a patient's number that do not make it another patient: Patient No. 7.
BEFORE_NUMBER = re.compile(
    rf"^(({'|'.join(sorted(PERSON_WORDS | PERSONS - {'p', 's'} | {'no', 'nr'}))}) ?)+(?=\d)")
# Columns of a table that seem to tell one patient from another, or the splits.
PATIENT_COLUMN = re.compile(
    r"(patient|subject|person|participant|pat|pt)( ?(id|nr|no|number|key|code))?|pid|mrn")
# Words for properties of a patient, which do not identify one.
ATTRIBUTES = {"age", "sex", "gender", "birth", "birthday", "birthdate", "dob",
              "year", "date", "weight", "height", "size", "bmi", "race",
              "ethnicity", "position", "orientation", "view", "type", "class",
              "status", "group", "control", "history", "smoker", "count", "comment",
              "comments", "diagnosis", "label", "outcome", "survival", "location"}
# Columns that identify somebody if their cells repeat; and columns that may number persons.
NAME_COLUMN = re.compile(
    r"((full|last|first|family|given|sur|short) ?)?names?|last|first|initials|vorname|nachname"
    r"|nom|prenom|nombre|apellidos?|nome|cognome|id|identifier|identifiant|individual|client|hn"
    r"|uhid|nhs( ?number)?|pseudonym|e?mpi|nhc|historia clinica|(n )?dossier|kennung"
    r"|identificador|ssn|nric|cpf|pesel|amka|rut|curp|dni|cedula|donor|volunteer|uuid|guid"
    r"|((codigo|numero|id) (de |del )?)?paciente|paziente|(no )?(rm|rekam medis)"
    r"|.*(患者|病人|病案|病历|住院号|カルテ|환자|등록번호).*"
    r"|(hospital|medical record|record|chart|clinic|person)( ?(id|nr|no|number|code))")
NUMBER_COLUMN = re.compile(r".+ (id|no|nr|number|key|code|hash)|(.+ )?\w*nummer|numero .+")
VIEW_COLUMN = re.compile(r"(.* )?(view|projection|body ?part|anatomy)( .*)?|frontal lateral|ap pa")
# A number as a spreadsheet shows it in a narrow column: 1.23457E+11.
SHORTENED = re.compile(r"-?\d([.,]\d{1,4})?E\+(0[5-9]|[1-9]\d)"
                       r"|-?\d[.,]\d{5}E\+(0[6-9]|[1-9]\d)", re.ASCII | re.IGNORECASE)
# The ending of a patient's number that names an examination or an image.
VISIT = re.compile(
    r"(?<=\d)([\W_]*(visit|study|exam|examination|scan|image|img|view|series|session|ses|timepoint"
    r"|follow[ _-]?up|day|week|month|year)[\W_]*\d+"
    r"|[\W_]+(cxr|x[ _-]?ray|xr|rx|dx|dr|cr|film|radiograph)[\W_]*\d+"
    r"|[\W_]+([vt]\d\d?|baseline|follow[ _-]?up|pre|post|frontal|lateral|lat|pa|ap|left|right|l|r"
    r"|(19|20)\d\d[_-]?[01]\d[_-]?[0-3]\d))$")
STUDY_COLUMN = re.compile(
    r"(study|series|exam|examination|accession|encounter|episode|admission|hadm|stay|order|report)"
    r" ?(instance ?)?(id|uid|nr|no|number|num|key|code)|accession|uid|study uid")
OTHER_NUMBERS = {"time", "width", "pixel", "pixels", "columns", "rows", "area",
                 "zip", "zipcode", "postcode", "phone", "dose", "exposure", "kvp",
                 "scanner", "device", "model", "serial", "manufacturer", "station",
                 "site", "institution", "center", "centre", "reader", "rater",
                 "radiologist", "doctor", "physician", "dx", "icd", "finding",
                 "findings", "version", "image", "img", "file", "slice", "frame", "batch",
                 "category", "lot", "room", "bed", "ward", "page", "fold", "project", "dataset",
                 "country", "cluster", "annotator", "equipment", "machine", "user", "operator",
                 "protocol", "procedure", "cpt", "snomed", "modality", "department", "color",
                 "url", "doi", "license", "threshold",
                 "cost"}
# Cells that number a person or an examination: P001, 20517, a UID, DOE^JANE; but not a date.
ID_CELL = re.compile(
    r"(?!(19|20)\d\d[01]\d[0-3]\d$)([a-z]{0,5}[ _-]?\d{5,}|[a-z]{1,7}[ _-]?\d{2,4}"
    r"|[12]\.[\d.]{10,}|[0-9a-f]{8}[0-9a-f-]*|[^\s^]+\^.*)", re.IGNORECASE)
SPLIT_COLUMN = re.compile(r"(data ?)?(split|subset|partition|set)( ?name)?|phase|usage")
FOLD_COLUMN = re.compile(r"((cv|k|val|test) ?)?folds?( ?(id|nr|no|number|index))?|cv")
HELD_OUT = {"holdout", "eval", "evaluation"}
# Words that stand for train or test if both kinds are there.
SPLIT_HINTS = {"derivation": "train", "development": "train", "discovery": "train",
               "internal": "test", "external": "test", "private": "test", "public": "test",
               **dict.fromkeys(HELD_OUT, "test")}
SPLIT_FLAGS = {"is", "in", "for", "set", "flag", "data", "sample", "used", "use", "split"}
MOST_OF_A_PATIENT = 20          # images, on average; folders with more are sites or diseases
MOST_COPIES = 50                # images that share a name without CHANGED; more are just numbered
FEW_OF_A_PERSON = 10            # images, on average; folders with more teach a class
MANY = 10                       # more folders with one name and a number are no grades of a disease


def drawings(images: list[str]) -> list[str]:
    """The images whose name, or a folder above them, says mask, segmentation or the like.

    A folder that holds all images may have such a word among others, as in with_annotations."""
    shared = os.path.commonprefix([PurePosixPath(image).parts[:-1] for image in images])

    def is_drawing(image: str) -> bool:
        # masks2 counts as masks, but letters between digits are part of a random name.
        parts = PurePosixPath(image).with_suffix("").parts[len(shared):]
        words = {word.rstrip("0123456789") for part in parts
                 for word in re.split(r"[\W_]+", NUMBERED_LABEL.sub("", part.casefold()))}
        whole = {re.sub(r"[\W_]+", "", part.casefold()) for part in (*shared, *parts)}
        return bool(DRAWINGS & (words | whole)) or any("mask" in word for word in words)

    return [image for image in images if is_drawing(image)]


def names_without_meaning(classes: list[str]) -> list[str]:
    """The names of class folders that are no class: a kind of file, a portion, a person or a day,
    a step of work on files, or a word for nothing.

    Such as images_001, p017, 00017, 2020-01-31, JPCLN001 beside JPCLN002, results_v2, To review,
    nan and Uncertain."""
    letters = {name: letters_of(name) for name in classes}
    known, codes = set(letters.values()), sum(map(bool, map(CODE.fullmatch, classes)))
    forms = set(map(form_key, classes))
    numbered = Counter(letters[name] for name in classes if re.search(r"\d", name))
    return [name for name in classes
            if {letters[name], letters[name].removesuffix("s")} & NO_CLASSES
            or says_no_class(name)
            or letters[name].startswith(("image", "img"))
            or is_copy(name, letters, known, forms) or is_garbled(name)
            or letters[name] in PERSONS and name.casefold() not in PERSONS
            or numbered[letters[name]] > MANY or is_number_of(name, numbered[letters[name]])
            or codes > 2 and CODE.fullmatch(name)]


def letters_of(name: str) -> str:
    """The letters of a name, small and joined."""
    return "".join(re.findall(r"[^\W\d_]+", name.casefold()))


def says_no_class(name: str) -> bool:
    """Whether a folder's name means, as in a cell, "not mentioned" or "uncertain", or has a word of
    NO_CLASS_WORDS, or only words of NO_CLASSES."""
    words = [word for word in words_of(name) if len(word) > 1]
    if {value_of(name.replace("_", mark)) for mark in " /_"} & {"", "-1"}:
        return len("".join(words_of(name))) > 1
    alone = [word.removesuffix("s") for word in words if word not in ("old", "new", "bad", "my")]
    return (not NO_CLASS_WORDS.isdisjoint(words) or "".join(words) in NO_CLASSES
            or bool(alone) and NO_CLASSES.issuperset(alone))


def is_copy(name: str, letters: dict[str, str], known: set[str], forms: set[str]) -> bool:
    """Whether a folder is a copy of another, as A - Copy, A (1), A 2, A_2, A_CLAHE and Kopie von A
    are of A.

    letters: {name: its letters}, with this name. known: the values of it. forms: the form_key of
    all names."""
    own = letters[name]
    rests = [*map(own.removesuffix, COPIES), *map(own.removeprefix, COPY_OF)]
    changed = letters_of(without_change(name))
    numbered = NUMBERED_FOLDER.fullmatch(name.casefold())
    return (numbered is not None
            and form_key(numbered[numbered.lastindex or 0].rstrip(" _-")) in forms
            or any(rest != own and rest in known for rest in (*rests, changed or own)))


def seem_persons(names: list[str], images: int) -> bool:
    """Whether class folders seem to be of one person each. A name with a caret, as in DOE^JANE, is
    enough. Else they hold under ten images on average, under a quarter of the names say a finding,
    and all names have a comma, or a word of three letters or more if there are at least four names,
    or two such words, as Smith_John."""
    if any("^" in name for name in names):
        return True
    findings = sum(bool(FINDINGS.search(name.casefold())) for name in names)
    if len(names) < 2 or images >= FEW_OF_A_PERSON * len(names) or 4 * findings >= len(names):
        return False
    if all("," in name for name in names):
        return True
    words = [[word for word in words_of(name) if len(word) > 2] for name in names]
    return all(words) and (len(names) > 3 or all(len(of_one) == 2 for of_one in words))


def say_no_finding(names: list[str]) -> bool:
    """Whether class folders may be of persons or hospitals: no name says a finding, is an answer
    such as pos, or has fewer than three letters, such as A."""
    return bool(names) and not any(
        FINDINGS.search(name.casefold()) or value_of(name) or len("".join(words_of(name))) < 3
        for name in names)


def is_number_of(name: str, alike: int) -> bool:
    """Whether a folder's name seems to be the number of a person, an examination or a day.

    alike: how many folders have the same letters and a number."""
    digits = len(re.findall(r"\d", name))
    return digits >= 5 or digits >= 3 and (alike > 1 or not re.search(r"[^\W\d_]", name))


def split_in_name(name: str) -> tuple[str, str]:
    """(rest of a name, train, val or test) for names such as normal_train and trainA; else split
    is ""."""
    text = form_key(name).replace(" ", "")
    for word in sorted(SPLIT_NAMES, key=len, reverse=True):
        if text.startswith(word):
            return text.removeprefix(word), SPLIT_NAMES[word]
        if text.endswith(word):
            return text.removesuffix(word), SPLIT_NAMES[word]
    return text, ""


def classes_of_splits(names: list[str]) -> tuple[str, str] | None:
    """Two classes that differ only by a split's name, as normal_train and normal_test, or normal
    and normal_test. If every class has such a word, they may differ otherwise, too. None if there
    are no such two."""
    first: dict[str, tuple[str, str]] = {}              # by the rest of a name: name, split
    found = {name: split_in_name(name) for name in names}
    for name, (rest, split) in found.items():
        other, known = first.setdefault(rest, (name, split))
        if known != split:
            return other, name
    # Only whole words count here: "device" and "contest" contain dev and test.
    separate = [name for name in names if SPLIT_NAMES.keys() & set(words_of(name))]
    for name in separate if len(separate) == len(names) else ():
        if found[name][1] != found[names[0]][1]:
            return names[0], name
    return None


def splits_in_names(images: list[str]) -> dict[str, list[str]]:
    """{train, val or test: the images whose name says it}, for files such as train_1.png and
    7_test_0_.png.

    Exactly one split must be in the name, by a word that is not in all names. Short words such as
    tr count only if every name has one."""
    words = {image: {split_word(word) for word in words_of(PurePosixPath(image).stem)}
             for image in images}
    shared = set.intersection(*words.values()) if words else set()
    for known in (SPLIT_NAMES | dict.fromkeys(HELD_OUT, "test"), SHORT_SPLITS):
        found: dict[str, list[str]] = {}
        for image in images:
            said = {known[word] for word in words[image] - shared if word in known}
            if len(said) == 1:
                found.setdefault(said.pop(), []).append(image)
        if found and (known is not SHORT_SPLITS or sum(map(len, found.values())) == len(images)):
            return found
    return {}


VIEWS = {"frontal", "lateral", "lat", "pa", "ap", "left", "right"}
# What programs append to the name of a changed copy, or the view that a name gives. A number beside
# it, also one in brackets at the end, may count the changes or belong to the picture.
CHANGED = re.compile(
    r"[\W_]*(?<![^\W\d_])(?:(?:aug(?:mented|mentation)?|[hv]?flip(?:ped)?|flip_?(?:lr|ud|[hv])"
    r"|mirror(?:ed)?|rot(?:ate|ated|ation)?|crop(?:ped)?|zoom(?:ed)?|shift(?:ed)?|shear(?:ed)?"
    r"|blur(?:red)?|noisy?|noise|clahe|bright(?:ness|er|ened)?|dark(?:er|ened)?|contrast|gamma"
    r"|equali[sz]ed|enhanced?|enhancement|sharp(?:en|ened)?|denoised|inverted|normali[sz]ed"
    r"|resized?|scaled|transform(?:ed)?|copy)(?:[\W_]*(\d{1,3}))?|rf\.[0-9a-f]{32}"
    r"|" + "|".join(sorted(VIEWS)) + r")(?![^\W_])[)\]]*")
# Folders that may be beside those of changed copies: TB/original beside TB/augmented.
ORIGINALS = {"original", "originals", "orig", "raw", "images", "image", "imgs", "img"}
NUMBERED_COPY = re.compile(r"\s*\(\d{1,3}\)$")          # x (1), from browsers and Windows


def stem_of(image: str) -> str:
    """The name of a file without folders and suffix, in small letters."""
    return PurePosixPath(image).stem.casefold()


def base_of(name: str, known: Collection[str]) -> str:
    """The known name that this one extends: 7 for 7_hist_eq, if 7_hist is not known; else the name
    itself. Numbers alone, as in 7_001, count pictures and extend nothing."""
    for mark in [*re.finditer(r"[\s._-]+", name)][::-1]:
        base, suffix = name[:mark.start()], name[mark.end():]
        if base in known and "/" not in suffix and re.search(r"[^\W\d_]", suffix):
            return base_of(base, known)
    return name


@cache
def without_change(folder: str) -> str:
    """TB for TB_CLAHE, flipped-TB or TBAugmented2; "" for augmented. A view or a side is no
    change."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z])", "\0", folder)
    rest = re.sub(CHANGED.pattern,
                  lambda found: found[0] if VIEWS & set(words_of(found[0])) else "", words,
                  flags=re.IGNORECASE)
    return folder if rest == words else rest.replace("\0", "").strip(" ._-")


@cache
def picture_folder(folder: str) -> str:
    """The folder of the unchanged pictures, by the names of folders: TB for TB/augmented,
    TB/TB_flip and TB/original; a/TB for a_flip/TB."""
    kept: list[str] = []
    for part in PurePosixPath(folder).parts:
        rest = without_change(part)
        if rest and rest.casefold() not in ORIGINALS and (rest == part or rest not in kept[-1:]):
            kept.append(rest)
    return "/".join(kept) or "."


def picture_names(images: list[str]) -> dict[str, str]:
    """{image: the name of its picture}, for images that are together; usually the file's own name.
    Names without a number are left out, as they tell no pictures apart: crop_1 and crop_2 may be of
    two.

    A number beside CHANGED counts the changes or names the picture: aug_2_7 is of 7 or of 2,
    whichever is there. If neither is, the rest of the name counts, unless it is the same beside all
    numbers. A name that extends another one (base_of) is of the same picture."""
    found = {image: CHANGED.search(stem_of(image)) for image in images}
    plain = {stem_of(image) for image in images if not found[image]}
    rests, numbers = {}, {}
    for image, change in found.items():
        rests[image] = (CHANGED if change else NUMBERED_COPY).sub("", stem_of(image)).strip(" ._-")
        numbers[image] = change[1] or "" if change else ""
    # The better way to read a name with two numbers is the one that finds more pictures.
    both = [image for image in images if numbers[image]]
    ways = sorted((rests, numbers), key=lambda way: -len(plain & {way[image] for image in both}))
    behind = {rests[image] for image in both}
    names = {}
    for image in images:
        known = [way[image] for way in ways if way[image] in plain]
        rest_tells = found[image] and (len(behind) > 1 or not numbers[image])
        own = rests[image] if rest_tells else stem_of(image)
        names[image] = known[0] if known else own
    # A name that too many others extend, such as "cover", does not merge them.
    stems = {*names.values(), *map(stem_of, images)}
    bases = {image: base_of(name, stems) for image, name in names.items()}
    often = Counter(bases.values())
    names |= {image: name for image, name in bases.items() if often[name] <= MOST_COPIES}
    return {image: name for image, name in names.items() if re.search(r"\d", name)}


def same_pictures(images: list[str]) -> dict[str, str]:
    """{image: the name it shares with others}, for images of one folder that seem to be changed
    copies or further views of one another: x1.png, x1_flip.png and aug_2_x1.png; x1.png and x1.jpg;
    x1.png and augmented/x1.png."""
    folders: dict[str, list[str]] = {}
    for image in images:
        folders.setdefault(picture_folder(str(PurePosixPath(image).parent)), []).append(image)
    sharing: dict[str, list[str]] = {}
    for folder, inside in folders.items():
        for image, name in picture_names(inside).items():
            sharing.setdefault(f"{folder}/{name}", []).append(image)
    return {image: name for name, group in sharing.items() for image in group
            if 1 < len(group) <= MOST_COPIES}


def copies_of_unknown(images: list[str], pictures: dict[str, str]) -> list[str]:
    """The images that are changed copies by the name of their folder, without an original by their
    own name: TB/augmented/a.png beside TB/1.png. pictures: from same_pictures."""
    folders = {image: str(PurePosixPath(image).parent) for image in images}
    changed = {image for image, folder in folders.items()
               if any(without_change(part) != part for part in PurePosixPath(folder).parts)}
    beside = {picture_folder(folders[image]) for image in folders.keys() - changed}
    known = {pictures.get(image) for image in folders.keys() - changed} - {None}
    return [image for image in images if image in changed
            and picture_folder(folders[image]) in beside and pictures.get(image) not in known]


def strayed_copies(images: list[str], places: list[tuple[str, Hashable]]) -> list[str]:
    """The images whose names say that they are changed copies while the picture itself is in
    another split. places: (split or "", class) of each image."""
    kinds: dict[Hashable, dict[str, str]] = {}          # by class: the split of each image
    for image, (split, kind) in zip(images, places):
        if split:
            kinds.setdefault(kind, {})[image] = split
    strayed = []
    for split_of in kinds.values():
        found: dict[str, dict[str, list[str]]] = {}     # by name, by split
        for image, name in picture_names([*split_of]).items():
            found.setdefault(name, {}).setdefault(split_of[image], []).append(image)
        for name, by_split in found.items():
            for group in by_split.values() if len(by_split) > 1 else ():
                strayed += group if name not in map(stem_of, group) else []
    return strayed


def persons_in_names(images: Iterable[str]) -> str:
    """The name of a file that seems to be one of several of a person, such as person1_virus_2.jpeg,
    TB_patient1_2.png or 00000013_005.png; "" if there is none."""
    first: dict[str, str] = {}      # by the name up to the person's number: a file's name
    for image in images:
        name = PurePosixPath(image).stem
        found = re.search(r"^\d{5,8}[_-]|(?<![^\W_])(patient|person|subject|pat|pt|case)"
                          r"[ _-]?\d+[ _-]", name.casefold())
        if found and first.setdefault(name.casefold()[:found.end()], name) != name:
            return name
    return ""


def parts_of_persons(patients: Iterable[str]) -> str:
    """A patient that seems to be one of several parts of a person: patient1_1, 101-1, 101.1 or 101a
    beside patient1_2, 101-2, 101.2 or 101b. "" if there is none."""
    names = list(dict.fromkeys(patients))
    person = persons_in_names(names)
    # A letter alone may stand for an examination if no name is a pseudonym such as 3fa8c1b.
    letters = all(re.fullmatch(r"([a-z]{0,7}[ _-]?)\d+[ _-]?[a-z]?", name.casefold())
                  for name in names)
    last = re.compile(rf"([a-z]{{0,7}}[ _-]?\d+)({'[a-f]|' if letters else ''}[ ._-][0-9a-f])")
    found = {name: match[1] for name in names if (match := last.fullmatch(name.casefold()))}
    pairs = pairs_alike(found, found.__getitem__)
    return person or (pairs[0][1] if pairs else "")


def words_of(name: str) -> list[str]:
    """The words of a name in small letters, for names such as patient_hash, MRN-anon, PatientName
    or trainA."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return [word.casefold() for word in words]


def may_name_patients(column: str) -> bool:
    """Whether a column's name has a word for a patient and none for a property: PatientName,
    id_patient, Case ID and MRN_anon do, Patient Age does not."""
    words = words_of(column)
    words += [word.removeprefix("patient") for word in words]
    return not ATTRIBUTES & set(words) and any(
        word.startswith(("patient", "subject", "participant"))
        or word.endswith("patient") and word not in ("inpatient", "outpatient")
        or word in PERSONS - {"p", "s", "id"} or word.removesuffix("id") in PERSON_WORDS
        for word in words)


def seem_patients(name: str, cells: list[str]) -> bool:
    """Whether a column of a table seems to tell one patient from another.

    The name alone may be enough. Else the cells must repeat, and yet be many; then a less certain
    name is enough, or cells that look like numbers of persons. cells: those that are not blank."""
    if PATIENT_COLUMN.fullmatch(form_key(name)):
        return True
    if not 2 <= len(set(cells)) < len(cells) <= 50 * len(set(cells)):
        return False
    if may_name_patients(name):
        return True
    words = " ".join(words_of(without_accents(name)))
    if NAME_COLUMN.fullmatch(words):
        # A column "Name" may hold classes.
        return not any(FINDINGS.search(cell.casefold()) for cell in set(cells))
    of_persons = not (ATTRIBUTES | OTHER_NUMBERS) & set(words_of(name))
    named = NUMBER_COLUMN.fullmatch(words) and not STUDY_COLUMN.fullmatch(words)
    return (of_persons and len(cells) <= MOST_OF_A_PATIENT * len(set(cells))
            and (bool(named) or all(map(ID_CELL.fullmatch, set(cells)))))


def seem_studies(name: str, cells: list[str]) -> bool:
    """Whether a column of a table seems to tell examinations of a few images each apart.

    cells: those that are not blank."""
    few = 2 <= len(set(cells)) < len(cells) <= MOST_OF_A_PATIENT * len(set(cells))
    return few and bool(STUDY_COLUMN.fullmatch(" ".join(words_of(name))))


def seem_views(name: str, cells: list[str]) -> bool:
    """Whether a column of a table says which part of the body an image shows, or from where, and
    not the same for all images. cells: those that are not blank."""
    return 2 <= len(set(cells)) <= MANY and bool(VIEW_COLUMN.fullmatch(" ".join(words_of(name))))


def seem_splits(name: str, cells: list[str]) -> bool:
    """Whether a column of a table seems to name train, val and test, or to number them.

    The cells hold two of these words, or one if the column's name says split; or 0 and 1 if it is
    called is_train or the like; or few different values if it is called fold, or few numbers or
    letters if its name says split. cells: those that are not blank."""
    said = SPLIT_COLUMN.fullmatch(form_key(name))
    different = set(cells)
    # A cell with another word, such as extra, is an error later, when the column is used.
    splits = {split_name(cell) or next(
        (SPLIT_HINTS[word] for word in words_of(cell) if word in SPLIT_HINTS), "")
        for cell in different}
    if len(splits - {""}) > (0 if said else 1):
        return True
    words = words_of(name)
    flags = {"test" if word in HELD_OUT else split_name(word)
             for word in words if word not in SPLIT_FLAGS}
    if flags and "" not in flags and different:
        return {value_of(cell) for cell in different} <= {"0", "1"}
    numbers = all(cell.isdigit() or len(cell) == 1 for cell in different)
    return 2 <= len(different) <= MANY and (
        bool(FOLD_COLUMN.fullmatch(" ".join(words))) or said is not None and numbers)


def folders_of_persons(images: list[str], levels: list[str], by_word: bool = False) -> str:
    """A folder of several images, just below those of `levels`, that seems to be one person's by
    its name, or by its place (small_folders); "" if there is none.

    by_word: only a name with a number and a word such as patient, or p, counts, and only if folders
    hold few images."""
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
            letters = letters_of(name)
            numbered = bool(re.search(r"\d", name))
            person = numbered and (letters in PERSON_WORDS or letters in PERSONS
                                   or not by_word and is_number_of(name, len(names)))
            if person and 1 < counts[path] and (not by_word or few):
                return path
    return "" if by_word else small_folders(images, levels)


def small_folders(images: list[str], levels: list[str]) -> str:
    """A folder below the classes that seems to be one patient's by its place; "" if there is none.

    Each folder name of its level is in one class only, and the folders hold a few images each."""
    deepest = max((len(PurePosixPath(image).parts) - 1 for image in images), default=0)
    for depth in range(len(levels), deepest) if "class" in levels else ():
        counts: Counter[str] = Counter()
        classes: dict[str, set[str]] = {}           # the classes that each name is in
        for image in images:
            folders = PurePosixPath(image).parts[:-1]
            if len(folders) > depth:
                counts["/".join(folders[:depth + 1])] += 1
                classes.setdefault(form_key(folders[depth]), set()).add(
                    form_key(place_of(image, levels).class_name))
        own = all(len(names) == 1 for names in classes.values())
        few = counts.total() <= MOST_OF_A_PATIENT * len(counts)
        # Findings are kinds of a class: non/Atelectasis.
        findings = sum(bool(FINDINGS.search(name)) for name in classes)
        few = few and 4 * findings < len(classes)
        if own and few and len(counts) > 2 and max(counts.values()) > 1:
            return min(counts)
    return ""


def repeated_below(images: list[str], levels: list[str]) -> tuple[str, str, str] | None:
    """A folder's name that is found below two classes, and these two; None if there is none.

    In siteA/NORMAL and siteB/NORMAL, the inner folders may be the classes."""
    if levels[-1:] != ["class"]:
        return None
    # Below each class there may be folders for images and for drawings, which are no classes.
    level = len(levels) - 1
    first: dict[str, tuple[str, str]] = {}          # by inner name: key, name of the folder above
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
