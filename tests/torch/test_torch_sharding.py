"""Several processes, started by torchrun, give what one gives: DDP, ZeRO, FSDP2, tensor parallelism, checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import DEVICE

if not torch.distributed.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

HERE = Path(__file__).resolve().parent


def torchrun(processes, script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    torchrun(2, HERE / "sharded_run.py", "train", folder)
    return folder, [
        torch.load(folder / f"train-2-{rank}.pt", weights_only=True, map_location="cpu") for rank in range(2)
    ]


PAIRS = {
    "ddp": "plain",
    "zero": "zero alone",
    "fsdp": "plain",
    "fsdp offload": "plain",
    "fsdp each": "each",
    "fsdp average": "plain average",
    "tensor parallel": "plain",
}


@pytest.mark.parametrize("way", PAIRS)
def test_two_processes_equal_one(trained, way):
    first, second = trained[1]
    (params, reports), (others, _) = first[way], second[way]
    expected, alone = first[PAIRS[way]]
    for one, other, wanted in zip(params, others, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-6)
    for (step, norm, skipped), (wanted_step, wanted_norm, wanted_skipped) in zip(reports, alone, strict=True):
        assert (step, skipped) == (wanted_step, wanted_skipped)
        assert norm is wanted_norm or abs(norm / wanted_norm - 1) < 1e-6


def test_the_runs_clip_and_skip(trained):
    """Or the comparisons above would say little."""
    results = trained[1][0]
    assert all(norm > 0.1 for _, norm, _ in results["plain"][1])
    assert results["each"][1][-1][2] == results["fsdp each"][1][-1][2] == 1
    assert not torch.equal(results["plain"][0][0], results["plain average"][0][0])


@pytest.mark.skipif(DEVICE != "cpu", reason="parameters on a GPU are not released")
@pytest.mark.parametrize("way", ["fsdp", "tensor parallel"])
def test_gradient_release_gives_the_same_bits(trained, way):
    """Uneven shards fill buckets unevenly; all processes must move the same ones together."""
    for results in trained[1]:
        params, reports = results[f"{way} released"]
        expected, wanted = results[f"{way} unreleased"]
        assert all(map(torch.equal, params, expected))
        assert [norm for _, norm, _ in reports] == pytest.approx([norm for _, norm, _ in wanted], rel=1e-14)
        assert reports[-1][0] == wanted[-1][0]


def test_mixed_precision(trained):
    results = trained[1][0]
    for one, other in zip(results["fsdp mixed"][0], results["plain"][0], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("processes", [1, 4 if DEVICE == "cpu" else 2])
def test_a_checkpoint_of_two_processes_resumes_on_others(trained, processes):
    folder, results = trained
    torchrun(processes, HERE / "sharded_run.py", "resume", folder)
    resumed, reports = torch.load(folder / f"resume-{processes}-0.pt", weights_only=True, map_location="cpu")["resumed"]
    expected, wanted = results[0]["fsdp later"]
    assert [step for step, *_ in reports] == [step for step, *_ in wanted] == list(range(7, 13))
    for one, other in zip(resumed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_example(tmp_path):
    pytest.importorskip("sklearn")
    example = HERE.parent.parent / "examples" / "torch_fsdp.py"
    for processes, steps in ((2, 44), (1, 44 + 88)):  # twice as many of half the size
        printed = torchrun(processes, example, "--epochs", 2, "--checkpoint", tmp_path / "run")
        assert f"epoch 2: step {steps}" in printed, printed
