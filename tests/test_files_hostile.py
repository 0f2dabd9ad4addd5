"""Files that somebody made, with a checksum that is right: refused, with the reason, in little memory. And old ones."""

import base64
import hashlib
import io
import json
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from nadam import checkpoint
from test_files_values import exact

MAGIC = b"nadam checkpoint 1\n"  # not taken from the module, as nothing here that old files have


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


def header(descr="<f8", shape=(3,), version=1, **more):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape, **more}).encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array))
    return file.getvalue()


def signed(content):
    return MAGIC + hashlib.sha256(content).digest() + content


def archive(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in members:
            made.writestr(name + ".npy", content)
    return file.getvalue()


def write(path, tree, *arrays, compression=zipfile.ZIP_STORED):
    """As the first version wrote: the tree as JSON, arrays by number (or the bytes of theirs)."""
    text = tree if isinstance(tree, str) else json.dumps(tree)
    contents = [array if isinstance(array, bytes) else npy(array) for array in arrays]
    members = [("tree", npy(text)), *[(f"array{i}", content) for i, content in enumerate(contents)]]
    path.write_bytes(signed(archive(members, compression)))


def refused(path, match=None):
    """With a ValueError that names the file, and with not much more memory than the file has bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as error:
            checkpoint.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: not as nadam writes it: ")
    assert peak < 30 * path.stat().st_size + 4_000_000


ONE = {"w": {"__array__": ["array0", "float64"]}}
VALUES = np.arange(3.0)
BYTES = VALUES.tobytes()
HEADERS = {
    "terabytes": header(shape=(1 << 40,)) + BYTES,
    "more dimensions": header(shape=(1 << 20, 1 << 20)) + BYTES,
    "overflow": header(shape=(1 << 61, 1 << 61)) + BYTES,
    "wraps to what is there": header(shape=((1 << 64) + 3,)) + BYTES,
    "negative": header(shape=(-3, -1)) + BYTES,
    "one less": header(shape=(2,)) + BYTES,
    "one more": header(shape=(4,)) + BYTES,
    "nothing": header(),
    "long strings": header("<U1000000000000", (3,)) + BYTES,
    "no integers": header(shape=(3.0,)) + BYTES,
    "no tuple": header(shape=3) + BYTES,
    "no dtype": header("hello") + BYTES,
    "dtype of another type": header({"a": [1]}) + BYTES,
    "objects": header("|O") + BYTES,
    "pickle": header("|O", ()) + b"cos\nsystem\n(S'exit'\ntR.",
    "more keys": header(more=1) + BYTES,
    "deep": b"\x93NUMPY\1\0" + (9000).to_bytes(2, "little") + b"-" * 9000,
    "longer than the file": b"\x93NUMPY\2\0" + b"\xff\xff\xff\xff",
    "no header": BYTES,
    "empty": b"",
    "version 2 of terabytes": header(shape=(1 << 40,), version=2) + BYTES,
    "version 3 of terabytes": header(shape=(1 << 40,), version=3) + BYTES,
    "version 9": header(version=9) + BYTES,
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers(path, content):
    write(path, ONE, content)
    refused(path)


def reference(*value):
    return {"w": {"__array__": list(value)}}


@pytest.mark.parametrize(("descr", "name"), [("|V0", "void"), ("<U0", "str")])
def test_terabytes_of_nothing(path, descr, name):
    write(path, reference("array0", name), header(descr, (1 << 40,)))
    refused(path, "in 0 bytes")


TREES = {
    "a missing array": reference("array7", "float64"),
    "the tree": reference("tree", "str"),
    "an array twice": [ONE, ONE],
    "no array": {"w": 1},
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
    "a list as key": {"v": ONE, "w": {"__items__": [[[1], 2]]}},
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


@pytest.mark.parametrize("dtype", ["hello", "load", "Tensor", "nn.Module", "", "quint8", "qint8", "int32", "int64"])
@pytest.mark.parametrize("stored", [VALUES, np.zeros(4, "u1"), np.array("a")], ids=["float64", "uint8", "text"])
def test_dtypes_of_torch(path, dtype, stored):
    pytest.importorskip("torch")
    write(path, reference("array0", "torch." + dtype), stored)
    refused(path, None if "int" in dtype.removeprefix("q") else "no dtype of a tensor")


def test_dtypes_of_other_sizes(path):
    write(path, reference("array0", "bfloat16"), np.zeros(4, "u1"))
    refused(path, "bfloat16")


@pytest.mark.parametrize("tree", [[1], np.arange(3), np.array(["{}", "{}"]), np.array({}, object)], ids=repr)
def test_a_tree_that_is_no_text(path, tree):
    path.write_bytes(signed(archive([("tree", npy(tree))])))
    refused(path)


def test_a_bomb(path):
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        write(path, ONE, np.zeros(1 << 23), compression=compression)
        assert path.stat().st_size < 100_000
        refused(path, "compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(path):
    members = [("tree", npy(json.dumps(ONE))), ("array0", npy(VALUES)), ("array0", npy(-VALUES))]
    path.write_bytes(signed(archive(members)))
    refused(path, "two arrays of one name")


def test_members_that_overlap(path):
    """A thousand entries in the directory of one member."""
    members = [("tree", npy(json.dumps({}))), ("array0", npy(np.zeros(10_000)))]
    content = archive(members)
    start = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    end = content.index(b"PK\5\6")
    entry, last = content[start:end], bytearray(content[end:])
    entries = [entry.replace(b"array0", b"arr%03d" % i) for i in range(1000)]
    size = int.from_bytes(last[12:16], "little") + 999 * len(entry)
    last[8:10] = last[10:12] = (1001).to_bytes(2, "little")
    last[12:16] = size.to_bytes(4, "little")
    path.write_bytes(signed(content[:start] + b"".join(entries) + bytes(last)))
    refused(path, "longer than the file")


def test_any_change_is_refused_or_harmless(path):
    """Bytes of the archive changed under a right checksum."""
    tree = {"v": {"__tuple__": [1, {"__items__": [[0, ONE]]}]}, "u": reference("array1", "int8")}
    write(path, tree, VALUES, np.int8(1))
    content = path.read_bytes()[len(MAGIC) + 32 :]
    draw = np.random.default_rng(5)
    harmless = 0
    for position in {*range(150), *range(len(content) - 350, len(content)), *draw.choice(len(content), 100).tolist()}:
        for value in (0, content[position] ^ 1 << draw.integers(8)):
            changed = bytearray(content)
            changed[position] = value
            path.write_bytes(signed(bytes(changed)))
            try:
                checkpoint.load(path)
                harmless += 1
            except ValueError:
                refused(path)
    assert harmless > 100


# What the first version wrote of OLD, deflated.
FIRST = (
    "c-qTLOi9dDNX|%2&MwH$%qvka<dUm)S#xwge?8N@4G+SSYq$M5rt4(8*5jT~!C|e#z5yKp-pnkz3=p8mkY?5@^&bj27(^IKic(Yc@(L;$83Y*i"
    "us~G7=*fPez5$Vp3}p<}>M5zk$wlf`3hFkYM&^d<ItuD(`9&o~iFxt)MJcHu8Mnlo;#8n`aYkZ6Dv+<CsiRP<Kmp*Y2D(8Bi1UHC0EkO~I1`9-"
    "p>!1xrvh;iRGk$ND?r(KK%5A~DNs5WDz1a1CKGBV%#1`NJMy7sAe(E9rauRZ-5@=sP`Mm5^+`~>N}zTXqv?hDHy(;hpk@_7%}Pa*L)I4!#0EgD"
    "2gH_0b|Q<xa4ZnlqPZ&_>W_RR`--vH0drpg)cr+BVOxyDO)z^5p>`wNi!F>xpyrlB{acGgUolb`!r~8KI3mY0%&oY>5#8M|vp{+)pni{s+Fb?>"
    "JA8J-!U+~um3Zt{!lB*(OWI9?ripx{Z~&!GBd9zqp3%cE8X6aa$$y4e{Fj8ok07;XIQ)prM=kaIUovRHN<A)Msh3z(lvrs1EB9tV)xl`&<zAWz"
    "QKg=dj)E~|B_9{W6%F=4!U2eYxB-Y4IH3Az&-LG-7=AK@`Kb-6t_`oBN{xu}ld%rPWjWYCKp!wN=`y3%MxfdTggF=xpn(yTmSJ@hx-L*`&Va@j"
    "7m6-TRtBWFMb`%ku{LO!pz8Yz(`N|L$I1p0X9mJ$Kzcuz2LK?N3~~"
)
OLD = {
    "optimizer": "nadam",
    "iteration": 3,
    "lr": None,
    "betas": (0.9, 0.999),
    "groups": [{"params": [0, 1], "on": True}],
    "state": {0: {"exp_avg": np.arange(6, dtype=np.float32).reshape(2, 3)}},
}


def test_a_file_of_the_first_version_loads(path):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    path.write_bytes(zlib.decompress(base64.b85decode(FIRST)))
    state = checkpoint.load(path)
    assert exact(state["state"].pop(1)) == exact({"exp_avg": np.arange(3).astype(bfloat16)})
    assert exact(state) == exact(OLD)


def test_tensors_and_markers_of_the_first_version_load(path):
    torch = pytest.importorskip("torch")
    write(
        path,
        {"__array__": 1, "w": [reference("array0", "torch.bfloat16"), reference("array1", "torch.int64")]},
        torch.arange(3).bfloat16().view(torch.int16).numpy(),
        np.arange(3),
    )
    found = checkpoint.load(path)
    assert exact(found) == exact({"__array__": 1, "w": [{"w": torch.arange(3).bfloat16()}, {"w": torch.arange(3)}]})


@pytest.mark.parametrize(
    ("module", "dtype", "advice"),
    [("torch", "torch.int8", r"nadam\[torch\]"), ("ml_dtypes", "float8_e5m2", "ml_dtypes")],
)
def test_what_is_not_installed_is_named(path, monkeypatch, module, dtype, advice):
    monkeypatch.setitem(sys.modules, module, None)
    write(path, reference("array0", dtype), np.zeros(3, "u1"))
    with pytest.raises(ImportError, match="pip install .*" + advice):
        checkpoint.load(path)
