"""bench.py runs, its contenders do the same work, and it counts memory as one would by hand."""
import json
import multiprocessing
import re

import pytest
import torch
from torch import nn

import bench

TINY = ["--size", "32", "--arch", "resnet18", "--batch-size", "4", "--threads", "1",
        "--repeats", "1", "--images", "300", "--rows", "3000", "--pairs", "256"]


def test_every_part_reports_ours_and_a_ratio(capsys, tmp_path, monkeypatch, forkserver):
    """The processes that it would spawn are forked, which saves their imports."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forkserver)
    bench.main([*bench.PARTS, *TINY, "--json", str(tmp_path / "figures.json")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[0] for line in lines} == set(bench.PARTS)
    for part in bench.PARTS:
        first = next(line for line in lines if line.startswith(part))
        assert first.endswith("1.00 x ours")
    units = "ms|images|pairs|GiB|MiB|s|MB|kB"
    figures = [re.search(rf"([\d.]+) ({units})\b", line)[1] for line in lines]
    assert len(figures) > 40

    # The same lines in the file, each with what it depends on.
    entries = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["part"] for entry in entries] == [line.split()[0] for line in lines]
    # Of a few pairs the peak of memory may lie below what Linux counts in.
    assert all(entry["figure"] > 0 for entry in entries if not entry["unit"].startswith("MiB"))
    assert all(entry["torch"] == torch.__version__ and entry["commit"] and entry["processor"]
               and entry["flags"]["size"] == "32" for entry in entries)

    # What a figure was not measured with does not stand beside it: `step` has pairs of its own.
    assert all(("batch_size" in entry["flags"]) == (entry["part"] != "step") for entry in entries)

    # Both sides of a comparison that must not differ, or must: bytes of the loss are known.
    by_name = {(entry["part"], entry["unit"], entry["contender"]): entry["figure"]
               for entry in entries}
    received = [figure for (part, unit, _), figure in by_name.items()
                if part == "scaling" and unit.startswith("kB") and "loss" in unit]
    assert received[0] >= 2 * 4 * 128 * 4 / 1000    # the other process's projections
    assert received[1] > 2 * received[0]


def test_parts_that_take_minutes_run_only_where_they_are_named(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "PARTS", {
        name: part._replace(run=lambda args, folder, name=name: ran.append(name))
        for name, part in bench.PARTS.items()})
    bench.main([])
    assert ran == ["prepare", "loader", "loss", "memory"] + torch.cuda.is_available() * [
        "step", "fed"]
    with pytest.raises(SystemExit):
        bench.main(["nothing"])


@pytest.mark.parametrize("form", bench.STEMS)
def test_stem_computed_in_another_way_is_the_same(form):
    convolution = nn.Conv2d(1, 8, 7, stride=2, padding=3, bias=False)
    x = torch.randn(2, 1, 20, 20)
    expected, found = convolution(x), bench.Stem(convolution, form)(x)
    assert found.shape == expected.shape == (2, 8, 10, 10)
    assert torch.allclose(found, expected, atol=1e-5)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weight).sum(), convolution.weight)[0]
                 for y in (expected, found)]
    assert torch.allclose(*gradients, atol=1e-3)


def test_memory_is_what_a_convolution_a_norm_and_a_relu_keep():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    one, three = (bench.saved_bytes(net, torch.randn(n, 1, 16, 16)) for n in (1, 3))
    # Of each image, in two bytes a value: the input, what the norm reads, what the ReLU gives.
    assert three - one == 2 * (1 + 8 + 8) * 16 * 16 * 2
