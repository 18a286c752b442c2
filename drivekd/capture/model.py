"""Finding the language model's decoder layers, and refusing what a token layout cannot express."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from drivekd.capture.registry import forward_code
from drivekd.errors import CaptureError

# Of a decoder or its config: the depth of the whole model, of which a truncated one is a part.
FULL_DEPTH = "drivekd_num_layers"

_PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SELF_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
# Families whose image tokens see each other in both directions whenever token types are passed.
_BIDIRECTIONAL_FAMILIES = {"paligemma", "gemma3", "pi0", "deepseek_ocr2"}
_UNSUPPORTED_WRAPPERS = {
    "DataParallel": "use DistributedDataParallel, one process per device",
    "DeepSpeedEngine": "hand in a model that is not wrapped by DeepSpeed",
}


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel, FSDP and PEFT wrappers."""
    while True:
        names = _class_names(model)
        for name, remedy in _UNSUPPORTED_WRAPPERS.items():
            if name in names:
                raise NotImplementedError(f"model is a {name}, which cannot be captured: {remedy}")
        if isinstance(inner := model._modules.get("_orig_mod"), nn.Module) or (
            names & {"DistributedDataParallel", "FullyShardedDataParallel"}
            and isinstance(inner := getattr(model, "module", None), nn.Module)
        ):
            model = inner
        elif callable(get_base_model := getattr(model, "get_base_model", None)):
            base: nn.Module = get_base_model()
            model = base
        else:
            return model


def _is_decoder(module: Any) -> bool:
    return (
        isinstance(module, nn.Module)
        and isinstance(getattr(module, "layers", None), nn.ModuleList)
        and len(module.layers) > 0  # type: ignore[arg-type]
        and isinstance(getattr(module, "embed_tokens", None), nn.Module)
    )


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    layers = decoder.layers
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"decoder.layers must be a ModuleList, got {type(layers).__name__}")
    return layers


def decoder_depth(decoder: nn.Module) -> int:
    """Number of layers of the whole model's decoder, also where only the first ones are loaded.

    Where layers were taken out by hand the config still says how many there were; or else -2 would
    quietly be another layer.
    """
    held = len(decoder_layers(decoder))
    config = getattr(decoder, "config", None)
    places = ((decoder, FULL_DEPTH), (config, FULL_DEPTH), (config, "num_hidden_layers"))
    depths = (getattr(place, name, None) for place, name in places)
    whole = next((depth for depth in depths if isinstance(depth, int)), held)
    return max(held, whole)


def find_decoder(model: nn.Module) -> nn.Module:
    """The text decoder of `model`: the module that holds `embed_tokens` and the `layers`."""
    base: Any = unwrap(model)
    seen: set[int] = set()
    candidate = base
    while callable(getattr(candidate, "get_decoder", None)) and id(candidate) not in seen:
        seen.add(id(candidate))
        candidate = unwrap(candidate.get_decoder())
    decoder: nn.Module
    if _is_decoder(candidate):
        decoder = candidate
        return decoder
    found = {name: module for name, module in base.named_modules() if _is_decoder(module)}
    if len(found) == 1:
        (decoder,) = found.values()
        return decoder
    kind = type(base).__name__
    if not found:
        raise CaptureError(
            f"model ({kind}) holds no text decoder, that is a transformers module with "
            "`embed_tokens` and a ModuleList `layers`; hand in the language model itself"
        )
    raise CaptureError(
        f"model ({kind}) holds {len(found)} text decoders: {', '.join(sorted(found))}; "
        "hand in the one that is meant"
    )


def path_to(model: nn.Module, target: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of everything from `model` down to `target`, both included."""
    for name, module in model.named_modules():
        if module is target:
            parts = name.split(".") if name else []
            names = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
            return [(prefix, model.get_submodule(prefix)) for prefix in names]
    raise CaptureError(f"{type(target).__name__} is not part of {type(model).__name__}")


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Sorted, unique, non-negative indices; complains by name about what does not fit `depth`."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of ints, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers is empty; name at least one decoder layer")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers must hold ints, got {layer!r} ({type(layer).__name__})")
    bad = [layer for layer in layers if not -depth <= layer < depth]
    if bad:
        raise ValueError(
            f"layers {bad} do not exist: the model's decoder has {depth} layers "
            f"({-depth} .. {depth - 1})"
        )
    return tuple(sorted({layer % depth for layer in layers}))


def check_loaded(decoder: nn.Module, layers: Sequence[int]) -> None:
    """Complain about layers of the whole model that a truncated one does not hold."""
    held = len(decoder_layers(decoder))
    absent = [layer for layer in layers if layer >= held]
    if absent:
        raise ValueError(
            f"layers {absent} of {decoder_depth(decoder)} are not loaded: this model holds the "
            f"first {held} only; name all wanted layers in drivekd.train.load_teacher, or, where "
            f"these {held} are the whole model, set num_hidden_layers of its config"
        )


def _dispatching_modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The submodules of a decoder layer that look their attention function up by name."""
    for name, module in layer.named_modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation is None:
            continue
        names, _ = forward_code(type(module))
        if "ALL_ATTENTION_FUNCTIONS" in names or "AttentionInterface" in names:
            yield name, module


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    return (
        "CrossAttention" in type(module).__name__
        or "cross" in name
        or name.endswith("encoder_attn")
        or bool(getattr(module, "is_cross_attention", False))
    )


def attention_module(decoder: nn.Module, index: int) -> nn.Module:
    """The self-attention of decoder layer `index`."""
    layer_types = getattr(getattr(decoder, "config", None), "layer_types", None)
    if layer_types is not None and layer_types[index] not in _PLAIN_LAYER_TYPES:
        raise NotImplementedError(
            f"layer {index} is of type {layer_types[index]!r}; only softmax attention over all "
            f"earlier tokens or a sliding window can be captured ({sorted(_PLAIN_LAYER_TYPES)})"
        )
    layer = decoder_layers(decoder)[index]
    found = dict(_dispatching_modules(layer))
    own = {name: m for name, m in found.items() if not _is_cross_attention(name, m)}
    if not own and found:
        raise NotImplementedError(
            f"layer {index} ({type(layer).__name__}) has cross-attention only, whose map is not "
            "over the text tokens; choose a self-attention layer"
        )
    preferred = [name for name in _SELF_ATTENTION_NAMES if name in own]
    if preferred:
        return own[preferred[0]]
    if len(own) == 1:
        return next(iter(own.values()))
    raise CaptureError(
        f"layer {index} ({type(layer).__name__}) has {len(own)} self-attention modules that go "
        f"through transformers' attention registry {sorted(own)}, one is needed; remote code that "
        "calls its attention function directly cannot be captured: use transformers' own class"
    )


def check_supported(path: list[tuple[str, nn.Module]]) -> None:
    """Refuse models whose maps need more than causal, window, padding and segments."""
    for _, module in path:
        config = getattr(module, "config", None)
        family = getattr(config, "model_type", None)
        text_config = getattr(config, "text_config", None)
        if family in _BIDIRECTIONAL_FAMILIES or any(
            getattr(part, "use_bidirectional_attention", None) for part in (config, text_config)
        ):
            raise NotImplementedError(
                f"model family {family!r} lets image tokens (or all tokens) attend in both "
                "directions; attention maps are captured for causal attention only"
            )
        if (getattr(module, "_tp_size", None) or 1) > 1:
            raise NotImplementedError(
                "model is tensor-parallel: each rank holds some heads only and a mean over heads "
                "would be wrong; use data parallelism or FSDP"
            )


def check_can_stop(model: nn.Module) -> None:
    """An early stop skips the hooks by which FSDP gives its shards back."""
    for name, module in model.named_modules():
        if _class_names(module) & {"FSDPModule", "FullyShardedDataParallel"}:
            raise NotImplementedError(
                f"stop_after_last=True with FSDP (module {name!r}): the stop would skip its "
                "post-forward hooks; leave out what lies behind the wanted layers with "
                "drivekd.train.load_teacher or truncate_teacher, and do not stop the forward"
            )
