"""Stage 0: what comes out of prepare.py, and what it does with what is wrong."""
import csv
import errno
import gzip
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
import radiograph as radiograph_module
import sources
from manifest import read_manifest
from sampling import study_numbers

SCRIPT = Path(prepare.__file__)


def radiograph(seed=0, width=48, height=40):
    """(height, width) uint8: soft noise, different for each seed, that survives JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(file, array=None, **keywords):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(radiograph() if array is None else array).save(file, **keywords)


def run(*flags):
    return prepare.main([str(flag) for flag in flags])


def folder(src, out, *flags):
    return run("folder", "--src", src, "--out", out, "--size", 32, "--workers", 2, *flags)


def rejected(out):
    with open(out / "rejected.csv", newline="") as file:
        return dict(list(csv.reader(file))[1:])


def write_csv(file, rows):
    file.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def labels_of(manifest):
    """{path: {label: value}}, the values as numbers."""
    return {path: dict(zip(manifest.label_names, row.tolist(), strict=True))
            for path, row in zip(manifest.paths, manifest.labels, strict=True)}


# --------------------------------------------------------------------------------------------------
# Class folders.

def test_class_folders_without_splits(tmp_path, capsys):
    for i in range(20):
        save(tmp_path / "src" / ("NORMAL" if i % 2 else "PNEUMONIA") / f"{i}.png", radiograph(i))
    (tmp_path / "src/readme.txt").write_text("not an image")
    folder(tmp_path / "src", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.label_names == ["NORMAL", "PNEUMONIA"]
    assert Counter(manifest.splits.tolist()) == {"train": 14, "val": 2, "test": 4}
    assert labels_of(manifest)["images/NORMAL/3.jpg"] == {"NORMAL": 1, "PNEUMONIA": 0}
    assert labels_of(manifest)["images/PNEUMONIA/4.jpg"] == {"NORMAL": 0, "PNEUMONIA": 1}
    assert len(set(manifest.patients.tolist())) == 20
    card = (tmp_path / "out/DATA.md").read_text()
    assert "every image counts as a patient of its own" in card and "1 .txt" in card
    assert "| images | 14 | 2 | 4 |" in card
    assert card in capsys.readouterr().out


def test_given_splits_stay_and_the_missing_one_is_carved_by_patient(tmp_path):
    rows = [("path", "patient", "split")]
    for i in range(60):
        path = f"{'test' if i < 12 else 'train'}/A/{i}.png"
        save(tmp_path / "src" / path, radiograph(i))
        rows.append((path, f"p{i // 3}", path.split("/")[0]))
    write_csv(tmp_path / "rows.csv", rows)
    flags = ("--csv", tmp_path / "rows.csv", "--val-fraction", 0.25)
    folder(tmp_path / "src", tmp_path / "out", *flags)
    manifest = read_manifest(tmp_path / "out")         # which refuses a patient in two splits
    assert {p for p, s in zip(manifest.paths, manifest.splits, strict=True) if s == "test"} == {
        f"images/test/A/{i}.jpg" for i in range(12)}
    assert Counter(manifest.splits.tolist()) == {"train": 36, "val": 12, "test": 12}
    val = set(manifest.patients[manifest.splits == "val"])
    folder(tmp_path / "src", tmp_path / "again", *flags)
    assert set(read_manifest(tmp_path / "again").patients[manifest.splits == "val"]) == val
    folder(tmp_path / "src", tmp_path / "seed1", *flags, "--seed", 1)
    other = read_manifest(tmp_path / "seed1")
    assert set(other.patients[other.splits == "val"]) != val


def test_split_folders_under_other_names(tmp_path):
    for name in ("Training", "valid", "test", "extra"):
        save(tmp_path / "src" / name / "A/x.png", radiograph(len(name)))
    save(tmp_path / "src/loose.png")
    folder(tmp_path / "src", tmp_path / "out", "--allow", "other-folders")
    manifest = read_manifest(tmp_path / "out")
    assert dict(zip(manifest.paths, manifest.splits.tolist(), strict=True)) == {
        "images/Training/A/x.jpg": "train", "images/valid/A/x.jpg": "val",
        "images/test/A/x.jpg": "test"}
    # Never a class called `extra`.
    assert set(rejected(tmp_path / "out")) == {"extra/A/x.png", "loose.png"}


def test_patients_in_two_splits_are_an_error_or_restart(tmp_path):
    rows = [("path", "patient", "split"),
            ("a.png", 1, "train"), ("b.png", 1, "test"), ("c.png", 2, "train")]
    for i, row in enumerate(rows[1:]):
        save(tmp_path / "src" / row[0], radiograph(i))
    write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(SystemExit, match="patient 1 is in test and in train.*--patients-per-split"):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv")
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv",
           "--patients-per-split", "--val-fraction", 0)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.patients.tolist() == ["train-1", "test-1", "train-2"]
    # The card holds all that it takes to make the folder again.
    card = (tmp_path / "out/DATA.md").read_text()
    assert all(flag in card for flag in ("--val-fraction 0", "--seed 0", "--patients-per-split"))


def test_csv_labels_of_both_kinds(tmp_path):
    rows = ["\ufeffpath, patient ,Edema,kind", "a.png,1,1,dense", "sub/b.png , 2,-1.0,soft",
            r"sub\c.png,3,,", "d.png,4,0.0,dense"]
    (tmp_path / "rows.csv").write_bytes("\r\n".join(rows).encode())
    for i, name in enumerate(("a.png", "sub/b.png", "sub/c.png", "d.png")):
        save(tmp_path / "src" / name, radiograph(i))
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv",
           "--label-columns", "Edema", "kind")
    text = (tmp_path / "out/manifest.csv").read_text().splitlines()
    assert text[0] == "path,patient,split,Edema,kind dense,kind soft"
    assert {line.split(",")[0]: line.split(",")[3:] for line in text[1:]} == {
        "images/a.jpg": ["1", "1", "0"], "images/sub/b.jpg": ["-1", "0", "1"],
        "images/sub/c.jpg": ["", "", ""], "images/d.jpg": ["0", "1", "0"]}


@pytest.mark.parametrize("rows, flags, message", [
    ([("file", "y"), ("a.png", 1)], (),
     r"rows.csv must have one column 'path', its header is 'file,y'"),
    ([("path", "y"), ("a.png", 1)], ("--label-columns", "z"), "one column 'z'"),
    ([("path", "y"), ("a.png", 1), ("b.png", "l")], ("--label-columns", "y"),
     "row 3, column y: 'l' among values of 1"),
    ([("path", "y"), ("a.png", 1), ("b.png",)], (), "row 3: 1 cells where the header has 2"),
    ([("path", "y"), ("a.png", 1), ("a.png", 0)], (),
     "row 3, column path: a.png is already in row 2"),
    ([("path", "patient", "patient"), ("a.png", 1, 2)], (), "must have one column 'patient'"),
    ([("path", "split"), ("a.png", "trian")], (), "row 2, column split: 'trian'"),
    ([("path", "patient"), ("a.png", "")], (), "row 2, column patient: empty"),
])
def test_csv_that_is_wrong(tmp_path, rows, flags, message):
    save(tmp_path / "src/a.png")
    save(tmp_path / "src/b.png")
    write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(SystemExit, match=message):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv", *flags)
    assert not (tmp_path / "out/manifest.csv").exists()


def test_csv_and_disk_that_differ(tmp_path):
    save(tmp_path / "src/a.png")
    save(tmp_path / "src/extra.png")
    write_csv(tmp_path / "rows.csv",
              [("path", "y"), ("a.png", 1), ("gone.png", 0), ("../out.png", 0)])
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv",
           "--label-columns", "y")
    assert read_manifest(tmp_path / "out").paths == ["images/a.jpg"]
    missing = "named in rows.csv, missing on disk"
    assert rejected(tmp_path / "out") == {
        "extra.png": "not in rows.csv", "gone.png": missing, "../out.png": missing}


def test_missing_csv_and_missing_source(tmp_path):
    save(tmp_path / "src/a.png")
    with pytest.raises(SystemExit, match="No such file.*none.csv"):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "none.csv")
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no image found in .*empty"):
        folder(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(SystemExit, match="must not lie one inside the other"):
        folder(tmp_path / "src", tmp_path / "src/out")


# --------------------------------------------------------------------------------------------------
# One image.

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_gray(tmp_path, mode):
    gray = Image.fromarray(radiograph(width=64, height=96))
    save(tmp_path / "src/reference.png", np.asarray(gray))
    file = tmp_path / "src" / ("x.tif" if mode == "CMYK" else "x.png")
    gray.convert("RGB" if mode == "CMYK" else "L").convert(mode).save(file)
    folder(tmp_path / "src", tmp_path / "out")
    with Image.open(tmp_path / "out/images/reference.jpg") as image:
        plain = np.asarray(image, float)
    with Image.open(tmp_path / "out/images/x.jpg") as image:
        assert image.mode == "L" and image.size == (32, 48)
        difference = np.abs(np.asarray(image, float) - plain).mean()
    assert difference < (30 if mode == "1" else 3)              # dithering


@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_deep_images_use_the_full_range(tmp_path, top):
    save(tmp_path / "src/x.png", (radiograph().astype(float) * top / 255).astype(np.uint16))
    folder(tmp_path / "src", tmp_path / "out")
    with Image.open(tmp_path / "out/images/x.jpg") as image:
        low, high = image.getextrema()
        levels = np.asarray(image, float)
    assert low < 10 and high > 245
    expected = Image.fromarray(radiograph()).resize(image.size, Image.Resampling.BICUBIC)
    expected = np.asarray(expected, float)
    assert np.corrcoef(levels.ravel(), expected.ravel())[0, 1] > 0.99


def test_size_and_aspect_and_quality(tmp_path):
    save(tmp_path / "src/wide.png", radiograph(1, 200, 100))
    save(tmp_path / "src/tall.jpg", radiograph(2, 400, 900), quality=95)
    save(tmp_path / "src/small.png", radiograph(3, 40, 36))
    out, rough = tmp_path / "out/images", tmp_path / "rough/images"
    run("folder", "--src", tmp_path / "src", "--out", out.parent, "--size", 50, "--workers", 1)
    sizes = {file.stem: Image.open(file).size for file in out.iterdir()}
    # small is not enlarged
    assert sizes == {"wide": (100, 50), "tall": (50, 112), "small": (40, 36)}
    # Antialiased, and right: close to the mean over the pixels that each new one covers.
    boxes = np.asarray(Image.fromarray(radiograph(1, 200, 100)).reduce(2), float)
    assert np.abs(np.asarray(Image.open(out / "wide.jpg"), float) - boxes).mean() < 2
    run("folder", "--src", tmp_path / "src", "--out", rough.parent, "--size", 50, "--quality", 20)
    assert (rough / "wide.jpg").stat().st_size < (out / "wide.jpg").stat().st_size / 1.3


def test_nothing_of_the_source_but_its_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                    # rotate by 90 degrees to see it upright
    exif[0x010E] = "Miller^John"
    save(tmp_path / "src/x.jpg", radiograph(0, 48, 40),
         exif=exif, comment=b"Miller^John", dpi=(300, 300))
    folder(tmp_path / "src", tmp_path / "out")
    assert b"Miller" not in (tmp_path / "out/images/x.jpg").read_bytes()
    with Image.open(tmp_path / "out/images/x.jpg") as image:
        assert image.size == (32, 38) and not image.getexif() and "dpi" not in image.info


def test_stretch(tmp_path):
    levels = (100 + radiograph(0, 64, 64) / 5).astype(np.uint8)             # 100 to 151
    save(tmp_path / "src/x.png", levels)
    folder(tmp_path / "src", tmp_path / "plain")
    folder(tmp_path / "src", tmp_path / "stretched", "--stretch", 1, 99)
    plain, stretched = (np.asarray(Image.open(tmp_path / name / "images/x.jpg"), float)
                        for name in ("plain", "stretched"))
    assert np.ptp(plain) < 60 and np.ptp(stretched) > 240
    assert np.corrcoef(plain.ravel(), stretched.ravel())[0, 1] > 0.99


def test_bad_files_are_rejected_with_the_reason(tmp_path):
    src = tmp_path / "src"
    save(src / "good.png")
    save(src / "whole.png", radiograph(0, 300, 300))
    save(src / "half.jpg", radiograph(1, 300, 300))
    os.rename(src / "whole.png", src / "half.png")
    for half in (src / "half.png", src / "half.jpg"):
        half.write_bytes(half.read_bytes()[:half.stat().st_size // 2])
    (src / "text.png").write_text("I am no image")
    (src / "empty.png").touch()
    save(src / "bomb.png", np.zeros((1500, 1000), np.uint8))
    save(src / "black.png", np.zeros((50, 50), np.uint8))
    save(src / "faint.png", (radiograph() // 20).astype(np.uint8))
    save(src / "deepblack.png", np.full((50, 50), 700, np.uint16))
    save(src / "icon.png", radiograph(0, 16, 16))
    Image.fromarray(radiograph()).save(
        src / "film.tif", save_all=True, append_images=[Image.fromarray(radiograph(1))])
    flags = ("--max-megapixels", 1.4, "--val-fraction", 0, "--test-fraction", 0)
    with pytest.raises(SystemExit, match="10 of 11 images would be left out, 3 of them.*: .*such "
                       "as .* and .*--allow many-left-out"):
        folder(src, tmp_path / "out", *flags)
    # What is allowed may be said when the run goes on.
    folder(src, tmp_path / "out", *flags, "--allow", "many-left-out")
    assert read_manifest(tmp_path / "out").paths == ["images/good.jpg"]
    reasons = rejected(tmp_path / "out")
    words = {"half.png": "truncated", "half.jpg": "truncated", "text.png": "cannot identify",
             "empty.png": "cannot identify", "bomb.png": "1500000 pixels",
             "black.png": "blank", "faint.png": "blank", "deepblack.png": "blank",
             "icon.png": "16 x 16", "film.tif": "2 frames"}
    assert reasons.keys() == words.keys()
    assert all(word in reasons[name] for name, word in words.items()), reasons
    assert not list(tmp_path.glob("out/**/*.tmp"))


def test_images_without_their_rows_are_doubted(tmp_path):
    for i in range(40):
        save(tmp_path / f"src/{i:02d}.{'png' if i < 30 else 'jpg'}", radiograph(i))
    table, src = tmp_path / "rows.csv", tmp_path / "src"
    write_csv(table, [("path", "y", "view"), *((f"{i:02d}.png", i % 2, "PA" if i < 30 else "L")
                                               for i in range(40))])
    flags = ("--csv", table, "--label-columns", "y")
    with pytest.raises(SystemExit, match="20 of 50 images.*10 of them.*: named in rows.csv, "
                       "missing on disk, such as 30.png and 31.png"):
        folder(src, tmp_path / "out", *flags)
    # Rows that nobody wants are not missed, and a table may be of a part of the images.
    folder(src, tmp_path / "view", *flags, "--where", "view=PA", "--allow", "many-left-out")
    assert not {"30.png", "31.png"} & set(rejected(tmp_path / "view"))
    write_csv(table, [("path", "y"), *((f"{i:02d}.png", i % 2) for i in range(9))])
    folder(src, tmp_path / "part", *flags)
    assert len(read_manifest(tmp_path / "part").paths) == 9


def test_masks_are_left_out_or_allowed(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    for i in range(8):
        save(src / f"a/{i}.png", radiograph(i))
        save(src / f"b/{i}.png", np.kron(radiograph(i, 8, 8) > 128, np.ones((9, 9))) > 0)
    with pytest.raises(SystemExit, match="8 of 16 images would be left out, all of them.*a mask or "
                       "a drawing.*b/0.png and b/1.png; --allow masks takes the masks"):
        folder(src, out, "--layout", "none")
    folder(src, out, "--layout", "none", "--allow", "many-left-out")
    assert "as masks or drawings, by their few gray levels: 8" in (out / "DATA.md").read_text()
    folder(src, out, "--layout", "none", "--allow", "masks")
    assert len(read_manifest(out).paths) == 16
    # They are there now, and would stay.
    with pytest.raises(SystemExit, match="made with other flags.*allow"):
        folder(src, out, "--layout", "none")


def test_splits_are_doubted_by_what_was_found(tmp_path):
    for name in "ab":
        save(tmp_path / f"src/{name}.png", radiograph(ord(name)))
    (tmp_path / "src/junk.png").write_text("no image")
    with pytest.raises(SystemExit, match="the test split is empty"):
        folder(tmp_path / "src", tmp_path / "out")


def test_no_image_found_says_what_there_is(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/x.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(SystemExit, match="Files passed over: 1 .dcm; `prepare.py dicom` reads"):
        folder(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize("to, words", [("/dev/full", "No space left on device: standard output"),
                                       (None, "Broken pipe: standard output")])
def test_an_error_of_standard_output_is_not_blamed_on_out(tmp_path, to, words):
    for i in range(4):
        save(tmp_path / f"src/{i}.png", radiograph(i))
    read, write = os.pipe()
    os.close(read)
    with open(to or write, "w") as stream:
        process = subprocess.run([sys.executable, SCRIPT, "folder", "--src", tmp_path / "src",
                                  "--out", tmp_path / "out"], stdout=stream,
                                 stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1 and words in process.stderr
    assert "Exception ignored" not in process.stderr


def test_a_table_is_no_pipe_and_may_be_packed_under_any_name(tmp_path):
    for i in range(6):
        save(tmp_path / f"src/{i}.png", radiograph(i))
    rows = "path,y\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(6))
    os.mkfifo(tmp_path / "pipe")
    flags = ("--label-columns", "y", "--csv")
    with pytest.raises(SystemExit, match="pipe is no file, but a pipe or a device"):
        folder(tmp_path / "src", tmp_path / "out", *flags, tmp_path / "pipe")
    (tmp_path / "rows.csv").write_bytes(gzip.compress(rows.encode()))
    folder(tmp_path / "src", tmp_path / "out", "--overwrite", *flags, tmp_path / "rows.csv")
    assert read_manifest(tmp_path / "out").label_names == ["y"]


def test_a_bomb_is_not_decoded(tmp_path):
    """A PNG of a few bytes whose header claims 60,000 x 60,000 pixels."""
    save(tmp_path / "src/good.png")
    png = bytearray((tmp_path / "src/good.png").read_bytes())
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "src/bomb.png").write_bytes(png)
    folder(tmp_path / "src", tmp_path / "out")
    assert "3600000000 pixels" in rejected(tmp_path / "out")["bomb.png"]


def test_two_files_of_one_name(tmp_path):
    save(tmp_path / "src/a.png", radiograph(1, 32, 32))
    save(tmp_path / "src/a.jpg", radiograph(2, 32, 32), quality=95)
    folder(tmp_path / "src", tmp_path / "out")
    assert read_manifest(tmp_path / "out").paths == ["images/a.jpg.jpg", "images/a.png.jpg"]
    for seed, name in ((1, "a.png.jpg"), (2, "a.jpg.jpg")):
        with Image.open(tmp_path / "out/images" / name) as image:
            assert np.abs(np.asarray(image, float) - radiograph(seed, 32, 32)).mean() < 5


# --------------------------------------------------------------------------------------------------
# NIH ChestX-ray14 and CheXpert.

def nih(src, rows, train, test):
    """The files that come with the images of ChestX-ray14, of `rows` (image, findings, patient)."""
    src.mkdir(exist_ok=True)
    columns = ("Follow-up #,{},Patient Age,Patient Gender,View Position,"
               "OriginalImage[Width,Height],Spacing[x,y],")
    with open(src / "Data_Entry_2017.csv", "w") as file:
        file.write(f"Image Index,Finding Labels,{columns.format('Patient ID')}\n")
        for i, (image, findings, patient) in enumerate(rows):
            follow_up = image.rpartition("_")[2].removesuffix(".png")
            file.write(f"{image},{findings},{follow_up},{patient},57,M,{('PA', 'AP')[i % 2]},2682,"
                       "2749,0.14,0.14,\n")
    (src / "train_val_list.txt").write_text("\n".join(train))
    (src / "test_list.txt").write_text("\r\n".join(test))


def test_nih(tmp_path):
    src = tmp_path / "src"
    rows = [(f"{patient:08}_{i:03}.png", "Cardiomegaly|Emphysema" if i else "No Finding", patient)
            for patient in range(1, 21) for i in range(2)]
    rows += [("00000021_000.png", "Mass", 21), ("00000022_000.png", "Mass", 22)]
    # The last one is in no list.
    nih(src, rows, [row[0] for row in rows[:30]], [row[0] for row in rows[30:41]])
    for i, (image, _, _) in enumerate(rows):
        where = f"images_{i % 2 + 1:03}/images"
        save(src / where / image, radiograph(i))
    Image.fromarray(radiograph(0)).convert("RGBA").save(src / "images_001/images/00000001_000.png")
    (src / "images_001/images/00000021_000.png").unlink()
    save(src / "images_002/images/00000099_000.png")
    (src / "BBox_List_2017.csv").write_text("Image Index,Finding Label\n")
    run("nih", "--src", src, "--out", tmp_path / "out", "--workers", 2, "--val-fraction", 0.2)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.label_names == sources.NIH_FINDINGS and len(manifest.label_names) == 15
    assert Counter(manifest.splits.tolist()) == {"train": 24, "val": 6, "test": 10}
    in_test = manifest.patients[manifest.splits == "test"]
    assert set(in_test.tolist()) == set("16 17 18 19 20".split())
    findings = {image: set(findings.split("|")) for image, findings, _ in rows}
    for path, labels in labels_of(manifest).items():
        present = {name for name, value in labels.items() if value == 1}
        assert present == findings[Path(path).with_suffix(".png").name]
        assert set(labels.values()) == {0, 1}
    columns = manifest.paths, manifest.studies, manifest.view_positions
    for path, study, view in zip(*columns, strict=True):
        assert (study, view) == (("000", "PA"), ("001", "AP"))["_001" in path]
    assert rejected(tmp_path / "out") == {
        "00000021_000.png": "named in Data_Entry_2017.csv, missing on disk",
        "images_002/images/00000022_000.png": "neither in train_val_list.txt nor in test_list.txt",
        "images_002/images/00000099_000.png": "not in Data_Entry_2017.csv"}
    # A table without follow-up numbers and view positions.
    (src / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels,Patient ID\n" + "".join(
        f"{image},{findings},{patient}\n" for image, findings, patient in rows))
    run("nih", "--src", src, "--out", tmp_path / "short", "--workers", 2, "--val-fraction", 0.2)
    short = read_manifest(tmp_path / "short")
    assert short.paths == manifest.paths and short.studies is None and short.view_positions is None


@pytest.mark.parametrize("suffix", [".jpg", ".PNG"])
def test_nih_of_another_format(tmp_path, suffix):
    """As others hand it on, made smaller: the official lists hold all the same."""
    rows = [(f"{i:08}_000.png", "Mass" if i % 2 else "No Finding", i) for i in range(12)]
    nih(tmp_path / "src", rows, [row[0] for row in rows[:8]], [row[0] for row in rows[8:]])
    for i, (image, _, _) in enumerate(rows):
        save(tmp_path / "src/images_224" / Path(image).with_suffix(suffix), radiograph(i))
    run("nih", "--src", tmp_path / "src", "--out", tmp_path / "out", "--workers", 1)
    assert Counter(read_manifest(tmp_path / "out").splits.tolist()) == {
        "train": 7, "val": 1, "test": 4}


def test_nih_that_is_wrong(tmp_path):
    rows = [("1_0.png", "Mass", 1), ("2_0.png", "Hernia", 2)]

    def fails(match, train=("1_0.png",), test=("2_0.png",), rows=rows):
        nih(tmp_path / "src", rows, train, test)
        with pytest.raises(SystemExit, match=match):
            run("nih", "--src", tmp_path / "src", "--out", tmp_path / "out")

    fails(r"no image found in .*src; 2 files: named in Data_Entry_2017.csv, missing on disk")
    for image, _, _ in rows:
        save(tmp_path / "src/images" / image)
    fails("row 2, column Finding Labels: 'Masss'", rows=[("1_0.png", "Masss", 1)])
    fails("2_0.png is in both", train=("1_0.png", "2_0.png"))
    fails("patient 1 is in test and in train",
          rows=[("1_0.png", "Mass", 1), ("2_0.png", "Mass", 1)])
    (tmp_path / "src/test_list.txt").unlink()
    with pytest.raises(SystemExit, match="No such file.*test_list.txt"):
        run("nih", "--src", tmp_path / "src", "--out", tmp_path / "out")
    (tmp_path / "src/Data_Entry_2017.csv").rename(tmp_path / "src/Data_Entry_2017_v2020.csv")
    (tmp_path / "src/Data_Entry_2017.csv").write_text("Image,Labels\n")
    with pytest.raises(SystemExit, match="must hold one Data_Entry_2017.*csv, it holds 2"):
        run("nih", "--src", tmp_path / "src", "--out", tmp_path / "out")
    (tmp_path / "src/Data_Entry_2017_v2020.csv").unlink()
    (tmp_path / "src/test_list.txt").touch()
    with pytest.raises(SystemExit, match="one column 'Image Index', its header is 'Image,Labels'"):
        run("nih", "--src", tmp_path / "src", "--out", tmp_path / "out")


@pytest.mark.parametrize("patient", ["{}", "{:08}", "{}.0", "{:05}"])
def test_nih_patients_are_those_of_the_names(tmp_path, patient, capsys):
    """A patient's number is in the image's name, in whatever form a spreadsheet left it."""
    rows = [(f"{i // 2:08}_{i % 2:03}.png", "Edema|No Finding" if i == 5 else "Edema",
             patient.format(i // 2)) for i in range(2, 14)]
    for i, (image, _, _) in enumerate(rows):
        save(tmp_path / "src/images" / image, radiograph(i))
    command = ["nih", "--src", tmp_path / "src", "--out", tmp_path / "out", "--workers", 1]
    lists = [row[0] for row in rows[:8]], [row[0] for row in rows[8:]]
    nih(tmp_path / "src", rows, *lists)
    run(*command)
    assert "'No Finding' and have another label as well: 1, such as images/00000002_001.jpg." in (
        capsys.readouterr().out)
    # The column alone is in another order.
    nih(tmp_path / "src", [(*row[:2], patient.format(7 - i // 2)) for i, row in enumerate(rows)],
        *lists)
    with pytest.raises(SystemExit, match="Data_Entry_2017.csv, row 2, column Patient ID: '0*7(.0)?'"
                       ", and the name of 00000001_000.png says 00000001: .*folder --csv"):
        run(*command, "--overwrite")


def test_nih_of_full_size_parses_in_seconds(tmp_path):
    """As many rows and patients as the real one has; only the parsing, without images on disk."""
    rows = [(f"{i % 30805:08}_{i // 30805:03}.png", ("No Finding", "Mass|Nodule")[i % 2], i % 30805)
            for i in range(112120)]
    in_test = {image for image, _, patient in rows if patient % 4 == 0}
    nih(tmp_path / "src", rows, {image for image, _, _ in rows} - in_test, in_test)
    args = prepare.parse_args(["nih", "--src", str(tmp_path / "src"), "--out", "out"])
    start = time.process_time()
    source = sources.nih_items(args, [f"images/{image}" for image, _, _ in rows])
    prepare.assign_splits(source, args)
    assert time.process_time() - start < 20                        # about 2
    assert len(source.items) == 112120 and not source.rejected
    splits = {}
    for item in source.items:
        splits.setdefault(item.patient, set()).add(item.split)
    assert len(splits) == 30805 and all(len(split) == 1 for split in splits.values())
    assert {item.path for item in source.items if item.split == "test"} == {
        f"images/{image[:-4]}.jpg" for image in in_test}


def chexpert(src, part, rows):
    """train.csv or valid.csv of `rows` (path, view, the 14 cells)."""
    src.mkdir(exist_ok=True)
    with open(src / f"{part}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA",
                        *sources.CHEXPERT_OBSERVATIONS])
        table.writerows([path, "Female", 68, view, "AP" if view == "Frontal" else "", *cells]
                        for path, view, cells in rows)


def chexpert_path(part, patient, view, i=1):
    return f"CheXpert-v1.0-small/{part}/patient{patient:05}/study1/view{i}_{view.lower()}.jpg"


def test_chexpert(tmp_path, capsys):
    src = tmp_path / "CheXpert-v1.0-small"
    cells = ["1.0", "", "-1.0", "0.0", *[""] * 9, "1.0"]
    train = [(chexpert_path("train", patient, view), view, cells) for patient in range(1, 21)
             for view in ("Frontal", "Lateral")]
    valid = [(chexpert_path("valid", patient, "Frontal"), "Frontal", ["0.0"] * 14)
             for patient in (64541, 64542)]
    chexpert(src, "train", train + [(chexpert_path("train", 99, "Frontal"), "Frontal", cells)])
    chexpert(src, "valid", valid)
    for i, (path, _, _) in enumerate(train + valid):
        save(tmp_path / path, radiograph(i))
    save(src / "train/patient00007/study1/view9_frontal.jpg")
    run("chexpert", "--src", src, "--out", tmp_path / "out", "--workers", 2)
    manifest = read_manifest(tmp_path / "out")
    assert Counter(manifest.splits.tolist()) == {"train": 18, "val": 2, "test": 2}
    first = (tmp_path / "out/manifest.csv").read_text().splitlines()
    start = "images/train/patient00001/study1/view1_frontal.jpg,patient"
    row = next(line for line in first if line.startswith(start))
    assert row.split(",")[1] == "patient00001"
    assert row.split(",")[3:5] == ["study1", "AP"]
    assert row.split(",")[5:] == ["1", "", "-1", "0", *[""] * 9, "1"]
    in_test = manifest.patients[manifest.splits == "test"]
    assert set(in_test.tolist()) == {"patient64541", "patient64542"}
    assert "Lateral views left out: 20" in capsys.readouterr().out
    assert rejected(tmp_path / "out") == {
        "train/patient00099/study1/view1_frontal.jpg": "named in train.csv, missing on disk",
        "train/patient00007/study1/view9_frontal.jpg": "not in train.csv"}
    run("chexpert", "--src", src, "--out", tmp_path / "all", "--workers", 2, "--all-views")
    every = read_manifest(tmp_path / "all")
    assert len(every.paths) == 42 and every.label_names == sources.CHEXPERT_OBSERVATIONS
    assert Counter(every.view_positions.tolist()) == {"AP": 22, "Lateral": 20}
    # Both views of a patient are of one study, which every patient calls study1.
    assert sorted(Counter(study_numbers(every).tolist()).values()) == [1, 1, *[2] * 20]
    wrong = (chexpert_path("train", 1, "Frontal"), "Frontal", ["2.0", *cells[1:]])
    chexpert(src, "train", [wrong, *train[2:]])
    with pytest.raises(SystemExit, match="train.csv, row 2, column No Finding: '2.0' among"):
        run("chexpert", "--src", src, "--out", tmp_path / "wrong")


@pytest.mark.parametrize("above", ["", "/kaggle/input/CheXpert-v1.0-small/", "x/train/y/"])
def test_chexpert_under_another_folder(tmp_path, capsys, above):
    """Paths from another machine, and the test set that was published later."""
    for part, count in (("train", 6), ("valid", 2), ("test", 2)):
        paths = [f"{part}/patient{i:05}/study1/view1_frontal.jpg" for i in range(count)]
        rows = [(above + path, "Frontal", ["1.0"] * 14) for path in paths]
        chexpert(tmp_path / "src", part, rows)
        for i, path in enumerate(paths):
            save(tmp_path / "src" / path, radiograph(i))
    shutil.move(tmp_path / "src/valid/patient00000", tmp_path / "src/valid/patient10000")
    shutil.move(tmp_path / "src/valid/patient00001", tmp_path / "src/valid/patient10001")
    text = (tmp_path / "src/valid.csv").read_text()
    (tmp_path / "src/valid.csv").write_text(text.replace("patient0", "patient1"))
    run("chexpert", "--src", tmp_path / "src", "--out", tmp_path / "out", "--workers", 1)
    assert Counter(read_manifest(tmp_path / "out").splits.tolist()) == {
        "train": 5, "val": 1, "test": 2}
    assert "Images outside train and valid, which are not used: 2." in capsys.readouterr().out


def test_chexpert_of_full_size_parses_in_seconds(tmp_path):
    """The real one's 223,414 rows of 64,540 patients."""
    values, views = ["1.0", "0.0", "-1.0", ""], ("Frontal", "Lateral")
    train = [(chexpert_path("train", i % 64540, views[i % 7 == 0], i // 64540),
              views[i % 7 == 0], [values[(i + k) % 4] for k in range(14)]) for i in range(223414)]
    valid = [(chexpert_path("valid", 70000 + i, "Frontal"), "Frontal", ["0.0"] * 14)
             for i in range(234)]
    chexpert(tmp_path / "src", "train", train)
    chexpert(tmp_path / "src", "valid", valid)
    args = prepare.parse_args(["chexpert", "--src", str(tmp_path / "src"), "--out", "out"])
    files = [path.partition("/")[2] for path, _, _ in train + valid]
    start = time.process_time()
    source = sources.chexpert_items(args, files)
    prepare.assign_splits(source, args)
    assert time.process_time() - start < 40                        # about 4
    frontal = [row for row in train if row[1] == "Frontal"]
    assert len(source.items) == len(frontal) + 234 and not source.rejected
    for item, row in zip(source.items, frontal, strict=False):
        assert item.labels == tuple(cell.removesuffix(".0") for cell in row[2])
        assert item.source in row[0]
    assert sum(item.split == "test" for item in source.items) == 234


# --------------------------------------------------------------------------------------------------
# verify.

def test_verify(tmp_path, capsys):
    for i in range(12):
        split = "test" if i < 4 else "train"
        save(tmp_path / "src" / split / "A" / f"{i:02}.png", radiograph(i, 64, 64))
    folder(tmp_path / "src", tmp_path / "out", "--val-fraction", 0, "--size", 48)
    assert run("verify", tmp_path / "out", "--workers", 2) == 0
    assert "12 images: all good" in capsys.readouterr().out

    images = tmp_path / "out/images"
    (images / "train/A/05.jpg").unlink()
    (images / "train/A/06.jpg").write_bytes((images / "train/A/06.jpg").read_bytes()[:300])
    (images / "train/A/07.jpg").write_bytes((images / "test/A/01.jpg").read_bytes())
    Image.new("L", (48, 48), 90).save(images / "train/A/08.jpg")
    Image.fromarray(radiograph(50, 64, 64)).save(images / "train/A/09.jpg")
    Image.fromarray(radiograph(51, 48, 48)).convert("RGB").save(images / "train/A/10.jpg")
    before = (tmp_path / "out/manifest.csv").read_bytes()
    assert run("verify", tmp_path / "out", "--workers", 2) == 1
    out = capsys.readouterr().out
    for line in ("train/A/05.jpg: missing", "train/A/06.jpg: unreadable",
                 "train/A/07.jpg: duplicate of images/test/A/01.jpg: test leaks into train",
                 "train/A/08.jpg: blank",
                 "train/A/09.jpg: unexpected size or mode: 64 x 64 L",
                 "train/A/10.jpg: unexpected size or mode"):
        assert f"images/{line}" in out
    assert "12 images: 1 duplicate, 1 missing, 1 unreadable, 1 blank, 2 unexpected" in out.replace(
        "1 missing, 1 unreadable, 1 duplicate", "1 duplicate, 1 missing, 1 unreadable")
    assert (tmp_path / "out/manifest.csv").read_bytes() == before

    assert run("verify", tmp_path / "out", "--drop") == 0
    manifest = read_manifest(tmp_path / "out")
    assert [Path(path).stem for path in manifest.paths] == ["00", "01", "02", "03", "04", "11"]
    assert (tmp_path / "out/manifest.1.csv").read_bytes() == before
    assert "left 6 images of 12" in (tmp_path / "out/DATA.md").read_text()
    assert run("verify", tmp_path / "out") == 0
    (images / "test/A/00.jpg").unlink()
    assert run("verify", tmp_path / "out", "--drop") == 0
    assert (tmp_path / "out/manifest.2.csv").exists()
    with pytest.raises(SystemExit, match="nowhere/manifest.csv"):
        run("verify", tmp_path / "nowhere")


def test_verify_waits_for_no_pipe_and_needs_no_settings(tmp_path, capsys):
    for i in range(12):
        save(tmp_path / "src" / "AB"[i % 2] / f"{i}.png", radiograph(i))
    folder(tmp_path / "src", tmp_path / "out")
    for settings in ("{}", '{"size": "large"}'):
        (tmp_path / "out/prepare.json").write_text(settings)
        assert run("verify", tmp_path / "out", "--workers", 1) == 0
    # All images of test are gone, one of them is a pipe.
    table = (tmp_path / "out/manifest.csv").read_text().splitlines()
    for line in (line for line in table if ",test," in line):
        (tmp_path / "out" / line.split(",")[0]).unlink()
    os.mkfifo(tmp_path / "out" / line.split(",")[0])
    capsys.readouterr()
    assert run("verify", tmp_path / "out", "--workers", 1, "--drop") == 0
    text = capsys.readouterr().out
    assert "a named pipe" in text and "The test split is empty now." in text


def test_verify_looks_at_the_manifest_too(tmp_path):
    save(tmp_path / "src/A/a.png")
    save(tmp_path / "src/A/b.png", radiograph(1))
    folder(tmp_path / "src", tmp_path / "out", "--layout", "class")
    file = tmp_path / "out/manifest.csv"
    file.write_text(file.read_text().replace(",1\n", ",7\n"))
    with pytest.raises(SystemExit, match="column A: '7' is none of 1, 0, -1 or empty"):
        run("verify", tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# Runs that are interrupted, repeated, or cannot write.

def many(tmp_path, count, side):
    for i in range(count):
        save(tmp_path / "src/A" / f"{i:03}.png", radiograph(i, side, side), compress_level=1)
    return [sys.executable, str(SCRIPT), "folder", "--src", str(tmp_path / "src"),
            "--workers", "2", "--size", "64"]


def contents(out):
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*"))
            if file.is_file() and file.name not in ("DATA.md", ".lock")}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(tmp_path, sign, capsys):
    command = many(tmp_path, 120, 500)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while len(list(tmp_path.glob("out/images/A/*.jpg"))) < 10:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(sign)
    error = process.communicate()[1]
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[sign]
    assert sign == signal.SIGKILL or "interrupted; the same command goes on" in error
    assert not (tmp_path / "out/manifest.csv").exists()
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("out/images/A/*.jpg")}
    assert 10 <= len(before) < 120
    assert run(*command[2:], "--out", tmp_path / "out") == 0
    assert f"{len(before)} of 120 images are there already" in capsys.readouterr().out
    after = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("out/images/A/*.jpg")}
    assert before.items() <= after.items()                          # not decoded again
    assert run(*command[2:], "--out", tmp_path / "straight") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert len(read_manifest(tmp_path / "out").paths) == 120


def interrupted(command, moment):
    """Exit code and error output of a command that gets Ctrl-C once its bar `moment` shows.

    The terminal sends it to the workers, too."""
    process = subprocess.Popen([sys.executable, SCRIPT, *command, "--workers", "2"], text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    error = ""
    while moment not in error:
        assert process.poll() is None, error
        error += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)
    error += process.communicate(timeout=60)[1]
    return process.returncode, error


def links(first, count=3000):
    """The paths of a file and its further names in the same folder: many files in no time."""
    files = [first, *(first.with_name(f"{i}{first.suffix}") for i in range(1, count))]
    for file in files[1:]:
        os.link(first, file)
    return files


def test_ctrl_c_in_conversion_is_one_sentence(tmp_path):
    out = tmp_path / "out"
    save(tmp_path / "src/0.png", radiograph(0, 200, 200))
    links(tmp_path / "src/0.png")
    code, error = interrupted(["folder", "--src", tmp_path / "src", "--out", out], "folder -> ")
    sentence = f"prepare.py: interrupted; the same command goes on from what is in {out}\n"
    assert code == 130 and "Traceback" not in error, error
    assert error.endswith(sentence) and error.count("prepare.py:") == 1, error
    assert not (out / "manifest.csv").exists()


def test_ctrl_c_in_verify_is_one_sentence(tmp_path):
    save(tmp_path / "images/0.jpg", radiograph(0, 200, 200))
    rows = [(file.relative_to(tmp_path), i, "train")
            for i, file in enumerate(links(tmp_path / "images/0.jpg"))]
    write_csv(tmp_path / "manifest.csv", [("path", "patient", "split"), *rows])
    code, error = interrupted(["verify", tmp_path], "verify: ")
    assert code == 130 and "Traceback" not in error, error
    # Ctrl-C in the middle of drawing the bar leaves the cursor at its end.
    assert re.search(r"prepare\.py: interrupted[^\n]*\n\Z", error), error


def test_one_worker_needs_no_locks(tmp_path):
    """Where /dev/shm cannot be written, as in some containers."""
    if os.geteuid() or subprocess.call(["unshare", "--mount", "true"]):
        pytest.skip("only root can mount")
    for i in range(8):
        save(tmp_path / f"src/{'AB'[i % 2]}/{i}.png", radiograph(i))
    mount = "mount -t tmpfs -o ro none /dev/shm && exec \"$@\""
    command = ["unshare", "--mount", "bash", "-c", mount, "bash", sys.executable, SCRIPT, "folder",
               "--src", "src", "--out", "out", "--workers"]
    process = subprocess.run([*command, "2"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1
    assert "Read-only file system: /dev/shm, where " in process.stderr
    assert process.stderr.endswith("; --workers 1 (of predict.py --threads 1) needs none\n")
    process = subprocess.run([*command, "1"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(read_manifest(tmp_path / "out").paths) == 8
    assert run("verify", tmp_path / "out", "--workers", 1) == 0


def test_a_run_loads_neither_pytorch_nor_dali(tmp_path):
    """They take seconds and most of a gigabyte, and prepare.py has no use for them."""
    code = """
import runpy, sys
script = sys.argv.pop(1)            # what is left is prepare.py's
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print(*sys.modules, file=sys.stderr)
"""
    out = tmp_path / "out"
    flags = ["demo", "--out", out, "--patients", "3", "--images-per-patient", "1", "--size", "32"]
    result = subprocess.run([sys.executable, "-c", code, SCRIPT, *flags], cwd=SCRIPT.parent,
                            capture_output=True, text=True)
    assert result.returncode == 0 and (out / "manifest.csv").exists(), result.stderr
    modules = result.stderr.splitlines()[-1].split()
    assert "prepare" not in modules and "radiograph" in modules
    assert not {"torch", "torchvision", "nvidia.dali"} & set(modules)


def test_other_settings_are_refused_and_named(tmp_path):
    save(tmp_path / "src/a.png", radiograph(0, 100, 100))
    folder(tmp_path / "src", tmp_path / "out")
    before = contents(tmp_path / "out")
    difference = r"--quality \(95 there, 50 here\), --seed \(0 there, 3 here\);.*--overwrite"
    with pytest.raises(SystemExit, match=difference):
        folder(tmp_path / "src", tmp_path / "out", "--quality", 50, "--seed", 3)
    assert contents(tmp_path / "out") == before
    folder(tmp_path / "src", tmp_path / "out", "--workers", 1)     # no setting of the data: goes on
    assert contents(tmp_path / "out") == before
    folder(tmp_path / "src", tmp_path / "out", "--quality", 50, "--overwrite")
    assert contents(tmp_path / "out")["images/a.jpg"] != before["images/a.jpg"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    save(tmp_path / "src/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("three years")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match="not empty and was not made by prepare.py"):
            folder(tmp_path / "src", tmp_path / "out", *flags)
    assert (tmp_path / "out/thesis.txt").read_text() == "three years"


def test_two_runs_at_once_are_refused(tmp_path):
    save(tmp_path / "src/a.png")
    with prepare.lock_folder(tmp_path / "out"):
        command = [sys.executable, SCRIPT, "folder",
                   "--src", tmp_path / "src", "--out", tmp_path / "out"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "out is being written by another run" in result.stderr
    assert folder(tmp_path / "src", tmp_path / "out") == 0


def pixels_of(file):
    with Image.open(file) as image:
        return np.asarray(image, float)


def test_a_file_that_is_another_now_is_made_again(tmp_path, capsys):
    """Its suffix changed, or its content: the picture and the label are its own."""
    for i in range(6):
        save(tmp_path / f"src/{i}.png", radiograph(i, 32, 32))
    src, out = tmp_path / "src", tmp_path / "out"
    write_csv(tmp_path / "rows.csv", [("path", "y"), *((f"{i}.png", i % 2) for i in range(6))])
    flags = "--csv", tmp_path / "rows.csv", "--label-columns", "y"
    folder(src, out, *flags)
    for interrupted_run in (False, True):
        if interrupted_run:
            (out / "manifest.csv").unlink()
        base = 20 if interrupted_run else 10
        (src / "0.png").unlink(missing_ok=True)
        save(src / "0.bmp", radiograph(base, 32, 32))
        save(src / "1.png", radiograph(base + 1, 32, 32))
        write_csv(tmp_path / "rows.csv", [("path", "y"), ("0.bmp", 1),
                                          *((f"{i}.png", i % 2) for i in range(1, 6))])
        capsys.readouterr()
        folder(src, out, *flags)
        assert "4 of 6 images are there already" in capsys.readouterr().out
        for i, seed in enumerate([base, base + 1, 2, 3, 4, 5]):
            assert np.abs(pixels_of(out / f"images/{i}.jpg") - radiograph(seed, 32, 32)).mean() < 5
        assert labels_of(read_manifest(out))["images/0.jpg"] == {"y": 1}
    # Without a record nothing is known of the images.
    (out / "sources.csv").write_text("path\n")
    folder(src, out, *flags)
    assert "are there already" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: content[:len(content) // 3],
    lambda content: content[:40], lambda content: b"", lambda content: bytes(len(content)),
    lambda content: content[:700] + bytes(120) + content[820:]])
@pytest.mark.parametrize("finished", [False, True])
def test_a_broken_image_of_an_earlier_run_is_made_again(tmp_path, capsys, damage, finished):
    """A power cut, or a copy that was not whole, may leave a part of it, or zeros."""
    src, out = tmp_path / "src", tmp_path / "out"
    for i in range(6):
        save(src / f"{i}.png", radiograph(i, 64, 64))
    folder(src, out)
    before = contents(out)
    broken = out / "images/3.jpg"
    broken.write_bytes(damage(broken.read_bytes()))
    if not finished:
        (out / "manifest.csv").unlink()
    folder(src, out)
    assert contents(out) == before and "5 of 6 images are there already" in capsys.readouterr().out


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "Cannot allocate memory"), (OSError(errno.ESTALE, "x"), "Stale file handle"),
    (OSError(errno.ETIMEDOUT, "x"), "Connection timed out")])
def test_a_machine_that_fails_rejects_no_image(tmp_path, monkeypatch, error, words):
    for i in range(4):
        save(tmp_path / f"src/{i}.png", radiograph(i))

    def fail(image, settings):
        raise error

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"{words} .once that is "
                                                       "over, the same command goes on.: .*.png"):
        patch.setattr(radiograph_module, "finish", fail)
        folder(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out/manifest.csv").exists()
    assert folder(tmp_path / "src", tmp_path / "out") == 0
    assert len(read_manifest(tmp_path / "out").paths) == 4


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file whose reading fails")
def test_a_disk_that_fails_rejects_and_drops_no_image(tmp_path):
    """The first byte of /proc/self/mem cannot be read: EIO, as of a broken disk."""
    for i in range(4):
        save(tmp_path / f"src/{i}.png", radiograph(i))
    folder(tmp_path / "src", tmp_path / "good")
    os.symlink("/proc/self/mem", tmp_path / "src/5.png")
    os.symlink("/proc/self/mem", tmp_path / "src/6.dcm")
    for source in ("folder", "dicom"):
        with pytest.raises(SystemExit, match="Input/output error .once that.*: .*src/[56]"):
            run(source, "--src", tmp_path / "src", "--out", tmp_path / source, "--workers", 1)
    image = tmp_path / "good/images/2.jpg"
    image.unlink()
    image.symlink_to("/proc/self/mem")
    before = (tmp_path / "good/manifest.csv").read_bytes()
    with pytest.raises(SystemExit, match="Input/output error .*images/2.jpg"):
        run("verify", tmp_path / "good", "--drop", "--workers", 1)
    assert (tmp_path / "good/manifest.csv").read_bytes() == before


def test_few_images_are_not_doubted_and_that_is_said(tmp_path, capsys):
    save(tmp_path / "src/a.png")
    folder(tmp_path / "src", tmp_path / "out")
    assert "Fewer than 3 images: empty splits and labels" in capsys.readouterr().out


def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    save(tmp_path / "src/a.png")
    message = "a worker process died.*same command goes on"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
        patch.setattr(radiograph_module, "finish",
                      lambda image, settings: os.kill(os.getpid(), signal.SIGKILL))
        folder(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out/manifest.csv").exists()
    assert folder(tmp_path / "src", tmp_path / "out") == 0


def test_full_disk(tmp_path):
    """A limit on the size of files stands in for it: writing fails in the workers, mid-run."""
    command = many(tmp_path, 12, 300) + ["--out", str(tmp_path / "out")]
    result = subprocess.run(
        [*command, "--size", "200"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert result.returncode == 1 and "prepare.py: File too large" in result.stderr, result.stderr
    assert not (tmp_path / "out/manifest.csv").exists() and not list(tmp_path.glob("out/**/*.tmp"))
    # With room again the same command goes on.
    assert run(*command[2:], "--size", 200) == 0
    assert len(read_manifest(tmp_path / "out").paths) == 12


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/sys"),
                    reason="root may write anywhere")
def test_target_that_cannot_be_written(tmp_path):
    save(tmp_path / "src/a.png")
    with pytest.raises(SystemExit, match="prepare.py: .*: /proc/sys/data"):
        folder(tmp_path / "src", "/proc/sys/data")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="prepare.py: .*file"):
        folder(tmp_path / "src", tmp_path / "file/out")


@pytest.mark.parametrize("flags, message", [
    (("--size", 8), "argument --size: 8 does not lie in 32 to 9999"),
    (("--quality", 0), "argument --quality: 0 does not lie in 1 to 100"),
    (("--workers", 0), "argument --workers: 0 does not lie in 1 to 999"),
    (("--max-megapixels", "nan"), "argument --max-megapixels: nan does not lie in 1 to 999"),
    (("--stretch", 99, 1), "two percentiles"),
    (("--val-fraction", 0.9), "leave something for train"),
    (("--sise", 64), "unrecognized arguments: --sise"),
    (("--enhance",), "unrecognized arguments: --enhance"),
    (("--label-columns", "y"), "columns of --csv")])
def test_flags_that_are_wrong(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        run("folder", "--src", tmp_path, "--out", tmp_path / "out", *flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_image_by_two_names_is_taken_once(tmp_path):
    """A link back to the source would put one radiograph under many names into all the splits."""
    for i in range(4):
        save(tmp_path / "src" / "class" / f"{i}.png", radiograph(i))
    (tmp_path / "src" / "class" / "loop").symlink_to(tmp_path / "src")
    folder(tmp_path / "src", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out").paths) == 4


def test_two_files_for_one_path_are_refused(tmp_path, capsys):
    for name in ("a.png", "a.jpg", "a.png.jpg"):
        save(tmp_path / "src" / "class" / name, radiograph())
    message = "two files of .* would both become images/class/a.png.jpg"
    with pytest.raises(SystemExit, match=message):
        folder(tmp_path / "src", tmp_path / "out")


def test_damaged_settings_and_empty_salt_are_told(tmp_path):
    save(tmp_path / "src" / "class" / "a.png", radiograph())
    folder(tmp_path / "src", tmp_path / "out")
    (tmp_path / "out" / "prepare.json").write_text('{"size": 25')
    with pytest.raises(SystemExit, match="prepare.json is damaged"):
        run("verify", str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="prepare.json is damaged"):
        folder(tmp_path / "src", tmp_path / "out")
    (tmp_path / "salt").touch()
    with pytest.raises(SystemExit, match="salt holds no secret"):
        run("dicom", "--src", tmp_path / "src", "--out", tmp_path / "other",
            "--salt", tmp_path / "salt")


def test_overwrite_deletes_nothing_behind_a_link(tmp_path):
    save(tmp_path / "src/a.png", radiograph(0, 100, 100))
    folder(tmp_path / "src", tmp_path / "out")
    (tmp_path / "out/images").rename(tmp_path / "elsewhere")
    (tmp_path / "out/images").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere/a.jpg").read_bytes()
    with pytest.raises(SystemExit, match="images is a link, behind which nothing is deleted"):
        folder(tmp_path / "src", tmp_path / "out", "--quality", 50, "--overwrite")
    assert (tmp_path / "elsewhere/a.jpg").read_bytes() == before
    assert (tmp_path / "out/manifest.csv").exists()


def test_no_manifest_and_no_archive_of_other_pictures(tmp_path):
    """A source that changed is told by neither, also where the run ends before the new ones."""
    src, out = tmp_path / "src", tmp_path / "out"
    for i in range(8):
        save(src / f"{'AB'[i % 2]}/{i}.png", radiograph(i, 32, 32))
    folder(src, out)
    run("pack", out)
    folder(src, out)                            # nothing has changed: both stay
    assert read_manifest(out).archive
    save(src / "A/0.png", radiograph(20, 32, 32))
    folder(src, out)
    assert not (out / "images.tar").exists()
    assert np.abs(pixels_of(out / "images/A/0.jpg") - radiograph(20, 32, 32)).mean() < 5
    for i in range(1, 8, 2):                    # all of a class: refused after the conversion
        (src / f"B/{i}.png").write_text("<html>")
    with pytest.raises(SystemExit, match="label 'A' is 1 for every image"):
        folder(src, out)
    assert not (out / "manifest.csv").exists()


@pytest.mark.parametrize("source, flag", [
    ("folder", "--path-column"), ("folder", "--patient-column"), ("folder", "--split-column"),
    ("dicom", "--key-column"), ("dicom", "--key")])
def test_flags_of_a_table_that_is_missing(tmp_path, capsys, source, flag):
    with pytest.raises(SystemExit):
        run(source, "--src", tmp_path, "--out", tmp_path / "out", flag, "PatientID")
    assert f"{flag} is about columns of --" in capsys.readouterr().err


def test_a_command_with_a_slash_as_a_value_goes_on(tmp_path):
    for i in range(6):
        save(tmp_path / f"src/{i}.png", radiograph(i))
    write_csv(tmp_path / "rows.csv",
              [("path", "y"), *((f"{i}.png", ("A/B", "B", "C/A")[i % 3]) for i in range(6))])
    for _ in range(2):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv",
               "--label-columns", "y", "--label-separator", "/")
    assert read_manifest(tmp_path / "out").label_names == ["A", "B", "C"]


@pytest.mark.parametrize("splits, words", [
    (("val", ""), "p0 is in no split and in val of .*: write the split of a patient into all"),
    (("val", "train"), r"p0 is in train and in val of .* \(--patients-per-split")])
def test_a_patient_in_two_splits_is_told_with_the_way_out(tmp_path, splits, words):
    rows = [(f"{i}.png", f"p{i // 2}", (*splits, "train", "train", "test", "test")[i])
            for i in range(6)]
    for i, row in enumerate(rows):
        save(tmp_path / "src" / row[0], radiograph(i))
    write_csv(tmp_path / "rows.csv", [("path", "patient", "split"), *rows])
    with pytest.raises(SystemExit, match=words):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv")


def test_chexpert_paths_without_a_study(tmp_path):
    cells = ["0.0"] * 14
    chexpert(tmp_path / "src", "train", [("train/a.jpg", "Frontal", cells)])
    chexpert(tmp_path / "src", "valid", [])
    save(tmp_path / "src/train/a.jpg")
    with pytest.raises(SystemExit, match="train.csv, row 2, column Path: 'train/a.jpg' is not tra"):
        run("chexpert", "--src", tmp_path / "src", "--out", tmp_path / "out")


def test_pack_makes_no_folder(tmp_path):
    with pytest.raises(SystemExit, match="nofolder is not a folder"):
        run("pack", tmp_path / "nofolder")
    assert not (tmp_path / "nofolder").exists()


def test_verify_drops_paths_with_blanks_around_them(tmp_path):
    save(tmp_path / "images/0.jpg", radiograph(0, 64, 64))
    rows = [("images/0.jpg", 0, "train"), (" images/1.jpg", 1, "train")]
    write_csv(tmp_path / "manifest.csv", [("path", "patient", "split"), *rows])
    assert run("verify", tmp_path, "--drop") == 0
    assert read_manifest(tmp_path).paths == ["images/0.jpg"]
