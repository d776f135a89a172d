"""Stage 0's DICOM source: gray levels as they are meant, and no identity in the data folder."""
import csv
import io
import zlib
from collections import Counter

import numpy as np
import pydicom
import pytest
from PIL import Image

from manifest import read_manifest
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
    ({"WindowCenter": 1024, "WindowWidth": 1024}, RAMP, ((RAMP - 512) / 1024).clip(0, 1)),
    ({"WindowCenter": [1024, 99], "WindowWidth": [1024, 9]}, RAMP,
     ((RAMP - 512) / 1024).clip(0, 1)),
    ({"WindowCenter": 1024, "WindowWidth": 1024, "photometric": "MONOCHROME1"}, RAMP,
     1 - ((RAMP - 512) / 1024).clip(0, 1)),
    ({"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 3000, "WindowWidth": 2000},
     RAMP,
     ((2 * RAMP - 1000 - 2000) / 2000).clip(0, 1)),
    ({"RescaleSlope": -1, "RescaleIntercept": 4095, "WindowCenter": 2048, "WindowWidth": 4096},
     RAMP, 1 - RAMP / 4095),
    ({"WindowCenter": 2048, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"}, RAMP,
     1 / (1 + np.exp(-4 * (RAMP - 2048) / 800))),
    (voi_table([i // 16 for i in range(4096)], 8), RAMP, RAMP / 4095),
    (voi_table([min(i, 1000) for i in range(4096)], 12), RAMP, (RAMP / 1000).clip(0, 1)),
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
    write_dicom(src / "named.dcm", RAMP, BurnedInAnnotation="YES")
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
    dicom(tmp_path, "--val-fraction", 0, "--test-fraction", 0)      # all of one patient
    assert len(read_manifest(tmp_path / "out").paths) == 1
    with open(tmp_path / "out.rejected.csv", newline="") as file:
        reasons = dict(list(csv.reader(file))[1:])
    words = {"ct.dcm": "modality CT, not CR or DX", "film.dcm": "3 frames",
             "colour.dcm": "in colour (RGB)", "huge.dcm": "60000 x 60000",
             "named.dcm": "BurnedInAnnotation", "flat.dcm": "blank",
             "nobody.dcm": "SOPInstanceUID is missing, or both PatientID and StudyInstanceUID are",
             "plan.dcm": "not an image (RT Structure Set Storage)", "short.dcm": "ValueError",
             "odd.dcm": "Error", "empty.dcm": "not a DICOM file",
             "good.dcm": "SOPInstanceUID of an earlier file"}           # again.dcm
    assert reasons.keys() == words.keys()
    assert all(word in reasons[name] for name, word in words.items()), reasons
    dicom(tmp_path, "--modality", "CT", out="ct")
    assert len(read_manifest(tmp_path / "ct").paths) == 1


def test_dicom_labels(tmp_path):
    for i in range(4):
        write_dicom(tmp_path / f"src/{i}.dcm", RAMP + i, patient=f"00{i}",
                    SOPInstanceUID=f"1.2.{i}")
    table = tmp_path / "rows.csv"
    write_csv(table, [("PatientID", "Edema", "Mass"),
                      ("001", 1, ""), ("002", 0, -1), ("009", 1, 1)])
    dicom(tmp_path, "--labels", tmp_path / "rows.csv")
    lines = (tmp_path / "out/manifest.csv").read_text().splitlines()
    assert lines[0] == "path,patient,split,Edema,Mass"
    cells = sorted(line.split(",")[3:] for line in lines[1:])
    assert cells == [["", ""], ["", ""], ["0", "-1"], ["1", ""]]
    assert "009,\"PatientID in rows.csv" in (tmp_path / "out.rejected.csv").read_text()
    write_csv(table, [("SOPInstanceUID", "PatientName", "Mass"), ("1.2.3", "Miller", 1)])
    by_image = ("--labels", table, "--key", "SOPInstanceUID")
    dicom(tmp_path, *by_image, "--label-columns", "Mass", out="by_image")
    lines = (tmp_path / "by_image/manifest.csv").read_text().splitlines()
    assert sorted(line.split(",")[3] for line in lines) == ["", "", "", "1", "Mass"]
    # Or Miller would become a label.
    with pytest.raises(SystemExit, match="rows.csv must hold 1, 0, -1 or blanks"):
        dicom(tmp_path, *by_image, out="names")
    assert not (tmp_path / "names/DATA.md").exists()
    write_csv(table, [("PatientID", "Mass"), ("1", 1)])         # a spreadsheet ate the zeros
    with pytest.raises(SystemExit, match="no PatientID in it is that of a DICOM file"):
        dicom(tmp_path, "--labels", table, out="zeros")


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
    assert error.splitlines()[-1].startswith("prepare.py: interrupted"), error
    assert not (out / "manifest.csv").exists()
