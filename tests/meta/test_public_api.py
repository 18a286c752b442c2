"""The public surface: changing it means changing this snapshot and CHANGELOG.md together."""

import inspect

import drivekd
import drivekd.functional

NAMES = {
    "AttentionMapLoss",
    "BackendUnavailableError",
    "BalancedWeights",
    "CaptureError",
    "DataError",
    "GradientProjector",
    "OnlineWeights",
    "ProjectionReport",
    "RecipeError",
    "StaticWeights",
    "TokenLayout",
    "TokenMismatchError",
    "__version__",
    "agp_weights",
    "backend_info",
    "capture_attention",
    "functional",
    "match_layer_groups",
    "pcgrad_weights",
}

# positional parameters | keyword-only parameters
SIGNATURES = {
    "functional.attention_map": "q k tokens | causal window scale backend",
    "functional.attention_map_loss": (
        "q_student k_student q_teacher k_teacher tokens | region loss denominator causal window "
        "sample_weight scale_student scale_teacher lse_student lse_teacher backend"
    ),
    "functional.layerwise_attention_map_loss": (
        "student_layers teacher_layers groups tokens | reduction region loss denominator causal "
        "window sample_weight scale_student scale_teacher lse_student lse_teacher backend"
    ),
    "functional.attention_map_targets": (
        "teacher_layers groups tokens | region top_k dtype causal window scale_teacher lse_teacher "
        "backend"
    ),
    "functional.attention_map_target_loss": (
        "q_student k_student target tokens | loss denominator causal sample_weight scale_student "
        "lse_student backend"
    ),
    "functional.layerwise_attention_map_target_loss": (
        "student_layers targets tokens | reduction loss denominator causal sample_weight "
        "scale_student lse_student backend"
    ),
    "functional.AttentionMapTarget.stack": "samples | num_tokens starts",
    "functional.gradient_gram": "task_grads | backend",
    "functional.combine_gradients": "task_grads weights | out accumulate backend",
    "match_layer_groups": "num_student num_teacher |",
    "agp_weights": "gram | anchor order missing ce_multiplicity",
    "pcgrad_weights": "gram | order",
    "capture_attention": "model layers | stop_after_last",
    "backend_info": "|",
    "GradientProjector": (
        "parameters | method anchor missing ce_multiplicity seed every max_norm process_group"
    ),
    "GradientProjector.backward": "self losses | weights scaler scale",
    "AttentionMapLoss": "| student_layers teacher_layers region loss denominator groups",
    "AttentionMapLoss.forward": (
        "self student_capture teacher_capture tokens sample_weight | reduction"
    ),
    "TokenLayout.from_masks": "is_vision | is_text valid segment_ids",
    "TokenLayout.from_batch": "batch config |",
    "TokenLayout.to": "self device non_blocking |",
}


def described(thing) -> str:
    parameters = inspect.signature(thing).parameters.values()
    keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return " ".join([*positional, "|", *keyword])


def test_names():
    assert set(drivekd.__all__) == NAMES
    assert all(hasattr(drivekd, name) for name in NAMES)


def test_signatures():
    found = {}
    for path in SIGNATURES:
        thing = drivekd
        for part in path.split("."):
            thing = getattr(thing, part)
        found[path] = described(thing)
    assert found == SIGNATURES


def test_every_public_thing_is_documented():
    for name in sorted(NAMES - {"__version__"}):
        text = inspect.getdoc(getattr(drivekd, name))
        assert text, name
        assert len(text.splitlines()[0]) <= 100, name
