"""The README's loops on two gloo ranks against one process with batches twice as large."""

import pytest

from tests.distributed.reference import returned
from tests.helpers.gradients import relative_error
from tests.helpers.loops import run_loop
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("tests.distributed.loops", tmp_path_factory.mktemp("loops"))


@pytest.mark.parametrize(
    "case, options",
    [
        ("plain_ddp", {"name": "plain", "rows": 4}),
        ("plain_fsdp", {"name": "plain", "rows": 4}),
        ("accelerate", {"name": "accelerate", "rows": 4}),
        ("accelerate_with_accumulation", {"name": "accelerate", "rows": 2, "accumulation": 2}),
        ("accelerate_fsdp", {"name": "accelerate", "rows": 2, "accumulation": 2}),
        ("trainer", {"name": "trainer", "rows": 4}),
    ],
)
def test_two_ranks_are_one_large_batch(ranks, case, options, tmp_path):
    first, second = returned(ranks, case)
    assert relative_error(first, second) == 0.0
    assert relative_error(first, run_loop(folder=tmp_path, **options)) < 1e-12
