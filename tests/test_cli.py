"""The command line: what `nadam inspect`, `verify` and `convert` print, write and exit with."""

import json
import subprocess
import sys

import numpy as np
import pytest

import nadam
from nadam import checkpoint, cli


def trained(steps=3, **settings):
    params = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    optimizer = nadam.Nadam(0.01, **settings)
    for _ in range(steps):
        optimizer.apply({name: np.full_like(array, 0.5) for name, array in params.items()}, params)
    return optimizer, params


@pytest.fixture
def file(tmp_path):
    checkpoint.save(tmp_path / "run.nadam", *trained(weight_decay=0.1), metadata={"epoch": 4})
    return tmp_path / "run.nadam"


def damaged(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_inspect_tells_step_settings_and_norms(file, capsys):
    assert cli.main(["inspect", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["whole"], told["step"], told["metadata"], told["optimizer"]) == (
        True,
        3,
        {"epoch": 4},
        "nadam.numpy.optimizer.Nadam",
    )
    assert told["2 parameters"]["weight_decay"] == 0.1
    state = checkpoint.load(file)["params"]["w"]
    row = told["tensors"][0]
    assert (row["name"], row["shape"], row["step"]) == ("w", "[2, 3]", 3)
    assert row["|exp_avg_sq|"] == pytest.approx(np.linalg.norm(state["exp_avg_sq"]), rel=1e-3)


@pytest.mark.parametrize("rich", [True, False])
def test_inspect_prints_a_table_with_rich_and_without(file, capsys, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "|exp_avg|" in out
    assert "momentum_product" in out


def test_inspect_takes_any_dict_and_the_newest_of_a_folder(tmp_path, capsys):
    for epoch in range(3):
        checkpoint.save(tmp_path, {"weights": np.full(4, epoch)}, keep=2)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "000003.nadam" in out
    assert "weights" in out


def test_a_damaged_file_is_told_and_exits_with_1(file, capsys):
    damaged(file)
    assert cli.main(["inspect", str(file)]) == 1
    assert "expected XXH3" in capsys.readouterr().out
    assert cli.main(["verify", str(file)]) == 1
    assert capsys.readouterr().out.startswith(f"{file}: ")


def test_verify_takes_files_and_folders(file, tmp_path, capsys):
    checkpoint.save(tmp_path / "more", {"a": np.ones(2)}, keep=3)
    assert cli.main(["verify", str(file), str(tmp_path / "more")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{file}: whole", f"{tmp_path}/more/000001.nadam: whole"]
    assert cli.main(["verify", str(file), str(tmp_path / "none.nadam"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [each["whole"] for each in told.values()] == [True, False]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04", None])
@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["convert", "--to", "nadam", "OUT"]])
def test_a_bad_file_gives_one_line(tmp_path, command, content):
    file = tmp_path / "bad.nadam"
    if content is not None:
        file.write_bytes(content)
    command = [str(file) if part == "OUT" else part for part in command]
    command.insert(1, str(file))
    done = subprocess.run([sys.executable, "-m", "nadam", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) <= 8
    assert str(file) in done.stdout + done.stderr


def test_wrong_usage_exits_with_2(capsys):
    for wrong in (["inspect"], ["convert", "a", "b"], ["nonsense"], ["convert", "a", "b", "--to", "keras"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(wrong)
        assert caught.value.code == 2


def test_to_torch_and_back(file, tmp_path):
    torch = pytest.importorskip("torch")
    assert cli.main(["convert", str(file), str(tmp_path / "run.pt"), "--to", "torch"]) == 0
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (("w", (2, 3)), ("b", (3,)))}
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    optimizer = torch.optim.NAdam(params.items(), lr=1.0)
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum_decay"], group["decoupled_weight_decay"]) == (
        0.01,
        0.1,
        1.0,
        True,
    )
    assert cli.main(["convert", str(tmp_path / "run.pt"), str(tmp_path / "back.nadam"), "--to", "nadam"]) == 0
    optimizer, params = trained(0, weight_decay=0.1)
    optimizer.build(params)
    checkpoint.load(tmp_path / "back.nadam", optimizer)
    expected = checkpoint.load(file)
    found = optimizer.state_dict()
    assert found["iteration"] == 3
    assert found["momentum_product"] == pytest.approx(expected["momentum_product"], rel=1e-6)  # float32 in PyTorch's
    for name in ("w", "b"):
        assert found["state"][name]["exp_avg"].tobytes() == expected["params"][name]["exp_avg"].tobytes()


def test_the_state_of_a_training_loop_and_of_adam(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save({"epoch": 1, "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "run.pt")
    command = [
        "convert",
        str(tmp_path / "run.pt"),
        str(tmp_path / "run.nadam"),
        "--to",
        "nadam",
        "--optimizer",
        "AdamW",
    ]
    assert cli.main(command) == 0
    moved = nadam.Nadam()
    moved.build({name: param.detach().numpy() for name, param in model.named_parameters()})
    with pytest.warns(UserWarning, match="settings differ"):
        checkpoint.load(tmp_path / "run.nadam", moved)
    assert moved.iterations == 1
    assert moved.learning_rate == 0.01


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"state": {}, "param_groups": [print]}, tmp_path / "run.pt")
    assert cli.main(["convert", str(tmp_path / "run.pt"), str(tmp_path / "out.nadam"), "--to", "nadam"]) == 1
    assert "torch.load cannot read it" in capsys.readouterr().err
    assert not (tmp_path / "out.nadam").exists()


def test_to_optax(file, tmp_path):
    optax = pytest.importorskip("optax")
    import jax

    assert cli.main(["convert", str(file), str(tmp_path / "run.npz"), "--to", "optax"]) == 0
    found = np.load(tmp_path / "run.npz")
    mu, nu = ({name: found[f"{kind}/{name}"] for name in ("w", "b")} for kind in ("mu", "nu"))
    state = (optax.ScaleByAdamState(found["count"], mu, nu), optax.EmptyState())
    like = optax.nadam(0.01).init(trained(0)[1])
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert int(found["count"]) == 3


def test_to_keras_and_back(tmp_path):
    keras = pytest.importorskip("keras")
    from nadam.keras import Nadam

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(Nadam(0.01), loss="mse")
    model.fit(np.ones((8, 3)), np.zeros((8, 2)), verbose=0)
    model.save(tmp_path / "trained.keras")
    assert cli.main(["convert", str(tmp_path / "trained.keras"), str(tmp_path / "run.nadam"), "--to", "nadam"]) == 0
    fresh = keras.models.clone_model(model)
    fresh.compile(Nadam(0.5), loss="mse")
    fresh.save(tmp_path / "fresh.keras")
    command = ["convert", str(tmp_path / "run.nadam"), str(tmp_path / "out.keras"), "--to", "keras"]
    assert cli.main([*command, "--like", str(tmp_path / "fresh.keras")]) == 0
    loaded = keras.models.load_model(tmp_path / "out.keras")
    assert float(loaded.optimizer.learning_rate) == pytest.approx(0.01)
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs))
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs))
