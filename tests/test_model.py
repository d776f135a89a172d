"""Encoders, the folded ImageNet stem, and checkpoints that are whole or refused."""
import numpy as np
import pytest
import torch
import torchvision

import model
from dali_pipeline import Preprocessing, eval_loader, read_manifest
from model import (
    CheckpointError, SimCLR, build_encoder, cached_features, extract_features, load_checkpoint, save_checkpoint)


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
    rgb_input = (x.expand(-1, 3, -1, -1) - model.IMAGENET_MEAN.view(3, 1, 1)) / model.IMAGENET_STD.view(3, 1, 1)
    gray_input = (x - model.MEAN) / model.STD
    with torch.no_grad():
        theirs, ours = rgb.bn1(rgb.conv1(rgb_input)), gray.bn1(gray.conv1(gray_input))
        inside = (..., slice(2, -2), slice(2, -2))                      # the padding reaches two outputs into the image
        assert torch.allclose(ours[inside], theirs[inside], atol=1e-5)
        rgb.fc = torch.nn.Identity()
        theirs, ours = rgb(rgb_input), gray(gray_input)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()                # the border, felt through the whole network
    assert (ours - theirs).norm() < 0.1 * (ours - ours.flip(0)).norm()  # and small beside what tells images apart


def test_projection_head():
    net = SimCLR(build_encoder("resnet18"), proj_layers=3, proj_width=96, proj_dim=32)
    assert [m.out_features for m in net.projector if isinstance(m, torch.nn.Linear)] == [96, 96, 32]
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 32)
    default = SimCLR(build_encoder("resnet50")).projector
    assert [(m.in_features, m.out_features) for m in default if isinstance(m, torch.nn.Linear)] == [(2048, 2048),
                                                                                                    (2048, 128)]


def test_encoder_file_round_trip(tmp_path):
    encoder = build_encoder("resnet18")
    save_checkpoint(tmp_path / "encoder.pt", {"format": model.FORMAT, "arch": "resnet18", "config": {},
                                              "encoder": encoder.state_dict()})
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
    elif damage == "pickle":                                            # would run code if it were unpickled freely
        torch.save({"step": pytest.approx(3)}, path)
    elif damage == "list":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="last.pt"):
        load_checkpoint(path)


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": 2, "what": lambda: None})
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_features_are_kept_for_the_same_weights_and_images(data, tmp_path):
    manifest, encoder = read_manifest(data), build_encoder("resnet18")

    def features(image_size=32, first=0):
        loader = eval_loader(manifest, np.arange(first, first + 10), 4, Preprocessing(image_size), "cpu")
        return cached_features(encoder, loader, 10, tmp_path)

    expected = features()
    kept, = tmp_path.iterdir()
    when = kept.stat().st_mtime_ns
    assert torch.equal(features(), expected) and [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [when]
    features(image_size=48)
    features(first=1)
    encoder.conv1.weight.data.neg_()
    features()
    assert len(list(tmp_path.iterdir())) == 4
    kept.write_bytes(b"cut short")
    encoder.conv1.weight.data.neg_()
    assert torch.equal(features(), expected) and len(list(tmp_path.iterdir())) == 4


def test_features_of_shards_add_up_to_those_of_the_whole():
    torch.manual_seed(0)
    encoder, images = build_encoder("resnet18"), torch.randn(7, 1, 32, 32)

    def loader(rank, world_size):
        mine = images[rank::world_size]
        batches = [(mine[i:i + 2], None) for i in range(0, len(mine), 2)]
        return type("Batches", (), {"device": torch.device("cpu"), "__iter__": lambda self: iter(batches)})()

    whole = extract_features(encoder, loader(0, 1), 7)
    assert encoder.training and whole.shape == (7, 512)
    encoder.eval()
    with torch.no_grad():
        assert torch.allclose(whole, encoder(images), atol=1e-5)
