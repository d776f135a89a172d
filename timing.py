"""How bench.py takes the time, and where its figures go: to the terminal, and to --json FILE."""
import contextlib
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


def median_seconds(work: Callable, repeats: int, clock: Callable = time.perf_counter) -> float:
    """Median of `repeats` calls, after one that warms up; the GPU's work is waited for."""
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return float(np.median(seconds[1:]))


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
