"""drivekd verify: agrees where it should, and finds what is broken on purpose."""

import json

import pytest
import torch
import yaml
from torch import Tensor

from drivekd.cli import main
from drivekd.data import save_records
from drivekd.errors import TokenMismatchError
from drivekd.losses import AttentionMapLoss
from drivekd.study.measure import peak_bytes
from drivekd.study.verify import AGREES, DIFFERS, NOTHING, verify
from drivekd.tokens import TokenLayout
from drivekd.train.config import SignalConfig
from tests.helpers import toy_data
from tests.helpers.toy_models import FAMILIES, IMAGE, internvl, qwen2, text_inputs
from tests.helpers.traces import traces


def pair(family, dtype=torch.float32):
    """A student of three layers, a teacher of five, and a batch for them."""
    make = FAMILIES[family]
    student, teacher = (make.model(layers=layers, seed=layers).to(dtype) for layers in (3, 5))
    batch = make.inputs(padding="left")
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return student, teacher.requires_grad_(False), batch


def signal(**settings):
    defaults = {"name": "s", "teacher": "t", "region": "full"}
    layers = {"student_layers": "0..-2", "teacher_layers": "0..-2"}
    return SignalConfig(**(defaults | layers | settings))


@pytest.mark.parametrize(
    ("family", "dtype", "autocast"),
    [
        ("internvl", torch.bfloat16, None),
        ("qwen2_5_vl", torch.float32, None),
        ("qwen3_vl", torch.bfloat16, None),
        ("llava_onevision", torch.float32, torch.bfloat16),
    ],
)
def test_all_signals_agree(family, dtype, autocast):
    checks = verify(*pair(family, dtype), autocast=autocast, repeats=1)
    assert [check.signal for check in checks] == ["perception", "reasoning", "planning"]
    for check in checks:
        assert check.verdict == AGREES, check.reasons
        assert check.reasons == ()
        assert check.dtype == ("float32" if dtype == torch.float32 and not autocast else "bfloat16")
        assert check.gradients > 20
        assert min(check.seconds, check.seconds_eager) > 0
        assert min(check.peak_bytes, check.peak_bytes_eager) > 1e5
        # What is allowed says something: a tenth of the value at the very most.
        assert check.loss_allowed < 0.12 and check.gradient_allowed < 0.12


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "cosine", "region": "text_to_vision"},
        {"loss": "kl", "region": "text_to_vision"},
        {"loss": "kl"},
        {"denominator": "live", "region": "text_to_vision"},
    ],
)
def test_every_loss_has_its_eager_twin(settings):
    (check,) = verify(*pair("internvl"), [signal(**settings)], repeats=1)
    assert check.verdict == AGREES, check.reasons


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_sliding_windows(loss):
    student, teacher = (
        qwen2(layers=3, sliding_window=5, first_sliding_layer=1, seed=n) for n in (3, 4)
    )
    batch = text_inputs(padding="right")
    valid = batch["attention_mask"].bool()
    tokens = TokenLayout.from_masks(torch.zeros_like(valid), valid=valid)
    wanted = signal(loss=loss, denominator="live")
    (check,) = verify(student, teacher, batch, [wanted], tokens=tokens, repeats=1)
    assert check.verdict == AGREES, check.reasons


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_models_of_text_alone_need_no_layout(family):
    checks = verify(*pair(family), repeats=1)
    assert [check.verdict for check in checks] == [NOTHING, AGREES, NOTHING]


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_packed_rows(family):
    """Three sequences in a row, an image in the last; eager attention keeps them apart too."""
    student, teacher, batch = pair(family)
    batch = {k: v[:1] if k in ("input_ids", "mm_token_type_ids") else v for k, v in batch.items()}
    batch.pop("attention_mask")
    pixels = batch["pixel_values"]
    batch["pixel_values"] = pixels[: len(pixels) // 2]
    if "image_grid_thw" in batch:
        batch["image_grid_thw"] = batch["image_grid_thw"][:1]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in (2, 3, 19)])[None]
    if family == "qwen3_vl":
        batch["position_ids"] = batch["position_ids"].expand(4, 1, -1)
    checks = verify(student, teacher, batch, repeats=1)
    assert [check.verdict for check in checks] == [AGREES] * 3, [c.reasons for c in checks]
    segments = TokenLayout.from_batch(batch, student.config).segment_ids
    assert segments.unique(return_counts=True)[1].tolist() == [2, 3, 19]
    whole = TokenLayout.from_masks(batch["input_ids"] == IMAGE)  # a layout that forgets them
    (check,) = verify(student, teacher, batch, [signal()], tokens=whole, repeats=1)
    assert check.verdict == DIFFERS


def test_models_are_left_as_they_were():
    student, teacher, batch = pair("internvl")
    student.train()
    verify(student, teacher, batch, [signal()], repeats=1)  # first forwards note a thing or two
    before, kinds = traces(student, teacher), student.config._attn_implementation
    weights = [p.clone() for p in student.parameters()]
    verify(student, teacher, batch, [signal()], repeats=1)
    assert traces(student, teacher) == before
    assert student.config._attn_implementation == kinds == "sdpa"
    assert student.training and not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True))
    assert all(p.grad is None for p in student.parameters())


def broken(monkeypatch, change):
    """Let the loss module give something else."""
    whole = AttentionMapLoss.forward
    monkeypatch.setattr(AttentionMapLoss, "forward", lambda *a, **k: change(whole, *a, **k))


def wrong_value(whole, *args, **options):
    return whole(*args, **options) * 1.2


def wrong_gradient(whole, *args, **options):
    loss: Tensor = whole(*args, **options)
    return loss + 0.2 * (loss - loss.detach())


def no_gradient_of_keys(whole, module, own, *args, **options):
    class Detached:
        input_ids = own.input_ids

        def __getitem__(self, layer):
            record = own[layer]
            return type(record)(record.query, record.key.detach(), record.scale)

    return whole(module, Detached(), *args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrong_value, "the loss is"),
        (wrong_gradient, "gradients are off by"),
        (no_gradient_of_keys, "gradient"),
    ],
)
def test_what_is_broken_is_found(monkeypatch, dtype, change, reason):
    broken(monkeypatch, change)
    (check,) = verify(*pair("internvl", dtype), [signal()], repeats=1)
    assert check.verdict == DIFFERS
    assert any(reason in each for each in check.reasons), check.reasons


def one_cell_too_many(whole, *args, **options):
    return whole(*args, **options) * (1 - 1 / 100)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_16_bits_hide_no_mistake_that_is_smaller_than_their_rounding(monkeypatch, autocast):
    """As a denominator that counts a cell too many: a hundredth, where bf16 allows a twentieth."""
    broken(monkeypatch, one_cell_too_many)
    pairs = pair("internvl", torch.float32 if autocast else torch.bfloat16)
    (check,) = verify(*pairs, [signal()], autocast=autocast, repeats=1)
    assert check.loss_error < check.loss_allowed and check.gradient_error < check.gradient_allowed
    assert check.verdict == DIFFERS
    assert check.reasons == (
        "in float32 the loss is off by 1.0e-02 and the gradients by 1.0e-02, 1.0e-04 is allowed",
    )


def test_gradients_that_only_one_way_has_are_named(monkeypatch):
    broken(monkeypatch, no_gradient_of_keys)
    first = signal(student_layers="first", teacher_layers="first")
    (check,) = verify(*pair("internvl"), [first], repeats=1)
    assert all("layers.0.self_attn.k_proj" in name for name in check.only_eager)
    assert len(check.only_eager) == 2


def test_a_wrong_capture_is_found(monkeypatch):
    """Eager attention returns its own maps: a scale that capture got wrong shows."""
    from drivekd.capture.forward import LayerTap

    take = LayerTap._record

    def wrong(self, query, key, options):
        return take(self, query, key, options | {"scaling": 0.3})

    monkeypatch.setattr(LayerTap, "_record", wrong)
    (check,) = verify(*pair("internvl"), [signal()], repeats=1)
    assert check.verdict == DIFFERS


def test_a_batch_without_image_has_nothing_for_signals_on_images():
    student, teacher, batch = pair("internvl")
    batch = {k: v for k, v in batch.items() if k != "pixel_values"}
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 7)
    checks = verify(student, teacher, batch, repeats=1)
    assert [check.verdict for check in checks] == [NOTHING, AGREES, NOTHING]
    assert (checks[0].loss, checks[0].loss_eager) == (0.0, 0.0)
    assert checks[0].reasons == ("both ways: no sample of the batch has text and image tokens",)


@pytest.mark.parametrize("loss", ["mse", "cosine", "kl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss, monkeypatch):
    student, teacher, batch = internvl(), internvl(), pair("internvl")[2]
    (check,) = verify(student, teacher, batch, [signal(loss=loss)], repeats=1)
    assert check.verdict == NOTHING
    assert "student and teacher have the" in check.reasons[0]
    broken(monkeypatch, lambda whole, *a, **k: whole(*a, **k) + 1e-3)
    (check,) = verify(student, teacher, batch, [signal(loss=loss)], repeats=1)
    assert check.verdict == DIFFERS


def test_models_with_other_image_tokens_are_refused():
    student, teacher, batch = pair("internvl")
    teacher.config.image_token_id = 7
    with pytest.raises(TokenMismatchError, match="has image_token_id 7 but the student 300"):
        verify(student, teacher, batch)


def test_logits_alone_are_nothing_to_compare():
    with pytest.raises(ValueError, match="none of kind 'attention'"):
        verify(*pair("internvl"), [SignalConfig(name="a", teacher="t", kind="logits")])


def test_peak_memory_is_what_lives_at_once():
    def work():
        for _ in range(3):
            torch.ones(250_000).add_(1)
        keep = torch.ones(500_000)
        return keep + 1

    assert peak_bytes(work, torch.device("cpu")) == pytest.approx(4e6, rel=0.05)


@pytest.fixture
def recipe(tmp_path):
    """A recipe with two signals of one teacher."""
    for name, layers in (("student", 2), ("teacher", 4)):
        internvl(layers=layers, seed=layers).save_pretrained(tmp_path / name)
        toy_data.tokenizer().save_pretrained(tmp_path / name)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "student" / "preprocessor_config.json").write_text(json.dumps(settings))
    save_records(toy_data.records(tmp_path, ("sort", "fold")), tmp_path / "train.json")
    layers = {"student_layers": "first", "teacher_layers": "penultimate"}
    tree = {
        "student": str(tmp_path / "student"),
        "teachers": {"big": str(tmp_path / "teacher")},
        "data": {"train": str(tmp_path / "train.json")},
        "distill": {
            "signals": [
                {"name": "sort", "teacher": "big", "region": "text_to_vision", **layers},
                {"name": "fold", "teacher": "big", "region": "full", "loss": "cosine", **layers},
                {"name": "words", "teacher": "big", "kind": "logits"},
            ]
        },
        "teacher_dtype": "bfloat16",
        "training": {"output_dir": str(tmp_path / "run"), "bf16": True},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_command(recipe, tmp_path, capsys):
    assert main(["verify", str(recipe), "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "The fused losses are as exact here as eager attention." in out
    document = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert document["verdict"] == "agrees"
    assert [check["signal"] for check in document["checks"]] == ["sort", "fold"]
    assert all(f"\n{name} " in out for name in ("sort", "fold"))
    assert {check["dtype"] for check in document["checks"]} == {"bfloat16"}
    assert document["versions"]["torch"] == torch.__version__


def test_command_says_what_differs_and_leaves_with_1(recipe, tmp_path, capsys, monkeypatch):
    broken(monkeypatch, wrong_value)
    arguments = ["verify", str(recipe), "--repeats", "1", "--samples", "1", "training.bf16=false"]
    assert main([*arguments, "--json", str(tmp_path / "other.json")]) == 1
    out = capsys.readouterr().out
    assert "The fused losses are NOT as exact here as eager attention." in out
    assert "sort: the loss is" in out
    document = json.loads((tmp_path / "other.json").read_text())
    assert document["verdict"] == "differs"
    assert {check["dtype"] for check in document["checks"]} == {"float32"}


def test_command_without_an_attention_signal(recipe, capsys):
    arguments = ["verify", str(recipe), "distill.signals=[{name: a, teacher: big, kind: logits}]"]
    assert main(arguments) == 2
    assert "no signal of kind 'attention'" in capsys.readouterr().err


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_command_names_a_checkpoint_that_lacks_a_layer_in_one_line(recipe, tmp_path, capsys, who):
    from safetensors.torch import load_file, save_file

    file = tmp_path / who / "model.safetensors"
    weights = load_file(file)
    weights = {n: weights[n] for n in weights if "vision" in n or "layers.1." not in n}
    save_file(weights, file, metadata={"format": "pt"})
    assert main(["verify", str(recipe)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "error: " + ("student" if who == "student" else "teacher 'big'") in err
    assert "lacks the weights" in err and "layers.1." in err


def test_command_names_a_layer_that_no_teacher_has_in_one_line(recipe, capsys):
    assert main(["verify", str(recipe), "distill.signals.sort.teacher_layers=9"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "teacher 'big': layer 9 does not exist in a model of 4 decoder layers" in err


REMOTE = {
    "model_type": "internvl_chat",
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
}


@pytest.mark.parametrize("command", ["verify", "distill"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_commands_refuse_remote_code_with_the_remedy(recipe, tmp_path, capsys, command, who):
    (tmp_path / who / "config.json").write_text(json.dumps(REMOTE))
    cpu = ["training.bf16=false", "training.use_cpu=true"]
    assert main([command, str(recipe), *cpu]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "error: " + ("student" if who == "student" else "teacher 'big'") in err
    assert "take the checkpoint in transformers' own format" in err and "truncate_teacher" in err


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_command_names_weights_that_do_not_fit_their_config(recipe, tmp_path, capsys, who):
    file = tmp_path / who / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["intermediate_size"] = 80
    file.write_text(json.dumps(config))
    assert main(["verify", str(recipe)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "does not fit its config: " in err and "is saved with shape (64, 96)" in err


def test_command_on_a_teacher_that_tokenises_differently(recipe, tmp_path, capsys):
    file = tmp_path / "teacher" / "tokenizer.json"
    text = file.read_text()
    file.write_text(
        text.replace('"w51"', '"w-"').replace('"w52"', '"w51"').replace('"w-"', '"w52"')
    )
    assert main(["verify", str(recipe)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "teacher 'big'" in err and "gives the token 'w51' the id 52, the student 51" in err
