"""Fine-tuning as a user meets it: what labels mean, who is drawn, scores against scikit-learn, runs, wrong input."""
import contextlib
import csv
import io
import json
import math
import random
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import run, smooth_image, start
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
from dali_pipeline import read_manifest
from finetune import (
    auroc, cell_weights, draw, fit_logistic, make_task, paired_test, patient_counts, reliability, score,
    to_probabilities, val_score, youden)
from loss import masked_cross_entropy
from model import FORMAT, build_encoder, load_checkpoint, load_classifier, save_checkpoint

FULL = ["--mode", "full", "--epochs", "2", "--warmup-epochs", "1", "--min-steps", "2", "--batch-size", "8",
        "--bootstrap", "50", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As `run` and `start` give their processes, so that what runs here and there is equal to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main(*arguments):
    """finetune.py in this process, which saves the start of another."""
    finetune.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A data folder with something to learn: 60 patients, 2 images each; a bright disc is a Mass, a dark left half an
    Effusion; and, for as many images, nothing in any label column."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    (folder / "images").mkdir()
    with open(folder / "manifest.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "patient", "split", "Mass", "Effusion"])
        for i in range(130):
            patient = i // 2
            mass, effusion = patient % 3 == 0, i % 4 == 1
            image = smooth_image(rng, 48, 48) // 2 + 40
            image[10:22, 26:38] += np.uint8(70 * mass)
            image[:, :20] -= np.uint8(38 * effusion)
            Image.fromarray(image).save(folder / f"images/{i:03d}.png")
            split = "train" if patient < 36 else "val" if patient < 48 else "test" if patient < 60 else "train"
            labels = [int(mass), int(effusion)] if patient < 60 else ["", ""]
            table.writerow([f"images/{i:03d}.png", f"p{patient}", split, *labels])
    return folder


@pytest.fixture(scope="module")
def encoder(labelled, tmp_path_factory):
    """An encoder.pt as pretrain.py leaves it, after no training."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    save_checkpoint(path, {"format": FORMAT, "arch": "resnet18", "encoder": build_encoder("resnet18").state_dict(),
                           "config": {"data": str(labelled), "image_size": 32, "normalize": "image", "clahe": True}})
    return path


def rows(out):
    return json.loads((out / "results.json").read_text())["results"]


# ----------------------------------------------------------------------------------------------------------------------

def test_what_labels_mean():
    labels = np.array([[1, -1], [0, np.nan], [np.nan, 0]], np.float32)

    def task(uncertain, blank, train=(0, 1, 2), labels=labels):
        return make_task(labels, ["A", "B"], np.array(train), uncertain, blank)

    for uncertain, value, known in (("ones", 1, 1), ("zeros", 0, 1), ("ignore", 0, 0)):
        binary = task(uncertain, "zeros")
        assert binary.kind == "binary"
        assert binary.targets[:, :, 0].tolist() == [[1, value], [0, 0], [0, 0]]
        assert binary.known.tolist() == [[1, known], [1, 1], [1, 1]]
        np.testing.assert_equal(binary.truth, np.array([[1, np.nan], [0, 0], [0, 0]], np.float32))   # -1 never scored
    assert task("ignore", "ignore").known.tolist() == [[1, 0], [1, 0], [0, 1]]
    three = task("multiclass", "ignore")
    assert three.kind == "three-way" and three.known.tolist() == [[1, 1], [1, 0], [0, 1]]
    assert three.targets[0].tolist() == [[0, 1, 0], [0, 0, 1]] and three.targets[2].tolist() == [[0, 0, 0], [1, 0, 0]]
    classes = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    assert task("ignore", "zeros", (0, 1), classes).kind == "exclusive"           # what train says counts
    assert task("ignore", "zeros", (0, 1), classes).targets.shape == (3, 1, 2)
    assert task("ignore", "zeros", (0, 1, 2), classes).kind == "binary"


def test_probabilities():
    logits = torch.tensor([[1.0, 2.0, 9.0, 0.0, 0.0, -5.0]])
    assert to_probabilities(logits, "three-way")[0] == pytest.approx([1 / (1 + math.exp(-1)), 0.5])
    assert to_probabilities(logits, "exclusive").sum() == pytest.approx(1)
    assert to_probabilities(logits, "binary")[0, 1] == pytest.approx(1 / (1 + math.exp(-2)))


def test_masked_loss_is_the_direct_sum():
    z, y = torch.tensor([[0.3, -1.2], [2.0, 0.4]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    w = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    direct = sum(w[i, j] * -(y[i, j] * z[i, j].sigmoid().log() + (1 - y[i, j]) * (1 - z[i, j].sigmoid()).log())
                 for i in range(2) for j in range(2)) / 4
    assert masked_cross_entropy(z[..., None], y[..., None], w).item() == pytest.approx(direct.item(), rel=1e-6)
    softmax = masked_cross_entropy(z[:, None], y[:, None], torch.tensor([[1.0], [3.0]]))
    assert softmax.item() == pytest.approx(-(z.log_softmax(1)[0, 0] + 3 * z.log_softmax(1)[1, 1]).item() / 2, rel=1e-6)


def test_draws():
    rng = np.random.default_rng(1)
    patients = np.array([f"p{i}" for i in rng.integers(0, 200, 700)])
    truth = (rng.random((700, 4)) < [0.3, 0.1, 0.01, 0.004]).astype(float)
    for seed in range(5):
        inside = set()
        for fraction in (0.01, 0.02, 0.1, 0.5, 1.0):
            chosen, asked, taken = draw(patients, truth, fraction, seed)
            assert inside <= set(chosen) and asked == round(fraction * len(set(patients)))              # nested
            assert set(np.flatnonzero(np.isin(patients, patients[chosen]))) == set(chosen)              # whole patients
            assert taken == len(set(patients[chosen])) and asked <= taken <= asked + 8
            assert (truth[chosen].sum(0) >= 1).all() and (truth[chosen].sum(0) < len(chosen)).all()
            inside = set(chosen)
        assert len(chosen) == 700
    third, again, fourth = (set(draw(patients, truth, 0.1, seed)[0]) for seed in (3, 3, 4))
    assert third == again != fourth
    with pytest.raises(finetune.DataError, match="--fraction 0.001 of .* is none"):
        draw(patients, truth, 0.001, 0)


def test_balance_gives_classes_the_same_sum():
    targets, known = np.array([1, 0, 0, 0, 1.0])[:, None, None], np.array([1, 1, 1, 1, 0.0])[:, None]
    weights = cell_weights(targets, known, True)[:, 0]
    assert weights[4] == 0 and weights[0] == pytest.approx(weights[1:4].sum()) and weights.mean() == pytest.approx(1)
    classes = np.eye(3)[[0, 0, 0, 1, 2, 2]][:, None]
    sums = (classes[:, 0] * cell_weights(classes, np.ones((6, 1)), True)).sum(0)
    assert sums == pytest.approx([2, 2, 2])


# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, width", [(60, 100), (400, 30)])
def test_probe_finds_scikit_learns_optimum(n, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, width)) * np.logspace(0, -2, width)
    x = (x - x.mean(0)) / x.std(0)
    z = x @ rng.standard_normal((width, 3))
    y = (z + 3 * rng.standard_normal((n, 3)) > [0, 3, 8]).astype(float)
    weights = rng.random((n, 3)) * (rng.random((n, 3)) < 0.8)
    strengths = [0.001, 0.1, 10.0]
    found, free = fit_logistic(torch.tensor(x), torch.tensor(y)[:, :, None], torch.tensor(weights),
                               torch.tensor(strengths, dtype=torch.float64), 1e-12)
    for r, strength in enumerate(strengths):
        for g in range(3):
            peer = LogisticRegression(C=1 / (weights[:, g].sum() * strength), tol=1e-9, max_iter=10_000)
            peer.fit(x, y[:, g], weights[:, g])
            np.testing.assert_allclose(found[:, r, g, 0], peer.coef_[0], atol=2e-3 * np.abs(peer.coef_).max())
            assert free[r, g, 0].item() == pytest.approx(peer.intercept_[0], abs=2e-3)
    classes = z.argmax(1)
    found, free = fit_logistic(torch.tensor(x), torch.eye(3, dtype=torch.float64)[classes][:, None],
                               torch.ones(n, 1, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64), 1e-12)
    peer = LogisticRegression(C=1 / (n * 0.01), tol=1e-9, max_iter=10_000).fit(x, classes)
    np.testing.assert_allclose(to_probabilities(torch.tensor(x) @ found[:, 0, 0] + free[0, 0], "exclusive"),
                               peer.predict_proba(x), atol=1e-4)


def test_area_with_ties_and_masks_is_scikit_learns():
    rng = np.random.default_rng(0)
    for n in (7, 50, 400):
        scores, truth = rng.integers(0, 6, n) / 5, rng.integers(0, 2, n).astype(float)
        assert auroc(scores, truth)[0] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert auroc(np.array([0.5, 0.5, 0.2, 0.9]), np.array([1, 0, 0, 1]))[0] == 7 / 8               # by hand
    assert np.isnan(auroc(np.array([0.1, 0.2]), np.array([1, 1]))[0])
    probabilities, truth = rng.integers(0, 9, (90, 3)) / 8, rng.choice([1, 0, np.nan], (90, 3))
    truth[:, 2] = 1                                                                     # one class: nothing to say
    columns, replicates = score(probabilities, truth, [0.5] * 3, np.ones((2, 90), int))
    for i in range(2):
        known = ~np.isnan(truth[:, i])
        assert columns["auroc"][i] == pytest.approx(roc_auc_score(truth[known, i], probabilities[known, i]))
        assert replicates[i] == pytest.approx([columns["auroc"][i]] * 2)
        called = probabilities[known, i] >= 0.5
        assert columns["accuracy"][i] == pytest.approx((called == truth[known, i]).mean())
        assert columns["sensitivity"][i] == pytest.approx(called[truth[known, i] == 1].mean())
        assert columns["specificity"][i] == pytest.approx((~called)[truth[known, i] == 0].mean())
        assert columns["n_test"][i] == known.sum() and columns["test_positives"][i] == (truth[:, i] == 1).sum()
    assert [math.isnan(columns[k][2]) for k in ("auroc", "auroc_low", "average_precision", "specificity")] == [True] * 4
    assert columns["majority"][2] == 1
    assert val_score(probabilities, truth) == pytest.approx(np.mean(columns["auroc"][:2]))


def test_average_precision_by_hand():
    # Descending: 0.9 (1), 0.8 twice (1, 0), 0.1 (1): steps of recall 1/3 each at precision 1, 2/3 and 3/4.
    scores, truth = np.array([[0.9], [0.8], [0.8], [0.1]]), np.array([[1.0], [1], [0], [1]])
    columns, _ = score(scores, truth, [0.5], np.ones((1, 4), int))
    assert columns["average_precision"][0] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_bootstrap_resamples_patients():
    rng = np.random.default_rng(2)
    patients = np.array([f"p{i}" for i in rng.integers(0, 12, 40)])
    scores, truth = rng.integers(0, 9, 40) / 8, rng.integers(0, 2, 40).astype(float)
    counts = patient_counts(patients, 200)
    assert all(len(set(counts[5, patients == p])) == 1 for p in set(patients))
    first = [counts[:, np.flatnonzero(patients == p)[0]] for p in sorted(set(patients))]
    assert (np.sum(first, 0) == 12).all() and np.std(first) > 0.5
    for replicate, area in zip(counts[:50], auroc(scores, truth, counts)):
        drawn = np.repeat(np.arange(40), replicate)                     # an image twice where its patient is in twice
        one_class = len(set(truth[drawn])) < 2
        assert math.isnan(area) if one_class else area == pytest.approx(roc_auc_score(truth[drawn], scores[drawn]))


def test_paired_difference():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 300).astype(float)
    counts = patient_counts(np.arange(300).astype(str), 500)
    good, poor = (auroc(truth + noise * rng.standard_normal(300), truth, counts) for noise in (0.7, 2.0))
    low, high, p = paired_test(good - poor)
    assert 0 < low < high and p == pytest.approx(2 / 501)
    assert paired_test(poor - good) == pytest.approx((-high, -low, p))
    assert paired_test(np.zeros(500))[2] == 1
    assert paired_test(np.array([-1.0, 1, 2, 3]))[2] == pytest.approx(4 / 5)


def test_threshold_and_calibration():
    scores, truth = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.9]), np.array([0, 0, 1, 0, 1, 1.0])
    best = max(scores, key=lambda t: (scores >= t)[truth == 1].mean() + (scores < t)[truth == 0].mean())
    assert youden(scores, truth) == best
    assert youden(np.r_[scores, 5], np.r_[truth, np.nan]) == best and youden(scores, np.ones(6)) == 0.5
    claimed, found, error = reliability(np.array([0.05, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1.0]), bins=10)
    assert claimed == pytest.approx([0.05, 0.975]) and found == pytest.approx([0.5, 1])
    assert error == pytest.approx((0.45 + 0.025) / 2)


# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def table(labelled, encoder, tmp_path_factory):
    """Two initialisations, two draws, both modes, in one command."""
    folder = tmp_path_factory.mktemp("table")
    command = ["finetune.py", *FULL, "--init", "random", encoder, "--mode", "linear", "full", "--fraction", "0.5",
               "--seeds", "0", "1", "--out", folder / "run", "--features", folder / "features", "--peak",
               "--explain", "2"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(*command[1:])
    return folder, command, output.getvalue()


def test_one_command_one_table(table, labelled):
    folder, command, output = table
    out, text = folder / "run", (folder / "run/results.md").read_text()
    assert f"data {labelled}, image_size 32, normalize image, clahe True, arch resnet18" in output
    assert text in output and "72 train, 24 val, 24 test images with labels" in output      # 10 more have no label
    found = rows(out)
    assert len(found) == 2 * 2 * 2 * 2
    assert {(r["init"], r["mode"], r["fraction"], r["seed"], r["label"]) for r in found} == {
        (i, m, f, s, name) for i in ("Scratch", "SimCLR") for m in ("linear", "full") for f in (0.5,) for s in (0, 1)
        for name in ("Mass", "Effusion")}
    assert {r["n_train"] for r in found} == {36} and all(r["auroc_low"] <= r["auroc"] <= r["auroc_high"] for r in found)
    assert all(("peak_accuracy" in r) == (r["mode"] == "full") for r in found) and "optimistic" in text
    block = text.split("## linear, 50 % of the labels")[1].split("##")[0]
    mean = np.mean([r["auroc"] for r in found if (r["init"], r["mode"], r["fraction"]) == ("Scratch", "linear", 0.5)])
    assert re.search(rf"\| Scratch \|.*{mean:.3f} ± \d\.\d{{3}}(\*\*)? \|", block)
    assert re.search(r"SimCLR − Scratch: mean AUROC [+-]\d\.\d{3} \(95 % .* p = ", block)
    assert "independent labels; in training -1 counts as ignore, blank as zeros" in text
    events = EventAccumulator(str(out / "combinations")).Reload()
    assert {"efficiency", "calibration", "curves/full 0.5/SimCLR"} <= set(events.Tags()["images"])
    events = EventAccumulator(str(out / "combinations/SimCLR_full_0.5_seed1")).Reload()
    assert {"loss", "val_score", "lr_encoder", "lr_head"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("loss")) == 2
    assert all(Image.open(out / f"{name}.png").size[0] > 400 for name in ("efficiency", "calibration"))
    assert len(list((out / "explained").glob("*_*_0.*.png"))) == 2


def test_linear_leaves_the_encoder_alone_and_learns(table, encoder, labelled, tmp_path):
    """The kept classifier, on images, gives the probabilities that the probe gave on features; better than chance."""
    folder, _, _ = table
    command = ["finetune.py", "--init", encoder, "--mode", "linear", "--out", tmp_path / "run", "--features",
               folder / "features", "--bootstrap", "50", "--threads", "1"]
    images = labelled / "images"
    images.rename(labelled / "hidden")                          # kept features: no image is touched
    (images).mkdir()
    try:
        for path in (labelled / "hidden").iterdir():
            (images / path.name).touch()
        main(*command[1:])
    finally:
        shutil.rmtree(images)
        (labelled / "hidden").rename(images)
    assert np.mean([r["auroc"] for r in rows(tmp_path / "run")]) > 0.75
    net, state = load_classifier(tmp_path / "run/classifier.pt")
    before = load_checkpoint(encoder)["encoder"]
    assert before.keys() == state["encoder"].keys() and state["labels"] == ["Mass", "Effusion"]
    assert all(torch.equal(value, state["encoder"][key]) for key, value in before.items())
    build_encoder("resnet18", str(tmp_path / "run/classifier.pt"))                              # as cluster_eval does
    main("--predict", tmp_path / "run/classifier.pt", "--data", labelled, "--threads", "1", "--explain", "3")
    with open(tmp_path / "run/predictions.csv") as file:
        predicted = {row["path"]: [float(row[name]) for name in state["labels"]] for row in csv.DictReader(file)}
    manifest = read_manifest(labelled)
    kept = load_checkpoint(tmp_path / "run/combinations/SimCLR_linear_1_seed0/predictions.pt")["test"]
    np.testing.assert_allclose([predicted[manifest.paths[i]] for i in manifest.images("test")], kept, atol=1e-4)
    assert len(list((tmp_path / "run/explained").iterdir())) == 3
    main("--predict", tmp_path / "run/classifier.pt", "--data", images, "--threads", 1, "--out", tmp_path / "other")
    assert (tmp_path / "other/predictions.csv").read_text().splitlines()[0] == "path,Mass,Effusion"
    assert sum(1 for _ in open(tmp_path / "other/predictions.csv")) == 131


def test_test_labels_decide_nothing(table, labelled, encoder, tmp_path):
    """With the test rows' labels permuted every weight, prediction and threshold is the same; the scores are not."""
    folder, command, _ = table
    other = tmp_path / "data"
    other.mkdir()
    (other / "images").symlink_to(labelled / "images")
    with open(labelled / "manifest.csv") as file:
        header, *lines = csv.reader(file)
    test = [line for line in lines if line[2] == "test"]
    for line, labels in zip(test, random.Random(0).sample([line[3:] for line in test], len(test))):
        line[3:] = labels
    with open(other / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    command = [*command[:command.index("--out")], "--out", tmp_path / "run", "--features", folder / "features",
               "--data", other, "--peak"]
    main(*command[1:])
    combinations = sorted(p.parent.name for p in (folder / "run").glob("combinations/*/predictions.pt"))
    assert len(combinations) == 8
    for name in combinations:
        a, b = (load_checkpoint(out / f"combinations/{name}/predictions.pt")
                for out in (folder / "run", tmp_path / "run"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in ("val", "test"))
        assert (a["val_score"], a["n_train"], a["positives"]) == (b["val_score"], b["n_train"], b["positives"])
    a, b = (load_checkpoint(out / "classifier.pt") for out in (folder / "run", tmp_path / "run"))
    assert a["thresholds"] == b["thresholds"]
    for part in ("encoder", "classifier"):
        assert all(torch.equal(value, b[part][key]) for key, value in a[part].items())
    a, b = rows(folder / "run"), rows(tmp_path / "run")
    assert [r["threshold"] for r in a] == [r["threshold"] for r in b]
    assert [r["auroc"] for r in a] != [r["auroc"] for r in b]


def test_killed_at_any_moment_and_started_again_ends_the_same(table, tmp_path, capsys):
    folder, command, _ = table
    command = [*command[:command.index("--out")], "--out", tmp_path / "run", "--features", folder / "features",
               "--peak"]
    victim, seen = random.randint(1, 8), 0
    process = start(*command)
    for line in process.stdout:
        seen += " epoch " in line
        if seen == victim:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    assert process.wait(60) == -signal.SIGKILL
    main(*command[1:])
    assert rows(tmp_path / "run") == rows(folder / "run"), f"killed after epoch line {victim}"
    assert [json.loads(line)["loss"] for line in open(tmp_path / "run/log.jsonl")] == [
        json.loads(line)["loss"] for line in open(folder / "run/log.jsonl")]
    a, b = (load_checkpoint(out / "classifier.pt") for out in (folder / "run", tmp_path / "run"))
    assert all(torch.equal(value, b["encoder"][key]) for key, value in a["encoder"].items())
    assert not (tmp_path / "run/last.pt").exists()
    before = (tmp_path / "run/results.md").read_text()
    capsys.readouterr()
    main(*command[1:])                                                          # nothing left to do but the table
    assert " epoch " not in capsys.readouterr().out and (tmp_path / "run/results.md").read_text() == before


def test_two_processes_are_one(encoder, labelled, tmp_path):
    """With batch norm frozen (a CPU cannot synchronise it) training is the same to rounding, and so is every score."""
    found = tmp_path / "one", tmp_path / "two"
    command = [*FULL, "--init", encoder, "--freeze-bn", "--lr-encoder", "1e-5"]
    main(*command, "--out", found[0])
    code, output = run("finetune.py", *command, "--out", found[1], processes=2)
    assert code == 0 and output.count("done:") == 1, output
    a, b = (load_checkpoint(out / "combinations/SimCLR_full_1_seed0/predictions.pt") for out in found)
    assert a["test"].shape == (24, 2)
    torch.testing.assert_close(a["test"], b["test"], atol=1e-3, rtol=0)
    losses = [[json.loads(line)["loss"] for line in open(out / "log.jsonl")] for out in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][1] < losses[0][0]
    one, two = (rows(out) for out in found)
    assert [r["auroc"] for r in one] == pytest.approx([r["auroc"] for r in two], abs=0.02)
    # And with batch norm learning: its statistics are the first process's, the evaluation still covers each image once.
    code, output = run("finetune.py", *FULL, "--epochs", 1, "--warmup-epochs", 0, "--init", encoder, "--out",
                       tmp_path / "bn", processes=2)
    assert code == 0, output
    main("--predict", tmp_path / "bn/classifier.pt", "--data", labelled, "--threads", 1)
    kept = load_checkpoint(tmp_path / "bn/combinations/SimCLR_full_1_seed0/predictions.pt")["test"]
    manifest = read_manifest(labelled)
    with open(tmp_path / "bn/predictions.csv") as file:
        predicted = [[float(row["Mass"]), float(row["Effusion"])] for row in csv.DictReader(file)]
    np.testing.assert_allclose(np.array(predicted)[manifest.images("test")], kept, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------

def refused(capsys, *arguments):
    """The one sentence with which finetune.main ends on bad input."""
    with pytest.raises(SystemExit) as end:
        main(*arguments)
    message = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert end.value.code not in (0, None) and "\n" not in message
    assert message.startswith("finetune.py: ") or ".py: error: " in message                 # argparse's own
    return message


def test_wrong_flags(capsys, tmp_path, monkeypatch, encoder, labelled, table):
    monkeypatch.chdir(tmp_path)
    assert "runs/pretrain/encoder.pt does not exist: pre-train first" in refused(capsys)
    assert "--fraction 0 must lie in 0 to 1" in refused(capsys, "--fraction", 0)
    assert "--seeds names something twice: 1 1" in refused(capsys, "--seeds", 1, 1)
    assert "--peak is over epochs" in refused(capsys, "--peak", "--mode", "linear")
    assert "--predict needs --data" in refused(capsys, "--predict", "x.pt")
    assert "x.pt does not exist" in refused(capsys, "--predict", "x.pt", "--data", labelled)
    assert "is not a classifier.pt" in refused(capsys, "--predict", encoder, "--data", labelled)
    assert "nowhere.pt does not exist" in refused(capsys, "--init", "nowhere.pt")
    assert "--labels Hernia" in refused(capsys, "--init", encoder, "--labels", "Hernia")
    assert "--fraction 0.001 of 36 labelled training patients is none" in refused(
        capsys, "--init", encoder, "--fraction", 0.001)
    assert "holds a resnet18, not a resnet50" in refused(capsys, "--init", encoder, "--arch", "resnet50", "--out", "a")
    assert not (tmp_path / "runs").exists()
    out = table[0] / "run"
    before = (out / "results.json").read_bytes()
    message = refused(capsys, "--init", encoder, "--out", out, "--epochs", 5)
    assert "--epochs (2 there, 5 here)" in message and "--overwrite" in message
    assert "is not empty and holds no run" in refused(capsys, "--init", encoder, "--out", labelled)
    assert (out / "results.json").read_bytes() == before


def rewritten(folder, change):
    with open(folder / "manifest.csv") as file:
        lines = list(csv.reader(file))
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(change(lines))
    return folder


def test_poor_labels(capsys, labelled, encoder, tmp_path):
    def folder(name, change):
        (tmp_path / name).mkdir()
        shutil.copy(labelled / "manifest.csv", tmp_path / name)
        (tmp_path / name / "images").symlink_to(labelled / "images")
        return rewritten(tmp_path / name, change)

    common = ["--init", encoder, "--mode", "linear", "--bootstrap", 20, "--threads", 1, "--features", tmp_path / "f"]

    def mass(value, *splits):
        return lambda lines: [line[:3] + [value] + line[4:] if line[2] in splits else line for line in lines]

    none = folder("none", lambda lines: [line[:3] for line in lines])
    assert "has no label column" in refused(capsys, *common, "--data", none)
    empty = folder("empty", lambda lines: [line[:3] + ["", ""] if line[2] == "val" else line for line in lines])
    assert "no image of the val split has a label" in refused(capsys, *common, "--data", empty)
    unsure = folder("unsure", lambda lines: [line[:3] + ["-1", "-1"] if line[2] == "val" else line for line in lines])
    assert "only uncertain or empty cells in Mass, Effusion" in refused(capsys, *common, "--data", unsure)
    constant = folder("constant", lambda lines: [lines[0]] + [line[:3] + ["1", "0"] for line in lines[1:]])
    assert "no label has a positive and a negative in train" in refused(capsys, *common, "--data", constant)
    main(*common, "--data", folder("train", mass("0", "train")), "--out", tmp_path / "o1")
    assert "left out, without both a positive and a negative in the train split: Mass" in capsys.readouterr().out
    assert {r["label"] for r in rows(tmp_path / "o1")} == {"Effusion"}
    main(*common, "--data", folder("val", mass("0", "val", "test")), "--out", tmp_path / "o2")
    assert "Mass has one class only in val" in capsys.readouterr().out
    by_label = {r["label"]: r for r in rows(tmp_path / "o2")}
    assert by_label["Mass"]["auroc"] is None and by_label["Mass"]["threshold"] == 0.5
    assert by_label["Effusion"]["auroc"] > 0.5 and "| – |" in (tmp_path / "o2/results.md").read_text()


@pytest.mark.parametrize("flags", [["--uncertain", "multiclass"],
                                   ["--uncertain", "ones", "--blank", "ignore", "--balance"]])
def test_uncertain_labels_train(data, tmp_path, flags, capsys):
    """The common fixture's labels have all four values."""
    main(*FULL, "--mode", "linear", "full", "--init", "random", "--arch", "resnet18", "--image-size", 32,
         "--data", data, "--out", tmp_path / "run", "--features", tmp_path / "f", *flags)
    output = capsys.readouterr().out
    named = "a class of its own" if "multiclass" in flags else "counts as ones, blank as ignore; classes balanced"
    assert named in output
    assert len(rows(tmp_path / "run")) == 4


def test_exclusive_classes(labelled, encoder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    shutil.copy(labelled / "manifest.csv", tmp_path / "data")
    (tmp_path / "data/images").symlink_to(labelled / "images")
    rewritten(tmp_path / "data", lambda lines: [lines[0]] + [
        line[:3] + ([line[3], str(1 - int(line[3]))] if line[3] else ["", ""]) for line in lines[1:]])
    main(*FULL, "--init", encoder, "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert "exclusive labels, softmax, AUROC one against the rest" in capsys.readouterr().out
    kept = load_checkpoint(tmp_path / "run/combinations/SimCLR_full_1_seed0/predictions.pt")
    torch.testing.assert_close(kept["test"].sum(1), torch.ones(24, dtype=torch.float64))
