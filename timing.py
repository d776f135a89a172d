"""How bench.py takes the time, and where its figures go: to the terminal, and to --json FILE."""
import contextlib
import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import __version__ as dali_version

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LINES: list[dict[str, Any]] = []        # every figure of this run


def seconds(work: Callable, clock: Callable = time.perf_counter) -> float:
    """How long a call takes; the GPU's work is waited for."""
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def median_seconds(work: Callable, repeats: int, clock: Callable = time.perf_counter) -> float:
    """Median of `repeats` calls, after one that warms up."""
    return float(np.median([seconds(work, clock) for _ in range(repeats + 1)][1:]))


def peak_mib(work: Callable) -> float:
    """The most memory that `work` needs at any moment, beyond what is in use before."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)                    # what was freed goes back to Linux, ...
    Path("/proc/self/clear_refs").write_text("5")       # ... which forgets the peak so far
    before = resident_kib("VmRSS")
    work()
    return (resident_kib("VmHWM") - before) / 2**10


def resident_kib(name: str) -> int:
    """The process's memory by Linux: VmRSS is that of now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def report(part: str, unit: str, figures: dict[str, float]) -> None:
    """Print a line for each contender; the ratio is to the first one, which is ours."""
    ours = next(iter(figures.values()))
    for name, figure in figures.items():
        print(f"{part:8s} {name:36s} {figure:10.2f} {unit}   {figure / ours:6.2f} x ours",
              flush=True)
        LINES.append({"part": part, "contender": name, "figure": figure, "unit": unit,
                      "ratio": figure / ours})


def machine() -> dict[str, str | int]:
    """What a figure depends on beside the program's flags: hardware, versions, commit."""
    def answer(*command: str) -> str:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(command, cwd=Path(__file__).parent, text=True,
                                           stderr=subprocess.DEVNULL).strip()
        return ""

    models = [line.split(":")[1].strip() for line in answer("cat", "/proc/cpuinfo").splitlines()
              if line.startswith("model name")]
    commit = answer("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = " with changes" if answer("git", "status", "--porcelain", "-uno") else ""
    return {"gpu": torch.cuda.get_device_name() if CUDA else "none",
            "processor": models[0] if models else platform.processor(),
            "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda) if CUDA else "none", "dali": dali_version,
            "commit": commit + changed, "date": str(date.today())}
