"""Capture in the whole flash path of transformers: its unpadding, its packing, its windows.

The package needs a GPU; its two functions are stood in for, transformers' own code is not
(tests/helpers/flash.py).
"""

import functools
import inspect

import pytest
import torch
import transformers
from transformers import modeling_flash_attention_utils as utils

from drivekd.capture import capture_attention
from drivekd.errors import CaptureError
from drivekd.losses import AttentionMapLoss
from drivekd.study.eager import eager_loss
from drivekd.tokens import TokenLayout
from tests.helpers.flash import flash_attention
from tests.helpers.maps import (
    assert_gradients_equal,
    assert_maps_equal,
    eager_attentions,
    gradients,
    head_mean_map,
    scores,
)
from tests.helpers.toy_models import FAMILIES, layout_of, qwen2, text_inputs
from tests.helpers.traces import run, traces

FLASH = "flash_attention_2"


@pytest.fixture(autouse=True)
def flash():
    with flash_attention() as package:
        yield package


def with_flash(model):
    model.set_attn_implementation(FLASH)
    return model


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_and_log_sum_exp_are_those_of_eager_attention(family, padding, flash):
    model, inputs = FAMILIES[family].model(), FAMILIES[family].inputs(padding=padding)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        reference = eager_attentions(model, inputs)
        captured = run(with_flash(model), inputs, range(4))
    assert [name for name, _ in flash.calls[-4:]] == ["varlen" if padding else "fixed"] * 4
    assert_maps_equal(captured, reference.attentions, valid)
    for layer in range(4):
        expected = scores(captured[layer], valid).logsumexp(-1).transpose(1, 2)[valid]
        lse = captured[layer].lse.transpose(1, 2)
        assert lse.dtype == torch.float32 and lse.isfinite().all()
        torch.testing.assert_close(lse[valid].double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_eager_attention(family):
    """With the log-sum-exp that flash attention handed over, also under checkpointing."""
    make = FAMILIES[family]
    inputs = make.inputs(padding="left")
    tokens = layout_of(inputs)
    settings = AttentionMapLoss(student_layers=[0, 2], teacher_layers=[1, 3], region="full")
    teacher = make.model(layers=5, seed=5).requires_grad_(False)
    student, twin = make.model(layers=4, seed=1), make.model(layers=4, seed=1)
    for model in (twin, teacher):
        model.set_attn_implementation("eager")
    expected = eager_loss(twin, teacher, inputs, tokens, settings)
    gradients_expected = gradients(twin, expected)
    targets = run(with_flash(teacher), inputs, [1, 3])
    for checkpointing in (False, True):
        if checkpointing:
            student.train().gradient_checkpointing_enable({"use_reentrant": False})
        with capture_attention(with_flash(student), [0, 2]) as own:
            student(**inputs, use_cache=False)
        assert all(each.lse is not None for each in (own[0], own[2], targets[1], targets[3]))
        loss = settings(own, targets, tokens)
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
        assert_gradients_equal(gradients(student, loss), gradients_expected)


@pytest.mark.parametrize("padding", [None, "right"])
def test_sliding_windows(padding, flash):
    model = qwen2(sliding_window=5, first_sliding_layer=2)
    inputs = text_inputs(padding=padding)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        reference = eager_attentions(model, inputs)
        captured = run(with_flash(model), inputs, range(4))
    assert [call["window_size"] for _, call in flash.calls] == [(-1, -1)] * 2 + [(4, 4)] * 2
    assert [captured[layer].window for layer in range(4)] == [None, None, 5, 5]
    assert_maps_equal(captured, reference.attentions, valid)
    expected = scores(captured[3], valid).logsumexp(-1).transpose(1, 2)[valid]
    torch.testing.assert_close(
        captured[3].lse.transpose(1, 2)[valid].double(), expected, rtol=1e-6, atol=2e-6
    )


def test_the_wide_head_of_a_small_hidden_size_and_odd_groups():
    model = FAMILIES["qwen3"].model(heads=6, kv_heads=2)
    inputs = text_inputs(padding="left")
    with torch.no_grad():
        reference = eager_attentions(model, inputs)
        captured = run(with_flash(model), inputs, [1])
    assert_maps_equal(captured, reference.attentions, inputs["attention_mask"].bool())


# --- packed rows ---------------------------------------------------------------------------------

LENGTHS = [9, 15]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def packed(**more):
    return {"input_ids": text_inputs(batch=1)["input_ids"], "position_ids": POSITIONS} | more


def lengths():
    ends = torch.tensor([0, 9, 24], dtype=torch.int32)
    kinds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    return kinds | {"max_length_q": 15, "max_length_k": 15}


@pytest.mark.parametrize("told", [{}, lengths()], ids=["positions", "lengths"])
def test_packed_rows_give_their_sequences_one_by_one(told, flash):
    """Through positions, and through what transformers' flattening collator adds."""
    model, inputs = with_flash(qwen2()), packed(**told)
    tokens = TokenLayout.from_masks(
        torch.zeros(1, 24, dtype=torch.bool), segment_ids=(torch.arange(24) >= 9)[None].long()
    )
    captured = run(model, inputs, [0, 3])
    assert flash.calls[-1][1]["cuts"] == [0, 9, 24]
    maps = head_mean_map(captured[3], tokens.valid, tokens.segment_ids)
    expected = scores(captured[3], tokens.valid, tokens.segment_ids).logsumexp(-1)
    torch.testing.assert_close(captured[3].lse.double(), expected, rtol=1e-6, atol=2e-6)
    for part in (slice(0, 9), slice(9, 24)):
        alone = run(model, {"input_ids": inputs["input_ids"][:, part]}, [3])
        expected = head_mean_map(alone[3], tokens.valid[:, part])
        torch.testing.assert_close(maps[:, part, part], expected, atol=1e-6, rtol=0)


def test_layout_of_flattened_rows_comes_from_their_lengths():
    config = FAMILIES["internvl"].model(layers=1).config
    for batch in (packed(), packed(**lengths()), {**lengths(), "input_ids": packed()["input_ids"]}):
        tokens = TokenLayout.from_batch(batch, config)
        assert tokens.segment_ids.tolist() == [[0] * 9 + [1] * 15]
    with pytest.raises(NotImplementedError, match="with 2 rows; it tells the sequences of one row"):
        TokenLayout.from_batch({**lengths(), "input_ids": text_inputs()["input_ids"]}, config)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is \[0, 9, 23\]; wanted 0"):
        short = {"cu_seq_lens_q": torch.tensor([0, 9, 23])}
        TokenLayout.from_batch(packed(**short), config)


def refuses(model, inputs, match):
    before = traces(model)
    with pytest.raises(CaptureError, match=match), capture_attention(model, [0]):
        model(**inputs, use_cache=False)
    assert traces(model) == before


def test_packing_in_a_batch_of_several_rows_is_refused():
    """Flash attention then attends across sequences without a word; sdpa does not."""
    inputs = text_inputs() | {"position_ids": POSITIONS.expand(2, 24)}
    inputs.pop("attention_mask")
    refuses(with_flash(qwen2()), inputs, "one row only.*give one packed row a batch, or use model")
    run(qwen2(), inputs)


def test_packing_beside_padding_is_refused():
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[:, -3:] = 0
    refuses(with_flash(qwen2()), packed(attention_mask=mask), "with attention_mask transformers")


def test_positions_that_jump_without_a_restart_are_refused_by_flash_alone():
    """Flash attention cuts a row where positions are lowest, the layout where they jump."""
    positions = torch.cat([torch.arange(9), torch.arange(11, 26)])[None]
    inputs = packed() | {"position_ids": positions}
    refuses(with_flash(qwen2()), inputs, "in the form that they have.*start each sequence at 0")
    run(qwen2(), inputs)


@pytest.mark.parametrize("implementation", [FLASH, "sdpa", "eager"])
def test_packed_positions_without_a_row_for_text_are_refused(implementation):
    """Qwen2.5-VL takes (B, N) positions for rotary ones and sees no packing; Qwen3-VL does."""
    model = FAMILIES["qwen2_5_vl"].model(layers=1)
    model.set_attn_implementation(implementation)
    refuses(model, packed(), r"form that they have.*\(4, B, N\) with the text's in the first row")
    model = FAMILIES["qwen3_vl"].model(layers=1)
    model.set_attn_implementation(implementation)
    run(model, packed())


@pytest.mark.parametrize("implementation", [FLASH, "sdpa"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_rotary_positions_alone_are_refused(family, implementation):
    """(3, B, N): what a data set computes for each record, joined; the model sees one sequence."""
    make = FAMILIES[family]
    model, inputs = make.model(layers=1), make.inputs(batch=1)
    model.set_attn_implementation(implementation)
    first, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    run(model, inputs | {"position_ids": first, "attention_mask": None})
    both = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((1, 5), 9)], 1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5)),
        "position_ids": torch.cat([first, torch.arange(5).expand(3, 1, 5)], -1),
    }
    inputs.pop("attention_mask")
    refuses(model, inputs | both, r"\(4, B, N\) with the text's in the first row")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_lengths_that_only_flash_attention_reads_are_refused_elsewhere(implementation):
    model, inputs = qwen2(), packed(**lengths())
    model.set_attn_implementation(implementation)
    run(model, inputs)  # positions say the same
    inputs.pop("position_ids")
    refuses(model, inputs, "cu_seq_lens_q pack several sequences")
    run(with_flash(model), inputs)


# --- the log-sum-exp -----------------------------------------------------------------------------


def always(function):
    """As version 3 was and version 4 is: a pair, whoever asks."""

    @functools.wraps(function)
    def call(q, k, v, *args, **options):
        assert not options.pop("return_attn_probs", False)
        return function(q, k, v, *args, return_attn_probs=True, **options)[:2]

    call.__signature__ = signature_without(function, "return_attn_probs")
    return call


def never(function):
    @functools.wraps(function)
    def call(q, k, v, *args, **options):
        return function(q, k, v, *args, **options)

    call.__signature__ = signature_without(function, "return_attn_probs")
    return call


def signature_without(function, name):
    signature = inspect.signature(function)
    return signature.replace(
        parameters=[p for p in signature.parameters.values() if p.name != name]
    )


@pytest.mark.parametrize(("kind", "is_there"), [(always, True), (never, False)])
@pytest.mark.parametrize("padding", [None, "left"])
def test_other_versions_of_the_package(kind, is_there, padding, monkeypatch):
    import flash_attn

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(flash_attn, name, kind(getattr(flash_attn, name)))
    captured = run(with_flash(qwen2()), text_inputs(padding=padding))
    assert (captured[0].lse is not None) == is_there


def test_only_recorded_calls_are_asked(flash):
    """Asking is free without dropout only; other layers, other models and vision are left alone."""
    model, other = with_flash(FAMILIES["internvl"].model()), with_flash(qwen2())
    with torch.no_grad(), capture_attention(model, [1]) as captured:
        model(**FAMILIES["internvl"].inputs(), use_cache=False)
        other(**text_inputs(), use_cache=False)
    asked = [call["asked"] for _, call in flash.calls]
    assert asked == [False] * 2 + [False, True, False, False] + [False] * 4
    assert captured[1].lse is not None
    for layer in other.model.layers:
        layer.self_attn.attention_dropout = 0.1
    flash.calls.clear()
    with torch.no_grad(), capture_attention(other.train(), [0]) as captured:
        other(**text_inputs(), use_cache=False)
    assert captured[0].lse is None
    assert not any(call["asked"] for _, call in flash.calls)


def test_none_where_queries_are_rounded_on_the_way():
    """Float32 queries reach the package in 16 bits; the loss computes with what was captured."""
    model = with_flash(qwen2())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        captured = run(model, text_inputs())
    assert captured[0].query.dtype == torch.float32
    assert captured[0].lse is None
    assert run(model.bfloat16(), text_inputs())[0].lse.dtype == torch.float32


def test_leaving_leaves_no_trace(flash):
    model, other = with_flash(qwen2()), with_flash(qwen2(seed=1))
    before, imports = traces(model, other), utils.lazy_import_flash_attention
    outer, inner = capture_attention(model, [0]), capture_attention(other, [0])
    with torch.no_grad():
        outer.__enter__()
        with inner:
            assert utils.lazy_import_flash_attention is not imports
            other(**text_inputs())
            model(**text_inputs())
        model(**text_inputs())
        outer.__exit__(None, None, None)
    assert utils.lazy_import_flash_attention is imports
    assert traces(model, other) == before
    assert outer[0].lse is not None and inner[0].lse is not None
    with pytest.raises(ZeroDivisionError), capture_attention(model, [0]):
        raise ZeroDivisionError
    assert utils.lazy_import_flash_attention is imports


def test_stopping():
    model, inputs = with_flash(qwen2()), text_inputs(padding="left")
    whole = run(model, inputs, [0, 2])
    with torch.no_grad(), capture_attention(model, [0, 2], stop_after_last=True) as captured:
        assert model(**inputs, use_cache=False) is None
    for layer in (0, 2):
        assert torch.equal(captured[layer].query, whole[layer].query)
    assert torch.equal(captured[0].lse, whole[0].lse)
    assert captured[2].lse is None


def test_attention_sinks_are_refused(monkeypatch):
    config = transformers.GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2,
        num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    monkeypatch.setattr(
        transformers.GptOssPreTrainedModel, "_compatible_flash_implementations", None
    )
    model = with_flash(transformers.GptOssForCausalLM(config))
    with (
        pytest.raises(NotImplementedError, match=r"attention sinks \(s_aux\)"),
        capture_attention(model, [0]),
    ):
        model(**text_inputs())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
def test_compiled_layers():
    torch._dynamo.reset()
    model, inputs = with_flash(qwen2(layers=2)), text_inputs()
    whole = run(model, inputs, [0, 1])
    for layer in model.model.layers:
        layer.compile(backend="eager")
    captured = run(model, inputs, [0, 1])
    torch._dynamo.reset()
    for layer in (0, 1):
        torch.testing.assert_close(captured[layer].query, whole[layer].query, rtol=1e-5, atol=1e-6)
