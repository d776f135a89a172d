"""What a run owes its environment: folders that move, storage without locks, locales, half an
environment of torchrun, fonts, and checkpoints of other tools."""
import errno
import fcntl
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, run, smooth_image, write_folder
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

import cluster_eval
import finetune
import launch
import predict
import pretrain
import probe
import report
from checkpoint import CheckpointError, load_checkpoint
from common import DataError, lock, read_place
from dali_pipeline import Preprocessing, eval_loader
from manifest import read_manifest
from model import build_encoder

STEPS = [*SMALL, "--max-steps", "1"]


def refused(capsys, main, *arguments):
    """The one sentence with which a stage ends on bad input."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    message = end.value.code
    if not isinstance(message, str):
        message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code not in (0, None) and "\n" not in message
    return message


def small_folder(folder):
    """A data folder of 12 images that pretrain.py can use."""
    return write_folder(folder, patients=4)


def shell(environment, *command, cwd=ROOT):
    """A script in an environment of its own: (exit code, output)."""
    process = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, timeout=300,
                             env=os.environ | environment,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return process.returncode, process.stdout.decode(errors="replace")


def shell_of_several(environment, *commands):
    """Stages one after another in one process, which saves the start of the others: the output of
    each. All have to end well."""
    code = ("import importlib, json, sys\n"
            "for stage, *arguments in json.loads(sys.argv[1]):\n"
            "    importlib.import_module(stage).main(arguments)\n"
            "    print(chr(12), flush=True)\n")
    commands = json.dumps([[*map(str, command)] for command in commands])
    code, output = shell(environment, "-c", code, commands)
    assert code == 0, output
    return output.split("\f")[:-1]


# --------------------------------------------------------------------------------------------------
# Storage.

@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_storage_without_locks_is_a_warning_that_names_the_folder(tmp_path, monkeypatch, capsys,
                                                                  error):
    def no_flock(file, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with open(tmp_path / "config.json", "w") as file:
        assert lock(file)
    warning = capsys.readouterr().err
    assert f"the storage of {tmp_path} has no file locks ({os.strerror(error)})" in warning
    assert "start only one" in warning


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_holds_is_no_missing_lock(tmp_path, monkeypatch, capsys, error):
    def others(file, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", others)
    with open(tmp_path / "config.json", "w") as file:
        assert not lock(file)
    assert not capsys.readouterr().err


def test_unwritable_shared_memory_is_named_and_not_the_run_folder(tmp_path):
    """Stage 0 keeps locks there. The folder that is written is not to blame."""
    script = tmp_path / "stage.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import multiprocessing\nfrom common import errors_in_one_sentence\n"
        "with errors_in_one_sentence('stage.py', 'out'):\n    multiprocessing.Lock()\n")
    mount = "mount -t tmpfs -o ro none /dev/shm && exec "
    command = ["unshare", "--mount", "bash", "-c", f"{mount} {sys.executable} {script}"]
    if os.geteuid() or subprocess.call(["unshare", "--mount", "true"]):
        pytest.skip("only root can mount")
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.startswith("stage.py: Read-only file system: /dev/shm")


@pytest.mark.parametrize("what", ["folder", "pipe", "link to a folder"])
def test_a_path_that_is_no_file_is_refused(folder, what):
    path = folder / "images/001_1.jpg"
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(folder / "images")
    with pytest.raises(DataError, match=r"row 6: images/001_1.jpg is (a folder|no regular file)"):
        read_manifest(folder)


# --------------------------------------------------------------------------------------------------
# Settings that cannot work.

@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "1"}, {"LOCAL_RANK": "0"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}])
def test_half_an_environment_of_torchrun_is_refused_by_name(data, tmp_path, monkeypatch, capsys,
                                                            variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    message = refused(capsys, pretrain.main, *STEPS, "--data", data, "--out", tmp_path / "run")
    there, missing = message.split(" but not ")
    assert all(name in message for name in variables) and "torchrun" in message
    assert not [name for name in variables if name in missing.split(", as")[0].split(", ")]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank, world_size", [("2", "2"), ("-1", "2"), ("0", "two"), ("", "1")])
def test_an_impossible_environment_of_torchrun_is_refused(monkeypatch, rank, world_size):
    for name, value in dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK="0", MASTER_ADDR="here",
                            MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match="torchrun"):
        read_place()


def test_too_many_processes_for_the_gpus_are_told_by_whoever_notices(tmp_path, monkeypatch, capsys):
    """A launcher that does not say how many processes a machine has leaves it to the last ones."""
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost",
                            MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = refused(capsys, pretrain.main, *STEPS, "--out", tmp_path / "run")
    assert "2 processes on this machine are too many for its 1 GPUs" in message


@pytest.fixture
def on_two_machines(run_forked, tmp_path):
    """What pretrain.py prints as the only process of each of two machines, whose data folders are
    these."""
    def run_both(*data):
        machines = [tmp_path / "first", tmp_path / "second"]
        for machine, folder in zip(machines, data):
            machine.mkdir()
            (machine / "data").symlink_to(folder)
        codes, outputs = zip(*run_forked(
            "pretrain.py", *STEPS, "--data", "data", "--out", tmp_path / "run", processes=2,
            environments=[{"LOCAL_RANK": "0", "PWD": str(machine)} for machine in machines]))
        assert codes == (1, 1), outputs
        assert "Traceback" not in "".join(outputs)
        return outputs

    return run_both


def test_what_is_wrong_on_one_machine_alone_is_said_there(data, tmp_path, on_two_machines):
    _, second = on_two_machines(data, tmp_path / "nowhere")
    assert "pretrain.py: data is not a data folder" in second


def test_machines_whose_data_folders_differ_do_not_train_together(data, tmp_path,
                                                                  on_two_machines):
    """A copy of the folder on a machine's own disk, in which one image of val has another label."""
    shutil.copytree(data, tmp_path / "copy")
    table = (tmp_path / "copy/manifest.csv").read_text()
    assert ",val,1," in table
    (tmp_path / "copy/manifest.csv").write_text(table.replace(",val,1,", ",val,0,", 1))
    for output in on_two_machines(data, tmp_path / "copy"):
        assert "the processes do not see the same --data data" in output


LOOKS = """
import time, types
import culprit

for number in (9, 12):
    watch = culprit.Watch(None, [], load_alone=None)
    watch.close()
    watch.since = time.monotonic() - 100 * culprit.PATIENCE     # so long ago a batch was asked for
    looks = iter([False] * number + [True])
    watch.closed = types.SimpleNamespace(wait=lambda seconds: next(looks))
    watch._watch()
    print("ended after", number, flush=True)
"""


def test_time_in_which_nobody_looks_accuses_no_image():
    """A process that is suspended, for however long, does not look; one that hangs does."""
    code, output = run("-c", LOOKS)
    before, after = output.split("ended after 9\n")
    assert not before and "an image cannot be read" in after and "ended" not in after, output
    assert code == 1


def test_a_meeting_point_alone_is_no_environment(monkeypatch):
    """Job scripts export it for torchrun, and start single processes beside it."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert read_place().world_size == 1


def test_precision_on_a_cpu_is_bf16_for_pretraining_alone(tmp_path, monkeypatch):
    """Where the processor has it; probabilities should not depend on that."""
    precisions = []
    for instructions in ("avx2 avx512_bf16", "avx2"):
        (tmp_path / "cpuinfo").write_text(f"flags : {instructions}\n")
        monkeypatch.setattr(launch, "Path", lambda name: tmp_path / Path(name).name)
        for script in (pretrain, finetune, cluster_eval):
            monkeypatch.setattr(script, script.__name__, lambda config, compute, resources:
                                precisions.append(compute.precision))
            script.main(["--out", str(tmp_path / "run")])
    assert precisions == ["bf16", "fp32", "fp32", "fp32", "fp32", "fp32"]


def test_a_batch_of_one_is_refused(data, tmp_path, capsys):
    message = refused(capsys, pretrain.main, *SMALL, "--batch-size", 1, "--data", data)
    assert "--batch-size 1 leaves nothing to learn" in message


# --------------------------------------------------------------------------------------------------
# Text, whatever the locale.

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
LATIN1 = {"PYTHONIOENCODING": "latin-1"}


@pytest.mark.parametrize("environment", [
    ASCII, LATIN1, pytest.param({"PYTHONIOENCODING": "cp437"}, marks=pytest.mark.long)])
def test_a_terminal_that_lacks_a_character_ends_no_run(tmp_path, environment):
    folder = write_folder(tmp_path / "data", patients=10, images_per_patient=4,
                          labels=("Lungenentzündung", "肺炎"))
    clusters = ["cluster_eval", "--init", "pixels", "--split", "all", "--data", folder, "--out",
                tmp_path / "runs/c", "--seeds", 1, "--bootstrap", 5]
    output, *of_clusters = shell_of_several(
        environment, ["finetune", "--init", "random", "--arch", "resnet18", "--image-size", 32,
                      "--mode", "linear", "--threads", 1, "--data", folder, "--out",
                      tmp_path / "runs/f"], clusters, clusters)
    assert "done:" in output
    assert "\\u80ba\\u708e" in output
    text = (tmp_path / "runs/f/results.md").read_text("utf-8")
    assert "肺炎" in text and "Lungenentzündung" in text and "−" not in output
    assert ["is complete" in output for output in of_clusters] == [False, True]


def test_folders_whose_names_are_no_utf8(labelled, tmp_path):
    """As an older system wrote them: read by each stage, to its end. Only run folders are refused,
    before any work, because TensorBoard cannot write there."""
    home = os.fsencode(tmp_path) + b"/R\xf6ntgen"
    shutil.copytree(os.fsencode(labelled), home + b"/data")
    home = os.fsdecode(home)
    encoder, runs = f"{home}/encoder.pt", tmp_path / "runs"
    code, output = shell({}, "pretrain.py", *STEPS, "--data", labelled, "--out", f"{home}/runs")
    assert code == 1 and r"R\udcf6ntgen/runs is not in UTF-8" in output, output
    os.symlink(runs / "p/encoder.pt", encoder)
    for output in shell_of_several(
            {}, ["pretrain", *STEPS, "--data", f"{home}/data", "--out", runs / "p"],
            ["finetune", "--init", "random", encoder, "--mode", "linear", "--threads", 1,
             "--out", runs / "f"],
            ["cluster_eval", "--init", "pixels", encoder, "--seeds", 1, "--bootstrap", 5,
             "--classes", "dominant", "--out", runs / "c"]):
        assert "done:" in output and r"R\udcf6ntgen" in output, output


def test_a_data_folder_of_other_names_is_read_in_any_locale(tmp_path):
    folder = small_folder(tmp_path / "data")
    (folder / "images").rename(folder / "Röntgen")
    table = (folder / "manifest.csv").read_text("utf-8").replace("images/", "Röntgen/")
    (folder / "manifest.csv").write_text(table, "utf-8")
    code, output = shell(ASCII, "pretrain.py", *STEPS, "--data", folder, "--out", tmp_path / "run")
    assert code == 0, output


# --------------------------------------------------------------------------------------------------
# Figures.

def make_font(path, family, characters):
    """A TrueType font in which each of the characters is a triangle."""
    glyphs = [".notdef", *(f"u{ord(c):x}" for c in characters)]
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    pen.lineTo((500, 800))
    pen.lineTo((900, 0))
    pen.closePath()
    triangle = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(glyphs)
    font.setupCharacterMap({ord(c): f"u{ord(c):x}" for c in characters})
    font.setupGlyf({glyph: triangle for glyph in glyphs})
    font.setupHorizontalMetrics({glyph: (1000, 100) for glyph in glyphs})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(path)


def test_names_are_written_in_a_font_that_has_them_or_numbered(tmp_path, monkeypatch):
    fonts = list(font_manager.fontManager.ttflist)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)     # and the old ones after
    make_font(tmp_path / "font.ttf", "Triangles", "\U000f0000\U000f0001")
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    names = ["\U000f0000\U000f0001", "\U000f0002", "Пневмония", "_odd $5 and $6", "a\x07b"]
    text = report.figure_text(label=names, row=["\U000f0002/encoder.pt"])
    assert "Triangles" in text.style["font.family"]
    assert [text.written[name] for name in names] == [
        "\U000f0000\U000f0001", "label 2", "Пневмония", r" _odd \$5 and \$6", "label 5"]
    assert text.legend == ("\nIn the figures label 2 is \U000f0002, label 5 is a\x07b, row 1 is "
                           "\U000f0002/encoder.pt.\n")
    assert not report.figure_text(label=["Effusion", "Köhler–Größe"]).legend


@pytest.mark.filterwarnings("error:Glyph")
def test_figures_have_no_empty_boxes(tmp_path):
    """Neither do those of the stages: matplotlib would warn of every glyph that it lacks."""
    folder = write_folder(tmp_path / "data", patients=10, images_per_patient=4,
                          labels=("\U000f0002", "肺\U000f0003"))
    cluster_eval.main(["--init", "pixels", "--split", "all", "--data", str(folder), "--seeds", "1",
                       "--bootstrap", "5", "--k", "sweep", "--out", str(tmp_path / "runs/c")])
    text = (tmp_path / "runs/c/results.md").read_text("utf-8")
    assert "class 1 is \U000f0002, class 2 is 肺\U000f0003." in text
    finetune.main(["--init", "random", "--arch", "resnet18", "--image-size", "32", "--mode",
                   "linear", "--threads", "1", "--data", str(folder),
                   "--out", str(tmp_path / "runs/f")])
    text = (tmp_path / "runs/f/results.md").read_text("utf-8")
    assert "label 1 is \U000f0002, label 2 is 肺\U000f0003." in text


# --------------------------------------------------------------------------------------------------
# Folders that move.

def test_a_moved_run_on_moved_data_goes_on_from_another_folder(tmp_path, monkeypatch, capsys):
    home, away = tmp_path / "home", tmp_path / "away"
    small_folder(home / "data")
    monkeypatch.chdir(home)
    flags = [*SMALL, "--batch-size", "4"]
    pretrain.main([*flags, "--data", "data", "--out", "runs/a", "--max-steps", "1"])
    home.rename(away)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (away / "link").symlink_to(away / "data")
    for step, spelling in enumerate(("../away/data", f"{away}/data/", "../away/link",
                                     "../away/./runs/../data"), 2):
        pretrain.main([*flags, "--data", spelling, "--out", f"{away}/runs/a",
                       "--max-steps", str(step)])
        assert f"going on from {away}/runs/a/last.pt, step {step - 1}" in capsys.readouterr().out
    lines = [json.loads(line) for line in open(away / "runs/a/log.jsonl", encoding="utf-8")]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    # A copy is the same data; another folder, or one whose images were made anew, is not.
    shutil.copytree(away / "data", tmp_path / "copy")
    pretrain.main([*flags, "--data", "../copy", "--out", f"{away}/runs/a", "--max-steps", "5"])
    image = Image.open(tmp_path / "copy/images/000_0.jpg")
    image.resize((90, 90)).save(tmp_path / "copy/images/000_0.jpg")
    write_folder(tmp_path / "other", patients=5)
    for other in ("copy", "other"):
        message = refused(capsys, pretrain.main, *flags, "--data", f"../{other}",
                          "--out", f"{away}/runs/a")
        assert f"with other flags: --data (data there, ../{other} here)" in message


def test_labels_may_be_added_while_a_pretraining_rests(folder, tmp_path, capsys):
    flags = [*SMALL, "--batch-size", "4", "--data", str(folder), "--out", str(tmp_path / "run")]
    pretrain.main([*flags, "--max-steps", "1"])
    lines = (folder / "manifest.csv").read_text().splitlines()
    lines = [lines[0] + ",Nodule", *(line + ",1" for line in lines[1:])]
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    pretrain.main([*flags, "--max-steps", "2"])
    assert "going on from" in capsys.readouterr().out


def test_later_stages_know_moved_folders_again(labelled, encoder, tmp_path, monkeypatch, capsys):
    """The table is complete, and no feature is extracted anew."""
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(labelled, home / "data")
    shutil.copy(encoder, home / "encoder.pt")
    stages = ((finetune.main, ["--mode", "linear", "--threads", "1"], "runs/f"),
              (cluster_eval.main, ["--seeds", "1", "--bootstrap", "5", "--threads", "1"],
               "runs/c"))

    def run_all(folder):
        for main, flags, out in stages:
            main([*flags, "--init", f"{folder}/encoder.pt", "--data", f"{folder}/data",
                  "--out", f"{folder}/{out}"])

    monkeypatch.chdir(home)
    run_all(".")
    before = {file.name: file.stat().st_mtime_ns for file in (home / "runs").glob("*/predict*.pt")}
    features = sorted(file.name for file in (home / "runs/features").iterdir())
    capsys.readouterr()
    home.rename(away)
    monkeypatch.chdir(tmp_path)
    run_all(str(away))
    output = capsys.readouterr().out
    assert "is complete" in output and "on val" not in output.split("# What")[0]
    assert before == {file.name: file.stat().st_mtime_ns
                      for file in (away / "runs").glob("*/predict*.pt")}
    assert features == sorted(file.name for file in (away / "runs/features").iterdir())
    # A label that was changed is other data, in words that say so.
    table = away / "data/manifest.csv"
    table.write_text(table.read_text().replace(",train,1,", ",train,0,", 1))
    for main, flags, out in stages:
        message = refused(capsys, main, *flags, "--init", away / "encoder.pt",
                          "--data", away / "data", "--out", away / out)
        assert f"--data (./data there, {away}/data here)" in message


def test_features_are_known_by_the_images_and_not_by_the_place(folder, tmp_path):
    def fingerprint(path):
        manifest = read_manifest(path)
        return probe.fingerprint(
            eval_loader(manifest, np.arange(5), 4, Preprocessing(32), "cpu"))

    first = fingerprint(folder)
    folder.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == first
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert fingerprint(tmp_path / "link") == first
    image = smooth_image(np.random.default_rng(1), 60, 70)
    Image.fromarray(image).save(tmp_path / "moved/images/000_0.jpg", quality=90)
    assert fingerprint(tmp_path / "moved") != first


# --------------------------------------------------------------------------------------------------
# Checkpoints of other tools.

def below(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(3)
    return torchvision.models.resnet18()


def checkpoints(resnet):
    """{tool: (what it writes, what the line about it says)}"""
    rgb, sequence = resnet.state_dict(), torch.nn.Sequential(*list(resnet.children())[:-1])
    head = {"projector.0.weight": torch.zeros(2, 512), "fc.weight": torch.zeros(3, 512)}
    return {
        "ddp": (below("module.", rgb), "'module.' was taken off"),
        "moco": ({"arch": "resnet18", "optimizer": {"state": {0: {"m": rgb["fc.bias"]}}},
                  "state_dict": below("module.encoder_q.", rgb) | below("module.encoder_k.", rgb)
                  | {"module.queue": torch.zeros(2, 2)}}, "'state_dict.module.encoder_q.'"),
        "lightning": ({"state_dict": below("model.backbone.", rgb), "hyper_parameters": {"a": 1}},
                      "'state_dict.model.backbone.'"),
        "compiled": ({"model": below("_orig_mod.encoder.", rgb) | below("_orig_mod.", head)},
                     "'_orig_mod.' was taken out"),
        "sequential": (below("backbone.", sequence.state_dict()) | head, "'backbone.'"),
        "nested": ({"model": {"encoder": rgb, "projector": head}, "step": 5}, "'model.encoder.'"),
        "byol": ({"online": below("encoder.", rgb), "target": below("encoder.", rgb)},
                 "'online.encoder.'"),
        "old": ({key: value for key, value in rgb.items() if "num_batches" not in key},
                "left out fc.weight, fc.bias")}


@pytest.mark.parametrize("tool", ["ddp", "moco", "lightning", "compiled", "sequential", "nested",
                                  "byol", "old"])
def test_checkpoints_of_other_tools_give_the_same_encoder(resnet, tmp_path, tool):
    torch.save(resnet.state_dict(), tmp_path / "plain.pt")
    state, words = checkpoints(resnet)[tool]
    torch.save(state, tmp_path / "theirs.pt")
    lines = []
    encoder = build_encoder("resnet18", str(tmp_path / "theirs.pt"), lines.append)
    expected = build_encoder("resnet18", str(tmp_path / "plain.pt")).state_dict()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, expected[key])
    line, = lines
    assert line.startswith(f"{tmp_path}/theirs.pt: ") and words in line and "\n" not in line


def write_safetensors(path, state, cut=None):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, value in state.items():
        content = value.contiguous().numpy().tobytes()
        header[key] = {"dtype": {torch.float32: "F32", torch.float16: "F16",
                                 torch.int64: "I64"}[value.dtype], "shape": list(value.shape),
                       "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + data)[:cut])


@pytest.mark.parametrize("prefix", ["", "module.", "vision.encoder."])
def test_safetensors(resnet, tmp_path, prefix):
    state = below(prefix, resnet.state_dict())
    write_safetensors(tmp_path / "w.safetensors", state)
    loaded = load_checkpoint(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    build_encoder("resnet18", str(tmp_path / "w.safetensors"))
    for cut in (-10, 5000, 40, 9):
        write_safetensors(tmp_path / "w.safetensors", state, cut)
        with pytest.raises(CheckpointError, match="w.safetensors is not a whole checkpoint"):
            load_checkpoint(tmp_path / "w.safetensors")


def test_a_mismatch_says_which_keys(resnet, tmp_path):
    rgb = resnet.state_dict()
    for change, words in [
            ({"bn1.weight": torch.ones(3)}, "keys of another shape: bn1.weight (3, not 64)"),
            ({"attention.weight": torch.ones(3)}, "unexpected keys: attention.weight"),
            ({"bn1.weight": "text"}, "missing keys: bn1.weight"),
            ({"bn1.weight": torch.full((64,), torch.nan)}, "not finite")]:
        torch.save(rgb | change, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="w.pt does not fit a resnet18") as error:
            build_encoder("resnet18", str(tmp_path / "w.pt"))
        assert words in str(error.value)
    torch.save({key: value for key, value in rgb.items() if "layer4.1" not in key},
               tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"layer4.1.conv1.weight, layer4.1.bn1.weight, "
                       r"layer4.1.bn1.bias and 7 more"):
        build_encoder("resnet18", str(tmp_path / "w.pt"))


def test_hostile_checkpoints_are_one_sentence(resnet, labelled, tmp_path, capsys):
    rgb, endless = resnet.state_dict(), {}
    endless["model"] = endless
    for state, words in [
            ({"encoder": [1, 2], "config": {}}, "holds no ResNet"),
            ({1: torch.zeros(2), (2, 3): {"a": 4}}, "holds no ResNet"),
            ({}, "holds no ResNet"), (endless, "holds no ResNet"),
            ({"a": rgb, "b": rgb}, "holds several networks, under a., b."),
            (rgb | {"conv1.weight": torch.zeros(2), "arch": ["resnet18"],
                    "config": {"image_size": "big", "data": 3, 5: 6}}, "does not fit a")]:
        torch.save(state, tmp_path / "w.pt")
        for main in (pretrain.main, finetune.main, cluster_eval.main):
            arguments = ["--init", tmp_path / "w.pt", "--data", labelled, "--out", tmp_path / "run"]
            if main is not cluster_eval.main:
                arguments += ["--arch", "resnet18"]
            if main is pretrain.main:
                arguments = [*SMALL, *arguments]
            assert words in refused(capsys, main, *arguments)


class Code:
    """A pickle of it would make a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(
    pickle.dumps(state))])
def test_code_in_a_pickle_does_not_run(tmp_path, write):
    write({"encoder": Code(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="w.pt is not a whole checkpoint"):
        build_encoder("resnet18", str(tmp_path / "w.pt"))
    assert not (tmp_path / "ran").exists()


def test_ctrl_c_of_a_command_with_overwrite_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    """Before the loop: the same command would delete what is there."""
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(pretrain, "read_data", interrupted)
    with pytest.raises(SystemExit, match="130"):
        pretrain.main([*SMALL, "--data", str(data), "--out", str(tmp_path), "--overwrite"])
    assert "the same command without --overwrite goes on from what" in capsys.readouterr().err


def test_a_classifier_whose_parts_do_not_belong_together_is_refused(encoder, tmp_path):
    state = load_checkpoint(encoder) | {
        "labels": ["a", "b"], "kind": "binary", "thresholds": [0.5, 0.5],
        "classifier": {"weight": torch.zeros(2, 512), "bias": torch.zeros(2)}}
    torch.save(state, tmp_path / "classifier.pt")
    predict.load_classifier(tmp_path / "classifier.pt")
    for change in ({"labels": ["a"]}, {"thresholds": ["x", "y"]}, {"labels": 3}, {"kind": "odd"},
                   {"kind": ["binary"]}, {"kind": "three-way"}, {"classifier": [1]},
                   {"config": state["config"] | {"image_size": "big"}}, {"encoder": [1]}):
        torch.save(state | change, tmp_path / "classifier.pt")
        with pytest.raises(CheckpointError, match="classifier.pt"):
            predict.load_classifier(tmp_path / "classifier.pt")


def test_a_full_gpu_is_a_sentence_that_is_true_of_every_stage(tmp_path):
    """cluster_eval.py has no --batch-size."""
    def stage(config, compute, resources):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit, match="as far as this script can, a smaller --batch-size"):
        launch.main(stage, cluster_eval.Config, ["--out", str(tmp_path)])
