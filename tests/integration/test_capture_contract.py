"""What capture_attention promises besides the numbers: arguments, records, and no trace left."""

import sys
import threading

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from drivekd.capture import capture_attention
from drivekd.capture.model import find_decoder
from drivekd.errors import CaptureError
from tests.helpers.toy_models import image_inputs, internvl, llama, qwen2, text_inputs
from tests.helpers.traces import run, traces

# --- layers and records -------------------------------------------------------------------------


def test_negative_and_duplicate_layers_are_one_record():
    captured = run(qwen2(), text_inputs(), [-2, 2, 0, 2])
    assert captured.layers == (0, 2)
    assert captured.num_layers == 4
    assert captured[-2] is captured[2]
    assert captured[-4] is captured[0]


@pytest.mark.parametrize("layers", [[4], [0, -5], [17, 1]])
def test_layers_that_do_not_exist_are_named_with_the_depth(layers):
    with pytest.raises(ValueError, match=r"layers \[.*\] do not exist: .*decoder has 4 layers"):
        capture_attention(qwen2(), layers)


@pytest.mark.parametrize("make", [qwen2, internvl])
def test_layers_that_were_taken_out_by_hand_do_not_shift_the_others(make):
    """The penultimate of five would become another's second without a word."""
    model = make(layers=5)
    decoder = find_decoder(model)
    inputs = text_inputs() if make is qwen2 else image_inputs()
    decoder.layers = decoder.layers[:3]
    with pytest.raises(
        ValueError, match=r"layers \[3\] of 5 are not loaded.*set num_hidden_layers"
    ):
        capture_attention(model, [-2])
    assert run(model, inputs, [1]).num_layers == 5
    decoder.config.num_hidden_layers = 3
    assert run(model, inputs, [-2]).layers == (1,)


@pytest.mark.parametrize("layers", [0, "0", [0.0], [True], [None], {0, 1}])
def test_layers_of_another_kind_are_a_type_error(layers):
    with pytest.raises(TypeError, match="layers must"):
        capture_attention(qwen2(), layers)


def test_no_layers_and_no_model_are_refused():
    with pytest.raises(ValueError, match="layers is empty"):
        capture_attention(qwen2(), [])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        capture_attention(lambda: None, [0])


def test_reading_a_layer_that_was_not_captured():
    captured = run(qwen2(), text_inputs(), [1])
    with pytest.raises(CaptureError, match=r"layer 0 was not captured: layers \[1\] of 4"):
        captured[0]
    with pytest.raises(CaptureError, match="layer 9 was not captured"):
        captured[9]
    with pytest.raises(TypeError, match="int, got str"):
        captured["1"]


def test_record_is_the_models_own_tensor():
    """A view with graph, not repeated over groups, with the model's scale."""
    model = qwen2(heads=4, kv_heads=2)
    with capture_attention(model, [1]) as captured:
        model(**text_inputs(), use_cache=False)
    record = captured[1]
    assert record.query.shape == (2, 4, 24, 16)
    assert record.key.shape == (2, 2, 24, 16)
    assert record.query.requires_grad
    assert record.key.requires_grad
    assert record.scale == 0.25
    assert record.lse is None
    assert record.window is None


def test_use_cache_without_packing_is_allowed():
    model, inputs = qwen2(), text_inputs(padding="left")
    plain = run(model, inputs)
    with torch.no_grad(), capture_attention(model, [0]) as captured:
        model(**inputs, use_cache=True, position_ids=torch.arange(24)[None])
    torch.testing.assert_close(captured[0].key[0], plain[0].key[0])


def test_a_new_forward_replaces_the_records():
    model = qwen2()
    first, second = text_inputs(seed=1), text_inputs(seed=2)
    with torch.no_grad(), capture_attention(model, [1]) as captured:
        model(**first)
        old = captured[1]
        model(**second)
    assert captured[1] is not old
    assert torch.equal(captured[1].query, run(model, second, [1])[1].query)
    assert captured.input_ids is second["input_ids"]


def test_input_ids_by_position_and_absent_with_embeddings():
    model, input_ids = qwen2(), text_inputs()["input_ids"]
    with torch.no_grad(), capture_attention(model, [0]) as captured:
        model(input_ids)
        assert captured.input_ids is input_ids
        model(inputs_embeds=model.get_input_embeddings()(input_ids))
        assert captured.input_ids is None


def test_select_takes_samples_and_lets_gradients_flow():
    model, inputs = qwen2(), text_inputs(batch=3)
    with capture_attention(model, [0, 2]) as captured:
        model(**inputs)
    rows = torch.tensor([2, 0])
    part = captured.select(rows)
    assert part.layers == captured.layers
    assert part.num_layers == 4
    assert torch.equal(part.input_ids, inputs["input_ids"][rows])
    assert captured.attention_mask is inputs["attention_mask"]
    assert torch.equal(part.attention_mask, inputs["attention_mask"][rows])
    for layer in (0, -2):
        assert torch.equal(part[layer].query, captured[layer].query[rows])
        assert torch.equal(part[layer].key, captured[layer].key[rows])
        assert part[layer].scale == captured[layer].scale
    assert torch.equal(part.select([1])[0].query, captured[0].query[:1])
    assert part.select([])[0].query.shape == (0, 4, 24, 16)
    grad = torch.autograd.grad((part[2].query * 3.0).sum(), captured[2].query)[0]
    assert torch.equal(grad, torch.tensor([3.0, 0.0, 3.0])[:, None, None, None].expand_as(grad))


def test_select_refuses_masks_and_matrices():
    captured = run(qwen2(), text_inputs())
    with pytest.raises(TypeError, match="sample indices"):
        captured.select(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="rows has shape"):
        captured.select(torch.zeros(1, 1, dtype=torch.int64))
    for rows, error in (([5], ValueError), ([-1], ValueError), (None, TypeError), ("a", TypeError)):
        with pytest.raises(error, match="rows"):
            captured.select(rows)


# --- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_leaving_leaves_no_trace(implementation):
    model, inputs = internvl(), image_inputs()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        model(**inputs)  # transformers notes a thing or two on a model's first forward
    before = traces(model)
    with torch.no_grad(), capture_attention(model, [0, -1]):
        assert traces(model) != before
        model(**inputs)
        towers = [m for name, m in model.named_modules() if "vision_tower" in name]
        assert len(towers) > 10
        assert not any("_drivekd_tap" in module.__dict__ for module in towers)
    assert traces(model) == before


def test_no_trace_when_an_exception_passes_through():
    model = qwen2()
    before = traces(model)

    def fail(*_):
        raise ZeroDivisionError("in layer 1")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), capture_attention(model, [0, 3]) as captured:
        model(**text_inputs())
    handle.remove()
    assert traces(model) == before
    assert captured[0].query.shape == (2, 4, 24, 16)
    run(model, text_inputs(), [0, 3])


def test_a_failed_forward_does_not_spoil_the_next_one_in_the_same_with():
    model, inputs = qwen2(), text_inputs()
    with torch.no_grad(), capture_attention(model, [0, 3]) as captured:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 24), 10**6))
        model(**inputs)
    assert torch.equal(captured[3].query, run(model, inputs, [3])[3].query)


def test_leaving_without_a_record_raises():
    model = qwen2()
    before = traces(model)
    capture = capture_attention(model, [0, 2])
    match = r"layers \[0, 2\] of 4 gave no record: call the model"
    with pytest.raises(CaptureError, match=match), capture:
        pass
    assert traces(model) == before


def test_calling_another_model_gives_no_record():
    model, other = qwen2(), qwen2(seed=1)
    with pytest.raises(CaptureError, match="gave no record"), capture_attention(model, [0]):
        other(**text_inputs())


def test_a_layer_called_by_hand_gives_no_record():
    model = qwen2()
    hidden = torch.randn(1, 5, 64)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with pytest.raises(CaptureError, match="gave no record"), capture_attention(model, [0]):
        model.model.layers[0](hidden, position_embeddings=rotary)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_captures_of_several_models_close_in_any_order(order, implementation):
    student, teacher, inputs = qwen2(), llama(layers=5, seed=3), text_inputs()
    for model in (student, teacher):
        model.set_attn_implementation(implementation)
    alone = [run(student, inputs, [0, 1])[1], run(teacher, inputs, [2])[2]]
    before = traces(student, teacher)
    captures = [
        capture_attention(student, [1]),
        capture_attention(teacher, [2], stop_after_last=True),
        capture_attention(student, [0]),
    ]
    with torch.no_grad():
        for capture in captures:
            capture.__enter__()
        assert teacher(**inputs) is None
        assert student(**inputs) is not None
        for index in order:
            captures[index].__exit__(None, None, None)
        assert traces(student, teacher) == before
    assert torch.equal(captures[0][1].query, alone[0].query)
    assert torch.equal(captures[1][2].query, alone[1].query)
    assert captures[2].layers == (0,)
    assert captures[2][0].query.shape == (2, 4, 24, 16)


def test_one_capture_can_be_opened_again_but_not_twice_at_once():
    model, inputs = qwen2(), text_inputs()
    capture = capture_attention(model, [0])
    before = traces(model)
    with torch.no_grad():
        with capture:
            model(**inputs)
            with pytest.raises(CaptureError, match="open already"):
                capture.__enter__()
        with capture:
            model(**inputs)
    assert traces(model) == before


def test_something_registered_over_the_wrapper_stays():
    model, inputs = qwen2(), text_inputs()
    original = AttentionInterface._global_mapping["sdpa"]
    calls = []
    try:
        with torch.no_grad(), capture_attention(model, [0]):
            wrapper = AttentionInterface._global_mapping["sdpa"]

            def theirs(*args, **kwargs):
                calls.append(1)
                return wrapper(*args, **kwargs)

            AttentionInterface.register("sdpa", theirs)
            model(**inputs)
        assert AttentionInterface._global_mapping["sdpa"] is theirs
        run(model, inputs)
        assert len(calls) == 8
        assert AttentionInterface._global_mapping["sdpa"] is theirs
    finally:
        AttentionInterface.register("sdpa", original)


# --- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_threads_that_share_a_model_get_the_records_of_their_own_forwards(implementation):
    """And are stopped, or not, each by itself: as with one teacher behind several loaders."""
    model = internvl()
    model.set_attn_implementation(implementation)
    batches = [image_inputs(seed=seed) for seed in range(4)]
    expected = [run(model, inputs, [0, 2]) for inputs in batches]
    before = traces(model)
    barrier, faults = threading.Barrier(5), []

    def work(index):
        stops = bool(index % 2)
        try:
            for _ in range(4):
                barrier.wait()
                with (
                    torch.no_grad(),
                    capture_attention(model, [0, 2], stop_after_last=stops) as captured,
                ):
                    assert (model(**batches[index], use_cache=False) is None) == stops
                assert captured.input_ids is batches[index]["input_ids"]
                for layer in (0, 2):
                    assert torch.equal(captured[layer].query, expected[index][layer].query)
        except BaseException as error:
            faults.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(4):  # this thread captures nothing, and is never stopped
            barrier.wait()
            assert model(**batches[0]).logits.shape == (2, 24, 320)
    for thread in threads:
        thread.join()
    assert faults == []
    assert traces(model) == before


def test_a_forward_in_another_thread_is_not_the_captures():
    model = qwen2()
    match = "in the thread that opened it"
    with pytest.raises(CaptureError, match=match), capture_attention(model, [0]):
        thread = threading.Thread(target=model, kwargs=text_inputs())
        thread.start()
        thread.join()


# --- exceptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("place", "stops"),
    [("vision", True), ("before", False), ("before", True), ("inside", True), ("after", False)],
)
def test_an_exception_anywhere_leaves_no_trace(implementation, place, stops):
    """In the vision tower, in a layer before, in the attention of a wanted one, and behind it."""
    model, inputs = internvl(), image_inputs(padding="left")
    model.set_attn_implementation(implementation)
    decoder = model.model.language_model
    part = {
        "vision": model.model.vision_tower.encoder.layer[0],
        "before": decoder.layers[0].mlp,
        "inside": decoder.layers[2].self_attn.k_proj,
        "after": decoder.layers[2].mlp,
    }[place]

    def fail(*_):
        raise ZeroDivisionError(place)

    before = traces(model)
    handle = part.register_forward_pre_hook(fail)
    with torch.no_grad(), capture_attention(model, [1]) as outer:
        during = traces(model)
        with (
            pytest.raises(ZeroDivisionError, match=place),
            capture_attention(model, [1, 2], stop_after_last=stops),
        ):
            model(**inputs, use_cache=False)
        assert traces(model) == during
        handle.remove()
        model(**inputs, use_cache=False)
    assert traces(model) == before
    assert torch.equal(outer[1].query, run(model, inputs, [1])[1].query)


# --- imports ------------------------------------------------------------------------------------


def test_import_needs_torch_alone(run_python):
    run_python("import sys, drivekd.capture; assert 'transformers' not in sys.modules")


def test_missing_transformers_is_named_with_the_remedy(monkeypatch):
    model = qwen2()
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", None)
    with pytest.raises(CaptureError, match=r"pip install 'transformers>=5\.17'"):
        capture_attention(model, [0])
