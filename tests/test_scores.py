"""Scores against scikit-learn or by hand: ties, masks, replicates drawn one by one."""
import json
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from report import curves_figure, report
from scores import (
    REPLICATES, auroc, auroc_in_folds, calibration_error, interval, p_value, patient_counts, score,
    val_score, youden)


def test_scores_with_ties_and_masks_are_scikit_learns():
    rng = np.random.default_rng(0)
    assert auroc(np.array([0.5, 0.5, 0.2, 0.9]), np.array([1, 0, 0, 1.0]))[0] == 7 / 8  # by hand
    probabilities, truth = rng.integers(0, 9, (90, 3)) / 8, rng.choice([1, 0, np.nan], (90, 3))
    truth[:, 2] = 1                                     # one class: nothing to say
    areas = []
    for p, y in zip(probabilities.T, truth.T):
        found, replicates = score(p, y, 0.5, np.ones((3, 90), int))
        p, y = p[~np.isnan(y)], y[~np.isnan(y)]
        called, areas = p >= 0.5, [*areas, found["auroc"]]
        assert (found["n_test"], found["test_positives"]) == (len(y), (y == 1).sum())
        assert found["accuracy"] == pytest.approx((called == y).mean())
        assert found["majority"] == max(y.mean(), 1 - y.mean())
        assert found["sensitivity"] == pytest.approx(called[y == 1].mean())
        if (y == 1).all():
            for key in ("auroc", "auroc_low", "average_precision", "specificity"):
                assert np.isnan(found[key])
            continue
        assert found["specificity"] == pytest.approx((~called)[y == 0].mean())
        assert [found["auroc"], *replicates] == pytest.approx([roc_auc_score(y, p)] * 4, abs=1e-12)
        assert found["average_precision"] == average_precision_score(y, p)
        best = max(p, key=lambda t: (p >= t)[y == 1].mean() + (p < t)[y == 0].mean())
        at_best, at_youden = ((p >= t)[y == 1].mean() + (p < t)[y == 0].mean()
                              for t in (best, youden(p, y)))
        assert at_best == pytest.approx(at_youden)
    assert val_score(probabilities, truth) == pytest.approx(np.nanmean(areas))
    assert youden(p, y) == 0.5
    p, y = np.array([0.05, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1.0])
    assert calibration_error(p, y, 10) == pytest.approx(0.2375)


def test_predictions_that_are_not_finite_have_no_score():
    """Where they are scored; NaN would be sorted behind all others, and have an AUROC."""
    truth = np.array([[0.0], [1], [np.nan], [1]])
    p = np.array([[0.1], [0.9], [np.nan], [0.8]])
    assert val_score(p, truth) == 1
    p[3] = np.nan
    with pytest.raises(FloatingPointError, match="predictions for val are not finite"):
        val_score(p, truth)


def test_auroc_in_folds_compares_pairs_of_one_fold():
    """In every replicate, with ties, images that are left out, and folds that lack a class."""
    rng = np.random.default_rng(3)
    scores, truth = rng.integers(0, 9, 60) / 8, rng.choice([1, 0, np.nan], 60)
    fold, patients = rng.integers(0, 4, 60), np.arange(60) // 3
    truth[fold == 3] = 1
    counts = patient_counts(patients, 20)
    expected = []
    for times in counts:
        won = pairs = 0
        for i, j in zip(*np.nonzero((truth == 1)[:, None] & (truth == 0))):
            if fold[i] == fold[j]:
                pairs += int(times[i]) * times[j]
                won += int(times[i]) * times[j] * (
                    (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
        expected.append(won / pairs)
    assert auroc_in_folds(scores, truth, counts, fold) == pytest.approx(expected)
    # Another scale for each fold changes nothing.
    assert auroc_in_folds(scores / 10 - 5 * fold, truth, counts, fold) == pytest.approx(expected)
    one = np.zeros(60, int)
    assert auroc_in_folds(scores, truth, counts, one) == pytest.approx(auroc(scores, truth, counts))
    assert np.isnan(auroc_in_folds(scores, np.ones(60), counts, fold)).all()


def test_bootstrap_over_patients_and_paired():
    rng = np.random.default_rng(2)
    patients = np.array([f"p{i}" for i in rng.integers(0, 12, 40)])
    scores, truth = rng.integers(0, 9, 40) / 8, rng.integers(0, 2, 40).astype(float)
    counts = patient_counts(patients, 200)
    assert (counts[0] == 1).all() and len(counts) == 201        # first the test set itself
    for patient in set(patients):
        own = counts[:, patients == patient]
        assert (own == own[:, :1]).all()
    for replicate, area in zip(counts, auroc(scores, truth, counts)):
        # An image is in twice where its patient is in twice.
        drawn = np.repeat(np.arange(40), replicate)
        if len(set(truth[drawn])) == 2:
            assert area == pytest.approx(roc_auc_score(truth[drawn], scores[drawn]))
        else:
            assert np.isnan(area)
    truth = rng.integers(0, 2, 300).astype(float)
    counts = patient_counts(np.arange(300).astype(str), 500)
    good, poor = (auroc(truth + noise * rng.standard_normal(300), truth, counts)
                  for noise in (0.7, 2.0))
    low, high = interval((good - poor)[1:])
    assert 0 < low < good[0] - poor[0] < high
    assert interval((poor - good)[1:]) == pytest.approx((-high, -low))
    assert p_value((good - poor)[1:]) == pytest.approx(2 / 501) and p_value(np.zeros(500)) == 1
    assert p_value(np.array([-1.0, 1, 2, 3, np.nan])) == pytest.approx(4 / 5)
    assert interval(np.array([np.nan, 1, 1])) == (1, 1)
    assert np.isnan(interval(np.full(3, np.nan))).all()


def test_mean_and_its_interval_keep_to_the_same_labels(tmp_path):
    """A replicate without a rare label's positive says nothing of the mean; both against
    scikit-learn, one by one."""
    rng = np.random.default_rng(3)
    patients = rng.integers(0, 30, 80).astype(str)
    # The last label has one class.
    truth = np.c_[rng.integers(0, 2, 80), np.arange(80) < 2, np.ones(80)].astype(float)
    p = np.clip(truth + rng.standard_normal((80, 3)) / 2, 0, 1)
    entry = {"val": torch.tensor(p), "test": torch.tensor(p), "n_train": [9] * 3,
             "positives": [3] * 3}
    about = {"data": "here", "kind": "binary", "labels": "as they are", "draws": {1.0: ["all"]}}
    predictions = {("full", 1.0, "Scratch", 0): entry}
    report(tmp_path, about, predictions, ["a", "b", "c"], truth, truth, patients)
    means = []
    for counts in patient_counts(patients, REPLICATES):
        drawn = np.repeat(np.arange(80), counts)
        if all(len(set(truth[drawn, i])) == 2 for i in (0, 1)):
            means.append(np.mean([roc_auc_score(truth[drawn, i], p[drawn, i]) for i in (0, 1)]))
    mean, = json.loads((tmp_path / "results.json").read_text())["means"]
    assert mean["auroc"] == pytest.approx(means[0]) and 500 < len(means) < REPLICATES
    assert [mean["low"], mean["high"]] == pytest.approx(np.percentile(means[1:], [2.5, 97.5]))
    text = (tmp_path / "results.md").read_text()
    assert f"the {len(means) - 1} times that every label had" in text


def test_the_order_of_the_combinations_does_not_matter(tmp_path):
    rng, predictions = np.random.default_rng(5), {}
    truth, patients = rng.integers(0, 2, (40, 1)).astype(float), np.arange(40).astype(str)
    for key in rng.permutation(list(np.ndindex(2, 2, 3))).tolist():
        p = torch.tensor(rng.random((40, 1)))
        name = ("linear", "full")[key[0]], (0.1, 1.0)[key[1]], f"init {key[2]}", 0
        predictions[name] = {"val": p, "test": p, "n_train": [9], "positives": [3]}
    about = {"data": "here", "kind": "binary", "labels": "as they are",
             "draws": {0.1: ["some"], 1.0: ["all"]}}
    report(tmp_path, about, predictions, ["a"], truth, truth, patients)
    for mean in json.loads((tmp_path / "results.json").read_text())["means"]:
        p = predictions[mean["mode"], mean["fraction"], mean["init"], 0]["test"]
        assert mean["auroc"] == pytest.approx(roc_auc_score(truth[:, 0], p[:, 0]))


def test_curves_say_of_which_draw_they_are():
    figure = curves_figure(np.linspace(0, 1, 9)[:, None], np.arange(9)[:, None] % 2, ["a"], 7)
    assert [ax.get_title() for ax in figure.axes] == ["draw 7: ROC", "draw 7: precision-recall"]


def test_exclusive_classes_have_one_accuracy(tmp_path):
    rng = np.random.default_rng(4)
    classes = rng.integers(0, 3, 50)
    p, peaks = rng.dirichlet(np.ones(3), 50), torch.tensor(rng.dirichlet(np.ones(3), (4, 50)))
    entry = {"val": torch.tensor(p), "test": torch.tensor(p), "peaks": peaks, "n_train": [9] * 3,
             "positives": [3] * 3}
    about = {"data": "here", "kind": "exclusive", "labels": "as they are",
             "draws": {1.0: ["all"]}}
    truth, patients = np.eye(3)[classes], np.arange(50).astype(str)
    predictions = {("full", 1.0, "Scratch", 0): entry}
    report(tmp_path, about, predictions, list("abc"), truth, truth, patients)
    mean, = json.loads((tmp_path / "results.json").read_text())["means"]
    assert mean["accuracy"] == (p.argmax(1) == classes).mean()
    assert mean["majority"] == np.bincount(classes).max() / 50
    peak = max((some.argmax(1).numpy() == classes).mean() for some in peaks)
    text = (tmp_path / "results.md").read_text()
    assert re.search(rf"Peak.*\n\n.*\n.*\n\| Scratch .*\| {peak:.3f} \|", text)


def test_names_that_would_break_a_table_and_one_test_patient(tmp_path):
    """A bar or a line end stays in its cell; a label is called as the mean is; one patient has no
    interval; and more labels than a legend has room for are drawn without one."""
    rng, count = np.random.default_rng(7), 102
    names = ["a|b\nc", "mean", *(f"label {i}" for i in range(count - 2))]
    truth = rng.integers(0, 2, (12, count)).astype(float)
    predictions = {("linear", 1.0, name, 0): {"val": p, "test": p, "n_train": [9] * count,
                                              "positives": [3] * count}
                   for name, p in (("x|y", torch.tensor(rng.random((12, count)))),
                                   ("z", torch.tensor(rng.random((12, count)))))}
    about = {"data": "here", "kind": "binary", "labels": "as they are", "draws": {1.0: ["all"]}}
    report(tmp_path, about, predictions, names, truth, truth, np.full(12, "p"))
    lines = (tmp_path / "results.md").read_text().splitlines()
    header, _, first, second = lines[lines.index("AUROC on test") + 2:][:4]
    for line in (header, first, second):
        assert len(re.split(r"(?<!\\)\|", line)) == count + 5
    assert r"| a\|b c | mean | label 0 |" in header and first.startswith(r"| x\|y | ")
    assert first.endswith("| – |") and "One test patient has no intervals" in lines[2]
    found = json.loads((tmp_path / "results.json").read_text())
    mean, of_label = ([pair["difference"] for pair in found["comparisons"]
                       if pair["label"] == "mean"][i] for i in (-1, 0))
    assert mean != of_label and found["means"][0]["low"] is None
    assert [line for line in lines if " − " in line] == [
        f"z − x|y: mean AUROC {mean:+.3f} (no interval)"]


def test_a_number_that_is_none_becomes_null_and_a_name_stays(tmp_path):
    """NaN is no JSON. A label, and a folder, may be called so all the same."""
    truth, patients = np.c_[np.arange(40) % 2, np.ones(40)].astype(float), np.arange(40).astype(str)
    p = torch.tensor(np.random.default_rng(6).random((40, 2)))
    entry = {"val": p, "test": p, "n_train": [9] * 2, "positives": [3] * 2}
    about = {"data": "data/NaN", "kind": "binary", "labels": "as they are",
             "draws": {1.0: ["all"]}}
    predictions = {("full", 1.0, "NaN", 0): entry}
    report(tmp_path, about, predictions, ["a", "NaN"], truth, truth, patients)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["data"] == "data/NaN" and found["means"][0]["init"] == "NaN"
    both, one_class = found["results"]
    assert (both["label"], one_class["label"]) == ("a", "NaN")
    assert 0 < both["auroc"] < 1 and both["peak_accuracy"] is None
    assert one_class["auroc"] is None and one_class["specificity"] is None
    assert 0 <= one_class["sensitivity"] <= 1
