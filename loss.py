"""NT-Xent, the SimCLR loss, with negatives gathered from every process, what to watch beside it, and the labels' loss.

Each process's anchors are its own 2N projections and the keys are everybody's 2WN. Its loss is the mean over its own
anchors; DistributedDataParallel averages gradients over the W processes, which makes them those of the global mean.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Gather(torch.autograd.Function):
    """(M, D) on each of W processes -> (W * M, D) on all, in the order of the ranks, with gradients.

    A process's rows are keys in every other process's loss too, so backward sums the gradients of all processes before
    it keeps its own rows. Leaving out the sum still gives the right loss, and the wrong gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)                                           # sums
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _logits(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine / temperature of anchors with keys, (2N, 2WN), -inf with itself; the key that is its positive, (2N,)."""
    anchors = F.normalize(torch.cat([z1, z2]).float(), dim=1)                                     # (2N, D)
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    keys = Gather.apply(anchors) if distributed else anchors                                      # (2WN, D)
    own = torch.arange(len(anchors), device=anchors.device) + (dist.get_rank() * len(anchors) if distributed else 0)
    logits = (anchors / temperature) @ keys.T
    return logits.scatter_(1, own[:, None], -torch.inf), own.roll(len(z1))      # i + N mod 2N is i's other view


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1), mean over this process's 2N anchors.

    z1, z2: (N, D) projections of the two views, not normalised, the same N on every process. Scalar, float32, computed
    outside autocast. An encoder that tells nothing apart scores ln(2WN - 1), see `chance_level`."""
    with torch.autocast(z1.device.type, enabled=False):
        return F.cross_entropy(*_logits(z1, z2, temperature))


def chance_level(global_batch_size: int) -> float:
    """NT-Xent where all projections are the same: ln(2WN - 1) for a global batch of WN images."""
    return math.log(2 * global_batch_size - 1)


@torch.no_grad()
def diagnostics(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """What the loss hides, as scalars: `top1`, how often an anchor's nearest key among all processes' is its positive;
    `alignment`, the mean squared distance of positives on the unit sphere, 0 best; `uniformity`, the log of the mean
    Gaussian potential of this process's pairs, about -4 best, 0 collapsed (Wang and Isola 2020)."""
    with torch.autocast(z1.device.type, enabled=False):
        logits, positives = _logits(z1, z2, 1.0)
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        return {"top1": (logits.argmax(1) == positives).float().mean(),
                "alignment": (z1 - z2).square().sum(1).mean(),
                "uniformity": (torch.pdist(z1).square().mul(-2).exp().mean().log()
                               + torch.pdist(z2).square().mul(-2).exp().mean().log()) / 2}


def masked_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The labels' loss, for N images and G questions of K answers each; scalar, float32.

    logits, targets: (N, G, K). K = 1 is binary cross-entropy, one sigmoid a label; otherwise targets are one-hot and it
    is softmax's. weights: (N, G), 0 leaves a cell out. The sum is divided by N * G and not by the weights, so that the
    mean over processes is the loss of their common batch; scale the weights to mean 1 over the training images."""
    logits = logits.float()
    if logits.shape[2] == 1:
        cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")[:, :, 0]
    else:
        cells = -(targets * logits.log_softmax(2)).sum(2)
    return (weights * cells).mean()
