"""The training script as a user meets it: runs, curves, interruption at any moment, wrong input."""
import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, write_folder
from sklearn.metrics import roc_auc_score

import prepare
import pretrain
from checkpoint import load_checkpoint, save_checkpoint
from flags import parse
from lars import LARS, warmup_and_cosine
from probe import knn_auroc
from run import Compute

LONG = pytest.mark.long     # what test_faults.py tries as well, at other moments


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 15 steps that nobody interrupted, with probes."""
    out, output = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with contextlib.redirect_stdout(output):
        pretrain.main([*SMALL, "--probe-every", "1", "--data", str(data), "--out", str(out)])
    return out, output.getvalue()


def scalars(out, name):
    lines = map(json.loads, open(out / "log.jsonl"))
    return {line["step"]: line[name] for line in lines if name in line}


def test_run_folder(finished):
    out, output = finished
    names = sorted(p.name.split(".")[0] for p in out.iterdir())
    assert names == ["config", "encoder", "events", "last", "log"]
    assert sorted(scalars(out, "loss")) == list(range(1, 16))
    # 42 images, 8 a step: epochs of 5.25 steps
    assert sorted(scalars(out, "probe/auroc")) == [0, 5, 10, 15]
    assert re.search(r"epoch 002 step 00015/15 \| loss \d\.\d{4} \(chance 2\.\d\d\) \| lr ", output)
    assert scalars(out, "lr")[1] == pytest.approx(0.3 * 8 / 256 / 6)
    assert scalars(out, "lr")[15] < 0.3 * 8 / 256 / 10


def test_encoder_loads_into_torchvision_strictly(data, tmp_path):
    pretrain.main([*SMALL, "--arch", "resnet50", "--data", str(data), "--out", str(tmp_path),
                   "--max-steps", "1"])
    checkpoint = load_checkpoint(tmp_path / "encoder.pt")
    net = torchvision.models.resnet50()
    net.conv1, net.fc = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False), torch.nn.Identity()
    net.load_state_dict(checkpoint["encoder"], strict=True)
    assert checkpoint["arch"] == "resnet50" and checkpoint["config"]["image_size"] == 32
    assert {"normalize", "clahe", "mean", "std", "data"} <= checkpoint["config"].keys()


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=LONG),
                                 pytest.param(signal.SIGINT, marks=LONG)])
def test_killed_at_any_step_and_started_again_ends_the_same(finished, data, tmp_path, how,
                                                            start_forked, capsys):
    whole, _ = finished
    command = [*SMALL, "--probe-every", "1", "--data", str(data), "--out", str(tmp_path / "run")]
    victim, at = random.Random(how).randint(4, 13), None
    process = start_forked("pretrain.py", *command)
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
    pretrain.main(command)
    assert "going on from" in capsys.readouterr().out
    ends = [load_checkpoint(folder / "last.pt") for folder in (whole, tmp_path / "run")]
    assert ends[0]["model"].keys() == ends[1]["model"].keys()
    assert all(torch.equal(value, ends[1]["model"][key]) for key, value in ends[0]["model"].items())
    buffers = [[s["momentum_buffer"] for s in end["optimizer"]["state"].values()] for end in ends]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    for name in ("loss", "top1", "lr", "probe/auroc"):
        assert scalars(whole, name) == scalars(tmp_path / "run", name)
    encoder = load_checkpoint(tmp_path / "run/encoder.pt")["encoder"]
    assert all(torch.equal(value, ends[0]["model"][f"encoder.{key}"])
               for key, value in encoder.items())


def interrupted(command, moment):
    """Ctrl-C once `moment` seconds, or a line that holds it, has passed: (exit code, stderr)."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if isinstance(moment, str):
        for line in process.stdout:
            if moment in line:
                break
    else:
        time.sleep(moment)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize("moment", [
    1.5, "learning rate", "step 00010/",
    *(pytest.param(seconds, marks=LONG) for seconds in (0.5, 2.5, 3.5, 5.0))])
def test_control_c_at_any_moment_is_one_sentence(data, tmp_path, moment):
    """While PyTorch loads, while the run is set up, while it probes, while it trains."""
    command = ["pretrain.py", *SMALL, "--probe-every", "1", "--data", data, "--epochs", "900",
               "--out", tmp_path / "run"]
    code, error = interrupted(command, moment)
    assert code == 130 and len(error.strip().splitlines()) <= 1 and "Traceback" not in error, error


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
    message = end.value.code
    if not isinstance(message, str):
        message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code not in (0, None) and "\n" not in message
    assert message.startswith("pretrain.py: ") or ".py: error: " in message  # argparse's own
    return message


def test_other_flags_are_refused_until_overwrite(finished, data, tmp_path, capsys):
    out, _ = finished
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    message = refused(capsys, "--probe-every", 1, "--data", data, "--out", out,
                      "--temperature", 0.2, "--seed", 5)
    assert "--seed (0 there, 5 here), --temperature (0.1 there, 0.2 here)" in message
    assert "--out" in message and "--overwrite" in message
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_copied_checkpoint_starts_a_run_with_other_flags(finished, data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(finished[0] / "last.pt", tmp_path / "run")
    flags = ["--data", str(data), "--out", str(tmp_path / "run"), "--epochs", "4", "--lr", "0.1"]
    pretrain.main([*SMALL, *flags])
    output = capsys.readouterr().out
    assert "last.pt, step 15" in output and f"resnet18 from {tmp_path}/run/last.pt" in output
    assert sorted(scalars(tmp_path / "run", "loss")) == list(range(16, 22))
    pretrain.main([*SMALL, *flags])
    assert "is complete: step 21 of 21" in capsys.readouterr().out
    message = refused(capsys, *flags, "--lr", 0.2)  # now it is a run like others
    assert "--lr (0.1 there, 0.2 here)" in message


def test_run_of_a_version_with_fewer_flags_goes_on_with_their_defaults(finished, data, tmp_path,
                                                                       capsys):
    out = shutil.copytree(finished[0], tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    del config["gamma"], config["balance"]
    (out / "config.json").write_text(json.dumps(config))
    flags = [*SMALL, "--probe-every", "1", "--data", str(data), "--out", str(out)]
    pretrain.main(flags)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--gamma \(1.0 1.0 there, 0.5 1.0 here\)"):
        pretrain.main([*flags, "--gamma", "0.5", "1"])


def test_run_goes_on_without_its_first_weights_and_in_another_precision(finished, data, tmp_path):
    shutil.copy(finished[0] / "encoder.pt", tmp_path / "first.pt")
    flags = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run"),
             "--init", str(tmp_path / "first.pt"), "--save-every", "1"]
    pretrain.main([*flags, "--max-steps", "1"])
    (tmp_path / "first.pt").unlink()
    pretrain.main([*flags, "--max-steps", "2", "--precision", "bf16"])
    assert sorted(scalars(tmp_path / "run", "loss")) == [1, 2]
    state = load_checkpoint(tmp_path / "run/last.pt")
    compute = Compute(0, 1, torch.device("cpu"), "fp16", 1)             # no CPU trains in it
    training = pretrain.build(parse(pretrain.Config, flags), compute)
    training.images_digest = state["images"]
    training.load()
    assert training.scaler.is_enabled() and training.step == 2


def test_stop_before_a_probe_leaves_it_to_the_run_that_goes_on(finished, data, tmp_path,
                                                               start_forked):
    """A signal that comes while step 5 is taken, after which the features are probed."""
    whole, _ = finished
    command = [*SMALL, "--probe-every", "1", "--data", str(data), "--out", str(tmp_path / "run")]
    process = start_forked("pretrain.py", *command)
    for line in process.stdout:
        if "step 00004/15 | loss" in line:
            process.send_signal(signal.SIGTERM)
            break
    assert "nothing to save" not in process.stdout.read() and process.wait(60) == 143
    pretrain.main(command)
    assert scalars(whole, "probe/auroc") == scalars(tmp_path / "run", "probe/auroc")


def test_a_probe_that_was_not_saved_stands_once(data, tmp_path):
    """A kill between the probe's line and the checkpoint, as after a signal at that step."""
    command = [*SMALL, "--probe-every", "1", "--data", str(data), "--out", str(tmp_path / "run")]
    pretrain.main([*command, "--max-steps", "5"])
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["probed"] == 5
    save_checkpoint(tmp_path / "run/last.pt", state | {"probed": 0})
    pretrain.main([*command, "--max-steps", "6"])
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert [line["step"] for line in lines if "probe/auroc" in line] == [0, 5]


def test_encoder_is_written_again_or_guarded(data, tmp_path, capsys):
    """A kill between the two files of a checkpoint leaves the older encoder; somebody may delete
    last.pt for space."""
    def again(*arguments):
        pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"),
                       "--max-steps", "1", *arguments])
        return load_checkpoint(tmp_path / "run/encoder.pt")["encoder"]["conv1.weight"]

    first = again()
    (tmp_path / "run/encoder.pt").unlink()
    assert torch.equal(again(), first) and "has reached --max-steps" in capsys.readouterr().out
    (tmp_path / "run/last.pt").unlink()
    settings = (tmp_path / "run/config.json").read_bytes()
    message = refused(capsys, "--data", data, "--out", tmp_path / "run", "--seed", 3)
    assert "holds an encoder.pt and no last.pt" in message
    assert (tmp_path / "run/config.json").read_bytes() == settings
    assert not torch.equal(again("--seed", "3", "--overwrite"), first)


def test_overwrite_deletes_nothing_that_init_names(data, tmp_path, capsys):
    command = ["--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    pretrain.main([*SMALL, *command])
    encoder = tmp_path / "run/encoder.pt"
    message = refused(capsys, *command, "--overwrite", "--init", encoder)
    assert f"--overwrite would delete {encoder}, which --init names" in message
    assert encoder.exists() and (tmp_path / "run/last.pt").exists()


def test_pieces_of_a_batch_are_equal_where_they_can_be(data, tmp_path, monkeypatch):
    """Batch norm sees a piece: of nine images four, four and one would be poor."""
    views, forward = [], pretrain.SimCLR.forward
    monkeypatch.setattr(pretrain.SimCLR, "forward",
                        lambda net, x: views.append(len(x)) or forward(net, x))
    pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path), "--batch-size", "9",
                   "--micro-batch", "4", "--max-steps", "1"])
    assert views == [6] * 6     # three pieces of three images' views, each encoded twice


def test_a_piece_holds_both_views_of_its_images():
    """Live batch norm sees the two views together, as in a whole batch. The gradient is that of
    the same pieces with a graph over all of them, and each image is counted once."""
    torch.manual_seed(0)
    net = pretrain.SimCLR(pretrain.build_encoder("resnet18")).double()
    reference = copy.deepcopy(net)
    view1, view2 = torch.randn(2, 6, 1, 32, 32, dtype=torch.double)
    loss_of = functools.partial(pretrain.nt_xent, temperature=0.1)
    pieces = [reference(torch.cat([view1[i:i + 3], view2[i:i + 3]])).chunk(2) for i in (0, 3)]
    loss_of(*map(torch.cat, zip(*pieces))).backward()
    pretrain.backward_in_pieces(
        net, view1, view2, 3, loss_of, torch.amp.GradScaler(enabled=False),
        Compute(0, 1, torch.device("cpu"), "fp32", 1))
    for ours, theirs in zip(net.parameters(), reference.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(net.buffers(), reference.buffers()):
        torch.testing.assert_close(ours, theirs)


def test_full_disk_while_saving_is_told_and_leaves_the_old_checkpoint(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    small_disk = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", tmp_path / "run"]
    if os.geteuid() or subprocess.call(small_disk):
        pytest.skip("only root can mount a small disk")
    try:
        pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"),
                       "--max-steps", "1"])
        before = (tmp_path / "run/last.pt").read_bytes()
        message = refused(capsys, "--data", data, "--out", tmp_path / "run", "--max-steps", "2")
        assert "No space left on device" in message
        assert (tmp_path / "run/last.pt").read_bytes() == before
        assert not list((tmp_path / "run").glob("*.tmp"))
    finally:
        subprocess.call(["umount", "-l", tmp_path / "run"])


def test_diverging_run_stops_before_the_probe(data, tmp_path, capsys):
    message = refused(capsys, "--data", data, "--out", tmp_path / "run", "--optimizer", "adam",
                      "--lr", "1e18", "--warmup-epochs", 0, "--log-every", 100,
                      "--save-every", 100, "--probe-every", 1)
    assert "not finite after step" in message and not (tmp_path / "run/last.pt").exists()


def test_overwrite_begins_anew_and_max_steps_goes_on(data, tmp_path, capsys):
    def steps(*arguments):
        pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), *arguments])
        return sorted(scalars(tmp_path / "run", "loss"))

    assert steps("--max-steps", "1") == [1]
    assert steps("--max-steps", "2") == [1, 2] and "going on from" in capsys.readouterr().out
    assert steps("--max-steps", "1", "--seed", "1", "--overwrite") == [1]


def test_wrong_input_gets_one_sentence(data, folder, tmp_path, capsys):
    out = tmp_path / "run"
    message = refused(capsys, "--data", tmp_path / "nowhere", "--out", out)
    assert "nowhere is not a data folder" in message
    assert "larger than" in refused(capsys, "--data", data, "--out", out, "--batch-size", 64)
    assert "unrecognized arguments: --batchsize 8" in refused(capsys, "--batchsize", 8)
    for flag, value in [("--epochs", 0), ("--temperature", -1), ("--temperature", "nan"),
                        ("--flip", 2), ("--brightness", 1), ("--warmup-epochs", 3),
                        ("--crop-area", "0.9 0.2"), ("--blur", "0 1"), ("--blur", "1 inf"),
                        ("--temperature", "0.2 0.1"), ("--temperature", "0.1 0.2 0.3")]:
        assert flag in refused(capsys, flag, *str(value).split())
    (folder / "manifest.csv").write_text("")
    assert "manifest.csv is empty" in refused(capsys, "--data", folder, "--out", out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("precious")
    flags = ["--data", data, "--out", tmp_path / "notes"]
    assert "holds no run" in refused(capsys, *flags, "--overwrite")
    (tmp_path / "notes/config.json").write_text('{"stage": "finetune"}')
    assert "something else than a run of pretrain.py" in refused(capsys, *flags)
    assert not out.exists() and (tmp_path / "notes/mine.txt").read_text() == "precious"


def test_default_data_folder_points_to_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys)
    assert "prepare.py nih" in message and "pretrain.py --demo" in message
    assert not list(tmp_path.iterdir())


def test_image_deleted_after_preparation_is_named(folder, tmp_path, capsys):
    (folder / "images/001_1.jpg").unlink()
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run")
    assert "images/001_1.jpg is missing on disk" in message
    (folder / "images/001_1.jpg").write_bytes(b"not a jpeg")
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run", "--batch-size", 4)
    assert "images/001_1.jpg (row 6 of manifest.csv) cannot be read" in message


def test_unusable_checkpoints_are_refused_and_stay(finished, data, tmp_path, capsys):
    """A last.pt that was copied into a new run folder is refused before the folder is claimed."""
    out, _ = finished
    last, copy = (out / "last.pt").read_bytes(), tmp_path / "run/last.pt"
    copy.parent.mkdir()
    arguments = ["--data", data, "--out", tmp_path / "run"]
    for content, flags, complaint in [
            (last[:-1000], [], "last.pt is not a whole checkpoint"),
            ((out / "encoder.pt").read_bytes(), [], "last.pt is no last.pt of a pre-training run"),
            (last, ["--arch", "resnet34"], "has --arch resnet18, not resnet34"),
            (last, ["--optimizer", "adam"], "has --optimizer lars, not adam"),
            (last, ["--batch-size", 4], "has --batch-size 8, not 4"),
            (last, ["--proj-dim", 64], "does not fit these flags")]:
        copy.write_bytes(content)
        assert complaint in refused(capsys, *arguments, *flags)
        assert copy.read_bytes() == content and list(copy.parent.iterdir()) == [copy]
    copy.unlink()
    torch.save(load_checkpoint(out / "encoder.pt")["encoder"], tmp_path / "plain.pt")
    message = refused(capsys, *arguments, "--arch", "resnet34", "--init", tmp_path / "plain.pt")
    assert "plain.pt does not fit a resnet34" in message


def test_two_processes_in_one_run_folder_are_refused(data, tmp_path, start_forked, capsys):
    command = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run")]
    process = start_forked("pretrain.py", *command, "--epochs", "200")
    for line in process.stdout:
        if "| loss" in line:
            break
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    message = refused(capsys, *command[len(SMALL):], "--epochs", "200")
    process.send_signal(signal.SIGKILL)
    drain.join()
    assert "another process is at work in" in message


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, capsys):
    arguments = ["--data", data, "--out", tmp_path / "run", "--optimizer", "adam",
                 "--save-every", 1]
    pretrain.main([*SMALL, *map(str, arguments), "--max-steps", "2"])
    state = load_checkpoint(tmp_path / "run/last.pt")
    state["model"]["projector.0.weight"][0] = math.inf  # as a diverging step would leave it
    save_checkpoint(tmp_path / "run/last.pt", state)
    before = (tmp_path / "run/last.pt").read_bytes()
    message = refused(capsys, *arguments)
    assert "the loss is not finite at step 3" in message and "checkpoint stays" in message
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_schedule():
    lr = [warmup_and_cosine(step, 100, 10, 2.0) for step in range(100)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == lr[10] == 2.0 and lr[55] == pytest.approx(1.0)
    assert lr[:10] == sorted(lr[:10]) and lr[10:] == sorted(lr[10:], reverse=True)
    assert 0 < lr[99] < 0.002


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


def test_a_run_in_pieces_goes_on_to_the_bit(data, tmp_path):
    flags = [*SMALL, "--micro-batch", "3", "--data", str(data), "--out"]
    pretrain.main([*flags, str(tmp_path / "whole"), "--max-steps", "4"])
    for steps in ("2", "4"):
        pretrain.main([*flags, str(tmp_path / "parts"), "--max-steps", steps])
    ends = [load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    # Every image was counted once by batch norm: a batch of 8 is three pieces in both views.
    assert ends[0]["encoder.bn1.num_batches_tracked"] == 4 * 3
    assert scalars(tmp_path / "whole", "loss") == scalars(tmp_path / "parts", "loss")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Two steps by the default ways to draw and to view."""
    out = tmp_path_factory.mktemp("plain")
    pretrain.main([*SMALL, "--data", str(data), "--out", str(out), "--max-steps", "2"])
    return out


@pytest.mark.parametrize("flags", [
    "--gamma 0.5 2", "--equalize 0.3", "--gamma 0.5 2 --equalize 0.3 --normalize image --clahe",
    "--balance patient Mass", "--balance Effusion --weigh-loss --decoupled",
    "--positives patient", "--positives patient --balance Mass --gamma 0.5 2 --micro-batch 3"])
def test_each_way_to_draw_and_view_trains(data, plain, tmp_path, flags):
    """Two steps, and the second of them alone goes on from the first to the same end."""
    command = [*SMALL, *flags.split(), "--data", str(data), "--out"]
    pretrain.main([*command, str(tmp_path / "whole"), "--max-steps", "2"])
    for steps in ("1", "2"):
        pretrain.main([*command, str(tmp_path / "parts"), "--max-steps", steps])
    losses = [scalars(tmp_path / name, "loss") for name in ("whole", "parts")]
    assert losses[0] == losses[1] and all(map(math.isfinite, losses[0].values()))
    assert scalars(plain, "loss") != losses[0]                              # the flags do something


@pytest.mark.parametrize("flags, complaint", [
    ("--gamma 2 1", "--gamma 2 1 must rise"), ("--gamma 0 1", "--gamma: 0 does not lie in"),
    ("--equalize 2", "--equalize: 2 does not lie in 0 to 1"),
    ("--weigh-loss", "--weigh-loss needs --balance"),
    ("--positives study", "manifest.csv has no column study"),
    ("--positives patient --same-patient", "--same-patient would count images among"),
    ("--positives person", "--positives: invalid choice: 'person'"),
    ("--balance Lump", "--balance Lump: there is no such label; the choice is patient, Effusion, "
                       "Mass")])
def test_ways_to_draw_and_view_that_make_no_sense(data, tmp_path, capsys, flags, complaint):
    assert complaint in refused(capsys, *flags.split(), "--data", data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, lr", [
    ("", 0.3), ("--optimizer adamw", 5e-4), ("--demo", 2e-3), ("--demo --optimizer lars", 0.3),
    ("--demo --lr 0.1", 0.1)])
def test_learning_rate_is_that_of_the_optimizer(flags, lr):
    assert parse(pretrain.Config, flags.split()).lr == lr


def test_the_values_of_a_flag_that_is_given_twice_add_up():
    """The first ones would be dropped in silence, which of --where or --exclude nobody wants."""
    config = parse(pretrain.Config, ["--balance", "patient", "--balance", "Mass", "Effusion"])
    assert config.balance == ("patient", "Mass", "Effusion")
    # LOW [HIGH] are one setting, of which the last counts, as of a single number.
    config = parse(pretrain.Config, ["--temperature", "0.1", "--temperature", "0.2"])
    assert config.temperature == (0.2,)
    args = prepare.parse_args([
        "folder", "--src", "a", "--out", "b", "--csv", "c", "--exclude", "m", "--exclude", "n", "o",
        "--where", "view=PA", "--where", "y=0,1", "--allow", "masks", "--allow", "odd-classes"])
    assert args.exclude == ["m", "n", "o"] and len(args.where) == 2 and len(args.allow) == 2
    dicom = ["dicom", "--src", "a", "--out", "b"]
    assert prepare.parse_args(dicom).modality == ["CR", "DX"]
    dicom += ["--modality", "none", "--modality", "CR"]
    assert prepare.parse_args(dicom).modality == ["none", "CR"]


def test_adam_goes_on_as_this_machine_computes(data, tmp_path):
    """An older last.pt of a CPU says that Adam was not fused. A run that goes on is."""
    command = [*SMALL, "--optimizer", "adamw", "--data", str(data), "--out", str(tmp_path)]
    pretrain.main([*command, "--max-steps", "1"])
    state = load_checkpoint(tmp_path / "last.pt")
    for group in state["optimizer"]["param_groups"]:
        assert group["fused"]
        group["fused"] = False
    save_checkpoint(tmp_path / "last.pt", state)
    pretrain.main([*command, "--max-steps", "2"])
    groups = load_checkpoint(tmp_path / "last.pt")["optimizer"]["param_groups"]
    assert all(group["fused"] for group in groups)


def test_probe_on_another_folder_counts_labels_with_enough_images(data, tmp_path, capsys):
    """The pre-training's own folder has no labels. Of the other one's val images one has the
    rare finding, which is no part of the mean."""
    plain, other = tmp_path / "plain", write_folder(tmp_path / "other", 80, 1, ("Often", "auroc"))
    shutil.copytree(data, plain)
    lines = (plain / "manifest.csv").read_text().splitlines()
    lines = [",".join(line.split(",")[:3]) for line in lines]
    (plain / "manifest.csv").write_text("\n".join(lines) + "\n")
    rows, finding = [], 0
    for line in (other / "manifest.csv").read_text().splitlines()[1:]:
        path, patient, split, *_ = line.split(",")
        place = "val" if len(rows) % 3 else "train"
        rows.append(f"{path},{patient},{place},{len(rows) % 2},{int(finding == 1)}")
        finding += place == "val"
    (other / "manifest.csv").write_text("\n".join(["path,patient,split,Often,auroc", *rows]) + "\n")
    flags = ["--data", str(plain), "--probe-data", str(other), "--out", str(tmp_path / "run")]
    pretrain.main([*SMALL, *flags, "--probe-every", "1", "--max-steps", "2"])
    assert "mean AUROC of 1 of 2 labels; the others have fewer than 10" in capsys.readouterr().out
    # A label of the mean's own name does not take its place.
    often, mean = (scalars(tmp_path / "run", f"probe/{name}")[0] for name in ("Often", "auroc"))
    assert often == mean
    assert "--probe-data" in refused(capsys, "--data", data, "--probe-data", plain,
                                     "--probe-every", "1", "--out", tmp_path / "new")


def test_lars_behind_a_scaler_skips_what_overflowed():
    """The scaled steps are those without a scaler; one with an infinite gradient changes nothing,
    and halves the scale."""
    torch.manual_seed(0)
    plain = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    scaled = [p.detach().clone().requires_grad_() for p in plain]
    optimizers = [LARS([{"params": p, "weight_decay": 0.1}], lr=0.5) for p in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for spoiled in (None, None, torch.inf, None, torch.nan, None):
        for p, q in zip(plain, scaled):
            p.grad = torch.randn_like(p)
            q.grad = p.grad * scaler.scale(torch.tensor(1.0))
        before = [q.clone() for q in scaled]
        if spoiled:
            scaled[1].grad[2] = spoiled
        scaler.step(optimizers[1])
        scale = scaler.get_scale()
        scaler.update()
        if spoiled:
            assert all(map(torch.equal, before, scaled)) and scaler.get_scale() == scale / 2
        else:
            optimizers[0].step()
        for p, q in zip(plain, scaled):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def test_knn_auroc_against_a_direct_computation():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(60, 8)), rng.normal(size=(30, 8))
    bank_labels = rng.choice([1, 0, -1, np.nan], (60, 3), p=[0.3, 0.4, 0.1, 0.2])
    query_labels = rng.choice([1, 0, -1, np.nan], (30, 3), p=[0.3, 0.4, 0.1, 0.2])
    query_labels[:, 2] = 0  # one class only
    got = knn_auroc(torch.tensor(bank), bank_labels, torch.tensor(queries), query_labels, k=7)
    for label in range(2):
        scores = []
        for q in queries:
            cosine = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
            near = [i for i in np.argsort(-cosine)[:7] if bank_labels[i, label] != -1]
            weight = np.exp(cosine[near] / 0.07)
            scores.append((weight * (bank_labels[near, label] == 1)).sum() / weight.sum())
        known = query_labels[:, label] != -1
        expected = roc_auc_score(query_labels[known, label] == 1, np.array(scores)[known])
        assert got[label] == pytest.approx(expected)
    assert math.isnan(got[2])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_gpu_steps_are_finite(data, tmp_path, precision):
    pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "3",
                   "--precision", precision])
    assert all(math.isfinite(x) for x in scalars(tmp_path / "run", "loss").values())
