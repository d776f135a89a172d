"""Checkpoints: written as a whole, read without trust; and the weights of an encoder in them.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts.
"""
import contextlib
import json
import math
import os
import re
import shlex
import signal
import urllib.error
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from common import DataError, whole_file

FORMAT = "simclr-cxr encoder, version 1"    # of encoder.pt and classifier.pt
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
PREPROCESSING = {"image_size", "normalize", "clahe"}    # entries of their config


class CheckpointError(DataError):
    """A checkpoint or a run folder that cannot be used."""


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` so that `path` is always a whole checkpoint, the old one or the new one."""
    try:
        with _interrupt_later(), whole_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        # PyTorch's writer reports a full disk as a RuntimeError that hides the OSError.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended, because PyTorch's writer would turn it into a
    RuntimeError, or abort the process."""
    signals = []
    before = signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if signals:                     # even if the block has failed
            signal.raise_signal(signal.SIGINT)


def first_not_finite(net: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The name of a weight or of an optimizer's value that is not finite, or "". Such a state must
    not replace the last good one.

    The optimizer is checked as well, because a huge gradient does not change its weight, but stops
    it forever: Adam keeps the gradient's square, which is infinite."""
    states = list(net.state_dict().items())
    states += [(f"the optimizer's {name}", torch.as_tensor(value))
               for state in optimizer.state.values() for name, value in state.items()]
    return next((name for name, value in states if not value.isfinite().all()), "")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, running no code from it; CheckpointError names the file.

    The file's first bytes tell whether it is PyTorch's or, from another tool, safetensors."""
    try:
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            safetensors = (file.read(1) == b"{"
                           and header_size <= os.path.getsize(path) - 8)
        if safetensors:
            state: Any = _read_safetensors(path, header_size)
        else:
            # PyTorch writes a checksum of each tensor, but does not check it when it reads.
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                if damaged:
                    raise ValueError(f"the checksum of {damaged} is wrong")
            with warnings.catch_warnings(action="ignore"):      # _why_not says it in a sentence
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as error:          # a decoder may raise anything on a broken file
        raise CheckpointError(f"{path} {_why_not(path, error)}") from None
    if not isinstance(state, dict) or not isinstance(state.get("config", {}), dict):
        raise CheckpointError(f"{path} is not a checkpoint of this project, nor a state dict")
    if damage := _damage(state):
        raise CheckpointError(f"{path} is damaged: {damage}")
    return state


# Python for a shell's command line, which saves only the tensors of a file, with their names.
WEIGHTS_ALONE = (
    "import torch; f = lambda d: {{k: f(v) if isinstance(v, dict) else torch.as_tensor(v) "
    "for k, v in d.items() if isinstance(v, dict) or hasattr(v, 'shape')}}; "
    "c = torch.load({}, 'cpu', weights_only=False); "
    "torch.save(f(getattr(c, 'state_dict', lambda: c)()), {})")


# Modules that no weights need, but from which a harmful pickle calls functions. In pickles
# subprocess is called commands.
RUNNING = {"", "io", "os", "subprocess", "commands", "shutil", "runpy", "importlib", "ctypes"}


def _why_not(path: str | Path, error: Exception) -> str:
    """Why a file cannot be read as a checkpoint, and what to do, from its first bytes and from the
    error that PyTorch raised."""
    if os.path.isdir(path):
        return "is a folder, and no checkpoint"
    head = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(64).lstrip()
    known = {b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` brings the file",
             b"<": "a page of HTML or XML: the download gave a page, such as one to log in",
             b"\x1f\x8b": "packed by gzip: unpack it", b"\x89HDF": "HDF5, as Keras writes it",
             b"\x93NUMPY": "an array of NumPy"}
    for start, what in known.items():
        if head.startswith(start):
            return f"is no checkpoint but {what}"
    if isinstance(error, EOFError) and not head:
        return "is empty"
    if "TorchScript" in str(error):
        return "is a TorchScript program: save the weights alone, torch.save(net.state_dict(), …)"
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    # A name without a module is built into Python, as getattr and eval are.
    if found and ("blocked" in str(error) or found[1].rpartition(".")[0] in RUNNING):
        return f"is not a whole checkpoint: it would run {found[1]}, which no weights need"
    if found:
        alone = os.path.splitext(path)[0] + "-weights.pt"
        command = WEIGHTS_ALONE.format(repr(str(path)), repr(alone))
        quoted = shlex.quote(command) if re.search(r'["$`\\!]', command) else f'"{command}"'
        return (f"holds Python objects beside its weights or around them ({found[1]}), and to read "
                "them could run any code. Where its source can be trusted, this saves the weights "
                f"alone as {alone}: python -c {quoted}")
    # Only the first sentence: PyTorch goes on to suggest weights_only=False.
    reason = (str(error) or repr(error)).splitlines()[0].split(". ")[0]
    return f"is not a whole checkpoint: {reason}"


# What PyTorch raises if parts of a checkpoint have a wrong shape or type.
MALFORMED = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
# The types of numbers in a .safetensors file, see below.
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
               "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def _read_safetensors(path: str | Path, header_size: int) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name; any exception if it is broken.

    The file has 8 bytes with the size of the header, then the header, then the bytes of all
    tensors. The header is JSON: the type, the shape and the place of each tensor's bytes. Reading
    it takes so few lines that a further package is not worth while."""
    content = Path(path).read_bytes()
    header = json.loads(content[8:8 + header_size])
    data, state = bytearray(content[8 + header_size:]), {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        dtype, shape = SAFETENSORS[about["dtype"]], about["shape"]
        if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the bytes of {name} are not all there")
        numbers = torch.frombuffer(data, dtype=torch.uint8, offset=start, count=end - start) \
            if end > start else torch.empty(0, dtype=torch.uint8)
        state[name] = numbers.clone().view(dtype).reshape(shape)
    return state


def _damage(state: dict) -> str:
    """An entry of this project's checkpoint that no stage would have written so, or ""."""
    if not {"format", "scaler"} & state.keys():            # from another tool
        return ""
    for name in ("config", "encoder", "projector", "classifier", "model"):
        entry = state.get(name, {})
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            return f"its {name} is no table of names"
        # If a batch norm's counter were missing, PyTorch would start it again from 0.
        counters = {key.replace("running_mean", "num_batches_tracked")
                    for key in entry if key.endswith("running_mean")}
        if lost := sorted(counters - entry.keys()):
            return f"its {name} has no {lost[0]}"
    # Without these entries, defaults would be used and the features would differ.
    missing = sorted(PREPROCESSING - state.get("config", {}).keys())
    if state.get("format") == FORMAT and missing:
        return f"its config has no {' and no '.join(missing)}"
    about = state.get("config", {}) | {key: state[key] for key in ("arch", "step") if key in state}
    kinds = {"image_size": int, "clahe": bool, "normalize": str, "data": str, "arch": str,
             "step": int}
    for name, kind in kinds.items():
        value = about.get(name)
        if name in about and (type(value) is not kind or kind is int and value < 0):
            return f"its {name} is {value!r}".splitlines()[0]
    if about.get("normalize", "fixed") not in ("fixed", "image"):
        return f"its normalize is {about['normalize']!r}"
    return ""


# --------------------------------------------------------------------------------------------------
# The weights of an encoder, from a checkpoint of this project or of another tool.

# torchvision's weights expect channels that are normalised by these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoder_weights(init: str | Path, arch: str, expected: dict[str, Tensor],
                    say: Callable) -> dict[str, Tensor]:
    """The state dict of a ResNet, with the keys and shapes of `expected`; its stem may have three
    channels. init: `imagenet`, or the path of a checkpoint. say: reports what was taken from it.

    CheckpointError if the weights cannot be read, do not fit or are not finite."""
    state = _imagenet_state(arch) if init == "imagenet" else _encoder_state(init, arch, say)
    try:
        reason = _mismatch(expected, state)
        if not reason and not all(value.isfinite().all() for value in state.values()):
            reason = "some of its weights are not finite"
    except MALFORMED as error:
        reason = last_line(error)
    if reason:
        raise CheckpointError(
            f"{init} does not fit a {arch} with a one-channel stem: {reason}")
    return state


def fold_rgb_stem(state: dict[str, Tensor], mean: float, std: float) -> dict[str, Tensor]:
    """The one-channel network with the same output as an RGB one on a gray image repeated thrice.

    mean, std: m and s, by which the one-channel input is normalised; gray levels are in [0, 1].

    The RGB stem sees channel c as (x - mean_c) / std_c, ours sees y = (x - m) / s. With x = m + s y
    in the former, the weights become sum_c w_c s / std_c, and a constant remains: the sum of
    w_c (m - mean_c) / std_c over channels and kernel. The running mean of the batch norm after the
    stem is lowered by this constant. This is exact except for the outermost pixels: the zeros of
    the padding mean gray level m for our stem, and mean_c for the RGB stem."""
    weight = state["conv1.weight"]                                              # (C, 3, 7, 7)
    rgb_mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1).to(weight)
    rgb_std = torch.tensor(IMAGENET_STD).view(3, 1, 1).to(weight)
    constant = (weight * (mean - rgb_mean) / rgb_std).sum((1, 2, 3))            # (C,)
    return state | {
        "conv1.weight": (weight * std / rgb_std).sum(1, keepdim=True),          # (C, 1, 7, 7)
        "bn1.running_mean": state["bn1.running_mean"] - constant}


def last_line(error: Exception) -> str:
    """The last line of an error, because PyTorch's first lines say where it was and not what."""
    return (str(error) or repr(error)).splitlines()[-1].strip()


def _imagenet_state(arch: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(arch)["DEFAULT"]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
        return {key: value for key, value in state.items() if not key.startswith("fc.")}
    except (urllib.error.URLError, OSError) as error:
        raise CheckpointError(
            f"the ImageNet weights cannot be downloaded ({error}): fetch {weights.url} elsewhere "
            f"and put it into {torch.hub.get_dir()}/checkpoints") from None


def _encoder_state(path: str | Path, arch: str, say: Callable) -> dict[str, Tensor]:
    """The encoder's weights in a checkpoint, by torchvision's keys."""
    state = load_checkpoint(path)
    if state.get("arch") in ARCHITECTURES and state["arch"] != arch:
        raise CheckpointError(f"{path} holds a {state['arch']}, not a {arch}")
    weights, taken = find_encoder(state, str(path))
    if state.get("format") != FORMAT and taken:
        say(f"{path}: {taken}")
    return weights


def _mismatch(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Which keys are missing, unexpected, of another shape or quantised, or "". The stem may have
    three channels. Batch norm's counters may be missing, because nothing uses them."""
    missing = [key for key in expected
               if key not in state and not key.endswith("num_batches_tracked")]
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    stem = shapes["conv1.weight"]
    allowed = {"conv1.weight": (stem, (stem[0], 3, *stem[2:]))}
    # A quantised number is useless without its scale.
    integers = [f"{key} ({state[key].dtype})" for key, value in expected.items() if key in state
                and value.is_floating_point() and not (
                    state[key].is_floating_point() and state[key].itemsize > 1)]
    other_shape = [f"{key} ({_by(state[key].shape)}, not {_by(shapes[key])})" for key in shapes
                   if key in state
                   and tuple(state[key].shape) not in allowed.get(key, (shapes[key],))]
    return "; ".join(f"{what}: {first_three(keys)}" for what, keys in (
        ("missing keys", missing),
        ("unexpected keys", [key for key in state if key not in expected]),
        ("keys of another shape", other_shape),
        ("numbers that seem to be quantised", integers)) if keys)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def settings_of(checkpoint: dict) -> dict[str, Any]:
    """A checkpoint's data folder, architecture and preprocessing. Values that make no sense here
    are left out, because another tool may use the same names for other things."""
    about = checkpoint | checkpoint.get("config", {})
    meant = {
        "data": checkpoint.get("format") == FORMAT and isinstance(about.get("data"), str),
        "arch": about.get("arch") in ARCHITECTURES,
        "image_size": type(about.get("image_size")) is int and 1 <= about["image_size"] <= 4096,
        "normalize": about.get("normalize") in ("fixed", "image"),
        "clahe": isinstance(about.get("clahe"), bool)}
    return {name: about[name] for name in meant if meant[name]}


# Heads after an encoder, and slowly updated copies of it, as other tools call them: parts of a
# checkpoint's keys, between the dots.
HEADS = {"fc", "head", "heads", "classifier", "linear", "proj", "projector", "projection",
         "projection_head", "predictor", "prediction_head", "mlp", "prototypes"}
COPIES = {"encoder_k", "key_encoder", "momentum_encoder", "backbone_momentum", "encoder_momentum",
          "teacher", "target", "target_encoder", "target_network", "ema", "model_ema", "ema_model",
          "best"}
# A ResNet's parts, if a tool has put them into an nn.Sequential.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
FIRST_BLOCK = {"conv1.weight": "layer1.0.conv1.weight", "0.weight": "4.0.conv1.weight"}


def find_encoder(checkpoint: dict, path: str) -> tuple[dict[str, Tensor], str]:
    """The weights of the ResNet in a checkpoint of any tool, by torchvision's keys; and in words
    what was taken and left out, "" if the file is the ResNet's state dict itself.

    Dictionaries may be nested (`state_dict`, `model`), and keys may have any prefix of a tool
    (`module.`, `backbone.`, `encoder_q.`) and contain torch.compile's `_orig_mod.`. The encoder is
    found by its keys `conv1.weight` and `layer1.0.conv1.weight` with the same prefix. Its heads
    are left out, and so are slow copies if there is another network. CheckpointError if no
    network is found, or more than one."""
    compiled = dict(_tensors(checkpoint))
    tensors = {key.replace("_orig_mod.", ""): value for key, value in compiled.items()}
    prefixes = [key.removesuffix(stem) for stem in ("conv1.weight", "0.weight") for key in tensors
                if key.endswith(stem) and f"{key.removesuffix(stem)}{FIRST_BLOCK[stem]}" in tensors]
    fast = [prefix for prefix in prefixes if not COPIES & set(prefix.split("."))]
    prefixes = fast or prefixes
    if not prefixes:
        keys = first_three([*tensors] or [str(key) for key in checkpoint])
        raise CheckpointError(f"{path} holds no ResNet: nothing in it ends in conv1.weight with "
                              f"a layer1 beside it, only {keys or 'nothing at all'}")
    if len(prefixes) > 1:
        raise CheckpointError(f"{path} holds several networks, under {first_three(prefixes)}: "
                              "save the one that is meant alone")
    prefix, weights, heads = prefixes[0], {}, []
    for key, value in tensors.items():
        if key.startswith(prefix):
            first, _, rest = key.removeprefix(prefix).partition(".")
            if first in HEADS:
                heads.append(key)
            else:
                weights[f"{CHILDREN.get(first, first)}.{rest}".rstrip(".")] = value
    words = [f"{prefix!r} was taken off the encoder's keys"] if prefix else []
    if compiled.keys() != tensors.keys():
        words.append("'_orig_mod.' was taken out of its keys")
    others = [key for key in tensors if not key.startswith(prefix)]
    if heads or others:
        words.append(f"left out {first_three(heads + others)}")
    return weights, "; ".join(words)


def _tensors(checkpoint: dict, depth: int = 5) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries, with their keys joined by dots. Keys other than strings
    are skipped and the depth is limited, because the file may be hostile."""
    for key, value in checkpoint.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield key, value
        elif isinstance(key, str) and isinstance(value, dict) and depth:
            for inner_key, inner in _tensors(value, depth - 1):
                yield f"{key}.{inner_key}", inner


def first_three(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
