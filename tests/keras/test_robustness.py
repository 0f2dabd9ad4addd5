"""Gradients of every kind, threads, forks, copies and interrupts. Numbers are the rows of the table of faults."""

import copy
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import keras
import numpy as np
import pytest
from test_faults_keras import (
    BACKEND,
    EVERYTHING,
    array,
    compiled,
    grads_of,
    only_torch,
    same,
    snapshot,
    unchanged,
    variables_of,
)

import nadam.keras
from cases import apart, same_bits
from reference import Reference

if BACKEND == "torch":
    import torch

    from nadam.kernels import layout
    from nadam.kernels.cpu import threads

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant checks):UserWarning")
SETTINGS = {
    "plain": {},
    "clipped": {"global_clipnorm": 0.5, "weight_decay": 0.01, "use_ema": True},
    "checked": {"skip_nonfinite": True, "use_ema": True, "ema_overwrite_frequency": 1},
    "accumulated": {"clipnorm": 0.5, "use_ema": True, "gradient_accumulation_steps": 2},
}
SHAPES = [(6, 4), (5,)]


def restore(optimizer, variables, arrays):
    for variable, value in zip([*variables, *optimizer.variables], arrays, strict=True):
        variable.assign(value)


def test_a_gradient_that_is_not_finite():  # 7
    dtypes = ["float16", "bfloat16", "float32", *(["float64"] if BACKEND != "jax" else [])]
    variables = [keras.Variable(np.ones(4), dtype=dtype) for dtype in dtypes]
    grads = [keras.ops.convert_to_tensor([1.0, np.nan, np.inf, -np.inf], dtype) for dtype in dtypes]
    nadam.keras.Nadam(0.1).apply(grads, variables)
    for variable in variables:
        assert np.isnan(array(variable).astype(float)).tolist() == [False, True, True, True]
        assert array(variable)[0] < 1


@pytest.mark.parametrize("way", ["eagerly", "compiled"])
def test_calls_with_a_gradient_that_is_not_finite_are_skipped_and_counted(way):  # 7, 9
    variables = variables_of(SHAPES)
    optimizer = nadam.keras.Nadam(0.1, skip_nonfinite=True, **EVERYTHING)
    optimizer.build(variables)
    call = optimizer.apply if way == "eagerly" else compiled(optimizer, variables)
    first, second = grads_of(SHAPES)
    call([first, second])
    before = snapshot(optimizer, variables)
    for bad in (np.nan, np.inf, -np.inf, 1e25):
        call([first, keras.ops.where(keras.ops.arange(5) == 3, bad, second)])
    assert same(before[:-1], snapshot(optimizer, variables)[:-1])
    assert optimizer.last_step.skipped_steps == 4
    call([first, second])
    assert int(optimizer.iterations) == 1
    assert optimizer.last_step[0] == 1


def test_float16_gradients_that_are_small_none_or_large():  # 8
    grads = [np.full(2, value, np.float16) for value in (1e-5, 0.0, 300.0)]
    variables, reference = (
        [keras.Variable(np.ones(2), dtype="float16") for _ in grads],
        Reference([np.ones(2)] * 3, 0.01),
    )
    nadam.keras.Nadam(0.01).apply(list(map(keras.ops.convert_to_tensor, grads)), variables)
    reference.step(grads)
    for variable, expected in zip(variables, reference.p, strict=True):
        assert apart(array(variable), expected, 0.0, np.float16) <= 0.501  # it is rounded once
    assert (array(variables[0]) < 0.992).all()


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue", None])
def test_float32_gradients_whose_square_overflows(clip):  # 9
    start, clips = np.linspace(-2, 2, 4, dtype=np.float32), {clip: 1.0} if clip else {}
    variable, reference = keras.Variable(start), Reference([start], 0.01, **clips)
    optimizer = nadam.keras.Nadam(0.01, **clips)
    optimizer.apply([keras.ops.full((4,), 1e25)], [variable])
    reference.step([np.full(4, 1e25)])
    if clip:
        assert apart(array(variable), reference.p[0], 1.0, np.float32) <= 1
    else:  # as in IEEE arithmetic: an infinite square, and no step
        assert np.isinf(array(optimizer._velocities[0])).all()
        assert same_bits(array(variable), start)


def rows_twice(grad):
    """A gradient's rows, those that are not zero, in two halves each; and their ids."""
    ids = np.flatnonzero(grad.any(axis=1))
    return np.concatenate([grad[ids] / 2] * 2), np.concatenate([ids, ids])


def at_odd_address(grad):
    return torch.frombuffer(bytearray(b"0" + grad.tobytes()), dtype=torch.float32, offset=1).view(6, 4)


def tf(name, *args):
    import tensorflow

    return getattr(tensorflow, name)(*args)


def bcoo(grad):
    from jax.experimental.sparse import BCOO

    values, ids = rows_twice(grad)
    return BCOO((values, ids[:, None]), shape=grad.shape)


# How a gradient may come (11, 13, 18, 20). Its values are multiples of 1/8; two of its six rows are zero.
KINDS = {
    "list": lambda g: g.tolist(),
    "array": np.copy,
    "float64 array": np.float64,
    "integer array": lambda g: (g * 8).astype(np.int32),
    "Fortran order": np.asfortranarray,
    "strided array": lambda g: np.repeat(g, 2, 1)[:, ::2],
    "reversed array": lambda g: np.ascontiguousarray(g[::-1])[::-1],
    "read-only array": lambda g: np.frombuffer(g.tobytes(), np.float32).reshape(g.shape),
    "float16": lambda g: keras.ops.convert_to_tensor(g, "float16"),
    "bfloat16": lambda g: keras.ops.convert_to_tensor(g, "bfloat16"),
}
KINDS |= {
    "torch": {
        "float64": lambda g: torch.tensor(g).double(),
        "transposed": lambda g: torch.tensor(g.T.copy()).T,
        "strided": lambda g: torch.tensor(np.repeat(g, 2, 1))[:, ::2],
        "unaligned": at_odd_address,
        "expanded": lambda g: torch.tensor(g[:, :1].copy()).expand(6, 4),
        "negative": lambda g: torch._neg_view(torch.tensor(-g)),
        "to be differentiated": lambda g: torch.tensor(g, requires_grad=True) * 1.0,
        "sparse COO": lambda g: torch.sparse_coo_tensor(rows_twice(g)[1][None], rows_twice(g)[0], g.shape),
        "sparse CSR": lambda g: torch.tensor(g).to_sparse_csr(),
    },
    "tensorflow": {
        "IndexedSlices": lambda g: tf("IndexedSlices", *rows_twice(g)),
        "SparseTensor": lambda g: tf("SparseTensor", np.argwhere(g), g[g != 0], g.shape),
    },
    "jax": {"BCOO": bcoo},
}.get(BACKEND, {})


@pytest.fixture(scope="module")
def twins():
    made = []
    for _ in range(2):
        variables, optimizer = variables_of(SHAPES), nadam.keras.Nadam(0.1, global_clipnorm=1.0, use_ema=True)
        optimizer.build(variables)
        made.append((optimizer, variables))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_gives_the_same_bits_however_it_comes_and_is_left_as_found(twins, kind):  # 11, 13, 18, 20
    (plain, plain_variables), (optimizer, variables) = twins
    grad, rest = map(array, grads_of(SHAPES, seed=len(kind)))
    grad[[1, 4]] = 0.0
    if kind == "expanded":
        grad[:] = grad[:, :1]
    dense, given = grad * 8 if kind == "integer array" else grad, KINDS[kind](grad)
    before = plainly(given)
    restore(optimizer, variables, snapshot(plain, plain_variables))
    plain.apply([keras.ops.convert_to_tensor(dense), keras.ops.convert_to_tensor(rest)], plain_variables)
    optimizer.apply([given, keras.ops.convert_to_tensor(rest)], variables)
    assert same(snapshot(plain, plain_variables), snapshot(optimizer, variables))
    assert plainly(given) == before


def plainly(grad):
    """The values of a gradient that could be changed."""
    if isinstance(grad, list):
        return copy.deepcopy(grad)
    dense = grad.to_dense() if hasattr(grad, "to_dense") else grad
    return dense.tolist() if hasattr(dense, "tolist") else None


@only_torch
@pytest.mark.parametrize("settings", SETTINGS)
def test_variables_of_any_layout_give_the_bits_of_contiguous_ones(settings):  # 13
    layouts = [
        lambda t: t.T.contiguous().T,
        lambda t: torch.repeat_interleave(t, 2, 1)[:, ::2],
        lambda t: at_odd_address(t.numpy(force=True)),
    ]
    results = []
    for layout in (torch.clone, *layouts):
        variables, optimizer = variables_of([(6, 4), (6, 4)]), nadam.keras.Nadam(0.1, **SETTINGS[settings])
        for variable in variables:
            variable._value.data = layout(variable._value.data)
        for seed in range(4):
            optimizer.apply(grads_of([(6, 4), (6, 4)], seed=seed), variables)
        results.append(snapshot(optimizer, variables))
        assert int(optimizer._iterations) == 4
    assert all(same(results[0], result) for result in results)


@only_torch
def test_a_gradient_on_another_device(twins):  # 20
    optimizer, variables = twins[0]
    with unchanged(*twins[0]), pytest.raises(RuntimeError, match=f"{variables[1].path}.*on meta, expected .* cpu"):
        optimizer.apply([grads_of(SHAPES)[0], torch.ones(5, device="meta")], variables)


def test_calls_that_fail_leave_no_trace_in_those_that_follow(twins):
    (optimizer, variables), results = twins[0], []
    start = snapshot(optimizer, variables)
    for faults in ([], [keras.ops.ones(1), keras.ops.ones(5, "complex64"), [1.0], np.ones((5, 5))]):
        restore(optimizer, variables, start)
        for fault in faults:
            with pytest.raises((ValueError, TypeError), match="grads"):
                optimizer.apply([grads_of(SHAPES)[0], fault], variables)
        optimizer.apply(grads_of(SHAPES), variables)
        results.append(snapshot(optimizer, variables))
    assert same(*results)
    assert not same(start, results[0])


def test_a_copy_goes_on_as_the_original_and_apart_from_it():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = nadam.keras.Nadam(0.1, **EVERYTHING)
    model.compile(optimizer, loss="mse")
    shapes, variables = [(3, 2), (2,)], model.trainable_variables
    optimizer.build(variables)
    for _ in range(3):
        optimizer.apply(grads_of(shapes), variables)
    start = list(map(array, variables))
    alone, whole = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(model))
    optimizer.apply(grads_of(shapes), variables)
    expected = snapshot(optimizer, variables)
    for other, own in ((alone, list(map(keras.Variable, start))), (whole.optimizer, whole.trainable_variables)):
        assert type(other) is nadam.keras.Nadam
        other.apply(grads_of(shapes), own)
        assert same(expected, snapshot(other, own))
    assert same(expected, snapshot(optimizer, variables))


def test_eight_threads_with_an_optimizer_each():  # 27
    begin, trained = threading.Barrier(8, timeout=60), []

    def work(optimizer, variables, seed):
        optimizer.build(variables)
        start = snapshot(optimizer, variables)
        begin.wait()
        for step in range(5):
            optimizer.apply(grads_of(SHAPES, seed=seed + step), variables)
        return start, snapshot(optimizer, variables)

    names = ["plain"] if BACKEND == "tensorflow" else [*SETTINGS]  # TensorFlow compiles each optimizer's step anew
    for seed, settings in enumerate(map(SETTINGS.get, (names * 8)[:8])):
        trained.append((nadam.keras.Nadam(0.05, **settings), variables_of(SHAPES, seed=seed), seed))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda arguments: work(*arguments), trained))
    for (optimizer, variables, seed), (start, result) in zip(trained, together, strict=True):
        restore(optimizer, variables, start)
        for step in range(5):
            optimizer.apply(grads_of(SHAPES, seed=seed + step), variables)
        assert same(result, snapshot(optimizer, variables))


def on_two_threads(work):
    begin = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: (begin.wait(), work()), range(2)))


@pytest.mark.parametrize("settings", ["clipped", "accumulated"])
def test_two_threads_with_one_optimizer(settings):  # 27
    variables, optimizer, grads = variables_of(SHAPES), nadam.keras.Nadam(0.05, **SETTINGS[settings]), grads_of(SHAPES)
    optimizer.build(variables)
    start = snapshot(optimizer, variables)
    on_two_threads(lambda: [optimizer.apply(grads, variables) for _ in range(20)])
    result = snapshot(optimizer, variables)
    restore(optimizer, variables, start)
    for _ in range(40):
        optimizer.apply(grads, variables)
    assert same(result, snapshot(optimizer, variables))


def test_two_threads_that_build_one_optimizer(monkeypatch):  # 27
    variables, optimizer, add_variable = variables_of(SHAPES), nadam.keras.Nadam(), nadam.keras.Nadam.add_variable

    def slowly(*args, **settings):
        time.sleep(0.01)
        return add_variable(*args, **settings)

    monkeypatch.setattr(nadam.keras.Nadam, "add_variable", slowly)
    on_two_threads(lambda: optimizer.build(variables))
    assert len(optimizer.variables) == 3 + 2 * len(SHAPES)


@pytest.mark.parametrize("call", ["apply", "finalize_variable_values", "save_own_variables", "load_own_variables"])
def test_within_a_step_other_threads_wait_and_a_signal_handler_is_refused(call, monkeypatch):  # 25, 27
    variables, optimizer, grads = variables_of(SHAPES), nadam.keras.Nadam(0.05, use_ema=True), grads_of(SHAPES)
    optimizer.apply(grads, variables)
    store, done, original = {}, [], type(nadam.keras.optimizer.backend).step
    optimizer.save_own_variables(store)
    given = {"apply": (grads, variables), "finalize_variable_values": (variables,)}.get(call, (store,))

    def work():
        getattr(optimizer, call)(*given)
        done.append(call)

    thread = threading.Thread(target=work)

    def during(*args):
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match=f"{call}: called from within a step, as by a signal handler"):
            work()
        thread.start()
        thread.join(0.2)
        assert not done
        original(*args)

    monkeypatch.setattr(type(nadam.keras.optimizer.backend), "step", during)
    optimizer.apply(grads, variables)
    thread.join(60)
    assert done == [call]
    assert int(optimizer.iterations.numpy()) == {"apply": 3, "load_own_variables": 1}.get(call, 2)


@pytest.fixture
def small(monkeypatch):
    """Chunks so small that a few hundred elements are many, shared out at once; `around(kernel)` runs each slice."""
    hooks, share_out = [], threads.share_out

    def watched(kernel, block, control, chunks, helpers):
        run = (lambda *args: hooks[-1](kernel, helpers + 1, *args)) if hooks else (lambda *args: kernel(*args))
        share_out(run, block, control, chunks, helpers)

    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    monkeypatch.setattr(threads, "SLICE", 1)
    monkeypatch.setattr(threads, "_requested", 1)
    monkeypatch.setattr(layout, "cut_into_chunks", partial(layout.cut_into_chunks, chunk=64))
    monkeypatch.setattr(threads, "share_out", watched)
    return hooks


LARGER = [(30, 10), (10,), (150,)]


def started(settings, steps):
    """An optimizer in the middle of training, and the state of everything before and after its next step."""
    variables, optimizer = variables_of(LARGER), nadam.keras.Nadam(0.05, **SETTINGS[settings])
    for seed in range(steps):
        optimizer.apply(grads_of(LARGER, seed=seed), variables)
    old = snapshot(optimizer, variables)
    optimizer.apply(grads_of(LARGER), variables)
    return optimizer, variables, old, snapshot(optimizer, variables)


@only_torch
def test_bits_do_not_depend_on_threads(small):  # 31
    counts = set()

    def slice_of(kernel, count, *args):
        counts.add(count)
        kernel(*args)

    small.append(slice_of)
    before = torch.get_num_threads()
    for settings in SETTINGS:
        optimizer, variables, old, new = started(settings, 3)
        for count in [1, 2, 4] * 7:
            for ask, default in ((nadam.set_num_threads, 1), (torch.set_num_threads, None)):
                nadam.set_num_threads(default)
                ask(count)
                restore(optimizer, variables, old)
                optimizer.apply(grads_of(LARGER), variables)
                assert same(new, snapshot(optimizer, variables))
    torch.set_num_threads(before)
    assert counts == {1, 2, 4}


@only_torch
@pytest.mark.usefixtures("small")
def test_a_step_in_the_child_of_a_fork():  # 26
    nadam.set_num_threads(2)
    optimizer, variables, old, new = started("clipped", 2)
    restore(optimizer, variables, old)
    assert threads._pool is not None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        optimizer.apply(grads_of(LARGER), variables)
        os.write(write, b"same" if same(new, snapshot(optimizer, variables)) else b"other")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"same"
    os.waitpid(child, 0)
    optimizer.apply(grads_of(LARGER), variables)
    assert same(new, snapshot(optimizer, variables))


def moved(optimizer, variables, old, new):
    """How many chunks are at their new values; the others are at their old ones, and the counters fit."""
    now, places = snapshot(optimizer, variables), {id(v): i for i, v in enumerate([*variables, *optimizer.variables])}
    sides = []
    for slot in optimizer._runtime.slots:
        mine = [places[id(v)] for v in slot[:5] if v is not None]
        for first in range(0, now[mine[0]].size, 64):
            n, o, w = ([x[i].reshape(-1)[first : first + 64].tobytes() for i in mine] for x in (now, old, new))
            assert (n == o) != (n == w)
            sides.append(n == w)
    counters = [len(variables), places[id(optimizer._momentum_product)]]
    assert [now[i] for i in counters] == [(new if any(sides) else old)[i] for i in counters]
    return sum(sides), len(sides)


@only_torch
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_interrupt_wherever_python_looks_for_one(small, settings, steps):  # 25
    optimizer, variables, old, new = started(settings, steps)
    grads, seen, left = grads_of(LARGER), set(), [0]

    def look(frame, event, argument):
        if event in ("call", "c_return"):  # where signals are handled
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

    for point in range(10_000):
        restore(optimizer, variables, old)
        left[0] = point
        try:
            sys.setprofile(look)
            optimizer.apply(grads, variables)
            sys.setprofile(None)
            break
        except KeyboardInterrupt:
            torch.set_grad_enabled(True)
            seen.add(moved(optimizer, variables, old, new)[0])
        finally:
            sys.setprofile(None)
    chunks = moved(optimizer, variables, old, new)[1]
    assert seen == set(range(chunks + 1))


@only_torch
def test_a_signal_is_answered_after_the_slice_at_work(small, monkeypatch):  # 32
    optimizer, variables, old, new = started("plain", 2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    for slices in range(8):
        left = [slices]

        def slice_of(kernel, count, *args, left=left):
            kernel(*args)
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGINT)

        small[:] = [slice_of]
        restore(optimizer, variables, old)
        with pytest.raises(KeyboardInterrupt):
            optimizer.apply(grads_of(LARGER), variables)
        assert moved(optimizer, variables, old, new) == (slices + 1, 9)
    signal.signal(signal.SIGINT, before)


@only_torch
def test_a_signal_handler_cannot_step_in_the_middle_of_a_step(small):
    optimizer, variables, old, new = started("plain", 2)
    restore(optimizer, variables, old)

    def slice_of(kernel, count, *args):
        with pytest.raises(RuntimeError, match="from within a step"):
            optimizer.apply(grads_of(LARGER), variables)
        kernel(*args)

    small.append(slice_of)
    optimizer.apply(grads_of(LARGER), variables)
    assert same(new, snapshot(optimizer, variables))
