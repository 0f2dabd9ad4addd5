"""Files that somebody made, with digests that are right: refused, with the reason, in little memory."""

import json
import sys
import tracemalloc

import numpy as np
import pytest

pytest.importorskip("hypothesis")  # of test_files_values

from files import BEGINNING, entries_of, framed, header, signed, write
from nadam import checkpoint
from test_files_values import exact


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


def peak_of(work):
    """What a call raises or returns, and the most memory that it took."""
    tracemalloc.start()
    try:
        try:
            result = work()
        except ValueError as error:
            result = error
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SLACK = 2_500_000  # of which two buffers are 1 MiB each; the rest is what errors and imports take


def refused(path, match="", crafted=True):
    """With a ValueError that names the file, and with no more memory than ten times the file."""
    error, peak = peak_of(lambda: checkpoint.load(path))
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"{path}: " + ("not as nadam writes it: " if crafted else ""))
    assert match in str(error)
    assert peak < 10 * path.stat().st_size + SLACK
    assert not checkpoint.inspect(path).whole or "not as nadam writes it" in str(error)


ONE = {"w": {"__array__": ["array0", "float64"]}}
VALUES = np.arange(3.0)
ENTRIES, DIGESTS, DATA = entries_of({"array0": VALUES})
(ENTRY,) = ENTRIES.values()


def test_what_is_made_by_hand_is_what_loads(path):
    """The tests below refuse nothing for the way in which their files are made."""
    write(path, ONE, VALUES)
    assert exact(checkpoint.load(path)) == exact({"w": VALUES})
    tree = {"__array__": 1, "w": [{"__array__": ["array0", "<M8[s]"]}, {"__tuple__": [1]}]}
    write(path, tree, np.zeros((2, 8), "u1"))
    assert exact(checkpoint.load(path)) == exact({"__array__": 1, "w": [np.zeros(2, "M8[s]"), (1,)]})


HEADERS = {
    "terabytes of what is there": {"shape": [1 << 40]},
    "more dimensions": {"shape": [1 << 20, 1 << 20]},
    "overflow": {"shape": [1 << 61, 1 << 61]},
    "wraps to what is there": {"shape": [(1 << 64) + 3]},
    "digits": {"shape": [10**4000]},
    "negative": {"shape": [-3, -1]},
    "negative offsets": {"data_offsets": [-24, 0]},
    "backwards": {"data_offsets": [24, 0]},
    "a gap": {"data_offsets": [8, 32]},
    "one less": {"shape": [2]},
    "one more": {"shape": [4]},
    "no integers": {"shape": [3.0]},
    "bools": {"shape": [3, True]},
    "text": {"shape": "3"},
    "no list": {"shape": 3},
    "65 dimensions": {"shape": [3] + [1] * 64},
    "NaN": {"shape": [float("nan")]},
    "infinite offsets": {"data_offsets": [0, float("inf")]},
    "three offsets": {"data_offsets": [0, 24, 48]},
    "no dtype": {"dtype": "F99"},
    "a list as dtype": {"dtype": ["F64"]},
    "a dtype of NumPy": {"dtype": "float64"},
    "another size": {"dtype": "F32"},
    "more keys": {"more": 1},
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_entries(path, change):
    path.write_bytes(framed(header(ONE, {"array0": {**ENTRY, **change}}, DIGESTS), DATA))
    refused(path)


@pytest.mark.parametrize("key", ENTRY)
def test_entries_without_a_key(path, key):
    entry = {name: value for name, value in ENTRY.items() if name != key}
    path.write_bytes(framed(header(ONE, {"array0": entry}, DIGESTS), DATA))
    refused(path, key)


def test_more_than_the_file_has(path):
    huge = {**ENTRY, "shape": [1 << 40], "data_offsets": [0, 1 << 43]}
    path.write_bytes(framed(header(ONE, {"array0": huge}, DIGESTS), DATA))
    refused(path, f"the tensors end at byte {(1 << 43) + len(path.read_bytes()) - 24}", crafted=False)


def test_tensors_that_overlap(path):
    one, two = json.dumps(ENTRY), json.dumps({**ENTRY, "data_offsets": [8, 32]})
    digests = {"array0": DIGESTS["array0"], "b": DIGESTS["array0"]}
    path.write_bytes(framed(header(ONE, f'{{"array0": {one}, "b": {two}}}', digests), DATA + DATA[:8]))
    refused(path, "tensor 'b' at byte 8: not where the last one ends")


@pytest.mark.parametrize("other", ["array0", "__metadata__"])
def test_a_name_twice(path, other):
    entries = f'{{"array0": {json.dumps(ENTRY)}, "{other}": {json.dumps(ENTRY)}}}'
    path.write_bytes(framed(header(ONE, entries, DIGESTS), DATA))
    refused(path, "one key twice")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"version": "2"}, "version '2', where this nadam reads '1'"),
        ({"version": 1}, "nadam_checkpoint: no text"),
        ({"more": {}}, "more: no text"),
        ({"more": "é"}, "not in ASCII"),
        ({"metadata": "[]"}, "no dict"),
        ({"metadata": "{"}, "double quotes"),
        ({"metadata": '{"a": 1, "a": 2}'}, "one key twice"),
    ],
    ids=repr,
)
def test_metadata(path, options, match):
    write(path, ONE, VALUES, **options)
    refused(path, match)


@pytest.mark.parametrize(
    "digests",
    [{}, {"array0": 1}, {"array0": "0"}, {**DIGESTS, "b": "0" * 32}, [], "deep", "[" * 10**5],
    ids=lambda digests: str(digests)[:30],
)
def test_digests(path, digests):
    path.write_bytes(framed(header(ONE, ENTRIES, digests), DATA))
    refused(path)


@pytest.mark.parametrize("length", [0, 1, 68, 1 << 32, 1 << 62, (1 << 64) - 1])
def test_lengths_of_the_header(path, length):
    path.write_bytes(framed(header(ONE, ENTRIES, DIGESTS), DATA, length))
    refused(path, "not a nadam checkpoint", crafted=False)


def test_safetensors_of_others_are_no_checkpoints(path):
    safetensors = pytest.importorskip("safetensors.numpy")
    for metadata in (None, {"format": "pt"}):
        safetensors.save_file({"w": VALUES}, path, metadata=metadata)
        refused(path, "not a nadam checkpoint", crafted=False)


def test_json_that_is_no_header(path):
    for text in (b"[" * 10**5, b'"}', b'"}}x', b'"},"a":1}', b'"},"a":NaN}', b'"}} \xff', b'"' + b"1" * 5000 + b"}}"):
        content = signed((BEGINNING + b"0" * 32 + text).ljust(10 * len(text) * (len(text) > 1000) + 600))
        path.write_bytes(framed(content))
        refused(path, crafted=text[:1] == b'"')


# JSON of which Python makes the most, in as few bytes as can be. As trees; the same is refused without room for it.
LARGE = {
    "lists": '{"a": [' + "[]," * 60_000 + "[]]}",
    "dicts": '{"a": [' + "{}," * 60_000 + "{}]}",
    "dicts of one": '{"a": [' + '{"a":1},' * 30_000 + "{}]}",
    "keys": '{"a": {' + ",".join(f'"{i:x}":0' for i in range(60_000)) + "}}",
    "keys and floats": '{"a": {' + ",".join(f'"{i:x}":.5'.replace(".", "0.") for i in range(60_000)) + "}}",
    "items": '{"a": {"__items__": [' + ",".join(f"[{i},[]]" for i in range(30_000)) + "]}}",
    "tuples": '{"a": [' + '{"__tuple__":[1]},' * 30_000 + "1]}",
    "integers": '{"a": [' + "-6," * 60_000 + "0]}",
    "strings": '{"a": [' + '"ab",' * 60_000 + "0]}",
    "escapes": '{"a": [' + '"\\u00ff\\ud83d",' * 30_000 + "0]}",
}


@pytest.mark.parametrize("tree", LARGE.values(), ids=LARGE)
def test_json_takes_no_more_than_ten_times_the_file(path, tree):
    write(path, tree, roomy=False)
    if "ud83d" not in tree:  # which is long enough
        refused(path, "where its JSON needs")
    checkpoint.save(path, json.loads(tree))
    result, peak = peak_of(lambda: checkpoint.load(path))
    assert isinstance(result, dict)
    assert peak < 10 * path.stat().st_size + SLACK


def reference(*value):
    return {"w": {"__array__": list(value)}}


TREES = {
    "a missing array": reference("array7", "float64"),
    "an array twice": {"a": ONE, "b": ONE},
    "no array": {"w": 1},
    "no dict": [ONE],
    "a tuple": {"__tuple__": [ONE]},
    "no name": reference([], "float64"),
    "no dtype": reference("array0"),
    "a number as dtype": reference("array0", 1),
    "an unknown dtype": reference("array0", "hello"),
    "another dtype": reference("array0", "int64"),
    "no dtype of ml_dtypes": reference("array0", "finfo"),
    "shorter": reference("array0", "bfloat16"),
    "text for a list": {"w": {"__array__": "ab"}},
    "a number for an array": {"w": {"__array__": 1}},
    "text for items": {"v": ONE, "w": {"__items__": "abab"}},
    "items of three": {"v": ONE, "w": {"__items__": [[1, 2, 3]]}},
    "items of texts": {"v": ONE, "w": {"__items__": ["ab"]}},
    "a list as key": {"v": ONE, "w": {"__items__": [[[1], 2]]}},
    "a key twice": {"v": ONE, "w": {"__items__": [[1, 2], [1, 3]]}},
    "an array as key": {"w": {"__items__": [[ONE["w"], 2]]}},
    "text for a tuple": {"v": ONE, "w": {"__tuple__": "abc"}},
    "deep": "[" * 10**5 + "]" * 10**5,
    "cut": '{"w": ',
    "empty": "",
    "long integer": '{"w": 1' + "0" * 10**5 + "}",
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_trees(path, tree):
    write(path, tree, VALUES)
    refused(path)


BYTES = np.zeros((3, 8), "u1")


@pytest.mark.parametrize(
    "dtype",
    [
        *("|O", "<f4", "<U3", "|V0", "<U1000000000000", "hello", "", [], {"a": 1}, None, "<f8,<f8", "O", "int64"),
        *("scalar.|O", [["a", "|O"]], [["a", "<f4"]], [["a"]], [1], [["a", "<f4", [1 << 40]]]),
        [["a", "<f8"], ["a", "<f8"]],
    ],
    ids=str,
)
def test_dtypes_of_bytes(path, dtype):
    write(path, reference("array0", dtype), BYTES)
    refused(path)


@pytest.mark.parametrize("dtype", ["hello", "load", "Tensor", "nn.Module", "", "quint8", "qint8", "int32", "int64"])
@pytest.mark.parametrize("stored", [VALUES, np.zeros(4, "u1")], ids=["float64", "uint8"])
def test_dtypes_of_torch(path, dtype, stored):
    pytest.importorskip("torch")
    write(path, reference("array0", "torch." + dtype), stored)
    refused(path, "stored as" if "int" in dtype.removeprefix("q") and dtype[0] != "q" else "no dtype of a tensor")


def test_any_change_is_refused_or_harmless(path):
    """Bytes of the header changed under a right digest."""
    tree = {"v": {"__tuple__": [1, {"__items__": [[0, ONE]]}]}, "u": reference("array1", "int8")}
    write(path, tree, VALUES, np.int8(1))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    made, data = content[8 : 8 + length], content[8 + length :]
    draw = np.random.default_rng(5)
    harmless = 0
    for position in range(len(BEGINNING) + 32, len(made.rstrip()) + 1):
        for value in (0, made[position] ^ 1 << draw.integers(8)):
            changed = bytearray(made)
            changed[position] = value
            path.write_bytes(framed(signed(bytes(changed)), data))
            try:
                checkpoint.load(path)
                harmless += 1
            except ValueError:
                refused(path, crafted=False)
    assert harmless > 3  # a name of another state, a number


@pytest.mark.parametrize(
    ("module", "dtype", "advice"),
    [("torch", "torch.int8", r"nadam\[torch\]"), ("ml_dtypes", "float8_e5m2", "ml_dtypes")],
)
def test_what_is_not_installed_is_named(path, monkeypatch, module, dtype, advice):
    monkeypatch.setitem(sys.modules, module, None)
    write(path, reference("array0", dtype), np.zeros(3, "u1"))
    with pytest.raises(ImportError, match="pip install .*" + advice):
        checkpoint.load(path)
