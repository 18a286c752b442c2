"""InternVL's remote code: a container that transformers does not know, around its Qwen2."""

import pytest
import torch

from drivekd.capture import capture_attention
from drivekd.capture.model import find_decoder
from drivekd.data import Collator
from drivekd.losses import AttentionMapLoss
from drivekd.study.verify import AGREES, verify
from drivekd.tokens import TokenLayout
from drivekd.train import truncate_teacher
from tests.helpers.maps import assert_maps_equal, gradients
from tests.helpers.modes import assert_like_eager, captured_loss
from tests.helpers.remote_code import TILE, InternVLChat, chat_inputs
from tests.helpers.toy_models import IMAGE, IMAGE_TOKENS, qwen2
from tests.helpers.traces import traces

PLANNING = AttentionMapLoss(student_layers=[2], teacher_layers=[3], region="text_to_vision")


@pytest.fixture
def pair():
    return InternVLChat(layers=4, seed=1), InternVLChat(layers=5, seed=2).requires_grad_(False)


def test_the_decoder_is_the_language_models_and_the_vision_tower_is_not_touched():
    """Its tower has layers and attention too."""
    model = InternVLChat(layers=4)
    assert find_decoder(model) is model.language_model.model
    with torch.no_grad(), capture_attention(model, [0, -1]) as captured:
        tapped = [n for n, m in model.named_modules() if "_drivekd_tap" in m.__dict__]
        model(**chat_inputs())
    assert tapped == [f"language_model.model.layers.{layer}.self_attn" for layer in (0, 3)]
    assert captured[0].query.shape == (2, 4, 24, 16)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_maps_are_those_of_its_language_model(implementation, padding):
    model, inputs = InternVLChat(layers=4, seed=1), chat_inputs(padding=padding)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        model.language_model.set_attn_implementation("eager")
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
        model.language_model.set_attn_implementation(implementation)
        before = traces(model)
        for stop in (False, True):
            with capture_attention(model, [0, -2], stop_after_last=stop) as captured:
                output = model(**inputs, use_cache=False)
            assert (output is None) == stop
            assert_maps_equal(captured, attentions, valid)
            assert captured.input_ids is inputs["input_ids"]
        assert traces(model) == before


@pytest.mark.parametrize("select_layer", [-1, -2])
def test_dynamic_tiles_train_projector_and_vision_tower(select_layer):
    """Three tiles in one row, one in the other; a layer of the tower that is not the last."""
    student = InternVLChat(layers=4, seed=1, select_layer=select_layer)
    teacher = InternVLChat(layers=5, seed=2).requires_grad_(False)
    inputs = chat_inputs(padding="left")
    ids = inputs["input_ids"]
    ids[0] = torch.where(ids[0] == IMAGE, 7, ids[0])
    ids[0, 4 : 4 + 3 * IMAGE_TOKENS] = IMAGE
    generator = torch.Generator().manual_seed(1)
    inputs["pixel_values"] = torch.randn(4, 3, TILE, TILE, generator=generator)
    inputs["image_flags"] = torch.ones(4, 1, dtype=torch.int64)
    tokens = TokenLayout.from_batch(inputs, student)
    assert tokens.is_vision.sum(1).tolist() == [12, 4]
    assert_like_eager(student, teacher, inputs, tokens, PLANNING)
    found = gradients(student, captured_loss(student, teacher, inputs, tokens, PLANNING))
    assert {"mlp1.1.weight", "vision_model.embeddings.patch_embedding.weight"} <= found.keys()
    assert any(n.startswith("vision_model.encoder.layers.1.") for n in found) == (
        select_layer == -1
    )


def test_a_batch_without_image_has_a_stand_in_tile_and_teaches_nothing_about_images(pair):
    """The remote code always wants pixels; a flag of 0 says that they are nobody's."""
    student, teacher = pair
    inputs = chat_inputs()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 7)
    inputs["image_flags"].zero_()
    tokens = TokenLayout.from_batch(inputs, student)
    assert not tokens.is_vision.any()
    loss = captured_loss(student, teacher, inputs, tokens, PLANNING)
    assert loss.item() == 0.0
    found = gradients(student, loss + student(**inputs).logits.square().mean())
    assert all(bool(grad.isfinite().all()) for grad in found.values())


def test_lora_inside_of_the_container(pair):
    """The remote code wraps its language model, not itself."""
    from peft import LoraConfig, get_peft_model

    student, teacher = pair
    config = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False
    )
    student.language_model = get_peft_model(student.language_model, config)
    inputs = chat_inputs(padding="right")
    tokens = TokenLayout.from_batch(inputs, student)
    assert_like_eager(student, teacher, inputs, tokens, PLANNING, more_than=15)


def test_checkpointing_and_cross_entropy_and_then_answers(pair):
    student, teacher = pair
    inputs = chat_inputs(padding="left")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    tokens = TokenLayout.from_batch(inputs, student)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            student.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            student.train()
        loss = captured_loss(student, teacher, inputs, tokens, PLANNING)
        with capture_attention(student, [1]) as captured:
            output = student(**inputs, labels=labels)
        results.append(gradients(student, output.loss + loss + captured[1].query.square().mean()))
    for name, grad in results[0].items():
        assert torch.equal(results[1][name], grad), name
    prompt = {"pixel_values": inputs["pixel_values"], "input_ids": inputs["input_ids"]}
    assert student.eval().generate(**prompt, max_new_tokens=3, do_sample=False).shape[0] == 2


@pytest.mark.filterwarnings("ignore:.*does not support setting its attention implementation.*")
def test_verify_and_a_truncated_teacher(pair):
    student, teacher = pair
    inputs = chat_inputs(padding="left")
    tokens = TokenLayout.from_batch(inputs, student)
    truncate_teacher(teacher, "penultimate")
    checks = verify(student, teacher, inputs, tokens=tokens, repeats=1)
    assert [check.verdict for check in checks] == [AGREES] * 3
    assert student.language_model.config._attn_implementation == "sdpa"


class Plain(torch.nn.Module):
    """No transformers model itself: only its language model can change its attention."""

    def __init__(self, **options):
        super().__init__()
        self.inner = qwen2(**options)

    def forward(self, input_ids, **options):
        embeds = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=embeds, **options)


def test_verify_of_a_plain_module_around_a_language_model():
    ids = chat_inputs()["input_ids"]
    tokens = TokenLayout.from_masks(ids == IMAGE)
    student, teacher = (Plain(layers=n, seed=n) for n in (3, 5))
    checks = verify(student, teacher, {"input_ids": ids}, tokens=tokens, repeats=1)
    assert [check.verdict for check in checks] == [AGREES] * 3


def test_the_layout_is_that_of_the_models_image_token():
    """Which neither its config nor, before somebody sets it, the model knows."""
    model, inputs = InternVLChat(layers=1), chat_inputs()
    tokens = TokenLayout.from_batch(inputs, model)
    assert torch.equal(tokens.is_vision, inputs["input_ids"] == IMAGE)
    setting = r"model\.img_context_token_id = tokenizer\.convert_tokens_to_ids\('<IMG_CONTEXT>'\)"
    with pytest.raises(ValueError, match=rf"the model itself as config, after {setting}"):
        TokenLayout.from_batch(inputs, model.config)
    model.img_context_token_id = None
    with pytest.raises(ValueError, match=rf"\(InternVLChat\) is not set: {setting}"):
        TokenLayout.from_batch(inputs, model)


def test_a_collator_does_not_take_its_config_for_one_of_text_alone():
    """Then every token would be text, and signals on images would silently be 0."""
    feature = {"input_ids": torch.arange(6), "labels": torch.arange(6)}
    collator = Collator(lambda record: feature, InternVLChat(layers=1).config, pad_token_id=0)
    with pytest.raises(ValueError, match="remote code and does not know its image token"):
        collator._layout({"input_ids": torch.arange(6)[None]})
