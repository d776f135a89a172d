"""Stage 1: SimCLR on unlabelled chest radiographs (Chen et al. 2020). Data folder in, encoder out.

    python pretrain.py --demo                                   drawn radiographs, a small ResNet
    python pretrain.py --data data/nih                          one GPU, or none
    torchrun --nproc_per_node=8 pretrain.py --data data/nih     eight GPUs: the same batches, faster
    tensorboard --logdir runs                                   the curves

The run folder (--out) gets encoder.pt, which is all that the later stages need; last.pt,
from which the same command resumes after an interruption, as though there had been none; and
log.jsonl, config.json and TensorBoard's event files. To go on with another learning rate, for
example, copy last.pt into a new run folder; network, optimizer, batch size and images must stay.
"""
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import launch  # first: it answers Ctrl-C in one sentence, also while PyTorch loads
import numpy as np
import torch
from torch import Tensor

from checkpoint import ARCHITECTURES
from common import DataError
from dali_pipeline import Preprocessing, train_loader
from flags import PRECISION, THREADS, flag
from lars import make_optimizer, warmup_and_cosine
from loss import diagnostics, nt_xent
from manifest import Manifest, read_manifest
from model import SimCLR, build_encoder
from probe import Probe, probe_sentence
from run import Compute
from run_folder import Curves, Progress, diverged
from sampling import Sampling, choose_sampling
from training import StopSignal, Training, backward_in_pieces, piece_size
from views import Augmentation

# Peak learning rates for a batch of 256; larger batches get more in proportion (Goyal et al. 2017).
BASE_LR = {"lars": 0.3, "adam": 5e-4, "adamw": 5e-4}
DEMO_LR = 2e-3  # for adamw
AUGMENTATION = Augmentation()


# --------------------------------------------------------------------------------------------------
# Flags: name, type, default, meaning, and for a number the smallest and largest value. When a run
# is resumed, only those that `may_differ` may have other values; folders may move.

@dataclass
class Config:
    """The defaults are the published recipe for chest radiographs, except that images of the same
    patient are no negatives, and that crop, brightness, contrast and temperature were chosen anew
    (docs/results.md)."""

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
        "fixed", "by a fixed mean and deviation; image: first shift and scale each image to these",
        choices=("fixed", "image"))
    clahe: bool = flag(False, "adaptive histogram equalisation of each image")
    crop_area: tuple[float, float] = flag(
        AUGMENTATION.crop_area, "area of the crop, as a share of the image",
        metavar=("LOW", "HIGH"))
    flip: float = flag(AUGMENTATION.flip, "probability of a mirror image", 0, 1)
    rotation: float = flag(AUGMENTATION.rotation, "largest angle to either side, degrees", 0, 360)
    brightness: float = flag(AUGMENTATION.brightness, "factor drawn from 1 ± this", 0, 0.999)
    contrast: float = flag(AUGMENTATION.contrast, "factor drawn from 1 ± this", 0, 0.999)
    blur: tuple[float, float] = flag(
        AUGMENTATION.blur, "sigma, pixels of the view; 0 0 for none", 0, 1000,
        metavar=("LOW", "HIGH"))
    gamma: tuple[float, float] = flag(
        AUGMENTATION.gamma, "exponent of a view's gray levels in 0 to 1, log-uniform, to imitate "
        "another machine; 1 1 for none", 0.01, 100, metavar=("LOW", "HIGH"))
    equalize: float = flag(
        AUGMENTATION.equalize, "probability that a view's histogram is equalised", 0, 1)

    epochs: int = flag(100, "passes over the train split", 1, section="optimisation")
    batch_size: int = flag(512, "images over all processes", 1)
    micro_batch: int = flag(
        0, "images that a process encodes at once, at most, if its batch is too large for the "
        "GPU's memory; the loss is of the whole batch, batch norm of a part; 0: all of them", 0)
    temperature: tuple[float, ...] = flag(
        (0.1,), "of NT-Xent; two: a cosine over the run, from HIGH to LOW and back", 1e-6, 1e6,
        metavar=("LOW", "HIGH"))
    positives: str = flag(
        "image", "what the second view shows: the same image, or another one of its patient or "
        "study, if there is one", choices=("image", "patient", "study"))
    balance: tuple[str, ...] = flag(
        (), "draw all patients equally often in an epoch, or images with and without each of these "
        "labels", metavar="patient|LABEL")
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
    lr: float = flag(  # __post_init__ replaces None
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

    precision: str = flag(**PRECISION, section="how it computes")  # auto, bf16, fp16 or fp32
    compile: bool = flag(False, "torch.compile the network", may_differ=True)
    threads: int | None = flag(**THREADS)  # of the loader
    log_every: int = flag(10, "steps from one log line to the next", 1, may_differ=True)
    save_every: int = flag(250, "steps from one checkpoint to the next", 1, may_differ=True)

    @staticmethod
    def presets(args) -> dict:
        """The defaults of --demo, which takes minutes on two CPU cores; called by flags.parse."""
        if not args.demo:
            return {}
        return dict(
            data="data/demo", out="runs/demo", arch="resnet18", image_size=64,
            normalize="image", rotation=20.0, blur=(0.1, 1.0),
            brightness=0.3, contrast=0.3, epochs=14, batch_size=128,
            optimizer="adamw", warmup_epochs=1.0, probe_every=4)

    def augmentation(self) -> Augmentation:
        """Each of its fields is also a flag."""
        return Augmentation(**{field.name: getattr(self, field.name)
                               for field in dataclasses.fields(Augmentation)})

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.image_size, self.normalize, self.clahe)

    def __post_init__(self):
        if self.lr is None:  # it depends on --optimizer, also for --demo
            in_demo = self.demo and self.optimizer == "adamw"
            self.lr = DEMO_LR if in_demo else BASE_LR[self.optimizer]
        # Rules beyond the range of a single number.
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
    """Train until --epochs, --max-steps or a signal. FloatingPointError if it diverges.

    resources: closed however the run ends; for example the lock of the run folder."""
    # The data: which images there are, how they are drawn, and which are probed.
    manifest, train = read_data(config, compute)
    sampling = choose_sampling(manifest, train, config.balance, config.weigh_loss,
                               config.positives, config.same_patient)
    probe = choose_probe(config, manifest)
    schedule = Schedule(config, len(train))

    # The network and its optimizer. This refuses a run folder that was made with other flags or
    # data, locks the folder, and loads last.pt if there is one.
    training = build(config, compute)
    training.begin_or_go_on(manifest, train, probe, resources)
    if training.step >= schedule.last_step:
        training.already_done(schedule.total_steps)
        return

    # Two views of each image, and the training steps.
    batches = train_loader(
        manifest, train, config.batch_size, steps=range(training.step, schedule.last_step),
        views=2, augmentation=config.augmentation(), preprocessing=config.preprocessing(),
        seed=config.seed, draw_weights=sampling.draw_weights, pair_group=sampling.pair_group,
        **compute.loader_arguments())
    introduce(training, schedule, probe)
    train_steps(training, schedule, iter(batches), sampling, probe, resources)


def train_steps(training: Training, schedule: "Schedule", batches: Iterator[list[Tensor]],
                sampling: Sampling, probe: Probe | None, resources: contextlib.ExitStack) -> None:
    """The loop, from the step of `training` to the last step of `schedule` or to a signal."""
    config, compute, say = training.config, training.compute, training.compute.say
    net, optimizer, scaler = training.net, training.optimizer, training.scaler
    # model is net, compiled and in DistributedDataParallel. Steps use model; probes and
    # checkpoints use net.
    model = compute.data_parallel(torch.compile(net) if config.compile else net)
    model.train()
    own_batch = config.batch_size // compute.world_size
    piece = piece_size(own_batch, config.micro_batch)  # images at once, two views each
    # DistributedDataParallel sums in another order in its first backward pass: take that pass now.
    compute.rehearse(model, (2 * piece, 1, config.image_size, config.image_size))
    start_step = training.step
    curves = Curves(config, compute.rank == 0, start_step, training.last_probe)
    progress = Progress(config, config.batch_size, compute, start_step)
    stop = StopSignal(resources)

    # Each round begins after `step` steps. It probes, saves or ends if it is time, and then takes
    # one more step.
    while True:
        step = training.step
        at_end, at_probe = step == schedule.last_step, step in schedule.probe_steps
        # Processes tell each other of a signal. That waits for the slowest, so not in every step.
        stop_signal = stop.received(compute, ask=step % 5 == 0 or at_probe or at_end)

        # Probe every few epochs: do the features get better, and not only the loss? A run that was
        # resumed at this step may have been probed here before (last_probe is -1 at first). After
        # a signal there is no time for a probe; the resumed run does it.
        probed = False
        if probe and at_probe and step > training.last_probe and (at_end or not stop_signal):
            with progress.pause():
                scores = probe.scores(net.encoder, piece, compute)
            if not scores:  # none, if a feature is not finite
                raise diverged(f"the features are not finite after step {step}", config)
            training.last_probe, probed = step, True
            curves.add(step, schedule.epoch(step), scores)
            say(f"{schedule.position(step)} | {probe_sentence(scores)}")

        # Save every few steps, after a probe, at a signal and at the end. The state that this run
        # started from is in last.pt already, unless its probe is new; new weights are not saved.
        at_save = probed or at_end or stop_signal or step % config.save_every == 0
        unsaved = step > 0 and (probed or step > start_step)
        if at_save and unsaved and compute.rank == 0:
            with progress.pause():
                training.save()
        if at_end:
            break
        if stop_signal:
            training.leave(stop_signal)  # exits

        # Learning rate and temperature of this step.
        lr, tau = schedule.learning_rate(step), schedule.temperature(step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Load two views of each image.
        with progress.waiting():
            view1, view2, index = next(batches)                         # (B, 1, S, S) each, (B,)
        if step == start_step:
            curves.add_views(view1, view2, step)
        patients = compute.send(sampling.patients[index])               # (B,)
        loss_weights = None                                             # (B,) with --weigh-loss
        if sampling.loss_weights is not None:
            loss_weights = compute.send(sampling.loss_weights[index])
        loss_of = functools.partial(
            nt_xent, temperature=tau, patients=patients, weights=loss_weights,
            decoupled=config.decoupled, hardness=config.hardness, prior=config.prior)

        # Encode all views, compare each projection with those of all processes, and go back.
        if piece == own_batch:
            with compute.autocast():
                z1, z2 = model(torch.cat([view1, view2])).chunk(2)      # (B, proj_dim) each
            loss = loss_of(z1, z2)
            scaler.scale(loss).backward()
        else:  # --micro-batch: the whole batch's loss; batch norm sees one piece at a time
            z1, z2, loss = backward_in_pieces(
                model, view1, view2, piece, loss_of, scaler, compute)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step = training.step = step + 1
        progress.add(loss, step)

        # Log every few steps, because reading the loss waits for the GPU.
        if step % config.log_every == 0 or step == schedule.last_step:
            watched = diagnostics(z1, z2, patients, loss_weights, config.decoupled)
            # The mean loss since the last log line, and `watched` of this batch, over all
            # processes. FloatingPointError if a loss was not finite.
            scalars = progress.read(step, watched) | {"lr": lr, "temperature": tau}
            curves.add(step, schedule.epoch(step), scalars)
            speed = scalars["images_per_second"]
            say(f"{schedule.position(step)} | loss {scalars['loss']:.4f} (chance "
                f"{scalars['chance']:.2f}) | lr {lr:.2e} | {speed:.0f} img/s | wait "
                f"{scalars['wait_share']:.0%} | eta {schedule.time_left(step, speed)}")

    curves.close(config)
    compute.barrier()  # no process leaves before the last save is done
    say(f"done: {training.encoder_file}")


# --------------------------------------------------------------------------------------------------
# The data and the schedule.

def read_data(config: Config, compute: Compute) -> tuple[Manifest, np.ndarray]:
    """The data folder and the images of its train split; --demo makes the folder first."""
    if config.batch_size % compute.world_size:
        raise DataError(f"--batch-size {config.batch_size} is global and must be divisible by the "
                        f"number of processes, {compute.world_size}")
    if config.demo:
        make_demo(config, compute)
    manifest = read_manifest(config.data)
    train = manifest.images("train")
    if config.batch_size > len(train):
        raise DataError(f"--batch-size {config.batch_size} is larger than the train split: "
                        f"{len(train)} images")
    return manifest, train


def make_demo(config: Config, compute: Compute) -> None:
    """The data folder of --demo, if it is not there. The other processes wait for the first."""
    if compute.rank == 0 and not Path(config.data, "manifest.csv").exists():
        import prepare  # stage 0, needed by the demo alone
        prepare.main(["demo", "--out", config.data])
    compute.barrier()


def choose_probe(config: Config, manifest: Manifest) -> Probe | None:
    """A probe on --probe-data or on the data folder itself; None if that has no labels."""
    if not config.probe_every:
        return None
    if config.probe_data:
        manifest = read_manifest(config.probe_data)
    if manifest.label_names and "val" in manifest.splits:
        return Probe(manifest, config.probe_images, config.seed, config.preprocessing())
    if config.probe_data:
        raise DataError(f"--probe-data {config.probe_data} has no labels or no val split to "
                        "probe by")
    return None


class Schedule:
    """When things happen, in steps. A batch may end one epoch and begin the next."""

    def __init__(self, config: Config, n_images: int):
        """n_images: in the train split."""
        self.n_images, self.batch_size = n_images, config.batch_size
        # Larger batches take larger steps, in proportion.
        self.peak_lr = config.lr * config.batch_size / 256
        self.temperatures = config.temperature
        self.total_steps = self.step_at(config.epochs)
        self.warmup_steps = config.warmup_epochs * n_images / config.batch_size  # need not be whole
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        # Probe before the first step, every --probe-every epochs, and after the last epoch.
        self.probe_steps = set()
        if config.probe_every:
            probed = [*range(0, config.epochs, config.probe_every), config.epochs]
            self.probe_steps = {self.step_at(epoch) for epoch in probed}

    def step_at(self, epoch: int) -> int:
        """How many whole steps are in so many epochs."""
        return (epoch * self.n_images) // self.batch_size

    def epoch(self, step: int) -> float:
        return step * self.batch_size / self.n_images

    def learning_rate(self, step: int) -> float:
        return warmup_and_cosine(step, self.total_steps, self.warmup_steps, self.peak_lr)

    def temperature(self, step: int) -> float:
        """Constant, or a cosine from high to low and back over the run (Kukleva et
        al. 2023): low temperatures tell images apart, high ones bring groups together."""
        low, high = self.temperatures[0], self.temperatures[-1]  # the same if there is only one
        return low + (high - low) * (1 + math.cos(2 * math.pi * step / self.total_steps)) / 2

    def position(self, step: int) -> str:
        return f"epoch {int(self.epoch(step)):03d} step {step:05d}/{self.total_steps}"

    def time_left(self, step: int, images_per_second: float) -> str:
        seconds = (self.last_step - step) * self.batch_size / images_per_second
        return f"{int(seconds / 3600)}h{int(seconds / 60) % 60:02d}m"


# --------------------------------------------------------------------------------------------------
# The network and its optimizer.

def build(config: Config, compute: Compute) -> Training:
    """Network, optimizer and scaler, at step 0."""
    torch.manual_seed(config.seed)
    # A run that is resumed will load its weights from last.pt: do not read or download --init.
    resumes = Path(config.out, "last.pt").exists() and not config.overwrite
    encoder = build_encoder(config.arch, "random" if resumes else config.init, compute.say)
    net = SimCLR(encoder, config.proj_layers, config.proj_width, config.proj_dim)
    net = compute.prepare(net)
    # Each step sets the learning rate anew.
    optimizer = make_optimizer(net, config.optimizer, config.lr, config.weight_decay)
    # In float16 small gradients would become 0; the loss is scaled up to prevent that.
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    return Training(config, compute, net, optimizer, scaler)


def introduce(training: Training, schedule: Schedule, probe: Probe | None) -> None:
    """Print what is about to be trained, on what, and how."""
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
    # In bf16 a CPU trains as well as in float32, and faster.
    launch.main(pretrain, Config, argv, bf16_on_cpu=True)


if __name__ == "__main__":
    main()
