"""`nadam.watch` on PyTorch: the norm without clipping, which parameter was not finite, the callbacks of trainers."""

import csv

import numpy as np
import pytest
import torch
from test_torch_libraries import (
    BATCHES,
    DEVICE,
    forget_accelerator,
    lightning,
    loader,
    loss_of,
    nothing_global_stays,
    perceptron,
    transformers,
    transformers_trainer,
)
from training import drawn, seeded

from nadam import StepReport, watch
from nadam.torch import NAdam, NAdamW

__all__ = ["lightning", "nothing_global_stays", "transformers"]  # fixtures
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def gradients(model, seed):
    generator = seeded(seed)
    for param in model.parameters():
        param.grad = drawn(generator, param.shape).to(param.device)


def norm_of(model):
    """By NumPy."""
    grads = [param.grad.cpu().numpy().astype(np.float64).ravel() for param in model.parameters()]
    return np.linalg.norm(np.concatenate(grads))


@pytest.mark.parametrize("cls", [NAdam, NAdamW])
@pytest.mark.parametrize("settings", [{}, {"clipvalue": 0.5}, {"maximize": True}], ids=str)
def test_the_norm_is_numpys_and_no_bit_of_a_step_is_another(cls, settings):
    ours, others = (perceptron().to(DEVICE) for _ in range(2))
    tracked, plain = cls(ours.parameters(), track_grad_norm=True, **settings), cls(others.parameters(), **settings)
    for step in range(5):
        for model, optimizer in ((ours, tracked), (others, plain)):
            gradients(model, step)
            optimizer.step()
        assert tracked.last_step.grad_norm == pytest.approx(norm_of(ours), rel=1e-6)
        assert (tracked.last_step.clip_factor, plain.last_step.grad_norm) == (None, None)
    assert all(map(torch.equal, ours.parameters(), others.parameters()))


def test_it_is_nothing_for_a_step_that_is_differentiated():
    with pytest.raises(ValueError, match=r"differentiable=True: expected none of .*track_grad_norm"):
        NAdam(perceptron().parameters(), differentiable=True, track_grad_norm=True)


def test_a_report_before_the_first_step():
    model = perceptron().to(DEVICE)
    optimizer = NAdam(model.parameters(), lr=0.5)
    assert optimizer.last_step == StepReport(0, 0.5, None, None, 0)
    gradients(model, 0)
    optimizer.step()
    resumed = NAdam(model.parameters(), lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.last_step == StepReport(1, 0.5, None, None, 0)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU tells no names")
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e25])
@pytest.mark.parametrize("bad", range(4))
def test_the_name_of_the_first_parameter_that_is_not_finite(bad, value):
    named, unnamed = (perceptron(), perceptron())
    optimizers = NAdam(named.named_parameters(), skip_nonfinite=True), NAdam(unnamed.parameters(), skip_nonfinite=True)
    for model, optimizer, names in zip(
        (named, unnamed), optimizers, (NAMES, [f"params[{i}]" for i in range(4)]), strict=True
    ):
        gradients(model, 0)
        for param in list(model.parameters())[bad:]:
            param.grad.view(-1)[-1] = value
        optimizer.step()
        assert (optimizer.last_step.skipped, optimizer.last_step.nonfinite_param) == (True, names[bad])
        gradients(model, 0)
        optimizer.step()
        assert (optimizer.last_step.skipped, optimizer.last_step.nonfinite_param) == (False, None)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU tells no names")
def test_the_name_with_a_gradscaler():
    model = perceptron()
    optimizer, scaler = NAdam(model.named_parameters()), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((1, 3), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    assert (optimizer.last_step.skipped, optimizer.last_step.nonfinite_param) == (True, "0.weight")


def test_norms_of_each_tensor():
    model, rows = perceptron().to(DEVICE), []
    optimizer = NAdam(model.parameters(), lr=0.1)
    watched = watch.Watch(optimizer, rows.append, every=2, params=model.named_parameters())
    for step in range(2):
        gradients(model, step)
        before = [param.detach().clone() for param in model.parameters()]
        watched.before_step()
        optimizer.step()
        watched.after_step()
    (row,) = rows
    for name, param, old in zip(NAMES, model.parameters(), before, strict=True):
        expected = {"grad": param.grad, "param": param.detach(), "update": param.detach() - old}
        for kind, tensor in expected.items():
            assert row[f"{kind}_norm/{name}"] == pytest.approx(float(tensor.norm()), rel=1e-5)


def test_norms_of_half_precision_and_complex_tensors():
    params = [torch.full((3,), 300.0, dtype=torch.float16), torch.full((2,), 3 + 4j)]
    params = {str(i): torch.nn.Parameter(param) for i, param in enumerate(params)}
    for param in params.values():
        param.grad = param.detach().clone()
    rows, optimizer = [], NAdam(params.values())
    watch.Watch(optimizer, rows.append, params=params).after_step()
    assert [rows[0][f"grad_norm/{name}"] for name in params] == pytest.approx([300 * 3**0.5, 50**0.5])


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(lightning, tmp_path, accumulate):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = perceptron()

        def training_step(self, batch):
            return loss_of(self.model, batch)

        def configure_optimizers(self):
            return NAdam(self.model.parameters(), lr=0.02, global_clipnorm=0.5)

    def trained(callbacks):
        trainer = lightning.Trainer(
            accelerator="cpu" if DEVICE == "cpu" else "gpu",
            devices=1,
            max_epochs=2,
            accumulate_grad_batches=accumulate,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module()
        trainer.fit(module, loader())
        return module, trainer.optimizers[0]

    rows = []
    write = [watch.CSV(tmp_path / "run.csv"), rows.append]
    callbacks = [watch.LightningCallback(write, every=2, tensors=True)]
    module, optimizer = trained(callbacks)
    steps = 2 * -(-BATCHES // accumulate)
    assert [row["step"] for row in rows] == list(range(2, steps + 1, 2))
    assert rows[-1]["clip_factor"] <= 1.0
    if steps % 2 == 0:
        assert rows[-1]["grad_norm"] == optimizer.last_step.grad_norm
        assert rows[-1]["param_norm/model.0.bias"] == pytest.approx(float(module.model[0].bias.detach().norm()))
    assert all(row["update_norm/model.2.weight"] > 0 and row["grad_norm/model.2.weight"] > 0 for row in rows)
    with open(tmp_path / "run.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["grad_norm"]) for row in read] == [row["grad_norm"] for row in rows]
    assert all(map(torch.equal, module.parameters(), trained([])[0].parameters()))


def test_transformers(transformers, tmp_path):
    rows = []
    settings = {"lr": 0.02, "track_grad_norm": True, "skip_nonfinite": True}
    trainer = transformers_trainer(transformers, tmp_path, 0, settings, NAdam)
    trainer.add_callback(watch.TransformersCallback(rows.append, every=3, tensors=True))
    trainer.train()
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert all(0 < row["grad_norm"] < 0.5 * (1 + 1e-5) for row in rows)  # after the Trainer's own clipping
    name = next(name for name, _ in trainer.model.named_parameters())
    for kind in watch.rows.NORMS:
        assert all(row[f"{kind}/{name}"] > 0 for row in rows)
    assert rows[-1]["param_norm/" + name] == pytest.approx(float(next(trainer.model.parameters()).detach().norm()))


def test_another_optimizer_is_refused(transformers, tmp_path):
    trainer = transformers_trainer(transformers, tmp_path, 0, {}, torch.optim.SGD)
    trainer.add_callback(watch.TransformersCallback([].append))
    with pytest.raises(TypeError, match="SGD has no last_step: expected an optimizer of nadam"):
        trainer.train()


def test_what_accelerate_has_wrapped():
    accelerate = pytest.importorskip("accelerate")
    forget_accelerator()
    accelerator = accelerate.Accelerator(cpu=DEVICE == "cpu")
    model = perceptron()
    optimizer = NAdam(model.parameters())
    wrapped = accelerator.prepare(optimizer)
    rows = []
    watch.Watch(wrapped, rows.append).after_step()
    assert rows[0]["step"] == 0
    forget_accelerator()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write = watch.TensorBoard(tmp_path)
    for step in (1, 2):
        write({"step": step, "grad_norm": step / 2, "clip_factor": None, "nonfinite_param": "w" if step == 2 else None})
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["nadam/grad_norm"]
    assert [(event.step, event.value) for event in found.Scalars("nadam/grad_norm")] == [(1, 0.5), (2, 1.0)]
    write.close()
