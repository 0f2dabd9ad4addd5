"""State of 8 bits in files: as it is, exactly wide where that cannot be, rounded with a warning, or refused."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import nadam
from nadam import checkpoint
from nadam.core.compressed import SCALES
from nadam.core.portable import PortableState
from nadam.core.portable_formats import wide_moments

SHAPE = (80, 70)
CODES = {"state_bits": 8, "seed": 5}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


def gradients(count, first=0, shape=SHAPE):
    return [np.random.default_rng(first + i).standard_normal(shape).astype(np.float32) for i in range(count)]


def trained(order="C", steps=5, **settings):
    """An optimizer for an array of 5,600 elements, after some steps, and that array."""
    weight = np.asarray(np.random.default_rng(99).standard_normal(SHAPE).astype(np.float32), order=order)
    optimizer = nadam.Nadam(0.01, **settings)
    optimizer.build({"w": weight})
    for grad in gradients(steps):
        optimizer.apply([grad])
    return optimizer, weight


def state_of(optimizer):
    return optimizer._parameters.entries[0].state


def wide_of(optimizer):
    """The moments' values: those of one run may have two codes, one the double of the other at half the scale."""
    return wide_moments(state_of(optimizer), optimizer._parameters.entries[0].order)


def same(one, other):
    return set(one) == set(other) and all(
        np.asarray(one[name]).dtype == np.asarray(other[name]).dtype and np.array_equal(one[name], other[name])
        for name in one
    )


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("way", ["file", "state_dict", "file of a state_dict", "copy", "pickle"])
def test_a_run_with_codes_goes_on_bit_for_bit(path, way, order):
    optimizer, weight = trained(order, **CODES)
    there = weight.copy(order="K")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way == "file":
            checkpoint.save(path, optimizer, {"w": weight})
            there = np.zeros_like(weight)
            other, _ = checkpoint.load(path, nadam.Nadam(0.01, **CODES), {"w": there})
        elif way in ("copy", "pickle"):
            other = copy.deepcopy(optimizer) if way == "copy" else pickle.loads(pickle.dumps(optimizer))
            there = other._parameters.entries[0].array
        else:
            state = optimizer.state_dict()
            if way != "state_dict":
                checkpoint.save(path, state)
                state = checkpoint.load(path)
            other = nadam.Nadam(0.01, **CODES)
            other.build({"w": there})
            other.load_state_dict(state)
    assert same(wide_of(optimizer), wide_of(other))
    assert order == "F" or same(state_of(optimizer), state_of(other))
    for grad in gradients(5, 5):
        optimizer.apply([grad])
        other.apply([grad])
    assert np.array_equal(weight, there)
    assert same(state_of(optimizer), state_of(other))
    assert (other.state_bits, other.seed) == (8, 5)


@pytest.mark.parametrize(("order", "dtype"), [("C", "int8"), ("F", "float32")])
def test_codes_are_saved_where_they_are_those_of_c_order(path, order, dtype):
    optimizer, weight = trained(order, **CODES)
    checkpoint.save(path, optimizer, {"w": weight})
    tree = checkpoint.load(path)
    saved = tree["params"]["w"]
    assert saved["exp_avg"].dtype == dtype
    assert (SCALES["exp_avg"] in saved) == (dtype == "int8")
    assert {"state_bits": 8, "seed": 5}.items() <= tree["groups"][0].items()
    found = PortableState.from_tree(tree).params["w"].wide()
    assert same({name: getattr(found, name) for name in SCALES}, wide_of(optimizer))


@pytest.mark.parametrize("by", ["file", "state_dict"])
def test_codes_become_wide_exactly_and_wide_moments_are_rounded_with_a_warning(path, by):
    def moved(source, target):
        if by == "file":
            checkpoint.save(path, source, {"w": np.zeros(SHAPE, np.float32)})
            return checkpoint.load(path, target, {"w": np.zeros(SHAPE, np.float32)})[0]
        target.build({"w": np.zeros(SHAPE, np.float32)})
        target.load_state_dict(source.state_dict())
        return target

    (wide, _), (narrow, _) = trained(), trained(**CODES)
    with pytest.warns(UserWarning, match=r"state_bits=8: the moments of \['w'\] are rounded") as caught:
        codes = moved(wide, nadam.Nadam(0.01, **CODES))
    assert len(caught) == 1
    first, second = (wide_of(codes)[name] for name in SCALES)
    groups = np.abs(state_of(wide)["exp_avg"]).max()
    assert 0 < np.abs(first - state_of(wide)["exp_avg"]).max() <= groups / 128
    relative = np.abs(second / state_of(wide)["exp_avg_sq"] - 1)
    assert 0.02 < relative[state_of(wide)["exp_avg_sq"] > 2.0**-15 * state_of(wide)["exp_avg_sq"].max()].max() <= 1 / 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = moved(narrow, nadam.Nadam(0.01))
        again = moved(back, nadam.Nadam(0.01, **CODES))
    assert same(state_of(back), wide_of(narrow))
    assert same(wide_of(again), wide_of(narrow))


def test_transposed_moments_are_wide(path):
    optimizer, weight = trained(**CODES)
    checkpoint.save(path, optimizer, {"w": weight})
    there = np.zeros(SHAPE[::-1], np.float32)
    other, _ = checkpoint.load(path, nadam.Nadam(0.01), {"w": there}, transpose=["w"])
    assert same(state_of(other), {name: array.T for name, array in wide_of(optimizer).items()})
    assert np.array_equal(there, weight.T)


@pytest.mark.parametrize("kind", ["optax", "fused"])
def test_jax_gets_wide_moments(path, kind):
    jnp, optax = pytest.importorskip("jax.numpy"), pytest.importorskip("optax")
    from nadam.jax import fused

    optimizer, weight = trained(**CODES)
    checkpoint.save(path, optimizer, {"w": weight})
    params = {"w": jnp.zeros(SHAPE)}
    made = fused(0.01, momentum_decay=1.0, eps=1e-7)
    like = optax.adam(0.01).init(params) if kind == "optax" else (made, made.init(params))
    state, params = checkpoint.load(path, like, params)
    inner = state[0] if kind == "optax" else state
    assert np.array_equal(params["w"], weight)
    assert np.array_equal(inner.mu["w"], wide_of(optimizer)["exp_avg"])
    assert np.array_equal(inner.nu["w"], wide_of(optimizer)["exp_avg_sq"])


def test_convert_writes_wide_moments_where_codes_are_not_known(path, tmp_path):
    torch = pytest.importorskip("torch")
    from nadam.cli import main

    optimizer, weight = trained(**CODES)
    checkpoint.save(path, optimizer, {"w": weight})
    for kind in ("torch", "optax", "nadam"):
        assert main(["convert", str(path), str(tmp_path / kind), "--to", kind]) == 0
    arrays = np.load(tmp_path / "optax")
    (entry,) = torch.load(tmp_path / "torch")["state"].values()
    for name, short in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
        assert np.array_equal(arrays[f"{short}/w"], wide_of(optimizer)[name])
        assert np.array_equal(entry[name].numpy(), wide_of(optimizer)[name])
        assert SCALES[name] not in entry
    assert same(checkpoint.load(tmp_path / "nadam")["params"]["w"], checkpoint.load(path)["params"]["w"])


def damaged(name, change):
    return pytest.param(change, id=name)


WRONG = [
    damaged("codes without scales", lambda s: [s.pop(name) for name in SCALES.values()]),
    damaged("one scale missing", lambda s: s.pop("exp_avg_sq_scale")),
    damaged("scales of wide moments", lambda s: s.update(exp_avg=s["exp_avg"].astype(np.float32))),
    damaged("signed second moment", lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].view(np.int8))),
    damaged("scales too few", lambda s: s.update(exp_avg_scale=s["exp_avg_scale"][:-1])),
    damaged("scales in two dimensions", lambda s: s.update(exp_avg_scale=s["exp_avg_scale"].reshape(-1, 64))),
    damaged("wide scales", lambda s: s.update(exp_avg_scale=s["exp_avg_scale"].astype(np.float32))),
    damaged("another shape", lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].reshape(-1))),
    damaged("a first scale of 255", lambda s: s["exp_avg_scale"].__setitem__(3, 255)),
    damaged("a first scale of 249", lambda s: s["exp_avg_scale"].__setitem__(3, 249)),
    damaged("a second scale of 240", lambda s: s["exp_avg_sq_scale"].__setitem__(0, 240)),
]


@pytest.mark.parametrize("change", WRONG)
def test_damaged_codes_are_refused_and_nothing_changes(path, change):
    optimizer, weight = trained(**CODES)
    checkpoint.save(path, optimizer, {"w": weight})
    tree = checkpoint.load(path)
    change(tree["params"]["w"])
    checkpoint.save(path, tree)
    before, kept = weight.copy(), {name: array.copy() for name, array in state_of(optimizer).items()}
    with pytest.raises(ValueError, match=r"^w[.:]"):
        checkpoint.load(path, optimizer, {"w": weight})
    state = optimizer.state_dict()
    change(state["state"]["w"])
    with pytest.raises(ValueError, match=r"^(w[.:]|slots of 'w')"):
        optimizer.load_state_dict(state)
    assert np.array_equal(weight, before)
    assert same(kept, state_of(optimizer))


def test_codes_do_not_go_to_other_dtypes():
    state = trained(**CODES)[0].state_dict()
    for dtype in (np.float64, np.complex64):
        other = nadam.Nadam(0.01, **CODES)
        other.build({"w": np.zeros(SHAPE, dtype)})
        with pytest.raises(ValueError, match="slots of 'w': not expected"):
            other.load_state_dict(state)


def test_a_config_has_how_state_is_kept():
    optimizer = nadam.Nadam(0.5, **CODES)
    again = nadam.Nadam.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert (again.state_bits, again.seed) == (8, 5)
    assert "state_bits=8, seed=5" in repr(again)
    for name in CODES:
        with pytest.raises(AttributeError, match=name):
            setattr(again, name, 8)


def test_a_parameter_with_a_gradient_that_is_not_finite_is_named():
    optimizer, weight = trained(**CODES, skip_nonfinite=True)
    before = weight.copy()
    optimizer.apply([np.full(SHAPE, np.nan, np.float32)])
    assert optimizer.last_step.nonfinite_param == "w"
    assert np.array_equal(weight, before)


def test_inspect_has_norms_of_codes(path, capsys):
    from nadam.cli.inspect import summary

    optimizer, weight = trained(**CODES)
    checkpoint.save(path, optimizer, {"w": weight})
    (row,) = summary(checkpoint.inspect(path))["tensors"]
    assert row["|exp_avg|"] == pytest.approx(np.linalg.norm(wide_of(optimizer)["exp_avg"]), rel=1e-3)
    assert "|exp_avg_scale|" not in row
