"""Reports: the document, its checks, the tables' numbers, and what the files may not contain."""

import base64
import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from drivekd.study import tables
from drivekd.study.plots import Plot
from drivekd.study.report import format_table, load_study, write_report
from drivekd.study.schema import Arm, Baseline, Comparison, LossPoint, Run, Study, Teacher
from drivekd.study.statistics import Tally
from tests.helpers.studies import make_run, make_study

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole report on disk: (directory, study, path returned)."""
    directory = tmp_path_factory.mktemp("report") / "new" / "folder"
    study = make_study(arms=("ce", "cosine", "cosine+agp", "random"))
    return directory, study, write_report(directory, study)


def two_arms(ce, kd, **changes):
    """A study of two arms with one capability of one kind; ce and kd are {seed: correct of 100}."""

    def run(arm, seed, correct):
        return Run(arm, seed, 10, 1000, 5.0, {"perception": {"count": Tally(correct, 100)}})

    settings = {
        "title": "t",
        "settings": {},
        "notes": (),
        "capabilities": ("perception",),
        "arms": (Arm("ce", "CE"), Arm("kd", "KD")),
        "runs": (
            *(run("ce", s, c) for s, c in ce.items()),
            *(run("kd", s, c) for s, c in kd.items()),
        ),
    }
    return Study(**{**settings, **changes})


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


# the document


def test_the_document_survives_a_round_trip():
    study = make_study(seeds=(0, 1))
    assert Study.from_json(study.to_json()) == study


def test_a_run_and_a_teacher_survive_alone():
    study = make_study(arms=("ce",), seeds=(0,))
    run, teacher = study.runs[0], study.teachers[0]
    assert Run.from_document(json.loads(json.dumps(asdict(run)))) == run
    assert Teacher.from_document(json.loads(json.dumps(asdict(teacher)))) == teacher
    with pytest.raises(ValueError, match=r"run\.seed is missing"):
        Run.from_document({"arm": "ce"})


def test_numbers_that_are_not_finite_travel_as_null():
    study = make_study(arms=("ce",), seeds=(0,), curves=False)
    run = replace(study.runs[0], loss_curve=(LossPoint(1, {"ce": math.nan, "kd": math.inf}),))
    text = replace(study, runs=(run,)).to_json()
    assert json.loads(text)["runs"][0]["loss_curve"][0]["values"] == {"ce": None, "kd": None}
    assert math.isnan(Study.from_json(text).runs[0].loss_curve[0].values["ce"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.pop("title"), ValueError, r"study\.title is missing"),
        (lambda d: d.update(colour="red"), ValueError, r"unknown keys \['colour'\]"),
        (lambda d: d.update(format=2), ValueError, "format 1"),
        (lambda d: d["runs"][0].update(seed="0"), TypeError, r"runs\[0\]\.seed is '0'; wanted int"),
        (lambda d: d["runs"][0].update(seed=True), TypeError, "seed is True"),
        (lambda d: d["runs"][0].update(cpu_seconds=None), ValueError, "cpu_seconds"),
        (lambda d: d.update(arms={}), TypeError, r"study\.arms is \{\}; wanted list"),
        (lambda d: d["settings"].update(a={}), TypeError, "a setting is"),
        (
            lambda d: d["runs"][0]["accuracy"]["perception"]["count"].update(correct=10**6),
            ValueError,
            r"runs\[0\]\.accuracy\['perception'\]\['count'\]: correct is 1000000",
        ),
    ],
)
def test_a_damaged_document_is_refused_with_its_place(change, error, message):
    document = json.loads(make_study(arms=("ce",), seeds=(0,), curves=False).to_json())
    change(document)
    with pytest.raises(error, match=message):
        Study.from_json(json.dumps(document))


def study_parts():
    run, other = (make_run("ce", seed, curves=False) for seed in (0, 1))
    learnt = make_run("ce", 2).learning_curve[0]
    short = {**run.accuracy, "planning": {}}
    missing = {c: q for c, q in run.accuracy.items() if c != "planning"}
    fewer = {**run.accuracy, "planning": {"action": Tally(1, 2), "speed": Tally(1, 325)}}
    return [
        ({"capabilities": ()}, "capabilities is empty"),
        ({"arms": ()}, "arms is empty"),
        ({"arms": (Arm("ce", "a"), Arm("ce", "b"))}, "listed twice"),
        ({"arms": (Arm("ce", "a"), Arm("x", "b"))}, "arm 'x' has no run"),
        ({"arms": (Arm("../ce", "a"),)}, "may hold only letters"),
        ({"reference": "sft"}, "'sft' is not one of"),
        ({"comparisons": (Comparison("ce", "kd"),)}, "'kd' is not one of"),
        ({"runs": (run, other, run)}, "seed 0 is there twice"),
        ({"runs": (run, replace(other, arm="kd"))}, "its arm is not one of"),
        ({"runs": (replace(run, cpu_seconds=-1.0),)}, "cpu_seconds"),
        ({"runs": (replace(run, teacher_cpu_seconds=1e9),)}, "teacher_cpu_seconds"),
        ({"runs": (replace(run, steps=-1),)}, "must not be negative"),
        ({"runs": (replace(run, accuracy=short),)}, "accuracy must have questions of each"),
        ({"runs": (replace(run, blank=missing),)}, "blank must have questions of each"),
        ({"runs": (run, replace(other, accuracy=fewer))}, "its test set differs"),
        ({"teachers": (Teacher("big", 1, fewer),)}, "teacher 'big': its test set differs"),
        ({"baselines": (Baseline("majority", fewer),)}, "'majority': its test set differs"),
        (
            {"runs": (replace(run, learning_curve=(replace(learnt, accuracy={"x": 1.0}),)),)},
            r"unknown capabilities \['x'\]",
        ),
    ]


@pytest.mark.parametrize(("changes", "message"), study_parts())
def test_a_study_that_does_not_fit_together_is_refused(changes, message):
    study = make_study(arms=("ce",), seeds=(0,), curves=False)
    with pytest.raises(ValueError, match=message):
        replace(study, **changes)


def test_load_study_reads_a_file_or_its_directory_and_names_a_bad_file(written, tmp_path):
    directory, study, _ = written
    assert load_study(directory) == load_study(directory / "report.json") == study
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_study(bad)


# the tables


def cells(table, label):
    (row,) = [row for row in table.rows if row.label == label]
    return dict(zip(table.columns[1:], row.cells, strict=True))


def test_accuracy_rows_hold_mean_and_standard_error_over_seeds():
    # 70, 74, 78: mean 74, error 4 / sqrt(3) = 2.309
    table = tables.accuracy_table(two_arms({0: 50, 1: 50}, {0: 70, 1: 74, 2: 78}))
    assert cells(table, "KD") == {"seeds": "3", "perception": "74.0 ± 2.3", "mean": "74.0 ± 2.3"}
    assert cells(table, "CE")["perception"] == "50.0 ± 0.0"


def test_a_single_seed_is_marked_and_said_to_prove_nothing():
    study = two_arms({0: 90}, {0: 80})
    accuracy, difference = tables.accuracy_table(study), tables.difference_table(study)
    assert cells(accuracy, "KD")["perception"] == "80.0 ± 4.0†"
    assert cells(difference, "KD − CE") == {  # noqa: RUF001
        "n": "1 seed",
        "perception": "-10.0 ± 5.0†",
        "mean": "-10.0 ± 5.0†",
    }
    assert any("binomial" in note for note in accuracy.notes)
    assert any("One seed proves nothing" in note for note in difference.notes)
    assert "One seed proves nothing" in format_table(study)


def test_several_seeds_are_not_said_to_prove_nothing():
    study = two_arms({s: 50 + s for s in range(4)}, dict.fromkeys(range(4), 60))
    text = format_table(study)
    assert "proves nothing" not in text
    assert "two or three seeds" not in text
    assert "two or three seeds" in format_table(two_arms({0: 1, 1: 2}, {0: 3, 1: 5}))


def test_differences_are_paired_by_seed_in_points():
    # 7, 9, 8: mean 8, error 1 / sqrt(3) = .577
    table = tables.difference_table(two_arms({0: 40, 1: 60, 2: 80}, {0: 47, 1: 69, 2: 88, 5: 0}))
    row = cells(table, "KD − CE")  # noqa: RUF001
    assert (row["n"], row["perception"]) == ("3 seeds", "+8.0 ± 0.6")


def test_a_named_reference_and_own_comparisons_decide_the_rows():
    study = two_arms(
        {0: 40, 1: 50}, {0: 50, 1: 60}, reference="kd", comparisons=(Comparison("kd", "ce"),)
    )
    rows = [(row.label, row.cells[1]) for row in tables.difference_table(study).rows]
    assert rows == [("CE − KD", "-10.0 ± 0.0"), ("KD − CE", "+10.0 ± 0.0")]  # noqa: RUF001


def test_arms_without_a_common_seed_have_no_difference():
    table = tables.difference_table(two_arms({0: 40}, {1: 50}))
    assert table.rows[0].cells == ("0 seeds", "–", "–")  # noqa: RUF001
    assert any("no seed in common" in note for note in table.notes)


def test_majority_teacher_and_blank_image_rows_are_there():
    table = tables.accuracy_table(make_study(arms=("ce",), curves=False))
    groups = [(row.group, row.label) for row in table.rows]
    assert groups == [
        ("teacher", "joint teacher (0.75 M parameters)"),
        ("baseline", "majority"),
        ("arm", "CE only"),
        ("blank", "joint teacher, blank image"),
        ("blank", "CE only, blank image"),
    ]
    assert cells(table, "majority")["planning"] == "24.0"


def test_compute_rows_hold_steps_seconds_and_teacher_seconds():
    table = tables.compute_table(make_study(arms=("ce", "cosine"), curves=False))
    assert cells(table, "+ attention cosine") == {
        "seeds": "3",
        "steps": "600",
        "parameters": "0.158 M",
        "CPU s": "46",
        "of which teacher": "4.0",
        "CPU ms a step": "77",
    }


def test_question_rows_end_with_micro_and_macro_means():
    kinds = {"count": Tally(9, 10), "lane": Tally(15, 30)}
    run = Run("ce", 0, 1, 1, 1.0, {"perception": kinds})
    study = two_arms({}, {}, arms=(Arm("ce", "CE"),), runs=(run,))
    rows = {row.label: row.cells for row in tables.question_table(study).rows}
    assert rows == {
        "perception: count": ("10", "90.0"),
        "perception: lane": ("30", "50.0"),
        "perception: all questions (micro)": ("40", "60.0"),
        "perception: mean of kinds (macro)": ("40", "70.0"),
    }


def test_the_terminal_table_is_plain_and_complete():
    study = make_study()
    text = format_table(study)
    text.encode("ascii")  # raises on anything a bare terminal cannot show
    assert "\x1b" not in text
    for words in (study.title, "Accuracy", "Differences", "Compute", "majority", *study.notes):
        assert words in text


def test_text_tables_keep_their_columns_aligned():
    table = tables.accuracy_table(make_study(arms=("ce", "random"), curves=False))
    lines = tables.to_text(table).splitlines()[2 : 2 + len(table.rows) + 5]
    ends = {len(line) for line in lines if line}
    assert len(ends) == 1


def test_markdown_cells_cannot_break_the_table():
    table = tables.Table("t", ("", "a"), (tables.Row("x|y\nz", ("1",), "g"),))
    assert "| x\\|y z | 1 |" in tables.to_markdown(table)


# the files


def test_the_report_has_its_files_and_gives_the_page(written):
    directory, _, page = written
    assert page == directory / "report.html"
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "report.json",
        "report.html",
        "report.md",
        "accuracy.png",
        "learning_steps.png",
        "learning_cpu.png",
        "losses.png",
        "gradients_cosine+agp.png",
    }
    for path in directory.glob("*.png"):
        assert path.read_bytes().startswith(PNG)


def test_the_page_is_self_contained(written):
    directory, _, page = written
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert not parsed.named("script")
    assert not parsed.named("link")
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(
            v.startswith("data:") for name, v in attributes.items() if name in {"src", "href"}
        )
    assert not re.search(r"https?:|@import|url\(", text)
    (policy,) = [m for m in parsed.named("meta") if m.get("http-equiv")]
    assert "default-src 'none'" in policy["content"]
    inlined = [base64.b64decode(i["src"].split(",", 1)[1]) for i in parsed.named("img")]
    assert sorted(inlined) == sorted(p.read_bytes() for p in directory.glob("*.png"))


def test_the_page_is_readable_on_a_phone_and_by_a_screen_reader(written):
    parsed = Page(written[2].read_text())
    assert parsed.named("html")[0]["lang"] == "en"
    assert any(m.get("name") == "viewport" for m in parsed.named("meta"))
    assert len(parsed.named("table")) == 5
    scrolls = [d for d in parsed.named("div") if d.get("class") == "scroll"]
    assert len(scrolls) == 5
    assert all(d["aria-label"] and d["tabindex"] == "0" for d in scrolls)
    alts = [image["alt"] for image in parsed.named("img")]
    assert len(set(alts)) == len(alts) == 5
    assert all(len(alt) > 40 for alt in alts)
    assert "CE only 76" in alts[0]  # numbers, not "a chart"


def test_the_page_and_the_markdown_say_the_notes_and_the_same_numbers(written):
    directory, study, page = written
    html, markdown = page.read_text(), (directory / "report.md").read_text()
    for note in study.notes:
        assert note in html
        assert note in markdown
    for row in tables.accuracy_table(study).rows:
        for cell in row.cells:
            assert f"<td>{cell}</td>" in html
            assert f"| {cell} |" in markdown
    for path in directory.glob("*.png"):
        assert f"({path.name})" in markdown


def test_text_from_the_study_is_escaped_in_the_page(tmp_path):
    study = make_study(arms=("ce",), seeds=(0,), curves=False)
    study = replace(
        study,
        title="<script>1</script>",
        notes=("a < b & c",),
        arms=(Arm("ce", '"><img src=x>', "<b>"),),
        settings={"<k>": ["<v>"]},
    )
    parsed = Page(write_report(tmp_path, study).read_text())
    assert not parsed.named("script")
    assert not parsed.named("b")
    assert all(image["src"].startswith("data:") for image in parsed.named("img"))


def test_further_figures_are_written_and_inlined(tmp_path):
    study = make_study(arms=("ce",), seeds=(0,), curves=False)
    figure = Plot("overlays", "Where they look", "Caption.", "Teacher looks left.", PNG + b"1")
    page = write_report(tmp_path, study, figures=[figure])
    assert (tmp_path / "overlays.png").read_bytes() == figure.png
    last = Page(page.read_text()).named("img")[-1]
    assert last["alt"] == "Teacher looks left."
    assert base64.b64decode(last["src"].split(",", 1)[1]) == figure.png
    assert "![Teacher looks left.](overlays.png)" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", ["accuracy", "../up", ""])
def test_figures_with_a_taken_or_unsafe_name_are_refused_before_anything_is_written(name, tmp_path):
    study = make_study(arms=("ce",), seeds=(0,), curves=False)
    with pytest.raises(ValueError, match="figures has the name"):
        write_report(tmp_path / "new", study, figures=[Plot(name, "t", "c", "a", PNG)])
    assert not (tmp_path / "new").exists()


def test_a_study_without_curves_has_only_the_bars(tmp_path):
    write_report(tmp_path, make_study(arms=("ce",), seeds=(0,), curves=False))
    assert [path.name for path in tmp_path.glob("*.png")] == ["accuracy.png"]


def test_a_report_read_back_and_written_again_is_the_same_byte_for_byte(written, tmp_path):
    directory, _, _ = written
    write_report(tmp_path, load_study(directory))
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
