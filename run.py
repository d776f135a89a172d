"""What the runs of all stages have in common: flags, processes and device, run folder.

A stage is a Config, a dataclass of its flags, and a function `stage(config, compute,
resources)` that `main` calls. What a stage decides stands in its script; what it would
have to repeat from another script stands here.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from common import (  # first: it answers Ctrl-C while PyTorch loads
    DataError, differing_flags, errors_in_one_sentence, lock, number_within, print_any_name,
    valid_unicode, write_text)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from checkpoint import CheckpointError
from manifest import Manifest
from syncbn import SyncBatchNorm


class RunConfig(Protocol):
    """What this file asks of a stage's Config, beside being a dataclass of `flag` fields."""
    __dataclass_fields__: ClassVar[dict[str, Any]]
    out: str
    overwrite: bool
    precision: str
    threads: int | None


# --------------------------------------------------------------------------------------------------
# Flags. A stage declares each one once, as a field of its Config: name, type, default, help, range.

def flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf, *,
         section: str | None = None, choices: tuple | None = None,
         metavar: str | tuple | None = None, may_differ: bool = False) -> Any:
    """A dataclass field that is a flag of the command line.

    low, high: the range of a number, both ends allowed.
    section: a heading of --help; it holds for this flag and those after it.
    may_differ: True where the flag says how or how long a run computes and not what, so that a
    run may go on with another value than it began with."""
    return dataclasses.field(default=default, metadata={
        "help": help, "low": low, "high": high, "section": section, "choices": choices,
        "metavar": metavar, "may_differ": may_differ})


def positional(help: str, metavar: str) -> Any:
    """A dataclass field that is an argument without a flag, or one or more of them where its type
    is `tuple[str, ...]`; such fields come first."""
    return dataclasses.field(metadata={
        "help": help, "metavar": metavar, "positional": True, "may_differ": True})


# The first of these that exists is what the later stages start from by default.
ENCODERS = ("runs/pretrain/encoder.pt", "runs/demo/encoder.pt")
# The same in every stage that trains or extracts features: `precision: str = flag(**PRECISION)`.
PRECISION: dict[str, Any] = dict(
    default="auto", choices=("auto", "bf16", "fp16", "fp32"), may_differ=True,
    help="auto: bf16 on a GPU that has it, fp16 on other GPUs, fp32 on a CPU")
THREADS: dict[str, Any] = dict(
    default=None, low=1, high=256, may_differ=True,
    help="of the loader, for each process (default: cores / processes, at most 8)")


def parse(config_class: type, argv: list[str] | None) -> Any:
    """The command line as an instance of `config_class`.

    A Config may define `presets(args) -> dict`: other defaults that one of its flags
    asks for, as --demo does. A ValueError from its __post_init__ is reported as a wrong
    flag is."""
    presets = {}
    if hasattr(config_class, "presets"):
        # Without --help, which shall show the defaults that the other flags ask for.
        first_look = _parser(config_class, presets, add_help=False)
        presets = config_class.presets(first_look.parse_known_args(argv)[0])
    parser = _parser(config_class, presets)
    args = vars(parser.parse_args(argv))
    try:
        return config_class(**{name: tuple(value) if isinstance(value, list) else value
                               for name, value in args.items()})
    except ValueError as error:
        parser.error(str(error))


def _parser(config_class: type, presets: dict, add_help: bool = True) -> argparse.ArgumentParser:
    """The fields of a Config as flags, some with other defaults than their own."""
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=add_help)
    group = parser
    for field in dataclasses.fields(config_class):
        if field.metadata.get("section"):
            group = parser.add_argument_group(field.metadata["section"])
        _add_argument(group, field, presets.get(field.name, field.default))
    return parser


def _add_argument(group, field: dataclasses.Field, default: Any) -> None:
    """Make one field of a Config known to argparse, by its type and its metadata."""
    about, name = field.metadata, f"--{field.name.replace('_', '-')}"
    if about.get("positional"):
        several = ... in typing.get_args(field.type)
        group.add_argument(field.name, nargs="+" if several else None, help=about["help"],
                           metavar=about["metavar"])
        return
    if field.type is bool:
        group.add_argument(name, action="store_true", default=default, help=about["help"])
        return
    if field.type == bool | None:  # --clahe, --no-clahe, or neither: inherited
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=default,
                           help=about["help"])
        return
    # The type is plain, as in `int`, or optional, as in `int | None`, or a tuple: of as many values
    # as the default has, or of one or more where it is written `tuple[str, ...]`.
    kind: Any
    kind, *rest = typing.get_args(field.type) or (field.type,)
    count = len(field.default) if isinstance(field.default, tuple) else None
    group.add_argument(
        name, type=number_within(kind, about["low"], about["high"]), default=default,
        nargs="+" if ... in rest else count, choices=about["choices"], metavar=about["metavar"],
        help=about["help"] + _default_text(default))


def _default_text(default: Any) -> str:
    """What --help says of a default, written as one would type it."""
    if default in (None, (), ""):
        return ""
    values = default if isinstance(default, tuple) else [default]
    return f" (default {' '.join(map(str, values))})"


# --------------------------------------------------------------------------------------------------
# Processes, device, precision.

# Batch norm's statistics are the same on all processes, so that nobody has to send them. The
# argument that says so has got another name in newer versions of PyTorch.
BUFFERS = inspect.signature(DistributedDataParallel).parameters.keys() & {"forward_sync_buffers"}
KEEP_BUFFERS: dict[str, Any] = dict.fromkeys(BUFFERS or {"broadcast_buffers"}, False)


@dataclasses.dataclass(frozen=True)
class Compute:
    """Where this process computes, and its place among the processes that torchrun started.

    With one process every collective call returns at once, so that a stage need not
    ask."""
    rank: int
    world_size: int
    device: torch.device
    precision: str  # bf16, fp16 or fp32
    threads: int    # of the loader

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None for float32 throughout."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[self.precision]

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def loader_arguments(self) -> dict[str, Any]:
        """What train_loader and eval_loader ask of the process that they load for."""
        return dict(device=self.device, rank=self.rank, world_size=self.world_size,
                    threads=self.threads, half=self.dtype is not None)

    def without_others(self) -> "Compute":
        """The same device for work that one process does while the others wait."""
        return dataclasses.replace(self, rank=0, world_size=1)

    def say(self, *words) -> None:
        """Print, once for all processes."""
        if self.rank == 0:
            print(*words, flush=True)

    def now(self) -> Any:
        """A moment on the GPU's own clock, which this process does not wait for; or on a CPU's."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """From one such moment to another, once the GPU has come there."""
        return start.elapsed_time(end) / 1000 if self.cuda else end - start

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, or another `op`; in place, and returned."""
        if self.world_size > 1:
            dist.all_reduce(x, op)
        return x

    def agree_on(self, number: int) -> bool:
        """Whether all processes have the same number."""
        smallest_negated, largest = self.reduce(
            torch.tensor([-number, number]), dist.ReduceOp.MAX).tolist()
        return -smallest_negated == largest

    def place(self, net: nn.Module) -> Any:
        """A network on this process's device, with batch norm over the images of all processes."""
        if self.world_size > 1:
            SyncBatchNorm.replace_in(net)
        net = net.to(device=self.device)
        return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def data_parallel(self, net: Any) -> Any:
        """The network for the training step: backward() averages gradients over all processes."""
        if self.world_size == 1:
            return net
        return DistributedDataParallel(net, device_ids=[self.device.index] if self.cuda else None,
                                       gradient_as_bucket_view=True, **KEEP_BUFFERS)

    def rehearse(self, model: nn.Module, x: Tensor) -> None:
        """A backward pass that changes nothing, before a run's first step and before that with
        which it goes on. x: what the network sees in that step.

        After its first backward pass DistributedDataParallel lays out the gradients in another
        order, in which all later steps sum them. Three summands or more round differently in
        another layout, so that without this a run that goes on would end with other bits."""
        if self.world_size == 1:
            return
        statistics = [buffer.clone() for buffer in model.buffers()]
        with self.autocast():
            y = model(x.contiguous(memory_format=torch.channels_last))
        y.float().sum().backward()
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), statistics):
            buffer.copy_(before)


class Place(NamedTuple):
    """A process among those that torchrun started: of all machines, and of its own."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


# What torchrun tells each process. The latter two say where the processes meet.
NUMBERS, MEETING_POINT = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")


def read_place() -> Place:
    """This process's place, from the environment; the only process's where that says nothing.

    DataError where it says only half: a variable that was left by something else would make
    this process wait for others that never come, or be silent as though it were not the first."""
    variables = os.environ
    present = [name for name in NUMBERS if name in variables]
    if not present:  # the meeting point alone is set for torchrun by many a job script
        return Place()
    advice = ("start the processes with torchrun, or this one alone after `unset "
              f"{' '.join(name for name in (*NUMBERS, *MEETING_POINT) if name in variables)}`")
    missing = [name for name in (*NUMBERS, *MEETING_POINT) if name not in variables]
    if missing:
        raise DataError(f"the environment has {', '.join(present)} but not {', '.join(missing)}, "
                        f"as torchrun would set: {advice}")
    try:
        rank, world_size, local_rank = (int(variables[name]) for name in NUMBERS)
        local_world_size = int(variables.get("LOCAL_WORLD_SIZE", 1))
        int(variables["MASTER_PORT"])
    except ValueError as error:
        raise DataError(f"a variable of torchrun's is no number ({error}): {advice}") from None
    if not (0 <= rank < world_size and 0 <= local_rank and local_world_size >= 1):
        values = ", ".join(f"{name}={variables[name]}" for name in NUMBERS)
        raise DataError(f"the environment has {values}, which cannot be: {advice}")
    return Place(rank, world_size, local_rank, local_world_size)


def start(config: RunConfig, timeout: timedelta, place: Place | None = None) -> Compute:
    """Join the processes that torchrun started, or be the only one."""
    rank, world_size, local_rank, local_world_size = place or read_place()
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise DataError(f"{local_world_size} processes are too many for "
                        f"{torch.cuda.device_count()} GPUs")
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if world_size > 1:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
        except (dist.DistError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"the {world_size} processes did not meet at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT): {reason}") from None
    precision = config.precision
    if precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    cores = len(os.sched_getaffinity(0))
    threads = config.threads or max(1, min(8, cores // local_world_size))
    return Compute(rank, world_size, device, precision, threads)


def learning_rate(step: int, total_steps: int, warmup_steps: float, peak: float = 1.0) -> float:
    """Linear warm-up to `peak`, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / math.ceil(warmup_steps)
    angle = math.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (1 + math.cos(angle)) / 2


# --------------------------------------------------------------------------------------------------
# How a run begins and ends.

def main(stage: Callable, config_class: type, argv: list[str] | None = None,
         timeout: timedelta = timedelta(minutes=30)) -> None:
    """Run `stage(config, compute, resources)`; what its user can mend ends it in one sentence.

    resources: an ExitStack; what the stage enters there is closed however the run ends.
    timeout: how long a process waits for another one in a collective call.

    A Config may say in `afterwards` what the same command does after Ctrl-C, where it does not
    go on from what is in --out."""
    print_any_name()
    threading.excepthook = _but_for_tensorboard
    config, script = parse(config_class, argv), f"{stage.__name__}.py"
    with errors_in_one_sentence(script, config.out):
        place = read_place()
    first, afterwards = place.rank == 0, getattr(config, "afterwards", "")
    try:
        with (contextlib.ExitStack() as resources,
              errors_in_one_sentence(script, config.out, first, afterwards)):
            stage(config, start(config, timeout, place), resources)
    except FloatingPointError as error:
        sys.exit(f"{script}: {error}" if first else 1)
    except torch.OutOfMemoryError:
        sys.exit(f"{script}: the GPU has too little memory: lower --batch-size or --image-size, or "
                 "take more GPUs")
    except RuntimeError as error:
        # Connection closed by peer, or reset by it, or a broken pipe.
        if "gloo/transport" not in str(error) and "closed by peer" not in str(error):
            raise
        sys.exit(1)  # another process failed, and has already printed the reason
    finally:
        threading.excepthook = threading.__excepthook__
        if dist.is_initialized():
            dist.destroy_process_group()


def _but_for_tensorboard(args) -> None:
    """The traceback of a thread, but for a disk that is full under TensorBoard's: its error
    is raised in the main thread as well, where it becomes one sentence."""
    full = isinstance(args.exc_value, OSError)
    if not (full and type(args.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(args)


class StopSignal:
    """SIGTERM and SIGINT, remembered until the run has come to a good moment to leave.

    A signal often comes twice, from the cluster and from torchrun; the second one must
    not end the process while it saves."""

    def __init__(self, resources: contextlib.ExitStack):
        self.number = 0
        self.asked: tuple[Tensor, dist.Work] | None = None  # a question that is under way
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, self._remember)
            resources.callback(signal.signal, number, before)

    def _remember(self, number, frame) -> None:
        self.number = number

    def received(self, compute: Compute) -> int:
        """The signal that any of the processes has received, or 0: all leave at the same step.

        The processes ask each other while they compute, so that nobody waits for the
        answer: it is that of the call before."""
        if compute.world_size == 1:
            return self.number
        answer = 0
        if self.asked:
            numbers, work = self.asked
            work.wait()
            answer = int(numbers)
        numbers = torch.tensor(self.number)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True)
        self.asked = (numbers, work) if work else None
        return answer


# --------------------------------------------------------------------------------------------------
# The run folder: config.json says which run it holds.

def content_of_data(manifest: Manifest, images: np.ndarray | None = None) -> str:
    """A digest of a data folder, or of these images of it without their labels.

    A folder of the same rows whose images were made with another --size differs by
    their sizes in bytes."""
    if images is None:
        sizes = manifest.sizes_digest(np.arange(len(manifest.paths)))
        return f"{manifest.rows_digest()} {sizes}"
    return f"{manifest.paths_digest(images)} {manifest.sizes_digest(images)}"


def content_of_file(path: str | Path) -> str:
    """A digest of a checkpoint; a name that is no file, such as `random`, stands for itself."""
    if not os.path.isfile(path):
        return str(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_run(config: RunConfig, stage: str, results: tuple[str, ...],
             resources: contextlib.ExitStack, starts_from: str = "",
             contents: dict[str, dict[str, str]] | None = None, **more) -> None:
    """Make the run folder, or recognise the run in it, and keep it locked until the run ends.

    results: patterns of the files that the stage writes; a folder in which the first of
    them exists holds something that could be lost. CheckpointError says which flags
    differ from those of the run that made it, unless --overwrite is given, which
    deletes the results. A folder that holds anything but a run of this stage is refused
    in any case.
    starts_from: a file that alone may lie in a new run folder, for the run to start from.
    contents: for each flag that names files, {path: digest}. Such flags are compared by the
    digests, so that files may be moved or named by another path.
    more: compared as flags are."""
    out = Path(config.out)
    if valid_unicode(config.out) != config.out:
        raise CheckpointError(f"--out {out} is not in UTF-8, and TensorBoard cannot write there: "
                              "choose another --out, or `export PYTHONUTF8=1` if it is only the "
                              "locale")
    names = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if names - {starts_from} and "config.json" not in names:
        raise CheckpointError(f"{out} is not empty and holds no run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    file = resources.enter_context(open(out / "config.json", "a+", encoding="utf-8"))
    if not lock(file):
        raise CheckpointError(f"another process is at work in {out}; choose another --out")
    before = _read_config(file)
    if before and before.get("stage") != stage:
        raise CheckpointError(f"{out} holds something else than a run of {stage}.py; "
                              "choose another --out")
    now = {"stage": stage} | fixed_flags(config) | more | {"contents": contents or {}}
    now = json.loads(json.dumps(now))  # tuples are lists in a file
    difference = _difference(before, now)
    if config.overwrite:
        for pattern in results:
            for old in out.glob(pattern):
                old.unlink()
    goes_on = bool(before) and (out / results[0]).exists()
    if goes_on and difference:
        raise CheckpointError(f"{out} holds a run {difference}; choose another --out, or give up "
                              "that run with --overwrite")
    if before != now and not goes_on:
        # The file is rewritten in place because its lock would not follow a new one. Nothing is
        # lost if that is cut short: the next run with the same flags writes it again.
        file.truncate(0)
        file.write(json.dumps(now, indent=1) + "\n")
        file.flush()


def fixed_flags(config: RunConfig) -> dict[str, Any]:
    """The flags that must be the same when a run goes on, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if not field.metadata["may_differ"]}


def _difference(before: dict, now: dict) -> str:
    """How two runs differ, or nothing: `with other flags: --epochs (2 there, 5 here)`."""
    now, changed = dict(now), []
    for name, files in now["contents"].items():
        earlier = before.get("contents", {}).get(name)
        if not isinstance(earlier, dict):  # of an older version, which compared the flags alone
            continue
        digests = list(earlier.values())
        if digests == list(files.values()):  # the same, wherever they lie
            now[name] = before.get(name)
        changed += [path for path, digest in files.items() if digest not in digests]
    now["contents"] = before.get("contents")  # a digest would say nothing to a user
    if flags := differing_flags(before, now):
        return f"with other flags: {flags}"
    return f"on {' and '.join(changed)} as it was before it was changed" if changed else ""


def _read_config(file) -> dict:
    """What an open config.json says; {} for an empty file."""
    file.seek(0)
    try:
        config = json.loads(file.read() or "{}")
    except ValueError:
        config = None
    return config if isinstance(config, dict) else {"stage": "unknown"}


class Curves:
    """log.jsonl and TensorBoard's files in the run folder, written by the first process."""

    def __init__(self, config: RunConfig, compute: Compute, step: int):
        """Go on after `step`; lines and points after it belong to steps that will be repeated."""
        self.writer = None
        if compute.rank > 0:
            return
        path = Path(config.out) / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text("utf-8").splitlines(keepends=True)
                     if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_text(path, "".join(lines))
        self.file = open(path, "a", encoding="utf-8")
        self.writer = SummaryWriter(config.out, purge_step=step + 1 if step else None)
        if not step:
            settings = dataclasses.asdict(config).items()
            text = "\n".join(f"    {k} = {v}" for k, v in settings)
            self.writer.add_text("config", valid_unicode(text))

    def add(self, step: int, epoch: float, scalars: dict[str, float]) -> None:
        """One line of log.jsonl and one point on each curve. JSON has no NaN: it becomes null."""
        if self.writer:
            finite = {name: value if math.isfinite(value) else None
                      for name, value in scalars.items()}
            line = {"step": step, "epoch": round(epoch, 3)} | finite
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """pixels: (3, H, W) in [0, 1]."""
        if self.writer:
            self.writer.add_image(name, pixels, step)

    def close(self, config: RunConfig, results: dict[str, float]) -> None:
        """End with the flags and the results in TensorBoard's table of hyper-parameters."""
        if self.writer:
            flags = {name: value if isinstance(value, int | float) else valid_unicode(str(value))
                     for name, value in dataclasses.asdict(config).items()}
            for summary in hparams(flags, results):
                self.writer._get_file_writer().add_summary(summary)
            self.writer.flush()  # close() alone would not say that the disk is full
            self.writer.close()
            self.file.close()
