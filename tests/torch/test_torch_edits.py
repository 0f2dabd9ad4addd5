"""What users do to parameters, state and groups between steps: beside `torch.optim.NAdam`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_edits_between_steps():
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--confcutdir", str(HERE)]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "edits_run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
