"""NT-Xent, the SimCLR loss, with negatives from every process; what to watch beside
it; and the loss of the labels.

Each process's anchors are its own 2N projections, and the keys are the 2WN of all W
processes. Its loss is the mean over its own anchors; DistributedDataParallel
averages the gradients over the processes, which makes them those of the global
mean.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Gather(torch.autograd.Function):
    """(M, D) on each of W processes -> (W * M, D) on all, in the order of the ranks.

    A process's rows are keys in every other process's loss too, so backward sums
    the gradients of all processes before it keeps its own rows. Leaving out the sum
    still gives the right loss, and the wrong gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)                                   # sums
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _logits(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Similarities of this process's anchors with all keys, and where each finds its positive.

    Row i of the first, (2N, 2WN): cosine / temperature of anchor i with every key,
    -inf with itself. Element i of the second, (2N,): the column of anchor i's other
    view."""
    anchors = F.normalize(torch.cat([z1, z2]).float(), dim=1)       # (2N, D)
    several = dist.is_initialized() and dist.get_world_size() > 1
    keys = Gather.apply(anchors) if several else anchors            # (2WN, D)
    assert isinstance(keys, Tensor)                                 # apply's type is unknown
    offset = dist.get_rank() * len(anchors) if several else 0       # of the own rows among all
    itself = torch.arange(len(anchors), device=anchors.device) + offset
    logits = (anchors / temperature) @ keys.T
    logits = logits.scatter_(1, itself[:, None], -torch.inf)
    return logits, itself.roll(len(z1))                             # the other view is N away


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1).

    z1, z2: (N, D) projections of the two views, of any norm, the same N on every
    process. The mean over this process's 2N anchors: a scalar, float32, computed
    outside autocast. An encoder that tells nothing apart scores ln(2WN - 1), see
    `chance_level`."""
    with torch.autocast(z1.device.type, enabled=False):
        return F.cross_entropy(*_logits(z1, z2, temperature))


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
        logits, positives = _logits(z1, z2, 1.0)
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        potentials = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]
        return {
            "top1": (logits.argmax(1) == positives).float().mean(),
            "alignment": (z1 - z2).square().sum(1).mean(),
            "uniformity": (potentials[0] + potentials[1]) / 2}


def masked_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The loss of the labels, for N images and G questions of K answers each; scalar, float32.

    logits, targets: (N, G, K). With K = 1 it is binary cross-entropy, one sigmoid a
    label; otherwise the targets are one-hot and it is that of a softmax. weights:
    (N, G), 0 leaves a cell out. The sum is divided by N * G and not by the weights,
    so that the mean over processes is the loss of their common batch; scale the
    weights to a mean of 1 over the training images."""
    logits = logits.float()
    if logits.shape[2] == 1:
        cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")[:, :, 0]
    else:
        cells = -(targets * logits.log_softmax(2)).sum(2)
    return (weights * cells).mean()
