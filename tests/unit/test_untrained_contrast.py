"""Where the pre-study's threshold comes from: the committed measurement, and what it is made of."""

import json

import numpy as np
import pytest

from benchmarks.untrained_contrast import RESULTS, choose
from drivekd.data import Message, Record
from drivekd.study.prestudy.suggest import CLEAR, UNTRAINED


@pytest.fixture(scope="module")
def document():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_threshold_is_above_19_in_20_untrained_teachers(document):
    largest = np.array([row["largest"] for row in document["teachers"]])
    assert len(largest) >= 60
    assert np.quantile(largest, 0.95) == document["largest_of_19_in_20"]
    assert (largest < UNTRAINED).mean() >= 0.95
    assert document["largest_of_19_in_20"] > 0.9 * UNTRAINED  # nor higher than it need be


def test_the_largest_contrasts_are_those_of_the_layers(document):
    for row in document["teachers"]:
        layers = [
            v for regions in row["contrasts"].values() for own in regions.values() for v in own
        ]
        assert len(layers) == 2 * 2 * document["size"]["layers"]
        assert row["largest"] == max(layers)


def test_no_untrained_teacher_is_called_clear(document):
    said = [each for row in document["teachers"] for each in row["evidence"].values()]
    assert len(said) == 2 * len(document["teachers"]) and CLEAR not in said
    assert document["evidence"] == {each: said.count(each) for each in document["evidence"]}
    assert sum(document["evidence"].values()) == len(said)


def test_too_few_records_are_refused():
    words = (Message("user", "what is ahead?"), Message("assistant", "a car"))
    one = Record(id="1", question_type="perception", images=("a.png",), messages=words)
    with pytest.raises(ValueError, match="1 records of perception, wanted 2"):
        choose([one], 2, seed=0)
