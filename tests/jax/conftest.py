"""The JAX host's tests, where JAX and optax are installed."""

from importlib.util import find_spec

collect_ignore = ["sharded_run.py"]  # a program, run by test_jax_sharding.py and test_jax_libraries.py
collect_ignore_glob = [] if find_spec("jax") and find_spec("optax") else ["*.py"]
