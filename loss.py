"""NT-Xent, the SimCLR loss, with negatives from every process; and what to watch beside it.

The anchors of a process are the 2B projections of its own B images, two views of each;
their keys are the K = 2WB projections of all W processes. Each process returns its share of
the mean over all anchors, times W, because DistributedDataParallel averages gradients over
the processes.
"""
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Stands for the similarity to a key that is no negative. Its exponential is 0, as that of -inf.
# But where a row has nothing else, ABSENT - ABSENT is 0, and -inf - -inf would be NaN.
ABSENT = -1e30


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, patients: Tensor | None = None,
            weights: Tensor | None = None, decoupled: bool = False, hardness: float = 0.0,
            prior: float = 0.0) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1) or
    a variant.

    z1, z2: (B, D) projections of the two views, of any norm, the same B on every
    process. An anchor i has one positive p, the other view of its image, and n negatives
    k, all other keys. With l the cosine similarity over the temperature, its loss is

        -l_ip + ln(exp(l_ip) + R),        R = sum over the negatives k of exp(l_ik)

    Returns a scalar, float32, computed outside autocast; its average over the processes
    is the mean over all 2WB anchors. What the options change:

    patients: (B,) integers, equal for images of the same patient. The negatives are the
        keys of other patients alone, so that an image that stands in the batch twice is
        none, either. An anchor without any negative has the loss 0.
    weights: (B,), not negative and not all 0, of the images in the mean.
    hardness: R = n * sum of exp((1 + hardness) l_ik) / sum of exp(hardness l_ik) (Robinson et
        al. 2021, beta; the weights exp(hardness l_ik) carry gradient, as in the authors' code).
    prior: from 0 to below 1, the expected share of negatives that are of the anchor's own kind
        (Chuang et al. 2020, tau+). R becomes
        max((R - prior * n exp(l_ip)) / (1 - prior), n exp(-1 / temperature)).
    decoupled: the loss is -l_ip + ln R (Yeh et al. 2022, L_DC).

    `diagnostics` gives `chance`, the loss of an encoder that maps all images to one point."""
    with torch.autocast(z1.device.type, enabled=False):
        batch = _batch(z1, z2, patients, weights)
        # l_ip, (B,): the same for both anchors of an image.
        positive = (batch.anchors[0] * batch.anchors[1]).sum(1) / temperature
        # ln R, (2, B): what all negatives of an anchor weigh together.
        log_r = LogSumExp.apply(batch.anchors, batch, (1 + hardness) / temperature)
        has_none = log_r < ABSENT / 2  # (2, B); false for NaN, which must stay NaN
        if hardness or prior:
            log_n = _count_negatives(batch).clamp_min(1).log()  # (B,)
            if hardness:
                log_r = log_n + log_r - LogSumExp.apply(
                    batch.anchors, batch, hardness / temperature)
            if prior:
                log_r = _debias(log_r, positive, log_n, temperature, prior)
        excess = log_r - positive  # (2, B)
        # -l_ip + ln(exp(l_ip) + R) = ln(1 + exp(ln R - l_ip)), which is softplus.
        loss = excess if decoupled else F.softplus(excess)
        # An anchor without a negative has nothing to be told from.
        loss = torch.where(has_none, 0.0, loss)
        return (batch.weights * loss).sum()


def _debias(log_r: Tensor, positive: Tensor, log_n: Tensor, temperature: float,
            prior: float) -> Tensor:
    """ln of max((R - prior * n exp(l_ip)) / (1 - prior), n exp(-1 / temperature)), (2, B)."""
    floor = log_n - 1 / temperature
    share = prior * (log_n + positive - log_r).clamp_max(60).exp()  # of R, taken off
    log_left = log_r + (1 - share).clamp_min(1e-30).log() - math.log(1 - prior)
    # From a share of 1 on nothing is left, and log_left says nothing. The clamps keep it finite,
    # or its gradient of 0 would be NaN.
    return torch.where(share < 1, log_left, floor).maximum(floor)


# --------------------------------------------------------------------------------------------------
# Who is compared with whom.

class Batch(NamedTuple):
    """The global batch as one of W processes sees it."""
    anchors: Tensor       # (2, B, D) projections of this process, of length 1
    keys: Tensor          # (K, D) projections of all processes, of length 1
    patients: Tensor      # (B,) of this process's images; without patients, each its own
    key_patients: Tensor  # (K,)
    weights: Tensor       # (B,) of each of an image's two anchors in this process's sum


def _batch(z1: Tensor, z2: Tensor, patients: Tensor | None, weights: Tensor | None) -> Batch:
    n_images, world_size, rank = len(z1), 1, 0
    if dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    anchors = F.normalize(torch.stack([z1, z2]).float(), dim=2)
    keys = _all_gather(anchors.detach()).flatten(0, 2)  # (W, 2, B, D) -> (K, D)
    if patients is None:
        patients = torch.arange(rank * n_images, (rank + 1) * n_images, device=z1.device)
    key_patients = _all_gather(patients)  # (W, B) -> (W, 2, B) -> (K,), in the keys' order
    key_patients = key_patients[:, None].expand(-1, 2, -1).flatten()
    if weights is None:
        weights = anchors.new_full((n_images,), 1 / (2 * n_images))
    else:
        # They add up to 1 over all processes, times W, as DistributedDataParallel divides by it.
        weights = weights.float() * (world_size / (2 * _all_gather(weights.float()).sum()))
    return Batch(anchors, keys, patients, key_patients, weights)


def _all_gather(rows: Tensor) -> Tensor:
    """A tensor of each process -> those of all W, in a new first dimension."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows[None]
    gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
    # The items of the list are views of `gathered`, which is filled by filling them.
    dist.all_gather(list(gathered), rows.contiguous())
    return gathered


def _blocks(batch: Batch) -> list[slice]:
    """Parts of a process's images whose similarities fit into cache, or a little of a GPU."""
    elements = 2**25 if batch.keys.is_cuda else 2**20
    images = len(batch.patients)
    size = max(1, elements // (2 * len(batch.keys)))
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def _count_negatives(batch: Batch) -> Tensor:
    """How many keys are negatives of each of an image's two anchors, (B,)."""
    return torch.cat([(batch.patients[block, None] != batch.key_patients).sum(1)
                      for block in _blocks(batch)])


def _similarities(batch: Batch, block: slice, scale: float) -> Tensor:
    """Cosines of a block's 2n anchors with all K keys, times scale, (2, n, K). ABSENT where the key
    is no negative: for the anchor itself, its positive, and all else that is of its patient."""
    similarities = (batch.anchors[:, block] * scale) @ batch.keys.T
    same_patient = batch.patients[block, None] == batch.key_patients  # (n, K)
    return similarities.masked_fill_(same_patient, ABSENT)


# --------------------------------------------------------------------------------------------------
# The sum over the negatives.

class LogSumExp(torch.autograd.Function):
    """ln of the sum over the negatives of exp(scale * cosine), for each anchor: (2, B). By blocks
    of similarities, so that all of them, (2B, 2WB), are never in memory.

    s_ik = scale * cosine of anchor i and key k where k is a negative of i, else ABSENT;
    r_i = ln of the sum over k of exp(s_ik), the result; and g_i = d loss / d r_i. The keys
    are detached, so that autograd would see an anchor in its own sum alone. `backward` adds
    what it does as a key in the sums of the other anchors, those of all processes:

        scale * sum over k of (g_i exp(s_ik - r_i) + g_k exp(s_ki - r_k)) key_k

    To be a negative is mutual, and s_ki = s_ik: this process has the similarities of both
    terms, and needs of the others nothing but r_k and g_k."""

    @staticmethod
    def forward(ctx, anchors: Tensor, batch: Batch, scale: float) -> Tensor:
        # The similarities of the last block are kept for the backward pass, which computes those
        # of the others, if there are any, once more.
        parts = []
        for block in _blocks(batch):
            ctx.kept = None  # free them before the next are made
            ctx.kept = _similarities(batch, block, scale)  # (2, n, K)
            parts.append(ctx.kept.logsumexp(2))
        r = torch.cat(parts, 1)  # (2, B)
        ctx.save_for_backward(r)
        ctx.batch, ctx.scale = batch, scale
        return r

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, (own_r,) = ctx.batch, ctx.saved_tensors  # (2, B)
        own_g = ctx.scale * gradient  # (2, B)
        # Those of all processes by one collective call.
        of_all = _all_gather(torch.stack([own_r, own_g]))  # (W, r or g, view, B)
        all_r, all_g = of_all.transpose(0, 1).flatten(1)  # (K,) each, in the keys' order
        for_anchors = torch.empty_like(batch.anchors)  # (2, B, D)
        for block in reversed(_blocks(batch)):  # the kept one first
            if ctx.kept is None:
                ctx.kept = _similarities(batch, block, ctx.scale)
            s, ctx.kept = ctx.kept, None  # (2, n, K)
            factor = (s - own_r[:, block, None]).exp_().mul_(own_g[:, block, None])
            factor.addcmul_(s.sub_(all_r).exp_(), all_g)  # s is used up
            for_anchors[:, block] = factor @ batch.keys
        return for_anchors, None, None


# --------------------------------------------------------------------------------------------------
# What to watch beside the loss.

@torch.no_grad()
def diagnostics(z1: Tensor, z2: Tensor, patients: Tensor | None = None,
                weights: Tensor | None = None, decoupled: bool = False) -> dict[str, Tensor]:
    """What the loss hides, as scalars, to be averaged over the processes. Arguments
    as in `nt_xent`.

    top1: how often an anchor's positive is nearer than all its negatives on all
    processes, by more than the rounding of float32: where all projections are the
    same, or there is no negative, that is never.
    alignment: mean squared distance of positives on the unit sphere, 0 at best.
    uniformity: log of the mean Gaussian potential of this process's pairs, about -4
    at best, 0 where all projections are the same (both Wang and Isola 2020); NaN for
    one image a process.
    chance: the loss of this batch where all projections are the same."""
    with torch.autocast(z1.device.type, enabled=False):
        batch = _batch(z1, z2, patients, weights)
        z1, z2 = batch.anchors
        positive = (z1 * z2).sum(1)  # (B,)
        nearest = torch.cat([_similarities(batch, block, 1).amax(2)  # (2, B)
                             for block in _blocks(batch)], 1)
        n_negatives = _count_negatives(batch)  # (B,)
        hits = (positive > nearest + 1e-6) & (n_negatives > 0)  # (2, B)
        potentials = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]
        # Where all similarities are the same, an anchor's loss is the logarithm of the number of
        # terms in its sum: its negatives, and its positive unless that is left out.
        terms = n_negatives if decoupled else n_negatives + 1  # (B,)
        return {
            "top1": hits.float().mean(),
            "alignment": (z1 - z2).square().sum(1).mean(),
            "uniformity": (potentials[0] + potentials[1]) / 2,
            "chance": 2 * (batch.weights * terms.clamp_min(1).log()).sum()}
