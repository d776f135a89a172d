"""Stage 3: every score against scikit-learn or a direct computation, then the script as a user meets it."""
import csv
import itertools
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from sklearn import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cluster_eval
import pretrain
from cluster_eval import (
    agreement, auroc, choose_classes, class_cosines, contingency, evaluate, k_means, knn_votes, silhouettes)
from dali_pipeline import DataError, Preprocessing, eval_loader, read_manifest
from model import build_encoder, extract_features, load_checkpoint, save_checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# Scores.

def best_mapping(truth, clusters):
    """Clusters as the classes they are assigned to (-1: none) by trying every assignment."""
    classes, found = np.unique(truth).tolist(), np.unique(clusters).tolist()
    pad = found + [-1] * max(0, len(classes) - len(found))
    best = max(itertools.permutations(pad, len(classes)),
               key=lambda p: sum(((truth == c) & (clusters == k)).sum() for c, k in zip(classes, p)))
    return np.array([dict(zip(best, classes)).get(k, -1) for k in clusters])


@pytest.mark.parametrize("n_classes, k, empty", [(3, 3, False), (4, 2, False), (2, 5, False), (3, 4, True)])
def test_agreement_is_that_of_scikit_learn(n_classes, k, empty):
    rng = np.random.default_rng(n_classes * k)
    for _ in range(20):
        truth = np.r_[np.arange(n_classes), rng.integers(n_classes, size=40)]
        clusters = np.where(rng.random(len(truth)) < 0.5, truth % k, rng.integers(k, size=len(truth)))
        if empty:
            clusters[clusters == 1] = 0                              # cluster 1 holds nothing
        scores, mapped = agreement(contingency(truth, clusters)), best_mapping(truth, clusters)
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, mapped))
        assert scores["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(truth, clusters))
        assert scores["ari"] == pytest.approx(metrics.adjusted_rand_score(truth, clusters))
        majority = sum(np.bincount(truth[clusters == c]).max() for c in np.unique(clusters))
        assert scores["purity"] == pytest.approx(majority / len(truth))


def test_agreement_by_hand():
    truth = np.array([0] * 6 + [1] * 3 + [2])
    perfect = dict.fromkeys(("accuracy", "balanced_accuracy", "nmi", "ari", "purity"), 1.0)
    for order in itertools.permutations(range(3)):                              # the clusters' numbers mean nothing
        assert agreement(contingency(truth, np.array(order)[truth])) == pytest.approx(perfect)
    one = agreement(contingency(truth, np.zeros(10, int)))                      # all in one: the majority class
    assert one == pytest.approx({"accuracy": 0.6, "balanced_accuracy": 1 / 3, "nmi": 0, "ari": 0, "purity": 0.6})
    each = agreement(contingency(truth, np.arange(10)))                         # a cluster an image: purity's weakness
    assert each["purity"] == 1 and each["accuracy"] == 0.3 and each["ari"] == 0
    # 5 of class 0 in cluster 0, 1 in cluster 1; 2 of class 1 in cluster 1, 1 in cluster 0; class 2 in cluster 1.
    clusters = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 1])
    scores = agreement(contingency(truth, clusters))
    assert scores["accuracy"] == 0.7 and scores["balanced_accuracy"] == pytest.approx((5 / 6 + 2 / 3 + 0) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # that some clusters are no class
        assert scores["balanced_accuracy"] == pytest.approx(
            metrics.balanced_accuracy_score(truth, best_mapping(truth, clusters)))


def test_weights_are_repetitions():
    rng = np.random.default_rng(0)
    truth, clusters, weights = (rng.integers(high, size=50) for high in (3, 4, 3))
    weights[truth == 2] = 0                                                     # a class that was not drawn
    again = np.repeat(np.arange(50), weights)
    scores = agreement(contingency(truth, clusters, weights))
    assert scores["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(truth[again], clusters[again]))
    assert scores["ari"] == pytest.approx(metrics.adjusted_rand_score(truth[again], clusters[again]))
    assert scores["accuracy"] == pytest.approx((truth[again] == best_mapping(truth[again], clusters[again])).mean())
    score = rng.integers(6, size=50) / 6                                        # many ties
    for c in (0, 1):
        assert auroc(score, truth == c, weights) == pytest.approx(
            metrics.roc_auc_score(truth[again] == c, score[again]))
    assert math.isnan(auroc(score, truth == 2, weights)) and math.isnan(auroc(score, truth < 3, weights))


def test_class_cosines_are_means_over_pairs():
    rng = np.random.default_rng(0)
    features, truth = rng.normal(1, 1, (40, 7)).astype(np.float32), np.r_[0, 1, 2, 3, rng.integers(3, size=36)]
    cosine = metrics.pairwise.cosine_similarity(features)
    same, pair = truth[:, None] == truth, ~np.eye(40, dtype=bool)
    assert class_cosines(features, truth) == pytest.approx((cosine[same & pair].mean(), cosine[~same].mean()), abs=1e-5)


def test_votes_of_the_nearest_images_of_other_patients():
    rng = np.random.default_rng(0)
    n = 600                                                                     # more than one block of queries
    features, truth = rng.normal(size=(n, 5)).astype(np.float32), np.r_[0, 1, 2, rng.integers(3, size=n - 3)]
    patients, queries = rng.integers(200, size=n), np.sort(rng.permutation(n)[:500])
    votes, cosine = knn_votes(features, truth, patients, queries, 7), metrics.pairwise.cosine_similarity(features)
    for row, q in enumerate(queries):
        others = np.flatnonzero(patients != patients[q])
        near = others[np.argsort(-cosine[q, others])[:7]]
        expected = np.bincount(truth[near], np.exp(cosine[q, near] / 0.07), 3)
        expected *= np.bincount(truth) / np.bincount(truth[others])
        assert votes[row] == pytest.approx(expected / expected.sum(), abs=1e-4)


def test_copies_of_a_patient_do_not_vote():
    features = np.repeat(np.eye(2, dtype=np.float32), 4, 0) + np.float32(0.1)   # two places, two patients at each
    truth, patients = np.array([0, 0, 1, 1] * 2), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    votes = knn_votes(features, truth, patients, np.arange(8), 2)
    assert (votes.argmax(1) == 1 - truth).all()             # the nearest of others is always the other class


def test_votes_of_features_that_say_nothing_are_at_chance():
    """Leave-one-out alone puts them below: an image's own class is always the rarest among the others."""
    truth, patients, one_place = np.arange(30) % 3, np.arange(30) % 15, np.ones((30, 2), np.float32)
    votes = knn_votes(one_place, truth, patients, np.arange(30), 29)
    assert np.allclose(votes, 1 / 3, atol=1e-6)
    areas, rng = [], np.random.default_rng(0)
    for _ in range(200):
        votes = knn_votes(rng.normal(size=(30, 5)).astype(np.float32), truth, patients, np.arange(30), 20)
        areas += [auroc(votes[:, c], truth == c, np.ones(30)) for c in range(3)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.05)


def test_silhouettes():
    rng = np.random.default_rng(0)
    features, clusters = rng.normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    one, own, three = silhouettes(features, [np.zeros(30, int), np.arange(30), clusters])
    assert math.isnan(one) and math.isnan(own)
    assert three == pytest.approx(metrics.silhouette_score(features, clusters), abs=1e-5)


@pytest.mark.parametrize("method", ["KMeans", "MiniBatchKMeans"])
def test_k_means(method, monkeypatch):
    """Blobs are found; copies of three points make three clusters, and no warning."""
    monkeypatch.setattr(cluster_eval, "MINIBATCH_ABOVE", 1000 if method == "KMeans" else 10)
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    found = k_means((8 * np.eye(3)[truth] + rng.normal(size=(300, 3))).astype(np.float32), 3, 0)
    assert type(found).__name__ == method
    assert agreement(contingency(truth, found.labels_.astype(int)))["accuracy"] > 0.97
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(np.unique(k_means(np.eye(3, dtype=np.float32)[truth], 5, 0).labels_)) == 3


def test_evaluate_where_all_is_known():
    rng = np.random.default_rng(0)
    truth, patients = np.arange(90) % 3, np.arange(90) // 2
    features = (np.eye(4)[truth] + 0.02 * rng.normal(size=(90, 4))).astype(np.float32)
    row, best = evaluate(features, truth, patients, 3, 3, 50, np.arange(90))
    assert list(row) == list(cluster_eval.SCORES) and best.n_clusters == 3
    for name in ("accuracy", "balanced_accuracy", "nmi", "ari", "purity", "knn_accuracy", "knn_auroc"):
        assert [row[name][x] for x in ("mean", "low", "high")] == pytest.approx([1, 1, 1])
    assert row["accuracy"]["spread"] == 0 and len(row["accuracy"]["seeds"]) == 3
    assert row["silhouette"]["mean"] > 0.9 and row["cosine_within"]["mean"] > 0.99 > row["cosine_between"]["mean"]


def test_intervals_count_patients_not_images():
    """A share p of n independent patients has a standard error of sqrt(p (1 - p) / n), however many copies each has."""
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=200)
    features = np.c_[np.where(rng.random(200) < 0.75, truth, 1 - truth), np.zeros(200)].astype(np.float32) * 9
    features += rng.normal(size=features.shape).astype(np.float32)
    for copies in (1, 5):
        rows = np.repeat(np.arange(200), copies)
        row, _ = evaluate(features[rows], truth[rows], rows, 2, 2, 500, np.arange(len(rows)))
        p = row["accuracy"]["mean"]
        assert 0.65 < p < 0.85 and row["accuracy"]["low"] < p < row["accuracy"]["high"]
        width = row["accuracy"]["high"] - row["accuracy"]["low"]
        assert width == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 200), rel=0.15)


def test_intervals_hold_the_estimate_where_there_is_nothing_to_find():
    """Many classes, few patients: a patient drawn twice lifts every score of agreement, and plain percentiles miss."""
    rng = np.random.default_rng(0)
    truth, patients = np.r_[np.arange(10), rng.integers(10, size=110)], np.arange(120) % 30
    row, _ = evaluate(rng.normal(size=(120, 8)).astype(np.float32), truth, patients, 10, 2, 200, np.arange(120))
    for name in ("accuracy", "balanced_accuracy", "nmi", "ari", "purity", "knn_accuracy", "knn_auroc"):
        assert row[name]["low"] < row[name]["mean"] < row[name]["high"], name


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

    assert classes("single", "drop") == ([M, E, _, M, _, _, _, _, _, _], ["Mass", "Edema", "No Finding"])
    assert classes("single", "keep")[0] == [M, E, _, M, _, H, H, _, _, _]
    assert classes("dominant", "drop")[0] == [M, E, E, M, M, _, _, _, _, _]
    assert classes("dominant", "keep")[0] == [M, E, E, M, M, H, H, _, _, _]
    assert classes("binary:Edema", "keep") == ([0, 1, 1, 0, _, 0, 0, 0, _, 0], ["not Edema", "Edema"])
    assert classes("binary:Edema", "drop")[0] == [0, 1, 1, 0, _, _, _, 0, _, 0]
    with pytest.raises(DataError, match="no label 'Oedema', only Mass, No Finding, Edema"):
        classes("binary:Oedema", "keep")
    # Without a column for it, healthy is who has a 0 and neither a 1 nor a -1.
    truth, _ = choose_classes(labels[:, [0, 2]], ["Mass", "Edema"], "single", "keep")
    assert truth.tolist() == [M, E, -1, M, -1, H, -1, -1, -1, H]


# ----------------------------------------------------------------------------------------------------------------------
# The script.

def write_classes(folder, labels=("bright", "dark", "striped"), per_class=10):
    """A data folder of images that pixels tell apart: two images a patient, one class an image, train and test."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with open(folder / "manifest.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["path", "patient", "split", *labels])
        for i, split, c in itertools.product(range(per_class), ("train", "test"), range(3)):
            image = np.linspace(60, 190, 48)[:, None] + np.zeros(48)
            image = [image, image[::-1], np.where(np.arange(48) // 6 % 2, 200, 60) + 0 * image][c]
            path = f"images/{split}_{c}_{i}.jpg"
            Image.fromarray((image + rng.normal(0, 12, (48, 48))).clip(0, 255).astype(np.uint8)).save(folder / path)
            table.writerow([path, f"{split}{i // 2}_{c}", split, *(int(c == j) for j in range(len(labels)))])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which data were prepared and an encoder trained, a little; its results are cluster_eval's own."""
    home = tmp_path_factory.mktemp("home")
    write_classes(home / "data")
    pretrain.main([*SMALL, "--data", str(home / "data"), "--out", str(home / "runs/pretrain"), "--max-steps", "2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        cluster_eval.main([])                                                   # no flag at all
    return home


def results(out):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")
    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def test_no_flag_after_pretraining(trained):
    found = results(trained / "runs/cluster")
    assert list(found["rows"]) == ["random", "pixels", "pretrain/encoder", "*majority class*"]
    assert found["images"] == 30 and found["classes"] == {"bright": 10, "dark": 10, "striped": 10}
    assert found["patients"] == 15 and found["k"] == 3 and found["algorithm"] == "KMeans"
    assert found["kept"] == {"single, drop": 30, "single, keep": 30, "dominant, drop": 30, "dominant, keep": 30}
    assert found["rows"]["pixels"]["scores"]["accuracy"]["mean"] == 1           # the test images were made so
    assert found["rows"]["*majority class*"]["scores"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    encoder = found["rows"]["pretrain/encoder"]
    assert encoder["preprocessing"]["image_size"] == 32 and encoder["width"] == 512         # inherited
    assert [row["labels_required"] for row in found["rows"].values()] == [0, 0, 0, 0]
    table = (trained / "runs/cluster/results.md").read_text()
    assert re.search(r"\| pixels \| 0 \| 1\.000 ± 0\.000 \[1\.000, 1\.000\] \|", table) and "30 of 30 images" in table


def test_figures_curves_and_projector(trained):
    out = trained / "runs/cluster"
    for kind, row in itertools.product(("confusion", "map", "nearest"), ("random", "pixels", "pretrain_encoder")):
        pixels = np.asarray(Image.open(out / f"{kind}_{row}.png").convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 5                     # not blank
    events = EventAccumulator(str(out), size_guidance={"images": 0}).Reload()
    assert {"accuracy/random", "nmi/pixels", "knn_auroc/pretrain/encoder"} <= set(events.Tags()["scalars"])
    assert [x.value for x in events.Scalars("accuracy/pixels")] == [1] * 5      # one a seed
    assert {"map/random", "confusion/pixels", "nearest/pretrain/encoder"} <= set(events.Tags()["images"])
    config = (out / "projector_config.pbtxt").read_text()
    for row, width in (("random", 512), ("pixels", 30), ("pretrain_encoder", 512)):
        assert f"00000/{row}/tensors.tsv" in config
        tensors = np.loadtxt(out / f"00000/{row}/tensors.tsv", delimiter="\t")
        header, *metadata = (out / f"00000/{row}/metadata.tsv").read_text().splitlines()
        assert tensors.shape == (30, width) and np.allclose(np.linalg.norm(tensors, axis=1), 1, atol=2e-3)
        assert header.split("\t") == ["cluster", "class", "patient", "path"] and len(metadata) == 30
        for line in metadata:
            _, name, patient, path = line.split("\t")
            assert ["bright", "dark", "striped"].index(name) == int(path.split("_")[1]) == int(patient[-1])
        assert Image.open(out / f"00000/{row}/sprite.png").size == (6 * 32, 6 * 32)


def evaluated(home, *arguments, out="runs/other"):
    """cluster_eval.main on the encoder of `home`, into another run folder beside the first."""
    cluster_eval.main(["--init", str(home / "runs/pretrain/encoder.pt"), "--seeds", "1", "--bootstrap", "10",
                       "--out", str(home / out), "--overwrite", *map(str, arguments)])
    return results(home / out)


def test_export_holds_the_encoders_own_features_and_kept_ones_are_read_again(trained):
    before = sorted((trained / "runs/features").iterdir())
    evaluated(trained, "--export", trained / "features.npz")
    assert before == sorted((trained / "runs/features").iterdir())
    with np.load(trained / "features.npz") as file:
        export = dict(file)
    manifest = read_manifest(trained / "data")
    images = manifest.images("test")
    encoder = build_encoder("resnet18", str(trained / "runs/pretrain/encoder.pt"))
    expected = extract_features(encoder, eval_loader(manifest, images, 7, Preprocessing(32), "cpu"), 30).numpy()
    assert np.allclose(export["features"], expected, rtol=1e-3, atol=1e-4) and export["features"].std() > 0.01
    assert (export["index"] == images).all() and (export["labels"] == manifest.labels[images]).all()
    assert export["path"].tolist() == [manifest.paths[i] for i in images]
    assert (export["patient"] == manifest.patients[images]).all()


def test_sweep_and_choices(trained):
    found = evaluated(trained, "--k", "sweep", "--classes", "binary:dark", "--split", "all", "--no-l2")
    curve = found["sweep"]["pretrain/encoder"]
    assert curve["k"] == list(range(2, 11)) and curve["inertia"] == sorted(curve["inertia"], reverse=True)
    assert all(-1 <= value <= 1 for value in curve["silhouette"])
    assert found["classes"] == {"not dark": 40, "dark": 20} and found["images"] == 60 and found["k"] == 2
    assert Image.open(trained / "runs/other/sweep.png").size[0] > 1000
    assert evaluated(trained, "--k", 7)["k"] == 7
    assert not (trained / "runs/other/sweep.png").exists()                      # nothing of the run given up is left


def test_labels_required(trained, tmp_path):
    state = load_checkpoint(trained / "runs/pretrain/encoder.pt")
    save_checkpoint(tmp_path / "classifier.pt", state | {
        "classifier": {"weight": torch.zeros(3, 512), "bias": torch.zeros(3)}, "label_names": ["a", "b", "c"],
        "n_train": 1234})
    save_checkpoint(tmp_path / "from_imagenet.pt", state | {"config": state["config"] | {"init": "imagenet"}})
    save_checkpoint(tmp_path / "plain.pt", state["encoder"])
    cluster_eval.main(["--init", *(str(tmp_path / f"{name}.pt") for name in ("plain", "classifier", "from_imagenet")),
                       "--seeds", "1", "--bootstrap", "5", "--out", str(tmp_path / "out")])
    rows = list(results(tmp_path / "out")["rows"].values())
    assert [row["labels_required"] for row in rows] == [None, 1234, 1_281_167, 0]
    assert "| 1,234 |" in (tmp_path / "out/results.md").read_text()
    assert rows[0]["preprocessing"]["image_size"] == 32                         # that of the first one that knows
    assert rows[0]["scores"] == rows[1]["scores"]                               # the same weights


def refused(capsys, *arguments):
    """The one sentence with which cluster_eval.main ends on bad input."""
    with pytest.raises(SystemExit) as end:
        cluster_eval.main([*map(str, arguments)])
    message = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert end.value.code not in (0, None) and "\n" not in message
    assert message.startswith("cluster_eval.py: ") or ".py: error: " in message             # argparse's own
    return message


def test_run_folders_are_not_written_over(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = {p: p.read_bytes() for p in (trained / "runs/cluster").iterdir() if p.is_file()}
    cluster_eval.main([])
    assert "is complete" in capsys.readouterr().out
    message = refused(capsys, "--seeds", 3, "--k", 4)
    assert "seeds (5 there, 3 here)" in message and "k (classes there, 4 here)" in message and "--overwrite" in message
    encoder = (trained / "runs/pretrain/encoder.pt").read_bytes()
    state = load_checkpoint(trained / "runs/pretrain/encoder.pt")
    save_checkpoint(trained / "runs/pretrain/encoder.pt", state | {"step": 9})  # the same path, another training
    assert "content (" in refused(capsys)
    (trained / "runs/pretrain/encoder.pt").write_bytes(encoder)
    assert "holds no run of cluster_eval.py" in refused(capsys, "--out", trained / "runs/pretrain", "--overwrite")
    assert before == {p: p.read_bytes() for p in (trained / "runs/cluster").iterdir() if p.is_file()}


def test_wrong_input_gets_one_sentence(trained, data, folder, tmp_path, monkeypatch, capsys):
    encoder, out = trained / "runs/pretrain/encoder.pt", tmp_path / "runs/out"
    base = ["--init", encoder, "--out", out]
    for flags, complaint in [
            (["--k", 50], "keeps 30 images of test, fewer than --k 50 clusters"),
            (["--classes", "binary:red"], "no label 'red', only bright, dark, striped"),
            (["--data", tmp_path / "nowhere"], "nowhere is not a data folder"), (["--split", "val"], "the val split"),
            (["--arch", "resnet34"], "holds a resnet18, not a resnet34"),
            (["--k", 1], "--k 1"), (["--k", "many"], "--k many"), (["--classes", "all"], "--classes all"),
            (["--seeds", 0], "--seeds 0"), (["--image-size", -1], "--image-size -1"), (["--seed", 3], "--seed 3"),
            (["--export", "features.csv"], "must end in .npz"), (["--init", "random", "random"], "names a row twice")]:
        assert complaint in refused(capsys, *base, *flags)
    assert "none.pt does not exist" in refused(capsys, "--init", tmp_path / "none.pt")
    assert "--data is needed" in refused(capsys, "--init", "random", "--out", out)
    monkeypatch.chdir(tmp_path)
    assert "pretrain.py --demo" in refused(capsys)

    lines = (trained / "data/manifest.csv").read_text().splitlines()
    def manifest(change):
        (tmp_path / "data").mkdir(exist_ok=True)
        if not (tmp_path / "data/images").exists():
            (tmp_path / "data/images").symlink_to(trained / "data/images")
        (tmp_path / "data/manifest.csv").write_text("\n".join(change(line.split(",")) for line in lines) + "\n")
        return refused(capsys, *base, "--data", tmp_path / "data")

    assert "no label column" in manifest(lambda row: ",".join(row[:3]))
    assert "one class only, bright" in manifest(lambda row: ",".join(row[:4]))
    assert "keeps none of the 30 images" in manifest(lambda row: ",".join([*row[:3], row[3].replace("1", "0")]))
    assert "one patient only" in manifest(lambda row: ",".join([row[0], "patient" if row[1] == "patient" else row[2],
                                                               *row[2:]]))
    state = load_checkpoint(encoder)
    state["encoder"]["layer4.1.bn2.weight"][3] = math.nan                       # as a training gone wrong leaves it
    save_checkpoint(tmp_path / "bad.pt", state)
    message = refused(capsys, "--init", tmp_path / "bad.pt", "--out", out)
    assert "bad.pt: the features of 30 images are not finite" in message and "images/test_0_0.jpg" in message


def test_collapsed_encoder_is_told_not_a_crash(trained, tmp_path, capsys):
    """Every image at one point, as SimCLR without negatives ends: one cluster, chance, and nothing to draw apart."""
    state = load_checkpoint(trained / "runs/pretrain/encoder.pt")
    state["encoder"]["conv1.weight"].zero_()
    save_checkpoint(tmp_path / "collapsed.pt", state)
    cluster_eval.main(["--init", str(tmp_path / "collapsed.pt"), "--seeds", "2", "--bootstrap", "5", "--k", "sweep",
                       "--out", str(tmp_path / "runs/out")])
    output, found = capsys.readouterr().out, results(tmp_path / "runs/out")
    assert "collapsed: 1 of 3 clusters hold images" in output
    scores = next(iter(found["rows"].values()))["scores"]
    assert scores["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert scores["silhouette"]["mean"] is None and "| – |" in output
