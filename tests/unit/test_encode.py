import numpy as np
import pytest
import torch
from PIL import Image

from drivekd.data import Message, Record
from drivekd.data.encode import ProcessorEncoder, SingleTileEncoder
from drivekd.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Answers of earlier turns are dropped, as templates of reasoning models do with their thoughts.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['role'] == 'user' or loop.last else '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["user", "assistant", "system", "how", "many", "cars", "?", "three", "two", "is", "it"]
WORDS += ["safe", "no", "yes", "look"]
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<IMG>", "<img>", "</img>"]


def make_tokenizer(template=CHATML):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=template,
    )


def make_encoder(root, template=CHATML, **changes):
    settings = {
        "image_size": (28, 42),
        "image_seq_length": 6,
        "image_token": "<IMG>",
        "image_mean": (0.5, 0.25, 0.0),
        "image_std": (0.5, 1.0, 2.0),
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "root": root,
    }
    return SingleTileEncoder(make_tokenizer(template), **(settings | changes))


def make_record(*contents, images=("a.png",), roles=("user", "assistant"), **changes):
    turns = [Message(role, content) for role, content in zip(roles, contents, strict=True)]
    settings = {"question_type": "perception", "id": "q7"} | changes
    return Record(messages=tuple(turns), images=tuple(images), **settings)


@pytest.fixture
def root(tmp_path):
    for name, size in (("a.png", (42, 28)), ("b.png", (99, 31))):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
    return tmp_path


def words(encoder, ids):
    return encoder.tokenizer.convert_ids_to_tokens(ids.tolist())


def labelled(encoder, encoded):
    assert encoded["labels"].dtype == encoded["input_ids"].dtype == torch.int64
    kept = encoded["labels"] != -100
    torch.testing.assert_close(encoded["labels"][kept], encoded["input_ids"][kept])
    return words(encoder, encoded["labels"][kept])


def test_image_expands_to_start_image_and_end_tokens(root):
    encoder = make_encoder(root)
    encoded = encoder(make_record("<image> how many cars ?", "three"))
    image = ["<img>", *["<IMG>"] * 6, "</img>"]
    assert words(encoder, encoded["input_ids"]) == [
        "<|im_start|>",
        "user",
        *image,
        *["how", "many", "cars", "?", "<|im_end|>", "<|im_start|>", "assistant"],
        *["three", "<|im_end|>"],
    ]


def test_image_expands_without_start_and_end_tokens(root):
    encoder = make_encoder(root, start_image_token=None, end_image_token=None)
    encoded = encoder(make_record("<image> look", "three"))
    assert words(encoder, encoded["input_ids"])[2:9] == ["<IMG>"] * 6 + ["look"]


def test_labels_hold_the_answer_and_its_end_token_only(root):
    encoder = make_encoder(root)
    encoded = encoder(make_record("<image> how many cars ?", "three cars"))
    assert labelled(encoder, encoded) == ["three", "cars", "<|im_end|>"]
    assert encoded["labels"][-1] != -100  # the template's line end after the answer is cut


def test_labels_hold_every_answer_of_several_turns(root):
    encoder = make_encoder(root)
    record = make_record(
        *["look", "<image> how many ?", "two", "is it safe ? <image>", "no"],
        roles=("system", "user", "assistant", "user", "assistant"),
        images=("a.png", "b.png"),
    )
    encoded = encoder(record)
    assert labelled(encoder, encoded) == ["two", "<|im_end|>", "no", "<|im_end|>"]
    assert encoded["pixel_values"].shape == (2, 3, 28, 42)


@pytest.mark.parametrize("turns", [1, 2])
def test_prompt_has_the_ids_of_the_training_prompt(root, turns):
    encoder = make_encoder(root)
    contents = ["<image> how many ?", "two", "is it safe ?", "no"][: 2 * turns]
    record = make_record(*contents, roles=("user", "assistant") * turns)
    encoded, prompt = encoder(record), encoder.encode_prompt(record)
    answer = 2  # one word and its end token
    assert set(prompt) == {"input_ids", "pixel_values"}
    torch.testing.assert_close(prompt["input_ids"], encoded["input_ids"][:-answer])
    torch.testing.assert_close(prompt["pixel_values"], encoded["pixel_values"])


def test_prompt_needs_no_answer(root):
    encoder = make_encoder(root)
    open_record = make_record("<image> look", roles=("user",))
    whole = encoder.encode_prompt(make_record("<image> look", "yes"))
    assert encoder.encode_prompt(open_record)["input_ids"].tolist() == whole["input_ids"].tolist()
    with pytest.raises(DataError, match=r"'q7'.*last message is by 'user'"):
        encoder(open_record)


def test_image_of_the_right_size_is_normalised_and_not_resampled(root):
    pixels = make_encoder(root)(make_record("<image> look", "yes"))["pixel_values"]
    raw = np.asarray(Image.open(root / "a.png"), dtype=np.float64).transpose(2, 0, 1) / 255
    mean, std = np.array([0.5, 0.25, 0.0]), np.array([0.5, 1.0, 2.0])
    wanted = (raw - mean[:, None, None]) / std[:, None, None]
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[0].numpy(), wanted, atol=1e-6)


def test_image_of_another_size_is_resized_bicubically(root):
    encoder = make_encoder(root, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    pixels = encoder(make_record("<image> look", "yes", images=["b.png"]))["pixel_values"]
    resized = Image.open(root / "b.png").resize((42, 28), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(
        pixels[0].permute(1, 2, 0).numpy(), np.asarray(resized) / 255, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_eight_bit_modes_become_rgb(root, mode):
    Image.open(root / "a.png").convert(mode).save(root / "other.png")
    encoded = make_encoder(root)(make_record("<image> look", "yes", images=["other.png"]))
    assert encoded["pixel_values"].shape == (1, 3, 28, 42)


def test_text_only_record_has_no_pixels(root):
    encoder = make_encoder(root)
    encoded = encoder(make_record("is it safe ?", "no", images=()))
    assert set(encoded) == {"input_ids", "labels"}
    assert labelled(encoder, encoded) == ["no", "<|im_end|>"]


@pytest.mark.parametrize(
    ("contents", "images", "message"),
    [
        (("look", "yes"), ["a.png"], "0 <image> placeholders but 1 images"),
        (("<image> <image> look", "yes"), ["a.png"], "2 <image> placeholders but 1 images"),
        (("<image> look", "<image>"), ["a.png"], "<image> stands in an assistant message"),
        (("<image> look", "  "), ["a.png"], "assistant message is empty"),
        (("<image> <IMG> look", "yes"), ["a.png"], "reserved token '<IMG>'"),
        (("<image> look", "yes"), ["gone.png"], "gone.png does not exist"),
        (("<image> look", "yes"), ["text.png"], "text.png cannot be read"),
        (("<image> look", "yes"), ["cut.png"], "cut.png cannot be read"),
        (("<image> look", "yes"), ["."], "cannot be read"),
        (("<image> look", "yes"), ["deep.png"], "deep.png has mode 'I;16'"),
    ],
)
def test_unusable_record_is_named(root, contents, images, message):
    (root / "text.png").write_text("no image")
    whole = (root / "b.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(root / "deep.png")
    with pytest.raises(DataError, match=message) as caught:
        make_encoder(root)(make_record(*contents, images=images))
    assert "'q7'" in str(caught.value)


def test_record_without_id_is_named_by_its_question(root):
    with pytest.raises(DataError, match=r"without id .*'how many"):
        make_encoder(root)(make_record("how many ?", "two", id=""))


@pytest.mark.parametrize("roles", [("assistant", "user"), ("system", "assistant")])
def test_conversation_that_the_user_does_not_open_is_refused(root, roles):
    with pytest.raises(DataError, match="must be the user's"):
        make_encoder(root)(make_record("look", "two", images=(), roles=roles))


def test_template_that_rewrites_earlier_turns_is_refused(root):
    record = make_record(
        *["look", "two", "is it safe ?", "no"], images=(), roles=("user", "assistant") * 2
    )
    with pytest.raises(DataError, match="does not continue its own generation prompt"):
        make_encoder(root, FORGETFUL)(record)


STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def test_turns_that_a_template_refuses_are_an_error_of_their_record(root):
    roles = ("user", "user", "assistant")
    record = make_record("<image> look", "how many ?", "two", roles=roles)
    with pytest.raises(DataError, match=r"'q7'.*refuses turns by user, user.*must alternate"):
        make_encoder(root, STRICT)(record)


def test_template_that_drops_the_image_is_refused(root):
    template = CHATML.replace("m['content'] }}", "m['content'] | replace('<image>', '') }}")
    with pytest.raises(DataError, match="has 0 image tokens, 1 images need 6"):
        make_encoder(root, template)(make_record("<image> look", "yes"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (0, 4)}, "image_size"),
        ({"image_seq_length": 0}, "image_seq_length"),
        ({"image_std": (1, 1, 0)}, "image_std"),
        ({"image_token": "<new> token"}, "is not one token"),
        ({"image_token": "absent"}, "not one token"),
        ({"template": None}, "chat template"),
    ],
)
def test_unusable_settings_are_refused(root, changes, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(root, **changes)


class FakeProcessor:
    """Stands for a Qwen-VL-like processor: flattened patches, one grid row an image."""

    chat_template = "set"

    def __init__(self, tokens_per_image=4):
        self.tokenizer = make_tokenizer(None)
        self.tokens_per_image = tokens_per_image
        self.images_seen = 0

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize
        text = ""
        for message in conversation:
            parts = [p.get("text", "<IMG>") for p in message["content"]]
            text += f"<|im_start|>{message['role']}\n{''.join(parts)}<|im_end|>\n"
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def __call__(self, *, text, images, add_special_tokens, return_tensors):
        assert not add_special_tokens and return_tensors == "pt"
        (text,) = text
        assert text.count("<IMG>") == len(images or [])
        ids = self.tokenizer(text.replace("<IMG>", "<IMG>" * self.tokens_per_image))["input_ids"]
        ids = torch.tensor([ids])
        output = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output["mm_token_type_ids"] = (ids == 4).int()
        if images:
            self.images_seen += len(images)
            pixels = [np.asarray(image, np.float32).reshape(-1, 3)[:16] for image in images]
            output["pixel_values"] = torch.from_numpy(np.concatenate(pixels))
            output["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(images))
        return output


def test_processor_labels_hold_every_answer(root):
    encoder = ProcessorEncoder(FakeProcessor(), root=root)
    record = make_record(
        *["<image> how many ?", "two cars", "<image> is it safe ?", "no"],
        roles=("user", "assistant") * 2,
        images=("a.png", "b.png"),
    )
    encoded = encoder(record)
    kept = encoded["labels"] != -100
    torch.testing.assert_close(encoded["labels"][kept], encoded["input_ids"][kept])
    answer = encoder.processor.tokenizer.convert_ids_to_tokens(encoded["labels"][kept].tolist())
    assert answer == ["two", "cars", "<|im_end|>", "no", "<|im_end|>"]
    assert encoded["input_ids"].dim() == 1 and encoded["labels"][-1] != -100
    assert encoded["mm_token_type_ids"].shape == encoded["input_ids"].shape
    assert encoded["pixel_values"].shape == (32, 3)
    assert encoded["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert "attention_mask" not in encoded


def test_processor_prompt_is_the_start_of_the_training_tokens(root):
    encoder = ProcessorEncoder(FakeProcessor(), root=root)
    record = make_record("<image> how many ?", "two cars")
    encoded, prompt = encoder(record), encoder.encode_prompt(record)
    assert "labels" not in prompt
    torch.testing.assert_close(prompt["input_ids"], encoded["input_ids"][:-3])


def test_processor_takes_text_only_records(root):
    encoded = ProcessorEncoder(FakeProcessor(), root=root)(make_record("look", "no", images=()))
    assert "pixel_values" not in encoded and (encoded["labels"] != -100).sum() == 2


def test_processor_whose_prompt_changes_with_the_answer_is_refused(root):
    class Unstable(FakeProcessor):
        def __call__(self, *, text, **options):
            tail = " look" if text[0].endswith("assistant\n") else ""
            return super().__call__(text=[text[0] + tail], **options)

    encoder = ProcessorEncoder(Unstable(), root=root)
    with pytest.raises(DataError, match=r"'q7'.*not the first tokens"):
        encoder(make_record("<image> how many ?", "two cars"))


def test_processors_own_image_token_in_a_message_is_refused(root):
    """Also in an answer, where it would ask for patches that no image gives."""
    processor = FakeProcessor()
    processor.image_token, processor.video_token = "<|image_pad|>", "<image>"
    encoder = ProcessorEncoder(processor, root=root)
    for encode in (encoder, encoder.encode_prompt):
        with pytest.raises(DataError, match=r"'q7': a message holds the reserved token '<\|image_"):
            encode(make_record("<image> how many ?", "two <|image_pad|> cars"))
    encoder(make_record("<image> how many ?", "two cars"))


def test_processor_errors_name_the_record(root):
    encoder = ProcessorEncoder(FakeProcessor(), root=root)
    with pytest.raises(DataError, match=r"'q7'.*gone.png does not exist"):
        encoder(make_record("<image> look", "yes", images=["gone.png"]))
    with pytest.raises(DataError, match=r"'q7'.*0 <image> placeholders but 1"):
        encoder(make_record("look", "yes"))
    FakeProcessor.chat_template, kept = None, FakeProcessor.chat_template
    try:
        with pytest.raises(ValueError, match="chat template"):
            ProcessorEncoder(FakeProcessor())
    finally:
        FakeProcessor.chat_template = kept
