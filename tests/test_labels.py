"""What labels mean by each policy, who is drawn, and what each label weighs."""
import numpy as np
import pytest
import torch

from common import DataError
from labels import (
    cell_weights, deal, draw, image_weights, labels_required, make_task, masked_cross_entropy,
    policy_sentence, to_probabilities)


def test_what_labels_mean():
    labels, nan = np.array([[1, -1], [0, np.nan], [np.nan, 0]], np.float32), np.nan
    for uncertain, value, seen in (("ones", 1, True), ("zeros", 0, True), ("ignore", 0, False)):
        task = make_task(labels, np.arange(3), uncertain, "zeros")
        assert task.kind == "binary"
        assert task.targets[:, :, 0].tolist() == [[1, value], [0, 0], [0, 0]]
        assert task.mask.tolist() == [[True, seen], [True, True], [True, True]]
        truth = np.array([[1, nan], [0, 0], [0, 0]], np.float32)        # -1 is never scored
        np.testing.assert_equal(task.truth, truth)
        learned = [[1, value if seen else nan], [0, 0], [0, 0]]
        np.testing.assert_equal(task.training_labels, learned)
    task = make_task(labels, np.arange(3), "ignore", "ignore")
    assert task.mask.tolist() == [[1, 0], [1, 0], [0, 1]]

    task = make_task(labels, np.arange(3), "multiclass", "ignore")
    assert task.kind == "three-way" and task.mask.tolist() == [[1, 1], [1, 0], [0, 1]]
    assert task.targets[0].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert task.targets[2].tolist() == [[0, 0, 0], [1, 0, 0]] and task.outputs == 6
    # Uncertain is learned, and is no negative.
    np.testing.assert_equal(task.training_labels, [[1, -1], [0, nan], [nan, 0]])

    classes = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    task = make_task(classes, np.arange(2), "ignore", "zeros")          # what train says counts
    assert task.kind == "exclusive" and task.targets.shape == (3, 1, 2)
    assert task.mask.tolist() == [[True], [True], [False]] and task.outputs == 2
    np.testing.assert_equal(task.training_labels, [[1, 0], [0, 1], [nan, nan]])
    assert make_task(classes, np.arange(3), "ignore", "zeros").kind == "binary"


def test_logits_to_probabilities():
    logits = torch.tensor([[1.0, 2.0, 9.0, 0.0, 0.0, -5.0]])
    assert to_probabilities(logits, "three-way")[0] == pytest.approx([1 / (1 + np.exp(-1)), 0.5])
    assert to_probabilities(logits, "exclusive").sum() == pytest.approx(1)
    assert to_probabilities(logits, "binary")[0, 3] == 0.5


def test_policy_is_told():
    assert policy_sentence("binary", "ones", "ignore", True) == (
        "independent labels; in training uncertain (-1) counts as present, an empty cell is left "
        "out; classes balanced")
    sentence = policy_sentence("three-way", "multiclass", "zeros", False)
    assert "(-1) is a class of its own, an empty cell counts as absent" in sentence
    assert "balanced" not in policy_sentence("exclusive", "ignore", "zeros", False)


def test_masked_loss_and_balance():
    z, y = torch.tensor([[0.3, -1.2], [2.0, 0.4]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    w = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    p = z.sigmoid()
    direct = sum(w[i, j] * -(y[i, j] * p[i, j].log() + (1 - y[i, j]) * (1 - p[i, j]).log())
                 for i in range(2) for j in range(2)) / 4
    found = masked_cross_entropy(z[..., None], y[..., None], w)
    assert found.item() == pytest.approx(float(direct), rel=1e-6)

    targets = np.array([1, 0, 0, 0, 1.0])[:, None, None]
    mask = np.array([1, 1, 1, 1, 0], bool)[:, None]
    weights = cell_weights(targets, mask, True)[:, 0]
    assert weights[4] == 0 and weights[0] == pytest.approx(weights[1:4].sum())
    assert weights.mean() == pytest.approx(1)
    classes = np.eye(3)[[0, 0, 0, 1, 2, 2]][:, None]
    weights = cell_weights(classes, np.ones((6, 1), bool), True)
    assert (classes * weights[:, None]).sum(0) == pytest.approx(2)


def test_weights_of_images_by_patient_and_by_label():
    rng = np.random.default_rng(0)
    patients, nan = rng.integers(0, 12, 60), np.nan
    labels = rng.choice([1, 0, -1, nan], (60, 2), p=[0.1, 0.6, 0.1, 0.2])
    rows, label_names = np.flatnonzero(rng.random(60) < 0.7), ["Mass", "Nodule"]

    def weights(*names):
        found = image_weights(names, patients, labels, label_names, rows)
        assert found.shape == (60,) and not found[np.setdiff1d(np.arange(60), rows)].any()
        assert found[rows].mean() == pytest.approx(1)
        return found

    by_patient = weights("patient")
    sums = np.bincount(patients, by_patient)
    assert sums[np.unique(patients[rows])] == pytest.approx(len(rows) / len(set(patients[rows])))
    for column, name in enumerate(label_names):
        found, cells = weights(name), labels[:, column]
        known = np.isin(cells, (0, 1))
        present, absent = (found[cells == value].sum() for value in (1, 0))
        assert [present, absent] == pytest.approx([known[rows].sum() / 2] * 2)
        assert (found[rows][~known[rows]] == 1).all()
    mean = (weights("Mass") + weights("Nodule") + by_patient) / 3
    assert weights("patient", "Mass", "Nodule") == pytest.approx(mean)
    with pytest.raises(DataError, match="--balance Lump: .* choice is patient, Mass, Nodule"):
        weights("Mass", "Lump")
    labels[:, 1] = rng.choice([0, -1, nan], 60)
    with pytest.raises(DataError, match="--balance Nodule: there is nothing to balance"):
        weights("Nodule")


def test_draws_are_nested_whole_patients_of_train():
    rng = np.random.default_rng(1)
    patients = np.array([f"p{i}" for i in rng.integers(0, 200, 700)])
    truth = (rng.random((700, 4)) < [0.3, 0.1, 0.01, 0.004]).astype(float)
    for seed in range(5):
        inside = set()
        for fraction in (0.01, 0.02, 0.1, 0.5, 1.0):
            rows, extra = draw(patients, truth, fraction, seed)
            assert inside <= set(rows)
            # Whole patients, as many as the fraction says, and every label with both classes.
            assert set(np.flatnonzero(np.isin(patients, patients[rows]))) == set(rows)
            assert len(set(patients[rows])) == int(fraction * len(set(patients)) + 0.5) + extra
            assert (truth[rows].sum(0) >= 1).all() and (truth[rows].sum(0) < len(rows)).all()
            inside = set(rows)
        assert len(rows) == 700 and not extra
    again = [set(draw(patients, truth, 0.1, seed).rows) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    with pytest.raises(DataError, match="--fraction 0.001 of .* is none"):
        draw(patients, truth, 0.001, 0)


def test_folds_are_of_whole_patients_and_equal():
    patients = np.array([f"p{i}" for i in np.random.default_rng(1).integers(0, 52, 400)])
    names = np.unique(patients)
    fold = deal(patients, 5, 0)
    of_patient = {name: set(fold[patients == name]) for name in names}
    assert all(len(folds) == 1 for folds in of_patient.values())
    sizes = np.bincount([folds.pop() for folds in of_patient.values()])
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1
    assert (fold == deal(patients, 5, 0)).all() and (fold != deal(patients, 5, 1)).any()
    with pytest.raises(DataError, match="--folds 60 are too many for 52"):
        deal(patients, 60, 0)


def test_a_draw_of_a_three_way_task_has_true_negatives():
    """Uncertain ones do not stand for them."""
    labels, patients = np.full((100, 1), -1.0), np.arange(100).astype(str)
    labels[:30], labels[97] = 1, 0
    task = make_task(labels, np.arange(100), "multiclass", "zeros")
    for seed in range(5):
        rows, _ = draw(patients, task.training_labels, 0.1, seed)
        assert 97 in rows and 1 in labels[rows]


def test_labels_that_an_encoder_required_add_up():
    """From one training to the next, as far as each says what it started from."""
    classifier = {"classifier": {}, "n_train": 30}
    for init, checkpoint, expected in [
            ("random", {}, 0), ("imagenet", {}, 1_281_167),
            ("a.pt", {"conv1.weight": 0}, "unknown"),
            ("encoder.pt", {"config": {"init": "random"}}, 0),
            ("encoder.pt", {"config": {"init": "imagenet"}}, 1_281_167),
            ("encoder.pt", {"config": {"init": "classifier.pt"}}, "unknown"),
            ("classifier.pt", classifier | {"config": {"init": "random"}}, 30),
            ("classifier.pt", classifier | {"config": {"init": "a.pt"}}, "unknown"),
            ("classifier.pt", classifier | {"labels_required": 100}, 100),
            ("classifier.pt", classifier | {"labels_required": "unknown"}, "unknown"),
            ("classifier.pt", classifier | {"labels_required": [1]}, "unknown")]:
        assert labels_required(init, checkpoint) == expected
