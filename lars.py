"""Optimizers and their learning rate; LARS, which the SimCLR paper uses, in a dozen launches."""
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# PyTorch's type stubs lack its operations on lists of tensors, torch._foreach_*.
import math

import torch
from torch import Tensor, nn


def make_optimizer(net: nn.Module, name: str, lr: float,
                   weight_decay: float) -> torch.optim.Optimizer:
    """`lars`, `adam` or `adamw` over a network's parameters. Biases and batch norm do not decay."""
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim <= 1]  # and batch norm's parameters
    groups = [dict(params=weights, weight_decay=weight_decay),
              dict(params=biases, weight_decay=0.0)]
    if name == "lars":
        return LARS(groups, lr)
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return adam(groups, lr, fused=True)  # one pass over each tensor, five times as fast on a CPU


def warmup_and_cosine(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """The learning rate at `step`: linear warm-up to `peak`, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / math.ceil(warmup_steps)
    angle = math.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (1 + math.cos(angle)) / 2


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) with momentum, as SimCLR uses it.

    A weight's step is scaled by trust |w| / |g|, so that all layers learn at the same relative pace
    for any batch size. Biases and batch norm, which are one-dimensional, get neither this scale nor
    weight decay."""

    def __init__(self, parameters, lr: float, weight_decay: float = 0.0, momentum: float = 0.9,
                 trust: float = 0.001):
        super().__init__(parameters, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    # Tells PyTorch's GradScaler that a step unscales its gradients itself, and skips itself if one
    # of them overflowed. If the scaler did so, the host would wait for the GPU in every step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor  # these two exist only while the scaler makes a step
    found_inf: Tensor   # 1 if the step is to be skipped

    @torch.no_grad()
    def step(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters, by operations on lists of tensors: a dozen launches on a GPU
        instead of six for each parameter."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if hasattr(self, "grad_scale"):
                torch._foreach_div_([p.grad for p in trained], self.grad_scale)
            weights = [p for p in trained if p.ndim > 1]
            biases = [p for p in trained if p.ndim <= 1]
            if weights:
                self._update(weights, self._adapted(weights, group), group)
            if biases:
                self._update(biases, [p.grad for p in biases], group)

    def _adapted(self, weights: list[Tensor], group: dict) -> list[Tensor]:
        """Gradients with weight decay, each scaled to the norm of its weight."""
        gradients = torch._foreach_add(
            [p.grad for p in weights], weights, alpha=group["weight_decay"])
        weight_norms = torch.stack(torch._foreach_norm(weights))
        gradient_norms = torch.stack(torch._foreach_norm(gradients))
        # If the weight or the gradient is zero, the ratio means nothing, and the gradient stays.
        scales = torch.where((weight_norms > 0) & (gradient_norms > 0),
                             group["trust"] * weight_norms / gradient_norms, 1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))
        return gradients

    def _update(self, parameters: list[Tensor], gradients: list, group: dict) -> None:
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        decay, lr = group["momentum"], group["lr"]
        if hasattr(self, "found_inf"):
            # A skipped step leaves momenta and parameters as they are.
            skip = self.found_inf > 0
            decay, lr = torch.where(skip, 1.0, decay), torch.where(skip, 0.0, lr)
            gradients = [torch.where(skip, 0.0, gradient) for gradient in gradients]
        torch._foreach_mul_(momenta, decay)
        torch._foreach_add_(momenta, gradients)
        torch._foreach_sub_(parameters, torch._foreach_mul(momenta, lr))
