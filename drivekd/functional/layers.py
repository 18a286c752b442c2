"""The layers of one model as a public function takes them: checked, named in messages, cast."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drivekd import validation as check
from drivekd.tokens import TokenLayout


@dataclass(frozen=True)
class ModelLayers:
    """Checked layers of one model, cast for autocast."""

    queries: list[Tensor]
    keys: list[Tensor]
    scales: list[float]
    lses: list[Tensor | None]
    lse_names: list[str]  # what they are called in messages
    name: str  # what the first query is called in messages


@dataclass(frozen=True)
class LayerNames:
    """What one model's arguments are called in messages; {i} stands for the layer."""

    query: str
    key: str
    scale: str
    lse: str
    learns: bool

    def layers(
        self,
        queries: Sequence[object],
        keys: Sequence[object],
        scales: Sequence[object],
        lses: Sequence[object],
    ) -> ModelLayers:
        """Check every layer by itself and against the first."""
        result = ModelLayers([], [], [], [], [], self.query.format(i=0))
        for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
            query_name = self.query.format(i=i)
            q, k = check.check_query_key(query, key, query_name, self.key.format(i=i))
            if not self.learns:
                for name, tensor in ((query_name, q), (self.key.format(i=i), k)):
                    check.check_no_grad(name, tensor, "run the teacher under torch.no_grad()")
            if i > 0:
                check.check_same_tokens(q, result.queries[0], query_name, result.name)
            result.lse_names.append(self.lse.format(i=i))
            result.lses.append(check.check_lse(result.lse_names[i], lses[i], q))
            scale_name = self.scale.format(i=i)
            result.scales.append(check.check_scale(scale_name, scales[i], q.shape[-1]))
            result.queries.append(autocast(q))
            result.keys.append(autocast(k))
        return result


def listed_layers(
    model: str, layers: object, scales: object, lses: object, *, learns: bool
) -> ModelLayers:
    """The layers of the argument `<model>_layers`, with `scale_<model>` and `lse_<model>`."""
    queries, keys = check.check_pairs(f"{model}_layers", layers)
    names = LayerNames(
        f"{model}_layers[{{i}}][0]",
        f"{model}_layers[{{i}}][1]",
        f"scale_{model}" + ("[{i}]" if check.is_sequence(scales) else ""),
        f"lse_{model}[{{i}}]",
        learns=learns,
    )
    return names.layers(
        queries,
        keys,
        check.per_layer(f"scale_{model}", scales, len(queries)),
        check.per_layer(f"lse_{model}", lses, len(queries)),
    )


def check_layout(region: str, layout: TokenLayout | None) -> None:
    """Refuse the text-to-vision region without a layout."""
    if region == "text_to_vision" and layout is None:
        raise ValueError(
            "region is 'text_to_vision' but tokens is None; pass a TokenLayout, which says which "
            "tokens are text and which are vision"
        )


def autocast(tensor: Tensor) -> Tensor:
    """Cast as scaled_dot_product_attention does under autocast: all but float64."""
    kind = tensor.device.type
    # Not torch.amp.is_autocast_available, which torch 2.11 cannot compile.
    if tensor.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
