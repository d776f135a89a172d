"""bench.py runs, and its contenders do the same work."""
import re

import bench


def test_every_part_reports_ours_and_a_ratio(capsys):
    bench.main(["--size", "32", "--arch", "resnet18", "--batch-size", "4", "--threads", "1", "--repeats", "1",
                "--images", "300"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[0] for line in lines} == set(bench.PARTS) and len(lines) == 13
    for part in bench.PARTS:
        first = next(line for line in lines if line.startswith(part))
        assert first.endswith("1.00 x ours")
    assert all(float(re.search(r"([\d.]+) (ms|images|s)\b", line)[1]) > 0 for line in lines)
