"""The networks: encoder, projection head, classifier, and the features of a data folder.

The encoder is torchvision's ResNet with a one-channel stem and without `fc`, so that
its state dict loads into torchvision's own model. Its input is a normalised radiograph,
(B, 1, S, S); its output the pooled features, (B, D).
"""
import contextlib
import hashlib
import os
import platform
import urllib.error
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from checkpoint import (
    MALFORMED, CheckpointError, find_encoder, first_three, load_checkpoint, save_checkpoint)

if TYPE_CHECKING:
    from dali_pipeline import Loader

MEAN, STD = 0.5, 0.25               # the input is (gray level - MEAN) / STD, gray levels in [0, 1]
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FORMAT = "simclr-cxr encoder, version 1"
KEPT_FEATURES = 8 * 2**30           # bytes; NIH's 112,120 images of ResNet-50 take 0.9 GB

# What a classifier.pt holds, and what its config says of the preprocessing.
CLASSIFIER = {"arch", "encoder", "config", "classifier", "labels", "kind", "thresholds"}
PREPROCESSING = {"image_size", "normalize", "clahe"}


# --------------------------------------------------------------------------------------------------
# Encoder.

def build_encoder(arch: str, init: str = "random",
                  say: Callable = lambda text: None) -> torchvision.models.ResNet:
    """A ResNet (B, 1, S, S) -> (B, D), its width D in `encoder.num_features`.

    init: `random`; `imagenet`, torchvision's weights folded by `fold_rgb_stem`; or the
    path of an encoder.pt or of another tool's checkpoint of a ResNet, see `find_encoder`, with
    one channel or three. say: is told what of such a file was taken.
    CheckpointError where the weights cannot be had or do not fit."""
    if arch not in ARCHITECTURES:
        raise CheckpointError(f"{init}: {arch!r} is none of {', '.join(ARCHITECTURES)}")
    encoder = getattr(torchvision.models, arch)()
    stem = encoder.conv1
    encoder.conv1 = nn.Conv2d(
        1, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.num_features, encoder.fc = encoder.fc.in_features, nn.Identity()
    if init == "random":
        return encoder

    state = _imagenet_state(arch) if init == "imagenet" else _encoder_state(init, arch, say)
    try:
        if reason := _mismatch(encoder.state_dict(), state):
            raise RuntimeError(reason)
        if state["conv1.weight"].shape[1] == 3:
            state = fold_rgb_stem(state)
        encoder.load_state_dict(state)
        if not all(value.isfinite().all() for value in state.values()):
            raise RuntimeError("some of its weights are not finite")
    except MALFORMED as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{init} does not fit a {arch} with a one-channel stem: {reason}") from None
    return encoder


def _mismatch(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Which keys are missing, unexpected or of another shape, or nothing. The stem may have
    three channels; batch norm's counters are of no use and may be missing."""
    missing = [key for key in expected
               if key not in state and not key.endswith("num_batches_tracked")]
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    stem = shapes["conv1.weight"]
    allowed = {"conv1.weight": (stem, (stem[0], 3, *stem[2:]))}
    other_shape = [f"{key} ({_by(state[key].shape)}, not {_by(shapes[key])})" for key in shapes
                   if key in state
                   and tuple(state[key].shape) not in allowed.get(key, (shapes[key],))]
    return "; ".join(f"{what}: {first_three(keys)}" for what, keys in (
        ("missing keys", missing),
        ("unexpected keys", [key for key in state if key not in expected]),
        ("keys of another shape", other_shape)) if keys)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _imagenet_state(arch: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(arch)["DEFAULT"]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
        return {key: value for key, value in state.items() if not key.startswith("fc.")}
    except (urllib.error.URLError, OSError) as error:
        raise CheckpointError(
            f"the ImageNet weights cannot be downloaded ({error}): fetch {weights.url} elsewhere "
            "and give its path instead of 'imagenet'") from None


def _encoder_state(path: str, arch: str, say: Callable) -> dict[str, Tensor]:
    """The encoder's weights in a checkpoint, by torchvision's own keys."""
    state = load_checkpoint(path)
    if state.get("arch") in ARCHITECTURES and state["arch"] != arch:
        raise CheckpointError(f"{path} holds a {state['arch']}, not a {arch}")
    weights, taken = find_encoder(state, path)
    if state.get("format") != FORMAT and taken:
        say(f"{path}: {taken}")
    return weights


def settings_of(checkpoint: dict) -> dict[str, Any]:
    """What a checkpoint says of its data folder, architecture and preprocessing, as far as that
    can be meant here: another tool may have other things under the same names."""
    about = checkpoint | checkpoint.get("config", {})
    meant = {
        "data": checkpoint.get("format") == FORMAT and isinstance(about.get("data"), str),
        "arch": about.get("arch") in ARCHITECTURES,
        "image_size": type(about.get("image_size")) is int and 1 <= about["image_size"] <= 4096,
        "normalize": about.get("normalize") in ("fixed", "image"),
        "clahe": isinstance(about.get("clahe"), bool)}
    return {name: about[name] for name in meant if meant[name]}


def fold_rgb_stem(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one-channel network that computes what an RGB one does on a gray image repeated thrice.

    The RGB stem sees channel c as (x - mean_c) / std_c, ours sees y = (x - m) / s. Put x = m + s y
    into the former: the weights become sum_c w_c s / std_c, and a constant remains, the sum of
    w_c (m - mean_c) / std_c over channels and kernel. The batch norm behind the stem absorbs it
    where its running mean is lowered by as much. Exact but for the outermost pixels, where the
    zeros of the padding mean the gray level m here and mean_c there."""
    weight = state["conv1.weight"]                                              # (C, 3, 7, 7)
    mean, std = IMAGENET_MEAN.view(3, 1, 1).to(weight), IMAGENET_STD.view(3, 1, 1).to(weight)
    constant = (weight * (MEAN - mean) / std).sum((1, 2, 3))                    # (C,)
    return state | {
        "conv1.weight": (weight * STD / std).sum(1, keepdim=True),              # (C, 1, 7, 7)
        "bn1.running_mean": state["bn1.running_mean"] - constant}


# --------------------------------------------------------------------------------------------------
# What stands on the encoder: a projection head for pre-training, a linear layer for labels.

class SimCLR(nn.Module):
    """Encoder and projection head: (B, 1, S, S) -> (B, proj_dim). Later stages drop the head.

    The head has `proj_layers` linear layers, with batch norm and ReLU between them, `proj_width`
    wide inside (0: as wide as the features)."""

    def __init__(self, encoder: torchvision.models.ResNet, proj_layers: int = 2,
                 proj_width: int = 0, proj_dim: int = 128):
        super().__init__()
        self.encoder = encoder
        width, layers = num_features(encoder), []
        hidden = proj_width or width
        for _ in range(proj_layers - 1):
            layers += [nn.Linear(width, hidden, bias=False),
                       nn.BatchNorm1d(hidden),
                       nn.ReLU(inplace=True)]
            width = hidden
        self.projector = nn.Sequential(*layers, nn.Linear(width, proj_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.encoder(x))


class Classifier(nn.Module):
    """Encoder and one linear layer: (B, 1, S, S) -> logits (B, outputs)."""

    def __init__(self, encoder: torchvision.models.ResNet, outputs: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(num_features(encoder), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """The network of a classifier.pt, in evaluation mode, and the checkpoint.

    CheckpointError where the file is no classifier.pt."""
    state = load_checkpoint(path)
    if not (CLASSIFIER <= state.keys() and PREPROCESSING <= state["config"].keys()):
        raise CheckpointError(f"{path} is not a classifier.pt of finetune.py")
    labels, thresholds = state["labels"], state["thresholds"]
    if not (isinstance(labels, list) and isinstance(thresholds, list)
            and len(labels) == len(thresholds) > 0
            and all(isinstance(name, str) for name in labels)
            and all(isinstance(value, int | float) for value in thresholds)):
        raise CheckpointError(f"{path} has no threshold for each of its labels")
    if not PREPROCESSING <= settings_of(state).keys():
        raise CheckpointError(f"{path} says of no image size, normalize and clahe that can be")
    try:
        encoder = build_encoder(state["arch"], str(path))
        outputs = len(labels) * {"binary": 1, "three-way": 3, "exclusive": 1}[state["kind"]]
        net = Classifier(encoder, outputs)
        net.head.load_state_dict(state["classifier"])
    except MALFORMED as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} holds a head that does not fit: {reason}") from None
    return net.eval(), state


# --------------------------------------------------------------------------------------------------
# Features of the images of a data folder.

def num_features(encoder: torchvision.models.ResNet) -> int:
    """D, the width of what the encoder gives."""
    width = encoder.num_features
    assert isinstance(width, int)
    return width


@torch.no_grad()
def extract_features(net: nn.Module, width: int, loader: "Loader",
                     dtype: torch.dtype | None = None) -> Tensor:
    """Outputs (n, width) of a network for the loader's n images, float32 on the loader's device.

    They are in the loader's order and the same on every process: process `rank` gets
    images rank, rank + world_size, ... and fills their rows, and the sum over the
    processes completes the others, exactly. dtype: autocast's, None for float32. The
    network's mode is restored."""
    training = net.training
    net.eval()
    features = torch.zeros(loader.n, width, device=loader.device)
    row = loader.rank
    for x, _ in loader:
        with torch.autocast(loader.device.type, dtype, enabled=dtype is not None):
            y = net(x.contiguous(memory_format=torch.channels_last))            # (b, width)
        end = row + loader.world_size * len(y)
        features[row:end:loader.world_size] = y.float()
        row = end
    if loader.world_size > 1:
        dist.all_reduce(features)
    net.train(training)
    return features


def cached_features(net: nn.Module, width: int, loader: "Loader", folder: Path,
                    dtype: torch.dtype | None = None) -> Tensor:
    """`extract_features` on the CPU, kept in `folder` and read from there the next time.

    A file's name is a digest of the weights, the preprocessing and the images. Where
    the kept files exceed KEPT_FEATURES bytes, those that were not used for the longest
    time are deleted."""
    digest = hashlib.sha256(f"{loader.fingerprint} {dtype}".encode())
    for name, value in net.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    file = folder / f"{digest.hexdigest()[:16]}.pt"
    with contextlib.suppress(CheckpointError):          # not there, or cut short: extract
        features = load_checkpoint(file)["features"]
        os.utime(file)                                  # the time of the last use
        return features
    features = extract_features(net, width, loader, dtype).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    # Another run may be keeping the same features, so that each writes under a name of its own.
    # What a killed one left half written is deleted by the next one on its machine.
    for part in folder.glob(f"{platform.node()}-*.part*"):
        process = part.name.removeprefix(f"{platform.node()}-").split(".")[0]
        if not Path("/proc", process).exists():
            part.unlink(missing_ok=True)
    own = folder / f"{platform.node()}-{os.getpid()}.part"
    save_checkpoint(own, {"features": features})
    os.replace(own, file)
    _delete_oldest(folder, file)
    return features


def _delete_oldest(folder: Path, newest: Path) -> None:
    """Keep the features in `folder` below KEPT_FEATURES bytes, but `newest` in any case."""
    with contextlib.suppress(FileNotFoundError):        # another run deletes the same files
        files = sorted(folder.glob("*.pt"), key=lambda file: file.stat().st_mtime)
        excess = sum(file.stat().st_size for file in files) - KEPT_FEATURES
        for file in files:
            if excess > 0 and file != newest:
                excess -= file.stat().st_size
                file.unlink()
