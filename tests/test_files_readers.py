"""Other readers of safetensors open our files; what they hold is told without loading it."""

import json

import numpy as np
import pytest

from nadam import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


STATE = {
    "step": 3,
    "state": {"dense.weight": {"exp_avg": np.arange(6, dtype=np.float32).reshape(2, 3).T, "step": np.array(7)}},
    "list": [np.zeros((0, 3)), np.array([True, False]), np.arange(3, dtype=np.float16), np.ones(2, np.complex64)],
    "a/b": np.arange(2, dtype=np.uint8),
    "a": {"b": np.arange(3, dtype=np.int16)},
    "": np.int8(1),
    "__metadata__": np.uint16(9),
    "\ud800": np.uint32(8),
    ("exp_avg", 0): np.ones(1),
    "bits": np.array([1 + 2j]),
}
NAMES = {
    "state/dense.weight/exp_avg": STATE["state"]["dense.weight"]["exp_avg"],
    "state/dense.weight/step": STATE["state"]["dense.weight"]["step"],
    **{f"list/{i}": array for i, array in enumerate(STATE["list"])},
    "a/b": STATE["a/b"],
    "a/b#1": STATE["a"]["b"],
    "": np.array(1, np.int8),
    "__metadata__#1": np.array(9, np.uint16),
    "\\ud800": np.array(8, np.uint32),
    "('exp_avg', 0)": np.ones(1),
    "bits": np.array([1 + 2j]).reshape(1, 1).view(np.uint8),
}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        one = np.asarray(found[name])
        assert (one.dtype, one.shape, one.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_safetensors_opens_a_file(path, framework):
    module = pytest.importorskip(f"safetensors.{framework}")
    checkpoint.save(path, STATE, metadata={"epoch": 4})
    equal(module.load_file(path), NAMES)
    with pytest.importorskip("safetensors").safe_open(path, "np") as file:
        assert json.loads(file.metadata()["metadata"]) == {"epoch": 4}


def test_tensors_of_torch_are_themselves_to_other_readers(path):
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    kinds = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.int64, torch.bool]
    state = {str(kind): torch.arange(4).to(kind) for kind in kinds}
    checkpoint.save(path, state)
    found = safetensors.load_file(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_file_has_nothing_of_anybody_elses_code_in_it(path):
    """A reader of twelve lines: the length of the header, JSON, numbers."""
    checkpoint.save(path, STATE)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 64 == 0
    header = json.loads(content[8:start])
    assert all(type(value) is str for value in header.pop("__metadata__").values())
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        assert content[start + first : start + last] == NAMES[name].tobytes()
        assert first % max(NAMES[name].itemsize, 1) == 0


def test_no_reader_is_imported(path):
    from test_files import python

    program = """
import json, sys, numpy as np
from nadam import checkpoint
checkpoint.save(sys.argv[1], {"w": np.ones(3)}); checkpoint.load(sys.argv[1]); checkpoint.inspect(sys.argv[1])
print(json.dumps([name for name in ("safetensors", "torch", "jax", "numba", "ml_dtypes") if name in sys.modules]))
"""
    assert python(program, path) == []


def test_arrays_can_be_written_to_and_are_aligned(path):
    checkpoint.save(path, STATE)
    state = checkpoint.load(path)
    for array in [state["state"]["dense.weight"]["exp_avg"], *state["list"], state["a"]["b"], state["bits"]]:
        assert array.flags.aligned
        array[...] = 1
    assert checkpoint.inspect(path).whole


def test_what_inspect_tells(path):
    checkpoint.save(
        path, {"w": np.ones((2, 3), np.float32), "b": np.ones(3)}, metadata={"loss": 0.5, "tags": ["a", None]}
    )
    found = checkpoint.inspect(path)
    assert found.whole
    assert (found.path, found.size, found.problem) == (str(path), path.stat().st_size, "")
    assert found.metadata == {"loss": 0.5, "tags": ["a", None]}
    rows = [(t.name, t.dtype, t.shape, t.nbytes, t.problem) for t in found.tensors]
    assert rows == [("b", "F64", (3,), 24, ""), ("w", "F32", (2, 3), 24, "")]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    found = checkpoint.inspect(path)
    assert not found.whole
    assert [bool(tensor.problem) for tensor in found.tensors] == [False, True]
    assert found.tensors[1].problem.startswith("damaged: expected XXH3 ")
    path.write_bytes(content[:-1])
    found = checkpoint.inspect(path)
    assert not found.whole
    assert "cut off" in found.problem
    with pytest.raises(FileNotFoundError):
        checkpoint.inspect(path.parent / "none")


NAN = float("nan")


def test_metadata_is_what_json_has(path):
    for metadata in ({}, {"a": [1, 2.5, "é\ud800", None, True, {"b": NAN}]}):
        checkpoint.save(path, {}, metadata=metadata)
        assert repr(checkpoint.inspect(path).metadata) == repr(metadata)
    before = path.read_bytes()
    for wrong in ([1], {1: 2}, {"a": (1,)}, {"a": np.ones(1)}, {"a": np.float64(1)}, {"a": object()}, "text", 0):
        with pytest.raises(TypeError, match="metadata"):
            checkpoint.save(path, {"iteration": 1}, metadata=wrong)
    assert path.read_bytes() == before


@pytest.mark.parametrize("state", [[1], None, np.ones(3), "text"], ids=str)
def test_a_state_is_a_dict(path, state):
    with pytest.raises(
        TypeError, match=f"state: {type(state).__name__}: expected an optimizer that nadam knows, or a dict"
    ):
        checkpoint.save(path, state)
    assert not path.exists()


def test_inspect_takes_the_memory_of_the_largest_tensor(path):
    from test_files_hostile import SLACK, peak_of

    checkpoint.save(path, {str(i): np.ones(500_000) for i in range(8)})
    found, peak = peak_of(lambda: checkpoint.inspect(path))
    assert found.whole
    assert peak < 4_000_000 + SLACK
