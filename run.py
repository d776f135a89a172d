"""What the runs of all stages have in common: processes, device and precision, beginning and end.

A stage is a Config, a dataclass of its flags, and a function `stage(config, compute,
resources)` that `main` calls. What a stage decides stands in its script; what it would
have to repeat from another script stands here.
"""
import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from common import (  # before PyTorch: it answers Ctrl-C while that loads
    ALONE, DataError, Place, errors_in_one_sentence, print_any_name, read_place)

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import last_line
from flags import RunConfig, parse
from run_folder import report_but_for_full_disk
from syncbn import SyncBatchNorm, unchanged_statistics


# --------------------------------------------------------------------------------------------------
# How a run begins.

def main(stage: Callable, config_class: type, argv: list[str] | None = None) -> None:
    """Run `stage(config, compute, resources)`; what its user can mend ends it in one sentence.

    resources: an ExitStack; what the stage enters there is closed however the run ends.

    A Config may say more of its stage, in attributes that are no flags:
    timeout: how long a process waits for another one in a collective call (30 minutes).
    bf16_on_cpu: whether --precision auto may be bf16 there (False: probabilities should not
        depend on the machine).
    afterwards: what the same command does after Ctrl-C, where it does not go on."""
    print_any_name()  # a name that the terminal cannot spell ends no run
    config = parse(config_class, argv)
    script = f"{stage.__name__}.py"
    afterwards = getattr(config, "afterwards", "")
    if config.overwrite and not afterwards:
        afterwards = f"without --overwrite goes on from what is in {config.out}"
    # Any process may find no place for itself, and each says so. From then on the first one of
    # each machine speaks for all.
    with errors_in_one_sentence(script, config.out):
        place = read_place()
    speaks = place.local_rank == 0
    # The main thread reports a full disk; TensorBoard's need not print a traceback as well.
    threading.excepthook = report_but_for_full_disk
    try:
        with (contextlib.ExitStack() as resources,
              errors_in_one_sentence(script, config.out, speaks, afterwards)):
            stage(config, start(config, place), resources)
    except torch.OutOfMemoryError:
        sys.exit(f"{script}: the GPU has too little memory: leave it to this run alone, take a "
                 "larger one, or, as far as this script can, a smaller --batch-size or "
                 "--micro-batch, or more GPUs")
    except RuntimeError as error:
        if "gloo/transport" not in str(error) and "closed by peer" not in str(error):
            raise
        # A collective call failed.
        if "Timed out" in str(error):
            sys.exit(f"{script}: waited for another process in vain: {last_line(error)}")
        sys.exit(1)  # the process that failed first says why
    finally:
        threading.excepthook = threading.__excepthook__
        if dist.is_initialized():
            dist.destroy_process_group()


def start(config: RunConfig, place: Place = ALONE) -> "Compute":
    """Join the processes that torchrun started, or be the only one."""
    rank, world_size, local_rank, local_world_size = place
    cuda = torch.cuda.is_available()
    gpus_needed = max(local_rank + 1, local_world_size)
    if cuda and gpus_needed > torch.cuda.device_count():
        raise DataError(f"{gpus_needed} processes on this machine are too many for its "
                        f"{torch.cuda.device_count()} GPUs")
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # nearly every batch has the same shape
    if world_size > 1:
        timeout = getattr(config, "timeout", timedelta(minutes=30))
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
        except (dist.DistError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"the {world_size} processes did not meet at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT): {reason}") from None
    precision = config.precision
    if precision == "auto":
        precision = _fastest_precision(cuda, getattr(config, "bf16_on_cpu", False))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    threads = config.threads or max(1, min(8, len(os.sched_getaffinity(0)) // local_world_size))
    compute = Compute(rank, world_size, device, precision, threads)
    if not compute.all_agree(precision):
        raise DataError(f"--precision {config.precision} is {precision} here and another one in "
                        "other processes: give all of them the same")
    return compute


def _fastest_precision(cuda: bool, bf16_on_cpu: bool) -> str:
    """bf16 where GPU or processor computes in it, and does not only imitate it."""
    if cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    instructions = Path("/proc/cpuinfo").read_text().split() if bf16_on_cpu else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(instructions) else "fp32"


# --------------------------------------------------------------------------------------------------
# Where it computes.

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
                    threads=self.threads)

    def without_others(self) -> "Compute":
        """The same device for work that one process does while the others wait."""
        return dataclasses.replace(self, rank=0, world_size=1)

    def say(self, *words) -> None:
        """Print, once for all processes."""
        if self.rank == 0:
            print(*words, flush=True)

    def send(self, x: Tensor) -> Tensor:
        """A CPU tensor on the device. From pinned memory, so that this process does not wait."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.cuda else x

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, or another `op`; in place, and returned."""
        if self.world_size > 1:
            dist.all_reduce(x, op)
        return x

    def all_agree(self, text: str) -> bool:
        """Whether all processes have the same text."""
        number = zlib.crc32(text.encode())
        smallest = self.reduce(torch.tensor(number), dist.ReduceOp.MIN)
        return bool(smallest == self.reduce(torch.tensor(number), dist.ReduceOp.MAX))

    def to_device(self, net: nn.Module) -> Any:
        """A network on this process's device, with batch norm over the images of all processes."""
        if self.world_size > 1:
            SyncBatchNorm.replace_in(net)
        net = net.to(device=self.device)
        # The images may stay as they are: with one channel, both layouts are the same.
        return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def data_parallel(self, net: Any) -> Any:
        """The network for the training step: backward() averages gradients over all processes."""
        if self.world_size == 1:
            return net
        model = DistributedDataParallel(
            net, device_ids=[self.device.index] if self.cuda else None,
            gradient_as_bucket_view=True)
        # Batch norm's statistics are the same everywhere: do not broadcast them every step. Set
        # afterwards, because as an argument it would also stop the broadcast at the start.
        model.broadcast_buffers = False
        return model

    def rehearse(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        """A first backward pass, on zeros of this shape, which changes nothing.

        After its first one DistributedDataParallel puts the gradients into other buckets, and in
        other buckets a sum over three or more processes rounds otherwise. With this before the
        first step of every start, a run that goes on has the buckets of one without a stop."""
        if self.world_size == 1:
            return
        parameter = next(model.parameters())
        x = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        with unchanged_statistics(model):
            with self.autocast():
                y = model(x)
            y.float().sum().backward()
            model.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------
# For the loop of a stage.

def warmup_and_cosine(step: int, total_steps: int, warmup_steps: float, peak: float = 1.0) -> float:
    """Linear warm-up to `peak`, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / math.ceil(warmup_steps)
    angle = math.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (1 + math.cos(angle)) / 2


class StopSignal:
    """SIGTERM and SIGINT, remembered until the run has come to a good moment to leave.

    A signal often comes twice, from the cluster and from torchrun; the second one must
    not end the process while it saves."""

    def __init__(self, resources: contextlib.ExitStack):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, self._remember)
            resources.callback(signal.signal, number, before)

    def _remember(self, number, frame) -> None:
        self.number = number

    def received(self, compute: Compute, ask: bool) -> int:
        """The signal that some process has received, or 0: the same answer on all of them, so
        that they leave at the same step. Without `ask`, several processes have heard nothing."""
        if compute.world_size > 1 and not ask:
            return 0
        return int(compute.reduce(torch.tensor(self.number), dist.ReduceOp.MAX))
