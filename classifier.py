"""The classifier that fine-tuning makes from an encoder, and that predict.py rebuilds.

Its linear layer may follow the first layers of the projection head, which encoder.pt holds,
instead of the features themselves (SimCLR v2, Chen et al. 2020b).
"""
import json
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from checkpoint import FORMAT, MALFORMED, CheckpointError, last_line, load_checkpoint
from model import num_features


class Classifier(nn.Module):
    """Encoder, first layers of its projection head, if any, and one linear layer: (B, 1, S, S) ->
    logits (B, outputs)."""

    def __init__(self, encoder: torchvision.models.ResNet, outputs: int,
                 projector: nn.Sequential | None = None):
        super().__init__()
        self.encoder, self.projector = encoder, projector or nn.Sequential()
        widths = [layer.out_features for layer in linear_layers(self.projector)]
        self.head = nn.Linear([num_features(encoder), *widths][-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.projector(self.encoder(x)))


def rebuild_projector(weights: dict[str, Tensor], width: int) -> nn.Sequential:
    """A projection head, or its first layers, from their state dict: (B, width) -> (B, C). An empty
    dict gives no layers. Raises one of MALFORMED if the weights do not fit."""
    layers = []
    for name, weight in weights.items():
        if weight.ndim == 2:            # a linear layer's, (C, width)
            bias = name.replace("weight", "bias") in weights
            layers.append(nn.Linear(width, len(weight), bias))
            width = len(weight)
        elif name.endswith("running_mean"):
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    projector = nn.Sequential(*layers)
    projector.load_state_dict(weights)
    return projector


def first_layers(init: str, count: int, encoder: torchvision.models.ResNet) -> nn.Sequential:
    """The projection head of a pre-training up to its `count`-th linear layer and the batch norm
    and ReLU after it (Chen et al. 2020b): (B, D) -> (B, C). For 0 there are no layers.

    init: what the encoder was built from. CheckpointError if that has no such layer."""
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
    """The flags by which prepare.py made the images of a data folder, {name: value}; {} if they
    are not known, for example because prepare.py did not make the folder."""
    try:
        made = json.loads((Path(folder) / "prepare.json").read_text("utf-8"))
        return {name: made[name] for name in ("size", "quality", "stretch")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
