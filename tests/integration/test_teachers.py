"""Teachers loaded in part: what is read, what it costs, and that nothing else changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from drivekd.capture import capture_attention
from drivekd.capture.model import FULL_DEPTH
from drivekd.train import load_model, load_teacher, loading_cost, truncate_teacher
from tests.helpers.maps import same_records
from tests.helpers.remote_code import InternVLChat, chat_inputs
from tests.helpers.toy_models import FAMILIES, image_inputs, internvl, qwen2, text_inputs
from tests.helpers.traces import run


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_bitwise_those_of_the_whole_model(family, checkpoint):
    whole, inputs = FAMILIES[family].model(layers=5), FAMILIES[family].inputs(padding="left")
    for spec, layers, held in (("first", [0], 1), ("penultimate", [-2], 4), ("0..-2", [0, 3], 4)):
        teacher = load_teacher(checkpoint(family), spec)
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not any("lm_head" in name for name, _ in teacher.named_parameters())
        expected = run(whole, inputs, layers)
        for stop in (False, True):
            got = run(teacher, inputs, layers, stop_after_last=stop)
            assert got.num_layers == 5
            assert got.layers == expected.layers
            assert same_records(got, expected, layers)
        with pytest.raises(ValueError, match=rf"layers \[4\] of 5 are not loaded.* first {held} "):
            capture_attention(teacher, [-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_needed_weights_are_read(family, checkpoint, read):
    teacher = load_teacher(checkpoint(family), "first")
    (source,) = read
    assert not [name for name in source.bytes_read if "layers.1." in name and "vision" not in name]
    assert not [name for name in source.bytes_read if "lm_head" in name]
    held = sum(p.numel() * p.element_size() for p in teacher.parameters())
    assert sum(source.bytes_read.values()) == held
    assert held < 0.65 * source.total_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_class_with_head_load_too(family, tmp_path):
    """As a plain state_dict has them; save_pretrained writes the names of older versions."""
    from safetensors.torch import save_file

    model, inputs = FAMILIES[family].model(layers=5), FAMILIES[family].inputs()
    model.config.save_pretrained(tmp_path)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    teacher = load_teacher(tmp_path, "penultimate")
    assert same_records(run(teacher, inputs, [-2]), run(model, inputs, [-2]), [-2])


def test_files_of_other_layers_need_not_exist(checkpoint, tmp_path):
    folder = tmp_path / "partial"
    shutil.copytree(checkpoint("internvl"), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if not _behind_first(name)}
    others = sorted(set(index.values()) - needed)
    assert len(others) >= 3
    (folder / others[0]).write_bytes(b"damaged")
    for file in others[1:]:
        (folder / file).unlink()
    inputs = image_inputs()
    got = run(load_teacher(folder, [0]), inputs, [0])
    assert same_records(got, run(internvl(layers=5), inputs, [0]), [0])
    with pytest.raises(OSError, match=r"is damaged|does not appear to have a file"):
        load_teacher(folder, "penultimate")


def _behind_first(name):
    return "language_model" in name and any(f"layers.{i}." in name for i in range(1, 5))


def test_a_lacking_weight_is_named(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "lacking"
    internvl(layers=3).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (gone,) = [n for n in weights if n.endswith("layers.0.self_attn.q_proj.weight")]
    weights.pop(gone)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \[.*layers\.0\.self_attn\.q_proj"):
        load_teacher(folder, "first")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_what_is_loaded_not_the_files_size(tmp_path, run_python):
    """Resident memory of a fresh process at its peak; the cast makes it read what it maps."""
    internvl(layers=24, hidden=512, heads=8, kv_heads=8).save_pretrained(tmp_path / "deep")
    internvl(layers=2).save_pretrained(tmp_path / "warm")
    size = sum(file.stat().st_size for file in (tmp_path / "deep").glob("*.safetensors"))
    code = f"""
import gc, pathlib
from drivekd.train import load_model, load_teacher
def kilobytes(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0])
load_model("{tmp_path}/warm", dtype="float64")
gc.collect()
for load in (lambda p: load_teacher(p, "first", dtype="float64"),
             lambda p: load_model(p, dtype="float64")):
    before = kilobytes("VmRSS")
    model = load("{tmp_path}/deep")
    print(kilobytes("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""
    (peak, held), (whole_peak, whole_held) = (
        map(int, line.split()) for line in run_python(code).splitlines()
    )
    assert size > 100e6
    assert whole_held == pytest.approx(2 * size, rel=0.01)
    assert whole_peak * 1024 > whole_held  # the meter sees what is loaded
    assert held < 0.15 * size
    # The weights, the file's pages that they came from, and what the process had taken before.
    assert peak * 1024 < 2 * held + 10e6


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_of_the_weights(checkpoint, dtype):
    teacher = load_teacher(checkpoint("internvl"), "first", dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in teacher.parameters()} == {wanted}


def test_auto_is_the_dtype_that_was_saved(tmp_path):
    qwen2(layers=2).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_teacher(tmp_path, 0).dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_teacher(tmp_path, 0).dtype == torch.bfloat16


def test_tied_embeddings_load_without_a_head(tmp_path):
    settings = qwen2(layers=3).config.to_dict() | {"tie_word_embeddings": True}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)).eval()
    model.save_pretrained(tmp_path)
    inputs = text_inputs()
    got = run(load_teacher(tmp_path, [1]), inputs, [1])
    assert same_records(got, run(model, inputs, [1]), [1])


def test_lists_of_layer_types_are_cut(tmp_path):
    model = qwen2(layers=4, sliding_window=5, first_sliding_layer=1)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, "penultimate")
    assert teacher.config.layer_types == model.config.layer_types[:3]
    inputs = text_inputs()
    got, expected = (run(each, inputs, [0, -2]) for each in (teacher, model))
    assert same_records(got, expected, [0, 2])
    assert [got[i].window for i in (0, 2)] == [None, 5]


def test_a_truncated_teacher_saved_again_still_knows_its_depth(checkpoint, tmp_path):
    load_teacher(checkpoint("internvl"), "penultimate").save_pretrained(tmp_path)
    again, inputs = load_teacher(tmp_path, "penultimate"), image_inputs()
    assert getattr(again.config.text_config, FULL_DEPTH) == 5
    expected = run(internvl(layers=5), inputs, [3])
    assert same_records(run(again, inputs, [-2]), expected, [3])
    with pytest.raises(ValueError, match=r"layer 4 of 5 is not in this checkpoint.* first 4 only"):
        load_teacher(tmp_path, "last")


def test_a_checkpoint_that_is_not_safetensors_is_read_whole_with_a_warning(tmp_path, caplog):
    model = qwen2(layers=3)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    teacher = load_teacher(tmp_path, "first")
    assert "not plain safetensors; its files are read whole" in caplog.text
    assert len(teacher.layers) == 1


@pytest.mark.parametrize(
    ("layers", "error", "match"),
    [
        (9, ValueError, "layer 9 does not exist in a model of 5"),
        ([], ValueError, "layers is empty"),
        ("middle", ValueError, "'middle'; wanted"),
        (1.5, TypeError, "wanted 'first'"),
    ],
)
def test_layers_that_make_no_sense(checkpoint, layers, error, match):
    with pytest.raises(error, match=match):
        load_teacher(checkpoint("qwen2"), layers)


def test_remote_code_is_refused_with_the_remedy(tmp_path):
    config = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.X"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"internvl_chat\).* ends in -hf\).*truncate_teacher"):
        load_teacher(tmp_path, "first")


def test_a_hub_name_reads_its_cached_files_and_asks_for_no_others(checkpoint, tmp_path, run_python):
    """As the hub's client lays its cache out, without a network, and without other files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--teacher"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(checkpoint("internvl"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    index = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if not _behind_first(name)}
    for file in set(index.values()) - needed:
        (snapshot / file).unlink()
    code = """
from drivekd.train import load_teacher, loading_cost
assert loading_cost("some/teacher", "first").layers == 1
teacher = load_teacher("some/teacher", "first", revision="main")
print(len(teacher.language_model.layers), teacher.config.name_or_path)
"""
    out = run_python(code, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert out.split() == ["1", "some/teacher"]


# --- teachers that are loaded already -----------------------------------------------------------


@pytest.mark.parametrize("make", [internvl, InternVLChat, qwen2])
def test_a_loaded_model_is_truncated_in_place(make):
    """Also InternVL's remote code, which load_teacher does not load."""
    inputs = text_inputs() if make is qwen2 else image_inputs(padding="left")
    inputs = chat_inputs(padding="left") if make is InternVLChat else inputs
    whole, teacher = make(layers=5, seed=1), make(layers=5, seed=1)
    before = sum(p.numel() for p in teacher.parameters())
    assert truncate_teacher(teacher, ["first", -3]) is teacher
    assert sum(p.numel() for p in teacher.parameters()) < before
    expected = run(whole, inputs, [0, -3])
    for stop in (False, True):
        got = run(teacher, inputs, [0, -3], stop_after_last=stop)
        assert got.num_layers == 5
        assert same_records(got, expected, [0, 2])
    with pytest.raises(ValueError, match=r"layers \[4\] of 5 are not loaded"):
        truncate_teacher(teacher, "last")
    truncate_teacher(teacher, 0)
    assert same_records(run(teacher, inputs, [-5]), expected, [0])


@pytest.mark.parametrize("model", [None, "folder", {}])
def test_what_is_no_model_is_not_truncated(model):
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}; wanted a torch.nn.M"):
        truncate_teacher(model, [0])


def test_an_fsdp_teacher_is_truncated_instead_of_stopped():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs = text_inputs()
    expected = run(qwen2(layers=5), inputs, [-2])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        teacher = truncate_teacher(qwen2(layers=5), "penultimate")
        mesh = init_device_mesh("cpu", (1,))
        for layer in teacher.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(teacher, mesh=mesh)
        with pytest.raises(NotImplementedError, match="load_teacher or truncate_teacher"):
            capture_attention(teacher, [-2], stop_after_last=True)
        got = run(teacher, inputs, [-2])
        assert got.num_layers == 5
        torch.testing.assert_close(got[-2].query, expected[3].query)
    finally:
        dist.destroy_process_group()


def test_an_adapter_alone_is_refused_with_the_remedy(checkpoint, tmp_path):
    """What peft saves of a tuned teacher holds no model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"))
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    match = r"adapter only.*model\.merge_and_unload\(\)\.save_pretrained"
    for load in (lambda p: load_teacher(p, "first"), load_model, lambda p: loading_cost(p, None)):
        with pytest.raises(ValueError, match=match):
            load(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "whole")
    teacher = load_teacher(tmp_path / "whole", "first")
    inputs = text_inputs()
    assert same_records(run(teacher, inputs, [0]), run(model, inputs, [0]), [0])
