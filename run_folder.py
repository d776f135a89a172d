"""The run folder (--out): which run it holds, its curves, and the measurements on them.

config.json says which run the folder holds. A run resumes in its own folder, and is refused in a
folder that holds another run.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from checkpoint import CheckpointError
from common import lock, valid_unicode, write_text
from flags import RunConfig, differing_flags
from manifest import Manifest
from model import MEAN, STD

if TYPE_CHECKING:
    from run import Compute


# --------------------------------------------------------------------------------------------------
# Digests of a run's inputs. They change with the content, but not with its place.

def content_of_data(manifest: Manifest, images: np.ndarray | None = None) -> str:
    """A digest of a data folder, or of some of its images without their labels.

    If the same images are made with another --size, the digest differs, because the sizes of the
    files in bytes do."""
    if images is None:
        return f"{rows_digest(manifest)} {sizes_digest(manifest, np.arange(len(manifest.paths)))}"
    paths = _digest(*(manifest.paths[i].encode("utf-8", "surrogateescape") for i in images))
    return f"{paths} {sizes_digest(manifest, images)}"


def rows_digest(manifest: Manifest) -> str:
    """A digest of the manifest's whole table."""
    columns = [manifest.paths, manifest.patients, manifest.splits, manifest.label_names]
    more = manifest.studies, manifest.view_positions
    columns += [column for column in more if column is not None]
    return _digest(*("\n".join(column).encode("utf-8", "surrogateescape")
                     for column in columns), manifest.labels.tobytes())


def sizes_digest(manifest: Manifest, images: np.ndarray) -> str:
    """A digest of some files' sizes. It does not notice a rewritten file of the same size."""
    return _digest(b"" if manifest.sizes is None else manifest.sizes[images].tobytes())


def paths_digest(manifest: Manifest, images: np.ndarray) -> str:
    """A digest of the paths of some images, by which a copied last.pt recognises its images."""
    paths = "\n".join(manifest.paths[i] for i in images)
    return hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest()


def patients_digest(manifest: Manifest, images: np.ndarray) -> str:
    """A digest of which images belong to the same patient. Patients' names do not matter."""
    _, first, number = np.unique(
        manifest.patients[images], return_index=True, return_inverse=True)
    return _digest(first[number].tobytes())


def _digest(*parts: bytes) -> str:
    """16 hexadecimal digits that differ if the parts do."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def content_of_file(path: str | Path) -> str:
    """A digest of a checkpoint; a name that is not a file, such as `random`, is returned itself."""
    if not os.path.isfile(path):
        return str(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Which run a folder holds.

def open_run(config: RunConfig, stage: str, results: tuple[str, ...],
             resources: contextlib.ExitStack, starts_from: str = "",
             contents: dict[str, dict[str, str]] | None = None, **more) -> None:
    """Make the run folder, or recognise the run in it, and keep it locked until the run ends.

    results: patterns of the files that the stage writes. If the first one exists, the folder
    holds a run that could be lost: then CheckpointError names the flags that differ from that
    run's. --overwrite deletes the results instead. A folder that is not empty and holds no run of
    this stage is always refused.
    starts_from: the only file that may lie in a new run folder; the run starts from it.
    contents: for each flag that names files, {path: digest}. Such flags are compared by their
    digests, so files may be moved or named by another path.
    more: compared like flags."""
    out = Path(config.out)
    if valid_unicode(config.out) != config.out:
        raise CheckpointError(f"--out {out} is not in UTF-8, and TensorBoard cannot write there: "
                              "choose another --out, or `export PYTHONUTF8=1` if it is only the "
                              "locale")
    names = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if names - {starts_from} and "config.json" not in names:
        raise CheckpointError(f"{out} is not empty and holds no run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    file = resources.enter_context(open(out / "config.json", "a+", encoding="utf-8"))
    if not lock(file):
        raise CheckpointError(f"another process is at work in {out}; choose another --out")
    before = _read_config(file)
    if before and before.get("stage") != stage:
        raise CheckpointError(f"{out} holds something else than a run of {stage}.py; "
                              "choose another --out")
    now = {"stage": stage} | fixed_flags(config) | more | {"contents": contents or {}}
    now = json.loads(json.dumps(now))  # tuples are lists in a file
    # A run of an older version lacks flags that were added later. It ran as with their defaults.
    difference = _difference(_defaults(config) | before if before else {}, now)
    if config.overwrite:
        results_there = [file for pattern in results for file in out.glob(pattern)]
        given = {os.path.realpath(path) for path in (contents or {}).get("init", {})}
        for old in results_there:
            if os.path.realpath(old) in given:
                raise CheckpointError(f"--overwrite would delete {old}, which --init names; "
                                      "choose another --out")
        for old in results_there:
            old.unlink()
    goes_on = bool(before) and (out / results[0]).exists()
    if goes_on and difference:
        raise CheckpointError(f"{out} holds a run {difference}; choose another --out, or give up "
                              "that run with --overwrite")
    if before != now and not goes_on:
        # Rewrite the file in place, because a new file would not be locked. Nothing is lost if the
        # run is killed here: the next one with the same flags writes the file again.
        file.truncate(0)
        file.write(json.dumps(now, indent=1) + "\n")
        file.flush()


def fixed_flags(config: RunConfig) -> dict[str, Any]:
    """The flags that must be the same when a run resumes, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if not field.metadata["may_differ"]}


def _defaults(config: RunConfig) -> dict[str, Any]:
    """The defaults of the fixed flags, as JSON would return them."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)
                if not field.metadata["may_differ"]}
    return json.loads(json.dumps(defaults))


def _difference(before: dict, now: dict) -> str:
    """How two runs differ, or "": `with other flags: --epochs (2 there, 5 here)`."""
    now, changed = dict(now), []
    for name, files in now["contents"].items():
        earlier = before.get("contents", {}).get(name)
        if not isinstance(earlier, dict):  # from an older version, which compared flags alone
            continue
        digests = list(earlier.values())
        if digests == list(files.values()):  # the same content, even by other paths
            now[name] = before.get(name)
        changed += [path for path, digest in files.items() if digest not in digests]
    now["contents"] = before.get("contents")  # users cannot read a digest
    if flags := differing_flags(before, now):
        return f"with other flags: {flags}"
    return f"on {' and '.join(changed)} as it was before it was changed" if changed else ""


def _read_config(file) -> dict:
    """The content of an open config.json; {} for an empty file."""
    file.seek(0)
    try:
        config = json.loads(file.read() or "{}")
    except ValueError:
        config = None
    return config if isinstance(config, dict) else {"stage": "unknown"}


# --------------------------------------------------------------------------------------------------
# Its curves.

class Curves:
    """log.jsonl and TensorBoard's files in the run folder, written by the first process."""

    METRICS = "loss", "probe/auroc"

    def __init__(self, config: RunConfig, first: bool, step: int, last_probe: int):
        """Continue after `step`, and after the probe at step `last_probe`. Later lines of the log
        are deleted: the run will repeat them."""
        self.writer = None
        if not first:
            return
        path = Path(config.out) / "log.jsonl"
        if not step:  # delete the curves of a run that was killed before its first checkpoint
            for old in [path, *path.parent.glob("events.out.tfevents.*")]:
                old.unlink(missing_ok=True)
        if path.exists():
            lines = []
            for line in path.read_text("utf-8").splitlines(keepends=True):
                entry = json.loads(line) if line.endswith("\n") else {"step": math.inf}
                if entry["step"] <= (last_probe if "probe/auroc" in entry else step):
                    lines.append(line)
            write_text(path, "".join(lines))
        self.file = open(path, "a", encoding="utf-8")
        self.writer = SummaryWriter(config.out, purge_step=step + 1 if step else None)
        if not step:
            settings = dataclasses.asdict(config).items()
            text = "\n".join(f"    {k} = {v}" for k, v in settings)
            self.writer.add_text("config", valid_unicode(text))

    def add(self, step: int, epoch: float, scalars: dict[str, float]) -> None:
        """One line of log.jsonl and one point on each curve. JSON has no NaN: it becomes null."""
        if self.writer:
            finite = {name: value if math.isfinite(value) else None
                      for name, value in scalars.items()}
            line = {"step": step, "epoch": round(epoch, 3)} | finite
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def add_views(self, view1: Tensor, view2: Tensor, step: int) -> None:
        """A picture of the two views of the first eight images; view1, view2: (B, 1, S, S)."""
        if self.writer:
            # Undo the normalisation.
            pairs = torch.stack([view1[:8], view2[:8]]).flatten(0, 1).float().cpu() * STD + MEAN
            self.writer.add_image(
                "views", make_grid(pairs.clamp(0, 1), nrow=len(view1[:8])), step)

    def close(self, config: RunConfig) -> None:
        """Write the flags as a row of TensorBoard's table of hyper-parameters, beside the latest
        points of the curves METRICS, and close all files."""
        if self.writer:
            flags = {name: value if isinstance(value, int | float) else valid_unicode(str(value))
                     for name, value in dataclasses.asdict(config).items()}
            for summary in hparams(flags, dict.fromkeys(self.METRICS)):
                self.writer._get_file_writer().add_summary(summary)
            self.writer.flush()  # raises an error if the disk is full; close() alone does not
            self.writer.close()
            self.file.close()


def report_but_for_full_disk(args) -> None:
    """For threading.excepthook. It prints a traceback, unless TensorBoard's thread finds the disk
    full: the main thread gets the same error and reports it in one sentence."""
    full = isinstance(args.exc_value, OSError)
    if not (full and type(args.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(args)


class Progress:
    """Loss and time since the last log line. The loss stays on the GPU until then."""

    NEVER = torch.iinfo(torch.int64).max

    def __init__(self, config: RunConfig, batch_size: int, compute: "Compute", step: int):
        self.config, self.batch_size, self.compute = config, batch_size, compute
        self.first_bad = torch.tensor(self.NEVER, device=compute.device)
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.loss_sum = torch.zeros((), device=self.compute.device)
        self.step, self.start, self.waits = step, time.perf_counter(), []

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock for probes and checkpoints: the speed is that of training alone."""
        if self.compute.cuda:  # the steps that are still queued do count
            torch.cuda.synchronize(self.compute.device)
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures how long a step waits for its batch. On a GPU the time is taken by the GPU,
        because this process only queues the work and does not wait."""
        start = self._now()
        yield
        self.waits.append((start, self._now()))

    def _now(self) -> Any:
        """The time; on a GPU an event that will record it, so that nobody waits for the GPU."""
        if not self.compute.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, loss: Tensor, step: int) -> None:
        """Add the loss of the step that led to `step`. `read` checks whether it was finite."""
        self.loss_sum += loss.detach()
        self.first_bad = self.first_bad.minimum(torch.where(loss.isfinite(), self.NEVER, step))

    def read(self, step: int, last: dict[str, Tensor]) -> dict[str, float]:
        """Averages over the processes of the mean loss since the last call and of `last`, which is
        from the last batch; and the speed of all processes. Then the sums start again.

        FloatingPointError if a loss since the last call was not finite."""
        steps = step - self.step
        scalars = last | {"loss": self.loss_sum / steps}
        averages = self.compute.reduce(torch.stack(list(scalars.values())))
        first_bad = int(self.compute.reduce(self.first_bad, dist.ReduceOp.MIN))
        if first_bad < self.NEVER:
            raise diverged(f"the loss is not finite at step {first_bad}", self.config)
        averages = (averages / self.compute.world_size).tolist()
        seconds = time.perf_counter() - self.start
        waited = sum(start.elapsed_time(end) / 1000 if self.compute.cuda else end - start
                     for start, end in self.waits)
        self._begin(step)
        return dict(zip(scalars, averages)) | {
            "images_per_second": steps * self.batch_size / seconds,
            "wait_seconds": waited, "wait_share": waited / seconds}


def diverged(what: str, config: RunConfig) -> FloatingPointError:
    return FloatingPointError(f"{what}; the last good checkpoint stays in {config.out}; "
                              "a lower --lr may help")
