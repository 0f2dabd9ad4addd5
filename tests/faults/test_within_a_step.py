"""While a step is at work, other threads wait, and a signal handler is refused: rows 25 and 27."""

import threading
from copy import deepcopy
from importlib import import_module

import numpy as np
import pytest

from faults.bad_input import GRADS, built, same
from hosts import HOSTS

NAMES = [name for name in ("numpy", "torch") if HOSTS[name]().available()]
CALLS = {
    "step": lambda host, state: host.step(GRADS),
    "state_dict": lambda host, state: host.optimizer.state_dict(),
    "load_state_dict": lambda host, state: host.optimizer.load_state_dict(state),
    "finalize": lambda host, state: finalize(host),
    "swap_ema": lambda host, state: swap(host),
}


def finalize(host):
    if hasattr(host.optimizer, "finalize"):
        host.optimizer.finalize()
    else:
        host.optimizer.finalize_variable_values(host.params)


def swap(host):
    if not hasattr(host.optimizer, "swap_ema"):
        return finalize(host)
    with host.optimizer.swap_ema():
        return None


@pytest.fixture(params=NAMES)
def within(request, monkeypatch):
    """A host after two steps, its first state, and a function that does a step with a call in the middle of it."""
    host = built(request.param, gradient_accumulation_steps=2, use_ema=True)
    host.step(GRADS)
    first = deepcopy(host.optimizer.state_dict())  # as PyTorch gives them, tensors are those of the state
    host.step(GRADS)
    module = import_module(f"nadam.{request.param}.optimizer")
    original = module.step

    def step_with(call):
        def during(*args, **options):
            monkeypatch.undo()
            call()
            return original(*args, **options)

        monkeypatch.setattr(module, "step", during)
        host.step(GRADS)

    return host, first, step_with


@pytest.mark.parametrize("call", CALLS)
def test_a_signal_handler_is_refused(within, call):
    host, first, step_with = within

    def refused():
        with pytest.raises(RuntimeError, match=r": called from within a step, as by a signal handler"):
            CALLS[call](host, first)

    step_with(refused)
    assert host.state()["calls"][0] == 3
    CALLS[call](host, first)


@pytest.mark.parametrize("call", CALLS)
def test_another_thread_waits(within, call):
    host, first, step_with = within
    given, threads = [], [threading.Thread(target=lambda: given.append(CALLS[call](host, first)))]

    def meanwhile():
        threads[0].start()
        threads[0].join(0.2)
        assert threads[0].is_alive()

    step_with(meanwhile)
    threads[0].join(30)
    assert len(given) == 1
    assert host.state()["calls"][0] == {"step": 4, "load_state_dict": 1}.get(call, 3)
    if call == "state_dict":
        host.optimizer.load_state_dict(given[0])
        assert host.state()["calls"][0] == 3
    before = host.state()
    host.step(GRADS)
    assert not same(before, host.state())
    assert np.isfinite(host.state()["params"][0]).all()


@pytest.mark.skipif("torch" not in NAMES, reason="PyTorch is not installed")
def test_a_step_waits_until_a_state_is_loaded():
    host, threads = built("torch"), []
    host.step(GRADS)
    first = deepcopy(host.optimizer.state_dict())

    def meanwhile(optimizer):
        threads.append(threading.Thread(target=optimizer.step))
        threads[0].start()
        threads[0].join(0.2)
        assert threads[0].is_alive()

    host.optimizer.register_load_state_dict_post_hook(meanwhile)
    host.optimizer.load_state_dict(first)
    threads[0].join(30)
    assert host.state()["step"][0] == 2


@pytest.mark.skipif("torch" not in NAMES, reason="PyTorch is not installed")
def test_a_step_that_waited_while_averages_were_swapped_in_is_refused(monkeypatch):
    host, said = built("torch", use_ema=True), []
    host.step(GRADS)
    optimizer, before = host.optimizer, host.state()

    def step():
        with pytest.raises(RuntimeError, match="step: called within swap_ema"):
            optimizer.step()
        said.append("refused")

    thread, averaged = threading.Thread(target=step), type(optimizer)._averaged

    def slowly(self):
        if not thread.ident:
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
        return averaged(self)

    monkeypatch.setattr(type(optimizer), "_averaged", slowly)
    with optimizer.swap_ema():
        thread.join(30)
    assert said == ["refused"]
    assert same(before, host.state())
