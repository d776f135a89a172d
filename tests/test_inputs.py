"""Inputs from the field, a table for each kind: what comes in, and what becomes of it.

The table of docs/sources.md, "Inputs from the field", has the same kinds. What is expected is
either a label's values, or the words of the refusal.
"""
import contextlib
import csv
import gzip
import os
import re
import socket
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from checkpoint import FORMAT, save_checkpoint
from classifier import Classifier
from common import DataError, write_csv
from dicom import read_dicom
from doubts import same_pictures
from manifest import read_manifest
from model import build_encoder
from radiograph import ImageSettings, load_image, read_image
from sources import CHEXPERT_OBSERVATIONS
from test_dicom import EDGE, SCAN, write_dicom
from test_prepare import SCRIPT, folder, labels_of, radiograph, rejected, run, save
from test_sources import column, mimic, splits_of, tree

LEVELS = np.linspace(0, 1, 64 * 48).reshape(64, 48)         # dark above, bright below


@contextlib.contextmanager
def outcome(expected):
    """A block that is refused in words like `expected`, where that is text."""
    if isinstance(expected, str):
        with pytest.raises(SystemExit, match=expected):
            yield
    else:
        yield


# --------------------------------------------------------------------------------------------------
# A. Cells: values, words, lists.

TWO, MAY_BE_A_LIST = ["Mass", "Nodule"] * 2, "row 2, column y: .* may be a list"
LIST = {"Mass": [1, 1, 0], "Nodule": [1, 0, 1]}


@pytest.mark.parametrize("cells, expected", [
    (["Y", "N ", "y", "n"], {"y": [1, 0, 1, 0]}),
    (["TRUE ", "F", "true", " false"], {"y": [1, 0, 1, 0]}),
    (["Pos", "NEG", "equivocal", "#N/A"], {"y": [1, 0, -1, ""]}),
    (["\u00a01", "01", "0.", "+0", "-1.0"], {"y": [1, 1, 0, 0, -1]}),
    (['["Mass","Nodule"]', '["Mass"]', '["Nodule"]'], LIST),
    (["('Mass', 'Nodule')", "('Mass',)", "('Nodule',)"], LIST),
    (["'Mass'|'Nodule'", "'Mass'", "'Nodule'"], LIST),
    (["Mass||Nodule|", "Mass", "Nodule"], LIST),
    (["Effusion", "Pleural Effusion", "left Pleural Effusion"] * 2,
     {"Effusion": [1, 0, 0] * 2, "Pleural Effusion": [0, 1, 0] * 2,
      "left Pleural Effusion": [0, 0, 1] * 2}),
    *((cells * 2, MAY_BE_A_LIST) for cells in (
        ["Mass#Nodule", *TWO], ["Mass with Nodule", *TWO], ["Mass\uff1bNodule", *TWO],
        ["Mass\u3001Nodule", *TWO], ["Mass - Nodule", *TWO], ["a~b", "b~c", "c~a"],
        ["{'Mass', 'Nodule'}", "set()", *TWO])),
    *((cells * 2, "row [234], column y: .* may be a list") for cells in (
        ["Mass - Nodule", "Infiltrate - Edema", "Edema - Effusion", "Normal"], ["A B", "B C"],
        ["Mass-Nodule", "Nodule-Edema", "Mass"], ["Mass_Nodule", "Nodule_Edema"])),
    *((cells * 2, "may be a list") for cells in (
        ["MassNodule", *TWO], ["massnodule", "Mass", "NODULE"], ["TB-HIV", "TB", "HIV"])),
    *((cells * 2, "labels .* and .* differ in form only") for cells in (
        ["MassNodule", "Mass Nodule", "Edema"], ["Mass.Nodule", "Mass-Nodule", "Edema"],
        ["\u00e9panchement", "epanchement", "normal"])),
    *((cells * 2, {one: [1, 0] * 2, other: [0, 1] * 2}) for cells, one, other in (
        (["Stage 1", "1 stage"], "Stage 1", "1 stage"), (["non", "covid"], "y non", "y covid"),
        (["Grade 1.5", "Grade 15"], "Grade 1.5", "Grade 15"), (["TB+", "TB"], "TB+", "TB"))),
    (["non", "oui", "Non", ""], {"y": [0, 1, 0, ""]}),
    # What is no class: ranges, dates, files, HTML, numbers beside findings.
    *((cells * 3, f"{re.escape(cells[0])}' seems to be {what}.*--class-columns")
      for cells, what in (
        (["0-1", "2-3"], "a range"), (["<5", "5-10"], "a range"), (["[1 0]", "[0 1]"], "a range"),
        (["2020-01-31", "2020-02-01"], "a range, a date"),
        (["31-Jan-2020", "1-Feb-2020"], "a date"),
        (["A/1.png", "B/2.png"], "a file"), (["A &amp; B", "C"], "HTML"), (["A<br>B", "C"], "HTML"),
        (["Mass:0.9|Nodule:0.1", "Mass:0.2"], "a finding and its number"),
        (["Mass = 1", "Mass = 0"], "a finding and its number"))),
    *((cells * 2, {"y": values * 2}) for cells, values in (
        (["sí", "no", "si"], [1, 0, 1]), (["да", "нет", ""], [1, 0, ""]),
        (["'True'", '"False"', "1"], [1, 0, 1]), (["✓", "✗", "?"], [1, 0, ""]))),
    *((cells * 2, "may be a list") for cells in (
        ["1. Mass 2. Nodule", "1. Mass", "1. Nodule"], ["R91.8 J18.9", "J18.9", "Z00.0"])),
    (["left effusion", "right effusion", "effusion"] * 2, {
        "effusion": [0, 0, 1] * 2, "left effusion": [1, 0, 0] * 2,
        "right effusion": [0, 1, 0] * 2}),
    # Marks, letters, and words for nothing.
    (["+", "-", "", "\u2013"], {"y": [1, 0, "", 0]}), (["ja", "nein", "?"], {"y": [1, 0, ""]}),
    (["pos.", "neg.", "unknown"], {"y": [1, 0, ""]}), (["(+)", "(-)", ""], {"y": [1, 0, ""]}),
    (["N", "F", "T"], "row 3, column y: 'F' beside 'N', which are letters .* 'N' would be 0, 'F' 0;"
                      " --class-columns takes .* --allow mixed-letters"),
    (["y", "f", "t"], "'f' beside 'y'"), (["0%", "100%"], "the number '0%' is none of 1, 0, -1"),
    (["=1", "=0"], "the number '=1' is none of"),
    (["COVID\u201319", "COVID-19", "Normal", "Normal.", "Nor\u200bmal", "?", "COVID-19"],
     {"COVID-19": [1, 1, 0, 0, 0, "", 1], "Normal": [0, 0, 1, 1, 1, "", 0]}),
    (["1,0", "0,0", "1,0"], "row 2, column y: '1,0' may be a number with a decimal comma"),
    (["1", "-1,0", "0"], "row 3, column y: '-1,0' may be a number with a decimal comma"),
    (["0", "1", "9", "1"], "row 4, column y: '9' among values"),
    (["Present", "Absent", "Not present"], "row 4, column y: 'Not present' among values"),
    ([f"report {i}" for i in range(60)], "60 classes are more than 60 images can teach"),
    # Values and words for nothing in other languages, and as programs write them.
    *((cells, {"y": [1, 0, ""]}) for cells in (
        ["Checked", "Unchecked", ""], ["positiv", "negativ", "."], ["Verdadero", "FALSO", "--"],
        ["\u9633\u6027", "\u9634\u6027", "NaT"], ["\u2611", "\u2610", "not done"],
        ["'1", '="0"', "missing"], ["1", "0", "Not available"])),
    (["Mass", "Nodule", "nil", "...", "Not reported"], {
        "Mass": [1, 0, "", "", ""], "Nodule": [0, 1, "", "", ""]}),
    (['"Mass"', "Mass", "'Nodule'", '="Nodule"'], {"Mass": [1, 1, 0, 0], "Nodule": [0, 0, 1, 1]}),
    *((cells * 2, f"row 2, column y: .* seems to be {what}.*, and no class") for cells, what in (
        (["#VALUE!", "Mass"], "an error of a spreadsheet"), (["#DIV/0!", "1-2"], "an error of"),
        (["01-Feb", "02-Mar"], "a date"), (["Feb-20", "Mar-20"], "a date"),
        (["Mass\0", "Nodule"], "damaged by zero bytes"))),
    # A class that denies others is no list of them.
    (["No Lung Opacity / Not Normal", "Normal", "Lung Opacity"] * 2, {
        "Lung Opacity": [0, 0, 1] * 2, "No Lung Opacity / Not Normal": [1, 0, 0] * 2,
        "Normal": [0, 1, 0] * 2}),
    (["mass without nodule", "mass", "nodule"] * 2, {
        "mass": [0, 1, 0] * 2, "mass without nodule": [1, 0, 0] * 2, "nodule": [0, 0, 1] * 2}),
    *((cells * 2, MAY_BE_A_LIST) for cells in (
        ["Nodule no Mass", *TWO], ["mass not nodule", *TWO], ["Mass_no_Nodule", *TWO])),
    *((cells * 2, {cell: [int(cell == other) for other in cells] * 2 for cell in cells})
      for cells in (["No Mass no Nodule", "Mass", "Nodule"], ["Mass non-TB", "Mass", "TB"],
                    ["Mass no cyst", "Mass", "Normal"])),
    # NumPy's bytes.
    (["b'Mass'|b'Nodule'", "b'Mass'", 'b"Nodule"'], LIST),
    (["[b'Mass', b'Nodule']", "[b'Mass']", "[b'Nodule']"], LIST),
    (["b'Goitre'", "b'Goitre'", "b'Stent'", "b''"], {
        "Goitre": [1, 1, 0, ""], "Stent": [0, 0, 1, ""]}),
    (["b'1'", "b'0'", "b'1'", "b''"], {"y": [1, 0, 1, ""]}),
    (["b'N\\xc3\\xa3o'", "TB", "TB"], "row 2, column y: .* damaged by a wrong decoding"),
    # Values in whatever quotes and brackets, with the number that they mean, and in more languages.
    *((cells, {"y": [1, 0, 1]}) for cells in (
        ["Positive.", "Negative.", "yes"], ["\u00abja\u00bb", "\u201enein\u201c", "\u2018ja\u2019"],
        ["\ufefftrue", "fal\u2060se", "\u200e1"], ["1: present", "0: absent", "1 - Present"],
        ["1. Yes", "2. No", "1) yes"], ["present (1)", "absent (0)", "Y=1"],
        ["=WAHR()", "=FALSCH()", "=TRUE()"], ["[1]", "[0]", '["present"]'],
        ["(yes)", "{no}", "Yes"],
        ["present!", "absent*", "1;"], ["Found", "not found", "\u2705"],
        ["detected", "Not Detected", "1"], ["Igen", "Nem", "igen"], ["Da", "Ne", "da"],
        ["ya", "tidak", "1"], ["\u03bd\u03b1\u03b9", "\u03cc\u03c7\u03b9", "1"])),
    (["0=no", "1=yes", "9=missing"], {"y": [0, 1, ""]}),
    (["12 (f)", "13 (m)"] * 3, "row 2, column y: '12 .f.' seems to be a finding and its answer"),
    *((cells * 2, "row [23], column y: .* seems to be .*--class-columns") for cells in (
        ["1=no", "0=yes"], ["True (0)", "False (1)"])),
    *((cells * 3, "column y: .* may be yes and no in a language .*--class-columns")
      for cells in (["bai", "ez"], ["Po", "Jo"], ["\u0561\u0575\u0578", "\u0578\u0579"])),
    # In scripts without capitals, in capitals, and longer ones.
    *((cells, {"y": [1, 0, 1]}) for cells in (
        ["\uc608", "\uc544\ub2c8\uc694", "\uc608"], ["Vorhanden", "nicht vorhanden", "vorhanden"],
        ["Presenti", "Assenti", "presente"], ["Pr\u00e9sente", "Absente", "pr\u00e9sent"],
        ["MEVCUT", "YOK", "Var"], ["POZ\u0130T\u0130F", "NEGAT\u0130F", "1"],
        ["\u0628\u0644\u0647", "\u062e\u06cc\u0631", "1"],
        ["\u05e7\u05d9\u05d9\u05dd", "\u05dc\u05d0", "1"],
        ["\u0e21\u0e35", "\u0e44\u0e21\u0e48\u0e21\u0e35", "1"],
        ["\u0435\u0441\u0442\u044c",
         "\u041e\u0442\u0441\u0443\u0442\u0441\u0442\u0432\u0443\u0435\u0442", "1"],
        ["aanwezig", "Afwezig", "ja"], ["obecny", "nieobecny", "tak"],
        ["c\u00f3", "kh\u00f4ng", "1"])),
    *((cells * 3, "column y: .* may be yes and no in a language .*--class-columns")
      for cells in (
        ["BAI", "EZ"], ["\u0985\u09be\u099b\u09c7", "\u09a8\u09be"],
        ["\u0b86\u0bae\u0bcd", "\u0b87\u0bb2\u0bcd"],
        ["\u10f0\u10dd", "\u10d0\u10e0\u10d0"], ["IYO", "MAYA"],
        ["\u05d4\u05df", "\u05d0\u05d9\u05df"])),
    *((cells * 3, {cell: [int(cell == other) for other in cells] * 3 for cell in cells})
      for cells in (
        ["\u6b63\u5e38", "\u80ba\u708e"], ["\uacb0\ud575", "\uc815\uc0c1"],
        ["\u7570\u5e38", "\u6b63\u5e38"],
        ["\u0633\u0644", "\u0633\u0644\u064a\u0645"], ["COPD", "ILD"], ["HIV", "TB"],
        ["\u826f\u6027", "\u60aa\u6027"], ["COVID", "non-COVID"], ["No TB", "TB"])),
    (["", "bai", "ez"] * 3, "row 3, column y: 'bai' and 'ez' may be yes and no"),
    *((cells * 3, {one: [1, 0] * 3, other: [0, 1] * 3}) for cells in (
        ["TB", "COPD"], ["edema", "cyst"], ["left", "right"], ["Grade: A", "Grade: B"],
                    ["COVID-1", "COVID-2"], ["TB - active", "TB - latent"])
      for one, other in [cells]),
    # Labels that carry an answer, a number or a sign.
    *((cells * 3, f"row [234], column y: .* seems to be {what}.*--class-columns")
      for cells, what in (
        (["yes;no", "no;no", "yes;yes"], "a list of answers"),
        (["['True', 'False']", "['False', 'True']"], "a list of answers"),
        (["Edema (50%)|Cyst (1)", "Edema (.1)"], "a finding and its number"),
        (["[Edema=0]", "[Edema=1]"], "a finding and its number"),
        (["Edema: present, Cyst: absent", "Edema: absent"], "a finding and its answer"),
        (["Edema (positive)", "Edema (negative)"], "a finding and its answer"),
        (["Edema [0.2]", "Cyst [0.7]"], "a finding and its number"),
        (["Edema \u2192 1", "Edema \u2192 0"], "a finding and its number"),
        (["Edema - yes", "Edema - no"], "a finding and its answer"),
        (["Yes (CT)", "No (CT)"], "an answer and a remark"),
        (["absent: edema", "present: edema"], "an answer and a remark"),
        (["Edema|0.4", "Cyst|0.3"], "a list of answers"), (["TB", "*"], "a mark"),
        (["\u25cf", "\u25cb"], "a mark"), (["a) Edema; b) Cyst", "a) Cyst"], "a numbered list"),
        (["iv. Edema; ii. Cyst", "x"], "a numbered list"),
        (["1) Edema; 2) Cyst", "1) Cyst"], "a numbered list"),
        (["(1) Edema|(2) Cyst", "(1) Cyst"], "a numbered list"),
        (["TB+ HIV-", "TB- HIV-"], "findings and their signs"),
        (["edema +, cyst \u2212", "edema -, cyst +"], "findings and their signs"),
        *((cells, "findings and their answers") for cells in (
            ["Edema present|Cyst absent", "Edema absent|Cyst absent"],
            ["Edema-neg;Cyst-pos", "Cyst-pos"], ["Edema_1|Cyst_0", "Edema_0|Cyst_1"],
            ["Edema 0.25|Cyst 0.5", "TB"], ["Edema presente|Cyst ausente", "TB"],
            ["negative Edema|positive Cyst", "TB"], ["no Edema;no Cyst", "Edema"],
            ["Edema yes Cyst no", "Edema no Cyst yes"], ["Edema yes / Cyst no", "TB"],
            ["|".join(f"Edema {zone} yes" for zone in "abcdefghijk"), "Cyst"])))),
    *((cells * 2, "may be a list") for cells in (
        ["(Edema;Cyst)", "Edema", "Cyst"], ["{Edema|Cyst}", "Cyst"], ["[Edema]", "Edema|Cyst"],
        ["\u2022 Edema \u2022 Cyst", "\u2022 Edema"], ["#Edema #Cyst", "#Cyst"],
        ["'Edema' 'Cyst'", "'Edema'"], ["Edema\u2028Cyst", "Edema"],
        ["Edema*Cyst", "Edema", "Normal"], ["Edema \u2192 Cyst", "Cyst", "Normal"],
        ["Edema\u00b7Cyst", "Cyst", "x"],
        # Commas of other scripts, tabs, wide blanks, bars, where no part stands alone.
        *([f"Edema{mark}Cyst", f"Hernia{mark}TB", "Normal"] for mark in (
            "\u060c ", "\u061b", "\u055d ", "\t", "  ", "\u3000", "\n", " \u00a6 ", "\u30fb")))),
    *((cells * 2, {"Lung Edema": [1, 1, 0] * 2, "TB": [0, 0, 1] * 2}) for cells in (
        ["Lung  Edema", "Lung Edema", "TB"],)),
    *((cells * 2, {cell: [int(cell == other) for other in cells] * 2 for cell in cells})
      for cells in (["TB positive", "TB negative"], ["Mass/Nodule", "Normal"],
                    ["no Edema", "Cyst of rib 1"])),
    (["HIV positive|TB", "Rib 1|Rib 2", "TB|No finding"], {
        "HIV positive": [1, 0, 0], "No finding": [0, 0, 1], "Rib 1": [0, 1, 0],
        "Rib 2": [0, 1, 0], "TB": [1, 0, 1]}),
    *((cells * 2, {cell: [int(cell == other) for other in cells] * 2 for cell in cells})
      for cells in (["Crohn\u2019s", "Chagas\u2019s", "Normal"], ["TB 50%", "TB 70%", "TB"],
                    ["\u0938\u093e\u092e\u093e\u0928\u094d\u092f", "\u0938\u093e\u0930", "TB"])),
    # Words for nothing, and what a wrong decoding has left.
    *((["Mass", cell, "Nodule"], {"Mass": [1, "", 0], "Nodule": [0, "", 1]}) for cell in (
        "N.D", "not recorded", "No information", "n/r", "not  specified", "\\N", "n\u200ba",
        "Blank")),
    *((cells * 2, "row [23], column y: .* seems to be damaged by a wrong decoding") for cells in (
        ["\u00d6dem", "\ufffddem"], ["Neumon\ufffd\ufffda", "TB"],
        ["\u00c9panchement", "\u00c9p?nchement"], ["TB", "\\xe9panchement"],
        ["TB", "\u00d6dem\x92"], ["Normal", "\u00c3\u2013dem"],
        ["Normal", "\u00e9panchement".encode().decode("cp1252")],
        ["\u6b63\u5e38".encode().decode("latin-1"), "TB"])),
    (["\u00c9panchement \u201cA\u201d", "Normal", "\u00c3O"] * 2, {
        "Normal": [0, 1, 0] * 2, "\u00c3O": [0, 0, 1] * 2,
        "\u00c9panchement \u201cA\u201d": [1, 0, 0] * 2})])
def test_cells(tmp_path, cells, expected):
    with outcome(expected):
        assert column(tmp_path, cells) == expected


@pytest.mark.parametrize("doubted", [
    "suspected Edema", "Probable edema", "r/o Edema", "Edema (possible)", "likely_Edema",
    "Edema, questionable", "suspicious for Edema", "Verdacht auf Edema"])
def test_an_uncertain_finding_beside_the_finding_is_refused(tmp_path, doubted):
    """In a list the finding would be absent, and the doubt a class of its own."""
    cells = [f"TB;{doubted}", "TB;Edema", "Edema;Cyst", "Cyst"]
    with pytest.raises(SystemExit, match="row 2, column y: .*--class-columns takes"):
        column(tmp_path, cells)
    assert column(tmp_path, cells, "--class-columns", "y")["Edema"] == [0, 1, 1, 0]


@pytest.mark.parametrize("other", [
    "Edema Effect", "Suspected Hernia", "no Edema", "Unlikely Edema", "Pulmonary Edema"])
def test_findings_that_begin_alike_are_labels(tmp_path, other):
    found = column(tmp_path, [f"TB;{other}", "TB;Edema", "Edema;Cyst", "Cyst"])
    assert found[other] == [1, 0, 0, 0] and found["Edema"] == [0, 1, 1, 0]


@pytest.mark.parametrize("cells, flags, words", [
    (["Mass;Nodule", *TWO], ["--label-separator", ","], "'Mass;Nodule' may be a list"),
    (["Mass+Nodule", *TWO], ["--label-separator", "/"], "may be a list"),
    (["1", "1.0", "2"] * 3, ["--class-columns", "y"], "labels 'y 1' and 'y 1.0' differ in form"),
    (["A 2.0", "A 2", "B"] * 3, ["--class-columns", "y"], "'A 2' and 'A 2.0' differ in form"),
    *((["Mass", cell, "Cyst"], ["--class-columns", "y"], "row 3, .*--not-mentioned is followed")
      for cell in ("no answer", "N.R.", "not available."))])
def test_flags_that_do_not_fit_the_cells(tmp_path, cells, flags, words):
    with pytest.raises(SystemExit, match=words):
        column(tmp_path, cells, *flags)


@pytest.mark.parametrize("one, other, alike", [
    ("nodule", "Nodules", True), ("Pleural effusion", "pleural effusions", True),
    ("Mass", "Masses", True), ("Mass", "Mass.1", True), ("Pneumonia", "Pnuemonia", True),
    ("Tumor", "Tumour", True), ("Cardiomegaly", "Cardiomegely", True),
    ("Atelectasis", "Atelectases", True), ("Oedema", "Edema", True),
    ("Haemothorax", "Hemothorax", True), ("Pelvis", "Pelvic", False),
    ("Normal", "Abnormal", False), ("typical", "atypical", False), ("Grade I", "Grade II", False),
    ("Category A", "Category B", False), ("Stage 1", "Stage 2", False), ("mass", "mask", False),
    ("scoliosis", "sclerosis", False), ("virus", "viral", False), ("SARS", "SAR-1", False),
    ("class_1", "class_11", False), ("Spondylosis", "Spondylolysis", False),
    ("HER2+", "HER2-", False)])
def test_labels_that_are_hardly_apart(tmp_path, one, other, alike):
    cells, flags = [one, other, "TB"] * 2, ["--label-separator", "none"]
    with outcome(f"labels '{re.escape(min(one, other))}' and .* spelled almost alike: .*"
                 "--allow similar-labels" if alike else None):
        assert len(column(tmp_path, cells, *flags)) == 3
    if alike:
        folder(tmp_path / "src", tmp_path / "out", "--csv", tmp_path / "rows.csv", *flags,
               "--label-columns", "y", "--allow", "similar-labels")


@pytest.mark.parametrize("one, other, alike", [
    ("TB", "TB-", True), ("COVID-19", "COVID-19 -", True), ("Effusion", "Effusion?", True),
    ("Edema", "Edema*", True), ("*Edema*", "Edema", True), ("**Edema**", "Edema", True),
    ("#Edema", "Edema", True), ("* Edema", "Edema", True), ("COVID-19", "COVID-19*", True),
    ("Edema", "Edema (left)\u2020", False), ("Edema", "Edema\u2020", True), ("TB", "TB++", False),
    ("T1", "T2", False), ("<50 mm", ">50 mm", False), ("TB #1", "TB #2", False),
    ("TB 5*10", "TB 510", False)])
def test_a_mark_beside_a_label_is_no_form(tmp_path, one, other, alike):
    with outcome(f"labels '{re.escape(one)}' and '{re.escape(other)}' differ in form only.*"
                 "--allow similar-labels" if alike else None):
        assert column(tmp_path, [one, other, "Normal"] * 2)[one] == [1, 0, 0] * 2


def test_marks_alone_are_classes(tmp_path):
    for cells in (["*", "**", "***"], ["+", "-", "0"]):
        assert len(column(tmp_path, cells * 2, "--class-columns", "y", "--not-mentioned")) == 3


@pytest.mark.parametrize("cells", [
    ["Cyst;-Edema", "Edema", "Cyst"], ["Edema", "\u2212Edema", "Normal"], ["+Edema", "-Edema"],
    ["Cyst|\u2013 Edema", "Edema"], ["Cyst|\u00acEdema", "Edema"], ["(-) Edema|(+) Cyst", "Cyst"],
    ["['Cyst', '-Edema']", "['Edema']"], ["- Edema", "Edema", "Cyst"], ["!Edema", "Edema"]])
def test_a_sign_before_a_finding(tmp_path, cells):
    with pytest.raises(SystemExit, match="row [23], column y: .* seems to be a finding with its "
                                         "sign before it, and no class; --class-columns"):
        column(tmp_path, cells * 3)


def test_a_minus_before_a_class_keeps_it_apart(tmp_path):
    for i, cells in enumerate((["Edema|-Cyst", "Cyst", "Edema"], ["-Cyst", "Cyst", "Edema"])):
        flags = ["--class-columns", "y"]
        (tmp_path / str(i)).mkdir()
        with pytest.raises(SystemExit, match="labels '-Cyst' and 'Cyst' differ in form only"):
            column(tmp_path / str(i), cells * 3, *flags)
        labels = column(tmp_path / str(i), cells * 3, *flags, "--allow", "similar-labels")
        assert labels["-Cyst"][:3] == [1, 0, 0] and labels["Cyst"][:3] == [0, 1, 0]
    assert column(tmp_path, ["-1", "0", "1"] * 2, "--class-columns", "y") == {
        "y -1": [1, 0, 0] * 2, "y 0": [0, 1, 0] * 2, "y 1": [0, 0, 1] * 2}
    for name in ("-Cyst", "Cyst", "Edema"):
        for i in range(3):
            save(tmp_path / f"folders/{name}/{i}.png", radiograph(ord(name[0]) + i))
    with pytest.raises(SystemExit, match="labels '-Cyst' and 'Cyst' differ in form only"):
        folder(tmp_path / "folders", tmp_path / "more")


def test_answers_are_taken_for_classes_where_that_is_said(tmp_path):
    (tmp_path / "lists").mkdir()
    for cells in (["bai", "ez"], ["1=no", "0=yes"], ["TB+ HIV-", "TB- HIV-"], ["TB (1)", "TB (0)"]):
        labels = column(tmp_path, cells * 2, "--class-columns", "y")
        assert [labels[cell] for cell in cells] == [[1, 0] * 2, [0, 1] * 2]
    assert column(tmp_path / "lists", ["[A|B]", "A", "B"] * 2, "--label-separator", "|") == {
        "A": [1, 1, 0] * 2, "B": [1, 0, 1] * 2}


@pytest.mark.parametrize("one, other, refused", [
    ("l\u00f6ytyy,ei l\u00f6ydy", "ei l\u00f6ydy,l\u00f6ytyy", True),
    ("fundet,borte", "borte,fundet,?", True),
    ("fundet,borte,tvivl", "Borte,fundet", True), ("mild,severe", "severe,mild", False),
    ("left,right", "right,left", False), ("TB,Normal", "Normal,TB", False),
    ("COPD,TB", "TB,COPD", False), ("fundet,borte", "hjerte,borte", False)])
def test_two_words_of_several_columns(tmp_path, one, other, refused):
    one, other = one.split(",") * 6, other.split(",") * 6
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(12)))
    (tmp_path / "l.csv").write_text("path,A,B\n" + "".join(
        f"{i}.png,{one[i]},{other[i]}\n" for i in range(12)))
    flags = ["--csv", tmp_path / "l.csv"]
    with outcome("row [23], column A: .*, which stand in another column as well, may be yes and "
                 "no in .*--class-columns" if refused else None):
        folder(src, out, *flags, "--label-columns", "A", "B")
    folder(src, tmp_path / "more", *flags, "--class-columns", "A", "B", "--not-mentioned", "?")


@pytest.mark.parametrize("cell", ["Edema & cyst", "Edema/Cyst", "edema et kyste", "Edema + Cyst",
                                  "Edema without cyst"])
def test_a_cell_that_may_be_a_list_is_told(tmp_path, capsys, cell):
    assert column(tmp_path, [cell, "TB"] * 2)[cell] == [1, 0] * 2
    assert f"One class, and no list, is '{cell}': --label-sep" in capsys.readouterr().out


def test_a_column_named_twice(tmp_path, capsys):
    for flags in (["--label-columns", "y", "y"], ["--label-columns", "y", "--class-columns", "y"]):
        with pytest.raises(SystemExit):
            folder(tmp_path, tmp_path / "out", "--csv", tmp_path / "l.csv", *flags)
        assert "name y twice" in capsys.readouterr().err


def test_a_finding_and_none_at_once_are_told(tmp_path, capsys):
    column(tmp_path, ["Mass|No finding", "Mass", "No finding", "Nodule"] * 2)
    assert "Images that are 'No finding' and have another label as well: 2, such as images/000.jpg"\
        in capsys.readouterr().out


@pytest.mark.parametrize("columns, rows, expected", [
    ("covid", ["positive", "", "positive", ""], "label 'covid' is 1 for every image that mentions "
     "it and teaches nothing .2 are blank, which does not mean absent: write 0 for that"),
    ("Mass,Nodule", ["x,", ",x", "x,x", ","], "'Mass x' is 1 .* 'Nodule x' is 1 for every image"),
    ("y", ["1", "-1", "1", "-1"], "label 'y' is 1 for every image, or uncertain .-1, 2., and"),
    ("y", ["0", "", "u", "no"], "is 0 for every image that mentions it, or uncertain .-1, 1., and"),
    ("dx", ["N", "T", "N", "T"], "row 3, column dx: 'T' beside 'N'"),
    ("Mass,dx", ["+,Y", "-,N", "-,no", "-,N"],
     "Column Mass: + read as 1 (1), - as 0 (3).\n"
     "Column dx: N read as 0 (2), Y as 1 (1), no as 0 (1).")])
def test_blanks_and_marks_are_told(tmp_path, capsys, columns, rows, expected):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(4)))
    (tmp_path / "l.csv").write_text("\n".join(
        [f"path,{columns}", *(f"{i}.png,{row}" for i, row in enumerate(rows))]))
    told = expected.startswith("Column")
    with outcome(None if told else expected):
        folder(src, out, "--csv", tmp_path / "l.csv", "--label-columns", *columns.split(","))
    assert not told or expected in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# B. Layouts of folders, patients, splits.

@pytest.mark.parametrize("pattern, classes, expected", [
    ("{Split}/{name}/{i}.png", ("NORMAL", "TB"), "split/class"),
    ("a/b/c/1_{split}/{name}/{i}.png", ("NORMAL", "TB"), "*/*/*/split/class"),
    ("{split}_images/{name}/pngs/{i}.png", ("NORMAL", "TB"), "split/class"),
    ("{name}/{Split}/{i}.png", ("0", "1"), "class/split"),
    ("{name}/{i}_{set}.png", ("TB", "TB "), "label 'TB' is 1 for every image"),
    ("{name}/{set}{i}.png", ("images", "masks"), "seem to be masks.*images does not look like"),
    ("{name}/{set}{i}.png", ("TB", "TB/segmentations"), "seem to be masks"),
    ("TB/{set}{i}{name}.png", ("", "_seg"), "seem to be masks"),
    ("{name}/{set}{i}.png", ("TB", "gt"), "seem to be masks"),
    ("{split}/{name}/{i}_3rh5gt.png", ("TB", "x0roi1"), "split/class"),
    ("{name}/{set}{i}.png", ("00017", "00018"), "00017 does not look like a class"),
    ("{name}/{set}{i}.png", ("2020-01-31", "2020-02-01"), "does not look like a class"),
    ("{name}/{set}{i}.png", ("JPCLN001", "JPCLN002"), "does not look like a class"),
    ("{split}/{name}/{i}.png", ("TB", "unlabeled"), "unlabeled does not look like a class"),
    ("{split}/{name}/p{i}/a.png", ("NORMAL", "TB"), "split/class"),         # one image of each
    ("{name}/p1/{set}{i}.png", ("NORMAL", "TB"), "NORMAL/p1 seems to be of one patient, .*"
                                                   "--layout class/patient"),
    ("{name}/{set}{i}.png", ("NORMAL/pt01", "NORMAL/pt02", "TB/pt03", "TB/pt04"),
     "NORMAL/pt01 seems to be of one patient, .*--layout class/patient"),
    ("{name}/{set}{i}.png", ("NORMAL/Smith_John", "NORMAL/A17", "TB/Doe"), "seems to be of one"),
    ("x/{name}/a/{i}{set}.png", ("NORMAL/imgs/A1", "TB/imgs/A2", "TB/imgs/B"),
     r"x/NORMAL/imgs/A1 seems to be of one patient.*--layout \*/class/\*/patient"),
    ("{name}/{set}{i}.png", ("TB/active", "TB/latent", "NORMAL"), "class"),
    ("{name}/{set}{i}.png", ("other/Effusion", "other/nodule", "covid/mild"), "class"),
    ("{split}/{name}/{set}{i}.png", ("sick/Pneumonia", "sick/Fibrosis", "well/normal", "well/x"),
     "split/class"),
    ("{name}/{set}{i}.png", ("NORMAL/PA", "NORMAL/LAT", "TB/PA", "TB/LAT"), "class"),
    ("{name}/{set}{i}.png", ("pt01", "pt02", "pt03"), "pt01 does not look like a class"),
    ("{name}/{set}{i}.png", ("A17", "B03", "C22"), "A17 does not look like a class"),
    ("{name}/{set}{i}.png", ("TB", "unknown"), "unknown does not look like a class"),
    *(("{name}/{set}{i}.png", names, "seem to be of one person each.*--layout patient")
      for names in (
        ("Smith_John", "Doe_Jane", "Roe_Richard", "Miles_Mary"), ("DOE^JANE", "ROE^R"),
        ("Smith, John", "Doe, Jane"), ("mueller", "schmidt", "meier", "otto"))),
    *(("{name}/{set}{i}.png", names, "does not look like a class") for names in (
        ("Frontal", "lateral"), ("AP", "PA"), ("TB", "documents"), ("TB", "Figures"),
        ("A", "A - Copy"), ("TB", "TB_augmented"), ("A", "thumbnails"), ("A", "$RECYCLE.BIN"),
        ("a3f9c2", "b81e77", "c0ffee"))),
    # What cells say for nothing, and what work on files leaves.
    *(("{name}/{set}{i}.png", ("TB", name), f"folder {name} does not look like a class: --exclude "
       f"'?{name}'? leaves it out.*--allow odd-classes") for name in (
        "NaN", "n_a", "not_reported", "Missing", "unsure", "Possible", "uncertain_2",
        "Nouveau dossier", "Untitled folder 3", "rejects", "Excluded by MK", "for review",
        "low_quality", "Duplicated", "Errors", "results_v3", "outputs", "Preprocessed",
        "original images", "old scans", "failed", "\u65b0\u5efa\u6587\u4ef6\u5939")),
    *(("{name}/{set}{i}.png", names, "class") for names in (
        ("Rejection", "Normal"), ("Old TB", "TB"), ("A", "U"), ("Other", "Normal"),
        ("Not Normal", "Normal"), ("-1", "1"), ("yes", "no"), ("TB.v2", "B.v2"))),
    *(("{name}/{set}{i}.png", names, "seem to be masks") for names in (
        ("A", "cams"), ("A", "segmented"))),
    *(("{name}/{set}{i}.png", names, "class") for names in (
        ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"), ("No Finding", "Pleural Effusion"),
        ("A", "B", "C", "D"))),
    ("{name}_{split}/{i}.png", ("normal", "tb"),
     "classes normal_test and normal_train seem to be of two splits by .*--allow odd-classes"),
    ("{split}{name}/{i}.png", ("A", "B"), "classes testA and trainA seem to be of two"),
    ("{name}/{set}{i}.png", ("TB", "TB_test"), "classes TB and TB_test seem to be of two"),
    ("{name}/{set}{i}.png", ("train_NORMAL", "test_TB"), "test_TB and train_NORMAL seem to be"),
    ("{name}/{set}{i}.png", ("train_NORMAL", "protest", "Device"), "class"),
    *(("{split}/{name}{i}.png", names, "differ in form only") for names in (
        ("COVID19/", "COVID-19/"), ("MassNodule/", "Mass_Nodule/"), ("A&B/", "A B/"))),
    ("{split}/{name}{i}.png", ("TB+/", "TB-/"), "split/class"),
    *(("{Short}/{name}/{i}.png", names, layout) for names, layout in (
        (("NORMAL", "TB"), "split/class"), (("0", "1"), "split/class"))),
    ("{name}/{Short}_set/{i}.png", ("NORMAL", "TB"), "class/split"),
    ("{name}/{set}{i}.png", ("VA", "NORMAL"), "class"),
    ("seen_{split}/{name}/{i}.png", ("NORMAL", "TB"), "NORMAL lies both below seen_"),
    *(("{name}/{set}{i}.png", names, "does not look like a class") for names in (
        ("TB", "TB (1)"), ("TB", "TB 2"), ("TB", "TB - Kopie"), ("TB", "Kopie von TB"),
        ("TB", "TB_2"), ("TB", "TB_CLAHE"), ("Mass", "mass-03"), ("COVID-19", "COVID-19_2"),
        ("Normal", "NormalFlipped"), ("Lung_Opacity", "hflip_lung opacity"),
        ("Edema", "Edema-rot90"), ("TB", "TBCropped_2"),
        ("A", "\ufffddem"), ("A", "\u00d6dem".encode().decode("cp1252")))),
    *(("{name}/{set}{i}.png", names, "class") for names in (
        ("label_0", "label_1"), ("Label 0", "Label 1"), ("COVID (576)", "Normal (1583)"),
        ("SARS", "SARS-CoV-2"), ("SARS-CoV", "SARS-CoV-2"), ("Stage 1", "Stage 2"),
        ("1", "1-2", "3"), ("Stage_1", "Stage_1-2"), ("TB", "TB_HIV"), ("Covid", "COVID-19"),
        ("Effusion", "Effusion_left"), ("Par", "Parrot"), ("A\ue000", "B"))),
    *((pattern, ("NORMAL", "TB"), r"12 names of files, such as .*test.*NORMAL.*, hold .* unzip")
      for pattern in ("{split}\\{name}\\{i}.png", "data/{split}\\{name}\\{i}.png")),
    ("{split}/x/{name}/{i}.png", ("TB", "../../holdout/x"), "images in holdout lie beside")])
def test_layouts(tmp_path, capsys, pattern, classes, expected):
    names = {"test": "Testing", "val": "Validation", "train": "Train"}
    short = {"test": "te", "val": "VA", "train": "tr"}
    src, out = tree(tmp_path, *(
        os.path.normpath(pattern.format(split=split, Split=names[split], Short=short[split],
                                        set=ord(split[1]), name=name, i=i))
        for split in names for name in classes for i in range(2)))
    for litter in ("__MACOSX/x/1.png", ".hidden/2.png", "Thumbs.db", "desktop.ini"):
        (src / litter).parent.mkdir(exist_ok=True, parents=True)
        (src / litter).write_bytes(b"no image")
    refused = " " in expected
    with outcome(expected if refused else None):
        folder(src, out)
        assert f"Layout of the folders: {expected} (rec" in capsys.readouterr().out
        manifest = read_manifest(out)
        assert len(manifest.paths) == 6 * len(classes)
        for path, split in splits_of(out).items():
            if "{Short}" in pattern:
                assert f"/{short[split]}" in path
            else:
                assert "split" not in expected or split in path.lower() or names[split] in path


@pytest.mark.parametrize("header, rows, expected", [
    ("path,patient", ["1e3", "1000", "2", "3"], "'1e3' and '1000' differ in form only"),
    ("path,patient", ["\uff11", "1", "2", "3"], "differ in form only"),
    ("path,patient", ["1.0", "01", " 1", "3"], "'1.0' and '01' differ in form only"),
    *(("path,patient", [*cells, "2", "3"], "patients .* and .* differ in form only") for cells in (
        ["`007", "7"], ["\u201c9\u201d", "9"], ["#12", "#012"], ["No. 5", "5"], ["7;", "007"],
        ["3.4.19/1", "3.4.19-1"], ["12:30", "12_30"], ["[8]", "8"],
        ["Ibarra Jos\u00e9", "ibarra jose"], ["Subject_0012", "12"],
        ["Patient No. 4", "4"], ["Ana Ruiz", "RUIZ^ANA"], ["PID00031", "31"],
        ["\u0420001", "P001"], ["A\u200b1", "A1"], ["2 040", "2040"], ["70\u2019500", "70500"],
        ["8.123", "8123"], ["1\u202f200\u202f300", "1200300"], ["31-40-52", "0314052"],
        ["31 405 2", "314052"], ["RUIZ ANA", "ruizana"], ["MR-55-1234", "MR551234"],
        ["\u0967\u0968", "12"], ["9 100", "9.100"])),
    *(("path,patient", cells, {"test": 1, "train": 2, "val": 1}) for cells in (
        ["1-12", "11-2", "1.12", "11.2"], ["P1-2", "P12", "1/3", "13"],
        ["1.0001", "10.001", "2.0001", "20.001"], ["Ana", "Anabel", "7.5", "75"])),
    *(("path,patient", cells, "patients '.*1' and '.*2' seem to be two examinations of one person"
       ".*--allow similar-patients") for cells in (
        ["7_scan1", "7_scan2", "8_scan1", "9_scan1"], ["A7-Exam1", "A7-Exam2", "B", "C"],
        ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1", "x"],
        ["P3 week 1", "P3 week 2", "4", "5"], ["9-V1", "9-V2", "8", "7"],
        ["3_t1", "3_t2", "4_t1", "5"])),
    *(("path,patient", cells, "seem to be two examinations of one person") for cells in (
        ["5_20200301", "5_20200302", "6", "7"], ["5_baseline", "5_follow-up", "6", "7"],
        ["31 left", "31 right", "8", "9"],
        *([f"MR40{mark}1", f"MR40{mark}2", "6", "7"] for mark in ("_CXR", "-dx", " X-ray ")),
        ["0-CXR1", "0-CXR2", "1-CXR1", "2"], ["7_film_1", "7_film_2", "8", "9"])),
    *(("path,patient", [cell, "2", "3", "4"], f"patient '{re.escape(cell)}' is a number that a "
       "spreadsheet has shortened.*--allow similar-patients") for cell in (
        "9.00012E+14", "4.5E+09", "-2E+07", "1.2e+05")),
    *(("path,patient", cells, {"test": 1, "train": 2, "val": 1}) for cells in (
        ["1.5E+01", "1e5b", "2E7", "3"], ["visit1", "visit2", "visit3", "visit4"],
        ["B_1", "A_1", "A_2", "B_2"], ["CXR1", "CXR2", "DX1", "DX2"])),
    ("path,patient", ["1", "1", "1", "1"], "the val split is empty: 4 images of 1 patient"),
    ("path,PatientID", ["1", "1", "2", "3"], "column 'PatientID' of l.csv seems to name the pat.*"
                                             "--patient-column PatientID"),
    ("path,subject_id", ["1", "1", "2", "3"], "--patient-column subject_id"),
    *((f"path,{name}", ["1", "1", "2", "3"], f"--patient-column {name} ") for name in (
        "patient.id", "PatientName", "id_patient", "patient_hash", "Case ID", "MRN_anon", "SUBJ")),
    *((f"path,{name}", ["x", "x", "y", "z"], f"--patient-column {name} ") for name in (
        "Name", "Patient Name", "pid", "subject", "mrn", "Hospital_No", "record number")),
    *(("path,code", cells, "column 'code' of l.csv seems to name the patients") for cells in (
        ["P01", "P01", "P02", "P03"], ["10233", "10233", "10240", "10251"],
        ["DOE^JANE", "DOE^JANE", "ROE^R", "A^B"],
        ["1.2.840.113.7", "1.2.840.113.7", "1.2.840.113.8", "1.2.840.113.9"])),
    *((header, cells, {"test": 1, "train": 2, "val": 1}) for header, cells in (
        ("path,Name", ["Normal", "Normal", "Pneumonia", "Mass"]), ("path,made", ["20200131"] * 4),
        ("path,made", ["20200131", "20200131", "20200202", "20200203"]),
        ("path,scanner", ["CR85", "CR85", "DX20", "DX21"]),
        ("path,dose", ["12345", "12345", "2", "3"]), ("path,view", ["PA", "PA", "AP", "L"]))),
    *((f"path,{name}", ["1", "1", "2", "3"], {"test": 1, "train": 2, "val": 1}) for name in (
        "Patient_Sex", "inpatient", "case type", "PatientAge", "patientage", "spatial")),
    ("path,Case ID", ["1", "2", "3", "4"], {"test": 1, "train": 2, "val": 1}),  # one image each
    *((f"path,{name}", ["Train", "TEST", "", "training"], f"--split-column {name} takes them")
      for name in ("Dataset_type", "group", "fold", "cohort")),
    ("path,partition", ["train", "eval", "holdout", ""], "--split-column partition takes them"),
    ("path,group", ["train", "train", "train", "train"], {"test": 1, "train": 2, "val": 1}),
    ("path,patient", ["1", "", "2", "3"], "row 3, column patient: empty"),
    ("path,Patient Age", ["1", "1", "2", "3"], {"test": 1, "train": 2, "val": 1}),
    ("path,Split", ["Train", "TEST", "valid", "training"], "--split-column Split takes them"),
    ("path,split", ["Train", "TEST", "dev", "training"], {"train": 2, "test": 1, "val": 1}),
    ("path,split", ["0", "1", "0", "1"], "row 2, column split: '0' is no split: write"),
    *(("path,split", cells, {"train": 2, "test": 1, "val": 1}) for cells in (
        ["entrenamiento", "prueba", "Validaci\u00f3n", "ENTRENAMIENTO"],
        ["treino", "teste", "valida\u00e7\u00e3o", "treino"])),
    *((f"path,{name}", ["1", "1", "2", "3"], f"column '{name}' of l.csv seems to name the exam.*"
       f"--patient-column {name} ") for name in (
        "study_id", "accession", "Exam No", "uid", "SeriesUID", "encounter_id", "StudyNumber")),
    *((f"path,{name}", ["1", "1", "2", "3"], {"test": 1, "train": 2, "val": 1}) for name in (
        "visit", "study", "exam", "report")),
    ("path,study_id", ["1", "2", "3", "4"], {"test": 1, "train": 2, "val": 1}),
    ("path,patient,study_id", ["1,1", "1,1", "2,2", "3,3"], {"test": 1, "train": 1, "val": 2}),
    ("path,patient", ["DOE^JANE", '"Doe, Jane"', "2", "3"], "differ in form only"),
    ("path,patient", ["DOE^JANE^^", "Doe^Jane", "2", "3"], "differ in form only"),
    ("path,split", ["tr", "TE", "va", "Tr"], {"train": 2, "test": 1, "val": 1}),
    ("path,split", ["training", "testing", "validation", "dev"], {"train": 1, "test": 1, "val": 2}),
    ("path,usage", ["trn", "tst", "Dev set", "trn"], "--split-column usage takes them"),
    *((f"path,{name}", cells, f"column '{name}' .* splits: --split-column {name} takes them, once")
      for name, cells in (
        ("is_train", ["0", "1", "1", "1"]), ("train", ["TRUE", "TRUE", "FALSE", "TRUE"]),
        ("isTest", ["1.0", "0.0", "0", "1"]), ("fold", ["0", "1", "2", "3"]),
        ("kfold", ["A", "B", "A", "B"]), ("subset", ["1", "2", "2", "2"]))),
    *((f"path,{name}", cells, f"--split-column {name} takes them") for name, cells in (
        ("holdout", ["0", "1", "0", "0"]), ("cohort", ["derivation", "validation"] * 2),
        ("centre", ["development", "external validation"] * 2),
        ("Usage", ["Public", "Private"] * 2))),
    *((f"path,{name}", ["a", "a", "b", "c"], f"--patient-column {name} ") for name in (
        "ID", "initials", "Nachname", "NHS number", "患者")),
    ("path,patient,PatientID", ["1,7", "2,7", "3,8", "4,9"], "--patient-column PatientID"),
    *((f"path,{name}", ["1", "1", "2", "3"], f"column '{name}' .* the patients.*column {name} ")
      for name in ("deid_key", "research number", "MPI", "Aktennummer", "numero_historia",
                   "Pseudonym_ID", "OP No", "kimlik no",
                   "\u75c5\u6848\u53f7", "codigo del paciente", "CPF")),
    *((f"path,{name}", ["1", "1", "2", "3"], {"test": 1, "train": 2, "val": 1}) for name in (
        "image_no", "class_id", "room number", "batch key", "age code", "slice_no", "label_id",
        "project id", "country code")),
    *((f"path,{name}", ["0", "1", "1", "0"], {"test": 1, "train": 2, "val": 1}) for name in (
        "PCR test", "folder", "set up")),
    ("path,patient,split", ["1,train", "1,test", "2,train", "3,val"],
     "patient 1 is in test and in train")])
def test_columns_of_patients_and_splits(tmp_path, header, rows, expected):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(4)))
    (tmp_path / "l.csv").write_text("\n".join(
        [header, *(f"{i}.png,{row}" for i, row in enumerate(rows))]))
    with outcome(expected):
        folder(src, out, "--csv", tmp_path / "l.csv")
        splits = list(splits_of(out).values())
        assert {split: splits.count(split) for split in splits} == expected


@pytest.mark.parametrize("blank", ["", "nan", "N/A"])
def test_images_without_a_split_are_told(tmp_path, capsys, blank):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(8)))
    rows = "".join(f"{i}.png,{['train', 'test', blank][min(i // 2, 2)]}\n" for i in range(8))
    (tmp_path / "l.csv").write_text(f"path,split\n{rows}")
    folder(src, out, "--csv", tmp_path / "l.csv")
    assert "Images to which the source gives no split, though it gives one to others: 4; they " \
        "count as train." in capsys.readouterr().out


@pytest.mark.parametrize("stand_in", ["0", "ANON"])
def test_one_patient_that_stands_for_many(tmp_path, stand_in):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(14)))
    rows = "".join(f"{i}.png,{stand_in if i % 2 else f'p{i}'}\n" for i in range(14))
    (tmp_path / "l.csv").write_text(f"path,patient\n{rows}")
    with pytest.raises(SystemExit, match=f"7 of 14 images are of patient '{stand_in}', and of any "
                                         "other 1 at most"):
        folder(src, out, "--csv", tmp_path / "l.csv")
    folder(src, out, "--csv", tmp_path / "l.csv", "--allow", "unknown-patients")


def test_folders_of_another_split_than_the_table_says(tmp_path):
    src, out = tree(tmp_path, *(f"{part}/{i}.png" for part in ("train", "test") for i in range(4)))
    rows = "".join(f"{part}/{i}.png,{'train' if i else 'test'}\n"
                   for part in ("train", "test") for i in range(4))
    (tmp_path / "l.csv").write_text(f"path,split\n{rows}")
    with pytest.raises(SystemExit, match="4 images, such as train/0.png, lie in the folder of "
                                         "another split than the table says, here test"):
        folder(src, out, "--csv", tmp_path / "l.csv")
    folder(src, out, "--csv", tmp_path / "l.csv", "--allow", "unused-splits")
    assert splits_of(out)["images/train/0.jpg"] == "test"


def test_what_is_not_used_is_told(tmp_path, capsys):
    """Columns that nobody named, file names that say the patient, and the same picture twice."""
    src, out = tree(tmp_path, *(f"A/person{i // 3}_virus_{i}.png" for i in range(9)),
                    *(f"B/person{i // 3}_none_{i}.png" for i in range(9, 18)))
    (src / "A/copy.png").write_bytes((src / "B/person3_none_9.png").read_bytes())
    (src / "B/link.png").symlink_to("person3_none_10.png")
    folder(src, out)
    text = capsys.readouterr().out
    assert "The same picture as another image: 2, " in text and "verify --drop" in text
    assert "The names of files seem to say the patient, such as person0_virus_1:" in text
    (tmp_path / "l.csv").write_text("path,Mass,Age\n" + "".join(
        f"A/person{i // 3}_virus_{i}.png,{i % 2},{40 + i}\n" for i in range(9)))
    folder(src, tmp_path / "b", "--csv", tmp_path / "l.csv", "--layout", "none")
    assert "Columns of l.csv that are not used: Mass, Age." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["xray_subject12_{i}.png", "TB-Pat_3_{i}.png"])
def test_persons_anywhere_in_names_are_told(tmp_path, capsys, name):
    src, out = tree(tmp_path, *(name.format(i=i) for i in range(6)))
    folder(src, out)
    assert "The names of files seem to say the patient, such as" in capsys.readouterr().out


@pytest.mark.parametrize("patient, told", [
    ("patient{}_{}", True), ("0000{}3_{}", True), ("P{}-pat{}", False), ("7{}-{}", True),
    ("A 1{}.{}", True), ("{}-0{}5", False), ("{0:03x}f{1}c", False)])
def test_patients_that_seem_to_be_parts_are_told(tmp_path, capsys, patient, told):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(6)))
    rows = "".join(f"{i}.png,{patient.format(i // 2, i % 2)}\n" for i in range(6))
    (tmp_path / "l.csv").write_text(f"path,patient\n{rows}")
    folder(src, out, "--csv", tmp_path / "l.csv")
    text = "seem to be parts of one person by their names"
    assert (text in capsys.readouterr().out) == told


@pytest.mark.parametrize("patients, told", [
    (["31a", "31b", "32a", "33"], True), (["S7c", "S7d", "S8", "S9"], True),
    (["31a", "31b", "3f1c", "33"], False), (["1.2.840.7", "1.2.840.8", "1", "2"], False)])
def test_letters_behind_patients_are_told(tmp_path, capsys, patients, told):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(4)))
    (tmp_path / "l.csv").write_text("path,patient\n" + "".join(
        f"{i}.png,{patient}\n" for i, patient in enumerate(patients)))
    folder(src, out, "--csv", tmp_path / "l.csv")
    assert ("seem to be parts of one person" in capsys.readouterr().out) == told


@pytest.mark.parametrize("one, other", [
    ("\u0421ovid", "Covid"), ("\u041c\u0410SS", "MASS"), ("TB \u0391", "TB A")])
def test_letters_that_look_like_others(tmp_path, one, other):
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in (one, other, "Normal")
                                for i in range(2)))
    with pytest.raises(SystemExit, match="differ in form only.*--allow similar-labels"):
        folder(src, out)
    folder(src, out, "--allow", "similar-labels")


@pytest.mark.parametrize("names, told", [
    (("mueller", "schmidt"), True),
    (("\u674e\u5c0f\u660e\u5148", "\u738b\u5927\u660e\u5148"), True),
    (("Shenzhen/png", "JSRT/png"), True), (("Geneva", "Beirut"), True),
    (("normal", "mueller"), False), (("pos", "neg"), False), (("0", "1"), False),
    (("A", "B", "C"), False)])
@pytest.mark.parametrize("images", [4, 12])
def test_folders_that_name_no_finding_are_told(tmp_path, capsys, names, told, images):
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(images)))
    folder(src, out)
    names = [name.removesuffix("/png") for name in names]
    text = f"No class folder, such as {min(names)}, is called as a finding is"
    assert (text in capsys.readouterr().out) == told


@pytest.mark.parametrize("name", ["cover/page.png", "Pneumonia/a/1.png"])
def test_a_class_of_one_image_beside_large_ones(tmp_path, name):
    src, out = tree(tmp_path, name, *(f"{part}/{i}.png" for part in ("NORMAL", "TB")
                                      for i in range(10)))
    part = name.split("/")[0]
    with pytest.raises(SystemExit, match=f"class folder {part} has one image only, .*--exclude "
                                         f"{part} .*--allow odd-classes"):
        folder(src, out)
    folder(src, out, "--allow", "odd-classes")
    folder(src, out, "--overwrite", "--layout", "class")


@pytest.mark.parametrize("names, pictures", [
    (["{i}.png", "{i}_flip.png", "{i}_rot90.png"], 4), (["aug_1_{i}.png", "aug_2_{i}.png"], 4),
    (["x{i}_png.rf.0123456789abcdef0123456789abcdef.jpg",
      "x{i}_png.rf.fedcba98765432100123456789abcdef.jpg"], 4),
    (["{i}.png", "{i}.jpg"], 4), (["p{i}_frontal.png", "p{i}_lateral.png"], 4),
    (["crop_{i}.png", "{i}_2.png"], 0), (["flipped{i}.png", "x{i} (2).png"], 0),
    (["p{i}_1.png", "p{i}_2.png"], 0), (["apical{i}.png", "x{i}paid.png"], 0),
    # The number beside such a word is the picture's own, or its copy's.
    (["{i}.png", "augmented_{i}_7712.png"], 4), (["{i}.png", "flip-{i}-31.png"], 4),
    (["{i}.png", "aug_2_{i}.png"], 4), (["{i}.png", "aug_{i}_0.png", "aug_{i}_1.png"], 4),
    (["augmented_{i}_7712.png", "p{i}.png"], 0),
    (["x{i}.png", "x{i} (1).png"], 4), (["a ({i}).png", "b ({i}).png"], 0),
    # Whatever goes on behind the name of another file, but for numbers.
    (["{i}.png", "{i}_histeq.png", "{i}-Salt and pepper 3.png"], 4),
    (["p{i}.png", "p{i}.solarized.jpg", "p{i}_mixup_flip.png", "p{i}_15deg_2.png"], 4),
    (["x{i}_flip.png", "x{i}_wavelet_flip.png", "x{i}_wavelet.png"], 4),
    (["{i}.png", "{i}_001.png", "{i}-2-3.png"], 0), (["{i}.png", "{i}0b.png", "b{i}.png"], 0),
    (["0000000{i}_000.png", "0000000{i}_001.png"], 0),
    (["x{i}.png", "x{i}_sharpened.png"], 4), (["x{i}_left.png", "x{i}_right.png"], 4)])
def test_changed_copies_stay_together(tmp_path, capsys, names, pictures):
    """Copies and views of a picture come into one split, as far as their names tell."""
    src, out = tree(tmp_path, *(f"{part}/{name.format(i=i)}"
                                for part in "AB" for i in range(4) for name in names))
    folder(src, out, "--val-fraction", 0.25, "--test-fraction", 0.25)
    patients = len(set(read_manifest(out).patients))
    said = f"By their names {8 * len(names):,} images, such as A/" in capsys.readouterr().out
    assert said == bool(pictures) and patients == 2 * (pictures or 4 * len(names))


def test_a_copy_is_of_the_nearest_name_and_many_copies_of_one_part_no_others(tmp_path):
    src, out = tree(tmp_path, *(f"{part}/{i}{end}.png" for part in "AB" for i in range(4)
                                for end in ("", "_001", "_001_warped", "_cover")))
    folder(src, out, "--val-fraction", 0.25, "--test-fraction", 0.25)
    patient = dict(zip(read_manifest(out).paths, read_manifest(out).patients))
    assert len(set(patient.values())) == 16
    assert patient["images/A/2_001.jpg"] == patient["images/A/2_001_warped.jpg"]
    images = ["1.png", *(f"1_a{i}{end}.png" for i in range(40) for end in ("", "_flip"))]
    assert len(set(same_pictures(images).values())) == 40


@pytest.mark.parametrize("plain, copy, pictures", [
    ("TB/{i}.png", "TB/augmented/{i}.png", 8), ("TB/{i}.png", "TB/CLAHE/{i}.png", 8),
    ("TB/{i}.png", "TB/rotated_15/{i}_rot.jpg", 8), ("TB/x{i}.png", "TB/HFlip/aug_7_x{i}.png", 8),
    ("TB/{i}.png", "TB/TB_cropped/{i}.png", 8),
    ("TB/Original/{i}.png", "TB/zoomed/{i}.png", 8), ("TB/images/{i}.png", "TB/aug/{i}.png", 8),
    # Folders of views, studies and kinds are none of copies, and may count from 1 again.
    *(("TB/{i}.png", f"TB/{name}/{{i}}.png", 16) for name in ("PA", "left", "frontal", "mild")),
    ("TB/study1/{i}.png", "TB/study2/{i}.png", 16),
    ("TB/cropped/{i}.png", "TB/cropped/x{i}.png", 16),
    # No picture of that name is beside them.
    ("TB/{i}.png", "TB/augmented/{i}_0.png", 0), ("TB/a{i}.png", "TB/inverted/b{i}.png", 0),
    ("TB/original/p{i}.png", "TB/shifted/{i}_1.png", 0)])
def test_changed_copies_in_folders_of_their_own(tmp_path, plain, copy, pictures):
    """Copies in a folder below one class stay with their pictures, or are refused."""
    src, out = tree(tmp_path, *(name.format(i=i) for i in range(8)
                                for name in ("NORMAL/{i}.png", plain, copy)))
    with outcome(None if pictures else "8 images, such as TB/.*changed copies of others by their "
                 "folder.*--exclude .* leaves that folder out .*--allow unknown-patients"):
        folder(src, out)
        assert len(set(read_manifest(out).patients)) == 8 + pictures
    if not pictures:
        folder(src, out, "--allow", "unknown-patients")


@pytest.mark.parametrize("given", [["train", "test"], ["train", "val", "test"]])
def test_changed_copies_in_folders_of_given_splits(tmp_path, given):
    """Where val is carved from train, copies of no known picture may come into it."""
    src, out = tree(tmp_path, *(f"{split}/{name}/{split}{i}.png" for split in given
                                for name in ("A", "B") for i in range(6)),
                    *(f"train/B/noisy/{i}_1.png" for i in range(6)))
    with outcome("6 images, such as train/B/noisy/0_1.png" if "val" not in given else None):
        folder(src, out)


def test_changed_copies_in_folders_of_a_table(tmp_path):
    """A table that names img/1.png and img_flip/1.png has one patient of both."""
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in ("img", "img_flip", "Clahe-img")
                                for i in range(6)))
    (tmp_path / "l.csv").write_text("\n".join(
        ["path,y", *(f"{name}/{i}.png,{i % 2}" for name in ("img", "img_flip", "Clahe-img")
                     for i in range(6))]))
    folder(src, out, "--csv", tmp_path / "l.csv", "--label-columns", "y")
    assert len(set(read_manifest(out).patients)) == 6


@pytest.mark.parametrize("files, strayed", [
    (["train/A/1.png", "test/A/1_flip.png"], 1), (["train/A/1_rot.png", "test/A/1_flip.png"], 2),
    (["train/A/1.png", "test/A/1.png", "test/A/1_flip.png"], 0),
    (["train/A/1.png", "test/B/1_flip.png"], 0), (["train/A/a.png", "test/A/a_flip.png"], 0)])
def test_changed_copies_in_two_given_splits_are_told(tmp_path, capsys, files, strayed):
    others = [f"{split}/{part}/{split}{i}.png" for split in ("train", "test") for part in "AB"
              for i in range(3)]
    src, out = tree(tmp_path, *files, *others)
    folder(src, out)
    text = f"By their names {strayed} images, such as test/A/1_flip.png, are changed copies"
    assert (text in capsys.readouterr().out) == bool(strayed)


@pytest.mark.parametrize("pattern, refused", [
    ("{name}/{split}-{i}.png", True), ("{i}_{split}set.png", True), ("a_test_{split}{i}.png", True),
    ("{name}/x{i}.{Short}.png", True), ("{name}/{held}{i}.png", True),
    ("{name}/{i}_covid_test.png", False),
    ("{name}/{i}_{split}_test_val.png", False), ("{name}/{split}ing2{i}ed.png", True),
    ("{name}/{i}contest{split}d.png", False), ("{split}/{name}/{split}_{i}.png", False)])
def test_splits_in_the_names_of_files(tmp_path, pattern, refused):
    """Official test images must not come into train because only their names say so."""
    short = {"train": "tr", "val": "va", "test": "te"}
    held = {"train": "train", "val": "train", "test": "holdout"}
    src, out = tree(tmp_path, *(
        pattern.format(name=name, split=split, Short=short[split], held=held[split], i=i)
        for name in ("NORMAL", "TB") for split in short
        for i in (range(2) if name == "TB" else range(2, 4))))
    with outcome("names of files, such as .* seem to name the split, .* column of --csv .*"
                 "--allow unused-splits" if refused else None):
        folder(src, out)
    folder(src, out, "--allow", "unused-splits")


def test_one_split_in_the_names_of_some_files_is_told(tmp_path, capsys):
    src, out = tree(tmp_path, *(f"{name}/{i}{test}.png" for name in ("NORMAL", "TB")
                                for i, test in enumerate(["", "", "_test", "-testing"])))
    folder(src, out)
    assert "4 names of files, such as NORMAL/2_test.png, seem to name the split, test; that is not"\
        in capsys.readouterr().out


@pytest.mark.parametrize("names, expected", [
    (["N/{i}.png", "P/{i}.jfif", "P/{i}.jpe"], 18), (["N/{i}.png", "P/{i}.png", "P/{i}.dcm"], 12),
    (["N/{i}.png", "P/{i}.png", "TB/{i}.heic"], "class TB has no image that can be read, only such "
     "as TB/0.heic.* 6 of 18 .* .heic is not read: save it as PNG.*--allow many-left-out"),
    (["N/{i}.png", "P/{i}.png", "N/x{i}.jpg.gz"], "6 of 18 images .* .jpg.gz is not read"),
    (["N/{i}.png", "P/{i}.png", "P/{i}.GIF.png", "P/x{i}.GIF"], "6 of 24 images .* .gif is not"),
    (["N/{i}.png", "P/{i}.png", "masks/{i}.gif"], 12),
    (["N/{i}.png", "P/{i}.png", "docs/{i}.txt"], 12)])
def test_pictures_of_a_kind_that_is_not_read_are_lost(tmp_path, names, expected):
    src, out = tmp_path / "src", tmp_path / "out"
    for name in names:
        for i in range(6):
            file = src / name.format(i=i)
            if file.suffix == ".png":
                save(file, radiograph(i))
            elif file.suffix in (".jfif", ".jpe"):
                save(file, radiograph(10 + i), format="JPEG")
            else:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(b"something")
    with outcome(expected):
        folder(src, out)
        assert len(read_manifest(out).paths) == expected
    if isinstance(expected, str):
        folder(src, out, "--exclude", "*.heic", "*.gz", "*.GIF")


@pytest.mark.parametrize("pattern, layout", [
    ("{name}.zip/{split}{i}.png", "class"), ("{name}.TAR.GZ/{name}/{split}{i}.png", "class"),
    ("{split}.7z/{name}/{i}.png", "split/class")])
def test_folders_that_are_called_as_the_archives_they_were_in(tmp_path, capsys, pattern, layout):
    src, out = tree(tmp_path, *(pattern.format(name=name, split=split, i=i)
                                for name in ("NORMAL", "TB") for split in ("train", "val", "test")
                                for i in range(2)))
    folder(src, out, "--allow", "unused-splits")
    assert f"Layout of the folders: {layout} (rec" in capsys.readouterr().out
    assert read_manifest(out).label_names == ["NORMAL", "TB"]


@pytest.mark.parametrize("both, other, flags", [
    ("Edema_Cyst", "Cyst", ()), ("Edema+Cyst", "Cyst", ("--layout", "class")),
    ("cyst with EDEMA", "Cyst", ()), ("EdemaCyst", "Cyst", ()), ("Edema & Hernia", "Cyst", ()),
    ("Edema;Cyst", "Cyst", ()), ("Edema and Hernia", "Cyst", ())])
def test_a_class_folder_that_names_others(tmp_path, both, other, flags):
    """Edema would be absent in its images, as in those of all other folders."""
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in ("Edema", other, both, "Normal")
                                for i in range(3)))
    with pytest.raises(SystemExit, match=f"class folder {re.escape(both)} seems to name several.*"
                                         "--csv says both.*--allow odd-classes"):
        folder(src, out, *flags)
    folder(src, out, "--allow", "odd-classes")


@pytest.mark.parametrize("names", [
    ("Edema", "Pulmonary Edema", "No Edema"), ("COVID", "Pneumonia", "non-COVID pneumonia"),
    ("Normal", "Nodule_Mass"), ("Pneumonia", "Pneumonia-Viral", "Pneumonia-Bacterial"),
    ("No Finding", "Other finding", "Fracture")])
def test_class_folders_of_kinds_are_no_lists(tmp_path, names):
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(3)))
    folder(src, out)
    assert read_manifest(out).label_names == sorted(names)


@pytest.mark.parametrize("link, target", [
    ("val/NORMAL", "../train/NORMAL"), ("train/TB2", "TB"), ("val/virus", "../../elsewhere")])
def test_folders_that_are_one_by_a_link(tmp_path, link, target):
    src, out = tree(tmp_path, "../elsewhere/0.png", "../elsewhere/1.png", *(
        f"{place}/{i}.png" for place in ("train/NORMAL", "train/TB", "val/TB") for i in range(4)))
    (src / "train/virus").symlink_to("../../elsewhere")
    (src / link).symlink_to(target)
    with pytest.raises(SystemExit, match=f"{link} leads to the same folder as train/.*: its files "
                       f"are taken by that name only; .*--exclude {link} .*--allow other-folders"):
        folder(src, out)
    for flags in (["--exclude", link], ["--allow", "other-folders"]):
        folder(src, out, "--overwrite", *flags)
        assert len(read_manifest(out).paths) == 14


@pytest.mark.parametrize("litter", ["@eaDir", "#recycle", "@Recycle", "__MACOSX"])
def test_folders_of_a_nas_are_passed_over(tmp_path, litter):
    src, out = tree(tmp_path, *(f"{name}/{place}{i}.png" for name in ("NORMAL", "TB")
                                for place in ("", f"{litter}/x") for i in range(4)),
                    f"{litter}/1.png")
    folder(src, out)
    assert len(read_manifest(out).paths) == 8


@pytest.mark.parametrize("hidden, told", [
    (("._0.png", "NORMAL/._0.png", ".git/x.png", "__MACOSX/0.png"), "4, such as ._0.png."),
    (("@eaDir/0.png",), "1, such as @eaDir."), ((), "")])
def test_hidden_files_are_counted(tmp_path, capsys, hidden, told):
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in ("NORMAL", "TB") for i in range(4)))
    for name in hidden:
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_bytes(b"AppleDouble")
    folder(src, out)
    said = "Hidden files and folders, which are passed over: "
    assert (said + told in capsys.readouterr().out) == bool(told)
    assert (said in (out / "DATA.md").read_text("utf-8")) == bool(told)


@pytest.mark.parametrize("name, cells, told", [
    ("Projection", ["PA", "L", "PA", "AP"], "PA (2), L (1), AP (1)"),
    ("BodyPart", ["CHEST", "HAND", "CHEST", ""], "CHEST (2), HAND (1)"),
    ("view", ["PA"] * 4, ""), ("review", ["good", "bad"] * 2, "")])
def test_views_among_others_are_told(tmp_path, capsys, name, cells, told):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(4)))
    (tmp_path / "l.csv").write_text(f"path,{name}\n" + "".join(
        f"{i}.png,{cell}\n" for i, cell in enumerate(cells)))
    folder(src, out, "--csv", tmp_path / "l.csv")
    text = f"Column {name} is not used and holds {told}"
    assert (text in capsys.readouterr().out) == bool(told)


@pytest.mark.parametrize("row", ["s3://b/{i}.png?v=1", "{i}.0"])
def test_rows_that_find_no_file_are_shown(tmp_path, row):
    src, out = tree(tmp_path, *(f"00{i}.png" for i in range(4)))
    (tmp_path / "l.csv").write_text("path,y\n" + "".join(
        f"{row.format(i=i)},{i % 2}\n" for i in range(4)))
    with pytest.raises(SystemExit, match="missing on disk, such as .*0.*not in l.csv, such as 000"):
        folder(src, out, "--csv", tmp_path / "l.csv", "--label-columns", "y")


def test_a_class_that_stands_in_test_only(tmp_path):
    names = {"train": ("TB", "NORMAL"), "val": ("TB", "normal"), "test": ("TBC", "NORMAL")}
    src, out = tree(tmp_path, *(f"{split}/{name}/{i}.png" for split in names
                                for name in names[split] for i in range(2)))
    with pytest.raises(SystemExit, match="class 'TBC' stands in test and not in train.*"
                                         "--allow untrained-class"):
        folder(src, out)
    folder(src, out, "--allow", "untrained-class")


@pytest.mark.parametrize("source, table, row", [
    ("nih", "Data_Entry_2017.csv", "row 3, column Patient ID: empty"),
    ("mimic", "mimic-cxr-2.0.0-split.csv", "row 3, column subject_id: empty")])
def test_a_patient_is_missing_in_an_official_table(tmp_path, source, table, row):
    src = tmp_path / "src"
    if source == "mimic":
        mimic(src, [(f"i{i}", f"5{i}", f"1{i}", "train", "PA") for i in range(4)])
    else:
        tree(tmp_path, *(f"{i}.png" for i in range(4)))
        (src / "train_val_list.txt").write_text("0.png 1.png 2.png")
        (src / "test_list.txt").write_text("3.png")
        (src / table).write_text("Image Index,Finding Labels,Patient ID\n" + "".join(
            f"{i}.png,Mass,1{i}\n" for i in range(4)))
    text = (src / table).read_text()
    (src / table).write_text(text.replace(",11", ","))
    with pytest.raises(SystemExit, match=f"{table}, {row}"):
        run(source, "--src", src, "--out", tmp_path / "out", "--workers", 1)


@pytest.mark.parametrize("source", ["nih", "chexpert", "mimic", "folder"])
def test_a_part_of_a_download_is_told_with_its_flag(tmp_path, source):
    """Tables of 40 images, of which 4 are there."""
    src, flags = tmp_path / "src", []
    if source == "nih":
        tree(tmp_path, *(f"images_001/{i}.png" for i in range(4)))
        rows = "".join(f"{i}.png,Mass,1{i}\n" for i in range(40))
        (src / "Data_Entry_2017.csv").write_text(f"Image Index,Finding Labels,Patient ID\n{rows}")
        (src / "train_val_list.txt").write_text(" ".join(f"{i}.png" for i in range(20)) + " 3.png")
        (src / "test_list.txt").write_text(" ".join(f"{i}.png" for i in range(20, 40)))
    elif source == "chexpert":
        tree(tmp_path, *(f"train/patient{i}/study1/view1_frontal.jpg" for i in range(4)))
        for part, images in (("train", range(40)), ("valid", ())):
            write_csv(src / f"{part}.csv", [
                ("Path", "Frontal/Lateral", *CHEXPERT_OBSERVATIONS),
                *((f"x/train/patient{i}/study1/view1_frontal.jpg", "Frontal", *["1"] * 14)
                  for i in images)])
    elif source == "mimic":
        mimic(src, [(f"i{i}", f"5{i}", f"1{i}", "train", "PA") for i in range(40)])
        for file in sorted(src.rglob("*.jpg"))[4:]:
            file.unlink()
    else:
        tree(tmp_path, *(f"{i}.png" for i in range(4)))
        (tmp_path / "l.csv").write_text("path,y\n" + "".join(
            f"{i}.png,{i % 2}\n" for i in range(40)))
        flags = ["--csv", tmp_path / "l.csv", "--label-columns", "y"]
    command = [source, "--src", src, "--out", tmp_path / "out", "--workers", 1, *flags]
    with pytest.raises(SystemExit) as caught:
        run(*command)
    text = str(caught.value)
    assert "36 of 40 images would be left out, all of them for one reason: named in " in text
    assert "missing on disk, such as " in text and "if that is meant: --allow many-left-out" in text
    allowed = text.partition("--allow ")[2].rstrip(")").split()
    run(*command, "--allow", *allowed)
    assert len(read_manifest(tmp_path / "out").paths) == 4


def test_folders_of_patients_beside_a_table(tmp_path):
    src, out = tree(tmp_path, *(f"x/pt{i // 3}/{i}.png" for i in range(12)))
    flags = ["--csv", tmp_path / "l.csv", "--label-columns", "y"]
    (tmp_path / "l.csv").write_text("path,y\n" + "".join(
        f"x/pt{i // 3}/{i}.png,{i % 2}\n" for i in range(12)))
    with pytest.raises(SystemExit, match=r"x/pt0 seems to be of one .*--layout \*/patient"):
        folder(src, out, *flags)
    folder(src, out, *flags, "--layout", "*/patient")
    assert len(set(read_manifest(out).patients)) == 4


def chexpert_tree(tmp_path, rows, table_folder="."):
    """CheXpert of rows (part, path in the table, path on disk, view)."""
    src, out = tree(tmp_path, *(file for _, _, file, _ in rows))
    (src / table_folder).mkdir(exist_ok=True)
    for name in ("train", "valid"):
        write_csv(src / table_folder / f"{name}.csv", [
            ("Path", "Frontal/Lateral", *CHEXPERT_OBSERVATIONS),
            *((path, view, *["1"] * 14) for part, path, _, view in rows if part == name)])
    return "chexpert", "--src", src, "--out", out, "--workers", 1, "--allow", "empty-split"


@pytest.mark.parametrize("above", ["film/", "natural/nokia/", "a/b/c/"])
def test_chexpert_with_folders_above_the_patients(tmp_path, above):
    """As CheXphoto has them."""
    paths = [f"train/{above if i % 2 else 'plain/'}patient{i // 2}/study1/view1_frontal.jpg"
             for i in range(6)]
    run(*chexpert_tree(tmp_path, [("train", f"x/{path}", path, "frontal") for path in paths]))
    manifest = read_manifest(tmp_path / "out")
    assert Counter(manifest.patients.tolist()) == {f"patient{i}": 2 for i in range(3)}
    assert len(manifest.paths) == 6 and (tmp_path / "out/images" / paths[1]).exists()


def test_chexpert_of_other_names(tmp_path, capsys):
    """Pseudonyms, and a folder that seems to be of both parts."""
    rows = [(part, f"{part}/{part}{i}/s1/v.jpg", f"{folder}/{part}{i}/s1/v.jpg", " FRONTAL ")
            for part, folder in (("train", "x (train 1)"), ("valid", "x (train 1)/valid"))
            for i in range(3)]
    run(*chexpert_tree(tmp_path, rows))
    assert sorted(read_manifest(tmp_path / "out").patients) == [
        f"{part}{i}" for part in ("train", "valid") for i in range(3)]
    assert "outside train and valid" not in capsys.readouterr().out


@pytest.mark.parametrize("path", ["train/a/patient1/view1.jpg", "train/x/a/b/view1.jpg",
                                  "train/patient1/study1/series2/view1.jpg"])
def test_chexpert_of_another_depth(tmp_path, path):
    with pytest.raises(SystemExit, match=f"train.csv, row 2, column Path: '{path}' is not train/"):
        run(*chexpert_tree(tmp_path, [("train", path, path, "Frontal")]))


@pytest.mark.parametrize("batch", ["CheXpert-v1.0 batch {} (train {})", "b{} (train {})"])
def test_chexpert_as_it_is_unpacked_in_full_size(tmp_path, batch):
    first = batch.partition(" ")[0] + " 1 (validate & csv)"
    names = [f"patient{i}/study1/view1_frontal.jpg" for i in range(6)]
    run(*chexpert_tree(tmp_path, [
        *(("train", f"x/train/{name}", f"{batch.format(2 + i % 2, 1 + i % 2)}/{name}", "Frontal")
          for i, name in enumerate(names[:4])),
        *(("valid", f"x/valid/{name}", f"{first}/valid/{name}", "Frontal") for name in names[4:])],
        first))
    assert splits_of(tmp_path / "out")["images/valid/patient4/study1/view1_frontal.jpg"] == "test"
    assert len(read_manifest(tmp_path / "out").paths) == 6


def test_chexpert_of_unknown_views_and_tables(tmp_path):
    row = ("train", "train/patient1/study1/v.jpg", "train/patient1/study1/v.jpg")
    command = chexpert_tree(tmp_path, [(*row, "oblique")])
    with pytest.raises(SystemExit, match="row 2, column Frontal/Lateral: 'oblique' is neither "
                                         "Frontal nor Lateral"):
        run(*command)
    (tmp_path / "src/train.csv").unlink()
    with pytest.raises(SystemExit, match="src must hold one train.csv, it holds 0"):
        run(*command)


@pytest.mark.parametrize("cell", ["0.31", "Edema", "3"])
def test_observations_that_are_none_are_named_by_row_and_column(tmp_path, cell):
    src, out = tree(tmp_path, *(f"train/patient{i}/study1/view1_frontal.jpg" for i in range(3)))
    for part in ("train", "valid"):
        write_csv(src / f"{part}.csv", [
            ("Path", "Frontal/Lateral", *CHEXPERT_OBSERVATIONS),
            *((f"{part}/patient{i}/study1/view1_frontal.jpg", "Frontal",
               *[cell if name == "Fracture" and i else "" for name in CHEXPERT_OBSERVATIONS])
              for i in range(3))])
    with pytest.raises(SystemExit, match=f"train.csv must hold 1, 0, -1 or blanks: row 3, column "
                       f"Fracture, holds '{cell}'"):
        run("chexpert", "--src", src, "--out", out, "--workers", 1)


def test_chexpert_as_windows_writes_it(tmp_path):
    src, out = tree(tmp_path, *(f"train/patient{i}/study1/view1_frontal.jpg" for i in range(3)))
    for part, images in (("train", range(3)), ("valid", ())):
        write_csv(src / f"{part}.csv", [
            ("Path", "Frontal/Lateral", *CHEXPERT_OBSERVATIONS),
            *((f"x\\train\\patient{i}\\study1\\view1_frontal.jpg", "Frontal", *[""] * 14)
              for i in images)])
    run("chexpert", "--src", src, "--out", out, "--workers", 1, "--allow", "empty-split")
    assert sorted(read_manifest(out).patients) == ["patient0", "patient1", "patient2"]


def test_a_class_whose_images_are_all_bad_is_told(tmp_path):
    src, out = tree(tmp_path, *(f"{name}/{i}.png" for name in "AB" for i in range(6)))
    for i in range(6):
        (src / f"A/{i}.png").write_text("<html>")
    with pytest.raises(SystemExit, match="label 'A' is 0 for every image"):
        folder(src, out, "--allow", "empty-split")
    assert not (out / "manifest.csv").exists()


# --------------------------------------------------------------------------------------------------
# C and D. Gray levels, and headers that say of them what cannot be.

def deep(top):
    return Image.fromarray((top * LEVELS).astype(np.uint16))


GRAY = Image.fromarray((255 * LEVELS).astype(np.uint8))
TURNED = Image.Exif()
TURNED[274] = 3


@pytest.mark.parametrize("name, image, options", [
    ("12 of 16 bits.png", deep(4095), {}), ("8 of 16 bits.png", deep(255), {}),
    ("float.tif", Image.fromarray(LEVELS.astype(np.float32)), {}),
    ("signed float.tif", Image.fromarray((2 * LEVELS - 1).astype(np.float32)), {}),
    ("white is 0.tif", deep(65535).point(lambda level: 65535 - level), {"tiffinfo": {262: 0}}),
    ("palette.png", GRAY.quantize(200), {}), ("cmyk.jpg", GRAY.convert("CMYK"), {}),
    ("turned.jpg", GRAY.rotate(180), {"exif": TURNED, "quality": 95}),
    ("turned.tif", GRAY.rotate(180), {"tiffinfo": {274: 3}}),
    ("alpha.webp", GRAY.convert("RGBA"), {"lossless": True}),
    ("pages.tif", GRAY, {"save_all": True, "append_images": [GRAY], "words": "2 frames"}),
    ("moving.png", GRAY, {"save_all": True, "append_images": [GRAY.rotate(9)], "words": "frames"}),
    ("zip.png", GRAY, {"words": "a zip file, none of PNG", "content": b"PK\3\4" + bytes(99)}),
    ("lfs.png", GRAY, {"words": "a pointer of Git LFS", "content": b"version https://git-lfs.x"}),
    ("page.jpg", GRAY, {"words": "a page of HTML", "content": b"<html>log in</html>"})])
def test_pixels(tmp_path, name, image, options):
    options = dict(options)
    words, content = options.pop("words", ""), options.pop("content", None)
    file = tmp_path / name
    if content:
        file.write_bytes(content)
    else:
        image.save(file, **options)
    if words:
        with pytest.raises(DataError, match=words):
            load_image(file, read_image, ImageSettings())
        return
    levels = np.asarray(load_image(file, read_image, ImageSettings()).image, float)
    assert np.abs(levels / 255 - LEVELS).max() < 0.02


def png_of_16_bits(file, levels, kind):
    """A PNG of 16-bit channels, which Pillow does not write: (H, W) of 0 to 1 as gray with alpha
    (kind 4), colour (2), or both (6)."""
    channels = {2: [1, 1, 1], 4: [1, 0], 6: [1, 1, 1, 0]}[kind]
    pixels = np.stack([levels if own else np.full_like(levels, 65535) for own in channels], 2)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    height, width = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks))


@pytest.mark.parametrize("kind", [2, 4, 6])
def test_colours_of_16_bits(tmp_path, kind):
    """Pillow reads the upper 8 bits: all there is of 16, next to nothing of 12 in 16."""
    png_of_16_bits(tmp_path / "x.png", LEVELS * 65535, kind)
    levels = np.asarray(load_image(tmp_path / "x.png", read_image, ImageSettings()).image, float)
    assert np.abs(levels / 255 - LEVELS).max() < 0.02
    for bits in (12, 14):
        png_of_16_bits(tmp_path / "x.png", LEVELS * (2 ** bits - 1), kind)
        with pytest.raises(DataError, match="16 bits, of which only the upper 8 .* save it in g"):
            load_image(tmp_path / "x.png", read_image, ImageSettings())


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
@pytest.mark.parametrize("colours, told", [
    ("jet", True), ("hsv", True), ((70, 90, 160), False), ((140, 100, 60), False), ("gray", False)])
def test_strong_colours_are_told(tmp_path, name, colours, told):
    """False colours, but not a blue or a brown film."""
    if isinstance(colours, str):
        pixels = 255 * colormaps[colours](radiograph(3) / 255)[..., :3]
    else:
        pixels = (radiograph(3) / 255)[..., None] * colours
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name, quality=95)
    reading = load_image(tmp_path / name, read_image, ImageSettings())
    assert any(note.startswith("strong colours not kept") for note in reading.notes) == told


@pytest.mark.parametrize("side, options, levels", [
    (60, {"quality": 75}, (0, 255)), (64, {"quality": 95}, (40, 190)),
    (72, {"quality": 60}, (255, 0)), (200, {"quality": 50}, (40, 190))])
def test_masks_as_jpeg(tmp_path, side, options, levels):
    y, x = np.mgrid[:side, :side] / side
    lungs = np.hypot((np.abs(x - 0.5) - 0.2) / 0.15, (y - 0.5) / 0.35) < 1
    Image.fromarray(np.where(lungs, *levels).astype(np.uint8)).save(tmp_path / "x.jpg", **options)
    with pytest.raises(DataError, match="a mask or a drawing"):
        load_image(tmp_path / "x.jpg", read_image, ImageSettings())
    # A pale radiograph in a black frame is none, nor is a halftone.
    frame = np.pad(100 + radiograph(1, side, side) / 12, side // 3)
    halftone = Image.fromarray(radiograph(2, side, side)).convert("1").convert("L")
    for image in (Image.fromarray(frame.astype(np.uint8)), halftone):
        image.save(tmp_path / "x.jpg", **options)
        load_image(tmp_path / "x.jpg", read_image, ImageSettings())


WHITE = "window not used: it would have made most of the image white"
NO_NUMBER = "window not used: its centre or width is missing or no number"
PAST = np.where(EDGE, 4095, SCAN)                           # columns of padding


@pytest.mark.parametrize("elements, pixels, expected, notes", [
    ({"WindowCenter": [1700, 40], "WindowWidth": [3200, 400]}, SCAN, SCAN, ()),
    ({"WindowCenter": [40, 1700], "WindowWidth": [400, 3200]}, SCAN, SCAN, (WHITE,)),
    ({"WindowCenter": 1700, "WindowWidth": "3200", "text": "1E-9"}, SCAN, SCAN,
     ("window not used: its width is too small",)),
    ({"WindowCenter": -9000, "WindowWidth": 3200}, SCAN, SCAN,
     ("window not used: it would have made all of the image one gray level",)),
    ({"WindowCenter": 1700, "WindowWidth": "3200", "text": "NaN "}, SCAN, SCAN, (NO_NUMBER,)),
    ({"WindowCenter": 1700, "WindowWidth": "3200", "text": "\\3,2"}, SCAN, SCAN, (NO_NUMBER,)),
    ({"WindowCenter": 1700, "WindowWidth": "3200.5", "text": "+3200,"}, SCAN, SCAN, ()),
    ({"photometric": "MONOCHROME1", "PixelPaddingValue": 4095}, PAST, np.where(EDGE, -3200, -SCAN),
     ()),
    ({"photometric": "MONOCHROME1", "PixelPaddingValue": 0}, np.where(EDGE, 0, SCAN),
     np.where(EDGE, -3200, -SCAN), ()),
    ({"PixelPaddingValue": 900, "PixelPaddingRangeLimit": 1400}, SCAN, SCAN,
     ("padding not believed: it lies inside the image",)),
    ({"RescaleSlope": "1.25", "RescaleIntercept": 0, "text": "wide"}, SCAN, SCAN,
     ("rescale not used: slope or intercept is no number, or the slope 0",))])
def test_dicom_headers(tmp_path, elements, pixels, expected, notes):
    elements = dict(elements)
    text = elements.pop("text", "")
    write_dicom(tmp_path / "x.dcm", pixels, **elements)
    if text:
        old = next(value for value in elements.values() if isinstance(value, str))[:len(text)]
        content = (tmp_path / "x.dcm").read_bytes()
        (tmp_path / "x.dcm").write_bytes(content.replace(old.encode(), text.encode()))
    reading = load_image(tmp_path / "x.dcm", read_dicom, ImageSettings(64))
    levels = np.asarray(reading.image, float)
    assert reading.notes == notes
    assert np.corrcoef(levels.ravel(), np.asarray(expected).ravel())[0, 1] > 0.99


# --------------------------------------------------------------------------------------------------
# E and F. Text: encodings, separators, line ends, names.

TABLE = "path,y\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(4))


@pytest.mark.parametrize("content, expected", [
    (TABLE.encode("utf-16"), None), (b"\xfe\xff" + TABLE.encode("utf-16-be"), None),
    (TABLE.replace(",", ";").encode("utf-8-sig"), None), (TABLE.replace(",", "\t"), None),
    (TABLE.replace("\n", "\r"), None), (TABLE.replace("\n", "\n\n"), None),
    (TABLE.replace("\n", ",\r\n"), None), (TABLE.replace("path,y", '"path","y"'), None),
    (TABLE.replace("path", ",path").replace("\n", "\n0,", 4), None),
    (TABLE.replace(",1", ",\u200b1"), None), (TABLE.replace("\n2", "\n\ufeff2"), None),
    (TABLE.replace("\n", "\r\n\ufeff", 2), None), ("\ufeff\ufeff" + TABLE, None),
    ("\ufeffsep=,\n\ufeff" + TABLE, None), (TABLE.replace("\n", ",\n").replace(
        "1,", f'1,"{"long report " * 12_000}"'), None),
    (TABLE.encode() + b"Befund M\xfcller,1\n",
     "l.csv is not a CSV file in UTF-8 .*: save its table as CSV in UTF-8"),
    *((TABLE.encode(encoding), "l.csv is not a CSV file in UTF-8 .it is in UTF-32, or in UTF-16 "
       "without a byte-order mark.: save its table as") for encoding in (
           "utf-32", "utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")),
    (TABLE.replace(",1", ",1\0"), r"row 3, column y: '1\\x00' among values"),
    (TABLE + ",\n,\n", None), (TABLE + ",1\n", "row 6: its key is empty .column path"),
    (TABLE.replace("2.png,0", '2.png,"0'), "row 4: .*, as a quote that opens there is"),
    (TABLE.replace("path,y", "path,y,y").replace(".png", ".png,1"),
     "columns 2 and 3 are called so"),
    (TABLE.replace("path,y", "x,path,y,x").replace("\n", ",1\n0,").replace("x,1\n", "x\n")[:-2],
     "one column 'x', and columns 1 and 4 are called so"),
    (",".join(f"c{i}" for i in range(900)), "must have one column 'path', its header is .{,3000}$"),
    *((start + bytes(900), f"l.csv is {what}, and no CSV file: save its table as CSV in UTF-8")
      for start, what in ((b"PK\3\4", "an Excel workbook or a zip file"),
                          (b"PAR1", "a Parquet file"),
                          (b"\xd0\xcf\x11\xe0\xa1\xb1", "an Excel workbook"),
                          (b"FEA1", "a Feather file"), (b"\x80\4\x95", "a pickle"),
                          (b"\x93NUMPY\1", "a NumPy file"), (b"\xff\xd8\xff", "an image"))),
    *((start + TABLE, f"l.csv is {what}, and no CSV file: save its table as CSV in UTF-8")
      for start, what in (('{"columns": ["path", "y"], "data": [', "JSON"),
                          ('[\n  {\n    "path": "0.png",', "JSON"),
                          ('{"path":"0.png","y":1}', "JSON"),
                          ('\ufeff[["path", "y"],', "JSON"),
                          ("\n<Table border=1>", "a page of HTML or XML"),
                          ('<?xml version="1.0"?>', "a page of HTML or XML"),
                          ("<!-- by the PACS -->", "a page of HTML or XML"),
                          ("Mime-Version: 1.0\n", "a web archive"))),
    (gzip.compress(b'[{"path": "0.png"}]', mtime=0), "l.csv is JSON, and no CSV file"),
    (gzip.compress(b"PK\3\4" + bytes(900), mtime=0), "l.csv is an Excel workbook or a zip file"),
    (TABLE.replace("path,y", "path,y,[0],<b>").replace("\n", ",,\n").replace(">,,", ">"), None),
    (TABLE.replace("path,y", "[id],path,y").replace("\n", "\n0,")[:-2].replace("\n0,", "\n7,"),
     None),
    ("sep=;\r\n" + TABLE.replace(",", ";"), None), ("\ufeffsep=,\n" + TABLE, None),
    (("sep=\t\n" + TABLE.replace(",", "\t")).encode("utf-16"), None),
    ("sep=,\n" + TABLE.replace(",1", ",9"), "row 4, column y: '9' among values"),
    (TABLE.replace("2.png,", "b'2.png',"), None), (TABLE.replace(",", "|"), None),
    (TABLE.replace("2.png", '"=""2.png"""'), None),
    ("", "must have one column 'path', its header is ''")])
def test_tables(tmp_path, content, expected):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(4)))
    (tmp_path / "l.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with outcome(expected):
        folder(src, out, "--csv", tmp_path / "l.csv", "--label-columns", "y")
        assert [label["y"] for _, label in sorted(labels_of(read_manifest(out)).items())] == [
            0, 1, 0, 1]


@pytest.mark.parametrize("between", ["\n\ufeff", "\r\n\ufeff", "\ufeff"])
def test_lists_that_were_joined(tmp_path, between):
    src, out = tree(tmp_path, *(f"images/{i}.png" for i in range(8)))
    (src / "train_val_list.txt").write_bytes(
        f"0.png\n1.png{between}2.png\n3.png{between}4.png\n5.png\n".encode())
    (src / "test_list.txt").write_text("6.png\n7.png")
    (src / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels,Patient ID\n" + "".join(
        f"{i}.png,Mass,{i}\n" for i in range(8)))
    run("nih", "--src", src, "--out", out, "--workers", 1)
    assert len(read_manifest(out).paths) == 8


def test_a_working_folder_that_was_deleted(tmp_path):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(4)))
    (tmp_path / "here").mkdir()
    result = subprocess.run(
        ["sh", "-c", f"cd {tmp_path}/here && rmdir ../here && {sys.executable} {SCRIPT} folder "
         f"--src {src} --out {out}"], text=True, capture_output=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the folder that prepare.py was started in was deleted" in result.stderr


def test_names_are_read_back_in_any_locale(tmp_path):
    names = ["a\nb", 'a"b', "a,b", "\x85", "x" * 200, "é" * 100, "e\u0301", "胸", "a\\b", "-x"]
    files = [f"{part}/{name}.png" for name in names for part in "AB"]
    tree(tmp_path, *files)
    for locale in ({}, {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        out = tmp_path / f"out{len(locale)}"
        result = subprocess.run(
            [sys.executable, SCRIPT, "folder", "--src", tmp_path / "src", "--out", out],
            capture_output=True, env={"PATH": os.environ["PATH"], "LC_ALL": "C"} | locale)
        assert result.returncode == 0, result.stderr
        assert sorted(read_manifest(out).paths) == sorted(
            f"images/{file.removesuffix('.png')}.jpg" for file in files)
        assert run("verify", out, "--workers", 1) == 0


# --------------------------------------------------------------------------------------------------
# I and J. One odd thing among many, and names of one file.

def test_odd_files_stop_nothing(tmp_path):
    src, out = tree(tmp_path, *(f"{part}/{i}.png" for part in "AB" for i in range(12)))
    (src / "loop.png").symlink_to("loop.png")
    (src / "A/again").symlink_to("../A")
    (src / "B/gone.png").symlink_to("nowhere.png")
    (src / "B/folder.png").mkdir()
    os.mkfifo(src / "B/pipe.png")
    save(src / "A" / ("x" * 250 + ".bmp"), radiograph(7))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(src / "A/socket.png"))
        folder(src, out)
    assert len(read_manifest(out).paths) == 24
    special = "a named pipe, a socket or a device"
    assert rejected(out) == {
        "loop.png": "Too many levels of symbolic links", "B/gone.png": "No such file or directory",
        "A/" + "x" * 250 + ".bmp": "its name would be longer than 251 bytes",
        "B/pipe.png": special, "A/socket.png": special}


@pytest.mark.parametrize("files, rows, expected", [
    (["a.png", "A.png", "b.png", "c.png"], ["a.png", "A.png", "b.png", "c.png"], [1, 0, 0, 1]),
    (["é.png", "e\u0301.png", "b.png"], ["é.png", "b.png"], "have the same name, written in two"),
    (["1.png", "1.png.png", "2.png", "3.png"], ["1.png", "1.png.png", "2.png", "3.png"],
     [0, 1, 0, 1]),
    (["x/1.PNG", "x/2.png", "x/3.png"],
     ["C:\\x\\1.png", "C:\\x\\2.png", "C:\\x\\3.png"], [0, 1, 0]),
    (["x/1.png", "x/2.png", "3.png"], ["1.png", "2.png", "3.png"],
     "row 2: there is no 1.png, but x/1.png, and row 4 names 3.png by its path"),
    (["a.b.png", "a.c.png", "d.png"], ["a.b", "a.c", "d"], [0, 1, 0]),
    (["1/0.png", "2/0.png", "3.png"], ["0.jpg", "3.jpg"], "row 2: 0.jpg may be 1/0.png or 2/0.png"),
    (["link/0.png", "z/1.png", "z/2.png"], ["z/0.png", "link/1.png", "z/2.png"], [0, 1, 0]),
    # Blanks that look alike, and characters without width.
    *(([f"x/a{blank}{i}.png" for i in range(4)], [f"x/A {i}.png" for i in range(4)], [0, 1, 0, 1])
      for blank in ("\u2009", "\u3000", "  ", "\u200b ")),
    ([f"x/a {i}.png" for i in range(4)], [f"a\u202f{i}.png" for i in range(4)], [0, 1, 0, 1]),
    ([f"a{blank}{i}.png" for i in range(2) for blank in "\u2009\u3000"],
     [f"a {i}.png" for i in range(2)], r"a 0.png may be a\\u20090.png or a\\u30000.png")])
def test_rows_find_their_files(tmp_path, files, rows, expected):
    if files[0].startswith("link"):
        (tmp_path / "src/z").mkdir(parents=True)
        (tmp_path / "src/link").symlink_to("z")
    src, out = tree(tmp_path, *files)
    with open(tmp_path / "l.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "y"), *((row, i % 2) for i, row in enumerate(rows))])
    with outcome(expected):
        folder(src, out, "--csv", tmp_path / "l.csv", "--label-columns", "y")
        labels = labels_of(read_manifest(out))
        assert [labels[path]["y"] for path in sorted(labels)] == expected


# --------------------------------------------------------------------------------------------------
# K. Identity that is not in the header.

@pytest.mark.parametrize("absent, flags, patients", [
    (("PatientID", "SOPInstanceUID"), (), "6 files: SOPInstanceUID is missing, or both"),
    (("PatientID",), (), 3), (("PatientID", "StudyInstanceUID"), ("--patient-from", "folder"), 2),
    (("Modality",), (), "Modality is missing .--modality none takes such files"),
    (("Modality", "SOPClassUID"), ("--modality", "None", "DX"), 3)])
def test_identity(tmp_path, absent, flags, patients):
    for i in range(6):
        file = tmp_path / f"src/{'ab'[i % 2]}/{i}.dcm"
        dataset = write_dicom(file, SCAN + i, patient=f"P{i // 2}", StudyInstanceUID=f"1.{i // 2}")
        for name in absent:
            delattr(dataset, name)
        dataset.save_as(file, enforce_file_format=False)
    command = ["dicom", "--src", tmp_path / "src", "--out", tmp_path / "out", "--workers", 1]
    with outcome(patients):
        run(*command, *flags, "--allow", "empty-split")
        assert len(set(read_manifest(tmp_path / "out").patients)) == patients


# --------------------------------------------------------------------------------------------------
# G, H, L and M. The neighbours: predict, pretrain, cluster_eval.

@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier.pt that was never trained."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    net = Classifier(build_encoder("resnet18"), 2)
    save_checkpoint(path, {
        "format": FORMAT, "arch": "resnet18", "labels": ["Mass", "Effusion"], "kind": "binary",
        "encoder": net.encoder.state_dict(), "classifier": net.head.state_dict(),
        "thresholds": [0.5, 0.5], "n_train": 0,
        "config": {"data": "", "image_size": 32, "normalize": "image", "clahe": False}})
    return path


def test_predict_takes_what_prepare_takes(classifier, tmp_path, capsys):
    import predict
    src, _ = tree(tmp_path, "a.JPEG", "below/b.tif", "below/c.bmp", 'd "e",\nf.png')
    write_dicom(src / "IM0001", SCAN, photometric="MONOCHROME1")
    (src / "more").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "elsewhere/g.webp")
    for name, content in (("Thumbs.db", b""), ("._a.png", b"x"), ("half.png", b"\x89PNG\r\n\x1a\n"),
                          ("page.jpg", b"<html>"), ("none.dcm", b"no DICOM")):
        (src / "below" / name).write_bytes(content)
    (src / "loop.png").symlink_to("loop.png")
    with pytest.raises(SystemExit, match="4 of 10 images cannot be read.*all in rejected.csv"):
        predict.main([str(classifier), str(src), "--threads", "1", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "passed over, as no images: 1 files (1 .db)" in printed
    assert "passed over, as hidden files or folders: 1\n" in printed
    assert rejected(tmp_path / "out") == {
        "below/half.png": "cannot identify the image: damaged, or of a kind of TIFF, PNG or JPEG "
                          "that cannot be read",
        "below/none.dcm": "not a DICOM file", "loop.png": "Too many levels of symbolic links",
        "below/page.jpg": "cannot identify the image: a page of HTML or XML, none of PNG, JPEG, "
                          "JPEG2000, TIFF, BMP, PPM, WEBP"}
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {
            "a.JPEG", "below/b.tif", "below/c.bmp", 'd "e",\nf.png', "IM0001", "more/g.webp"}


def test_predict_tells_what_is_no_frontal_chest(classifier, tmp_path, capsys):
    import predict
    for i, (view, part) in enumerate((("PA", "CHEST"), ("LL", "CHEST"), ("AP", "HAND"),
                                      ("lateral", "Miller"), ("", "PORT CHEST"), ("", ""))):
        write_dicom(tmp_path / f"src/{i}.dcm", SCAN, ViewPosition=view, BodyPartExamined=part)
    predict.main([str(classifier), str(tmp_path / "src"), "--threads", "1", "--out",
                  str(tmp_path / "out")])
    text = capsys.readouterr().out
    for told in ("No frontal view: 1, ViewPosition says LL.", "ViewPosition says LATERAL.",
                 "No chest: 1, BodyPartExamined says HAND.", "BodyPartExamined says OTHER."):
        assert told in text
    assert "iller" not in text and len(rejected(tmp_path / "out")) == 0


def test_predict_leaves_masks_out(classifier, tmp_path):
    import predict
    src, _ = tree(tmp_path, "a.png", "b.jpg", "c.jpg")
    circle = np.hypot(*(np.mgrid[:64, :64] - 32)) < 20
    for name in ("masks/a.png", "masks/b.jpg", "c.jpg"):
        save(src / name, np.where(circle, 255, 0).astype(np.uint8))
    with pytest.raises(SystemExit, match="3 of 5 images cannot be read"):
        predict.main([str(classifier), str(src), "--threads", "1", "--out", str(tmp_path / "out")])
    assert rejected(tmp_path / "out").keys() == {"masks/a.png", "masks/b.jpg", "c.jpg"}


@pytest.mark.parametrize("flags, environment, words", [
    (("--batch-size", "1"), {}, "--batch-size 1 leaves nothing to learn"),
    (("--batch-size", "0"), {}, "0 does not lie in"),
    (("--batch-size", "4096"), {}, "4096"), ((), {"RANK": "0"}, "RANK but not "),
    ((), {"LOCAL_RANK": "1"}, "LOCAL_RANK but not ")])
def test_settings_that_cannot_work(data, tmp_path, monkeypatch, capsys, flags, environment, words):
    import pretrain
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        pretrain.main(["--data", str(data), "--out", str(tmp_path / "out"), "--arch", "resnet18",
                       "--image-size", "32", "--threads", "1", *flags])
    assert caught.value.code not in (0, None)
    assert words in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "none"])
def test_a_notebooks_way_to_draw_is_not_asked_for(backend):
    """A notebook names it to all that it starts, where its package may be missing."""
    result = subprocess.run(
        [sys.executable, "-c", "import common, matplotlib; print(matplotlib.get_backend())"],
        capture_output=True, text=True, cwd=SCRIPT.parent, env=os.environ | {"MPLBACKEND": backend})
    assert result.stdout.lower() == "agg\n", result.stderr
    in_notebook = "import os, sys; sys.modules['ipykernel'] = sys; import common; "
    result = subprocess.run(
        [sys.executable, "-c", in_notebook + "print(os.environ['MPLBACKEND'])"],
        capture_output=True, text=True, cwd=SCRIPT.parent, env=os.environ | {"MPLBACKEND": backend})
    assert result.stdout == f"{backend}\n", result.stderr


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_stop_nothing(tmp_path, closed):
    src, out = tree(tmp_path, *(f"{i}.png" for i in range(6)))
    result = subprocess.run(
        f'"{sys.executable}" "{SCRIPT}" folder --src "{src}" --out "{out}" --workers 2 {closed}',
        shell=True)
    assert result.returncode == 0 and len(read_manifest(out).paths) == 6
    # No file of theirs holds what was printed.
    assert run("verify", out, "--workers", 1) == 0


def test_names_that_figures_cannot_write(tmp_path, recwarn):
    """From right to left, and a sign that no font has."""
    import cluster_eval
    names = ["سليم", "\U0010fffd", "_TB $x$"]
    tree(tmp_path, *(f"{unicodedata.normalize('NFC', name)}/{i}.png" for name in names
                     for i in range(8)))
    folder(tmp_path / "src", tmp_path / "data", "--allow", "empty-split")
    cluster_eval.main(["--data", str(tmp_path / "data"), "--init", "pixels", "--split", "all",
                       "--out", str(tmp_path / "out"), "--bootstrap", "5", "--seeds", "1",
                       "--threads", "1"])
    text = (tmp_path / "out/results.md").read_text()
    assert f"is {names[0]}" in text and f"is {names[1]}" in text and "In the figures" in text
    assert not any("Glyph" in str(warning.message) for warning in recwarn)
