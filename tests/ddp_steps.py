"""Run under torchrun by test_distributed.py: training steps, and everything they saw.

    torchrun --nproc_per_node=W tests/ddp_steps.py DATA OUT frozen|live

writes OUT/rank.pt, a list of steps, on each process. Batch norm is frozen, by its running
statistics, or live, by the statistics of the batch of all processes.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import ROOT  # noqa: F401  (puts the project on the path)

from dali_pipeline import Augmentation, Preprocessing, train_loader
from loss import diagnostics, nt_xent
from manifest import read_manifest
from model import SimCLR, build_encoder
from pretrain import backward_in_pieces
from run import Compute

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
compute = Compute(rank, world_size, torch.device("cpu"), "fp32", 1)
net = compute.place(SimCLR(build_encoder("resnet18"))).train(sys.argv[3] == "live")
# Live batch norm of small images amplifies rounding errors from step to step, so that equality
# shows in double precision, and in weights that stay as they are.
precision, lr = (torch.float64, 0.0) if net.training else (torch.float32, 1e-3)
net.to(precision)
model = compute.data_parallel(net)
optimizer, scaler = torch.optim.SGD(net.parameters(), lr), torch.amp.GradScaler(enabled=False)
manifest, steps = read_manifest(sys.argv[1]), []
loader = train_loader(manifest, manifest.images("train"), 8, range(6), 2, Augmentation(),
                      Preprocessing(32), 0, "cpu", rank, world_size)


def gradient():
    return torch.cat([p.grad.flatten() for p in net.parameters()])


for view1, view2, index in loader:
    x, in_pieces = torch.cat([view1, view2]).to(precision), None
    optimizer.zero_grad()
    if not net.training:        # pieces have a batch norm of their own
        backward_in_pieces(model, x, 3, 0.07, scaler, compute)
        in_pieces = gradient()
    z1, z2 = model(x).chunk(2)
    loss = nt_xent(z1, z2, 0.07)
    optimizer.zero_grad()
    loss.backward()
    steps.append({"index": index, "views": torch.stack([view1, view2]), "loss": loss.detach(),
                  "top1": diagnostics(z1, z2)["top1"],
                  "gradient": gradient(), "gradient in pieces": in_pieces,
                  "statistics": torch.cat([b.flatten().float() for b in net.buffers()])})
    optimizer.step()
torch.save(steps, Path(sys.argv[2]) / f"{rank}.pt")
dist.destroy_process_group()
