"""`nadam.torch.NAdam` as three hosts: by the CPU's kernel, PyTorch's foreach operations, or the GPU's kernels."""

from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from unittest.mock import patch

import numpy as np

from cases import BFLOAT16
from hosts.base import MOMENTS, SCALES, SMALL, STEP, Host


class Torch(Host):
    """`nadam.torch.NAdam`: by the CPU's kernel, by PyTorch's foreach operations, or by the GPU's in the interpreter."""

    options = frozenset(STEP | {"coupled_weight_decay", "maximize", "remainder", "exp_avg_dtype", "seed"})
    dtypes = (*Host.dtypes, "complex64")
    needs = ("torch",)

    def __init__(self, way="kernel"):
        self.way = way
        if way == "kernel":
            self.options = Torch.options | {"state_bits"}
        if way == "triton":
            self.environment, self.needs = {"TRITON_INTERPRET": "1"}, ("torch", "triton")
            self.shapes, self.steps, self.dense, self.dtypes = SMALL, 10, True, Host.dtypes

    def available(self):
        return super().available() and (self.way != "triton" or has_interpreter())

    @contextmanager
    def surroundings(self):
        import torch

        from nadam.torch import buckets
        from nadam.torch.gpu import bucket_cache as gpu_parts

        with ExitStack() as stack:
            if self.way == "triton":
                stack.enter_context(patch.object(gpu_parts, "DEVICES", {"cpu", "cuda"}))
            elif self.way == "fallback":
                stack.enter_context(patch.object(gpu_parts, "DEVICES", set()))
                stack.enter_context(patch.object(buckets, "has_kernel", lambda params: False))
                stack.enter_context(patch.object(buckets, "_warned", {"cpu", "cuda"}))
                # PyTorch's own sums depend on how many threads share them.
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(1)
            yield

    def _build(self, params, settings):
        import torch

        from nadam.torch import NAdam

        excluded, self.scale = settings.pop("excluded", ()), settings.pop("loss_scale_factor", None)
        self.lr = settings.get("lr")
        if callable(self.lr):
            settings["lr"] = self.lr(0)
        settings["betas"] = settings.pop("beta1", 0.9), settings.pop("beta2", 0.999)
        settings["decoupled_weight_decay"] = not settings.pop("coupled_weight_decay", False)
        settings["weight_decay"] = settings.get("weight_decay") or 0.0
        if "exp_avg_dtype" in settings:
            settings["exp_avg_dtype"] = getattr(torch, settings["exp_avg_dtype"])
        self.params, self.calls = [torch.nn.Parameter(to_torch(p)) for p in params], 0
        groups = [{"params": [p for i, p in enumerate(self.params) if i not in excluded]}]
        if excluded:
            groups.append({"params": [self.params[i] for i in excluded], "weight_decay": 0.0})
        self.optimizer = NAdam(groups, **settings)

    def _step(self, grads):
        import torch

        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else to_torch(grad)
        if callable(self.lr):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.calls)
        if self.scale is not None:  # as GradScaler hands it over
            self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(self.scale), torch.tensor(0.0)
        self.optimizer.step()
        self.calls += not self.optimizer.last_step.skipped

    def _state(self):
        groups = self.optimizer.state_dict()["param_groups"]
        entries = [self.optimizer.state[param] for param in self.params]
        names = {name: name for name in (*MOMENTS, *SCALES, "ema", "remainder")}
        names |= {"accumulator": "grad_accumulator", "step": "step"}
        names |= {"momentum_product": "mu_product", "seen": "accumulated"}
        kept = {name: [from_torch(e[key]) for e in entries if key in e] for name, key in names.items()}
        steps = self.settings.get("gradient_accumulation_steps") or 1
        calls = [int(step) * steps + groups[0].get("accumulation_position", 0) for step in kept["step"]]
        kept["seen"] = [np.array(kept["seen"], bool)] if kept["seen"] else []
        skipped = [groups[0].get("skipped_steps", 0)]
        return {"params": map(from_torch, self.params), **kept, "calls": calls, "skipped": skipped}

    def _resumed(self, optimizer, params):
        group = optimizer.state_dict()["param_groups"][0]
        steps = self.settings.get("gradient_accumulation_steps") or 1
        self.calls = int(optimizer.last_step.step) * steps + group.get("accumulation_position", 0)

    def _last_step(self):
        last = self.optimizer.last_step
        return last.read() if hasattr(last, "read") else last


def has_interpreter():
    """Triton 3.6's loops by numbers in arrays of one element, which NumPy 2.4 no longer converts."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton >= (3, 7) or numpy < (2, 4)


def to_torch(array):
    """A tensor with an array's memory."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor):
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()
