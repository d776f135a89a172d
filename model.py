"""The network of pre-training: encoder and projection head.

The encoder is torchvision's ResNet with a one-channel stem and without `fc`, so that
its state dict loads into torchvision's own model. Its input is a normalised radiograph,
(B, 1, S, S); its output the pooled features, (B, D).
"""
from collections.abc import Callable

import torchvision
from torch import Tensor, nn

from checkpoint import ARCHITECTURES, CheckpointError, encoder_weights, fold_rgb_stem

MEAN, STD = 0.5, 0.25               # the input is (gray level - MEAN) / STD, gray levels in [0, 1]


# --------------------------------------------------------------------------------------------------
# Encoder.

def build_encoder(arch: str, init: str = "random",
                  say: Callable = lambda text: None) -> torchvision.models.ResNet:
    """A ResNet (B, 1, S, S) -> (B, D), its width D in `encoder.num_features`.

    init: `random`; `imagenet`, torchvision's weights; or the path of an encoder.pt or of another
    tool's checkpoint of a ResNet, with one channel or three (see checkpoint.py).
    say: is told what of such a file was taken.
    CheckpointError where the weights cannot be had or do not fit."""
    if arch not in ARCHITECTURES:  # from a checkpoint it may be anything
        raise CheckpointError(f"architecture {arch!r} is none of {', '.join(ARCHITECTURES)}")
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
    encoder.load_state_dict(fold_rgb_stem(state, MEAN, STD) if rgb else state)
    return encoder


def num_features(encoder: torchvision.models.ResNet) -> int:
    """D, the width of what the encoder gives."""
    return int(encoder.num_features)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------
# What stands on the encoder for pre-training.

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
