"""Logit distillation through Liger-Kernel's KL divergence."""

import importlib.util
import sys
import types

import pytest
import torch

from drivekd.errors import BackendUnavailableError
from drivekd.train import DistillConfig, SignalConfig, liger, logit_distillation_loss
from drivekd.train.signals import SignalPlan
from tests.helpers import toy_models

IS_INSTALLED = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not IS_INSTALLED, reason="needs liger-kernel, an optional package")


def make_case(rows=3, tokens=9, entries=321, device="cpu"):
    """A sample without answers, one with fewer than the others, a vocabulary off any tile size."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, tokens, entries)
    student, teacher = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(0, entries, (rows, tokens), generator=generator)
    labels[0] = -100
    labels[1, :4] = -100
    weights = torch.tensor([3.0, 0.25, 1.5])[:rows]
    case = [own.to(device) for own in (student, teacher, labels, weights)]
    return [case[0].requires_grad_(), *case[1:]]


def loss_and_gradient(case, implementation):
    student, teacher, labels, weights = case
    loss = logit_distillation_loss(
        student,
        teacher,
        labels,
        temperature=2.5,
        sample_weight=weights,
        implementation=implementation,
    )
    return loss.detach(), *torch.autograd.grad(0.7 * loss, student)


def check_parity(case):
    wanted, got = loss_and_gradient(case, "torch"), loss_and_gradient(case, "liger")
    for own, other in zip(got, wanted, strict=True):
        # Float32 sums over the vocabulary in another order.
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    assert wanted[1].abs().max() > 1e-3


class PlainKernel:
    """What Liger's function is documented to be."""

    calls = 0

    @classmethod
    def apply(cls, prediction, target, reduction, log_target):
        cls.calls += 1
        assert (reduction, log_target) == ("sum", True) and prediction.dtype == torch.float32
        return (target.exp() * (target - prediction)).sum()


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("liger_kernel.ops.kl_div")
    module.LigerKLDivLossFunction = PlainKernel
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger, "is_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(PlainKernel, "calls", 0)


def test_reduction_is_the_same(stand_in):
    """Mean over a sample's answer tokens, then over samples with any; weights; temperature."""
    check_parity(make_case())
    assert PlainKernel.calls == 2
    student, teacher, labels, _ = make_case()
    loss = logit_distillation_loss(
        student, teacher, torch.full_like(labels, -100), implementation="liger"
    )
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, student)[0].count_nonzero() == 0


def test_auto_is_torch_off_the_gpu(stand_in):
    loss_and_gradient(make_case(), "auto")
    assert PlainKernel.calls == 0


@needs_liger
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_kernels_agree_in_the_interpreter(monkeypatch):
    if sys.modules.get("triton") is not None and not _interprets():
        pytest.skip("needs TRITON_INTERPRET=1 from the start")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from liger_kernel.ops import kl_div

    class Number(float):
        """The interpreter hands numbers over as they are; compiled, they have a dtype."""

        def to(self, dtype):
            return self

    forward = kl_div.kldiv_forward_triton
    monkeypatch.setattr(
        kl_div,
        "kldiv_forward_triton",
        lambda *args, eps, **settings: forward(*args, eps=Number(eps), **settings),
    )
    check_parity(make_case())
    check_parity(make_case(rows=2, tokens=5, entries=37))


def _interprets():
    from triton import knobs

    return bool(knobs.runtime.interpret)


@pytest.mark.gpu
@pytest.mark.optional_package
@needs_liger
def test_kernels_agree_on_a_gpu():
    check_parity(make_case(device="cuda"))
    assert liger.uses_liger("auto", torch.zeros(1, device="cuda"))


def test_liger_by_name_runs_or_says_why_not(monkeypatch):
    case = make_case()
    monkeypatch.setattr(liger, "is_installed", lambda: False)
    with pytest.raises(BackendUnavailableError, match="not installed; pip install liger-kernel"):
        loss_and_gradient(case, "liger")
    signal = SignalConfig(name="words", teacher="t", kind="logits", implementation="liger")
    model = toy_models.qwen2(layers=1)
    with pytest.raises(BackendUnavailableError, match="not installed"):
        SignalPlan(DistillConfig(signals=[signal]), model, {"t": model}, ["words"])
    monkeypatch.setattr(liger, "is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="run on GPUs, but the logits are on cpu"):
        loss_and_gradient(case, "liger")
    with pytest.raises(BackendUnavailableError, match="the logits are float64"):
        liger.uses_liger("liger", case[0].double())


def test_setting_belongs_to_logits():
    with pytest.raises(ValueError, match="implementation belongs to kind 'logits'"):
        SignalConfig(
            name="a",
            teacher="t",
            student_layers=0,
            teacher_layers=0,
            region="full",
            implementation="liger",
        )
    with pytest.raises(ValueError, match=r"implementation is 'ligre'.*did you mean 'liger'"):
        SignalConfig(name="a", teacher="t", kind="logits", implementation="ligre")
