"""Accuracy, its error and the majority baseline."""

import json
import math

import pytest

from drivekd.data.records import Message, Record
from drivekd.driving.scoring import read_choice, score
from drivekd.errors import DataError


def _record(qid="count", label="A", capability="perception", options=("zero", "one"), **meta):
    return Record(
        (Message("user", "how many?"), Message("assistant", f"Final: {label}")),
        ("a.png",),
        capability,
        id="r",
        meta={"qid": qid, "label": label, "options": list(options), **meta},
    )


def _public(question, answer, capability="reasoning"):
    return Record((Message("user", question), Message("assistant", answer)), (), capability)


def test_counts_by_question_capability_and_in_total():
    records = [_record(), _record(), _record("lead", "B", "reasoning"), _record("far", "B")]
    scores = score(records, ["Final: A. zero", "one", "the answer is B", "no idea"])
    assert {q: (t.count, t.correct, t.unparsable) for q, t in scores.by_question.items()} == {
        "count": (2, 1, 0),
        "lead": (1, 1, 0),
        "far": (1, 0, 1),
    }
    assert {c: (t.count, t.correct) for c, t in scores.by_capability.items()} == {
        "perception": (3, 1),
        "reasoning": (1, 1),
    }
    assert (scores.total.count, scores.total.correct, scores.total.unparsable) == (4, 2, 1)
    assert scores.total.accuracy == 0.5
    assert scores.total.standard_error == pytest.approx(math.sqrt(0.5 * 0.5 / 4))
    assert scores.by_question["lead"].standard_error == 0.0
    assert scores.total.majority is None


def test_majority_comes_from_the_reference_and_not_from_the_scored_records():
    reference = [_record(label="A")] * 3 + [_record(label="B")] * 2 + [_record("lead", "B")]
    records = [_record(label="A"), *[_record(label="B")] * 3, _record("lead", "B")]
    scores = score(records, [""] * 5, reference=reference)
    assert scores.by_question["count"].majority == 0.25
    assert scores.by_question["lead"].majority == 1.0
    assert scores.total.majority == 0.4
    assert scores.total.unparsable == 5


def test_a_tie_in_the_reference_is_the_first_letter():
    reference = [_record(label="B"), _record(label="A")]
    assert score([_record(label="A")], ["A"], reference=reference).total.majority == 1.0


def test_options_and_answer_are_read_from_public_texts():
    question = (
        "<image>\nWhat is the moving status of object <c1,CAM_FRONT,0.4,0.5>? Please select: "
        "A. Going ahead. B. Turn left. C. Stopped."
    )
    record = _public(question, "Final: {C. Stopped.} Object: car. Evidence: a red light.")
    assert read_choice(record) == (("Going ahead", "Turn left", "Stopped"), "C")
    scores = score([record], ["The car is stopped."])
    assert scores.by_question["reasoning"].correct == 1


@pytest.mark.parametrize(
    "question",
    [
        "Which? (A) yes (B) no",
        "Which?\nA) yes\nB) no",
        "Which? A. yes, B. no.",
        "Which? A. yes; B. no",
        "<image>\nWhich? A. yes B. no\n",
    ],
)
def test_listed_options_are_read_in_the_usual_forms(question):
    assert read_choice(_public(question, "B")) == (("yes", "no"), "B")


def test_an_open_question_is_refused_by_name():
    with pytest.raises(DataError, match="record at 1 lists no options"):
        score([_record(), _public("What matters here?", "The van.")], ["A", "B"])


def test_a_record_without_readable_answer_is_refused():
    with pytest.raises(DataError, match="no right answer"):
        score([_public("Which? A. yes B. no", "maybe")], ["A"])
    with pytest.raises(DataError, match="record r has no right answer"):
        score([_record(label="C")], ["A"])


def test_rejects_unequal_lengths_nothing_and_an_unknown_question():
    with pytest.raises(ValueError, match="2 entries for 1 records"):
        score([_record()], ["A", "B"])
    with pytest.raises(ValueError, match="empty"):
        score([], [])
    with pytest.raises(ValueError, match="'lead'"):
        score([_record("lead")], ["A"], reference=[_record()])


def test_scores_are_json():
    values = json.loads(json.dumps(score([_record()], ["A"], reference=[_record()]).to_dict()))
    assert values["total"] == {
        "count": 1,
        "correct": 1,
        "unparsable": 0,
        "majority": 1.0,
        "accuracy": 1.0,
        "standard_error": 0.0,
    }
    assert set(values["by_question"]) == {"count"}
    assert set(values["by_capability"]) == {"perception"}


def test_generated_answers_score_full_marks():
    pytest.importorskip("highway_env")
    from drivekd.driving.dataset import _records
    from drivekd.driving.world import simulate_scene

    records = [r for f in range(5) for r in _records(simulate_scene(0, "t", f), "t", f, "t.png")]
    scores = score(records, [r.answer for r in records], reference=records)
    assert scores.total.accuracy == 1.0
    # The texts alone give the same options and letters as the meta data.
    for record in records:
        bare = Record(record.messages, record.images, record.question_type)
        assert read_choice(bare) == read_choice(record)
