"""The data folder's contract and what stands beside it: errors in one sentence, files that are
whole, locks."""
import contextlib
import csv
import io
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from common import (
    DataError, ImageError, errors_in_one_sentence, lock, whole_file, write_csv, write_text)
from flags import differing_flags
from manifest import read_manifest
from manifest_csv import table_at_once, table_by_rows
from run_folder import rows_digest
from sampling import study_numbers


def edit(folder, row, column, value):
    rows = list(csv.reader(open(folder / "manifest.csv")))
    rows[row][column] = value
    with open(folder / "manifest.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)


def test_manifest_is_read(data):
    manifest = read_manifest(data)
    assert manifest.label_names == ["Effusion", "Mass"] and manifest.labels.shape == (60, 2)
    assert [len(manifest.images(split)) for split in ("train", "val", "test")] == [42, 9, 9]
    assert manifest.labels[:4, 0].tolist()[:3] == [1, 0, -1]
    assert math.isnan(manifest.labels[3 * 3, 0])


@pytest.mark.parametrize("row, column, value, message", [
    (0, 1, "person", r"row 1: column 2 must be 'patient'"),
    (0, 4, "Effusion", r"row 1: label column 'Effusion' is there twice"),
    (0, 3, "", r"row 1: label column '' is without a name"),
    (0, 4, "study", r"row 1: column 'study' is no label and must stand once, right after split"),
    (0, 4, "view", r"row 1: column 'view' is no label"),
    (5, 0, "images/000_0.jpg", r"row 6, column path: images/000_0.jpg is already in row 2"),
    (5, 0, "../secret.jpg", r"row 6, column path: '../secret.jpg' must be a path inside"),
    (5, 0, "/etc/secret.jpg", r"row 6, column path"),
    (5, 0, "images/none.jpg", r"row 6: images/none.jpg is missing on disk"),
    (5, 1, "", r"row 6, column patient: empty"),
    (5, 2, "training", r"row 6, column split: 'training' is none of train, val, test"),
    (5, 2, "test", r"row (6|7), column patient: p1 is in \w+ and in \w+"),
    (5, 3, "2", r"row 6, column Effusion: '2' is none of 1, 0, -1 or empty"),
    (5, 4, "yes", r"row 6, column Mass: 'yes'")])
def test_manifest_error_names_file_row_and_column(folder, row, column, value, message):
    edit(folder, row, column, value)
    with pytest.raises(DataError, match=r"manifest.csv, " + message):
        read_manifest(folder)


@pytest.mark.parametrize("text, message", [
    ("", "is empty"), ("path,patient,split\n", "lists no image"),
    ("path,patient\na,b\n", "row 1: column 3 must be 'split'"),
    ("path,patient,split,A\nx.jpg,p,train\n", "row 2: 3 cells where the header has 4")])
def test_manifest_that_is_no_table(folder, text, message):
    (folder / "manifest.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(folder)


CELLS = ["1", "0", "-1", "", "1.0", "0.0", "-1.0"]


def written(rng, path):
    """A table with one oddity at most, in one of the ways in which tables are written."""
    optional = [[], ["study"], ["view"], ["study", "view"], ["view", "study"]][
        rng.choice(5, p=[0.4, 0.19, 0.19, 0.19, 0.03])]
    labels = ("A", "b c", "Ä")[:rng.integers(4)]
    header = ["path", "patient", "split", *optional, *labels]
    rows = [[f"images/胸{i}.jpg", f"p{i // 2}", ("train", "val", "test")[i // 2 % 3],
             *rng.choice(["", "s1", "PA"], len(optional)), *rng.choice(CELLS, len(labels))]
            for i in range(rng.integers(1, 9))]
    odd = ["", " 1", "1 ", "2", "01", "-0", "1.00", "nan", "a,b", 'a"b', "a\nb", "a\rb", "..", "/a",
           "a..b", "./a", "images/胸0.jpg", "p0", "train", "x\0y", "\ufeff", "\x85", "٣"]
    line, column = rng.integers(len(rows)), rng.integers(len(header))
    change = rng.integers(5)
    if change == 0:
        rows[line][column] = rng.choice(odd)
    elif change == 1:
        header[column] = rng.choice([*odd, "A", "path", "study", "view"])
    elif change == 2:
        rows[line] = [rows[line][:column], [*rows[line], "1"], []][rng.integers(3)]
    text = io.StringIO()
    csv.writer(text, lineterminator=rng.choice(["\n", "\r\n", "\r"], p=[0.6, 0.3, 0.1])).writerows(
        [header, *rows])
    text = text.getvalue() + rng.choice(["", "\n", "x"], p=[0.8, 0.1, 0.1])
    text = text.removesuffix("\n") if rng.random() < 0.3 else text
    path.write_bytes(text.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"], p=[0.8, 0.1, 0.1])))


def test_both_ways_of_reading_a_table_agree(tmp_path):
    """The fast way gives what the other one gives, or leaves the table to it."""
    rng, file, fast, seen = np.random.default_rng(0), tmp_path / "manifest.csv", 0, set()
    for _ in range(2400):
        written(rng, file)
        at_once = table_at_once(file)
        if at_once is None:
            with contextlib.suppress(DataError):
                table_by_rows(file, tmp_path)
            continue
        fast += 1
        by_rows = table_by_rows(file, tmp_path)            # and does not refuse it
        assert (at_once.paths, at_once.label_names) == (by_rows.paths, by_rows.label_names)
        seen.add((at_once.studies is None, at_once.view_positions is None))
        for one, other in zip(at_once[1:4] + at_once[5:], by_rows[1:4] + by_rows[5:], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype and one.shape == other.shape
                np.testing.assert_array_equal(one, other)
    assert fast > 700 and len(seen) == 4


def test_studies_and_views(folder):
    """A study's name is a patient's own; of what is not known no two images share it."""
    lines = (folder / "manifest.csv").read_text().splitlines()
    before = read_manifest(folder)
    assert before.studies is None and before.view_positions is None
    with pytest.raises(DataError, match="manifest.csv has no column study"):
        study_numbers(before)
    cells = ["s1,PA", "s1,Lateral", "s2,", ",AP", ",", "s1,PA", *["s1,AP"] * 6]
    (folder / "manifest.csv").write_text("\n".join(
        line.replace(f",{line.split(',')[2]},", f",{line.split(',')[2]},{cell},", 1)
        for line, cell in zip(lines, ["study,view", *cells], strict=True)) + "\n")
    assert table_at_once(folder / "manifest.csv") is not None
    manifest = read_manifest(folder)
    assert [f"{a},{b}" for a, b in zip(manifest.studies, manifest.view_positions)] == cells
    assert manifest.label_names == before.label_names
    np.testing.assert_array_equal(manifest.labels, before.labels)
    assert rows_digest(manifest) != rows_digest(before)
    number = study_numbers(manifest).tolist()              # three images a patient
    assert len(set(number)) == 7 and number[0] == number[1]
    assert all(len(set(number[i:i + 3])) == 1 for i in (6, 9))


def test_sound_tables_take_the_fast_way(data):
    assert table_at_once(data / "manifest.csv") is not None


def test_missing_folder_and_missing_split(tmp_path, folder):
    with pytest.raises(DataError, match="nowhere is not a data folder"):
        read_manifest(tmp_path / "nowhere")
    for row in range(1, 13):
        edit(folder, row, 2, "train")
    with pytest.raises(DataError, match="manifest.csv has no image in the val split"):
        read_manifest(folder).images("val")


@pytest.mark.parametrize("name", ["a\rb", "a\r\nb", "a\nb", 'a"b', '"a"', "a,b", " a ", "\ufeff",
                                  "胸", "a\x85b", "'a'"])
def test_what_is_written_is_read_back(tmp_path, name):
    (tmp_path / f"{name}.jpg").touch()
    write_csv(tmp_path / "manifest.csv", [("path", "patient", "split", name),
                                          (f"{name}.jpg", name, "train", 1)])
    manifest = read_manifest(tmp_path)
    assert (manifest.paths, manifest.patients.tolist()) == ([f"{name}.jpg"], [name])
    assert manifest.label_names == [name] and manifest.labels.tolist() == [[1]]


@pytest.mark.parametrize("encoding, message", [
    ("utf-16", None), ("utf-8-sig", None), ("latin-1", "is empty or not a CSV file")])
def test_manifest_in_other_encodings(tmp_path, encoding, message):
    (tmp_path / "Ä.jpg").touch()
    (tmp_path / "manifest.csv").write_bytes("path,patient,split\nÄ.jpg,Ö,test\n".encode(encoding))
    if message:
        with pytest.raises(DataError, match=message):
            read_manifest(tmp_path)
    else:
        assert read_manifest(tmp_path).patients.tolist() == ["Ö"]


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "\ufeff\r\n"])
def test_an_empty_manifest_is_called_empty(tmp_path, content):
    (tmp_path / "manifest.csv").write_text(content, "utf-8")
    with pytest.raises(DataError, match="manifest.csv is empty$"):
        read_manifest(tmp_path)


# --------------------------------------------------------------------------------------------------

def test_a_file_is_whole_or_not_there(tmp_path):
    write_text(tmp_path / "a.txt", "old Ä")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old Ä"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_lock_excludes_others_until_the_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert lock(first) and not lock(second)
        first.close()
        assert lock(second)


def test_differing_flags_are_named_with_both_values():
    assert differing_flags({"seed": 0, "lr": 1.0}, {"seed": 0, "lr": 1.0}) == ""
    difference = differing_flags({"image_size": 64, "lr": 1}, {"image_size": 32, "clahe": True})
    assert difference == ("--clahe (not given there, True here), --image-size (64 there, 32 here), "
                          "--lr (1 there, not given here)")


@pytest.mark.parametrize("error, speaks, code", [
    (DataError("no"), True, "a.py: no"), (DataError("no"), False, 1),
    (ImageError("no"), False, "a.py: no"),
    (OSError(28, "No space left", "x"), True, "a.py: No space left: x"),
    (OSError(28, "No space left"), True, "a.py: No space left: out"),
    (OSError(28, "No space left"), False, "a.py: No space left: out"),
    (FloatingPointError("no"), True, "a.py: no"), (FloatingPointError("no"), False, 1),
    (KeyboardInterrupt(), True, 130)])
def test_errors_that_a_user_can_mend_end_in_one_sentence(error, speaks, code, capsys):
    with pytest.raises(SystemExit) as end, errors_in_one_sentence("a.py", "out", speaks):
        raise error
    assert end.value.code == code
    told = capsys.readouterr().err
    assert told.startswith("a.py: interrupted") if code == 130 else not told


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError), errors_in_one_sentence("a.py", "out"):
        raise ZeroDivisionError


def test_control_c_in_a_destructor_is_not_lost():
    """Python drops exceptions there, a KeyboardInterrupt too, and would go on as if nothing had
    happened."""
    script = """
import signal, time
from common import errors_in_one_sentence

class Object:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

with errors_in_one_sentence("a.py", "out"):
    item = Object()
    del item
    time.sleep(20)
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True,
                             capture_output=True, timeout=60)
    assert process.returncode == 130
    assert process.stderr.startswith("a.py: interrupted") and process.stderr.count("\n") == 1


def test_control_c_that_a_library_drops_while_it_is_loaded_is_not_lost(tmp_path):
    """Modules written in C do. It is answered when the script begins, and once."""
    script = f"""
import signal
import common
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
import prepare
prepare.main(["demo", "--out", {str(tmp_path / "demo")!r}])
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True,
                             capture_output=True, timeout=60)
    assert process.returncode == 130 and not (tmp_path / "demo").exists()
    assert process.stderr.endswith(": interrupted before it began\n")
    assert process.stderr.count("\n") == 1
