"""The optimizers chosen by name, and the settings that docs/recipes show; their programs run in tests/test_docs.py."""

import re
import sys
from pathlib import Path

import pytest
import torch
from training import apart, parameters, timm_optim, train

from nadam.torch import NAdam, NAdamW
from nadam.torch.integrations import register_timm

pytestmark = [  # of Lightning, which asks jsonargparse for what it would rather not do
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]
RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


def shown(page):
    """The settings that a page shows."""
    return re.search(r"```yaml\n(.*?)```", (RECIPES / page).read_text(), re.DOTALL)[1]


@pytest.fixture
def timm():
    """timm.optim, whose registry is put back."""
    optim = timm_optim()
    from timm.optim._optim_factory import default_registry

    before = dict(default_registry._optimizers)
    yield optim
    default_registry._optimizers.clear()
    default_registry._optimizers.update(before)


def test_timm_makes_them_by_name(timm, caplog):
    own = timm.get_optimizer_class("nadamw", bind_defaults=False)
    register_timm()
    assert not caplog.records  # nothing was there already
    assert timm.get_optimizer_class("nadamw", bind_defaults=False) is own
    assert {"nadam.nadam", "nadam.nadamw"} <= set(timm.list_optimizers("nadam*"))
    made = []
    for name, cls in (("nadam.nadamw", NAdamW), ("nadamw", own)):
        params = parameters()
        optimizer = timm.create_optimizer_v2(params, opt=name, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99))
        assert type(optimizer) is cls
        train(optimizer, params, 20)
        made.append(params)
    assert apart(*made) < 20.0
    assert type(timm.create_optimizer_v2(parameters(), opt="NAdam.NAdam", eps=1e-6)) is NAdam
    params = parameters()
    train(timm.create_optimizer_v2(params, opt="lookahead_nadam.nadamw", lr=0.01), params, 7)


def test_timm_with_a_registry_of_its_own(timm):
    registry = timm.OptimizerRegistry()
    register_timm(registry)
    assert registry.list_optimizers() == ["nadam.nadam", "nadam.nadamw"]
    (named,) = registry.list_optimizers("*w", with_description=True)
    assert named[1].startswith("NAdamW in the place of")


@pytest.fixture
def made_by_cli(tmp_path, monkeypatch):
    """What Lightning's CLI makes of arguments."""
    lightning = pytest.importorskip("lightning", minversion="2.6")
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(2, 1)

        def training_step(self, batch):
            return self.model(batch).square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    trainer = [f"--trainer.{name}=false" for name in quiet] + ["--trainer.accelerator=cpu", "--trainer.max_epochs=1"]

    def made(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", "fit", *trainer, *args])
        cli = LightningCLI(Module, seed_everything_default=False)
        (optimizer,) = cli.trainer.optimizers
        return optimizer

    return made


@pytest.mark.parametrize("cls", [NAdam, NAdamW])
def test_lightning_by_path(made_by_cli, cls):
    path = f"nadam.torch.{cls.__name__}"
    optimizer = made_by_cli("--optimizer", path, "--optimizer.lr=0.25", "--optimizer.global_clipnorm=2.0")
    assert type(optimizer) is cls
    assert (optimizer.param_groups[0]["lr"], optimizer.last_step.step) == (0.25, 2)
    assert optimizer.last_step.grad_norm is not None


def test_lightning_as_shown(made_by_cli, tmp_path):
    (tmp_path / "chosen.yaml").write_text(shown("lightning.md"))
    optimizer = made_by_cli("--config", "chosen.yaml")
    assert type(optimizer) is NAdamW
    assert [optimizer.param_groups[0][name] for name in ("lr", "betas")] == [1e-3, (0.9, 0.98)]
    assert optimizer.last_step.grad_norm is not None


def test_lightning_refuses_an_argument_that_there_is_not(made_by_cli, capsys):
    with pytest.raises(SystemExit):
        made_by_cli("--optimizer", "nadam.torch.NAdamW", "--optimizer.momentum_decay=1.0")
    assert "momentum_decay" in capsys.readouterr().err


def test_hydra_as_shown():
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    config = OmegaConf.create(shown("index.md"))
    optimizer = hydra.utils.instantiate(config.optimizer)(parameters())
    assert type(optimizer) is NAdamW
    assert optimizer.param_groups[0]["lr"] == 1e-3
