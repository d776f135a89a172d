"""Where a stage computes: device and precision, and the other processes."""
import dataclasses
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

    With one process, `barrier` and `reduce` do nothing."""
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
        """The type that autocast computes in; None if everything is float32."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[self.precision]

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def loader_arguments(self) -> dict[str, Any]:
        """The arguments of train_loader and eval_loader that depend on the process."""
        return dict(device=self.device, rank=self.rank, world_size=self.world_size,
                    threads=self.threads)

    def without_others(self) -> "Compute":
        """For work that this process does alone while the others wait."""
        return dataclasses.replace(self, rank=0, world_size=1)

    def say(self, *words) -> None:
        """Print, on the first process only."""
        if self.rank == 0:
            print(*words, flush=True)

    def send(self, x: Tensor) -> Tensor:
        """Copy a CPU tensor to the device. From pinned memory the copy is asynchronous."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.cuda else x

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Replace x by its sum over all processes, or by another `op`, and return it.

        A CPU tensor goes through gloo and a GPU tensor through NCCL."""
        if self.world_size > 1:
            dist.all_reduce(x, op)
        return x

    def all_agree(self, text: str) -> bool:
        """Whether all processes have the same text, by its checksum."""
        checksum = torch.tensor(zlib.crc32(text.encode()))
        smallest = self.reduce(checksum.clone(), dist.ReduceOp.MIN)
        largest = self.reduce(checksum.clone(), dist.ReduceOp.MAX)
        return bool(smallest == largest)

    def prepare(self, net: nn.Module) -> Any:
        """Move a network to the device, channels-last, with batch norm over all processes' images.

        Images need no such call: with one channel, both memory formats are the same."""
        if self.world_size > 1:
            SyncBatchNorm.replace_in(net)
        net = net.to(device=self.device)
        return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def data_parallel(self, net: Any) -> Any:
        """Wrap a network so that backward() averages its gradients over all processes."""
        if self.world_size == 1:
            return net
        model = DistributedDataParallel(
            net, device_ids=[self.device.index] if self.cuda else None,
            gradient_as_bucket_view=True)
        # All processes have the same batch-norm statistics, which need no broadcast in each step.
        # As an argument this would also turn off the broadcast at the start.
        model.broadcast_buffers = False
        return model

    def rehearse(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        """One forward and backward pass on zeros of this shape. It changes no weight or statistic.

        After its first backward pass DistributedDataParallel regroups the gradients into other
        buckets, in which sums over three or more processes round differently. A run that resumes
        would begin with that pass, and differ in the last bits from one that was never
        interrupted. Here it comes before the first step of either."""
        if self.world_size == 1:
            return
        parameter = next(model.parameters())
        x = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        with unchanged_statistics(model):
            with self.autocast():
                y = model(x)
            y.float().sum().backward()
            model.zero_grad(set_to_none=True)
