"""images.tar: the same batches to the bit, read by everything that reads images, and each kind of
damage named in a sentence."""
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import SMALL, run, start, write_folder

import cluster_eval
import finetune
import predict
import prepare
import pretrain
import probe
from archive import NAME
from checkpoint import load_checkpoint
from common import DataError, ImageError
from dali_pipeline import Preprocessing, eval_loader, train_loader
from manifest import read_manifest
from test_manifest import edit
from views import Augmentation


@pytest.fixture
def packed(folder, capsys):
    """A data folder with images.tar and without images/."""
    assert prepare.main(["pack", str(folder), "--workers", "1"]) == 0
    assert "images.tar: 12 images" in capsys.readouterr().out
    shutil.rmtree(folder / "images")
    return folder


def test_batches_are_the_same_to_the_bit(folder):
    """From a folder and from a tar, by a loader that goes on at some step, with one fingerprint."""
    def batches():
        manifest = read_manifest(folder)
        loader = train_loader(manifest, manifest.images("train"), 4, range(3, 20), 2,
                              Augmentation(), Preprocessing(32, "image", True), 0, "cpu")
        whole = eval_loader(manifest, np.arange(12), 5, Preprocessing(48), "cpu")
        return probe.fingerprint(whole), [tensor for batch in [*loader, *whole] for tensor in batch]

    fingerprint, expected = batches()
    prepare.main(["pack", str(folder), "--workers", "1"])
    shutil.rmtree(folder / "images")
    assert read_manifest(folder).archive is not None
    fingerprint_packed, got = batches()
    assert fingerprint_packed == fingerprint
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_tar_unpacks_it_again(folder, tmp_path):
    """And the same images make the same tar."""
    prepare.main(["pack", str(folder), "--workers", "1"])
    first = (folder / NAME).read_bytes()
    prepare.main(["pack", str(folder), "--workers", "1"])
    assert (folder / NAME).read_bytes() == first
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "xf", folder / NAME, "-C", tmp_path / "out"], check=True)
    for path in read_manifest(folder).paths:
        assert (tmp_path / "out" / path).read_bytes() == (folder / path).read_bytes()


@pytest.mark.parametrize("name", ["胸 \n.jpg", 200 * "a" + ".jpg", "a,b.jpg", "-x.jpg"])
def test_any_name_is_packed(folder, name):
    path = f"images/{name}"
    (folder / "images/001_0.jpg").rename(folder / path)
    edit(folder, 4, 0, path)
    content = (folder / path).read_bytes()
    prepare.main(["pack", str(folder), "--workers", "1"])
    assert read_manifest(folder).archive.member(3).read_bytes() == content
    found = subprocess.run(["tar", "xOf", folder / NAME, "--", path], capture_output=True)
    assert found.stdout == content


def test_rows_may_leave_the_manifest_or_move(packed):
    before = read_manifest(packed)
    lines = (packed / "manifest.csv").read_text().splitlines()
    (packed / "manifest.csv").write_text("\n".join([lines[0], lines[9], lines[4]]))
    manifest = read_manifest(packed)
    assert manifest.sizes.tolist() == before.sizes[[8, 3]].tolist()
    assert [content.tobytes() for content in manifest.dali_inputs(np.arange(2))] == \
        [before.archive.member(i).read_bytes() for i in (8, 3)]


def flip(file, place):
    with open(file, "r+b") as tar:
        tar.seek(place)
        byte = tar.read(1)
        tar.seek(place)
        tar.write(bytes([byte[0] ^ 255]))


def members_of_index(file, number):
    """Another number of members in the index's first line, which its checksum does not cover."""
    with open(file, "r+b") as tar:
        tar.seek(512)
        line = json.loads(tar.read(512)) | {"members": number}
        tar.seek(512)
        tar.write(json.dumps(line).encode().ljust(512))


@pytest.mark.parametrize("damage, message", [
    (lambda folder: os.truncate(folder / NAME, 20_000), r"images.tar has 20,000 bytes and its"),
    (lambda folder: os.truncate(folder / NAME, 1100), r"images.tar has 1,100 bytes and its"),
    (lambda folder: os.truncate(folder / NAME, 0), r"images.tar has no index"),
    (lambda folder: (folder / NAME).write_text("no tar" * 1000), r"images.tar has no index"),
    (lambda folder: flip(folder / NAME, 515), r"images.tar has no index"),
    (lambda folder: flip(folder / NAME, 1030), r"the index of .*images.tar is damaged"),
    *((lambda folder, n=n: members_of_index(folder / NAME, n), r"the index of .*tar is damaged")
      for n in (900, -2, "", None)),
    (lambda folder: edit(folder, 5, 0, "images/new.jpg"),
     r"manifest.csv, row 6: images/new.jpg is not in .*images.tar, which was packed before")])
def test_damage_is_named(packed, damage, message):
    damage(packed)
    with pytest.raises(DataError, match=message):
        read_manifest(packed)
    with pytest.raises(SystemExit, match=message):
        prepare.main(["verify", str(packed), "--workers", "1"])


def test_images_that_were_made_anew_are_noticed(folder):
    prepare.main(["pack", str(folder), "--workers", "1"])
    with open(folder / "images/001_0.jpg", "ab") as file:
        file.write(b"x")
    message = r"images/001_0.jpg is not as it was when .*images.tar was packed: make it again"
    with pytest.raises(DataError, match=message):
        read_manifest(folder)
    with pytest.raises(SystemExit, match=message):
        prepare.main(["verify", str(folder), "--workers", "1"])
    prepare.main(["pack", str(folder), "--workers", "1"])
    assert read_manifest(folder).archive is not None


def test_damaged_member_is_named(packed, capsys):
    """By the loader where DALI cannot decode it, and by verify in any case."""
    member = read_manifest(packed).archive.member(3)
    for place in range(member.start, member.start + 300):
        flip(packed / NAME, place)
    manifest = read_manifest(packed)
    complaint = r"images.tar, images/001_0.jpg \(row 5 of manifest.csv\) cannot be read: its bytes"
    with pytest.raises(ImageError, match=complaint):
        list(eval_loader(manifest, np.arange(12), 4, Preprocessing(32), "cpu"))
    assert prepare.main(["verify", str(packed), "--workers", "1"]) == 1
    assert "images/001_0.jpg: unreadable: its bytes are not those" in capsys.readouterr().out
    assert prepare.main(["verify", str(packed), "--drop", "--workers", "1"]) == 0
    assert len(read_manifest(packed).paths) == 11


@pytest.mark.parametrize("damage, message", [
    (lambda file: file.unlink(), r"row 5: images/001_0.jpg is missing on disk"),
    (lambda file: file.write_bytes(file.read_bytes()[:300]),
     r"1 images that cannot be packed, first images/001_0.jpg: unreadable")])
def test_what_cannot_be_read_is_not_packed(folder, damage, message):
    damage(folder / "images/001_0.jpg")
    with pytest.raises(SystemExit, match=message):
        prepare.main(["pack", str(folder), "--workers", "1"])
    assert not [*folder.glob("images.tar*")]


def test_killed_while_packing(tmp_path):
    """No images.tar is left, whatever moment it was, and the same command makes one."""
    folder = write_folder(tmp_path / "folder", patients=200)
    process = start("prepare.py", "pack", folder)
    while process.poll() is None and not (folder / f"{NAME}.tmp").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / NAME).exists() and read_manifest(folder).archive is None
    assert run("prepare.py", "pack", folder)[0] == 0
    assert len(read_manifest(folder).archive.paths) == 600
    assert not (folder / f"{NAME}.tmp").exists()


def test_cut_short_under_way(packed, tmp_path, start_forked):
    """One sentence, and no death by a signal without a word."""
    process = start_forked("pretrain.py", *SMALL, "--batch-size", "4", "--epochs", "100000",
                           "--save-every", "100000", "--data", packed, "--out", tmp_path / "run")
    assert any("step 00003/" in line for line in process.stdout)
    os.truncate(packed / NAME, 4096)
    code, output = process.to_end()
    assert code == 1, output
    assert "images.tar can no longer be read: it was cut short, or its disk failed" in output
    assert "Traceback" not in output


def test_overwrite_removes_it(tmp_path):
    command = ["demo", "--out", str(tmp_path / "demo"), "--patients", "8", "--workers", "1"]
    prepare.main(command)
    prepare.main(["pack", str(tmp_path / "demo"), "--workers", "1"])
    prepare.main([*command, "--seed", "1", "--overwrite"])
    assert not (tmp_path / "demo" / NAME).exists()


def test_every_stage_works_from_it(data, encoder, tmp_path):
    """Pre-training, classifiers, clusters, and predictions with their Grad-CAM: the same files as
    from the images themselves."""
    folder = tmp_path / "packed" / "folder"
    shutil.copytree(data, folder)
    prepare.main(["pack", str(folder), "--workers", "1"])
    shutil.rmtree(folder / "images")
    for source, out in ((data, tmp_path / "a"), (folder, tmp_path / "b")):
        pretrain.main([*SMALL, "--max-steps", "3", "--data", str(source), "--out",
                       str(out / "pretrain")])
        finetune.main(["--data", str(source), "--init", str(encoder), "--mode", "linear",
                       "--seeds", "0", "--fraction", "1", "--out", str(out / "finetune")])
        cluster_eval.main(["--init", str(encoder), "--data", str(source), "--split", "all",
                           "--classes", "binary:Mass", "--bootstrap", "10",
                           "--out", str(out / "cluster")])
        predict.main([str(out / "finetune/classifier.pt"), str(source), "--threads", "1",
                      "--explain", "3", "--out", str(out / "predictions")])
    for pattern in ("finetune/results.md", "cluster/results.md", "features/*.pt",
                    "predictions/predictions.csv", "predictions/explained/*.png"):
        files = sorted(tmp_path.glob(f"a/{pattern}"))
        assert files, pattern
        for file in files:
            other = tmp_path / "b" / file.relative_to(tmp_path / "a")
            expected = file.read_bytes().replace(bytes(data), bytes(folder))
            assert other.read_bytes() == expected, file
    first, second = (load_checkpoint(tmp_path / x / "pretrain/encoder.pt")["encoder"]
                     for x in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
