"""Training steps, and everything they saw, for test_distributed.py."""
import functools
import signal

import torch
import torch.distributed as dist
from conftest import ROOT  # noqa: F401  (puts the project on the path)

from dali_pipeline import Preprocessing, train_loader
from loss import diagnostics, nt_xent
from manifest import read_manifest
from model import SimCLR, build_encoder
from run import Compute
from training import backward_in_pieces
from views import Augmentation

STEPS, RESUMED = 6, 5


def train(compute, data, live, first=0, state=None):
    """The steps from `first` on, each a dict, and the network's state before step RESUMED.

    Batch norm is frozen, by its running statistics, or live, by the statistics of the batch of
    all processes. In double precision, because in float32 another order of summation can push an
    activation over a ReLU's edge, and a gradient jumps by a thousandth. Live batch norm of small
    images amplifies even the rest from step to step, so that there the weights stay as they are."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18")
    encoder.layer4, encoder.num_features = torch.nn.Identity(), 256     # a quarter of the weights
    net = compute.prepare(SimCLR(encoder)).train(live)
    precision, lr = torch.float64, 0.0 if live else 1e-3
    net.to(precision)
    if state:
        net.load_state_dict(state)
    model = compute.data_parallel(net)
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr), torch.amp.GradScaler(enabled=False)
    manifest, steps = read_manifest(data), []
    loss_of = functools.partial(nt_xent, temperature=0.07)
    loader = train_loader(
        manifest, manifest.images("train"), 8, range(first, STEPS), 2, Augmentation(),
        Preprocessing(32), 0, "cpu", compute.rank, compute.world_size)
    for step, (view1, view2, index) in enumerate(loader, first):
        if step == RESUMED:
            state = {name: value.clone() for name, value in net.state_dict().items()}
        views = view1.to(precision), view2.to(precision)
        x = torch.cat(views)
        if step == first:
            compute.rehearse(model, tuple(x.shape))
        in_pieces = {}
        if not live:                    # a piece has a batch norm of its own
            backward_in_pieces(model, *views, 2, loss_of, scaler, compute)
            in_pieces = {"gradient in pieces": gradient_of(net)}
            optimizer.zero_grad()
        z1, z2 = model(x).chunk(2)
        loss = loss_of(z1, z2)
        loss.backward()
        steps.append({"index": index, "views": torch.stack([view1, view2]), "loss": loss.detach(),
                      "top1": diagnostics(z1, z2)["top1"], "gradient": gradient_of(net),
                      "statistics": torch.cat([b.flatten().float() for b in net.buffers()])}
                     | in_pieces)
        optimizer.step()
        optimizer.zero_grad()
    return steps, state


def gradient_of(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def steps_of_both(compute, data):
    """{"frozen" and "live": all steps; and the same with " resumed": those after a resume}."""
    recorded = {}
    for name, live in (("frozen", False), ("live", True)):
        recorded[name], state = train(compute, data, live)
        recorded[f"{name} resumed"], _ = train(compute, data, live, RESUMED, state)
    return recorded


def one_of(rank, world_size, data, folder):
    """As one of several processes: what `steps_of_both` returns, in a file."""
    signal.alarm(400)                       # its end, whatever it waits for
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world_size)
    compute = Compute(rank, world_size, torch.device("cpu"), "fp32", 1)
    torch.save(steps_of_both(compute, data), folder / f"{rank}.pt")
    dist.destroy_process_group()
