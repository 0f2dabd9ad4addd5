"""The example that moves a run from Keras to PyTorch: its loss stays that of a run that did not move."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "keras_to_torch.py"


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="Triton, which PyTorch's step loads, aborts after TensorFlow"
)
def test_the_run_goes_on_in_pytorch_as_it_would_have_in_keras(tmp_path):
    command = list(map(str, [sys.executable, EXAMPLE, "--epochs", 2, "--out", tmp_path / "run.nadam"]))
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "settings differ" not in done.stderr
    rows = re.findall(r"^(.+): +held-out loss ([\d.]+), accuracy ([\d.]+)%$", done.stdout, re.MULTILINE)
    found = {where: (float(loss), float(accuracy)) for where, loss, accuracy in rows}
    assert list(found) == [
        *("epoch 1, Keras", "epoch 2, Keras", "moved to PyTorch"),
        *("epoch 3, PyTorch", "epoch 3, had it stayed", "epoch 4, PyTorch", "epoch 4, had it stayed"),
    ]
    assert found["moved to PyTorch"] == pytest.approx(found["epoch 2, Keras"], abs=2e-4)
    for epoch in (3, 4):
        # Four digits of what float32 gives on either side; without the moments it is off by 4e-3 or more.
        assert found[f"epoch {epoch}, PyTorch"][0] == pytest.approx(found[f"epoch {epoch}, had it stayed"][0], abs=5e-4)
    assert found["epoch 4, PyTorch"][0] < found["epoch 2, Keras"][0] < found["epoch 1, Keras"][0]
    assert found["epoch 4, PyTorch"][1] > 85
