"""Stage 2: what pre-training buys at 1 %, 10 % and all of the labels. Encoder and labels in, classifier and table out.

    python finetune.py --fraction 0.01                          the encoder of pretrain.py, its data, 1 % of the labels
    python finetune.py --init random runs/pretrain/encoder.pt --fraction 0.01 0.1 1 --mode linear full --seeds 0 1 2
    torchrun --nproc_per_node=8 finetune.py --mode full         eight GPUs: the same batches, the same views, faster
    python finetune.py --predict runs/finetune/classifier.pt --data DIR --explain 8

`linear` fits a logistic regression to the frozen encoder's features; `full` trains the encoder, too, and where it was
pre-trained goes on from there. Thresholds, epochs and regularisation are chosen on val. Test labels meet nothing but
predictions that already lie on disk.

The run folder (--out) gets results.json, results.md and plots; classifier.pt, the best on val of all combinations; and
predictions.pt and last.pt, from which the same command goes on after an interruption, at the last whole epoch. One that
asks for more fractions, seeds, modes or initialisations trains only what is missing.
"""
import argparse
import contextlib
import csv
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from dali_pipeline import (
    Augmentation, DataError, ImageError, Manifest, Preprocessing, eval_loader, read_manifest, train_loader)
from loss import masked_cross_entropy
from model import (
    ARCHITECTURES, FORMAT, MEAN, PREPROCESSING, STD, CheckpointError, Classifier, build_encoder, cached_features,
    extract_features, load_checkpoint, load_classifier, open_run, save_checkpoint)
from scores import report, val_score, youden

ENCODERS = ("runs/pretrain/encoder.pt", "runs/demo/encoder.pt")         # the first that exists is --init's default
SHOWN = {"random": "Scratch", "imagenet": "ImageNet"}                   # what tables call them
INHERITED = {"data": "data/nih", "arch": "resnet50", "image_size": 224, "normalize": "fixed", "clahe": False}
AUGMENTATION = Augmentation(crop_area=(0.6, 1.0), blur=(0.0, 0.0), brightness=0.2, contrast=0.2)    # of full training
STRENGTHS = 10.0 ** np.arange(-4, 3)                    # of the linear probe's regularisation, see fit_logistic
IMAGES = (".jpg", ".jpeg", ".png")
RESULTS = ("predictions.pt", "last.pt", "classifier.pt", "log.jsonl", "results.*", "*.png", "tensorboard/*/events*")
# Flags that say how much is computed, where and how, but not what: they may differ when a run goes on.
NOT_THE_RUN = {"init", "mode", "fraction", "seeds", "out", "overwrite", "predict", "explain", "threads", "precision"}


def within(kind: type, low: float, high: float):
    """An argparse type: a number from low to high."""
    def number(text):
        if not low <= kind(text) <= high:                               # NaN is not
            raise argparse.ArgumentTypeError(f"{text} does not lie in {low:g} to {high:g}")
        return kind(text)
    number.__name__ = kind.__name__                                     # argparse: "invalid int value"
    return number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("what is compared: every combination")
    group.add_argument("--init", nargs="+", metavar="random|imagenet|PATH", help=f"(default {' or '.join(ENCODERS)})")
    group.add_argument("--mode", nargs="+", choices=("linear", "full"), default=["full"], help="(default full)")
    group.add_argument("--fraction", nargs="+", type=within(float, 1e-9, 1), default=[1.0],
                       help="of the labelled patients (default 1)")
    group.add_argument("--seeds", nargs="+", type=within(int, 0, 2**63 - 1), default=[0],
                       help="draws of patients and of heads (default 0)")
    group.add_argument("--out", default="runs/finetune", help="run folder (default %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="begin anew in a run folder that holds a run")
    group = parser.add_argument_group("labels")
    group.add_argument("--labels", nargs="+", metavar="NAME", help="columns of the manifest (default: all)")
    group.add_argument("--uncertain", choices=("ones", "zeros", "ignore", "multiclass"), default="ignore",
                       help="what -1 is in training: present, absent, left out, a third class (default %(default)s)")
    group.add_argument("--blank", choices=("zeros", "ignore"), default="zeros", help="what an empty cell is in a row "
                       "that has labels: absent, or left out (default %(default)s)")
    group.add_argument("--balance", action="store_true", help="weigh the classes of each label alike")
    group = parser.add_argument_group("inherited from the first encoder, unless given")
    group.add_argument("--data", help="data folder, made by prepare.py")
    group.add_argument("--arch", choices=ARCHITECTURES, help="of random and imagenet")
    group.add_argument("--image-size", type=within(int, 32, 4096), help="side of the input, pixels")
    group.add_argument("--normalize", choices=("fixed", "image"), help="by a fixed mean and deviation, or per image")
    group.add_argument("--clahe", action=argparse.BooleanOptionalAction, help="adaptive histogram equalisation")
    group = parser.add_argument_group("full fine-tuning")
    group.add_argument("--epochs", type=within(int, 1, 10**6), default=20, help="(default %(default)s)")
    group.add_argument("--batch-size", type=within(int, 2, 2**16), default=64,
                       help="images over all processes (default %(default)s)")
    group.add_argument("--lr-encoder", type=within(float, 1e-12, 10), default=2e-4,
                       help="peak, AdamW (default %(default)s)")
    group.add_argument("--lr-head", type=within(float, 1e-12, 10), default=2e-3,
                       help="peak, AdamW (default %(default)s)")
    group.add_argument("--freeze-bn", action="store_true", help="keep the batch norm statistics of the initialisation")
    group.add_argument("--peak", action="store_true", help="add the best test accuracy over epochs (optimistic)")
    group = parser.add_argument_group("how it computes")
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: bf16 on a "
                       "GPU that has it, fp16 on others, fp32 on a CPU")
    group.add_argument("--threads", type=within(int, 1, 256),
                       help="of the loader, a process (default: cores / processes, at most 8)")
    group = parser.add_argument_group("using a classifier")
    group.add_argument("--predict", metavar="CLASSIFIER.pt", help="write predictions.csv beside it: probabilities for "
                       "--data, a data folder or any folder of images")
    group.add_argument("--explain", type=within(int, 0, 10**9), default=0, metavar="N",
                       help="and Grad-CAM overlays of N images")

    args = parser.parse_args(argv)
    for flag in ("init", "mode", "fraction", "seeds", "labels"):                    # twice the same is once
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag) or ())))
    if args.peak and "full" not in args.mode:
        parser.error("--peak is over epochs and needs --mode full")
    if args.predict and not args.data or args.explain and not args.predict:
        parser.error("--predict needs --data, a data folder or a folder of images; --explain needs --predict")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Labels and draws, as pure functions.

def make_task(labels: np.ndarray, train: np.ndarray, uncertain: str,
              blank: str) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """What is asked of each image: labels (N, L) of 1, 0, -1 and NaN, read by the policies --uncertain and --blank.

    Returns the kind, G questions of K answers each; targets (N, G, K), one-hot where K > 1; known (N, G), whether there
    is something to learn from; and the truth to score by (N, L), 1, 0 or NaN: a -1 is never scored, on val or test.
    binary: G = L, K = 1. three-way (`multiclass`): G = L, and absent, present and uncertain are classes (Irvin et al.
    2019). exclusive: G = 1, K = L, one softmax, where each of the rows `train` has exactly one 1 and otherwise 0."""
    labels = np.where(np.isnan(labels) & (blank == "zeros"), 0, labels).astype(np.float32)
    truth = np.where(labels == -1, np.nan, labels)
    if labels.shape[1] > 1 and (truth[train].sum(1) == 1).all():                        # a NaN is not 1
        return "exclusive", np.nan_to_num(truth)[:, None], np.nansum(truth, 1, keepdims=True) == 1, truth
    if uncertain == "multiclass":
        one_hot = np.stack([labels == value for value in (0, 1, -1)], axis=2)
        return "three-way", one_hot.astype(np.float32), one_hot.any(2), truth
    learned = np.where(labels == -1, np.float32({"ones": 1, "zeros": 0, "ignore": np.nan}[uncertain]), labels)
    return "binary", np.nan_to_num(learned)[:, :, None], ~np.isnan(learned), truth


def as_learned(kind: str, targets: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What training sees of each label, (N, L): 1, 0, or NaN for nothing. The arguments are make_task's results."""
    answers = targets[:, 0] if kind == "exclusive" else targets[:, :, 1 if kind == "three-way" else 0]
    return np.where(known, answers, np.nan)


def to_probabilities(logits: Tensor, kind: str) -> np.ndarray:
    """Logits (n, G * K) -> probability of each label, (n, L) float64. A three-way label's is that of present against
    absent, without the uncertain class."""
    logits = logits.double().cpu()
    if kind == "exclusive":
        return logits.softmax(1).numpy()
    if kind == "three-way":
        absent, present, _ = logits.view(len(logits), -1, 3).unbind(2)
        logits = present - absent
    return logits.sigmoid().numpy()


def draw(patients: np.ndarray, learned: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, int]:
    """Rows (m,) of a fraction of the patients, and how many patients beyond that fraction are in it.

    patients (n,), learned (n, L). The seed puts the patients in an order; a fraction is the front of it, so the smaller
    lies in the larger. For a label without a positive (or a negative) there, the first patient in that order who has
    one comes in addition, which keeps the nesting. DataError where the fraction is no patient."""
    names, patient = np.unique(patients, return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(names))[patient]                # (n,) in the seed's order
    asked = math.floor(fraction * len(names) + 0.5)
    if not asked:
        raise DataError(f"--fraction {fraction:g} of {len(names)} labelled training patients is none")
    first = [place[has].min() for has in (column == value for column in learned.T for value in (1, 0)) if has.any()]
    beyond = {p for p in first if p >= asked}
    return np.flatnonzero((place < asked) | np.isin(place, list(beyond))), len(beyond)


def cell_weights(targets: np.ndarray, known: np.ndarray, balance: bool) -> np.ndarray:
    """Weights (n, G), 0 for unknown cells, 1 on average; with `balance`, each class of a label has the same sum."""
    answers = targets.argmax(2) if targets.shape[2] > 1 else targets[:, :, 0]
    weights = np.zeros(known.shape)
    for g, some in enumerate(known.T):
        weights[some, g] = compute_sample_weight("balanced" if balance else None, answers[some, g])
    return weights / weights.mean()


# ----------------------------------------------------------------------------------------------------------------------
# The linear probe: all labels and all strengths of regularisation in one go.

def fit_logistic(x: Tensor, targets: Tensor, weights: Tensor, strengths: Tensor, tolerance: float = 1e-6,
                 max_steps: int = 5000) -> tuple[Tensor, Tensor]:
    """Logistic regressions (softmax where K > 1), one for each of R strengths and G questions.

    x (n, D) float64; targets (n, G, K); weights (n, G). Each minimises its weighted mean cross-entropy + strength / 2 *
    |w|^2, the intercept free: scikit-learn's with C = 1 / (n * strength). Returns coefficients (D, R, G, K) and
    intercepts (R, G, K).

    In the rows' principal axes x'x is diagonal, and with it a bound of the Hessian (Böhning 1992): the gradient divided
    by it is sure to descend. Nesterov's momentum makes that fast; a problem whose momentum points uphill starts it anew
    (O'Donoghue and Candès 2015). It ends where no step promises more than `tolerance` of loss; where strength
    is little and rows are few the optimum may still be some 1e-4 below."""
    center = x.mean(0)
    x = x - center
    few = len(x) < x.shape[1]                   # then the axes of the rows' span, where the optimum lies, are enough
    squares, axes = torch.linalg.eigh(x @ x.T if few else x.T @ x)
    keep = squares > 1e-10 * squares[-1]
    squares, axes = squares[keep], axes[:, keep]
    axes = x.T @ axes / squares.sqrt() if few else axes                                             # (D, d)
    x = torch.cat([x @ axes, torch.ones_like(x[:, :1])], dim=1)                                     # (n, d + 1)
    shape = x.shape[1], len(strengths), *targets.shape[1:]                                          # (d + 1, R, G, K)
    weights = (weights / weights.sum(0))[:, None, :, None]                                          # (n, 1, G, 1)
    targets = targets[:, None]                                                                      # (n, 1, G, K)
    penalty = strengths.view(1, -1, 1, 1).repeat(shape[0], 1, 1, 1)                                 # (d + 1, R, 1, 1)
    penalty[-1] = 0
    steepest = weights.amax(0, keepdim=True) * (0.25 if shape[3] == 1 else 0.5)     # of sigmoid, of softmax
    bound = torch.cat([squares, squares.new_tensor([len(x)])]).view(-1, 1, 1, 1) * steepest + penalty
    beta, ahead, age = x.new_zeros(shape), x.new_zeros(shape), x.new_ones(1)
    for _ in range(max_steps):
        logits = (x @ ahead.flatten(1)).view(len(x), *shape[1:])                                    # (n, R, G, K)
        error = weights * ((logits.sigmoid() if shape[3] == 1 else logits.softmax(3)) - targets)
        gradient = (x.T @ error.flatten(1)).view(shape) + penalty * ahead
        if (gradient.square() / bound).sum((0, 3)).max() < 2 * tolerance:
            break
        before, beta = beta, ahead - gradient / bound
        uphill = (gradient * (beta - before)).sum((0, 3), keepdim=True) > 0                         # (1, R, G, 1)
        age = torch.where(uphill, 1.0, age)
        older = (1 + (1 + 4 * age ** 2).sqrt()) / 2
        ahead = beta + (age - 1) / older * (beta - before)
        age = older
    coefficients = (axes @ ahead[:-1].flatten(1)).view(-1, *shape[1:])
    return coefficients, ahead[-1] - torch.tensordot(center, coefficients, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Using a classifier.

def grad_cam(net: Classifier, x: Tensor, outputs: Tensor) -> Tensor:
    """Where in the images x (B, 1, S, S) the outputs (B,) come from: (B, S, S), 0 to 1 (Selvaraju et al. 2017). The map
    has S / 32 cells a side, coarse below 224 pixels, and is 0 where none of them speaks for the output."""
    kept = []
    hook = net.encoder.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = net(x)
    hook.remove()
    gradient, = torch.autograd.grad(logits.gather(1, outputs[:, None]).sum(), kept[0])              # (B, C, h, w)
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True))              # (B, 1, h, w)
    cam = F.interpolate(cam, x.shape[2:], mode="bilinear")[:, 0]
    return (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)).detach()


def predict(args: argparse.Namespace, where: dict, dtype: torch.dtype | None) -> None:
    """--predict: probabilities of every image of a data folder, or of any folder of images, as a CSV file; --explain:
    a Grad-CAM overlay of the first images, each for the label most above its threshold, named in the file."""
    net, state = load_classifier(args.predict)
    net = net.to(where["device"], memory_format=torch.channels_last)
    folder, out = Path(args.data), Path(args.predict).parent
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder")
    if (folder / "manifest.csv").exists():
        manifest = read_manifest(folder)
    else:
        paths = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in IMAGES
                       and p.is_file())
        if not paths:
            raise DataError(f"--data {folder} has no manifest.csv and no image ({', '.join(IMAGES)})")
        for path in paths:
            with contextlib.suppress(OSError), Image.open(folder / path) as image:      # a broken one is named later
                if image.mode.startswith("I"):
                    raise DataError(f"{folder / path} has 16 bits a pixel: `prepare.py folder` brings such images to 8")
        manifest = Manifest(folder, paths, None, None, None, [])
    preprocessing = Preprocessing(**{key: state["config"][key] for key in PREPROCESSING})
    images, labels = np.arange(len(manifest.paths)), state["labels"]
    loader = eval_loader(manifest, images, args.batch_size, preprocessing, **where)
    probabilities = to_probabilities(extract_features(net, loader, len(images), dtype=dtype), state["kind"])    # (n, L)
    with open(out / "predictions.csv.tmp", "w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([["path", *labels], *(
            [path, *(f"{p:.6f}" for p in row)] for path, row in zip(manifest.paths, probabilities))])
    os.replace(out / "predictions.csv.tmp", out / "predictions.csv")
    print(f"{out / 'predictions.csv'}: {len(images)} images, {', '.join(labels)}")
    if args.explain:
        (out / "explained").mkdir(exist_ok=True)
    answers, present = (3, 1) if state["kind"] == "three-way" else (1, 0)       # logits a label, and which says present
    for x, index in eval_loader(manifest, images[:args.explain], 1, preprocessing, **where):
        i, x = index.item(), x.float()
        label = int((probabilities[i] - state["thresholds"]).argmax())
        heat = grad_cam(net, x, torch.tensor([label * answers + present], device=x.device))[0].cpu().numpy()[..., None]
        gray = (x[0, 0] * STD + MEAN).clamp(0, 1).cpu().numpy()[..., None]                          # (S, S, 1)
        overlay = gray * (1 - 0.5 * heat) + colormaps["jet"](heat[..., 0])[..., :3] * 0.5 * heat    # (S, S, 3)
        name = re.sub(r"[^\w.-]+", "-", f"{Path(manifest.paths[i]).stem}_{labels[label]}_{probabilities[i, label]:.2f}")
        Image.fromarray((255 * overlay).astype(np.uint8)).save(out / f"explained/{i:06d}_{name}.png")


def digest(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        with contextlib.ExitStack() as held:
            finetune(args, rank, local_rank, world_size, held)
    except torch.OutOfMemoryError:
        sys.exit(f"finetune.py: GPU {local_rank} has too little memory for --batch-size {args.batch_size} over "
                 f"{world_size} processes: lower it, or take more GPUs")
    except RuntimeError as error:
        if world_size > 1 and "closed by peer" in str(error):           # which has said why
            sys.exit(1)
        raise
    except KeyboardInterrupt:
        if rank == 0:
            print(f"finetune.py: interrupted; the same command goes on from what is in {args.out}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (FloatingPointError, DataError, CheckpointError, OSError) as error:
        if isinstance(error, OSError):                                  # a full disk, a folder that may not be written
            error = f"{error.strerror or error}: {error.filename or args.out}"
        # Wrong input is wrong for every process, and told once; a bad image is met by one alone.
        sys.exit(f"finetune.py: {error}" if rank == 0 or isinstance(error, ImageError) else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def finetune(args: argparse.Namespace, rank: int, local_rank: int, world_size: int, held: contextlib.ExitStack) -> None:
    # ------------------------------------------------------------------------------------------------ processes, device
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise DataError(f"{local_world_size} processes are too many for {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world_size > 1:                          # the others wait while one extracts features and fits linear probes
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    threads = args.threads or max(1, min(8, len(os.sched_getaffinity(0)) // local_world_size))
    precision = args.precision
    if precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    alone = dict(device=device, threads=threads, half=dtype is not None)
    shared = alone | dict(rank=rank, world_size=world_size)

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    if args.predict:
        if rank == 0:
            predict(args, alone, dtype)
        return

    # -------------------------------------------------------------------------------------------------- initialisations
    sources = args.init or [path for path in ENCODERS if os.path.exists(path)][:1]
    if not sources:
        raise DataError(f"{ENCODERS[0]} does not exist: pre-train first (`python pretrain.py --demo` takes minutes), "
                        "or name another encoder, random or imagenet with --init")
    paths = [source for source in sources if source not in SHOWN]
    # A file may change under its name, so that what is computed from it is kept by its content, too.
    inits = {source if source in SHOWN else f"{source} {digest(source)}": source for source in sources}
    shown, settings = {init: SHOWN.get(source, source) for init, source in inits.items()}, {}
    for init, path in inits.items():
        if path in paths:
            state = load_checkpoint(path)
            settings[path] = {k: v for k, v in (state | state.get("config", {})).items() if k in INHERITED}
            if state.get("format") == FORMAT and "classifier" not in state:
                shown[init] = "SimCLR" if len(paths) == 1 else f"SimCLR ({path})"
    inherited = next(iter(settings.values()), {})                       # the same for all rows, so that they compare
    given = {k: v for k, v in vars(args).items() if k in INHERITED and v is not None}
    setting = INHERITED | inherited | given
    if paths:
        say(f"inherited from {paths[0]}:", ", ".join(f"{k} {v}" for k, v in inherited.items() if k not in given))
    for path, own in settings.items():
        if differ := [f"{k} {v}" for k, v in own.items() if v != setting[k] and k != "data"]:
            say(f"{path} was trained with {', '.join(differ)}, which is not what it is given here")
    data, arch = setting["data"], setting["arch"]
    preprocessing = Preprocessing(setting["image_size"], setting["normalize"], setting["clahe"])
    for source in sources:
        build_encoder(arch, source)             # what does not fit is refused before anything is written

    # ------------------------------------------------------------------------------------------------------------- data
    manifest = read_manifest(data)
    table = manifest.folder / "manifest.csv"
    if not manifest.label_names:
        raise DataError(f"{table} has no label column: there is nothing to fine-tune on")
    asked = args.labels or manifest.label_names
    if unknown := set(asked) - set(manifest.label_names):
        raise DataError(f"--labels {unknown.pop()}: {table} has {', '.join(manifest.label_names)}")
    has_labels = ~np.isnan(manifest.labels).all(1)                      # an all-empty row is an image without labels
    train, val, test = (images[has_labels[images]] for images in map(manifest.images, ("train", "val", "test")))
    for split, images in zip(("train", "val", "test"), (train, val, test)):
        if not len(images):
            raise DataError(f"{table}: no image of the {split} split has a label")
    columns = [manifest.label_names.index(name) for name in asked]
    for _ in range(2):                                                  # again, without what train cannot teach
        kind, targets, known, truth = make_task(manifest.labels[:, columns], train, args.uncertain, args.blank)
        learned = as_learned(kind, targets, known)                                                          # (N, L)
        both = (learned[train] == 1).any(0) & (learned[train] == 0).any(0)
        columns = [column for column, kept in zip(columns, both) if kept]
        if not columns:
            raise DataError(f"{table}: no label has a positive and a negative in train, with --uncertain "
                            f"{args.uncertain} and --blank {args.blank}")
    names = [manifest.label_names[column] for column in columns]
    if left_out := [name for name in asked if name not in names]:
        say("left out, without both a positive and a negative in train:", ", ".join(left_out))
    for split, images in (("val", val), ("test", test)):
        if np.isnan(truth[images]).all():
            raise DataError(f"{table}: the {split} split has only uncertain or empty cells in {', '.join(names)}")
    for name, y in zip(names, truth[val].T):
        if not {0, 1} <= set(y.tolist()):
            say(f"{name} has one class only in val: its threshold is 0.5, and it has no say in what is chosen there")
    measure = "AUROC" if val_score(truth[val], truth[val]) > 0 else "minus the Brier score"     # of a perfect answer
    policy = {"exclusive": "exclusive labels, softmax, AUROC one against the rest",
              "binary": f"independent labels; in training -1 counts as {args.uncertain}, blank as {args.blank}",
              "three-way": f"independent labels, uncertain a class of its own; blank counts as {args.blank}",
              }[kind] + ("; classes balanced" if args.balance else "")
    say(f"{data}: {len(train)} train, {len(val)} val, {len(test)} test images with labels\n"
        f"{len(names)} labels ({', '.join(names)}): {policy}; -1 is never scored")
    samples, drawn = {}, {}
    for fraction, seed in itertools.product(args.fraction, args.seeds):
        rows, beyond = draw(manifest.patients[train], learned[train], fraction, seed)
        samples[fraction, seed] = train[rows]
        drawn.setdefault(fraction, []).append(f"draw {seed}: {len(rows)} images" + (
            f", {beyond} patients beyond the fraction for labels that lacked a class" if beyond else ""))
    if args.batch_size % world_size:
        raise DataError(f"--batch-size {args.batch_size} is global and must divide by the {world_size} processes")

    # ------------------------------------------------------------------------------------------------------- run folder
    out = Path(args.out)
    finished, last = out / "predictions.pt", out / "last.pt"
    config = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN} | setting
    config["the manifest's digest"] = digest(table)
    if rank == 0:
        open_run(out, "finetune", config, RESULTS, args.overwrite, held)
        if not finished.exists():
            save_checkpoint(finished, {})
    if world_size > 1:
        dist.barrier()
    done = load_checkpoint(finished)            # (mode, fraction, init, seed) -> predictions, and how they came about

    def told(key):
        mode, fraction, init, seed = key
        return f"{shown[init]}, {mode}, {100 * fraction:g} %, seed {seed}"

    def finish(key, sample, net, val_p, test_p, extra):
        """Keep a combination's predictions and, if it is the best on val up to now, its classifier."""
        value = val_score(val_p, truth[val])
        if value > max((kept["val_score"] for kept in done.values()), default=-math.inf):
            save_checkpoint(out / "classifier.pt", {
                "format": FORMAT, "arch": arch, "encoder": net.encoder.state_dict(), "labels": names, "kind": kind,
                "classifier": net.head.state_dict(), "config": config | {"init": inits[key[2]], "what": told(key)},
                "thresholds": [youden(p, y) for p, y in zip(val_p.T, truth[val].T)],
                "n_train": 0 if key[0] == "linear" else len(sample)})           # what its encoder learned from
        done[key] = extra | {
            "val": torch.from_numpy(val_p), "test": torch.from_numpy(test_p), "val_score": value,
            "n_train": (~np.isnan(learned[sample])).sum(0).tolist(),
            "positives": (learned[sample] == 1).sum(0).tolist()}
        save_checkpoint(finished, done)
        chosen = ", ".join(f"{k} {v:g}" for k, v in extra.items() if k in ("strength", "epoch"))
        say(f"{told(key)}: {measure} on val {value:.4f} ({chosen})")

    # ----------------------------------------------------------------------------------------------------- linear probe
    @functools.lru_cache(maxsize=1)
    def frozen(init):
        """The encoder as it came; its features of all images, standardised, (N, D), and by what mean and deviation."""
        torch.manual_seed(0)                                            # one untrained encoder stands for all
        encoder = build_encoder(arch, inits[init]).to(device, memory_format=torch.channels_last)
        everything = np.concatenate([train, val, test])
        say(f"{shown[init]}: features of {len(everything)} images, kept in {out.parent / 'features'}")
        features = torch.cat([cached_features(                          # by split, as cluster_eval.py looks for them
            encoder, eval_loader(manifest, images, args.batch_size, preprocessing, **alone), len(images),
            out.parent / "features", dtype) for images in (train, val, test)])
        if not features.isfinite().all():
            raise FloatingPointError(f"{inits[init]}: some features are not finite; --precision fp32 may help")
        # All of train, labelled or drawn or not, says how large a feature is; some are constant on a few images.
        deviation, mean = torch.std_mean(features[:len(train)], 0)
        deviation = deviation.clamp(min=1e-6)
        x = features.new_zeros(len(manifest.paths), len(mean))
        x[everything] = (features - mean) / deviation
        return encoder, x, mean, deviation

    fits = {}

    def probe(init, fraction, seed):
        """Logistic regression on one draw: the classifier, its predictions, and the strength that val chose."""
        encoder, x, mean, deviation = frozen(init)
        fit, sample = (init, fraction, seed if fraction < 1 else None), samples[fraction, seed]     # all is all
        if fit not in fits:
            weights = cell_weights(targets[sample], known[sample], args.balance)
            fits[fit] = [found.flatten(-2).cpu() for found in fit_logistic(*(
                torch.as_tensor(array, dtype=torch.float64, device=device)
                for array in (x[sample], targets[sample], weights, STRENGTHS)))]
        weight, bias = fits[fit]                                                            # (D, R, G * K), (R, G * K)
        val_p, test_p = (np.stack([to_probabilities(x[images].double() @ weight[:, r] + bias[r], kind)
                                   for r in range(len(STRENGTHS))]) for images in (val, test))              # (R, n, L)
        scores = [val_score(p, truth[val]) for p in val_p]
        r = max(range(len(STRENGTHS)), key=lambda r: (scores[r], r))                        # at a tie the strongest
        net = Classifier(encoder, bias.shape[1])
        scaled = weight[:, r].T / deviation                                                             # (G * K, D)
        net.head.load_state_dict({"weight": scaled.float(), "bias": (bias[r] - scaled @ mean.double()).float()})
        return net, val_p[r], test_p[r], float(STRENGTHS[r])

    # ------------------------------------------------------------------------------------------------- full fine-tuning
    def full(key, sample):
        """Train encoder and head on one draw; the epoch that is best on val counts. What was pre-trained starts from
        the linear probe, epoch 0: a random head could distort it in its first steps (Kumar et al. 2022)."""
        _, fraction, init, seed = key
        torch.manual_seed(seed)
        net = Classifier(build_encoder(arch, inits[init]), targets[0].size)
        net = net.to(device, memory_format=torch.channels_last)
        if world_size > 1 and cuda:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)          # PyTorch has none on a CPU
        optimizer = torch.optim.AdamW([dict(params=net.encoder.parameters(), peak=args.lr_encoder),
                                       dict(params=net.head.parameters(), peak=args.lr_head)],
                                      weight_decay=0.01, fused=cuda)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        weights, answers = torch.zeros(known.shape), torch.from_numpy(targets)                      # (N, G), (N, G, K)
        weights[sample] = torch.from_numpy(cell_weights(targets[sample], known[sample], args.balance)).float()
        history, best, peaks = [], {"val_score": -math.inf}, []
        with contextlib.suppress(CheckpointError):                      # none there, or half of one: from the start
            state = load_checkpoint(last)
            if state.get("key") == key:
                net.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                scaler.load_state_dict(state["scaler"])
                history, best, peaks = state["history"], state["best"], state["peaks"]
                say(f"going on from {last}, epoch {len(history)} of {told(key)}")
        if init != "random" and not history and rank == 0:              # DDP hands it on to the other processes
            net.head.load_state_dict(probe(init, fraction, seed)[0].head.state_dict())
        model = net if world_size == 1 else DistributedDataParallel(net, device_ids=[local_rank] if cuda else None)
        folder = out / "tensorboard" / re.sub(r"[^\w.-]+", "-", told(key))
        writer = SummaryWriter(folder, purge_step=len(history) + 1) if rank == 0 else None

        def evaluate(images):
            loader = eval_loader(manifest, images, args.batch_size, preprocessing, **shared)
            return to_probabilities(extract_features(net, loader, len(images), rank, world_size, dtype), kind)

        def snapshot(epoch, val_p):
            return {"val_score": val_score(val_p, truth[val]), "epoch": epoch, "val": torch.from_numpy(val_p),
                    "model": {name: value.cpu().clone() for name, value in net.state_dict().items()}}

        if init != "random" and not history:
            best = snapshot(0, evaluate(val))
            say(f"{told(key)} epoch 000/{args.epochs} | the linear probe | val {measure} {best['val_score']:.4f}")
        epoch_steps = max(10, math.ceil(len(sample) / args.batch_size))         # few images are shown several times
        total_steps, warmup_steps = args.epochs * epoch_steps, args.epochs * epoch_steps // 10
        batches = iter(train_loader(manifest, sample, args.batch_size, range(len(history) * epoch_steps, total_steps),
                                    1, AUGMENTATION, preprocessing, seed, **shared))
        for epoch in range(len(history) + 1, args.epochs + 1):
            net.train()
            for module in net.modules() if args.freeze_bn else ():
                module.train(not isinstance(module, nn.modules.batchnorm._BatchNorm))
            loss_sum, clock = torch.zeros((), device=device), time.perf_counter()
            for step in range((epoch - 1) * epoch_steps, epoch * epoch_steps):
                factor = ((step + 1) / warmup_steps if step < warmup_steps else
                          (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2)
                for group in optimizer.param_groups:
                    group["lr"] = factor * group["peak"]
                x, index = next(batches)                                                            # (B, 1, S, S)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    logits = model(x.contiguous(memory_format=torch.channels_last))                 # (B, G * K)
                loss = masked_cross_entropy(logits.view(-1, *targets.shape[1:]), answers[index].to(device),
                                            weights[index].to(device))
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                loss_sum += loss.detach()
            if world_size > 1:
                dist.all_reduce(loss_sum)
                for buffer in net.buffers():                    # one set of batch norm statistics, or rows would differ
                    dist.broadcast(buffer, 0)
            seconds = time.perf_counter() - clock
            scalars = {"loss": loss_sum.item() / epoch_steps / world_size,
                       "lr_encoder": factor * args.lr_encoder, "lr_head": factor * args.lr_head}
            if not math.isfinite(scalars["loss"]):
                raise FloatingPointError(f"the loss is not finite in epoch {epoch} of {told(key)}: lower --lr-encoder "
                                         "or --lr-head")
            val_p = evaluate(val)
            scalars["val_score"] = val_score(val_p, truth[val])
            history.append({"combination": told(key), "epoch": epoch} | scalars)
            if args.peak:
                peaks.append(torch.from_numpy(evaluate(test)).float())                              # (n_test, L)
            if scalars["val_score"] > best["val_score"]:
                best = snapshot(epoch, val_p)
            if rank == 0:
                save_checkpoint(last, {
                    "key": key, "model": net.state_dict(), "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(), "history": history, "best": best, "peaks": peaks})
                lines = [x for kept in done.values() for x in kept.get("history", [])] + history
                (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
                for name, value in scalars.items():
                    writer.add_scalar(name, value, epoch)
                say(f"{told(key)} epoch {epoch:03d}/{args.epochs} | loss {scalars['loss']:.4f} | val {measure} "
                    f"{scalars['val_score']:.4f} | {epoch_steps * args.batch_size / seconds:.0f} img/s")
        net.load_state_dict(best["model"])
        test_p = evaluate(test)
        if rank == 0:
            writer.close()
            finish(key, sample, net, best["val"].numpy(), test_p, {
                "epoch": best["epoch"], "history": history} | ({"peaks": torch.stack(peaks)} if peaks else {}))

    # ------------------------------------------------------------------------------------------------- all combinations
    combinations = list(itertools.product(args.mode, args.fraction, inits, args.seeds))
    missing = [key for key in combinations if key not in done]
    for key in sorted(missing, key=lambda key: list(inits).index(key[2])):              # features are read once
        mode, fraction, init, seed = key
        if mode == "linear" and rank == 0:
            net, val_p, test_p, strength = probe(init, fraction, seed)
            finish(key, samples[fraction, seed], net, val_p, test_p, {"strength": strength})
    for key in missing:
        if key[0] == "full":
            full(key, samples[key[1], key[3]])
    if rank:
        return
    last.unlink(missing_ok=True)
    kept = {(mode, fraction, shown[init], seed): done[mode, fraction, init, seed]
            for mode, fraction, init, seed in combinations}
    report(out, {"data": str(data), "kind": kind, "labels": policy, "draws": drawn}, kept, names,
           truth[val], truth[test], manifest.patients[test])
    say(f"done: {out / 'results.md'}, {out / 'results.json'}, {out / 'classifier.pt'}")


if __name__ == "__main__":
    main()
