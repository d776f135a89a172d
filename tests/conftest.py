"""Small data folders of real JPEGs, and the skipping of what needs a GPU."""
import csv
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.forkserver import ensure_running
from pathlib import Path

# Everywhere, before the libraries read it: what is compared to the last bit is summed in one order,
# and the threads of several workers do not spin for the same cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# What a training run in these tests shares: small enough for seconds on a CPU, and still the real
# thing.
SMALL = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "8", "--epochs", "3",
         "--warmup-epochs", "1", "--log-every", "1", "--save-every", "3", "--probe-every", "0",
         "--threads", "1", "--precision", "fp32"]


def pytest_configure(config):
    # Processes and bits are compared on the CPU, on a machine with a GPU as well: only
    # `pytest -m gpu` sees it.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A process of pytest-xdist has no script, after which argparse would call the program.
    sys.argv[0] = __file__
    # A shell starts a background job with Ctrl-C ignored, and all that the job starts inherits
    # that: a SIGINT would do nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="test_faults.py: the whole campaign")
    parser.addoption("--fault-seed", type=int, default=0, help="test_faults.py: of what is drawn")
    parser.addoption("--fault-table", metavar="FILE", help="test_faults.py: rows are added to it")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "long" in item.keywords and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="--long only"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device, or not asked for with -m gpu"))


def smooth_image(rng, height, width):
    """(height, width) uint8 with structure at all scales up to a few pixels, as radiographs
    have."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write_folder(folder, patients=20, images_per_patient=3, labels=("Effusion", "Mass")):
    """A data folder as prepare.py makes it: images of different shapes, every value a label can
    take, all splits."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with open(folder / "manifest.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["path", "patient", "split", *labels])
        for patient in range(patients):
            split = ("train" if patient < 0.7 * patients else
                     "val" if patient < 0.85 * patients else "test")
            for image in range(images_per_patient):
                height, width = 40 + rng.integers(30), 40 + rng.integers(30)
                path = f"images/{patient:03d}_{image}.jpg"
                Image.fromarray(smooth_image(rng, height, width)).save(folder / path, quality=95)
                values = [1, 0, -1, "", 1, 0]
                table.writerow([path, f"p{patient}", split,
                                *(values[(patient + image + i) % 6] for i in range(len(labels)))])
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder that tests read and never change: 60 images of 20 patients, 42 of them for
    training."""
    return write_folder(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture
def folder(tmp_path):
    """A data folder of one's own, to break: 12 images of 4 patients."""
    return write_folder(tmp_path / "folder", patients=4)


def start(*command, processes=None, torchrun=("--standalone",), env=(), stdout=subprocess.PIPE,
          **kwargs):
    """Start a script of the project as a user does, under torchrun where `processes` is given. Its
    lines come as it prints them, as on a terminal."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, text=True, stdout=stdout,
                            stderr=subprocess.STDOUT,
                            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env), **kwargs)


def run(*command, processes=None):
    """The same, to its end: (exit code, everything it printed)."""
    process = start(*command, processes=processes)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


@pytest.fixture(scope="session")
def forkserver():
    """multiprocessing's context of this name. Its processes find all libraries imported, because
    the process that they are forked from has imported them, and has done nothing else."""
    multiprocessing.set_forkserver_preload(["conftest", "bench"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{ROOT}")
        ensure_running()
    yield multiprocessing.get_context("forkserver")
    for process in multiprocessing.active_children():       # of tests that failed
        process.kill()


class Forked:
    """A script in a process of the forkserver: what `start` returns, as far as tests use it. What
    it prints is to be read from stdout, or is added to the file `output`."""

    def __init__(self, forkserver, script, arguments, environment, output=None):
        reader, writer = forkserver.Pipe(duplex=False)
        with reader, writer:
            self.process = forkserver.Process(
                target=_run_script, args=(script, arguments, environment, output or writer))
            self.process.start()
            self.stdout = open(os.dup(reader.fileno()))

    def send_signal(self, sign):
        os.kill(self.process.pid, sign)

    def wait(self, seconds=400):
        self.process.join(seconds)
        return self.process.exitcode

    def to_end(self):
        """(exit code, what nobody has read)"""
        output = self.stdout.read()
        return self.wait(), output


def _run_script(script, arguments, environment, output):
    signal.alarm(400)                       # its end, whatever it waits for
    os.environ |= environment
    os.chdir(environment.get("PWD", ROOT))
    sys.stdout = sys.stderr = (
        open(output, "a", 1) if isinstance(output, str) else open(output.fileno(), "w", 1))
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(scope="session")
def start_forked(forkserver):
    """A function that starts a script: a Forked, or a list of as many as torchrun would start.
    These are on one machine, unless `environments` say something else."""
    def start_all(script, *arguments, processes=None, environments=None, output=None):
        if not processes:
            return Forked(forkserver, script, arguments, {}, output)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": str(free.getsockname()[1])}
        environments = environments or [
            {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            for rank in range(processes)]
        return [Forked(forkserver, script, arguments,
                       common | {"RANK": str(rank)} | environment, output)
                for rank, environment in enumerate(environments)]

    return start_all


@pytest.fixture(scope="session")
def run_forked(start_forked):
    """The same, to its end: [(exit code, output)]."""
    def run_all(script, *arguments, processes, **options):
        started = start_forked(script, *arguments, processes=processes, **options)
        with ThreadPoolExecutor(processes) as readers:      # a full pipe would stop its writer
            return list(readers.map(Forked.to_end, started))

    return run_all


# --------------------------------------------------------------------------------------------------
# What fine-tuning and prediction are tested on.

@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A data folder with something to learn: 60 patients, 2 images each. A bright disc is a
    Mass, a dark left half an Effusion. Five more patients of the train split have nothing in any
    label column."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    (folder / "images").mkdir()
    with open(folder / "manifest.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "patient", "split", "Mass", "Effusion"])
        for i in range(130):
            patient = i // 2
            mass, effusion = patient % 3 == 0, i % 4 == 1
            image = smooth_image(rng, 48, 48) // 2 + 40
            image[10:22, 26:38] += np.uint8(70 * mass)
            image[:, :20] -= np.uint8(38 * effusion)
            Image.fromarray(image).save(folder / f"images/{i:03d}.png")
            split = "val" if 36 <= patient < 48 else "test" if 48 <= patient < 60 else "train"
            labels = [int(mass), int(effusion)] if patient < 60 else ["", ""]
            table.writerow([f"images/{i:03d}.png", f"p{patient}", split, *labels])
    return folder


@pytest.fixture(scope="session")
def encoder(labelled, tmp_path_factory):
    """An encoder.pt as pretrain.py leaves it, after no training."""
    from checkpoint import FORMAT
    from model import build_encoder
    from checkpoint import save_checkpoint
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    save_checkpoint(path, {
        "format": FORMAT, "arch": "resnet18", "encoder": build_encoder("resnet18").state_dict(),
        "config": {"data": str(labelled), "image_size": 32, "normalize": "image", "clahe": True}})
    return path
