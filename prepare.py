"""Stage 0: any source of chest radiographs -> one data folder, all that the later stages read.

    python prepare.py demo     --out data/demo                      # synthetic, from nothing
    python prepare.py folder   --src chest_xray --out data/kermany  # class folders, optional CSV
    python prepare.py nih      --src NIH --out data/nih             # ChestX-ray14 as unpacked
    python prepare.py chexpert --src CheXpert-v1.0-small --out data/chexpert
    python prepare.py mimic    --src MIMIC-CXR-JPG --out data/mimic
    python prepare.py dicom    --src archive --out data/hospital    # de-identified on the way
    python prepare.py pack     data/nih                             # all images in one images.tar
    python prepare.py verify   data/nih                             # decode all of it once more

A source says which image becomes which row of the manifest: patient, split and labels (sources.py,
folders.py, dicom.py). From there on all sources are treated alike. First, what was understood is
printed: the layout, the counts of each label in each split, some rows. Doubtful input is refused,
unless --allow names the doubt (doubts.py). Then a pool of processes decodes every image once and
makes it an 8-bit gray JPEG whose shorter side is --size (radiograph.py). An image that cannot be
decoded, or has no sure label, is left out and listed in rejected.csv with the reason. manifest.csv
is written last: a folder that has one is complete. The same command continues an interrupted run.
It makes an image again if the file it was made of (sources.csv) has changed its name, size or time;
--overwrite starts over.
"""
import argparse
import csv
import fnmatch
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from common import (                  # first: it answers Ctrl-C while the rest loads
    DataError, begin_script, errors_in_one_sentence, lock, open_text, printable, read_text,
    restart_in_utf8, whole_file, write_csv, write_text)
import archive
from manifest import as_bytes, read_manifest
from manifest_csv import FIRST_COLUMNS, OPTIONAL_COLUMNS, SPLITS

import numpy as np
from PIL import Image

from dicom import dicom_flags, dicom_items, is_dicom, read_dicom
from doubts import (
    FEW, Doubt, allow_flag, constant_labels, empty_splits, large_patients, many_left_out,
    refuse_doubts, similar_labels, similar_patients)
from flags import differing_flags, number_within
from folders import folder_flags, folder_items
from layout import excluder, pattern_below
from radiograph import (
    MASK, MIN_SIDE, Found, ImageSettings, Reader, blank_reason, find_files, in_parallel, load_image,
    read_image, reason)
from sources import (
    Item, Source, chexpert_flags, chexpert_items, demo_flags, demo_items, mimic_items, nih_items,
    read_phantom, text_of)
from tables import CELL_WORDS, form_key, plain_cell, read_table


# --------------------------------------------------------------------------------------------------
# The sources by their names on the command line.

@dataclass(frozen=True)
class SourceKind:
    """What the command line and the pool of processes need to know about a source."""
    help: str
    items: Callable[[argparse.Namespace, list[str]], Source]
    read: Reader                                        # makes an image of what Item.source names
    src_help: str = ""                                  # help of --src; "": reads no files
    flags: Callable[[Callable], None] | None = None     # declares the flags of this source alone
    carves_test: bool = True                            # False: the source has its own test split


SOURCES = {
    "demo": SourceKind(
        "synthetic chest radiographs with a known truth",
        demo_items, read_phantom, flags=demo_flags),
    "folder": SourceKind(
        "class folders, in train/val/test folders or not; optionally a CSV",
        folder_items, read_image, "folder of the class folders", folder_flags),
    "nih": SourceKind(
        "NIH ChestX-ray14 as downloaded and unpacked",
        nih_items, read_image,
        "folder of Data_Entry_2017*.csv, train_val_list.txt, test_list.txt and the images",
        carves_test=False),
    "chexpert": SourceKind(
        "CheXpert-v1.0 or CheXpert-v1.0-small",
        chexpert_items, read_image, "folder of train.csv, valid.csv, train/ and valid/",
        chexpert_flags, carves_test=False),
    "mimic": SourceKind(
        "MIMIC-CXR-JPG",
        mimic_items, read_image, "folder of its split, chexpert and metadata tables and of files/",
        chexpert_flags, carves_test=False),
    "dicom": SourceKind(
        "DICOM radiographs, de-identified on the way",
        dicom_items, read_dicom, "folder of DICOM files, at any depth", dicom_flags),
}


# --------------------------------------------------------------------------------------------------
# Splits.

def assign_splits(source: Source, args: argparse.Namespace) -> None:
    """Fill in the splits that the source does not give, by patient; those it gives stay.

    A missing test or val split is carved from the patients in train or in no split. They are
    ordered by a hash, so that nearly all patients keep their split when the folder grows. DataError
    for a patient in two given splits: a network would be tested on a chest that it learned from."""
    # The splits that the source gives. A patient without one may go to any.
    first = {}                                  # item of each patient
    for item in source.items:
        other = first.setdefault(item.patient, item)
        if (item.split or "train") != (other.split or "train"):
            hint = ""
            if "patients_per_split" in args:
                hint = " (--patients-per-split if its numbering restarts in each)"
            if not (item.split and other.split):
                hint = ": write the split of a patient into all of its rows"
            raise DataError(f"patient {item.patient} is in {item.split or 'no split'} and in "
                            f"{other.split or 'no split'} of {args.src}{hint}")
    split_of = {patient: item.split or "train" for patient, item in first.items()}

    without = sum(not item.split for item in source.items)
    if 0 < without < len(source.items):
        source.notes.append("Images to which the source gives no split, though it gives one to "
                            f"others: {without:,}; they count as train.")

    # The missing splits: first test, then val from the remaining patients.
    pool = [patient for patient, split in split_of.items() if split == "train"]
    pool.sort(key=lambda patient: hashlib.sha256(f"{args.seed} {patient}".encode()).digest())
    total = len(pool)
    for split in ("test", "val"):
        fraction = getattr(args, f"{split}_fraction", 0)
        if not fraction or split in split_of.values():
            continue
        count = max(1, round(fraction * total))
        count = max(0, min(count, len(pool) - 1))               # somebody stays in train
        split_of |= dict.fromkeys(pool[:count], split)
        del pool[:count]
        source.notes.append(f"The {split} split was carved by patient: {count:,} of {total:,}, "
                            f"seed {args.seed}.")
    for item in source.items:
        item.split = split_of[item.patient]


# --------------------------------------------------------------------------------------------------
# Images: read, finished and written by a pool of processes.

# Bytes of a file's name: file systems take 255, and `.tmp` is appended while it is written.
LONGEST_NAME = 251
# In --out: the file that each image was made of. A continued run compares it with the file there.
RECORD = "sources.csv"
# Labels that say that there is no finding.
NO_FINDING = re.compile(r"no (finding|abnormality|disease)s?|normal|healthy|negative")
# In a JPEG's comment, the start of a line that says what was decided about the image.
NOTE = "prepare.py: "


@dataclass(frozen=True)
class Conversion:
    """How the images of a run are converted, from where and to where."""
    read: Reader
    src: Path                       # the folder that Item.source is below
    out: Path                       # the folder that Item.path is below
    settings: ImageSettings


def convert(item: Item, conversion: Conversion) -> str:
    """Read one item and write its JPEG; returns "", or the reason why there is none.

    What the reader had to decide becomes the JPEG's comment, where a continued run finds it.
    OSError if --out cannot be written: that ends the run."""
    target = conversion.out / item.path
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        return f"its name would be longer than {LONGEST_NAME} bytes"
    try:
        image, notes = load_image(
            conversion.src / item.source, conversion.read, conversion.settings)
    except DataError as error:
        return str(error)
    image.info.clear()              # else Pillow copies the source's comment and resolution
    jpeg = io.BytesIO()             # complete before the first byte is written to disk
    comment = {"comment": "".join(f"{NOTE}{note}\n" for note in notes)} if notes else {}
    image.save(jpeg, "JPEG", quality=conversion.settings.quality, **comment)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target, sync=False) as file:
        file.write(jpeg.getvalue())
    return ""


class Written(NamedTuple):
    """What look_back finds in an image that convert wrote."""
    notes: list[str]                # what was decided about it
    digest: bytes                   # the same for identical files


def look_back(file: Path) -> Written:
    """Read an image that convert wrote. Runs in a process of a pool."""
    content = file.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        lines = image.info.get("comment", b"").decode(errors="replace").splitlines()
    notes = [line.removeprefix(NOTE) for line in lines if line.startswith(NOTE)]
    return Written(notes, hashlib.blake2b(content, digest_size=16).digest())


def look_back_at(files: list[Path], workers: int) -> list[Written]:
    """look_back for many images, in parallel."""
    return in_parallel(look_back, files, workers, "notes")


def count_notes(written: list[Written]) -> list[str]:
    """Sentences that count what was decided about images:
    `Window not used: 12, it would have made most of the image white.`"""
    # A note is `what was done: why`, in the same words for every image.
    sentences = []
    notes = Counter(note for image in written for note in image.notes)
    for note, count in sorted(notes.items()):
        what, _, why = note.partition(": ")
        sentences.append(f"{what[:1].upper()}{what[1:]}: {count:,}, {why}.")
    return sentences


def twins_note(items: list[Item], written: list[Written]) -> list[str]:
    """A sentence on images that show the same picture, if there are any."""
    first: dict[bytes, Item] = {}               # the first item with each digest
    # How many images repeat an earlier one, and how many of these are in another split.
    twins, apart, example = 0, 0, ""
    for item, image in zip(items, written, strict=True):
        other = first.setdefault(image.digest, item)
        if other is not item:
            twins += 1
            apart += other.split != item.split
            example = example or f"{other.path} and {item.path}"
    if not twins:
        return []
    return [f"The same picture as another image: {twins:,}, {apart:,} of them in another split, "
            f"such as {example}; `prepare.py verify --drop` takes them out."]


def write_images(source: Source, args: argparse.Namespace) -> None:
    """Write the images that are not there yet, and the list of what was rejected.

    Images that cannot be converted leave source.items. DataError if none is left."""
    # An earlier run of the same command may have written some images. Those made of another file,
    # or of one that has changed since, are deleted before the new record vouches for them.
    made_from, now = read_record(args.out / RECORD), fingerprints(source, args)
    changed = [path for path, print_now in now.items() if made_from.get(path) != print_now]
    # The manifest and the archive describe the old pictures, and go first: this run may be killed.
    for path in ("manifest.csv", archive.NAME, *changed) if changed else ():
        if size_of(args.out / path):
            (args.out / path).unlink()
    write_csv(args.out / RECORD, [("path", "made_from"), *now.items()])
    there = [item.path for item in source.items if size_of(args.out / item.path)]
    whole = in_parallel(is_whole, [args.out / path for path in there], args.workers, "check")
    written = {path for path, good in zip(there, whole, strict=True) if good}
    todo = [item for item in source.items if item.path not in written]
    if len(written) < len(there):
        print(f"{len(there) - len(written):,} images of an earlier run are broken, and are made "
              "again")
    if len(todo) < len(source.items):
        print(f"{len(source.items) - len(todo):,} of {len(source.items):,} images "
              "are there already")
    conversion = Conversion(
        SOURCES[args.source].read, src_folder(args), args.out, image_settings(args))
    reasons = in_parallel(partial(convert, conversion=conversion), todo, args.workers,
                          f"{args.source} -> {args.out}")

    # Items that could not be converted join those that the source had rejected.
    failed = {item.source: why for item, why in zip(todo, reasons, strict=True) if why}
    source.items = [item for item in source.items if item.source not in failed]
    source.rejected = sorted([*source.rejected, *failed.items()])

    # What was decided about images becomes notes.
    if args.source != "demo":
        written = look_back_at([args.out / item.path for item in source.items], args.workers)
        source.notes += [*count_notes(written), *twins_note(source.items, written)]
    masks = [file for file, why in failed.items() if why == MASK]
    if masks:
        source.notes.append(f"Left out as masks or drawings, by their few gray levels: "
                            f"{len(masks):,} (--allow masks takes them).")

    # Names of a hospital's files are for the hospital only, and the data folder may be handed on:
    # the list then lies beside it.
    file = args.out / "rejected.csv"
    if args.source == "dicom":
        file = Path(f"{os.path.abspath(args.out)}.rejected.csv")        # --out may be a dot
    write_csv(file, [("file", "reason"), *source.rejected])
    see = f", see {file.name}" if source.rejected else ""
    source.notes.append(f"Rejected: {len(source.rejected):,}{see}.")
    if not source.items:
        example, why = next(iter(failed.items()))
        raise DataError(f"none of the {len(failed):,} images can be used: {example}: {why}"
                        f"{takes_masks(failed.values())} (all in {file})")


def size_of(file: Path) -> int:
    """Bytes of a file; 0 if it is missing, or if its name is too long for the file system."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def is_whole(file: Path) -> bool:
    """Whether an image of an earlier run has all its bytes. convert does not wait for the disk, so
    that a power cut, or a copy, may have cut the file off or left zeros in it. Decoding would take
    twenty times as long and find no more of such damage: only the end of a JPEG has the end mark,
    and no JPEG has so many zeros in a row. Runs in a process of a pool."""
    content = file.read_bytes()
    return (content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")
            and bytes(64) not in content)


def fingerprints(source: Source, args: argparse.Namespace) -> dict[str, str]:
    """{path of each image: a hash that changes with the name, size or time of its source file}.

    For DICOM files the hash is keyed with the secret, because their names may name a person."""
    key = args.salt.read_bytes()[:64] if args.source == "dicom" else b""
    prints = {}
    for item in source.items:
        try:
            found = os.stat(src_folder(args) / item.source)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:             # a phantom has no file; a broken link is reported later
            state = ""
        text = os.fsencode(f"{item.source}\0{state}")
        prints[item.path] = hashlib.blake2b(text, digest_size=8, key=key).hexdigest()
    return prints


def read_record(file: Path) -> dict[str, str]:
    """The fingerprints that an earlier run wrote; {} if they cannot be read, so that all images
    are made again."""
    try:
        with open_text(file) as f:
            return {row[0]: row[1] for row in csv.reader(f)}
    except (OSError, ValueError, IndexError, csv.Error):
        return {}


# --------------------------------------------------------------------------------------------------
# The data folder: consistent whenever the run ends.

def prepare(args: argparse.Namespace) -> None:
    """Make the data folder --out from a source, or finish it if an earlier run was interrupted.

    Faults of the source are found first: before the images, only .lock and DICOM's secret are
    written."""
    if "exclude" in args:
        args.exclude = [pattern_below(args.src, pattern) for pattern in args.exclude]
    check_out(args)
    with lock_folder(args.out):
        below = find_files(args.src) if "src" in args else Found([], [], [])
        refuse_idle_patterns(args, below)
        source = SOURCES[args.source].items(args, below.files)
        special = "a named pipe, a socket or a device"
        source.rejected += [(path, special) for path in below.special]
        source.asked_for.add(special)
        if below.hidden:
            # The data folder must not show names of a hospital's files.
            example = "" if args.source == "dicom" else f", such as {text_of(below.hidden[0])}"
            source.notes.append("Hidden files and folders, which are passed over: "
                                f"{len(below.hidden):,}{example}.")
        say_links(source, args, below)
        check_source(source, args, below.files)
        found = len(source.items)
        if found < FEW:
            source.notes.append(f"Fewer than {FEW} images: empty splits and labels that are the "
                                "same for all were not refused.")

        # Print what was understood before refusing: it shows best what went wrong.
        source.notes += contradictions(source)
        print_notes(source)
        assign_splits(source, args)
        print_rows(source, args)
        refuse_doubts([*source.doubts, *doubts_of(source, args, found)], args.allow)

        # Remove what another run made, its manifest first: a folder with a manifest is complete.
        if args.overwrite:
            images = args.out / "images"
            if images.is_symlink():
                raise DataError(f"{images} is a link, behind which nothing is deleted: remove it")
            for name in ("manifest.csv", "DATA.md", "rejected.csv", RECORD, archive.NAME):
                (args.out / name).unlink(missing_ok=True)
            if images.exists():
                shutil.rmtree(images)

        # Say what is being made, make it, and only then write the manifest.
        write_text(args.out / "prepare.json", json.dumps(settings_of(args), indent=1))
        write_images(source, args)
        # All images of a split or of a class may have been rejected.
        refuse_doubts(doubts_of(source, args, found), args.allow)
        card = data_card(source, args)
        write_text(args.out / "DATA.md", card)
        columns = FIRST_COLUMNS + [
            name for name in OPTIONAL_COLUMNS if any(getattr(item, name) for item in source.items)]
        rows = [[*(getattr(item, name) for name in columns), *item.labels]
                for item in source.items]
        write_csv(args.out / "manifest.csv", [[*columns, *source.label_names], *rows])
    print(card)


def refuse_idle_patterns(args: argparse.Namespace, below: Found) -> None:
    """DataError for an --exclude that matches nothing: what it was meant for would be taken.

    It is enough if it matches links to folders, or what is passed over anyway, such as __MACOSX.
    A kind of file, such as *.gz, need not exist at all."""
    names = [*below.files, *below.special, *below.hidden, *(link for link, _ in below.links)]
    for pattern in getattr(args, "exclude", []):
        if any(map(excluder([pattern]), names)):
            continue
        form = form_key(Path(pattern).name)
        alike = {part for name in names for part in Path(name).parts
                 if fnmatch.fnmatchcase(form_key(part), form)}
        if alike or not re.fullmatch(r"\*(\.\w+)+", pattern):
            hint = f", but {min(alike)!r} is" if alike else ""
            raise DataError(printable(text_of(
                f"--exclude {pattern} passes nothing over: nothing below {args.src} is called so"
                f"{hint}; without it all is taken that is there")))


def say_links(source: Source, args: argparse.Namespace, below: Found) -> None:
    """Note which folders are links to others, whose files are taken by one name only. This is a
    doubt if nothing but folders says what an image is."""
    excluded = excluder(getattr(args, "exclude", []))
    links = [(link, name) for link, name in below.links if not excluded(f"{link}/x")
             and any(file.startswith(f"{name}/") for file in below.files)]
    if not links:
        return
    link, name = map(text_of, links[0])
    more = f", and {len(links) - 1:,} more" if len(links) > 1 else ""
    says = f"{link} leads to the same folder as {name}{more}: its files are taken by that name only"
    if args.source == "folder" and not args.csv:
        source.doubts.append(Doubt(
            "other-folders", f"{says}; remove the link, or --exclude {link}"))
    else:
        source.notes.append(f"{says}.")


def contradictions(source: Source) -> list[str]:
    """Sentences on images that have a finding and are also labelled as having none."""
    sentences = []
    # Support devices are no finding: CheXpert labels them beside No Finding.
    others = [i for i, name in enumerate(source.label_names) if form_key(name) != "support devices"]
    for place in others:
        name = source.label_names[place]
        if not NO_FINDING.fullmatch(form_key(name)):
            continue
        both = [item for item in source.items if item.labels[place] == "1"
                and any(item.labels[i] == "1" for i in others if i != place)]
        if both:
            sentences.append(f"Images that are {name!r} and have another label as well: "
                             f"{len(both):,}, such as {both[0].path}.")
    return sentences


def print_notes(source: Source) -> None:
    """Print what the source has understood, and why it leaves files out."""
    reasons = Counter(why for _, why in source.rejected).most_common(5)
    left_out = [f"Left out: {count:,}, {why}." for why, count in reasons]
    print(*map(printable, [*source.notes, *left_out]), "", sep="\n")


def print_rows(source: Source, args: argparse.Namespace) -> None:
    """Print the counts of labels in each split, and a few rows as the manifest will have them."""
    print(*count_table(source), "", sep="\n")
    for split in SPLITS:
        # The first two of each split: enough to notice that labels went to the wrong images.
        for item in [item for item in source.items if item.split == split][:2]:
            # Names of a hospital's files stay in the hospital: the coded path is shown instead.
            name = item.path if args.source == "dicom" else item.source
            labels = [f"{label} {cell}" for label, cell in zip(source.label_names, item.labels)
                      if cell not in ("", "0")]
            says = ", ".join(labels) or ("no finding named" if source.label_names else "no labels")
            print(printable(f"{text_of(name)} -> patient {item.patient}, {split}: {says}"))
    print(flush=True)


def split_doubts(source: Source, args: argparse.Namespace, found: int) -> list[Doubt]:
    """Doubts for splits without images that nobody asked for."""
    fractions = {split: getattr(args, f"{split}_fraction") for split in ("val", "test")
                 if f"{split}_fraction" in args}
    return empty_splits([item.split for item in source.items],
                        len({item.patient for item in source.items}), fractions, found)


def lost_images(source: Source) -> list[tuple[str, str]]:
    """What was rejected although nobody asked for it: (file, reason)."""
    return [(file, why) for file, why in source.rejected if why not in source.asked_for]


def takes_masks(reasons: Iterable[str]) -> str:
    """The end of a message about rejected images, if masks are among them."""
    return "; --allow masks takes the masks" if MASK in reasons else ""


def doubts_of(source: Source, args: argparse.Namespace, found: int) -> list[Doubt]:
    """Doubts that follow from counts, for any source. found: images before any was decoded."""
    lost = lost_images(source)
    masks = takes_masks(why for _, why in lost)
    doubts = [doubt._replace(sentence=printable(doubt.sentence) + masks)
              for doubt in many_left_out(len(source.items), lost)]
    doubts += split_doubts(source, args, found)
    # A patient of the dicom source is a hash by now, which hides the form of the identity.
    if source.patients_known and args.source != "dicom":
        doubts += similar_patients(item.patient for item in source.items)
    # A stand-in such as 0 or ANON would make one person of many, all in one split.
    if source.patients_known and not source.official_labels:
        doubts += large_patients([item.patient for item in source.items])
    # Official labels are not in doubt: a part of the images may lack a rare finding.
    if not source.official_labels:
        # Each label is compared with each: too slow for thousands of folders that are no classes.
        if "many-classes" in {*args.allow} or "many-classes" not in {*dict(source.doubts)}:
            doubts += similar_labels(source.label_names)
        # Class folders may be no classes: then another layout may be the solution.
        constant = constant_labels(source.label_names, [item.labels for item in source.items],
                                   source.classes, found)
        if constant and args.source == "folder" and not (args.label_columns or args.class_columns):
            constant = [doubt._replace(sentence=doubt.sentence + ": --layout says what each level "
                                       "of folders is, --layout none that none is a class")
                        for doubt in constant]
        doubts += constant
    return doubts


def check_out(args: argparse.Namespace) -> None:
    """DataError if --out may not be written.

    It may be if it is empty, or holds a part of this very run, or another run that --overwrite
    gives up."""
    # --out must not lie inside --src: the next run would find its images there.
    if "src" in args:
        src, out = args.src.resolve(), args.out.resolve()
        if not src.is_dir():
            raise DataError(f"--src {args.src} is not a folder")
        if src == out or src in out.parents or out in src.parents:
            raise DataError(f"--src {args.src} and --out {args.out} must not lie one inside "
                            "the other")

    # Was it made by prepare.py? A run that was killed early may have left only these two.
    names = {path.name for path in args.out.glob("*")} - {".lock", "prepare.json.tmp"}
    if not names:
        return
    if "prepare.json" not in names:
        raise DataError(f"{args.out} is not empty and was not made by prepare.py")
    if not args.overwrite:
        before = read_settings(args.out / "prepare.json")
        now = json.loads(json.dumps(settings_of(args)))         # as read from a file
        # --allow may differ: what was refused after its images were made need not be made again.
        # But masks that were allowed before are there, and would stay.
        lost = "masks" in set(before.get("allow", [])) - set(args.allow)
        for settings in () if lost else (before, now):
            settings.pop("allow", None)
        differing = differing_flags(before, now)
        if differing:
            raise DataError(f"{args.out} was made with other flags: {differing}; choose another "
                            "--out, or give it up with --overwrite")


def lock_folder(folder: Path) -> TextIO:
    """Lock a folder until the returned file is closed. The folder is made if it is missing.

    DataError if another run holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    if not lock(file):
        file.close()
        raise DataError(f"{folder} is being written by another run of prepare.py")
    return file


def check_source(source: Source, args: argparse.Namespace, files: list[str]) -> None:
    """DataError if a source has no image, a label without a proper name, or one path twice.

    files: all of them below --src."""
    # The usual cause is a wrong --src, which the commonest reasons show.
    if not source.items:
        reasons = Counter(why for _, why in source.rejected).most_common(3)
        # An example shows how two lists of names differ. A key of DICOM may name a person.
        examples = {why: f", such as {file}" for file, why in reversed(source.rejected)
                    if args.source != "dicom"}
        # The files may be of another kind, or of views that were not asked for.
        says = [f"{count:,} files: {why}{examples.get(why, '')}" for why, count in reasons]
        says += [source.passed_over.rstrip(".")] if source.passed_over else []
        if args.source != "dicom" and any(is_dicom(args.src / file) for file in files[:100]):
            says.append("`prepare.py dicom` reads DICOM files")
        raise DataError(printable("; ".join([f"no image found in {args.src}", *says])))
    # A label is a column of the manifest.
    for name in source.label_names:
        taken = name in FIRST_COLUMNS + OPTIONAL_COLUMNS or source.label_names.count(name) > 1
        if not name or taken:
            raise DataError(f"{name!r} cannot be the name of a label, or is that of two")
    # x.png, x.jpg and x.png.jpg in one folder could become one file.
    for path, count in Counter(item.path for item in source.items).items():
        if count > 1:
            raise DataError(f"two files of {args.src} would both become {path}: "
                            "rename one of them")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that shape the data folder, for prepare.json and DATA.md.

    The paths of DICOM sources are left out, as they may contain names."""
    left_out = {"out", "workers", "overwrite"}      # they do not change the images
    if args.source == "dicom":
        left_out |= {"src", "labels", "salt"}
    return {name: from_out(value, args.out) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name not in left_out}


def from_out(path: Path, out: Path) -> str:
    """The path relative to --out, which stays true on a machine that both are moved to."""
    return text_of(os.path.relpath(path.resolve(), out.resolve()))


def read_settings(file: Path) -> dict[str, Any]:
    """What settings_of gave for the run that wrote this prepare.json."""
    try:
        return dict(json.loads(read_text(file)))
    except (ValueError, TypeError, DataError):
        raise DataError(f"{file} is damaged, and says no more how its folder was made") from None


def data_card(source: Source, args: argparse.Namespace) -> str:
    """DATA.md: the command that made the folder, and what is in it, counted."""
    # The command. Flags without a value are left out; 0 is a value. Of a path only the last name is
    # given, because the folder may go to other machines.
    command = ["python", "prepare.py", args.source, "--out", args.out.resolve().name]
    for name, value in settings_of(args).items():
        if name == "source" or value is None or value is False or value == "" or (
                value == [] and name != "not_mentioned"):
            continue
        command.append(f"--{name.replace('_', '-')}")
        path = vars(args)[name]
        if isinstance(path, Path):
            value = path.resolve().name
        if value is not True:
            command += map(str, value if isinstance(value, list) else [value])
    return text_of("\n".join([f"# {args.out.resolve().name}", "", f"    {shlex.join(command)}", "",
                              *count_table(source), "", *source.notes, ""]))


def count_table(source: Source) -> list[str]:
    """The lines of a Markdown table: images, patients and each label, counted in each split."""
    splits = [[item for item in source.items if item.split == split] for split in SPLITS]
    rows = [("images", [f"{len(items):,}" for items in splits]),
            ("patients", [f"{len({item.patient for item in items}):,}" for items in splits])]
    for place, name in enumerate(source.label_names):
        counts = [Counter(item.labels[place] for item in items) for items in splits]
        rows.append((name, [label_cell(count) for count in counts]))
    return ["| | train | val | test |", "|---|---:|---:|---:|",
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]


def label_cell(counts: Counter) -> str:
    """`present of present and absent`, and how many are uncertain."""
    text = f"{counts['1']:,} of {counts['1'] + counts['0']:,}"
    return text + (f", {counts['-1']:,} uncertain" if counts["-1"] else "")


# --------------------------------------------------------------------------------------------------
# A data folder, packed into one file, or decoded once more.

def pack(args: argparse.Namespace) -> int:
    """Write images.tar, from which the later stages read instead of images/; see archive.py.

    DataError names an image that cannot be decoded: it would be packed for good."""
    if not args.folder.is_dir():            # lock_folder would make it
        raise DataError(f"{args.folder} is not a folder")
    with lock_folder(args.folder):
        manifest = read_manifest(args.folder, use_tar=False)
        files = [args.folder / path for path in manifest.paths]
        looks = in_parallel(partial(look_at, size=None), files, args.workers, "decode")
        broken = [f"{path}: {look.problem}" for path, look in zip(manifest.paths, looks)
                  if look.problem.startswith(("missing", "unreadable"))]
        if broken:
            raise DataError(f"{args.folder} has {len(broken):,} images that cannot be packed, "
                            f"first {broken[0]}; `verify --drop` takes them out of the manifest")
        file = archive.write_archive(args.folder, manifest.paths, manifest.path_bytes)
        # Read back what was written, through the archive's index.
        packed = read_manifest(args.folder).archive
        assert packed is not None
        for i in range(len(packed.paths)):
            packed.member(i).read_bytes()
    print(f"{file}: {len(files):,} images, {file.stat().st_size / 1e9:,.2f} GB. Every stage reads "
          "it from now on; images/ may be deleted.")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Decode every image of a data folder and print what is wrong.

    The exit code is 1 if something is wrong and --drop does not remove it, else 0."""
    table = read_table(args.folder / "manifest.csv", "path", ["split"])
    problems = find_problems(args.folder, table.column("split"), args.workers)
    for path, problem in problems.items():
        print(f"{path}: {problem}")

    # A problem's first word is its kind: missing, unreadable, blank, unexpected or duplicate.
    kinds = Counter(problem.split()[0].rstrip(":") for problem in problems.values())
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    print(f"{len(table.rows):,} images: {counts or 'all good'}")

    if args.drop and problems:
        drop(args.folder, set(problems))
        left = {split for path, split in table.column("split").items() if path not in problems}
        for split in sorted({*table.column("split").values()} - left):
            print(f"The {split} split is empty now.")
    # read_manifest checks the patients, splits and labels, but stops at an image that is missing.
    if args.drop or "missing" not in kinds:
        read_manifest(args.folder)
    return 1 if problems and not args.drop else 0


def find_problems(folder: Path, split_of: dict[str, str], workers: int) -> dict[str, str]:
    """{path: what is wrong with it} for the images {path: split} of a data folder."""
    made = folder / "prepare.json"      # missing in a folder that was made by hand
    size = read_settings(made).get("size") if made.exists() else None
    size = size if isinstance(size, int) else None      # a damaged file has none

    # Of identical images, keep the one in test, or else in val: the test set must not shrink.
    order = {"test": 0, "val": 1}
    paths = sorted(split_of, key=lambda path: order.get(split_of[path], 2))
    rows = {path: i for i, path in enumerate(split_of)}
    packed = archive.open_archive(folder, list(rows), as_bytes(rows))
    if packed:
        archive.check_against_folder(packed, folder, as_bytes(rows), np.arange(len(rows)))
    files = [packed.member(rows[path]) if packed else folder / path for path in paths]
    looks = in_parallel(partial(look_at, size=size), files, workers, "verify")

    problems, first = {}, {}            # the first path with each digest
    for path, look in zip(paths, looks, strict=True):
        problem = look.problem          # if the image itself is good, it may be there twice
        twin = first.setdefault(look.digest, path) if look.digest else path
        if twin != path:
            problem = f"duplicate of {twin}"
            if split_of[twin] != split_of[path]:
                problem += f": {split_of[twin]} leaks into {split_of[path]}"
        if problem:
            problems[path] = problem
    return problems


class Look(NamedTuple):
    """The result of decoding an image."""
    problem: str                        # "" if nothing is wrong
    digest: bytes = b""                 # of its pixels; b"" if something is wrong


def look_at(file: Path | archive.Member, size: int | None) -> Look:
    """Decode an image of a data folder. size: the --size it was made with, if known."""
    packed = isinstance(file, archive.Member)
    if not packed and file.exists() and not file.is_file():     # a pipe would block
        return Look("unreadable: a folder, a named pipe, a socket or a device")
    try:
        with Image.open(io.BytesIO(file.read_bytes()) if packed else file) as image:
            image.load()
    except FileNotFoundError:
        return Look("missing")
    except Exception as error:          # a decoder may raise anything
        return Look(f"unreadable: {reason(error, file.archive if packed else file)}")

    # Every image that prepare.py wrote is gray, of the right size, and not blank.
    blank = blank_reason(image.convert("L"))
    if blank:
        return Look(blank)
    side = min(image.size)
    if image.mode != "L" or side < MIN_SIDE or size and side > size:
        return Look(f"unexpected size or mode: {image.width} x {image.height} {image.mode}")
    pixels = image.tobytes() + repr(image.size).encode()        # 2 x 8 pixels differ from 4 x 4
    return Look("", hashlib.blake2b(pixels).digest())


def drop(folder: Path, paths: set[str]) -> None:
    """Rewrite the manifest without these images; the old one stays as manifest.1.csv, .2, …"""
    file = folder / "manifest.csv"
    with lock_folder(folder):
        with open_text(file) as f:
            header, *rows = (row for row in csv.reader(f) if row)       # skips blank lines
        remaining = [row for row in rows if plain_cell(row[0]) not in paths]

        # The first free number: no earlier manifest is overwritten.
        number = 1
        while (folder / f"manifest.{number}.csv").exists():
            number += 1
        old = folder / f"manifest.{number}.csv"
        shutil.copy2(file, old)
        write_csv(file, [header, *remaining])
        with open(folder / "DATA.md", "a", encoding="utf-8") as card:
            card.write(f"\nverify --drop left {len(remaining):,} images of {len(rows):,}; "
                       f"before: {old.name}.\n")


# --------------------------------------------------------------------------------------------------
# The command line.

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of one source, named by args.source, or of pack or verify."""
    parser = argparse.ArgumentParser(
        description="Any source of radiographs -> one data folder.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, kind in SOURCES.items():
        command = commands.add_parser(
            name, help=kind.help, description=kind.help, allow_abbrev=False,
            epilog=cells_help() if name in ("folder", "dicom") else None,
            formatter_class=HelpWithTable)
        source_flags(command.add_argument, kind)
        if kind.flags:
            kind.flags(command.add_argument)
    command = commands.add_parser("pack", help="all images of a data folder in one images.tar",
                                  allow_abbrev=False)
    command.add_argument("folder", type=Path, help="the data folder")
    workers_flag(command.add_argument)
    command = commands.add_parser("verify", help="decode a data folder once more",
                                  allow_abbrev=False)
    verify_flags(command.add_argument)

    # Defaults and checks that depend on several flags.
    args = parser.parse_args(argv)
    if args.source == "dicom" and not args.salt:
        args.salt = Path(f"{os.path.abspath(args.out)}.salt")
    if "out" in args:
        check_flags(args, commands.choices[args.source].error)
    # The usual names of a table's columns. Without a table, no column may be named.
    usual = {"key": "PatientID"} if getattr(args, "labels", None) else {}
    if getattr(args, "csv", None):
        usual = {"path_column": "path", "patient_column": "patient", "split_column": "split"}
    for name, value in usual.items():
        setattr(args, name, getattr(args, name) or value)
    return args


class HelpWithTable(argparse.HelpFormatter):
    """A help formatter that keeps the lines of the last paragraph, which is a table."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def cells_help() -> str:
    """The meanings of cells in label columns, as text."""
    meanings = {"1": "present", "0": "absent", "-1": "uncertain", "": "not mentioned"}
    lines = [f"  {meanings[value]:14s} {value or '(blank)'}, {', '.join(filter(None, words))}"
             for value, words in CELL_WORDS.items()]
    return "\n".join(["Cells of label columns, in capital or small letters, in quotes or not; "
                      "numbers such as 1.0 are compared as numbers, 1 (yes) and 1=yes are yes:",
                      *lines,
                      "  also not mentioned: not known, no data, not recorded and the like"])


def source_flags(flag: Callable, kind: SourceKind) -> None:
    """Declare the flags that all sources have."""
    flag("--out", type=Path, required=True, help="the data folder to make")
    if kind.src_help:
        flag("--src", type=Path, required=True, help=kind.src_help)
    flag("--size", type=number_within(int, MIN_SIDE, 9999), default=ImageSettings.size,
         help="shorter side of the images, pixels (default: %(default)s)")
    flag("--quality", type=number_within(int, 1, 100), default=ImageSettings.quality,
         help="of the JPEGs, 1 to 100 (default: %(default)s)")
    flag("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"),
         help="percentiles that become black and white")
    flag("--max-megapixels", type=number_within(float, 1, 999),
         default=ImageSettings.max_megapixels, help="reject larger images (default: %(default)s)")
    flag("--val-fraction", type=float, default=0.1,
         help="of the patients, if no val is given (default: %(default)s)")
    if kind.carves_test:
        flag("--test-fraction", type=float, default=0.2,
             help="of the patients, if no test is given (default: %(default)s)")
    flag("--seed", type=number_within(int, 0, 2**63 - 1), default=0,
         help="of the splits, and of the demo's people (default: %(default)s)")
    allow_flag(flag)
    workers_flag(flag)
    flag("--overwrite", action="store_true",
         help="replace what prepare.py wrote into --out before")


def workers_flag(flag: Callable) -> None:
    flag("--workers", type=number_within(int, 1, 999), default=len(os.sched_getaffinity(0)),
         help="processes (default: cores)")


def verify_flags(flag: Callable) -> None:
    flag("folder", type=Path, help="the data folder")
    flag("--drop", action="store_true",
         help="take what is wrong out of the manifest; keep the old one")
    workers_flag(flag)


def check_flags(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Report conflicting flags of a source by `error`, which ends the script."""
    # Sources with their own test split have no --test-fraction.
    fractions = args.val_fraction, getattr(args, "test_fraction", 0)
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        error("--val-fraction and --test-fraction must leave something for train")
    low, high = args.stretch or (0, 100)
    if not 0 <= low < high <= 100:
        error("--stretch takes two percentiles, 0 <= LOW < HIGH <= 100")
    if args.source == "dicom" and args.out.resolve() in args.salt.resolve().parents:
        error("--salt must not lie inside --out, which may be handed on")
    table = {"folder": "csv", "dicom": "labels"}.get(args.source)
    for name in ("label_columns", "class_columns", "label_separator", "not_mentioned", "where",
                 "several_rows", "rater_column", "path_column", "patient_column", "split_column",
                 "key", "key_column"):
        if table and getattr(args, name, None) and not getattr(args, table):
            error(f"--{name.replace('_', '-')} is about columns of --{table}, which is missing")
    # A column that is read twice would give two labels with one name.
    if table:
        named = Counter([*args.label_columns, *args.class_columns])
        for name in [name for name, count in named.items() if count > 1]:
            error(f"--label-columns and --class-columns name {name} twice")
    if getattr(args, "not_mentioned", None) is not None and not args.class_columns:
        error("--not-mentioned is for --class-columns, which is missing")
    if getattr(args, "rater_column", "") and not args.several_rows:
        error("--rater-column is for --several-rows, which is missing")


def image_settings(args: argparse.Namespace) -> ImageSettings:
    """The image settings that a source's flags ask for."""
    return ImageSettings(args.size, args.quality, args.stretch and tuple(args.stretch),
                         args.max_megapixels, "masks" in args.allow)


def src_folder(args: argparse.Namespace) -> Path:
    """--src, or for a source that reads no files the empty path, which joining leaves out."""
    return args.src if "src" in args else Path()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, unless an error ends the script with a sentence."""
    if argv is None:
        restart_in_utf8()
    begin_script()
    args = parse_args(argv)
    if "folder" in args:
        with errors_in_one_sentence("prepare.py", args.folder):
            return verify(args) if args.source == "verify" else pack(args)
    with errors_in_one_sentence("prepare.py", args.out):
        prepare(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
