"""NAdam with state of 8 bits and bfloat16 parameters of 24: against wide state, over files and threads; refusals."""

import copy
import io

import numpy as np
import pytest
import torch
from test_torch_extras import by_arrays
from training import Gradients, equal, parameters, train

import nadam
from nadam.core.compressed import widened
from nadam.torch import NAdam, NAdamW

SHAPES = [(70, 90), (5,), (4096,), (3, 40, 50)]
LARGE = {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}
SETTINGS = [
    {},
    {"global_clipnorm": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True, "use_ema": True},
    {"gradient_accumulation_steps": 2, "clipvalue": 0.5, "skip_nonfinite": True},
]


def wide_moments(state):
    """The moments of a parameter in float32."""
    if "exp_avg_scale" not in state:
        return state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
    codes = state["exp_avg"]
    order = sorted(range(codes.dim()), key=lambda d: -codes.stride(d))  # groups are in the order of memory
    flat = [state[name].permute(order).reshape(-1).numpy() for name in ("exp_avg", "exp_avg_sq")]
    made = widened(*flat, state["exp_avg_scale"].numpy(), state["exp_avg_sq_scale"].numpy())
    shape, back = [codes.shape[d] for d in order], [order.index(d) for d in range(codes.dim())]
    return [array.reshape(shape).transpose(back) for array in made]


def whole(param, state):
    """A parameter's value, with its remainder."""
    rest = state.get("remainder")
    if rest is None:
        return param.detach().float()
    upper = param.detach().view(torch.int16).to(torch.int32) << 16
    return (upper + (rest.to(torch.int32) << (8 if rest.dtype == torch.int8 else 0))).view(torch.float32)


def bits(optimizer, params):
    state = [value for param in params for value in optimizer.state[param].values()]
    return [tensor.detach().clone() for tensor in [*params, *state]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_are_those_of_numpy(settings, dtype):
    """The same kernel in the same order, on tensors and on arrays."""
    params = parameters(dtype, shapes=SHAPES)
    arrays = [param.detach().numpy().copy() for param in params]
    ours = NAdam(params, lr=0.01, state_bits=8, seed=7, eps=1e-7, momentum_decay=1.0, **settings)
    options = {name: value for name, value in settings.items() if name != "decoupled_weight_decay"}
    other = nadam.Nadam(0.01, state_bits=8, seed=7, **options)
    gradients = Gradients()
    for _ in range(6):
        gradients.give(params)
        ours.step()
        other.apply([param.grad.numpy() for param in params], arrays)
    for param, array, entry in zip(params, arrays, other._parameters.entries, strict=True):
        np.testing.assert_array_equal(param.detach().numpy(), array)
        state = ours.state[param]
        assert (set(state) >= LARGE) == (param.numel() >= 4096)
        for name, kept in entry.state.items():
            if name != "accumulator":
                np.testing.assert_array_equal(state[name].numpy(), kept)


@pytest.mark.parametrize("state_bits", [None, 8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_24_bits_follow_32(settings, state_bits):
    """One step from the same state: what is kept of a parameter is within a unit of 24 bits of what float32 has."""
    params = parameters(torch.bfloat16, shapes=SHAPES)
    ours = NAdam(params, lr=0.01, remainder=8, state_bits=state_bits, seed=3, **settings)
    twins = [torch.nn.Parameter(param.detach().float()) for param in params]
    other = NAdam(twins, lr=0.01, state_bits=state_bits, seed=3, **settings)
    gradients = Gradients()
    went_up = []
    for _ in range(8):
        gradients.give(params)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.float()
            if param in ours.state:
                twin.data.copy_(whole(param, ours.state[param]))
        ours.step()
        other.step()
        for param, twin in zip(params, twins, strict=True):
            state, theirs = ours.state[param], other.state[twin]
            assert state["remainder"].dtype == torch.int8
            error = (whole(param, state) - twin.detach()).double()
            unit = torch.frexp(twin.detach())[1].double().sub(16).exp2()
            assert (error.abs() <= unit).all()
            went_up.append((error / unit).flatten())
            for name in LARGE & set(state):
                assert torch.equal(state[name], theirs[name])
    assert abs(torch.cat(went_up).mean()) < 0.02  # without bias


def test_small_updates_add_up():
    """Of 2**-20 of a parameter, a sixteenth of a unit of 24 bits: to nearest each would be lost."""
    param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = NAdam([param], lr=2.0**-20, remainder=8, momentum_decay=float("inf"), betas=(0.0, 0.0), eps=0.0)
    for _ in range(256):
        param.grad = torch.ones_like(param)
        optimizer.step()
    moved = 1.0 - float(whole(param, optimizer.state[param]).double().mean())
    assert abs(moved / (256 * 2.0**-20) - 1) < 0.02


@pytest.mark.parametrize("kept", [{"state_bits": 8}, {"remainder": 8}, {"remainder": 8, "state_bits": 8}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(kept):
    def made():
        params = parameters(torch.bfloat16, shapes=SHAPES)
        return NAdam(params, lr=0.01, seed=5, **kept), params

    (whole_run, params), (first, others) = made(), made()
    gradients, twin = Gradients(), Gradients()
    train(whole_run, params, 9, gradients)
    train(first, others, 4, twin)
    file = io.BytesIO()
    torch.save([first.state_dict(), others], file)
    file.seek(0)
    state, loaded = torch.load(file, weights_only=False)
    second, _ = NAdam(loaded, lr=0.01, seed=5, **kept), others
    second.load_state_dict(state)
    copied = copy.deepcopy((second, loaded))
    twin_state = twin.generator.get_state()
    train(second, loaded, 5, twin)
    assert all(map(torch.equal, bits(second, loaded), bits(whole_run, params)))
    twin.generator.set_state(twin_state)
    train(*copied, 5, twin)
    assert all(map(torch.equal, bits(*copied), bits(whole_run, params)))


def test_bits_do_not_depend_on_threads():
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 4) * 7:
            torch.set_num_threads(count)
            params = parameters(torch.bfloat16, shapes=[(700, 900), (5,)])
            optimizer = NAdam(params, lr=0.01, remainder=8, state_bits=8, global_clipnorm=1.0)
            train(optimizer, params, 3)
            found.append(bits(optimizer, params))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, each, found[0])) for each in found)


def test_at_most_5_2_bytes_are_kept_of_a_parameter():
    param = torch.nn.Parameter(torch.ones(1 << 20, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = NAdam([param], remainder=8, state_bits=8)
    optimizer.step()
    kept = [param, *(value for value in optimizer.state[param].values() if value.dim())]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) <= 5.2 * param.numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_wide_state_is_taken_over_and_back(layout):
    """Wide moments are rounded to codes; codes become the numbers that they are."""
    param = torch.nn.Parameter(torch.randn(16, 8, 9, 9, generator=torch.Generator().manual_seed(0)))
    if layout == "channels_last":
        param = torch.nn.Parameter(param.detach().to(memory_format=torch.channels_last))
    wide, small = NAdam([param], lr=0.01), NAdam([param], lr=0.01, state_bits=8)
    train(wide, [param], 3)
    with pytest.warns(UserWarning, match=r"state_bits=8: the moments of \['params\[0\]'\] are rounded"):
        small.load_state_dict(wide.state_dict())
    first, second = wide_moments({name: value.contiguous() for name, value in wide.state[param].items()})
    assert small.state[param]["exp_avg"].stride() == param.stride()
    again = NAdam([param], lr=0.01)
    again.load_state_dict(small.state_dict())
    back = again.state[param]
    assert back["exp_avg"].dtype == torch.float32
    assert "exp_avg_scale" not in back
    assert np.abs(back["exp_avg"].numpy() - first).max() <= np.abs(first).max() / 63
    assert np.abs(back["exp_avg_sq"].numpy() / second - 1).max() <= 1 / 16
    twice = NAdam([param], lr=0.01, state_bits=8)
    twice.load_state_dict(again.state_dict())
    for one, other in zip(wide_moments(twice.state[param]), wide_moments(small.state[param]), strict=True):
        np.testing.assert_array_equal(one, other)  # scales may be smaller now
    train(twice, [param], 1)


def test_remainders_of_8_and_16_bits_are_taken_for_each_other():
    params = parameters(torch.bfloat16, shapes=[(50, 100)])
    wide, small = NAdam(params, remainder=True), NAdam(params, remainder=8)
    train(wide, params, 3)
    small.load_state_dict(wide.state_dict())
    near, exact = (whole(params[0], optimizer.state[params[0]]) for optimizer in (small, wide))
    assert ((near / exact - 1).abs() <= 2.0**-15).all()
    wide.load_state_dict(small.state_dict())
    assert torch.equal(whole(params[0], wide.state[params[0]]), near)


@pytest.mark.parametrize(("dtype", "remainder"), [
    (torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, 8),
], ids=str)  # fmt: skip
def test_averages_are_swapped_in_and_out(dtype, remainder):
    params = parameters(dtype, shapes=SHAPES)
    optimizer = NAdam(params, lr=0.1, remainder=remainder, state_bits=8, use_ema=True)
    train(optimizer, params, 4)
    before = bits(optimizer, params)
    with optimizer.swap_ema():
        for param in params:
            ema, value = optimizer.state[param]["ema"], whole(param, optimizer.state[param])
            expected = ema if remainder else ema.to(dtype).float()
            assert ((value - expected).abs() <= ema.abs() * 2.0**-16).all()
    assert all(map(torch.equal, bits(optimizer, params), before))


def test_a_gradient_that_is_not_finite_shows():
    for value in (float("nan"), float("inf")):
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = NAdam([param], remainder=8, state_bits=8)
        for grad in (value, 1.0):
            param.grad = torch.full_like(param, grad)
            optimizer.step()
        assert param.isnan().all()


def test_what_has_no_kernel_is_refused():
    param = torch.nn.Parameter(torch.ones(4096))
    param.grad = torch.ones(4096)
    for kept in ({"state_bits": 8}, {"remainder": 8}):
        optimizer = NAdam([param], **kept)
        with by_arrays(), pytest.raises(RuntimeError, match=r"(state_bits|remainder)=8: there is no kernel"):
            optimizer.step()
        assert param.detach().eq(1).all()
        with pytest.raises(ValueError, match="differentiable=True"):
            NAdam([param], differentiable=True, **kept)


@pytest.mark.parametrize("make", [NAdam, NAdamW])
@pytest.mark.parametrize(("kept", "message"), [
    ({"state_bits": 4}, "state_bits=4: expected 8 or None"),
    ({"remainder": 4}, "remainder=4: expected 8, 16"),
    ({"remainder": "8"}, "remainder='8': expected 8, 16"),
    ({"state_bits": 8, "exp_avg_dtype": torch.bfloat16}, "exp_avg_dtype=torch.bfloat16: expected None"),
], ids=str)  # fmt: skip
def test_other_formats_are_refused(make, kept, message):
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.ones(3))], **kept)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda entry: entry.pop("exp_avg_scale"), "expected scales of both"),
    (lambda entry: entry.update(exp_avg=entry["exp_avg"].float()), "expected scales of both"),
    (lambda entry: entry.update(exp_avg_sq_scale=entry["exp_avg_sq_scale"][:-1]), "shape"),
    (lambda entry: [entry.pop(name) for name in ("exp_avg_scale", "exp_avg_sq_scale")], "without their scales"),
    (lambda entry: entry.update(remainder=entry["exp_avg"].float()), r"remainder.*float32"),
], ids=["no scale", "wide", "short", "no scales", "remainder"])  # fmt: skip
def test_damaged_codes_are_refused_and_nothing_changes(damage, message):
    params = parameters(torch.bfloat16, shapes=[(70, 90)])
    optimizer = NAdam(params, remainder=8, state_bits=8)
    train(optimizer, params, 2)
    state, before = copy.deepcopy(optimizer.state_dict()), bits(optimizer, params)
    damage(state["state"][0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert all(map(torch.equal, bits(optimizer, params), before))


def test_draws_do_not_depend_on_how_a_gradient_lies():
    """Both kinds of stochastic rounding at once, of a tensor in several chunks; a strided gradient comes in pieces."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(torch.ones(8, 64, 12, 12, dtype=torch.bfloat16))
        optimizer = NAdam([param], lr=0.01, remainder=8, exp_avg_dtype=torch.bfloat16)
        for i in range(2):
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16)
            param.grad = grad.to(memory_format=layout)
            optimizer.step()
        found.append(bits(optimizer, [param]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("scales", [
    torch.zeros(64, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)[::2], torch.zeros(128),
], ids=["short", "strided", "dtype"])  # fmt: skip
def test_scales_that_do_not_fit_are_refused(scales):
    params = parameters(shapes=[(60, 64)], dtype=torch.float32) + parameters(shapes=[(4096,)])
    optimizer = NAdam(params, state_bits=8)
    train(optimizer, params, 2)
    optimizer.state[params[1]]["exp_avg_scale"] = scales
    before = bits(optimizer, params)
    with pytest.raises(ValueError, match=r"exp_avg_scale: .*expected contiguous torch.uint8 of shape \(128,\)"):
        optimizer.step()
    assert all(map(torch.equal, bits(optimizer, params), before))


def test_nadamw_keeps_8_bits_too():
    params, others = (parameters(torch.bfloat16, shapes=SHAPES) for _ in range(2))
    ours = NAdamW(params, remainder=8, state_bits=8, seed=2)
    rule = {"momentum_decay": float("inf"), "bias_correction": "adam", "weight_decay": 1e-2}
    twin = NAdam(others, lr=1e-3, decoupled_weight_decay=True, remainder=8, state_bits=8, seed=2, **rule)
    train(ours, params, 4)
    train(twin, others, 4)
    assert equal(params, others)
