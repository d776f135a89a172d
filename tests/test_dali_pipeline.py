"""The pure functions of sampling and views, and DALI's tensors against
independent ones."""
import dataclasses
import functools
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, smooth_image, write_folder
from PIL import Image
from torchvision.transforms import v2

import prepare
from common import ImageError
from dali_pipeline import Preprocessing, eval_loader, train_loader
from manifest import read_manifest
from model import MEAN, STD
from philox import PARTNER, VIEW, uniform_numbers
from sampling import partners_drawn, weighted_order
from views import Augmentation, batch_at, shuffled_order, view_parameters

STRONG = Augmentation(crop_area=(0.3, 1.0), rotation=25.0, blur=(0.1, 2.0), flip=0.5,
                      brightness=0.4, contrast=0.4)


# ----------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (12, 5), (100, 1)])
def test_every_epoch_shows_every_image_once(n, batch_size):
    images, order = np.arange(n) * 3 + 1, functools.partial(shuffled_order, n, 0)
    batches = [batch_at(step, batch_size, images, order) for step in range(3 * n)]
    positions, index = (np.concatenate(x) for x in zip(*batches))
    assert positions.tolist() == list(range(3 * n * batch_size))
    for epoch in range(3):
        assert sorted(index[positions // n == epoch]) == sorted(images)
    assert index[:n].tolist() != index[n:2 * n].tolist() or n < 8                   # another order
    another_seed = functools.partial(shuffled_order, n, 1)
    other = [batch_at(step, batch_size, images, another_seed)[1] for step in range(3 * n)]
    assert index.tolist() != np.concatenate(other).tolist()


def test_random_numbers_are_numpys_philox():
    """One object of NumPy's for each image and view, with the largest seed and indices, too."""
    epochs, images = np.array([0, 1, 99, 2**40]), np.array([0, 7, 10**6, 2**62])
    for seed, view in ((0, 0), (5, 1), (2**63 - 1, 3)):
        for column, epoch, image in zip(uniform_numbers((seed, VIEW), 9, view, images, epochs).T,
                                        epochs.tolist(), images.tolist()):
            philox = np.random.Philox(key=[seed, VIEW], counter=[0, view, image, epoch])
            assert column.tolist() == np.random.Generator(philox).random(9).tolist()


def test_a_part_of_a_batch_is_that_part():
    images, order = np.arange(10) * 3, functools.partial(shuffled_order, 10, 0)
    for step in range(8):                           # some of them across two epochs, or three
        whole = batch_at(step, 12, images, order)
        for part in (slice(0, 4), slice(4, 12), slice(11, 12)):
            own = batch_at(step, 12, images, order, part)
            assert all(np.array_equal(a, b[part]) for a, b in zip(own, whole))


def one_view(augmentation, seed, positions, images, view):
    """The parameters of view number `view` alone."""
    parameters = view_parameters(augmentation, seed, positions, images, 2)
    return {name: values[view] for name, values in parameters.items()}


def test_views_depend_on_seed_position_image_and_view_alone():
    images, positions = np.array([5, 900, 3]), np.array([2, 3, 2])
    together = view_parameters(STRONG, 7, positions, images, 2)
    alone = view_parameters(STRONG, 7, positions[1:2], images[1:2], 2)
    fewer = view_parameters(STRONG, 7, positions, images, 1)
    for name, values in together.items():
        assert np.array_equal(values[:, 1:2], alone[name])
        assert np.array_equal(values[:1], fewer[name])
    for other in ((8, positions, images), (7, positions + 1, images),
                  (7, positions, images + 1)):
        assert not np.isclose(together["angle"], view_parameters(STRONG, *other, 2)["angle"]).any()
    assert not np.isclose(*together["angle"]).any()


def test_view_parameters_keep_their_ranges_and_fill_them():
    n = 4000
    p = one_view(STRONG, 0, np.zeros(n, int), np.arange(n), 0)
    height, width = (p["roi_end"] - p["roi_start"]).T
    assert (p["roi_start"] >= 0).all() and (p["roi_end"] <= 1).all()
    area, aspect = height * width, width / height
    assert 0.299 < area.min() < 0.32 and 0.98 < area.max() < 1.001
    assert 0.7499 < aspect.min() < 0.77 and 1.31 < aspect.max() < 1.3334
    assert -25 <= p["angle"].min() < -24 and 24 < p["angle"].max() <= 25
    assert 0.1 <= p["sigma"].min() < 0.12 and 1.98 < p["sigma"].max() <= 2
    assert p["mirror"].mean() == pytest.approx(0.5, abs=0.03)
    b = 255 * MEAN / p["mean"]
    c = 255 * STD / p["std"] / b
    assert 0.6 < b.min() < 0.62 and 1.38 < b.max() < 1.4001
    assert 0.5999 < c.min() < 0.62 and 1.38 < c.max() < 1.4001
    top, left = p["roi_start"].T
    numbers = np.stack([top / (1 - height).clip(1e-3), left / (1 - width).clip(1e-3), area,
                        p["angle"], p["sigma"], p["mirror"], b, c])
    assert abs(np.corrcoef(numbers) - np.eye(len(numbers))).max() < 0.06  # drawn independently


@pytest.mark.parametrize("n, spread", [(7, 0.0), (50, 1.0), (1000, 0.3), (1000, 3.0)])
def test_each_image_is_drawn_as_often_as_its_weight_says(n, spread):
    """The floor or the ceiling of its expectation in every epoch, which still has n draws."""
    weights = np.exp(np.random.default_rng(0).normal(0, spread, n))
    expected, total = n * weights / weights.sum(), np.zeros(n)
    for epoch in range(200):
        order = weighted_order(weights, 3, epoch)
        assert order.shape == (n,)
        draws = np.bincount(order, minlength=n)
        assert (np.floor(expected + 1e-9) <= draws).all()
        assert (draws <= np.ceil(expected - 1e-9)).all()
        total += draws
    # A draw beyond the floor has the probability of what is beyond it.
    p = expected % 1
    assert (np.abs(total / 200 - expected) <= 5 * np.sqrt(p * (1 - p) / 200) + 1e-9).all()
    assert np.array_equal(order, weighted_order(weights, 3, 199))
    assert not np.array_equal(order, weighted_order(weights, 4, 199))
    two_weights = np.repeat([1, 3], [12, 12])
    together = [np.bincount(weighted_order(two_weights, 0, e))[:2] for e in range(300)]
    assert np.prod(together, 1).mean() == pytest.approx(0.25, abs=0.1)      # neighbours are free


def test_batches_of_an_order_are_cut_from_its_epochs():
    images, weights = np.arange(10) * 3, np.arange(1.0, 11)
    order = functools.partial(weighted_order, weights, 0)
    sequence = np.concatenate([images[order(epoch)] for epoch in range(10)])
    for step in range(8):
        positions, index = batch_at(step, 12, images, order)
        assert index.tolist() == sequence[12 * step:12 * (step + 1)].tolist()
        assert positions.tolist() == list(range(12 * step, 12 * (step + 1)))
        part = batch_at(step, 12, images, order, slice(3, 9))
        assert np.array_equal(part, (positions[3:9], index[3:9]))


def test_partners_are_other_images_of_the_group():
    """Each of them with the same probability, and only of those that may be drawn."""
    rng = np.random.default_rng(0)
    numbers, images = rng.integers(0, 12, 40), np.sort(rng.choice(40, 30, replace=False))
    partners, seen = partners_drawn(numbers, images, 7), np.zeros((40, 40))
    for epoch in range(600):
        found = partners(np.full(30, epoch), images)
        seen[images, found] += 1
    for i in images:
        others = [j for j in images if numbers[j] == numbers[i] and j != i]
        assert set(np.flatnonzero(seen[i])) == set(others or [i])
        assert seen[i][others or [i]] == pytest.approx(600 / max(1, len(others)), rel=0.3)
    # One image of a batch, by hand.
    others = [j for j in images if numbers[j] == numbers[images[5]] and j != images[5]]
    assert len(others) > 1
    philox = np.random.Philox(key=[7, PARTNER], counter=[0, 0, images[5], 599])
    assert found[5] == others[int(np.random.Generator(philox).random() * len(others))]


# -------------------------------------------------------------------------------------------- views

def independent_view(manifest, preprocessing, parameters, i):
    """Pillow crops and resizes, torchvision rotates, blurs and mirrors, in floats: (S, S)
    normalised. And where it can be compared, (S, S): away from the edge that rotation draws, which
    DALI and torchvision fade differently."""
    p = {name: values[0] for name, values in parameters.items()}
    image, size = Image.open(manifest.folder / manifest.paths[i]), preprocessing.image_size
    (top, left), (bottom, right) = p["roi_start"], p["roi_end"]
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    x = image.convert("F").resize((size, size), Image.Resampling.BILINEAR,
                                  box=tuple(map(float, box)))
    x = torch.from_numpy(np.stack([x, np.ones_like(x)]))  # beside it, a white image
    x = v2.functional.rotate(x, float(p["angle"]), v2.InterpolationMode.BILINEAR, fill=0.0)
    reach = math.ceil(4 * p["sigma"])
    x[0] = v2.functional.gaussian_blur(x[:1], [2 * reach + 1] * 2, [float(p["sigma"])] * 2)[0]
    inside = -torch.nn.functional.max_pool2d(-x[1:], 2 * reach + 3, 1, reach + 1)[0] > 0.999
    if p["mirror"]:
        x, inside = x.flip(-1), inside.flip(-1)
    b = 255 * MEAN / p["mean"]
    c = 255 * STD / p["std"] / b
    # Brightness, then contrast
    return ((c * (b * x[0] / 255 - MEAN) + MEAN - MEAN) / STD).numpy(), inside.numpy()


@pytest.mark.parametrize("image_size", [32, 96])
def test_views_equal_an_independent_computation(data, image_size):
    manifest, preprocessing = read_manifest(data), Preprocessing(image_size)
    train = manifest.images("train")
    loader = train_loader(manifest, train, 16, range(2), 2, STRONG, preprocessing, 0, "cpu")
    for view1, view2, index in loader:
        assert view1.shape == view2.shape == (16, 1, image_size, image_size)
        assert view1.dtype == torch.float32
        for k, i in enumerate(index.tolist()):
            for number, view in enumerate((view1, view2)):
                p = one_view(STRONG, 0, np.array([k]), np.array([i]), number)
                expected, inside = independent_view(manifest, preprocessing, p, i)
                assert inside.mean() > 0.05
                error = np.abs(view[k, 0].numpy() - expected)[inside] * p["std"]
                # Gray levels: DALI rounds after each of three steps
                assert error.max() < 2.5 and error.mean() < 0.6
        break  # the second step belongs to the next epoch in part


@pytest.mark.parametrize("weighted, paired", [(False, False), (True, False), (True, True)])
def test_batches_are_the_same_from_any_step_and_on_any_number_of_processes(data, weighted, paired):
    manifest = read_manifest(data)
    weights = 1.0 + np.arange(60) % 5 if weighted else None
    numbers = np.arange(60) // 4 if paired else None

    def batches(steps, rank=0, world_size=1):
        return list(train_loader(manifest, manifest.images("train"), 8, steps, 2, STRONG,
                                 Preprocessing(32), 3, "cpu", rank, world_size,
                                 draw_weights=weights, pair_group=numbers))

    whole = batches(range(8))                                   # across the seam at step 5.25
    for expected, got in zip(whole[5:], batches(range(5, 8)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    shards = [batches(range(8), rank, 4) for rank in range(4)]
    for expected, *parts in zip(whole, *shards, strict=True):
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(expected, zip(*parts), strict=True))
    view1, _, index = map(torch.cat, zip(*whole[:5]))                       # of one epoch
    again = [(i, j) for i in range(40) for j in range(i) if index[i] == index[j]]
    assert bool(again) == weighted
    assert not any(torch.equal(view1[i], view1[j]) for i, j in again)       # other views


def test_outputs_stay_what_they_were(data):
    """Zero copies, and still nobody writes into a batch that is held."""
    manifest = read_manifest(data)
    train, held = manifest.images("train"), []
    loader = train_loader(manifest, train, 8, range(12), 2, STRONG, Preprocessing(32), 0, "cpu")
    for view1, _, _ in loader:
        held.append((view1, view1.clone()))
    assert all(torch.equal(a, b) for a, b in held)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_shows_every_image_once_whole_and_in_order(data, world_size):
    manifest, preprocessing = read_manifest(data), Preprocessing(48)
    val = manifest.images("val")
    for rank in range(world_size):
        batches = list(eval_loader(manifest, val, 4, preprocessing, "cpu", rank, world_size))
        index = torch.cat([index for _, index in batches])
        assert index.tolist() == val[rank::world_size].tolist()
        x = torch.cat([x for x, _ in batches])
        for k, i in enumerate(index.tolist()):
            image = Image.open(data / manifest.paths[i]).convert("F")
            image = image.resize((48, 48), Image.Resampling.BILINEAR)
            error = x[k, 0].numpy() - (np.array(image) / 255 - MEAN) / STD
            assert np.abs(error).max() < 2.1 / 255 / STD
    assert list(eval_loader(manifest, val[:1], 4, preprocessing, "cpu", 1, 2)) == []


def test_normalisation_of_each_image_and_clahe(folder):
    rng = np.random.default_rng(0)
    faint = (100 + 20 * rng.random((64, 64))).astype(np.uint8)
    Image.fromarray(faint).save(folder / "images/000_0.jpg", quality=95)
    Image.new("L", (64, 64), 77).save(folder / "images/000_1.jpg")                   # blank
    manifest = read_manifest(folder)

    def first_two(**options):
        loader = eval_loader(manifest, np.arange(2), 2, Preprocessing(64, **options), "cpu")
        return next(iter(loader))[0]

    plain, image, clahe = first_two(), first_two(normalize="image"), first_two(clahe=True)
    assert plain[0].std() < 0.15 < 0.2 < clahe[0].std()
    assert image[0].mean().abs() < 0.05 and image[0].std().item() == pytest.approx(1, abs=0.1)
    assert image[1].isfinite().all() and image[1].abs().max() < 0.1
    views = next(iter(train_loader(manifest, np.arange(2), 2, range(1), 2, Augmentation(),
                                   Preprocessing(64, "image", True), 0, "cpu")))
    assert all(view.isfinite().all() for view in views[:2])


def other_machine(image, exponent=1.0, equalize=0, normalize="fixed"):
    """In NumPy: (S, S) gray levels 0 to 255 with a flat histogram, then to a power, then
    normalised."""
    if equalize and np.ptp(image):
        share = np.cumsum(np.bincount(image.ravel(), minlength=256)) / image.size
        image = np.rint(255 * (share - share[image.min()]) / (1 - share[image.min()]))[image]
    x = (image / 255.0) ** exponent
    if normalize == "image":
        x = MEAN + STD * (x - x.mean()) / np.sqrt(x.var() + 255.0 ** -2)
    return x


@pytest.mark.parametrize("normalize", ["fixed", "image"])
@pytest.mark.parametrize("options", [
    {"gamma": (0.4, 2.5)}, {"equalize": 0.5}, {"equalize": 1.0}, {"equalize": 1e-9},
    {"gamma": (0.4, 2.5), "equalize": 0.5}])
def test_gray_levels_as_other_machines_give_them(tmp_path, options, normalize):
    """Whole images, none of them resized, turned or blurred, so that nothing rounds."""
    folder, n = write_folder(tmp_path / "folder"), 42
    rng = np.random.default_rng(0)
    images = [np.clip(smooth_image(rng, 48, 48) // 2 + i, 0, 255) for i in range(n)]
    images[3][:] = 90                                                               # blank
    manifest = read_manifest(folder)
    for path, image in zip(manifest.paths, images):
        Image.fromarray(image).save(folder / path, format="PNG")
    augmentation = Augmentation((1.0, 1.0), 0.0, (0.0, 0.0), **options)
    loader = train_loader(manifest, np.arange(n), n, range(1), 2, augmentation,
                          Preprocessing(48, normalize), 5, "cpu")
    view1, view2, index = next(iter(loader))
    drawn = []
    for k, i in enumerate(index.tolist()):
        for number, view in enumerate((view1, view2)):
            p = one_view(augmentation, 5, np.array([k]), np.array([i]), number)
            p = {name: values[0] for name, values in p.items()}
            drawn.append((float(p.get("gamma", 1)), int(p.get("equalize", 0))))
            x = other_machine(images[i], *drawn[-1], normalize)
            x = (255 * x - p["mean"]) / p["std"]
            x = x[:, ::-1] if p["mirror"] else x
            error = np.abs(view[k, 0].numpy() - x) * p["std"]                       # gray levels
            assert error.max() < (2e-3 if normalize == "fixed" else 0.02)
    exponents, switches = np.array(drawn).T
    if "gamma" in options:
        assert 0.4 <= exponents.min() < 0.45 and 2.2 < exponents.max() <= 2.5
        assert np.log(exponents).mean() == pytest.approx(0, abs=0.2) and len(set(exponents)) == 84
    assert switches.mean() == pytest.approx(options.get("equalize", 0), abs=0.15)


def test_other_gray_levels_move_no_other_number():
    images, positions = np.arange(50), np.full(50, 3)
    before = one_view(STRONG, 7, positions, images, 1)
    assert not {"gamma", "equalize"} & before.keys()
    changed = dataclasses.replace(STRONG, gamma=(0.5, 2.0), equalize=0.3)
    after = one_view(changed, 7, positions, images, 1)
    assert all(np.array_equal(values, after[name]) for name, values in before.items())
    u = np.stack([np.random.Generator(np.random.Philox(key=[7, VIEW], counter=[0, 1, i, 3])).random(
        11) for i in images])
    assert after["gamma"] == pytest.approx(0.5 * 4 ** u[:, 9], rel=1e-6)
    assert np.array_equal(after["equalize"], u[:, 10] < 0.3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("numbers", [np.arange(60) // 3, np.arange(60) % 21, np.arange(60)])
def test_the_second_view_is_of_another_image(folder, data, numbers, packed):
    """The loader's tensors are those of the two files, decoded alone; images without another one
    stand beside images with one, and make up the last case."""
    if packed:
        shutil.copytree(data, folder, dirs_exist_ok=True)
        prepare.main(["pack", str(folder), "--workers", "1"])
    manifest = read_manifest(folder if packed else data)
    train = manifest.images("train")
    plain = Augmentation((1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.0, 0.0)
    for preprocessing in (Preprocessing(48), Preprocessing(48, "image", True)):
        alone = next(iter(eval_loader(manifest, np.arange(60), 60, preprocessing, "cpu")))[0]
        loader = train_loader(manifest, train, 14, range(3), 2, plain, preprocessing, 3, "cpu",
                              pair_group=numbers)
        pairs = []
        for view1, view2, index in loader:
            other = [int((alone - view).abs().amax((1, 2, 3)).argmin()) for view in view2]
            assert torch.equal(view1, alone[index]) and torch.equal(view2, alone[other])
            pairs += zip(index.tolist(), other)
        assert sorted(i for i, _ in pairs) == train.tolist()
        for i, j in pairs:
            others = set(train[numbers[train] == numbers[i]]) - {i}
            assert j in (others or {i})


@pytest.mark.parametrize("damage", ["truncate", "text"])
def test_second_image_that_cannot_be_read_is_named(folder, damage):
    """An image that is never an anchor in these steps, and once another one's partner."""
    manifest, seed = read_manifest(folder), 0
    train = manifest.images("train")
    order = functools.partial(shuffled_order, len(train), seed)
    positions, anchors = batch_at(0, 2, train, order)
    partners = partners_drawn(manifest.patient_numbers(), train, seed)
    bad = next(iter(set(partners(positions, anchors)) - set(anchors)))
    path = folder / manifest.paths[bad]
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2] if damage == "truncate" else b"no image")
    with pytest.raises(ImageError, match=f"{path.name} .row {bad + 2} of .* cannot be read"):
        list(train_loader(manifest, train, 2, range(1), 2, STRONG, Preprocessing(32), seed, "cpu",
                          pair_group=manifest.patient_numbers()))


def test_second_image_that_never_arrives_is_named(folder):
    """In a process of its own, which ends."""
    pipe = folder / "images/001_2.jpg"
    script = f"""
import os, sys, time
import numpy as np
import culprit
from dali_pipeline import Work
from manifest import read_manifest
manifest = read_manifest({str(folder)!r})
os.remove({str(pipe)!r})
os.mkfifo({str(pipe)!r})
culprit.PATIENCE = 1
work = Work(np.array([0, 1]), {{}}, np.array([0, 5]))
with culprit.Watch(manifest, [(work, [])], load_alone=None):
    time.sleep(60)
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, timeout=50,
                             capture_output=True)
    assert process.returncode == 1
    assert "001_2.jpg (row 7 of manifest.csv) cannot be read: nothing has come" in process.stderr


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty", "text"])
def test_image_that_cannot_be_read_is_named(folder, damage):
    manifest = read_manifest(folder)
    path = folder / manifest.paths[3]
    content = path.read_bytes()
    {"delete": path.unlink, "truncate": lambda: path.write_bytes(content[:len(content) // 2]),
     "empty": lambda: path.write_bytes(b""), "text": lambda: path.write_text("no image")}[damage]()
    complaint = r"images/001_0.jpg \(row 5 of manifest.csv\) cannot be read"
    with pytest.raises(ImageError, match=complaint):
        list(eval_loader(manifest, np.arange(12), 4, Preprocessing(32), "cpu"))


@pytest.mark.parametrize("content", [b"no image", b"\xff\xd8\xff\xe0\x00", None])
def test_bad_image_in_a_large_batch_does_not_crash_the_process(tmp_path, start_forked, content):
    """In a process of its own: the decoder alone ends it by a segmentation fault, mostly."""
    folder = write_folder(tmp_path / "folder", patients=60)
    bad = folder / "images/007_1.jpg"
    bad.write_bytes(content or bad.read_bytes()[:200])
    code, output = start_forked("pretrain.py", *SMALL, "--batch-size", "64", "--epochs", "8",
                                "--data", folder, "--out", tmp_path / "run").to_end()
    assert code == 1 and "images/007_1.jpg (row 24 of manifest.csv) cannot be read" in output


@pytest.mark.gpu
def test_gpu_views_equal_cpu_views(tmp_path):
    """Up to the JPEG decoders' rounding: within two gray levels on average, 99 %
    within six."""
    manifest = read_manifest(write_folder(tmp_path / "folder"))
    train = manifest.images("train")
    curved = dataclasses.replace(STRONG, gamma=(0.8, 1.5), equalize=0.5)
    for options, augmentation in (({}, STRONG), ({"normalize": "image"}, STRONG),
                                  ({"clahe": True}, STRONG), ({}, curved)):
        cpu, gpu = (next(iter(train_loader(
            manifest, train, 16, range(1), 2, augmentation, Preprocessing(64, **options), 0, device
        ))) for device in ("cpu", "cuda"))
        assert torch.equal(cpu[2], gpu[2]) and gpu[0].device.type == "cuda"
        for a, b in zip(cpu[:2], gpu[:2], strict=True):
            error = (a.float() - b.float().cpu()).abs() * STD * 255
            assert error.mean() < 2 and error.quantile(0.99) < 6


@pytest.mark.gpu
def test_clahe_on_a_gpu_is_that_on_a_cpu(tmp_path):
    """Whole images of 40 to 69 pixels, which no eight tiles fit: what remains is the resizing's
    rounding."""
    manifest = read_manifest(write_folder(tmp_path / "folder"))
    cpu, gpu = (next(iter(eval_loader(manifest, np.arange(60), 60, Preprocessing(64, clahe=True),
                                      device)))[0].cpu() for device in ("cpu", "cuda"))
    error = (cpu - gpu).abs() * STD * 255
    assert error.mean() < 0.1 and error.max() < 1.5
