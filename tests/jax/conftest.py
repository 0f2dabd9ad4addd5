"""The JAX host's tests, where JAX is installed."""

from importlib.util import find_spec

# Where it is not, this folder would pass for a package of that name, but one without a file of its own.
found = find_spec("jax")
collect_ignore = ["sharded_run.py"]  # a program that test_jax_sharding.py runs
collect_ignore_glob = [] if found and found.origin else ["*.py"]
