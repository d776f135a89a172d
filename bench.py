"""What each part of the program costs, beside what one would write without it.

    python bench.py                                     all parts, on drawn radiographs
    python bench.py loader fed --size 64 --arch resnet18
    python bench.py memory --batch-size 256             GiB that a GPU needs for 256 pairs

Both contenders of a part do the same work in the same run, so that their ratio holds on
other machines too.
"""
import argparse
import contextlib
import ctypes
import io
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import phantom
import prepare
from common import number_within
from checkpoint import ARCHITECTURES
from dali_pipeline import Augmentation, Loader, Preprocessing, train_loader
from labels import draw
from loss import nt_xent
from manifest import Manifest, read_manifest
from model import MEAN, STD, SimCLR, build_encoder
from pretrain import LARS
from probe import STRENGTHS, fit_logistic
from radiograph import ImageSettings, read_image

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BATCHES = 8                             # that a loader delivers between two looks at the clock


# --------------------------------------------------------------------------------------------------
# Timing and reporting.

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


def report(part: str, unit: str, figures: dict[str, float]) -> None:
    """Print a line for each contender; the ratio is to the first one, which is ours."""
    ours = next(iter(figures.values()))
    for name, figure in figures.items():
        print(f"{part:8s} {name:28s} {figure:10.2f} {unit}   {figure / ours:6.2f} x ours",
              flush=True)


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
        device=DEVICE, threads=args.threads, half=CUDA)


def torchvision_loader(args: argparse.Namespace, manifest: Manifest) -> DataLoader:
    """The same views by torchvision, written as well as one can: gray tensors, a short blur."""
    recipe = Augmentation()
    transform = v2.Compose([
        v2.RandomResizedCrop(args.size, recipe.crop_area, antialias=True),
        v2.RandomHorizontalFlip(recipe.flip),
        v2.RandomRotation((-recipe.rotation, recipe.rotation), v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(recipe.brightness, recipe.contrast),
        v2.GaussianBlur(13, recipe.blur),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([MEAN], [STD])])

    def load(indices: list[int]) -> list[Tensor]:
        pairs = []
        for i in indices:
            file = str(manifest.folder / manifest.paths[i])
            image = decode_image(file, ImageReadMode.GRAY)
            pairs.append((transform(image), transform(image)))
        return [torch.stack(views) for views in zip(*pairs)]

    # The workers load where they would collate, so that the order of the
    # images is the whole data set.
    order = np.random.default_rng(0).integers(len(manifest.paths), size=10**6).tolist()
    return DataLoader(order, args.batch_size, num_workers=args.threads, collate_fn=load)


def bench_loader(args: argparse.Namespace, folder: Path) -> None:
    """Two augmented views of each JPEG, ready for the network."""
    manifest, figures = demo_folder(args, folder / "data"), {}
    for name, loader in (("dali_pipeline.py", dali_loader(args, manifest)),
                         ("torchvision v2, written well", torchvision_loader(args, manifest))):
        batches = iter(loader)

        def load(batches=batches):
            for _ in range(BATCHES):
                next(batches)

        figures[name] = BATCHES * args.batch_size / median_seconds(load, args.repeats)
        del batches, load               # end these workers before the next ones are timed
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
# Training step.

def forward_backward(net: SimCLR, x: Tensor) -> None:
    """The gradients of one batch x (2N, 1, S, S); bf16 on a GPU, float32 on a CPU."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
        z1, z2 = net(x).chunk(2)                                        # (N, 128) each
    nt_xent(z1, z2, 0.07).backward()


def random_batch(args: argparse.Namespace) -> Tensor:
    """Noise in place of both views of a batch, (2N, 1, S, S)."""
    return torch.randn(2 * args.batch_size, 1, args.size, args.size, device=DEVICE)


def bench_step(args: argparse.Namespace, folder: Path) -> None:
    """Forward, loss and backward on noise, with the two memory layouts of a convolution."""
    figures = {}
    for name, layout in (("channels-last", torch.channels_last),
                         ("contiguous", torch.contiguous_format)):
        net = SimCLR(build_encoder(args.arch)).to(device=DEVICE)
        net = net.to(memory_format=layout)      # pyright: ignore[reportCallIssue]
        x = random_batch(args).contiguous(memory_format=layout)

        def step(net=net, x=x):
            forward_backward(net, x)
            net.zero_grad()

        figures[f"{args.arch}, {name}"] = args.batch_size / median_seconds(step, args.repeats)
    report("step", "images/s", figures)


def simclr(args: argparse.Namespace) -> tuple[SimCLR, LARS]:
    """A network and its optimizer, as pretrain.py makes them by default."""
    net = SimCLR(build_encoder(args.arch)).to(device=DEVICE)
    net = net.to(memory_format=torch.channels_last)     # pyright: ignore[reportCallIssue]
    return net, LARS(net.parameters(), lr=0.1)


def training_step(net: SimCLR, optimizer: LARS, view1: Tensor, view2: Tensor) -> None:
    """Everything that pretrain.py does with a batch; view1, view2: (N, 1, S, S)."""
    x = torch.cat([view1, view2])                                       # (2N, 1, S, S)
    forward_backward(net, x.contiguous(memory_format=torch.channels_last))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bench_fed(args: argparse.Namespace, folder: Path) -> None:
    """Whole training steps, fed by the loader or by two views that are already there.

    Where both are equally fast, the loader keeps up and costs nothing."""
    net, optimizer = simclr(args)
    batches = iter(dali_loader(args, demo_folder(args, folder / "data")))
    same1, same2, _ = next(batches)
    steps = BATCHES if CUDA else 1          # a step takes seconds on a CPU

    def fed():
        for _ in range(steps):
            view1, view2, _ = next(batches)
            training_step(net, optimizer, view1, view2)

    def unfed():
        for _ in range(steps):
            training_step(net, optimizer, same1, same2)

    contenders = {"fed by dali_pipeline.py": fed, "the same two views each time": unfed}
    report("fed", "images/s", {
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


def measured_gib(args: argparse.Namespace) -> float:
    """The most that PyTorch had allocated on the GPU at any moment of three training steps."""
    net, optimizer = simclr(args)
    view1, view2 = random_batch(args).chunk(2)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        training_step(net, optimizer, view1, view2)
    return torch.cuda.max_memory_allocated() / 2**30


def bench_memory(args: argparse.Namespace, folder: Path) -> None:
    """What --batch-size pairs need on one GPU, in bf16; measured as well where there is one."""
    figures = {f"{args.arch}, {args.batch_size} pairs, computed": computed_gib(args)}
    if CUDA:
        figures["measured"] = measured_gib(args)
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

PARTS = {"prepare": bench_prepare, "loader": bench_loader, "loss": bench_loss, "step": bench_step,
         "fed": bench_fed, "memory": bench_memory, "probe": bench_probe}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    positive = number_within(int, 1, 10**6)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--size", type=positive, default=224, help="side of a view, pixels (default 224)")
    parser.add_argument(
        "--arch", choices=ARCHITECTURES, default="resnet50",
        help="for step, fed and memory (default resnet50)")
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="images, two views each (default 32)")
    parser.add_argument(
        "--pairs", type=positive, nargs="+", default=[64, 256, 1024, 2048],
        help="for loss; 8192 takes the one written out 5 GB (default 64 256 1024 2048)")
    parser.add_argument("--threads", type=positive, default=2, help="of the loaders (default 2)")
    parser.add_argument(
        "--images", type=positive, default=10_000, help="for probe (default 10000)")
    parser.add_argument(
        "--repeats", type=positive, default=5, help="of which the median counts (default 5)")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part!r} is none of {', '.join(PARTS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.backends.cudnn.benchmark = True       # as in pre-training
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](args, Path(folder))


if __name__ == "__main__":
    main()
