"""Stage 2: what pre-training buys at 1 %, 10 % and all of the labels. Encoder and labels in,
classifier and table out.

    python finetune.py --fraction 0.01              the encoder of pretrain.py, 1 % of the labels
    python finetune.py --init random runs/pretrain/encoder.pt --fraction 0.01 0.1 1 \\
        --mode linear full --seeds 0 1 2            all combinations, in one table
    python finetune.py --mode linear --folds 5 --init A/encoder.pt B/encoder.pt
                                                    which of two encoders? without a look at test
    torchrun --nproc_per_node=8 finetune.py         eight GPUs: the same batches, faster

`linear` fits a logistic regression to the features of the frozen encoder. `full` trains
the encoder as well, and begins with this regression if the encoder was pre-trained. Epochs,
regularisation and thresholds are chosen on val. Test labels decide nothing.

The run folder (--out) gets results.json, results.md and plots; classifier.pt, the
combination that is best on val, for predict.py; log.jsonl and tensorboard/, the curves of
full training; and predictions.pt and last.pt, from which the same command resumes after an
interruption, at the last whole epoch. A command that asks for more fractions, seeds, modes
or initialisations trains only the missing combinations.
"""
import contextlib
import itertools
import json
import math
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import launch  # first: it answers Ctrl-C while PyTorch loads
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import run_folder
from checkpoint import (
    ARCHITECTURES, FORMAT, MALFORMED, CheckpointError, first_not_finite, last_line,
    load_checkpoint, save_checkpoint)
from classifier import image_flags
from common import write_text
from dali_pipeline import eval_loader, train_loader
from flags import ENCODERS, PRECISION, THREADS, flag
from labels import Draw, add_labels, cell_weights, masked_cross_entropy, to_probabilities
from lars import warmup_and_cosine
from linear import LinearProbe, cross_validate, read_features
from probe import extract_features
from run import Compute
from report import report, report_folds
from scores import youden
from study import Combination, Outcome, Study, key_in, read_study
from views import Augmentation

# Full training changes images less than pre-training by default: larger crops, and no blur.
AUGMENTATION = Augmentation(crop_area=(0.6, 1.0), blur=(0.0, 0.0), brightness=0.2, contrast=0.2)
# The files that a run writes and --overwrite deletes. If the first one is there, a run resumes.
RESULTS = ("predictions.pt", "last.pt", "last-*.pt", "classifier.pt", "log.jsonl", "results.*",
           "*.png", "tensorboard/*/events*")


# --------------------------------------------------------------------------------------------------
# Flags: name, type, default, meaning, and for a number the smallest and largest value. A later
# command in the same folder may change those that `may_differ`, to choose other combinations.

@dataclass
class Config:
    """Which combinations are compared, on which labels, and how each is trained."""

    init: tuple[str, ...] = flag(
        (), f"(default {' or '.join(ENCODERS)})", metavar="random|imagenet|PATH", may_differ=True,
        section="what is compared: every combination")
    mode: tuple[str, ...] = flag(("full",), "train the last layer, or everything",
                                 choices=("linear", "full"), may_differ=True)
    fraction: tuple[float, ...] = flag((1.0,), "of the labelled patients", 1e-9, 1,
                                       may_differ=True)
    seeds: tuple[int, ...] = flag((0,), "draws of patients and of heads", 0, 2**63 - 1,
                                  may_differ=True)
    out: str = flag("runs/finetune", "run folder", may_differ=True)
    overwrite: bool = flag(False, "begin anew in a run folder that holds a run", may_differ=True)
    from_head: int | None = flag(None, "keep the first N layers of the projection head, each but "
                                 "the last of all with batch norm and ReLU (default 0: none)", 0,
                                 metavar="N")
    folds: int | None = flag(None, "cross-validate linear classifiers over train and val in K "
                             "folds, and leave test alone (default 0: report on test)", 0,
                             metavar="K")

    labels: tuple[str, ...] = flag((), "columns of the manifest (default: all)", metavar="NAME",
                                   section="labels")
    uncertain: str = flag(
        "ignore", "what -1 is in training: present, absent, left out, a third class",
        choices=("ones", "zeros", "ignore", "multiclass"))
    blank: str = flag("zeros", "what an empty cell is in a row that has labels: absent, or left "
                      "out", choices=("zeros", "ignore"))
    balance: bool = flag(False, "weigh the classes of each label alike")

    data: str | None = flag(None, "data folder, made by prepare.py",
                            section="inherited from the first encoder, unless given")
    arch: str | None = flag(None, "of random and imagenet", choices=ARCHITECTURES)
    image_size: int | None = flag(None, "side of the input, pixels", 32, 4096)
    normalize: str | None = flag(None, "by a fixed mean and deviation, or each image to these",
                                 choices=("fixed", "image"))
    clahe: bool | None = flag(None, "adaptive histogram equalisation")

    epochs: int = flag(20, "passes over the draw", 1, 10**6, section="full fine-tuning")
    batch_size: int = flag(64, "images over all processes", 2, 2**16)
    lr_encoder: float = flag(2e-4, "peak, AdamW, of the encoder and what --from-head keeps",
                             1e-12, 10)
    lr_head: float = flag(2e-3, "peak, AdamW, of the last layer", 1e-12, 10)
    freeze_bn: bool = flag(False, "keep the batch norm statistics of the initialisation")
    peak: bool = flag(False, "add the best test accuracy over epochs (optimistic)")

    precision: str = flag(**PRECISION, section="how it computes")
    threads: int | None = flag(**THREADS)

    def __post_init__(self):
        for name in ("init", "mode", "fraction", "seeds", "labels"):
            setattr(self, name, tuple(dict.fromkeys(getattr(self, name))))  # without repeats
        # 0 means the same as no flag, so config.json gets the same value for both.
        self.from_head, self.folds = self.from_head or None, self.folds or None
        if self.peak and "full" not in self.mode:
            raise ValueError("--peak is over epochs and needs --mode full")
        if self.folds and self.mode != ("linear",):
            raise ValueError("--folds judges linear classifiers and needs --mode linear")
        if self.folds in (1, 2):
            raise ValueError("--folds takes 3 or more: one fold is predicted, one chooses the "
                             "regularisation, and the others are learned from")


# --------------------------------------------------------------------------------------------------
# What a combination leaves in the run folder when it has ended.

def finish(study: Study, c: Combination, outcome: Outcome) -> None:
    """Keep a combination's predictions and, if it is the best on val so far, its classifier."""
    score = study.val_score(outcome.val)
    if score > max((entry["val_score"] for entry in study.predictions.values()), default=-math.inf):
        save_classifier(study, c, outcome)

    labels = study.task.training_labels[study.sample(c)]                    # (m, L)
    of_its_mode = {"strength": outcome.strength, "epoch": outcome.epoch,
                   "history": outcome.history, "peaks": outcome.peaks}
    entry = {name: value for name, value in of_its_mode.items() if value is not None}
    # A plain tuple, because weights_only loading refuses our classes. It finds the same entry as c.
    study.predictions[tuple(c)] = entry | {
        "val": torch.from_numpy(outcome.val), "test": torch.from_numpy(outcome.test),
        "val_score": score, "n_train": (~np.isnan(labels)).sum(0).tolist(),
        "positives": (labels == 1).sum(0).tolist()}
    save_checkpoint(study.out / "predictions.pt", study.predictions)
    choice = f"epoch {outcome.epoch}"
    if c.mode == "linear":
        choice = f"strength {outcome.strength:g}"
    study.compute.say(f"{study.name(c)}: {study.measure} on val {score:.4f} ({choice})")


def save_classifier(study: Study, c: Combination, outcome: Outcome) -> None:
    """Write classifier.pt: the network, and all else that predict.py and cluster_eval.py need."""
    init, val_truth = study.inits[c.init], study.truth("val")
    # How many labelled images trained the encoder. The linear probe, which is also epoch 0 of full
    # training, does not change the encoder.
    n_train = len(study.sample(c)) if outcome.epoch else 0
    save_checkpoint(study.out / "classifier.pt", {
        "format": FORMAT, "arch": study.settings["arch"],
        "labels": study.label_names, "kind": study.task.kind,
        "encoder": outcome.net.encoder.state_dict(),
        "projector": outcome.net.projector.state_dict(),
        "classifier": outcome.net.head.state_dict(),
        "config": study.settings | {
            "init": init.source, "what": study.name(c),
            "images": image_flags(study.manifest.folder)},
        "thresholds": [youden(p, y) for p, y in zip(outcome.val.T, val_truth.T)],
        "n_train": n_train, "labels_required": add_labels(init.labels_required, n_train)})


# --------------------------------------------------------------------------------------------------
# Linear: the encoder is frozen. One process does the work while the others wait.

def fit_probes(study: Study, missing: list[Combination]) -> dict[Combination, dict[str, Tensor]]:
    """Fit a probe for every missing linear combination, and for every full one that starts from a
    probe and has no epoch yet. Finish the linear ones; return the heads of the full ones."""
    heads = {}
    # A full combination that resumes from a checkpoint gets its head from there.
    begun = {key_in(study.last), *(c for c in missing if key_in(study.waiting_file(c)) == c)}
    for init in study.inits.values():
        combinations = [c for c in missing if c.init == init.key and (
            c.mode == "linear" or (c.starts_from_probe and c not in begun))]
        if not combinations:
            continue
        linear_probe = LinearProbe(study, read_features(study, init))
        for c in combinations:
            outcome = linear_probe.fit(c)
            if c.mode == "linear":
                finish(study, c, outcome)
            else:
                heads[c] = outcome.net.head.state_dict()
    return heads


# --------------------------------------------------------------------------------------------------
# Full: all processes train encoder and head.

def freeze_batch_norm(net: nn.Module) -> None:
    """Use the running statistics without updating them, until the next net.train()."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def probabilities(study: Study, net: nn.Module, split: str) -> np.ndarray:
    """The network's probabilities for the images of a split, (n, L); all processes share the work.

    FloatingPointError if a prediction is not finite, because an AUROC would not show it: NaN
    is sorted like any other score."""
    compute = study.compute
    loader = eval_loader(study.manifest, study.splits[split], study.config.batch_size,
                         study.preprocessing, **compute.loader_arguments())
    logits = extract_features(net, study.task.outputs, loader, compute.dtype)
    if not logits.isfinite().all():
        raise FloatingPointError(f"some predictions for {split} are not finite; --precision fp32 "
                                 "may help")
    return to_probabilities(logits, study.task.kind)


class FineTuning:
    """The training of a full combination: the targets of its sample, and all that an epoch changes,
    which last.pt keeps.

    history: a line of log.jsonl for each epoch. best: the epoch that is best on val so far.
    peaks: with --peak, the test probabilities (n_test, L) after each epoch."""

    def __init__(self, study: Study, c: Combination):
        self.study, self.combination = study, c
        config, compute, task = study.config, study.compute, study.task

        # The weight of each label of the sample; all other images weigh 0. Targets and weights are
        # kept on the device, so that no step waits for them.
        sample = study.sample(c)
        weights = np.zeros(task.mask.shape, np.float32)
        weights[sample] = cell_weights(task.targets[sample], task.mask[sample], config.balance)
        self.targets = torch.from_numpy(task.targets).to(compute.device)    # (N, G, K)
        self.weights = torch.from_numpy(weights).to(compute.device)         # (N, G)

        # Network and optimizer before the first step.
        torch.manual_seed(c.seed)
        self.net = compute.prepare(study.classifier(study.inits[c.init]))
        pretrained = [*self.net.encoder.parameters(), *self.net.projector.parameters()]
        groups = [dict(params=pretrained, peak=config.lr_encoder),
                  dict(params=self.net.head.parameters(), peak=config.lr_head)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
        # Small gradients would underflow in float16, so the loss is scaled up.
        self.scaler = torch.amp.GradScaler(
            compute.device.type, enabled=compute.precision == "fp16")
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"val_score": -math.inf}
        self.peaks: list[Tensor] = []

    def load(self) -> None:
        """Resume from this combination's last.pt; CheckpointError if it does not fit."""
        state = load_checkpoint(self.study.last)
        try:
            self.net.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:         # empty if the precision was not fp16
                self.scaler.load_state_dict(state["scaler"])
            self.history, self.best, self.peaks = state["history"], state["best"], state["peaks"]
        except MALFORMED as error:
            reason = last_line(error)
            raise CheckpointError(f"{self.study.last} does not fit this run ({reason}): delete "
                                  "it, and the same command begins that training anew") from None

    def save(self) -> None:
        save_checkpoint(self.study.last, {
            "key": tuple(self.combination), "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "history": self.history, "best": self.best, "peaks": self.peaks})

    def loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """The loss of logits (B, G * K) for the images `index` (B,), which is on the CPU."""
        index = self.study.compute.send(index)
        targets, weights = self.targets[index], self.weights[index]
        return masked_cross_entropy(logits.view(targets.shape), targets, weights)

    def keep_best(self, epoch: int, val: np.ndarray) -> float:
        """The network's score by its predictions for val (n_val, L).

        If it is the best so far, `best` keeps the epoch and a copy of the weights."""
        score = self.study.val_score(val)
        if score > self.best["val_score"]:
            weights = {name: value.cpu().clone() for name, value in self.net.state_dict().items()}
            self.best = {"val_score": score, "epoch": epoch, "val": torch.from_numpy(val),
                         "model": weights}
        return score


class EpochLog:
    """Writes the curves of a full combination to TensorBoard, and those of it and all finished
    ones to log.jsonl. The lines of a training that was put aside return when it is resumed.

    Only the first process writes."""

    def __init__(self, training: FineTuning):
        self.training, study = training, training.study
        folder = study.folder_name(training.combination)
        self.writer = None
        if study.compute.rank == 0:
            # Hide points of an epoch that last.pt does not have: that epoch is repeated.
            self.writer = SummaryWriter(study.out / "tensorboard" / folder,
                                        purge_step=len(training.history) + 1)

    def add(self, epoch: int, scalars: dict[str, float]) -> None:
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, epoch)
            study = self.training.study
            histories = [entry.get("history", []) for entry in study.predictions.values()]
            lines = [line for history in [*histories, self.training.history] for line in history]
            write_text(study.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def close(self) -> None:
        if self.writer:
            self.writer.flush()         # raises if the disk is full; close() alone does not
            self.writer.close()


def claim_last(study: Study, c: Combination) -> None:
    """Put aside a last.pt of another combination, and bring back this combination's own.

    The other one was begun by an earlier command, and waits until a command asks for it again."""
    key, waiting = key_in(study.last), study.waiting_file(c)
    if key is not None and key != c and key not in study.predictions:
        os.replace(study.last, study.waiting_file(key))
    if key_in(waiting) == c:
        os.replace(waiting, study.last)


def forget_damaged(study: Study) -> None:
    """Delete checkpoints that cannot be read, and say so: their trainings begin anew."""
    # Checkpoints are replaced as a whole, so a kill damages none; a faulty disk may.
    for file in sorted(study.out.glob("last*.pt")):
        if key_in(file) is None:
            study.compute.say(f"{file} is damaged: its epochs are lost, and that training begins "
                              "anew")
            file.unlink()


def fine_tune(study: Study, c: Combination, head: dict[str, Tensor] | None) -> Outcome:
    """Train encoder and head on one draw, and return the epoch that is best on val.

    head: initial weights of the linear layer, needed on the first process alone; None for
    random ones. FloatingPointError if the training diverges."""
    config, compute, say = study.config, study.compute, study.compute.say
    sample, name = study.sample(c), study.name(c)

    # Network and optimizer: new, or as they were after the last whole epoch.
    training = FineTuning(study, c)
    net, optimizer, scaler = training.net, training.optimizer, training.scaler
    if compute.rank == 0:
        claim_last(study, c)
    compute.barrier()
    if key_in(study.last) == c:
        training.load()
        say(f"going on from {study.last}, epoch {len(training.history)} of {name}")
    elif head is not None:
        net.head.load_state_dict(head)
    first = len(training.history)
    model = compute.data_parallel(net)          # all processes get the first one's weights

    # An epoch has at least ten steps, so it shows a small sample several times.
    epoch_steps = max(10, math.ceil(len(sample) / config.batch_size))
    steps = config.epochs * epoch_steps
    batches = iter(train_loader(
        study.manifest, sample, config.batch_size, range(first * epoch_steps, steps), 1,
        AUGMENTATION, study.preprocessing, c.seed, **compute.loader_arguments()))
    log = EpochLog(training)

    # The linear probe counts as epoch 0, which is the best one until training is better.
    if c.starts_from_probe and not first:
        score = training.keep_best(0, probabilities(study, net, "val"))
        say(f"{name} epoch 000/{config.epochs} | the linear probe | val {study.measure} "
            f"{score:.4f}")

    for epoch in range(first + 1, config.epochs + 1):
        net.train()
        if config.freeze_bn:
            freeze_batch_norm(net)
        loss_sum, clock = torch.zeros((), device=compute.device), time.perf_counter()

        # The steps of an epoch. The learning rates depend on the step's number alone.
        for step in range((epoch - 1) * epoch_steps, epoch * epoch_steps):
            for group in optimizer.param_groups:
                group["lr"] = warmup_and_cosine(step, steps, steps // 10, group["peak"])
            # The network sees one view of each image of the batch.
            x, index = next(batches)                                        # (B, 1, S, S), (B,)
            if step == first * epoch_steps:
                compute.rehearse(model, tuple(x.shape))
            with compute.autocast():
                logits = model(x)
            # Its logits are compared with the labels; a missing label weighs 0.
            loss = training.loss(logits, index)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()

        # The mean loss of the epoch.
        mean_loss = compute.reduce(loss_sum).item() / epoch_steps / compute.world_size
        speed = epoch_steps * config.batch_size / (time.perf_counter() - clock)
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch} of {name}: lower "
                                     "--lr-encoder or --lr-head")
        # The last step may have spoiled the weights after its loss was computed.
        if what := first_not_finite(net, optimizer):
            raise FloatingPointError(f"{what} is not finite after epoch {epoch} of {name}: lower "
                                     "--lr-encoder or --lr-head")

        # Is the epoch the best on val? Only --peak predicts test here, and test decides nothing.
        score = training.keep_best(epoch, probabilities(study, net, "val"))
        if config.peak:
            training.peaks.append(torch.from_numpy(probabilities(study, net, "test")).float())

        # Save all that the next epoch needs, so that a kill costs one epoch at most.
        scalars = {"loss": mean_loss, "lr_encoder": optimizer.param_groups[0]["lr"],
                   "lr_head": optimizer.param_groups[1]["lr"], "val_score": score}
        training.history.append({"combination": name, "epoch": epoch} | scalars)
        log.add(epoch, scalars)         # first: an epoch that is saved is not repeated
        if compute.rank == 0:
            training.save()
        say(f"{name} epoch {epoch:03d}/{config.epochs} | loss {mean_loss:.4f} | val "
            f"{study.measure} {score:.4f} | {speed:.0f} img/s")

    # The best epoch's network predicts the test images.
    log.close()
    best = training.best
    net.load_state_dict(best["model"])
    peaks = torch.stack(training.peaks) if training.peaks else None         # (epochs, n, L)
    return Outcome(net, best["val"].numpy(), probabilities(study, net, "test"),
                   epoch=best["epoch"], history=training.history, peaks=peaks)


# --------------------------------------------------------------------------------------------------
# The stage.

def draw_sentence(seed: int, sample: Draw) -> str:
    """The size of a draw, for the report."""
    sentence = f"draw {seed}: {len(sample.rows)} images"
    if sample.extra_patients:
        sentence += (f", {sample.extra_patients} patients beyond the fraction for labels that "
                     "lacked a class")
    return sentence


def write_report(study: Study, combinations: list[Combination]) -> None:
    """The table of all combinations. Only here are predictions compared with the test labels."""
    config, out = study.config, study.out
    draws = {fraction: [draw_sentence(seed, study.draws[fraction, seed]) for seed in config.seeds]
             for fraction in config.fraction}
    about = {"data": study.settings["data"], "kind": study.task.kind, "labels": study.policy,
             "draws": draws}
    report(out, about, study.by_name(combinations), study.label_names, study.truth("val"),
           study.truth("test"), study.manifest.patients[study.splits["test"]])
    files = [out / name for name in ("results.md", "results.json", "classifier.pt")]
    study.compute.say("done:", ", ".join(str(file) for file in files if file.exists()))
    # The folder keeps predictions of all combinations, but the network of the best one alone.
    if not files[-1].exists():
        study.compute.say(f"{files[-1]} was deleted, and only --overwrite makes it again")


def write_folds_report(study: Study, combinations: list[Combination]) -> None:
    """The table of a cross-validation, over train and val."""
    out, images = study.out, study.images
    about = {"data": study.settings["data"], "labels": study.policy, "folds": study.config.folds}
    report_folds(out, about, study.by_name(combinations), study.label_names,
                 study.task.truth[images], study.manifest.patients[images])
    study.compute.say(f"done: {out / 'results.md'}, {out / 'results.json'}")


def finetune(config: Config, compute: Compute, resources: contextlib.ExitStack) -> None:
    """Train every combination that the run folder lacks, then report on all."""
    study = read_study(config, compute)

    # The run folder, and what it holds already.
    file = study.out / "predictions.pt"
    if compute.rank == 0:
        contents = {"data": {
            study.settings["data"]: run_folder.content_of_data(study.manifest)}}
        run_folder.open_run(config, "finetune", RESULTS, resources, contents=contents,
                            **study.settings)
        if not file.exists():
            save_checkpoint(file, {})
        forget_damaged(study)
    compute.barrier()
    study.predictions.update(load_checkpoint(file))

    # Train the missing combinations. First one process fits the linear ones, and the heads from
    # which full ones start; then all processes train the full ones.
    combinations = [Combination(*c) for c in itertools.product(
        config.mode, config.fraction, study.inits, config.seeds)]
    if config.folds:
        if compute.rank == 0:
            cross_validate(study, combinations)
            write_folds_report(study, combinations)
        return
    missing = [c for c in combinations if c not in study.predictions]
    heads = fit_probes(study, missing) if compute.rank == 0 else {}
    for c in missing:
        if c.mode == "full":
            outcome = fine_tune(study, c, heads.get(c))
            if compute.rank == 0:
                finish(study, c, outcome)

    # All is trained and chosen: from here on the test labels are used.
    if compute.rank == 0:
        key = key_in(study.last)
        if key is None or key in study.predictions:     # else another command began it
            study.last.unlink(missing_ok=True)
        write_report(study, combinations)


def main(argv: list[str] | None = None) -> None:
    # The other processes wait while one extracts features and fits the probes.
    launch.main(finetune, Config, argv, timeout=timedelta(days=1))


if __name__ == "__main__":
    main()
