"""A stopped forward: same tensors, None returned, nothing left behind; and captures in wrappers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from drivekd.capture import capture_attention
from tests.helpers.toy_models import FAMILIES, image_inputs, internvl, qwen2, text_inputs
from tests.helpers.traces import Container, run, traces


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[0], [-2], [0, 1, 2]])
@pytest.mark.parametrize("family", FAMILIES)
def test_stopped_records_are_bitwise_those_of_a_whole_forward(family, layers):
    model = FAMILIES[family].model()
    inputs = FAMILIES[family].inputs(padding="left")
    whole = run(model, inputs, layers)
    before = traces(model)
    reached = []
    with torch.no_grad(), capture_attention(model, layers, stop_after_last=True) as captured:
        assert model(**inputs, use_cache=False) is None
        reached.append("the statement after the call")
    assert reached
    assert captured.layers == whole.layers
    for layer in captured.layers:
        assert torch.equal(captured[layer].query, whole[layer].query)
        assert torch.equal(captured[layer].key, whole[layer].key)
    assert captured.input_ids is inputs["input_ids"]
    assert traces(model) == before


def test_layers_after_the_last_wanted_one_do_not_run():
    model = qwen2()
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad(), capture_attention(model, [1], stop_after_last=True):
        model(**text_inputs())
    assert ran == [0]


def test_later_forwards_are_clean_after_a_stop():
    """Hidden-state recording, autocast, grad mode and the cache are as before."""
    model, inputs = internvl(), image_inputs(padding="right")
    expected = logits(model, inputs)
    with capture_attention(model, [1], stop_after_last=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(**inputs, output_hidden_states=True)
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(logits(model, inputs), expected)
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert output.logits.requires_grad


def test_stop_is_not_swallowed_by_model_code_that_catches_exceptions():
    class Careful(Container):
        def forward(self, input_ids):
            try:
                return super().forward(input_ids)
            except Exception:
                return "recovered"

    model = Careful(qwen2())
    with torch.no_grad(), capture_attention(model, [0], stop_after_last=True):
        assert model(text_inputs()["input_ids"]) is None


def test_container_that_uses_the_language_models_output_is_stopped_as_a_whole():
    model = Container(qwen2())
    with torch.no_grad(), capture_attention(model, [2], stop_after_last=True) as captured:
        assert model(text_inputs()["input_ids"]) is None
    assert captured[2].query.shape == (2, 4, 24, 16)


def test_two_captures_of_one_model_stop_when_both_can():
    model, inputs = qwen2(), text_inputs()
    with torch.no_grad(), capture_attention(model, [2], stop_after_last=True) as outer:
        with capture_attention(model, [0]) as inner:
            assert model(**inputs).logits.shape == (2, 24, 320)
        with capture_attention(model, [0], stop_after_last=True) as first:
            assert model(**inputs) is None
        assert torch.equal(outer[2].query, run(model, inputs, [2])[2].query)
    assert torch.equal(inner[0].query, first[0].query)


def test_stop_with_grad_keeps_the_graph():
    model, inputs = qwen2(), text_inputs()
    weight = model.model.layers[1].self_attn.q_proj.weight
    grads = []
    for stop in (False, True):
        with capture_attention(model, [1], stop_after_last=stop) as captured:
            model(**inputs)
        grads.append(torch.autograd.grad(captured[1].query.square().sum() * 0.3, weight)[0])
    assert torch.equal(*grads)


def test_offloaded_weights_are_put_away_after_a_stop():
    """Hooks of accelerate that a stop cuts short leave no weights on the device."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, inputs = qwen2(), text_inputs()
    expected = logits(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    # One hook for a whole layer, as for modules that are loaded together: the stop is inside it.
    layer, weights = model.model.layers[1], qwen2().model.layers[1].state_dict()
    for module in layer.modules():
        module.__dict__.pop("_hf_hook", None)
        if (forward := module.__dict__.pop("_old_forward", None)) is not None:
            module.forward = forward
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
    add_hook_to_module(layer, hook)
    before = traces(model)
    with torch.no_grad(), capture_attention(model, [1], stop_after_last=True) as captured:
        assert model(**inputs) is None
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert traces(model)[0] == before[0]
    assert torch.equal(captured[1].query, run(qwen2(), inputs, [1])[1].query)
    torch.testing.assert_close(logits(model, inputs), expected)


# --- wrappers -----------------------------------------------------------------------------------


@pytest.fixture
def lora():
    from peft import LoraConfig, get_peft_model

    def attach(model):
        torch.manual_seed(5)
        targets = r".*language_model.*\.(q_proj|v_proj)"
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return get_peft_model(model, config)

    return attach


def test_lora_before_and_after(lora):
    """Attached inside the `with` or before it, the adapters get the same gradient."""
    inputs = image_inputs(padding="left")
    grads = []
    for attached_first in (True, False):
        model = internvl()
        if attached_first:
            model = lora(model)
        with capture_attention(model, [0, 2]) as captured:
            if not attached_first:
                model = lora(model)
            model(**inputs)
        loss = sum(captured[i].query.square().mean() + captured[i].key.sum() for i in (0, 2))
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        grads.append({n: g for n, g in zip(trainable, found, strict=True) if g is not None})
    first, second = grads
    assert first.keys() == second.keys()
    # A and B of the queries of layers 0, 1, 2 and of the values of layers 0, 1.
    assert len(first) == 10
    assert all("lora_" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(grad.abs().max() > 0 for grad in first.values())


def test_stop_through_a_peft_model(lora):
    model, inputs = lora(internvl()), image_inputs()
    before = traces(model)
    whole = run(model, inputs, [1])
    with torch.no_grad(), capture_attention(model, [1], stop_after_last=True) as captured:
        assert model(**inputs) is None
    assert torch.equal(captured[1].query, whole[1].query)
    assert captured.input_ids is inputs["input_ids"]
    assert traces(model) == before


def compile_whole(model):
    return torch.compile(model, backend="aot_eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


# A mask made beforehand: tracing the code that makes it takes longer than all the rest.
COMPILED_INPUTS = {
    "input_ids": text_inputs()["input_ids"],
    "attention_mask": torch.ones(24, 24, dtype=torch.bool).tril().expand(2, 1, 24, 24),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_layers])
def test_compiled_models(compiled):
    torch._dynamo.reset()
    plain = qwen2(layers=2).train()

    def gradients(model):
        with capture_attention(model, [1]) as captured:
            output = model(**COMPILED_INPUTS, use_cache=False)
        loss = captured[1].query.square().mean() * captured[1].key.square().mean()
        loss = loss + 0.1 * output.logits.square().mean()
        return torch.autograd.grad(loss, list(plain.parameters()))

    expected = gradients(plain)
    model = compiled(plain)
    for _ in range(2):
        for got, grad in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(got, grad, atol=1e-6, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
def test_compiled_model_is_stopped():
    torch._dynamo.reset()
    plain = qwen2(layers=2)
    expected = run(plain, COMPILED_INPUTS, [0])
    model = torch.compile(plain, backend="eager")
    with torch.no_grad(), capture_attention(model, [0], stop_after_last=True) as captured:
        for _ in range(2):
            assert model(**COMPILED_INPUTS, use_cache=False) is None
    torch.testing.assert_close(captured[0].query, expected[0].query, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
def test_compiling_with_fullgraph_is_refused_with_the_reason():
    torch._dynamo.reset()
    model = torch.compile(qwen2(layers=2), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"drivekd\.capture_attention"):
        run(model, text_inputs())
    torch._dynamo.reset()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(one_process):
    inputs = text_inputs()
    model = nn.parallel.DistributedDataParallel(qwen2())
    with capture_attention(model, [1]) as captured:
        output = model(**inputs, labels=inputs["input_ids"])
    (output.loss + captured[1].query.square().mean()).backward()
    weight = model.module.model.layers[1].self_attn.q_proj.weight
    assert weight.grad.abs().max() > 0
    with torch.no_grad(), capture_attention(model, [1], stop_after_last=True) as stopped:
        assert model(**inputs) is None
    assert torch.equal(stopped[1].query, captured[1].query)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_fsdp_is_captured_but_not_stopped(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs = text_inputs()
    expected = run(qwen2(), inputs, [1])
    model = qwen2()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(NotImplementedError, match="stop_after_last=True with FSDP"):
        capture_attention(model, [1], stop_after_last=True)
    captured = run(model, inputs, [1])
    torch.testing.assert_close(captured[1].query, expected[1].query)


def test_a_deepspeed_engine_is_refused():
    class DeepSpeedEngine(nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="DeepSpeedEngine, which cannot be captured"):
        capture_attention(DeepSpeedEngine(), [0])
