"""The demo's radiographs: a finding shows where it should, and pixels alone do not give it away."""
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import prepare
from manifest import read_manifest
from phantom import FINDINGS, findings, patient_anatomy, phantom


def test_each_image_can_be_made_alone():
    image = phantom(0, 7, 3, 64)
    assert image.shape == (64, 64) and image.dtype == np.uint8
    phantom(0, 7, 2, 64)
    assert np.array_equal(image, phantom(0, 7, 3, 64))
    for other in ((1, 7, 3), (0, 8, 3), (0, 7, 4)):
        assert (image != phantom(*other, 64)).mean() > 0.5
    assert np.array_equal(image, phantom(0, 7, 3, 64, found=findings(0, 7, 3)))


@pytest.mark.parametrize("finding", range(4), ids=FINDINGS)
def test_a_finding_is_visible_and_changes_nothing_else(finding):
    """More in the beam's way, so brighter: in a patch of the chest, by a margin the eye sees."""
    healthy, areas = np.zeros(4, bool), []
    sick = np.arange(4) == finding
    for patient in range(12):
        before, after = (phantom(3, patient, 0, 128, present).astype(int)
                         for present in (healthy, sick))
        brighter = after - before > 12              # gray levels, about three times the noise
        areas.append(brighter.mean())
        assert (after < before - 3).mean() < 0.01
        assert (after == before)[~brighter].mean() > 0.6
    assert min(areas) > 0.001 and 0.01 < np.median(areas) < 0.25 and max(areas) > 1.5 * min(areas)


def test_healthy_hearts_are_narrower_than_half_the_thorax():
    hearts = [patient_anatomy(0, patient)["heart"] for patient in range(100)]
    assert 0.37 < min(hearts) and max(hearts) < 0.45
    prevalence = np.mean([findings(0, patient, image)
                          for patient in range(300) for image in range(4)], axis=0)
    assert (0.15 < prevalence).all() and (prevalence < 0.3).all()


def test_pixels_alone_do_not_tell():
    """A linear model on the pixels, 400 patients to learn from and 200 to be asked about."""
    images = [Image.fromarray(phantom(0, patient, 0, 96)).resize((32, 32))
              for patient in range(600)]
    x = np.stack([np.asarray(image).ravel() for image in images]) / 255.0           # (600, 1024)
    y = np.array([findings(0, patient, 0) for patient in range(600)])               # (600, 4)
    auroc = []
    for k in range(4):
        model = LogisticRegression(C=0.01, max_iter=300).fit(x[:400], y[:400, k])
        auroc.append(roc_auc_score(y[400:, k], model.predict_proba(x[400:])[:, 1]))
    assert 0.55 < np.mean(auroc) < 0.85


def test_demo_source_is_a_data_folder_that_can_be_made_again(tmp_path):
    for out in ("one", "two"):
        prepare.main(["demo", "--out", str(tmp_path / out), "--patients", "10",
                      "--images-per-patient", "2", "--size", "64"])
    manifest = read_manifest(tmp_path / "one")
    assert manifest.label_names == [*FINDINGS, "No Finding"] and len(manifest.paths) == 20
    assert [len(manifest.images(split)) for split in ("train", "val", "test")] == [14, 2, 4]
    for path, patient, labels in zip(manifest.paths, manifest.patients, manifest.labels):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
        found = findings(0, int(patient), int(path.split("/")[-1].removesuffix(".jpg")))
        assert labels.tolist() == [*found.astype(float), float(not found.any())]
