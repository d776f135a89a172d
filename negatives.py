"""The sum over the negatives of NT-Xent, across all processes and in blocks.

The similarities of a process's 2B anchors to the K = 2WB keys of all W processes would take
more memory than anything else in a large batch. They are computed block by block, and for the
gradient once more if there are too many to keep.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# The similarity to a key that is no negative. Its exponential is 0, like that of -inf. But in a row
# of nothing else, -inf - -inf would be NaN, where ABSENT - ABSENT is 0.
ABSENT = -1e30
# How many similarities a sum keeps for its backward pass, 128 MiB of them; and how many a GPU
# computes at once.
ROOM = 2**25
# Up to this scale, exp(-2 * scale) to exp(2 * scale) are well within float32, even times a gradient
# that was scaled up for float16.
MODERATE = 30.0


def log_sum_over_negatives(batch: "Batch", scale: float) -> Tensor:
    """ln of the sum over the negatives of exp(scale * cosine), for each anchor: (2, B).

    For an anchor without negatives it is ABSENT, up to rounding. The gradient counts an anchor
    also as a key in the sums of other anchors, on all processes."""
    return LogSumExp.apply(batch.anchors, batch, scale)


# --------------------------------------------------------------------------------------------------
# Who is compared with whom.

class Batch(NamedTuple):
    """The global batch as one of W processes sees it."""
    anchors: Tensor       # (2, B, D) projections of this process, of length 1
    keys: Tensor          # (K, D) projections of all processes, of length 1
    patients: Tensor      # (B,) of this process's images; without patients, each its own
    key_patients: Tensor  # (K,)
    weights: Tensor       # (B,) of both anchors of an image in this process's sum


def gather_batch(z1: Tensor, z2: Tensor, patients: Tensor | None, weights: Tensor | None) -> Batch:
    """Arguments as in `nt_xent`."""
    n_images, world_size, rank = len(z1), 1, 0
    if dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    anchors = F.normalize(torch.stack([z1, z2]).float(), dim=2)
    # (W, 2, B, D) -> (K, D), without a graph: LogSumExp.backward adds the keys' part.
    keys = all_gather(anchors.detach()).flatten(0, 2)
    if patients is None:
        patients = torch.arange(rank * n_images, (rank + 1) * n_images, device=z1.device)
    key_patients = all_gather(patients)  # (W, B) -> (W, 2, B) -> (K,), in the keys' order
    key_patients = key_patients[:, None].expand(-1, 2, -1).flatten()
    if weights is None:
        weights = anchors.new_full((n_images,), 1 / (2 * n_images))
    else:
        # Those of all 2WB anchors add up to W, because DistributedDataParallel averages over W.
        weights = weights.float() * (world_size / (2 * all_gather(weights.float()).sum()))
    return Batch(anchors, keys, patients, key_patients, weights)


def all_gather(rows: Tensor) -> Tensor:
    """A tensor of each process -> those of all W, in a new first dimension."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows[None]
    gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
    # The list holds views of `gathered`.
    dist.all_gather(list(gathered), rows.contiguous())
    return gathered


def blocks(batch: Batch) -> list[slice]:
    """Slices of a process's images, so that a slice's similarities fit into the CPU's cache, or
    into a small part of a GPU.

    Write what is kept of each block into one tensor. Many small tensors would come to lie where a
    block was freed, and the next block would no longer fit there."""
    elements = ROOM if batch.keys.is_cuda else 2**20
    images = len(batch.patients)
    size = max(1, elements // (2 * len(batch.keys)))
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def count_negatives(batch: Batch) -> Tensor:
    """How many keys are negatives of an image's anchors, (B,): the same number for both."""
    counts = torch.empty_like(batch.patients, dtype=torch.int64)
    for block in blocks(batch):
        counts[block] = (batch.patients[block, None] != batch.key_patients).sum(1)
    return counts


def nearest_negative(batch: Batch) -> Tensor:
    """The largest cosine of each anchor with a negative, (2, B); ABSENT where it has none."""
    nearest = batch.anchors.new_empty(batch.anchors.shape[:2])
    for block in blocks(batch):
        nearest[:, block] = similarities(batch, block, 1).amax(2)
    return nearest


def similarities(batch: Batch, block: slice, scale: float) -> Tensor:
    """scale * cosine of a block's 2n anchors and all K keys, (2, n, K). ABSENT for keys that are no
    negatives: the anchor itself, its positive, and all others of its patient."""
    cosines = (batch.anchors[:, block] * scale) @ batch.keys.T
    same_patient = batch.patients[block, None] == batch.key_patients  # (n, K)
    return cosines.masked_fill_(same_patient, ABSENT)


# --------------------------------------------------------------------------------------------------
# The sum and its gradient.

class LogSumExp(torch.autograd.Function):
    """`log_sum_over_negatives` by blocks, without all similarities, (2B, 2WB), in memory at once.

    s_ik = scale * cosine of anchor i and key k if k is a negative of i, else ABSENT;
    r_i = ln of the sum over k of exp(s_ik), the result; g_i = d loss / d r_i. Keys are detached,
    so that autograd would see anchor i in r_i alone. `backward` adds its part as a key in the sums
    r_k of all other anchors of all processes. The gradient of anchor i is

        scale * sum over k of (g_i exp(s_ik - r_i) + g_k exp(s_ki - r_k)) key_k

    If k is a negative of i, then i is one of k, and s_ki = s_ik. So this process has all
    similarities that it needs; from the others it gathers only r_k and g_k."""

    @staticmethod
    def forward(ctx, anchors: Tensor, batch: Batch, scale: float) -> Tensor:
        # `anchors` are batch.anchors, as an argument of their own because autograd must see them.
        r, ctx.kept, room = anchors.new_empty(anchors.shape[:2]), [], ROOM  # (2, B)
        for block in blocks(batch):
            terms = _terms(batch, block, scale)  # (2, n, K)
            r[:, block] = terms.sum(2) if scale <= MODERATE else terms.logsumexp(2)
            room -= terms.numel()
            ctx.kept.append(terms if room >= 0 else None)
        if scale <= MODERATE:
            r = torch.where(r == 0, ABSENT, r.log() + scale)
        ctx.save_for_backward(r)
        ctx.batch, ctx.scale = batch, scale
        return r

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, scale, (own_r,) = ctx.batch, ctx.scale, ctx.saved_tensors  # (2, B)
        own_g = scale * gradient  # (2, B)
        # r and g of all processes by one collective call, (W, 2, 2, B) -> (2, K).
        of_all = all_gather(torch.stack([own_r, own_g]))
        all_r, all_g = of_all.transpose(0, 1).flatten(1)
        if scale <= MODERATE:
            # g exp(s - r) = g exp(scale - r) exp(s - scale), whose last factor was kept. The clamp
            # is for an anchor without negatives, whose g is 0: 0 * infinity would be NaN.
            own_g = own_g * (scale - own_r).clamp_max(2 * scale).exp()
            all_g = all_g * (scale - all_r).clamp_max(2 * scale).exp()
        for_anchors = torch.empty_like(batch.anchors)  # (2, B, D)
        for i, block in enumerate(blocks(batch)):
            terms, ctx.kept[i] = ctx.kept[i], None  # frees each block after its use
            if terms is None:
                terms = _terms(batch, block, scale)
            if scale <= MODERATE:
                factor = terms.mul_(own_g[:, block, None] + all_g)
            else:
                factor = (terms - own_r[:, block, None]).exp_().mul_(own_g[:, block, None])
                factor.addcmul_(terms.sub_(all_r).exp_(), all_g)
            for_anchors[:, block] = factor @ batch.keys
        return for_anchors, None, None


def _terms(batch: Batch, block: slice, scale: float) -> Tensor:
    """exp(s_ik - scale) of a block's anchors, (2, n, K), at most 1 each. It could underflow for
    a large scale, for which s_ik is returned."""
    s = similarities(batch, block, scale)
    return s.sub_(scale).exp_() if scale <= MODERATE else s
