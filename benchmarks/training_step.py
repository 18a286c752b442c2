"""One multi-teacher training step of InternVLs with random weights, in several ways.

Four tasks: cross-entropy, perception, reasoning and planning, with three teachers. The public code
keeps three models for them; here one frozen model plays all three parts, for every way, and is run
once for each. Optimiser and data loading, the same for all, are left out: a step ends with the
update in `.grad`.

- `drivekd`: losses from captured queries and keys, teachers that stop after their last layer, and
  `GradientProjector`; the models run on sdpa.
- `plain`: what no such step can do without, and nothing else: the student's forward and
  cross-entropy, the teachers as far as `drivekd` runs them, and K backward passes, each from as
  deep as its task reaches. No capture, no attention loss, no projection; gradients of
  capabilities are thrown away.
- `plain-ce`: the same with K backward passes of the cross-entropy, all through the whole student.
- `public`: the public procedure. The language models run on eager attention and return every map
  (the vision towers, which need none, stay on sdpa), losses are made from the maps, and gradients
  are copied, weighted and projected list by list with reads back to the host.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.baselines.public_losses import PUBLIC_LOSSES
from benchmarks.baselines.public_projection import public_projection
from benchmarks.shapes import Decoder, Step, Tower
from drivekd.capture import capture_attention
from drivekd.losses import AttentionMapLoss
from drivekd.projection import GradientProjector
from drivekd.tokens import TokenLayout
from tests.helpers.gradients import relative_error

CE, CAPABILITIES = "ce", tuple(PUBLIC_LOSSES)
TASKS = (CE, *CAPABILITIES)
SEED = 0
# Standard deviation of attention scores: random weights of the usual size give nearly even maps.
SCORE_DEVIATION = 2.0

Gradients = list[Tensor | None]


def internvl(
    decoder: Decoder,
    tower: Tower,
    *,
    image_token: int,
    device: str,
    dtype: torch.dtype,
    seed: int,
) -> transformers.PreTrainedModel:
    """`InternVLForConditionalGeneration` of these shapes, made on the device."""
    config = transformers.InternVLConfig(
        vision_config={
            "num_hidden_layers": tower.layers,
            "hidden_size": tower.width,
            "num_attention_heads": tower.heads,
            "intermediate_size": tower.inner,
            "image_size": (tower.picture, tower.picture),
            "patch_size": (14, 14),
        },
        text_config={
            "model_type": "qwen2",
            "num_hidden_layers": decoder.layers,
            "hidden_size": decoder.width,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "intermediate_size": decoder.inner,
            "vocab_size": decoder.vocabulary,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": decoder.tied,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        image_token_id=image_token,
        image_seq_length=tower.tokens,
        tie_word_embeddings=decoder.tied,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    deviation = (SCORE_DEVIATION / decoder.width) ** 0.5
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.normal_(std=deviation)
            layer.self_attn.k_proj.weight.normal_(std=deviation)
    return model


class TrainingStep:
    """Models and one sample, and the step in every way.

    Every way takes no argument and returns the losses it knows, detached; the update is in the
    `.grad` of `parameters` until `clear`.
    """

    def __init__(self, shape: Step, *, device: str, dtype: torch.dtype) -> None:
        make = {"image_token": shape.image_token, "device": device, "dtype": dtype}
        self.student = internvl(shape.student, shape.tower, **make, seed=1).train()
        self.teacher = internvl(shape.teacher, shape.tower, **make, seed=2).eval()
        self.teacher.requires_grad_(False)
        self.parameters = [each for each in self.student.parameters() if each.requires_grad]
        self.weights = dict.fromkeys(TASKS, 1.0)

        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(6, 290, (1, shape.num_tokens), generator=generator)
        ids[:, : shape.num_tokens - shape.text] = shape.image_token
        size = (shape.views, 3, shape.tower.picture, shape.tower.picture)
        batch = {"input_ids": ids, "pixel_values": torch.randn(size, generator=generator)}
        tokens = TokenLayout.from_batch(batch, self.student.config)  # a collator does this
        self.tokens = tokens.to(device)
        self.is_image = tokens.is_vision[0].to(device)
        self.labels = ids.masked_fill(tokens.is_vision, -100).to(device)
        self.batch = {
            "input_ids": ids.to(device),
            "pixel_values": batch["pixel_values"].to(device, dtype),
            "use_cache": False,
        }

        own, other = (list(range(each.layers - 1)) for each in (shape.student, shape.teacher))
        self.losses = {
            "perception": _loss([0], [0], "text_to_vision"),
            "reasoning": _loss(own, other, "full"),
            "planning": _loss(own[-1:], other[-1:], "text_to_vision"),
        }
        self.projector = GradientProjector(self.parameters, missing="official", seed=SEED)
        self.ways = {
            "drivekd": self.drivekd,
            "plain": self.plain,
            "plain-ce": self.plain_ce,
            "public": self.public,
        }

    def clear(self) -> None:
        """Forget the update."""
        for parameter in self.parameters:
            parameter.grad = None

    # ---- drivekd

    def drivekd_losses(self) -> dict[str, Tensor]:
        """All four, with graph."""
        self._use("sdpa")
        targets = {}
        for name, loss in self.losses.items():
            with (
                torch.no_grad(),
                capture_attention(self.teacher, loss.teacher_layers, stop_after_last=True) as each,
            ):
                self.teacher(**self.batch)
            targets[name] = each
        self._mark("teachers")
        with capture_attention(self.student, self.losses["reasoning"].student_layers) as own:
            losses = {CE: self.student(**self.batch, labels=self.labels).loss}
        self._mark("student")
        for name, loss in self.losses.items():
            losses[name] = loss(own, targets[name], self.tokens)
        self._mark("losses")
        return losses

    def drivekd(self) -> list[Tensor]:
        losses = self.drivekd_losses()
        self.projector.backward(losses, weights=self.weights)
        self._mark("gradients and projection")
        return [loss.detach() for loss in losses.values()]

    # ---- the public procedure

    def public_losses(self) -> dict[str, Tensor]:
        """All four, with graph; at most the maps of two teachers are alive, as there."""
        self._use("eager")
        student = self.student(**self.batch, labels=self.labels, output_attentions=True)
        self._mark("student")
        losses = {CE: student.loss}
        for name, loss in PUBLIC_LOSSES.items():
            with torch.no_grad():
                teacher = self.teacher(**self.batch, output_attentions=True)
            losses[name] = loss(student.attentions, teacher.attentions, self.is_image)
        self._mark("teachers and losses")
        return losses

    def public(self, order: Sequence[int] | None = None) -> list[Tensor]:
        losses = self.public_losses()
        grads = list(self.public_gradients(losses).values())
        self._mark("gradients")
        update = public_projection(grads, [self.weights[name] for name in losses], order=order)
        for parameter, grad in zip(self.parameters, update, strict=True):
            parameter.grad = grad
        self._mark("projection")
        return [loss.detach() for loss in losses.values()]

    def public_gradients(self, losses: Mapping[str, Tensor]) -> dict[str, Gradients]:
        """Copies of what each backward leaves in `.grad`."""
        grads = {}
        for number, (name, loss) in enumerate(losses.items(), start=1):
            self.clear()
            loss.backward(retain_graph=number < len(losses))
            grads[name] = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        self.clear()
        return grads

    # ---- the lower bounds

    def plain(self) -> list[Tensor]:
        self._plain_teachers()
        student = self.student(**self.batch, labels=self.labels, output_hidden_states=True)
        self._mark("student")
        for loss in self.losses.values():
            hidden = student.hidden_states[loss.student_layers[-1]]
            self._differentiate(hidden, torch.ones_like(hidden))
        student.loss.backward()
        self._mark("gradients")
        return [student.loss.detach()]

    def plain_ce(self) -> list[Tensor]:
        self._plain_teachers()
        loss = self.student(**self.batch, labels=self.labels).loss
        self._mark("student")
        for _ in self.losses:
            self._differentiate(loss, None)
        loss.backward()
        self._mark("gradients")
        return [loss.detach()]

    def _differentiate(self, output: Tensor, seed: Tensor | None) -> None:
        torch.autograd.grad(output, self.parameters, seed, retain_graph=True, allow_unused=True)

    def _plain_teachers(self) -> None:
        self._use("sdpa")
        layers = self.teacher.model.language_model.layers
        for loss in self.losses.values():
            attention = layers[loss.teacher_layers[-1]].self_attn
            cut = attention.register_forward_pre_hook(_cut)
            with contextlib.suppress(_CutError), torch.no_grad():
                self.teacher(**self.batch)
            cut.remove()
        self._mark("teachers")

    # ---- where the time goes

    def phases(self, way: str) -> dict[str, float]:
        """Milliseconds of the parts of one step; the device is waited for between them."""
        found: dict[str, float] = {}
        begin = self._now()

        def mark(name: str) -> None:
            nonlocal begin
            end = self._now()
            found[name], begin = 1e3 * (end - begin), end

        self._mark = mark
        try:
            self.ways[way]()
        finally:
            del self._mark
        self.clear()
        return found

    def _mark(self, name: str) -> None:
        """The end of a part; nobody asks."""

    def _now(self) -> float:
        if self.is_image.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _use(self, attention: str) -> None:
        for model in (self.student, self.teacher):
            model.model.language_model.set_attn_implementation(attention)

    # ---- agreement

    def balance(self, share: float) -> None:
        """Set weights by which each capability's gradient is `share` of cross-entropy's."""
        report = self.projector.backward(self.drivekd_losses())
        norms = dict(zip(report.names, report.norms.tolist(), strict=True))
        self.weights = {CE: 1.0, **{name: share * norms[CE] / norms[name] for name in CAPABILITIES}}
        self.clear()

    def agreement(self) -> dict[str, Any]:
        """How far `drivekd` is from `public`: losses, each task's gradients, and the update."""
        losses, gradients = {}, {}
        for way, make in (("ours", self.drivekd_losses), ("public", self.public_losses)):
            found = make()
            losses[way] = {name: float(loss.detach()) for name, loss in found.items()}
            gradients[way] = self.public_gradients(found)
            del found
        pairs = {name: (gradients["ours"][name], gradients["public"][name]) for name in TASKS}
        facts: dict[str, Any] = {
            "loss_errors": {
                name: abs(losses["ours"][name] / losses["public"][name] - 1) for name in TASKS
            },
            "gradient_cosines": {name: _cosine(*pair) for name, pair in pairs.items()},
        }
        pairs.clear()
        gradients.clear()

        self.projector = GradientProjector(self.parameters, missing="official", seed=SEED)
        order = torch.randperm(len(CAPABILITIES), generator=torch.Generator().manual_seed(SEED))
        self.drivekd()
        ours = [parameter.grad for parameter in self.parameters]
        self.clear()
        self.public([1 + place for place in order.tolist()])
        public = [parameter.grad for parameter in self.parameters]
        self.clear()
        return facts | {
            "update_cosine": _cosine(ours, public),
            "update_error": relative_error(ours, public),
        }


class _CutError(Exception):
    """Ends a teacher's forward where nobody needs the rest."""


def _cut(*_: object) -> None:
    raise _CutError


def _loss(student: list[int], teacher: list[int], region: str) -> AttentionMapLoss:
    return AttentionMapLoss(student_layers=student, teacher_layers=teacher, region=region)


def _present(a: Gradients, b: Gradients) -> list[tuple[Tensor, Tensor]]:
    """Pairs of gradients; both sides must lack the same."""
    assert [x is None for x in a] == [y is None for y in b]
    return [
        (x.flatten(), y.flatten())
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    ]


def _inner(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    return float(sum((x.float() * y.float()).sum(dtype=torch.float64) for x, y in pairs))


def _cosine(a: Gradients, b: Gradients) -> float:
    pairs = _present(a, b)
    squares = _inner([(x, x) for x, _ in pairs]) * _inner([(y, y) for _, y in pairs])
    return _inner(pairs) / max(squares, 1e-300) ** 0.5
