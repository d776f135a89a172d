"""Batch norm over the images of all processes, so that the number of processes changes nothing.

PyTorch's nn.SyncBatchNorm exists for GPUs only, makes the host wait for the GPU three times a
layer, and breaks the graph of torch.compile. This one exchanges its statistics by one collective
call in each direction, never looks at a tensor's values on the host, and works with gloo and NCCL.
"""
import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Normalise(torch.autograd.Function):
    """Batch norm of a process's images by the statistics of all processes' images.

    x (B, C, ...), the same B on every process; weight and bias (C,). Returns the output and, for
    the running statistics, mean (C,) and biased variance (C,) of all processes' images. Equations:
    Ioffe and Szegedy (2015), section 3. Of the tensors of x's size only x itself is kept for
    backward, in its own precision."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        own = torch.stack(torch.var_mean(_precise(x), _dims(x), correction=0))  # (2, C)
        everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everybodys, own)
        variances, means = torch.stack(everybodys).unbind(1)                    # (W, C) each
        # The variance within processes, plus the variance between them.
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx, gradient: Tensor, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, inverse_deviation = ctx.saved_tensors
        channels = [1, -1, *[1] * (x.ndim - 2)]
        normalised = (_precise(x) - mean.view(channels)) * inverse_deviation.view(channels)
        gradient = _precise(gradient)
        for_weight = (gradient * normalised).sum(_dims(x))  # (C,)
        for_bias = gradient.sum(_dims(x))                   # (C,)
        # Each image changes mean and variance, and so the output of all images.
        everybodys = torch.stack([for_weight, for_bias])    # (2, C)
        dist.all_reduce(everybodys)
        count = dist.get_world_size() * x.numel() / x.shape[1]
        along, shift = (everybodys / count).unbind(0)       # (C,) each
        for_x = gradient - shift.view(channels) - normalised * along.view(channels)
        for_x = for_x * (weight * inverse_deviation).view(channels)
        return for_x.to(x.dtype), for_weight, for_bias, None


def _precise(x: Tensor) -> Tensor:
    """In float32 or better: sums over a batch lose too much in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dims(x: Tensor) -> list[int]:
    """All dimensions except the channels'."""
    return [0, *range(2, x.ndim)]


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d or 2d over the images of all processes, with the same state dict."""

    def forward(self, x: Tensor) -> Tensor:
        # These may be None in a batch norm without running statistics; ours always has them.
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        y, mean, variance = Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = dist.get_world_size() * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        return y

    @staticmethod
    def replace_in(module: nn.Module) -> None:
        """Replace every batch norm of a network by one of these, with the same parameters."""
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                synchronised = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                synchronised.load_state_dict(child.state_dict())
                setattr(module, name, synchronised)
            else:
                SyncBatchNorm.replace_in(child)


@contextlib.contextmanager
def unchanged_statistics(net: nn.Module) -> Iterator[None]:
    """Restores batch norm's running statistics at the end of the context."""
    before = [buffer.clone() for buffer in net.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(net.buffers(), before):
            buffer.copy_(value)
