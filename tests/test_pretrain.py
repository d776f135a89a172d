"""The training script as a user meets it: runs, curves, interruption at any moment, wrong input."""
import json
import math
import random
import re
import signal
import threading

import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL, run, start
from sklearn.metrics import roc_auc_score

import pretrain
from model import load_checkpoint, save_checkpoint
from pretrain import LARS, knn_auroc, learning_rate


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 15 steps that nobody interrupted, with probes."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, output = run("pretrain.py", *SMALL, "--probe-every", "1", "--data", data, "--out", out)
    assert code == 0, output
    return out, output


def scalars(out, name):
    return {line["step"]: line[name] for line in map(json.loads, open(out / "log.jsonl")) if name in line}


def test_run_folder(finished):
    out, output = finished
    assert sorted(p.name.split(".")[0] for p in out.iterdir()) == ["config", "encoder", "events", "last", "log"]
    assert sorted(scalars(out, "loss")) == list(range(1, 16))
    assert sorted(scalars(out, "probe/auroc")) == [0, 5, 10, 15]        # 42 images, 8 a step: epochs of 5.25 steps
    assert re.search(r"epoch 002 step 00015/15 \| loss \d\.\d{4} \(chance 2\.71\) \| lr ", output)
    assert scalars(out, "lr")[1] == pytest.approx(0.3 * 8 / 256 / 6) and scalars(out, "lr")[15] < 0.3 * 8 / 256 / 10


def test_encoder_loads_into_torchvision_strictly(data, tmp_path):
    code, output = run("pretrain.py", *SMALL, "--arch", "resnet50", "--data", data, "--out", tmp_path,
                       "--max-steps", "1")
    assert code == 0, output
    checkpoint = load_checkpoint(tmp_path / "encoder.pt")
    net = torchvision.models.resnet50()
    net.conv1, net.fc = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False), torch.nn.Identity()
    net.load_state_dict(checkpoint["encoder"], strict=True)
    assert checkpoint["arch"] == "resnet50" and checkpoint["config"]["image_size"] == 32
    assert {"normalize", "clahe", "mean", "std", "data"} <= checkpoint["config"].keys()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_step_and_started_again_ends_the_same(finished, data, tmp_path, how):
    whole, _ = finished
    command = ["pretrain.py", *SMALL, "--probe-every", "1", "--data", data, "--out", tmp_path / "run"]
    victim, at = random.Random(how).randint(4, 13), None
    process = start(*command)
    for line in process.stdout:
        match = re.search(r"step (\d+)/15 \| loss", line)
        if match and int(match[1]) >= victim:
            at = int(match[1])
            process.send_signal(how)
            break
    rest, code = process.stdout.read(), process.wait(60)
    assert at and code == (-how if how == signal.SIGKILL else 128 + how), rest
    if how != signal.SIGKILL:
        assert f"{signal.Signals(how).name} at step" in rest and "the same command goes on" in rest
    code, output = run(*command)
    assert code == 0 and "going on from" in output, output
    ends = [load_checkpoint(folder / "last.pt") for folder in (whole, tmp_path / "run")]
    assert ends[0]["model"].keys() == ends[1]["model"].keys()
    assert all(torch.equal(value, ends[1]["model"][key]) for key, value in ends[0]["model"].items())
    buffers = [[s["momentum_buffer"] for s in end["optimizer"]["state"].values()] for end in ends]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    for name in ("loss", "top1", "lr", "probe/auroc"):
        assert scalars(whole, name) == scalars(tmp_path / "run", name)
    encoder = load_checkpoint(tmp_path / "run/encoder.pt")["encoder"]
    assert all(torch.equal(value, ends[0]["model"][f"encoder.{key}"]) for key, value in encoder.items())


def test_same_command_on_a_complete_run_says_so(finished, data, capsys):
    out, _ = finished
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    pretrain.main([*SMALL, "--probe-every", "1", "--data", str(data), "--out", str(out)])
    assert "is complete: step 15 of 15" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def refused(capsys, *arguments):
    """The one sentence with which pretrain.main ends on bad input."""
    with pytest.raises(SystemExit) as end:
        pretrain.main([*SMALL, *map(str, arguments)])
    message = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert end.value.code not in (0, None) and "\n" not in message
    assert message.startswith("pretrain.py: ") or ".py: error: " in message                 # argparse's own
    return message


def test_other_flags_are_refused_until_overwrite(finished, data, tmp_path, capsys):
    out, _ = finished
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    message = refused(capsys, "--probe-every", 1, "--data", data, "--out", out, "--temperature", 0.2, "--seed", 5)
    assert "--seed (0 there, 5 here), --temperature (0.07 there, 0.2 here)" in message
    assert "--out" in message and "--overwrite" in message
    message = refused(capsys, "--probe-every", 1, "--data", data, "--out", out, "--resume", tmp_path / "other.pt")
    assert "has a last.pt of its own" in message
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_overwrite_begins_anew_and_max_steps_goes_on(data, tmp_path, capsys):
    def steps(*arguments):
        pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), *arguments])
        return sorted(scalars(tmp_path / "run", "loss"))

    assert steps("--max-steps", "1") == [1]
    assert steps("--max-steps", "2") == [1, 2] and "going on from" in capsys.readouterr().out
    assert steps("--max-steps", "1", "--seed", "1", "--overwrite") == [1]


def test_wrong_input_gets_one_sentence(data, folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert "nowhere is not a data folder" in refused(capsys, "--data", tmp_path / "nowhere", "--out", out)
    assert "larger than" in refused(capsys, "--data", data, "--out", out, "--batch-size", 64)
    assert "unrecognized arguments: --batchsize 8" in refused(capsys, "--batchsize", 8)
    for flag, value in [("--epochs", 0), ("--temperature", -1), ("--temperature", "nan"), ("--flip", 2),
                        ("--brightness", 1), ("--warmup-epochs", 3), ("--crop-area", "0.9 0.2"), ("--blur", "0 1")]:
        assert flag in refused(capsys, flag, *str(value).split())
    (folder / "manifest.csv").write_text("")
    assert "manifest.csv is empty" in refused(capsys, "--data", folder, "--out", out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("precious")
    assert "holds no run" in refused(capsys, "--data", data, "--out", tmp_path / "notes", "--overwrite")
    (tmp_path / "notes/config.json").write_text('{"stage": "finetune"}')
    assert "something else than a run of pretrain.py" in refused(capsys, "--data", data, "--out", tmp_path / "notes")
    assert not out.exists() and (tmp_path / "notes/mine.txt").read_text() == "precious"


def test_default_data_folder_points_to_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys)
    assert "prepare.py nih" in message and "pretrain.py --demo" in message and not list(tmp_path.iterdir())


def test_image_deleted_after_preparation_is_named(folder, tmp_path, capsys):
    (folder / "images/001_1.jpg").unlink()
    assert "images/001_1.jpg is missing on disk" in refused(capsys, "--data", folder, "--out", tmp_path / "run")
    (folder / "images/001_1.jpg").write_bytes(b"not a jpeg")
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run", "--batch-size", 4)
    assert "images/001_1.jpg (row 6 of manifest.csv) cannot be read" in message


def test_unusable_checkpoints_are_refused_and_stay(finished, data, tmp_path, capsys):
    out, _ = finished
    last = (out / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(last[:-1000])
    arguments = ["--data", data, "--out", tmp_path / "run", "--resume"]
    assert "cut.pt is not a whole checkpoint" in refused(capsys, *arguments, tmp_path / "cut.pt")
    assert "none.pt does not exist" in refused(capsys, *arguments, tmp_path / "none.pt")
    assert "encoder.pt is no last.pt" in refused(capsys, *arguments, out / "encoder.pt")
    assert "holds a resnet18, not a resnet34" in refused(capsys, *arguments, out / "last.pt", "--arch", "resnet34")
    assert "does not fit these flags" in refused(capsys, *arguments, out / "last.pt", "--proj-dim", 64)
    torch.save(load_checkpoint(out / "encoder.pt")["encoder"], tmp_path / "plain.pt")
    assert "plain.pt does not fit a resnet34" in refused(capsys, *arguments[:-1], "--arch", "resnet34", "--init",
                                                         tmp_path / "plain.pt")
    assert (out / "last.pt").read_bytes() == last


def test_two_processes_in_one_run_folder_are_refused(data, tmp_path, capsys):
    command = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run")]
    process = start("pretrain.py", *command, "--epochs", "200")
    for line in process.stdout:
        if "| loss" in line:
            break
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    message = refused(capsys, *command[len(SMALL):], "--epochs", "200")
    process.kill()
    drain.join()
    assert "another process is at work in" in message


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, capsys):
    arguments = ["--data", data, "--out", tmp_path / "run", "--optimizer", "adam", "--save-every", 1]
    pretrain.main([*SMALL, *map(str, arguments), "--max-steps", "2"])
    state = load_checkpoint(tmp_path / "run/last.pt")
    state["model"]["projector.0.weight"][0] = math.inf                   # as a diverging step would leave it
    save_checkpoint(tmp_path / "run/last.pt", state)
    before = (tmp_path / "run/last.pt").read_bytes()
    message = refused(capsys, *arguments)
    assert "the loss is not finite at step 3" in message and "checkpoint stays" in message
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_synthetic_needs_no_files(tmp_path, capsys):
    pretrain.main([*SMALL, "--synthetic", "--out", str(tmp_path / "run"), "--max-steps", "2"])
    assert sorted(scalars(tmp_path / "run", "loss")) == [1, 2] and "of noise at 32 px" in capsys.readouterr().out


def test_schedule():
    lr = [learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == lr[10] == 2.0 and lr[55] == pytest.approx(1.0)
    assert lr[:10] == sorted(lr[:10]) and lr[10:] == sorted(lr[10:], reverse=True) and 0 < lr[99] < 0.002


def test_lars_steps():
    """Two steps of You et al. 2017 by hand: a matrix adapts and decays, a vector does neither."""
    w, b = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([{"params": [w], "weight_decay": 0.1}, {"params": [b]}], lr=0.5)
    expected_w, expected_b, velocity_w, velocity_b = w.detach().clone(), b.detach().clone(), 0, 0
    for _ in range(2):
        w.grad, b.grad = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5])
        optimizer.step()
        g = w.grad + 0.1 * expected_w
        velocity_w = 0.9 * velocity_w + 0.001 * expected_w.norm() / g.norm() * g
        velocity_b = 0.9 * velocity_b + b.grad
        expected_w, expected_b = expected_w - 0.5 * velocity_w, expected_b - 0.5 * velocity_b
        assert torch.allclose(w, expected_w) and torch.allclose(b, expected_b)


def test_knn_auroc_against_a_direct_computation():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(60, 8)), rng.normal(size=(30, 8))
    bank_labels = rng.choice([1, 0, -1, np.nan], (60, 3), p=[0.3, 0.4, 0.1, 0.2])
    query_labels = rng.choice([1, 0, -1, np.nan], (30, 3), p=[0.3, 0.4, 0.1, 0.2])
    query_labels[:, 2] = 0                                                                  # one class only
    got = knn_auroc(torch.tensor(bank), bank_labels, torch.tensor(queries), query_labels, k=7)
    for label in range(2):
        scores = []
        for q in queries:
            cosine = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
            near = [i for i in np.argsort(-cosine)[:7] if bank_labels[i, label] != -1]
            weight = np.exp(cosine[near] / 0.07)
            scores.append((weight * (bank_labels[near, label] == 1)).sum() / weight.sum())
        known = query_labels[:, label] != -1
        assert got[label] == pytest.approx(roc_auc_score(query_labels[known, label] == 1, np.array(scores)[known]))
    assert math.isnan(got[2])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_gpu_steps_are_finite(data, tmp_path, precision):
    pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "3",
                   "--precision", precision])
    assert all(math.isfinite(x) for x in scalars(tmp_path / "run", "loss").values())
