"""What the trainer wants to know of a data set of records before it trains."""

from __future__ import annotations

from typing import Any


def has_text_alone(dataset: Any) -> bool:
    """Whether a data set has records without an image; False where it holds something else."""
    try:
        return any(not dataset[index].images for index in range(len(dataset)))
    except (TypeError, AttributeError):
        return False


def question_types_of(dataset: Any) -> set[str]:
    """The question types of a data set of records."""
    try:
        return {dataset[index].question_type for index in range(len(dataset))}
    except (TypeError, AttributeError) as error:
        raise TypeError(
            "the question types cannot be read from train_dataset, which is no sequence of "
            "drivekd.data.Record; pass question_types"
        ) from error
