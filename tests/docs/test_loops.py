"""The README's loops: at most five lines change, and they do what they say."""

import pytest

from tests.helpers.gradients import relative_error
from tests.helpers.loops import Net, Plain, run_loop
from tests.helpers.readme import loops

NAMES = ("plain", "accelerate", "trainer")


@pytest.mark.parametrize("name", NAMES)
def test_at_most_five_lines_are_added(name):
    assert 2 <= loops()[name].added <= 5


@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("name", NAMES)
def test_without_projection_the_loop_trains_as_before(name, accumulation, tmp_path):
    """Same steps, same scaling: only what joins the gradients is new."""
    options = {"accumulation": accumulation if name != "plain" else 1}
    before = run_loop(name, tmp_path, which="before", **options)
    after = run_loop(name, tmp_path, library=Plain, **options)
    assert relative_error(after, before) < 1e-12
    start = [own.detach() for own in Net().parameters()]
    assert relative_error(before, start) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_with_projection_all_loops_agree(name, tmp_path):
    projected = run_loop(name, tmp_path)
    assert relative_error(projected, run_loop("plain", tmp_path)) < 1e-12
    assert relative_error(projected, run_loop(name, tmp_path, which="before")) > 1e-4
