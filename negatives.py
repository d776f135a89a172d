"""The sum over the negatives of NT-Xent, across all processes and in blocks.

The similarities of a process's 2B anchors to the K = 2WB keys of all W processes would be
the largest thing in the memory of a large batch. Here they are made block by block, for the
loss and, beyond a limit, once more for its gradient.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Stands for the similarity to a key that is no negative. Its exponential is 0, as that of -inf.
# But where a row has nothing else, ABSENT - ABSENT is 0, and -inf - -inf would be NaN.
ABSENT = -1e30
# How many similarities, 128 MiB, a sum keeps for its backward pass, which computes others anew; and
# how many a GPU handles at once.
ROOM = 2**25
# Up to this scale exp of twice the scale, times a gradient as large as float16's loss scaling makes
# it, is far from the largest number of float32.
MODERATE = 30.0


def log_sum_exp(batch: "Batch", scale: float) -> Tensor:
    """ln of the sum over the negatives of exp(scale * cosine), for each anchor: (2, B).

    For an anchor without any it is ABSENT, but for rounding. Its gradient is that of the sums of
    all processes, since an anchor of this one is a key in the others' sums as well."""
    return LogSumExp.apply(batch.anchors, batch, scale)


# --------------------------------------------------------------------------------------------------
# Who is compared with whom.

class Batch(NamedTuple):
    """The global batch as one of W processes sees it."""
    anchors: Tensor       # (2, B, D) projections of this process, of length 1
    keys: Tensor          # (K, D) projections of all processes, of length 1
    patients: Tensor      # (B,) of this process's images; without patients, each its own
    key_patients: Tensor  # (K,)
    weights: Tensor       # (B,) of each of an image's two anchors in this process's sum


def gather_batch(z1: Tensor, z2: Tensor, patients: Tensor | None, weights: Tensor | None) -> Batch:
    """Arguments as in `nt_xent`."""
    n_images, world_size, rank = len(z1), 1, 0
    if dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    anchors = F.normalize(torch.stack([z1, z2]).float(), dim=2)
    # (W, 2, B, D) -> (K, D). They are detached: LogSumExp.backward adds their part.
    keys = all_gather(anchors.detach()).flatten(0, 2)
    if patients is None:
        patients = torch.arange(rank * n_images, (rank + 1) * n_images, device=z1.device)
    key_patients = all_gather(patients)  # (W, B) -> (W, 2, B) -> (K,), in the keys' order
    key_patients = key_patients[:, None].expand(-1, 2, -1).flatten()
    if weights is None:
        weights = anchors.new_full((n_images,), 1 / (2 * n_images))
    else:
        # Those of the 2WB anchors add up to W: DistributedDataParallel takes the mean.
        weights = weights.float() * (world_size / (2 * all_gather(weights.float()).sum()))
    return Batch(anchors, keys, patients, key_patients, weights)


def all_gather(rows: Tensor) -> Tensor:
    """A tensor of each process -> those of all W, in a new first dimension."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows[None]
    gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
    # The items of the list are views of `gathered`, which is filled by filling them.
    dist.all_gather(list(gathered), rows.contiguous())
    return gathered


def blocks(batch: Batch) -> list[slice]:
    """Parts of a process's images whose similarities fit into cache, or a little of a GPU."""
    elements = ROOM if batch.keys.is_cuda else 2**20
    images = len(batch.patients)
    size = max(1, elements // (2 * len(batch.keys)))
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def count_negatives(batch: Batch) -> Tensor:
    """How many keys are negatives of each of an image's two anchors, (B,)."""
    return torch.cat([(batch.patients[block, None] != batch.key_patients).sum(1)
                      for block in blocks(batch)])


def nearest_negative(batch: Batch) -> Tensor:
    """The largest cosine of each anchor with a negative, (2, B); ABSENT where it has none."""
    return torch.cat([similarities(batch, block, 1).amax(2) for block in blocks(batch)], 1)


def similarities(batch: Batch, block: slice, scale: float) -> Tensor:
    """Cosines of a block's 2n anchors with all K keys, times scale, (2, n, K). ABSENT where the key
    is no negative: for the anchor itself, its positive, and all else that is of its patient."""
    cosines = (batch.anchors[:, block] * scale) @ batch.keys.T
    same_patient = batch.patients[block, None] == batch.key_patients  # (n, K)
    return cosines.masked_fill_(same_patient, ABSENT)


# --------------------------------------------------------------------------------------------------
# The sum and its gradient.

class LogSumExp(torch.autograd.Function):
    """`log_sum_exp`, by blocks of similarities: all of them, (2B, 2WB), need not be in memory.

    s_ik = scale * cosine of anchor i and key k where k is a negative of i, else ABSENT;
    r_i = ln of the sum over k of exp(s_ik), the result; and g_i = d loss / d r_i. The keys
    are detached, so that autograd would see an anchor in its own sum alone. `backward` adds
    what it does as a key in the sums of the other anchors, those of all processes:

        scale * sum over k of (g_i exp(s_ik - r_i) + g_k exp(s_ki - r_k)) key_k

    To be a negative is mutual, and s_ki = s_ik: this process has the similarities of both
    terms, and needs of the others nothing but r_k and g_k."""

    @staticmethod
    def forward(ctx, anchors: Tensor, batch: Batch, scale: float) -> Tensor:
        # The anchors are those of the batch: as an argument, autograd sees them.
        parts, ctx.kept, room = [], [], ROOM
        for block in blocks(batch):
            s = similarities(batch, block, scale)  # (2, n, K)
            parts.append(s.logsumexp(2))
            room -= s.numel()
            ctx.kept.append(s if room >= 0 else None)
        r = torch.cat(parts, 1)  # (2, B)
        ctx.save_for_backward(r)
        ctx.batch, ctx.scale = batch, scale
        return r

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, scale, (own_r,) = ctx.batch, ctx.scale, ctx.saved_tensors  # (2, B)
        own_g = scale * gradient  # (2, B)
        # Those of all processes by one collective call, (W, r or g, 2, B) -> (r or g, K).
        of_all = all_gather(torch.stack([own_r, own_g]))
        all_r, all_g = of_all.transpose(0, 1).flatten(1)
        if scale <= MODERATE:
            # As g exp(s - r) = g exp(scale - r) exp(s - scale), both terms share the last factor.
            # An anchor without any negative, whose g is 0, is kept from 0 times infinity.
            own_g = own_g * (scale - own_r).clamp_max(2 * scale).exp()
            all_g = all_g * (scale - all_r).clamp_max(2 * scale).exp()
        for_anchors = torch.empty_like(batch.anchors)  # (2, B, D)
        for i, block in enumerate(blocks(batch)):
            s, ctx.kept[i] = ctx.kept[i], None  # what is used up goes at once
            if s is None:
                s = similarities(batch, block, scale)
            if scale <= MODERATE:
                factor = s.sub_(scale).exp_().mul_(own_g[:, block, None] + all_g)
            else:
                factor = (s - own_r[:, block, None]).exp_().mul_(own_g[:, block, None])
                factor.addcmul_(s.sub_(all_r).exp_(), all_g)
            for_anchors[:, block] = factor @ batch.keys
        return for_anchors, None, None
