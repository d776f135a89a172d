"""Stage 0's DICOM source: gray levels as they are meant, and no identity in the data folder."""
import csv
import io
import zlib
from collections import Counter
from functools import partial

import numpy as np
import pydicom
import pytest
from PIL import Image

from common import DataError
from dicom import read_radiograph
from manifest import read_manifest
from radiograph import ImageSettings, load_image
from sampling import study_numbers
from test_prepare import interrupted, links, run, write_csv


def write_dicom(file, pixels, stored=12, photometric="MONOCHROME2", patient="4711", **elements):
    """A CR image of `pixels` (H, W) uint16.

    It holds a name, a number and a birth date that must not get out."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = elements.pop(
        "SOPInstanceUID", f"1.2.3.{zlib.crc32(file.name.encode())}")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.PatientName, dataset.PatientID = "Miller^John", patient
    dataset.PatientBirthDate, dataset.InstitutionName = "19400305", "Mercy Hospital"
    dataset.StudyInstanceUID, dataset.Modality = "1.2.9", "CR"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, stored, stored - 1
    dataset.PixelData = np.ascontiguousarray(pixels, np.uint16).tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return dataset


def dicom(tmp_path, *flags, out="out"):
    return run("dicom", "--src", tmp_path / "src", "--out", tmp_path / out,
               "--size", 64, "--workers", 2, *flags)


RAMP = np.linspace(0, 4095, 64 * 64).reshape(64, 64).round()    # 12 bits, dark above, bright below


def voi_table(entries, bits):
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [len(entries), 0, bits])
    table.add_new("LUTData", "US", list(entries))
    return {"VOILUTSequence": [table]}


@pytest.mark.parametrize("elements, pixels, expected", [
    ({}, RAMP, RAMP / 4095),                                    # by percentiles
    ({}, RAMP / 8, RAMP / 4095),                                # to the full range, too
    ({"photometric": "MONOCHROME1"}, RAMP, 1 - RAMP / 4095),
    ({"WindowCenter": 1024, "WindowWidth": 1024}, RAMP / 2, ((RAMP / 2 - 512) / 1024).clip(0, 1)),
    ({"WindowCenter": [1024, 99], "WindowWidth": [1024, 9]}, RAMP / 2,
     ((RAMP / 2 - 512) / 1024).clip(0, 1)),
    ({"WindowCenter": 1024, "WindowWidth": 1024, "photometric": "MONOCHROME1"}, RAMP / 2,
     1 - ((RAMP / 2 - 512) / 1024).clip(0, 1)),
    ({"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 3000, "WindowWidth": 2000},
     RAMP,
     ((2 * RAMP - 1000 - 2000) / 2000).clip(0, 1)),
    ({"RescaleSlope": -1, "RescaleIntercept": 4095, "WindowCenter": 2048, "WindowWidth": 4096},
     RAMP, 1 - RAMP / 4095),
    ({"WindowCenter": 2048, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"}, RAMP,
     1 / (1 + np.exp(-4 * (RAMP - 2048) / 800))),
    (voi_table([i // 16 for i in range(4096)], 8), RAMP, RAMP / 4095),
    (voi_table([min(i, 1000) for i in range(4096)], 12), RAMP / 3, (RAMP / 3000).clip(0, 1)),
    ({"PixelPaddingValue": 4095, "WindowCenter": 1024, "WindowWidth": 2048},
     np.where(RAMP < 400, 4095, RAMP / 2), np.where(RAMP < 400, 0.0977, RAMP / 4095)),
])
def test_dicom_gray_levels(tmp_path, elements, pixels, expected):
    write_dicom(tmp_path / "src/x.dcm", pixels, **elements)
    dicom(tmp_path)
    with Image.open(next((tmp_path / "out/images").rglob("*.jpg"))) as image:
        levels = np.asarray(image, float) / 255
    assert levels.shape == (64, 64) and levels.min() < 0.02 and levels.max() > 0.98
    expected = (expected - expected.min()) / np.ptp(expected)
    assert np.abs(levels - expected).mean() < 0.01 and np.abs(levels - expected).max() < 0.08


# --------------------------------------------------------------------------------------------------
# Headers that say what is not so. Each row: elements, pixels as they are stored, the picture that
# is meant, and what the card says of it.

SCAN = np.asarray(Image.fromarray(np.random.default_rng(5).random((8, 8)).astype(np.float32))
                  .resize((64, 64)), float)                     # soft shapes, 200 to 3200
SCAN = (200 + 3000 * (SCAN - SCAN.min()) / np.ptp(SCAN)).round()
WHITE = "it would have made most of the image white"
EDGE = np.arange(64) < 20                                       # columns of padding


def replaced(old, new):
    """Elements that pydicom would not write: the text is replaced in the file."""
    return {"replaced": (old, new)}


@pytest.mark.parametrize("elements, pixels, expected, note", [
    # Windows of other data: of a CT, too narrow, far above, below, and a table that ends early.
    ({"WindowCenter": 40, "WindowWidth": 400}, SCAN, SCAN, "Window not used: 1, " + WHITE),
    ({"WindowCenter": 500, "WindowWidth": 900}, SCAN, SCAN, "Window not used: 1, " + WHITE),
    ({"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": -1, "RescaleIntercept": 4095},
     4095 - SCAN, SCAN, "Window not used: 1, " + WHITE),
    ({"WindowCenter": 3000, "WindowWidth": 300, "photometric": "MONOCHROME1"}, SCAN, -SCAN,
     "Window not used: 1, " + WHITE),
    ({"WindowCenter": 40000, "WindowWidth": 2000}, SCAN, SCAN,
     "Window not used: 1, it would have made all of the image one gray level."),
    ({"WindowCenter": 3100, "WindowWidth": 500}, SCAN, SCAN,
     "Window not used: 1, it would have made most of the image black"),
    (voi_table([min(i, 500) for i in range(4096)], 12), SCAN, SCAN,
     "VOI LUT not used: 1, " + WHITE),
    # Windows and tables that cannot be applied.
    ({"WindowCenter": 0, "WindowWidth": 0}, SCAN, SCAN, "Window not used: 1, its width is too"),
    ({"WindowCenter": 0.5, "WindowWidth": 0.9, "RescaleSlope": 0.00025, "RescaleIntercept": 0},
     SCAN, SCAN, "Window not used: 1, its width is too small"),
    ({"WindowCenter": 1600, "WindowWidth": -3000}, SCAN, SCAN, "Window not used: 1, its width is"),
    ({"WindowCenter": 1600, "WindowWidth": None}, SCAN, SCAN,
     "Window not used: 1, its centre or width is missing or no number"),
    ({"WindowCenter": 1600, "WindowWidth": "3000.5"} | replaced("3000.5", "wide  "), SCAN, SCAN,
     "Window not used: 1, its centre or width is missing or no number"),
    ({"WindowCenter": 1600, "WindowWidth": 3000, "VOILUTFunction": "MAGIC"}, SCAN, SCAN,
     "Window not used: 1, its VOI LUT Function is unknown"),
    (voi_table([], 12) | {"WindowCenter": 1700, "WindowWidth": 3200}, SCAN, SCAN,
     "VOI LUT not used: 1, it cannot be applied"),
    (voi_table(range(4096), 40), SCAN, SCAN, ""),               # only how deep it is, is wrong
    # Written by a machine with decimal commas, or left empty.
    ({"WindowCenter": "1700.5", "WindowWidth": "3200.5"} | replaced("00.5", "00,5"), SCAN, SCAN,
     ""),
    ({"RescaleSlope": "-1.50", "RescaleIntercept": "0.5"} | replaced("1.50", "1,50"),
     4095 - SCAN, SCAN, ""),
    ({"WindowCenter": 1700, "WindowWidth": 3200, "VOILUTFunction": ""}, SCAN, SCAN, ""),
    ({"WindowCenter": None, "WindowWidth": None}, SCAN, SCAN, ""),
    ({"RescaleSlope": None, "RescaleIntercept": None}, SCAN, SCAN, ""),
    ({"RescaleSlope": -1, "RescaleIntercept": None}, 4095 - SCAN, SCAN, ""),
    ({"RescaleSlope": 0, "RescaleIntercept": 7}, SCAN, SCAN, "Rescale not used: 1, slope or"),
    # What lies above BitsStored: an overlay, many, or the image itself.
    ({}, np.where(np.arange(64) % 9 == 0, SCAN + 4096, SCAN), SCAN, "Bits outside BitsStored rem"),
    ({"photometric": "MONOCHROME1"}, SCAN + 4096 * (np.arange(4096).reshape(64, 64) % 5), -SCAN,
     "Bits outside BitsStored removed: 1"),
    ({"PixelRepresentation": 1}, (SCAN - 1700) % 4096, SCAN, "Bits outside BitsStored removed: 1"),
    ({"PixelRepresentation": 1}, (SCAN - 1700) % 65536, SCAN, ""),
    ({"HighBit": 15}, SCAN * 16 + 3, SCAN, "Bits outside BitsStored removed: 1"),
    ({"BitsStored": 10, "HighBit": 9}, SCAN, SCAN, "BitsStored not believed: 1"),
    ({"BitsStored": 8, "HighBit": 7}, SCAN, SCAN, "BitsStored not believed: 1"),
    ({"BitsStored": 8, "HighBit": 7, "photometric": "MONOCHROME1"}, SCAN, -SCAN,
     "BitsStored not believed: 1"),
    # Which way the image lies: as a chest is looked at, and otherwise.
    ({"PatientOrientation": ["L", "F"]}, SCAN, SCAN, ""),
    ({"PatientOrientation": ["A", "FR"]}, SCAN, SCAN, ""),
    ({"PatientOrientation": ["L", ""]}, SCAN, SCAN, ""),
    ({"PatientOrientation": ["F", "L"]}, SCAN, SCAN, "PatientOrientation not used: 1, the image"),
    ({"PatientOrientation": ["R", "F"]}, SCAN, SCAN, "PatientOrientation not used: 1, the image"),
    # Padding: a range, its ends exchanged, and one whose value is written with another sign.
    ({"PixelPaddingValue": 3900, "PixelPaddingRangeLimit": 4095},
     np.where(EDGE, 3900 + 9 * np.arange(64), SCAN), np.where(EDGE, 200, SCAN), ""),
    ({"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 3900},
     np.where(EDGE, 3900 + 9 * np.arange(64), SCAN), np.where(EDGE, 200, SCAN), ""),
    ({"PixelPaddingValue": 65535, "stored": 12}, np.where(EDGE, 65535, SCAN),
     np.where(EDGE, 200, SCAN), "Bits outside"),
    ({"PixelRepresentation": 1, "stored": 16, "PixelPaddingValue": -2000},
     np.where(EDGE, 65536 - 2000, SCAN), np.where(EDGE, 200, SCAN), ""),
    # Padding that is none: levels of the image itself.
    ({"PixelPaddingValue": 800}, SCAN // 100 * 100, SCAN,
     "Padding not believed: 1, it lies inside the image."),
    ({"PixelPaddingValue": 900, "PixelPaddingRangeLimit": 1500}, SCAN, SCAN,
     "Padding not believed: 1, it lies inside the image."),
    ({"PresentationLUTShape": "INVERSE"}, SCAN, SCAN, "PresentationLUTShape not used: 1"),
])
def test_dicom_headers_that_are_wrong(tmp_path, elements, pixels, expected, note):
    """The picture is the one that is meant, right way up and over the full range."""
    elements = dict(elements)
    old, new = elements.pop("replaced", ("", ""))
    file = tmp_path / "src/x.dcm"
    write_dicom(file, pixels, **elements)
    file.write_bytes(file.read_bytes().replace(old.encode(), new.encode()))
    dicom(tmp_path)
    with Image.open(next((tmp_path / "out/images").rglob("*.jpg"))) as image:
        levels = np.asarray(image, float)
    assert np.corrcoef(levels.ravel(), expected.ravel())[0, 1] > 0.99
    assert levels.min() < 5 and levels.max() > 250
    assert (levels > 250).mean() < 0.05 and (levels < 5).mean() < 0.05 + EDGE.mean()
    card = (tmp_path / "out/DATA.md").read_text()
    assert note in card
    words = ("not used", "not believed", "removed")
    assert note or not any(word in card for word in words)


def test_notes_are_counted_over_all_images_also_of_a_run_that_goes_on(tmp_path):
    for i in range(6):
        window = {"WindowCenter": 40, "WindowWidth": 400} if i < 4 else {}
        write_dicom(tmp_path / f"src/{i}.dcm", SCAN + i, SOPInstanceUID=f"1.2.{i}", **window)
    dicom(tmp_path, "--allow", "empty-split")           # all of one patient
    card = (tmp_path / "out/DATA.md").read_text()
    assert f"Window not used: 4, {WHITE}." in card
    for name in ("manifest.csv", "DATA.md"):
        (tmp_path / "out" / name).unlink()
    next((tmp_path / "out/images").rglob("*.jpg")).unlink()
    dicom(tmp_path, "--allow", "empty-split")           # all of one patient
    assert (tmp_path / "out/DATA.md").read_text() == card


def test_dicom_without_identity(tmp_path, capsys):
    """As the files of VinBigData are: without Modality, PatientID and UID, told by their names."""
    for i in range(6):
        file = tmp_path / f"src/{'ab'[i % 2]}/4b56bc6d{i}.1.dicom"
        dataset = write_dicom(file, RAMP + i)
        for name in ("Modality", "PatientID", "StudyInstanceUID", "SOPInstanceUID", "SOPClassUID"):
            delattr(dataset, name)
        dataset.save_as(file, enforce_file_format=False)
    with pytest.raises(SystemExit, match="6 files: Modality is missing .--modality none takes"):
        dicom(tmp_path)
    with pytest.raises(SystemExit, match="6 files: .* .--patient-from folder or file takes"):
        dicom(tmp_path, "--modality", "none")

    table = tmp_path / "train.csv"
    write_csv(table, [("image_id", "Nodule"), ("4b56bc6d0.1", 1), ("4b56bc6d3.1.dicom", 0)])
    labels = ("--labels", table, "--key", "file", "--key-column", "image_id")
    dicom(tmp_path, "--modality", "none", "--patient-from", "file", *labels)
    manifest = read_manifest(tmp_path / "out")
    assert len(set(manifest.patients.tolist())) == 6
    assert sorted(manifest.labels[:, 0].tolist(), key=str) == [0, 1, *[pytest.approx(
        np.nan, nan_ok=True)] * 4]
    everything = b"".join(str(file.relative_to(tmp_path)).encode() + file.read_bytes()
                          for file in sorted((tmp_path / "out").rglob("*")) if file.is_file())
    assert b"4b56bc6d" not in everything
    assert "A patient is a file (--patient-from file)." in (tmp_path / "out/DATA.md").read_text()
    dicom(tmp_path, "--modality", "none", "--patient-from", "folder", "--allow", "empty-split",
          out="folders")
    manifest = read_manifest(tmp_path / "folders")
    assert Counter(Counter(manifest.patients.tolist()).values()) == {3: 2}

    # Folders of the same names are studies of the folders above them.
    for i in range(4):
        write_dicom(tmp_path / f"studies/P{i // 2}/S{i % 2}/1.dcm", RAMP, SOPInstanceUID=f"1.3.{i}")
    with pytest.raises(SystemExit, match=r"as though they were studies.*such as P0/S0, for a pat"):
        run("dicom", "--src", tmp_path / "studies", "--patient-from", "folder", "--workers", 1,
            "--out", tmp_path / "no")

    # One PatientID in several folders is said; one name in two folders cannot be a key.
    for name in "ab":
        write_dicom(tmp_path / f"named/{name}/1.dcm", RAMP, SOPInstanceUID=f"1.2.{ord(name)}")
    flags = ("dicom", "--src", tmp_path / "named", "--patient-from", "folder", "--workers", 1)
    run(*flags, "--out", tmp_path / "named_out")
    assert "several patients now: 1." in (tmp_path / "named_out/DATA.md").read_text()
    write_csv(table, [("file", "Nodule"), ("1", 1)])
    with pytest.raises(SystemExit, match="2 files in .* are called 1: --key file needs names"):
        run(*flags, "--out", tmp_path / "twice", "--labels", table, "--key", "file")


def test_dicom_holds_no_identity(tmp_path, capsys):
    src = tmp_path / "src/Miller_John 4711"
    for i in range(12):
        write_dicom(src / f"Miller{i}.dcm", RAMP + i, patient=f"4711{i // 2}",
                    SOPInstanceUID=f"1.2.840.99{i}")
    (src / "Miller.txt").write_text("Miller")
    dicom(tmp_path)
    manifest = read_manifest(tmp_path / "out")
    assert len(manifest.paths) == 12
    assert Counter(Counter(manifest.patients.tolist()).values()) == {2: 6}
    everything = b"".join(str(file.relative_to(tmp_path)).encode() + file.read_bytes()
                          for file in sorted((tmp_path / "out").rglob("*")) if file.is_file())
    for secret in (b"Miller", b"John", b"4711", b"19400305", b"Mercy", b"1.2.840.99", b"1.2.9"):
        assert secret not in everything
    assert len(everything) > 12 * 500
    # The list of what was rejected, with its telling names, lies beside the folder; so does the
    # secret, for its owner.
    assert "Miller.txt,not a DICOM file" in (tmp_path / "out.rejected.csv").read_text()
    assert (tmp_path / "out.salt").stat().st_mode & 0o777 == 0o600
    # The same secret gives the same names, another one others.
    dicom(tmp_path, "--salt", tmp_path / "out.salt", out="same")
    assert read_manifest(tmp_path / "same").paths == manifest.paths
    dicom(tmp_path, out="other")
    assert not set(read_manifest(tmp_path / "other").paths) & set(manifest.paths)
    capsys.readouterr()
    dicom(tmp_path)
    assert "12 of 12 images are there already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        dicom(tmp_path, "--salt", tmp_path / "out2/salt", out="out2")
    assert caught.value.code == 2 and "--salt must not lie inside --out" in capsys.readouterr().err


def test_dicom_that_is_not_taken(tmp_path):
    src = tmp_path / "src"
    write_dicom(src / "good.dcm", RAMP)
    write_dicom(src / "again.dcm", RAMP, SOPInstanceUID=f"1.2.3.{zlib.crc32(b'good.dcm')}")
    write_dicom(src / "ct.dcm", RAMP, Modality="CT")
    write_dicom(src / "film.dcm", RAMP, NumberOfFrames=3)
    write_dicom(src / "colour.dcm", RAMP, PhotometricInterpretation="RGB")
    write_dicom(src / "huge.dcm", RAMP, Rows=60000, Columns=60000)
    write_dicom(src / "raw.dcm", RAMP, PresentationIntentType="FOR PROCESSING")
    write_dicom(src / "raw2.dcm", RAMP,
                SOPClassUID=pydicom.uid.DigitalXRayImageStorageForProcessing)
    write_dicom(src / "gray.dcm", RAMP, PhotometricInterpretation="")
    write_dicom(src / "signed.dcm", RAMP, PixelRepresentation=None)
    write_dicom(src / "padding.dcm", np.full((64, 64), 9), PixelPaddingValue=9)
    dataset = write_dicom(src / "header.dcm", RAMP)
    del dataset.PixelData
    dataset.save_as(src / "header.dcm", enforce_file_format=True)
    write_dicom(src / "named.dcm", RAMP, BurnedInAnnotation="yes ")
    write_dicom(src / "flat.dcm", np.full((64, 64), 7))
    write_dicom(src / "nobody.dcm", RAMP, patient="", StudyInstanceUID="")
    dataset = write_dicom(src / "plan.dcm", RAMP)
    del dataset.Rows, dataset.Columns, dataset.PixelData
    dataset.SOPClassUID = pydicom.uid.RTStructureSetStorage
    dataset.save_as(src / "plan.dcm", enforce_file_format=True)
    write_dicom(src / "short.dcm", RAMP)
    (src / "short.dcm").write_bytes((src / "short.dcm").read_bytes()[:-3000])
    write_dicom(src / "odd.dcm", RAMP)
    odd = (src / "odd.dcm").read_bytes()
    (src / "odd.dcm").write_bytes(odd.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    (src / "empty.dcm").touch()
    dicom(tmp_path, "--val-fraction", 0, "--test-fraction", 0,      # all of one patient
          "--allow", "many-left-out")
    assert len(read_manifest(tmp_path / "out").paths) == 1
    with open(tmp_path / "out.rejected.csv", newline="") as file:
        reasons = dict(list(csv.reader(file))[1:])
    words = {"raw.dcm": "FOR PROCESSING", "raw2.dcm": "FOR PROCESSING",
             "gray.dcm": "PhotometricInterpretation is missing",
             "signed.dcm": "PixelRepresentation is missing", "padding.dcm": "all of it is padding",
             "header.dcm": "there is no pixel data in it",
             "ct.dcm": "modality CT, not CR or DX", "film.dcm": "3 frames",
             "colour.dcm": "in colour (RGB)", "huge.dcm": "60000 x 60000",
             "named.dcm": "BurnedInAnnotation", "flat.dcm": "blank",
             "nobody.dcm": "SOPInstanceUID is missing, or both PatientID and StudyInstanceUID are",
             "plan.dcm": "not an image (RT Structure Set Storage)",
             "short.dcm": "5,192 of 8,192 bytes are there", "empty.dcm": "not a DICOM file",
             "odd.dcm": "its pixels cannot be decoded: UID is not a transfer syntax",
             "good.dcm": "SOPInstanceUID of an earlier file"}           # again.dcm
    assert reasons.keys() == words.keys()
    assert all(word in reasons[name] for name, word in words.items()), reasons
    dicom(tmp_path, "--modality", "CT", out="ct")
    assert len(read_manifest(tmp_path / "ct").paths) == 1


def test_dicom_studies_are_pseudonyms_and_views_are_known_words(tmp_path):
    studies, views = ["1.2.77", "1.2.77", "1.2.78", ""], ["PA", "lateral", "MILLER JOHN", ""]
    for i in range(4):
        write_dicom(tmp_path / f"src/{i}.dcm", RAMP + i, patient=f"00{i // 2}",
                    SOPInstanceUID=f"1.2.{i}", StudyInstanceUID=studies[i], ViewPosition=views[i])
    dicom(tmp_path, "--allow", "empty-split")
    text = (tmp_path / "out/manifest.csv").read_text()
    assert text.startswith("path,patient,split,study,view\n")
    assert "1.2.77" not in text and "MILLER" not in text
    manifest = read_manifest(tmp_path / "out")
    assert sorted(manifest.view_positions.tolist()) == ["", "", "LATERAL", "PA"]
    assert all(len(study) in (0, 16) for study in manifest.studies)
    same = manifest.studies[manifest.view_positions != ""]
    assert same[0] == same[1] != "" and len(set(manifest.studies)) == 3
    assert len(set(manifest.patients)) == 2 and len(set(study_numbers(manifest))) == 3


def test_dicom_labels(tmp_path):
    for i in range(4):
        write_dicom(tmp_path / f"src/{i}.dcm", RAMP + i, patient=f"00{i}",
                    SOPInstanceUID=f"1.2.{i}")
    table = tmp_path / "rows.csv"
    write_csv(table, [("PatientID", "Edema", "Mass"),
                      ("001", 1, ""), ("002", 0, -1), ("009", 1, 1)])
    dicom(tmp_path, "--labels", tmp_path / "rows.csv", "--allow", "constant-label")
    lines = (tmp_path / "out/manifest.csv").read_text().splitlines()
    assert lines[0] == "path,patient,split,study,Edema,Mass"
    cells = sorted(line.split(",")[4:] for line in lines[1:])
    assert cells == [["", ""], ["", ""], ["0", "-1"], ["1", ""]]
    assert "009,\"PatientID in rows.csv" in (tmp_path / "out.rejected.csv").read_text()
    write_csv(table, [("SOPInstanceUID", "PatientName", "Mass"), ("1.2.3", "Miller", 1)])
    by_image = ("--labels", table, "--key", "SOPInstanceUID", "--allow", "constant-label")
    dicom(tmp_path, *by_image, "--label-columns", "Mass", out="by_image")
    lines = (tmp_path / "by_image/manifest.csv").read_text().splitlines()
    assert sorted(line.split(",")[4] for line in lines) == ["", "", "", "1", "Mass"]
    # Or Miller would become a label.
    with pytest.raises(SystemExit, match="rows.csv must hold 1, 0, -1 or blanks"):
        dicom(tmp_path, *by_image, out="names")
    assert not (tmp_path / "names/DATA.md").exists()
    write_csv(table, [("PatientID", "Mass"), ("001", 1), ("", 1)])
    with pytest.raises(SystemExit, match="row 3: its key is empty"):    # or it were of all without
        dicom(tmp_path, "--labels", table, out="blank")
    write_csv(table, [("PatientID", "Mass"), ("1", 1)])         # a spreadsheet ate the zeros
    with pytest.raises(SystemExit, match="no PatientID in it is that of a DICOM file"):
        dicom(tmp_path, "--labels", table, out="zeros")


@pytest.mark.parametrize("name, cell", [
    ("Referring", "Dr. Quincy"), ("Cohort", "external"), ("TB", "reactivo"), ("score", "0.35")])
def test_a_column_of_words_is_named_by_its_row_and_not_its_cell(tmp_path, name, cell):
    for i in range(4):
        write_dicom(tmp_path / f"src/{i}.dcm", RAMP + i, patient=f"00{i}",
                    SOPInstanceUID=f"1.2.{i}")
    write_csv(tmp_path / "rows.csv", [("PatientID", "Mass", name), ("000", 1, ""),
                                      *((f"00{i}", i % 2, cell) for i in range(1, 4))])
    with pytest.raises(SystemExit, match=f"rows.csv must hold .*: row 3, column {name}, does not; "
                       ".* by --label-columns, .* --split-column") as refused:
        dicom(tmp_path, "--labels", tmp_path / "rows.csv")
    assert cell not in str(refused.value)


def test_dicom_tells_which_words_were_read_as_values(tmp_path, capsys):
    for i in range(4):
        write_dicom(tmp_path / f"src/{i}.dcm", SCAN + i, patient=f"P{i}")
    (tmp_path / "rows.csv").write_text(
        "PatientID,Mass,Edema\nP0,pos,Y\nP1,neg,N\nP2,unknown,N\nP3,neg,1\n")
    dicom(tmp_path, "--labels", tmp_path / "rows.csv")
    for text in (capsys.readouterr().out, (tmp_path / "out/DATA.md").read_text()):
        assert "Column Mass: neg read as 0 (2), pos as 1 (1)." in text
        assert "Not mentioned in column Mass: 1 cells that say 'unknown'." in text
        assert "Column Edema: N read as 0 (2), Y as 1 (1)." in text


def test_dicom_labels_by_file_know_rejected_namesakes(tmp_path):
    """Of two files of one name the row may mean either, also where one is a CT or damaged."""
    for i in range(4):
        write_dicom(tmp_path / f"src/a/{i}.dcm", SCAN + i, patient=f"P{i}")
    write_csv(tmp_path / "rows.csv", [("file", "Mass"), *((i, i % 2) for i in range(4))])
    flags = ("--labels", tmp_path / "rows.csv", "--key", "file")
    (tmp_path / "src/b").mkdir()
    (tmp_path / "src/b/1").write_text("notes")                  # is no image, and never was
    (tmp_path / "src/b/2.dcm").write_bytes((tmp_path / "src/a/2.dcm").read_bytes())     # a copy
    dicom(tmp_path, *flags)
    for file, why in (("3.dcm", "modality CT"), ("0.dcm", "not a DICOM file")):
        if why.endswith("CT"):
            write_dicom(tmp_path / "src/b" / file, RAMP, Modality="CT")
        else:
            (tmp_path / "src/b" / file).write_text("<html>")
        message = f"2 files in .* are called {file[0]}: --key file.*also from b/{file}, .*{why}"
        with pytest.raises(SystemExit, match=message):
            dicom(tmp_path, *flags, out="other")
        (tmp_path / "src/b" / file).unlink()


def test_dicom_takes_tables_of_several_rows_and_words(tmp_path):
    """As VinBigData has them: three readers, each of whom may have drawn several boxes."""
    said = {"a": ["R1 Mass", "R1 Mass", "R2 Mass", "R3 No finding"], "c": ["R1 Cyst", "R2 Cyst"],
            "b": ["R1 No finding", "R2 No finding", "R3 Mass"], "d": ["R1 No finding"]}
    for i, name in enumerate(said):
        write_dicom(tmp_path / f"src/{name}.dicom", SCAN + i, patient=f"P{i}")
    rows = [(name, *word.split(" ", 1)) for name, words in said.items() for word in words]
    write_csv(tmp_path / "train.csv", [("image_id", "rad_id", "class_name"), *rows,
                                       ("elsewhere", "R1", "Elsewhere")])
    flags = ("--labels", tmp_path / "train.csv", "--key", "file", "--key-column", "image_id",
             "--val-fraction", 0, "--test-fraction", 0)
    by_name = (*flags, "--label-columns", "class_name")
    with pytest.raises(SystemExit, match="row 3, .*a is already in row 2; --several-rows"):
        dicom(tmp_path, *by_name)
    with pytest.raises(SystemExit, match="must hold 1, 0, -1 or blanks: .* by --class-columns"):
        dicom(tmp_path, *flags, "--several-rows", "any")
    with pytest.raises(SystemExit, match="train.csv must have one column 'reader', its header is"):
        dicom(tmp_path, *flags, "--several-rows", "any", "--rater-column", "reader")
    for rule, mass in (("any", [0, 0, 1, 1]), ("majority", [0, 0, 0, 1])):
        rater = ("--rater-column", "rad_id") if rule == "majority" else ()
        dicom(tmp_path, *by_name, "--several-rows", rule, *rater, out=rule)
        manifest = read_manifest(tmp_path / rule)
        assert manifest.label_names == ["Cyst", "Mass", "No finding"]
        assert sorted(manifest.labels[:, 1].tolist()) == mass
    card = (tmp_path / "any/DATA.md").read_text()
    assert "Images without a row of labels: 0" in card and "--several-rows any" in card
    assert "elsewhere,\"file in train.csv" in (tmp_path / "any.rejected.csv").read_text()


@pytest.mark.parametrize("ids, by_table", [
    (("7", "007"), False), (("7", "7.0"), False), (("P7", "p 07"), False), (("8", "9"), True),
    (("70 500", "70500"), False)])
def test_patient_ids_that_differ_in_form_only(tmp_path, capsys, ids, by_table):
    for i, patient in enumerate([*ids, "1", "2"]):
        write_dicom(tmp_path / f"src/{i}.dcm", SCAN + i, patient=patient)
    flags = ()
    if by_table:                        # 8 is labelled, 9 is not, as its row says 09
        write_csv(tmp_path / "rows.csv", [("PatientID", "Mass"), ("8", 1), ("09", 0), ("1", 0)])
        flags = ("--labels", tmp_path / "rows.csv")
    with pytest.raises(SystemExit) as caught:
        dicom(tmp_path, *flags)
    other = "rows.csv, row 3" if by_table else "1.dcm"
    assert f"{'1' if by_table else '0'}.dcm and {other} differ in form only" in str(caught.value)
    dicom(tmp_path, *flags, "--allow", "similar-patients")
    dicom(tmp_path, "--patient-from", "file", out="by_file")


def test_a_dicom_file_with_new_pixels_is_made_again(tmp_path, capsys):
    for i in range(3):
        write_dicom(tmp_path / f"src/{i}.dcm", SCAN + i, patient=f"P{i}")
    dicom(tmp_path)
    write_dicom(tmp_path / "src/1.dcm", SCAN[::-1], patient="P1")
    before = {file: file.read_bytes() for file in (tmp_path / "out/images").rglob("*.jpg")}
    capsys.readouterr()
    dicom(tmp_path)
    assert "2 of 3 images are there already" in capsys.readouterr().out
    assert sum(file.read_bytes() != content for file, content in before.items()) == 1


def test_labels_of_a_patient_are_those_of_all_images_and_that_is_said(tmp_path):
    for i in range(8):                  # patients 0 and 1 have two studies, 2 and 3 one
        write_dicom(tmp_path / f"src/{i}.dcm", SCAN + i, patient=f"P{i // 2}",
                    StudyInstanceUID=f"1.2.{i if i < 4 else 10 + i // 2}")
    write_csv(tmp_path / "rows.csv", [("PatientID", "y"), ("P0", 1), ("P1", 0), ("P2", 1)])
    dicom(tmp_path, "--labels", tmp_path / "rows.csv")
    card = (tmp_path / "out/DATA.md").read_text()
    assert ("A row is of a PatientID and labels all its images: 3 rows label several, 2 of them "
            "several studies, whose findings may differ." in card)
    assert "Images without a row of labels: 2; nothing" in card
    write_csv(tmp_path / "rows.csv", [("StudyInstanceUID", "y"), ("1.2.12", 1), ("1.2.3", 0)])
    dicom(tmp_path, "--labels", tmp_path / "rows.csv", "--key", "StudyInstanceUID", out="study")
    assert "1 rows label several" in (tmp_path / "study/DATA.md").read_text()


def test_dicom_compressed(tmp_path):
    dataset = write_dicom(tmp_path / "src/rle.dcm", RAMP, patient="rle")
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(tmp_path / "src/rle.dcm", enforce_file_format=True)
    jpeg2000 = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint16)).save(jpeg2000, "JPEG2000", no_jp2=True)
    dataset = write_dicom(tmp_path / "src/j2k.dcm", RAMP, patient="j2k", BitsStored=16, HighBit=15)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([jpeg2000.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "src/j2k.dcm", enforce_file_format=True)
    dicom(tmp_path)
    images = [np.asarray(Image.open(file), float)
              for file in (tmp_path / "out/images").rglob("*.jpg")]
    assert len(images) == 2
    assert all(np.abs(image / 255 - RAMP / 4095).mean() < 0.01 for image in images)


def test_ctrl_c_in_headers_is_one_sentence(tmp_path):
    write_dicom(tmp_path / "src/0.dcm", RAMP)
    links(tmp_path / "src/0.dcm")
    out = tmp_path / "out"
    code, error = interrupted(["dicom", "--src", tmp_path / "src", "--out", out], "headers: ")
    assert code == 130 and "Traceback" not in error, error
    # A progress bar that was cut short may stand before it on the line.
    assert "prepare.py: interrupted" in error.splitlines()[-1], error
    assert not (out / "manifest.csv").exists()


# --------------------------------------------------------------------------------------------------
# Copies, blank identities, folders in keys, and a sign that is none.

def test_dicom_copies(tmp_path, capsys):
    """Of the files of one SOPInstanceUID the first intact one is taken; other images are missed."""
    for i in range(8):
        image = {"SOPInstanceUID": f"1.2.{i}", "patient": str(i)}
        write_dicom(tmp_path / f"src/b/{i}.dcm", RAMP + i, **image)
        write_dicom(tmp_path / f"src/c/{i}.dcm", RAMP + i, **image)
        if i < 3:
            write_dicom(tmp_path / f"src/a/{i}.dcm", RAMP + i, PixelData=bytes(18), **image)
    dicom(tmp_path)
    assert len(read_manifest(tmp_path / "out").paths) == 8
    reasons = (tmp_path / "out.rejected.csv").read_text()
    assert "a/0.dcm,\"damaged, and another file of its SOPInstanceUID is not\"" in reasons
    assert "c/0.dcm,SOPInstanceUID of an earlier file\n" in reasons
    for i in range(8):
        write_dicom(tmp_path / f"src/d/{i}.dcm", RAMP.T, SOPInstanceUID=f"1.2.{i}", patient=str(i))
    with pytest.raises(SystemExit, match="8 of 16 images would be left out, all of them for one "
                       "reason: SOPInstanceUID of an earlier file, which shows another image"):
        dicom(tmp_path, out="other")


def test_dicom_salt_is_a_file(tmp_path):
    write_dicom(tmp_path / "src/x.dcm", RAMP)
    with pytest.raises(SystemExit, match="--salt .* is no file"):
        dicom(tmp_path, "--salt", tmp_path)


def test_dicom_blank_patients(tmp_path):
    for i in range(8):
        write_dicom(tmp_path / f"src/{i}.dcm", RAMP + i, patient="", StudyInstanceUID=f"1.{i}")
    dicom(tmp_path)
    assert "Images without a PatientID: 8 of 8. There each study" in (
        tmp_path / "out/DATA.md").read_text()
    write_dicom(tmp_path / "src/8.dcm", RAMP, patient="P", StudyInstanceUID="1.0")
    with pytest.raises(SystemExit, match="7 of 9 images, such as 1.dcm, have no PatientID"):
        dicom(tmp_path, out="mixed")
    # Whose the others of its study are is not unknown.
    dicom(tmp_path, "--allow", "unknown-patients", out="mixed")
    assert len(set(read_manifest(tmp_path / "mixed").patients.tolist())) == 8


def test_dicom_labels_by_file_in_folders(tmp_path):
    for site in "AB":
        for i in range(4):
            write_dicom(tmp_path / f"src/{site}/{i}.dcm", RAMP + i, patient=f"{site}{i}",
                        SOPInstanceUID=f"1.{ord(site)}.{i}")
    table = tmp_path / "rows.csv"
    flags = ("--labels", table, "--key", "file")
    write_csv(table, [("file", "Mass"), *((f"C/{i}.dcm", i % 2) for i in range(4))])
    with pytest.raises(SystemExit, match="no file in it is that of a DICOM file"):
        dicom(tmp_path, *flags)
    write_csv(table, [("file", "Mass"), *((f"archive\\{site}\\{i}.dcm", int(site == "A"))
                                          for site in "AB" for i in range(4))])
    dicom(tmp_path, *flags, out="folders")
    assert sorted(read_manifest(tmp_path / "folders").labels[:, 0].tolist()) == [0] * 4 + [1] * 4
    write_csv(table, [("file", "Mass"), ("A/1.dcm", 0), ("src/A/1.dcm", 1)])
    with pytest.raises(SystemExit, match="rows 2 and 3: both may name A/1.dcm"):
        dicom(tmp_path, *flags, out="twice")


def test_dicom_unsigned_that_claims_a_sign(tmp_path):
    write_dicom(tmp_path / "src/x.dcm", RAMP * 16, stored=16, PixelRepresentation=1)
    dicom(tmp_path)
    image = Image.open(next((tmp_path / "out/images").rglob("*.jpg")))
    assert np.abs(np.asarray(image) / 255 - RAMP / 4095).max() < 0.08
    assert "PixelRepresentation not believed: 1, without a sign" in (
        tmp_path / "out/DATA.md").read_text()


@pytest.mark.parametrize("elements, words", [
    ({"Modality": "RF"}, "modality RF, not CR or DX .--modality CR DX RF takes it, too"),
    ({"Modality": "xa"}, "--modality CR DX xa takes it, too"),
    *(({"BurnedInAnnotation": value}, f"BurnedInAnnotation is {value.upper()}: a name")
      for value in ("Y", "true", "1", "PARTLY", "UNKNOWN")),
    *(({"BurnedInAnnotation": value}, "") for value in ("N", "no", "FALSE", "0", ""))])
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_words_of_a_header_are_read_in_any_form(tmp_path, elements, words):
    write_dicom(tmp_path / "x.dcm", RAMP, **elements)
    read = partial(read_radiograph, modalities=["CR", "DX"])
    if words:
        with pytest.raises(DataError, match=words):
            load_image(tmp_path / "x.dcm", read, ImageSettings())
    else:
        load_image(tmp_path / "x.dcm", read, ImageSettings())


@pytest.mark.parametrize("written, meant", [("Monochrome2", "MONOCHROME2"),
                                            ("monochrome1", "MONOCHROME1")])
@pytest.mark.parametrize("elements", [{}, {"WindowCenter": 2000, "WindowWidth": 3000}])
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_photometric_interpretation_in_small_letters(tmp_path, written, meant, elements):
    images = []
    for word in (written, meant):
        write_dicom(tmp_path / "x.dcm", RAMP, photometric=word, **elements)
        read = partial(read_radiograph, modalities=["CR"])
        images.append(load_image(tmp_path / "x.dcm", read, ImageSettings()))
    assert images[0].notes == images[1].notes
    assert (np.asarray(images[0].image) == np.asarray(images[1].image)).all()


def several(tmp_path, count=12, **elements):
    """Images of two each of a patient; an element is a value, or a function of the number."""
    for i in range(count):
        own = {name: value(i) if callable(value) else value for name, value in elements.items()}
        write_dicom(tmp_path / f"src/{i}.dcm", np.roll(SCAN, 5 * i, 1), patient=f"P{i // 2}",
                    StudyInstanceUID=f"1.2.{i // 2}", **own)


def test_views_and_parts_of_the_body_are_told_and_chosen(tmp_path, capsys):
    several(tmp_path, ViewPosition=lambda i: ["PA", "LL"][i % 2],
            BodyPartExamined=lambda i: ["Chest PA", "HAND", "Miller", ""][i % 4])
    dicom(tmp_path)
    text = capsys.readouterr().out
    assert "Views by the headers: PA 6, LL 6. --view takes" in text and "iller" not in text
    assert "Body parts by the headers: CHEST 3, HAND 3, OTHER 3, none 3. --body-part" in text
    dicom(tmp_path, "--view", "pa", "ap", "--body-part", "chest", "none", out="chosen")
    assert read_manifest(tmp_path / "chosen").view_positions.tolist() == ["PA"] * 3
    reasons = Counter(row[1] for row in csv.reader(open(tmp_path / "chosen.rejected.csv")))
    assert reasons["view LL, not PA or AP"] == 6
    assert reasons["body part OTHER, not CHEST or NONE"] == 3


def test_nothing_is_said_of_frontal_chests(tmp_path, capsys):
    several(tmp_path, ViewPosition="PA", BodyPartExamined="CHEST")
    dicom(tmp_path)
    assert "by the headers" not in capsys.readouterr().out


@pytest.mark.parametrize("key, column", [("AccessionNumber", "AccessionNumber"), ("file", "image")])
def test_labels_by_accession_number_or_by_the_names_of_pngs(tmp_path, key, column):
    several(tmp_path, AccessionNumber=lambda i: f"A{i}")
    names = [f"{i}.png" if key == "file" else f"A{i}" for i in range(12)]
    write_csv(tmp_path / "l.csv", [(column, "y"), *((name, i % 2) for i, name in enumerate(names))])
    dicom(tmp_path, "--labels", tmp_path / "l.csv", "--key", key, "--key-column", column,
          "--label-columns", "y")
    manifest = read_manifest(tmp_path / "out")
    assert sorted(manifest.labels[:, 0].tolist()) == [0] * 6 + [1] * 6
    assert "A1" not in (tmp_path / "out/manifest.csv").read_text()


@pytest.mark.parametrize("column, flags, splits", [
    ("split", (), {"train": 8, "test": 4}), ("split", ("--label-columns", "y"), {"train": 8,
                                                                                "test": 4}),
    ("Set", ("--split-column", "Set"), {"train": 8, "test": 4}),
    ("Set", ("--label-columns", "y"), "column 'Set' of l.csv seems to name the splits: "
                                      "--split-column Set takes them"),
    ("split", ("--split-column", "fold"), "must have one column 'fold'")])
def test_splits_of_a_table_of_labels(tmp_path, column, flags, splits):
    several(tmp_path)
    write_csv(tmp_path / "l.csv", [("PatientID", "y", column), *(
        (f"P{i}", i % 2, "Testing" if i < 2 else "train") for i in range(6))])
    command = "--labels", tmp_path / "l.csv", *flags, "--val-fraction", 0
    if isinstance(splits, str):
        with pytest.raises(SystemExit, match=splits):
            dicom(tmp_path, *command)
        return
    dicom(tmp_path, *command)
    assert Counter(read_manifest(tmp_path / "out").splits.tolist()) == splits


def test_a_column_of_splits_needs_its_table(tmp_path, capsys):
    several(tmp_path)
    with pytest.raises(SystemExit):
        dicom(tmp_path, "--split-column", "Set")
    assert "--split-column is about columns of --labels" in capsys.readouterr().err


def test_ids_of_a_table_that_differ_in_form_are_told(tmp_path):
    several(tmp_path)
    write_csv(tmp_path / "l.csv", [("PatientID", "y"), *((f"p0{i}", i % 2) for i in range(6))])
    with pytest.raises(SystemExit, match="no PatientID in it .* differ in form only, as 7.0 and 0"):
        dicom(tmp_path, "--labels", tmp_path / "l.csv", "--label-columns", "y")


def jpeg_inside(dataset, image):
    """Make a file's pixels those of a JPEG."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7


@pytest.mark.parametrize("mode, size, words", [
    ("L", (64, 64), ""), ("RGB", (64, 64), "in colour, although its header says that it is gray"),
    ("L", (32, 128), "its image has 32 x 128 pixels, and its header says 64 x 64"),
    ("short", (), "its pixels cannot be decoded"), ("empty", (), "there is no pixel data in it"),
    ("processing", (), "FOR PROCESSING")])
def test_headers_that_contradict_the_pixels(tmp_path, mode, size, words):
    dataset = write_dicom(tmp_path / "x.dcm", SCAN)
    if size:
        jpeg_inside(dataset, Image.fromarray((SCAN / 13).astype(np.uint8)).convert(mode).resize(
            size))
    elif mode == "processing":
        dataset.PresentationIntentType = "For Processing"
    else:
        dataset.PixelData = dataset.PixelData[:-100] if mode == "short" else b""
    dataset.save_as(tmp_path / "x.dcm")
    read = partial(read_radiograph, modalities=["CR"])
    if words:
        with pytest.raises(DataError, match=words):
            load_image(tmp_path / "x.dcm", read, ImageSettings())
        return
    levels = np.asarray(load_image(tmp_path / "x.dcm", read, ImageSettings()).image, float)
    assert np.corrcoef(levels.ravel(), SCAN.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("elements, words", [
    ({"Rows": 0}, "Rows is 0, as of no gray image"), ({"Columns": [64, 64]}, "Columns is .64, 64."),
    ({"SamplesPerPixel": 3}, "SamplesPerPixel is 3"), ({"SamplesPerPixel": None}, "is missing"),
    ({"BitsAllocated": 12}, "BitsAllocated is 12"),
    ({"BitsStored": 17}, "BitsStored is 17 and BitsAllocated 16"), ({"BitsStored": 0}, "is 0 and"),
    ({"PixelRepresentation": 2}, "PixelRepresentation is 2"),
    ({"Columns": 65}, "its pixels cannot be decoded: 8,192 of 8,320 bytes are there"),
    ({"Rows": 32}, "cannot be decoded: 8,192 bytes are there, and an image takes 4,096"),
    ({"Rows": 16}, "cannot be decoded: 8,192 bytes are there, and an image takes 2,048"),
    ({"PhotometricInterpretation": "MONOCHROME 1"}, "is MONOCHROME 1, and neither MONOCHROME1 nor"),
    ({"PhotometricInterpretation": "GRAY"}, "is GRAY, and neither"),
    ({"PhotometricInterpretation": "palette color"}, "in colour .PALETTE COLOR.")])
def test_impossible_headers_are_named_by_their_element(tmp_path, elements, words):
    write_dicom(tmp_path / "x.dcm", RAMP, **elements)
    with pytest.raises(DataError, match=words) as refused:
        load_image(tmp_path / "x.dcm", partial(read_radiograph, modalities=["CR"]), ImageSettings())
    assert "Error" not in str(refused.value) and "'" not in str(refused.value)


def test_a_file_without_an_image_says_so(tmp_path):
    """A report whose header does not even say what it is."""
    (tmp_path / "x.dcm").write_bytes(bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0\0\0\0\0")
    with pytest.raises(DataError, match="^not an image"):
        load_image(tmp_path / "x.dcm", partial(read_radiograph, modalities=["CR"]),
                   ImageSettings())


def test_broken_dicom_files_are_counted_whatever_lies_beside_them(tmp_path):
    """A text file is none of the images; a file called .dcm that is HTML is a lost one."""
    several(tmp_path)
    for i in range(12):
        (tmp_path / f"src/bad{i}.dcm").write_text("<html>")
    (tmp_path / "src/README.txt").write_text("notes")
    with pytest.raises(SystemExit, match="12 of 24 images .* a DICOM file, though it is called so"):
        dicom(tmp_path)


@pytest.mark.parametrize("suffix", [".dcm.gz", ".DCM.zip", ".ima.xz"])
def test_packed_dicom_files_are_lost_ones(tmp_path, suffix):
    several(tmp_path)
    for i in range(12):
        (tmp_path / f"src/packed{i}{suffix}").write_bytes(b"\x1f\x8b")
    (tmp_path / "src/notes.txt.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(SystemExit, match=r"12 of 24 images .* packed .*: unpack it first"):
        dicom(tmp_path)


def test_labels_where_no_file_is_taken(tmp_path):
    several(tmp_path, Modality="CT")
    write_csv(tmp_path / "l.csv", [("PatientID", "y"), *((f"P{i}", i % 2) for i in range(6))])
    with pytest.raises(SystemExit, match="no image found .*12 files: modality CT, not CR or DX"):
        dicom(tmp_path, "--labels", tmp_path / "l.csv")


def test_a_table_that_pandas_wrote_with_its_index(tmp_path):
    several(tmp_path)
    rows = [(i, f"P{i}", i % 2) for i in range(6)]
    write_csv(tmp_path / "l.csv", [("", "PatientID", "y"), *rows])
    dicom(tmp_path, "--labels", tmp_path / "l.csv")
    assert read_manifest(tmp_path / "out").label_names == ["y"]
    write_csv(tmp_path / "l.csv", [("", "id", "y"), *rows])
    with pytest.raises(SystemExit, match="one column 'PatientID', .*'; --key-column names another"):
        dicom(tmp_path, "--labels", tmp_path / "l.csv", out="other")


def test_classes_of_dicom_that_train_lacks(tmp_path):
    several(tmp_path)
    rows = [(f"P{i}", "AABBAC"[i], "train" if i < 4 else "test") for i in range(6)]
    write_csv(tmp_path / "l.csv", [("PatientID", "dx", "split"), *rows])
    with pytest.raises(SystemExit, match="class 'C' stands in test and not in train"):
        dicom(tmp_path, "--labels", tmp_path / "l.csv", "--label-columns", "dx")


def test_masks_that_are_allowed_are_no_copies_of_one_another(tmp_path):
    """Two drawings of one UID, each of two gray levels, show two images."""
    for i in range(2):
        mask = np.kron(np.eye(2) if i else np.array([[0, 1], [1, 1]]), np.full((32, 32), 4095))
        write_dicom(tmp_path / f"src/{i}.dcm", mask, SOPInstanceUID="1.2.3")
    with pytest.raises(SystemExit):
        dicom(tmp_path)
    dicom(tmp_path, "--allow", "masks", "many-left-out")
    assert "which shows another image" in (tmp_path / "out.rejected.csv").read_text()


def test_what_the_hospital_keeps_lies_beside_a_data_folder_that_is_a_dot(tmp_path, monkeypatch):
    several(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    run("dicom", "--src", tmp_path / "src", "--out", ".", "--workers", 2)
    assert {file.name for file in tmp_path.iterdir()} == {
        "src", "out", "out.salt", "out.rejected.csv"}
    assert not [file for file in (tmp_path / "out").iterdir() if "rejected" in file.name]


def test_folders_and_columns_that_nobody_reads_are_said(tmp_path):
    """Splits in the names of folders or in a column, and findings in the names of folders."""
    def write(folder, number):
        write_dicom(tmp_path / f"{folder}/{number}.dcm", RAMP, patient=f"P{number}",
                    SOPInstanceUID=f"1.4.{number}")

    def convert(src, *flags):
        run("dicom", "--src", tmp_path / src, "--workers", 1, "--allow", "empty-split",
            "--overwrite", "--out", tmp_path / "out", *flags)

    for number, folder in enumerate(("a/train/x", "a/train/x", "a/test/x", "b/VAL", "b/Training")):
        write(folder, number)
    for src, called in (("a", "test and train"), ("b", "Training and VAL")):
        with pytest.raises(SystemExit, match=f"folders of .*/{src} are called {called}, and are"):
            convert(src)
    write_csv(tmp_path / "splits.csv", [("PatientID", "split"), ("P3", "val"), ("P4", "train")])
    convert("b", "--labels", tmp_path / "splits.csv")
    assert sorted(read_manifest(tmp_path / "out").splits) == ["train", "val"]

    for number, folder in enumerate(("c/NORMAL", "c/Tuberculosis", "c/NORMAL")):
        write(folder, number)
    convert("c")
    assert "are not taken for labels: 2." in (tmp_path / "out/DATA.md").read_text("utf-8")
    for name in ("is_train", "test set"):
        write_csv(tmp_path / "labels.csv", [("PatientID", "tb", name), ("P0", 1, 0), ("P1", 0, 1)])
        with pytest.raises(SystemExit, match=f"column '{name}' of labels.csv seems to name the sp"):
            convert("c", "--labels", tmp_path / "labels.csv")


@pytest.mark.parametrize("file, told", [
    ("{kind}/{i}.dcm", True),
    ("disc/{kind}/P{i}/S1/{i}.dcm", True),
    ("train/{kind}/{i}.dcm", True),
    ("P{i}/{kind}/{i}.dcm", False), ("PAT{i:04}/STD0/{i}.dcm", False),
    ("part{half}/{i}.dcm", False),
    ("2019{half}/{i}.dcm", False), ("{i}.dcm", False)])
def test_folders_that_may_be_classes_are_told(tmp_path, capsys, file, told):
    for i in range(8):
        write_dicom(tmp_path / "src" / file.format(
            i=i, half=i % 2, kind=("Silicosis", "Asbestosis")[i % 2]), RAMP, patient=f"P{i}",
            StudyInstanceUID=f"1.5.{i}", SOPInstanceUID=f"1.4.{i}")
    dicom(tmp_path)
    note = "hold several patients each, as classes do, are not taken for labels: 2. --labels"
    assert (note in capsys.readouterr().out) == told
    # Names of folders are not for a data folder.
    assert "Silicosis" not in (tmp_path / "out/DATA.md").read_text("utf-8")
