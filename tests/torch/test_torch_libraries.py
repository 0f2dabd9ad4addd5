"""Under the training loops of others: Lightning, Transformers' Trainer and Accelerate."""

import os
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from training import DEVICE, apart, drawn, equal, seeded

from nadam.torch import NAdam, NAdamW

BATCHES, SIZE = 5, 4
CLIP = 0.5
# What else than PyTorch's NAdam has is to come through a checkpoint too. With BATCHES an odd number, the one in the
# middle lies inside a window of accumulation.
EXTRAS = [{}, {"use_ema": True, "skip_nonfinite": True}, {"gradient_accumulation_steps": 2}]
SETTINGS = {"lr": 0.02, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def on_the_device():
    """These libraries bring models and batches there themselves, and draw their numbers on the CPU."""


@pytest.fixture(autouse=True)
def nothing_global_stays(monkeypatch):
    """These libraries seed every generator and set variables of the environment."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    environment, python, numbers = dict(os.environ), random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numbers)  # noqa: NPY002
    os.environ.clear()
    os.environ.update(environment)


def perceptron(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def loader():
    inputs = drawn(seeded(2), (BATCHES * SIZE, 3)).cpu()
    return DataLoader(TensorDataset(inputs, 3 * inputs.prod(dim=1, keepdim=True)), batch_size=SIZE)


def loss_of(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def decay(optimizer):
    return StepLR(optimizer, step_size=2, gamma=0.9)


def by_hand(epochs, limit, **settings):
    """What a loop of Lightning's does, without it."""
    model = perceptron().to(DEVICE)
    optimizer = NAdam(model.parameters(), **settings)
    scheduler = decay(optimizer)
    for _ in range(epochs):
        for batch in loader():
            optimizer.zero_grad()
            loss_of(model, [tensor.to(DEVICE) for tensor in batch]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            scheduler.step()
    return model, optimizer


def assert_same(ours, others):
    """Two pairs of a model and its optimizer, bit for bit."""
    for one, other in zip(ours, others, strict=True):
        # Lightning brings both back to the CPU after a run.
        assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0, check_device=False)


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning", minversion="2.6")


def lightning_run(lightning, folder, seed, epochs, settings, resume=None):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = perceptron(seed)

        def training_step(self, batch):
            return loss_of(self.model, batch)

        def configure_optimizers(self):
            optimizer = NAdam(self.model.parameters(), **settings)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay(optimizer), "interval": "step"}}

    trainer = lightning.Trainer(
        accelerator="cpu" if DEVICE == "cpu" else "gpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Module()
    trainer.fit(module, loader(), ckpt_path=resume, weights_only=True if resume else None)
    return trainer, module


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_lightning(lightning, tmp_path, extras):
    settings = {**SETTINGS, **extras}
    trainer, module = lightning_run(lightning, tmp_path, 0, 4, settings)
    unbroken = module.model, trainer.optimizers[0]
    assert type(unbroken[1]) is NAdam
    assert_same(unbroken, by_hand(4, CLIP, **settings))
    assert not equal(unbroken[0].parameters(), by_hand(4, float("inf"), **settings)[0].parameters())

    trainer, module = lightning_run(lightning, tmp_path, 0, 1, settings)
    halfway = deepcopy(module.model)
    trainer.save_checkpoint(tmp_path / "halfway.ckpt")

    trainer, module = lightning_run(lightning, tmp_path, 1, 4, settings, resume=tmp_path / "halfway.ckpt")
    assert trainer.global_step == 4 * BATCHES
    assert type(trainer.optimizers[0]) is NAdam
    assert_same((module.model, trainer.optimizers[0]), unbroken)
    assert not equal(module.model.parameters(), halfway.parameters())


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate")  # which the Trainer runs on
    yield pytest.importorskip("transformers")
    forget_accelerator()


def forget_accelerator():
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def transformers_trainer(transformers, folder, seed, settings, cls):
    forget_accelerator()
    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    texts = torch.randint(0, 16, (24, 6), generator=seeded(2))
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=9,
        save_steps=5,  # in the middle of an epoch
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=CLIP,
        use_cpu=DEVICE == "cpu",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
        optimizer_cls_and_kwargs=(cls, settings),
    )


@pytest.mark.parametrize(("cls", "extras"), [*((NAdam, extras) for extras in EXTRAS), (NAdamW, {"clipnorm": 0.2})])
def test_transformers_trainer(transformers, tmp_path, cls, extras):
    settings = {**SETTINGS, **extras}
    unbroken = transformers_trainer(transformers, tmp_path, 0, settings, cls)
    before = deepcopy(unbroken.model)
    unbroken.train()
    assert type(unbroken.optimizer.optimizer) is cls
    assert not equal(unbroken.model.parameters(), before.parameters())

    resumed = transformers_trainer(transformers, tmp_path, 1, settings, cls)
    assert not equal(resumed.model.parameters(), before.parameters())
    steps = []
    resumed.add_callback(counting(transformers, steps))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert steps == [6, 7, 8, 9]
    assert type(resumed.optimizer.optimizer) is cls
    assert_same(*[(trainer.model, trainer.optimizer.optimizer) for trainer in (resumed, unbroken)])


def counting(transformers, steps):
    class Counting(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    return Counting()


@pytest.fixture
def accelerate():
    yield pytest.importorskip("accelerate")
    forget_accelerator()


class Accelerated:
    """A training with Accelerate, which accumulates gradients itself."""

    def __init__(self, accelerate, cls=NAdam, seed=0, **settings):
        forget_accelerator()
        self.norms = []
        self.accelerator = accelerate.Accelerator(cpu=DEVICE == "cpu", gradient_accumulation_steps=2)
        model = perceptron(seed)
        optimizer = cls(model.parameters(), **SETTINGS, **settings)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader(), decay(optimizer)
        )

    def train(self, epochs):
        for _ in range(epochs):
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, batch))
                    if self.accelerator.sync_gradients:
                        self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)))
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self

    def made(self):
        return self.accelerator.unwrap_model(self.model), self.optimizer.optimizer


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_accelerate(accelerate, tmp_path, extras):
    unbroken = Accelerated(accelerate, **extras).train(4)
    assert type(unbroken.optimizer.optimizer) is NAdam
    assert max(unbroken.norms) > CLIP

    broken = Accelerated(accelerate, **extras).train(1)
    broken.accelerator.save_state(tmp_path)
    halfway = deepcopy(broken.model)

    resumed = Accelerated(accelerate, seed=1, **extras)
    resumed.accelerator.load_state(tmp_path)
    assert equal(resumed.model.parameters(), halfway.parameters())
    resumed.train(3)
    assert type(resumed.optimizer.optimizer) is NAdam
    assert_same(resumed.made(), unbroken.made())
    assert not equal(resumed.model.parameters(), halfway.parameters())


def test_accelerate_as_with_pytorchs_own(accelerate):
    ours, stock = (Accelerated(accelerate, cls).train(4).made() for cls in (NAdam, torch.optim.NAdam))
    assert type(ours[1]) is NAdam
    assert ours[1].last_step.step == 4 * (BATCHES + 1) // 2
    assert not equal(ours[0].parameters(), perceptron().to(DEVICE).parameters())
    assert apart(ours[0].parameters(), stock[0].parameters()) < 10
