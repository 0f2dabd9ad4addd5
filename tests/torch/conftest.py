"""The PyTorch host's tests, where PyTorch is installed."""

from importlib.util import find_spec

collect_ignore = ["sharded_run.py"]  # a program for torchrun
collect_ignore_glob = [] if find_spec("torch") else ["*.py"]
