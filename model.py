"""The network of pre-training: encoder and projection head.

The encoder is torchvision's ResNet, with a stem for one channel and without `fc`; the keys
of its state dict are torchvision's. It maps normalised radiographs (B, 1, S, S) to pooled
features (B, D).
"""
from collections.abc import Callable
from itertools import pairwise

import torchvision
from torch import Tensor, nn

from checkpoint import ARCHITECTURES, CheckpointError, encoder_weights, fold_rgb_stem

# The input is (gray level - MEAN) / STD, with gray levels in [0, 1].
MEAN, STD = 0.5, 0.25


# --------------------------------------------------------------------------------------------------
# Encoder.

def build_encoder(arch: str, init: str = "random",
                  say: Callable = lambda text: None) -> torchvision.models.ResNet:
    """A ResNet (B, 1, S, S) -> (B, D); num_features(encoder) tells D.

    init: `random`; `imagenet`, torchvision's weights; or the path of an encoder.pt or of another
    tool's checkpoint of a ResNet, with one channel or three (see checkpoint.py).
    say: called with a sentence about what was taken from another tool's checkpoint.
    CheckpointError if the weights cannot be loaded or do not fit."""
    if arch not in ARCHITECTURES:  # the name may come from a checkpoint
        raise CheckpointError(f"architecture {arch!r} is none of {', '.join(ARCHITECTURES)}")
    encoder = getattr(torchvision.models, arch)()
    stem = encoder.conv1
    encoder.conv1 = nn.Conv2d(
        1, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False)
    # As torchvision initialises all its convolutions.
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.num_features, encoder.fc = encoder.fc.in_features, nn.Identity()
    if init == "random":
        return encoder

    state = encoder_weights(init, arch, encoder.state_dict(), say)
    rgb = state["conv1.weight"].shape[1] == 3
    encoder.load_state_dict(fold_rgb_stem(state, MEAN, STD) if rgb else state)
    return encoder


def num_features(encoder: torchvision.models.ResNet) -> int:
    """D, the width of the encoder's features, as an int for type checkers too."""
    return int(encoder.num_features)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------
# Encoder and projection head.

class SimCLR(nn.Module):
    """(B, 1, S, S) -> (B, proj_dim). Later stages keep the encoder and, if asked, the head's
    first layers.

    The head has `proj_layers` linear layers with batch norm and ReLU between them. Inside it
    is `proj_width` wide, or as wide as the features if that is 0."""

    def __init__(self, encoder: torchvision.models.ResNet, proj_layers: int = 2,
                 proj_width: int = 0, proj_dim: int = 128):
        super().__init__()
        self.encoder = encoder
        features = num_features(encoder)
        widths = [features] + [proj_width or features] * (proj_layers - 1)
        layers = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out, bias=False),
                       nn.BatchNorm1d(width_out),
                       nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(widths[-1], proj_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.encoder(x))
