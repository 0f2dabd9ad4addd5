"""`nadam.watch` on NumPy: the norm without clipping, which parameter was not finite, rows and the files they go to."""

import copy
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

import nadam
from nadam import watch

COLUMNS = ["step", "learning_rate", "grad_norm", "clip_factor", "skipped_steps", "nonfinite_param"]


def drawn(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (30, 20), "bias": (20,), "scale": ()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def norm(grads):
    return np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))


@pytest.mark.parametrize("settings", [{}, {"loss_scale_factor": 8.0}, {"clipvalue": 0.5}, {"use_ema": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_norm_is_numpys_and_no_bit_of_a_step_is_another(dtype, settings):
    tracked, plain = nadam.Nadam(track_grad_norm=True, **settings), nadam.Nadam(**settings)
    ours, others = drawn(0, dtype), drawn(0, dtype)
    for step in range(1, 6):
        tracked.apply(drawn(step, dtype), ours)
        plain.apply(drawn(step, dtype), others)
        expected = norm(drawn(step, dtype)) / settings.get("loss_scale_factor", 1.0)
        assert tracked.last_step.grad_norm == pytest.approx(expected, rel=1e-6)
        assert (tracked.last_step.clip_factor, plain.last_step.grad_norm) == (None, None)
    assert all(ours[name].tobytes() == others[name].tobytes() for name in ours)


def test_with_accumulation_it_is_that_of_the_mean():
    optimizer, params, seen = nadam.Nadam(track_grad_norm=True, gradient_accumulation_steps=2), drawn(0), []
    for step in (1, 2):
        optimizer.apply(drawn(step), params)
        seen.append(optimizer.last_step.grad_norm)
    mean = {name: (drawn(1)[name] + drawn(2)[name]) / 2 for name in params}
    assert seen == [None, pytest.approx(norm(mean), rel=1e-6)]


def test_it_may_be_set_and_is_saved():
    optimizer = nadam.Nadam()
    optimizer.track_grad_norm = True
    assert nadam.Nadam.from_config(optimizer.get_config()).track_grad_norm is True


def test_a_report_before_the_first_step():
    assert nadam.Nadam(0.5).last_step == nadam.StepReport(0, 0.5, None, None, 0)
    asked = []
    assert np.isnan(nadam.Nadam(lambda: asked.append(1) or 0.5).last_step.learning_rate)
    assert not asked
    optimizer = nadam.Nadam(0.5)
    optimizer.apply(drawn(1), drawn(0))
    resumed = nadam.Nadam(0.5)
    resumed.build(drawn(0))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.last_step.step == 1
    assert copy.deepcopy(optimizer).last_step == optimizer.last_step


def test_a_report_prints_what_there_is():
    shown = repr(nadam.StepReport(100, np.float32(1 / 3), 1.23456789, None, np.int32(0), skipped=np.bool_(False)))
    assert shown == "StepReport(step=100, learning_rate=0.333333, grad_norm=1.23457, skipped_steps=0)"
    assert repr(nadam.StepReport(1, 0.1, None, None, 2, skipped=True, nonfinite_param="w")) == (
        "StepReport(step=1, learning_rate=0.1, skipped_steps=2, skipped=True, nonfinite_param='w')"
    )
    assert "array([1., 2.])" in repr(nadam.StepReport(1, np.array([1.0, 2.0]), None, None, 0))


BAD = [np.nan, np.inf, -np.inf, 1e25]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("named", [True, False])
def test_the_name_of_the_first_parameter_that_is_not_finite(value, named):
    optimizer, params = nadam.Nadam(skip_nonfinite=True), drawn(0)
    as_given = dict if named else lambda grads: list(grads.values())
    params = as_given(params)
    names = list(drawn(0)) if named else ["0", "1", "2"]
    for bad in (0, 1, 2, 1):
        optimizer.apply(as_given(drawn(1)), params)
        assert optimizer.last_step.nonfinite_param is None
        grads = drawn(2)
        for name in list(grads)[bad:]:
            grads[name].flat[-1:] = value
        optimizer.apply(as_given(grads), params)
        assert (optimizer.last_step.skipped, optimizer.last_step.nonfinite_param) == (True, names[bad])


def test_the_name_where_a_gradient_is_missing_or_another_dtype():
    optimizer, params = nadam.Nadam(skip_nonfinite=True), drawn(0)
    optimizer.build(params)
    optimizer.apply({"scale": float("nan"), "bias": drawn(1)["bias"].astype("float16")})
    assert optimizer.last_step.nonfinite_param == "scale"


def test_the_name_with_a_dynamic_loss_scale():
    inner = nadam.Nadam()
    optimizer = nadam.LossScaleOptimizer(inner)
    optimizer.apply({**drawn(1), "bias": np.full(20, np.inf, "float32")}, drawn(0))
    assert (optimizer.last_step.skipped, optimizer.last_step.nonfinite_param) == (True, "bias")


def train(optimizer, watched, params, steps, bad=()):
    for step in steps:
        grads = drawn(step)
        if step in bad:
            grads["kernel"][0] = np.nan
        watched.before_step()
        optimizer.apply(grads, params)
        watched.after_step(grads)


def test_a_row_every_so_many_steps_and_for_each_that_was_skipped():
    rows, others, params = [], [], drawn(0)
    optimizer = nadam.Nadam(0.5, global_clipnorm=1.0, skip_nonfinite=True)
    train(optimizer, watch.Watch(optimizer, [rows.append, others.append], every=3), params, range(1, 8), bad={2, 4})
    assert rows == others
    assert [(r["step"], r["skipped_steps"], r["nonfinite_param"]) for r in rows] == [
        *((1, 1, "kernel"), (2, 1, None), (2, 2, "kernel"), (4, 2, None)),
    ]
    assert [list(row) for row in rows] == [COLUMNS] * 4
    assert rows[1]["clip_factor"] == pytest.approx(1 / norm(drawn(3)))
    assert (rows[0]["grad_norm"], rows[0]["learning_rate"]) == (None, 0.5)


def test_norms_of_each_tensor():
    rows, params, again, after = [], drawn(0), nadam.Nadam(), drawn(0)
    optimizer = nadam.Nadam(skip_nonfinite=True)
    train(optimizer, watch.Watch(optimizer, rows.append, every=2, params=params), params, [1, 2, 3], bad={3})
    again.apply(drawn(1), after)
    before = copy.deepcopy(after)
    again.apply(drawn(2))
    for name in params:
        assert rows[0][f"grad_norm/{name}"] == pytest.approx(np.linalg.norm(drawn(2)[name]), rel=1e-6)
        assert rows[0][f"param_norm/{name}"] == pytest.approx(np.linalg.norm(after[name]), rel=1e-6)
        assert rows[0][f"update_norm/{name}"] == pytest.approx(np.linalg.norm(after[name] - before[name]), rel=1e-5)
        assert rows[1][f"update_norm/{name}"] is None  # skipped, between those that were due
    assert list(rows[0]) == list(rows[1])


def test_csv(tmp_path):
    optimizer, params = nadam.Nadam(0.5, skip_nonfinite=True), drawn(0)
    with watch.CSV(tmp_path / "run.csv") as write:
        train(optimizer, watch.Watch(optimizer, write), params, [1, 2], bad={1})
        # On disk, though nobody has closed the file.
        assert (tmp_path / "run.csv").read_text().splitlines()[:2] == [",".join(COLUMNS), "0,0.5,,,1,kernel"]
    with watch.CSV(str(tmp_path / "run.csv")) as write:  # a run that is resumed
        train(optimizer, watch.Watch(optimizer, write), params, [3])
    lines = (tmp_path / "run.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "0", "1", "2"]
    assert float(lines[-1].split(",")[2]) == optimizer.last_step.grad_norm


@pytest.mark.parametrize("content", ["", "step,l", "step,lr", "step,lr\n", "step,lr\n1,0.", "step,lr\n1,0.5"])
def test_csv_goes_on_after_what_is_whole(content, tmp_path):
    (tmp_path / "run.csv").write_text(content)
    with watch.CSV(tmp_path / "run.csv") as write:
        write({"step": 2, "lr": 0.25})
    assert (tmp_path / "run.csv").read_text() == "step,lr\n2,0.25\n"


def test_csv_quotes_names(tmp_path):
    row = {"step": 1, "grad_norm/a,b": 0.5, "nonfinite_param": 'a"é'}
    for _ in range(2):
        with watch.CSV(tmp_path / "run.csv") as write:
            write(row)
    lines = (tmp_path / "run.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ['step,"grad_norm/a,b",nonfinite_param', *['1,0.5,"a""é"'] * 2]


@pytest.mark.parametrize("content", ["step,other\n1,2\n", "something else", "\n", "step,lr,more\n", "lr,step\n"])
def test_csv_refuses_other_columns(content, tmp_path):
    (tmp_path / "run.csv").write_text(content)
    write = watch.CSV(tmp_path / "run.csv")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"run\.csv: other columns than this run's: .*; expected a new file"):
            write({"step": 1, "lr": 0.5})
    assert (tmp_path / "run.csv").read_text() == content


def test_csv_says_which_columns(tmp_path):
    with watch.CSV(tmp_path / "run.csv") as write:
        write({"step": 1, "lr": 0.5})
        with pytest.raises(ValueError, match=r"it has no \['norm'\]; this run has no \['lr'\]"):
            write({"step": 2, "norm": 0.5})
        write({"step": 3, "lr": 0.5})
    assert (tmp_path / "run.csv").read_text() == "step,lr\n1,0.5\n3,0.5\n"


def test_rows_of_a_run_that_is_killed_stay(tmp_path):
    program = """if True:
        import os, sys
        import numpy as np, nadam
        from nadam import watch
        optimizer, params = nadam.Nadam(), [np.ones(3)]
        watched = watch.Watch(optimizer, watch.CSV(sys.argv[1]))
        for _ in range(5):
            optimizer.apply([np.ones(3)], params)
            watched.after_step()
        os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "run.csv"], check=False)
    assert done.returncode == 9
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 6


class Events:
    """What a writer of event files is asked for."""

    def __init__(self, folder):
        self.folder, self.scalars, self.texts, self.flushed = folder, [], [], 0

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.flushed = "closed"


class EventsWithText(Events):
    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))


@pytest.mark.parametrize("package", ["torch.utils.tensorboard", "tensorboardX", "tensorboard.summary"])
def test_tensorboard_by_what_is_installed(package, monkeypatch):
    for other in ("torch.utils.tensorboard", "tensorboardX", "tensorboard", "tensorboard.summary"):
        monkeypatch.setitem(sys.modules, other, None)
    name, cls = ("Writer", Events) if package == "tensorboard.summary" else ("SummaryWriter", EventsWithText)
    module = ModuleType(package)
    setattr(module, name, cls)
    for part in (package, package.partition(".")[0]):
        if part not in sys.modules or sys.modules[part] is None:
            monkeypatch.setitem(sys.modules, part, module if part == package else ModuleType(part))
    monkeypatch.setitem(sys.modules, package, module)
    write = watch.TensorBoard("folder")
    write({"step": 3, "grad_norm": 0.5, "clip_factor": None, "nonfinite_param": "w"})
    made = write._writer
    assert (made.folder, made.scalars, made.flushed) == ("folder", [("nadam/grad_norm", 0.5, 3)], 1)
    assert made.texts == ([] if cls is Events else [("nadam/nonfinite_param", "w", 3)])
    write.close()
    assert made.flushed == "closed"


def test_tensorboard_that_is_not_installed(monkeypatch):
    for name in ("torch.utils.tensorboard", "tensorboardX", "tensorboard.summary", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        watch.TensorBoard("folder")


def test_faults():
    optimizer = nadam.Nadam()
    for every in (0, -1, 1.5, True, None, "1"):
        with pytest.raises(ValueError, match=r"every=.*: expected an integer, every >= 1"):
            watch.Watch(optimizer, print, every=every)
    for other in (object(), None):
        with pytest.raises(TypeError, match="has no last_step: expected an optimizer of nadam"):
            watch.Watch(other, print)
    with pytest.raises(TypeError, match="write: str, expected a function of a dict"):
        watch.Watch(optimizer, "run.csv")
    with pytest.raises(AttributeError, match=r"'nadam\.watch' has no attribute 'Callback'"):
        watch.Callback  # noqa: B018


def test_importing_it_imports_no_framework():
    program = """if True:
        import sys
        import nadam.watch
        print([name for name in ("torch", "keras", "jax", "lightning", "transformers") if name in sys.modules])
    """
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
