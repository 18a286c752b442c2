"""Calls of the library on fake CUDA tensors; `main` tells, as JSON, what was wrong with each."""

import functools
import itertools
import json
import os
import sys
import traceback

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import drivekd
from drivekd import functional, reweighting
from drivekd.functional.projection import METHODS
from drivekd.functional.targets import AttentionMapTarget
from drivekd.train.config import SignalConfig
from drivekd.train.hidden import HiddenStateLoss
from drivekd.train.metrics import StepMetrics
from drivekd.train.signals import Signal, _sample_weight
from tests.helpers import toy_models
from tests.helpers.fake_cuda.mode import as_on_a_gpu

B, N = 2, 24
LOSSES = ("mse", "cosine", "kl")
REGIONS = ("full", "text_to_vision")
LAYOUTS = ("plain", "padded", "packed", "none")
BACKENDS = ("torch", "triton")
CALLS = {}


def call(function):
    """A call that must not wait for the GPU."""
    CALLS[function.__name__] = function
    return function


def layout(kind: str):
    """A TokenLayout on the GPU, or None."""
    if kind == "none":
        return None
    position = torch.arange(N).expand(B, N)
    valid = position < N - 3 if kind == "padded" else None
    segments = position // 9 if kind == "packed" else None
    made = drivekd.TokenLayout.from_masks((position > 2) & (position < 9), valid=valid,
                                          segment_ids=segments)  # fmt: skip
    return made.pin_memory().to("cuda", non_blocking=True)


def heads(count: int, dim: int, dtype=torch.bfloat16, *, grad: bool = False):
    made = torch.empty(B, N, count, dim, dtype=dtype, device="cuda").transpose(1, 2)
    return made.detach().requires_grad_(grad)


def layers(count: int, shape: tuple[int, int, int], *, grad: bool = False, dtype=torch.bfloat16):
    H, H_kv, D = shape
    return [(heads(H, D, dtype, grad=grad), heads(H_kv, D, dtype, grad=grad)) for _ in range(count)]


def check_grads(tensors) -> None:
    for tensor in tensors:
        assert tensor.grad is not None and tensor.grad.device == tensor.device, tensor


def _losses(backend: str) -> None:
    for loss, region, kind in itertools.product(LOSSES, REGIONS, LAYOUTS):
        tokens = layout(kind)
        if tokens is None and region != "full":
            continue
        ((q, k),), teachers = layers(1, (6, 2, 16), grad=True), layers(2, (4, 4, 24))
        value = functional.attention_map_loss(
            q, k, [q for q, _ in teachers], [k for _, k in teachers], tokens,
            region=region, loss=loss, denominator="live", backend=backend,
            sample_weight=torch.ones(B, device="cuda"),
        )  # fmt: skip
        (2.5 * value).backward()
        check_grads((q, k))


def _layerwise(backend: str) -> None:
    for dtype, loss in itertools.product((torch.float32, torch.float16, torch.bfloat16), LOSSES):
        students = layers(3, (6, 2, 16), grad=True, dtype=dtype)
        teachers = layers(4, (4, 4, 24), dtype=dtype)
        lse = [torch.empty(B, 6, N, device="cuda") for _ in students]
        value = functional.layerwise_attention_map_loss(
            students, teachers, [[0, 1], [1, 2], [3]], layout("padded"), loss=loss,
            reduction="none", window=[None, 5, None], lse_student=lse, backend=backend,
        )  # fmt: skip
        value.sum().backward()
        check_grads(x for pair in students for x in pair)


def _maps(backend: str) -> None:
    ((q, k),) = layers(1, (6, 2, 16))
    for kind in LAYOUTS:
        made = functional.attention_map(q, k, layout(kind), window=7, backend=backend)
        assert made.shape == (B, N, N) and made.device.type == "cuda"


def gradients(dtype=torch.bfloat16):
    """Four tasks of ragged gradients; the second one lacks some, and not all are contiguous."""
    shapes = ((7,), (), (33, 65), (40_000,))
    lists = [[torch.empty(s, dtype=dtype, device="cuda") for s in shapes] for _ in range(4)]
    lists[1][2] = None
    lists[2][2] = torch.empty(65, 33, dtype=dtype, device="cuda").mT
    return lists


def _projection(backend: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        lists = gradients(dtype)
        gram = functional.gradient_gram(lists, backend=backend)
        for missing, count in itertools.product(("zero", "official"), ("official", "once")):
            weights = drivekd.agp_weights(gram, missing=missing, ce_multiplicity=count)
            made = functional.combine_gradients(lists, weights, backend=backend)
            functional.combine_gradients(lists, weights, out=made, accumulate=True, backend=backend)
        drivekd.pcgrad_weights(gram)


for _backend, _shared in itertools.product(BACKENDS, (_losses, _layerwise, _maps, _projection)):
    CALLS[f"{_backend}{_shared.__name__}"] = functools.partial(_shared, _backend)


@call
def torch_loss_against_given_targets() -> None:
    students = layers(1, (6, 2, 16), grad=True)
    shape = (B, N, 5)
    full = AttentionMapTarget(
        torch.empty(shape, dtype=torch.float16, device="cuda"),
        torch.empty(shape[:2], dtype=torch.int16, device="cuda"),
        torch.empty(shape, dtype=torch.int32, device="cuda"),
        torch.empty(shape[:2], device="cuda"),
    )
    inside = AttentionMapTarget(
        torch.empty(B, 18, 6, dtype=torch.float16, device="cuda"),
        torch.empty(B, 18, dtype=torch.int16, device="cuda"),
    )
    for target, loss in itertools.product((full, inside), LOSSES):
        value = functional.layerwise_attention_map_target_loss(
            students, [target], layout("padded"), loss=loss
        )
        value.backward()
    check_grads(students[0])


class Net(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.first = torch.nn.Linear(5, 7, device="cuda", dtype=dtype)
        self.second = torch.nn.Linear(7, 3, device="cuda", dtype=dtype)

    def losses(self):
        x = torch.empty(6, 5, device="cuda", dtype=self.first.weight.dtype)
        hidden = self.first(x).tanh()
        return {
            "ce": self.second(hidden).square().mean(),
            "perception": (1.5 - hidden).square().mean(),
            "planning": (0.3 - hidden).abs().mean(),
        }


def project(weights=None, *, dtype=torch.float32, scaler=None, steps=2, **settings) -> None:
    net = Net(dtype)
    projector = drivekd.GradientProjector(net.parameters(), **settings)
    for _ in range(steps):
        report = projector.backward(net.losses(), weights=weights, scaler=scaler)
        if settings.get("every") == "step":
            report = projector.step()
        assert report.cosines.device.type == "cuda"
    check_grads(net.parameters())


@call
def projector_with_every_method() -> None:
    for method, missing in itertools.product(METHODS, ("zero", "official")):
        project(method=method, missing=missing)
        project({"ce": 1.0, "perception": 0.2, "planning": torch.ones((), device="cuda")},
                method=method, missing=missing)  # fmt: skip


@call
def projector_per_step_with_a_bound_and_16_bit_gradients() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        project(dtype=dtype, every="step", max_norm=1.0)


@call
def projector_with_a_gradient_scaler() -> None:
    project(scaler=Scaler())


class Scaler:
    """What the projector needs of a GradScaler, whose own constructor looks for a GPU."""

    def scale(self, values):
        return values * torch.full((), 65536.0, device=values.device)


@call
def reweighting_on_the_device() -> None:
    static = {"ce": 1.0, "perception": 0.5, "planning": 2.0}
    project(reweighting.BalancedWeights(0.1, max_weight=100.0))
    online = reweighting.OnlineWeights(static, alpha=0.5)
    # Its state is made on the host, and moves once.
    online._tensors = {
        name: torch.empty_like(own, device="cuda") for name, own in online._tensors.items()
    }
    project(online)


@call
def capture_and_loss_of_two_models() -> None:
    """Without a mask: of one, a value is read back (`capture_attention` says so)."""
    ids = torch.empty(B, N, dtype=torch.int64, device="cuda")
    student, teacher = (on_gpu(toy_models.qwen2(layers=n)) for n in (3, 4))
    loss = drivekd.AttentionMapLoss(
        student_layers=[0, 1], teacher_layers=[0, 2], region="full", loss="mse"
    )
    with sdpa_kernel(SDPBackend.MATH):  # the others ask the GPU what it is
        with torch.no_grad(), drivekd.capture_attention(teacher, [0, 2], stop_after_last=True) as t:
            teacher(input_ids=ids, use_cache=False)
        with drivekd.capture_attention(student, [0, 1]) as s:
            logits = student(input_ids=ids, use_cache=False).logits
    ce = logits.float().logsumexp(-1).mean()
    projector = drivekd.GradientProjector(student.parameters())
    projector.backward({"ce": ce, "perception": loss(s, t, layout("plain"))})
    check_grads(student.parameters())


def on_gpu(model):
    """The model with parameters and buffers on the fake GPU."""
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                made = torch.empty(own.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = torch.nn.Parameter(made, own.requires_grad)
        for name, own in module._buffers.items():
            if own is not None:
                module._buffers[name] = torch.empty_like(own, device="cuda")
    return model


@call
def what_a_training_step_makes_and_notes() -> None:
    net = Net(torch.float32)
    projector, metrics = drivekd.GradientProjector(net.parameters()), StepMetrics(threshold=0.005)
    for _ in range(2):
        metrics.add_report(projector.backward(net.losses()))
    config = SignalConfig(name="fold", teacher="t", kind="logits")
    signal = Signal(config, "t", {"a": 0.5, "b": 1.0}, None)
    assert _sample_weight(signal, ["a", "b", "c"], torch.device("cuda")).shape == (2,)
    loss = HiddenStateLoss(
        student_layers=[0, 1], teacher_layers=[0, 2], student_width=8, teacher_width=12
    )
    for map_ in loss.maps:
        map_.weight = torch.nn.Parameter(torch.empty_like(map_.weight, device="cuda"))
        if map_.bias is not None:
            map_.bias = torch.nn.Parameter(torch.empty_like(map_.bias, device="cuda"))
    states = [{n: torch.empty(B, N, D, device="cuda") for n in range(3)} for D in (8, 12)]
    weight = torch.ones(B, device="cuda")
    loss(*states, layout("padded").valid, weight).sum().backward()


# The harness itself: each of these must be refused.


@call
def refused_a_value_read_back() -> None:
    torch.ones((), device="cuda").item()


@call
def refused_a_branch_on_a_tensor() -> None:
    bool(torch.ones((), device="cuda") > 0)


@call
def refused_two_devices() -> None:
    torch.ones(3, device="cuda") + torch.ones(3)


@call
def refused_a_copy_of_a_list() -> None:
    torch.tensor([1.0, 2.0], device="cuda")


@call
def refused_a_copy_from_pageable_memory() -> None:
    torch.ones(3).to("cuda", non_blocking=True)


@call
def refused_a_copy_to_the_host() -> None:
    torch.ones(3, device="cuda").cpu()


@call
def refused_an_index_made_of_a_list() -> None:
    torch.ones(3, device="cuda")[[0, 1]]


@call
def refused_an_index_that_is_a_mask() -> None:
    x = torch.ones(3, device="cuda")
    x[x > 0] = torch.ones(3, device="cuda")


@call
def refused_a_backward_that_reads() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.item()

    Reads.apply(torch.ones((), device="cuda", requires_grad=True)).backward()


def main() -> None:
    """Run all calls and write what was wrong with each, or null; ends the process."""
    found = {}
    for name, function in CALLS.items():
        try:
            with as_on_a_gpu():
                function()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the engine's threads for this device do not end by themselves
