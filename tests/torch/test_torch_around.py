"""What goes around an optimizer in PyTorch: AMP, torch.compile, averaged models, an optimizer in the backward pass."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import DEVICE, Gradients, apart, drawn, equal, parameters, seeded, train

from nadam.torch import NAdam

STOCK = torch.optim.NAdam


def scaled_run(cls, spoil, **options):
    params = parameters()
    optimizer = cls(params, eps=0.1, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=3)
    gradients, scales = Gradients(), []
    for step in range(8):
        gradients.give(params)
        for param in params:
            param.grad *= scaler.get_scale() if scales else 2.0**10
        scaler.scale(torch.zeros(()))  # as in a loop, where it is made on the first call
        if step == spoil:
            params[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return params, scales, optimizer


@pytest.mark.parametrize("spoil", [None, 4])
def test_grad_scaler(spoil):
    (params, scales, optimizer), (others, wanted, _) = scaled_run(NAdam, spoil), scaled_run(STOCK, spoil)
    assert scales == wanted
    assert apart(params, others) < 60.0
    assert optimizer.last_step.skipped_steps == (spoil is not None)
    assert optimizer.state[params[0]]["step"] == 8 - (spoil is not None)


def test_grad_scaler_leaves_unscaling_to_the_step():
    """So that the gradients are read once less, and clipping is of unscaled ones."""
    params, _, optimizer = scaled_run(NAdam, None, global_clipnorm=0.5)
    assert max(float(p.grad.abs().max()) for p in params if p.numel()) > 100.0  # still scaled
    assert 0.1 < optimizer.last_step.grad_norm < 100.0


def test_grad_scaler_after_unscaling():
    params, others = parameters(), parameters()
    for cls, chosen in ((NAdam, params), (STOCK, others)):
        optimizer, scaler = cls(chosen, eps=0.1), torch.amp.GradScaler(DEVICE, init_scale=4.0)
        scaler.scale(torch.zeros(()))
        Gradients(scale=4.0).give(chosen)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(chosen, 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert apart(params, others) < 4.0


@pytest.mark.parametrize("whole", [False, True], ids=["step", "training step"])
def test_compile(whole):
    torch.compiler.reset()
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        optimizer = NAdam(model.parameters(), lr=0.01, global_clipnorm=1.0)

        def backward(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            (model(x) ** 2).mean().backward()

        def training_step(x, backward=backward, optimizer=optimizer):
            backward(x)
            optimizer.step()

        step = optimizer.step
        if compiled and whole:
            training_step = torch.compile(training_step, backend="eager")
        elif compiled:
            step = torch.compile(step, backend="eager")
        for i in range(4):
            x = drawn(seeded(i), (8, 4))
            if whole:
                training_step(x)
            else:
                backward(x)
                step()
        results.append(list(model.parameters()))
        assert optimizer.last_step.step == 4
    assert apart(*results) < 4.0
    torch.compiler.reset()


def test_averaged_model_and_ours():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = NAdam(model.parameters(), lr=0.01, use_ema=True, ema_momentum=0.9)
    params, gradients = list(model.parameters()), Gradients()
    for _ in range(10):
        train(optimizer, params, 1, gradients)
        averaged.update_parameters(model)
    with optimizer.swap_ema():
        for own, other in zip(params, averaged.module.parameters(), strict=True):
            torch.testing.assert_close(own, other)


def test_an_optimizer_in_the_backward_pass():
    """One optimizer a parameter, whose gradient is gone as soon as it is used."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        optimizers = {param: NAdam([param], lr=0.01) for param in model.parameters()}

        def step(param, optimizers=optimizers):
            optimizers[param].step()
            optimizers[param].zero_grad()

        if fused:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(step)
        for i in range(5):
            x = drawn(seeded(i), (8, 4))
            (model(x) ** 2).mean().backward()
            if fused:
                assert all(param.grad is None for param in model.parameters())
            else:
                for param in model.parameters():
                    step(param)
        results.append(list(model.parameters()))
    assert equal(*results)


def test_a_module_that_is_moved_to_another_dtype_by_autocast_is_left_alone():
    model = torch.nn.Linear(4, 3)
    optimizer = NAdam(model.parameters(), lr=0.01)
    with torch.autocast(DEVICE, torch.bfloat16):
        model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert model.weight.dtype == torch.float32
    assert optimizer.last_step.step == 1


def test_numbers_of_the_documentation():
    param = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = NAdam([param], lr=1e-3, eps=1e-7)
    for t in range(1, 1001):
        param.grad = torch.tensor(0.1 + 0.3 * np.sin(t), dtype=torch.float64)
        optimizer.step()
        if t in (1, 10, 1000):
            expected = {1: 0.998943549, 10: 0.995777853, 1000: 0.576271844}[t]
            assert abs(param.item() - expected) < 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"use_ema": True, "clipnorm": 1.0}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_state_is_where_its_parameter_is(options):
    """Whatever device tensors are made on where none is named."""
    results = []
    for default in (DEVICE, "meta"):
        params, gradients = parameters(shapes=[(3, 4), (), (1 << 20,)]), Gradients()
        copied = copy.deepcopy(params)
        with torch.device(default):
            optimizer = NAdam(params, lr=0.02, **options)
            train(optimizer, params, 3, gradients)
            other = NAdam(copied, lr=0.02, **options)
            other.load_state_dict(pickle.loads(pickle.dumps(optimizer)).state_dict())
            train(other, copied, 3, gradients)
        results.append([*params, *copied])
    assert equal(*results)
