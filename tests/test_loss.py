"""NT-Xent against its definition, written out in float64."""
import math

import pytest
import torch

from loss import chance_level, diagnostics, nt_xent, _anchors_and_keys, _blocks


def definition(z1, z2, temperature):
    """Equation 1 of Chen et al. 2020, one pair after the other."""
    z = torch.cat([z1, z2])
    z = z / z.norm(dim=1, keepdim=True)
    n, terms = len(z1), []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = torch.stack([torch.dot(z[i], z[k]) / temperature for k in range(2 * n) if k != i])
        terms.append(others.exp().sum().log() - torch.dot(z[i], z[j]) / temperature)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("n, temperature", [(1, 0.5), (2, 0.07), (7, 0.07), (16, 1.0)])
def test_loss_and_gradient_are_those_of_the_definition(n, temperature):
    torch.manual_seed(n)
    z = torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)
    reference = definition(*z, temperature)
    gradient, = torch.autograd.grad(reference, z)
    z32 = z.detach().float().requires_grad_()
    loss = nt_xent(*z32, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert (z32.grad - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9


def test_many_pairs_are_the_same_in_blocks():
    """So many that the similarities do not fit into one block; written out in float64."""
    torch.manual_seed(0)
    z = torch.randn(2, 700, 16, dtype=torch.float64, requires_grad=True)
    anchors = torch.nn.functional.normalize(z.flatten(0, 1), dim=1)
    logits = (anchors @ anchors.T / 0.07).fill_diagonal_(-torch.inf)
    reference = torch.nn.functional.cross_entropy(logits, torch.arange(1400).roll(700))
    gradient, = torch.autograd.grad(reference, z)
    z32 = z.detach().float().requires_grad_()
    assert len(_blocks(_anchors_and_keys(*z32))) > 1
    loss = nt_xent(*z32, 0.07)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert (z32.grad - 3 * gradient).norm() < 1e-5 * gradient.norm()
    nearest = logits.argmax(1) == torch.arange(1400).roll(700)
    assert diagnostics(*z32)["top1"].item() == pytest.approx(nearest.float().mean().item())


def test_collapsed_projections_score_the_chance_level():
    z = torch.ones(8, 16)
    assert nt_xent(z, z, 0.07).item() == pytest.approx(math.log(15), rel=1e-6)
    assert chance_level(8) == pytest.approx(math.log(15))


def test_scale_of_the_projections_does_not_matter():
    z1, z2 = torch.randn(2, 5, 16)
    scaled = nt_xent(1000 * z1, z2 / 1000, 0.1)
    assert scaled.item() == pytest.approx(nt_xent(z1, z2, 0.1).item(), rel=1e-5)


def test_float32_under_autocast():
    z1, z2 = torch.randn(2, 5, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z1, z2, 0.07)
    assert loss.dtype == torch.float32
    assert loss.item() == nt_xent(z1.float(), z2.float(), 0.07).item()


def test_diagnostics():
    torch.manual_seed(0)
    z = torch.randn(64, 16)
    same, other = diagnostics(z, z), diagnostics(z, torch.randn(64, 16))
    assert same["top1"] == 1 and same["alignment"] == 0
    assert other["top1"] < 0.1
    assert other["alignment"].item() == pytest.approx(2, abs=0.3)  # of orthogonal directions
    collapsed = diagnostics(torch.ones(8, 16), torch.ones(8, 16))
    assert other["uniformity"] < -2.5 < collapsed["uniformity"]
