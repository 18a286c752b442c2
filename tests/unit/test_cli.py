"""The command line: help, exit codes, one-line errors, and what reaches the functions below."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import drivekd
from drivekd import errors
from drivekd.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(monkeypatch):
    """Put a module in the place of drivekd.<name>."""

    def install(name, **functions):
        module = ModuleType(f"drivekd.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"drivekd.{name}", module)
        monkeypatch.setattr(drivekd, name, module, raising=False)

    return install


def failing(error):
    def run(*_, **__):
        raise error

    return run


def python_m(*arguments, **settings):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "drivekd", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
        **settings,
    )


# help


def test_help_says_what_to_try_first_where_outputs_go_and_gives_examples(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for words in ("start here:", "examples:", "where things go:", "exit codes:", "runs/demo"):
        assert words in text
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["distill"],
        ["cache"],
        ["prestudy"],
        ["verify"],
        ["profile"],
        ["report"],
        ["data"],
        ["data", "check"],
        ["data", "convert"],
        ["evaluate"],
        ["doctor"],
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    assert f"usage: drivekd {' '.join(command)}" in capsys.readouterr().out


def test_examples_in_the_help_are_legal_command_lines():
    parser = build_parser()
    lines = parser.epilog.split("examples:")[1].split("where things go:")[0].strip().splitlines()
    assert len(lines) >= 4
    for line in lines:
        command = line.split("   ")[0].split()
        assert command[0] == "drivekd"
        parser.parse_args(command[1:])


def test_help_imports_nothing_heavy(run_python):
    run_python(
        "import sys, contextlib, drivekd.cli as cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main(['--help'])\n"
        "bad = {'transformers', 'accelerate', 'matplotlib', 'highway_env'} & set(sys.modules)\n"
        "assert not bad, bad"
    )


def test_subpackages_come_when_they_are_named(run_python):
    run_python(
        "import sys, drivekd\n"
        "assert not {'drivekd.train', 'drivekd.data', 'transformers'} & set(sys.modules)\n"
        "assert drivekd.train.DistillMixin and drivekd.data.Record and drivekd.study\n"
        "assert not hasattr(drivekd, 'trian')"
    )


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("drivekd ")


# exit codes

ENDING = """
import atexit, sys
import drivekd.cli.command as program

class Finalized:
    def __del__(self, write=sys.stderr.write):
        write("finalized ")

last = Finalized()
def main():
    atexit.register(sys.stderr.write, "handlers ")
    sys.stdout.write("result")  # without a line's end: still in the buffer
    {ending}
program.main = main
program.command()
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "ending, code, says",
    [
        ("return 0", 0, ""),
        ("return 2", 2, ""),
        ("sys.exit(2)", 2, ""),
        ("raise KeyError('a bug')", 1, "Traceback"),
    ],
)
def test_one_of_several_processes_ends_before_the_interpreter_is_finalized(
    ending, code, says, ranks
):
    """Where a thread of gloo could abort it; what others do at exit, output and code stay."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDING.format(ending=ending)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(ranks)},
        timeout=120,
        check=False,
    )
    assert ended.returncode == code
    assert ended.stdout == "result"
    assert "handlers " in ended.stderr and says in ended.stderr
    assert ("finalized " in ended.stderr) == (ranks == 1)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["demo", "--steps", "0"],
        ["demo", "--workers", "many"],
        ["demo", "--fast", "--steps", "3"],
        ["demo", "--full", "--arms", "ce"],
        ["demo", "--prepare", "a", "--data", "b"],
        ["demo", "--device", "tpu"],
        ["data"],
        ["data", "check"],
        ["evaluate", "model"],
        ["doctor", "--json", "--build"],
    ],
)
def test_an_illegal_command_line_leaves_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: drivekd" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["demo", "--fast", "--seeds"], ["prestudy", "r", "--seed"]])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("-1", "is -1; it must be from 0 to 4294967295"),
        (str(2**32), "is 4294967296; it must be from 0 to 4294967295"),
        ("1.5", "invalid seed value: '1.5'"),
    ],
)
def test_a_seed_that_generators_do_not_take_is_refused_at_once(arguments, value, says, capsys):
    with pytest.raises(SystemExit) as left:
        main([*arguments, value])
    assert left.value.code == 2
    assert f"argument {arguments[-1]}: {says}" in capsys.readouterr().err


OURS = [getattr(errors, name) for name in vars(errors) if name.endswith("Error")]


@pytest.mark.parametrize("kind", [*OURS, FileNotFoundError, PermissionError, ImportError])
def test_expected_errors_are_one_line_on_stderr_and_code_2(kind, fake, capsys):
    fake("demo", run=failing(kind("what came\n  and what to do")))
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "drivekd demo: error: what came and what to do\n"


def test_every_error_class_of_ours_is_expected():
    assert len(OURS) >= 5


def test_a_missing_file_is_named_without_its_number(fake, capsys, tmp_path):
    def run(*_, **__):
        (tmp_path / "gone").read_text()

    fake("demo", run=run)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        f"drivekd demo: error: {tmp_path / 'gone'}: No such file or directory\n"
    )


@pytest.mark.parametrize("arguments", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_shows_the_traceback(arguments, fake):
    fake("demo", run=failing(errors.DataError("x")))
    with pytest.raises(errors.DataError):
        main(arguments)


@pytest.mark.parametrize("bug", [ZeroDivisionError("x"), ImportError("x", name="drivekd.gone")])
def test_a_bug_is_not_hidden(bug, fake):
    fake("demo", run=failing(bug))
    with pytest.raises(type(bug)):
        main(["demo"])


def test_an_interrupt_leaves_with_130(fake, capsys):
    fake("demo", run=failing(KeyboardInterrupt()))
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", "drivekd", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert err == b""
    process.stderr.close()


def test_python_m_gives_the_code_to_the_shell(tmp_path):
    done = python_m("data", "check", str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("drivekd data check: error: ")
    assert done.stderr.count("\n") == 1


# what reaches the functions below


def test_demo_passes_its_settings_on(fake, capsys):
    calls = []

    def run(output, **settings):
        calls.append((output, settings))
        return output / "report.html"

    fake("demo", run=run)
    assert main(["demo"]) == 0
    out = Path("runs/demo")
    default = {
        "arms": None, "full": False, "seeds": None, "workers": None, "steps": None, "fast": False,
        "data": None, "device": "auto", "report_only": False,
    }  # fmt: skip
    assert calls.pop() == (out, default)
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    line = "demo --output o --full --seeds 3 1 --workers 1 --steps 9 --data w --device cpu"
    assert main([*line.split(), "--report-only"]) == 0
    wanted = {
        "arms": None, "full": True, "seeds": [3, 1], "workers": 1, "steps": 9, "fast": False,
        "data": Path("w"), "device": "cpu", "report_only": True,
    }  # fmt: skip
    assert calls.pop() == (Path("o"), wanted)
    assert main(["demo", "--fast", "--arms", "ce", "multi"]) == 0
    assert calls[-1][1]["fast"] is True
    assert calls.pop()[1]["arms"] == ["ce", "multi"]


def test_demo_prepare_makes_the_data_set_and_nothing_else(fake, capsys, tmp_path):
    calls = []

    def prepare(folder, **settings):
        calls.append((folder, settings))
        (folder / "world.json").write_text("x" * 50_000)
        return folder

    fake("demo", prepare=prepare, run=failing(AssertionError("trained")))
    assert main(["demo", "--prepare", str(tmp_path), "--fast"]) == 0
    assert calls == [(tmp_path, {"workers": None, "fast": True})]
    said = f"data set: {tmp_path} (0.1 MB); use it with --data {tmp_path}\n"
    assert capsys.readouterr().out == said


def test_distill_loads_the_recipe_with_its_overrides(fake, capsys):
    fake(
        "train",
        load_recipe=lambda path, overrides: SimpleNamespace(path=path, overrides=overrides),
        distill=lambda recipe: f"{recipe.path} {recipe.overrides}",
    )
    assert main(["distill", "r.yaml", "a.b=c", "d=e"]) == 0
    assert capsys.readouterr().out == "student: r.yaml ['a.b=c', 'd=e']\n"
    fake("train", load_recipe=failing(errors.RecipeError("unknown key x")), distill=None)
    assert main(["distill", "r.yaml"]) == 2
    assert "drivekd distill: error: unknown key x" in capsys.readouterr().err


def write_records(folder, name, pictures, *, answer="Final: A. yes"):
    """A file of records, one a picture; a picture is a colour or None for a missing file."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, colour in enumerate(pictures):
        if colour is not None:
            picture = Image.new("RGB", (8, 8), colour)
            picture.putpixel((0, 0), (255, 255, 255))
            picture.save(folder / f"{name}{i}.png")
        messages = [
            {"role": "user", "content": "<image>Is it? A. yes B. no"},
            {"role": "assistant", "content": answer},
        ]
        images = [f"{name}{i}.png"]
        rows.append({"messages": messages, "images": images, "question_type": "planning"})
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return str(folder / f"{name}.json")


def test_data_check_of_good_files_leaves_with_0(capsys, tmp_path):
    file = write_records(tmp_path, "train", ["red", "blue"])
    assert main(["data", "check", file]) == 0
    assert capsys.readouterr().out == f"{file}: 2 records (planning 2), 2 images, no problems\n"


def test_data_check_names_every_problem_and_leaves_with_1(capsys, tmp_path):
    train = write_records(tmp_path / "a", "train", ["red", None])
    test = write_records(tmp_path / "b", "test", ["green"])
    assert main(["data", "check", train, test]) == 1
    kind, problem, first, second = capsys.readouterr().out.splitlines()
    assert kind == "image_missing: 1"
    assert problem.startswith(f"  {train}[1]: ")
    assert "train1.png" in problem
    assert first == f"{train}: 2 records (planning 2), 2 images, 1 problem"
    assert second == f"{test}: 1 record (planning 1), 1 image, no problems"


def test_data_check_finds_a_picture_in_two_files(capsys, tmp_path):
    files = [write_records(tmp_path / name, name, ["red"]) for name in ("train", "test")]
    assert main(["data", "check", *files]) == 1
    assert "train" in capsys.readouterr().out.splitlines()[1]


def test_data_check_takes_images_from_root(capsys, tmp_path):
    file = write_records(tmp_path / "pictures", "train", ["red"])
    moved = Path(file).rename(tmp_path / "train.json")
    assert main(["data", "check", str(moved)]) == 1
    assert main(["data", "check", str(moved), "--root", str(tmp_path / "pictures")]) == 0


def test_doctor_prints_text_json_or_the_build_and_its_code(monkeypatch, capsys):
    monkeypatch.delenv("DRIVEKD_BACKEND", raising=False)
    assert main(["doctor"]) == 0
    assert "Backends" in capsys.readouterr().out
    assert main(["doctor", "--build"]) == 0
    assert capsys.readouterr().out.startswith("drivekd: compiled extension ")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    monkeypatch.setenv("DRIVEKD_BACKEND", "abacus")
    assert main(["doctor", "--json"]) == 1
    assert "abacus" in json.loads(capsys.readouterr().out)["problems"][0]


@pytest.mark.parametrize(
    "arguments", [["distill", "a.yaml", "--nonsense=1"], ["doctor", "--json", "a", "b=c"]]
)
def test_what_is_no_override_is_still_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "unrecognized arguments: " in capsys.readouterr().err
