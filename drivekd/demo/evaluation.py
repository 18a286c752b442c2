"""Tallies of a model's generated answers, by capability and kind of question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from drivekd.data import Record
from drivekd.demo.settings import CAPABILITIES
from drivekd.driving import score
from drivekd.driving.scoring import Tally as Scored
from drivekd.study.evaluate import generate_answers
from drivekd.study.schema import Tallies
from drivekd.study.statistics import Tally

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

    from drivekd.demo.models import CachedEncoder

BATCH_SIZES = {"cpu": 128, "cuda": 1024}  # a GPU is bound by launches, not by prompts
ANSWER_TOKENS = 6  # "Final : C. unsafe ahead <end>" is the longest answer


def tally_answers(
    model: InternVLForConditionalGeneration,
    encoder: CachedEncoder,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
) -> Tallies:
    """Generate an answer to every record greedily, read the choice from the text, and count."""
    batch_size = BATCH_SIZES[model.device.type]
    answers = generate_answers(
        model, encoder, tokenizer, records, batch_size=batch_size, max_new_tokens=ANSWER_TOKENS
    )
    by_question = score(records, answers).by_question
    return _by_capability(records, {q: _plain(t) for q, t in by_question.items()})


def tally_majority(records: Sequence[Record], reference: Iterable[Record]) -> Tallies:
    """Tallies of always giving the reference's most frequent answer to a question."""
    scored = score(records, [""] * len(records), reference=reference).by_question
    counts = {q: Tally(round((t.majority or 0.0) * t.count), t.count) for q, t in scored.items()}
    return _by_capability(records, counts)


def _plain(scored: Scored) -> Tally:
    return Tally(scored.correct, scored.count)


def _by_capability(records: Sequence[Record], by_question: dict[str, Tally]) -> Tallies:
    owner = {str(record.meta["qid"]): record.question_type for record in records}
    return {
        capability: {q: by_question[q] for q, c in sorted(owner.items()) if c == capability}
        for capability in CAPABILITIES
    }
