"""What type checkers find in a user's script: every keyword and name that is not there, on every host, and no more."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import nadam

SCRIPT = Path(__file__).with_name("user_script.txt")  # no module, or pytest would look for examples in it
WRONG = {i for i, line in enumerate(SCRIPT.read_text().splitlines(), 1) if line.endswith("# wrong")}
SOURCES = Path(nadam.__file__).parent.parent
FRAMEWORKS = ("torch", "keras", "jax", "optax", "tensorflow", "triton", "numba", "llvmlite", "ml_dtypes")


def with_mypy(folder):
    """Frameworks are not followed, so that it is quick, and says the same without them."""
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = True\n" for name in FRAMEWORKS)
    config = folder / "mypy.ini"
    config.write_text("[mypy]\n[mypy-nadam.*]\nfollow_imports = silent\n" + skipped)
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", folder / "cache", "script.py"]
    environment = {**os.environ, "MYPYPATH": str(SOURCES)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=folder)
    return [(int(line), text) for line, text in re.findall(r"script\.py:(\d+): error: (.*)", done.stdout)]


def with_pyright(folder):
    config = folder / "pyrightconfig.json"
    config.write_text(json.dumps({"extraPaths": [str(SOURCES)], "include": ["."]}))
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "--project", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [each for each in found if each["severity"] == "error"]
    return [(each["range"]["start"]["line"] + 1, each["message"]) for each in errors]


@pytest.mark.parametrize("check", [
    pytest.param(with_mypy, marks=pytest.mark.skipif(not find_spec("mypy"), reason="no mypy")),
    pytest.param(with_pyright, marks=pytest.mark.skipif(not shutil.which("pyright"), reason="no pyright")),
])  # fmt: skip
def test_what_is_wrong_in_a_users_script_is_found(check, tmp_path):
    shutil.copy(SCRIPT, tmp_path / "script.py")
    errors = check(tmp_path)
    assert errors
    assert {line for line, _ in errors} == WRONG, errors
