import os
import sys
from importlib.util import find_spec

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # then the files that use it are left out
    settings = None
    collect_ignore = ["test_combinations.py", "test_files_values.py", "test_files_hostile.py", "test_fuzz.py"]

os.environ.setdefault("KERAS_BACKEND", "torch")  # of its CPU backends, the one that computes in float64 when asked

# The same examples on every run; a failure prints what to put into @reproduce_failure.
if settings is not None:
    settings.register_profile(
        "nadam", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("nadam")

# Folders of tests have the names of frameworks. Where one is absent, its folder would pass for a package without files.
for framework in ("jax", "keras", "torch"):
    found = find_spec(framework)
    if found is None or found.origin is None:
        sys.modules[framework] = None
