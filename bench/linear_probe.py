"""The linear probe's speed: finetune.py's fit of everything at once, beside a plain scikit-learn loop.

    python bench/linear_probe.py                10,000 images' features (2,048 wide), 14 labels, 3 fractions, 5 draws

The features are noise like an encoder's: correlated and not negative. Both fit seven strengths of regularisation and
choose one on val; the loop takes label by label and strength by strength.
"""
import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune import STRENGTHS, auroc, draw, fit_logistic, val_score  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=10_000)
parser.add_argument("--width", type=int, default=2048)
parser.add_argument("--peer-labels", type=int, default=14, help="that the loop fits; its time is scaled up to 14")
args = parser.parse_args()

rng, n, labels = np.random.default_rng(0), args.images, 14
hidden = rng.standard_normal((n + 4000, 300)) * np.arange(1, 301) ** -0.5
x = np.maximum(0, hidden @ rng.standard_normal((300, args.width)) + 0.3 * rng.standard_normal((n + 4000, args.width)))
x = (x - x[:n].mean(0)) / x[:n].std(0)                                                          # (n + 4000, D)
signal = hidden @ rng.standard_normal((300, labels))
signal = signal / signal.std(0) + rng.standard_normal(signal.shape)
rates = np.logspace(-2, -0.5, labels)                                                           # 1 % to 32 % positive
y = (signal > [np.quantile(column, 1 - rate) for column, rate in zip(signal.T, rates)]).astype(float)
val, test = slice(n, n + 2000), slice(n + 2000, None)
patients = np.array([f"p{i // 3}" for i in range(n)])
samples = {draw(patients, y[:n], fraction, seed)[0].tobytes(): (fraction, seed)
           for fraction in (0.01, 0.1, 1.0) for seed in range(5)}                       # all of the labels is one draw
print(f"{n} x {args.width} features, {labels} labels, {len(STRENGTHS)} strengths, {len(samples)} different draws, "
      f"{torch.get_num_threads()} threads")



def areas(fitted, count):
    """Test AUROC of `count` labels at the strength that is best on val; coefficients (D, R, count)."""
    coefficients, intercepts = fitted
    best = np.argmax([val_score(x[val] @ coefficients[:, r] + intercepts[r], y[val, :count])
                      for r in range(len(STRENGTHS))])
    return [auroc(z, truth)[0] for z, truth in zip((x[test] @ coefficients[:, best]).T, y[test].T)]


def ours(sample, count):
    fitted = fit_logistic(torch.tensor(x[sample]), torch.tensor(y[sample, :count])[:, :, None],
                          torch.ones(len(sample), count).double(), torch.tensor(STRENGTHS))
    return [a[..., 0].numpy() for a in fitted]


def loop(sample, count):
    coefficients, intercepts = np.empty((args.width, len(STRENGTHS), count)), np.empty((len(STRENGTHS), count))
    for r, label in np.ndindex(len(STRENGTHS), count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                             # of fits that do not converge
            peer = LogisticRegression(C=1 / (len(sample) * STRENGTHS[r]), max_iter=1000)
            peer.fit(x[sample], y[sample, label])
        coefficients[:, r, label], intercepts[r, label] = peer.coef_[0], peer.intercept_[0]
    return coefficients, intercepts


for name, fit, count in (("finetune.py", ours, labels), ("scikit-learn loop", loop, args.peer_labels)):
    found, clock = {}, (time.perf_counter(), time.process_time())
    for rows, (fraction, _) in samples.items():
        sample = np.frombuffer(rows, np.int64)
        found.setdefault(fraction, []).append(areas(fit(sample, count), count))
    wall, cpu = ((now - then) * labels / count for now, then in zip((time.perf_counter(), time.process_time()), clock))
    share = args.peer_labels
    print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU{', extrapolated' if count < labels else ''}; mean test AUROC of "
          f"the first {share} labels:", *(f"{100 * fraction:g} % {np.mean(np.array(a)[:, :share]):.4f}"
                                      for fraction, a in found.items()), flush=True)
