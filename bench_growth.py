"""The parts of bench.py on what grows: `manifest` with the images, `scaling` with the processes.
"""
import argparse
import csv
import io
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.multiprocessing.spawn import spawn

import phantom
from archive import write_archive
from common import DataError, write_text
from dali_pipeline import Preprocessing, train_loader
from loss import nt_xent
from manifest import read_manifest
from manifest_csv import SPLITS
from model import SimCLR, build_encoder
from syncbn import SyncBatchNorm
from timing import median_seconds, report
from views import Augmentation


# --------------------------------------------------------------------------------------------------
# The start of a run: a manifest of a million rows.

def write_large_folder(folder: Path, rows: int) -> None:
    """A data folder of `rows` images, three of each patient and a thousand in each subfolder.

    All are one JPEG: a file system allows tens of thousands of names for one file."""
    jpeg = io.BytesIO()
    Image.fromarray(phantom.phantom(0, 1, 0, 64)).save(jpeg, "JPEG", quality=50)
    cells = np.random.default_rng(0).choice(["1", "0", "-1", ""], (997, 14))
    labels = [",".join(row) for row in cells.tolist()]
    with open(folder / "manifest.csv", "w") as table:
        table.write(f"path,patient,split,{','.join(f'label {i}' for i in range(14))}\n")
        for i in range(rows):
            path, patient = f"images/{i // 1000:04d}/{i:08d}.jpg", i // 3
            if i % 1000 == 0:
                (folder / path).parent.mkdir(parents=True)
            if i % 20_000 == 0:
                first = folder / path
                first.write_bytes(jpeg.getvalue())
            else:
                os.link(first, folder / path)
            split = SPLITS[patient % 3]
            table.write(f"{path},p{patient:07d},{split},{labels[i % 997]}\n")


class Start(NamedTuple):
    """What a process needs from its first line to its first batch."""
    reading: float      # seconds of a core, of the manifest alone
    batch: float        # seconds, with the first batch of 64 pairs
    megabytes: float    # the most that the process held, with all libraries


def start_ours(folder: Path) -> Start:
    """By the project's own functions, in a process of its own."""
    start, start_core = time.perf_counter(), time.process_time()
    manifest = read_manifest(folder)
    reading = time.process_time() - start_core
    next(iter(train_loader(
        manifest, manifest.images("train"), 64, range(9), views=2, augmentation=Augmentation(),
        preprocessing=Preprocessing(64), seed=0, device="cpu")))
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0])            # kB
    return Start(reading, time.perf_counter() - start, peak / 1000)


def start_written_out(folder: Path) -> float:
    """Seconds of a core of the loop that one would write to read and check the same table."""
    start = time.process_time()
    paths, labels, split_of = set(), [], {}
    with open(folder / "manifest.csv", newline="") as table:
        for row in csv.DictReader(table):
            path, patient, split, *cells = row.values()
            if not (folder / path).is_file() or path in paths:
                raise DataError(path)
            if split_of.setdefault(patient, split) != split:
                raise DataError(patient)
            paths.add(path)
            labels.append([float(cell) if cell else np.nan for cell in cells])
    np.array(labels)
    return time.process_time() - start


def bench_manifest(args: argparse.Namespace, folder: Path) -> None:
    """From nothing to the first batch of a folder of --rows images, as files and as images.tar."""
    write_large_folder(folder, args.rows)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        files = processes.apply(start_ours, [folder])
        written_out = processes.apply(start_written_out, [folder])
        manifest = read_manifest(folder)
        write_archive(folder, manifest.paths, manifest.path_bytes)
        packed = processes.apply(start_ours, [folder])
    rows = f"{args.rows:,} rows"
    report("manifest", f"s of a core, {rows} read and checked", {
        "manifest.py": files.reading, "manifest.py, images.tar": packed.reading,
        "csv.DictReader and a loop": written_out})
    report("manifest", f"s, {rows} to the first batch", {
        "files": files.batch, "images.tar": packed.batch})
    report("manifest", f"MB, {rows}", {
        "files": files.megabytes, "images.tar": packed.megabytes})


# --------------------------------------------------------------------------------------------------
# Scaling: what the processes tell each other.

class Traffic:
    """Counts what PyTorch's collective calls move to each process, while it is entered."""

    def __init__(self):
        self.calls, self.bytes = 0, 0.0

    def __enter__(self) -> "Traffic":
        self.originals = dist.all_gather, dist.all_reduce
        others = dist.get_world_size() - 1

        def gather(tensors, own, *rest, **options):
            self.calls, self.bytes = self.calls + 1, self.bytes + others * own.nbytes
            return self.originals[0](tensors, own, *rest, **options)

        def reduce(own, *rest, **options):      # around a ring, once to add and once to tell
            self.calls += 1
            self.bytes += 2 * others / (others + 1) * own.nbytes
            return self.originals[1](own, *rest, **options)

        dist.all_gather, dist.all_reduce = gather, reduce
        return self

    def __exit__(self, *error) -> None:
        dist.all_gather, dist.all_reduce = self.originals


class Exchange(NamedTuple):
    """What one step's loss, or its batch norm, costs a process."""
    milliseconds: float
    kilobytes: float
    calls: int


def exchanges(rank: int, processes: int, folder: Path, args: argparse.Namespace) -> None:
    """Measure both as one of the processes, and leave the first one's figures in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{processes}", rank=rank,
                            world_size=processes)
    z = torch.randn(2, args.batch_size, 128, requires_grad=True)

    def loss():
        nt_xent(z[0], z[1], 0.07).backward()

    # All norms of the network, each on few pixels: what is left is the exchange.
    encoder = build_encoder(args.arch)
    SyncBatchNorm.replace_in(encoder)
    norms = [module for module in encoder.modules() if isinstance(module, SyncBatchNorm)]

    def batch_norm():
        for norm in norms:
            norm(torch.randn(4, norm.num_features, 2, 2, requires_grad=True)).sum().backward()

    figures = []
    for work in (loss, batch_norm):
        seconds = median_seconds(work, args.repeats)
        with Traffic() as traffic:
            work()
        figures.append(Exchange(1000 * seconds, traffic.bytes / 1000, traffic.calls))
    if rank == 0:
        write_text(folder / f"{processes}.json", json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def bench_scaling(args: argparse.Namespace, folder: Path) -> None:
    """Time and traffic of a step's loss and batch norm on 1, 2 and 4 processes of this machine."""
    measured = {}
    for processes in (1, 2, 4):
        spawn(exchanges, (processes, folder, args), processes)
        figures = json.loads((folder / f"{processes}.json").read_text())
        measured[f"{processes} process" + "es" * (processes > 1)] = [
            Exchange(*figure) for figure in figures]
    for place, what in enumerate((f"loss, {args.batch_size} pairs a process",
                                  f"batch norm of a {args.arch}")):
        of_one = {name: figures[place] for name, figures in measured.items()}
        report("scaling", f"ms, {what}", {n: x.milliseconds for n, x in of_one.items()})
        others = {name: exchange for name, exchange in of_one.items() if exchange.kilobytes}
        report("scaling", f"kB to each process, {what}",
               {f"{n}, {x.calls} calls": x.kilobytes for n, x in others.items()})
    for gpus in (8, 64):
        report("scaling", f"ms a step, {gpus} GPUs, on paper", on_paper(args, gpus))


# Assumed, not measured: bytes a second that a GPU sends while it receives as many, and
# seconds that a collective call takes beside.
NVLINK, NVLINK_CALL = 300e9, 20e-6          # one machine of 8 GPUs
INFINIBAND, INFINIBAND_CALL = 40e9, 60e-6   # a 400 Gbit/s adapter for each GPU


def on_paper(args: argparse.Namespace, gpus: int) -> dict[str, float]:
    """Milliseconds of a step and of its exchanges on so many GPUs with --batch-size pairs each.

    Nobody computes during the exchanges of the loss and of batch norm. The gradients' overlap
    with the backward pass, two thirds of a step, but for the last bucket of 25 MB."""
    speed, call = (NVLINK, NVLINK_CALL) if gpus <= 8 else (INFINIBAND, INFINIBAND_CALL)
    net = SimCLR(build_encoder(args.arch))
    share = (gpus - 1) / gpus
    # Bytes of a process: its projections, its images' patients, two numbers of each anchor.
    exchanged = args.batch_size * (2 * 128 * 4 + 8 + 2 * 2 * 4)
    channels = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    loss = 3 * call + (gpus - 1) * exchanged / speed
    norms = sum(2 * call + 2 * c * 4 * (gpus - 1 + 2 * share) / speed for c in channels)
    gradients = 2 * share * sum(p.numel() for p in net.parameters()) * 4 / speed
    last = 2 * share * 25e6 / speed
    exposed = max(last, gradients - 2 / 3 * args.step_ms / 1000)
    total = args.step_ms / 1000 + loss + norms + exposed
    return {name: 1000 * seconds for name, seconds in {
        "step on one GPU (--step-ms)": args.step_ms / 1000, "loss": loss, "batch norm": norms,
        "gradients that nothing hides": exposed, "step": total}.items()}
