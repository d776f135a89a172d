"""Stage 0: what comes out of prepare.py, and what it does with what is wrong."""
import csv
import os
import resource
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
from dali_pipeline import read_manifest

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


# ----------------------------------------------------------------------------------------------------------------------
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
    assert "every image counts as a patient of its own" in card and "1 .txt" in card and "| train | 14 | 14 |" in card
    assert card in capsys.readouterr().out


def test_given_splits_stay_and_the_missing_one_is_carved_by_patient(tmp_path):
    rows = [("path", "patient", "split")]
    for i in range(60):
        path = f"{'test' if i < 12 else 'train'}/A/{i}.png"
        save(tmp_path / "src" / path, radiograph(i))
        rows.append((path, f"p{i // 3}", path.split("/")[0]))
    write_csv(tmp_path / "rows.csv", rows)
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv", "--val-fraction", 0.25)
    manifest = read_manifest(tmp_path / "out")         # which refuses a patient in two splits
    assert {p for p, s in zip(manifest.paths, manifest.splits, strict=True) if s == "test"} == {
        f"images/test/A/{i}.jpg" for i in range(12)}
    assert Counter(manifest.splits.tolist()) == {"train": 36, "val": 12, "test": 12}
    val = set(manifest.patients[manifest.splits == "val"])
    folder(tmp_path / "src", tmp_path / "again", "--csv", tmp_path / "rows.csv", "--val-fraction", 0.25)
    assert set(read_manifest(tmp_path / "again").patients[manifest.splits == "val"]) == val
    folder(tmp_path / "src", tmp_path / "seed1", "--csv", tmp_path / "rows.csv", "--val-fraction", 0.25, "--seed", 1)
    other = read_manifest(tmp_path / "seed1")
    assert set(other.patients[other.splits == "val"]) != val


def test_split_folders_under_other_names(tmp_path):
    for name in ("Training", "valid", "test", "extra"):
        save(tmp_path / "src" / name / "A/x.png", radiograph(len(name)))
    save(tmp_path / "src/loose.png")
    folder(tmp_path / "src", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert dict(zip(manifest.paths, manifest.splits.tolist(), strict=True)) == {
        "images/Training/A/x.jpg": "train", "images/valid/A/x.jpg": "val", "images/test/A/x.jpg": "test"}
    assert set(rejected(tmp_path / "out")) == {"extra/A/x.png", "loose.png"}        # never a class called `extra`


def test_patients_in_two_splits_are_an_error_or_restart(tmp_path):
    rows = [("path", "patient", "split"), ("a.png", 1, "train"), ("b.png", 1, "test"), ("c.png", 2, "train")]
    for i, row in enumerate(rows[1:]):
        save(tmp_path / "src" / row[0], radiograph(i))
    write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(SystemExit, match="patient 1 is in test and in train.*--patients-per-split"):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv")
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv", "--patients-per-split",
           "--val-fraction", 0)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.patients.tolist() == ["train-1", "test-1", "train-2"]


def test_csv_labels_of_both_kinds(tmp_path):
    rows = ["\ufeffpath, patient ,Edema,kind", "a.png,1,1,cold", "sub/b.png , 2,-1.0,hot", r"sub\c.png,3,,",
            "d.png,4,0.0,cold"]
    (tmp_path / "rows.csv").write_bytes("\r\n".join(rows).encode())
    for i, name in enumerate(("a.png", "sub/b.png", "sub/c.png", "d.png")):
        save(tmp_path / "src" / name, radiograph(i))
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv", "--label-columns", "Edema", "kind")
    text = (tmp_path / "out/manifest.csv").read_text().splitlines()
    assert text[0] == "path,patient,split,Edema,kind cold,kind hot"
    assert {line.split(",")[0]: line.split(",")[3:] for line in text[1:]} == {
        "images/a.jpg": ["1", "1", "0"], "images/sub/b.jpg": ["-1", "0", "1"],
        "images/sub/c.jpg": ["", "", ""], "images/d.jpg": ["0", "1", "0"]}


@pytest.mark.parametrize("rows, flags, message", [
    ([("file", "y"), ("a.png", 1)], (), r"rows.csv must have one column 'path', its header is 'file,y'"),
    ([("path", "y"), ("a.png", 1)], ("--label-columns", "z"), "one column 'z'"),
    ([("path", "y"), ("a.png", 1), ("b.png", "l")], ("--label-columns", "y"), "row 3, column y: 'l' among values of 1"),
    ([("path", "y"), ("a.png", 1), ("b.png",)], (), "row 3: 1 cells where the header has 2"),
    ([("path", "y"), ("a.png", 1), ("a.png", 0)], (), "row 3: a.png is already in row 2"),
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
    write_csv(tmp_path / "rows.csv", [("path", "y"), ("a.png", 1), ("gone.png", 0), ("../out.png", 0)])
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv", "--label-columns", "y")
    assert read_manifest(tmp_path / "out").paths == ["images/a.jpg"]
    missing = "named in rows.csv, missing on disk"
    assert rejected(tmp_path / "out") == {"extra.png": "not in rows.csv", "gone.png": missing, "../out.png": missing}


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


# ----------------------------------------------------------------------------------------------------------------------
# One image.

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_gray(tmp_path, mode):
    gray = Image.fromarray(radiograph(width=64, height=96))
    save(tmp_path / "src/reference.png", np.asarray(gray))
    file = tmp_path / "src" / ("x.tif" if mode == "CMYK" else "x.png")
    gray.convert("RGB" if mode == "CMYK" else "L").convert(mode).save(file)
    folder(tmp_path / "src", tmp_path / "out")
    with Image.open(tmp_path / "out/images/x.jpg") as image, Image.open(tmp_path / "out/images/reference.jpg") as plain:
        assert image.mode == "L" and image.size == (32, 48)
        difference = np.abs(np.asarray(image, float) - np.asarray(plain, float)).mean()
    assert difference < (30 if mode == "1" else 3)              # dithering


@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_deep_images_use_the_full_range(tmp_path, top):
    save(tmp_path / "src/x.png", (radiograph().astype(float) * top / 255).astype(np.uint16))
    folder(tmp_path / "src", tmp_path / "out")
    with Image.open(tmp_path / "out/images/x.jpg") as image:
        low, high = image.getextrema()
        levels = np.asarray(image, float)
    assert low < 10 and high > 245
    expected = np.asarray(Image.fromarray(radiograph()).resize(image.size, Image.Resampling.BICUBIC), float)
    assert np.corrcoef(levels.ravel(), expected.ravel())[0, 1] > 0.99


def test_size_and_aspect_and_quality(tmp_path):
    save(tmp_path / "src/wide.png", radiograph(1, 200, 100))
    save(tmp_path / "src/tall.jpg", radiograph(2, 400, 900), quality=95)
    save(tmp_path / "src/small.png", radiograph(3, 40, 36))
    run("folder", "--src", tmp_path / "src", "--out", tmp_path / "out", "--size", 50, "--workers", 1)
    sizes = {file.stem: Image.open(file).size for file in (tmp_path / "out/images").iterdir()}
    assert sizes == {"wide": (100, 50), "tall": (50, 112), "small": (40, 36)}        # not enlarged
    # Antialiased, and right: close to the mean over the pixels that each new one covers.
    boxes = np.asarray(Image.fromarray(radiograph(1, 200, 100)).reduce(2), float)
    assert np.abs(np.asarray(Image.open(tmp_path / "out/images/wide.jpg"), float) - boxes).mean() < 2
    run("folder", "--src", tmp_path / "src", "--out", tmp_path / "rough", "--size", 50, "--quality", 20)
    assert (tmp_path / "rough/images/wide.jpg").stat().st_size < (tmp_path / "out/images/wide.jpg").stat().st_size / 1.3


def test_nothing_of_the_source_but_its_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                # rotate by 90 degrees to see it upright
    exif[0x010E] = "Miller^John"
    save(tmp_path / "src/x.jpg", radiograph(0, 48, 40), exif=exif, comment=b"Miller^John", dpi=(300, 300))
    folder(tmp_path / "src", tmp_path / "out")
    assert b"Miller" not in (tmp_path / "out/images/x.jpg").read_bytes()
    with Image.open(tmp_path / "out/images/x.jpg") as image:
        assert image.size == (32, 38) and not image.getexif() and "dpi" not in image.info


def test_stretch_and_enhance(tmp_path):
    save(tmp_path / "src/x.png", (100 + radiograph(0, 64, 64) / 5).astype(np.uint8))            # levels 100 to 151
    folder(tmp_path / "src", tmp_path / "plain")
    folder(tmp_path / "src", tmp_path / "stretched", "--stretch", 1, 99)
    folder(tmp_path / "src", tmp_path / "enhanced", "--enhance")
    plain, stretched, enhanced = (np.asarray(Image.open(tmp_path / name / "images/x.jpg"), float)
                                  for name in ("plain", "stretched", "enhanced"))
    assert np.ptp(plain) < 60 and np.ptp(stretched) > 240
    assert np.corrcoef(plain.ravel(), stretched.ravel())[0, 1] > 0.99
    assert enhanced.std() > 1.2 * plain.std()


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
    Image.fromarray(radiograph()).save(src / "film.gif", save_all=True, append_images=[Image.fromarray(radiograph(1))])
    folder(src, tmp_path / "out", "--max-megapixels", 1.4)
    assert read_manifest(tmp_path / "out").paths == ["images/good.jpg"]
    reasons = rejected(tmp_path / "out")
    words = {"half.png": "truncated", "half.jpg": "truncated", "text.png": "cannot identify",
             "empty.png": "cannot identify", "bomb.png": "1500000 pixels",
             "black.png": "blank", "faint.png": "blank", "deepblack.png": "blank",
             "icon.png": "16 x 16", "film.gif": "2 frames"}
    assert reasons.keys() == words.keys()
    assert all(word in reasons[name] for name, word in words.items()), reasons
    assert not list(tmp_path.glob("out/**/*.tmp"))


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


# ----------------------------------------------------------------------------------------------------------------------
# Runs that are interrupted, repeated, or cannot write.

def many(tmp_path, count, side):
    for i in range(count):
        save(tmp_path / "src/A" / f"{i:03}.png", radiograph(i, side, side), compress_level=1)
    return [sys.executable, str(SCRIPT), "folder", "--src", str(tmp_path / "src"), "--workers", "2", "--size", "64"]


def contents(out):
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*"))
            if file.is_file() and file.name not in ("DATA.md", ".lock")}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(tmp_path, sign, capsys):
    command = many(tmp_path, 120, 500)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while len(list(tmp_path.glob("out/images/A/*.jpg"))) < 10:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(sign)
    error = process.communicate()[1]
    assert process.returncode != 0 and (sign == signal.SIGKILL or "interrupted; the same command goes on" in error)
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


def test_other_settings_are_refused_and_named(tmp_path):
    save(tmp_path / "src/a.png", radiograph(0, 100, 100))
    folder(tmp_path / "src", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"--quality 95 \(now 50\), --seed 0 \(now 3\).*--overwrite"):
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
    with prepare.lock(tmp_path / "out"):
        command = [sys.executable, SCRIPT, "folder", "--src", tmp_path / "src", "--out", tmp_path / "out"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "out is being written by another run" in result.stderr
    assert folder(tmp_path / "src", tmp_path / "out") == 0


def test_full_disk(tmp_path):
    """A limit on the size of files stands in for it: writing fails in the workers, in the middle of the run."""
    command = many(tmp_path, 12, 300) + ["--out", str(tmp_path / "out")]
    result = subprocess.run([*command, "--size", "200"], capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert result.returncode == 1 and "prepare.py: File too large" in result.stderr, result.stderr
    assert not (tmp_path / "out/manifest.csv").exists() and not list(tmp_path.glob("out/**/*.tmp"))
    assert run(*command[2:], "--size", 200) == 0                    # with room again the same command goes on
    assert len(read_manifest(tmp_path / "out").paths) == 12


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/sys"), reason="root may write anywhere")
def test_target_that_cannot_be_written(tmp_path):
    save(tmp_path / "src/a.png")
    with pytest.raises(SystemExit, match="prepare.py: .*: /proc/sys/data"):
        folder(tmp_path / "src", "/proc/sys/data")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="prepare.py: .*file"):
        folder(tmp_path / "src", tmp_path / "file/out")


@pytest.mark.parametrize("flags, message", [
    (("--size", 8), "--size must be"), (("--quality", 0), "--quality must be"), (("--workers", 0), "--workers must be"),
    (("--stretch", 99, 1), "two percentiles"), (("--val-fraction", 0.9), "leave something for train"),
    (("--sise", 64), "unrecognized arguments: --sise"), (("--label-columns", "y"), "columns of --csv")])
def test_flags_that_are_wrong(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        run("folder", "--src", tmp_path, "--out", tmp_path / "out", *flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
