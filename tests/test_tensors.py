"""PyTorch's tensors in the kernels' tables: found anew at every step, refused where they are not as before."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nadam.kernels import tensors  # noqa: E402
from nadam.kernels.spans import GRAD, PARAM  # noqa: E402

SHAPES = [(3, 4), (1,), (), (0, 2), (6,)]


@pytest.fixture(params=["asked in one call", "asked one by one"])
def make(request, monkeypatch):
    """A plan of a few parameters: by PyTorch's function for C, and without it."""
    if request.param == "asked one by one":
        monkeypatch.setattr(tensors, "exchange_function", lambda: 0)
    elif not tensors.exchange_function():
        pytest.skip("this PyTorch has no function for that")

    def make(params, grads):
        slots = [
            tensors.Slot(str(i), p, *(torch.zeros(p.shape) for _ in range(2)), None, None, decays=True, averaged=True)
            for i, p in enumerate(params)
        ]
        return tensors.TensorPlan(slots, grads, range(len(params)))

    return make


def drawn(dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def assert_tables_point_to(plan, params, grads):
    found = np.zeros((len(params), 2), np.int64)
    for group in plan.plan.groups:
        found[group.members] = group.table.rows[:, [PARAM, GRAD]]
    for row, param, grad in zip(found.tolist(), params, grads, strict=True):
        assert not param.numel() or row == [param.data_ptr(), grad.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_new_gradients_are_found(make, dtype):
    params = [torch.nn.Parameter(p) for p in drawn()]
    plan = make(params, drawn(dtype))
    for _ in range(3):
        grads = drawn(dtype)
        assert plan.fits(grads)
        assert_tables_point_to(plan, params, grads)


def test_two_formats(make):
    params = drawn()
    plan = make(params, [*drawn()[:2], *drawn(torch.bfloat16)[2:]])
    grads = [*drawn()[:2], *drawn(torch.bfloat16)[2:]]
    assert plan.fits(grads)
    assert_tables_point_to(plan, params, grads)
    assert not plan.fits(drawn())


class Subclass(torch.Tensor):
    pass


OTHERS = {
    "dtype": lambda g: g.double(),
    "shape": lambda g: g[:2],
    "strides": lambda g: torch.randn(4, 3).t(),
    "no memory": lambda g: g.to("meta"),
    "sparse": lambda g: g.to_sparse(),
    "subclass": lambda g: g.as_subclass(Subclass),
    "missing": lambda g: None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_gradient_that_lies_otherwise_does_not_fit(make, other):
    plan, grads = make(drawn(), drawn()), drawn()
    assert plan.fits(grads)
    assert not plan.fits([OTHERS[other](grads[0]), *grads[1:]])
    assert not plan.fits(grads[:-1])
    assert plan.fits(grads)


def test_a_view_that_stands_for_its_negative_does_not_fit(make):
    column = torch.ones(3, 4, 2)[..., 0]
    plan = make(drawn(), [column, *drawn()[1:]])
    assert plan.fits([torch.ones(3, 4, 2)[..., 0], *drawn()[1:]])
    negative = torch.ones(3, 4, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    assert negative.stride() == column.stride()
    assert not plan.fits([negative, *drawn()[1:]])
    single = torch.ones(1, dtype=torch.complex64).conj().imag
    assert not plan.fits([torch.ones(3, 4, 2)[..., 0], single, *drawn()[2:]])


def test_memory_that_the_step_writes_to_is_no_gradient(make):
    params, grads = drawn(), drawn()
    plan = make(params, grads)
    own = [params[0].detach(), *grads[1:]]
    with pytest.raises(ValueError, match=r"'0'.*shares memory"):
        plan.fits(own) or make(params, own)


def test_parameters_whose_data_were_exchanged_do_not_fit(make):
    params = [torch.nn.Parameter(p) for p in drawn()]
    plan, grads = make(params, drawn()), drawn()
    assert plan.fits(grads)
    before = params[0].data  # kept, so that its memory is not given out again
    params[0].data = before.clone()
    assert not plan.fits(grads)
