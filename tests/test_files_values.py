"""What a checkpoint file holds comes back equal and of its type, or is refused by its key before a byte is written."""

import os
from collections import Counter, OrderedDict, namedtuple
from dataclasses import make_dataclass
from enum import IntEnum
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nadam
from nadam import checkpoint
from test_files import exact as bits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


def exact(value):
    """A tree in which equal means of one type and, for arrays, scalars and floats, bit for bit."""
    if type(value) is dict:
        return dict, [(exact(key), exact(item)) for key, item in value.items()]
    if type(value) in (list, tuple):
        return type(value), [exact(item) for item in value]
    if isinstance(value, np.generic):
        return type(value), bits(np.asarray(value))
    if isinstance(value, float):
        return float, value.hex()
    if type(value).__module__ == "torch":
        import torch

        raw = torch.view_as_real(value.resolve_conj()) if value.dtype == torch.complex64 else value.resolve_neg()
        return value.dtype, value.shape, value.numel() and raw.contiguous().reshape(-1).view(torch.uint8).tolist()
    return bits(value)


def back(path, value):
    checkpoint.save(path, {"value": value})
    return checkpoint.load(path)["value"]


MARKERS = ["__array__", "__items__", "__tuple__", "array0", "tree"]
ARRAYS = [np.arange(3.0), np.array("é"), np.zeros((0, 2), np.int8), np.float32(0.1), np.bool_(True)]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=5),  # lone surrogates too
    st.sampled_from(MARKERS),
    st.sampled_from(ARRAYS),
)
PLAIN = LEAVES.filter(lambda leaf: not isinstance(leaf, (np.ndarray, np.generic)))
KEYS = st.recursive(PLAIN, lambda keys: st.lists(keys, max_size=3).map(tuple), max_leaves=4)
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tree=NESTED)
def test_nested_trees_come_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "nested.nadam"
    assert exact(back(path, tree)) == exact(tree)


def deep(levels, wrap, value=None):
    for _ in range(levels):
        value = wrap(value)
    return value


WRAPS = {"dict": lambda v: {"a": v}, "keys": lambda v: {1: v}, "list": lambda v: [v], "tuple": lambda v: (v,)}


@pytest.mark.parametrize(
    "value",
    [
        {"__array__": 1},
        {"__tuple__": [1]},
        {"__items__": [[1, 2]], "more": 1},
        {("exp_avg", 0): 1, (): 2, ((None, 1.5),): 3},
        {1: "integer", "1": "string", None: 0, 2.5: 1},
        [-0.0, float("inf"), 5e-324, True, 10**4000, -(2**64)],
        np.array(["2020-01-01", "NaT"], "M8[ns]"),
        np.array([1, 2], ">f4"),
        np.zeros(2, [("x", "f4"), ("é", "i8", (3,))]),
        np.array([b"a\0b", b""]),
        *[np.array(2.5, kind)[()] for kind in ("f2", "f4", "f8", "g", "c8", "c16")],
        *[np.array(2, kind)[()] for kind in ("?", "i1", "u8", "m8[s]", "M8[D]")],
        *[deep(98, wrap) for wrap in WRAPS.values()],
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_value_comes_back(path, value):
    assert exact(back(path, value)) == exact(value)


def test_other_mappings_come_back_as_dicts(path):
    for kind in (OrderedDict, Counter, MappingProxyType):
        assert exact(back(path, kind({"b": 1, ("a", 2): 2}))) == exact({"b": 1, ("a", 2): 2})


def test_every_dtype_of_ml_dtypes_comes_back(path):
    module = pytest.importorskip("ml_dtypes")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, np.generic)]
    assert len(kinds) > 10
    for kind in kinds:
        value = [np.array([[0, 1]]).astype(kind), np.ones((), kind), np.ones((), kind)[()]]
        assert exact(back(path, value)) == exact(value)
        assert type(back(path, value)[2]) is kind


def test_every_dtype_of_torch_comes_back(path):
    torch = pytest.importorskip("torch")
    kinds = {kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
    plain = [kind for kind in kinds if not str(kind).startswith("torch.q")]
    assert torch.float8_e4m3fn in plain
    for kind in plain:
        value = torch.arange(16, dtype=torch.uint8).view(kind)
        value = (torch.arange(16) % 2).to(torch.bool) if kind == torch.bool else value
        found = back(path, [value, value[0], value[:0]])
        assert exact(found) == exact([value, value[0], value[:0]])
        assert type(found[0]) is torch.Tensor


def test_views_of_tensors_come_back(path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(6.0).reshape(2, 3)
    turned = (whole + 1j * whole).T.conj()
    for value in (whole.T, whole[:, 1], turned, torch.nn.Parameter(whole).T, whole.expand(4, 2, 3)):
        assert exact(back(path, value)) == exact(value.detach())
    for value in (turned.T, torch._neg_view(whole)):  # lazily so, and contiguous
        assert value.is_conj() or value.is_neg()
        assert exact(back(path, value)) == exact(value)


Point = namedtuple("Point", "x y")
Level = IntEnum("Level", "LOW HIGH")
Data = make_dataclass("Data", ["x"])
REFUSED = {
    "object": object(),
    "set": {1, 2},
    "complex": 1j,
    "bytes": b"1",
    "named tuple": Point(1, 2),
    "enum": Level.LOW,
    "dataclass": Data(1),
    "function": len,
    "masked array": np.ma.masked_equal([1, 2], 1),
    "matrix": np.ones((2, 2)).view(np.matrix),
    "array of objects": np.array([None, "x"]),
    "objects in a structure": np.zeros(2, [("x", object)]),
    "NumPy's string": np.str_("a"),
    "NumPy's bytes": np.bytes_(b"a\0"),
    "key of objects": {(1, object()): 1},
    "key of NumPy": {np.int64(1): 1},
    "key of bytes": {b"a": 1},
    "long integer": 10**5000,
    "long integer as key": {10**5000: 1},
    "deep": deep(101, WRAPS["list"]),
    "deep keys": {deep(101, WRAPS["tuple"]): 1},
    "very deep": deep(10**4, WRAPS["dict"]),
}
CYCLE = []
CYCLE.append({"again": CYCLE})


def refused(path, value, match=""):
    checkpoint.save(path, {"iteration": 3})
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError), match=r"state\['a'\]\[1\]\[3\].*" + match):
        checkpoint.save(path, {"b": np.ones(3), "a": [0, {3: value}]})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("value", [*REFUSED.values(), CYCLE], ids=[*REFUSED, "cycle"])
def test_what_would_not_come_back_is_refused_by_key(path, value):
    refused(path, value)


def test_dtypes_inside_a_structure_are_refused(path):
    refused(path, np.zeros(2, [("x", pytest.importorskip("ml_dtypes").bfloat16)]), "bfloat16")


def test_tensors_that_would_not_come_back_are_refused_by_key(path):
    torch = pytest.importorskip("torch")
    other = type("Other", (torch.Tensor,), {})
    theirs = type("Theirs", (torch.Tensor,), {"__module__": "torch.theirs"})
    for value, match in {
        torch.eye(3).to_sparse(): "sparse_coo",
        torch.ones(3, device="meta"): "meta",
        torch.ones(3).as_subclass(other): "Other",
        torch.ones(3).as_subclass(theirs): "Theirs",
        torch.float32: "torch.dtype",
        torch.Size([1]): "torch.Size",
    }.items():
        refused(path, value, match)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_quantized_tensors_are_refused_by_key(path):
    torch = pytest.importorskip("torch")
    refused(path, torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8), "quantized")


def test_what_is_no_array_of_jax_is_refused_by_key(path):
    jax = pytest.importorskip("jax")
    deleted = jax.numpy.ones(3)
    deleted.delete()
    for value in (jax.random.key(0), deleted, jax.numpy.float32, jax.ShapeDtypeStruct((3,), np.float32)):
        refused(path, value)
    with pytest.raises(TypeError, match=r"state\['w'\]"):
        jax.jit(lambda w: checkpoint.save(path, {"w": w}))(1.0)
    for value in (jax.numpy.ones(3, jax.numpy.int4), jax.random.key_data(jax.random.key(0))):
        assert exact(back(path, value)) == exact(np.asarray(value))


def test_a_state_is_what_it_was(path):
    optimizer = nadam.Nadam(use_ema=True)
    optimizer.apply([np.ones(3)], [np.zeros(3)])
    checkpoint.save(path, optimizer.state_dict())
    assert exact(checkpoint.load(path)) == exact(optimizer.state_dict())
