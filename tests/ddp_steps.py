"""Run under torchrun by test_distributed.py: training steps with batch norm frozen, and
everything they saw written down.

    torchrun --nproc_per_node=W tests/ddp_steps.py DATA OUT

writes OUT/rank.pt, a list of steps, on each process.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import ROOT  # noqa: F401  (puts the project on the path)
from torch.nn.parallel import DistributedDataParallel

from dali_pipeline import Augmentation, Preprocessing, train_loader
from loss import diagnostics, nt_xent
from manifest import read_manifest
from model import SimCLR, build_encoder

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
net = SimCLR(build_encoder("resnet18")).eval()  # eval: batch norm by its running statistics
model = DistributedDataParallel(net, gradient_as_bucket_view=True)
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
manifest, steps = read_manifest(sys.argv[1]), []
loader = train_loader(manifest, manifest.images("train"), 8, range(6), 2, Augmentation(),
                      Preprocessing(32), 0, "cpu", rank, world_size)
for view1, view2, index in loader:
    z1, z2 = model(torch.cat([view1, view2])).chunk(2)
    loss = nt_xent(z1, z2, 0.07)
    optimizer.zero_grad()
    loss.backward()
    steps.append({"index": index, "views": torch.stack([view1, view2]), "loss": loss.detach(),
                  "top1": diagnostics(z1, z2)["top1"],
                  "gradient": torch.cat([p.grad.flatten() for p in net.parameters()])})
    optimizer.step()
torch.save(steps, Path(sys.argv[2]) / f"{rank}.pt")
dist.destroy_process_group()
