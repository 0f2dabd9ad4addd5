"""Memory of variables that is exchanged between steps on torch: with it and without it a run is the same, bit for bit.

Run by test_on_torch.py, with freed memory spoilt.
"""

import keras
import numpy as np
import torch

from nadam.keras import Nadam


def data(tensor):
    tensor.data = tensor.data.clone()


def reset(tensor):
    with torch.no_grad():
        tensor.set_(tensor.detach().clone())


EXCHANGES = [data, torch.Tensor.share_memory_, reset, lambda t: torch.utils.swap_tensors(t, t.detach().clone())]
SETTINGS = [{}, {"use_ema": True, "weight_decay": 0.1, "global_clipnorm": 1.0}, {"gradient_accumulation_steps": 2}]


def run(settings, exchange=None):
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.standard_normal(shape), dtype="float32") for shape in ((3, 4), (5,), (300, 400))]
    optimizer = Nadam(0.01, **settings)
    for step in range(8):
        grads = [torch.from_numpy(rng.standard_normal(v.shape).astype("float32")) for v in variables]
        if exchange is not None and step in (3, 6):
            for variable in [*optimizer.variables, *variables][step % 2 :]:
                if exchange is not EXCHANGES[-1] or not variable._value.requires_grad:
                    exchange(variable._value)
        optimizer.apply(grads, variables)
    return [v.numpy() for v in (*variables, *optimizer.variables)]


for settings in SETTINGS:
    expected = run(settings)
    for exchange in EXCHANGES:
        for one, other in zip(run(settings, exchange), expected, strict=True):
            assert one.tobytes() == other.tobytes(), (settings, exchange)
print("exchanged", len(SETTINGS) * len(EXCHANGES))
