"""What drivekd is compared with does what it stands for."""

import pytest

from benchmarks.baselines.public_projection import public_projection
from drivekd.reference import agp as reference
from tests.helpers.gradients import relative_error, task_gradients

# Which of 8 tensors each of the four tasks has, tensor by tensor; the anchor may be absent too.
PRESENCE = {
    "all": ("1111",),
    "absent followers": ("1111", "1011", "1101", "1001"),
    "absent anchor": ("1111", "0110", "1010", "0001"),
    "absent everywhere": ("1111", "0000"),
}


@pytest.mark.parametrize("order", [None, [2, 3, 1]])
@pytest.mark.parametrize("presence", PRESENCE.values(), ids=PRESENCE)
@pytest.mark.parametrize("correlation", [-0.8, 0.3])
def test_the_public_projection_is_agp_with_absent_gradients_left_absent(
    correlation, presence, order
):
    weights = [1.0, 0.5, 20.0, 3.0]
    grads = task_gradients(presence=presence, correlation=correlation)
    scaled = [
        [None if grad is None else weight * grad for grad in own]
        for weight, own in zip(weights, grads, strict=True)
    ]
    expected = reference.agp(scaled, order=order, missing="official")
    got = public_projection(grads, weights, order=order)
    assert relative_error(got, expected) < 1e-5  # its inner products are float32
