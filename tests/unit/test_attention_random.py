"""The torch backend on random calls against the float64 twin."""

import pytest

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
