"""Attention-map losses of a transformers model on two ranks against one process.

Captured queries and keys leave a layer by the side, past the outputs at which FSDP2 waits for a
backward: without help it gathers too late (an error) or reduces too late (a loss's gradient ends
up in the next one's, silently).
"""

import pytest
import torch

from tests.distributed.captured import (
    trained,
    with_adapters,
    with_frozen_embeddings,
    with_tied_weights,
)
from tests.distributed.reference import check_same_on_all, returned
from tests.helpers.gradients import relative_error
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("tests.distributed.captured", tmp_path_factory.mktemp("students"))


@pytest.fixture(scope="module")
def one_process():
    return trained(seeds=(0, 1))


@pytest.mark.parametrize(
    "case",
    ("ddp", "checkpointing_ddp", "fsdp", "fsdp_without_resharding", "checkpointing_fsdp"),
)
def test_two_steps_are_those_of_one_process(ranks, one_process, case):
    results = returned(ranks, case)
    check_same_on_all(results)
    # fp32 through four layers, forwards and backwards, twice.
    assert relative_error(results[0]["grads"], one_process["grads"]) < 1e-5
    torch.testing.assert_close(
        results[0]["report"]["norms"], one_process["report"]["norms"], rtol=1e-5, atol=0
    )
    assert results[0]["report"]["names"] == one_process["report"]["names"]


@pytest.mark.parametrize(
    "case, change",
    [
        # No input of the first layer needs a gradient, where FSDP2 would finish that layer.
        ("frozen_embeddings_fsdp", with_frozen_embeddings),
        ("tied_weights_ddp", with_tied_weights),
        ("tied_weights_fsdp", with_tied_weights),
        ("adapters_ddp", with_adapters),
        ("adapters_fsdp", with_adapters),
    ],
)
def test_models_whose_parameters_are_not_all_alike(ranks, case, change):
    results = returned(ranks, case)
    check_same_on_all(results)
    want = trained(change, seeds=(0, 1))
    assert relative_error(results[0]["grads"], want["grads"]) < 1e-5
    torch.testing.assert_close(
        results[0]["report"]["norms"], want["report"]["norms"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("case", ("lacking_samples_ddp", "lacking_samples_fsdp"))
def test_a_rank_without_samples_for_a_loss(ranks, case):
    """It leaves the loss out or, as FSDP2 needs it, gives the exact zero of no counted sample."""
    results = returned(ranks, case)
    check_same_on_all(results)
    want = trained(seeds=(0, 1), lack="absent")
    assert relative_error(results[0]["grads"], want["grads"]) < 1e-5
