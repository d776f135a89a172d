"""NT-Xent, the SimCLR loss, with negatives from every process; what to
watch beside it; and the loss of the labels.

Each process's anchors are its own 2N projections, and the keys are the 2WN
of all W processes. Its loss is the mean over its own anchors;
DistributedDataParallel averages the gradients over the processes, which
makes them those of the global mean.
"""
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Gather(torch.autograd.Function):
    """(M, D) on each of W processes -> (W * M, D) on all, in the order of the ranks.

    A process's rows are keys in every other process's loss too, so backward
    sums the gradients of all processes before it keeps its own rows.
    Leaving out the sum still gives the right loss, and the wrong
    gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)                   # sums
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class AnchorsAndKeys(NamedTuple):
    """Projections of length 1, and which keys are an anchor's own: itself and its other view."""
    anchors: Tensor   # (2N, D) of this process
    keys: Tensor      # (2WN, D) of all processes
    itself: Tensor    # (2N,) rows of keys
    positive: Tensor  # (2N,) rows of keys


def _anchors_and_keys(z1: Tensor, z2: Tensor) -> AnchorsAndKeys:
    anchors = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    keys = Gather.apply(anchors) if distributed else anchors
    assert isinstance(keys, Tensor)                            # apply's type is unknown
    offset = dist.get_rank() * len(anchors) if distributed else 0  # of this process in keys
    itself = torch.arange(len(anchors), device=anchors.device) + offset
    return AnchorsAndKeys(anchors, keys, itself, itself.roll(len(z1)))


def _blocks(pairs: AnchorsAndKeys) -> list[slice]:
    """Parts of the anchors for which all similarities fit into cache, or a little of a GPU."""
    elements = 2**25 if pairs.keys.is_cuda else 2**20
    rows = max(1, elements // len(pairs.keys))
    return [slice(start, start + rows) for start in range(0, len(pairs.anchors), rows)]


class ContrastiveCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of anchors (M, D) that have to tell their positive among keys (K, D).

    The similarities of a block of anchors are used for the loss and for both gradients at
    once and then forgotten: nothing of size M x K is ever in memory. With p the softmax of
    an anchor's similarities, its gradient is (sum_k p_k key_k - positive) / (temperature M)
    and that of key k gets (p_k - [k is the positive]) anchor / (temperature M)."""

    @staticmethod
    def forward(ctx, pairs: AnchorsAndKeys, anchors: Tensor, keys: Tensor,
                temperature: float) -> Tensor:
        # Anchors and keys are in `pairs`, too, but autograd sees only tensors that are arguments.
        loss = anchors.new_zeros(())
        for_anchors, for_keys = torch.empty_like(anchors), torch.zeros_like(keys)
        scaled = anchors / temperature
        for block in _blocks(pairs):
            positive = pairs.positive[block]
            logits = scaled[block] @ keys.T                    # (m, K)
            logits.scatter_(1, pairs.itself[block, None], -torch.inf)
            of_positive = logits.gather(1, positive[:, None])  # (m, 1)
            largest = logits.amax(1, keepdim=True)             # (m, 1), against overflow
            p = logits.sub_(largest).exp_()                    # (m, K), not yet divided by ...
            total = p.sum(1, keepdim=True)                     # (m, 1) ... this
            loss += (total.log() + largest - of_positive).sum()
            for_anchors[block] = p @ keys / total - keys[positive]
            for_keys.addmm_(p.T, scaled[block] / total)
            for_keys.index_add_(0, positive, scaled[block], alpha=-1)
        ctx.save_for_backward(for_anchors / (temperature * len(anchors)), for_keys / len(anchors))
        return loss / len(anchors)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        for_anchors, for_keys = ctx.saved_tensors
        return None, gradient * for_anchors, gradient * for_keys, None


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1).

    z1, z2: (N, D) projections of the two views, of any norm, the same N on
    every process. The mean over this process's 2N anchors: a scalar,
    float32, computed outside autocast. An encoder that tells nothing apart
    scores ln(2WN - 1), see `chance_level`."""
    with torch.autocast(z1.device.type, enabled=False):
        pairs = _anchors_and_keys(z1, z2)
        loss = ContrastiveCrossEntropy.apply(pairs, pairs.anchors, pairs.keys, temperature)
        assert isinstance(loss, Tensor)
        return loss


def chance_level(global_batch_size: int) -> float:
    """NT-Xent where all projections are the same: ln(2WN - 1) for a global batch of WN images."""
    return math.log(2 * global_batch_size - 1)


@torch.no_grad()
def diagnostics(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """What the loss hides, as scalars. z1, z2: (N, D) as in `nt_xent`.

    top1: how often an anchor's nearest key among those of all processes is its positive.
    alignment: mean squared distance of positives on the unit sphere, 0 at best.
    uniformity: log of the mean Gaussian potential of this process's pairs, about -4 at best, 0
    where all projections are the same (both Wang and Isola 2020)."""
    with torch.autocast(z1.device.type, enabled=False):
        pairs = _anchors_and_keys(z1, z2)
        found = []  # for each block, whether the nearest key is the positive
        for block in _blocks(pairs):
            cosine = pairs.anchors[block] @ pairs.keys.T
            cosine.scatter_(1, pairs.itself[block, None], -torch.inf)
            found.append(cosine.argmax(1) == pairs.positive[block])
        z1, z2 = pairs.anchors.chunk(2)
        potentials = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]
        return {
            "top1": torch.cat(found).float().mean(),
            "alignment": (z1 - z2).square().sum(1).mean(),
            "uniformity": (potentials[0] + potentials[1]) / 2}


