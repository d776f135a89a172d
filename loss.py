"""NT-Xent, the SimCLR loss, with negatives from every process; and what to watch beside it.

Each process has B images, two views of each. Their 2B projections are its anchors. They are
compared with keys, the K = 2WB projections of all W processes, which negatives.py gathers.
Gathered keys carry no gradient. Instead, the backward pass of `log_sum_over_negatives` also
gives each anchor the gradient that it has as a key of the other anchors, on all processes. A new
term over the negatives must be built from it: built from the keys, it would lack that part.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from negatives import (
    ABSENT, Batch, count_negatives, gather_batch, log_sum_over_negatives, nearest_negative)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, patients: Tensor | None = None,
            weights: Tensor | None = None, decoupled: bool = False, hardness: float = 0.0,
            prior: float = 0.0) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1).

    z1, z2: (B, D) projections of the two views, of any norm; B is the same on every process.
    Anchor i has one positive p, the other view of its image. All other keys k are its
    negatives. With l = cosine similarity / temperature, the loss of the anchor is

        -l_ip + ln(exp(l_ip) + R),        R = sum over the negatives k of exp(l_ik)

    Returns a scalar in float32, computed outside autocast. Its average over the processes is
    the mean over all 2WB anchors, weighted if there are `weights`.

    patients: (B,) integers. Keys of the anchor's own patient are no negatives; this also
        covers an image that is in the batch twice, at the seam of two epochs. An anchor
        without any negative has loss 0.
    weights: (B,) of the images in the mean; none is negative, and not all are 0.

    Three published variants:
    decoupled: leaves exp(l_ip) out (Yeh et al. 2022, L_DC).
    hardness: lets similar negatives weigh more in R (Robinson et al. 2021, beta).
    prior: the share of negatives that are expected to be of the anchor's own kind, in [0, 1);
        that part is subtracted from R (Chuang et al. 2020, tau+)."""
    with torch.autocast(z1.device.type, enabled=False):
        batch = gather_batch(z1, z2, patients, weights)
        anchors1, anchors2 = batch.anchors.unbind()             # (B, D) each, of length 1
        positive = (anchors1 * anchors2).sum(1) / temperature   # (B,): l_ip of both anchors
        if hardness or prior:
            log_r = _log_reweighted_sum(batch, positive, temperature, hardness, prior)
        else:
            log_r = log_sum_over_negatives(batch, 1 / temperature)         # (2, B): ln R
        excess = log_r - positive                               # (2, B)
        # -l_ip + ln(exp(l_ip) + R) = ln(1 + exp(ln R - l_ip)), which is softplus.
        loss = excess if decoupled else F.softplus(excess)
        # Without negatives, ln R is ABSENT, -1e30, and the anchor has nothing to be told from.
        loss = torch.where(log_r < ABSENT / 2, 0.0, loss)
        # An anchor weighs 1 / 2B; or `weights`, scaled so that all processes' add up to W.
        return (batch.weights * loss).sum()


def _log_reweighted_sum(batch: Batch, positive: Tensor, temperature: float, hardness: float,
                        prior: float) -> Tensor:
    """ln R, (2, B), with hardness and prior; ABSENT where an anchor has no negatives."""
    n_negatives = count_negatives(batch)                        # (B,)
    log_n = n_negatives.clamp_min(1).log()
    log_r = log_sum_over_negatives(batch, (1 + hardness) / temperature)    # (2, B)
    if hardness:
        # R becomes n times a mean of exp(l_ik), weighted by exp(hardness l_ik). The gradient
        # flows through these weights, too, as in the authors' code.
        log_r = log_n + log_r - log_sum_over_negatives(batch, hardness / temperature)
    if prior:
        # R becomes (R - prior n exp(l_ip)) / (1 - prior) = R (1 - share) / (1 - prior), where
        # share = prior n exp(l_ip) / R, but at least the floor n exp(-1 / temperature).
        log_floor = log_n - 1 / temperature
        share = prior * (log_n + positive - log_r).clamp_max(60).exp()
        log_rest = log_r + (1 - share).clamp_min(1e-30).log() - math.log(1 - prior)
        # From a share of 1 on, nothing is left above the floor. torch.where multiplies the gradient
        # of the branch not taken by 0, and the two clamps keep it finite: 0 * inf would be NaN.
        log_r = torch.where(share < 1, log_rest, log_floor).maximum(log_floor)
    return torch.where(n_negatives > 0, log_r, ABSENT)


# --------------------------------------------------------------------------------------------------
# What to watch beside the loss.

@torch.no_grad()
def diagnostics(z1: Tensor, z2: Tensor, patients: Tensor | None = None,
                weights: Tensor | None = None, decoupled: bool = False) -> dict[str, Tensor]:
    """What the loss hides, as scalars, to be averaged over the processes. Arguments
    as in `nt_xent`.

    top1: how often an anchor's positive is nearer than all its negatives on all processes,
    whatever the weights. If all projections are the same it is 0: a tie is no hit.
    alignment: mean squared distance of positives on the unit sphere, 0 at best.
    uniformity: log of the mean Gaussian potential of this process's pairs; about -4 at best, 0
    where all projections are the same, NaN for one image a process. (Both by Wang and Isola
    2020.)
    chance: the loss of this batch if all projections were the same, for any hardness and
    prior."""
    with torch.autocast(z1.device.type, enabled=False):
        batch = gather_batch(z1, z2, patients, weights)
        anchors1, anchors2 = batch.anchors.unbind()             # (B, D) each, of length 1
        cosine = (anchors1 * anchors2).sum(1)                   # (B,) of the positives
        n_negatives = count_negatives(batch)                    # (B,)
        # Nearer by more than float32's rounding.
        is_nearest = cosine > nearest_negative(batch) + 1e-6  # (2, B)
        hits = is_nearest & (n_negatives > 0)
        potentials = [torch.pdist(anchors).square().mul(-2).exp().mean().log()
                      for anchors in (anchors1, anchors2)]
        # If all similarities are equal, an anchor's loss is the logarithm of the number of terms
        # in its sum: its negatives, and its positive unless that is left out.
        n_terms = n_negatives if decoupled else n_negatives + 1  # (B,)
        chance = batch.weights * n_terms.clamp_min(1).log()     # (B,), the same for both anchors
        return {
            "top1": hits.float().mean(),
            "alignment": (anchors1 - anchors2).square().sum(1).mean(),
            "uniformity": (potentials[0] + potentials[1]) / 2,
            "chance": 2 * chance.sum()}
