"""The PyTorch host's tests, where PyTorch is installed."""

from importlib.util import find_spec

# Programs for torchrun, and what test_triton.py runs in processes of their own.
collect_ignore = ["sharded_run.py", *(f"triton_{name}.py" for name in ("interpreted", "host", "compiled", "cuda"))]
collect_ignore_glob = [] if find_spec("torch") else ["*.py"]
