"""Bad input and faults: each is refused by name, or done right; and where it is refused, nothing has changed.

Numbers are the rows of faults/rows.txt.
"""

import inspect
import multiprocessing
import signal
import threading
import time

import numpy as np
import pytest
import torch
from training import DEVICE, Gradients, apart, equal, parameters, train

import nadam
from nadam.torch import NAdam, NAdamW, settings


def snapshot(optimizer):
    state = optimizer.state_dict()["state"]
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, {i: {name: value.clone() for name, value in entry.items()} for i, entry in state.items()}


def same(one, other):
    entries = one[1].keys() == other[1].keys() and all(
        torch.equal(value, other[1][i][name].to(value.device))
        for i, entry in one[1].items()
        for name, value in entry.items()
    )
    return equal(one[0], other[0]) and entries


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), None])
def test_betas_are_two_numbers(betas):
    with pytest.raises(TypeError, match=r"betas=.*: expected two numbers"):
        NAdam(parameters(), betas=betas)


@pytest.mark.parametrize(("name", "value"), [("lr", torch.tensor(float("inf"))), ("betas", (0.9, 1.0))])
def test_row_5_a_setting_of_one_group_out_of_range(name, value):
    with pytest.raises(ValueError, match=r"Invalid .*expected 0 <= "):
        NAdam(parameters(), **{name: value})
    params = parameters()
    optimizer = NAdam([{"params": params[:2]}, {"params": params[2:]}])
    train(optimizer, params, 2)
    before, good = snapshot(optimizer), optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.step()
    optimizer.param_groups[1][name] = good
    assert same(before, snapshot(optimizer))
    train(optimizer, params, 1)


def test_row_6_the_same_parameter_twice_and_shared_memory():
    weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        NAdam([{"params": [weight]}, {"params": [weight]}])
    whole = torch.ones(4)
    halves = [torch.nn.Parameter(whole[:3]), torch.nn.Parameter(whole[2:])]
    optimizer = NAdam(halves)
    Gradients().give(halves)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert torch.equal(whole, torch.ones(4))
    expanded = torch.nn.Parameter(torch.ones(1).expand(3))
    expanded.grad = torch.ones(3)
    with pytest.raises(ValueError, match="share memory"):
        NAdam([expanded]).step()
    own = torch.nn.Parameter(torch.ones(3))
    own.grad = own.detach()
    with pytest.raises(ValueError, match="shares memory"):
        NAdam([own]).step()


def test_row_7_nan_spreads_as_in_pytorch():
    results = []
    for cls in (NAdam, torch.optim.NAdam):
        params, gradients = parameters(), Gradients()
        gradients.give(params)
        params[0].grad[0, 0], params[1].grad[2] = float("nan"), float("inf")
        cls(params).step()
        results.append([torch.isnan(param) for param in params])
    assert equal(*results)


def test_row_8_float16():
    for value, expected in ((1e-5, 0.99), (0.0, 1.0), (300.0, 0.99)):
        param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
        param.grad = torch.full((3,), value, dtype=torch.float16)
        NAdam([param], lr=0.01).step()
        assert abs(float(param[0].detach()) - expected) < 0.002


def test_row_9_a_large_gradient():
    for setting in ({"global_clipnorm": 1.0}, {"clipnorm": 1.0}):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.full((4,), 1e25)
        optimizer = NAdam([param], lr=0.01, **setting)
        optimizer.step()
        assert abs(optimizer.last_step.grad_norm / 2e25 - 1) < 1e-6
        assert torch.isfinite(param).all()
        assert abs(float(optimizer.state[param]["exp_avg"][0]) - 0.05) < 1e-6


def test_row_10_bfloat16_as_float32():
    half, whole = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    optimizers = NAdam([half], lr=1e-4, remainder=True), NAdam([whole], lr=1e-4)
    for _ in range(1000):
        for param, optimizer in zip((half, whole), optimizers, strict=True):
            param.grad = torch.ones(3, dtype=param.dtype)
            optimizer.step()
    assert float(whole[0].detach()) < 0.91
    assert abs(float(half[0].detach()) - float(whole[0].detach())) < 0.002


def test_row_13_an_unaligned_parameter():
    memory = torch.zeros(4 * 5 + 1, dtype=torch.uint8, device="cpu")  # PyTorch itself makes no such tensors
    array = np.frombuffer(memory.numpy(), np.uint8)[1:].view(np.float32)
    with pytest.warns(UserWarning, match="not writable") if not array.flags.writeable else pytest.MonkeyPatch.context():
        unaligned = torch.nn.Parameter(torch.from_numpy(array))
    aligned = torch.nn.Parameter(unaligned.detach().clone())
    assert unaligned.data_ptr() % 4
    for param in (unaligned, aligned):
        train(NAdam([param]), [param], 3)
    assert torch.equal(unaligned, aligned)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_row_16_a_parameter_that_is_no_real_number(dtype):
    optimizer = NAdam(parameters())
    with pytest.raises(TypeError, match=r"params\[0\]: dtype"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="a gradient has the dtype of its parameter")
def test_row_20_gradients_whose_dtype_is_let_free():
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32):
        params = parameters(shapes=[(3, 4), (5,)])
        optimizer = NAdam(params)
        train(optimizer, params, 2)
        params[1].grad_dtype = None
        params[1].grad = torch.full((5,), 2, dtype=dtype, device=DEVICE)
        optimizer.step()
        results.append(params)
        before = snapshot(optimizer)
        params[1].grad = torch.ones(5, dtype=torch.complex64, device=DEVICE)
        message = r"complex64, expected real numbers for one of torch\.float32"
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert same(before, snapshot(optimizer))
    assert all(equal(results[0], other) for other in results[1:])


def test_row_18_a_sparse_gradient():
    params = parameters(shapes=[(3, 4), (5,)])
    optimizer = NAdam(params)
    train(optimizer, params, 1)
    before = snapshot(optimizer)
    params[1].grad = None
    params[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(RuntimeError, match="NAdam does not support sparse gradients"):
        optimizer.step()
    assert same(before, snapshot(optimizer))


def test_a_parameter_that_is_converted_takes_its_state_along():
    param = torch.nn.Parameter(torch.ones(300))
    optimizer = NAdam([param])
    train(optimizer, [param], 2)
    param.grad, param.data = None, param.data.double()
    train(optimizer, [param], 2)
    assert optimizer.state[param]["exp_avg"].dtype == torch.float64
    param.grad, param.data = None, param.data[:5]
    param.grad = torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"exp_avg: shape \(300,\), but its parameter has \(5,\)"):
        optimizer.step()


def test_state_that_is_exchanged_is_used():
    params = parameters()
    optimizer = NAdam(params)
    train(optimizer, params, 3)
    for param in params:
        optimizer.state[param] = {name: value.clone() for name, value in optimizer.state[param].items()}
        optimizer.state[param]["exp_avg"] = torch.full_like(param, 7.0)
    train(optimizer, params, 1)
    assert (optimizer.state[params[0]]["exp_avg"] > 4).all()
    optimizer.state.clear()
    train(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 1


def broken(change):
    params = parameters()
    other = NAdam(params)
    train(other, params, 2)
    state = {
        "state": {i: dict(entry) for i, entry in other.state_dict()["state"].items()},
        "param_groups": other.state_dict()["param_groups"],
    }
    change(state)
    return state


def test_a_checkpoint_that_is_none():
    with pytest.raises(ValueError, match="expected a dict, got NoneType"):
        NAdam(parameters()).load_state_dict(None)


BROKEN = {
    r"\['exp_avg'\]: shape \(5,\), expected \(3, 4\)": lambda s: s["state"][0].update(exp_avg=torch.zeros(5)),
    r"\['exp_avg_sq'\]: it holds NaN": lambda s: s["state"][0].update(exp_avg_sq=torch.full((3, 4), float("nan"))),
    r"\['exp_avg_sq'\]: it holds a negative": lambda s: s["state"][0].update(exp_avg_sq=torch.full((3, 4), -1.0)),
    r"\['step'\]: 1.5, expected an integer": lambda s: s["state"][0].update(step=torch.tensor(1.5)),
    r"\['mu_product'\]: 2.0, expected 0 <=": lambda s: s["state"][0].update(mu_product=torch.tensor(2.0)),
    r"state\[1\]: no 'exp_avg'": lambda s: s["state"][1].pop("exp_avg"),
    r"no 'param_groups'": lambda s: s.pop("param_groups"),
    r"different number of parameter groups": lambda s: s["param_groups"].append(s["param_groups"][0]),
    r"state: it has entries of \[0\], param_groups parameters of \[-1, 1": lambda s: s["param_groups"][0].update(
        params=[-1, *s["param_groups"][0]["params"][1:]]
    ),
    r"doesn't match the size": lambda s: s["param_groups"][0]["params"].pop(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_row_23_damaged_state_is_refused(message):
    params = parameters()
    optimizer = NAdam(params)
    train(optimizer, params, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(BROKEN[message]))
    assert same(before, snapshot(optimizer))
    train(optimizer, params, 1)
    assert optimizer.last_step.step == 4


def test_row_25_and_32_an_interrupt_leaves_counters_that_agree():
    """The step of 20M elements is interrupted somewhere; each tensor's step tells whether any of it has moved."""
    params = [torch.nn.Parameter(torch.ones(2_000_000)) for _ in range(10)]
    optimizer = NAdam(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    begin = time.perf_counter()
    optimizer.step()
    duration = time.perf_counter() - begin
    seen, main = 0, threading.main_thread().ident
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        count, first = float(optimizer.state[params[0]]["step"]), float(params[0][0].detach())
        timer = threading.Timer(share * duration, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            optimizer.step()
            time.sleep(60)
        except KeyboardInterrupt:
            seen += 1
        moved = float(params[0][0].detach()) != first
        assert float(optimizer.state[params[0]]["step"]) - count == moved
    assert seen == 5
    optimizer.step()


def child(param, optimizer, queue):
    for _ in range(2):  # nothing else: PyTorch's own operations on large tensors hang after a fork
        optimizer.step()
    queue.put(param.detach().cpu().numpy().tobytes())


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA is not usable in a forked process")
def test_row_26_fork_after_a_step():
    param = torch.nn.Parameter(torch.ones(1 << 21))
    optimizer = NAdam([param], global_clipnorm=1.0)
    train(optimizer, [param], 1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(param, optimizer, queue))
    process.start()
    found = queue.get(timeout=60)
    process.join()
    for _ in range(2):
        optimizer.step()
    assert found == param.detach().cpu().numpy().tobytes()


def test_row_27_eight_threads_with_an_optimizer_each():
    results = [None] * 8

    def work(i):
        params = parameters(shapes=[(300, 1000), (7,)])
        train(NAdam(params, global_clipnorm=1.0), params, 10)
        results[i] = params

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(results[0], other) for other in results[1:])


def test_row_27_two_threads_with_one_optimizer():
    params, others = parameters(shapes=[(300, 1000), (7,)]), parameters(shapes=[(300, 1000), (7,)])
    for chosen in (params, others):
        Gradients().give(chosen)
    optimizer, alone = NAdam(params), NAdam(others)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(40):
        alone.step()
    assert equal(params, others)


def test_row_31_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 4):
        nadam.set_num_threads(count)
        params = parameters(shapes=[(1500, 1000), (7,)])
        train(NAdam(params, global_clipnorm=1.0, weight_decay=0.1), params, 3)
        results.append(params)
    nadam.set_num_threads(None)
    assert all(equal(results[0], other) for other in results[1:])


def test_autograd_sees_that_parameters_have_changed():
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight**2).sum()
    weight.grad = torch.ones(3)
    NAdam([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_that_is_a_conjugate_or_negative_view():
    results = []
    for resolve in (True, False):
        params = parameters(torch.complex64)
        optimizer = NAdam(params)
        for _ in range(3):
            for param in params:
                grad = torch.ones_like(param) * (1 + 2j)
                grad = grad.detach().conj()
                param.grad = grad.resolve_conj() if resolve else grad
            optimizer.step()
        results.append(params)
    assert equal(*results)
    assert apart(results[0], parameters(torch.complex64)) > 1.0


def saved(tmp_path):
    params, gradients = parameters(torch.bfloat16), Gradients()
    optimizer = NAdam([{"params": params[:3]}, {"params": params[3:], "lr": torch.tensor(0.01)}], remainder=True)
    train(optimizer, params, 5, gradients)
    path = tmp_path / "run.nadam"
    nadam.checkpoint.save(path, {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]})
    return path, params, optimizer, gradients


def test_rows_28_and_29_a_file_of_ours_is_whole_and_resumes(tmp_path):
    path, params, optimizer, gradients = saved(tmp_path)
    state = nadam.checkpoint.load(path)
    others = [torch.nn.Parameter(param.to(DEVICE)) for param in state["params"]]
    other = NAdam([{"params": others[:3]}, {"params": others[3:]}], remainder=True)
    other.load_state_dict(state["optimizer"])
    assert other.param_groups[0]["betas"] == (0.9, 0.999)
    position = gradients.generator.get_state()
    train(optimizer, params, 5, gradients)
    gradients.generator.set_state(position)
    train(other, others, 5, gradients)
    assert same(snapshot(optimizer), snapshot(other))


def test_row_29_one_flipped_bit_or_a_cut_is_refused(tmp_path):
    path, *_ = saved(tmp_path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 100, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            nadam.checkpoint.load(path)
        path.write_bytes(content[:place])
        with pytest.raises(ValueError, match="damaged"):
            nadam.checkpoint.load(path)


def test_a_step_as_a_number_as_in_old_checkpoints():
    params = parameters()
    optimizer = torch.optim.NAdam(params)
    train(optimizer, params, 3)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"], entry["mu_product"] = 3, float(entry["mu_product"])
    del state["param_groups"][0]["maximize"]
    other = NAdam(params)
    other.load_state_dict(state)
    train(other, params, 1)
    assert other.state[params[0]]["step"] == 4


@pytest.mark.parametrize("name", [*settings.EXTRAS, *settings.STATE_OPTIONS])
def test_a_setting_of_the_whole_optimizer_in_a_group(name):
    params, message = parameters(), rf"^{name}=1 in param_groups\[%d\]: expected as an argument of the constructor"
    with pytest.raises(ValueError, match=message % 0):
        NAdam([{"params": params, name: 1}])
    optimizer = NAdam(params[:2])
    with pytest.raises(ValueError, match=message % 1):
        optimizer.add_param_group({"params": params[2:], name: 1})
    train(optimizer, params[:2], 3)
    before = snapshot(optimizer)
    optimizer.param_groups[0][name] = 1  # later: seen at the next step
    with pytest.raises(ValueError, match=message % 0):
        optimizer.step()
    with pytest.raises(ValueError, match=message % 0):
        optimizer.load_state_dict(optimizer.state_dict())
    assert same(before, snapshot(optimizer))
    optimizer.param_groups[0][name] = optimizer._of_all()[name]  # as ZeroRedundancyOptimizer has it
    optimizer.param_groups[0]["note"] = "the user's"
    train(optimizer, params[:2], 1)


@pytest.mark.parametrize("name", [*settings.DEFAULTS, *settings.EXTRAS, *settings.STATE_OPTIONS])
def test_a_setting_as_an_attribute(name):
    place = rf"set in param_groups\[i\]\['{name}'\]" if name in settings.DEFAULTS else "an argument of the constructor"
    for cls in (NAdam, NAdamW):
        optimizer = cls(parameters())
        with pytest.raises(AttributeError, match=rf"^{name}=1: not an attribute of {cls.__name__}: it is {place}"):
            setattr(optimizer, name, 1)
        assert not hasattr(optimizer, name)
        optimizer.grad_scale = optimizer.found_inf = None  # GradScaler's
        optimizer.anything = 1


@pytest.mark.parametrize("cls", [NAdam, NAdamW])
@pytest.mark.parametrize(("name", "meant"), [
    ("beta1", "betas"), ("epsilon", "eps"), ("learning_rate", "lr"), ("max_grad_norm", "global_clipnorm"),
    ("weight_decya", "weight_decay"),
])  # fmt: skip
def test_an_unknown_argument_names_the_one_that_is_meant(cls, name, meant):
    with pytest.raises(
        TypeError, match=rf"^{cls.__name__}\(\) got an unexpected keyword argument '{name}': .* {meant}\?$"
    ):
        cls(parameters(), **{name: 1})


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "momentum_decay", "clipnorm", "ema_momentum"])
def test_a_bool_for_a_number(name):
    for value in (True, torch.tensor(True)):
        with pytest.raises(TypeError, match=f"^{name}=.*True.*: expected a number"):
            NAdam(parameters(), **{name: value})
    optimizer, params = NAdam(parameters()), parameters()
    if name in optimizer.defaults:
        with pytest.raises(TypeError, match=f"^{name}=True: expected a number"):
            optimizer.add_param_group({"params": params, name: True})
    with pytest.raises(TypeError, match=r"^betas\[1\]=True: expected a number"):
        NAdam(params, betas=(0.9, True))


def test_a_model_or_a_used_up_generator_for_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    for params in (model, [{"params": model}]):
        with pytest.raises(
            TypeError, match=r"^params: expected model.parameters\(\), got the model itself, a Sequential"
        ):
            NAdam(params)
    generator = model.parameters()
    assert len(NAdam(generator).param_groups[0]["params"]) == 2
    with pytest.raises(ValueError, match=r"empty parameter list: .* a generator, as .* gives, can be used once"):
        NAdam(generator)
    with pytest.raises(ValueError, match="empty parameter list"):
        NAdam([])


def test_a_step_within_swap_ema():
    params = parameters()
    optimizer = NAdam(params, use_ema=True)
    train(optimizer, params, 3)
    before, calls = snapshot(optimizer), []
    with optimizer.swap_ema(), optimizer.swap_ema():
        for closure in (None, lambda: calls.append(1)):
            with pytest.raises(RuntimeError, match="step: called within swap_ema"):
                optimizer.step(closure)
    assert not calls
    assert same(before, snapshot(optimizer))
    with pytest.raises(KeyError), optimizer.swap_ema():
        raise KeyError
    train(optimizer, params, 1)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("saved", "cls", "remedy"), [
    (torch.optim.Adam, NAdam, "load_adam_state_dict"), (torch.optim.AdamW, NAdam, "load_adam_state_dict"),
    (torch.optim.Adam, NAdamW, "load_adam_state_dict"), (NAdamW, NAdam, "nadam.torch.NAdamW"),
])  # fmt: skip
def test_the_state_of_another_optimizer_names_what_takes_it(saved, cls, remedy, steps):
    params = parameters()
    other, optimizer = saved(params), cls(params)
    train(other, params, steps)
    if saved is NAdamW and not steps:
        return  # there is nothing yet by which they differ
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]: this is the state of another .* {remedy} takes it$"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state
    assert "amsgrad" not in optimizer.param_groups[0]


def test_the_repr_shows_the_extras_that_are_set():
    given = {"global_clipnorm": 1.0, "use_ema": True, "exp_avg_dtype": torch.bfloat16}
    lines = [f"{name}: {value}" for name, value in given.items()]
    plain, full = (repr(NAdam(parameters(), **chosen)).split("\n") for chosen in ({}, given))
    assert plain == repr(torch.optim.NAdam(parameters())).split("\n")
    assert full == [plain[0], *lines, *plain[1:]]


def test_the_tables_of_settings_are_the_signatures():
    signature = inspect.signature(NAdam).parameters
    table = {**settings.EXTRAS, **settings.STATE_OPTIONS}
    assert {name: signature[name].default for name in table} == table
    assert set(signature) - {"params"} == {*table, *settings.DEFAULTS}
    fixed = {"momentum_decay", "decoupled_weight_decay", "differentiable", "bias_correction"}
    others = inspect.signature(NAdamW).parameters
    assert {name: others[name].default for name in table if name not in fixed} == {
        n: table[n] for n in table if n not in fixed
    }
