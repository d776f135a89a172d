"""What a step of pre-training changes, how last.pt keeps it, and how a run is resumed from it.

A run is resumed with the flags and inputs in its folder's config.json; only flags that
`may_differ` may be others. A last.pt that was copied into a new folder, to go on with another
learning rate for example, has no config.json beside it. It fits if network, optimizer, batch
size and images are the same.
"""
import contextlib
import dataclasses
import math
import operator
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import run_folder
from checkpoint import (
    FORMAT, MALFORMED, CheckpointError, first_not_finite, last_line, load_checkpoint,
    save_checkpoint)
from common import DataError
from manifest import Manifest
from model import MEAN, STD, SimCLR
from probe import Probe
from run import Compute
from run_folder import diverged
from syncbn import unchanged_statistics

if TYPE_CHECKING:
    from pretrain import Config

# What a run writes, and --overwrite deletes. It is resumed from the first of them.
RESULTS = ("last.pt", "encoder.pt", "log.jsonl", "events.out.tfevents.*")


class Training:
    """All that a step changes. last.pt keeps it, with the flags and a digest of the images.

    The loader has no state to keep: views follow from images, flags and step."""

    def __init__(self, config: "Config", compute: Compute, net: SimCLR,
                 optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self.config, self.compute = config, compute
        self.net, self.optimizer, self.scaler = net, optimizer, scaler
        self.last_file = Path(config.out) / "last.pt"
        self.encoder_file = Path(config.out) / "encoder.pt"
        self.step = 0         # steps taken
        self.last_probe = -1  # the step after which the features were last probed
        self.images_digest = ""  # of the train split's paths

    def begin_or_go_on(self, manifest: Manifest, train: np.ndarray, probe: Probe | None,
                       resources: contextlib.ExitStack) -> None:
        """Lock the run folder, and load its last.pt if there is one. A copied last.pt in an
        otherwise empty folder is loaded, too.

        train: image indices of the train split. CheckpointError or DataError if the folder
        holds a run with other flags or data, or if the processes see different files."""
        config, compute, out = self.config, self.compute, Path(self.config.out)
        self.images_digest = run_folder.paths_digest(manifest, train)
        inputs = inputs_of(config, manifest, train, probe)
        if compute.rank == 0:
            if not config.overwrite:
                # Refuse a copied last.pt that does not fit before config.json is written.
                if self.last_file.exists() and not (out / "config.json").exists():
                    self.load()
                if self.encoder_file.exists() and not self.last_file.exists():
                    raise DataError(f"{out} holds an encoder.pt and no last.pt to go on from; "
                                    "choose another --out, or give it up with --overwrite")
            run_folder.open_run(config, "pretrain", RESULTS, resources, "last.pt", inputs)
        # Now the folder belongs to this run, and all processes read the same last.pt.
        compute.barrier()
        if self.last_file.exists():
            self.load()
        if not compute.all_agree(str(self.step)):
            raise DataError(f"the processes do not see the same {self.last_file}: --out must lie "
                            "on storage that all of them see")
        # Each machine may have its own copy of the data folder, and one of them may be old.
        probed_on = {"--probe-data": probe.manifest} if probe and config.probe_data else {}
        for flag, seen in ({"--data": manifest} | probed_on).items():
            if compute.world_size > 1 and not compute.all_agree(run_folder.content_of_data(seen)):
                raise DataError(f"the processes do not see the same {flag} {seen.folder}")

    def load(self) -> None:
        """Take over the state in last.pt; CheckpointError or DataError if it is of another run."""
        file = self.last_file
        state = load_checkpoint(file)
        if not {"model", "optimizer", "scaler", "step", "config", "images"} <= state.keys():
            raise CheckpointError(f"{file} is no last.pt of a pre-training run")
        # The tensors would not fit another architecture or optimizer, and with another batch size
        # the step would stand for other images.
        for name in ("arch", "optimizer", "batch_size"):
            in_file, flag_value = state["config"].get(name), getattr(self.config, name)
            if in_file != flag_value:
                raise CheckpointError(f"{file} has --{name.replace('_', '-')} {in_file}, "
                                      f"not {flag_value}")
        if state["images"] != self.images_digest:
            raise DataError(f"{self.config.data}/manifest.csv lists other training images than "
                            f"when {file} was saved")
        try:
            self.net.load_state_dict(state["model"])  # PyTorch compares all shapes
            # Momenta come from the file, learning rate and weight decay from the flags.
            momenta = {"state": state["optimizer"]["state"]}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | momenta)
            if state["scaler"]:  # empty if the run had no scaler before
                self.scaler.load_state_dict(state["scaler"])
            self.step = operator.index(state["step"])
            self.last_probe = operator.index(state.get("probed", self.step))
        except MALFORMED as error:
            reason = last_line(error)
            raise CheckpointError(f"{file} does not fit these flags: {reason}") from None

    def save(self) -> None:
        """Write last.pt and encoder.pt. FloatingPointError if a weight, or a value that the
        optimizer keeps for it, is not finite: that must not replace the last good state."""
        if name := first_not_finite(self.net, self.optimizer):
            raise diverged(f"{name} is not finite after step {self.step}", self.config)
        save_checkpoint(self.last_file, {
            "model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step, "probed": self.last_probe,
            "config": self.settings(), "images": self.images_digest})
        self.save_encoder()

    def save_encoder(self) -> None:
        save_checkpoint(self.encoder_file, {
            "format": FORMAT, "arch": self.config.arch, "step": self.step,
            "config": self.settings(), "encoder": self.net.encoder.state_dict(),
            "projector": self.net.projector.state_dict()})

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config) | {"mean": MEAN, "std": STD}

    # Two ends other than after the last step.

    def leave(self, stop_signal: int) -> NoReturn:
        """Exit because of a signal. All processes come here after the same step."""
        self.compute.barrier()  # torchrun might kill the one that is still saving
        state = f"saved {self.last_file}" if self.step else "nothing to save yet"
        command = "the same command" + (" without --overwrite" if self.config.overwrite else "")
        self.compute.say(f"{signal.Signals(stop_signal).name} at step {self.step}: {state}; "
                         f"{command} goes on")
        sys.exit(128 + stop_signal)

    def already_done(self, total_steps: int) -> None:
        """For a run that has taken its last step before. encoder.pt is written again: it is
        missing or old if the run was killed between last.pt and encoder.pt."""
        if self.compute.rank == 0:
            self.save_encoder()
        what = "is complete" if self.step >= total_steps else "has reached --max-steps"
        self.compute.say(f"{self.config.out} {what}: step {self.step} of {total_steps}, encoder "
                         f"in {self.encoder_file}")


def inputs_of(config: "Config", manifest: Manifest, train: np.ndarray,
              probe: Probe | None) -> dict[str, dict[str, str]]:
    """{flag: {path: digest}} of a run's inputs. If they differ from those in config.json, it is
    another run."""
    # New labels do not make it another run, unless --balance or --positives reads the table.
    whole_table = config.balance or config.positives != "image"
    content = run_folder.content_of_data(manifest, None if whole_table else train)
    inputs = {"data": {config.data: content}}
    if not config.same_patient:
        inputs["patients"] = {config.data: run_folder.patients_digest(manifest, train)}
    if config.probe_data and probe:
        content = run_folder.content_of_data(probe.manifest)
        inputs["probe_data"] = {config.probe_data: content}
    if Path(config.init).is_file():  # it is not needed once there is a last.pt
        inputs["init"] = {config.init: run_folder.content_of_file(config.init)}
    return inputs


# --------------------------------------------------------------------------------------------------
# When to leave.

class StopSignal:
    """Remembers SIGTERM and SIGINT until the loop can save and leave.

    A signal often comes twice, from the cluster and from torchrun; the second one must
    not end the process while it saves."""

    def __init__(self, resources: contextlib.ExitStack):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, self._remember)
            resources.callback(signal.signal, number, before)

    def _remember(self, number, frame) -> None:
        self.number = number

    def received(self, compute: Compute, ask: bool) -> int:
        """The signal that any of the processes has received, or 0. All of them get the same
        answer, and so leave after the same step.

        ask: whether the processes ask each other now. If not, and there are several, it is 0."""
        if compute.world_size > 1 and not ask:
            return 0
        return int(compute.reduce(torch.tensor(self.number), dist.ReduceOp.MAX))


# --------------------------------------------------------------------------------------------------
# The step of --micro-batch.

def piece_size(own_batch: int, limit: int) -> int:
    """How many of a process's images it encodes at once: at most `limit` (0: all of them), so
    that the pieces are as equal as possible."""
    pieces = math.ceil(own_batch / (limit or own_batch))
    return math.ceil(own_batch / pieces)


def backward_in_pieces(model: Any, view1: Tensor, view2: Tensor, piece: int, loss_of: Callable,
                       scaler: torch.amp.GradScaler, compute: Compute,
                       ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient caching (Gao et al. 2021): the loss of a whole batch with memory for a
    piece of it.

    view1, view2: (B, 1, S, S), the views of B images. Both views of `piece` images are encoded
    at a time, and all of them twice. The first pass keeps no graph. From all its projections
    follow the loss and its gradient with respect to each projection. The second pass encodes
    each piece again, with a graph, and sends its part of that gradient back. So the parameters'
    gradients add up to those of the whole batch; only batch norm differs, whose statistics are
    those of one piece.

    Returns the projections z1, z2 (B, D) and the loss."""
    is_parallel = isinstance(model, DistributedDataParallel)
    net = model.module if is_parallel else model

    def in_pieces(of_view1: Tensor, of_view2: Tensor) -> list[Tensor]:
        return [torch.cat(both) for both in zip(of_view1.split(piece), of_view2.split(piece))]

    pieces = in_pieces(view1, view2)                                        # (2 * piece, 1, S, S)
    # The first pass uses the network itself, because DistributedDataParallel would expect a
    # backward pass. Batch norm's running statistics must count an image once, not twice.
    with unchanged_statistics(net), torch.no_grad(), compute.autocast():
        halves = [net(views).chunk(2) for views in pieces]
    z1, z2 = (torch.cat(half).requires_grad_() for half in zip(*halves))    # (B, D) each
    loss = loss_of(z1, z2)
    gradients = torch.autograd.grad(scaler.scale(loss), (z1, z2))           # (B, D) each

    def second_pass(views: Tensor, gradient: Tensor) -> None:
        with compute.autocast():
            z_piece = model(views)
        z_piece.backward(gradient)

    # Gradients are summed over the processes once, with the last piece.
    *but_last, last = zip(pieces, in_pieces(*gradients))
    with model.no_sync() if is_parallel else contextlib.nullcontext():
        for views, gradient in but_last:
            second_pass(views, gradient)
    second_pass(*last)
    return z1.detach(), z2.detach(), loss.detach()
