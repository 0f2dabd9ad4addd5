"""In the place of torch.optim.NAdam: the same numbers, groups, hooks and state, in the same process."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import optim_db
from training import DEVICE, Gradients, apart, equal, parameters, train

from nadam.torch import NAdam

STOCK = torch.optim.NAdam
OPTIONS = [
    {},
    {"lr": 0.05},
    {"lr": torch.tensor(0.01)},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.99)},
    {"eps": 0.1},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"momentum_decay": 0.2},
    {"momentum_decay": 0.0},
    {"maximize": True, "weight_decay": 0.1},
    {"foreach": True},
    {"foreach": False},
    {"capturable": False, "differentiable": False},
]
# PyTorch rounds its momentum product to float32 at every step, and divides where we multiply: a few units a step.
UNITS = {torch.float32: 60.0, torch.complex64: 60.0}


def pair(dtype=torch.float32, **options):
    made = []
    for cls in (NAdam, STOCK):
        params = parameters(dtype)
        made.append((cls(params, **options), params))
    return made


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_100_steps(options, dtype):
    (ours, params), (stock, others) = pair(dtype, **options)
    train(ours, params, 100)
    train(stock, others, 100)
    assert not equal(params, parameters(dtype))
    assert apart(params, others) < UNITS[dtype]


def test_100_steps_in_float64():
    """Apart by PyTorch's momentum product, which is float32 there too."""
    (ours, params), (stock, others) = pair(torch.float64)
    train(ours, params, 100)
    train(stock, others, 100)
    assert max(float((p - q).detach().abs().max()) for p, q in zip(params, others, strict=True) if p.numel()) < 1e-8


info = next(entry for entry in optim_db if entry.optim_cls is STOCK)


@pytest.mark.parametrize("given", info.optim_inputs_func(device="cpu"), ids=lambda given: given.desc)
def test_options_that_pytorch_tests(given):
    (ours, params), (stock, others) = pair(**given.kwargs)
    train(ours, params, 30)
    train(stock, others, 30)
    assert apart(params, others) < UNITS[torch.float32]


@pytest.mark.parametrize(
    "given", info.optim_error_inputs_func(device="cpu", dtype=torch.float32), ids=lambda g: g.optimizer_error_input.desc
)
def test_errors_that_pytorch_tests(given):
    wrong = given.optimizer_error_input
    with pytest.raises(given.error_type, match=given.error_regex):
        NAdam(wrong.params if wrong.params is not None else parameters(), **wrong.kwargs)


def test_an_argument_out_of_range_names_value_and_range():
    with pytest.raises(ValueError, match=r"^Invalid learning rate: -1.0: expected 0 <= lr < inf$"):
        NAdam(parameters(), lr=-1.0)
    with pytest.raises(ValueError, match=r"^Invalid beta parameter at index 1: 1.0: expected 0 <= betas\[1\] < 1$"):
        NAdam(parameters(), betas=(0.9, 1.0))


@pytest.mark.parametrize("view", [
    lambda: torch.randn(4, 6).t(),
    lambda: torch.randn(4, 6)[::2, 1::3],
    lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    lambda: torch.randn(5, dtype=torch.complex64)[::2],
])  # fmt: skip
def test_parameters_that_are_not_contiguous(view):
    torch.manual_seed(0)
    strided = view().requires_grad_()
    twin = strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    for param in (strided, twin):
        train(NAdam([param], weight_decay=0.1), [param], 5)
    # On a GPU the kernel takes only dense ones, and PyTorch's operations round otherwise.
    assert apart([strided], [twin]) <= (0.0 if DEVICE == "cpu" else 8.0)
    assert strided.stride() != twin.stride()


def groups(params):
    return [
        {"params": params[:2], "lr": 0.03, "betas": (0.8, 0.95)},
        {"params": params[2:4], "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.1},
        {"params": params[4:], "maximize": True, "eps": 1e-3},
    ]


def test_groups_with_settings_of_their_own():
    results = []
    for cls in (NAdam, STOCK):
        params = parameters()
        train(cls(groups(params), lr=0.01), params, 50)
        results.append(params)
    assert apart(*results) < UNITS[torch.float32]


def test_parameters_without_a_gradient_keep_their_own_count():
    results = []
    for cls in (NAdam, STOCK):
        params, gradients = parameters(), Gradients()
        optimizer = cls(params)
        for step in range(30):
            gradients.give(params)
            for i, param in enumerate(params):
                if step % (i + 1):
                    param.grad = None
            optimizer.step()
        results.append((params, [float(optimizer.state[p]["step"]) for p in params]))
    assert apart(results[0][0], results[1][0]) < UNITS[torch.float32]
    assert results[0][1] == results[1][1] == [30.0, 15.0, 10.0, 8.0, 6.0]


def test_a_step_without_any_gradient_changes_nothing():
    params = parameters()
    NAdam(params).step()
    assert equal(params, parameters())


def test_a_group_that_is_added_starts_fresh():
    results = []
    for cls in (NAdam, STOCK):
        params, gradients = parameters(), Gradients()
        optimizer = cls(params[:2], lr=0.01)
        train(optimizer, params, 5, gradients)
        optimizer.add_param_group({"params": params[2:], "lr": 0.1})
        train(optimizer, params, 20, gradients)
        results.append(params)
    assert apart(*results) < UNITS[torch.float32]


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = NAdam(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_closure():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = NAdam([weight])

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert optimizer.step(closure).item() < 3.0


def test_zero_grad_keeping_the_gradients():
    params = parameters()
    optimizer = NAdam(params)
    Gradients().give(params)
    kept = [param.grad for param in params]
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is grad and not grad.any() for param, grad in zip(params, kept, strict=True))


def test_hooks():
    params, seen = parameters(), []
    optimizer = NAdam(params)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    train(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "saved", "loading", "loaded"]


def test_printing():
    ours, stock = (repr(cls(parameters())) for cls in (NAdam, STOCK))
    assert ours == stock


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([
        lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)
    ]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # by SequentialLR itself, in PyTorch 2.6
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    results = []
    for optimizer, params in pair(lr=0.01):
        scheduler, gradients = SCHEDULERS[name](optimizer), Gradients()
        for _ in range(12):
            train(optimizer, params, 1, gradients)
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
        results.append((params, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    assert results[0][1:] == results[1][1:]
    assert apart(results[0][0], results[1][0]) < UNITS[torch.float32]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("carried", [lambda state: state, through_a_file, copy.deepcopy], ids=["as is", "file", "copy"])
@pytest.mark.parametrize(("first", "second"), [(NAdam, STOCK), (STOCK, NAdam), (NAdam, NAdam)])
def test_checkpoints_go_both_ways_in_the_middle_of_a_run(first, second, carried):
    params, gradients = parameters(), Gradients()
    one = first(params, lr=0.02, weight_decay=0.1)
    train(one, params, 20, gradients)
    copied = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = second(copied)
    other.load_state_dict(carried(copy.deepcopy(one.state_dict()) if first is second else one.state_dict()))
    for name in ("lr", "weight_decay"):
        assert other.param_groups[0][name] == one.param_groups[0][name]
    twin_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    twin = first(twin_params)
    twin.load_state_dict(copy.deepcopy(one.state_dict()))
    state = gradients.generator.get_state()
    train(other, copied, 20, gradients)
    gradients.generator.set_state(state)
    train(twin, twin_params, 20, gradients)
    if first is second:
        assert equal(copied, twin_params)
    else:
        assert apart(copied, twin_params) < UNITS[torch.float32]
    assert not equal(copied, params)


def test_an_unbroken_run_and_a_resumed_one_are_equal_bit_for_bit():
    params, gradients = parameters(), Gradients()
    optimizer = NAdam(params, lr=0.02)
    train(optimizer, params, 10, gradients)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]})
    state = gradients.generator.get_state()
    train(optimizer, params, 10, gradients)
    resumed = [torch.nn.Parameter(param) for param in saved["params"]]
    again = NAdam(resumed)
    again.load_state_dict(saved["optimizer"])
    gradients.generator.set_state(state)
    train(again, resumed, 10, gradients)
    assert equal(resumed, params)
    assert again.state[resumed[0]]["mu_product"] == optimizer.state[params[0]]["mu_product"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copied_optimizer_goes_on(copied):
    params, gradients = parameters(), Gradients()
    optimizer = NAdam(params, use_ema=True, gradient_accumulation_steps=3)
    train(optimizer, params, 7, gradients)
    others, other = copied((params, optimizer))
    state = gradients.generator.get_state()
    train(optimizer, params, 7, gradients)
    gradients.generator.set_state(state)
    train(other, others, 7, gradients)
    assert equal(params, others)
    assert other.state[others[0]]["step"] == 4


def test_state_dict_is_that_of_pytorch():
    (ours, params), (stock, others) = pair()
    train(ours, params, 3)
    train(stock, others, 3)
    mine, theirs = ours.state_dict(), stock.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for i, entry in theirs["state"].items():
        assert mine["state"][i].keys() == entry.keys()
        assert [mine["state"][i][name].shape for name in entry] == [value.shape for value in entry.values()]


def test_steps_in_a_state_dict_are_each_their_own():
    params = parameters()
    optimizer = NAdam(params)
    train(optimizer, params, 2)
    state = optimizer.state_dict()["state"]
    state[0]["step"] += 5
    assert [float(entry["step"]) for entry in state.values()] == [7.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_checkpoints_of_adam(cls):
    params, gradients = parameters(), Gradients()
    adam = cls(params, amsgrad=True)
    train(adam, params, 10, gradients)
    optimizer = NAdam(params, lr=0.03)
    with pytest.raises(ValueError, match="another optimizer than NAdam, Adam or AdamW: load_adam_state_dict takes it"):
        optimizer.load_state_dict(adam.state_dict())
    optimizer.load_adam_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert optimizer.state[params[0]]["step"] == 10
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], adam.state[params[0]]["exp_avg"])
    fresh = NAdam(parameters())
    train(fresh, fresh.param_groups[0]["params"], 10)
    products = [o.state[o.param_groups[0]["params"][0]]["mu_product"] for o in (optimizer, fresh)]
    assert abs(products[0] / products[1] - 1) < 1e-12
    train(optimizer, params, 1, gradients)


def test_named_parameters_in_another_order_are_matched_by_name():
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = NAdam([("one", one), ("two", two)])
    one.grad, two.grad = torch.ones(2), torch.full((2,), 2.0)
    optimizer.step()
    other = NAdam([("two", two), ("one", one)])
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[two]["exp_avg"], optimizer.state[two]["exp_avg"])
    assert other.param_groups[0]["param_names"] == ["two", "one"]
    third = NAdam([("two", two), ("three", one)])
    with pytest.raises(ValueError, match=r"\['one', 'three'\]"):
        third.load_state_dict(optimizer.state_dict())


def test_differentiable():
    names = ("exp_avg", "exp_avg_sq", "mu_product")

    def stepped(cls, param, grad, *values):
        param = param.clone()
        param.grad = grad
        optimizer = cls([param], lr=0.1, differentiable=True, weight_decay=0.1)
        state = {"step": torch.tensor(10.0, dtype=torch.float64)}
        state |= {name: value.clone() for name, value in zip(names, values, strict=True)}
        optimizer.state[param].update(state)
        optimizer.step()
        return (param, *(state[name] for name in names))

    torch.manual_seed(0)
    given = [torch.rand(10, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    given.append(torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    ours, stock = ([value.detach() for value in stepped(cls, *given)] for cls in (NAdam, STOCK))
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *values: stepped(NAdam, *values), given)


def test_differentiable_takes_no_extras():
    with pytest.raises(ValueError, match="differentiable=True"):
        NAdam(parameters(), differentiable=True, clipnorm=1.0)
