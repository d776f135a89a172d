"""NT-Xent and its variants against their definition, written out in float64, on one, two and
four processes."""
import gc
import math
import signal
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT  # noqa: F401  (puts the project on the path)
from torch.multiprocessing.spawn import start_processes

import negatives
from loss import diagnostics, nt_xent

VARIANTS = {
    "published": {},
    "patients": {"patients": True},
    "weights": {"weights": True},
    "decoupled": {"decoupled": True},
    "hardness": {"hardness": 1.5},
    "prior": {"prior": 0.1},
    "hardness and prior": {"hardness": 0.5, "prior": 0.05},
    "prior, decoupled, on the floor": {"prior": 0.6, "decoupled": True},
    "everything": {"patients": True, "weights": True, "decoupled": True, "hardness": 1.0,
                   "prior": 0.1},
}


def definition(z1, z2, temperature, patients=None, weights=None, decoupled=False, hardness=0.0,
               prior=0.0):
    """The mean loss of a global batch, one anchor after the other, by the papers' equations."""
    pairs, terms = len(z1), []
    z = torch.cat([z1, z2])
    z = z / z.norm(dim=1, keepdim=True)
    patients = list(range(pairs)) if patients is None else patients.tolist()
    weights = torch.ones(pairs) if weights is None else weights
    for i in range(2 * pairs):
        similarity = z @ z[i] / temperature
        positive = similarity[(i + pairs) % (2 * pairs)].exp()
        others = [k for k in range(2 * pairs) if patients[k % pairs] != patients[i % pairs]]
        if not others:
            terms.append(0 * positive)
            continue
        similarity, n = similarity[others], len(others)
        importance = (hardness * similarity).exp() / (hardness * similarity).exp().mean()
        negatives = (importance * similarity.exp()).sum()
        negatives = (negatives - prior * n * positive) / (1 - prior)
        if prior:
            negatives = negatives.clamp_min(n * math.exp(-1 / temperature))
        denominator = negatives if decoupled else positive + negatives
        terms.append(-(positive / denominator).log())
    weights = torch.cat([weights, weights]).double()
    return (torch.stack(terms) * weights).sum() / weights.sum()


def drawn(pairs, variant):
    """Projections (2, pairs, 24) in which positives are alike, and the variant's arguments."""
    generator = torch.Generator().manual_seed(pairs)
    z = torch.randn(2, pairs, 24, dtype=torch.float64, generator=generator)
    z[1] += 0.7 * z[0]
    options = dict(VARIANTS[variant])
    if "patients" in options:
        options["patients"] = torch.randint(pairs // 2 + 1, (pairs,), generator=generator)
    if "weights" in options:
        options["weights"] = torch.rand(pairs, generator=generator)
    return z, options


def loss_and_gradient(loss, z, *args, **options):
    z = z.clone().requires_grad_()
    value = loss(*z, *args, **options)
    value.backward()
    return value.detach(), z.grad


def assert_equal(loss, gradient, expected, options):
    # A prior leaves the difference of two sums, which may be almost equal: that magnifies the
    # rounding of float32.
    tolerance = 1e-4 if "prior" in options else 1e-5
    assert loss.item() == pytest.approx(expected[0].item(), rel=tolerance, abs=1e-7)
    assert (gradient - expected[1]).norm() <= tolerance * expected[1].norm() + 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pairs, temperature", [
    (1, 0.5), (2, 0.07), (7, 0.07), (16, 1.0), (9, 0.02)])
def test_loss_and_gradient_are_those_of_the_definition(pairs, temperature, variant):
    z, options = drawn(pairs, variant)
    expected = loss_and_gradient(definition, z, temperature, **options)
    found = loss_and_gradient(nt_xent, z.float(), temperature, **options)
    assert_equal(*found, expected, options)


def small_blocks(batch):
    """Four images at a time, so that few images make several blocks, and the last is smaller. With
    room for the first of them, the backward pass computes the others once more."""
    images = batch.anchors.shape[1]
    return [slice(start, min(start + 4, images)) for start in range(0, images, 4)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_change_nothing(variant, monkeypatch):
    monkeypatch.setattr("negatives.blocks", small_blocks)
    monkeypatch.setattr("negatives.ROOM", 2 * 4 * 30)
    z, options = drawn(15, variant)
    expected = loss_and_gradient(definition, z, 0.2, **options)
    assert_equal(*loss_and_gradient(nt_xent, z.float(), 0.2, **options), expected, options)


def test_many_pairs_are_the_same_in_blocks():
    """So many that the similarities do not fit into one block; written out in float64."""
    torch.manual_seed(0)
    z = torch.randn(2, 700, 16, dtype=torch.float64, requires_grad=True)
    anchors = F.normalize(z.flatten(0, 1), dim=1)
    logits = (anchors @ anchors.T / 0.07).fill_diagonal_(-torch.inf)
    reference = F.cross_entropy(logits, torch.arange(1400).roll(700))
    gradient, = torch.autograd.grad(reference, z)
    z32 = z.detach().float().requires_grad_()
    assert len(negatives.blocks(negatives.gather_batch(*z32, None, None))) > 1
    loss = nt_xent(*z32, 0.07)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert (z32.grad - 3 * gradient).norm() < 1e-5 * gradient.norm()
    nearest = logits.argmax(1) == torch.arange(1400).roll(700)
    assert diagnostics(*z32)["top1"].item() == pytest.approx(nearest.float().mean().item())


# --------------------------------------------------------------------------------------------------
# Several processes.

def one_of(rank, world_size, folder):
    """A process of `distributed`: its slice of each variant's batch, its loss and gradient."""
    signal.alarm(400)                       # its end, whatever it waits for
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world_size)
    negatives.blocks, negatives.ROOM = small_blocks, 2 * 4 * 48
    found = {}
    for variant in VARIANTS:
        z, options = drawn(24, variant)
        own = slice(24 // world_size * rank, 24 // world_size * (rank + 1))
        for name in ("patients", "weights"):
            if name in options:
                options[name] = options[name][own]
        watched = {name: options[name] for name in ("patients", "weights", "decoupled")
                   if name in options}
        found[variant] = (*loss_and_gradient(nt_xent, z[:, own].float(), 0.2, **options),
                          diagnostics(*z[:, own], **watched))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def distributed(request, tmp_path_factory, forkserver):
    """What every process found, in the order of the ranks; real processes under gloo."""
    folder = tmp_path_factory.mktemp("processes")
    start_processes(one_of, (request.param, folder), request.param, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_change_nothing(distributed, variant):
    z, options = drawn(24, variant)
    expected = loss_and_gradient(definition, z, 0.2, **options)
    losses, gradients, watched = zip(*(found[variant] for found in distributed))
    # DistributedDataParallel would take the mean of the gradients over the processes.
    gradient = torch.cat(gradients, 1) / len(distributed)
    assert_equal(torch.stack(losses).mean(), gradient, expected, options)
    # The chance level is what the definition says of projections that are all the same.
    alike = torch.ones(2, 24, 1, dtype=torch.float64)
    means = {name: torch.stack([w[name] for w in watched]).mean().item() for name in watched[0]}
    assert means["chance"] == pytest.approx(definition(*alike, 0.2, **options).item(), rel=1e-5)
    options = {name: options[name] for name in ("patients",) if name in options}
    assert means["top1"] == pytest.approx(share_on_top(*z, **options))


def share_on_top(z1, z2, patients=None):
    """How many of the anchors are nearer to their positive than to any negative."""
    patients = torch.arange(len(z1)) if patients is None else patients
    patients = torch.cat([patients, patients])
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    negatives = (z @ z.T).masked_fill(patients[:, None] == patients, -torch.inf).amax(1)
    return ((z * z.roll(len(z1), 0)).sum(1) > negatives).double().mean().item()


# --------------------------------------------------------------------------------------------------
# Special cases.

def test_image_that_stands_twice_in_a_batch_is_not_its_own_negative():
    """Then copies of a batch's images push nobody: only the mean's divisor changes."""
    z, patients = torch.randn(2, 5, 16), torch.arange(5)
    twice = torch.cat([z, z], dim=1)
    loss = nt_xent(*twice, 0.5, patients.repeat(2), decoupled=True)
    once = nt_xent(*z, 0.5, patients, decoupled=True)
    # Every other image is there twice as well, which adds ln 2 to the sum over the negatives.
    assert loss.item() == pytest.approx(once.item() + math.log(2), rel=1e-5)


@pytest.mark.parametrize("variant", ["patients", "everything"])
def test_anchors_without_negatives_have_no_loss(variant):
    z, options = torch.randn(2, 6, 16, requires_grad=True), VARIANTS[variant]
    options = options | {"patients": torch.zeros(6, dtype=torch.long)}
    if "weights" in options:
        options["weights"] = torch.ones(6)
    loss = nt_xent(*z, 0.07, **options)
    loss.backward()
    assert loss == 0 and not z.grad.any()
    options = {name: options[name] for name in ("patients", "weights", "decoupled")
               if name in options}
    assert diagnostics(*z, **options)["chance"] == 0


def test_weights_of_zero_leave_images_out_of_the_mean_but_not_of_the_negatives():
    z = torch.randn(2, 6, 16)
    weights = torch.tensor([1.0, 0, 0, 0, 0, 0])
    first = nt_xent(*z, 0.5, weights=weights)
    assert first.item() == pytest.approx(nt_xent(*z, 0.5, weights=7 * weights).item())
    logits = F.normalize(z.flatten(0, 1), dim=1) @ F.normalize(z[:, 0], dim=1).T / 0.5  # (12, 2)
    logits[0, 0] = logits[6, 1] = -torch.inf
    expected = F.cross_entropy(logits.T, torch.tensor([6, 0]))
    assert first.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.001, 100.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_temperatures_stay_finite(variant, temperature):
    z, options = drawn(16, variant)
    loss, gradient = loss_and_gradient(nt_xent, z.float(), temperature, **options)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_collapsed_projections_score_the_chance_level(variant):
    z, options = torch.ones(8, 16), {name: value for name, value in VARIANTS[variant].items()
                                     if name not in ("patients", "weights")}
    decoupled = options.get("decoupled", False)
    level = math.log(14 if decoupled else 15)
    tolerance = 1e-5 if options else 1e-6
    assert nt_xent(z, z, 0.07, **options).item() == pytest.approx(level, rel=tolerance)
    assert diagnostics(z, z, decoupled=decoupled)["chance"].item() == pytest.approx(level)


def test_scale_of_the_projections_does_not_matter():
    z1, z2 = torch.randn(2, 5, 16)
    scaled = nt_xent(1000 * z1, z2 / 1000, 0.1)
    assert scaled.item() == pytest.approx(nt_xent(z1, z2, 0.1).item(), rel=1e-5)


def test_float32_under_autocast():
    z1, z2 = torch.randn(2, 5, 16).bfloat16()
    z1.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z1, z2, 0.07)
    loss.backward()
    assert loss.dtype == torch.float32 and z1.grad.dtype == torch.bfloat16
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
    # Projections that differ by rounding only tell nothing apart.
    assert diagnostics(*(z[:1] * torch.rand(2, 64, 1)))["top1"] == 0
    # Neither does a batch of one patient, whose anchors have no negative.
    assert diagnostics(z, z, patients=torch.zeros(64, dtype=torch.long))["top1"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_that_are_not_finite_have_no_finite_loss(value, variant):
    """Or a run that diverges would go on, and its checkpoint be overwritten."""
    for images in (slice(2, 3), slice(None)):
        z, options = drawn(6, variant)
        z[:, images, 1] = value
        assert not nt_xent(*z.float(), 0.2, **options).isfinite()


def test_a_step_leaves_no_tensor_behind():
    """Without the garbage collector, which would come too late: a large batch would stay."""
    z = torch.randn(2, 6, 16, requires_grad=True)
    kept, gather = [], negatives.all_gather

    def remember(rows):
        kept.append(weakref.ref(gathered := gather(rows).clone()))
        return gathered

    negatives.all_gather = remember
    gc.disable()
    try:
        nt_xent(*z, 0.1).backward()
        assert kept and not any(reference() is not None for reference in kept)
    finally:
        gc.enable()
        negatives.all_gather = gather
