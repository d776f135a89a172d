"""Kill it, starve it, lie to it: what docs/faults.md promises, tried on real files and processes.

    python -m pytest tests/test_faults.py               minutes: a few of each fault
    python -m pytest tests/test_faults.py --long -s     the campaign, and its table

Parts of the campaign, chosen by -k, add their rows to one file, --fault-table.
What is drawn at random follows from --fault-seed (0), which is printed.
"""
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from conftest import ROOT, SMALL, smooth_image, start, write_folder
from PIL import Image

import cluster_eval
import finetune
import predict
import prepare
import pretrain
from checkpoint import FORMAT, load_checkpoint, save_checkpoint
from classifier import Classifier
from common import DataError
from dali_pipeline import Preprocessing, eval_loader
from dicom import read_dicom, read_identity
from manifest import read_manifest
from model import build_encoder
from predict import load_classifier
from radiograph import ImageSettings, in_parallel, load_image, read_image

SCRIPTS = {script.__name__: script for script in (prepare, pretrain, finetune, cluster_eval,
                                                  predict)}


@pytest.fixture(scope="module")
def long(request):
    return request.config.getoption("--long")


@pytest.fixture
def rng(request):
    """Its numbers depend on the seed and on the test's name, and on nothing that ran before."""
    seed = request.config.getoption("--fault-seed")
    print(f"--fault-seed {seed}")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture(scope="module")
def report(request):
    """Prints a row of the campaign's table, | fault | tried | seen |, and adds it to the file
    --fault-table, in which the parts of a campaign meet."""
    table = request.config.getoption("--fault-table")

    def add(row):
        print(f"\n{row}", flush=True)
        if table:
            with open(table, "a", encoding="utf-8") as file:
                file.write(f"{row}\n")

    return add


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A source for prepare.py: 240 PNG images in two class folders."""
    folder, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for name in ("NORMAL", "PNEUMONIA"):
        (folder / name).mkdir()
        for i in range(120):
            Image.fromarray(smooth_image(numbers, 96, 96)).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def classifier(labelled, tmp_path_factory):
    """A classifier.pt as finetune.py leaves it, after no training."""
    torch.manual_seed(6)
    net = Classifier(build_encoder("resnet18"), 2)
    path = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    save_checkpoint(path, {
        "format": FORMAT, "arch": "resnet18", "labels": ["Mass", "Effusion"], "kind": "binary",
        "encoder": net.encoder.state_dict(), "classifier": net.head.state_dict(),
        "thresholds": [0.5, 0.5], "n_train": 0,
        "config": {"data": str(labelled), "image_size": 32, "normalize": "image", "clahe": False}})
    return path


@pytest.fixture(scope="module")
def commands(data, labelled, pictures, encoder, classifier, long):
    """The command line of each stage, but for --out. Only the campaign pre-trains for 15 steps,
    otherwise it is 10."""
    lines = {
        "prepare": ["folder", "--src", pictures, "--workers", "2", "--size", "48"],
        "pretrain": [*SMALL, "--epochs", 3 if long else 2, "--probe-every", "1", "--data", data],
        "finetune": ["--epochs", "2", "--batch-size", "8", "--threads", "1", "--init", encoder],
        "cluster_eval": ["--init", "random", encoder, "--data", labelled, "--threads", "1",
                         "--classes", "binary:Mass", "--seeds", "2", "--bootstrap", "20"],
        "predict": [classifier, labelled, "--explain", "20", "--threads", "1"]}
    return {stage: [*map(str, line), "--out"] for stage, line in lines.items()}


# --------------------------------------------------------------------------------------------------
# Two runs are the same where all files of their folders are, but for what is measured by a clock.

CLOCK = ("images_per_second", "wait_seconds", "wait_share")


def contents(out):
    """{path: what must be equal} of a run folder and of the features kept beside it."""
    files = [file for folder in (out, out.parent / "features") for file in folder.rglob("*")
             if file.is_file() and "tfevents" not in file.name and file.name != ".lock"]
    return {str(file.relative_to(out.parent)): _content(file, str(out)) for file in files
            if "cluster_figures" not in file.parts or file.suffix == ".png"}


def _content(file, out):
    if file.name == "prepare.json":             # --src as it is seen from --out
        return json.loads(file.read_text()) | {"src": ""}
    if file.suffix == ".pt":
        return _digest(load_checkpoint(file), out)
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    if file.suffix in (".json", ".md"):
        return file.read_text().replace(out, "OUT")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest(value, out):
    """A checkpoint's content, tensors by their bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: _digest(entry, out) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_digest(entry, out) for entry in value]
    return value.replace(out, "OUT") if isinstance(value, str) else value


def lines_of_tracebacks(output):
    """The functions of the project in tracebacks. torchrun may end in one of its own, which lies
    below the project's folder where that holds the virtual environment."""
    return re.findall(rf'File "{re.escape(str(ROOT))}/[^/"]+", line .*, in (.*)', output)


def check_whole(out):
    """Whatever has its name is whole: every checkpoint, table and image can be read.

    cluster_figures/ belongs to a run that is complete, and is made anew by any other."""
    for file in out.parent.rglob("*.*"):
        if "cluster_figures" in file.parts or file.suffix not in (".pt", ".jpg", ".png"):
            continue
        if file.suffix == ".pt":
            load_checkpoint(file)
        else:
            with Image.open(file) as image:
                image.load()
    for file in [*out.glob("results.json"), *out.glob("prepare.json")]:
        json.loads(file.read_text())
    if (out / "prepare.json").exists() and (out / "manifest.csv").exists():
        read_manifest(out)


@pytest.fixture(scope="module")
def undisturbed(commands, long, run_forked, tmp_path_factory):
    """stage, processes -> the contents of a run that nobody disturbed, and its seconds: in the
    campaign those of a job from start to end, where it is `timed`, which costs the start of a
    process. Elsewhere they lack what is imported, and a blow comes the earlier."""
    runs = {}

    def run_once(stage, processes=None, timed=False):
        as_job = long and bool(timed or processes)
        key = stage, processes, as_job
        if key not in runs:
            out, began = tmp_path_factory.mktemp(stage) / "run", time.monotonic()
            if as_job:
                job = Job(stage, [*commands[stage], out], processes)
                job.wait(400)
                assert job.code == 0, job.output
            elif processes:
                for code, output in run_forked(f"{stage}.py", *commands[stage], out,
                                               processes=processes):
                    assert code == 0, output
            else:
                SCRIPTS[stage].main([*commands[stage], str(out)])
            seconds = job.seconds if as_job else time.monotonic() - began
            runs[key] = contents(out), seconds
        return runs[key]

    return run_once


# --------------------------------------------------------------------------------------------------
# A job: a script, the processes that it starts, and everything that they print.

class Job:
    """A stage as a user starts it. All of its processes carry a mark in their environment, by
    which they are found whatever becomes of their parent."""

    def __init__(self, stage, command, processes=None, **options):
        self.mark = f"FAULTS={uuid.uuid4()}"
        script = self.prepare(stage)
        env = dict([self.mark.split("=")]) | options.pop("env", {})
        self.process = start(script, *command, processes=processes, stdout=self.file, env=env,
                             **options)

    def prepare(self, stage):
        self.file = tempfile.TemporaryFile("w+")
        self.path = f"/proc/{os.getpid()}/fd/{self.file.fileno()}"
        self.began, self.known = time.monotonic(), {}
        return stage if str(stage).endswith(".py") else f"{stage}.py"

    @property
    def output(self):
        with open(self.path) as file:       # its writers' place in it stays as it is
            return file.read()

    @property
    def code(self):
        return self.process.poll()

    @property
    def steps(self):
        """The steps, or epochs, whose line was printed."""
        return [int(step) for step in re.findall(r"(?:step|epoch) (\d+)/\d+ \| loss", self.output)]

    def processes(self):
        """The ids of all processes that are alive, the first one first."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
                    if found[-1] not in self.known:
                        self.known[found[-1]] = os.pidfd_open(found[-1])
            except OSError:             # it has just ended, or is another user's
                continue
        return sorted(found)

    def dying(self):
        """The ids of those that have no memory left, and may still hold files and their locks: a
        process has ended when its last thread has, and only then can its descriptor be read."""
        ended, _, _ = select.select(self.known.values(), [], [], 0)
        return [pid for pid, descriptor in self.known.items() if descriptor not in ended]

    def until(self, condition, seconds=120):
        """Wait until a condition holds: True, or False where the job ended first."""
        end = time.monotonic() + seconds
        while not condition():
            if self.code is not None:
                return False
            assert time.monotonic() < end, self.output
            time.sleep(0.002)
        return True

    def kill(self, sign, pids):
        for pid in pids:
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue

    def wait(self, seconds):
        """Until its last process is gone. What is there after that is killed, and is a fault."""
        try:
            self.process.wait(seconds)
            self.seconds = time.monotonic() - self.began
            end = time.monotonic() + 40
            while (left := self.processes() or self.dying()) and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            self.kill(signal.SIGKILL, self.processes())
            while self.known:
                os.close(self.known.popitem()[1])
        assert not left, f"{len(left)} processes stay\n{self.output}"


class ForkedJob(Job):
    """The same without torchrun, and without the start of processes that import libraries."""

    def __init__(self, start_forked, stage, command, processes=None):
        script = self.prepare(stage)
        self.forks = start_forked(script, *command, processes=processes or 1, output=self.path)

    @property
    def code(self):
        """None while one of them is there; not 0 where one of them has failed."""
        codes = [fork.process.exitcode for fork in self.forks]
        return None if None in codes else max(codes, key=abs)

    def processes(self):
        return [fork.process.pid for fork in self.forks if fork.process.is_alive()]

    def wait(self, seconds):
        try:
            self.until(lambda: False, seconds)
        finally:
            self.kill(signal.SIGKILL, self.processes())


@pytest.fixture(scope="module")
def start_job(long, start_forked):
    """Where it does not matter how the processes were started, only the campaign starts them as a
    user does."""
    return Job if long else functools.partial(ForkedJob, start_forked)


# --------------------------------------------------------------------------------------------------
# Kills.

MOMENTS = ("anywhere", "after a sign of life", "inside a write")


def strike(job, out, rng, seconds):
    """Kill a job, or one process of it, at a random moment: what was done, or "" where it ended
    before that."""
    sign = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    moment, whom = rng.choice(MOMENTS), rng.choice(["one", "all"])
    part = rng.random()
    if moment == "anywhere":
        struck = job.until(lambda: time.monotonic() > job.began + part * seconds)
    elif moment == "inside a write":    # a job that has nothing left to do writes nothing and ends
        struck = job.until(lambda: any(out.parent.rglob("*.tmp")))
    else:
        struck = job.until(lambda: os.fstat(job.file.fileno()).st_size)
        alive = time.monotonic()
        struck = struck and job.until(lambda: time.monotonic() > alive + part * seconds / 2)
    pids = job.processes()
    if not struck or not pids:
        return ""
    job.kill(sign, pids if whom == "all" else [rng.choice(pids)])
    return f"{signal.Signals(sign).name} to {whom} of {len(pids)}, {moment}"


@pytest.mark.parametrize("stage, processes, few, many", [
    ("prepare", None, 3, 40), ("pretrain", None, 1, 16), ("pretrain", 2, 1, 10),
    ("pretrain", 4, 0, 8), ("finetune", None, 0, 12), ("cluster_eval", None, 0, 8),
    ("predict", None, 0, 10)])
def test_killed_again_and_again_ends_the_same(stage, processes, few, many, commands, undisturbed,
                                              start_job, rng, long, tmp_path, report):
    count = many if long else few
    if not count:
        pytest.skip("--long only")
    expected, seconds = undisturbed(stage, processes, timed=True)
    out, blows, complete = tmp_path / "victim/run", [], 0
    out.parent.mkdir()
    while True:
        job = (Job if len(blows) < count else start_job)(
            stage, [*commands[stage], out], processes)
        blow = strike(job, out, rng, seconds) if len(blows) < count else ""
        job.wait(400)
        # Whatever happened, what has its name is whole, and no line of the project's is in a
        # traceback, but for its imports: Python answers Ctrl-C until the first of them is done.
        print(f"{stage} {processes or 1}: {blow or 'not struck'}: {job.code}", flush=True)
        check_whole(out)
        lines = set(lines_of_tracebacks(job.output))
        assert not lines or "SIGINT" in blow and lines == {"<module>"}, f"{blow}\n{job.output}"
        if blow:
            blows.append(blow)
            continue
        assert job.code == 0, job.output
        complete += 1
        assert contents(out) == expected
        left = [file for pattern in ("*.tmp*", "*.part*") for file in tmp_path.rglob(pattern)]
        assert not left
        if len(blows) == count:
            break
        shutil.rmtree(out.parent)
        out.parent.mkdir()
    counts = [f"{sum(word in blow for blow in blows)} {word}"
              for word in ("SIGKILL", "SIGTERM", "SIGINT", "to all", "inside a write")]
    report(f"| {stage}, {counted(processes)}, killed | {len(blows)} | "
           f"{', '.join(counts)}; runs that reached the end: {complete}, all with the same bits |")


def dies_at_40(item):
    if item == 40:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_ends_all_workers():
    """Also where its death is noticed in the midst of something else, so it is tried often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(20):
            with soon(), pytest.raises(DataError, match="a worker process died"):
                in_parallel(dies_at_40, list(range(4000)), 2, "items")
            assert not active_children()
    finally:
        sys.setswitchinterval(interval)


class InterruptedFailure:
    """Ctrl-C comes while this is saved, and then there is no room for it."""
    def __reduce__(self):
        signal.raise_signal(signal.SIGINT)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_ctrl_c_in_a_save_that_fails_is_not_lost(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.pt", {"step": InterruptedFailure()})
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


# --------------------------------------------------------------------------------------------------
# torchrun: a worker or an agent dies, and the run goes on.

# By default torchrun keeps one store for all restarts, in which a process may find the address of a
# dead one.
STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_torchrun_brings_back_a_killed_worker(commands, undisturbed, rng, long, tmp_path, report):
    """By itself, and it costs --save-every steps at most, which are 3 here."""
    if not long:
        pytest.skip("--long only")
    expected, _ = undisturbed("pretrain", 2)
    job = Job("pretrain", [*commands["pretrain"], tmp_path / "run"], 2,
              torchrun=["--standalone", "--max-restarts=2"], env=STORES)
    lost = [kill_a_worker(job, step, rng) for step in (rng.randint(4, 6), rng.randint(9, 11))]
    job.wait(400)
    assert job.code == 0, job.output
    assert max(lost) <= 3 and contents(tmp_path / "run") == expected
    report(f"| a worker of torchrun killed twice, `--max-restarts=2` | 2 | back by itself; "
           f"{lost[0]} and {lost[1]} steps lost, `--save-every 3`; the same bits |")


def kill_a_worker(job, step, rng):
    """Kill one of torchrun's workers after a step, and wait for it to be back: steps lost."""
    before = job.output.count("going on from")
    assert job.until(lambda: step in job.steps, 200), job.output
    job.kill(signal.SIGKILL, [rng.choice(job.processes()[1:])])
    assert job.until(lambda: job.output.count("going on from") > before, 200), job.output
    done, resumed = job.output.rsplit("going on from", 1)
    return int(re.findall(r"step (\d+)/15 \| loss", done)[-1]) - int(
        re.search(r"last.pt, step (\d+)", resumed)[1])


@pytest.fixture
def agents(commands, undisturbed, long, tmp_path):
    """Two agents of torchrun, as though there were two nodes, on loopback addresses: a function
    that starts one of them, and one that waits until both have ended as one node would."""
    if not long:
        pytest.skip("--long only")
    expected, _ = undisturbed("pretrain", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start_agent(node):
        return Job("pretrain", [*commands["pretrain"], tmp_path / "run"], 1, env=STORES, torchrun=[
            "--nnodes=2", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=faults",
            f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={int(node == 0)}",
            f"--local-addr=127.0.0.{node + 1}"])

    def end_as_one_node(*jobs):
        for job in jobs:
            job.wait(400)
            assert job.code == 0, "\n".join(job.output for job in jobs)
        assert contents(tmp_path / "run") == expected

    return start_agent, end_as_one_node


def test_two_agents_are_one_node(agents, report):
    start_agent, end_as_one_node = agents
    end_as_one_node(start_agent(0), start_agent(1))
    report("| two agents with a c10d rendezvous | 1 | the same bits as one node |")


def test_agent_killed_and_started_again(agents, report):
    """Not the one at --rdzv-endpoint, without which the others cannot meet."""
    start_agent, end_as_one_node = agents
    first, second = start_agent(0), start_agent(1)
    assert first.until(lambda: 5 in first.steps + second.steps, 300)
    second.kill(signal.SIGKILL, [second.process.pid])
    second.wait(60)                     # its worker leaves, although nobody could tell it to
    end_as_one_node(first, start_agent(1))
    report("| one of two agents killed, and started again | 1 | goes on, the same bits |")


# A batch norm that keeps its statistics: on a CPU it would see each process's own images, and what
# is left of a step is the same for any number of processes.
FROZEN = """
from torch.nn.modules.batchnorm import _BatchNorm
_BatchNorm.train = lambda self, mode=True: torch.nn.Module.train(self, False)
"""


def driver(folder, change, stage="pretrain"):
    """A script that runs a stage after something in it was changed."""
    file = folder / "driver.py"
    file.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {stage}, run\n"
                    f"import torch, culprit\n{change}\nsys.argv[0] = '{stage}.py'\n"
                    f"{stage}.main()\n")
    return file


def counted(processes):
    return f"{processes} processes" if processes else "1 process"


def losses(out):
    return [line["loss"] for line in map(json.loads, open(out / "log.jsonl")) if "loss" in line]


def test_another_number_of_processes_goes_on(data, long, tmp_path, report):
    """The same batches and losses where batch norm is left aside."""
    if not long:
        pytest.skip("--long only; test_distributed.py compares single steps")
    command = [*SMALL, "--data", data, "--optimizer", "adam", "--lr", "1e-3", "--out"]
    script = driver(tmp_path, FROZEN)
    for out, steps, processes in [("one", 9, None), ("many", 3, 2), ("many", 6, None),
                                  ("many", 9, 4)]:
        job = Job(script, [*command, tmp_path / out, "--max-steps", steps], processes)
        job.wait(200)
        assert job.code == 0, job.output
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert len(one) == 9 and many == pytest.approx(one, abs=1e-5)
    most = max(abs(a - b) for a, b in zip(one, many))
    report("| 2, then 1, then 4 processes on one run, batch norm frozen | 9 steps | losses "
           f"within {most:.1e} of one process's |")


# --------------------------------------------------------------------------------------------------
# Numbers: what is not finite stops all processes, and is never in last.pt.

POISON = """
before = pretrain.nt_xent
steps = iter(range(1, 1000))

class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): return gradient * {factor}

def nt_xent(z1, z2, **options):
    if next(steps) == 5 and os.environ.get("RANK", "0") == "{rank}":
        z1 = Spoiled.apply(z1)
        return before(z1, z2, **options) * {loss}
    return before(z1, z2, **options)

nan, inf = float("nan"), float("inf")
pretrain.nt_xent = nt_xent
"""


@pytest.mark.parametrize("loss, factor, optimizer, sentence", [
    ("nan", "1", "lars", "the loss is not finite at step 5"),
    ("1", "nan", "lars", r"(the loss is not finite at step 6|is not finite after step 6)"),
    ("1", "1e22", "adam", r"(the loss is not finite at step 6|is not finite after step 6)")])
def test_poison_in_one_process_stops_all(data, tmp_path, loss, factor, optimizer, sentence, long,
                                         start_job, report):
    """Also a gradient that is finite and whose square is not: Adam would never move that weight
    again."""
    if factor != "nan" and not long:
        pytest.skip("--long only")
    script = driver(tmp_path, POISON.format(loss=loss, factor=factor, rank=1))
    job = start_job(script, [*SMALL, "--data", data, "--optimizer", optimizer, "--out",
                             tmp_path / "run"], 2)
    job.wait(120)
    assert job.code and re.search(sentence, job.output), job.output
    assert not lines_of_tracebacks(job.output) and job.output.count("not finite") == 1
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())
    report(f"| loss x {loss}, gradient x {factor} in one of two processes | 1 | all stop: "
           f"{re.search(sentence, job.output)[0]}; last.pt is of step 3 |")


def test_poison_in_the_last_step_of_an_epoch(data, tmp_path, monkeypatch, capsys):
    """Its loss is still finite. The network after it would be scored, and kept as a classifier."""
    before, steps = finetune.masked_cross_entropy, iter(range(1, 1000))

    def masked_cross_entropy(logits, *rest):
        if next(steps) == 20:           # an epoch has ten
            logits.register_hook(lambda gradient: gradient * math.nan)
        return before(logits, *rest)

    monkeypatch.setattr(finetune, "masked_cross_entropy", masked_cross_entropy)
    sentence = ends_with("finetune", [
        "--init", "random", "--arch", "resnet18", "--image-size", 32, "--data", data, "--epochs",
        3, "--batch-size", 8, "--threads", 1, "--out", tmp_path / "run"], capsys)
    assert "is not finite after epoch 2" in sentence
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["model"].values())


# --------------------------------------------------------------------------------------------------
# A full disk. Most of these limit the size of a file, as anybody may; --long mounts a small disk.

@contextlib.contextmanager
def file_limit(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder, room):
    """A disk of its own at `folder`, with `room` bytes left beyond what lies in it."""
    kept = folder.parent / "kept"
    folder.rename(kept)
    folder.mkdir()
    size = sum(file.stat().st_blocks * 512 for file in kept.rglob("*")) + room
    if subprocess.call(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]):
        pytest.skip("only root can mount a small disk")
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    try:
        yield
        shutil.rmtree(kept)
        shutil.copytree(folder, kept)
    finally:
        subprocess.call(["umount", "-l", folder])
        folder.rmdir()
        kept.rename(folder)


def ends_with(stage, arguments, capsys):
    """Run a stage in this process until it refuses to go on: its sentence."""
    with pytest.raises(SystemExit) as end:
        SCRIPTS[stage].main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert "Traceback" not in error, error
    return str(end.value.code)


@pytest.mark.parametrize("disk", [False, True], ids=["file limit", "small disk"])
@pytest.mark.parametrize("what, stage, flags, first, room", [
    ("images", "prepare", [], None, 3_000),
    ("checkpoint", "pretrain", [], "--max-steps 4", 1_000_000),
    ("TensorBoard", "pretrain", ["--save-every", "1000"], "--max-steps 1", 9_000),
    ("log", "pretrain", ["--save-every", "1000", "--log-every", "1"], "--max-steps 6", 1_500),
    ("checkpoint", "finetune", [], None, 1_000_000),
    ("predictions", "finetune", ["--mode", "linear"], None, 60_000),
    ("table", "cluster_eval", [], None, 1_000),
    ("table", "predict", [], None, 3_000)])
def test_full_disk(what, stage, flags, first, room, disk, commands, undisturbed, long, tmp_path,
                   capsys, report):
    if disk and not long:
        pytest.skip("--long only")
    out = tmp_path / "victim/run"
    command = [*commands[stage][:-1], *flags, "--out", out]
    out.mkdir(parents=True)
    if first:
        SCRIPTS[stage].main([*map(str, command), *first.split()])
    before = {file: file.read_bytes() for file in out.glob("*.pt")}
    with small_disk(out.parent, room) if disk else file_limit(room):
        sentence = ends_with(stage, command, capsys)
        assert "No space left" in sentence if disk else "File too large" in sentence, sentence
        assert not [*tmp_path.rglob("*.tmp")]
        assert all(file.read_bytes() == content for file, content in before.items())
        check_whole(out)
    # Room is made, and the same command goes on.
    SCRIPTS[stage].main([*map(str, command)])
    check_whole(out)
    if not flags:
        assert contents(out) == undisturbed(stage)[0]
    report(f"| {'disk' if disk else 'file'} full: {what} of {stage} | 1 | "
           f"“{sentence.split(': ', 1)[1].split(': ')[0]}”, then goes on |")


# --------------------------------------------------------------------------------------------------
# Data that changes while a run reads it.

def deleted(file):
    file.unlink()


def truncated(file):
    file.write_bytes(file.read_bytes()[:200])


def replaced(file):
    file.write_bytes(b"not an image at all" * 20)


def unreadable(file):
    """For root as well: a link to itself."""
    file.unlink()
    file.symlink_to(file)


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_pipe(file):
    """A read that never returns."""
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("spoil", [deleted, truncated, replaced, unreadable, a_folder])
def test_image_spoiled_under_way_is_named(spoil, tmp_path, capsys, report):
    folder, log = write_folder(tmp_path / "folder"), tmp_path / "run/log.jsonl"
    spoiled_at = []

    def spoil_it():
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            time.sleep(0.01)
        spoil(folder / "images/007_1.jpg")
        spoiled_at.append(time.monotonic())

    thread = threading.Thread(target=spoil_it)
    thread.start()
    sentence = ends_with("pretrain", [*SMALL, "--epochs", "2000", "--data", folder, "--out",
                                      tmp_path / "run"], capsys)
    seconds = time.monotonic() - spoiled_at[0]
    thread.join()
    assert re.search(r"folder/images/007_1.jpg.* cannot be read", sentence), sentence
    assert seconds < 60
    report(f"| an image {spoil.__name__.replace('_', ' ')} under way, 1 process | 1 | named "
           f"after {seconds:.1f} s |")


@pytest.mark.parametrize("spoil, processes", [
    (a_pipe, None), (a_pipe, 2), (truncated, 2), (deleted, 2), (replaced, 2)])
def test_image_spoiled_in_one_process_ends_all(spoil, processes, long, start_job, tmp_path,
                                               report):
    """Within seconds, whichever process meets it and wherever the others wait. Of a read that
    never returns nothing can be known before PATIENCE has passed, here 5 seconds."""
    if (spoil, processes) not in [(a_pipe, None), (truncated, 2)] and not long:
        pytest.skip("--long only")
    folder = write_folder(tmp_path / "folder")
    job = start_job(driver(tmp_path, "culprit.PATIENCE = 5"), [
        *SMALL, "--epochs", "2000", "--data", folder, "--out", tmp_path / "run"], processes)
    assert job.until(lambda: 3 in job.steps), job.output
    spoil(folder / "images/007_1.jpg")
    began = time.monotonic()
    job.wait(100)
    seconds = time.monotonic() - began
    assert job.code, job.output
    assert len(re.findall(r"folder/images/007_1.jpg.* cannot be read", job.output)) == 1, job.output
    assert not lines_of_tracebacks(job.output)
    report(f"| an image {spoil.__name__.replace('_', ' ')} under way, {counted(processes)} "
           f"| 1 | named, and all ended after {seconds:.0f} s |")


# --------------------------------------------------------------------------------------------------
# Hostile files. Nothing but a sentence or the right answer may come of them, and soon.

@contextlib.contextmanager
def soon(seconds=20):
    """TimeoutError after that time. Nothing here takes longer than a fraction of it."""
    def hang(number, frame):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(content, rng):
    """Bytes with a few places changed, cut out, doubled, or moved; sometimes cut short."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, n = rng.randrange(len(content) or 1), rng.choice([1, 1, 4, 30])
        kind = rng.choice(["flip", "flip", "set", "cut", "double", "move", "end"])
        if kind == "flip" and content:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            content[at:at + n] = rng.choice([b"\0", b"\xff", b"\n", b",", b'"', b"-"]) * n
        elif kind == "cut":
            del content[at:at + n]
        elif kind == "double":
            content[at:at] = content[at:at + n]
        elif kind == "move":
            piece = content[at:at + n]
            del content[at:at + n]
            content[rng.randrange(len(content) + 1):0] = piece
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def changed_cell(rows, rng):
    """A table with one row or one cell changed."""
    rows = [list(row) for row in rows]
    row = rng.choice(rows)
    kind = rng.choice(["cell", "cell", "cell", "swap", "drop", "double", "column"])
    if kind == "cell":
        row[rng.randrange(len(row))] = rng.choice([
            "", " ", "1", "0", "-1", "1.0", "2", "nan", "x", "images", ".", "../a", "/etc/passwd",
            "images/000_0.jpg", "images/000_0.jpg/", "train", "test", "p0", "p1", "\0", "'", '"',
            "é", "1e0", "+1", "01", " 1", "٢", "True"])
    elif kind == "swap":
        i, j = rng.randrange(len(row)), rng.randrange(len(row))
        row[i], row[j] = row[j], row[i]
    elif kind == "drop":
        rows.remove(row)
    elif kind == "double":
        rows.append(list(row))
    else:
        del row[rng.randrange(len(row))]
    return rows


def test_hostile_manifests(rng, long, tmp_path, report):
    """Refused in a sentence, or read as what it says, cell by cell."""
    folder = write_folder(tmp_path / "folder", patients=4)
    good, refused = (folder / "manifest.csv").read_bytes(), 0
    rows = [line.split(",") for line in good.decode().splitlines()]
    meaning = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}
    count = 2000 if long else 300
    for _ in range(count):
        if rng.random() < 0.5:
            content = mutated(good, rng)
        else:
            table = io.StringIO()
            csv.writer(table).writerows(changed_cell(rows, rng))
            content = table.getvalue().encode()
        (folder / "manifest.csv").write_bytes(content)
        try:
            with soon():
                manifest = read_manifest(folder)
        except DataError as error:
            assert "manifest.csv" in str(error)
            refused += 1
            continue
        # It was accepted: then by a second reading every path is a file and every label is there.
        header, *lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        lines = [line for line in lines if line]
        assert manifest.label_names == header[3:] and len(lines) == len(manifest.paths)
        for line, path, labels in zip(lines, manifest.paths, manifest.labels):
            assert line[0] == path and (folder / path).is_file()
            assert [meaning.get(cell) for cell in line[3:]] == [
                None if math.isnan(label) else label for label in labels]
    report(f"| mutated manifests | {count} | {refused} refused in a sentence, the others "
           "read as they say |")


def dicom_file(file, rng):
    """A radiograph of 12 bits as a modality writes it."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3.4"
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.PatientID, dataset.StudyInstanceUID, dataset.Modality = "P1", "1.2.3", "DX"
    dataset.Rows = dataset.Columns = 64
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation, dataset.WindowCenter, dataset.WindowWidth = 0, 2048, 4096
    pixels = smooth_image(np.random.default_rng(0), 64, 64).astype("<u2") * 16
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(file, enforce_file_format=True)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "dcm"])
def test_hostile_images(suffix, rng, long, tmp_path, report):
    """In stage 0: an image as any other, or a sentence."""
    file, count, refused = tmp_path / f"image.{suffix}", 500 if long else 40, 0
    if suffix == "dcm":
        dicom_file(file, rng)
    else:
        Image.fromarray(smooth_image(np.random.default_rng(0), 96, 80)).save(file)
    read = read_dicom if suffix == "dcm" else read_image
    good = file.read_bytes()
    for _ in range(count):
        file.write_bytes(mutated(good, rng))
        try:
            with soon():
                if suffix == "dcm" and isinstance(
                        read_identity(file, ["DX"], 100), str):
                    refused += 1
                    continue
                image = load_image(file, read, ImageSettings(64)).image
        except DataError as error:
            assert str(error) and "\n" not in str(error) and "hangs" not in str(error)
            refused += 1
            continue
        assert image.mode == "L" and 32 <= min(image.size) <= 64
    report(f"| mutated {suffix.upper()} files, stage 0 | {count} | {refused} refused in a "
           "sentence |")


def test_hostile_jpegs_in_a_data_folder(rng, long, tmp_path, report):
    """In the loader: an image as any other, or its name."""
    folder, refused = write_folder(tmp_path / "folder", patients=4), 0
    manifest, count = read_manifest(folder), 500 if long else 60
    file = folder / "images/000_1.jpg"
    good = file.read_bytes()
    for _ in range(count):
        file.write_bytes(mutated(good, rng))
        loader = eval_loader(manifest, np.arange(3), 3, Preprocessing(32), "cpu", threads=1)
        try:
            with soon():
                (x, _), = loader
        except DataError as error:
            assert "000_1.jpg (row 3 of manifest.csv) cannot be read" in str(error)
            refused += 1
        else:
            assert x.shape == (3, 1, 32, 32) and x.isfinite().all()
    report(f"| mutated JPEG files in a data folder | {count} | {refused} named by the "
           "loader |")


# What may stand in the place of anything in a checkpoint.
JUNK = [None, 3, -1.5, "x", [], [1, 2], {}, {1: 2}, {"a": 1}, True, torch.tensor(1.0),
        torch.ones(2, 3), torch.full((64, 1, 7, 7), math.nan), torch.ones(5, dtype=torch.int64)]


def changed_state(state, rng):
    """A checkpoint with one entry, at any depth, replaced, deleted or under another key; and
    whether the new entry is of the old one's type, so that it has to be believed."""
    state = dict(state)
    key = rng.choice(list(state))
    if isinstance(state[key], dict) and state[key] and rng.random() < 0.6:
        state[key], believed = changed_state(state[key], rng)
        return state, believed
    value, believed = state.pop(key), False
    kind = rng.choice(["junk", "junk", "delete", "key"])
    if kind == "junk":
        state[key] = rng.choice(JUNK)
        believed = type(state[key]) is type(value)
    elif kind == "key":
        state[rng.choice([1, None, (1, 2), "another"])] = value
    return state, believed


def describe(before, after, path=""):
    """What changed_state has done."""
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after or key not in before:
            return f"{path}{key} {'gone' if key in before else 'new'}"
        if isinstance(before[key], dict) and isinstance(after[key], dict):
            if change := describe(before[key], after[key], f"{path}{key}."):
                return change
        elif before[key] is not after[key]:
            return f"{path}{key} {after[key]!r:.60}"
    return ""


def computed(stage, out):
    """What a stage made of a checkpoint."""
    if stage == "predict":
        return (out / "predictions.csv").read_bytes()
    if stage == "pretrain":             # its last.pt was complete, and only encoder.pt is made
        return _digest(load_checkpoint(out / "encoder.pt")["encoder"], str(out))
    results = json.loads((out / "results.json").read_text())["results"]
    return [{key: value for key, value in row.items() if key != "init"} for row in results]


def test_hostile_checkpoints(data, folder, labelled, encoder, classifier, rng, long, tmp_path,
                             capsys, report):
    """Refused in a sentence by every stage that reads one, or with no effect on what comes out."""
    out = tmp_path / "run"
    pretrain.main([*SMALL, "--max-steps", "1", "--data", str(data), "--out", str(out)])
    last, count, outcome = out / "last.pt", 500 if long else 12, Counter()
    readers = {
        encoder: ("finetune", ["--init", encoder, "--data", labelled, "--mode", "linear",
                               "--threads", "1", "--overwrite", "--out",
                               tmp_path / "finetune/run"]),
        classifier: ("predict", [classifier, folder, "--threads", "1", "--overwrite", "--out",
                                 tmp_path / "predict"]),
        last: ("pretrain", [*SMALL, "--max-steps", "1", "--data", data, "--out", out])}
    readers = {file: (stage, [*map(str, arguments)]) for file, (stage, arguments)
               in readers.items()}
    good = {file: file.read_bytes() for file in readers}
    states = {file: load_checkpoint(file) for file in readers}
    expected, wrong = {}, []
    for file, (stage, arguments) in readers.items():
        SCRIPTS[stage].main(arguments)
        expected[file] = computed(stage, Path(arguments[-1]))
    try:
        for i in range(count):
            file, believed = [*readers][i % 3], False
            if rng.random() < 0.4:
                file.write_bytes(mutated(good[file], rng))
                change = "bytes"
            else:
                state, believed = changed_state(states[file], rng)
                change = describe(states[file], state)
                torch.save(state, file)
            stage, arguments = readers[file]
            (out / "encoder.pt").unlink(missing_ok=True)        # so that it is made of last.pt
            try:
                with soon(60):
                    SCRIPTS[stage].main(arguments)
                same = computed(stage, Path(arguments[-1])) == expected[file]
                if not same and not believed:
                    wrong.append(f"{file.name}: {change}")
                outcome["without effect" if same else "of the right type, and believed"] += 1
            except SystemExit as end:
                assert isinstance(end.code, str) and "\n" not in end.code, end.code
                outcome["refused in a sentence"] += 1
            file.write_bytes(good[file])
    finally:
        for file, content in good.items():
            file.write_bytes(content)
    assert not wrong
    report(f"| mutated checkpoints of three kinds | {count} | "
           f"{', '.join(f'{n} {what}' for what, n in outcome.items())} |")


def test_a_counter_that_is_missing_is_missed(encoder, tmp_path):
    """PyTorch would begin it anew, and a run that goes on would end with other bits."""
    state = load_checkpoint(encoder)
    state["encoder"] = {key: value for key, value in state["encoder"].items()
                        if key != "bn1.num_batches_tracked"}
    torch.save(state, tmp_path / "encoder.pt")
    with pytest.raises(DataError, match="its encoder has no bn1.num_batches_tracked"):
        load_checkpoint(tmp_path / "encoder.pt")


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("save", [torch.save, lambda bomb, file: file.write_bytes(
    pickle.dumps(bomb)), lambda bomb, file: torch.save(
        bomb, file, _use_new_zipfile_serialization=False)], ids=["zip", "pickle", "legacy"])
def test_code_in_a_pickle_does_not_run(save, tmp_path):
    file, mark = tmp_path / "encoder.pt", tmp_path / "it ran"
    save({"encoder": Bomb(mark), "config": {}}, file)
    with pytest.raises(DataError, match="encoder.pt is not a whole checkpoint"):
        load_checkpoint(file)
    with pytest.raises(DataError):
        load_classifier(file)
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------
# Long runs: what a process holds does not grow.

# With each line on the terminal a process says what it holds: memory as the system counts it, but
# for that of files, which the system takes back when it likes; what of this glibc's malloc (2.33 or
# newer) has free in its heaps, and what it has handed out; open handles; and threads.
COUNTED = """
import ctypes, re
from pathlib import Path

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

mallinfo2, say = ctypes.CDLL(None).mallinfo2, run.Compute.say
mallinfo2.restype = Mallinfo2

def say_and_count(self, *words):
    say(self, *words)
    status = Path("/proc/self/status").read_text()
    resident = sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+)", status))) * 1024
    heap = mallinfo2()
    say(self, "holds", resident, heap.fordblks, heap.uordblks + heap.hblkhd,
        len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))

run.Compute.say = say_and_count
"""


@pytest.mark.parametrize("unit, few, many", [
    ("steps of pre-training", 40, 2000), ("epochs of fine-tuning", 0, 20),
    ("epochs of the demo at 32 pixels", 0, 20)])
def test_long_runs_hold_no_more(unit, few, many, data, labelled, encoder, long, start_job, tmp_path,
                                report):
    """Slopes over the second half, when all that is made once has been made.

    Of memory it is what malloc has handed out, and what the process holds beyond what malloc has
    free. A leak of any kind shows in these; that free memory lies scattered, and the heap has to
    grow for it, does not."""
    count = many if long else few
    if not count:
        pytest.skip("--long only")
    stage, command = {
        "steps of pre-training": ("pretrain", [
            *SMALL, "--batch-size", "4", "--epochs", "200", "--probe-every", "5", "--save-every",
            "50", "--max-steps", count, "--data", data]),
        "epochs of fine-tuning": ("finetune", [
            "--init", encoder, "--data", labelled, "--batch-size", "8", "--epochs", count]),
        "epochs of the demo at 32 pixels": ("pretrain", [
            "--demo", "--image-size", "32", "--epochs", count, "--log-every", "1", "--data",
            tmp_path / "demo"])}[unit]
    job = start_job(driver(tmp_path, COUNTED, stage), [
        *command, "--threads", "1", "--out", tmp_path / "run"])
    job.wait(3600)
    assert job.code == 0, job.output
    samples = np.array([[float(number) for number in line] for line in re.findall(
        r"(?:step|epoch) (\d+)/\d+ \| loss.*\nholds (\d+) (\d+) (\d+) (\d+) (\d+)", job.output)])
    assert len(samples) == samples[-1, 0] >= count
    samples[:, 1:4] /= 2**20
    print("MiB:", ", ".join(f"{memory:.0f}, {free:.0f} free at {place:.0f}" for place, memory, free
                            in samples[::len(samples) // 10, :3]))
    place, memory, free, used, handles, threads = samples[len(samples) // 2:].T
    used, held, memory, handles, threads = (
        np.polyfit(place, values, 1)[0] * (place[-1] - place[0])
        for values in (used, memory - free, memory, handles, threads))
    text = (f"memory in use {used:+.1f} MiB, held {held:+.1f} MiB, with what malloc has free "
            f"{memory:+.1f} MiB, handles {handles:+.2f}, threads {threads:+.2f} over the second "
            "half")
    print(text)
    assert used < 4 and held < 8 and abs(handles) < 2 and abs(threads) < 2, text
    report(f"| {count:,} {unit} | 1 | {text} |")
