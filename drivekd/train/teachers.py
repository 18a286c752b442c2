"""Teachers that hold no more than their signals need."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from drivekd.capture.model import (
    FULL_DEPTH,
    check_loaded,
    decoder_depth,
    decoder_layers,
    find_decoder,
)
from drivekd.pairing import resolve_layers
from drivekd.train.config import LayerSpec
from drivekd.train.weights import Checkpoint

_LOG = logging.getLogger(__name__)


def load_teacher(
    path: str | Path,
    layers: LayerSpec | Sequence[LayerSpec],
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | int = "cpu",
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> Any:
    """Load the part of a teacher that attention maps of some layers need.

    That is its vision tower, embeddings and decoder layers up to the deepest one wanted; the
    layers behind it and the language-model head are never made and their weights never read (whole
    files stay unopened, and unfetched, where the checkpoint has several). Queries and keys of its
    layers are those of the whole model, bit for bit.

    The model remembers the whole depth: layer -2 is the penultimate one of the whole model for
    `drivekd.capture_attention`, also after `save_pretrained` and loading it again.

    Args:
        path: Folder or hub name, as for `from_pretrained`; weights in safetensors, others are read
            whole, with a warning.
        layers: The layers whose maps are wanted: "first", "penultimate", "last", an int, a range
            such as "0..-2", or a sequence of these.
        dtype: "auto" (as saved), or a dtype or its name, such as "bfloat16".
        device: Where the weights go.
        attn_implementation: Attention implementation; None is transformers' own choice.
        revision: Branch, tag or commit of a hub name.

    Returns:
        The model without head, in eval mode, without gradients.

    Raises:
        TypeError: `layers` is of another kind.
        ValueError: A layer does not exist, or the checkpoint lacks a weight that is needed.
        OSError: There is no such checkpoint, or a file with a needed weight is missing or damaged.

    Example:
        >>> teacher = load_teacher("OpenGVLab/InternVL3-8B-hf", "first",
        ...     dtype="bfloat16")  # doctest: +SKIP
    """
    config = read_config(path, revision=revision)
    truncated = truncate_config(config, deepest_layer(config, layers) + 1)
    model_class = base_class(truncated)
    checkpoint = None if is_quantized(config) else _open_checkpoint(path, revision)
    if checkpoint is None:
        _LOG.warning("%s is not plain safetensors; its files are read whole", path)
        model, report = model_class.from_pretrained(
            path,
            revision=revision,
            config=truncated,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=None if torch.device(device).type == "cpu" else {"": device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        check_complete(path, model_class, report)
        return model.eval().requires_grad_(False)
    with checkpoint:
        model = from_checkpoint(
            model_class,
            checkpoint,
            truncated,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
        )
    return model.eval().requires_grad_(False)


def from_checkpoint(
    model_class: Any,
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: str | torch.dtype,
    device: torch.device | str | int,
    attn_implementation: str | None = None,
) -> Any:
    """Make a model of a class and config; transformers picks and reads the tensors that it has.

    Raises:
        ValueError: The checkpoint lacks a weight.
        OSError: A file is missing or damaged.
    """
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or _saved_dtype(checkpoint)
    with _without_load_report():
        model, report = model_class.from_pretrained(
            None,
            state_dict=_state_dict(model_class, checkpoint, config),
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=None if torch.device(device).type == "cpu" else {"": device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_complete(checkpoint.path, model_class, report)
    model.config.name_or_path = checkpoint.path
    return model


def _state_dict(model_class: Any, checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """The tensors under names that transformers knows for this class.

    Transformers renames what older versions saved. Of some families it does not know today's names
    under the prefix of the class with head when the class without head is loaded; such names are
    the class' own behind the prefix.
    """
    tensors = checkpoint.state_dict()
    with torch.device("meta"):
        wanted = set(model_class(config).state_dict())
    prefix = f"{model_class.base_model_prefix}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if wanted <= set(own) and not wanted <= set(tensors):
        return {name: own[name] for name in wanted}
    return tensors


def check_complete(path: str | Path, model_class: Any, report: dict[str, Any]) -> None:
    """Raise unless all weights were there, in the shapes that the config wants.

    Args:
        path: The checkpoint, for the message.
        model_class: What was loaded.
        report: The loading info of `from_pretrained(..., ignore_mismatched_sizes=True)`.

    Raises:
        ValueError: A weight would stay at its random start.
    """
    if report["missing_keys"]:
        raise ValueError(
            f"{path} lacks the weights {sorted(report['missing_keys'])[:5]} of "
            f"{model_class.__name__}"
        )
    if report["mismatched_keys"]:
        name, saved, wanted = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"{path} does not fit its config: {name} is saved with shape {tuple(saved)}, "
            f"{model_class.__name__} with this config has {tuple(wanted)} "
            f"({len(report['mismatched_keys'])} such weights)"
        )


def truncate_teacher(model: nn.Module, layers: LayerSpec | Sequence[LayerSpec]) -> nn.Module:
    """Take the layers behind the deepest one wanted out of a model that is loaded already.

    For models that `load_teacher` cannot load, such as remote code, and where a forward may not be
    stopped half way, such as FSDP (truncate before wrapping). In place; the weights are freed, and
    what the model gives out (hidden states, logits, answers) is of no use any more. As after
    `load_teacher`, -2 stays the whole model's penultimate layer for `drivekd.capture_attention`.

    Args:
        model: What `drivekd.capture_attention` takes.
        layers: As for `load_teacher`.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module, or `layers` is of another kind.
        ValueError: A layer does not exist, or has been taken out before.
        drivekd.errors.CaptureError: `model` holds no text decoder, or several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; wanted a torch.nn.Module")
    decoder = find_decoder(model)
    depth = decoder_depth(decoder)
    deepest = _deepest(layers, depth)
    check_loaded(decoder, [deepest])
    decoder.layers = nn.ModuleList(list(decoder_layers(decoder))[: deepest + 1])
    setattr(decoder, FULL_DEPTH, depth)
    return model


def share_equal_weights(models: Iterable[nn.Module]) -> int:
    """Let frozen models keep one copy of every tensor that they have in common.

    Teachers tuned from one model, their vision tower frozen, have it and often their embeddings in
    common. Tensors of one name, shape, dtype, device and value become one; models that require
    grad are left alone.

    Args:
        models: Models whose weights will not change.

    Returns:
        Bytes that are free now.
    """
    kept: dict[tuple[Any, ...], list[Tensor]] = {}
    freed = 0
    for model in dict.fromkeys(models):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or parameter.device.type == "meta":
                continue
            key = (name, parameter.shape, parameter.dtype, parameter.device)
            candidates = kept.setdefault(key, [])
            same = next((each for each in candidates if _is_equal(each, parameter)), None)
            if same is None:
                candidates.append(parameter.data)
            elif same.data_ptr() != parameter.data_ptr():
                freed += parameter.numel() * parameter.element_size()
                parameter.data = same
    return freed


def _is_equal(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def read_config(
    path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Any:
    """The config of a checkpoint that transformers' own classes can load.

    Raises:
        ValueError: The checkpoint is of remote code, or an adapter without its model, or its
            config is no JSON object.
        OSError: There is no such checkpoint.
    """
    is_local = Path(path).is_absolute() or str(path).startswith(".") or Path(path).is_file()
    if is_local and not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is not a folder of a saved model")
    options = {"revision": revision, "local_files_only": local_files_only}
    try:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(path, **options)
    except OSError as error:
        raw = {}
        if not _has_adapter(path, options):
            if Path(path).exists():
                raise
            raise OSError(
                f"{path} is no folder here, and no model of that name can be read from the hub or "
                f"its cache: {error}"
            ) from error
    except TypeError as error:  # transformers takes it for an object
        raise ValueError(f"{path} has a config.json that holds no JSON object") from error
    if "model_type" not in raw and _has_adapter(path, options):
        raise ValueError(
            f"{path} holds an adapter only, not the model that it belongs to; merge it first: "
            "load both with peft (AutoPeftModelForCausalLM, or PeftModel.from_pretrained on the "
            "loaded model), then model.merge_and_unload().save_pretrained(FOLDER)"
        )
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{path} is remote code ({raw.get('model_type')}), which is not loaded here; take the "
            "checkpoint in transformers' own format (for InternVL3 the one whose name ends in "
            "-hf). In a loop of your own, load the model yourself: drivekd.capture_attention takes "
            "it and stops it early, drivekd.train.truncate_teacher cuts a teacher down"
        )
    return transformers.AutoConfig.from_pretrained(path, **options)


def _has_adapter(path: str | Path, options: dict[str, Any]) -> bool:
    """Whether a checkpoint is what peft saves: weights beside those of a model elsewhere."""
    found = cached_file(
        str(path),
        "adapter_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )
    return found is not None


def num_layers(config: Any) -> int:
    """Depth of the whole model's text decoder."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, FULL_DEPTH, None) or text.num_hidden_layers)


def deepest_layer(config: Any, layers: LayerSpec | Sequence[LayerSpec]) -> int:
    """Index of the deepest of the layers named.

    Raises:
        TypeError: `layers` is of another kind.
        ValueError: A layer does not exist.
    """
    depth = num_layers(config)
    deepest = _deepest(layers, depth)
    held = int(config.get_text_config(decoder=True).num_hidden_layers)
    if deepest >= held:
        raise ValueError(
            f"layer {deepest} of {depth} is not in this checkpoint, which holds the first {held} "
            "only; load the whole model's checkpoint"
        )
    return deepest


def _deepest(layers: LayerSpec | Sequence[LayerSpec], depth: int) -> int:
    is_list = isinstance(layers, Sequence) and not isinstance(layers, str)
    specs = list(layers) if is_list else [layers]  # type: ignore[arg-type]
    if not specs:
        raise ValueError("layers is empty; name at least one layer of the teacher")
    return max(max(resolve_layers(spec, depth)) for spec in specs)  # type: ignore[arg-type]


def truncate_config(config: Any, count: int) -> Any:
    """A copy of a config whose decoder has the first `count` layers and knows its whole depth."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    depth, held = num_layers(config), int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        # layer_types, mlp_layer_types, no_rope_layers and their kind have one entry a layer.
        if "layer" in name and isinstance(value, list | tuple) and len(value) == held:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    setattr(text, FULL_DEPTH, depth)
    return config


def base_class(config: Any) -> Any:
    """Transformers' class for this config without a language-model head.

    Raises:
        ValueError: There is none.
    """
    mapping = transformers.AutoModel._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"transformers has no model without head for {type(config).__name__}")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def head_class(config: Any) -> Any:
    """Transformers' class for this config with its language-model head.

    Raises:
        ValueError: There is none.
    """
    image_text = transformers.AutoModelForImageTextToText._model_mapping
    mapping = image_text if type(config) in image_text else None
    mapping = mapping or transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"transformers has no language model for {type(config).__name__}")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint's weights are quantised."""
    return getattr(config, "quantization_config", None) is not None


def _open_checkpoint(path: str | Path, revision: str | None) -> Checkpoint | None:
    try:
        return Checkpoint(path, revision=revision)
    except FileNotFoundError:
        return None


def _saved_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating tensor."""
    floating = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for tensor in checkpoint.state_dict().values():
        if (name := tensor.get_dtype()) in floating:
            return floating[name]
    return torch.float32


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from listing the weights that are left out on purpose."""

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)
