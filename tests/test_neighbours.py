"""Nearest neighbours' votes against a direct computation."""
import numpy as np
import pytest
from sklearn import metrics

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
