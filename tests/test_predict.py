"""Prediction as a user meets it: a classifier.pt and a folder in, a table and overlays out."""
import csv
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import predict
import prepare
from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from classifier import Classifier, image_flags
from dali_pipeline import Preprocessing, eval_loader
from manifest import read_manifest
from model import build_encoder
from test_dicom import RAMP, write_dicom


@pytest.fixture(scope="module")
def classifier(encoder, tmp_path_factory):
    """A classifier.pt of finetune.py, whose encoder.pt asks for other preprocessing than the
    defaults."""
    out = tmp_path_factory.mktemp("classifier") / "run"
    finetune.main(["--init", str(encoder), "--mode", "linear", "--seeds", "0", "1",
                   "--fraction", "0.5", "1", "--out", str(out)])
    return out / "classifier.pt"


def main(*arguments):
    """predict.py in this process, which saves the start of another."""
    predict.main([*map(str, arguments)])


def refused(*arguments):
    with pytest.raises(SystemExit) as end:
        main(*arguments)
    return str(end.value.code)


def table(file):
    return np.loadtxt(file, delimiter=",", skiprows=1, usecols=(1, 2))


def test_predictions_are_those_of_fine_tuning(classifier, labelled, tmp_path):
    """The kept classifier, on images, gives the probabilities that the probe gave on features."""
    main(classifier, labelled, "--threads", 1, "--explain", 3)
    out = classifier.parent / "predictions" / labelled.name
    kept = max(load_checkpoint(classifier.parent / "predictions.pt").values(),
               key=lambda entry: entry["val_score"])
    manifest, predicted = read_manifest(labelled), table(out / "predictions.csv")
    np.testing.assert_allclose(predicted[manifest.images("test")], kept["test"], atol=1e-4)
    assert (out / "predictions.csv").read_bytes().startswith(b"path,Mass,Effusion\nimages/000.png,")
    names = {path.name for path in (out / "explained").glob("*_00[012]_*_?.??.png")}
    assert len(names) == 3 and Image.open(out / "explained" / min(names)).size == (32, 32)

    # Fewer overlays the next time: none of the old ones stays.
    main(classifier, labelled, "--threads", 1, "--explain", 1)
    assert len(list((out / "explained").iterdir())) == 1

    assert not list(tmp_path.rglob("*.tmp")) and not list(out.rglob("*.tmp"))


@pytest.fixture(scope="module")
def prepared(labelled, tmp_path_factory):
    """A data folder that prepare.py made of 20 PNG images of 16 bits."""
    out = tmp_path_factory.mktemp("prepared")
    for i in range(20):
        levels = np.asarray(Image.open(labelled / f"images/{i:03d}.png"), np.uint16) * 17 + 300
        levels = levels.repeat(7, 0).repeat(6, 1)                               # (336, 288)
        (out / f"src/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).save(out / f"src/{'ab'[i % 2]}/{i:03d}.png")
    prepare.main(["folder", "--src", str(out / "src"), "--out", str(out / "data"),
                  "--workers", "1"])
    return out


def by_name(file):
    """{name of the image, without folders and suffix: its row} of a predictions.csv."""
    with open(file, newline="") as f:
        return {Path(row["path"]).stem: [row["Mass"], row["Effusion"]] for row in csv.DictReader(f)}


def test_the_same_images_by_three_ways(classifier, prepared, tmp_path):
    """As prepare.py made them, the same without a manifest, and from what it made them of."""
    for name, folder in (("data", prepared / "data"), ("images", prepared / "data/images"),
                         ("raw", prepared / "src")):
        main(classifier, folder, "--threads", 1, "--out", tmp_path / name)
    data, images, raw = (by_name(tmp_path / name / "predictions.csv")
                         for name in ("data", "images", "raw"))
    assert len(data) == 20 and data == images == raw
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {
        "config.json", "predictions.csv", "rejected.csv"}
    assert (tmp_path / "raw/rejected.csv").read_text() == "file,reason\n"

    # One file, and its row is the one that it has among others.
    main(classifier, prepared / "src/a/004.png", "--threads", 1)
    file = classifier.parent / "predictions/004.png/predictions.csv"
    row, expected = by_name(file)["004"], raw["004"]
    np.testing.assert_allclose(np.array(row, float), np.array(expected, float), atol=1e-5)


def test_images_are_read_as_the_classifiers_own_were_made(classifier, prepared, tmp_path, capsys):
    """By --size, --quality and --stretch of its data folder, as far as no flag says otherwise."""
    flags = ["--size", "40", "--quality", "80", "--stretch", "5", "90"]
    prepare.main(["folder", "--src", str(prepared / "src"), "--out", str(tmp_path / "data"),
                  "--workers", "1", *flags])
    state = load_checkpoint(classifier)
    assert state["config"]["images"] == {}              # that folder was not made by prepare.py
    images = image_flags(tmp_path / "data")
    assert images == {"size": 40, "quality": 80, "stretch": [5, 90]}

    def predicted(folder, name, images, *arguments):
        state["config"]["images"] = images
        save_checkpoint(tmp_path / "classifier.pt", state)
        main(tmp_path / "classifier.pt", folder, "--threads", 1, "--out", tmp_path / name,
             *arguments)
        return by_name(tmp_path / name / "predictions.csv")

    expected = predicted(tmp_path / "data", "made", {})
    assert predicted(prepared / "src", "raw", images) == expected
    assert "as the classifier's own: --size 40, --quality 80, --stretch 5 90\n" \
        in capsys.readouterr().out
    # A data folder is taken as it is, and what differs is said.
    assert predicted(tmp_path / "data", "as it is", images | {"stretch": None}) == expected
    assert "here: --stretch (None there, 5.0 90.0 here)" in capsys.readouterr().out
    assert predicted(prepared / "src", "flags", images | {"size": 99, "stretch": None},
                     "--size", 40, "--stretch", 5, 90) == expected
    assert "warning: images are read by other flags than the classifier's own: --size (99 there, " \
        "40 here), --stretch (None there, 5.0 90.0 here)\n" in capsys.readouterr().out
    assert predicted(prepared / "src", "other", {}) != expected
    assert "read with --size 256, --quality 95: how the classifier's own were made is not known" \
        in capsys.readouterr().out
    # A flag that is as the classifier's own is no difference; for a data folder it says nothing.
    predicted(prepared / "src", "same flag", images, "--size", 40, "--stretch", 5, 90)
    assert "as the classifier's own: --size 40" in capsys.readouterr().out
    assert predicted(tmp_path / "data", "data, flag", images, "--size", 512) == expected
    assert "a data folder, are taken as they are: --size, --stretch and --modality change" \
        in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(classifier, prepared / "src", "--stretch", 90, 5)
    assert "two percentiles, 0 <= LOW < HIGH <= 100" in capsys.readouterr().err
    for wrong in ([1], {"size": 40}, images | {"size": -1}, images | {"stretch": [90, 5]}):
        state["config"]["images"] = wrong
        save_checkpoint(tmp_path / "classifier.pt", state)
        with pytest.raises(CheckpointError, match="says of no --size, --quality and --stretch"):
            predict.load_classifier(tmp_path / "classifier.pt")


def test_one_bad_image_costs_one_row(classifier, prepared, tmp_path, capsys):
    """DICOM files too; links are followed, and what is no image is passed over and counted."""
    src = tmp_path / "src"
    write_dicom(src / "good.dcm", RAMP, WindowCenter=40, WindowWidth=400)
    write_dicom(src / "no_suffix", RAMP)
    write_dicom(src / "ct.dcm", RAMP, Modality="CT")
    shutil.copytree(prepared / "src/a", tmp_path / "elsewhere")
    (src / "linked").symlink_to(tmp_path / "elsewhere")
    image = Image.open(prepared / "src/a/000.png")
    Image.fromarray(np.asarray(image).astype(np.float32)).save(src / "float.tif")
    image.convert("L").save(src / "wrong.png", "GIF")
    shutil.copy(src / "wrong.png", src / "film.gif")
    (src / "short.png").write_bytes((prepared / "src/a/000.png").read_bytes()[:3000])
    (src / "._a.png").write_bytes(b"AppleDouble")
    (src / "notes.txt").write_text("no image")
    (src / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    os.mkfifo(src / "pipe.png")
    shutil.copy(prepared / "src/a/002.png", src / ("0" * 251 + ".png"))
    sentence = refused(classifier, src, "--threads", 1, "--out", tmp_path / "out",
                       "--explain", 1)
    assert "4 of 18 images cannot be read" in sentence and "all in rejected.csv" in sentence
    printed = capsys.readouterr().out
    assert "passed over, as no images: 3 files (1 without a suffix, 1 .txt, 1 .png)" in printed
    assert "Window not used: 1, it would have made most of the image white." in printed
    rows = by_name(tmp_path / "out/predictions.csv")
    assert len(rows) == 14 and {"good", "no_suffix", "float", "000"} <= rows.keys()
    assert rows["good"] == rows["no_suffix"]
    with open(tmp_path / "out/rejected.csv", newline="") as file:
        reasons = dict(list(csv.reader(file))[1:])
    words = {"ct.dcm": "modality CT, not CR or DX", "wrong.png": "a GIF, none of PNG",
             "film.gif": "a GIF, none of PNG", "short.png": "truncated"}
    assert reasons.keys() == words.keys()
    assert all(word in reasons[name] for name, word in words.items()), reasons

    # Those that are broken, missing, or no files in a data folder, too.
    data = tmp_path / "data"
    shutil.copytree(prepared / "data", data)
    broken, missing, pipe = (data / read_manifest(data).paths[i] for i in (3, 5, 7))
    broken.write_bytes(broken.read_bytes()[:500])
    missing.unlink()
    pipe.unlink()
    os.mkfifo(pipe)
    sentence = refused(classifier, data, "--threads", 1, "--out", tmp_path / "broken")
    assert "3 of 20 images cannot be read and have no row" in sentence and broken.name in sentence
    rows = by_name(tmp_path / "broken/predictions.csv")
    assert len(rows) == 17 and not {broken.stem, missing.stem, pipe.stem} & rows.keys()
    reasons = (tmp_path / "broken/rejected.csv").read_text()
    assert f"{missing.name},missing on disk\n" in reasons
    assert f'{pipe.name},"no file, but a folder, a named pipe' in reasons


def test_a_blank_image_is_rejected_in_every_format(classifier, prepared, tmp_path):
    """Also as the JPEG that prepare.py would write, which is taken as it is."""
    shutil.copytree(prepared / "src/a", tmp_path / "src")
    for name in ("blank.jpg", "blank.png"):
        Image.new("L", (200, 200), 9).save(tmp_path / "src" / name, quality=95)
    assert "2 of 12 images cannot be read" in refused(
        classifier, tmp_path / "src", "--threads", 1, "--out", tmp_path / "out")
    assert (tmp_path / "out/rejected.csv").read_text() == "file,reason\n" + "".join(
        f"{name},blank: gray levels 9 to 9 only\n" for name in ("blank.jpg", "blank.png"))


def test_each_folder_has_predictions_of_its_own(classifier, labelled, tmp_path):
    """By its name; and where two have the same name the second is refused."""
    for parent, number in (("a", 3), ("b", 4)):
        (tmp_path / parent / "scans").mkdir(parents=True)
        for image in sorted((labelled / "images").iterdir())[:number]:
            shutil.copy(image, tmp_path / parent / "scans")
    main(classifier, tmp_path / "a/scans", "--threads", 1)
    file = classifier.parent / "predictions/scans/predictions.csv"
    before = file.read_bytes()
    assert len(table(file)) == 3
    (file.parent / "explained").mkdir()
    (file.parent / "explained/old.png").touch()
    main(classifier, tmp_path / "a/../a/scans/", "--threads", 1)        # the same one again
    assert file.read_bytes() == before and not list((file.parent / "explained").iterdir())

    sentence = refused(classifier, tmp_path / "b/scans", "--threads", 1)
    assert f"({tmp_path}/a/scans there, {tmp_path}/b/scans here); choose another --out" in sentence
    assert file.read_bytes() == before
    main(classifier, tmp_path / "b/scans", "--threads", 1, "--out", tmp_path / "out")
    assert len(table(tmp_path / "out/predictions.csv")) == 4
    main(classifier, tmp_path / "b/scans", "--threads", 1, "--overwrite")
    assert len(table(file)) == 4
    assert json.loads((file.parent / "config.json").read_text())["data"].endswith("b/scans")


def test_several_folders_in_one_call(classifier, labelled, tmp_path, capsys):
    """Each has an output folder of its own, and what is wrong with one stops no other."""
    images = sorted((labelled / "images").iterdir())
    for name, number in (("may", 3), ("june", 4), ("empty", 0)):
        (tmp_path / name).mkdir()
        for image in images[:number]:
            shutil.copy(image, tmp_path / name)
    Image.new("L", (40, 40), 9).save(tmp_path / "empty/blank.png")
    (tmp_path / "june/short.png").write_bytes(images[9].read_bytes()[:300])
    folders = [tmp_path / name for name in ("empty", "june", "may")]
    sentence = refused(classifier, *folders, images[5], "--threads", 1, "--out", tmp_path / "out")
    assert f"no image of {tmp_path}/empty can be read: blank.png" in sentence
    assert "; 1 of 5 images cannot be read and have no row in" in sentence
    assert "short.png: " in sentence and sentence.startswith("predict.py: ")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"empty", "june", "may", images[5].name}
    assert [len((out / name / "predictions.csv").read_text().splitlines())
            for name in ("june", "may", images[5].name)] == [5, 4, 2]

    # Before anything is written: one that is not there, and two of one name.
    assert "nowhere is not a folder" in refused(
        classifier, tmp_path / "may", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert "new/may must not lie inside" in refused(
        classifier, tmp_path / "may", tmp_path, "--out", tmp_path / "new")
    capsys.readouterr()
    assert refused(classifier, tmp_path / "may", tmp_path / "out/may") == "2"
    assert "two of DIR are called may" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_control_c_says_what_the_same_command_does(classifier, labelled, tmp_path, capsys):
    """It begins anew, and nothing half done stays."""
    def interrupt():
        while not any(tmp_path.glob("out/.images/*.jpg")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as end:
        main(classifier, labelled, "--threads", 1, "--out", tmp_path / "out")
    assert end.value.code == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "predict.py: interrupted; the same command begins anew"
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"config.json", "rejected.csv"}


def test_wrong_input_is_refused_in_a_sentence(classifier, encoder, labelled, tmp_path):
    assert "is not a classifier.pt" in refused(encoder, labelled)
    assert "is not a folder" in refused(classifier, tmp_path / "nowhere")
    deep = tmp_path / "deep"
    deep.mkdir()
    assert "no manifest.csv and no image" in refused(classifier, deep)
    assert not (classifier.parent / "predictions/deep").exists()
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(deep / "scan.png")
    assert "no image of" in refused(classifier, deep)
    assert "scan.png: blank: gray levels 3000 to 3000 only" in refused(classifier, deep)
    (deep / "scan.png").write_bytes(b"no image")
    assert "scan.png: cannot identify the image: unknown, none of PNG" in refused(classifier, deep)
    assert "must not lie inside" in refused(classifier, deep, "--out", deep / "out")
    assert not (classifier.parent / "predictions/deep/predictions.csv").exists()
    state = load_checkpoint(classifier)
    state["classifier"]["weight"][:] = 3e38
    save_checkpoint(tmp_path / "huge.pt", state)
    assert "predictions of 130 images are not finite, of images/000.png first; --precision fp32" \
        in refused(tmp_path / "huge.pt", labelled, "--threads", 1)
    assert not (tmp_path / "predictions" / labelled.name / "predictions.csv").exists()


def test_grad_cam_is_the_class_activation_map():
    """Behind mean pooling and one linear layer both are the same (Selvaraju et al. 2017)."""
    torch.manual_seed(0)
    net = Classifier(build_encoder("resnet18"), 2).eval()
    x, outputs = torch.randn(3, 1, 64, 64), torch.tensor([0, 1, 1])
    found = predict.grad_cam(net, x, outputs)
    with torch.no_grad():
        features = torch.nn.Sequential(*list(net.encoder.children())[:-2])(x)   # (3, C, 2, 2)
        cam = torch.einsum("bc,bchw->bhw", net.head.weight[outputs], features).clamp(min=0)[:, None]
        cam = torch.nn.functional.interpolate(cam, (64, 64), mode="bilinear")[:, 0]
        cam /= cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
    assert found.shape == (3, 64, 64) and found.max() == 1 and not found.requires_grad
    torch.testing.assert_close(found, cam, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, output", [("three-way", 3 * 1 + 1), ("exclusive", 1)])
def test_what_is_explained_is_that_a_label_is_present(labelled, tmp_path, kind, output):
    """Of a three-way label's absent, present and uncertain the second; names of labels that no
    file could have."""
    torch.manual_seed(1)
    net = Classifier(build_encoder("resnet18"), 6 if kind == "three-way" else 2).eval()
    manifest, images = read_manifest(labelled), np.arange(2)
    loader = eval_loader(manifest, images, 1, Preprocessing(64), "cpu")
    state = {"kind": kind, "thresholds": [0.9, 0.1], "labels": ["a", "../肺/b\n*"]}
    predict.explain(net, state, ["x/0.png", "y\n.png"], np.full((2, 2), 0.5), loader, tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["000000_0_..-肺-b-_0.50.png", "000001_y-_..-肺-b-_0.50.png"]
    for name, (x, _) in zip(names, loader):
        expected = predict.overlay(x[0], predict.grad_cam(net, x, torch.tensor([output]))[0])
        np.testing.assert_array_equal(Image.open(tmp_path / name), expected)


def test_help_and_two_processes(classifier, labelled, capsys, run_forked):
    with pytest.raises(SystemExit) as end:
        predict.main(["--help"])
    output = capsys.readouterr().out
    assert end.value.code == 0
    assert "python predict.py runs/finetune/classifier.pt data/new" in output
    assert "CLASSIFIER.pt" in output and "--explain N" in output
    assert "beside the classifier" in output
    codes, outputs = zip(*run_forked("predict.py", classifier, labelled, processes=2))
    assert codes == (0, 0) and "".join(outputs).count("130 images, Mass, Effusion") == 1, outputs
