"""PyTorch's tensors in the kernels' tables: found anew at every step, refused where they are not as before."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nadam.kernels.layout import GRAD, PARAM  # noqa: E402
from nadam.torch import memory  # noqa: E402

SHAPES = [(3, 4), (1,), (), (0, 2), (6,)]


class Watched:
    """A plan of a few parameters, and what tells whether it fits."""

    def __init__(self, params, grads):
        moments = [[torch.zeros(p.shape) for _ in range(2)] for p in params]
        self.slots = [
            memory.Slot(str(i), p, *own, *[None] * 5, decays=True, averaged=True)
            for i, (p, own) in enumerate(zip(params, moments, strict=True))
        ]
        made = memory.TensorPlan(self.slots, grads, range(len(params)))
        named = [(slot.name, grad) for slot, grad in zip(self.slots, grads, strict=True)]
        self.watch = memory.watch([made], memory.check_apart(memory.named(self.slots), named))
        self.plan, self.fits = made.plan, self.watch.fits


@pytest.fixture(params=["natively", "by methods"])
def make(request, monkeypatch):
    """Looked at natively, and where it is not known how PyTorch keeps its memory."""
    if request.param == "by methods":
        monkeypatch.setattr(memory, "tensor_words", lambda: None)
    else:
        assert memory.tensor_words()

    def make(params, grads):
        made = Watched(params, grads)
        assert type(made.watch).__name__ == ("Methods" if request.param == "by methods" else "Pointers")
        return made

    return make


def drawn(dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def assert_tables_point_to(plan, params, grads):
    found = np.zeros((len(params), 2), np.int64)
    for group in plan.plan.groups:
        found[group.members] = group.rows[:, [PARAM, GRAD]]
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


def test_steps_of_numpy_before_pytorch_is_there():
    program = "import numpy as np, nadam\nfor _ in range(2): nadam.Nadam().apply([np.ones(3)], [np.ones(3)])\n"
    program += "import torch\nfrom nadam.torch import memory\nassert memory.tensor_words()"
    subprocess.run([sys.executable, "-c", program], check=True)


EXCHANGES = {
    "share_memory_": torch.Tensor.share_memory_,
    "data": lambda t: setattr(t, "data", t.data.clone()),
    "dtype": lambda t: setattr(t, "data", t.data.double()),
    "set_": lambda t: t.set_(t.clone()),
    "swap_tensors": lambda t: torch.utils.swap_tensors(t, t.clone()),
    "resize_": lambda t: t.resize_(2, 2),
    "transposed": lambda t: t.t_(),
    "another place of the same memory": lambda t: t.set_(t.untyped_storage(), 1, (3, 3), (3, 1)),
    "negated": lambda t: setattr(t, "data", torch._neg_view(t.data)),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("field", ["param", "exp_avg", "exp_avg_sq"])
def test_what_stays_is_looked_at(make, field, exchange):
    plan, grads = make(drawn(), drawn()), drawn()
    assert plan.fits(grads)
    tensor = getattr(plan.slots[0], field)
    kept = tensor.data  # so that its memory is not given out again
    EXCHANGES[exchange](tensor)
    assert not plan.fits(grads)
    del kept


def test_gradients_of_many_dimensions(make):
    shape = (2, 1, 3, 1, 2, 2, 2)
    plan = make([torch.zeros(shape)], [torch.zeros(shape)])
    assert plan.fits([torch.ones(shape)])
    assert not plan.fits([torch.ones(shape).transpose(0, 2).contiguous().transpose(0, 2)])


def test_parameters_may_be_interleaved(make):
    whole, grads = torch.zeros(4, 4), torch.zeros(4, 4)
    halves, slopes = ([t[:, :2], t[:, 2:]] for t in (whole, grads))
    assert make(halves, slopes).fits(slopes)
    with pytest.raises(ValueError, match="0 and 1: the variables share memory"):
        make([whole[:, :3], whole[:, 1:]], [torch.zeros(4, 3), torch.zeros(4, 3)])
    with pytest.raises(ValueError, match=r"'1'.*shares memory"):
        make(halves, [slopes[0], whole[:, 2:]])


def test_contiguous_views_that_stand_for_their_negatives(make):
    plan = make(drawn(), drawn())
    assert not plan.fits([torch._neg_view(drawn()[0]), *drawn()[1:]])


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
