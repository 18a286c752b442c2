"""Reading choices out of answers, as a table: every row is a form that answers take."""

import time

import pytest

from drivekd.driving.extraction import extract_choice

STATUS = ["going ahead", "turning left", "turning right", "stopped"]
ACTION = ["accelerate", "keep speed", "brake", "change left", "change right"]
YES_NO = ["yes", "no"]
SAFE = ["safe", "unsafe ahead", "unsafe behind"]
COUNT = ["zero", "one", "two", "three", "four or more"]
NINE = [f"object {number}" for number in range(1, 9)] + ["object nine"]

DECLARED = [
    ("Final: C. turning right", STATUS, "C"),
    ("Final: {A. going ahead}", STATUS, "A"),
    ("Final: {A. Going ahead.} Object: <c1,CAM_FRONT,0.4,0.5> Support: a car.", STATUS, "A"),
    ("Final : C . turning right", STATUS, "C"),
    ("final answer: b", STATUS, "B"),
    ("Final answer is (d).", STATUS, "D"),
    ("Target: car. Action: slow. Final: C. brake", ACTION, "C"),
    ("The answer is C, because a car is turning.", STATUS, "C"),
    ("The answer is: Option B.", STATUS, "B"),
    ("The correct answer is option (b)", STATUS, "B"),
    ("The correct option is D", STATUS, "D"),
    ("The answer to the question is D.", STATUS, "D"),
    ("Answer: **B**", STATUS, "B"),
    ("**Answer:** B. turning left", STATUS, "B"),
    ('{"answer": "C"}', STATUS, "C"),
    ("<answer>D</answer>", STATUS, "D"),
    ("\\boxed{B}", STATUS, "B"),
    ("$\\boxed{B}$", STATUS, "B"),
    ("<think>Maybe A. Or B.</think> Final: D", STATUS, "D"),
    ("\uff21nswer\uff1a\uff22", STATUS, "B"),
    ("The answer is A because the road is clear.", STATUS, "A"),
    ("The answer is a.", STATUS, "A"),
    ("The answer is a", STATUS, "A"),
    ("Final: A going ahead", STATUS, "A"),
    ("Final: A", STATUS, "A"),
    ("The answer is stopped.", STATUS, "D"),
    ("The answer is the left lane change: change left", ["hold", "change left"], "B"),
    ("Final: going  ahead", STATUS, "A"),
    ("The answer is yes.", YES_NO, "A"),
    ("Final: no", YES_NO, "B"),
    ("Answer: E. four or more", COUNT, "E"),
    ("answer: four or more", COUNT, "E"),
    # The last declaration counts.
    ("The answer is B. Looking again, the answer is D.", STATUS, "D"),
    ("Final: B. No, wait. Final: C.", STATUS, "C"),
    ("Final answer: C. The answer is based on the front camera.", STATUS, "C"),
    ("A. going ahead is what I thought, but the final answer is B.", STATUS, "B"),
    # What follows the marker counts before what led to it.
    ("It could be A. Final: I think it is (C)", STATUS, "C"),
    ("The answer is not A but C.", STATUS, "C"),
    # Declared, but contradictory or outside the options.
    ("The answer is A or B.", STATUS, None),
    ("The answer is A and C", STATUS, None),
    ("Final: A, B", STATUS, None),
    ("Final: B. stopped", STATUS, None),
    ("Final: F. flying", STATUS, None),
    ("The answer is Z.", STATUS, None),
    ("The answer is a car.", STATUS, None),
    ("The answer is A car.", STATUS, None),
    ("Final: A vehicle is ahead", STATUS, None),
    ("The answer is not A.", STATUS, None),
    ("The answer isn't B", STATUS, None),
    ("The answer is unknown", STATUS, None),
]
PREFERRED = [
    ("I would choose D here.", STATUS, "D"),
    ("I'd go with option b.", STATUS, "B"),
    ("We select (C)", STATUS, "C"),
    ("My choice is B.", STATUS, "B"),
    ("I choose A lane on the left", STATUS, None),
    ("A car is ahead, so B", ACTION, "B"),
    ("A car is ahead, so B.", ACTION, "B"),
    ("The lane is blocked, therefore brake.", ACTION, "C"),
    ("No gap => D", ACTION, "D"),
    ("Nothing ahead, so A.", ACTION, "A"),
    ("Both A and B look fine, so it is B.", ACTION, "B"),
    ("It is clear, so A car may pass", ACTION, None),
    ("It is near, so I brake.", ACTION, "C"),
    ("A truck is there, so yes", YES_NO, "A"),
]
LEADING = [
    ("C", STATUS, "C"),
    ("c", STATUS, "C"),
    ("a", STATUS, "A"),
    ("A", STATUS, "A"),
    ("(b)", STATUS, "B"),
    ("(a)", STATUS, "A"),
    ("b)", STATUS, "B"),
    ("[D]", STATUS, "D"),
    ("{A. going ahead}", STATUS, "A"),
    ("A. going ahead", STATUS, "A"),
    ("a. going ahead", STATUS, "A"),
    ("A) going ahead", STATUS, "A"),
    ("D: stopped", STATUS, "D"),
    ("D - stopped", STATUS, "D"),
    ("**D.** stopped", STATUS, "D"),
    ("- B. turning left", STATUS, "B"),
    ("### C", STATUS, "C"),
    ("C. turning right, because option A would need a clear lane.", STATUS, "C"),
    ("The van slows.\nD. stopped", STATUS, "D"),
    ("Option D", STATUS, "D"),
    ("option d", STATUS, "D"),
    ("Option (d)", STATUS, "D"),
    ("Yes, a car is there.", YES_NO, "A"),
    ("Yes there is a car", YES_NO, "A"),
    ("No, there is nothing.", YES_NO, "B"),
    ("No there is not", YES_NO, "B"),
    ("NO", YES_NO, "B"),
    ("**Yes**", YES_NO, "A"),
    ("I", NINE, "I"),
    ("I. object nine", NINE, "I"),
    ("A. going ahead\nB. turning left", STATUS, None),
    ("A. stopped", STATUS, None),
    ("E. reversing", STATUS, None),
    ("e", STATUS, None),
]
RUNNING = [
    ("I can see a black sedan. D. stopped", STATUS, "D"),
    ("I can see a black sedan . D . stopped", STATUS, "D"),
    ("It looks like C to me", STATUS, "C"),
    ("It must be (c) here", STATUS, "C"),
    ("Here option A is right", STATUS, "A"),
    ("Clearly option D, since it stands.", STATUS, "D"),
    ("Not A. It is D.", STATUS, "D"),
    ("A is wrong, D fits", STATUS, "D"),
    ("It is C rather than B.", STATUS, "C"),
    ("Either B or C fits.", STATUS, None),
    ("Either A or C fits.", STATUS, None),
    ("A or C", STATUS, None),
    ("A/B", STATUS, None),
    ("The vehicle(s) in view", STATUS, None),
    ("The car in lane B waits", STATUS, None),
    ("Camera A. sees it", STATUS, None),
    ("The B-pillar hides it", STATUS, None),
    ("It happened at 8 a.m. today", STATUS, None),
    ("A car is ahead.", STATUS, None),
    ("a car", STATUS, None),
    ("I see a bus", NINE, None),
    ("There is a car. A bus follows. I see a van.", STATUS, None),
    ("D.C. plates", STATUS, None),
    ("It is a C class car.", STATUS, None),
    ("Option A is incorrect. Option B is correct.", STATUS, "B"),
    ("C<|im_end|>", STATUS, "C"),
]
PHRASES = [
    ("going ahead", STATUS, "A"),
    ("Going ahead.", STATUS, "A"),
    ("The car is going ahead", STATUS, "A"),
    ("A car is turning left.", STATUS, "B"),
    ("It is not going ahead, it is stopped.", STATUS, "D"),
    ("It isn't stopped", STATUS, None),
    ("stopped or going ahead", STATUS, None),
    ("It is safe", SAFE, "A"),
    ("unsafe behind", SAFE, "C"),
    ("It is not safe", SAFE, None),
    ("unsafe", SAFE, None),
    ("There are four or more vehicles", COUNT, "E"),
    ("keep speed", ACTION, "B"),
    ("There is no reason to doubt it", YES_NO, None),
    ("The lane holds no vehicle", YES_NO, None),
    ("Is it there? Yes.", YES_NO, "A"),
]
NOTHING = [
    ("", STATUS, None),
    ("   \n ", STATUS, None),
    ("...", STATUS, None),
    ("A. going ahead B. turning left C. turning right D. stopped", STATUS, None),
    ("A. going ahead\nB. turning left\nC. turning right\nD. stopped\nAnswer: D", STATUS, "D"),
    ("A. yes B. no\nyes", YES_NO, "A"),
    ("I do not know", STATUS, None),
    ("42", COUNT, None),
]


@pytest.mark.parametrize(("text", "options", "expected"), DECLARED)
def test_reads_a_declared_answer(text, options, expected):
    assert extract_choice(text, options) == expected


@pytest.mark.parametrize(("text", "options", "expected"), PREFERRED)
def test_reads_a_preference_or_a_conclusion(text, options, expected):
    assert extract_choice(text, options) == expected


@pytest.mark.parametrize(("text", "options", "expected"), LEADING)
def test_reads_a_letter_or_yes_or_no_that_opens(text, options, expected):
    assert extract_choice(text, options) == expected


@pytest.mark.parametrize(("text", "options", "expected"), RUNNING)
def test_reads_a_letter_in_running_text(text, options, expected):
    assert extract_choice(text, options) == expected


@pytest.mark.parametrize(("text", "options", "expected"), PHRASES)
def test_reads_the_words_of_an_option(text, options, expected):
    assert extract_choice(text, options) == expected


@pytest.mark.parametrize(("text", "options", "expected"), NOTHING)
def test_finds_no_choice_where_there_is_none(text, options, expected):
    assert extract_choice(text, options) == expected


@pytest.mark.parametrize("article", ["a", "A"], ids=["lower", "upper"])
@pytest.mark.parametrize(
    "sentence",
    [
        "{} car is ahead",
        "ahead is {} car",
        "see: {} car",
        "so {} car",
        "Final: {} bus",
        "it is {} van",
    ],
)
def test_never_reads_an_article_as_option_a(article, sentence):
    assert extract_choice(sentence.format(article), STATUS) is None


def test_every_option_of_every_question_is_read_back():
    from drivekd.driving import QUESTIONS

    for question in QUESTIONS.values():
        for letter, option in zip("ABCDE", question.options, strict=False):
            for form in ("Final: {}. {}", "Final : {} . {}", "{}. {}", "{}) {}", "{} {}"):
                assert extract_choice(form.format(letter, option), question.options) == letter
            assert extract_choice(option, question.options) == letter
            assert extract_choice(f"Final: {option}", question.options) == letter


def test_long_answers_are_read_in_linear_time():
    text = "A car and a bus in lane B. I see a sedan " * 500
    start = time.process_time()
    assert extract_choice(text + " Final: C", STATUS) == "C"
    assert extract_choice(text, STATUS) is None
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("options", [[], [str(n) for n in range(27)], ["yes", "Yes"], ["yes", " "]])
def test_rejects_options_that_are_none(options):
    with pytest.raises(ValueError, match="options"):
        extract_choice("A", options)


def test_rejects_an_answer_that_is_no_text():
    with pytest.raises(TypeError, match="NoneType"):
        extract_choice(None, STATUS)
