"""Logistic regression against scikit-learn's, and features that are kept on disk."""
import platform

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from dali_pipeline import Preprocessing, eval_loader
from labels import to_probabilities
from manifest import read_manifest
from probe import cached_features, fit_logistic


def test_only_what_a_dead_process_of_this_machine_left_is_deleted(data, tmp_path, monkeypatch):
    """And not what a machine is writing whose name goes on where this one's ends."""
    monkeypatch.setattr(platform, "node", lambda: "node")
    manifest = read_manifest(data)
    loader = eval_loader(manifest, manifest.images("val"), 8, Preprocessing(32), "cpu")
    other, dead = tmp_path / "node-2-999999999.part.tmp", tmp_path / "node-999999999.part.tmp"
    other.touch()
    dead.touch()
    cached_features(nn.Flatten(), 32 ** 2, loader, tmp_path)
    assert other.exists() and not dead.exists()


@pytest.mark.parametrize("n, width", [(60, 100), (400, 30)])
def test_probe_finds_scikit_learns_optimum(n, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, width)) * np.logspace(0, -2, width)
    x = x / x.std(0) + 0.5
    z = x @ rng.standard_normal((width, 3))
    y = (z + 3 * rng.standard_normal((n, 3)) > [0, 3, 8]).astype(float)
    weights = rng.random((n, 3)) * (rng.random((n, 3)) < 0.8)
    strengths = [0.001, 0.1, 10.0]
    found, free = fit_logistic(*map(torch.tensor, (x, y[:, :, None], weights, strengths)), 1e-12)
    for r, g in np.ndindex(3, 3):
        peer = LogisticRegression(C=1 / (weights[:, g].sum() * strengths[r]), tol=1e-9,
                                  max_iter=10_000).fit(x, y[:, g], weights[:, g])
        np.testing.assert_allclose(found[:, r, g, 0], peer.coef_[0],
                                   atol=2e-3 * np.abs(peer.coef_).max())
        assert free[r, g, 0].item() == pytest.approx(peer.intercept_[0], abs=5e-3)

    classes = z.argmax(1)
    one_hot = np.eye(3)[classes][:, None]
    found, free = fit_logistic(*map(torch.tensor, (x, one_hot, np.ones((n, 1)), [0.01])), 1e-12)
    peer = LogisticRegression(C=1 / (n * 0.01), tol=1e-9, max_iter=10_000).fit(x, classes)
    logits = torch.tensor(x) @ found[:, 0, 0] + free[0, 0]
    np.testing.assert_allclose(to_probabilities(logits, "exclusive"), peer.predict_proba(x),
                               atol=1e-4)
