import pytest
import torch

from drivekd.errors import TokenMismatchError
from drivekd.train import logit_distillation_loss


def make_case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 7, 11, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = -100
    labels[1] = -100  # a sample without an answer is left out
    return student.requires_grad_(), teacher, labels


def by_hand(student, teacher, labels, temperature, weights):
    """Token by token, through probabilities."""
    samples = []
    for b in range(len(labels)):
        terms = []
        for i in range(labels.shape[1] - 1):
            if labels[b, i + 1] == -100:
                continue
            p = torch.softmax(teacher[b, i] / temperature, -1)
            q = torch.softmax(student[b, i] / temperature, -1)
            terms.append(temperature**2 * (p * (p / q).log()).sum())
        if terms:
            samples.append(weights[b] * sum(terms) / len(terms))
    return sum(samples) / len(samples)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_equal_the_definition(temperature, weighted):
    student, teacher, labels = make_case()
    weights = torch.tensor([0.5, 4.0, 2.0], dtype=torch.float64) if weighted else None
    loss = logit_distillation_loss(
        student, teacher, labels, temperature=temperature, sample_weight=weights
    )
    (gradient,) = torch.autograd.grad(1.7 * loss, student)
    twin = student.detach().clone().requires_grad_()
    factors = torch.ones(3, dtype=torch.float64) if weights is None else weights
    wanted = by_hand(twin, teacher, labels, temperature, factors)
    (wanted_gradient,) = torch.autograd.grad(1.7 * wanted, twin)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-15)


def test_low_precision_logits_give_a_float32_loss():
    student, teacher, labels = make_case(torch.bfloat16)
    loss = logit_distillation_loss(student, teacher, labels)
    loss.backward()
    wanted = by_hand(student.double(), teacher.double(), labels, 2.0, [1, 1, 1])
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=0)


def test_batch_without_labels_is_an_exact_zero():
    student, teacher, labels = make_case()
    loss = logit_distillation_loss(student, teacher, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_unusable_arguments_are_refused():
    student, teacher, labels = make_case()
    with pytest.raises(TokenMismatchError, match="has 11 entries and the teacher's 10"):
        logit_distillation_loss(student, teacher[..., :10], labels)
    with pytest.raises(ValueError, match=r"wanted \(B, N, V\) with one B and N"):
        logit_distillation_loss(student, teacher[:2], labels)
    with pytest.raises(ValueError, match="labels has shape"):
        logit_distillation_loss(student, teacher, labels[:, :5])
    with pytest.raises(ValueError, match="temperature is 0"):
        logit_distillation_loss(student, teacher, labels, temperature=0)
    with pytest.raises(ValueError, match="teacher_logits requires grad"):
        logit_distillation_loss(student, teacher.clone().requires_grad_(), labels)
