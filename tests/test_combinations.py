"""Arguments in combination over many steps, drawn by hypothesis, against the reference."""

import numpy as np
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agree import step_against_reference
from arguments import Case
from cases import DTYPES, SHAPES, draw_grads, draw_params

SMALL = st.floats(0.01, 3.0)
CLIPS = st.one_of(
    st.just({}),
    SMALL.map(lambda x: {"clipnorm": x}),
    SMALL.map(lambda x: {"clipvalue": x}),
    SMALL.map(lambda x: {"global_clipnorm": x}),
)
SETTINGS = st.fixed_dictionaries(
    {
        "lr": st.one_of(st.floats(0.0, 0.5), st.sampled_from([lambda step: 0.1 / (1 + step), lambda: 0.05])),
        "beta1": st.floats(0.0, 0.99),
        "beta2": st.floats(0.5, 0.9999),  # below, an average that falls steeply keeps the rounding of what it was
        "eps": st.floats(1e-3, 1.0),  # a tiny one makes a near-zero gradient's step ill-conditioned
        "weight_decay": st.one_of(st.none(), st.floats(0.0, 0.5)),
        "loss_scale_factor": st.one_of(st.none(), st.floats(0.5, 1000.0)),
        "gradient_accumulation_steps": st.one_of(st.none(), st.integers(2, 4)),
        "momentum_decay": st.sampled_from([1.0, 0.004, 0.0, float("inf")]),
        "bias_correction": st.sampled_from(["nadam", "adam"]),
        "skip_nonfinite": st.booleans(),
        "use_ema": st.booleans(),
        "ema_momentum": st.floats(0.0, 1.0),
        "ema_overwrite_frequency": st.one_of(st.none(), st.integers(1, 4)),
    }
)


@hypothesis_settings(max_examples=300)
@given(
    settings=SETTINGS,
    clip=CLIPS,
    dtypes=st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=4),
    steps=st.integers(1, 24),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_combination_does_what_the_reference_does(settings, clip, dtypes, steps, seed, data):
    # Through the norm of all, what an accumulator in float32 rounds off reaches the float64 parameters.
    rounds = "global_clipnorm" in clip and settings["gradient_accumulation_steps"]
    assume(not (rounds and "float64" in dtypes and len(set(dtypes)) > 1))
    rng = np.random.default_rng(seed)
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=len(dtypes), max_size=len(dtypes)))
    params = [draw_params(rng, [shape], DTYPES[dtype])[0] for shape, dtype in zip(shapes, dtypes, strict=True)]
    all_grads = []
    for _ in range(steps):
        grads = draw_grads(rng, params)
        missing = rng.random(len(grads)) < 0.2
        missing[rng.integers(len(grads))] = False
        all_grads.append([None if gone else g for gone, g in zip(missing, grads, strict=True)])
    step_against_reference("numpy", Case("drawn", {**settings, **clip}), (params, all_grads))


@hypothesis_settings(max_examples=40)
@given(param=st.sampled_from(list(DTYPES)), grad=st.sampled_from([*DTYPES, "int32"]), seed=st.integers(0, 2**32 - 1))
def test_any_gradient_dtype_with_any_parameter_dtype(param, grad, seed):
    rng = np.random.default_rng(seed)
    params = draw_params(rng, [(70,), (2, 3)], DTYPES[param])
    grads = [draw_grads(rng, params, DTYPES.get(grad, np.int32), scale=3.0) for _ in range(4)]
    step_against_reference("numpy", Case("dtypes", {"eps": 0.01, "clipnorm": 1.0}), (params, grads))
