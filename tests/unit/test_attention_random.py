"""The torch backend on random calls against the float64 twin."""

import pytest

from drivekd.ops.torch_backend import attention_chunks
from tests.helpers.random_attention import draw_call, excess


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_random_calls_match_the_twin(first):
    for seed in range(first, first + 20):
        call = draw_call(seed)
        worst = excess(call, *call.run("torch"))
        assert max(worst.values()) <= 1, f"seed {seed}: {worst}; {call}"


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_random_calls_with_scores_of_hundreds_match_the_twin(first):
    """Nearly one-hot rows, of which a gradient is what is left when its terms cancel."""
    for seed in range(first, first + 20):
        call = draw_call(seed, max_spread=30.0)
        worst = excess(call, *call.run("torch"))
        assert max(worst.values()) <= 1, f"seed {seed}: {worst}; {call}"


@pytest.mark.parametrize("first", range(200, 320, 20))
def test_random_calls_on_the_path_of_other_devices_match_the_twin(first, monkeypatch):
    """On a GPU no value of the layout is read; here the same path runs on the CPU, in chunks."""
    monkeypatch.setattr(attention_chunks, "READABLE", frozenset())
    monkeypatch.setitem(attention_chunks._STACK_BYTES, "cpu", 1)
    for seed in range(first, first + 20):
        call = draw_call(seed, max_spread=12.0)
        worst = excess(call, *call.run("torch"))
        assert max(worst.values()) <= 1, f"seed {seed}: {worst}; {call}"
