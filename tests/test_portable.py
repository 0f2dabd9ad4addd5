"""What the portable state refuses or leaves out where two optimizers differ; the numbers are in test_moves.py."""

import numpy as np
import pytest

import nadam
from nadam import checkpoint
from nadam.core.portable import PortableState


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


def saved(path, params, **settings):
    optimizer = nadam.Nadam(0.25, **settings)
    optimizer.apply({name: np.ones_like(array) for name, array in params.items()}, params)
    checkpoint.save(path, optimizer, params)


@pytest.mark.parametrize(("there", "here"), [("complex64", "float32"), ("float32", "complex64")])
def test_complex_and_real_numbers_are_not_mixed(path, there, here):
    saved(path, {"w": np.ones(3, there)})
    params, optimizer = {"w": np.zeros(3, here)}, nadam.Nadam()
    with pytest.raises(ValueError, match=r"w: expected (real|complex) numbers, the state has"):
        checkpoint.load(path, optimizer, params)
    assert not params["w"].any()
    assert not optimizer.built


def test_complex_numbers_stay_with_one_kind_of_second_moment(path):
    jnp = pytest.importorskip("jax.numpy")
    pytest.importorskip("optax")
    from nadam.jax import nadam as transformation

    saved(path, {"w": np.ones(3, np.complex64)})
    params = {"w": jnp.zeros(3, jnp.complex64)}
    with pytest.raises(ValueError, match="a second moment for each part, which this one does not"):
        checkpoint.load(path, transformation(0.1).init(params), params)


def test_a_learning_rate_that_is_not_there_is_left(path):
    saved(path, {"w": np.ones(3)})
    tree = checkpoint.load(path)
    optimizer = nadam.Nadam(0.5)
    checkpoint.load(path, optimizer, {"w": np.zeros(3)})
    assert optimizer.learning_rate == 0.25
    for group in tree["groups"]:
        del group["lr"]
    checkpoint.save(path, tree)
    checkpoint.load(path, optimizer)
    assert optimizer.learning_rate == 0.25
    assert PortableState.from_tree(tree).learning_rate(["w"]) is None


def test_a_remainder_becomes_part_of_a_float32_parameter(path):
    torch = pytest.importorskip("torch")
    from nadam.torch import NAdam

    torch.manual_seed(0)
    narrow, wide = torch.nn.Linear(8, 4).to(torch.bfloat16), torch.nn.Linear(8, 4)
    optimizer = NAdam(narrow.parameters(), remainder=True)
    for _ in range(5):
        for param in narrow.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    checkpoint.save(path, optimizer, narrow)
    moved, _ = checkpoint.load(path, NAdam(wide.parameters()), wide)
    values = PortableState.from_tree(checkpoint.load(path)).values
    for name, param in wide.named_parameters():
        assert "remainder" not in moved.state[param]
        assert np.array_equal(param.detach().numpy(), values[name])
        assert not np.array_equal(narrow.get_parameter(name).detach().float().numpy(), values[name])
    back = torch.nn.Linear(8, 4).to(torch.bfloat16)
    again, _ = checkpoint.load(path, NAdam(back.parameters(), remainder=True), back)
    for name, param in back.named_parameters():
        before = narrow.get_parameter(name)
        assert torch.equal(param, before)
        assert torch.equal(again.state[param]["remainder"], optimizer.state[before]["remainder"])


def test_keras_is_not_built_by_a_state_that_does_not_fit(path):
    keras = pytest.importorskip("keras")
    from nadam.keras import Nadam

    saved(path, {"w": np.ones(3, np.float32)})
    variable, optimizer = keras.Variable(np.zeros(4, "float32"), name="w"), Nadam()
    with pytest.raises(ValueError, match=r"w: shape \(3,\), expected \(4,\)"):
        checkpoint.load(path, optimizer, {"w": variable})
    assert not optimizer.built
    fitting = keras.Variable(np.zeros(3, "float32"), name="w")
    checkpoint.load(path, optimizer, {"w": fitting})
    assert optimizer.built
    assert int(optimizer.iterations) == 1
