"""Stage 1: SimCLR on unlabelled chest radiographs (Chen et al. 2020). Data folder in, encoder out.

    python pretrain.py --demo                                   drawn radiographs, a small ResNet
    python pretrain.py --data data/nih                          one GPU, or none
    torchrun --nproc_per_node=8 pretrain.py --data data/nih     eight GPUs: the same batches, faster
    tensorboard --logdir runs                                   the curves

The run folder (--out) gets encoder.pt, which is all that the later stages need;
last.pt, from which the same command goes on after any interruption as though there
had been none; and log.jsonl, config.json and TensorBoard's event files. A last.pt
that is copied into a new run folder starts the run there, with another learning
rate, say.
"""
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import launch  # before PyTorch, which loads for seconds: from here on Ctrl-C is one sentence
import numpy as np
import torch
from torch import Tensor

from checkpoint import ARCHITECTURES
from common import DataError
from dali_pipeline import Preprocessing, train_loader
from flags import PRECISION, THREADS, flag
from lars import make_optimizer
from loss import diagnostics, nt_xent
from manifest import Manifest, read_manifest
from model import SimCLR, build_encoder
from probe import Probe, probe_sentence
from run import Compute, warmup_and_cosine
from run_folder import Curves, Progress, diverged
from sampling import Sampling, choose_sampling
from training import StopSignal, Training, backward_in_pieces, piece_size
from views import Augmentation

# Peak learning rates for a batch of 256; larger batches get more in proportion (Goyal et al. 2017).
BASE_LR = {"lars": 0.3, "adam": 5e-4, "adamw": 5e-4}
DEMO_LR = 2e-3  # of adamw
DEFAULT_VIEWS = Augmentation()


# --------------------------------------------------------------------------------------------------
# Flags: name, type, default, what it means, and the range of a number. A run may go on with
# another value of a flag that `may_differ`.

@dataclass
class Config:
    """The defaults are the published recipe for chest radiographs, but for crop, brightness,
    contrast and temperature, which docs/results.md chose on NIH's; --demo has others."""
    bf16_on_cpu: ClassVar[bool] = True  # what --precision auto may choose

    data: str = flag(
        "data/nih", "data folder, made by prepare.py", section="data and run folder")
    out: str = flag("runs/pretrain", "run folder", may_differ=True)
    demo: bool = flag(False, "small run on data/demo, made if missing, into runs/demo")
    overwrite: bool = flag(
        False, "begin anew in a run folder that holds a run", may_differ=True)
    seed: int = flag(0, "random seed of weights, order and views", 0, 2**63 - 1)

    arch: str = flag("resnet50", "encoder", choices=ARCHITECTURES, section="network")
    init: str = flag("random", "first weights of the encoder", metavar="random|imagenet|PATH")
    proj_layers: int = flag(2, "layers of the projection head", 1)
    proj_width: int = flag(0, "width inside the head; 0: that of the features", 0)
    proj_dim: int = flag(128, "width of the projections", 1)

    image_size: int = flag(224, "side of a view, pixels", 1, section="preprocessing and views")
    normalize: str = flag(
        "fixed", "by a fixed mean and deviation; image: each image is brought to these",
        choices=("fixed", "image"))
    clahe: bool = flag(False, "adaptive histogram equalisation of each image")
    crop_area: tuple[float, float] = flag(
        DEFAULT_VIEWS.crop_area, "area of the crop, as a share of the image",
        metavar=("LOW", "HIGH"))
    flip: float = flag(DEFAULT_VIEWS.flip, "probability of a mirror image", 0, 1)
    rotation: float = flag(DEFAULT_VIEWS.rotation, "largest angle to either side, degrees", 0, 360)
    brightness: float = flag(DEFAULT_VIEWS.brightness, "factor drawn from 1 ± this", 0, 0.999)
    contrast: float = flag(DEFAULT_VIEWS.contrast, "factor drawn from 1 ± this", 0, 0.999)
    blur: tuple[float, float] = flag(
        DEFAULT_VIEWS.blur, "sigma, pixels of the view; 0 0 for none", 0, 1000,
        metavar=("LOW", "HIGH"))
    gamma: tuple[float, float] = flag(
        DEFAULT_VIEWS.gamma, "exponent of a view's gray levels in 0 to 1, log-uniform, to imitate "
        "another machine; 1 1 for none", 0.01, 100, metavar=("LOW", "HIGH"))
    equalize: float = flag(
        DEFAULT_VIEWS.equalize, "probability that a view's histogram is equalised", 0, 1)

    epochs: int = flag(100, "passes over the train split", 1, section="optimisation")
    batch_size: int = flag(512, "images over all processes", 1)
    micro_batch: int = flag(
        0, "most images that a process encodes at once, where its batch is too large for the "
        "GPU's memory; the loss stays that of the whole batch; 0: all of them", 0)
    temperature: tuple[float, ...] = flag(
        (0.1,), "of NT-Xent; with two, a cosine goes from HIGH to LOW and back", 1e-6, 1e6,
        metavar=("LOW", "HIGH"))
    positives: str = flag(
        "image", "what the second view is of: the same image, or another of its patient or "
        "study, where there is one", choices=("image", "patient", "study"))
    balance: tuple[str, ...] = flag(
        (), "draw images in an epoch so that each patient, or present and absent of each of these "
        "labels, comes equally often", metavar="patient|LABEL")
    weigh_loss: bool = flag(
        False, "weigh the loss by --balance, instead of drawing by it")
    same_patient: bool = flag(
        False, "count other images of an anchor's patient among its negatives")
    decoupled: bool = flag(False, "leave the positive out of the denominator")
    hardness: float = flag(
        0.0, "how much more the similar negatives weigh, beta of Robinson et al.", 0, 100)
    prior: float = flag(
        0.0, "share of negatives that are of the anchor's kind, tau+ of Chuang et al.", 0, 0.999)
    optimizer: str = flag("lars", "optimizer; lars as published", choices=tuple(BASE_LR))
    lr: float = flag(  # None until __post_init__
        None, "peak learning rate for a batch of 256 (default: "
        + ", ".join(f"{name} {lr:g}" for name, lr in BASE_LR.items())
        + f"; adamw with --demo {DEMO_LR:g})", 1e-12, 1e30)
    weight_decay: float = flag(1e-6, "decay of weights, not of biases and batch norm", 0, 1e6)
    warmup_epochs: float = flag(10.0, "epochs of linear warm-up", 0, 1e6)
    max_steps: int | None = flag(
        None, "stop after this step; the schedule still spans --epochs", 1, may_differ=True)

    probe_every: int = flag(5, "epochs from one probe to the next; 0 for none", 0,
                            section="probe: k nearest neighbours on val, where there are labels")
    probe_data: str | None = flag(
        None, "another data folder, with labels, to probe on (default: --data)")
    probe_images: int = flag(10_000, "images at most, of train and of val each", 1)

    precision: str = flag(**PRECISION, section="how it computes")
    compile: bool = flag(False, "torch.compile the network", may_differ=True)
    threads: int | None = flag(**THREADS)
    log_every: int = flag(10, "steps from one log line to the next", 1, may_differ=True)
    save_every: int = flag(250, "steps from one checkpoint to the next", 1, may_differ=True)

    @staticmethod
    def presets(args) -> dict:
        """Other defaults for --demo, for which flags.parse asks: minutes on two CPU cores."""
        return {} if not args.demo else dict(
            data="data/demo", out="runs/demo", arch="resnet18", image_size=64,
            normalize="image", rotation=20.0, blur=(0.1, 1.0),
            brightness=0.3, contrast=0.3, epochs=14, batch_size=128,
            optimizer="adamw", warmup_epochs=1.0, probe_every=4)

    def augmentation(self) -> Augmentation:
        """Each of its fields has a flag of the same name."""
        return Augmentation(**{field.name: getattr(self, field.name)
                               for field in dataclasses.fields(Augmentation)})

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.image_size, self.normalize, self.clahe)

    def __post_init__(self):
        if self.lr is None:
            in_demo = self.demo and self.optimizer == "adamw"
            self.lr = DEMO_LR if in_demo else BASE_LR[self.optimizer]
        # What the range of one flag cannot say.
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"--crop-area {low} {high} must rise, within 0 to 1")
        if self.batch_size < 2:
            raise ValueError("--batch-size 1 leaves nothing to learn: the loss tells an image's "
                             "two views from those of other images, and would be 0")
        if len(self.temperature) > 2 or list(self.temperature) != sorted(self.temperature):
            raise ValueError("--temperature takes one number, or two that rise")
        low, high = self.blur
        if not (0 == low == high or 0 < low <= high):
            raise ValueError(f"--blur {low} {high} must rise and be positive, or be 0 0")
        if self.gamma[0] > self.gamma[1]:
            raise ValueError(f"--gamma {self.gamma[0]:g} {self.gamma[1]:g} must rise")
        if self.weigh_loss and not self.balance:
            raise ValueError("--weigh-loss needs --balance, which says by what")
        if self.positives != "image" and self.same_patient:
            raise ValueError(f"--same-patient would count images among an anchor's negatives that "
                             f"--positives {self.positives} makes its positives")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs:g} leaves nothing of --epochs "
                             f"{self.epochs}: give a smaller --warmup-epochs too")


# --------------------------------------------------------------------------------------------------
# The stage. What it calls stands below.

def pretrain(config: Config, compute: Compute, resources: contextlib.ExitStack) -> None:
    """Train until --epochs, --max-steps or a signal. FloatingPointError where it diverges.

    resources: what has to be undone however the run ends, a lock for example."""
    # The data: which images there are, and which of them form a batch.
    manifest, train = read_data(config, compute)
    sampling = choose_sampling(manifest, train, config.balance, config.weigh_loss,
                               config.positives, config.same_patient)
    probe = choose_probe(config, manifest)
    schedule = Schedule(config, len(train))

    # What is trained. Its weights, optimizer and step are new, or from last.pt where the run
    # folder has one; the folder is locked for this run.
    training = build(config, compute)
    training.begin_or_go_on(manifest, train, probe, resources)
    if training.step >= schedule.last_step:
        training.end_at_once(schedule.total_steps)
        return

    # Two views of each image.
    batches = train_loader(
        manifest, train, config.batch_size, steps=range(training.step, schedule.last_step),
        views=2, augmentation=config.augmentation(), preprocessing=config.preprocessing(),
        seed=config.seed, draw_weights=sampling.draw_weights, pair_group=sampling.pair_group,
        **compute.loader_arguments())
    introduce(training, schedule, probe)
    train_steps(training, schedule, iter(batches), sampling, probe, resources)


def train_steps(training: Training, schedule: "Schedule", batches: Iterator[list[Tensor]],
                sampling: Sampling, probe: Probe | None, resources: contextlib.ExitStack) -> None:
    """The loop, from the step of `training` to the last one of `schedule` or a signal."""
    config, compute, say = training.config, training.compute, training.compute.say
    net, optimizer, scaler = training.net, training.optimizer, training.scaler
    # model is net, compiled and in DistributedDataParallel, for training steps. Probes and
    # checkpoints use net itself.
    model = compute.data_parallel(torch.compile(net) if config.compile else net)
    model.train()
    own_batch = config.batch_size // compute.world_size
    piece = piece_size(own_batch, config.micro_batch)  # images encoded at once
    # So that a run that goes on is the same to the bit, see there.
    compute.rehearse(model, (2 * piece, 1, config.image_size, config.image_size))
    start_step = training.step
    curves = Curves(config, compute.rank == 0, start_step, training.last_probe)
    progress = Progress(config, config.batch_size, compute, start_step)
    stop = StopSignal(resources)

    # After `step` steps: probe, save, leave if it is time; then take one more.
    while True:
        step = training.step
        at_end, at_probe = step == schedule.last_step, step in schedule.probe_steps
        # To ask each other, processes wait for the slowest: only at some steps.
        stop_signal = stop.received(compute, ask=step % 5 == 0 or at_probe or at_end)
        # Every few epochs: do the features get better, and not only the loss? Not twice at one
        # step, as after a restart. A stop signal leaves it to the next start; after the last step
        # there is none.
        probed = False
        if probe and at_probe and step > training.last_probe and (at_end or not stop_signal):
            with progress.pause():
                scores = probe.scores(net.encoder, piece, compute)
            if not scores:
                raise diverged(f"the features are not finite after step {step}", config)
            training.last_probe, probed = step, True
            curves.add(step, schedule.epoch(step), scores)
            say(f"{schedule.position(step)} | {probe_sentence(scores)}")

        # Save after a probe, every few steps, at the end and at a signal. The step from which this
        # run started is in last.pt, and is saved again after a probe alone.
        due = step > start_step and (step % config.save_every == 0 or at_end or stop_signal)
        if step > 0 and (probed or due) and compute.rank == 0:
            with progress.pause():
                training.save()
        if at_end:
            break
        if stop_signal:
            training.leave(stop_signal)

        # Learning rate and temperature depend on the step alone.
        lr, tau = schedule.learning_rate(step), schedule.temperature(step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Load two views of each image.
        with progress.waiting():
            view1, view2, index = next(batches)                         # (B, 1, S, S) each, (B,)
        if step == start_step:
            curves.add_views(view1, view2, step)
        x = torch.cat([view1, view2])                                   # (2B, 1, S, S)
        patients = compute.send(sampling.patients[index])               # (B,)
        weights = sampling.loss_weights                                 # (N,) or None
        weights = None if weights is None else compute.send(weights[index])
        loss_of = functools.partial(
            nt_xent, temperature=tau, patients=patients, weights=weights,
            decoupled=config.decoupled, hardness=config.hardness, prior=config.prior)

        # Encode the views as one batch, compare each projection with those of all processes, and
        # go back to the weights.
        if piece == own_batch:
            with compute.autocast():
                z1, z2 = model(x).chunk(2)                              # (B, proj_dim) each
            loss = loss_of(z1, z2)
            scaler.scale(loss).backward()
        else:  # --micro-batch: the whole batch's gradient, with batch norm over a piece at a time
            z1, z2, loss = backward_in_pieces(model, x, piece, loss_of, scaler, compute)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        done = training.step = step + 1
        progress.add(loss, done)
        # Every few steps: a point on the curves. Reading the loss waits for the GPU, so not always.
        if done % config.log_every == 0 or done == schedule.last_step:
            watched = diagnostics(z1, z2, patients, weights, config.decoupled)
            # The mean loss since the last point, the speed, and what is watched of this batch,
            # averaged over the processes. FloatingPointError where a loss was not finite.
            scalars = progress.read(done, watched) | {"lr": lr, "temperature": tau}
            curves.add(done, schedule.epoch(done), scalars)
            speed = scalars["images_per_second"]
            say(f"{schedule.position(done)} | loss {scalars['loss']:.4f} (chance "
                f"{scalars['chance']:.2f}) | lr {lr:.2e} | {speed:.0f} img/s | wait "
                f"{scalars['wait_share']:.0%} | eta {schedule.time_left(done, speed)}")

    curves.close(config)
    compute.barrier()  # the last save is done before any process leaves
    say(f"done: {training.encoder_file}")


# --------------------------------------------------------------------------------------------------
# The data, and when what happens.

def read_data(config: Config, compute: Compute) -> tuple[Manifest, np.ndarray]:
    """The data folder and the images of its train split; for --demo it is made first."""
    # The other processes wait until the first one has drawn the demo's radiographs.
    if config.demo and compute.rank == 0 and not Path(config.data, "manifest.csv").exists():
        import prepare  # stage 0 is needed for the demo alone
        prepare.main(["demo", "--out", config.data])
    compute.barrier()
    manifest = read_manifest(config.data)
    train = manifest.images("train")
    if config.batch_size > len(train):
        raise DataError(f"--batch-size {config.batch_size} is larger than the train split: "
                        f"{len(train)} images")
    if config.batch_size % compute.world_size:
        raise DataError(f"--batch-size {config.batch_size} is global and must be divisible by the "
                        f"number of processes, {compute.world_size}")
    return manifest, train


def choose_probe(config: Config, manifest: Manifest) -> Probe | None:
    """On --probe-data or the data folder itself; None where it has no labels."""
    if config.probe_data:
        manifest = read_manifest(config.probe_data)
    can_be_probed = manifest.label_names and "val" in manifest.splits
    if config.probe_data and not can_be_probed:
        raise DataError(f"--probe-data {config.probe_data} has no labels or no val split to "
                        "probe by")
    if not (config.probe_every and can_be_probed):
        return None
    return Probe(manifest, config.probe_images, config.seed, config.preprocessing())


class Schedule:
    """When things happen, in steps. Batches run on from one epoch into the next."""

    def __init__(self, config: Config, n_images: int):
        """n_images: in the train split."""
        self.n_images, self.batch_size = n_images, config.batch_size
        # Larger batches take larger steps, in proportion.
        self.peak_lr = config.lr * config.batch_size / 256
        self.temperatures = config.temperature
        self.total_steps = self.step_at(config.epochs)
        self.warmup_steps = config.warmup_epochs * n_images / config.batch_size  # need not be whole
        # Where this run stops.
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        # The features are probed, if they are, before the first step, every --probe-every epochs,
        # and after the last step of the schedule.
        probed = [*range(0, config.epochs, config.probe_every or config.epochs), config.epochs]
        self.probe_steps = {self.step_at(epoch) for epoch in probed}

    def step_at(self, epoch: int) -> int:
        """The whole steps in so many epochs."""
        return (epoch * self.n_images) // self.batch_size

    def epoch(self, step: int) -> float:
        return step * self.batch_size / self.n_images

    def learning_rate(self, step: int) -> float:
        return warmup_and_cosine(step, self.total_steps, self.warmup_steps, self.peak_lr)

    def temperature(self, step: int) -> float:
        """Constant, or a cosine from high to low and back over the run (Kukleva et
        al. 2023): low ones tell images apart, high ones bring groups together."""
        low, high = self.temperatures[0], self.temperatures[-1]  # of one number, both
        return low + (high - low) * (1 + math.cos(2 * math.pi * step / self.total_steps)) / 2

    def position(self, step: int) -> str:
        return f"epoch {int(self.epoch(step)):03d} step {step:05d}/{self.total_steps}"

    def time_left(self, step: int, images_per_second: float) -> str:
        seconds = (self.last_step - step) * self.batch_size / images_per_second
        return f"{int(seconds / 3600)}h{int(seconds / 60) % 60:02d}m"


# --------------------------------------------------------------------------------------------------
# What is trained.

def build(config: Config, compute: Compute) -> Training:
    """Network, optimizer and scaler, with new weights."""
    torch.manual_seed(config.seed)
    # A run that goes on takes its weights from last.pt, later: do not read or download --init.
    goes_on = Path(config.out, "last.pt").exists() and not config.overwrite
    encoder = build_encoder(config.arch, "random" if goes_on else config.init, compute.say)
    net = SimCLR(encoder, config.proj_layers, config.proj_width, config.proj_dim)
    net = compute.to_device(net)
    optimizer = make_optimizer(  # each step sets its own learning rate
        net, config.optimizer, config.lr, config.weight_decay)
    # Small gradients underflow in float16, so that their loss is scaled up.
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    return Training(config, compute, net, optimizer, scaler)


def introduce(training: Training, schedule: Schedule, probe: Probe | None) -> None:
    """Say what is about to be trained, on what, and how."""
    config, compute, say = training.config, training.compute, training.compute.say
    parameters = sum(p.numel() for p in training.net.parameters()) / 1e6
    start = training.last_file if training.step else config.init
    say(f"{config.arch} from {start}, {parameters:.1f} M parameters, {compute.precision} on "
        f"{compute.world_size} x {compute.name}")
    say(f"{schedule.n_images} images of {config.data} at {config.image_size} px, {config.epochs} "
        f"epochs = {schedule.total_steps} steps of {config.batch_size} images "
        f"({config.batch_size // compute.world_size} a process)")
    say(f"{config.optimizer}, learning rate {schedule.peak_lr:.3g} = {config.lr:g} x "
        f"{config.batch_size} / 256")
    say(str(probe) if probe else
        "no probe of the features: it needs --probe-every, labels and a val split")
    if training.step:
        say(f"going on from {training.last_file}, step {training.step}")


def main(argv: list[str] | None = None) -> None:
    launch.main(pretrain, Config, argv)


if __name__ == "__main__":
    main()
