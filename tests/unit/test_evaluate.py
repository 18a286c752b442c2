"""Greedy answering of records: order, padding, blank images, modes, refusals."""

import time
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from drivekd.errors import DataError
from drivekd.study import evaluate
from drivekd.study.evaluate import generate_answers

WORDS = ["<pad>", "<end>", "<image>", *(f"w{i}" for i in range(61))]
IMAGE, FIRST_WORD = 2, 3


@dataclass(frozen=True)
class Question:
    """As much of a Record as the function reads."""

    id: str
    length: int
    seed: int
    images: int = 1
    messages: tuple = ()


class Encoder:
    """Random prompts with images, as an encoder of records gives them."""

    def __init__(self):
        self.calls = 0

    def encode_prompt(self, record):
        self.calls += 1
        g = torch.Generator().manual_seed(record.seed)
        words = torch.randint(FIRST_WORD, len(WORDS), (record.length,), generator=g)
        ids = torch.cat([torch.full((4 * record.images,), IMAGE), words])
        prompt = {"input_ids": ids}
        if record.images:
            prompt["pixel_values"] = torch.randn(record.images, 3, 28, 28, generator=g)
        return prompt


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": (28, 28),
            "patch_size": (14, 14),
            "initializer_range": 0.3,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=1.0,
    )
    return InternVLForConditionalGeneration(config)


def make_questions(count, *, images=1):
    return [Question(f"q{i}", 3 + (5 * i) % 7, seed=i, images=images) for i in range(count)]


def greedy_by_hand(model, tokenizer, prompt, steps):
    """One prompt, no cache, no padding, argmax after argmax."""
    ids = prompt["input_ids"][None]
    images = {k: v for k, v in prompt.items() if k != "input_ids"}
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=ids, **images, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_equal_unpadded_greedy_decoding_in_the_order_of_the_records(
    model, tokenizer, batch_size
):
    questions, encoder = make_questions(9), Encoder()
    model.eval()
    want = [greedy_by_hand(model, tokenizer, encoder.encode_prompt(q), 5) for q in questions]
    got = generate_answers(
        model, encoder, tokenizer, questions, batch_size=batch_size, max_new_tokens=5
    )
    assert got == want
    assert len(set(want)) > 5  # else the order could not be seen


def test_windows_of_records_are_joined_in_order(model, tokenizer, monkeypatch):
    questions = make_questions(11)
    whole = generate_answers(
        model, Encoder(), tokenizer, questions, batch_size=16, max_new_tokens=3
    )
    monkeypatch.setattr(evaluate, "WINDOW_BATCHES", 2)
    encoder = Encoder()
    cut = generate_answers(model, encoder, tokenizer, questions, batch_size=2, max_new_tokens=3)
    assert cut == whole
    assert encoder.calls == len(questions)


def test_records_with_and_without_images_and_with_several_share_a_call(model, tokenizer):
    questions = [Question(f"q{i}", 4 + i % 3, seed=i, images=(0, 1, 2)[i % 3]) for i in range(9)]
    encoder = Encoder()
    model.eval()
    want = [greedy_by_hand(model, tokenizer, encoder.encode_prompt(q), 4) for q in questions]
    got = generate_answers(model, encoder, tokenizer, questions, batch_size=4, max_new_tokens=4)
    assert got == want


def test_blank_images_make_the_answer_independent_of_the_pixels(model, tokenizer):
    class SameWords(Encoder):
        def encode_prompt(self, record):
            prompt = super().encode_prompt(record)
            prompt["input_ids"] = torch.tensor([IMAGE] * 4 + [7, 8, 9])
            return prompt

    def answer(*, blank_images):
        return generate_answers(
            model,
            SameWords(),
            tokenizer,
            make_questions(6),
            batch_size=3,
            max_new_tokens=4,
            blank_images=blank_images,
        )

    assert len(set(answer(blank_images=True))) == 1
    assert len(set(answer(blank_images=False))) > 1


def test_blank_images_refuse_a_record_without_images(model, tokenizer):
    with pytest.raises(DataError, match=r"q0.*pixel_values"):
        generate_answers(
            model,
            Encoder(),
            tokenizer,
            make_questions(1, images=0),
            batch_size=1,
            max_new_tokens=1,
            blank_images=True,
        )


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_even_after_an_error(model, tokenizer, training):
    model.train(training)
    generate_answers(model, Encoder(), tokenizer, make_questions(2), batch_size=2, max_new_tokens=1)
    assert model.training is training
    with pytest.raises(DataError):
        generate_answers(
            model,
            Encoder(),
            tokenizer,
            make_questions(1, images=0),
            batch_size=2,
            max_new_tokens=1,
            blank_images=True,
        )
    assert model.training is training


def test_per_token_inputs_are_padded_on_the_left(model, tokenizer, monkeypatch):
    class TypedEncoder(Encoder):
        def encode_prompt(self, record):
            prompt = super().encode_prompt(record)
            prompt["token_type_ids"] = (prompt["input_ids"] == IMAGE).long()
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            return prompt

    seen = {}

    def generate(**inputs):
        seen.update(inputs)
        return torch.cat([inputs["input_ids"], torch.tensor([[5], [6]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    questions = [Question("short", 2, seed=0), Question("long", 4, seed=1)]
    answers = generate_answers(
        model, TypedEncoder(), tokenizer, questions, batch_size=2, max_new_tokens=1
    )
    assert answers == ["w2", "w3"]
    assert seen["token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert seen["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]
    assert seen["input_ids"][0, :2].tolist() == [0, 0]
    assert seen["pixel_values"].shape == (2, 3, 28, 28)


def test_images_of_two_sizes_in_one_batch_name_the_input(model, tokenizer):
    class Sizes(Encoder):
        def encode_prompt(self, record):
            prompt = super().encode_prompt(record)
            prompt["pixel_values"] = torch.zeros(1, 3, 28, 28 + 14 * record.seed)
            return prompt

    with pytest.raises(ValueError, match="pixel_values"):
        generate_answers(
            model, Sizes(), tokenizer, make_questions(2), batch_size=2, max_new_tokens=1
        )


def test_stops_at_the_tokenizers_end_where_the_model_names_none(tokenizer):
    torch.manual_seed(0)
    text_model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        text_model.lm_head.weight.zero_()  # all logits equal: argmax is token 0
        text_model.lm_head.weight[tokenizer.eos_token_id] = 100.0
        text_model.model.norm.weight.fill_(1.0)
        text_model.model.embed_tokens.weight.fill_(1.0)  # every hidden state positive
    calls = []
    text_model.register_forward_hook(lambda *_: calls.append(1))
    question = Question("q", 3, seed=0, images=0)
    answers = generate_answers(
        text_model, Encoder(), tokenizer, [question], batch_size=1, max_new_tokens=9
    )
    assert answers == [""]
    assert len(calls) == 1


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("max_new_tokens", 0)])
def test_rejects_settings_below_one(model, tokenizer, name, value):
    settings = {"batch_size": 1, "max_new_tokens": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        generate_answers(model, Encoder(), tokenizer, [], **settings)


def test_rejects_a_tokenizer_without_padding(model, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="padding token"):
        generate_answers(model, Encoder(), bare, [], batch_size=1, max_new_tokens=1)


def test_no_records_no_answers(model, tokenizer):
    assert generate_answers(model, Encoder(), tokenizer, [], batch_size=2, max_new_tokens=1) == []


def test_large_batches_are_much_cheaper_than_one_record_at_a_time(model, tokenizer):
    questions = make_questions(64)

    def seconds(batch_size):
        start = time.process_time()
        generate_answers(
            model, Encoder(), tokenizer, questions, batch_size=batch_size, max_new_tokens=2
        )
        return time.process_time() - start

    seconds(64)  # warm up
    assert seconds(64) < 0.5 * seconds(1)
