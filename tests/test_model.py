"""Encoders, the folded ImageNet stem, kept features, and checkpoints that are whole or refused."""
import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import checkpoint
import model
import probe
from checkpoint import FORMAT, CheckpointError, load_checkpoint, save_checkpoint
from dali_pipeline import Preprocessing, eval_loader
from manifest import read_manifest
from model import SimCLR, build_encoder
from probe import cached_features, extract_features


def rgb_network(arch="resnet18"):
    """torchvision's own network with batch norm statistics that are not the trivial ones."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, arch)().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize("arch, width", [("resnet18", 512), ("resnet50", 2048)])
def test_encoder_is_torchvisions_own_with_one_channel(arch, width):
    encoder = build_encoder(arch)
    assert encoder(torch.randn(2, 1, 64, 64)).shape == (2, width) and encoder.num_features == width
    theirs = getattr(torchvision.models, arch)()
    theirs.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(encoder.state_dict(), strict=True)


def test_folded_stem_sees_what_the_rgb_network_sees(tmp_path):
    rgb = rgb_network()
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    gray = build_encoder("resnet18", str(tmp_path / "rgb.pth")).eval()
    x = torch.rand(2, 1, 96, 96)
    mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in (
        checkpoint.IMAGENET_MEAN, checkpoint.IMAGENET_STD))
    rgb_input = (x.expand(-1, 3, -1, -1) - mean) / std
    gray_input = (x - model.MEAN) / model.STD
    with torch.no_grad():
        theirs, ours = rgb.bn1(rgb.conv1(rgb_input)), gray.bn1(gray.conv1(gray_input))
        inside = (..., slice(2, -2), slice(2, -2))  # the padding reaches two outputs into the image
        assert torch.allclose(ours[inside], theirs[inside], atol=1e-5)
        rgb.fc = torch.nn.Identity()
        theirs, ours = rgb(rgb_input), gray(gray_input)
    # The border, felt through the whole network
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    # And small beside what tells images apart
    assert (ours - theirs).norm() < 0.1 * (ours - ours.flip(0)).norm()


def test_projection_head():
    net = SimCLR(build_encoder("resnet18"), proj_layers=3, proj_width=96, proj_dim=32)
    assert [m.out_features for m in net.projector if isinstance(m, torch.nn.Linear)] == [96, 96, 32]
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 32)
    default = SimCLR(build_encoder("resnet50")).projector
    linear = [m for m in default if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(2048, 2048), (2048, 128)]


def test_encoder_file_round_trip(tmp_path):
    encoder = build_encoder("resnet18")
    save_checkpoint(tmp_path / "encoder.pt", {
        "format": FORMAT, "arch": "resnet18", "encoder": encoder.state_dict(),
        "config": {"image_size": 224, "normalize": "fixed", "clahe": False}})
    again = build_encoder("resnet18", str(tmp_path / "encoder.pt"))
    for key, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    with pytest.raises(CheckpointError, match="encoder.pt holds a resnet18, not a resnet50"):
        build_encoder("resnet50", str(tmp_path / "encoder.pt"))


def test_plain_state_dict_of_another_architecture_is_refused(tmp_path):
    torch.save(rgb_network("resnet34").state_dict(), tmp_path / "r34.pth")
    with pytest.raises(CheckpointError, match="r34.pth does not fit a resnet18"):
        build_encoder("resnet18", str(tmp_path / "r34.pth"))


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "missing", "pickle", "list"])
def test_broken_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 3, "model": {"w": torch.zeros(1000)}})
    assert load_checkpoint(path)["step"] == 3
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "missing":
        path.unlink()
    elif damage == "pickle":  # would run code if it were unpickled freely
        torch.save({"step": pytest.approx(3)}, path)
    elif damage == "list":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="last.pt"):
        load_checkpoint(path)


class Harm:
    """What runs a function where it is unpickled freely."""
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrap, words", [
    (lambda state: {"model": state, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
    (lambda state: {key: value.numpy() for key, value in state.items()}, "numpy"),
    (lambda state: {"epoch": np.float64(3), "best": Path("x"), "net": {"e": state}}, "numpy|path"),
    (lambda state: {"state_dict": state, "when": datetime.timedelta(1)}, "datetime.timedelta")])
def test_weights_beside_other_objects_can_be_saved_alone(tmp_path, wrap, words):
    """The command in the message does what the message says."""
    path, state = tmp_path / "it's $1.pt", rgb_network().state_dict()
    torch.save(wrap(state), path)
    with pytest.raises(CheckpointError, match=rf"holds Python objects .*\(.*({words})") as error:
        load_checkpoint(path)
    command = str(error.value).partition("python -c ")[2]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True, cwd=tmp_path)
    alone = build_encoder("resnet18", str(tmp_path / "it's $1-weights.pt"))
    assert torch.equal(alone.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


@pytest.mark.parametrize("content, words", [
    (b"\n<html>log in", "a page of HTML"), (b"version https://git-lfs.x/v1", "git lfs"),
    (b"\x1f\x8b\x08", "packed by gzip"), (b"\x93NUMPY\1\0", "an array of NumPy"),
    (b"", "empty"), (None, "a folder")])
def test_files_that_are_no_checkpoints_are_called_what_they_are(tmp_path, content, words):
    path = tmp_path / "x.pt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.pt is .*{words}"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_is_told_from_damage(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt is a TorchScript program: save the weights"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("function, words", [
    (os.system, "touch {}"), (eval, "open({!r}, 'w')"), (os.mkdir, "{}"),
    (subprocess.check_output, "touch {}")])
def test_code_in_a_checkpoint_does_not_run_and_is_not_advised(tmp_path, function, words):
    harm = Harm(function, words.format(str(tmp_path / "ran")))
    torch.save({"conv1.weight": harm}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"it would run .*{function.__name__}") as error:
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists() and "python -c" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_quantised_weights_are_refused(tmp_path, dtype, all_of_it):
    state = rgb_network().state_dict()
    for key in state if all_of_it else ["layer2.0.conv1.weight"]:
        state[key] = state[key].to(dtype) if state[key].is_floating_point() else state[key]
    torch.save(state, tmp_path / "q.pt")
    with pytest.raises(CheckpointError, match=rf"quantised: .*conv1.weight \({dtype}\)"):
        build_encoder("resnet18", str(tmp_path / "q.pt"))


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="local object"):
        save_checkpoint(path, {"step": 2, "what": lambda: None})
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_features_are_kept_for_the_same_weights_and_images(data, tmp_path):
    manifest, encoder = read_manifest(data), build_encoder("resnet18")

    def features(image_size=32, first=0):
        images = np.arange(first, first + 10)
        loader = eval_loader(manifest, images, 4, Preprocessing(image_size), "cpu")
        return cached_features(encoder, 512, loader, tmp_path)

    expected = features()
    kept, = tmp_path.iterdir()
    when = kept.stat().st_mtime_ns
    written = kept.read_bytes()
    os.utime(kept, ns=(when - 10**9, when - 10**9))
    assert torch.equal(features(), expected) and list(tmp_path.iterdir()) == [kept]
    # Read and not written again: the bytes are the same, and the time is that of the last use.
    assert kept.read_bytes() == written and kept.stat().st_mtime_ns > when - 10**9
    features(image_size=48)
    features(first=1)
    encoder.conv1.weight.data.neg_()
    features()
    assert len(list(tmp_path.iterdir())) == 4
    kept.write_bytes(b"cut short")
    encoder.conv1.weight.data.neg_()
    assert torch.equal(features(), expected) and len(list(tmp_path.iterdir())) == 4


def test_kept_features_are_bounded_and_the_oldest_go_first(data, tmp_path, monkeypatch):
    manifest, encoder = read_manifest(data), build_encoder("resnet18")

    def keep(first):
        loader = eval_loader(manifest, np.arange(first, first + 10), 4, Preprocessing(32), "cpu")
        cached_features(encoder, 512, loader, tmp_path)
        return set(tmp_path.iterdir())

    first, = keep(0)
    second, = keep(1) - {first}
    monkeypatch.setattr(probe, "KEPT_FEATURES", int(2.5 * first.stat().st_size))
    for file, seconds in ((first, 100), (second, 50)):          # that long ago
        os.utime(file, ns=(file.stat().st_mtime_ns - seconds * 10**9,) * 2)
    keep(0)                                                     # read: the second is the oldest now
    third, = keep(2) - {first, second}
    assert set(tmp_path.iterdir()) == {first, third}


def test_features_are_the_networks_outputs_in_order(data):
    torch.manual_seed(0)
    encoder, manifest = build_encoder("resnet18"), read_manifest(data)
    loader = eval_loader(manifest, np.arange(7), 2, Preprocessing(32), "cpu")
    features = extract_features(encoder, 512, loader)
    assert encoder.training and features.shape == (7, 512)
    encoder.eval()
    with torch.no_grad():
        images = torch.cat([x for x, _ in loader])
        assert torch.allclose(features, encoder(images), atol=1e-5)


def test_each_process_fills_its_rows(data, monkeypatch):
    """What two processes fill adds up to the whole: here their sum is taken by hand."""
    encoder, manifest = build_encoder("resnet18"), read_manifest(data)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda features: None)
    parts = [extract_features(encoder, 512, eval_loader(
        manifest, np.arange(7), 2, Preprocessing(32), "cpu", rank, world_size))
        for rank, world_size in ((0, 1), (0, 2), (1, 2))]
    assert (parts[1][1::2] == 0).all() and (parts[2][0::2] == 0).all()
    assert torch.allclose(parts[0], parts[1] + parts[2], atol=1e-5)
