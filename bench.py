"""What each part costs, beside what one would write without it: in one run, so that the ratios count on any machine.

    python bench.py                                     all parts, on radiographs drawn on the spot
    python bench.py loader step --size 64 --arch resnet18
"""
import argparse
import contextlib
import io
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import phantom
import prepare
from dali_pipeline import Augmentation, Preprocessing, read_manifest, train_loader
from finetune import STRENGTHS, draw, fit_logistic
from loss import nt_xent
from model import ARCHITECTURES, MEAN, STD, SimCLR, build_encoder

PARTS = ("prepare", "loader", "loss", "step", "probe")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels (default %(default)s)")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet50", help="for step (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images, two views each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the loaders (default %(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="for probe (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (default 5)")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part!r} is none of {', '.join(PARTS)}")
    for flag in ("size", "batch_size", "threads", "images", "repeats"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be positive")
    return args


def median_seconds(work, repeats: int, clock=time.perf_counter) -> float:
    """Of `repeats` calls after one that warms up; the GPU's work is waited for."""
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return float(np.median(seconds[1:]))


def report(part: str, unit: str, figures: dict[str, float]) -> None:
    """A line for each contender; the ratio is to the first, ours."""
    ours = next(iter(figures.values()))
    for name, figure in figures.items():
        print(f"{part:8s} {name:28s} {figure:10.2f} {unit}   {figure / ours:6.2f} x ours", flush=True)


def bench_prepare(args: argparse.Namespace, folder: Path) -> None:
    """1024 x 1024 PNG -> 256-pixel JPEG, CPU time of one core for an image."""
    sources = [folder / f"{i}.png" for i in range(8)]
    for i, source in enumerate(sources):
        Image.fromarray(phantom.phantom(0, i, 0, 1024)).save(source)
    options = prepare.parse_args(["folder", "--src", str(folder), "--out", str(folder / "out")])
    items = [prepare.Item(source.name, f"images/{source.stem}.jpg", "", "", ()) for source in sources]

    def plain():
        for source in sources:
            with Image.open(source) as image:
                image.convert("L").resize((256, 256), Image.Resampling.LANCZOS).save(io.BytesIO(), "JPEG", quality=95)

    contenders = {"prepare.py": lambda: [prepare.convert(item, options) for item in items], "a loop over Pillow": plain,
                  "decoding alone": lambda: [Image.open(source).load() for source in sources]}
    report("prepare", "ms an image", {name: 1000 * median_seconds(work, args.repeats, time.process_time) / len(sources)
                                      for name, work in contenders.items()})


def bench_loader(args: argparse.Namespace, folder: Path) -> None:
    """Two augmented views of each JPEG, the published recipe; torchvision's as well as it can be written."""
    patients = str(max(8, args.batch_size // 2))
    with contextlib.redirect_stdout(None):
        prepare.main(["demo", "--out", str(folder / "data"), "--patients", patients])
    manifest, augmentation = read_manifest(folder / "data"), Augmentation()
    images = np.arange(len(manifest.paths))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform = v2.Compose([
        v2.RandomResizedCrop(args.size, augmentation.crop_area, antialias=True), v2.RandomHorizontalFlip(),
        v2.RandomRotation(augmentation.rotation, v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(augmentation.brightness, augmentation.contrast), v2.GaussianBlur(13, augmentation.blur),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN], [STD])])

    def load(i):
        image = decode_image(str(manifest.folder / manifest.paths[i]), ImageReadMode.GRAY)
        return transform(image), transform(image)

    dali = train_loader(manifest, images, args.batch_size, range(10**6), 2, augmentation, Preprocessing(args.size), 0,
                        device, threads=args.threads)
    order = np.random.default_rng(0).integers(len(images), size=10**6).tolist()
    # The workers load where they would collate, so that the order of the images is the whole data set.
    torchvision = torch.utils.data.DataLoader(
        order, args.batch_size, num_workers=args.threads,
        collate_fn=lambda batch: [torch.stack(views) for views in zip(*map(load, batch))])
    figures = {}
    for name, loader in (("dali_pipeline.py", dali), ("torchvision v2, written well", torchvision)):
        batches = iter(loader)
        seconds = median_seconds(lambda batches=batches: [next(batches) for _ in range(8)], args.repeats)
        figures[name] = 8 * args.batch_size / seconds
        del batches                                 # and its workers, before the next is timed
    report("loader", "images/s", figures)


def bench_loss(args: argparse.Namespace, folder: Path) -> None:
    """Forward and backward, 128-d projections; beside it equation 1 as it is mostly written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for pairs in (256, 2048):
        z = torch.randn(2, pairs, 128, device=device, requires_grad=True)

        def plain(z=z, pairs=pairs):
            anchors = F.normalize(z.flatten(0, 1), dim=1)
            itself = torch.eye(2 * pairs, dtype=bool, device=device)
            logits = (anchors @ anchors.T / 0.07).masked_fill(itself, -torch.inf)
            F.cross_entropy(logits, torch.arange(2 * pairs, device=device).roll(pairs)).backward()

        report("loss", f"ms, {pairs} pairs", {name: 1000 * median_seconds(work, args.repeats) for name, work in (
            ("loss.py", lambda z=z: nt_xent(*z, 0.07).backward()), ("cross-entropy, written out", plain))})


def bench_step(args: argparse.Namespace, folder: Path) -> None:
    """Forward, loss and backward of SimCLR on noise, channels-last or not; bf16 on a GPU, float32 on a CPU."""
    device, figures = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name, layout in (("channels-last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        net = SimCLR(build_encoder(args.arch)).to(device, memory_format=layout)
        x = torch.randn(2 * args.batch_size, 1, args.size, args.size, device=device).contiguous(memory_format=layout)

        def step(net=net, x=x):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                z1, z2 = net(x).chunk(2)
            nt_xent(z1, z2, 0.07).backward()
            net.zero_grad()

        figures[f"{args.arch}, {name}"] = args.batch_size / median_seconds(step, args.repeats)
    report("step", "images/s", figures)


def bench_probe(args: argparse.Namespace, folder: Path) -> None:
    """Logistic regressions of 14 labels on 1, 10 and 100 % of ResNet-50 features, 5 draws, all strengths, once; beside
    it scikit-learn's, one by one, two labels for all. The features are correlated and not negative, as an encoder's."""
    rng, labels = np.random.default_rng(0), 14
    hidden = rng.standard_normal((args.images, 300)) * np.arange(1, 301) ** -0.5
    x = (hidden @ rng.standard_normal((300, 2048)) + 0.3 * rng.standard_normal((args.images, 2048))).clip(0)
    x = (x - x.mean(0)) / x.std(0)                                                                      # (n, 2048)
    signal = hidden @ rng.standard_normal((300, labels)) + rng.standard_normal((args.images, labels))
    y = (signal > np.diag(np.quantile(signal, 1 - np.logspace(-2, -0.5, labels), axis=0))).astype(float)    # 1 to 32 %
    patients = np.arange(args.images) // 3
    draws = {sample.tobytes(): sample for sample in (
        draw(patients, y, fraction, seed)[0] for fraction in (0.01, 0.1, 1.0) for seed in range(5))}

    def ours():
        for rows in draws.values():                         # all of the labels are the same in every draw
            fit_logistic(*map(torch.tensor, (x[rows], y[rows][:, :, None], np.ones((len(rows), labels)), STRENGTHS)))

    def loop():
        for rows, strength, label in itertools.product(draws.values(), STRENGTHS, (3, 10)):
            LogisticRegression(C=1 / (len(rows) * strength), max_iter=1000).fit(x[rows], y[rows, label])

    figures = {}
    for name, work, share in ("finetune.py, all at once", ours, 1), ("scikit-learn, one by one", loop, labels / 2):
        start = time.perf_counter()
        work()
        figures[name] = share * (time.perf_counter() - start)
    report("probe", "s", figures)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            globals()[f"bench_{part}"](args, Path(folder))


if __name__ == "__main__":
    main()
