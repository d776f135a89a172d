"""What the loops of all stages share: where they compute, and among which processes.

What a stage decides stands in its script; what it would have to repeat from another
script stands here.
"""
import dataclasses
import math
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import SyncBatchNorm, unchanged_statistics


@dataclasses.dataclass(frozen=True)
class Compute:
    """Where this process computes, and its place among the processes that torchrun started.

    With one process every collective call returns at once, so that a stage need not
    ask."""
    rank: int
    world_size: int
    device: torch.device
    precision: str  # bf16, fp16 or fp32
    threads: int    # of the loader

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None for float32 throughout."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[self.precision]

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def loader_arguments(self) -> dict[str, Any]:
        """What train_loader and eval_loader ask of the process that they load for."""
        return dict(device=self.device, rank=self.rank, world_size=self.world_size,
                    threads=self.threads)

    def without_others(self) -> "Compute":
        """The same device for work that one process does while the others wait."""
        return dataclasses.replace(self, rank=0, world_size=1)

    def say(self, *words) -> None:
        """Print, once for all processes."""
        if self.rank == 0:
            print(*words, flush=True)

    def send(self, x: Tensor) -> Tensor:
        """A CPU tensor on the device. From pinned memory, so that this process does not wait."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.cuda else x

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, or another `op`; in place, and returned. x lies on a CPU or
        a GPU: launch.py has opened a way for each."""
        if self.world_size > 1:
            dist.all_reduce(x, op)
        return x

    def all_agree(self, text: str) -> bool:
        """Whether all processes have the same text."""
        number = zlib.crc32(text.encode())
        smallest = self.reduce(torch.tensor(number), dist.ReduceOp.MIN)
        return bool(smallest == self.reduce(torch.tensor(number), dist.ReduceOp.MAX))

    def to_device(self, net: nn.Module) -> Any:
        """A network on this process's device, with batch norm over the images of all processes."""
        if self.world_size > 1:
            SyncBatchNorm.replace_in(net)
        net = net.to(device=self.device)
        # Images (B, 1, S, S) stay as they are: with one channel both layouts are the same bytes.
        return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def data_parallel(self, net: Any) -> Any:
        """The network for the training step: backward() averages gradients over all processes."""
        if self.world_size == 1:
            return net
        model = DistributedDataParallel(
            net, device_ids=[self.device.index] if self.cuda else None,
            gradient_as_bucket_view=True)
        # Batch norm's statistics are the same everywhere: do not broadcast them every step. Set
        # afterwards, because as an argument it would also stop the broadcast at the start.
        model.broadcast_buffers = False
        return model

    def rehearse(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        """A first backward pass, on zeros of this shape, which changes nothing.

        It is for runs that go on to the bit. After its first backward pass DistributedDataParallel
        deals the gradients to its buckets anew, and in other buckets a sum over three or more
        processes rounds differently. Now that comes before the first step of every start."""
        if self.world_size == 1:
            return
        parameter = next(model.parameters())
        x = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        with unchanged_statistics(model):
            with self.autocast():
                y = model(x)
            y.float().sum().backward()
            model.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------
# For the loop of a stage.

def warmup_and_cosine(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / math.ceil(warmup_steps)
    angle = math.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (1 + math.cos(angle)) / 2
