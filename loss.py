"""NT-Xent, the SimCLR loss, with negatives from every process; its variants in one
form; and what to watch beside it.

Each process has two views of each of its N images, and its anchors are the 2N
projections of these. The keys that an anchor is compared with are the 2WN of all W
processes. DistributedDataParallel averages gradients over the processes, and so the
loss of a process is made such that the average over the processes is the mean over
all anchors.

The loss of anchor i is ln(exp(l_ip) + sum_k exp(l_ik)) - l_ip, with l the cosine
similarity over the temperature, p the positive, which is the other view of the image,
and k the negatives. Its gradient is written out below, because one pass over a block of
similarities can then give loss and gradient, and forget them: with autograd all of
them, (2N, 2WN), would have to stay in memory. tests/test_loss.py has the reference that
autograd differentiates.
"""
import contextlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# The similarity to a key that is no negative. Its exponential is 0 as that of -inf is, but it
# may be multiplied and subtracted, even in a row that has nothing else.
ABSENT = -1e30


# --------------------------------------------------------------------------------------------------
# Who is compared with whom.

class Batch(NamedTuple):
    """The global batch as one of W processes sees it."""
    anchors: Tensor           # (2, N, D) projections of this process, of length 1
    lengths: Tensor           # (2, N, 1) that they had
    keys: Tensor              # (W, 2, N, D) projections of all processes, of length 1
    rank: int                 # of this process among the W
    patients: Tensor | None   # (W, N) of all processes' images
    count: Tensor             # (N, 1) of the negatives of an image's anchors, 1 where none
    weights: Tensor           # (N, 1) of its anchors' losses in the sum, 0 where no negatives


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(rows: Tensor) -> Tensor:
    """A tensor of each process -> those of all W, in a new first dimension."""
    if _world_size() == 1:
        return rows[None]
    gathered = rows.new_empty(_world_size(), *rows.shape)
    dist.all_gather(list(gathered), rows.contiguous())
    return gathered


def _batch(z1: Tensor, z2: Tensor, patients: Tensor | None, weights: Tensor | None) -> Batch:
    z = torch.stack([z1, z2]).float()  # (2, N, D)
    lengths = torch.linalg.vector_norm(z, dim=2, keepdim=True).clamp_min_(1e-12)
    anchors = z / lengths
    keys = _gather(anchors)
    rank, images = dist.get_rank() if len(keys) > 1 else 0, len(keys) * len(z1)
    if patients is None:
        count = z.new_full((len(z1), 1), 2 * images - 2)
    else:
        patients = _gather(patients)  # (W, N)
        # How many images are of the same patient is how far apart the first and the last of
        # them lie in a sorted list.
        ordered, own = patients.flatten().sort().values, patients[rank]
        last, first = (torch.searchsorted(ordered, own, right=right) for right in (True, False))
        count = 2.0 * (images - (last - first))[:, None]
    weights = _weights(weights, z)
    if patients is not None or images == 1:
        # An anchor without negatives has nothing to be told apart from: its loss is 0.
        weights, count = weights * (count > 0), count.clamp_min(1)
    return Batch(anchors, lengths, keys, rank, patients, count, weights)


def _weights(weights: Tensor | None, z: Tensor) -> Tensor:
    """(N, 1) with which a process sums up the losses of its anchors z (2, N, D), so
    that the average of these sums over the processes is the weighted mean over all
    anchors."""
    if weights is None:
        return z.new_full((z.shape[1], 1), 1 / (2 * z.shape[1]))
    weights = weights.float()
    total = 2 * weights.sum()
    if _world_size() > 1:
        dist.all_reduce(total)
    return weights[:, None] * (_world_size() / total)


def _blocks(batch: Batch) -> list[slice]:
    """Parts of the images whose similarities fit into cache, or a little of a GPU."""
    elements = 2**25 if batch.keys.is_cuda else 2**20
    world_size, views, images, _ = batch.keys.shape
    rows = max(1, elements // (views * world_size * views * images))
    return [slice(start, min(start + rows, images)) for start in range(0, images, rows)]


def _similarities(batch: Batch, scaled: Tensor, block: slice) -> Tensor:
    """(2n, K) of a block's scaled anchors (2, n, D); ABSENT where the key is no
    negative."""
    logits = scaled.flatten(0, 1).mm(batch.keys.flatten(0, 2).T)  # (2n, K)
    by_image = logits.view(*scaled.shape[:2], *batch.keys.shape[:3])  # (2, n, W, 2, N)
    if batch.patients is None:
        # An anchor itself and its positive: the two views of its own image.
        own = by_image[:, :, batch.rank, :, block]  # (2, n, 2, n)
        own.diagonal(dim1=1, dim2=3).fill_(ABSENT)
    else:
        patients = batch.patients[batch.rank, block]  # (n,)
        same = patients[:, None, None] == batch.patients  # (n, W, N)
        by_image.masked_fill_(same[:, :, None], ABSENT)
    return logits


# --------------------------------------------------------------------------------------------------
# The loss of an anchor, and its derivatives.

class Negatives(NamedTuple):
    """R, what the negatives weigh together, of each of a block's 2n anchors."""
    log: Tensor      # (2n, 1) ln R
    slopes: Tensor   # (2n, K) its derivatives by the similarities, times ...
    divisor: Tensor  # (2n, 1) ... this


def _negatives(logits: Tensor, count: Tensor, hardness: float) -> Negatives:
    """From similarities (2n, K), which it overwrites, and the count of negatives (n, 1).

    R is the sum of exp(l) or, with hardness beta, their number times the mean of
    exp(l) under weights proportional to exp(beta l), in which a similar negative
    counts more."""
    largest = logits.amax(1, keepdim=True)  # against overflow
    importance = (hardness * logits).softmax(1) if hardness else None  # (2n, K)
    parts = logits.sub_(largest).exp_()
    if importance is None:
        total = parts.sum(1, keepdim=True)
        return Negatives(total.log() + largest, parts, total)
    mean = parts.mul_(importance).sum(1, keepdim=True)
    # Of ln of the mean, the derivatives are (1 + beta) part / mean - beta importance.
    slopes = parts.mul_(1 + hardness).sub_(importance.mul_(hardness * mean))
    return Negatives((count.repeat(2, 1) * mean).log() + largest, slopes, mean)


class Contrast(NamedTuple):
    """The weighted losses of a block's anchors, and their derivatives; (2, n, 1)."""
    loss: Tensor
    push: Tensor  # derivatives by ln R
    pull: Tensor  # derivatives by the positive's similarity, with the sign turned


def _contrast(log_r: Tensor, positive: Tensor, count: Tensor, weight: Tensor,
              temperature: float, decoupled: bool, prior: float) -> Contrast:
    """What the negatives weigh, log_r (2, n, 1), against the positive's similarity
    l_p, (n, 1) for both views, as are their number n and the weight.

    The loss is ln(exp(l_p) + Ng) - l_p, or ln Ng - l_p if decoupled. Ng is R or, with
    a prior tau, (R - tau n exp(l_p)) / (1 - tau), at least n exp(-1 / temperature).
    """
    excess = log_r - positive
    if not prior:
        loss, slope = _loss_and_slope(excess, weight, decoupled)
        return Contrast(loss, slope, slope)
    # The share of R that is left when images of the anchor's own kind are taken off.
    share = 1 - prior * count * (-excess).exp()
    debiased = excess + share.clamp_min(0).log() - math.log(1 - prior)
    floor = count.log() - 1 / temperature - positive
    loss, slope = _loss_and_slope(debiased.maximum(floor), weight, decoupled)
    # What is taken off moves with the positive. On the floor the negatives move nothing.
    above, debiased_slope = debiased > floor, slope / share
    return Contrast(
        loss, debiased_slope.where(above, 0), debiased_slope.where(above, slope))


def _loss_and_slope(
        excess: Tensor, weight: Tensor, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Weighted loss and its derivative by the excess, ln Ng - l_p; (2, n, 1) each."""
    if decoupled:
        return excess * weight, weight.expand_as(excess)
    return F.softplus(excess) * weight, excess.sigmoid() * weight


# --------------------------------------------------------------------------------------------------
# The loss of a batch.

class NTXent(torch.autograd.Function):
    """The sum of a process's weighted losses, see `nt_xent`, with its gradient.

    The similarities of a block of anchors are used for the loss and for the
    gradients of both anchors and keys, and then forgotten: all of them are never in
    memory at once."""

    @staticmethod
    def forward(ctx, z1: Tensor, z2: Tensor, temperature: float, patients: Tensor | None,
                weights: Tensor | None, decoupled: bool, hardness: float, prior: float) -> Tensor:
        batch, losses = _batch(z1, z2, patients, weights), []
        keys, scaled = batch.keys.flatten(0, 2), batch.anchors / temperature
        positive = (scaled[0] * batch.anchors[1]).sum(1, keepdim=True)  # (N, 1)
        # This process's part of the gradient, and two views of it: for all keys, of which its own
        # anchors are some.
        gradient = torch.zeros_like(batch.keys)  # (W, 2, N, D)
        for_keys, for_anchors = gradient.flatten(0, 2), gradient[batch.rank]
        # With R the sum of exp(l_ik), an anchor's loss moves by push = d loss / d ln R, spread over
        # its negatives by their shares of R, and by -pull = d loss / d l_ip.
        for block in _blocks(batch):
            scaled_anchors, count = scaled[:, block], batch.count[block]  # (2, n, D), (n, 1)
            logits = _similarities(batch, scaled_anchors, block)  # (2n, K)
            negatives = _negatives(logits, count, hardness)
            contrast = _contrast(negatives.log.view(2, -1, 1), positive[block], count,
                                 batch.weights[block], temperature, decoupled, prior)
            losses.append(contrast.loss.sum())
            # Anchors and negatives push each other away, ...
            push = contrast.push / negatives.divisor.view(2, -1, 1)  # (2, n, 1)
            for_keys.addmm_(negatives.slopes.T, (scaled_anchors * push).flatten(0, 1))
            away = negatives.slopes.mm(keys).view(scaled_anchors.shape)  # (2, n, D)
            for_anchors[:, block].addcmul_(away, push, value=1 / temperature)
            # ... and the two views of an image pull each other, each by its own loss and by
            # that of the other.
            pull = contrast.pull.sum(0)  # (n, 1)
            for_anchors[0, block].addcmul_(scaled_anchors[1], pull, value=-1)
            for_anchors[1, block].addcmul_(scaled_anchors[0], pull, value=-1)
        ctx.batch, ctx.gradient = batch, gradient
        return sum(losses[1:], losses[0])

    @staticmethod
    def backward(ctx, scale: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, gradient = ctx.batch, scale * ctx.gradient  # (W, 2, N, D)
        # A process's projections are keys in every other process's loss, too. Leaving out
        # this sum would still give the right loss, and the wrong gradient.
        if _world_size() > 1:
            dist.all_reduce(gradient)
        own = gradient[batch.rank]  # (2, N, D)
        # The length of a projection does not matter: what points along it falls out.
        along = (own * batch.anchors).sum(2, keepdim=True)  # (2, N, 1)
        for_z = own.addcmul_(batch.anchors, along, value=-1).div_(batch.lengths)
        return for_z[0], for_z[1], *[None] * 6


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context in which float32 stays float32.

    Autocast's own costs a small batch a twentieth of its time, even where there is
    nothing to switch off."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, patients: Tensor | None = None,
            weights: Tensor | None = None, decoupled: bool = False, hardness: float = 0.0,
            prior: float = 0.0) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1) or
    a variant.

    z1, z2: (N, D) projections of the two views, of any norm, the same N on every
    process. Returns a scalar, float32, computed outside autocast, of which the
    average over the processes is the mean over all 2WN anchors i of

        -l_ip + ln(exp(l_ip) + Ng),        Ng = sum over the negatives k of exp(l_ik)

    with l the cosine similarity over the temperature and p the positive, the
    image's other view. All other keys are negatives, unless:

    patients: (N,) integers, equal for images of the same patient. Then an anchor's
        negatives are the n keys of other patients. This covers an image that stands
        in the batch twice.
    weights: (N,), not negative, of the images in the mean, which is divided by
        their sum over all processes; some weight must be above 0.
    decoupled: the loss is -l_ip + ln Ng (L_DC of Yeh et al. 2022).
    hardness: beta of Robinson et al. 2021. Ng is n times the mean of exp(l_ik) in
        which each negative's weight is proportional to exp(beta l_ik). As in the
        authors' published code these weights carry gradient: what is returned is
        the gradient of the whole formula.
    prior: tau+ of Chuang et al. 2020, from 0 to below 1, the expected share of
        negatives that are of the anchor's own kind. From Ng is taken tau+ n
        exp(l_ip), and the rest divided by 1 - tau+; it is at least n exp(-1 /
        temperature), where it has no gradient. With hardness this is the loss of
        Robinson et al.

    An anchor without any negative has the loss 0. What an encoder scores that tells
    nothing apart stands in `diagnostics`, as `chance`."""
    with _without_autocast(z1.device.type):
        loss = NTXent.apply(z1, z2, temperature, patients, weights, decoupled, hardness, prior)
        assert isinstance(loss, Tensor)  # apply's type is unknown
        return loss


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
    at best, 0 where all projections are the same (both Wang and Isola 2020).
    chance: the loss of this batch where all projections are the same."""
    with _without_autocast(z1.device.type):
        batch = _batch(z1, z2, patients, weights)
        z1, z2 = batch.anchors
        positive, found = (z1 * z2).sum(1), []
        for block in _blocks(batch):
            nearest = _similarities(batch, batch.anchors[:, block], block).amax(1)  # (2n,)
            found.append(positive[block].repeat(2) > nearest + 1e-6)
        potentials = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]
        parts = batch.count + (not decoupled)  # (N, 1)
        return {
            "top1": torch.cat(found).float().mean(),
            "alignment": (z1 - z2).square().sum(1).mean(),
            "uniformity": (potentials[0] + potentials[1]) / 2,
            "chance": 2 * (batch.weights * parts.log()).sum()}
