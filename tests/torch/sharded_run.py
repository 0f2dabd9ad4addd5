"""Train a small model in the ways of torch.distributed; run by torchrun from test_torch_sharding.py.

torchrun --nproc-per-node 2 sharded_run.py train FOLDER
torchrun --nproc-per-node 4 sharded_run.py resume FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from nadam.torch import NAdam, release

DEVICE = os.environ.get("NADAM_TEST_DEVICE", "cpu")
STEPS = 6
OPTIONS = {"lr": 0.05, "global_clipnorm": 0.05, "eps": 1e-3, "weight_decay": 0.1, "use_ema": True}
EACH = {**OPTIONS, "global_clipnorm": None, "clipnorm": 0.02, "skip_nonfinite": True}
RELEASED = {**EACH, "skip_nonfinite": False, "track_grad_norm": True}


def make_model():
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 7), torch.nn.Linear(7, 1)
    return torch.nn.Sequential(*layers).to(DEVICE)


def train(model, optimizer, first=0, last=STEPS):
    """The same data on every process, so that their mean is that of one."""
    reports = []
    for step in range(first, last):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        optimizer.zero_grad()
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        if step == 3 and optimizer_of(optimizer)._extras["skip_nonfinite"]:
            loss = loss * float("inf")  # on all of them
        loss.backward()
        optimizer.step()
        report = optimizer_of(optimizer).last_step
        reports.append((report.step, report.grad_norm, report.skipped_steps))
    return reports


def optimizer_of(optimizer):
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def whole(model):
    """All parameters, gathered."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p.detach()).to(DEVICE) for p in inner.parameters()]


def sharded(model, **options):
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def tensor_parallel(model):
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def released(params, **options):
    optimizer = NAdam(params, **options)
    release(optimizer, bucket_mb=1e-4)  # some 100 bytes
    return optimizer


WAYS = {
    "plain": (lambda: make_model(), NAdam, OPTIONS),
    "each": (lambda: make_model(), NAdam, EACH),
    "ddp": (lambda: DistributedDataParallel(make_model()), NAdam, OPTIONS),
    "zero": (
        lambda: DistributedDataParallel(make_model()),
        lambda params, **options: ZeroRedundancyOptimizer(params, optimizer_class=NAdam, **options),
        {**OPTIONS, "global_clipnorm": None},  # a process has whole gradients, but not all of them
    ),
    "zero alone": (lambda: make_model(), NAdam, {**OPTIONS, "global_clipnorm": None}),
    "fsdp": (lambda: sharded(make_model()), NAdam, OPTIONS),
    "fsdp each": (lambda: sharded(make_model()), NAdam, EACH),
    "fsdp offload": (lambda: sharded(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False)), NAdam, OPTIONS),
    "fsdp mixed": (
        lambda: sharded(make_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        NAdam,
        OPTIONS,
    ),
    "tensor parallel": (lambda: tensor_parallel(make_model()), NAdam, OPTIONS),
    "fsdp unreleased": (lambda: sharded(make_model()), NAdam, RELEASED),
    "tensor parallel unreleased": (lambda: tensor_parallel(make_model()), NAdam, RELEASED),
}
if DEVICE == "cpu":
    WAYS["fsdp released"] = lambda: sharded(make_model()), released, RELEASED
    WAYS["tensor parallel released"] = lambda: tensor_parallel(make_model()), released, RELEASED


def train_all(folder):
    results = {}
    for name, (make, cls, options) in WAYS.items():
        model = make()
        optimizer = cls(model.parameters(), **options)
        reports = train(model, optimizer)
        if name == "fsdp":
            with optimizer.swap_ema():
                results["fsdp average"] = (whole(model), reports)
            state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.save(state, checkpoint_id=folder / "checkpoint")
        if name == "plain":
            with optimizer.swap_ema():
                results["plain average"] = ([p.clone() for p in whole(model)], reports)
        results[name] = ([p.clone() for p in whole(model)], reports)
        if name == "fsdp":  # and on, as those that resume will
            results["fsdp later"] = (None, train(model, optimizer, STEPS, 2 * STEPS))
            results["fsdp later"] = ([p.clone() for p in whole(model)], results["fsdp later"][1])
    return results


def resume(folder):
    model = sharded(make_model())
    optimizer = NAdam(model.parameters(), **OPTIONS)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    reports = train(model, optimizer, STEPS, 2 * STEPS)
    return {"resumed": (whole(model), reports)}


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    results = train_all(folder) if what == "train" else resume(folder)
    torch.save(results, folder / f"{what}-{dist.get_world_size()}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
