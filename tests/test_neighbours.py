"""Nearest neighbours' votes against a direct computation."""
import numpy as np
import pytest
from sklearn import metrics

from cluster_eval import SCORES, evaluate
from probe import knn_class_shares


def test_votes_of_the_nearest_images_of_other_patients():
    rng = np.random.default_rng(0)
    truth, patients = np.r_[0, 1, 2, rng.integers(3, size=197)], rng.integers(70, size=200)
    cosine = metrics.pairwise.cosine_similarity(rng.normal(size=(200, 5)))
    votes = knn_class_shares(cosine, truth, patients, 7)
    for q in range(200):
        others = np.flatnonzero(patients != patients[q])
        near = others[np.argsort(-cosine[q, others])[:7]]
        expected = np.bincount(truth[near], np.exp(cosine[q, near] / 0.07), 3)
        expected *= np.bincount(truth) / np.bincount(truth[others])
        assert votes[q] == pytest.approx(expected / expected.sum())
    # Features that say nothing are at chance, though among the others an image's own class is the
    # rarest.
    votes = knn_class_shares(np.ones((30, 30)), np.arange(30) % 3, np.arange(30) % 15, 29)
    assert np.allclose(votes, 1 / 3)
    # One patient has no others who could vote.
    assert np.isnan(knn_class_shares(np.ones((4, 4)), np.arange(4) % 2, np.zeros(4, int))).all()


def test_a_sample_of_one_patient_has_no_neighbours_score(recwarn):
    """All others have one, and nothing is a warning: of the 40 images 30 are one patient's."""
    rng, patients = np.random.default_rng(1), np.r_[np.zeros(30, int), np.arange(1, 11)]
    features = rng.normal(size=(40, 3)).astype(np.float32)
    scores, _ = evaluate(features, np.arange(40) % 2, patients, 2, 1, 10, np.arange(30))
    absent = {name for name in SCORES if np.isnan(scores[name]["mean"])}
    assert absent == {"kNN_accuracy", "kNN_AUROC"} and not recwarn.list
