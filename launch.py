"""How the script of a stage begins and ends: its flags, its processes, its errors.

A stage is a Config, which is a dataclass of its flags, and a function `stage(config, compute,
resources)`, which `main` calls.
"""
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from common import (  # before PyTorch: it answers Ctrl-C while that loads
    ALONE, DataError, Place, begin_script, errors_in_one_sentence, read_place)

import torch
import torch.distributed as dist

from checkpoint import last_line
from flags import RunConfig, parse
from run import Compute
from run_folder import report_but_for_full_disk

# How long a process waits for another one in a collective call.
TIMEOUT = timedelta(minutes=30)


def main(stage: Callable, config_class: type, argv: list[str] | None = None, *,
         bf16_on_cpu: bool = False, timeout: timedelta = TIMEOUT, afterwards: str = "") -> None:
    """Run `stage(config, compute, resources)`. Errors that the user can mend end the script with
    one sentence.

    resources: an ExitStack; what the stage enters there is closed however the run ends.
    bf16_on_cpu: whether --precision auto may be bf16 on a CPU. Stages that predict leave it False,
        because probabilities should not depend on the machine.
    timeout: how long a process waits for another one in a collective call.
    afterwards: what the same command does after Ctrl-C, if it does not resume."""
    begin_script()
    config = parse(config_class, argv)
    script = f"{stage.__name__}.py"
    if config.overwrite and not afterwards:
        afterwards = f"without --overwrite goes on from what is in {config.out}"
    # Each process reports wrong variables of torchrun. Later a machine's first process speaks.
    with errors_in_one_sentence(script, config.out):
        place = read_place()
    speaks = place.local_rank % place.local_world_size == 0  # all, if LOCAL_WORLD_SIZE is not set
    # The main thread reports a full disk in one sentence. TensorBoard's thread meets the same error
    # and must not print a traceback.
    threading.excepthook = report_but_for_full_disk
    try:
        with (contextlib.ExitStack() as resources,
              errors_in_one_sentence(script, config.out, speaks, afterwards)):
            stage(config, start(config, place, bf16_on_cpu, timeout), resources)
    except torch.OutOfMemoryError:
        sys.exit(f"{script}: the GPU has too little memory: leave it to this run alone, take a "
                 "larger one, or, as far as this script can, a smaller --batch-size or "
                 "--micro-batch, or more GPUs")
    except RuntimeError as error:
        if "gloo/transport" not in str(error) and "closed by peer" not in str(error):
            raise
        # A collective call of gloo failed: another process hangs, or has ended and reported why.
        if "Timed out" in str(error):
            sys.exit(f"{script}: waited for another process in vain: {last_line(error)}")
        sys.exit(1)
    finally:
        threading.excepthook = threading.__excepthook__
        if dist.is_initialized():
            dist.destroy_process_group()


def start(config: RunConfig, place: Place = ALONE, bf16_on_cpu: bool = False,
          timeout: timedelta = TIMEOUT) -> Compute:
    """Join the processes that torchrun started, or be the only process. DataError if there are
    fewer GPUs than processes, or if the processes do not meet or differ in precision."""
    rank, world_size, local_rank, local_world_size = place
    cuda = torch.cuda.is_available()
    gpus_needed = max(local_rank + 1, local_world_size)  # the latter is 1 if not set
    if cuda and gpus_needed > torch.cuda.device_count():
        raise DataError(f"{gpus_needed} processes on this machine are too many for its "
                        f"{torch.cuda.device_count()} GPUs")
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # nearly every batch has the same shape
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
        precision = _fastest_precision(cuda, bf16_on_cpu)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    threads = config.threads or max(1, min(8, len(os.sched_getaffinity(0)) // local_world_size))
    compute = Compute(rank, world_size, device, precision, threads)
    if not compute.all_agree(precision):
        raise DataError(f"--precision {config.precision} is {precision} here and another one in "
                        "other processes: give all of them the same")
    return compute


def _fastest_precision(cuda: bool, bf16_on_cpu: bool) -> str:
    """bf16 if the GPU or the processor has it in hardware."""
    if cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    instructions = Path("/proc/cpuinfo").read_text().split() if bf16_on_cpu else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(instructions) else "fp32"
