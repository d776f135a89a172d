"""The number of processes changes the speed and nothing else. Real gloo processes; whole runs are
started by torchrun."""
import json
import os
import signal

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, run, start
from ddp_steps import one_of, steps_of_both
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing.spawn import start_processes

from model import SimCLR, build_encoder
from run import Compute


@pytest.fixture(scope="module")
def steps(data, tmp_path_factory, forkserver):
    """{W: {name: {key: per step, W processes' values}}} for one, two and four processes at the same
    global batch; the names are those of steps_of_both."""
    alone = Compute(0, 1, torch.device("cpu"), "fp32", 1)
    recorded = {1: [steps_of_both(alone, data)]}
    for world_size in (2, 4):
        out = tmp_path_factory.mktemp(f"w{world_size}")
        start_processes(one_of, (world_size, data, out), world_size, start_method="forkserver")
        recorded[world_size] = [torch.load(out / f"{rank}.pt") for rank in range(world_size)]
    return {world_size: {name: {key: [[rank[name][step][key] for rank in ranks]
                                      for step in range(len(ranks[0][name]))]
                                for key in ranks[0][name][0]} for name in ranks[0]}
            for world_size, ranks in recorded.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(steps, world_size):
    """Where batch norm is frozen: a piece has a batch norm of its own."""
    for step in range(6):
        reference = steps[1]["frozen"]["gradient"][step][0]
        for gradient in steps[world_size]["frozen"]["gradient in pieces"][step]:
            tolerance = 1e-5 if world_size == 1 else 1e-4       # as without pieces
            assert (gradient - reference).norm() < tolerance * reference.norm()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("batch_norm", ["frozen", "live"])
def test_processes_see_the_same_and_learn_the_same(steps, batch_norm, world_size):
    one, many = steps[1][batch_norm], steps[world_size][batch_norm]
    for step in range(6):
        assert torch.equal(torch.cat(many["index"][step]), one["index"][step][0])
        assert torch.equal(torch.cat(many["views"][step], dim=1), one["views"][step][0])
        for name, tolerance in (("loss", 1e-5), ("top1", 1e-6)):
            mean = torch.stack(many[name][step]).mean().item()
            assert mean == pytest.approx(one[name][step][0].item(), abs=tolerance)
        reference = one["gradient"][step][0]
        for gradient in many["gradient"][step]:
            assert (gradient - reference).norm() < 1e-4 * reference.norm()
        for statistics in many["statistics"][step]:
            assert torch.equal(statistics, many["statistics"][step][0])         # nobody's differ
            assert (statistics - one["statistics"][step][0]).abs().max() < 1e-5


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_norm", ["frozen", "live"])
def test_going_on_changes_no_bit(steps, batch_norm, world_size):
    """Four processes sum a gradient's parts in an order that depends on where it lies in its
    bucket, and DistributedDataParallel moves it after its first backward pass."""
    undisturbed = steps[world_size][batch_norm]
    resumed = steps[world_size][f"{batch_norm} resumed"]
    for key in undisturbed:
        (after,) = resumed[key]
        assert all(map(torch.equal, undisturbed[key][-1], after)), key


def test_four_processes_write_one_run(data, tmp_path, run_forked):
    """Of batches in which each process has one image: batch norm takes its statistics from the
    images of all processes."""
    codes, outputs = zip(*run_forked(
        "pretrain.py", *SMALL, "--data", data, "--out", tmp_path / "run", "--batch-size", "4",
        "--max-steps", "4", "--probe-every", "1", processes=4))
    output = "".join(outputs)
    assert codes == (0, 0, 0, 0), output
    assert output.count("done:") == 1 and "(1 a process)" in output
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"loss", "chance", "alignment", "uniformity", "top1", "lr", "images_per_second",
            "wait_seconds", "wait_share", "probe/auroc", "probe/Effusion",
            "probe/Mass"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["views"]
    assert "config/text_summary" in events.Tags()["tensors"]
    table = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert b"probe/auroc" in table and b"temperature" in table
    assert len(events.Scalars("loss")) == 4


def test_bad_input_is_told_once(data, tmp_path, run_forked):
    codes, outputs = zip(*run_forked("pretrain.py", *SMALL, "--data", data, "--out",
                                     tmp_path / "run", "--batch-size", "9", processes=2))
    assert all(codes)
    assert "".join(outputs).count("--batch-size 9 is global and must be divisible by the") == 1
    assert not (tmp_path / "run").exists()


def test_terminated_job_goes_on_where_it_stopped(data, tmp_path, run_forked):
    """A cluster signals every process of the job, and torchrun passes the signal on: each hears it
    twice. What goes on needs no torchrun."""
    command = [*SMALL, "--data", data, "--out", tmp_path / "run", "--save-every", "1000"]
    job = start("pretrain.py", *command, processes=2, start_new_session=True)
    for line in job.stdout:
        if "step 00004/15 | loss" in line:
            os.killpg(job.pid, signal.SIGTERM)
            break
    rest = job.stdout.read()
    assert job.wait(60) != 0 and "SIGTERM at step" in rest, rest
    (code, output), (other_code, _) = run_forked("pretrain.py", *command, processes=2)
    assert code == other_code == 0 and "going on from" in output, output
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, 16))


def changed(folder, change):
    """A script that pre-trains after something in pretrain.py was changed."""
    file = folder / "changed.py"
    file.write_text("import datetime, functools, os, signal, sys, time\n"
                    f"sys.path.insert(0, {str(ROOT)!r})\n"
                    f"import launch, pretrain\n{change}\npretrain.main()\n")
    return file


SIGNAL_IN_STEP_7 = """
whole, step = pretrain.nt_xent, iter(range(1, 100))
def nt_xent(*arguments, **options):
    if next(step) == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(*arguments, **options)
pretrain.nt_xent = nt_xent
"""


def test_one_process_that_hears_a_signal_keeps_all_from_the_probe(data, tmp_path, run_forked):
    """After step 7 of 21 the features would be probed, for which a job that is stopped has no
    time."""
    codes, outputs = zip(*run_forked(
        changed(tmp_path, SIGNAL_IN_STEP_7), *SMALL, "--data", data, "--out", tmp_path / "run",
        "--batch-size", "6", "--probe-every", "1", processes=2))
    output = "".join(outputs)
    assert all(codes) and "SIGTERM at step 7: saved" in output, output
    assert "00000/21 | probe" in output and "00007/21 | probe" not in output


MACHINES_DIFFER = """
pretrain.launch._fastest_precision = lambda *_: ("bf16", "fp32")[int(os.environ["RANK"])]
"""


def test_machines_that_choose_another_precision_do_not_train_together(data, tmp_path, run_forked):
    """A loss scaled for float16 on one of them alone would be averaged with the other's."""
    codes, outputs = zip(*run_forked(
        changed(tmp_path, MACHINES_DIFFER), *SMALL, "--data", data, "--out", tmp_path / "run",
        "--precision", "auto", processes=2))
    assert codes == (1, 1) and not (tmp_path / "run").exists()
    assert "--precision auto is bf16 here and another one in other processes" in outputs[0]


PROCESS_1_HANGS = """
launch.main = functools.partial(launch.main, timeout=datetime.timedelta(seconds=8))
if os.environ["RANK"] == "1":
    pretrain.train_steps = lambda *arguments: time.sleep(100)
"""


def test_a_process_that_never_comes_is_told(data, tmp_path):
    code, output = run(changed(tmp_path, PROCESS_1_HANGS), *SMALL, "--data", data, "--out",
                       tmp_path / "run", processes=2)
    assert code and "pretrain.py: waited for another process in vain" in output, output
    assert f'File "{ROOT}/launch.py"' not in output      # no traceback but torchrun's own


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one process alone proves nothing")
def test_synchronised_batch_norm_and_bf16_under_nccl(data, tmp_path):
    code, output = run("pretrain.py", *SMALL, "--data", data, "--out", tmp_path / "run",
                       "--max-steps", "3", processes=2)
    assert code == 0 and ("bf16" in output or "fp16" in output), output
    lines = map(json.loads, open(tmp_path / "run/log.jsonl"))
    assert all(line["loss"] is not None for line in lines)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_network_with_batch_norm_over_all_processes_is_one_graph(precision):
    """Where a graph breaks, --compile gains little. The other processes are PyTorch's fake ones."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        compute = Compute(0, 2, torch.device("cpu"), precision, 1)
        net = compute.prepare(SimCLR(build_encoder("resnet18")))

        def project(x):
            with compute.autocast():
                return net(x)

        found = torch._dynamo.explain(project)(torch.randn(4, 1, 32, 32))
        assert found.graph_count == 1 and not found.break_reasons
    finally:
        torch._dynamo.reset()
        dist.destroy_process_group()
