"""The networks: encoder, projection head, classifier, and the features of a data folder.

The encoder is torchvision's ResNet with a one-channel stem and without `fc`, so that
its state dict loads into torchvision's own model. Its input is a normalised radiograph,
(B, 1, S, S); its output the pooled features, (B, D).
"""
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from checkpoint import (
    ARCHITECTURES, FORMAT, MALFORMED, CheckpointError, encoder_weights, load_checkpoint)

if TYPE_CHECKING:
    from dali_pipeline import Loader

MEAN, STD = 0.5, 0.25               # the input is (gray level - MEAN) / STD, gray levels in [0, 1]
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])


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

    state = encoder_weights(init, arch, encoder.state_dict(), say)
    rgb = state["conv1.weight"].shape[1] == 3
    encoder.load_state_dict(fold_rgb_stem(state) if rgb else state)
    return encoder


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
    """Encoder and projection head: (B, 1, S, S) -> (B, proj_dim). Later stages drop the head, or
    all of it but its first layers.

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


def rebuild_projector(weights: dict[str, Tensor], width: int) -> nn.Sequential:
    """The layers of a projection head, (B, width) -> (B, C), whose state dict this is, or whose
    first layers'; none where it is empty. One of MALFORMED where they do not fit."""
    layers = []
    for name, weight in weights.items():
        if weight.ndim == 2:            # of a linear layer, (C, width)
            bias = name.replace("weight", "bias") in weights
            layers.append(nn.Linear(width, len(weight), bias))
            width = len(weight)
        elif name.endswith("running_mean"):
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    projector = nn.Sequential(*layers)
    projector.load_state_dict(weights)
    return projector


def first_layers(init: str, count: int, encoder: torchvision.models.ResNet) -> nn.Sequential:
    """The projection head of a pre-training up to its `count`-th linear layer, with the batch norm
    and the ReLU that follow this (Chen et al. 2020b): (B, D) -> (B, C). No layer for 0.

    init: what the encoder was built from. CheckpointError where that has no such layer."""
    if not count:
        return nn.Sequential()
    state = {} if init in ("random", "imagenet") else load_checkpoint(init)
    if state.get("format") != FORMAT or not state.get("projector"):
        raise CheckpointError(
            f"--from-head {count}: {init} has no projection head, as an encoder.pt of pretrain.py "
            "has; one that is older gets it where the command that made it is given again")
    try:
        projector = rebuild_projector(state["projector"], num_features(encoder))
    except MALFORMED as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{init} holds a projection head that does not fit: {reason}") from None
    layers = len(linear_layers(projector))
    if count > layers:
        raise CheckpointError(f"--from-head {count}: the projection head in {init} has {layers} "
                              f"layer{'s' if layers > 1 else ''}")
    return projector[:3 * count]        # linear layer, batch norm, ReLU


def linear_layers(net: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in net if isinstance(layer, nn.Linear)]


class Classifier(nn.Module):
    """Encoder, the first layers of its projection head, if any, and one linear layer:
    (B, 1, S, S) -> logits (B, outputs)."""

    def __init__(self, encoder: torchvision.models.ResNet, outputs: int,
                 projector: nn.Sequential | None = None):
        super().__init__()
        self.encoder, self.projector = encoder, projector or nn.Sequential()
        widths = [layer.out_features for layer in linear_layers(self.projector)]
        self.head = nn.Linear([num_features(encoder), *widths][-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.projector(self.encoder(x)))


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


