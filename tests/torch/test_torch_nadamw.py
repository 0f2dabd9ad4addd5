"""NAdamW in the place of timm's and of AlgoPerf's: the same numbers and state, in the same process."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR
from training import Gradients, apart, equal, parameters, timm_optim, train

from nadam.torch import NAdam, NAdamW

# AlgoPerf's five published points, of which the third is the first again: learning rate, 1 - beta1, beta2, weight
# decay, share of the steps that warm up.
POINTS = [
    (0.00130820982, 0.02686663, 0.99812329, 0.16375311, 0.1),
    (0.00084450746, 0.11042418, 0.99785048, 0.08135403, 0.05),
    (0.00495846, 0.13625576, 0.62918535, 0.11473863, 0.02),
    (0.00174863875, 0.06733926, 0.99551597, 0.08121617, 0.02),
]
HORIZON, STEPS = 1000, 500
DTYPES = [torch.float32, torch.float64, torch.complex64]
KEPT = ["exp_avg", "exp_avg_sq", "step"]


class Twin(torch.optim.Optimizer):
    """AlgoPerf's NadamW from its formula, with its state; in float64, whatever the parameters."""

    def __init__(self, params, lr, betas, weight_decay, eps=1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                s["step"] += 1
                t, g = int(s["step"]), p.grad
                p *= 1 - lr * group["weight_decay"]
                s["exp_avg"].copy_(beta1 * s["exp_avg"] + (1 - beta1) * g)
                s["exp_avg_sq"].copy_(beta2 * s["exp_avg_sq"] + (1 - beta2) * g * g)
                ahead = (beta1 * s["exp_avg"] + (1 - beta1) * g) / (1 - beta1**t)
                p -= lr * ahead / ((s["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"])


def settings(point):
    lr, rest, beta2, decay, _ = point
    return {"lr": lr, "betas": (1.0 - rest, beta2), "weight_decay": decay}


def warmed_up(optimizer, share):
    """Linear warm-up, then cosine to 0 at the HORIZON."""
    warm = share * HORIZON
    return LambdaLR(
        optimizer,
        lambda i: i / warm if i < warm else 0.5 * (1 + math.cos(math.pi * (i - warm) / (HORIZON - warm))),
    )


def run(make, point, dtype, steps=STEPS, gradients_in=torch.float32):
    """Parameters after the steps of one of AlgoPerf's points, with gradients that ``gradients_in`` holds."""
    params, gradients = parameters(dtype), Gradients()
    with torch.no_grad():
        for param, start in zip(params, parameters(gradients_in), strict=True):
            param.copy_(start)
    optimizer = make(params, **settings(point))
    schedule = warmed_up(optimizer, point[-1])
    for _ in range(steps):
        gradients.give(params)
        for param in params:
            param.grad = param.grad.to(gradients_in).to(dtype)
        optimizer.step()
        schedule.step()
    return params


def error(params, exact):
    """The largest distance from parameters in float64, relative to 1 or the larger number."""
    pairs = [(p.detach().double(), q.detach()) for p, q in zip(params, exact, strict=True) if p.numel()]
    return max(float(((p - q).abs() / q.abs().clamp(min=1.0)).max()) for p, q in pairs)


@pytest.mark.parametrize("point", POINTS)
def test_500_steps_in_float64(point):
    """From the same start; timm rounds the product of lr and decay, the lerp and the quotient in another order."""
    ours = run(NAdamW, point, torch.float64)
    assert apart(ours, run(timm_optim().NAdamW, point, torch.float64)) <= 60.0


@pytest.mark.parametrize("point", POINTS)
def test_each_of_500_steps_in_float64_is_within_four_units(point):
    """Each from timm's state and parameters."""
    params, others = parameters(torch.float64), parameters(torch.float64)
    ours, theirs = NAdamW(params, **settings(point)), timm_optim().NAdamW(others, **settings(point))
    gradients, twins = Gradients(), Gradients()
    schedules = [warmed_up(optimizer, point[-1]) for optimizer in (ours, theirs)]
    for _ in range(STEPS):
        train(ours, params, 1, gradients)
        train(theirs, others, 1, twins)
        for schedule in schedules:
            schedule.step()
        assert apart(params, others) <= 4.0
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                param.copy_(other)


@pytest.mark.parametrize("point", POINTS)
def test_500_steps_in_float32(point):
    """As near to the same steps in float64 as timm's are, up to chance."""
    exact = run(Twin, point, torch.float64)
    ours, theirs = (run(cls, point, torch.float32) for cls in (NAdamW, timm_optim().NAdamW))
    assert error(ours, exact) <= max(1.5 * error(theirs, exact), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [
    {},
    {"lr": torch.tensor(0.01, dtype=torch.float64)},
    {"eps": 0.1, "weight_decay": 0.0},
    {"betas": (0.0, 0.9)},
    {"maximize": True},
    {"foreach": True},
    {"foreach": False, "capturable": False},
], ids=str)  # fmt: skip
def test_100_steps_with_each_option(options, dtype):
    made = []
    for cls in (NAdamW, timm_optim().NAdamW):
        params = parameters(dtype)
        train(cls(params, **options), params, 100)
        made.append(params)
    assert not equal(made[0], parameters(dtype))
    assert apart(*made) < 60.0


def test_a_wrong_bias_correction_is_seen():
    params, others = parameters(torch.float64), parameters(torch.float64)
    train(NAdam(params, 1e-3, weight_decay=1e-2, momentum_decay=math.inf, decoupled_weight_decay=True), params, 20)
    train(timm_optim().NAdamW(others), others, 20)
    assert apart(params, others) > 1e9


def test_the_signature_is_that_of_timm():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (NAdamW, timm_optim().NAdamW))
    names = list(theirs)
    assert list(ours)[: len(names)] == names
    assert [ours[name].default for name in names] == [theirs[name].default for name in names]


@pytest.mark.parametrize("maker", ["timm", "twin"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_a_run_goes_on_in_the_other_ones_state(maker, ours_first):
    stock = timm_optim().NAdamW if maker == "timm" else Twin
    first, then = (NAdamW, stock) if ours_first else (stock, NAdamW)
    whole, params, gradients = parameters(torch.float64), parameters(torch.float64), Gradients()
    train(stock(whole, **settings(POINTS[2])), whole, 20)
    before, after = first(params, **settings(POINTS[2])), then(params, lr=1.0, betas=(0.5, 0.5), weight_decay=0.5)
    train(before, params, 10, gradients)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(after, params, 10, gradients)
    assert apart(params, whole) < 20.0
    if not ours_first:
        assert sorted(after.state_dict()["state"][0]) == KEPT


@pytest.mark.parametrize("extras", [
    {},
    {"use_ema": True, "skip_nonfinite": True, "global_clipnorm": 1.0},
    {"gradient_accumulation_steps": 3},
    {"exp_avg_dtype": torch.bfloat16, "seed": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_has_the_same_bits(extras, how):
    params, gradients = parameters(), Gradients()
    optimizer = NAdamW(params, **extras)
    train(optimizer, params, 7, gradients)
    if how == "state_dict":
        others = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = NAdamW(others, **extras)
        resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    else:
        resumed = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
        others = resumed.param_groups[0]["params"]
    more = copy.deepcopy(gradients)
    train(optimizer, params, 8, gradients)
    train(resumed, others, 8, more)
    assert equal(params, others)
    one, other = optimizer.state_dict(), resumed.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert all(equal(list(one["state"][i].values()), list(other["state"][i].values())) for i in one["state"])


@pytest.mark.parametrize(("name", "value"), [
    ("caution", True), ("corrected_weight_decay", True), ("clipping_threshold", 1.0),
])  # fmt: skip
def test_what_is_refused_is_named(name, value):
    params, named = parameters(), rf"{name}={value}: expected (False|None)"
    with pytest.raises(ValueError, match="^" + named):
        NAdamW(params, **{name: value})
    optimizer = NAdamW(params[:2])
    with pytest.raises(ValueError, match="^" + named):
        optimizer.add_param_group({"params": params[2:], name: value})
    assert len(optimizer.param_groups) == 1
    train(optimizer, params[:2], 1)
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=r"param_groups\[0\]: " + named):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("cls", [NAdam, torch.optim.NAdam, torch.optim.Adam])
def test_the_state_of_another_optimizer_is_refused(cls):
    params = parameters()
    other, optimizer = cls(params), NAdamW(params)
    train(other, params, 2)
    with pytest.raises(ValueError, match="the state of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("eps", -1.0), ("betas", (1.0, 0.9)), ("weight_decay", -1.0)]
)
def test_an_argument_out_of_range(name, value):
    for cls in (NAdamW, timm_optim().NAdamW):
        with pytest.raises(ValueError, match=r"^Invalid "):
            cls(parameters(), **{name: value})


def test_an_argument_that_is_fixed_here():
    for name in ("momentum_decay", "decoupled_weight_decay", "bias_correction"):
        with pytest.raises(TypeError, match=name):
            NAdamW(parameters(), **{name: 1})
    with pytest.raises(TypeError, match="amsgrad"):
        NAdamW(parameters(), amsgrad=True)


def test_a_distributed_checkpoint_goes_on():
    """Which asks for the state by the parameters' names, of an optimizer that has not stepped too."""
    runs = [torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(2)]
    optimizers = [NAdamW(model.parameters(), lr=0.01) for model in runs]
    train(optimizers[0], list(runs[0].parameters()), 5)
    saved = get_state_dict(runs[0], optimizers[0])
    assert sorted({name.rpartition(".")[2] for name in saved[1]["state"]["weight"]}) == KEPT
    set_state_dict(runs[1], optimizers[1], model_state_dict=saved[0], optim_state_dict=saved[1])
    for model, optimizer in zip(runs, optimizers, strict=True):
        train(optimizer, list(model.parameters()), 5)
    assert equal(*map(list, (model.parameters() for model in runs)))


def test_it_goes_on_from_adamw():
    params = parameters()
    other = torch.optim.AdamW(params, lr=0.1)
    train(other, params, 3)
    optimizer = NAdamW(params, lr=0.01)
    optimizer.load_adam_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert float(optimizer.state[params[0]]["mu_product"]) == pytest.approx(0.9**3)
