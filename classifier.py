"""What fine-tuning makes of an encoder, and predict.py rebuilds: a classifier.

It may stand on the first layers of the projection head, which encoder.pt carries, instead of
on the features themselves (SimCLR v2, Chen et al. 2020b).
"""
import json
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from checkpoint import FORMAT, MALFORMED, CheckpointError, last_line, load_checkpoint
from model import num_features


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
        reason = last_line(error)
        raise CheckpointError(
            f"{init} holds a projection head that does not fit: {reason}") from None
    layers = len(linear_layers(projector))
    if count > layers:
        raise CheckpointError(f"--from-head {count}: the projection head in {init} has {layers} "
                              f"layer{'s' if layers > 1 else ''}")
    return projector[:3 * count]        # linear layer, batch norm, ReLU


def linear_layers(net: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in net if isinstance(layer, nn.Linear)]


def image_flags(folder: str | Path) -> dict[str, Any]:
    """The flags that shaped the images of a data folder, {name: value} as prepare.py wrote them;
    {} where nothing says it: the folder was not made by prepare.py."""
    try:
        made = json.loads((Path(folder) / "prepare.json").read_text("utf-8"))
        return {name: made[name] for name in ("size", "quality", "stretch")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
