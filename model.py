"""The network, and how it is kept: encoder, projection head, checkpoints.

The encoder is torchvision's ResNet with a one-channel stem and no `fc`, so its state dict loads into torchvision's own
model. Its input is a normalised radiograph, (B, 1, S, S); its output the pooled features, (B, D).
"""
import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import urllib.error
import zipfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

MEAN, STD = 0.5, 0.25                       # what the input's intensities in [0, 1] are normalised by
IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FORMAT = "simclr-cxr encoder, version 1"
CLASSIFIER = {"arch", "encoder", "config", "classifier", "labels", "kind", "thresholds"}    # what a classifier.pt holds
PREPROCESSING = {"image_size", "normalize", "clahe"}                                        # and its config


class CheckpointError(Exception):
    """A checkpoint or run folder that cannot be used, told in one sentence that names it."""


def build_encoder(arch: str, init: str = "random") -> nn.Module:
    """A ResNet (B, 1, S, S) -> (B, D), its width D in `encoder.num_features`.

    init: `random`; `imagenet` (torchvision's weights, folded by `fold_rgb_stem`); or the path of an encoder.pt or of a
    plain torchvision state dict, of one channel or three. CheckpointError where it cannot be had or does not fit."""
    if arch not in ARCHITECTURES:
        raise CheckpointError(f"{init}: {arch!r} is none of {', '.join(ARCHITECTURES)}")
    encoder = getattr(torchvision.models, arch)()
    stem = encoder.conv1
    encoder.conv1 = nn.Conv2d(1, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")       # as torchvision's stem
    encoder.num_features, encoder.fc = encoder.fc.in_features, nn.Identity()
    if init == "random":
        return encoder
    if init == "imagenet":
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (urllib.error.URLError, OSError) as error:
            raise CheckpointError(f"the ImageNet weights cannot be downloaded ({error}): fetch {weights.url} elsewhere "
                                  f"and give its path instead of 'imagenet'") from None
    else:
        state = load_checkpoint(init)
        if state.get("arch", arch) != arch:
            raise CheckpointError(f"{init} holds a {state['arch']}, not a {arch}")
        state = state.get("encoder", state)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        if state["conv1.weight"].shape[1] == 3:
            state = fold_rgb_stem(state)
        encoder.load_state_dict(state)
        if not all(value.isfinite().all() for value in state.values()):
            raise RuntimeError("some of its weights are not finite")
    except (RuntimeError, KeyError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{init} does not fit a {arch} with a one-channel stem: {reason}") from None
    return encoder


def fold_rgb_stem(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one-channel network that computes what an RGB one would on a gray image repeated three times.

    The RGB stem sees channel c as (x - mean_c) / std_c, ours sees y = (x - m) / s. Put in x = m + s y: the weights
    become sum_c w_c s / std_c, and what does not depend on y, sum_c w_c (m - mean_c) / std_c over the kernel, is a
    constant that the batch norm behind takes off again through its running mean. Exact but for the outermost pixels,
    where padding with zeros means gray m here and mean_c there."""
    weight = state["conv1.weight"]                                                              # (C, 3, 7, 7)
    mean, std = IMAGENET_MEAN.view(3, 1, 1).to(weight), IMAGENET_STD.view(3, 1, 1).to(weight)
    constant = (weight * (MEAN - mean) / std).sum((1, 2, 3))
    return state | {"conv1.weight": (weight * STD / std).sum(1, keepdim=True),
                    "bn1.running_mean": state["bn1.running_mean"] - constant}


class SimCLR(nn.Module):
    """Encoder and projection head: (B, 1, S, S) -> (B, proj_dim). The head is thrown away after pre-training.

    `proj_layers` linear layers, `proj_width` wide inside (0: as wide as the features), batch norm and ReLU between."""

    def __init__(self, encoder: nn.Module, proj_layers: int = 2, proj_width: int = 0, proj_dim: int = 128):
        super().__init__()
        self.encoder = encoder
        width, layers = encoder.num_features, []
        for _ in range(proj_layers - 1):
            hidden = proj_width or encoder.num_features
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            width = hidden
        self.projector = nn.Sequential(*layers, nn.Linear(width, proj_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.encoder(x))


class Classifier(nn.Module):
    """Encoder and one linear layer: (B, 1, S, S) -> logits (B, outputs)."""

    def __init__(self, encoder: nn.Module, outputs: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.num_features, outputs)
        self.num_features = outputs                                     # extract_features takes a classifier, too

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """The network of a classifier.pt, in evaluation mode, and the checkpoint; CheckpointError where it is none."""
    state = load_checkpoint(path)
    if not (CLASSIFIER <= state.keys() and PREPROCESSING <= state["config"].keys()):
        raise CheckpointError(f"{path} is not a classifier.pt of finetune.py")
    try:
        net = Classifier(build_encoder(state["arch"], str(path)), len(state["classifier"]["bias"]))
        net.head.load_state_dict(state["classifier"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds a head that does not fit: {str(error).splitlines()[-1].strip()}") from None
    return net.eval(), state


@torch.no_grad()
def extract_features(encoder: nn.Module, loader, n: int, rank: int = 0, world_size: int = 1,
                     dtype: torch.dtype | None = None) -> Tensor:
    """Features (n, D) of the loader's images, float32 on the loader's device, in order, the same on every process.

    Process `rank`'s loader yields images rank, rank + world_size, ...: each fills its rows, and a sum over the
    processes completes the rest, exactly. `dtype` is autocast's, None for float32. The encoder's mode is restored."""
    training = encoder.training
    encoder.eval()
    features = torch.zeros(n, encoder.num_features, device=loader.device)
    row = rank
    for x, _ in loader:
        with torch.autocast(loader.device.type, dtype, enabled=dtype is not None):
            y = encoder(x.contiguous(memory_format=torch.channels_last))
        features[row:row + world_size * len(y):world_size] = y.float()
        row += world_size * len(y)
    if world_size > 1:
        torch.distributed.all_reduce(features)
    encoder.train(training)
    return features


def cached_features(encoder: nn.Module, loader, n: int, folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """extract_features on the CPU, kept in `folder`: the same weights, preprocessing and images are read from there."""
    digest = hashlib.sha256(f"{loader.fingerprint} {dtype}".encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    file = folder / f"{digest.hexdigest()[:16]}.pt"
    with contextlib.suppress(CheckpointError):
        return load_checkpoint(file)["features"]
    features = extract_features(encoder, loader, n, dtype=dtype).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f"{os.getpid()}.part"                       # another run may be keeping the same features
    save_checkpoint(mine, {"features": features})
    os.replace(mine, file)
    return features


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) so that `path` is at every moment whole: old or new."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:           # how torch's writer tells of a full disk
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        temporary.unlink(missing_ok=True)                       # a full disk must not stay full


def open_run(out: Path, stage: str, config: dict, results: tuple[str, ...], overwrite: bool,
             held: contextlib.ExitStack) -> None:
    """Make the run folder, or recognise the run in it, and lock its config.json until `held` closes.

    `results` are the patterns of the files that the stage writes; where the first of them exists there is something to
    lose, and CheckpointError says which flags of `config` differ, unless `overwrite` gives the results up. A folder
    that holds anything else than a run of this stage is refused, with `overwrite` or without."""
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise CheckpointError(f"{out} is not empty and holds no run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    file = held.enter_context(open(out / "config.json", "a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another process is at work in {out}; choose another --out") from None
    file.seek(0)
    try:
        before = json.loads(file.read() or "{}")
    except ValueError:
        before = {"stage": "another"}                                   # not a run folder's config.json
    config = {"stage": stage} | config
    if before and (not isinstance(before, dict) or before.get("stage") != stage):
        raise CheckpointError(f"{out} holds something else than a run of {stage}.py; choose another --out")
    flag = {k: k if " " in k else f"--{k.replace('_', '-')}" for k in before.keys() | config.keys()}
    differ = [f"{flag[k]} ({before.get(k, 'not given')} there, {config.get(k, 'not given')} here)"
              for k in sorted(flag) if before.get(k) != config.get(k)]
    if (out / results[0]).exists() and differ and not overwrite:
        raise CheckpointError(f"{out} holds a run with other flags: {', '.join(differ)}; choose another --out, or give "
                              "up that run with --overwrite")
    if overwrite:
        for old in (path for pattern in results for path in out.glob(pattern)):
            old.unlink()
    if differ:                              # in place, to keep the lock; nothing is lost if this is cut short
        file.truncate(0)
        file.write(json.dumps(config, indent=1) + "\n")
        file.flush()


def load_checkpoint(path: str | Path) -> dict:
    """Read what save_checkpoint wrote, onto the CPU, without running code from the file; CheckpointError names it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = (str(error) or repr(error)).splitlines()[0].split(". ")[0]         # what torch advises next is no help
        raise CheckpointError(f"{path} is not a whole checkpoint: {reason}") from None
    if not isinstance(state, dict) or not isinstance(state.get("config", {}), dict):
        raise CheckpointError(f"{path} is not a checkpoint of this project, nor a state dict")
    return state
