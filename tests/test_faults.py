"""Kill it, starve it, lie to it: what docs/faults.md promises, tried on real files and processes.

    python -m pytest tests/test_faults.py               minutes: a few of each fault
    python -m pytest tests/test_faults.py --long -s     the campaign, and its table

What is drawn at random follows from --fault-seed (0), which is printed.
"""
import hashlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, smooth_image, start
from PIL import Image

import cluster_eval
import finetune
import predict
import prepare
import pretrain
from manifest import read_manifest
from model import FORMAT, Classifier, build_encoder
from run import load_checkpoint, save_checkpoint

SCRIPTS = {script.__name__: script for script in (prepare, pretrain, finetune, cluster_eval,
                                                  predict)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As `start` gives its processes, so that what runs here and there is equal to the last
    bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def report():
    """Lines of the campaign's table, printed when all is done."""
    lines = []
    yield lines
    print("\n| fault | tried | seen |\n|---|---:|---|", *lines, sep="\n")


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
def commands(data, labelled, pictures, encoder, classifier):
    """The command line of each stage, but for --out."""
    lines = {
        "prepare": ["folder", "--src", pictures, "--workers", "2", "--size", "48"],
        "pretrain": [*SMALL, "--probe-every", "1", "--data", data],
        "finetune": ["--epochs", "3", "--batch-size", "8", "--threads", "1", "--init", encoder],
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
def undisturbed(commands, tmp_path_factory):
    """stage, processes -> the contents of a run that nobody disturbed, and its seconds from
    start to end."""
    runs = {}

    def run_once(stage, processes):
        if (stage, processes) not in runs:
            out = tmp_path_factory.mktemp(stage) / "run"
            job = Job(stage, [*commands[stage], out], processes)
            job.wait(400)
            assert job.code == 0, job.output
            runs[stage, processes] = contents(out), job.seconds
        return runs[stage, processes]

    return run_once


# --------------------------------------------------------------------------------------------------
# A job: a script, the processes that it starts, and everything that they print.

class Job:
    """A stage as a user starts it. All of its processes carry a mark in their environment, by
    which they are found whatever becomes of their parent."""

    def __init__(self, stage, command, processes=None, **options):
        self.mark = f"FAULTS={uuid.uuid4()}"
        self.file = tempfile.TemporaryFile("w+")
        self.began = time.monotonic()
        script = stage if str(stage).endswith(".py") else f"{stage}.py"
        self.process = start(script, *command, processes=processes, stdout=self.file,
                             env=[self.mark.split("=")], **options)

    @property
    def output(self):
        self.file.seek(0)
        return self.file.read()

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
            except OSError:             # it has just ended, or is another user's
                continue
        return sorted(found)

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
            while (left := self.processes()) and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            self.kill(signal.SIGKILL, self.processes())
        assert not left, f"{len(left)} processes stay\n{self.output}"


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
    ("prepare", None, 4, 36), ("pretrain", None, 2, 16), ("pretrain", 2, 1, 10),
    ("pretrain", 4, 0, 6), ("finetune", None, 1, 14), ("cluster_eval", None, 1, 10),
    ("predict", None, 1, 10)])
def test_killed_again_and_again_ends_the_same(stage, processes, few, many, commands, undisturbed,
                                              rng, long, tmp_path, report):
    count = many if long else few
    if not count:
        pytest.skip("--long only")
    expected, seconds = undisturbed(stage, processes)
    out, blows, complete = tmp_path / "victim/run", [], 0
    out.parent.mkdir()
    while True:
        job = Job(stage, [*commands[stage], out], processes)
        blow = strike(job, out, rng, seconds) if len(blows) < count else ""
        job.wait(400)
        # Whatever happened, what has its name is whole, and no line of the project's is in a
        # traceback.
        print(f"{stage} {processes or 1}: {blow or 'not struck'}: {job.code}", flush=True)
        check_whole(out)
        assert f'File "{ROOT}' not in job.output, f"{blow}\n{job.output}"
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
    report.append(f"| {stage}, {processes or 1} processes, killed | {len(blows)} | "
                  f"{', '.join(counts)}; {complete} times at the end, each time the same bits |")
