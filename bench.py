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
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import run  # first: it answers Ctrl-C while PyTorch loads
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import phantom
import prepare
import pretrain
from archive import write_archive
from bench_growth import bench_manifest, bench_scaling
from checkpoint import ARCHITECTURES
from common import write_text
from dali_pipeline import Loader, Preprocessing, train_loader
from flags import number_within
from labels import draw
from loss import nt_xent
from manifest import Manifest, read_manifest
from model import MEAN, STD, SimCLR, build_encoder
from probe import STRENGTHS, fit_logistic
from radiograph import ImageSettings, read_image
from timing import CUDA, DEVICE, LINES, machine, median_seconds, peak_mib, report, seconds
from views import Augmentation

BATCHES = 8                             # that a loader delivers between two looks at the clock


# --------------------------------------------------------------------------------------------------
# Stage 0.

def bench_prepare(args: argparse.Namespace, folder: Path) -> None:
    """1024 x 1024 PNG -> 256-pixel JPEG: processor time of one core for an image."""
    files = [folder / f"{patient}.png" for patient in range(8)]
    for patient, file in enumerate(files):
        Image.fromarray(phantom.phantom(0, patient, 0, 1024)).save(file)
    items = [prepare.Item(file.name, f"{file.stem}.jpg", "", "", ()) for file in files]
    conversion = prepare.Conversion(read_image, folder, folder / "out", ImageSettings())

    def ours():
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

    contenders = {"prepare.py": ours, "a loop over Pillow": loop, "decoding alone": decode}
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
    """An endless one, by the published recipe; float16 on a GPU, as in pre-training."""
    return train_loader(
        manifest, np.arange(len(manifest.paths)), args.batch_size, steps=range(10**6), views=2,
        augmentation=Augmentation(), preprocessing=Preprocessing(args.size), seed=0,
        device=DEVICE, threads=args.threads)


def written_well(size: int) -> Callable:
    """The same views by torchvision, as well as one can: gray tensors, a short blur."""
    recipe = Augmentation()
    transform = v2.Compose([
        v2.RandomResizedCrop(size, recipe.crop_area, antialias=True),
        v2.RandomHorizontalFlip(recipe.flip),
        v2.RandomRotation((-recipe.rotation, recipe.rotation), v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(recipe.brightness, recipe.contrast),
        v2.GaussianBlur(13, recipe.blur),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([MEAN], [STD])])

    def load(file: str) -> list[Tensor]:
        image = decode_image(file, ImageReadMode.GRAY)
        return [transform(image), transform(image)]
    return load


def written_as_usual(size: int) -> Callable:
    """The published recipe on Pillow's images in RGB, which is how most scripts and solo-learn
    load them."""
    transform = v1.Compose([
        v1.RandomResizedCrop(size, scale=(0.8, 1.0)), v1.RandomHorizontalFlip(),
        v1.RandomRotation(10), v1.ColorJitter(0.4, 0.4, 0.2, 0.1), v1.RandomGrayscale(0.2),
        v1.GaussianBlur(23, (0.1, 2.0)), v1.ToTensor(), v1.Normalize([MEAN] * 3, [STD] * 3)])

    def load(file: str) -> list:
        image = Image.open(file).convert("RGB")
        return [transform(image), transform(image)]
    return load


def by_lightly(size: int) -> Callable:
    """lightly's own transform, with rotation; ImportError where it is not installed."""
    from lightly.transforms.simclr_transform import (  # pyright: ignore[reportMissingImports]
        SimCLRTransform)
    transform = SimCLRTransform(size, min_scale=0.8, gaussian_blur=1.0, sigmas=(0.1, 2.0),
                                rr_prob=1.0, rr_degrees=10)
    return lambda file: transform(Image.open(file).convert("RGB"))


def worker_loader(args: argparse.Namespace, manifest: Manifest, load: Callable) -> DataLoader:
    """An endless DataLoader; its workers load where they would collate, so that the order of the
    images is the whole data set."""
    files = [str(manifest.folder / path) for path in manifest.paths]

    def batch(indices: list[int]) -> list[Tensor]:
        return [torch.stack(views) for views in zip(*(load(files[i]) for i in indices))]

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
    for name, contender in (("torchvision v2, written well", written_well),
                            ("torchvision on Pillow, as usual", written_as_usual),
                            ("lightly", by_lightly)):
        with contextlib.suppress(ImportError):
            loader = worker_loader(args, manifest, contender(args.size))
            figures[name] = images_per_second(args, loader)
    report("loader", "images/s", figures)


# --------------------------------------------------------------------------------------------------
# Loss.

TEMPERATURE = 0.07


def ours(z1: Tensor, z2: Tensor) -> Tensor:
    return nt_xent(z1, z2, TEMPERATURE)


def ours_with_patients(z1: Tensor, z2: Tensor) -> Tensor:
    """Every patient has two images in the batch, and the other one is no negative."""
    return nt_xent(z1, z2, TEMPERATURE, torch.arange(len(z1), device=z1.device) // 2)


def written_out(z1: Tensor, z2: Tensor) -> Tensor:
    """Equation 1 of SimCLR as most people write it; z1, z2 (N, D)."""
    anchors = F.normalize(torch.cat([z1, z2]), dim=1)                   # (2N, D)
    logits = (anchors @ anchors.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(anchors), device=z1.device).roll(len(z1)))


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The contenders. That of lightly is among them where lightly is installed."""
    contenders = {"loss.py": ours, "loss.py, with patients": ours_with_patients,
                  "cross-entropy, written out": written_out}
    with contextlib.suppress(ImportError):
        from lightly.loss import NTXentLoss
        contenders["lightly's NTXentLoss"] = NTXentLoss(TEMPERATURE)
    return contenders


def bench_loss(args: argparse.Namespace, folder: Path) -> None:
    """Forward and backward of NT-Xent, 128-d projections: time, on a CPU that of all its cores
    together, and peak memory of the most pairs."""
    contenders, order = losses(), np.random.default_rng(0)
    clock = time.perf_counter if CUDA else time.process_time
    for pairs in args.pairs:
        z1, z2 = (torch.randn(pairs, 128, device=DEVICE, requires_grad=True) for _ in range(2))

        def work(name, z1=z1, z2=z2):
            z1.grad = z2.grad = None
            contenders[name](z1, z2).backward()

        # The contenders take turns, in an order that is drawn anew each time: what comes before
        # leaves its traces in the caches. A small batch gets more turns; the first one warms
        # up. A CPU's own clock stands still while it works for others.
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


def ways(args: argparse.Namespace) -> list[Way]:
    """Those worth a comparison here; the first is pretrain.py's default."""
    other = ["fp16", "fp32"] if CUDA else ["bf16"]
    compiled = [Way("compiled", compiled=True)] if CUDA or args.compile else []
    if CUDA:
        compiled.append(Way("compiled, fp16", "fp16", compiled=True))
    return [Way("default"), *compiled, *(Way(precision, precision) for precision in other),
            Way("adamw", optimizer="adamw"), Way("contiguous", layout=torch.contiguous_format)]


class Step:
    """A training step of pretrain.py, with its own network, optimizer and scaler."""

    def __init__(self, args: argparse.Namespace, folder: Path, way: Way, pairs: int):
        config = pretrain.Config(arch=args.arch, image_size=args.size, batch_size=pairs,
                                 optimizer=way.optimizer, precision=way.precision,
                                 threads=args.threads, out=str(folder))
        self.compute = run.start(config)
        self.training, self.way = pretrain.Training(config, self.compute, ""), way
        net = self.training.net.to(memory_format=way.layout)    # pyright: ignore
        self.model = torch.compile(net) if way.compiled else net

    def __call__(self, view1: Tensor, view2: Tensor) -> None:
        """view1, view2: (N, 1, S, S)."""
        x = torch.cat([view1, view2]).contiguous(memory_format=self.way.layout)
        with self.compute.autocast():
            z1, z2 = self.model(x).chunk(2)                             # (N, 128) each
        scaler, optimizer = self.training.scaler, self.training.optimizer
        scaler.scale(nt_xent(z1, z2, 0.07)).backward()
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
    """In place of both views of a batch, (N, 1, S, S) each."""
    return torch.randn(2 * pairs, 1, args.size, args.size, device=DEVICE).chunk(2)


def peak_gib() -> float:
    """The most that PyTorch has had on the GPU since this was asked last; 0 without a GPU."""
    if not CUDA:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def bench_step(args: argparse.Namespace, folder: Path) -> None:
    """Whole steps on noise: precisions, compiled or not, optimizers, the bare encoder beside."""
    steps = BATCHES if CUDA else 1          # a step takes seconds on a CPU
    for pairs in (64, 256) if CUDA else (args.batch_size,):
        views, speeds, memory = noise(args, pairs), {}, {}
        for way in ways(args):
            step = Step(args, folder, way, pairs)
            contenders: dict[str, Callable] = {f"{way.name} ({step.compute.precision})": step}
            if way.name == "default":
                contenders["its encoder, bare"] = step.bare
            for name, work in contenders.items():
                peak_gib()

                def several(work=work, views=views):
                    for _ in range(steps):
                        work(*views)

                speeds[name] = steps * pairs / median_seconds(several, args.repeats)
                memory[name] = peak_gib()
            del step, contenders, work, several     # or the next way's memory would count theirs
        report("step", f"pairs/s, {args.arch}, {pairs} pairs", speeds)
        if CUDA:
            report("step", f"GiB, {args.arch}, {pairs} pairs", memory)


def bench_fed(args: argparse.Namespace, folder: Path) -> None:
    """Whole training steps, fed by the loader or by two views that are already there.

    Where both are equally fast, the loader keeps up and costs nothing."""
    step = Step(args, folder / "run", Way("default"), args.batch_size)
    batches = iter(dali_loader(args, demo_folder(args, folder / "data")))
    same1, same2, _ = next(batches)
    steps = BATCHES if CUDA else 1

    def fed():
        for _ in range(steps):
            view1, view2, _ = next(batches)
            step(view1, view2)

    def unfed():
        for _ in range(steps):
            step(same1, same2)

    contenders = {"fed by dali_pipeline.py": fed, "the same two views each time": unfed}
    report("fed", "pairs/s", {
        name: steps * args.batch_size / median_seconds(work, args.repeats)
        for name, work in contenders.items()})


# --------------------------------------------------------------------------------------------------
# GPU memory.

def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """What a forward pass in bf16 keeps for its backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    # Several operations save the same storage. Holding on to each one makes sure that no
    # address is used again for another.
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

    The parameters stand there three times in float32, with gradients and LARS's momentum;
    that autocast's bf16 copies of them do not depend on the batch falls out of the
    difference. Left out: cuDNN's workspaces, DALI's buffers and CUDA itself."""
    net = SimCLR(build_encoder(args.arch)).to(
        memory_format=torch.channels_last)      # pyright: ignore[reportCallIssue]
    two, four = (saved_bytes(net, torch.randn(n, 1, args.size, args.size).contiguous(
        memory_format=torch.channels_last)) for n in (2, 4))
    image = (four - two) / 2
    parameters = sum(p.numel() for p in net.parameters())
    return (two + image * (2 * args.batch_size - 2) + 3 * 4 * parameters) / 2**30


def measured_gib(args: argparse.Namespace, folder: Path) -> float:
    """The most that PyTorch had allocated on the GPU at any moment of three training steps."""
    step, views = Step(args, folder, Way("default"), args.batch_size), noise(args, args.batch_size)
    peak_gib()
    for _ in range(3):
        step(*views)
    return peak_gib()


def bench_memory(args: argparse.Namespace, folder: Path) -> None:
    """What --batch-size pairs need on one GPU, in bf16; measured as well where there is one."""
    figures = {f"{args.arch}, {args.batch_size} pairs, computed": computed_gib(args)}
    if CUDA:
        figures["measured"] = measured_gib(args, folder)
    report("memory", "GiB", figures)


# --------------------------------------------------------------------------------------------------
# Linear probe.

def drawn_features(images: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 2048) as an encoder's, correlated and not negative before they are
    standardised, and labels (n, L) of 1 and 0, of which 1 to 32 % are positive."""
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
    regularisation, on five draws each of 1, 10 and 100 %: once, without repeats.

    Ours fits the labels and strengths of a draw together. scikit-learn fits one by one, and
    only two of the labels, times 7."""
    labels, timed = 14, (3, 10)
    x, y = drawn_features(args.images, labels)
    patients = np.arange(args.images) // 3
    # At 100 % the five draws are one.
    draws = {rows.tobytes(): rows for rows in (
        draw(patients, y, fraction, seed).rows
        for fraction in (0.01, 0.1, 1.0) for seed in range(5))}.values()

    def ours():
        for rows in draws:
            targets, weights = torch.tensor(y[rows, :, None]), torch.ones(len(rows), labels)
            fit_logistic(torch.tensor(x[rows]), targets, weights.double(),
                         torch.tensor(STRENGTHS))

    def loop():
        for rows, strength, label in itertools.product(draws, STRENGTHS, timed):
            model = LogisticRegression(C=1 / (len(rows) * strength), max_iter=1000)
            model.fit(x[rows], y[rows, label])

    figures = {}
    for name, work, share in (("probe.py, all at once", ours, 1),
                              ("scikit-learn, one by one", loop, labels / len(timed))):
        start = time.perf_counter()
        work()
        figures[name] = share * (time.perf_counter() - start)
    report("probe", "s", figures)


# --------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """What a name on the command line runs."""
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
        ("--batch-size", number_within(int, 2, 10**6), 32, "images, two views each"),
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
        args.threads = run.start(pretrain.Config()).threads
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
            lines = [line | about | {"flags": flags} for line in LINES]
            write_text(args.json, json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
