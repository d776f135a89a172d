"""Fine-tuning as a user meets it: what labels mean, who is drawn, scores against scikit-learn, runs, wrong input."""
import csv
import itertools
import json
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
from dali_pipeline import read_manifest
from finetune import cell_weights, draw, fit_logistic, make_task, to_probabilities
from loss import masked_cross_entropy
from model import FORMAT, build_encoder, load_checkpoint, load_classifier, save_checkpoint

FULL = ["--epochs", "2", "--batch-size", "8", "--threads", "1"]


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
    Effusion; and five patients of the train split with nothing in any label column."""
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


def changed(labelled, folder, change):
    """A data folder with the same images and a changed manifest: `change` gets and returns its rows, header first."""
    folder.mkdir(parents=True)
    (folder / "images").symlink_to(labelled / "images")
    with open(labelled / "manifest.csv") as old, open(folder / "manifest.csv", "w", newline="") as new:
        csv.writer(new).writerows(change(list(csv.reader(old))))
    return folder


def rows(out):
    return json.loads((out / "results.json").read_text())["results"]


def same_weights(a, b):
    return all(torch.equal(value, b[part][key]) for part in ("encoder", "classifier") for key, value in a[part].items())


# ----------------------------------------------------------------------------------------------------------------------

def test_what_labels_mean():
    labels = np.array([[1, -1], [0, np.nan], [np.nan, 0]], np.float32)
    for uncertain, value, seen in (("ones", 1, True), ("zeros", 0, True), ("ignore", 0, False)):
        kind, targets, known, truth = make_task(labels, np.arange(3), uncertain, "zeros")
        assert kind == "binary" and targets[:, :, 0].tolist() == [[1, value], [0, 0], [0, 0]]
        assert known.tolist() == [[True, seen], [True, True], [True, True]]
        np.testing.assert_equal(truth, np.array([[1, np.nan], [0, 0], [0, 0]], np.float32))         # -1 never scored
    assert make_task(labels, np.arange(3), "ignore", "ignore")[2].tolist() == [[1, 0], [1, 0], [0, 1]]
    kind, targets, known, _ = make_task(labels, np.arange(3), "multiclass", "ignore")
    assert kind == "three-way" and known.tolist() == [[1, 1], [1, 0], [0, 1]]
    assert targets[0].tolist() == [[0, 1, 0], [0, 0, 1]] and targets[2].tolist() == [[0, 0, 0], [1, 0, 0]]
    classes = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    kind, targets, known, _ = make_task(classes, np.arange(2), "ignore", "zeros")               # what train says counts
    assert kind == "exclusive" and targets.shape == (3, 1, 2) and known.tolist() == [[True], [True], [False]]
    assert make_task(classes, np.arange(3), "ignore", "zeros")[0] == "binary"
    logits = torch.tensor([[1.0, 2.0, 9.0, 0.0, 0.0, -5.0]])
    assert to_probabilities(logits, "three-way")[0] == pytest.approx([1 / (1 + np.exp(-1)), 0.5])
    assert to_probabilities(logits, "exclusive").sum() == pytest.approx(1)


def test_masked_loss_and_balance():
    z, y = torch.tensor([[0.3, -1.2], [2.0, 0.4]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    w = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    direct = sum(w[i, j] * -(y[i, j] * z[i, j].sigmoid().log() + (1 - y[i, j]) * (1 - z[i, j].sigmoid()).log())
                 for i in range(2) for j in range(2)) / 4
    assert masked_cross_entropy(z[..., None], y[..., None], w).item() == pytest.approx(direct.item(), rel=1e-6)
    targets, known = np.array([1, 0, 0, 0, 1.0])[:, None, None], np.array([1, 1, 1, 1, 0], bool)[:, None]
    weights = cell_weights(targets, known, True)[:, 0]
    assert weights[4] == 0 and weights[0] == pytest.approx(weights[1:4].sum()) and weights.mean() == pytest.approx(1)
    classes = np.eye(3)[[0, 0, 0, 1, 2, 2]][:, None]
    assert (classes * cell_weights(classes, np.ones((6, 1), bool), True)[:, None]).sum(0) == pytest.approx(2)


def test_draws_are_nested_whole_patients_of_train(labelled):
    rng = np.random.default_rng(1)
    patients = np.array([f"p{i}" for i in rng.integers(0, 200, 700)])
    truth = (rng.random((700, 4)) < [0.3, 0.1, 0.01, 0.004]).astype(float)
    for seed in range(5):
        inside = set()
        for fraction in (0.01, 0.02, 0.1, 0.5, 1.0):
            chosen, beyond = draw(patients, truth, fraction, seed)
            assert inside <= set(chosen)
            assert set(np.flatnonzero(np.isin(patients, patients[chosen]))) == set(chosen)              # whole patients
            assert len(set(patients[chosen])) == int(fraction * len(set(patients)) + 0.5) + beyond
            assert (truth[chosen].sum(0) >= 1).all() and (truth[chosen].sum(0) < len(chosen)).all()
            inside = set(chosen)
        assert len(chosen) == 700 and not beyond
    assert set(draw(patients, truth, 0.1, 3)[0]) == set(draw(patients, truth, 0.1, 3)[0]) != set(draw(
        patients, truth, 0.1, 4)[0])
    with pytest.raises(finetune.DataError, match="--fraction 0.001 of .* is none"):
        draw(patients, truth, 0.001, 0)


@pytest.mark.parametrize("n, width", [(60, 100), (400, 30)])
def test_probe_finds_scikit_learns_optimum(n, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, width)) * np.logspace(0, -2, width)
    x = x / x.std(0) + 0.5
    z = x @ rng.standard_normal((width, 3))
    y = (z + 3 * rng.standard_normal((n, 3)) > [0, 3, 8]).astype(float)
    weights = rng.random((n, 3)) * (rng.random((n, 3)) < 0.8)
    found, free = fit_logistic(*map(torch.tensor, (x, y[:, :, None], weights, [0.001, 0.1, 10.0])), 1e-12)
    for r, g in np.ndindex(3, 3):
        peer = LogisticRegression(C=1 / (weights[:, g].sum() * [0.001, 0.1, 10.0][r]), tol=1e-9, max_iter=10_000)
        peer.fit(x, y[:, g], weights[:, g])
        np.testing.assert_allclose(found[:, r, g, 0], peer.coef_[0], atol=2e-3 * np.abs(peer.coef_).max())
        assert free[r, g, 0].item() == pytest.approx(peer.intercept_[0], abs=5e-3)
    classes = z.argmax(1)
    found, free = fit_logistic(*map(torch.tensor, (x, np.eye(3)[classes][:, None], np.ones((n, 1)), [0.01])), 1e-12)
    peer = LogisticRegression(C=1 / (n * 0.01), tol=1e-9, max_iter=10_000).fit(x, classes)
    np.testing.assert_allclose(to_probabilities(torch.tensor(x) @ found[:, 0, 0] + free[0, 0], "exclusive"),
                               peer.predict_proba(x), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def table(labelled, encoder, tmp_path_factory):
    """Two initialisations and both modes in one command."""
    out = tmp_path_factory.mktemp("table") / "run"
    command = [*FULL, "--init", "random", encoder, "--mode", "linear", "full", "--fraction", "0.5", "--peak", "--out"]
    main(*command, out)
    return out, command


def test_one_command_one_table(table):
    out, _ = table
    text, found = (out / "results.md").read_text(), rows(out)
    assert [(r["mode"], r["init"], r["label"]) for r in found] == list(itertools.product(
        ("linear", "full"), ("Scratch", "SimCLR"), ("Mass", "Effusion")))
    assert {r["n_train"] for r in found} == {36} and all(r["auroc_low"] <= r["auroc"] <= r["auroc_high"] for r in found)
    assert all((r["peak_accuracy"] is not None) == (r["mode"] == "full") for r in found) and "optimistic" in text
    block = text.split("## linear, 50 % of the labels")[1].split("##")[0]
    assert re.search(rf"\| Scratch \|.*{(found[0]['auroc'] + found[1]['auroc']) / 2:.3f}(\*\*)? \|", block)
    assert re.search(r"SimCLR − Scratch: mean AUROC [+-]\d\.\d{3} \(95 % .* p = ", block)
    mean = json.loads((out / "results.json").read_text())["means"][0]
    assert f"| {mean['low']:.3f} to {mean['high']:.3f} |" in block and mean["low"] <= mean["auroc"] <= mean["high"]
    events = EventAccumulator(str(out / "tensorboard/table")).Reload()
    assert {"efficiency", "calibration", "curves/full 0.5/SimCLR"} <= set(events.Tags()["images"])
    events = EventAccumulator(str(next(out.glob("tensorboard/SimCLR-full-50-seed-0")))).Reload()
    assert len(events.Scalars("loss")) == len(events.Scalars("val_score")) == 2
    assert all(Image.open(out / f"{name}.png").size[0] > 400 for name in ("efficiency", "calibration"))


def test_linear_leaves_the_encoder_alone_and_predicts(table, encoder, labelled, tmp_path, monkeypatch):
    """The kept classifier, on images, gives the probabilities that the probe gave on features; better than chance."""
    out = table[0].parent / "linear"
    with monkeypatch.context() as patch:                                        # kept features: no image is touched
        patch.setattr("model.extract_features", None)
        main("--init", encoder, "--mode", "linear", "--seeds", 0, 1, "--fraction", 0.5, 1, "--out", out)
    assert np.mean([r["auroc"] for r in rows(out)]) > 0.7 and "±" in (out / "results.md").read_text()
    net, state = load_classifier(out / "classifier.pt")
    before = load_checkpoint(encoder)["encoder"]
    assert before.keys() == state["encoder"].keys() and state["labels"] == ["Mass", "Effusion"]
    assert all(torch.equal(value, state["encoder"][key]) for key, value in before.items())
    main("--predict", out / "classifier.pt", "--data", labelled, "--threads", 1, "--explain", 3)
    kept = max(load_checkpoint(out / "predictions.pt").values(), key=lambda run: run["val_score"])
    manifest = read_manifest(labelled)
    predicted = np.loadtxt(out / "predictions.csv", delimiter=",", skiprows=1, usecols=(1, 2))
    np.testing.assert_allclose(predicted[manifest.images("test")], kept["test"], atol=1e-4)
    assert len(list((out / "explained").glob("*_00[012]_*_?.??.png"))) == 3
    main("--predict", out / "classifier.pt", "--data", labelled / "images", "--threads", 1)             # no manifest
    np.testing.assert_array_equal(predicted, np.loadtxt(out / "predictions.csv", delimiter=",", skiprows=1, usecols=(
        1, 2)))
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(deep / "scan.png")
    with pytest.raises(SystemExit, match="scan.png has 16 bits a pixel"):
        main("--predict", out / "classifier.pt", "--data", deep)
    (deep / "scan.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="scan.png cannot be read: cannot identify"):
        main("--predict", out / "classifier.pt", "--data", deep)


def test_test_labels_decide_nothing_and_no_test_patient_is_drawn(table, labelled, tmp_path, monkeypatch):
    """With the test rows' labels permuted every weight, prediction and threshold is the same; the scores are not."""
    def permute(lines):
        test = [line for line in lines if line[2] == "test"]
        for line, labels in zip(test, random.Random(0).sample([line[3:] for line in test], len(test))):
            line[3:] = labels
        return lines

    drawn, (out, command) = [], table
    monkeypatch.setattr(finetune, "draw", lambda patients, *rest: drawn.append(patients) or draw(patients, *rest))
    main(*command, tmp_path / "run", "--data", changed(labelled, tmp_path / "data", permute))
    manifest = read_manifest(labelled)
    assert not set(np.concatenate(drawn)) & set(manifest.patients[manifest.splits != "train"])
    a, b = (load_checkpoint(folder / "predictions.pt") for folder in (out, tmp_path / "run"))
    assert len(a) == 4 and a.keys() == b.keys()
    assert all(torch.equal(a[name][split], b[name][split]) for name in a for split in ("val", "test"))
    a, b = (load_checkpoint(folder / "classifier.pt") for folder in (out, tmp_path / "run"))
    assert same_weights(a, b) and a["thresholds"] == b["thresholds"]
    a, b = rows(out), rows(tmp_path / "run")
    assert [r["threshold"] for r in a] == [r["threshold"] for r in b]
    assert [r["auroc"] for r in a] != [r["auroc"] for r in b]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_mixed_precision_learns_the_same(labelled, tmp_path, precision):
    """Other roundings (bf16's on a CPU, too), nearly the same losses, from the very draw and views."""
    losses = []
    for name in ("fp32", precision):
        main(*FULL, "--init", "random", "--arch", "resnet18", "--image-size", 32, "--data", labelled, "--freeze-bn",
             "--lr-encoder", "1e-5", "--precision", name, "--out", tmp_path / name)
        losses.append([json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_killed_at_any_moment_and_started_again_ends_the_same(table, capsys):
    out, command = table
    again, victim, seen = out.parent / "killed", random.randint(1, 4), 0
    process = start("finetune.py", *command, again)
    for line in process.stdout:
        seen += " epoch " in line
        if seen == victim:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    assert process.wait(60) == -signal.SIGKILL
    main(*command, again)
    assert rows(again) == rows(out), f"killed after epoch line {victim}"
    assert (again / "log.jsonl").read_text() == (out / "log.jsonl").read_text()
    assert same_weights(*(load_checkpoint(folder / "classifier.pt") for folder in (out, again)))
    capsys.readouterr()
    main(*command, again)                                                       # nothing left to do but the table
    assert " epoch " not in capsys.readouterr().out and rows(again) == rows(out)


def test_a_run_takes_more_and_trains_only_that(table, encoder, capsys):
    more = shutil.copytree(table[0], table[0].parent / "more")
    main(*FULL, "--init", encoder, "random", "--mode", "linear", "full", "--fraction", 0.5, 0.2, "--seeds", 0, "--peak",
         "--out", more)
    output, known = capsys.readouterr().out, {tuple(row.values()) for row in rows(table[0])}
    assert "50 %, seed 0" not in output.split("# What")[0] and output.count("Scratch, full, 20 %, seed 0 epoch") == 2
    assert len(rows(more)) == 16 and known <= {tuple(row.values()) for row in rows(more)}


def test_full_starts_from_the_linear_probe(table):
    """With rates near zero and batch norm frozen, what was pre-trained stays what the probe found."""
    out, command = table[0].parent / "still", [*table[1][:-1], "--freeze-bn", "--lr-encoder", 1e-12, "--lr-head", 1e-12]
    main(*command, "--out", out)
    auroc = {(row["mode"], row["init"], row["label"]): row["auroc"] for row in rows(out)}
    for label in ("Mass", "Effusion"):
        assert auroc["full", "SimCLR", label] == pytest.approx(auroc["linear", "SimCLR", label], abs=0.01)
        assert auroc["full", "Scratch", label] != auroc["linear", "Scratch", label]


def test_two_processes_are_one(encoder, labelled, tmp_path):
    """With batch norm frozen (a CPU cannot synchronise it) training is the same to rounding, and so is every score."""
    found = tmp_path / "one", tmp_path / "two"
    command = [*FULL, "--init", encoder, "--freeze-bn", "--lr-encoder", "1e-5", "--out"]
    main(*command, found[0])
    code, output = run("finetune.py", *command, found[1], processes=2)
    assert code == 0 and output.count("done:") == 1, output
    (a,), (b,) = (load_checkpoint(out / "predictions.pt").values() for out in found)
    torch.testing.assert_close(a["test"], b["test"], atol=1e-3, rtol=0)
    losses = [[line["loss"] for line in kept["history"]] for kept in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]
    assert [r["auroc"] for r in rows(found[0])] == pytest.approx([r["auroc"] for r in rows(found[1])], abs=0.02)


# ----------------------------------------------------------------------------------------------------------------------

def test_wrong_input_is_refused_in_a_sentence(capsys, tmp_path, monkeypatch, encoder, labelled, table):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main(*arguments)
        return end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]

    def cells(name, split, labels):
        return changed(labelled, tmp_path / name, lambda lines: [
            line[:3] + labels if line[2] in (split, name) else line for line in lines])

    monkeypatch.chdir(tmp_path)
    given = "--init", encoder
    assert "runs/pretrain/encoder.pt does not exist: pre-train first" in refused()
    assert "--fraction: 0 does not lie in" in refused("--fraction", 0) and "nan does" in refused("--fraction", "nan")
    assert "--seeds: -1 does not" in refused("--seeds", 0, -1) and "invalid int value: 'x'" in refused("--epochs", "x")
    assert "is not a classifier.pt" in refused("--predict", encoder, "--data", labelled)
    assert "--labels Hernia" in refused(*given, "--labels", "Hernia")
    assert "of 36 labelled training patients is none" in refused(*given, "--fraction", 0.001)
    assert "holds a resnet18, not a resnet50" in refused(*given, "--arch", "resnet50")
    assert "no image of the val split has a label" in refused(*given, "--data", cells("empty", "val", ["", ""]))
    assert "only uncertain" in refused(*given, "--data", cells("unsure", "val", ["-1", "-1"]))
    assert "no label has a positive and a negative" in refused(*given, "--data", cells("one", "train", ["1", "0"]))
    bare = changed(labelled, tmp_path / "bare", lambda lines: [line[:3] for line in lines])
    assert "has no label column" in refused(*given, "--data", bare)
    assert not (tmp_path / "runs").exists()
    assert "--epochs (2 there, 5 here)" in refused(*table[1], table[0], "--epochs", 5)
    twice = changed(labelled, tmp_path / "twice", lambda lines: lines + [["images/000.jpg", "p0", "train", "1", "0"]])
    shutil.copy(next((labelled / "images").iterdir()), twice / "images/000.jpg")
    assert "the manifest's digest (" in refused(*table[1], table[0], "--data", twice)
    assert "the test split has only uncertain" in refused(*given, "--data", cells("mute", "test", ["-1", "-1"]))
    assert "is not a folder" in refused("--predict", table[0] / "classifier.pt", "--data", tmp_path / "nowhere")
    weights = load_checkpoint(encoder)["encoder"]
    weights["conv1.weight"][0] = torch.nan
    torch.save({"format": FORMAT, "arch": "resnet18", "encoder": weights}, tmp_path / "nan.pt")
    assert "weights are not finite" in refused("--init", tmp_path / "nan.pt", "--data", labelled)


@pytest.mark.parametrize("flags", [["--uncertain", "multiclass"], ["--uncertain", "ones", "--blank", "ignore",
                                                                   "--balance"]])
def test_uncertain_labels_and_a_class_missing_in_val(data, tmp_path, flags, capsys):
    """The common fixture's labels have all four values; Mass is made absent in all of val and test."""
    poor = changed(data, tmp_path / "data", lambda lines: [
        line[:4] + ["0"] if line[2] in ("val", "test") else line for line in lines])
    main(*FULL, "--mode", "linear", "full", "--init", "random", "--arch", "resnet18", "--image-size", 32,
         "--data", poor, "--out", tmp_path / "run", *flags, "--epochs", 1)
    output, found = capsys.readouterr().out, rows(tmp_path / "run")
    named = "a class of its own" if "multiclass" in flags else "counts as ones, blank as ignore; classes balanced"
    assert named in output and "Mass has one class only in val" in output and "| – |" in output
    assert [r["auroc"] is None for r in found] == [False, True] * 2 and found[1]["threshold"] == 0.5
