"""bench.py runs, its contenders do the same work, and it counts memory as one would by hand."""
import re

import torch
from torch import nn

import bench


def test_every_part_reports_ours_and_a_ratio(capsys):
    bench.main(["--size", "32", "--arch", "resnet18", "--batch-size", "4", "--threads", "1",
                "--repeats", "1", "--images", "300", "--pairs", "256"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[0] for line in lines} == set(bench.PARTS)
    contenders = len(bench.losses())    # of the loss, in time and in memory
    assert len(lines) == 12 + 2 * contenders + torch.cuda.is_available()  # memory is measured, too
    for part in bench.PARTS:
        first = next(line for line in lines if line.startswith(part))
        assert first.endswith("1.00 x ours")
    figures = [re.search(r"([\d.]+) (ms|images|GiB|MiB|s)\b", line)[1] for line in lines]
    assert all(float(figure) > 0 for figure in figures)


def test_memory_is_what_a_convolution_a_norm_and_a_relu_keep():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    one, three = (bench.saved_bytes(net, torch.randn(n, 1, 16, 16)) for n in (1, 3))
    # Of each image, in two bytes a value: the input, what the norm reads, what the ReLU gives.
    assert three - one == 2 * (1 + 8 + 8) * 16 * 16 * 2
