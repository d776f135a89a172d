"""Stage 3: every score against scikit-learn or a direct computation, then the script as a user
meets it."""
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image
from sklearn import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cluster_eval
import pretrain
from checkpoint import load_checkpoint, save_checkpoint
from cluster_eval import agreement, evaluate, k_means
from common import DataError
from dali_pipeline import Preprocessing, eval_loader
from labels import choose_classes
from manifest import read_manifest
from model import build_encoder
from probe import extract_features, knn_class_shares
from run import Compute


# --------------------------------------------------------------------------------------------------
# Scores.

def best_mapping(truth, clusters):
    """Clusters as the classes they are assigned to (-1: none) by trying every assignment."""
    classes, found = np.unique(truth).tolist(), np.unique(clusters).tolist()
    pad = found + [-1] * max(0, len(classes) - len(found))
    best = max(itertools.permutations(pad, len(classes)), key=lambda p: sum(
        ((truth == c) & (clusters == k)).sum() for c, k in zip(classes, p)))
    return np.array([dict(zip(best, classes)).get(k, -1) for k in clusters])


@pytest.mark.parametrize("n_classes, k", [(3, 3), (4, 2), (2, 5)])
def test_agreement_is_that_of_a_direct_computation(n_classes, k):
    rng = np.random.default_rng(n_classes * k)
    truth = np.r_[np.arange(n_classes), rng.integers(n_classes, size=40)]
    # The last: some clusters are empty.
    for cluster in (rng.integers(k, size=len(truth)), truth % k, 3 * (truth % k)):
        scores = agreement(truth, cluster)
        assert scores["accuracy"] == pytest.approx((truth == best_mapping(truth, cluster)).mean())
        majority = sum(np.bincount(truth[cluster == c]).max() for c in np.unique(cluster))
        assert scores["purity"] == pytest.approx(majority / len(truth))


def test_agreement_by_hand():
    truth = np.array([0] * 6 + [1] * 3 + [2])
    perfect = dict.fromkeys(("accuracy", "balanced_accuracy", "NMI", "ARI", "purity"), 1.0)
    for order in itertools.permutations(range(3)):      # the clusters' numbers mean nothing
        assert agreement(truth, np.array(order)[truth]) == pytest.approx(perfect)
    one = agreement(truth, np.zeros(10, int))           # all in one: the majority class
    assert one == pytest.approx({"accuracy": 0.6, "balanced_accuracy": 1 / 3, "NMI": 0, "ARI": 0,
                                 "purity": 0.6})
    each = agreement(truth, np.arange(10))              # a cluster an image: purity's weakness
    assert each["purity"] == 1 and each["accuracy"] == 0.3 and each["ARI"] == 0
    # 5 of class 0 in cluster 0, 1 in cluster 1; 2 of class 1 in cluster 1, 1 in cluster 0; class 2
    # in cluster 1.
    clusters = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 1])
    scores = agreement(truth, clusters)
    assert scores["accuracy"] == 0.7
    assert scores["balanced_accuracy"] == pytest.approx((5 / 6 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("method", ["KMeans", "MiniBatchKMeans"])
def test_k_means(method, monkeypatch):
    """Blobs are found; copies of three points make three clusters; one has no silhouette."""
    monkeypatch.setattr(cluster_eval, "MINIBATCH_ABOVE", 1000 if method == "KMeans" else 10)
    rng, every = np.random.default_rng(0), np.arange(300)
    truth = rng.integers(3, size=300)
    blobs = (8 * np.eye(3)[truth] + rng.normal(size=(300, 3))).astype(np.float32)
    found, width = k_means(blobs, 3, 0, every)
    assert type(found).__name__ == method and agreement(truth, found.labels_)["accuracy"] > 0.97
    assert width == pytest.approx(metrics.silhouette_score(blobs, found.labels_))
    found, _ = k_means(np.eye(3, dtype=np.float32)[truth], 5, 0, every)
    assert len(np.unique(found.labels_)) == 3
    assert math.isnan(k_means(np.ones((30, 2), np.float32), 2, 0, np.arange(30))[1])


def test_evaluate_is_a_direct_computation():
    rng = np.random.default_rng(0)
    truth, patients, every = np.arange(90) % 3, np.arange(90) // 2, np.arange(90)
    clear = (np.eye(4)[truth] + 0.02 * rng.normal(size=(90, 4))).astype(np.float32)
    row, best = evaluate(clear, truth, patients, 3, 3, 50, every)
    assert list(row) == list(cluster_eval.SCORES) and best.n_clusters == 3
    for name in ("accuracy", "balanced_accuracy", "NMI", "ARI", "purity", "kNN_accuracy",
                 "kNN_AUROC"):
        assert [row[name][x] for x in ("mean", "low", "high")] == pytest.approx([1, 1, 1])
    vague = (clear + rng.normal(size=(90, 4))).astype(np.float32)
    row, best = evaluate(vague, truth, patients, 3, 1, 5, every)
    cosine, same = metrics.pairwise.cosine_similarity(vague), truth[:, None] == truth
    votes = knn_class_shares(cosine, truth, patients)
    for name, expected in (
            ("cosine_within", cosine[same & ~np.eye(90, dtype=bool)].mean()),
            ("cosine_between", cosine[~same].mean()),
            ("NMI", metrics.normalized_mutual_info_score(truth, best.labels_)),
            ("ARI", metrics.adjusted_rand_score(truth, best.labels_)),
            ("silhouette", metrics.silhouette_score(vague, best.labels_)),
            ("kNN_accuracy", metrics.accuracy_score(truth, votes.argmax(1))),
            ("kNN_AUROC", metrics.roc_auc_score(truth, votes, multi_class="ovr"))):
        assert row[name]["mean"] == pytest.approx(expected, abs=1e-5)


def test_intervals_count_patients_not_images():
    """A share p of n independent patients has a standard error of sqrt(p (1 - p) / n), however
    many copies each has."""
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=200)
    side = np.where(rng.random(200) < 0.75, truth, 1 - truth)
    features = np.c_[side, np.zeros(200)].astype(np.float32) * 9
    features += rng.normal(size=features.shape).astype(np.float32)
    for copies in (1, 5):
        rows = np.repeat(np.arange(200), copies)
        row, _ = evaluate(features[rows], truth[rows], rows, 2, 1, 300, np.arange(len(rows)))
        p = row["accuracy"]["mean"]
        assert 0.65 < p < 0.85 and row["accuracy"]["low"] < p < row["accuracy"]["high"]
        width = row["accuracy"]["high"] - row["accuracy"]["low"]
        assert width == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 200), rel=0.2)


def test_classes_from_findings():
    nan = math.nan
    names = ["Mass", "No Finding", "Edema"]
    labels = np.array([[1, 0, 0],           # 0  Mass alone
                       [0, 0, 1],           # 1  Edema alone
                       [1, 0, 1],           # 2  both: Edema is the rarer
                       [1, nan, nan],       # 3  Mass alone, the rest not mentioned
                       [1, 0, -1],          # 4  Mass, and perhaps Edema
                       [0, 1, 0],           # 5  healthy
                       [nan, 1, nan],       # 6  healthy
                       [-1, 0, 0],          # 7  perhaps Mass
                       [nan, nan, nan],     # 8  nobody looked
                       [0, 0, 0]])          # 9  no finding of these, and not said to be healthy
    _, M, E, H = -1, 0, 1, 2

    def classes(*arguments):
        truth, found = choose_classes(labels, names, *arguments)
        return truth.tolist(), found

    assert classes("single", "drop") == ([M, E, _, M, _, _, _, _, _, _],
                                         ["Mass", "Edema", "No Finding"])
    assert classes("single", "keep")[0] == [M, E, _, M, _, H, H, _, _, _]
    assert classes("dominant", "drop")[0] == [M, E, E, M, M, _, _, _, _, _]
    assert classes("dominant", "keep")[0] == [M, E, E, M, M, H, H, _, _, _]
    assert classes("binary:Edema", "keep") == ([0, 1, 1, 0, _, 0, 0, 0, _, 0],
                                               ["not Edema", "Edema"])
    assert classes("binary:Edema", "drop")[0] == [0, 1, 1, 0, _, _, _, 0, _, 0]
    with pytest.raises(DataError, match="no label 'Oedema', only Mass, No Finding, Edema"):
        classes("binary:Oedema", "keep")
    # However it is spelled.
    for rule, no_finding in itertools.product(("single", "dominant", "binary:Mass"),
                                              ("drop", "keep")):
        names[1] = "No Finding"
        expected = classes(rule, no_finding)
        names[1] = "No finding"
        assert classes(rule, no_finding) == expected
    # Without a column for it, healthy is who has a 0 and neither a 1 nor a -1.
    truth, _ = choose_classes(labels[:, [0, 2]], ["Mass", "Edema"], "single", "keep")
    assert truth.tolist() == [M, E, -1, M, -1, H, -1, -1, -1, H]


# --------------------------------------------------------------------------------------------------
# The script.

def write_classes(folder):
    """A data folder of images that pixels tell apart: two images a patient, one class an image,
    train and test."""
    rng, rows = np.random.default_rng(0), ["path,patient,split,bright,dark,striped"]
    (folder / "images").mkdir(parents=True)
    for i, split, c in itertools.product(range(10), ("train", "test"), range(3)):
        image = np.linspace(60, 190, 48)[:, None] + np.zeros(48)
        image = [image, image[::-1], np.where(np.arange(48) // 6 % 2, 200, 60) + 0 * image][c]
        path = f"images/{split}_{c}_{i}.jpg"
        image = (image + rng.normal(0, 12, (48, 48))).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / path)
        labels = ",".join(str(int(c == j)) for j in range(3))
        rows.append(f"{path},{split}{i // 2}_{c},{split},{labels}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which data were prepared and an encoder trained, a little; its results are
    cluster_eval's own."""
    home = tmp_path_factory.mktemp("home")
    write_classes(home / "data")
    pretrain.main([*SMALL, "--data", str(home / "data"), "--out", str(home / "runs/pretrain"),
                   "--max-steps", "2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        cluster_eval.main(["--bootstrap", "20"])        # no flag but for speed
    return home


def results(out):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")
    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def test_no_flag_after_pretraining(trained):
    found = results(trained / "runs/cluster")
    assert list(found["rows"]) == ["random", "pixels", "runs/pretrain/encoder.pt",
                                   "*majority class*"]
    assert "30 of 30 images" in found["images"]
    assert "15 patients: {'bright': 10, 'dark': 10," in found["images"]
    assert found["k"] == 3 and found["algorithm"] == "KMeans"
    assert set(found["kept"].values()) == {30}
    # The test images were made so that pixels tell them apart.
    assert found["rows"]["pixels"]["scores"]["accuracy"]["mean"] == 1
    assert found["rows"]["*majority class*"]["scores"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert found["rows"]["runs/pretrain/encoder.pt"]["image_size"] == 32        # inherited
    assert [row["labels_required"] for row in found["rows"].values()] == [0, 0, 0, 0]
    table = (trained / "runs/cluster/results.md").read_text()
    assert "| pixels | 0 | 1.000 ± 0.000 [1.000, 1.000] |" in table


def test_figures_and_projector(trained):
    out = trained / "runs/cluster/cluster_figures"
    rows = "1_random", "2_pixels", "3_runs_pretrain_encoder.pt"
    events = EventAccumulator(str(out)).Reload()
    assert set(rows) <= set(events.Tags()["images"])
    assert "results/text_summary" in events.Tags()["tensors"]
    config = (out / "projector_config.pbtxt").read_text()
    for row, width in zip(rows, (512, 30, 512)):
        pixels = np.asarray(Image.open(out / f"{row}.png").convert("L"))
        assert min(pixels.shape) > 1000 and pixels.std() > 5                    # not blank
        assert f"00000/{row}/tensors.tsv" in config
        tensors = np.loadtxt(out / f"00000/{row}/tensors.tsv", delimiter="\t")
        header, *metadata = (out / f"00000/{row}/metadata.tsv").read_text().splitlines()
        assert tensors.shape == (30, width)
        assert np.allclose(np.linalg.norm(tensors, axis=1), 1, atol=2e-3)
        assert header.split("\t") == ["cluster", "class", "patient", "path"]
        assert len(metadata) == 30
        for line in metadata:
            _, name, patient, path = line.split("\t")
            number = ["bright", "dark", "striped"].index(name)
            assert number == int(path.split("_")[1]) == int(patient[-1])
        assert Image.open(out / f"00000/{row}/sprite.png").size == (6 * 32, 6 * 32)


def evaluated(home, *arguments):
    """cluster_eval.main on the encoder of `home`, into another run folder beside the first."""
    cluster_eval.main(["--init", str(home / "runs/pretrain/encoder.pt"), "--seeds", "1",
                       "--bootstrap", "10", "--out", str(home / "runs/other"), "--overwrite",
                       *map(str, arguments)])
    return results(home / "runs/other")


def test_export_holds_the_encoders_own_features_and_kept_ones_are_read_again(trained):
    before = sorted((trained / "runs/features").iterdir())
    evaluated(trained, "--export", trained / "features.npz")
    assert before == sorted((trained / "runs/features").iterdir())
    with np.load(trained / "features.npz") as file:
        export = dict(file)
    manifest = read_manifest(trained / "data")
    images = manifest.images("test")
    encoder = build_encoder("resnet18", str(trained / "runs/pretrain/encoder.pt"))
    loader = eval_loader(manifest, images, 7, Preprocessing(32), "cpu")
    expected = extract_features(encoder, 512, loader).numpy()
    assert np.allclose(export["features"], expected, rtol=1e-3, atol=1e-4)
    assert export["features"].std() > 0.01
    assert (export["index"] == images).all()
    assert (export["labels"] == manifest.labels[images]).all()
    assert export["path"].tolist() == [manifest.paths[i] for i in images]
    assert (export["patient"] == manifest.patients[images]).all()


def test_sweep_and_choices(trained):
    found = evaluated(trained, "--k", "sweep", "--classes", "binary:dark", "--split", "all",
                      "--no-l2")
    [curve] = found["sweep"].values()
    assert curve["k"] == list(range(2, 11))
    assert curve["inertia"] == sorted(curve["inertia"], reverse=True)
    assert all(-1 <= value <= 1 for value in curve["silhouette"])
    assert "60 of 60 images" in found["images"]
    assert "{'not dark': 40, 'dark': 20}" in found["images"]
    assert (trained / "runs/other/cluster_figures/sweep.png").exists()
    for k in (2, 7):                                    # fewer, more clusters than classes
        assert evaluated(trained, "--k", k)["k"] == k
    # Nothing of the run given up is left.
    assert not (trained / "runs/other/cluster_figures/sweep.png").exists()


def test_precision_is_chosen_as_in_the_other_stages(trained):
    """Features of another precision are others, and are kept beside the first ones."""
    before = {file.name for file in (trained / "runs/features").iterdir()}
    for precision in ("fp32", "bf16"):
        found = evaluated(trained, "--precision", precision)
        assert found["config"]["precision"] == precision
    assert {file.name for file in (trained / "runs/features").iterdir()} > before


def test_labels_required(trained, tmp_path):
    state = load_checkpoint(trained / "runs/pretrain/encoder.pt")
    save_checkpoint(tmp_path / "classifier.pt", state | {
        "classifier": {"weight": torch.zeros(3, 512)}, "n_train": 1234})
    save_checkpoint(tmp_path / "from_imagenet.pt", state | {
        "config": state["config"] | {"init": "imagenet"}})
    save_checkpoint(tmp_path / "plain.pt", state["encoder"])
    # Fine-tuned once more, from that classifier: finetune.py adds both trainings up.
    save_checkpoint(tmp_path / "again.pt", state | {
        "classifier": {"weight": torch.zeros(3, 512)}, "n_train": 100, "labels_required": 1334})
    inits = [str(tmp_path / f"{name}.pt")
             for name in ("plain", "classifier", "from_imagenet", "again")]
    cluster_eval.main(["--init", *inits, "--seeds", "1", "--bootstrap", "5",
                       "--out", str(tmp_path / "out")])
    rows = list(results(tmp_path / "out")["rows"].values())
    assert [row["labels_required"] for row in rows] == ["unknown", 1234, 1_281_167, 1334, 0]
    assert rows[0]["image_size"] == 32                  # that of the first one that knows
    assert rows[0]["scores"] == rows[1]["scores"]       # the same weights


def test_settings_come_from_the_first_checkpoint_that_says_some(trained, tmp_path):
    """And not from one of another tool that comes before it, with a config of its own."""
    encoder = trained / "runs/pretrain/encoder.pt"
    torch.save({"state_dict": load_checkpoint(encoder)["encoder"], "config": {"lr": 1}},
               tmp_path / "moco.pt")
    rows, data = cluster_eval.inherit(cluster_eval.read_checkpoints(
        (str(tmp_path / "moco.pt"), "random", str(encoder))))
    assert data == str(trained / "data")
    assert [row.arch for row in rows] == ["resnet18"] * 3
    assert all(row.preprocessing == rows[2].preprocessing for row in rows)
    assert rows[2].preprocessing["image_size"] == 32


def test_a_long_name_leaves_the_figure_its_room(trained, tmp_path, recwarn):
    """It becomes a number, as one that no font can write."""
    name, data = "long " * 24, tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(trained / "data/images")
    table = (trained / "data/manifest.csv").read_text().replace("bright", name.strip(), 1)
    (data / "manifest.csv").write_text(table)
    cluster_eval.main(["--init", "pixels", "--data", str(data), "--seeds", "1", "--bootstrap", "5",
                       "--out", str(tmp_path / "out")])
    assert not [warning for warning in recwarn if "layout" in str(warning.message)]
    assert f"In the figures class 1 is {name.strip()}." in (tmp_path / "out/results.md").read_text()


def refused(capsys, *arguments):
    """The one sentence with which cluster_eval.main ends on bad input."""
    with pytest.raises(SystemExit) as end:
        cluster_eval.main([*map(str, arguments)])
    message = end.value.code
    if not isinstance(message, str):
        message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code not in (0, None) and "\n" not in message
    assert message.startswith("cluster_eval.py: ") or ".py: error: " in message     # argparse's
    return message


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_run_folders_are_not_written_over(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = contents(trained / "runs/cluster")
    cluster_eval.main(["--bootstrap", "20"])
    output = capsys.readouterr().out
    assert "is complete" in output and (trained / "runs/cluster/results.md").read_text() in output
    # What the defaults stand for is the same run.
    cluster_eval.main(["--bootstrap", "20", "--data", str(trained / "data"),
                       "--init", "random", "pixels", "runs/pretrain/encoder.pt"])
    assert "is complete" in capsys.readouterr().out
    message = refused(capsys, "--bootstrap", 20, "--seeds", 3, "--k", 4)
    assert "seeds (5 there, 3 here)" in message and "k (classes there, 4 here)" in message
    assert "--overwrite" in message
    # The same path, another training.
    encoder = trained / "runs/pretrain/encoder.pt"
    content, state = encoder.read_bytes(), load_checkpoint(encoder)
    state["encoder"]["conv1.weight"].neg_()
    save_checkpoint(encoder, state)
    message = refused(capsys, "--bootstrap", 20)
    assert "holds a run on runs/pretrain/encoder.pt as it was before it was changed" in message
    assert "--data" not in message
    # The same training, only copied or touched, is the same run.
    encoder.write_bytes(content)
    cluster_eval.main(["--bootstrap", "20"])
    assert "is complete" in capsys.readouterr().out
    assert before == contents(trained / "runs/cluster")
    # Nor is a folder of another stage touched, whatever is asked.
    before = contents(trained / "runs/pretrain")
    message = refused(capsys, "--out", "runs/pretrain", "--overwrite")
    assert "holds something else than a run of cluster_eval.py" in message
    assert before == contents(trained / "runs/pretrain")


def test_a_file_that_is_gone_is_made_again(trained, tmp_path):
    """Complete is a run whose files are there, the exported one among them."""
    command = ["--init", "pixels", "--data", str(trained / "data"), "--seeds", "1",
               "--bootstrap", "5", "--out", str(tmp_path / "out"),
               "--export", str(tmp_path / "features.npz")]
    cluster_eval.main(command)
    table = (tmp_path / "out/results.md").read_text()
    for file in (tmp_path / "features.npz", tmp_path / "out/results.md"):
        file.unlink()
        cluster_eval.main(command)
        assert file.exists() and (tmp_path / "out/results.md").read_text() == table


@pytest.mark.parametrize("moment", [2.0, "images kept", "encoder.pt (resnet18"])
def test_control_c_is_one_sentence_and_the_same_command_completes(trained, tmp_path, moment):
    """While PyTorch loads, while features are extracted, while figures are drawn."""
    encoder, out = str(trained / "runs/pretrain/encoder.pt"), tmp_path / "out"
    arguments = ["--init", encoder, "--bootstrap", "5", "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(ROOT / "cluster_eval.py"), *arguments],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if isinstance(moment, str):
        assert any(moment in line for line in process.stdout)
    else:
        time.sleep(moment)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"cluster_eval\.py: interrupted[^\n]*\n", error), error
    assert moment == 2.0 or "begins anew, with the features that are kept" in error
    assert not (out / "results.json").exists()
    cluster_eval.main(arguments)
    assert list(results(out)["rows"]) == [encoder, "*majority class*"]
    assert len([*(out / "cluster_figures").glob("events*")]) == 1           # of one run


def test_wrong_input_gets_one_sentence(trained, tmp_path, monkeypatch, capsys):
    encoder, out = trained / "runs/pretrain/encoder.pt", tmp_path / "runs/out"
    base = ["--init", encoder, "--out", out]
    for flags, complaint in [
            (["--k", 50], "fewer images than --k 50 clusters"),
            (["--classes", "all"], "--classes all"),
            (["--classes", "binary:red"], "no label 'red', only bright, dark, striped"),
            (["--data", tmp_path / "nowhere"], "nowhere is not a data folder"),
            (["--split", "val"], "the val split"),
            (["--k", 1], "--k 1"), (["--k", "many"], "--k many"),
            (["--seeds", 0], "--seeds: 0 does not lie in 1 to"),
            (["--bootstrap", 0], "--bootstrap: 0 does not lie in 1 to"),
            (["--export", tmp_path / "none/x.npz"], "must be a .npz file in a folder that exists"),
            (["--export", tmp_path / "x.csv"], "must be a .npz file")]:
        assert complaint in refused(capsys, *base, *flags)
    assert "none.pt does not exist" in refused(capsys, "--init", tmp_path / "none.pt")
    monkeypatch.chdir(tmp_path)
    assert "runs/pretrain/encoder.pt does not exist" in refused(capsys)

    lines = (trained / "data/manifest.csv").read_text().splitlines()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(trained / "data/images")

    def manifest(change):
        changed = [change(line.split(",")) for line in lines]
        (tmp_path / "data/manifest.csv").write_text("\n".join(changed) + "\n")
        return refused(capsys, *base, "--data", tmp_path / "data")

    # No label; one; one that nobody has; one patient a split.
    for change in (lambda row: ",".join(row[:3]), lambda row: ",".join(row[:4]),
                   lambda row: ",".join([*row[:3], row[3].replace("1", "0")])):
        assert "it takes two classes" in manifest(change)
    assert "two patients" in manifest(
        lambda row: ",".join([row[0], row[1] if row[1] == "patient" else row[2], *row[2:]]))
    state = load_checkpoint(encoder)
    for value, complaint in ((math.nan, "weights are not finite"),
                             (3e38, "features of 30 images are not finite, or huge")):
        # As a training gone wrong leaves it.
        state["encoder"]["layer4.1.bn2.weight"][:] = value
        save_checkpoint(tmp_path / "bad.pt", state)
        message = refused(capsys, "--init", tmp_path / "bad.pt", "--out", out)
        assert "bad.pt" in message and complaint in message


def test_processes_of_torchrun_are_refused(tmp_path):
    config = cluster_eval.Config(init=("random",), out=str(tmp_path / "out"))
    with pytest.raises(DataError, match="start it with python, not with torchrun"):
        cluster_eval.cluster_eval(config, Compute(0, 2, torch.device("cpu"), "fp32", 1), None)
    assert not (tmp_path / "out").exists()


def test_collapsed_encoder_is_told_not_a_crash(trained, tmp_path, capsys):
    """Every image at one point, as SimCLR without negatives ends: one cluster, chance, and nothing
    to draw apart."""
    state = load_checkpoint(trained / "runs/pretrain/encoder.pt")
    state["encoder"]["conv1.weight"].zero_()
    save_checkpoint(tmp_path / "collapsed.pt", state)
    cluster_eval.main(["--init", str(tmp_path / "collapsed.pt"), "--seeds", "2",
                       "--bootstrap", "5", "--k", "sweep", "--out", str(tmp_path / "runs/out")])
    output, found = capsys.readouterr().out, results(tmp_path / "runs/out")
    scores = next(iter(found["rows"].values()))["scores"]
    assert scores["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert scores["silhouette"]["mean"] is None and "| – |" in output
