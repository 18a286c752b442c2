"""An attention function that returns its log-sum-exp saves the loss from computing it."""

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from drivekd.capture import capture_attention
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout
from tests.helpers.toy_models import image_inputs, internvl, qwen2, text_inputs
from tests.helpers.traces import traces

BOTH = AttentionMapLoss(student_layers=[0, 2], teacher_layers=[0, 2], region="full")


def flash_like(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention by hand that returns (output, log-sum-exp), -inf where a row sees nothing."""
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ keys.mT).float() * scaling
    count = query.shape[2]
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    if attention_mask is not None:
        seen = seen & attention_mask
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    output = scores.softmax(-1).nan_to_num(0.0).to(value.dtype) @ values
    return output.transpose(1, 2).contiguous(), lse.to(flash_like.dtype)


@pytest.fixture(autouse=True)
def flash():
    """In the place of sdpa, whose masks it takes."""
    original = AttentionInterface._global_mapping["sdpa"]
    flash_like.dtype = torch.float32
    AttentionInterface.register("sdpa", flash_like)
    yield
    AttentionInterface.register("sdpa", original)


def run(model, inputs, layers=(0, 2), **options):
    with capture_attention(model, layers, **options) as captured:
        model(**inputs, use_cache=False)
    return captured


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_lse_is_handed_to_the_loss_which_stays_the_same(padding, monkeypatch):
    student, teacher = internvl(seed=1), internvl(layers=5, seed=2).requires_grad_(False)
    inputs = image_inputs(padding=padding)
    tokens = TokenLayout.from_batch(inputs, student.config)
    own, targets = run(student, inputs), run(teacher, inputs)
    valid = inputs["attention_mask"].bool()
    for captured in (own, targets):
        for layer in (0, 2):
            record = captured[layer]
            assert record.lse.shape == record.query.shape[:3]
            assert not record.lse.requires_grad
            assert record.lse.transpose(1, 2)[valid].isfinite().all()
    given = []

    def noted(*args, **options):
        given.append((options["lse_student"], options["lse_teacher"]))
        return layerwise(*args, **options)

    import drivekd.losses as losses

    layerwise = losses.layerwise_attention_map_loss
    monkeypatch.setattr(losses, "layerwise_attention_map_loss", noted)
    results = []
    for forget in (False, True):
        if forget:
            for captured in (own, targets):
                for layer in (0, 2):
                    object.__setattr__(captured[layer], "lse", None)
        loss = BOTH(own, targets, tokens)
        weight = student.model.language_model.layers[2].self_attn.k_proj.weight
        results.append((loss, *torch.autograd.grad(loss, weight, retain_graph=True)))
    assert all(lse is not None for lses in given[0] for lse in lses)
    assert all(lse is None for lses in given[1] for lse in lses)
    for with_lse, without in zip(*results, strict=True):
        torch.testing.assert_close(with_lse, without, rtol=1e-4, atol=1e-9)


def test_checkpointing_keeps_the_first_record_and_its_lse():
    model = qwen2().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    captured = run(model, text_inputs())
    lse = captured[2].lse
    captured[2].query.sum().backward()
    assert captured[2].lse is lse is not None


def test_the_last_layer_of_a_stopped_forward_has_none():
    with torch.no_grad():
        captured = run(qwen2(), text_inputs(), stop_after_last=True)
    assert captured[0].lse is not None
    assert captured[2].lse is None


def test_a_rounded_lse_is_not_taken():
    flash_like.dtype = torch.bfloat16
    with torch.no_grad():
        assert run(qwen2().to(torch.bfloat16), text_inputs())[0].lse is None


def test_nor_is_one_under_autocast_where_the_loss_rounds_queries():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(qwen2(), text_inputs())[0].lse is None


def test_select_takes_the_lse_along_and_leaving_leaves_no_trace():
    model = qwen2()
    before = traces(model)
    with torch.no_grad():
        captured = run(model, text_inputs())
    assert torch.equal(captured.select([1])[2].lse, captured[2].lse[1:])
    assert traces(model) == before
