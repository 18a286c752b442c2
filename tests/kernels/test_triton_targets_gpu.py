"""Given targets where only a GPU can show it: bfloat16, no synchronisation, graphs."""

from dataclasses import replace

import pytest
import torch

from drivekd.functional import attention_map_target_loss
from tests.helpers.attention import Heads, make_case
from tests.helpers.given import make_target, run_given, run_given_twin, whole_map
from tests.helpers.graphs import check_captured, loss_and_gradients

pytestmark = pytest.mark.gpu

LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
def test_bfloat16_against_a_given_target_matches_the_twin(loss, region):
    case = make_case(
        num_samples=2, num_tokens=300, dtype=torch.bfloat16, student=Heads(14, 2, 64),
        teacher=Heads(28, 4, 128), loss=loss, region=region, padding="left", segments=2,
    ).but(backend="triton")  # fmt: skip
    target = make_target(case, torch.float16, top_k=64)
    expected, actual = run_given_twin(case, target), run_given(case, target, device="cuda")
    assert abs(actual[0] - expected[0]) <= 1e-3 * expected[0]
    for got, want in zip(actual[1:], expected[1:], strict=True):
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("region", REGIONS)
def test_targets_are_made_as_in_float64(region):
    case = make_case(
        num_tokens=300, dtype=torch.bfloat16, teacher=Heads(28, 4, 128), region=region,
        num_teachers=2, padding="left",
    )  # fmt: skip
    moved = replace(case.map_tensors(lambda x: x.to("cuda")), tokens=case.tokens.to("cuda"))
    made = make_target(moved, top_k=None, layers=torch.bfloat16, backend="triton").to("cpu")
    got, want = whole_map(case, made), whole_map(case, make_target(case, top_k=None))
    assert (got - want).norm() <= 1e-5 * want.norm()  # products of bfloat16 are exact, sums are not


def given_call_of(case):
    q, k = (x.to("cuda", case.dtype).requires_grad_() for x in case.student)
    target, tokens = make_target(case, torch.float16).to("cuda"), case.tokens.to("cuda")

    def call():
        loss = attention_map_target_loss(
            q, k, target, tokens, loss=case.settings["loss"], backend="triton"
        )
        return loss_and_gradients(loss, (q, k))

    return call


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
def test_no_synchronisation_and_a_graph_replays_it(loss, region):
    torch.use_deterministic_algorithms(False)  # as in production
    case = make_case(num_tokens=200, dtype=torch.bfloat16, loss=loss, region=region, padding="left")
    check_captured(given_call_of(case))
