"""What only the TensorFlow backend does: small variables side by side in one tensor."""

import keras
import numpy as np
import pytest

import nadam.keras

if keras.backend.backend() != "tensorflow":
    pytest.skip("the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from nadam.keras import packing

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 2), *[(7,)] * 6, (200, 100)]
SETTINGS = [
    {},
    {"weight_decay": 0.1, "global_clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 3},
    {"clipvalue": 0.1, "loss_scale_factor": 4.0},
    {"gradient_accumulation_steps": 2, "use_ema": True, "global_clipnorm": 0.5},
    {"skip_nonfinite": True, "global_clipnorm": 0.5},
]


def trained(settings, dtypes, compiled):
    rng = np.random.default_rng(0)
    variables = [
        keras.Variable(rng.normal(size=shape), dtype=dtypes[i % len(dtypes)], name="kernel" if i % 2 else "bias")
        for i, shape in enumerate(SHAPES)
    ]
    optimizer = nadam.keras.Nadam(0.01, **settings)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(variables)
    apply = tf.function(lambda grads: optimizer.apply(grads)) if compiled else optimizer.apply
    for _ in range(6):
        apply([tf.cast(tf.constant(rng.normal(size=v.shape)), v.dtype) for v in variables])
    return [keras.ops.convert_to_numpy(v).astype(np.float64) for v in [*variables, *optimizer.variables]]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("dtypes", [["float32"], ["float32", "float64", "bfloat16"]], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_packed_or_not_the_numbers_are_the_same(settings, dtypes, compiled, monkeypatch):
    packed = []
    real = packing.one_pass

    def counted(h, p, tensors, infos):
        packed.append(len(tensors))
        return real(h, p, tensors, infos)

    monkeypatch.setattr(packing, "one_pass", counted)
    together = trained(settings, dtypes, compiled)
    assert set(packed) == {len(SHAPES) - 1}
    monkeypatch.setattr(packing, "WORTH_PACKING", 1000)
    packed.clear()
    for one, other in zip(together, trained(settings, dtypes, compiled), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6 if dtypes == ["float32"] else 2e-2, atol=1e-6)
    assert not packed


@pytest.mark.parametrize("settings", [{"clipnorm": 0.5}], ids=str)
def test_gradients_that_are_clipped_each_are_not_packed(settings, monkeypatch):
    monkeypatch.setattr(packing, "one_pass", None)
    assert np.isfinite(trained(settings, ["float32"], compiled=True)[0]).all()
