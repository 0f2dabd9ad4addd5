"""Edits between steps beside PyTorch's own optimizer; test_torch_edits.py runs it with freed memory spoilt."""

import os

import pytest
import torch
from edits import EDITS, Pair
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from nadam.torch.bucket_cache import BucketCache

SEQUENCES = int(os.environ.get("NADAM_SEQUENCES", "500"))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_as_in_pytorch(edit, groups):
    pair = Pair(groups=groups)
    for moment in range(9):
        if moment in (3, 6):
            pair.edit(EDITS[edit])
        pair.step()


@pytest.mark.parametrize("edit", [name for name in EDITS if "on all" in name or "replaced" in name])
def test_an_edit_of_large_tensors(edit):
    pair = Pair(groups=1, shapes=[(3, 4), (5,), (1 << 11, 1 << 8)])
    for moment in range(4):
        if moment == 2:
            pair.edit(EDITS[edit])
        pair.step()


def test_without_edits_nothing_is_formed_anew(monkeypatch):
    formed, form = [], BucketCache._form
    monkeypatch.setattr(BucketCache, "_form", lambda *args: formed.append(1) or form(*args))
    pair = Pair()
    for _ in range(5):
        pair.step()
    assert len(formed) == 1


class Edited(RuleBasedStateMachine):
    """Random edits between steps, ours and PyTorch's compared after each step."""

    @initialize(seed=st.integers(0, 1 << 20), groups=st.integers(1, 2))
    def begin(self, seed, groups):
        self.pair = Pair(seed, groups)

    @rule(edit=st.sampled_from(sorted(EDITS)))
    def edit(self, edit):
        self.pair.edit(EDITS[edit])

    @rule(
        missing=st.sets(st.integers(0, 5), max_size=3),
        strided=st.sets(st.integers(0, 5), max_size=2),
        times=st.integers(1, 3),
    )
    def step(self, missing, strided, times):
        for _ in range(times):
            self.pair.step(missing, strided)


def test_sequences_of_edits():
    run_state_machine_as_test(
        Edited,
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=12,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_comparison_can_fail():
    pair = Pair()
    pair.step()
    with torch.no_grad():
        pair.optimizers[0].state[pair.params[0][1]]["exp_avg"].mul_(1.001)
    with pytest.raises(AssertionError):
        pair.step()
