"""Mutated checkpoint files and states, given to what loads them: `python tests/fuzz.py 60`. It must not crash."""

import copy
import os
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import nadam
from files import BEGINNING, framed, signed
from nadam import checkpoint

REFUSALS = (ValueError, TypeError, KeyError)
# Of hosts, whose state dicts people edit: PyTorch's groups that are no dicts are an AttributeError.
OTHERS = (AttributeError, IndexError, RuntimeError)
os.environ.setdefault("KERAS_BACKEND", "torch")
ODD = [None, True, -1, 2**70, float("nan"), "x", [], {}, (), np.zeros(2), np.array(["x"])]


def mutated(draw, value):
    """A copy of a nested state with one place of it removed or replaced."""
    value = copy.deepcopy(value)
    place, key = None, None
    inner = value
    while isinstance(inner, (dict, list)) and inner and (place is None or draw.random() < 0.8):
        key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        place, inner = inner, inner[key]
    if draw.random() < 0.3:
        del place[key]
    else:
        place[key] = copy.deepcopy(draw.choice(ODD))
    return value


def fuzz_files(draw, path):
    """Bytes of the file, or of a header under a right digest."""
    checkpoint.save(path, {"a": {"w": np.ones(3), "t": (1, {2: np.int8(1)})}, "b": [np.zeros((2, 2), "f"), 0.5]})
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    resign = draw.random() < 0.8
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(8 + len(BEGINNING) if resign else 0, len(content))] = draw.choice(b'0129-[]{}:,"\\aU.')
    if resign:
        content = framed(signed(bytes(content[8 : 8 + length])), bytes(content[8 + length :]))
    path.write_bytes(bytes(content))
    checkpoint.load(path)


def fuzz_numpy(draw, path):
    params = [np.ones(3), np.ones((2, 2))]
    optimizer = nadam.Nadam(use_ema=True)
    optimizer.apply([np.ones_like(p) for p in params], params)
    optimizer.load_state_dict(mutated(draw, optimizer.state_dict()))
    optimizer.apply([np.ones_like(p) for p in params], params)


def fuzz_torch(draw, path):
    import torch

    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = nadam.torch.NAdam(params, use_ema=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(mutated(draw, optimizer.state_dict()))
    optimizer.step()


def fuzz_keras(draw, path):
    import keras

    params = [keras.Variable(np.ones(3)), keras.Variable(np.ones((2, 2)))]
    optimizer, store = nadam.keras.Nadam(), {}
    optimizer.build(params)
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(mutated(draw, {name: np.asarray(value) for name, value in store.items()}))


TARGETS = {"files": fuzz_files, "NumPy": fuzz_numpy, "torch": fuzz_torch, "keras": fuzz_keras}


def main(seconds, seed=0):
    """How many calls of each target were refused, and how many loaded; any other error ends it, with its seed."""
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        targets = [name for name in TARGETS if name not in ("torch", "keras") or find_spec(name)]
        for name in targets:
            end, counts[name] = float("inf"), [0, 0]
            while time.monotonic() < end:
                seed += 1
                try:
                    TARGETS[name](random.Random(seed), Path(folder) / "run.nadam")
                    counts[name][1] += 1
                except (*REFUSALS, *OTHERS) as error:
                    if name == "files" and not isinstance(error, ValueError):
                        raise RuntimeError(f"files: seed {seed}") from error
                    counts[name][0] += 1
                except BaseException:
                    print(f"{name}: seed {seed}")
                    raise
                if end == float("inf"):  # the first call imports and compiles
                    end = time.monotonic() + seconds / len(targets)
    return counts


if __name__ == "__main__":
    for name, (refused, loaded) in main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0).items():
        print(f"{name}: {refused} refused, {loaded} loaded")
