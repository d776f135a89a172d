"""NT-Xent, the SimCLR loss, with negatives from every process; and what to watch beside it.

The anchors of a process are the 2B projections of its own B images, two views of each;
their keys are the K = 2WB projections of all W processes, which negatives.py gathers. Keys
carry no gradient. `log_sum_exp` makes up for it: it adds the gradient that an anchor gets as a
key of other anchors, on all processes. A new term over negatives must be made of it, too.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from negatives import ABSENT, count_negatives, gather_batch, log_sum_exp, nearest_negative


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, patients: Tensor | None = None,
            weights: Tensor | None = None, decoupled: bool = False, hardness: float = 0.0,
            prior: float = 0.0) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1).

    z1, z2: (B, D) projections of the two views, of any norm, the same B on every
    process. An anchor i has one positive p, the other view of its image, and n negatives
    k, all other keys. With l the cosine similarity over the temperature, its loss is

        -l_ip + ln(exp(l_ip) + R),        R = sum over the negatives k of exp(l_ik)

    Returns a scalar, float32, computed outside autocast; its average over the processes
    is the mean over all 2WB anchors.

    The options are variants:
    patients: (B,) integers. Keys of the anchor's own patient are no negatives, nor are
        other showings of its image, which may stand in a batch twice. An anchor without
        any negative has the loss 0.
    weights: (B,), not negative and not all 0, of the images in the mean.
    decoupled: exp(l_ip) is left out (Yeh et al. 2022, L_DC).
    hardness: similar negatives weigh more in R (Robinson et al. 2021, beta).
    prior: from 0 to below 1, the expected share of negatives that are of the anchor's own
        kind, and are taken off R (Chuang et al. 2020, tau+).

    `diagnostics` gives `chance`, the loss of an encoder that maps all images to one point."""
    with torch.autocast(z1.device.type, enabled=False):
        batch = gather_batch(z1, z2, patients, weights)
        # l_ip, (B,): the same for both anchors of an image.
        anchors1, anchors2 = batch.anchors.unbind()
        positive = (anchors1 * anchors2).sum(1) / temperature
        # ln R, (2, B), from which and l_ip the loss follows: what all negatives of an anchor weigh
        # together. With hardness it is the first of two sums.
        log_r = log_sum_exp(batch, (1 + hardness) / temperature)
        # The sum of nothing is about ABSENT. A NaN is not below, and so stays in the loss.
        has_none = log_r < ABSENT / 2  # (2, B)
        if hardness or prior:
            log_n = count_negatives(batch).clamp_min(1).log()  # (B,); of none, it is not used
            if hardness:
                # R = n * sum of exp((1 + hardness) l_ik) / sum of exp(hardness l_ik). The weights
                # exp(hardness l_ik) carry gradient, as in the authors' code.
                log_r = log_n + log_r - log_sum_exp(batch, hardness / temperature)
            if prior:
                log_r = _debias(log_r, positive, log_n, temperature, prior)
        excess = log_r - positive  # (2, B)
        # -l_ip + ln(exp(l_ip) + R) = ln(1 + exp(ln R - l_ip)), which is softplus.
        loss = excess if decoupled else F.softplus(excess)
        # An anchor without a negative has nothing to be told from.
        loss = torch.where(has_none, 0.0, loss)
        # The mean: each of an image's two anchors weighs 1 / 2B, unless there are weights.
        return (batch.weights * loss).sum()


def _debias(log_r: Tensor, positive: Tensor, log_n: Tensor, temperature: float,
            prior: float) -> Tensor:
    """ln of max((R - prior * n exp(l_ip)) / (1 - prior), n exp(-1 / temperature)), (2, B)."""
    floor = log_n - 1 / temperature
    # With share = prior * n exp(l_ip) / R, the first is R (1 - share) / (1 - prior). From a share
    # of 1 on nothing is left, and the floor holds. The clamps keep the branch that is not chosen
    # finite: its gradient is multiplied by 0, and 0 times infinity is NaN.
    share = prior * (log_n + positive - log_r).clamp_max(60).exp()
    log_left = log_r + (1 - share).clamp_min(1e-30).log() - math.log(1 - prior)
    return torch.where(share < 1, log_left, floor).maximum(floor)


# --------------------------------------------------------------------------------------------------
# What to watch beside the loss.

@torch.no_grad()
def diagnostics(z1: Tensor, z2: Tensor, patients: Tensor | None = None,
                weights: Tensor | None = None, decoupled: bool = False) -> dict[str, Tensor]:
    """What the loss hides, as scalars, to be averaged over the processes. Arguments
    as in `nt_xent`.

    top1: how often an anchor's positive is nearer than all its negatives on all
    processes. A tie is no hit, so that it is 0 where all projections are the same.
    alignment: mean squared distance of positives on the unit sphere, 0 at best.
    uniformity: log of the mean Gaussian potential of this process's pairs, about -4
    at best, 0 where all projections are the same (both Wang and Isola 2020); NaN for
    one image a process.
    chance: the loss of this batch where all projections are the same, whatever hardness
    and prior are."""
    with torch.autocast(z1.device.type, enabled=False):
        batch = gather_batch(z1, z2, patients, weights)
        z1, z2 = batch.anchors
        positive = (z1 * z2).sum(1)  # (B,)
        n_negatives = count_negatives(batch)  # (B,)
        # Nearer by more than the rounding of float32.
        is_nearest = positive > nearest_negative(batch) + 1e-6  # (2, B)
        hits = is_nearest & (n_negatives > 0)
        potentials = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]
        # Where all similarities are the same, an anchor's loss is the logarithm of the number of
        # terms in its sum: its negatives, and its positive unless that is left out.
        terms = n_negatives if decoupled else n_negatives + 1  # (B,), for both anchors of an image
        return {
            "top1": hits.float().mean(),
            "alignment": (z1 - z2).square().sum(1).mean(),
            "uniformity": (potentials[0] + potentials[1]) / 2,
            "chance": 2 * (batch.weights * terms.clamp_min(1).log()).sum()}
