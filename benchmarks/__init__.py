"""Timings of a step against the memory floor and against every installed peer: ``python -m benchmarks``."""
