"""Linear classifiers on frozen features, for finetune.py: one process fits them while the others
wait. Cross-validation (--folds) compares encoders without a look at test, if val alone is too
small for that.
"""
import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from checkpoint import save_checkpoint
from classifier import Classifier
from common import DataError
from dali_pipeline import eval_loader
from labels import cell_weights, deal, draw, to_probabilities
from model import num_features
from probe import STRENGTHS, cached_features, fit_logistic
from study import Combination, Init, Outcome, Study


class Features(NamedTuple):
    """The inputs of a classifier's linear layer."""
    net: Classifier                     # frozen; its linear layer is not used
    x: Tensor                           # (N, D) on the CPU; zeros for images in none of the splits


def read_features(study: Study, init: Init) -> Features:
    """Features of all images in the study's splits; FloatingPointError if some are not finite."""
    compute = study.compute.without_others()
    torch.manual_seed(0)                # the same random encoder for every seed of the draw
    net = compute.prepare(study.classifier(init)).eval()

    # Each split's features are kept in a file of their own: cluster_eval.py can use that file too,
    # if every image of the split has a label.
    folder = study.out.parent / "features"
    compute.say(f"{init.name}: features of {len(study.images)} images, kept in {folder}")
    loaders = [eval_loader(study.manifest, split, study.config.batch_size,
                           study.preprocessing, **compute.loader_arguments())
               for split in study.splits.values()]
    features = torch.cat([                                                  # (n, D)
        cached_features(net.encoder, num_features(net.encoder), loader, folder,
                        compute.dtype) for loader in loaders])
    with torch.no_grad():
        features = net.projector(features.to(compute.device)).cpu()
    if not features.isfinite().all():
        raise FloatingPointError(f"{init.source}: some features are not finite; --precision "
                                 "fp32 may help")
    x = features.new_zeros(len(study.manifest.paths), features.shape[1])
    x[study.images] = features
    return Features(net, x)


class LinearProbe:
    """Logistic regressions on one initialisation's features."""

    def __init__(self, study: Study, features: Features):
        self.study, self.features = study, features
        self.outcomes: dict[tuple, Outcome] = {}
        # Standardise by the whole train split, because many features are constant in a small draw.
        train = features.x[study.splits["train"]]                           # (n, D)
        deviation, self.mean = torch.std_mean(train, 0)
        self.deviation = deviation.clamp(min=1e-6)                          # (D,)

    def _inputs(self, images: np.ndarray) -> Tensor:
        """The standardised features of some images, (n, D) float64."""
        x = self.features.x[images]
        return ((x - self.mean) / self.deviation).double()

    def fit(self, c: Combination) -> Outcome:
        """The regression on one draw, with the strength of regularisation that val chooses."""
        # At 100 % every seed draws the same images, so fit once.
        key = c.fraction, c.seed if c.fraction < 1 else None
        if key not in self.outcomes:
            self.outcomes[key] = self._fit(self.study.sample(c))
        return self.outcomes[key]

    def _fit(self, sample: np.ndarray) -> Outcome:
        study, task = self.study, self.study.task
        targets, mask = task.targets[sample], task.mask[sample]

        # All labels and all strengths at once, in double precision.
        weights = cell_weights(targets, mask, study.config.balance)
        double = functools.partial(torch.as_tensor, dtype=torch.float64,
                                   device=study.compute.device)
        weight, bias = fit_logistic(double(self._inputs(sample)), double(targets),
                                    double(weights), double(STRENGTHS))
        weight = weight.flatten(-2).cpu()                                   # (D, R, G * K)
        bias = bias.flatten(-2).cpu()                                       # (R, G * K)

        # The strength that is best on val; the strongest of equally good ones.
        val = self._predict("val", weight, bias)
        _, best = max((study.val_score(p), r) for r, p in enumerate(val))
        test = self._predict("test", weight, bias)

        # The regression saw standardised features. The classifier's head sees raw features, so its
        # weights include the standardisation.
        frozen = self.features.net
        net = Classifier(frozen.encoder, task.outputs, frozen.projector)
        head_weight = weight[:, best].T / self.deviation                    # (G * K, D)
        head_bias = bias[best] - head_weight @ self.mean.double()           # (G * K,)
        net.head.load_state_dict(
            {"weight": head_weight.float(), "bias": head_bias.float()})
        return Outcome(net, val[best], test[best], strength=float(STRENGTHS[best]))

    def _predict(self, split: str, weight: Tensor, bias: Tensor) -> list[np.ndarray]:
        """Probabilities (n, L) of a split's images for each of R strengths."""
        x = self._inputs(self.study.splits[split])                          # (n, D)
        return [to_probabilities(x @ weight[:, r] + bias[r], self.study.task.kind)
                for r in range(len(STRENGTHS))]


# --------------------------------------------------------------------------------------------------
# Cross-validation: the same with other splits, which are made of train and val.

def study_of_fold(study: Study, images: np.ndarray, fold: np.ndarray, k: int,
                  c: Combination) -> Study:
    """The study with the splits of fold k: test is fold k of the images (n,), val is fold k + 1,
    and c's draw comes from the other folds. DataError if a label is never present or absent in
    these."""
    test, val = fold == k, fold == (k + 1) % (fold.max() + 1)               # (n,) bool
    train = images[~(test | val)]                                           # (m,)
    labels = study.task.training_labels[train]                              # (m, L)
    for name, column in zip(study.label_names, labels.T):
        if not np.isin(column, (0, 1)).any():
            raise DataError(f"--folds: what fold {k} is predicted from says nothing of {name}; "
                            "leave it out with --labels")
    patients = study.manifest.patients[train]
    sample = draw(patients, labels, c.fraction, c.seed)
    return dataclasses.replace(
        study, splits={"train": train, "val": images[val], "test": images[test]},
        draws={(c.fraction, c.seed): sample})


def cross_validate(study: Study, combinations: list[Combination]) -> None:
    """Predict every image of train and val by a regression for which neither the weights nor the
    regularisation were chosen on its fold. No classifier is kept."""
    folds, images = study.config.folds or 0, study.images                   # (n,)
    patients = study.manifest.patients[images]
    for init in study.inits.values():
        missing = [c for c in combinations
                   if c.init == init.key and c not in study.predictions]
        if not missing:
            continue
        features = read_features(study, init)
        for c in missing:
            fold = deal(patients, folds, c.seed)                            # (n,)
            p = np.empty((len(images), len(study.label_names)))             # (n, L)
            for k in range(folds):
                part = study_of_fold(study, images, fold, k, c)
                p[fold == k] = LinearProbe(part, features).fit(c).test
            study.predictions[tuple(c)] = {
                "predictions": torch.from_numpy(p), "fold": torch.from_numpy(fold)}
            save_checkpoint(study.out / "predictions.pt", study.predictions)
            study.compute.say(f"{study.name(c)}: {folds} folds")
