"""drivekd prestudy: its numbers are those of eager attention, and it finds what was planted."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from drivekd.capture import CapturedAttention, CapturedLayer
from drivekd.cli import main
from drivekd.data import Collator, Message, ProcessorEncoder, Record, save_records
from drivekd.errors import DataError, TokenMismatchError
from drivekd.study.prestudy import Document, prestudy
from drivekd.study.prestudy import observe as observing
from drivekd.study.prestudy.measures import VISION_BINS, bin_shares
from drivekd.study.prestudy.observe import observe, observe_margins
from drivekd.train import distill, load_recipe
from tests.helpers import toy_data, toy_models
from tests.helpers.memory import LiveBytes
from tests.helpers.recipes import write_recipe
from tests.helpers.toy_processors import QwenProcessor

CAPABILITIES = ("perception", "reasoning", "planning")


def family(name, root):
    """A teacher of four layers, a student of three, and a collator for both."""
    make = toy_models.FAMILIES[name].model
    teacher = make(layers=4, seed=1).requires_grad_(False)
    student = make(layers=3, hidden=32, heads=2, kv_heads=1, seed=2).requires_grad_(False)
    encoder = toy_data.encoder(root)
    if name == "qwen2_5_vl":
        encoder = ProcessorEncoder(QwenProcessor(), root=root)
    return teacher, student, Collator(encoder, teacher.config, pad_token_id=0)


def eager(model, batch, sample=0):
    """(L, N, N) maps, (L + 1, N, D) hidden states and (N, V) logits of eager attention, float64."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    inputs = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
    with torch.no_grad():
        out = twin(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    maps = np.stack([layer[sample].double().mean(0).numpy() for layer in out.attentions])
    hidden = np.stack([layer[sample].double().numpy() for layer in out.hidden_states])
    return maps, hidden, out.logits[sample].double().numpy()


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl"])
def test_observations_are_those_of_eager_attention(name, tmp_path):
    teacher, student, collate = family(name, tmp_path)
    for record in toy_data.records(tmp_path, CAPABILITIES):
        batch = collate([record])
        (found,) = observe(teacher, batch, student=student, tau=0.7)
        maps, hidden, logits = eager(teacher, batch)
        own, _, _ = eager(student, batch)
        vision, text = (
            mask[0].numpy() for mask in (batch["tokens"].is_vision, batch["tokens"].is_text)
        )
        last = np.flatnonzero(vision).max()
        asking = text & (np.arange(len(text)) > last)

        # The last hidden state that transformers gives is behind the final norm.
        adjacent = [cosine(hidden[i], hidden[i + 1]).mean() for i in range(3)]
        np.testing.assert_allclose(found.adjacent[:3], adjacent, atol=2e-6)
        states = hidden[1:4]
        between = cosine(states[:, vision].mean(1), states[:, text].mean(1))
        np.testing.assert_allclose(found.vision_text[:3], between, atol=2e-6)
        np.testing.assert_allclose(found.hidden[:3], states[:, asking].mean(1), atol=2e-5)

        seen = maps[:, asking][:, :, vision]
        shares = seen / seen.sum(-1, keepdims=True)
        np.testing.assert_allclose(found.vision_mass, seen.sum(-1).mean(1), atol=2e-6)
        spread = bin_shares(int(vision.sum()), VISION_BINS).numpy()
        np.testing.assert_allclose(found.vision, shares.mean(1) @ spread, atol=2e-6)
        np.testing.assert_allclose(found.sink_share, shares.mean(1).max(1), atol=2e-6)
        np.testing.assert_allclose(found.row_share, shares.max(2).mean(1), atol=2e-6)
        assert found.sink_floor == pytest.approx(1 / vision.sum())

        rows = text & (np.arange(len(text)) > np.flatnonzero(vision).min())
        for region, (r, c) in {
            "full": (np.ones_like(text), np.ones_like(text)),
            "text_to_vision": (rows, vision),
        }.items():
            wanted = [[cosine(s[r][:, c], t[r][:, c]).mean() for t in maps] for s in own]
            np.testing.assert_allclose(found.alignment[region], wanted, atol=2e-6)

        labels = batch["labels"][0].numpy()
        places = np.flatnonzero(labels[1:] != -100)
        margins = []
        for place in places:
            z, right = logits[place] / 0.7, labels[place + 1]
            others = np.delete(z, right)
            top = others.max()
            margins.append(0.7 * (z[right] - top - np.log(np.exp(others - top).sum())))
        assert found.margin.tokens == len(margins)
        assert found.margin.mean == pytest.approx(np.mean(margins), abs=1e-4)
        assert found.num_tokens == len(text) and len(found.words) == text.sum()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["internvl3_5", "qwen3_vl", "llava_onevision"])
def test_every_family_is_observed(name, padding):
    make = toy_models.FAMILIES[name]
    teacher, student = (make.model(layers=n, seed=n).requires_grad_(False) for n in (3, 2))
    batch = make.inputs(padding=padding)
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -8:-5] = batch["input_ids"][:, -8:-5]
    tokens = toy_models.layout_of(batch)
    names = {"question_types": ["a", "b"], "record_ids": ["", ""], "tokens": tokens}
    found = observe(teacher, {**batch, **names}, student=student, tau=1.0)[1]
    maps, own = (eager(model, batch, sample=1)[0] for model in (teacher, student))
    valid, vision, text = (
        mask[1].numpy() for mask in (tokens.valid, tokens.is_vision, tokens.is_text)
    )
    asking = text & (np.arange(len(text)) > np.flatnonzero(vision).max())
    seen = maps[:, asking][:, :, vision].sum(-1).mean(1)
    np.testing.assert_allclose(found.vision_mass, seen, atol=3e-6)
    wanted = [[cosine(s[valid][:, valid], t[valid][:, valid]).mean() for t in maps] for s in own]
    np.testing.assert_allclose(found.alignment["full"], wanted, atol=3e-6)
    assert found.num_tokens == valid.sum() == toy_models.NUM_TOKENS - 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(side, tmp_path):
    teacher, student, collate = family("internvl", tmp_path)
    records = toy_data.records(tmp_path, CAPABILITIES)
    padded = Collator(collate.encoder, teacher.config, pad_token_id=0, padding_side=side)
    together = observe(teacher, padded(records), student=student, tau=1.0)
    for record, found in zip(records, together, strict=True):
        (alone,) = observe(teacher, collate([record]), student=student, tau=1.0)
        for name in ("adjacent", "vision_text", "hidden", "vision", "pooled", "sink_share"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(alone, name), atol=3e-5, err_msg=name
            )
        for region, pairs in alone.alignment.items():
            np.testing.assert_allclose(found.alignment[region], pairs, atol=1e-5)
        np.testing.assert_allclose(found.margin.along, alone.margin.along, atol=1e-4)
        assert found.words.tolist() == alone.words.tolist()


def test_rows_are_read_in_chunks_and_no_map_is_held(tmp_path, monkeypatch):
    """Long records are bounded by rows: of each layer never more than the chunk's."""
    teacher, student, collate = family("internvl", tmp_path)
    (record,) = toy_data.records(tmp_path, ("planning",))
    long = Message("user", record.messages[0].content + " w9" * 90)
    record = Record((long, record.messages[1]), record.images, "planning", "long")
    batch = collate([record])
    teacher, student = teacher.double(), student.double()
    (whole,) = observe(teacher, batch, student=student, tau=1.0)
    heights = []
    real = observing._rows
    monkeypatch.setattr(
        observing, "_rows", lambda *a, **k: heights.append((m := real(*a, **k)).shape[1]) or m
    )
    monkeypatch.setattr(observing, "_CHUNK_BYTES", 0)
    (found,) = observe(teacher, batch, student=student, tau=1.0)
    assert max(heights) == 16 and sum(heights) == 2 * found.num_tokens
    np.testing.assert_allclose(found.pooled, whole.pooled, rtol=1e-10)
    np.testing.assert_allclose(found.alignment["full"], whole.alignment["full"], rtol=1e-10)


def test_memory_is_bounded_by_rows_however_long_a_record_is(monkeypatch):
    """No map of a layer, let alone one with heads, is ever whole; all layers are 24 maps."""
    num_tokens, heads = 1200, 4

    def capture(layers):
        records = {
            i: CapturedLayer(*torch.randn(2, 1, heads, num_tokens, 16), scale=0.25)
            for i in range(layers)
        }
        return CapturedAttention(layers, tuple(range(layers)), records, None, None)

    teacher, student = capture(16), capture(8)
    is_vision = torch.arange(num_tokens) < 700
    monkeypatch.setattr(observing, "_CHUNK_BYTES", 4 * 24 * num_tokens * 32)  # 32 rows
    with LiveBytes() as memory:
        features, pairs = observing._read_maps(teacher, student, 0, 0, is_vision, ~is_vision)
    one_map = 4 * num_tokens**2
    assert memory.largest < one_map
    assert memory.peak < 3 * one_map < 24 * one_map / 2
    assert torch.isfinite(features.pooled).all() and torch.isfinite(pairs["full"]).all()


def test_logits_of_the_answer_alone_are_asked_for_where_the_model_can(tmp_path, monkeypatch):
    teacher, _, collate = family("internvl", tmp_path)
    batch = collate(toy_data.records(tmp_path, ("planning",)))
    sizes = []
    teacher.lm_head.register_forward_hook(lambda *a: sizes.append(a[2].shape[1]))
    (few,) = observe_margins(teacher, batch, tau=1.0)
    assert sizes == [few.tokens]
    forward = type(teacher).forward
    monkeypatch.setattr(type(teacher), "forward", lambda self, **inputs: forward(self, **inputs))
    (all_of_them,) = observe_margins(teacher, batch, tau=1.0)
    assert sizes[1] == batch["input_ids"].shape[1]
    np.testing.assert_allclose(few.along, all_of_them.along, atol=1e-4)


def batches(collate, records, size=1):
    for i in range(0, len(records), size):
        some = records[i : i + size]
        yield collate(some) | {"pictures": [record.images for record in some]}


def plant(teacher, layer, record_types):
    """Make one layer's maps tell capabilities apart: queries of text find one vision token each."""
    attention = teacher.get_decoder().layers[layer].self_attn
    wide = attention.config.num_attention_heads * attention.head_dim
    kinds = iter(record_types)

    def keys(module, args, output):
        output = output * 0.05
        kind = CAPABILITIES.index(next(kinds))
        place = int((teacher.planted_ids[0] == toy_models.IMAGE).nonzero()[0]) + kind
        output[:, place] = 6.0
        return output

    def queries(module, args, output):
        return torch.ones_like(output)[..., :wide]

    attention.k_proj.register_forward_hook(keys)
    attention.q_proj.register_forward_hook(queries)
    # Without rotation, so that what is planted is found from everywhere.
    rotary = teacher.get_decoder().rotary_emb

    def unturned(module, args, output):
        return torch.ones_like(output[0]), torch.zeros_like(output[1])

    rotary.register_forward_hook(unturned)
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(module, "planted_ids", kwargs["input_ids"]),
        with_kwargs=True,
    )


def worded_alike(root, count, *, seed=0):
    """Records of all capabilities whose words say nothing about which one they are of."""
    made = toy_data.records(root, [CAPABILITIES[i % 3] for i in range(count)], seed=seed)
    generator = np.random.default_rng(seed)
    alike = []
    for record in made:
        words = " ".join(f"w{i}" for i in generator.integers(6, 40, 9))
        messages = (Message("user", f"<image> {words}"), Message("assistant", words[-3:].strip()))
        alike.append(Record(messages, record.images, record.question_type, record.id))
    return alike


def test_a_layer_that_tells_capabilities_apart_by_construction_is_found(tmp_path):
    teacher, _, collate = family("internvl", tmp_path)
    records = worded_alike(tmp_path, 96)
    plant(teacher, 1, [record.question_type for record in records])
    study = prestudy(teacher, batches(collate, records), resamples=300)
    for capability in study.capabilities:
        curve = capability.similarity["text_to_vision"].beyond_words
        assert int(np.argmax(curve.value)) == 1
        assert curve.value[1] > 0.9 and curve.low[1] > 0.8
        assert capability.sink_share.value[1] > 0.9  # all rows look at the planted token
        assert capability.similarity["text_to_vision"].dispersion.value[1] < 0.01
        assert abs(curve.value[0]) < 0.2  # before it there is nothing
    suggestions = {each.capability: each for each in study.suggestions}
    found = suggestions["perception"]
    assert (found.teacher_layers, found.region) == (1, "text_to_vision")
    assert found.evidence == "clear" and not found.is_default
    assert "loss: cosine" in " ".join(found.reasons)


def test_capabilities_that_are_alike_by_construction_keep_the_papers_layers(tmp_path):
    teacher, student, collate = family("internvl", tmp_path)
    records = worded_alike(tmp_path, 60)
    study = prestudy(teacher, batches(collate, records, 4), student=student, resamples=300)
    for each in study.suggestions:
        assert each.is_default, each.reasons
        assert each.evidence in ("within noise", "too small to matter")
    assert study.num_student_layers == 3 and len(study.capabilities[0].alignment["full"]) == 3


def test_a_student_that_is_the_teacher_pairs_layer_by_layer(tmp_path):
    teacher, _, collate = family("internvl", tmp_path)
    records = toy_data.records(tmp_path, CAPABILITIES * 3)
    study = prestudy(teacher, batches(collate, records), student=teacher, resamples=50)
    for capability in study.capabilities:
        for pairs in capability.alignment.values():
            assert np.argmax(pairs, axis=1).tolist() == [0, 1, 2, 3]
            np.testing.assert_allclose(np.diag(pairs), 1, atol=1e-6)


def test_general_records_give_margins_and_may_be_of_text_alone(tmp_path):
    teacher, _, collate = family("internvl", tmp_path)
    words = Record((Message("user", "w9 w8"), Message("assistant", "w7 w6")), (), "talk", "plain")
    general = [words] * 9 + toy_data.records(tmp_path, ("talk",), seed=3)
    study = prestudy(
        teacher,
        batches(collate, toy_data.records(tmp_path, CAPABILITIES)),
        general=[collate([record]) for record in general],
        resamples=50,
    )
    margins = study.general["general"]
    assert (margins.records, margins.pictures) == (10, 10)
    wanted = [observe_margins(teacher, collate([r]), tau=1.0)[0].mean for r in general]
    assert margins.mean.value[0] == pytest.approx(np.mean(wanted))
    assert np.isfinite(margins.along.low).all()


def test_records_that_cannot_be_used_are_named(tmp_path):
    teacher, _, collate = family("internvl", tmp_path)
    records = toy_data.records(tmp_path, CAPABILITIES)
    words = Record((Message("user", "w9"), Message("assistant", "w7")), (), "planning", "plain")
    with pytest.raises(DataError, match="record 'plain' has no picture"):
        prestudy(teacher, [collate([words])])
    silent = collate(records[:1])
    silent["labels"].fill_(-100)
    with pytest.raises(DataError, match="record 'perception-0' has no answer"):
        prestudy(teacher, [silent])
    with pytest.raises(DataError, match="no record of question type 'planning'; there are perc"):
        prestudy(teacher, batches(collate, records[:2]))
    with pytest.raises(DataError, match="there are none of those asked for"):
        prestudy(teacher, [])
    packed = collate(records[:1])
    tokens = packed["tokens"]
    segments = torch.zeros_like(packed["input_ids"])
    packed["tokens"] = type(tokens)(tokens.is_vision, tokens.is_text, tokens.valid, segments)
    with pytest.raises(ValueError, match="packed"):
        prestudy(teacher, [packed])


def test_models_that_do_not_fit_are_refused(tmp_path):
    teacher, _, collate = family("internvl", tmp_path)
    records = toy_data.records(tmp_path, CAPABILITIES)
    with pytest.raises(TokenMismatchError, match="image_token_id"):
        other = toy_models.internvl(layers=2)
        other.config.image_token_id = 7
        prestudy(teacher, batches(collate, records), student=other)
    with pytest.raises(ValueError, match="holds 1 of 1 decoder layers"):
        prestudy(toy_models.internvl(layers=1), batches(collate, records))
    with pytest.raises(ValueError, match="resamples is 0"):
        prestudy(teacher, batches(collate, records), resamples=0)


# the command


@pytest.fixture
def recipe(tmp_path):
    """A recipe of two teachers, and records of the three capabilities."""
    file = write_recipe(tmp_path, ("sort", "fold"), layers=("0..-2", "0..-2"), max_steps=1)
    save_records(worded_alike(tmp_path, 27, seed=5), tmp_path / "driving.json")
    tree = yaml.safe_load(file.read_text())
    tree["teachers"] = {"small": tree["teachers"]["a"], "large": tree["teachers"]["b"]}
    signal = {"teacher": "large", "student_layers": "first", "teacher_layers": "first"}
    tree["distill"]["signals"] = [
        {"name": name, **signal, "region": "full", "teacher": teacher}
        for name, teacher in zip(CAPABILITIES, ("small", "large", "large"), strict=True)
    ]
    tree["data"]["train"] = str(tmp_path / "driving.json")
    file.write_text(yaml.safe_dump(tree))
    return file


def test_the_command_writes_a_report_and_signals_that_distill_takes(recipe, tmp_path, capsys):
    folder = tmp_path / "out"
    records = str(tmp_path / "driving.json")
    general = str(tmp_path / "train.json")
    arguments = ["prestudy", str(recipe), records, "--output", str(folder), "--device", "cpu"]
    assert main([*arguments, "--limit", "4", "--general", general]) == 0
    printed = capsys.readouterr().out
    for name in CAPABILITIES:
        assert re.search(rf"^{name} +(text_to_vision|full) ", printed, re.M)
    assert "not measurable" in printed  # of four pictures
    document = Document.from_json((folder / "prestudy.json").read_text())
    small, large = document.studies
    assert (small.num_layers, large.num_layers) == (3, 4)
    assert [each.capability for each in small.suggestions] == ["perception"]
    assert [each.capability for each in large.suggestions] == ["reasoning", "planning"]
    assert all(each.records == 4 for each in small.capabilities)
    assert small.student == str(tmp_path / "student") and small.num_student_layers == 2
    assert small.general["general"].records == 2
    assert small.settings["records"] == records and small.settings["limit"] == 4
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == 12 == len(list(folder.glob("*.png")))
    assert not re.search(r"https?:|<script|(src|href)=\"(?!data:)", page)
    text = (folder / "report.md").read_text()
    for name in re.findall(r"\]\((\S+\.png)\)", text):
        assert (folder / name).is_file()

    joined = tmp_path / "joined.yaml"
    joined.write_text(f"base: [{recipe.name}, out/signals.yaml]\n")
    taken = load_recipe(joined)
    assert [signal.name for signal in taken.distill.signals] == list(CAPABILITIES)
    assert [signal.teacher for signal in taken.distill.signals] == ["small", "large", "large"]
    assert taken.distill.signals[0].region == "text_to_vision"
    assert (distill(taken) / "config.json").is_file()


def test_the_command_takes_a_model_and_prints_json(tmp_path, capsys, recipe):
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(settings))
    records = str(tmp_path / "driving.json")
    arguments = ["prestudy", str(tmp_path / "a"), records, "--json", "--limit", "3"]
    arguments += ["--output", str(tmp_path / "out"), "--types", "planning", "reasoning"]
    assert main(arguments) == 0
    (study,) = Document.from_json(capsys.readouterr().out).studies
    assert [each.name for each in study.capabilities] == ["planning", "reasoning"]
    assert study.student == "" and study.num_student_layers == 0
    signals = yaml.safe_load((tmp_path / "out" / "signals.yaml").read_text())
    assert signals["teachers"] == {"teacher": str(tmp_path / "a")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml", "train.json"], "train.json has no record of question type 'perception'"),
        (["recipe.yaml", "gone.json"], "gone.json"),
        (["gone.yaml", "driving.json"], "gone.yaml"),
        (["./gone", "driving.json"], "teacher 'teacher': ./gone is not a folder"),
        (["a", "driving.json", "student=b"], "student=b changes a recipe, but a is a model"),
        (["recipe.yaml", "driving.json", "studnet=b"], "studnet"),
        (["recipe.yaml", "train.json", "--types", "sort"], "no signal and no teacher is named"),
        (["recipe.yaml", "driving.json", "--student", "./b/no"], "student: ./b/no is not a folder"),
        (["recipe.yaml", "driving.json", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["recipe.yaml", "words.json"], "record 'plain' has no picture"),
        (["recipe.yaml", "silent.json"], "training needs an answer"),
    ],
)
def test_errors_are_one_line_and_name_what_is_wrong(
    arguments, message, recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    records = worded_alike(tmp_path, 3, seed=6)
    plain = Record((Message("user", "w9"), Message("assistant", "w7")), (), "planning", "plain")
    save_records([*records[:2], plain], Path("words.json"))
    silent = Record(records[2].messages[:1], records[2].images, "planning", "silent")
    save_records([*records[:2], silent], Path("silent.json"))
    assert main(["prestudy", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("drivekd prestudy: error: ") and message in error


def test_records_of_new_pictures_are_taken_first(tmp_path):
    from drivekd.study.prestudy.recipe import Request, _sample

    messages = (Message("user", "<image> w9"), Message("assistant", "w7"))
    records = [Record(messages, (f"{i // 5}.png",), "planning", str(i)) for i in range(50)]
    request = Request(source="x", records=tmp_path, limit=12)
    chosen = _sample(records, request)
    assert len({record.images for record in chosen[:10]}) == 10 and len(chosen) == 12
    assert chosen == _sample(records, request)
    assert len(_sample(records, Request(source="x", records=tmp_path, limit=0))) == 50
