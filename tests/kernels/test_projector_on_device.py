"""`GradientProjector` on a GPU: it does not wait, takes a loss scale, and can be captured."""

import contextlib

import pytest
import torch

import drivekd
from drivekd.reweighting import BalancedWeights, OnlineWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATIC = {"ce": 1.0, "perception": 0.5, "planning": 2.0}


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(5, 70, dtype=dtype)
        self.second = torch.nn.Linear(70, 3, dtype=dtype)
        self.to(DEVICE)
        self.x = torch.randn(6, 5, dtype=dtype).to(DEVICE)

    def losses(self):
        hidden = self.first(self.x).tanh()
        return {
            "ce": self.second(hidden).square().mean() + hidden.mean(),
            "perception": (1.5 - hidden).square().mean(),
            "planning": (0.3 - hidden).abs().mean(),
        }


@contextlib.contextmanager
def no_wait():
    """Inside, what synchronises with a GPU is an error."""
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def weightings():
    return {
        "none": None,
        "numbers": {**STATIC, "planning": torch.tensor(2.0, device=DEVICE)},
        "balance": BalancedWeights(0.1),
        "online": OnlineWeights(STATIC, alpha=0.5),
    }


@pytest.mark.parametrize("weighting", weightings())
@pytest.mark.parametrize("missing", ["zero", "official"])
@pytest.mark.parametrize("every", ["microbatch", "step"])
def test_nothing_waits_for_the_device(weighting, missing, every):
    """From the second step on: kernels are compiled then, and states are where gradients are."""
    torch.use_deterministic_algorithms(False)
    net, weights = Net(), weightings()[weighting]
    projector = drivekd.GradientProjector(
        net.parameters(), missing=missing, every=every, max_norm=1.0 if every == "step" else None
    )

    def step():
        report = projector.backward(net.losses(), weights=weights)
        return projector.step() if every == "step" else report

    step()
    with no_wait():
        report = step()
    assert bool(report.finite.all()) and report.norms.device.type == DEVICE
    assert all(bool(each.grad.isfinite().all()) for each in net.parameters())


def test_a_loss_scale_is_in_the_gradients_and_in_nothing_else():
    scaled, plain = Net(), Net()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    reports = [
        drivekd.GradientProjector(net.parameters()).backward(net.losses(), scaler=own)
        for net, own in ((scaled, scaler), (plain, None))
    ]
    for one, other in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, 2.0**10 * other.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(reports[0].norms, reports[1].norms, rtol=1e-5, atol=1e-9)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    before = scaled.first.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    moved = before - 0.1 * plain.first.weight.grad
    torch.testing.assert_close(scaled.first.weight.detach(), moved, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_a_graph_holds_forward_projection_and_constants():
    """Replayed after other work has taken, and written to, whatever pinned memory is free."""
    torch.use_deterministic_algorithms(False)
    net = Net()
    projector = drivekd.GradientProjector(net.parameters(), method="agp", missing="official")

    def step():
        for each in net.parameters():
            each.grad = None
        projector.backward(net.losses())
        return [each.grad for each in net.parameters()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    projector.load_state_dict(drivekd.GradientProjector(net.parameters()).state_dict())
    wanted = [each.clone() for each in step()]
    projector.load_state_dict(drivekd.GradientProjector(net.parameters()).state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    noise = [torch.full((2**n,), -1.0).pin_memory() for n in range(4, 14) for _ in range(4)]
    for each in captured:
        each.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert noise
    for got, want in zip(captured, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)  # other cuBLAS kernels, maybe
