import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("KERAS_BACKEND", "torch")  # of its CPU backends, the one that computes in float64 when asked

# The same examples on every run; a failure prints what to put into @reproduce_failure.
settings.register_profile(
    "nadam", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nadam")
