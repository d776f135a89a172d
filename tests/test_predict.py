"""Prediction as a user meets it: a classifier.pt and a folder in, a table and overlays out."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import finetune
import predict
from manifest import read_manifest
from model import Classifier, build_encoder
from run import load_checkpoint


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
    assert (out / "predictions.csv").read_text().splitlines()[0] == "path,Mass,Effusion"
    names = {path.name for path in (out / "explained").glob("*_00[012]_*_?.??.png")}
    assert len(names) == 3 and Image.open(out / "explained" / min(names)).size == (32, 32)

    # Fewer overlays the next time: none of the old ones stays.
    main(classifier, labelled, "--threads", 1, "--explain", 1)
    assert len(list((out / "explained").iterdir())) == 1

    # The same images without a manifest.
    main(classifier, labelled / "images", "--threads", 1, "--out", tmp_path / "images")
    np.testing.assert_array_equal(predicted, table(tmp_path / "images/predictions.csv"))
    assert not list(tmp_path.rglob("*.tmp")) and not list(out.rglob("*.tmp"))


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
    main(classifier, tmp_path / "a/../a/scans/", "--threads", 1)        # the same one again
    assert file.read_bytes() == before

    sentence = refused(classifier, tmp_path / "b/scans", "--threads", 1)
    assert f"({tmp_path}/a/scans there, {tmp_path}/b/scans here); choose another --out" in sentence
    assert file.read_bytes() == before
    main(classifier, tmp_path / "b/scans", "--threads", 1, "--out", tmp_path / "out")
    assert len(table(tmp_path / "out/predictions.csv")) == 4
    main(classifier, tmp_path / "b/scans", "--threads", 1, "--overwrite")
    assert len(table(file)) == 4
    assert json.loads((file.parent / "config.json").read_text())["data"].endswith("b/scans")


def test_wrong_input_is_refused_in_a_sentence(classifier, encoder, labelled, tmp_path):
    assert "is not a classifier.pt" in refused(encoder, labelled)
    assert "is not a folder" in refused(classifier, tmp_path / "nowhere")
    deep = tmp_path / "deep"
    deep.mkdir()
    assert "no manifest.csv and no image" in refused(classifier, deep)
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(deep / "scan.png")
    assert "scan.png has 16 bits a pixel" in refused(classifier, deep)
    assert not (classifier.parent / "predictions/deep").exists()
    (deep / "scan.png").write_bytes(b"no image")
    assert "scan.png cannot be read: cannot identify" in refused(classifier, deep)
    assert not (classifier.parent / "predictions/deep/predictions.csv").exists()


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


def test_help_and_two_processes(classifier, labelled):
    code, output = run("predict.py", "--help")
    assert code == 0 and "python predict.py runs/finetune/classifier.pt data/new" in output
    assert "CLASSIFIER.pt" in output and "--explain N" in output
    assert "beside the classifier" in output
    code, output = run("predict.py", classifier, labelled, processes=2)
    assert code == 0 and output.count("130 images, Mass, Effusion") == 1, output
