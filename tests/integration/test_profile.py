"""`drivekd profile MODEL`: times, tokens, memory, ratios, and that nothing is left changed."""

import json
import random
import time

import numpy as np
import pytest
import torch

from drivekd.cli import main
from drivekd.data import save_records
from drivekd.errors import RecipeError
from drivekd.study.profile import models as loading
from drivekd.study.profile.deployment import profile_model
from drivekd.study.profile.prompt import Prompt, synthetic_prompt
from drivekd.study.profile.report import deployment_table, ratios
from drivekd.study.tables import to_text
from tests.helpers import toy_data
from tests.helpers.toy_models import FAMILIES, IMAGE, internvl, llama, qwen2, qwen2_5_vl, qwen3_vl


def text_prompt(tokens=11):
    return synthetic_prompt(qwen2().config, text_tokens=tokens, images=0)


def profiled(model, prompt=None, **settings):
    settings = {"new_tokens": 6, "rounds": 2, **settings}
    return profile_model(model, prompt or text_prompt(), **settings)


def test_tokens_images_and_sizes_are_exact():
    model = internvl(layers=3, heads=4, kv_heads=2)
    prompt = synthetic_prompt(model.config, text_tokens=10, images=3)
    one, two = profiled(model, prompt, batch_sizes=(1, 2), new_tokens=5)
    for result, size in ((one, 1), (two, 2)):
        assert (result.batch_size, result.new_tokens, result.images) == (size, 5, 3)
        assert (result.prompt_tokens, result.image_tokens) == (10 + 3 * 4, 3 * 4)
        assert result.kv_bytes == result.run.kv_bytes == size * (22 + 4) * result.kv_bytes_per_token
        assert result.parameters == sum(p.numel() for p in model.parameters())
        assert result.weight_bytes == 4 * result.parameters <= result.run.weight_bytes
        assert (result.dtype, result.attention) == ("float32", "sdpa")
        assert result.device.startswith("cpu")
        assert len(result.run.first_token_seconds) == len(result.run.decode_seconds) == 2
        assert len(result.run.token_seconds) == 2 * 4
        assert sum(result.run.token_seconds) == pytest.approx(sum(result.run.decode_seconds))
        speed = size * 4 / np.median(result.run.decode_seconds)
        assert result.tokens_per_second == pytest.approx(speed)


def test_peak_memory_holds_weights_and_cache_and_grows_with_the_batch():
    model = qwen2(layers=2)
    small, large = profiled(model, text_prompt(64), batch_sizes=(1, 16))
    for result in (small, large):
        assert result.run.peak_bytes >= result.run.weight_bytes + result.run.kv_bytes
        assert result.run.reserved_bytes is None
        assert result.run.resident_growth_bytes >= 0
    assert large.run.peak_bytes - small.run.peak_bytes >= large.run.kv_bytes - small.run.kv_bytes


def test_first_token_ends_with_the_first_token_and_has_the_vision_tower_in_it():
    model = internvl(layers=2)
    prompt = synthetic_prompt(model.config, text_tokens=5, images=1)
    profiled(model, prompt)  # whatever is done once is done
    language, tower = model.model.language_model, model.model.vision_tower
    language.register_forward_pre_hook(
        lambda _, __, settings: time.sleep(0.2 if settings["inputs_embeds"].shape[1] > 1 else 0.03),
        with_kwargs=True,
    )
    tower.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    (result,) = profiled(model, prompt, rounds=1, new_tokens=4)
    (first,), (decode,) = result.run.first_token_seconds, result.run.decode_seconds
    assert first >= 0.2 + 0.1
    assert decode >= 3 * 0.03
    assert 0.03 <= min(result.run.token_seconds) < 0.2  # the first token's wait is in none of them


def test_a_model_that_stops_early_does_not_shorten_the_run():
    model = qwen2(layers=2)
    inputs = text_prompt().batch(1)
    first = model.generate(**inputs, do_sample=False, max_new_tokens=1, pad_token_id=0)[0, -1]
    model.generation_config.eos_token_id = int(first)
    stopped = model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert stopped.shape[1] == inputs["input_ids"].shape[1] + 1
    (result,) = profiled(model, new_tokens=6)
    assert result.problem is None
    assert len(result.run.token_seconds) == 2 * 5


def test_settings_of_the_model_do_not_count_and_stay():
    model = qwen2(layers=2)
    own = model.generation_config
    own.do_sample, own.temperature, own.max_time, own.repetition_penalty = True, 0.5, 1e-9, 1.3
    (result,) = profiled(model)
    assert result.problem is None
    assert model.generation_config is own
    assert (own.do_sample, own.temperature, own.max_time) == (True, 0.5, 1e-9)


def test_a_model_that_cannot_be_kept_from_stopping_is_named(monkeypatch):
    model = qwen2(layers=2)
    generate = type(model).generate

    def short(self, *, generation_config, **inputs):
        generation_config.min_new_tokens = generation_config.max_new_tokens = 3
        return generate(self, generation_config=generation_config, **inputs)

    monkeypatch.setattr(type(model), "generate", short)
    (result,) = profiled(model)
    assert result.run is None
    assert result.problem == "it stopped after 3 of 6 tokens"


def states():
    return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_model_and_random_generators_are_left_as_they_were():
    model = llama(layers=2).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    prompt, before = text_prompt(), states()
    profiled(model, prompt)
    assert states() == before
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["new_tokens", "warmup", "rounds"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0, wanted at least 1"):
        profiled(qwen2(layers=2), **{name: 0})


def test_memory_that_runs_out_is_a_result_of_its_batch_size_alone():
    model = qwen2(layers=2)

    def full(module, arguments, settings):
        if len(settings["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore words")

    model.register_forward_pre_hook(full, with_kwargs=True)
    small, large, last = profiled(model, batch_sizes=(2, 3, 1))
    assert small.problem is last.problem is None
    assert large.run is None and large.tokens_per_second is None
    assert large.problem == "out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    assert large.weight_bytes == small.weight_bytes
    text = to_text(deployment_table([small, large, last]))
    assert "out of memory" in text and "batch 3: out of memory: CUDA" in text


def test_other_errors_are_not_swallowed():
    model = qwen2(layers=2)
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profiled(model)


@pytest.mark.parametrize("make", [internvl, qwen2_5_vl, qwen3_vl])
def test_made_up_pictures_fit_the_family(make):
    model = make(layers=2)
    size = None if make is internvl else (56, 112)
    prompt = synthetic_prompt(model.config, text_tokens=9, images=2, image_size=size)
    of_images = int((prompt.inputs["input_ids"] == IMAGE).sum())
    assert of_images == 2 * (4 if make is internvl else 2 * 4)
    (result,) = profiled(model, prompt, batch_sizes=(2,), new_tokens=2)
    assert result.image_tokens == of_images


def test_pictures_that_cannot_be_made_are_refused():
    config = FAMILIES["llava_onevision"].model().config
    with pytest.raises(RecipeError, match=r"llava_onevision.*give --records"):
        synthetic_prompt(config, text_tokens=9, images=1)
    with pytest.raises(RecipeError, match="qwen2 reads no images"):
        synthetic_prompt(qwen2().config, text_tokens=9, images=1)
    with pytest.raises(RecipeError, match="takes 56 x 56 only"):
        synthetic_prompt(internvl().config, text_tokens=9, images=1, image_size=(28, 28))


def test_ratios_are_how_much_better_the_first_model_is():
    small, large = (
        profiled(qwen2(layers=layers), rounds=1, name=str(layers))[0] for layers in (1, 9)
    )
    found = ratios(large, small)
    assert found["memory"] == large.run.peak_bytes / small.run.peak_bytes > 1
    assert found["speed"] == small.tokens_per_second / large.tokens_per_second
    assert found["first_token"] == large.first_token_seconds / small.first_token_seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small and a large checkpoint with tokenizer and records; a config of a larger one."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers in (("small", 2), ("large", 5)):
        internvl(layers=layers).save_pretrained(folder / name)
        toy_data.tokenizer().save_pretrained(folder / name)
        image = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(image))
    internvl(layers=7).config.save_pretrained(folder / "huge")
    save_records(toy_data.records(folder, ["sort", "fold"]), folder / "records.json")
    return folder


def files(folder):
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


QUICK = ["--new-tokens", "3", "--rounds", "1", "--device", "cpu"]


def run(capsys, *arguments):
    code = main(["profile", *map(str, arguments), *QUICK, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_command_measures_checkpoints_and_configs_on_a_record(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, draws = files(place), states()
    code, document = run(
        capsys, place / "small", place / "large", "--records", place / "records.json",
        "--random-weights", place / "huge" / "config.json",
    )  # fmt: skip
    assert code == 0
    small, large, huge = document["models"]
    record = toy_data.records(tmp_path, ["sort"])[0]
    prompt = toy_data.encoder(tmp_path).encode_prompt(record)
    assert {row["prompt_tokens"] for row in document["models"]} == {len(prompt["input_ids"])}
    assert {row["image_tokens"] for row in document["models"]} == {4}
    assert [row["weights"] for row in document["models"]] == ["checkpoint", "checkpoint", "random"]
    assert small["parameters"] < large["parameters"] < huge["parameters"]
    assert "first_model_is_better_by" not in small
    assert large["first_model_is_better_by"]["memory"] > 1
    assert set(large["first_token_seconds"]) == {"p50", "p90"}
    assert document["versions"]["torch"] == torch.__version__
    assert files(place) == before
    assert states() == draws
    assert [file.name for file in tmp_path.iterdir()] == ["0-0.png"]  # of this test's own record


def test_a_model_that_does_not_fit_is_a_named_row_and_exit_code_1(place, capsys, monkeypatch):
    size = 4 * sum(p.numel() for p in internvl(layers=4).parameters())
    monkeypatch.setattr(loading, "free_bytes", lambda _: size)
    code, document = run(capsys, place / "small", "--random-weights", place / "huge")
    assert code == 1
    small, huge = document["models"]
    assert small["problem"] is None and small["run"] is not None
    assert huge["problem"].startswith("does not fit: weights of ")
    assert huge["run"] is None and huge["kv_bytes"] > 0 and huge["weight_bytes"] > size
    better = huge["first_model_is_better_by"]
    assert better.pop("memory_at_least") == huge["weight_bytes"] / small["run"]["peak_bytes"]
    assert set(better.values()) == {None}
    assert main(["profile", str(place / "small"), "--random-weights", str(place / "huge"), *QUICK])
    row = next(x for x in capsys.readouterr().out.splitlines() if "  does not fit  " in x)
    assert row.split("  ")[-1].strip() == "-" and "> " in row


def test_memory_that_runs_out_while_loading_is_a_row_too(place, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(loading, "load_model", full)
    code, document = run(capsys, place / "small", "--random-weights", place / "huge")
    assert code == 1
    assert document["models"][0]["problem"].startswith("out of memory while loading: [enforce")
    assert document["models"][1]["problem"] is None


def test_tables_are_text_or_markdown(place, capsys):
    arguments = ["profile", str(place / "small"), str(place / "large"), *QUICK]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "What an answer costs" in text and "x first token" in text
    assert main([*arguments, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("## What an answer costs\n\n|  | batch |")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to profile"),
        (["a", "training.seed=1"], "KEY=VALUE changes a recipe; there is none"),
        (["a", "--steps", "3"], "--steps belongs to a recipe, not to models"),
        (["a.yaml", "--rounds", "3"], "--rounds belongs to models, not to a recipe"),
        (["a.yaml", "b"], "b stands beside the recipe a.yaml"),
        (["/nowhere/model"], "/nowhere/model is not a folder of a saved model"),
        (["{records}"], "records.json is not a folder of a saved model"),
        (["{list}"], "list has a config.json that holds no JSON object"),
        (["--random-weights", "{list}/config.json"], "has a config.json that holds no JSON object"),
        (["{small}", "--device", "mars"], "device 'mars' is not there"),
        (["{small}", "--images", "1", "--image-size", "9", "9"], "takes 56 x 56 only"),
        (["--random-weights", "{huge}", "--records", "{records}"], "no model has a tokenizer"),
        (["--random-weights", "{records}"], "is no folder of a model, and not the config.json"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, says, place, capsys):
    names = {each: place / each for each in ("small", "huge", "list")}
    names["records"] = place / "records.json"
    names["list"].mkdir(exist_ok=True)
    (names["list"] / "config.json").write_text("[1, 2]")
    assert main(["profile", *(each.format(**names) for each in arguments)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("drivekd")]
    assert line.startswith("drivekd profile: error: ") and says in line


def test_a_model_without_tokenizer_must_read_the_same_tokens(place, capsys, tmp_path):
    config = internvl(layers=2).config
    config.image_seq_length = 9
    config.save_pretrained(tmp_path / "other")
    arguments = [place / "small", "--records", place / "records.json"]
    code = main(["profile", *map(str, arguments), "--random-weights", str(tmp_path / "other")])
    assert code == 2
    assert "image_seq_length" in capsys.readouterr().err


def test_prompt_is_copied_without_padding():
    prompt = Prompt({"input_ids": torch.tensor([7, 8, 9])}, 0, "three words")
    batch = prompt.batch(2)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 8, 9]]
    assert batch["attention_mask"].all()
