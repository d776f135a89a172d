"""Fine-tuning as a user meets it: one table of all combinations, interruption at any moment, wrong
input."""
import csv
import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
import predict
import pretrain
import study
from checkpoint import load_checkpoint, save_checkpoint
from dali_pipeline import Preprocessing, eval_loader
from labels import deal, draw
from manifest import read_manifest
from model import SimCLR, build_encoder
from predict import load_classifier
from run import Compute

FULL = ["--epochs", "2", "--batch-size", "8", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def control_c():
    """A shell starts what runs in the background with SIGINT ignored, and processes inherit
    that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def main(*arguments):
    """finetune.py in this process, which saves the start of another."""
    finetune.main([*map(str, arguments)])


def changed(labelled, folder, change):
    """A data folder with the same images and a changed manifest: `change` gets and returns its
    rows, header first."""
    folder.mkdir(parents=True)
    (folder / "images").symlink_to(labelled / "images")
    with (open(labelled / "manifest.csv") as old,
          open(folder / "manifest.csv", "w", newline="") as new):
        csv.writer(new).writerows(change(list(csv.reader(old))))
    return folder


def rows(out):
    return json.loads((out / "results.json").read_text())["results"]


def same_weights(a, b):
    return all(torch.equal(value, b[part][key])
               for part in ("encoder", "classifier") for key, value in a[part].items())


# --------------------------------------------------------------------------------------------------
# One command, one table.

@pytest.fixture(scope="module")
def table(labelled, encoder, tmp_path_factory):
    """Two initialisations and both modes in one command."""
    out = tmp_path_factory.mktemp("table") / "run"
    command = [*FULL, "--init", "random", encoder, "--mode", "linear", "full",
               "--fraction", "0.5", "--peak", "--out"]
    main(*command, out)
    return out, command


def test_one_command_one_table(table):
    out, _ = table
    text, found = (out / "results.md").read_text(), rows(out)
    assert [(r["mode"], r["init"], r["label"]) for r in found] == list(itertools.product(
        ("linear", "full"), ("Scratch", "SimCLR"), ("Mass", "Effusion")))
    assert {r["n_train"] for r in found} == {36}
    assert all(r["auroc_low"] <= r["auroc"] <= r["auroc_high"] for r in found)
    assert all((r["peak_accuracy"] is not None) == (r["mode"] == "full") for r in found)
    assert "optimistic" in text

    block = text.split("## linear, 50 % of the labels")[1].split("##")[0]
    mean = (found[0]["auroc"] + found[1]["auroc"]) / 2
    assert re.search(rf"\| Scratch \|.*{mean:.3f}(\*\*)? \|", block)
    assert re.search(r"SimCLR − Scratch: mean AUROC [+-]\d\.\d{3} \(95 % .* p = ", block)
    mean = json.loads((out / "results.json").read_text())["means"][0]
    assert f"| {mean['low']:.3f} to {mean['high']:.3f} |" in block
    assert mean["low"] <= mean["auroc"] <= mean["high"]

    events = EventAccumulator(str(out / "tensorboard/table")).Reload()
    assert {"efficiency", "calibration", "curves/full 0.5/SimCLR"} <= set(events.Tags()["images"])
    events = EventAccumulator(str(next(out.glob("tensorboard/SimCLR-full-50-seed-0")))).Reload()
    assert len(events.Scalars("loss")) == len(events.Scalars("val_score")) == 2
    assert all(Image.open(out / f"{name}.png").size[0] > 400
               for name in ("efficiency", "calibration"))


def test_linear_leaves_the_encoder_alone(table, encoder, monkeypatch):
    """Better than chance, and from kept features: no image is touched."""
    out = table[0].parent / "linear"
    with monkeypatch.context() as patch:
        patch.setattr("probe.extract_features", None)
        main("--init", encoder, "--mode", "linear", "--seeds", 0, 1, "--fraction", 0.5, 1,
             "--out", out)
    assert np.mean([r["auroc"] for r in rows(out)]) > 0.7
    assert "±" in (out / "results.md").read_text()
    _, state = load_classifier(out / "classifier.pt")
    before = load_checkpoint(encoder)["encoder"]
    assert before.keys() == state["encoder"].keys() and state["labels"] == ["Mass", "Effusion"]
    assert all(torch.equal(value, state["encoder"][key]) for key, value in before.items())


def test_test_labels_decide_nothing_and_no_test_patient_is_drawn(table, labelled, tmp_path,
                                                                 monkeypatch):
    """With the test rows' labels permuted every weight, prediction and threshold is the same; the
    scores are not."""
    def permute(lines):
        test = [line for line in lines if line[2] == "test"]
        shuffled = random.Random(0).sample([line[3:] for line in test], len(test))
        for line, labels in zip(test, shuffled):
            line[3:] = labels
        return lines

    def remember(patients, *rest):
        drawn.append(patients)
        return draw(patients, *rest)

    drawn, (out, command) = [], table
    monkeypatch.setattr(study, "draw", remember)
    main(*command, tmp_path / "run", "--data", changed(labelled, tmp_path / "data", permute))
    manifest = read_manifest(labelled)
    assert drawn
    assert not set(np.concatenate(drawn)) & set(manifest.patients[manifest.splits != "train"])

    a, b = (load_checkpoint(folder / "predictions.pt") for folder in (out, tmp_path / "run"))
    assert len(a) == 4 and a.keys() == b.keys()
    assert all(torch.equal(a[name][split], b[name][split])
               for name in a for split in ("val", "test"))
    a, b = (load_checkpoint(folder / "classifier.pt") for folder in (out, tmp_path / "run"))
    assert same_weights(a, b) and a["thresholds"] == b["thresholds"]
    a, b = rows(out), rows(tmp_path / "run")
    assert [r["threshold"] for r in a] == [r["threshold"] for r in b]
    assert [r["auroc"] for r in a] != [r["auroc"] for r in b]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_mixed_precision_learns_the_same(labelled, tmp_path, precision):
    """Other roundings (bf16's on a CPU, too), nearly the same losses, from the very draw and
    views."""
    losses = []
    for name in ("fp32", precision):
        main(*FULL, "--init", "random", "--arch", "resnet18", "--image-size", 32,
             "--data", labelled, "--freeze-bn", "--lr-encoder", "1e-5", "--precision", name,
             "--out", tmp_path / name)
        losses.append([json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert load_checkpoint(tmp_path / "fp32/classifier.pt")["labels_required"] == 72


def test_full_starts_from_the_linear_probe(table):
    """With rates near zero and batch norm frozen, what was pre-trained stays what the probe
    found."""
    out, command = table[0].parent / "still", table[1]
    main(*command, out, "--freeze-bn", "--lr-encoder", 1e-12, "--lr-head", 1e-12, "--epochs", 1)
    auroc = {(row["mode"], row["init"], row["label"]): row["auroc"] for row in rows(out)}
    for label in ("Mass", "Effusion"):
        linear = auroc["linear", "SimCLR", label]
        assert auroc["full", "SimCLR", label] == pytest.approx(linear, abs=0.01)
        assert auroc["full", "Scratch", label] != auroc["linear", "Scratch", label]


def test_two_processes_are_one(encoder, tmp_path, run_forked):
    """With batch norm frozen (a CPU cannot synchronise it) training is the same to rounding, and so
    is every score."""
    found = tmp_path / "one", tmp_path / "two"
    command = [*FULL, "--init", encoder, "--freeze-bn", "--lr-encoder", "1e-5", "--out"]
    main(*command, found[0])
    codes, outputs = zip(*run_forked("finetune.py", *command, found[1], processes=2))
    assert codes == (0, 0) and "".join(outputs).count("done:") == 1, outputs
    (a,), (b,) = (load_checkpoint(out / "predictions.pt").values() for out in found)
    torch.testing.assert_close(a["test"], b["test"], atol=1e-3, rtol=0)
    losses = [[line["loss"] for line in entry["history"]] for entry in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]
    auroc = [[r["auroc"] for r in rows(out)] for out in found]
    assert auroc[0] == pytest.approx(auroc[1], abs=0.02)


# --------------------------------------------------------------------------------------------------
# Interruption, and going on.

def test_killed_at_any_moment_and_started_again_ends_the_same(table, start_forked, capsys):
    out, command = table
    again, victim, seen = out.parent / "killed", random.randint(1, 4), 0
    process = start_forked("finetune.py", *command, again)
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
    main(*command, again)                               # nothing left to do but the table
    assert " epoch " not in capsys.readouterr().out and rows(again) == rows(out)


@pytest.mark.parametrize("mode, line", [
    ("full", "features of"), ("full", " epoch 001"), ("linear", "# What")])
def test_ctrl_c_is_one_sentence(encoder, start_forked, mode, line, tmp_path):
    """At any moment, also while the report is written: `line` is what was printed last."""
    process = start_forked("finetune.py", *FULL, "--init", "random", encoder, "--mode", mode,
                           "--out", tmp_path / "run")
    for output in process.stdout:
        if line in output:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            break
    output = process.stdout.read()
    assert process.wait(60) == 130 and "Traceback" not in output
    assert output.splitlines()[-1].startswith("finetune.py: interrupted; the same command goes on")


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path):
    """It waits until the file is whole, and is the KeyboardInterrupt that it should be."""
    file, interrupts = tmp_path / "last.pt", 0
    state = {str(i): torch.full((1000, 250), i) for i in range(20)}
    save_checkpoint(file, state)
    for milliseconds in range(1, 41):
        timer = threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for _ in range(100):
                save_checkpoint(file, state)
        except KeyboardInterrupt:
            interrupts += 1
        assert load_checkpoint(file).keys() == state.keys()
        assert list(tmp_path.iterdir()) == [file]
    assert interrupts == 40


def test_a_run_takes_more_and_trains_only_that(table, encoder, capsys):
    more = shutil.copytree(table[0], table[0].parent / "more")
    config = json.loads((more / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("from_head", "folds")}
    (more / "config.json").write_text(json.dumps(config))       # of a version without these flags
    main(*FULL, "--init", encoder, "random", "--mode", "linear", "full", "--fraction", 0.5, 0.2,
         "--seeds", 0, "--peak", "--out", more)
    output, before = capsys.readouterr().out, {tuple(row.values()) for row in rows(table[0])}
    assert "50 %, seed 0" not in output.split("# What")[0]
    assert output.count("Scratch, full, 20 %, seed 0 epoch") == 2
    assert output.count("features of") == 2             # read once for each initialisation
    assert len(rows(more)) == 16 and before <= {tuple(row.values()) for row in rows(more)}


def test_what_another_command_has_begun_is_not_lost(labelled, tmp_path, capsys):
    """Interrupted, asked for something else, and then for both."""
    command = ["--epochs", "3", "--batch-size", "8", "--threads", "1", "--init", "random",
               "--arch", "resnet18", "--image-size", "32", "--data", labelled, "--fraction", "0.2",
               "--out", tmp_path / "run"]

    def interrupt():
        while not (tmp_path / "run/last.pt").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit):
        main(*command, "--seeds", 1)
    begun = load_checkpoint(tmp_path / "run/last.pt")
    assert 0 < len(begun["history"]) < 3
    # Nothing to train: it stays. Something to train: it is put aside.
    main(*command, "--mode", "linear")
    assert load_checkpoint(tmp_path / "run/last.pt")["key"] == begun["key"]
    main(*command)
    assert not (tmp_path / "run/last.pt").exists()
    aside, = (tmp_path / "run").glob("last-*.pt")
    assert aside.name == "last-0.2-random-1.pt"
    assert load_checkpoint(aside)["history"] == begun["history"]
    capsys.readouterr()
    main(*command, "--seeds", 0, 1)
    output = capsys.readouterr().out
    assert f"going on from {tmp_path}/run/last.pt, epoch {len(begun['history'])} of" in output
    assert "seed 0 epoch" not in output and not list((tmp_path / "run").glob("last*"))


@pytest.fixture(scope="module")
def begun(encoder, start_forked, tmp_path_factory):
    """The command of a training, its run folder after a kill, and another one without."""
    command = [*FULL, "--init", encoder, "--fraction", 0.5, "--out"]
    out, undisturbed = (tmp_path_factory.mktemp("begun") / name for name in ("run", "undisturbed"))
    process = start_forked("finetune.py", *command, out)
    assert any("epoch 001" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.to_end()
    main(*command, undisturbed)
    return command, out, undisturbed


@pytest.mark.parametrize("name", ["last-*.pt", "last.pt"])
def test_a_damaged_file_of_a_begun_training_is_said_and_begun_anew(begun, name, tmp_path, capsys):
    """Whether it is put aside or not: from the linear probe, as one that nobody disturbed."""
    command, out, undisturbed = begun
    out = shutil.copytree(out, tmp_path / "run")
    if name == "last-*.pt":
        main(*command, out, "--seeds", 1)
    file, = out.glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    main(*command, out)
    output = capsys.readouterr().out
    assert f"{file} is damaged: its epochs are lost, and that training begins anew" in output
    assert "going on" not in output and not list(out.glob("last*"))
    assert rows(out) == rows(undisturbed)


def test_a_classifier_that_is_gone_is_said(table, capsys):
    out = shutil.copytree(table[0], table[0].parent / "gone")
    main(*table[1], out)
    assert "was deleted" not in capsys.readouterr().out
    (out / "classifier.pt").unlink()
    main(*table[1], out)
    output = capsys.readouterr().out
    assert f"{out}/classifier.pt was deleted, and only --overwrite makes it again" in output
    assert "results.json, " not in output


def test_names_in_the_table_are_told_apart_and_settings_come_from_who_has_some(
        labelled, encoder, tmp_path, monkeypatch, capsys):
    """Files of another tool that say nothing of their training, one of them called as random
    weights are."""
    monkeypatch.chdir(tmp_path)
    weights = load_checkpoint(encoder)["encoder"]
    torch.save({"state_dict": weights, "config": {"lr": 1}}, "Scratch")
    shutil.copy(encoder, "encoder.pt")
    main("--init", "Scratch", "random", "encoder.pt", "--mode", "linear", "--threads", 1)
    output = capsys.readouterr().out
    assert f"inherited from encoder.pt: data {labelled}, arch resnet18, image_size 32" in output
    assert list(dict.fromkeys(row["init"] for row in rows(tmp_path / "runs/finetune"))) == [
        "Scratch", "Scratch (random)", "SimCLR (encoder.pt)"]


def test_a_copy_is_the_same_initialisation_and_labels_add_up(encoder, tmp_path, capsys):
    """The classifier says how many images' labels its encoder has learned from, earlier trainings
    included."""
    classifier = load_checkpoint(encoder) | {"classifier": {}, "labels_required": 100}
    for name in ("a b.pt", "a-b.pt"):
        save_checkpoint(tmp_path / name, classifier | {"name": name})
    shutil.copy(tmp_path / "a b.pt", tmp_path / "copy.pt")
    main(*FULL, "--init", tmp_path / "a b.pt", tmp_path / "copy.pt", tmp_path / "a-b.pt",
         "--epochs", 1, "--fraction", 0.5, "--freeze-bn", "--out", tmp_path / "run")
    output = capsys.readouterr().out
    assert f"{tmp_path}/copy.pt is the same as {tmp_path}/a b.pt, and left out" in output
    assert len(rows(tmp_path / "run")) == 4
    last = load_checkpoint(tmp_path / "run/classifier.pt")
    best = max(load_checkpoint(tmp_path / "run/predictions.pt").values(),
               key=lambda entry: entry["val_score"])
    assert last["n_train"] == 36 * best["epoch"]        # epoch 0 leaves the encoder as it came
    assert last["labels_required"] == 100 + last["n_train"]
    # Their curves are in folders of their own.
    assert len(list((tmp_path / "run/tensorboard").glob("*a-b.pt-full*"))) == 2


# --------------------------------------------------------------------------------------------------
# Wrong input, and poor input.

def test_wrong_input_is_refused_in_a_sentence(capsys, tmp_path, monkeypatch, encoder, labelled,
                                              table):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main(*arguments)
        code = end.value.code
        return code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]

    def cells(name, split, labels):
        return changed(labelled, tmp_path / name, lambda lines: [
            line[:3] + labels if line[2] in (split, name) else line for line in lines])

    monkeypatch.chdir(tmp_path)
    given = "--init", encoder
    assert "runs/pretrain/encoder.pt does not exist: pre-train first" in refused()
    assert "--fraction: 0 does not lie in" in refused("--fraction", 0)
    assert "nan does" in refused("--fraction", "nan")
    assert "--seeds: -1 does not" in refused("--seeds", 0, -1)
    assert "invalid int value: 'x'" in refused("--epochs", "x")
    assert "--peak is over epochs" in refused("--peak", "--mode", "linear")
    assert "--labels Hernia" in refused(*given, "--labels", "Hernia")
    assert "of 36 labelled training patients is none" in refused(*given, "--fraction", 0.001)
    assert "holds a resnet18, not a resnet50" in refused(*given, "--arch", "resnet50")
    empty = cells("empty", "val", ["", ""])
    assert "no image of the val split has a label" in refused(*given, "--data", empty)
    unsure = cells("unsure", "val", ["-1", "-1"])
    assert "only uncertain" in refused(*given, "--data", unsure)
    one = cells("one", "train", ["1", "0"])
    assert "no label has a positive and a negative" in refused(*given, "--data", one)
    present = changed(labelled, tmp_path / "present", lambda lines: [
        [cell.replace("0", "-1") if i > 2 and line[2] == "train" else cell
         for i, cell in enumerate(line)] for line in lines])
    assert "no label has a positive and a negative" in refused(
        *given, "--data", present, "--uncertain", "multiclass")
    mute = cells("mute", "test", ["-1", "-1"])
    assert "the test split has only uncertain" in refused(*given, "--data", mute)
    bare = changed(labelled, tmp_path / "bare", lambda lines: [line[:3] for line in lines])
    assert "has no label column" in refused(*given, "--data", bare)
    assert not (tmp_path / "runs").exists()
    state = load_checkpoint(encoder)
    state["encoder"]["conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    assert "weights are not finite" in refused("--init", tmp_path / "nan.pt", "--data", labelled)


def test_another_run_is_refused(table, labelled, tmp_path):
    """With other flags, with another data folder, and where the manifest was changed."""
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main(*table[1], table[0], *arguments)
        return end.value.code

    assert "with other flags: --epochs (2 there, 5 here); choose another" in refused("--epochs", 5)
    shorter = changed(labelled, tmp_path / "shorter", lambda lines: lines[:-1])
    assert f"--data ({labelled} there, {shorter} here)" in refused("--data", shorter)

    # As though the run's own data folder had lost a row. Other tests need that folder as it is.
    run_folder = shutil.copytree(table[0], tmp_path / "run")
    config = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(config | {"data": str(shorter)}))
    with pytest.raises(SystemExit, match=f"run on {shorter} as it was before it was"):
        main(*table[1], run_folder, "--data", shorter)


@pytest.mark.parametrize("flags", [
    ["--uncertain", "multiclass"], ["--uncertain", "ones", "--blank", "ignore", "--balance"]])
def test_uncertain_labels_and_a_class_missing_in_val(data, tmp_path, flags, capsys):
    """The common fixture's labels have all four values; Mass is made absent in all of val and
    test."""
    poor = changed(data, tmp_path / "data", lambda lines: [
        line[:4] + ["0"] if line[2] in ("val", "test") else line for line in lines])
    main(*FULL, "--mode", "linear", "full", "--init", "random", "--arch", "resnet18",
         "--image-size", 32, "--data", poor, "--out", tmp_path / "run", *flags, "--epochs", 1)
    output, found = capsys.readouterr().out, rows(tmp_path / "run")
    policy = ("is a class of its own, an empty cell counts as absent" if "multiclass" in flags else
              "counts as present, an empty cell is left out; classes balanced")
    assert policy in output and "Mass has one class only in val" in output and "| – |" in output
    assert [r["auroc"] is None for r in found] == [False, True] * 2
    assert found[1]["threshold"] == 0.5


# --------------------------------------------------------------------------------------------------
# From a layer of the projection head.

@pytest.fixture(scope="module")
def pretrained(labelled, tmp_path_factory):
    """An encoder.pt that pretrain.py has made, with its projection head of three layers, and
    SimCLR's network as its last.pt has it."""
    out = tmp_path_factory.mktemp("pretrained")
    pretrain.main([*SMALL, "--data", str(labelled), "--proj-layers", "3", "--proj-width", "96",
                   "--out", str(out)])
    net = SimCLR(build_encoder("resnet18"), 3, 96)
    net.load_state_dict(load_checkpoint(out / "last.pt")["model"])
    return out / "encoder.pt", net.eval()


@pytest.mark.parametrize("layers, modules, width", [(1, 3, 96), (2, 6, 96), (3, 7, 128)])
def test_features_from_the_head(pretrained, labelled, tmp_path, layers, modules, width, capsys):
    """They are what SimCLR's own network has there, linear training leaves them alone, and
    predict.py rebuilds them."""
    encoder, net = pretrained
    main("--init", encoder, "--mode", "linear", "--from-head", layers, "--out", tmp_path / "run",
         "--batch-size", 8)
    classifier, state = load_classifier(tmp_path / "run/classifier.pt")
    manifest = read_manifest(labelled)
    preprocessing = Preprocessing(32, state["config"]["normalize"], state["config"]["clahe"])
    loader = eval_loader(manifest, manifest.images("test"), 8, preprocessing, "cpu")
    x = torch.cat([batch for batch, _ in loader])
    with torch.no_grad():
        expected = net.projector[:modules](net.encoder(x))                  # (n, width)
        torch.testing.assert_close(classifier.projector(classifier.encoder(x)), expected)
        logits = classifier(x)
    assert expected.shape[1] == classifier.head.in_features == width
    for key, value in classifier.projector.state_dict().items():
        assert torch.equal(value, net.projector.state_dict()[key])
    predictions, = load_checkpoint(tmp_path / "run/predictions.pt").values()
    torch.testing.assert_close(logits.sigmoid().double(), predictions["test"], atol=1e-4, rtol=0)

    # What stands in the table, and what predict.py says of the same images.
    name = f"SimCLR, head layer {layers}"
    assert {row["init"] for row in rows(tmp_path / "run")} == {name}
    assert f"| {name} |" in (tmp_path / "run/results.md").read_text()
    predict.main([str(tmp_path / "run/classifier.pt"), str(labelled), "--out", str(tmp_path / "p"),
                  "--threads", "1"])
    lines = list(csv.reader(open(tmp_path / "p/predictions.csv")))[1:]
    found = [[float(p) for p in lines[i][1:]] for i in manifest.images("test")]
    np.testing.assert_allclose(found, predictions["test"], atol=1e-4)


def test_full_training_trains_the_head_as_well(pretrained, tmp_path):
    """Its first layers and no more; the classifier starts another training from the same place."""
    encoder, net = pretrained
    before = net.projector[:3].state_dict()
    config = finetune.Config(init=(str(encoder),), from_head=1)
    study = finetune.read_study(config, Compute(0, 1, torch.device("cpu"), "fp32", 1))
    key, = study.inits
    training = finetune.FineTuning(study, finetune.Combination("full", 1.0, key, 0))
    training.net.train()(torch.randn(4, 1, 32, 32)).sum().backward()
    training.optimizer.param_groups[0]["lr"] = 1e-3
    training.optimizer.step()
    after = training.net.projector.state_dict()
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[key], value) for key, value in before.items())

    main(*FULL, "--init", encoder, "--from-head", 1, "--out", tmp_path / "run")
    _, state = load_classifier(tmp_path / "run/classifier.pt")
    assert state["projector"].keys() == before.keys() and state["config"]["from_head"] == 1
    main(*FULL, "--init", tmp_path / "run/classifier.pt", "--from-head", 1, "--mode", "linear",
         "--out", tmp_path / "again")
    again = load_checkpoint(tmp_path / "again/classifier.pt")["projector"]
    assert all(torch.equal(value, state["projector"][key]) for key, value in again.items())


def test_a_head_that_is_not_there_is_refused_in_a_sentence(pretrained, labelled, tmp_path):
    def refused(init, layers):
        with pytest.raises(SystemExit) as end:
            main("--init", init, "--from-head", layers, "--data", labelled, "--arch", "resnet18",
                 "--image-size", 32, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return end.value.code

    state = load_checkpoint(pretrained[0])
    torch.save(state["encoder"], tmp_path / "plain.pt")
    save_checkpoint(tmp_path / "older.pt", {key: value for key, value in state.items()
                                            if key != "projector"})
    state["projector"]["0.weight"] = state["projector"]["0.weight"][:, :100]
    save_checkpoint(tmp_path / "narrow.pt", state)
    for init in ("random", tmp_path / "plain.pt", tmp_path / "older.pt"):
        assert f"--from-head 2: {init} has no projection head" in refused(init, 2)
    assert "--from-head 4: the projection head in" in refused(pretrained[0], 4)
    assert "holds a projection head that does not fit: " in refused(tmp_path / "narrow.pt", 2)


def test_an_older_encoder_gets_its_head_from_the_last_checkpoint(pretrained, labelled, capsys):
    encoder, _ = pretrained
    state = load_checkpoint(encoder)
    head = state.pop("projector")
    save_checkpoint(encoder, state)
    pretrain.main([*SMALL, "--data", str(labelled), "--proj-layers", "3", "--proj-width", "96",
                   "--out", str(encoder.parent)])
    assert "is complete" in capsys.readouterr().out
    again = load_checkpoint(encoder)["projector"]
    assert all(torch.equal(value, again[key]) for key, value in head.items())


# --------------------------------------------------------------------------------------------------
# Cross-validation over train and val.

@pytest.fixture(scope="module")
def validated(labelled, encoder, tmp_path_factory):
    """Two initialisations on three folds, where no image of test can be read."""
    folder, out = tmp_path_factory.mktemp("folds") / "data", tmp_path_factory.mktemp("folds")
    shutil.copytree(labelled, folder)
    manifest = read_manifest(labelled)
    for i in manifest.images("test"):
        (folder / manifest.paths[i]).write_bytes(b"not an image")
    command = ["--mode", "linear", "--folds", 3, "--fraction", 0.5, 1, "--seeds", 0, 1,
               "--batch-size", 8, "--threads", 1, "--init", "random", encoder, "--out"]
    command += [out / "run", "--data", folder]
    main(*command)
    return out / "run", command


def test_cross_validation_in_one_table(validated, labelled, capsys):
    out, command = validated
    manifest = read_manifest(labelled)
    text, results = (out / "results.md").read_text(), json.loads((out / "results.json").read_text())
    assert "96 images of 48 patients, train and val together; no image of test was read" in text
    assert results["folds"] == 3
    assert [(r["fraction"], r["init"], r["seed"], r["label"]) for r in results["results"]] == list(
        itertools.product((0.5, 1.0), ("Scratch", "SimCLR"), (0, 1), ("Mass", "Effusion")))
    last = results["means"][-1]
    mean = np.mean([r["auroc"] for r in results["results"][-4:]])
    assert last["auroc"] == pytest.approx(mean) and last["low"] <= mean <= last["high"]
    assert last["auroc"] > 0.6
    assert re.search(rf"\| SimCLR \|.*{mean:.3f}.* \| {last['low']:.3f} to {last['high']:.3f} \|",
                     text.split("## 100 %")[1])
    pair = results["comparisons"][-1]
    assert (pair["init"], pair["against"], pair["label"]) == ("SimCLR", "Scratch", "mean")
    assert (f"SimCLR − Scratch: mean AUROC {pair['difference']:+.3f} (95 % {pair['low']:+.3f} to "
            f"{pair['high']:+.3f}, p = ") in text

    # Nothing is left to do but the table; another command is another run.
    main(*command)
    assert "features of" not in capsys.readouterr().out
    assert (out / "results.md").read_text() == text
    assert not (out / "classifier.pt").exists()
    with pytest.raises(SystemExit, match=r"with other flags: .*--folds \(3 there, None here\)"):
        main("--init", "random", "--data", manifest.folder, "--out", out)


def test_a_fold_has_no_say_in_its_own_predictions(validated, labelled, encoder, tmp_path):
    """Its labels permuted, they are the same to the bit, and so is the strength of
    regularisation; those of the other folds are not."""
    manifest = read_manifest(labelled)
    images = np.concatenate([manifest.images("train"), manifest.images("val")])
    images = images[~np.isnan(manifest.labels[images]).all(1)]
    fold = deal(manifest.patients[images], 3, 0)
    moved = images[fold == 1] + 1                       # rows of the table, after its header

    def permute(lines):
        labels = random.Random(0).sample([lines[i][3:] for i in moved], len(moved))
        for i, cells in zip(moved, labels):
            lines[i][3:] = cells
        return lines

    out, command = validated
    main(*command, "--out", tmp_path / "run",
         "--data", changed(labelled, tmp_path / "data", permute))
    a, b = (load_checkpoint(folder / "predictions.pt") for folder in (out, tmp_path / "run"))
    assert len(a) == 8 and a.keys() == b.keys()
    for key in a:
        if key[3] == 0:
            assert all(np.array_equal(entry[key]["fold"], fold) for entry in (a, b))
            same = (a[key]["predictions"] == b[key]["predictions"]).numpy()
            assert same[fold == 1].all() and not same[fold != 1].all()
        assert a[key]["predictions"].isfinite().all()


def test_a_finished_combination_is_kept_before_the_next_begins(validated, start_forked, tmp_path):
    """With folds, too: an interruption costs one at most."""
    process = start_forked("finetune.py", *validated[1], "--seeds", *range(9), "--out",
                           tmp_path / "run")
    assert any(line.endswith(" 3 folds\n") for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.to_end()
    assert 1 <= len(load_checkpoint(tmp_path / "run/predictions.pt")) < 9


def test_folds_that_cannot_be_are_refused(labelled, encoder, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main("--init", encoder, "--out", tmp_path / "run", *arguments)
        return end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err

    assert "--folds judges linear classifiers and needs --mode linear" in refused("--folds", 5)
    assert "--folds takes 3 or more" in refused("--folds", 2, "--mode", "linear")
    assert "--folds 50 are too many for 48 labelled patients" in refused(
        "--folds", 50, "--mode", "linear")


@pytest.mark.parametrize("flags, complaint", [
    (["--uncertain", "ones"], "--folds can score no label, as none has a certain positive"),
    (["--uncertain", "multiclass"], "what fold 0 is predicted from says nothing of Mass")])
def test_uncertain_labels_alone_are_refused_by_folds(labelled, encoder, tmp_path, flags, complaint):
    """Where all that could be positive is uncertain, and where all of a third fold is."""
    manifest = read_manifest(labelled)
    learners = manifest.patients[(manifest.splits != "test") & ~np.isnan(manifest.labels[:, 0])]
    third = set(learners[deal(learners, 3, 0) == 2])
    ones = "ones" in flags

    def unsure(lines):
        return [lines[0][:4], *(
            [*line[:3], "-1" if (line[3] == "1" if ones else line[1] in third) else line[3]]
            for line in lines[1:])]

    with pytest.raises(SystemExit) as end:
        main("--init", encoder, "--mode", "linear", "--folds", 3, *flags, "--out", tmp_path / "run",
             "--data", changed(labelled, tmp_path / "data", unsure))
    assert complaint in end.value.code
