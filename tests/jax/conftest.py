"""The JAX host's tests, where JAX is installed."""

from importlib.util import find_spec

collect_ignore = ["sharded_run.py"]  # a program of its own
collect_ignore_glob = [] if find_spec("jax") and find_spec("optax") else ["*.py"]
