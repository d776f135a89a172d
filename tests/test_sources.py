"""Stage 0's sources: what cells, folders and names mean, what is said of it, what is refused."""
import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest

import prepare
import folders
import sources
from common import DataError, read_text, write_csv
from doubts import patient_key
from layout import split_name
from manifest import read_manifest
from tables import majority_of, value_of
from test_prepare import SCRIPT, folder, labels_of, radiograph, rejected, run, save


def table(tmp_path, header, rows, name="rows.csv"):
    """A table of images, which are made, too: the first cell of each row is an image's path."""
    for i, row in enumerate(rows):
        save(tmp_path / "src" / row[0], radiograph(i))
    write_csv(tmp_path / name, [header, *rows])
    return ["--csv", tmp_path / name, "--allow", "constant-label"]


def column(tmp_path, cells, *flags, name="y"):
    """{label: its values in the images' order} of a column with these cells."""
    rows = [(f"{i:03}.png", cell) for i, cell in enumerate(cells)]
    by_csv = table(tmp_path, ("path", name), rows)
    labels = ["--label-columns", name] if "--class-columns" not in flags else []
    folder(tmp_path / "src", tmp_path / "out", *by_csv, *labels, *flags)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.paths == [f"images/{i:03}.jpg" for i in range(len(cells))]
    return {label: ["" if np.isnan(value) else int(value) for value in manifest.labels[:, i]]
            for i, label in enumerate(manifest.label_names)}


def tree(tmp_path, *files):
    """Images at these paths below src."""
    for i, file in enumerate(files):
        save(tmp_path / "src" / file, radiograph(i))
    return tmp_path / "src", tmp_path / "out"


def splits_of(out):
    manifest = read_manifest(out)
    return dict(zip(manifest.paths, manifest.splits.tolist()))


# --------------------------------------------------------------------------------------------------
# Cells.

@pytest.mark.parametrize("value, cells", [
    ("1", ["1", "1.0", "1.00", "+1", "1e0", "01", "Yes", "y", "TRUE", "T", "Positive", "pos",
           "Present", " yes ", "ja", "pos."]),
    ("0", ["0", "0.0", "0.00", "-0", "NO", "n", "False", "f", "negative", "Neg", "ABSENT"]),
    ("-1", ["-1", "-1.00", "\u22121", "\u20131", "uncertain", "U", "Maybe", "possible",
            "equivocal"]),
    ("", ["", "  ", "NaN", "None", "null", "N/A", "na", "-", "#N/A", "<NA>", "Not  mentioned",
          "?"]),
    (None, ["2", "0.5", "1.5e3", "yess", "Mass", "inf", "1,0", "0x1", "100%", "\u0661"])])
def test_what_a_cell_says(value, cells):
    assert {cell: value_of(cell) for cell in cells} == dict.fromkeys(cells, value)


@pytest.mark.parametrize("cells, expected", [
    (["Y", "N", "u", ""], {"y": [1, 0, -1, ""]}),
    (["TRUE", "FALSE", "True"], {"y": [1, 0, 1]}),
    (["1.00", "0.00", "-1.00", "nan"], {"y": [1, 0, -1, ""]}),
    (["positive", "Negative", "1", "n/a"], {"y": [1, 0, 1, ""]}),
    # Words, of which some are written in two ways, and some say nothing.
    (["Normal", "NORMAL", "normal", "Pneumonia", "PNEUMONIA", "Normal"],
     {"Normal": [1, 1, 1, 0, 0, 1], "PNEUMONIA": [0, 0, 0, 1, 1, 0]}),
    (["COVID-19", "nan", "Normal", "None", "covid 19", "N/A"],
     {"COVID-19": [1, "", 0, "", 1, ""], "Normal": [0, "", 1, "", 0, ""]}),
    # Lists of words.
    (["Mass|Nodule", "No Finding", "Nodule", "nan"],
     {"Mass": [1, 0, 0, ""], "No Finding": [0, 1, 0, ""], "Nodule": [1, 0, 1, ""]}),
    (["Mass; Nodule", "mass", ";"], {"Mass": [1, 1, ""], "Nodule": [1, 0, ""]}),
    (["['a', ' b', '']", '["B"]', "[]", "['a' \"b\"]"],
     {"a": [1, 0, "", 1], "b": [1, 1, "", 1]}),
    (["{a, b}", "[a]", "[b]"], {"a": [1, 1, 0], "b": [1, 0, 1]}),
    (["Nodule/Mass", "Other lesion", "Nodule/Mass"],
     {"Nodule/Mass": [1, 0, 1], "Other lesion": [0, 1, 0]})])
def test_columns_of_cells(tmp_path, cells, expected):
    assert column(tmp_path, cells) == expected


@pytest.mark.parametrize("cells, flags, expected", [
    (["a,b", "b", ""], ("--label-separator", ","), {"a": [1, 0, ""], "b": [1, 1, ""]}),
    (["a + b", "b", "a"], ("--label-separator", "+"), {"a": [1, 0, 1], "b": [1, 1, 0]}),
    (["a|b", "b", "b"], ("--label-separator", "none"), {"a|b": [1, 0, 0], "b": [0, 1, 1]}),
    (["0", "1", "2", "1", "0", "2"], ("--class-columns", "y"),
     {"y 0": [1, 0, 0, 0, 1, 0], "y 1": [0, 1, 0, 1, 0, 0], "y 2": [0, 0, 1, 0, 0, 1]}),
    (["no", "mild", "no", "mild"], ("--class-columns", "y"),
     {"y mild": [0, 1, 0, 1], "y no": [1, 0, 1, 0]})])
def test_columns_that_need_a_flag(tmp_path, cells, flags, expected):
    assert column(tmp_path, cells, *flags) == expected


GRADES = ["none", "mild", "severe", "None", "mild", "nan", "", "none"]


@pytest.mark.parametrize("flags, none", [
    (("--not-mentioned",), ["y nan", "y none"]),
    (("--not-mentioned", "-"), ["y nan", "y none"]), (("--not-mentioned", "NAN"), ["y none"]),
    (("--not-mentioned", "none", "nan"), [])])
def test_none_may_be_a_class_or_say_nothing(tmp_path, capsys, flags, none):
    with pytest.raises(SystemExit, match="row 2, column y: 'none' may be a class, or say that "
                                         "none is known: --not-mentioned is followed by"):
        column(tmp_path, GRADES, "--class-columns", "y")
    labels = column(tmp_path, GRADES, "--class-columns", "y", *flags, "--allow", "many-classes")
    assert sorted(labels) == sorted(["y mild", "y severe", *none] if none else ["mild", "severe"])
    if none:
        assert labels["y none"] == [1, 0, 0, 1, 0, 0 if "y nan" in labels else "", "", 1]
    assert " ".join(flags) in (tmp_path / "out/DATA.md").read_text()
    said = {0: "4 cells that say 'None', 'nan', 'none'.", 1: "1 cells that say 'nan'.", 2: ""}
    assert said[len(none)] in capsys.readouterr().out


def test_words_that_say_nothing_are_told(tmp_path, capsys):
    assert column(tmp_path, ["none", "Mass", "Cyst", "none"])["Mass"] == ["", 1, 0, ""]
    assert "Not mentioned in column y: 2 cells that say 'none'." in capsys.readouterr().out


@pytest.mark.parametrize("cells, message", [
    (["yes", "no", "ys"], "row 4, column y: 'ys' among values of 1, 0, -1 and blank, such as 'yes'"
                          "; --class-columns"),
    (["M", "F", "F"], "row 2, column y: 'M' among values"),
    (["0.93", "0.17", "0.5"], "row 2, column y: the number '0.93' is none of 1, 0, -1"),
    (["Mass, Nodule", "Mass", ""], "row 2, column y: 'Mass, Nodule' may be a list: --label-sep"),
    (["Mass", "Nodule + Mass", ""], r"row 3, column y: 'Nodule \+ Mass' may be a list"),
    (["Mass and Edema", "Edema and Cyst", ""], "row 2, column y: 'Mass and Edema' may be a list"),
    (["Mass Nodule", "Mass", "nodule"], "row 2, column y: 'Mass Nodule' may be a list"),
    (["a|b", "a;b", "a"], "row 3, column y: 'a;b' may be a list"),
    (["['a', b", "['a']", "c"], "may be a list"),
    (["['a' or 'b']", "['a']", "['b']"], r"row 2, column y: the list .* cannot be taken apart"),
    (["1|0|0", "0|1|0", "0|0|1"], r"row 2, column y: '1\|0\|0' seems to be a range, a date or oth"),
    (["one", "two", "three", "four", "five", "six"], "6 classes are more than 6 images can teach"),
    ([f"word {i}" for i in range(31)] * 2, None)])
def test_columns_that_are_refused(tmp_path, cells, message):
    if message is None:         # 31 classes of 62 images are two images for each
        assert len(column(tmp_path, cells)) == 31
        return
    with pytest.raises(SystemExit, match=message):
        column(tmp_path, cells)
    assert not (tmp_path / "out/manifest.csv").exists()


def test_a_column_of_reports_is_no_column_of_classes(tmp_path):
    """As many strings as PadChest's column has, whose labels would not fit into memory."""
    rows = [(f"{i}.png", f"report {i}") for i in range(30000)]
    write_csv(tmp_path / "rows.csv", [("path", "y"), *rows])
    flags = ["folder", "--src", ".", "--out", "out", "--csv", str(tmp_path / "rows.csv"),
             "--label-columns", "y"]
    for more in ([], ["--allow", "many-classes"]):
        args = prepare.parse_args([*flags, *more])
        with pytest.raises(DataError, match="30,000 classes .* 30,000 images"):
            folders.folder_items(args, [row[0] for row in rows])


def test_labels_that_differ_in_form_only(tmp_path):
    rows = [(f"{i}.png", i % 2, (i + 1) % 2) for i in range(6)]
    flags = table(tmp_path, ("path", "Lung Opacity", "lung_opacity"), rows)
    flags += ["--label-columns", "Lung Opacity", "lung_opacity"]
    with pytest.raises(SystemExit, match="'Lung Opacity' and 'lung_opacity' differ in form only.*"
                                         "--allow similar-labels"):
        folder(tmp_path / "src", tmp_path / "out", *flags)
    folder(tmp_path / "src", tmp_path / "out", *flags, "--allow", "similar-labels")


@pytest.mark.parametrize("cells, message", [
    ([1, 1, 1], "label 'y' is 1 for every image"), (["no", 0, "F"], "label 'y' is 0 for every"),
    (["", "nan", "-"], "label 'y' is not mentioned for any image")])
def test_a_label_that_is_the_same_for_all(tmp_path, cells, message):
    by_csv = table(tmp_path, ("path", "y"), [(f"{i}.png", cell) for i, cell in enumerate(cells)])
    with pytest.raises(SystemExit, match=f"{message}.*--allow constant-label"):
        folder(tmp_path / "src", tmp_path / "out", *by_csv[:2], "--label-columns", "y")
    folder(tmp_path / "src", tmp_path / "out", *by_csv, "--label-columns", "y")


# --------------------------------------------------------------------------------------------------
# Several rows an image.

def test_several_rows_an_image(tmp_path):
    """As VinBigData has them: three readers, each of whom may draw several boxes."""
    said = {"a": {"R1": ["Mass", "Mass"], "R2": ["Nodule"], "R3": ["Nodule", "Mass"]},
            "b": {"R1": ["No finding"], "R2": ["No finding"], "R3": ["Mass"]},
            "c": {"R1": ["Mass"], "R2": ["Nodule"]}, "d": {"R1": ["No finding"]}}
    rows = [(image, word, reader) for image, readers in said.items()
            for reader, words in readers.items() for word in words]
    for i, image in enumerate(said):
        save(tmp_path / "src/train" / f"{image}.png", radiograph(i))
    write_csv(tmp_path / "rows.csv", [("image_id", "class_name", "rad_id"), *rows])
    flags = ["--csv", tmp_path / "rows.csv", "--path-column", "image_id",
             "--label-columns", "class_name"]
    with pytest.raises(SystemExit, match="row 3, column image_id: a is already in row 2; --sev"):
        folder(tmp_path / "src", tmp_path / "out", *flags)

    def labels(out, *more):
        folder(tmp_path / "src", tmp_path / out, *flags, *more)
        manifest = read_manifest(tmp_path / out)
        assert manifest.label_names == ["Mass", "No finding", "Nodule"]
        return manifest.labels.astype(int).tolist()

    assert labels("any", "--several-rows", "any") == [[1, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 0]]
    readers = ["--several-rows", "majority", "--rater-column", "rad_id"]
    assert labels("majority", *readers) == [[1, 0, 1], [0, 1, 0], [-1, 0, -1],
                                             [0, 1, 0]]


def test_majority_of_values():
    """A blank cell is a reader who does not mention a finding, and no reader less."""
    assert majority_of([("1", "", "0", "", "1"), ("1", "1", "1", "", "1"),
                        ("0", "", "-1", "", "")]) == ("1", "", "-1", "", "1")
    assert majority_of([("1", "1"), ("", "0")]) == ("-1", "-1")


def test_rows_of_one_image_must_agree_in_the_patient(tmp_path):
    save(tmp_path / "src/a.png")
    write_csv(tmp_path / "rows.csv", [("path", "patient", "y"), ("a.png", 1, 1), ("a.png", 2, 1)])
    with pytest.raises(SystemExit, match="row 3, column patient: '2', but '1' in row 2 of the"):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv",
               "--label-columns", "y", "--several-rows", "any")


def test_rows_are_chosen_by_their_columns(tmp_path):
    """As PadChest has them: lateral views among the others, and lists in Python's own writing."""
    rows = [(f"{i % 3}/{i}.png", ("PA", "AP", "L", "")[i % 4], f'"[\'a\', \' b{i % 2}\']"', i // 2)
            for i in range(12)]
    for i, row in enumerate(rows):
        save(tmp_path / "src" / row[0], radiograph(i))
    lines = ["ImageID,Projection,Labels,PatientID",
             *(",".join(map(str, (row[0].split("/")[1], *row[1:]))) for row in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv", "--path-column",
           "ImageID", "--patient-column", "PatientID", "--label-columns", "Labels",
           "--where", "Projection=PA,AP", "--allow", "constant-label")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.label_names == ["a", "b0", "b1"] and len(manifest.paths) == 6
    assert rejected(tmp_path / "out")["2/2.png"] == "Projection is L in rows.csv"
    assert "--where Projection=PA,AP" in (tmp_path / "out/DATA.md").read_text()
    with pytest.raises(SystemExit, match="one column 'View'"):
        folder(tmp_path / "src", tmp_path / "view", "--csv", tmp_path / "rows.csv",
               "--path-column", "ImageID", "--where", "View=PA")


# --------------------------------------------------------------------------------------------------
# Folders.

@pytest.mark.parametrize("name, split", [
    ("Testing", "test"), ("TRAIN", "train"), ("validation_set", "val"), ("Train Data", "train"),
    ("testset", "test"), ("train2017", "train"), ("01_val", "val"), ("NORMAL", ""), ("tested", ""),
    ("contest", ""), ("", ""), ("data", "")])
def test_names_of_splits(name, split):
    assert split_name(name) == split


@pytest.mark.parametrize("pattern, layout", [
    ("archive/chest_xray/{split}/{name}/{i}.png", "*/*/split/class"),
    ("{split}/images/{name}/{i}.png", "split/*/class"),
    ("data/{name}/{split}/{i}.png", "*/class/split"),
    ("{Split}ing/{name}/{i}.png", "split/class")])
def test_layouts_are_recognised(tmp_path, capsys, pattern, layout):
    files = {pattern.format(split=split, Split=split.capitalize(), name=name, i=i): (split, name)
             for split in ("train", "test") for name in ("NORMAL", "TB") for i in range(4)}
    src, out = tree(tmp_path, *files)
    folder(src, out)
    manifest = read_manifest(out)
    assert f"Layout of the folders: {layout} (recognised)." in capsys.readouterr().out
    assert manifest.label_names == ["NORMAL", "TB"] and len(manifest.paths) == 16
    for path, split, row in zip(manifest.paths, manifest.splits, manifest.labels):
        own_split, name = files[path.removeprefix("images/").replace(".jpg", ".png")]
        assert (split == "test") == (own_split == "test")
        assert row.tolist() == [name == "NORMAL", name == "TB"]
    # What was recognised can be said as well.
    folder(src, tmp_path / "said", "--layout", layout)
    assert splits_of(tmp_path / "said") == splits_of(out)


@pytest.mark.parametrize("files", [
    ["all/{i}.png"], ["a/b/{i}.png"], ["train/A/{i}.png", "test/A/{i}.png"]])
def test_a_folder_that_holds_all_images_is_no_label(tmp_path, files):
    src, out = tree(tmp_path, *(file.format(i=i) for file in files for i in range(4)))
    folder(src, out)
    assert read_manifest(out).label_names == []


def test_class_folders_that_differ_in_case(tmp_path, capsys):
    src, out = tree(tmp_path, *(f"train/{name}/{i}.png" for name in ("NORMAL", "Lung_Opacity")
                                for i in range(3)),
                    *(f"test/{name}/{i}.png" for name in ("Normal", "lung opacity")
                      for i in range(2)))
    folder(src, out)
    assert read_manifest(out).label_names == ["Lung_Opacity", "NORMAL"]
    assert "Taken for one: 'Normal' as 'NORMAL', 'lung opacity'" in capsys.readouterr().out


@pytest.mark.parametrize("files, message, flags", [
    # Drawings among the images.
    (["COVID/images/{i}.png", "COVID/masks/{i}.png", "TB/images/{i}.png", "TB/masks/{i}.png"],
     "6 of the images, such as COVID/masks/0.png, seem to be masks.*--allow masks",
     ("--exclude", "masks")),
    (["A/{i}.png", "B/{i}.png", "A/{i}_mask.png"], "such as A/0_mask.png",
     ("--exclude", "*_mask*")),
    (["A/{i}.png", "B/{i}.png", "lungmasks/{i}.png", "ground-truth/{i}.png"],
     "6 of the images, such as ", ("--exclude", "lungmasks", "ground-truth")),
    (["A/{i}.png", "B/{i}.png", "Lung Segmentation/{i}.png"], "such as Lung Segmentation/0.png",
     ("--exclude", "Lung*")),
    # Folders that are portions or places.
    (["images_001/{i}.png", "images_002/{i}.png"],
     "images_001 does not look like a class.*--allow odd-classes", ("--layout", "*")),
    (["siteA/NORMAL/{i}.png", "siteA/TB/{i}.png", "siteB/NORMAL/{i}.png"],
     "NORMAL lies both below siteA and below siteB", ("--layout", "*/class")),
    (["siteA/train/TB/{i}.png", "siteB/train/TB/{i}.png"], "can be read in two ways",
     ("--layout", "*/split/class", "--allow", "constant-label")),
    # Folders beside those of the splits.
    (["train/A/{i}.png", "train/B/{i}.png", "Holdout/A/{i}.png"],
     "3 images in Holdout lie beside the split folders.*--allow other-folders",
     ("--exclude", "Holdout")),
    (["test/A/{i}.png", "test/B/{i}.png"], "the train split is empty", ("--layout", "*/class"))])
def test_layouts_that_are_doubted(tmp_path, files, message, flags):
    src, out = tree(tmp_path, *(file.format(i=i) for file in files for i in range(3)))
    with pytest.raises(SystemExit, match=message):
        folder(src, out)
    assert not (out / "prepare.json").exists()
    folder(src, out, *flags)
    manifest = read_manifest(out)
    left_out = ("mask", "Segm", "Hold", "truth")
    assert not any(word in path for path in manifest.paths for word in left_out)


@pytest.mark.parametrize("pattern, words", [
    ("B_or_so", "--exclude B_or_so passes nothing over: nothing below .*src is called so; "),
    ("flipped", "called so, but 'Flipped' is"), ("no-film", "called so, but 'no film' is"),
    ("no_*", "called so, but 'no film' is"), ("TB/flipped", "called so, but 'Flipped' is"),
    ("*.PNG", "called so, but '0.png' is"), ("../TB/Flipped", "called so, but 'Flipped' is"),
    ("{tmp}/TB/Flipped", "called so, but 'Flipped' is"), ("{src}", "nothing below .* is called so"),
    ("Flip[ped]", "--exclude Flip.ped. passes nothing over"),
    *((pattern, "") for pattern in (
        "Flipped", "./TB/Flipped", "TB//Flipped/", "{src}/TB/Flipped", "src/TB/Flipped",
        "./src/TB/Flip*", "src/../src/TB/Flipped", "other/TB/Flipped", "TB/Flip*"))])
def test_a_pattern_passes_something_over_or_is_refused(tmp_path, monkeypatch, pattern, words):
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in ("NORMAL", "TB", "TB/Flipped")
                                for i in range(4)), "no film/0.png", "no film/1.png")
    (tmp_path / "other").symlink_to("src")
    monkeypatch.chdir(tmp_path)
    pattern = pattern.format(src=src, tmp=tmp_path)
    others = ["no film", "__MACOSX", ".DS_Store", "*.gz"]
    (src / "__MACOSX").mkdir()
    (src / ".DS_Store").touch()
    with pytest.raises(SystemExit, match=words) if words else contextlib.nullcontext():
        folder("src", out, "--layout", "class/*", "--exclude", *others, pattern)
        assert len(read_manifest(out).paths) == 8
    if not words:               # the same in other words goes on
        folder(src, out, "--layout", "class/*", "--exclude", *others, pattern.rstrip("/") + "/")


def test_a_pattern_is_first_a_path_below_the_source(tmp_path, monkeypatch):
    """Kermany's archive has a folder of its own name in it, with the same images once more."""
    _, out = tree(tmp_path, *(f"{above}{name}/{i}.png" for above in ("", "src/")
                              for name in ("NORMAL", "TB") for i in range(4)),
                  *(f"A [{i}]/{j}.png" for i in range(2) for j in range(4)))
    monkeypatch.chdir(tmp_path)
    folder("src", out, "--exclude", "src/TB", "A [0]", "--allow", "odd-classes")
    paths = read_manifest(out).paths
    assert "images/TB/0.jpg" in paths and "images/src/NORMAL/0.jpg" in paths
    assert len(paths) == 16 and "images/A [1]/0.jpg" in paths


def test_each_layout_can_be_said(tmp_path):
    src, out = tree(tmp_path, *(f"{name}/p{patient}/{i}.png" for name in ("A", "B")
                                for patient in range(3) for i in range(2)))
    folder(src, out, "--layout", "class/patient")
    manifest = read_manifest(out)
    assert manifest.label_names == ["A", "B"] and set(manifest.patients) == {"p0", "p1", "p2"}
    folder(src, tmp_path / "none", "--layout", "none")
    assert read_manifest(tmp_path / "none").label_names == []
    with pytest.raises(SystemExit):
        folder(src, tmp_path / "wrong", "--layout", "klass")


# --------------------------------------------------------------------------------------------------
# Patients and splits.

@pytest.mark.parametrize("ids", [("7", "007"), ("7", "7.0"), ("P 07", "p7"), ("ab", "AB"),
                                 ("1_2", "1-2")])
def test_patients_that_differ_in_form_only(tmp_path, ids):
    rows = [(f"{i}.png", patient) for i, patient in enumerate([*ids, "8", "9", "10"])]
    by_csv = table(tmp_path, ("path", "patient"), rows)
    with pytest.raises(SystemExit, match=f"patients '{ids[0]}' and '{ids[1]}' differ in form only"
                                         ".*--allow similar-patients"):
        folder(tmp_path / "src", tmp_path / "out", *by_csv)
    folder(tmp_path / "src", tmp_path / "out", *by_csv, "--allow", "similar-patients")
    assert len(set(read_manifest(tmp_path / "out").patients)) == 5


def test_patients_that_differ():
    ids = ["7", "70", "1.10", "1.1", "1-10", "11-0", "P10", "P1", "a7", "7a", "0", "10"]
    assert len(set(map(patient_key, ids))) == len(ids)


@pytest.mark.parametrize("patient", ["nan", "None", "N/A"])
def test_a_patient_that_is_none(tmp_path, patient):
    by_csv = table(tmp_path, ("path", "patient"), [("a.png", "p1"), ("b.png", patient)])
    with pytest.raises(SystemExit, match=f"row 3, column patient: '{patient}' is no patient"):
        folder(tmp_path / "src", tmp_path / "out", *by_csv)


def test_splits_that_are_empty(tmp_path):
    by_csv = table(tmp_path, ("path", "patient"), [(f"{i}.png", "anonymous") for i in range(5)])
    message = "the val split is empty: 5 images of 1 patient; --val-fraction 0.*the test split"
    with pytest.raises(SystemExit, match=message):
        folder(tmp_path / "src", tmp_path / "out", *by_csv)
    assert not (tmp_path / "out/images").exists()
    folder(tmp_path / "src", tmp_path / "asked", *by_csv, "--val-fraction", 0,
           "--test-fraction", 0)
    folder(tmp_path / "src", tmp_path / "allowed", *by_csv, "--allow", "empty-split")
    assert set(splits_of(tmp_path / "asked").values()) == {"train"}


def test_a_split_whose_images_are_all_bad(tmp_path):
    src, out = tree(tmp_path, *(f"{split}/{name}/{i}.png" for split in ("train", "val", "test")
                                for name in ("A", "B") for i in range(2)))
    for file in (src / "test").rglob("*.png"):
        file.write_text("a page that asks to log in")
    with pytest.raises(SystemExit, match="the test split is empty"):
        folder(src, out)
    assert not (out / "manifest.csv").exists()


# --------------------------------------------------------------------------------------------------
# What is said before the work.

def test_what_was_understood_is_said_first(tmp_path):
    src, _ = tree(tmp_path, *(f"{name}/{i}.png" for name in ("NORMAL", "TB") for i in range(10)))
    result = subprocess.run(
        [sys.executable, SCRIPT, "folder", "--src", src, "--out", "out", "--size", "32"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"})
    said, _, _ = result.stdout.partition("folder -> out")
    assert result.returncode == 0 and "Layout of the folders: class (recognised)." in said
    assert "| images | 14 | 2 | 4 |" in said and "| NORMAL | " in said
    assert "NORMAL/0.png -> patient images/NORMAL/0.jpg, " in said and ": NORMAL 1\n" in said


# --------------------------------------------------------------------------------------------------
# Text.

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_tables_in_other_encodings(tmp_path, encoding):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(6)))
    rows = [f"{i}.png,{'Lungenentzündung' if i % 2 else 'gesund'}" for i in range(6)]
    text = "\r\n".join(["path,y", *rows])
    (tmp_path / "rows.csv").write_bytes(text.encode(encoding))
    flags = ["--csv", tmp_path / "rows.csv", "--label-columns", "y"]
    if encoding in ("utf-8", "utf-8-sig", "utf-16"):
        folder(src, out, *flags)
        assert read_manifest(out).label_names == ["Lungenentzündung", "gesund"]
        return
    with pytest.raises(SystemExit, match="rows.csv is not a CSV file in UTF-8|one column 'path'"):
        folder(src, out, *flags)


def test_a_table_with_an_open_quote_and_a_packed_one(tmp_path):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(6)))
    text = "path,y\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(6))
    (tmp_path / "rows.csv").write_text(text.replace("3.png,1", '3.png,"1'))
    with pytest.raises(SystemExit, match="rows.csv is not a CSV file.*unexpected end of data"):
        folder(src, out, "--csv", tmp_path / "rows.csv", "--label-columns", "y")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(text.encode()))
    folder(src, out, "--csv", tmp_path / "rows.csv.gz", "--label-columns", "y")
    assert read_manifest(out).labels[:, 0].tolist() == [0, 1] * 3
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(text.encode())[:-12])
    with pytest.raises(SystemExit, match="rows.csv.gz is not a CSV file"):
        folder(src, tmp_path / "half", "--csv", tmp_path / "rows.csv.gz", "--label-columns", "y")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_of_nih_in_other_encodings(tmp_path, encoding):
    src = tmp_path / "src"
    images = [f"{i:08}_000.png" for i in range(10)]
    for i, image in enumerate(images):
        save(src / "images" / image, radiograph(i))
    write_csv(src / "Data_Entry_2017.csv", [
        ("Image Index", "Finding Labels", "Patient ID"),
        *((image, "Mass" if i % 2 else "No Finding", i) for i, image in enumerate(images))])
    (src / "train_val_list.txt").write_bytes("\n".join(images[:7]).encode(encoding))
    (src / "test_list.txt").write_bytes("\r\n".join(images[7:]).encode(encoding))
    if encoding == "utf-16-le":         # without a mark
        with pytest.raises(SystemExit, match="train_val_list.txt is not text in UTF-8"):
            run("nih", "--src", src, "--out", tmp_path / "out", "--workers", 2)
        return
    run("nih", "--src", src, "--out", tmp_path / "out", "--workers", 2)
    splits = splits_of(tmp_path / "out")
    assert len(splits) == 10 and sum(split == "test" for split in splits.values()) == 3


@pytest.mark.parametrize("name", [
    "a\rb", "a\r\nb", "a\nb", 'a"b', '"a"', "a,b", " a ", "a'b", "\ufeffa", "a\u2028b", "a\x1cb",
    "Röntgen", "胸", "=1+1", "#a", "\\", "a\tb"])
def test_whatever_is_in_a_name_is_read_back(tmp_path, name):
    src, out = tree(tmp_path, *(f"{name}/{name}{i}.png" for i in range(3)),
                    *(f"other/{i}.png" for i in range(3)))
    folder(src, out)
    manifest = read_manifest(out)
    assert sorted(manifest.paths) == sorted(
        [f"images/{name}/{name}{i}.jpg" for i in range(3)]
        + [f"images/other/{i}.jpg" for i in range(3)])
    assert manifest.label_names == sorted([name, "other"])
    assert run("verify", out, "--workers", 2) == 0
    (out / manifest.paths[0]).unlink()
    assert run("verify", out, "--drop", "--workers", 2) == 0
    assert read_manifest(out).paths == manifest.paths[1:]


def test_names_in_latin_1(tmp_path):
    for i in range(6):
        name = b"Entz\xfcndung" if i % 2 else "胸".encode()
        save(tmp_path / "src" / os.fsdecode(name) / f"{i}.png", radiograph(i))
    (tmp_path / "src" / os.fsdecode(b"Befund M\xfcller.txt\xfc")).touch()
    for locale in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"},
                   {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        out = tmp_path / "-".join(locale)
        result = subprocess.run(
            [sys.executable, SCRIPT, "folder", "--src", tmp_path / "src", "--out", out],
            capture_output=True, env={"PATH": os.environ["PATH"]} | locale)
        assert result.returncode == 0, result.stderr
        assert read_manifest(out).label_names == ["Entz\ufffdndung", "胸"]
        (out / "DATA.md").read_text(encoding="utf-8")


def test_verify_drops_from_a_manifest_with_blank_lines(tmp_path):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(6)))
    folder(src, out)
    with open(out / "manifest.csv", "a") as file:
        file.write("\n\n")
    (out / "images/3.jpg").unlink()
    assert run("verify", out, "--drop", "--workers", 2) == 0
    assert len(read_manifest(out).paths) == 5


# --------------------------------------------------------------------------------------------------
# One file, several names.

def flags_of(tmp_path, paths):
    write_csv(tmp_path / "rows.csv", [("path", "y"), *((path, i % 2)
                                                       for i, path in enumerate(paths))])
    return ["--csv", tmp_path / "rows.csv", "--label-columns", "y"]


def labels_by_image(tmp_path, paths):
    """The label of each image, by its number, by a table that names it in this way."""
    folder(tmp_path / "src", tmp_path / "out", *flags_of(tmp_path, paths))
    assert rejected(tmp_path / "out") == {}
    return [labels["y"] for _, labels in sorted(labels_of(read_manifest(tmp_path / "out")).items())]


@pytest.mark.parametrize("link, target", [
    ("alpha", "zeta"), ("zeta/current", "."), ("a/b", "../c")])
def test_files_below_links_have_two_names(tmp_path, link, target):
    real = "c" if target == "../c" else "zeta"
    tree(tmp_path, *(f"{real}/{i}.png" for i in range(5)))
    (tmp_path / "src" / link).parent.mkdir(exist_ok=True)
    (tmp_path / "src" / link).symlink_to(target)
    assert labels_by_image(tmp_path, [f"{real}/{i}.png" for i in range(5)]) == [0, 1, 0, 1, 0]
    both = flags_of(tmp_path, [f"{real}/0.png", f"{link}/0.png"])
    with pytest.raises(SystemExit, match="rows 2 and 3: both name "):
        folder(tmp_path / "src", tmp_path / "both", *both)


@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_are_one_character_or_two(tmp_path, on_disk, in_table):
    names = [f"Röntgen/Müller{i}.png" for i in range(5)]
    tree(tmp_path, *(unicodedata.normalize(on_disk, name) for name in names))
    rows = [unicodedata.normalize(in_table, name) for name in names]
    assert labels_by_image(tmp_path, rows) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("row", ["{i}.png", "{i}", "{i}.PNG", "./{i}.dicom", "b/{i}.png",
                                 "/home/me/archive/a/b/{i}.png"])
def test_rows_by_file_names(tmp_path, capsys, row):
    tree(tmp_path, *(f"a/b/{i}.png" for i in range(5)))
    assert labels_by_image(tmp_path, [row.format(i=i) for i in range(5)]) == [0, 1, 0, 1, 0]
    assert "name files by their name" in capsys.readouterr().out


def test_rows_whose_file_is_not_sure(tmp_path):
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(3)))
    with pytest.raises(SystemExit, match="row 2: 0.png may be a/0.png or b/0.png"):
        folder(src, out, *flags_of(tmp_path, ["0.png", "1.png"]))
    with pytest.raises(SystemExit, match="no image found"):         # c/0.png is neither
        folder(src, out, *flags_of(tmp_path, ["c/0.png", "c/1.png"]))


# --------------------------------------------------------------------------------------------------
# A data folder names no machine.

def test_a_data_folder_can_be_moved(tmp_path, monkeypatch, capsys):
    src, out = tree(tmp_path / "here", *(f"{name}/{i}.png" for name in "ab" for i in range(5)))
    write_csv(tmp_path / "here/rows.csv", [("path",), *((f"a/{i}.png",) for i in range(5)),
                                           *((f"b/{i}.png",) for i in range(5))])
    folder(src, out, "--csv", tmp_path / "here/rows.csv")
    for name in ("DATA.md", "prepare.json", "manifest.csv", "rejected.csv"):
        assert str(tmp_path) not in (out / name).read_text() and "/home" not in name
    assert json.loads((out / "prepare.json").read_text())["src"] == "../src"
    assert "--out out --src src" in (out / "DATA.md").read_text()
    manifest = (out / "manifest.csv").read_bytes()
    # Moved together, renamed, and made again from within another folder.
    shutil.move(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there/out").rename(tmp_path / "there/renamed")
    monkeypatch.chdir(tmp_path / "there/src")
    capsys.readouterr()
    folder(".", "../renamed", "--csv", "../rows.csv")
    assert "10 of 10 images are there already" in capsys.readouterr().out
    assert (tmp_path / "there/renamed/manifest.csv").read_bytes() == manifest
    # Another source is another source.
    tree(tmp_path / "there/other", *(f"{name}/{i}.png" for name in "ab" for i in range(5)))
    with pytest.raises(SystemExit, match=r"--src \(../src there, ../other/src here\)"):
        folder("../other/src", "../renamed", "--csv", "../rows.csv")


# --------------------------------------------------------------------------------------------------
# MIMIC-CXR-JPG.

def mimic(src, rows, unlabelled=()):
    """MIMIC-CXR-JPG of rows (image, study, patient, split, view)."""
    for i, (image, study, patient, _, _) in enumerate(rows):
        save(src / f"files/p{patient[:2]}/p{patient}/s{study}/{image}.jpg", radiograph(i))
    version = "mimic-cxr-2.0.0"
    write_csv(src / f"{version}-split.csv", [
        ("dicom_id", "study_id", "subject_id", "split"),
        *((image, study, patient, split) for image, study, patient, split, _ in rows)])
    write_csv(src / f"{version}-metadata.csv", [
        ("dicom_id", "subject_id", "study_id", "ViewPosition"),
        *((image, patient, study, view) for image, study, patient, _, view in rows)])
    names = sorted(sources.CHEXPERT_OBSERVATIONS)
    studies = {study: patient for _, study, patient, _, _ in rows if study not in unlabelled}
    labels = [("subject_id", "study_id", *names),
              *((patient, study, "1.0", "0.0", "-1.0", *[""] * 11)
                for study, patient in studies.items())]
    text = "".join(",".join(row) + "\n" for row in labels)
    (src / f"{version}-chexpert.csv.gz").write_bytes(gzip.compress(text.encode()))


def test_mimic(tmp_path, capsys):
    src, out = tmp_path / "src", tmp_path / "out"
    rows = [(f"{i:04x}-view", f"5{i // 2:03}", f"1{i // 2:03}",
             {9: "validate", 8: "test"}.get(i // 2, "train"), "LATERAL" if i % 2 else "PA")
            for i in range(20)]
    mimic(src, rows, unlabelled={"5000"})
    run("mimic", "--src", src, "--out", out, "--workers", 2)
    manifest = read_manifest(out)
    assert Counter(manifest.splits.tolist()) == {"train": 8, "val": 1, "test": 1}
    assert set(manifest.patients) == {f"1{i:03}" for i in range(10)}
    names = sorted(sources.CHEXPERT_OBSERVATIONS)
    labels = labels_of(manifest)["images/files/p10/p1001/s5001/0002-view.jpg"]
    assert [labels[name] for name in names[:3]] == [1, 0, -1] and np.isnan(labels[names[3]])
    assert np.isnan(manifest.labels[0]).all()
    assert manifest.studies.tolist() == [row[1] for row in rows[::2]]
    assert set(manifest.view_positions) == {"PA"}
    said = capsys.readouterr().out
    assert "views left out: 10" in said and "chexpert.csv.gz: 1;" in said
    assert "metadata.csv: 0. Studies of mimic-cxr-2.0.0-chexpert.csv.gz without an image: 0" in said
    run("mimic", "--src", src, "--out", tmp_path / "all", "--workers", 2, "--all-views")
    assert len(read_manifest(tmp_path / "all").paths) == 20
    (src / "mimic-cxr-2.0.0-metadata.csv").unlink()
    with pytest.raises(SystemExit, match=r"must hold one mimic-cxr-\*-metadata.csv\*, it holds 0"):
        run("mimic", "--src", src, "--out", tmp_path / "none")


@pytest.mark.parametrize("table, column", [("chexpert.csv.gz", "study_id"),
                                           ("metadata.csv", "dicom_id")])
def test_mimic_tables_that_do_not_fit(tmp_path, capsys, table, column):
    """Ids as another program wrote them: of all rows they are refused, of some they are counted."""
    rows = [(f"i{i}", f"5{i:03}", f"1{i:03}", ("train", "validate", "test")[i % 3], "PA")
            for i in range(9)]
    mimic(tmp_path / "src", rows)
    file = tmp_path / f"src/mimic-cxr-2.0.0-{table}"
    packed = table.endswith("gz")
    text = (gzip.decompress if packed else bytes)(file.read_bytes()).decode()

    def write(text):
        file.write_bytes((gzip.compress if packed else bytes)(text.encode()))

    write(text.replace(",500", ",s500").replace("\ni", "\nI"))
    flags = ["mimic", "--src", tmp_path / "src", "--out", tmp_path / "out", "--workers", 1]
    with pytest.raises(SystemExit, match=f"{table}, column {column}: none of the 9 ids of the "
                                         "images is in it, such as .* of mimic-cxr-2.0.0-split"):
        run(*flags)
    write(text.replace(",5003", ",s5003").replace("\ni3", "\nI3"))
    run(*flags)
    said = capsys.readouterr().out
    assert ("without an image: 1." if packed else "metadata.csv: 1.") in said
    assert len(read_manifest(tmp_path / "out").paths) == (9 if packed else 8)


def test_text_that_is_none(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match="x.txt is not text in UTF-8"):
        read_text(tmp_path / "x.txt")


def test_where_looks_at_every_row_of_an_image(tmp_path):
    """Of two readers' rows the one's are taken, whichever comes first; a missing column is told."""
    for i in range(4):
        save(tmp_path / f"src/{i}.png", radiograph(i))
    (tmp_path / "rows.csv").write_text("path,rad,finding\n" + "".join(
        f"{i}.png,{rad},{finding}\n" for i in range(4)
        for rad, finding in [("R2", "Nodule"), ("R1", "Mass")][::1 if i % 2 else -1]))
    flags = ["--csv", tmp_path / "rows.csv", "--class-columns", "finding",
             "--several-rows", "any", "--allow", "constant-label", "empty-split"]
    folder(tmp_path / "src", tmp_path / "out", *flags, "--where", "rad=R1")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.label_names == ["Mass"] and (manifest.labels == 1).all()
    assert len(manifest.paths) == 4
    with pytest.raises(SystemExit, match="must have one column 'split'"):
        folder(tmp_path / "src", tmp_path / "other", *flags, "--where", "split=train")


@pytest.mark.parametrize("above, place", [("", "--src"), ("archive/", "archive")])
def test_images_directly_beside_the_split_folders_are_doubted(tmp_path, above, place):
    files = [f"{above}{split}/{name}/{i}.png" for split in ("train", "test")
             for name in ("A", "B") for i in range(2)]
    src, out = tree(tmp_path, *files, f"{above}1.png", f"{above}2.png")
    with pytest.raises(SystemExit, match=f"2 images directly in {place} lie beside the split"):
        folder(src, out, "--layout", "*/split/class" if above else "split/class")
    if not above:
        with pytest.raises(SystemExit, match="2 images directly in --src .*allow other-folders"):
            folder(src, out)


def test_paths_that_end_alike():
    """What is looked up by ends is what comparing each with each finds, in any mixture."""
    rng = np.random.default_rng(0)
    one, other = (["/".join(rng.choice(["a", "b", "ab"], rng.integers(1, 4)))
                   for _ in range(60)] for _ in range(2))
    found = sources.that_end_alike([*one, "/a/b"], dict(enumerate(other)))
    assert any(len(files) > 1 for files in found.values())
    for path, files in found.items():
        assert sorted(files) == [
            i for i, known in enumerate(other)
            if f"/{path}".endswith(f"/{known}") or f"/{known}".endswith(f"/{path}")]


def test_more_class_folders_than_fit_into_memory(tmp_path):
    save(tmp_path / "src/0/0.png")
    for i in range(1, 10_001):
        (tmp_path / f"src/{i}").mkdir()
        os.link(tmp_path / "src/0/0.png", tmp_path / f"src/{i}/0.png")
    with pytest.raises(SystemExit, match="10,001 class folders of 10,001 images are more than fit"):
        folder(tmp_path / "src", tmp_path / "out")


def test_many_class_folders_are_not_compared_until_they_are_allowed(tmp_path):
    names = ["Nodule", "Nodules", "Mass", "Edema", "Hernia", "Fibrosis", "Effusion"]
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for i in range(2) for name in names))
    (src / "Mass/0.png").unlink()
    for allow, doubt in (((), "many-classes"), (("--allow", "many-classes"), "similar-labels")):
        with pytest.raises(SystemExit, match=rf"if that is meant: --allow {doubt}\)"):
            folder(src, out, "--val-fraction", 0, "--test-fraction", 0, *allow)


def test_classes_beside_values_are_doubted_too(tmp_path):
    """A class that train lacks is one, whatever other column is named."""
    words = {"train": ["A", "B"], "test": ["A", "C"]}
    rows = [(f"{split}/{i}.png", words[split][i % 2], i // 2 % 2)
            for split in words for i in range(4)]
    flags = table(tmp_path, ("path", "dx", "Mass"), rows)
    for columns in (["dx"], ["dx", "Mass"]):
        with pytest.raises(SystemExit, match="class '(dx )?C' stands in test and not in train"):
            folder(tmp_path / "src", tmp_path / "out", *flags, "--label-columns", *columns)


def test_a_rater_without_a_name(tmp_path):
    """Two such rows may be of two readers."""
    save(tmp_path / "src/a.png")
    write_csv(tmp_path / "rows.csv",
              [("path", "y", "who"), ("a.png", 1, "R1"), ("a.png", 0, ""), ("a.png", 0, "")])
    with pytest.raises(SystemExit, match="rows.csv, row 3, column who: '' names no reader"):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv",
               "--label-columns", "y", "--several-rows", "majority", "--rater-column", "who")


def test_a_table_without_its_column_of_paths_names_the_flag(tmp_path):
    save(tmp_path / "src/a.png")
    write_csv(tmp_path / "rows.csv", [("image", "y"), ("a.png", 1)])
    with pytest.raises(SystemExit, match="one column 'path', .*'; --path-column names another"):
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv")
