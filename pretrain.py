"""Stage 1: SimCLR on unlabelled chest radiographs (Chen et al. 2020). Data folder in, encoder and curves out.

    python pretrain.py --demo                                   synthetic radiographs, a small ResNet, a few minutes
    python pretrain.py --data data/nih                          one GPU, or none
    torchrun --nproc_per_node=8 pretrain.py --data data/nih     eight GPUs: the same batches, the same views, faster
    tensorboard --logdir runs                                   the curves

The run folder (--out) gets encoder.pt, all that the later stages need; last.pt, from which the same command goes on
after any interruption as though there had been none; log.jsonl, config.json and TensorBoard's event files.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from dali_pipeline import (
    Augmentation, DataError, ImageError, Preprocessing, eval_loader, read_manifest, train_loader)
from loss import chance_level, diagnostics, nt_xent
from model import (
    ARCHITECTURES, FORMAT, MEAN, STD, CheckpointError, SimCLR, build_encoder, extract_features, load_checkpoint,
    open_run, save_checkpoint)

DEMO = dict(data="data/demo", out="runs/demo", arch="resnet18", image_size=64, normalize="image", batch_size=128,
            epochs=14, warmup_epochs=1, optimizer="adamw", lr=2e-3, temperature=0.1, probe_every=4,
            crop_area=(0.5, 1.0), rotation=20.0, blur=(0.1, 1.0), brightness=0.3, contrast=0.3)
BASE_LR = {"lars": 0.3, "adam": 5e-4, "adamw": 5e-4}                    # for a batch of 256; scaled in proportion
RESULTS = ("last.pt", "encoder.pt", "log.jsonl", "events.out.tfevents.*")       # what --overwrite gives up
# Flags that say where and how a run computes, not what: they may differ when it goes on.
NOT_THE_RUN = {"out", "resume", "overwrite", "max_steps", "save_every", "log_every", "threads", "precision", "compile"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("data and run folder")
    group.add_argument("--data", default="data/nih", help="data folder, made by prepare.py (default %(default)s)")
    group.add_argument("--out", default="runs/pretrain", help="run folder (default %(default)s)")
    group.add_argument("--demo", action="store_true", help="small run on data/demo, made if missing, into runs/demo")
    group.add_argument("--synthetic", action="store_true", help="random tensors, no files: the step's ceiling of speed")
    group.add_argument("--resume", default="auto", metavar="auto|PATH", help="checkpoint to go on from (default: "
                       "last.pt of the run folder, if there)")
    group.add_argument("--overwrite", action="store_true", help="begin anew in a run folder that holds a run")
    group.add_argument("--seed", type=int, default=0, help="of weights, order and views (default %(default)s)")

    group = parser.add_argument_group("network")
    group.add_argument("--arch", choices=ARCHITECTURES, default="resnet50", help="encoder (default %(default)s)")
    group.add_argument("--init", default="random", metavar="random|imagenet|PATH", help="encoder's first weights")
    group.add_argument("--proj-layers", type=int, default=2, help="of the projection head (default %(default)s)")
    group.add_argument("--proj-width", type=int, default=0, help="inside the head (default: the encoder's, 2048)")
    group.add_argument("--proj-dim", type=int, default=128, help="at the head's end (default %(default)s)")

    group = parser.add_argument_group("preprocessing and views")
    group.add_argument("--image-size", type=int, default=224, help="side of a view, pixels (default %(default)s)")
    group.add_argument("--normalize", choices=("fixed", "image"), default="fixed", help="by a fixed mean and "
                       "deviation, or after bringing each image to them (default %(default)s)")
    group.add_argument("--clahe", action="store_true", help="adaptive histogram equalisation of each image")
    default = Augmentation()
    group.add_argument("--crop-area", type=float, nargs=2, default=default.crop_area, metavar=("LOW", "HIGH"),
                       help="fraction of the image in a view (default %(default)s)")
    group.add_argument("--flip", type=float, default=default.flip, help="probability of a mirror image (default "
                       "%(default)s)")
    group.add_argument("--rotation", type=float, default=default.rotation, help="degrees, to either side (default "
                       "%(default)s)")
    group.add_argument("--brightness", type=float, default=default.brightness, help="factor 1 ± this (default "
                       "%(default)s)")
    group.add_argument("--contrast", type=float, default=default.contrast, help="factor 1 ± this (default %(default)s)")
    group.add_argument("--blur", type=float, nargs=2, default=default.blur, metavar=("LOW", "HIGH"),
                       help="sigma, pixels of the view; 0 0 for none (default %(default)s)")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=100, help="(default %(default)s)")
    group.add_argument("--batch-size", type=int, default=512, help="images over all processes (default %(default)s)")
    group.add_argument("--temperature", type=float, default=0.07, help="of NT-Xent (default %(default)s)")
    group.add_argument("--optimizer", choices=BASE_LR, default="lars", help="(default %(default)s)")
    group.add_argument("--lr", type=float, help="learning rate for a batch of 256 (default: lars 0.3, adam(w) 5e-4)")
    group.add_argument("--weight-decay", type=float, default=1e-6, help="(default %(default)s)")
    group.add_argument("--warmup-epochs", type=float, default=10, help="of linear warm-up (default %(default)s)")
    group.add_argument("--max-steps", type=int, help="stop after this step; the schedule still spans --epochs")

    group = parser.add_argument_group("probe: k nearest neighbours on val, where there are labels")
    group.add_argument("--probe-every", type=int, default=5, help="epochs; 0 for never (default %(default)s)")
    group.add_argument("--probe-images", type=int, default=10_000, help="at most, of train and of val (default "
                       "%(default)s)")

    group = parser.add_argument_group("how it computes")
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: bf16 on a "
                       "GPU that has it, fp16 on others, fp32 on a CPU")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--threads", type=int, help="of the loader, a process (default: cores / processes, at most 8)")
    group.add_argument("--log-every", type=int, default=10, help="steps (default %(default)s)")
    group.add_argument("--save-every", type=int, default=250, help="steps (default %(default)s)")

    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    for flag in ("epochs", "batch_size", "image_size", "proj_layers", "proj_dim", "log_every", "save_every",
                 "probe_images", "max_steps", "threads", "temperature", "lr"):
        value = getattr(args, flag)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{flag.replace('_', '-')} {value} must be positive")
    for flag in ("seed", "proj_width", "probe_every", "weight_decay", "warmup_epochs", "rotation"):
        value = getattr(args, flag)
        if not (value >= 0 and math.isfinite(value)):
            parser.error(f"--{flag.replace('_', '-')} {value} must not be negative")
    for flag in ("brightness", "contrast"):
        if not 0 <= getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} must lie in 0 to 1, 1 left out")
    if not 0 <= args.flip <= 1:
        parser.error(f"--flip {args.flip} is a probability, from 0 to 1")
    if not 0 < args.crop_area[0] <= args.crop_area[1] <= 1:
        parser.error(f"--crop-area {args.crop_area[0]} {args.crop_area[1]} must rise, within 0 to 1")
    if not (0 == args.blur[0] == args.blur[1] or 0 < args.blur[0] <= args.blur[1]):
        parser.error(f"--blur {args.blur[0]} {args.blur[1]} must rise and be positive, or be 0 0")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}")
    args.crop_area, args.blur = list(args.crop_area), list(args.blur)                # as JSON gives them back
    args.lr = args.lr if args.lr is not None else BASE_LR[args.optimizer]
    return args


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) with momentum, as SimCLR uses it.

    A weight's step is scaled by trust |w| / |g|, so that layers learn at the same relative pace however large the
    batch; biases and batch norm (one-dimensional parameters) get neither that nor weight decay."""

    def __init__(self, parameters, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad
                if p.ndim > 1:
                    gradient = gradient.add(p, alpha=group["weight_decay"])
                    weight_norm, gradient_norm = p.norm(), gradient.norm()
                    scale = torch.where((weight_norm > 0) & (gradient_norm > 0),
                                        group["trust"] * weight_norm / gradient_norm, 1.0)
                    gradient = gradient * scale
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(gradient)
                p.add_(momentum, alpha=-group["lr"])


def learning_rate(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / math.ceil(warmup_steps)
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


def knn_auroc(bank: Tensor, bank_labels: np.ndarray, queries: Tensor, query_labels: np.ndarray, k: int = 20) -> list:
    """AUROC of each label when a query's score is the weighted vote of its k nearest neighbours in the bank.

    bank (N, D), queries (M, D): features, any norm. Labels (N, L), (M, L): 1, 0, NaN for not mentioned, which counts as
    absent, and -1 for uncertain, which is left out. A vote weighs exp(cosine / 0.07) (Wu et al. 2018). NaN where the
    queries have one class only."""
    cosine, neighbours = (F.normalize(queries) @ F.normalize(bank).T).topk(min(k, len(bank)))              # (M, k)
    weights, neighbours = ((cosine - cosine[:, :1]) / 0.07).exp().cpu().numpy(), neighbours.cpu().numpy()
    votes = np.nan_to_num(bank_labels)[neighbours]                                                         # (M, k, L)
    known = weights[:, :, None] * (votes >= 0)
    scores = (known * votes).sum(1) / known.sum(1).clip(min=1e-12)                                         # (M, L)
    truth = np.nan_to_num(query_labels)
    auroc = []
    for score, label in zip(scores.T, truth.T):
        score, label = score[label >= 0], label[label >= 0]
        auroc.append(float(roc_auc_score(label, score)) if 0 < label.sum() < len(label) else math.nan)
    return auroc


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        with contextlib.ExitStack() as held:
            pretrain(args, rank, local_rank, world_size, held)
    except FloatingPointError as error:
        sys.exit(f"pretrain.py: {error}; the last good checkpoint stays in {args.out}; a lower --lr may help"
                 if rank == 0 else 1)
    except torch.OutOfMemoryError:
        sys.exit(f"pretrain.py: GPU {local_rank} has too little memory for --batch-size {args.batch_size} over "
                 f"{world_size} processes at --image-size {args.image_size}: lower one of them, or take more GPUs")
    except (DataError, CheckpointError, OSError) as error:
        # Whatever is wrong with the input is wrong for every process, and told once; a bad image is met by one alone.
        sys.exit(f"pretrain.py: {error}" if rank == 0 or isinstance(error, ImageError) else 1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def pretrain(args: argparse.Namespace, rank: int, local_rank: int, world_size: int, held: contextlib.ExitStack) -> None:
    # ------------------------------------------------------------------------------------------------ processes, device
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    threads = args.threads or max(1, min(8, os.cpu_count() // local_world_size))
    precision = args.precision
    if precision == "auto":
        precision = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    # ------------------------------------------------------------------------------------------------------------- data
    if args.demo and not args.synthetic and not (Path(args.data) / "manifest.csv").exists():
        if rank == 0:
            import prepare
            prepare.main(["demo", "--out", args.data])
        if world_size > 1:
            dist.barrier()
    preprocessing = Preprocessing(args.image_size, args.normalize, args.clahe)
    augmentation = Augmentation(args.crop_area, args.rotation, args.blur, args.flip, args.brightness, args.contrast)
    if args.synthetic:
        manifest, train = None, np.arange(100 * args.batch_size)
    else:
        if args.data == "data/nih" and not Path(args.data).exists():
            raise DataError("data/nih does not exist: make it with `python prepare.py nih --src DIR --out data/nih`, "
                            "name another folder with --data, or try `python pretrain.py --demo`, which brings its own")
        manifest = read_manifest(args.data)
        train = manifest.images("train")
    if args.batch_size > len(train):
        raise DataError(f"--batch-size {args.batch_size} is larger than the train split: {len(train)} images")
    if args.batch_size % world_size:
        raise DataError(f"--batch-size {args.batch_size} is global and must divide by the {world_size} processes")
    total_steps = args.epochs * len(train) // args.batch_size           # batches run on across the seam of two epochs
    warmup_steps = args.warmup_epochs * len(train) / args.batch_size
    fingerprint = hashlib.sha256("\n".join(manifest.paths[i] for i in train).encode()).hexdigest() if manifest else ""

    # ---------------------------------------------------------------------------------------------------------- network
    torch.manual_seed(args.seed)
    net = SimCLR(build_encoder(args.arch, args.init), args.proj_layers, args.proj_width, args.proj_dim)
    net = net.to(device, memory_format=torch.channels_last)
    if world_size > 1 and cuda:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)              # PyTorch has none on a CPU
    peak_lr = args.lr * args.batch_size / 256
    decayed, plain = [[p for p in net.parameters() if (p.ndim > 1) == flag] for flag in (True, False)]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=plain, weight_decay=0.0)]
    optimizer = (LARS(groups, peak_lr) if args.optimizer == "lars" else
                 {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer](groups, peak_lr, fused=cuda))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # --------------------------------------------------------------------------------------------- run folder, resuming
    out = Path(args.out)
    if rank == 0:
        config = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN}
        open_run(out, "pretrain", config, RESULTS, args.overwrite, held)
        if args.resume != "auto" and (out / "last.pt").exists():
            raise DataError(f"{out} has a last.pt of its own: leave out --resume {args.resume} to go on from that one, "
                            "or give it up with --overwrite")
    if world_size > 1:
        dist.barrier()
    step = 0
    checkpoint = out / "last.pt" if args.resume == "auto" else Path(args.resume)
    if args.resume != "auto" or checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if not {"model", "optimizer", "scaler", "step", "config", "images", "rng"} <= state.keys():
            raise CheckpointError(f"{checkpoint} is no last.pt of a pre-training run")
        if state["config"]["arch"] != args.arch:
            raise CheckpointError(f"{checkpoint} holds a {state['config']['arch']}, not a {args.arch}")
        if state["images"] != fingerprint:
            raise DataError(f"{args.data}/manifest.csv lists other training images than when {checkpoint} was written")
        try:
            net.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{checkpoint} does not fit these flags: {reason}") from None
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        step = state["step"]
        del state
    stop_at = min(total_steps, args.max_steps or total_steps)
    if step >= stop_at:
        say(f"{out} is complete: step {step} of {total_steps}, encoder in {out / 'encoder.pt'}")
        return
    model = torch.compile(net) if args.compile else net
    if world_size > 1:
        model = DistributedDataParallel(model, device_ids=[local_rank] if cuda else None, gradient_as_bucket_view=True)

    writer, log_file = None, None
    if rank == 0:
        if (out / "log.jsonl").exists():        # lines behind the checkpoint, of steps that will be taken once more
            lines = [x for x in (out / "log.jsonl").read_text().splitlines(True) if x.endswith("\n")]
            (out / "log.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= step))
        log_file = open(out / "log.jsonl", "a")
        writer = SummaryWriter(out, purge_step=step + 1 if step else None)
        if not step:
            writer.add_text("config", "\n".join(f"    {k} = {v}" for k, v in vars(args).items()))

    def place() -> str:
        return f"epoch {step * args.batch_size // len(train):03d} step {step:05d}/{total_steps}"

    def log(scalars: dict):
        """One line of log.jsonl and one point on each curve."""
        if rank == 0:
            log_file.write(json.dumps({"step": step, "epoch": round(step * args.batch_size / len(train), 3)} | {
                k: v if math.isfinite(v) else None for k, v in scalars.items()}) + "\n")
            log_file.flush()
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

    say(f"{args.arch} from {args.init}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, "
        f"{precision} on {world_size} x {torch.cuda.get_device_name(device) if cuda else 'CPU'}")
    say(f"{len(train)} images of {args.data if manifest else 'noise'} at {args.image_size} px, {args.epochs} epochs = "
        f"{total_steps} steps of {args.batch_size} images ({args.batch_size // world_size} a process)")
    say(f"{args.optimizer}, learning rate {peak_lr:.3g} = {args.lr:g} x {args.batch_size} / 256")
    if world_size > 1 and not cuda:
        say("batch norm sees each process's images alone: there is no SyncBatchNorm on a CPU")
    if step:
        say(f"going on from {checkpoint}, step {step}")

    # ------------------------------------------------------------------------------------------------------------ probe
    probe_auroc = math.nan
    probe_steps = set()
    if manifest and args.probe_every and "val" in manifest.splits and manifest.label_names:
        val = manifest.images("val")
        probe_steps = {epoch * len(train) // args.batch_size for epoch in range(0, args.epochs, args.probe_every)}
        probe_steps.add(total_steps)
    else:
        say("no probe of the features: it needs --probe-every, labels and a val split")

    def probe():
        """Do the features get better, and not only the loss? Mean AUROC over the labels on val, from train's."""
        chosen = [np.sort(np.random.default_rng(args.seed).permutation(images)[:args.probe_images])
                  for images in (train, val)]
        features = [extract_features(
            net.encoder, eval_loader(manifest, images, max(1, 2 * args.batch_size // world_size), preprocessing, device,
                                     rank, world_size, threads, half=dtype is not None),
            len(images), rank, world_size, dtype) for images in chosen]
        if rank == 0:
            nonlocal probe_auroc
            auroc = knn_auroc(features[0], manifest.labels[chosen[0]], features[1], manifest.labels[chosen[1]])
            probe_auroc = float(np.nanmean(auroc)) if not np.isnan(auroc).all() else math.nan
            named = dict(zip(manifest.label_names, auroc))
            log({"probe/auroc": probe_auroc} | {f"probe/{name}": value for name, value in named.items()})
            say(f"{place()} | probe AUROC {probe_auroc:.4f} ({', '.join(f'{k} {v:.3f}' for k, v in named.items())})")

    # ----------------------------------------------------------------------------------------------------------- saving
    def save():
        if rank == 0:
            for parameter in net.parameters():
                if not parameter.isfinite().all():
                    raise FloatingPointError(f"a weight is not finite after step {step}")
            config = vars(args) | {"mean": MEAN, "std": STD}
            save_checkpoint(out / "last.pt", {
                "model": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "step": step, "epoch": step * args.batch_size // len(train), "config": config, "images": fingerprint,
                "rng": torch.get_rng_state()})
            save_checkpoint(out / "encoder.pt", {"format": FORMAT, "arch": args.arch, "step": step, "config": config,
                                                 "encoder": net.encoder.state_dict()})

    signalled = []                  # often twice, by the cluster and by torchrun: no reason to leave without saving
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signalled.append(number))

    # --------------------------------------------------------------------------------------------------------- training
    if args.synthetic:
        shape = (args.batch_size // world_size, 1, args.image_size, args.image_size)
        loader = [[torch.randn(shape, device=device), torch.randn(shape, device=device), None]] * (stop_at - step)
    else:
        loader = train_loader(manifest, train, args.batch_size, range(step, stop_at), 2, augmentation, preprocessing,
                              args.seed, device, rank, world_size, threads, half=dtype is not None)
    if step == 0 and step in probe_steps:
        probe()
    model.train()
    never = torch.iinfo(torch.int64).max
    first_bad = torch.tensor(never, device=device)          # first step whose loss is not finite, found without waiting
    loss_sum, waited, logged, clock = torch.zeros((), device=device), 0.0, step, time.perf_counter()
    batches, first = iter(loader), step
    while step < stop_at:
        lr = learning_rate(step, total_steps, warmup_steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        asked = time.perf_counter()
        view1, view2, index = next(batches)                                                 # (N, 1, S, S) each
        waited += time.perf_counter() - asked
        x = torch.cat([view1, view2]).contiguous(memory_format=torch.channels_last)         # (2N, 1, S, S)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            z1, z2 = model(x).chunk(2)                                                      # (N, proj_dim) each
        loss = nt_xent(z1, z2, args.temperature)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.detach()
        first_bad = first_bad.minimum(torch.where(loss.isfinite(), never, step + 1))
        if rank == 0 and step == first:
            pairs = torch.stack([view1[:8], view2[:8]]).flatten(0, 1).float().cpu() * STD + MEAN
            writer.add_image("views", make_grid(pairs.clamp(0, 1), nrow=len(view1[:8])), step)
        step += 1

        if step % args.log_every == 0 or step == stop_at:
            scalars = diagnostics(z1.detach(), z2.detach()) | {"loss": loss_sum / (step - logged)}
            averages = torch.stack(list(scalars.values()))
            if world_size > 1:
                dist.all_reduce(averages)
                dist.all_reduce(first_bad, dist.ReduceOp.MIN)
            if first_bad < never:
                raise FloatingPointError(f"the loss is not finite at step {first_bad.item()}")
            scalars = dict(zip(scalars, (averages / world_size).tolist()))
            seconds = time.perf_counter() - clock
            speed = (step - logged) * args.batch_size / seconds
            log(scalars | {"chance": chance_level(args.batch_size), "lr": lr, "images_per_second": speed,
                           "wait_seconds": waited})
            left = int((total_steps - step) * seconds / (step - logged))
            say(f"{place()} | loss {scalars['loss']:.4f} (chance {chance_level(args.batch_size):.2f}) | lr {lr:.2e} | "
                f"{speed:.0f} img/s | wait {waited / seconds:.0%} | eta {left // 3600}h{left // 60 % 60:02d}m")
            loss_sum.zero_()
            waited, logged, clock = 0.0, step, time.perf_counter()
        pause = time.perf_counter()
        if step in probe_steps:
            probe()
        stop = torch.tensor(signalled[0] if signalled else 0)
        if world_size > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)        # over gloo, on the CPU: all leave at the same step
        if step % args.save_every == 0 or step == stop_at or step in probe_steps or stop:
            save()
        if stop:
            say(f"{signal.Signals(stop.item()).name} at step {step}: saved {out / 'last.pt'}; the same command goes on")
            sys.exit(128 + stop.item())
        clock += time.perf_counter() - pause                # speed is that of training
    if rank == 0:
        flags = {k: v if isinstance(v, int | float | bool) else str(v) for k, v in vars(args).items()}
        for summary in hparams(flags, {"loss": scalars["loss"], "probe/auroc": probe_auroc}):
            writer.file_writer.add_summary(summary)
        writer.close()
    say(f"done: {out / 'encoder.pt'}")


if __name__ == "__main__":
    main()
