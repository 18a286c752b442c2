"""agp_weights and pcgrad_weights against plain vectors: equations, rules, edge cases, accuracy."""

import itertools
import math
import time

import pytest
import torch

from drivekd.functional.gradient import GradientGram, combine_gradients, gradient_gram
from drivekd.functional.projection import agp_weights, pcgrad_weights, projection_weights
from drivekd.reference import agp as reference
from tests.helpers.gradients import (
    PRESENCE,
    every_presence_of,
    near_antiparallel,
    relative_error,
    task_gradients,
)

EXACT = 1e-10
RULES = list(itertools.product(("zero", "official"), ("official", "once")))


def agp_error(lists, **options):
    weights = agp_weights(gradient_gram(lists), **options)
    expected = reference.agp(lists, **options)
    return relative_error(combine_gradients(lists, weights), expected)


@pytest.mark.parametrize("presence", PRESENCE.values(), ids=PRESENCE)
@pytest.mark.parametrize("missing, ce_multiplicity", RULES)
def test_matches_plain_vectors_in_every_order(presence, missing, ce_multiplicity):
    options = {"missing": missing, "ce_multiplicity": ce_multiplicity}
    for correlation in (-0.9, -0.3, 0.3):
        lists = task_gradients(presence=presence, correlation=correlation)
        for order in itertools.permutations((1, 2, 3)):
            assert agp_error(lists, order=list(order), **options) < EXACT


@pytest.mark.parametrize("missing, ce_multiplicity", RULES)
def test_matches_plain_vectors_for_every_presence(missing, ce_multiplicity):
    """Every way in which three tasks can have or lack gradients at two tensors."""
    for presence in every_presence_of(3, 2):
        lists = task_gradients(3, shapes=[(5,), (4,)], presence=presence, correlation=-0.7)
        assert agp_error(lists, missing=missing, ce_multiplicity=ce_multiplicity) < EXACT


@pytest.mark.parametrize("missing, ce_multiplicity", RULES)
@pytest.mark.parametrize("num_tasks", range(1, 9))
def test_one_to_eight_tasks_and_any_anchor(num_tasks, missing, ce_multiplicity):
    presence = [mask + "1111" for mask in PRESENCE["nested followers"]]
    for anchor in {0, num_tasks // 2, num_tasks - 1}:
        lists = task_gradients(num_tasks, presence=presence, correlation=-0.5)
        options = {"missing": missing, "ce_multiplicity": ce_multiplicity}
        assert agp_error(lists, anchor=anchor, **options) < EXACT


@pytest.mark.parametrize("missing", ("zero", "official"))
@pytest.mark.parametrize("scale", (0.0, 1e-30, 1e-12, 1e-9, 1e-6))
def test_zero_and_tiny_anchors(scale, missing):
    lists = task_gradients(correlation=-0.8)
    lists[0] = [scale * grad for grad in lists[0]]
    assert agp_error(lists, missing=missing) < EXACT


def test_a_follower_that_cancels_the_anchor():
    lists = task_gradients(3)
    lists[1] = [-2.0 * grad for grad in lists[0]]
    assert agp_error(lists) < EXACT


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("missing, ce_multiplicity", RULES)
def test_one_stage_alone(stage, missing, ce_multiplicity):
    lists = task_gradients(presence=PRESENCE["nested followers"], correlation=-0.6)
    options = {"missing": missing, "ce_multiplicity": ce_multiplicity}
    weights = projection_weights(gradient_gram(lists), method=f"stage{stage}", **options)
    expected = reference.agp(lists, stages=(stage,), **options)
    assert relative_error(combine_gradients(lists, weights), expected) < EXACT


@pytest.mark.parametrize("num_tasks", (1, 2, 4, 8))
def test_pcgrad_matches_plain_vectors(num_tasks):
    presence = [mask + "1111" for mask in PRESENCE["nested followers"]]
    lists = task_gradients(num_tasks, presence=presence, correlation=-0.5)
    for order in (None, list(range(num_tasks))[::-1]):
        weights = pcgrad_weights(gradient_gram(lists), order=order)
        expected = reference.pcgrad(lists, order=order)
        assert relative_error(combine_gradients(lists, weights), expected) < EXACT


def test_without_conflicts_the_anchor_counts_once_per_follower():
    lists = [[torch.ones(3)] for _ in range(4)]
    gram = gradient_gram(lists)
    assert agp_weights(gram).tolist() == [3, 1, 1, 1]
    assert agp_weights(gram, missing="official").tolist() == [[3, 1, 1, 1]]
    once = agp_weights(gram, ce_multiplicity="once")
    torch.testing.assert_close(once, torch.ones(4, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_anchor_alone_is_the_update():
    gram = gradient_gram([[torch.randn(3), None, torch.ones(1)]])
    for missing, ce_multiplicity in RULES:
        weights = agp_weights(gram, missing=missing, ce_multiplicity=ce_multiplicity)
        assert weights.flatten().tolist() == [1.0]


def test_stage_one_leaves_no_conflict_with_the_anchor_under_zero_only():
    """The official rule leaves 1 - |ce_S|^2 / |ce|^2 of it, S where the follower is present."""
    lists = task_gradients(2, shapes=[(50,), (50,)], presence=("11", "10"), correlation=-0.8)
    gram = gradient_gram(lists)
    before = float(gram.total[0, 1])
    part = float(gram.values[0, 0, 0] / gram.total[0, 0])
    for missing, left in (("zero", 0.0), ("official", before * (1 - part))):
        weights = projection_weights(gram, method="stage1", missing=missing).view(-1, 2).clone()
        weights[:, 0] -= 1.0
        follower = combine_gradients(lists, weights.expand(2, 2))
        product = sum(float((f * c).sum()) for f, c in zip(follower, lists[0], strict=True))
        assert product == pytest.approx(left, abs=1e-12)


@pytest.mark.parametrize("missing", ("zero", "official"))
@pytest.mark.parametrize("epsilon", (0.1, 1e-2, 1e-3))
@pytest.mark.parametrize("scale", (1.0, 1e2, 1e4, 1e6))
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)])
def test_near_antiparallel_gradients_do_not_blow_up(dtype, bound, scale, epsilon, missing):
    """A Gram held in fp32 gives 2e26 or inf here; bf16 has 1.7e-3 from rounding the update."""
    lists = near_antiparallel(scale, epsilon, dtype)
    assert agp_error(lists, missing=missing) < bound


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_non_finite_gradients_give_non_finite_weights(value):
    for task in range(3):
        lists = task_gradients(3)
        lists[task][0][0] = value
        weights = agp_weights(gradient_gram(lists))
        update = combine_gradients(lists, weights)
        assert not bool(update[0].isfinite().all())


def test_weights_of_scaled_gradients():
    lists = task_gradients(presence=PRESENCE["nested followers"], correlation=-0.5)
    weights = torch.tensor([1.0, 0.3, 30.0, 2.0], dtype=torch.float64)
    pairs = list(zip(weights, lists, strict=True))
    scaled = [[None if g is None else w * g for g in own] for w, own in pairs]
    for missing in ("zero", "official"):
        folded = weights * agp_weights(gradient_gram(lists).scaled(weights), missing=missing)
        expected = reference.agp(scaled, missing=missing)
        assert relative_error(combine_gradients(lists, folded), expected) < EXACT


def test_an_empty_gram_has_weights_too():
    gram = gradient_gram([[None], [None]])
    assert agp_weights(gram).tolist() == [1.0, 1.0]
    assert agp_weights(gram, missing="official").shape == (0, 2)


def test_weights_of_four_tasks_cost_well_under_a_millisecond():
    gram = gradient_gram(task_gradients(presence=PRESENCE["nested followers"]))
    rounds = []
    for _ in range(30):
        start = time.process_time()
        agp_weights(gram)
        rounds.append(time.process_time() - start)
    # 0.2 ms on a loaded core; the bound leaves room for a busy machine.
    assert min(rounds) < 1e-3


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"anchor": 4}, ValueError, "anchor is 4"),
        ({"anchor": -1}, ValueError, "anchor is -1"),
        ({"anchor": "ce"}, TypeError, "anchor must be an int"),
        ({"anchor": True}, TypeError, "anchor must be an int"),
        ({"order": [0, 1, 2, 3]}, ValueError, r"order is \[0, 1, 2, 3\]"),
        ({"order": [1, 1, 2]}, ValueError, "order is"),
        ({"order": [1, 2]}, ValueError, "order is"),
        ({"order": torch.tensor([1, 2, 3])}, TypeError, "order must be a sequence"),
        ({"order": [1.0, 2.0, 3.0]}, TypeError, "order must hold ints"),
        ({"missing": "skip"}, ValueError, "missing is 'skip'"),
        ({"ce_multiplicity": "twice"}, ValueError, "ce_multiplicity is 'twice'"),
    ],
)
def test_agp_refuses(options, error, message):
    gram = gradient_gram(task_gradients())
    with pytest.raises(error, match=message):
        agp_weights(gram, **options)


def test_refuses_what_is_no_gram():
    with pytest.raises(TypeError, match="GradientGram"):
        agp_weights(torch.eye(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="GradientGram"):
        pcgrad_weights(None)
    gram = GradientGram(((0,),), torch.ones(1, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="order"):
        pcgrad_weights(gram, order=[1])
    with pytest.raises(ValueError, match="method"):
        projection_weights(gram, method="cagrad")
