"""What each part of the program costs, beside what one would write without it.

    python bench.py                                     the parts that take seconds
    python bench.py step fed --arch resnet18 --size 64  these parts
    python bench.py manifest --json manifest.json       and the figures in a file
    python bench.py memory --batch-size 256             GiB that a GPU needs for 256 pairs

The contenders of a part do the same work in the same run, so that their ratio holds on
other machines too. Parts that take minutes run where they are named.
"""
import argparse
import contextlib
import csv
import ctypes
import io
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import launch  # first: it answers Ctrl-C while PyTorch loads
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nvidia.dali import __version__ as dali_version
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import phantom
import prepare
import pretrain
from archive import write_archive
from checkpoint import ARCHITECTURES
from common import DataError, write_text
from dali_pipeline import Loader, Preprocessing, train_loader
from flags import number_within
from labels import draw
from loss import nt_xent
from manifest import Manifest, read_manifest
from manifest_csv import SPLITS
from model import MEAN, STD, SimCLR, build_encoder
from probe import STRENGTHS, fit_logistic
from radiograph import ImageSettings, read_image
from syncbn import SyncBatchNorm
from views import Augmentation

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GPU_PAIRS = 64, 256                     # for `step` on a GPU, whatever --batch-size is
BATCHES = 8                             # loaded between two looks at the clock
TEMPERATURE = 0.07
LINES: list[dict[str, Any]] = []        # every figure of this run


# --------------------------------------------------------------------------------------------------
# Measuring time and memory, and collecting the figures.

def seconds(work: Callable, clock: Callable = time.perf_counter) -> float:
    """How long a call takes, including the GPU's work."""
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def median_seconds(work: Callable, repeats: int, clock: Callable = time.perf_counter) -> float:
    """The median of `repeats` calls, after one call to warm up."""
    return float(np.median([seconds(work, clock) for _ in range(repeats + 1)][1:]))


def peak_mib(work: Callable) -> float:
    """The peak memory that `work` needs, beyond what is in use before."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)                    # return freed memory to Linux, ...
    Path("/proc/self/clear_refs").write_text("5")       # ... and make it forget the peak so far
    before = resident_kib("VmRSS")
    work()
    return (resident_kib("VmHWM") - before) / 2**10


def resident_kib(name: str) -> int:
    """The process's memory as Linux counts it: VmRSS is the current amount, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_gib() -> float:
    """The peak of PyTorch's memory on the GPU since the last call; 0 without a GPU."""
    if not CUDA:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def report(part: str, unit: str, figures: dict[str, float]) -> None:
    """Print a line for each contender. The first one is the project's own."""
    own = next(iter(figures.values()))
    for name, figure in figures.items():
        print(f"{part:8s} {name:36s} {figure:10.2f} {unit}   {figure / own:6.2f} x ours",
              flush=True)
        LINES.append({"part": part, "contender": name, "figure": figure, "unit": unit,
                      "ratio": figure / own})


def machine() -> dict[str, str | int]:
    """What a figure depends on besides the program's flags: hardware, versions, commit."""
    def answer(*command: str) -> str:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(command, cwd=Path(__file__).parent, text=True,
                                           stderr=subprocess.DEVNULL).strip()
        return ""

    processors = Path("/proc/cpuinfo").read_text()
    models = [line.split(":")[1].strip() for line in processors.splitlines()
              if line.startswith("model name")]
    commit = answer("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = " with changes" if answer("git", "status", "--porcelain", "-uno") else ""
    return {"gpu": torch.cuda.get_device_name() if CUDA else "none",
            "processor": models[0] if models else platform.processor(),
            "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda) if CUDA else "none", "dali": dali_version,
            "commit": commit + changed, "date": str(date.today())}


# --------------------------------------------------------------------------------------------------
# Stage 0.

def bench_prepare(args: argparse.Namespace, folder: Path) -> None:
    """1024 x 1024 PNG -> 256-pixel JPEG: processor time per image, on one core."""
    files = [folder / f"{patient}.png" for patient in range(8)]
    for patient, file in enumerate(files):
        Image.fromarray(phantom.phantom(0, patient, 0, 1024)).save(file)
    items = [prepare.Item(file.name, f"{file.stem}.jpg", "", "", ()) for file in files]
    conversion = prepare.Conversion(read_image, folder, folder / "out", ImageSettings())

    def convert():
        for item in items:
            assert not prepare.convert(item, conversion)

    def loop():
        for file in files:
            with Image.open(file) as image:
                small = image.convert("L").resize((256, 256), Image.Resampling.LANCZOS)
                small.save(io.BytesIO(), "JPEG", quality=95)

    def decode():
        for file in files:
            Image.open(file).load()

    contenders = {"prepare.py": convert, "a loop over Pillow": loop, "decoding alone": decode}
    report("prepare", "ms an image", {
        name: 1000 * median_seconds(work, args.repeats, time.process_time) / len(files)
        for name, work in contenders.items()})


# --------------------------------------------------------------------------------------------------
# Loader.

def demo_folder(args: argparse.Namespace, folder: Path) -> Manifest:
    """A data folder of drawn radiographs, four images of each patient."""
    patients = max(8, args.batch_size // 2)
    with contextlib.redirect_stdout(None):
        prepare.main(["demo", "--out", str(folder), "--patients", str(patients)])
    return read_manifest(folder)


def dali_loader(args: argparse.Namespace, manifest: Manifest) -> Loader:
    """An endless loader with the default views; float32, as in pre-training."""
    return train_loader(
        manifest, np.arange(len(manifest.paths)), args.batch_size, steps=range(10**6), views=2,
        augmentation=Augmentation(), preprocessing=Preprocessing(args.size), seed=0,
        device=DEVICE, threads=args.threads)


def written_well(args: argparse.Namespace, manifest: Manifest) -> DataLoader:
    """The same views by torchvision, written as well as possible: gray tensors, a short blur, and
    an endless loader. Its data set is only the order of the images; the workers load them in
    collate_fn."""
    recipe = Augmentation()
    transform = v2.Compose([
        v2.RandomResizedCrop(args.size, recipe.crop_area, antialias=True),
        v2.RandomHorizontalFlip(recipe.flip),
        v2.RandomRotation((-recipe.rotation, recipe.rotation), v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(recipe.brightness, recipe.contrast),
        v2.GaussianBlur(13, recipe.blur),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([MEAN], [STD])])
    files = [str(manifest.folder / path) for path in manifest.paths]

    def batch(indices: list[int]) -> list[Tensor]:
        images = [decode_image(files[i], ImageReadMode.GRAY) for i in indices]
        return [torch.stack([transform(image) for image in images]) for _ in range(2)]

    order = np.random.default_rng(0).integers(len(files), size=10**6).tolist()
    return DataLoader(order, args.batch_size, num_workers=args.threads, collate_fn=batch)


def images_per_second(args: argparse.Namespace, loader: Loader | DataLoader) -> float:
    batches = iter(loader)

    def load():
        for _ in range(BATCHES):
            next(batches)

    return BATCHES * args.batch_size / median_seconds(load, args.repeats)


def bench_loader(args: argparse.Namespace, folder: Path) -> None:
    """Two augmented views of each JPEG, ready for the network."""
    manifest = demo_folder(args, folder)
    figures = {"dali_pipeline.py": images_per_second(args, dali_loader(args, manifest))}
    write_archive(folder, manifest.paths, manifest.path_bytes)
    packed = read_manifest(folder)
    figures["the same from images.tar"] = images_per_second(args, dali_loader(args, packed))
    peer = written_well(args, manifest)
    figures["torchvision v2, written well"] = images_per_second(args, peer)
    report("loader", "images/s", figures)


# --------------------------------------------------------------------------------------------------
# Loss.

def with_patients(z1: Tensor, z2: Tensor) -> Tensor:
    """Each patient has two images in the batch, which are not each other's negatives."""
    return nt_xent(z1, z2, TEMPERATURE, torch.arange(len(z1), device=z1.device) // 2)


def written_out(z1: Tensor, z2: Tensor) -> Tensor:
    """Equation 1 of SimCLR as most people write it; z1, z2 (N, D)."""
    anchors = F.normalize(torch.cat([z1, z2]), dim=1)                   # (2N, D)
    logits = (anchors @ anchors.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(anchors), device=z1.device).roll(len(z1)))


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The contenders, among them lightly's loss if lightly is installed."""
    contenders = {"loss.py": lambda z1, z2: nt_xent(z1, z2, TEMPERATURE),
                  "loss.py, with patients": with_patients,
                  "cross-entropy, written out": written_out}
    with contextlib.suppress(ImportError):
        from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]
        contenders["lightly's NTXentLoss"] = NTXentLoss(TEMPERATURE)
    return contenders


def bench_loss(args: argparse.Namespace, folder: Path) -> None:
    """Forward and backward of NT-Xent on 128-d projections: time, on a CPU the sum over all cores,
    and peak memory for the largest number of pairs."""
    contenders, order = losses(), np.random.default_rng(0)
    clock = time.perf_counter if CUDA else time.process_time
    for pairs in args.pairs:
        z1, z2 = (torch.randn(pairs, 128, device=DEVICE, requires_grad=True) for _ in range(2))

        def work(name, z1=z1, z2=z2):
            z1.grad = z2.grad = None
            contenders[name](z1, z2).backward()

        # The contenders take turns in a new random order each time, because each leaves its traces
        # in the caches. A small batch gets more turns; the first turn warms up. On a CPU, the
        # process's own clock does not count the time that other processes take.
        turns = {name: [] for name in contenders}
        for _ in range(1 + args.repeats * max(1, 2048 // pairs)):
            for name in order.permutation(list(contenders)):
                turns[name].append(seconds(lambda name=name: work(name), clock))
        report("loss", f"ms, {pairs} pairs", {
            name: 1000 * float(np.median(turn[1:])) for name, turn in turns.items()})
        if pairs == max(args.pairs):
            report("loss", f"MiB, {pairs} pairs", {
                name: peak_mib(lambda name=name: work(name)) for name in contenders})


# --------------------------------------------------------------------------------------------------
# Training step: everything that pretrain.py does with a batch.

@dataclass(frozen=True)
class Way:
    """How a step is computed."""
    name: str
    precision: str = "auto"
    optimizer: str = "lars"
    compiled: bool = False
    layout: torch.memory_format = torch.channels_last
    stem: str = ""      # one of STEMS, or the encoder's own


# Other ways to compute the stem: a GPU's kernels may not suit its single channel.
STEMS = ("4 channels", "8 channels", "2 x 2 blocks")


class Stem(nn.Module):
    """The one-channel stem with the same weights and output, computed in another way.

    x (B, 1, S, S), S even, -> (B, C, S / 2, S / 2). Additional channels are zeros. With 2 x 2
    blocks, each block of pixels becomes one pixel of four channels, and the 7 x 7 kernel of stride
    2 becomes one of 4 x 4 blocks and stride 1."""

    def __init__(self, convolution: nn.Conv2d, form: str):
        super().__init__()
        self.weight, self.form = convolution.weight, form               # (C, 1, 7, 7)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "2 x 2 blocks":
            # The kernel begins at an odd pixel, three before the centre. With a row and a column of
            # zeros before it, it covers whole blocks: two before the centre's and one after it.
            weight = F.pixel_unshuffle(F.pad(self.weight, (1, 0, 1, 0)), 2)     # (C, 4, 4, 4)
            x = F.pad(F.pixel_unshuffle(x, 2), (2, 1, 2, 1))
            return F.conv2d(x.contiguous(memory_format=torch.channels_last), weight)
        zeros = (0, 0, 0, 0, 0, int(self.form.split()[0]) - 1)
        x = F.pad(x, zeros).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, F.pad(self.weight, zeros), stride=2, padding=3)


def ways(args: argparse.Namespace) -> list[Way]:
    """The ways to compare on this machine; the first is pretrain.py's default."""
    default = launch.start(pretrain.Config(), bf16_on_cpu=True).precision
    other = [precision for precision in ("bf16", "fp16", "fp32")
             if precision != default and (CUDA or precision != "fp16")]     # no CPU trains in fp16
    compiled = [Way("compiled", compiled=True)] if CUDA or args.compile else []
    if CUDA:
        compiled.append(Way("compiled, fp16", "fp16", compiled=True))
    return [Way("default"), *compiled, *(Way(precision, precision) for precision in other),
            Way("adamw", optimizer="adamw"), Way("contiguous", layout=torch.contiguous_format),
            *(Way(f"stem of {stem}", stem=stem) for stem in STEMS)]


class Step:
    """A training step of pretrain.py, with its own network, optimizer and scaler."""

    def __init__(self, args: argparse.Namespace, folder: Path, way: Way, pairs: int):
        config = pretrain.Config(arch=args.arch, image_size=args.size, batch_size=pairs,
                                 optimizer=way.optimizer, precision=way.precision,
                                 threads=args.threads, out=str(folder))
        self.compute = launch.start(config, bf16_on_cpu=True)
        self.training, self.way = pretrain.build(config, self.compute), way
        net: Any = self.training.net.to(memory_format=way.layout)   # pyright: ignore
        if way.stem:
            net.encoder.conv1 = Stem(net.encoder.conv1, way.stem)
        self.model = torch.compile(net) if way.compiled else net
        self.patients = torch.arange(pairs, device=DEVICE)      # one image each

    def __call__(self, view1: Tensor, view2: Tensor) -> None:
        """view1, view2: (N, 1, S, S)."""
        x = torch.cat([view1, view2]).contiguous(memory_format=self.way.layout)
        with self.compute.autocast():
            z1, z2 = self.model(x).chunk(2)                             # (N, 128) each
        scaler, optimizer = self.training.scaler, self.training.optimizer
        scaler.scale(nt_xent(z1, z2, TEMPERATURE, self.patients)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def bare(self, view1: Tensor, view2: Tensor) -> None:
        """The encoder's forward and backward pass alone, on the same images."""
        x = torch.cat([view1, view2]).contiguous(memory_format=self.way.layout)
        with self.compute.autocast():
            features = self.training.net.encoder(x)
        features.float().sum().backward()
        self.training.optimizer.zero_grad(set_to_none=True)


def noise(args: argparse.Namespace, pairs: int) -> tuple[Tensor, ...]:
    """Noise instead of both views of a batch, (N, 1, S, S) each."""
    return torch.randn(2 * pairs, 1, args.size, args.size, device=DEVICE).chunk(2)


def pairs_per_second(args: argparse.Namespace, step: Callable, pairs: int,
                     batches: Iterator) -> float:
    """The speed of a step with `pairs` pairs. batches: two views each, endless."""
    steps = BATCHES if CUDA else 1          # a step takes seconds on a CPU

    def several():
        for view1, view2, *_ in itertools.islice(batches, steps):
            step(view1, view2)

    return steps * pairs / median_seconds(several, args.repeats)


def bench_step(args: argparse.Namespace, folder: Path) -> None:
    """Whole steps on noise, with other precisions, optimizers, compilation and stems; and the bare
    encoder for comparison."""
    for pairs in GPU_PAIRS if CUDA else (args.batch_size,):
        same, speeds, memory = itertools.repeat(noise(args, pairs)), {}, {}
        for way in ways(args):
            step = Step(args, folder, way, pairs)
            contenders: dict[str, Callable] = {f"{way.name} ({step.compute.precision})": step}
            if way.name == "default":
                contenders["its encoder, bare"] = step.bare
            for name, work in contenders.items():
                peak_gib()
                speeds[name] = pairs_per_second(args, work, pairs, same)
                memory[name] = peak_gib()
            del step, contenders, work      # else the next way's memory would include theirs
        report("step", f"pairs/s, {args.arch}, {pairs} pairs", speeds)
        if CUDA:
            report("step", f"GiB, {args.arch}, {pairs} pairs", memory)


def bench_fed(args: argparse.Namespace, folder: Path) -> None:
    """Whole training steps, fed by the loader or with two views that are already on the device.

    If both are equally fast, the loader costs nothing."""
    step = Step(args, folder / "run", Way("default"), args.batch_size)
    batches = iter(dali_loader(args, demo_folder(args, folder / "data")))
    same = itertools.repeat(next(batches))
    contenders = {"fed by dali_pipeline.py": batches, "the same two views each time": same}
    report("fed", "pairs/s", {name: pairs_per_second(args, step, args.batch_size, views)
                              for name, views in contenders.items()})


# --------------------------------------------------------------------------------------------------
# GPU memory.

def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass in bf16 keeps for its backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    # Several operations save the same storage. All storages are kept alive, so that no address is
    # used twice.
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16):
        net(x)
    return sum(storage.nbytes() for address, storage in storages.items()
               if address not in parameters)


def computed_gib(args: argparse.Namespace) -> float:
    """GiB of a training step, from what the CPU's autograd saves for two and for four images.

    Parameters count three times in float32: themselves, gradients and LARS's momentum. Autocast's
    bf16 copies of them do not depend on the batch and stay in the constant part. Left out: cuDNN's
    workspaces, DALI's buffers and CUDA itself."""
    net = SimCLR(build_encoder(args.arch)).to(
        memory_format=torch.channels_last)      # pyright: ignore[reportCallIssue]
    two, four = (saved_bytes(net, torch.randn(n, 1, args.size, args.size).contiguous(
        memory_format=torch.channels_last)) for n in (2, 4))
    image = (four - two) / 2
    parameters = sum(p.numel() for p in net.parameters())
    return (two + image * (2 * args.batch_size - 2) + 3 * 4 * parameters) / 2**30


def bench_memory(args: argparse.Namespace, folder: Path) -> None:
    """GiB that --batch-size pairs need on one GPU, in bf16; also measured if there is a GPU."""
    figures = {f"{args.arch}, {args.batch_size} pairs, computed": computed_gib(args)}
    if CUDA:
        step = Step(args, folder, Way("default"), args.batch_size)
        views = noise(args, args.batch_size)
        peak_gib()
        for _ in range(3):
            step(*views)
        figures["measured"] = peak_gib()
    report("memory", "GiB", figures)


# --------------------------------------------------------------------------------------------------
# Linear probe.

def drawn_features(images: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 2048) like an encoder's, correlated and (before they are standardised) not
    negative; and labels (n, L) of 1 and 0, 1 to 32 % of them positive."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((images, 300)) * np.arange(1, 301) ** -0.5
    x = hidden @ rng.standard_normal((300, 2048))
    x = (x + 0.3 * rng.standard_normal((images, 2048))).clip(0)
    x = (x - x.mean(0)) / x.std(0)
    signal = hidden @ rng.standard_normal((300, labels))
    signal += rng.standard_normal((images, labels))
    shares = np.logspace(-2, -0.5, labels)
    thresholds = np.diag(np.quantile(signal, 1 - shares, axis=0))
    return x, (signal > thresholds).astype(float)


def bench_probe(args: argparse.Namespace, folder: Path) -> None:
    """Logistic regressions of 14 labels on ResNet-50 features, with all strengths of
    regularisation, on five draws each of 1, 10 and 100 %; measured once, without repeats.

    probe.py fits all labels and strengths of a draw together. scikit-learn fits them one by one;
    it is measured on two of the labels, and its time multiplied by 7."""
    labels, timed = 14, (3, 10)
    x, y = drawn_features(args.images, labels)
    patients = np.arange(args.images) // 3
    # At 100 % the five draws are the same.
    draws = {rows.tobytes(): rows for rows in (
        draw(patients, y, fraction, seed).rows
        for fraction in (0.01, 0.1, 1.0) for seed in range(5))}.values()

    def at_once():
        for rows in draws:
            targets, weights = torch.tensor(y[rows, :, None]), torch.ones(len(rows), labels)
            fit_logistic(torch.tensor(x[rows]), targets, weights.double(),
                         torch.tensor(STRENGTHS))

    def one_by_one():
        for rows, strength, label in itertools.product(draws, STRENGTHS, timed):
            model = LogisticRegression(C=1 / (len(rows) * strength), max_iter=1000)
            model.fit(x[rows], y[rows, label])

    report("probe", "s", {
        "probe.py, all at once": seconds(at_once),
        "scikit-learn, one by one": labels / len(timed) * seconds(one_by_one)})


# --------------------------------------------------------------------------------------------------
# The start of a run: a manifest of a million rows.

def write_large_folder(folder: Path, rows: int) -> None:
    """A data folder of `rows` images, three of each patient and a thousand in each subfolder.

    Groups of 20,000 are hard links to one JPEG: a file system limits the links to a file."""
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
    """What a process takes from its first line to its first batch."""
    reading: float      # seconds of a core, for the manifest alone
    batch: float        # seconds, including the first batch of 64 pairs
    megabytes: float    # the peak of the process, with all libraries


def first_batch(folder: Path) -> Start:
    """Measure the project's own functions, in a process of its own."""
    start, start_core = time.perf_counter(), time.process_time()
    manifest = read_manifest(folder)
    reading = time.process_time() - start_core
    next(iter(train_loader(
        manifest, manifest.images("train"), 64, range(9), views=2, augmentation=Augmentation(),
        preprocessing=Preprocessing(64), seed=0, device="cpu")))
    return Start(reading, time.perf_counter() - start, resident_kib("VmHWM") / 1000)


def loop_over_rows(folder: Path) -> float:
    """Seconds of a core for the obvious loop that reads and checks the same table."""
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
        files = processes.apply(first_batch, [folder])
        loop = processes.apply(loop_over_rows, [folder])
        manifest = read_manifest(folder)
        write_archive(folder, manifest.paths, manifest.path_bytes)
        packed = processes.apply(first_batch, [folder])
    rows = f"{args.rows:,} rows"
    report("manifest", f"s of a core, {rows} read and checked", {
        "manifest.py": files.reading, "manifest.py, images.tar": packed.reading,
        "csv.DictReader and a loop": loop})
    report("manifest", f"s, {rows} to the first batch", {
        "files": files.batch, "images.tar": packed.batch})
    report("manifest", f"MB, {rows}", {
        "files": files.megabytes, "images.tar": packed.megabytes})


# --------------------------------------------------------------------------------------------------
# Scaling: the traffic between processes.

class Traffic:
    """A context that counts the bytes PyTorch's collective calls move to each process."""

    def __init__(self):
        self.calls, self.bytes = 0, 0.0

    def __enter__(self) -> "Traffic":
        self.originals = dist.all_gather, dist.all_reduce
        others = dist.get_world_size() - 1

        def gather(tensors, own, *rest, **options):
            self.calls, self.bytes = self.calls + 1, self.bytes + others * own.nbytes
            return self.originals[0](tensors, own, *rest, **options)

        def reduce(own, *rest, **options):      # a ring: once to add, once to distribute
            self.calls += 1
            self.bytes += 2 * others / (others + 1) * own.nbytes
            return self.originals[1](own, *rest, **options)

        dist.all_gather, dist.all_reduce = gather, reduce
        return self

    def __exit__(self, *error) -> None:
        dist.all_gather, dist.all_reduce = self.originals


class Exchange(NamedTuple):
    """The cost of one step's loss, or of its batch norm, for a process."""
    milliseconds: float
    kilobytes: float
    calls: int


def exchanges(rank: int, processes: int, folder: Path, args: argparse.Namespace) -> None:
    """Measure loss and batch norm in one of the processes; the first one writes its figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{processes}", rank=rank,
                            world_size=processes)
    z = torch.randn(2, args.batch_size, 128, requires_grad=True)

    def loss():
        nt_xent(z[0], z[1], TEMPERATURE).backward()

    # All norms of the network, each on few pixels, so that little but the exchange remains.
    encoder = build_encoder(args.arch)
    SyncBatchNorm.replace_in(encoder)
    norms = [module for module in encoder.modules() if isinstance(module, SyncBatchNorm)]

    def batch_norm():
        for norm in norms:
            norm(torch.randn(4, norm.num_features, 2, 2, requires_grad=True)).sum().backward()

    figures = []
    for work in (loss, batch_norm):
        milliseconds = 1000 * median_seconds(work, args.repeats)
        with Traffic() as traffic:
            work()
        figures.append(Exchange(milliseconds, traffic.bytes / 1000, traffic.calls))
    if rank == 0:
        write_text(folder / f"{processes}.json", json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def bench_scaling(args: argparse.Namespace, folder: Path) -> None:
    """Time and traffic of a step's loss and batch norm with 1, 2 and 4 processes here."""
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
        report("scaling", f"kB to each process, {what}", {
            f"{n}, {x.calls} calls": x.kilobytes for n, x in of_one.items() if x.kilobytes})
    for gpus in (8, 64):
        report("scaling", f"ms a step, {gpus} GPUs, on paper", on_paper(args, gpus))


# Assumed, not measured: bytes per second that a GPU sends while it receives as many, and the
# latency of a collective call in seconds.
NVLINK, NVLINK_CALL = 300e9, 20e-6          # one machine of 8 GPUs
INFINIBAND, INFINIBAND_CALL = 40e9, 60e-6   # a 400 Gbit/s adapter for each GPU


def on_paper(args: argparse.Namespace, gpus: int) -> dict[str, float]:
    """Milliseconds of a step and of its exchanges on so many GPUs with --batch-size pairs each.

    Nothing is computed during the exchanges of the loss and of batch norm. Those of the gradients,
    except the last bucket of 25 MB, overlap with the backward pass, two thirds of a step."""
    speed, call = (NVLINK, NVLINK_CALL) if gpus <= 8 else (INFINIBAND, INFINIBAND_CALL)
    net = SimCLR(build_encoder(args.arch))
    share = (gpus - 1) / gpus
    # Bytes of a process: its projections, its images' patients, two numbers per anchor.
    exchanged = args.batch_size * (2 * 128 * 4 + 8 + 2 * 2 * 4)
    channels = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    loss = 3 * call + (gpus - 1) * exchanged / speed
    norms = sum(2 * call + 2 * c * 4 * (gpus - 1 + 2 * share) / speed for c in channels)
    gradients = 2 * share * sum(p.numel() for p in net.parameters()) * 4 / speed
    last = 2 * share * 25e6 / speed
    exposed = max(last, gradients - 2 / 3 * args.step_ms / 1000)
    total = args.step_ms / 1000 + loss + norms + exposed
    return {name: 1000 * duration for name, duration in {
        "step on one GPU (--step-ms)": args.step_ms / 1000, "loss": loss, "batch norm": norms,
        "gradients that nothing hides": exposed, "step": total}.items()}

# --------------------------------------------------------------------------------------------------
# The script.

class Part(NamedTuple):
    """What a part's name on the command line runs."""
    run: Callable[[argparse.Namespace, Path], None]
    takes_minutes: bool = False


PARTS = {
    "prepare": Part(bench_prepare), "loader": Part(bench_loader), "loss": Part(bench_loss),
    "memory": Part(bench_memory), "step": Part(bench_step, not CUDA),
    "fed": Part(bench_fed, not CUDA), "probe": Part(bench_probe, True),
    "manifest": Part(bench_manifest, True), "scaling": Part(bench_scaling, True)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    positive = number_within(int, 1, 10**8)
    slow = ", ".join(name for name, part in PARTS.items() if part.takes_minutes)
    parser.add_argument(
        "parts", nargs="*", metavar="PART",
        help=f"{', '.join(PARTS)} (default: all but {slow}, which take minutes)")
    flags: list[tuple[str, Any, Any, str]] = [
        ("--size", positive, 224, "side of a view, pixels"),
        ("--batch-size", number_within(int, 2, 10**6), 32,
         f"images, two views each; step on a GPU takes {' and '.join(map(str, GPU_PAIRS))}"),
        ("--threads", positive, None, "of the loaders (default: as pretrain.py)"),
        ("--repeats", positive, 5, "of which the median counts"),
        ("--images", positive, 10_000, "for probe"),
        ("--rows", positive, 10**6, "for manifest"),
        ("--step-ms", number_within(float, 0.1, 10**6), 25.6,
         "for scaling: what a step takes on one GPU, if there are no others"),
        ("--json", Path, None, "file for all figures, with hardware, versions and commit")]
    for name, kind, default, text in flags:
        shown = f" (default {default})" if default else ""
        parser.add_argument(name, type=kind, default=default, help=text + shown)
    parser.add_argument(
        "--pairs", type=positive, nargs="+", default=[64, 256, 1024, 2048],
        help="for loss; 8192 takes the one written out 5 GB (default 64 256 1024 2048)")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet50",
                        help="for step, fed, memory and scaling (default resnet50)")
    parser.add_argument("--compile", action="store_true",
                        help="for step: torch.compile on a CPU, too, which takes minutes")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part!r} is none of {', '.join(PARTS)}")
    if args.threads is None:
        args.threads = launch.start(pretrain.Config()).threads
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.backends.cudnn.benchmark = True       # as in pre-training
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    LINES.clear()
    for name in args.parts or [name for name, part in PARTS.items() if not part.takes_minutes]:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name].run(args, Path(folder))
        if args.json:                           # after each part: a later one may be interrupted
            flags = {key: str(value) for key, value in vars(args).items()}
            # `step` names its number of pairs in each figure.
            flags_of = {"step": {key: flags[key] for key in flags if key != "batch_size"}}
            lines = [line | about | {"flags": flags_of.get(line["part"], flags)}
                     for line in LINES]
            write_text(args.json, json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
