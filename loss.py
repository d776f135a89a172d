"""NT-Xent, the SimCLR loss, with negatives from every process; and what to watch beside it.

The anchors of a process are the 2N projections of its own N images, two views of each;
their keys are the K = 2WN projections of all W processes. DistributedDataParallel averages
gradients over the processes, and so the loss of a process is made such that its average
over them is the mean over all anchors.
"""
import contextlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# The similarity to a key that is no negative: as -inf is, nothing in a sum of exponentials, but
# it can be multiplied and subtracted where a row has nothing else.
ABSENT = -1e30


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, patients: Tensor | None = None,
            weights: Tensor | None = None, decoupled: bool = False, hardness: float = 0.0,
            prior: float = 0.0) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1) or
    a variant.

    z1, z2: (N, D) projections of the two views, of any norm, the same N on every
    process. Returns a scalar, float32, computed outside autocast, of which the
    average over the processes is the mean over all 2WN anchors i of

        -l_ip + ln(exp(l_ip) + R),        R = sum over the negatives k of exp(l_ik)

    with l the cosine similarity over the temperature and p the positive, the anchor
    image's other view. All keys but the anchor itself and its positive are negatives, unless:

    patients: (N,) integers, equal for images of the same patient. Then an anchor's
        negatives are the n keys of other patients. This covers an image that stands
        in the batch twice. An anchor without any negative has the loss 0.
    weights: (N,), not negative, of the images in the mean, which is divided by
        their sum over all processes; some weight must be above 0.
    decoupled: the loss is -l_ip + ln R (L_DC of Yeh et al. 2022).
    hardness: beta of Robinson et al. 2021. R is n times the mean of exp(l_ik) in
        which each negative's weight is proportional to exp(beta l_ik). As in the
        authors' published code these weights carry gradient.
    prior: tau+ of Chuang et al. 2020, from 0 to below 1, the expected share of
        negatives that are of the anchor's own kind. They are taken from R, which
        becomes (R - tau+ n exp(l_ip)) / (1 - tau+), at least n exp(-1 / temperature).

    What an encoder scores that tells nothing apart stands in `diagnostics`, as `chance`."""
    with _without_autocast(z1.device.type):
        batch = _batch(z1, z2, patients, weights)
        positive = (batch.anchors[0] * batch.anchors[1]).sum(1) / temperature  # (N,) l_ip
        log_n = batch.n_negatives.clamp_min(1).log()  # (N,)
        # What all negatives of an anchor weigh together: ln R, (2, N).
        if hardness:
            log_r = (log_n + log_sum_exp(batch, (1 + hardness) / temperature)
                     - log_sum_exp(batch, hardness / temperature))
        else:
            log_r = log_sum_exp(batch, 1 / temperature)
        if prior:
            log_r = _debiased(log_r, positive, log_n, temperature, prior)
        excess = log_r - positive  # (2, N)
        # -l_ip + ln(exp(l_ip) + R) = ln(1 + exp(ln R - l_ip)), which is softplus.
        loss = excess if decoupled else F.softplus(excess)
        return (batch.shares * loss).sum()


def _debiased(log_r: Tensor, positive: Tensor, log_n: Tensor, temperature: float,
              prior: float) -> Tensor:
    """ln of max((R - tau+ n exp(l_ip)) / (1 - tau+), n exp(-1 / temperature)), (2, N)."""
    floor = log_n - 1 / temperature
    # What is left of R, as a share of it. The clamps keep what is out of range from overflowing;
    # there the floor is taken.
    share = 1 - prior * (log_n + positive - log_r).clamp_max(60).exp()
    left = log_r + share.clamp_min(1e-30).log() - math.log(1 - prior)
    return torch.where(share > 0, left, floor).maximum(floor)


# --------------------------------------------------------------------------------------------------
# Who is compared with whom.

class Batch(NamedTuple):
    """The global batch as one of W processes sees it."""
    anchors: Tensor       # (2, N, D) projections of this process, of length 1
    keys: Tensor          # (K, D) projections of all processes, of length 1
    patients: Tensor      # (N,) of this process's images; without patients, each its own
    key_patients: Tensor  # (K,)
    n_negatives: Tensor   # (N,) of each of an image's two anchors
    shares: Tensor        # (N,) of each of its two anchors in the mean; 0 without a negative


def _batch(z1: Tensor, z2: Tensor, patients: Tensor | None, weights: Tensor | None) -> Batch:
    images, world_size, rank = len(z1), 1, 0
    if dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    anchors = F.normalize(torch.stack([z1, z2]).float(), dim=2)
    keys = _all_gather(anchors.detach()).flatten(0, 2)  # by process, view, image
    if patients is None:
        patients = torch.arange(rank * images, (rank + 1) * images, device=z1.device)
    all_patients = _all_gather(patients)  # (W, N)
    key_patients = all_patients[:, None].expand(-1, 2, -1).flatten()
    # In a sorted list the images of a patient stand together. (torch.unique would have the host
    # wait for the GPU.)
    in_order = all_patients.flatten().sort().values
    images_of_patient = (torch.searchsorted(in_order, patients, right=True)
                         - torch.searchsorted(in_order, patients))  # (N,)
    n_negatives = 2 * (world_size * images - images_of_patient)
    # The shares of all anchors of all processes add up to W, because DistributedDataParallel
    # divides by it.
    shares = anchors.new_full((images,), 1 / (2 * images))
    if weights is not None:
        shares = weights.float() * (world_size / (2 * _all_gather(weights.float()).sum()))
    shares = shares * (n_negatives > 0)
    return Batch(anchors, keys, patients, key_patients, n_negatives, shares)


def _all_gather(rows: Tensor) -> Tensor:
    """A tensor of each process -> those of all W, in a new first dimension."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows[None]
    gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
    dist.all_gather(list(gathered), rows.contiguous())
    return gathered


def _blocks(batch: Batch) -> list[slice]:
    """Parts of a process's images whose similarities fit into cache, or a little of a GPU."""
    elements = 2**25 if batch.keys.is_cuda else 2**20
    images = len(batch.patients)
    size = max(1, elements // (2 * len(batch.keys)))
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def _similarities(batch: Batch, block: slice, scale: float) -> Tensor:
    """Cosines of a block's 2n anchors with all K keys, times scale, (2, n, K); ABSENT where the
    key is no negative: the anchor, its positive, and what else is of its patient."""
    similarities = (batch.anchors[:, block] * scale) @ batch.keys.T
    same_patient = batch.patients[block, None] == batch.key_patients  # (n, K)
    return similarities.masked_fill_(same_patient, ABSENT)


# --------------------------------------------------------------------------------------------------
# The sum over the negatives.

def log_sum_exp(batch: Batch, scale: float) -> Tensor:
    """ln of the sum over the negatives of exp(scale * cosine), for each anchor: (2, N)."""
    return LogSumExp.apply(batch.anchors, batch, scale)  # pyright: ignore[reportReturnType]


class LogSumExp(torch.autograd.Function):
    """`log_sum_exp` by blocks of similarities, so that all of them, (2N, 2WN), are never in memory.

    With r_i the result for anchor i and g_i the gradient that arrives there, the gradient
    for anchor i is

        scale * sum over k of (g_i exp(s_ik - r_i) + g_k exp(s_ki - r_k)) key_k

    The first term is the softmax of its own negatives. The second is what it gets as a key
    of the other anchors, those of other processes too; without it the loss would still be
    right, and its gradient wrong. As s_ki = s_ik, this process can compute both from its
    own similarities: all it needs of another anchor is r_k and g_k."""

    @staticmethod
    def forward(ctx, anchors: Tensor, batch: Batch, scale: float) -> Tensor:
        log_sums, similarities = [], None
        for block in _blocks(batch):
            similarities = _similarities(batch, block, scale)  # (2, n, K)
            log_sums.append(similarities.logsumexp(2))
        log_sum = torch.cat(log_sums, 1)  # (2, N)
        ctx.save_for_backward(log_sum)
        ctx.batch, ctx.scale = batch, scale
        ctx.last_block = similarities  # the gradient begins there; a small batch has no other
        return log_sum

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, (log_sum,) = ctx.batch, ctx.saved_tensors
        gradient = ctx.scale * gradient  # (2, N)
        # One collective call for both.
        of_all = _all_gather(torch.stack([log_sum, gradient]))  # (W, 2, 2, N)
        log_sums, gradients = of_all.transpose(0, 1).flatten(1)  # (K,) each, in the keys' order
        for_anchors = torch.empty_like(batch.anchors)  # (2, N, D)
        for block in reversed(_blocks(batch)):
            similarities, ctx.last_block = ctx.last_block, None  # forward has left the last one's
            if similarities is None:
                similarities = _similarities(batch, block, ctx.scale)  # (2, n, K)
            as_anchor = similarities - log_sum[:, block, None]  # g_i exp(s_ik - r_i)
            as_anchor = as_anchor.exp_().mul_(gradient[:, block, None])
            as_key = similarities.sub_(log_sums).exp_().mul_(gradients)  # g_k exp(s_ki - r_k)
            for_anchors[:, block] = as_anchor.add_(as_key) @ batch.keys
            del similarities, as_anchor, as_key  # before the next block takes as much
        return for_anchors, None, None


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context in which float32 stays float32.

    Autocast's own costs a small batch a twentieth of its time, even where there is
    nothing to switch off."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


# --------------------------------------------------------------------------------------------------
# What to watch beside the loss.

@torch.no_grad()
def diagnostics(z1: Tensor, z2: Tensor, patients: Tensor | None = None,
                weights: Tensor | None = None, decoupled: bool = False) -> dict[str, Tensor]:
    """What the loss hides, as scalars, to be averaged over the processes. Arguments
    as in `nt_xent`.

    top1: how often an anchor's positive is nearer than all its negatives on all
    processes, by more than the rounding of float32: where all projections are the
    same that is never.
    alignment: mean squared distance of positives on the unit sphere, 0 at best.
    uniformity: log of the mean Gaussian potential of this process's pairs, about -4
    at best, 0 where all projections are the same (both Wang and Isola 2020); NaN for
    one image a process.
    chance: the loss of this batch where all projections are the same."""
    with _without_autocast(z1.device.type):
        batch = _batch(z1, z2, patients, weights)
        z1, z2 = batch.anchors
        positive = (z1 * z2).sum(1)  # (N,)
        nearest = torch.cat([_similarities(batch, block, 1).amax(2)  # (2, N)
                             for block in _blocks(batch)], 1)
        potentials = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]
        # If all similarities are the same, it is the logarithm of how many terms the sum has.
        terms = (batch.n_negatives + (not decoupled)).clamp_min(1)  # (N,)
        return {
            "top1": (positive > nearest + 1e-6).float().mean(),
            "alignment": (z1 - z2).square().sum(1).mean(),
            "uniformity": (potentials[0] + potentials[1]) / 2,
            "chance": 2 * (batch.shares * terms.log()).sum()}
