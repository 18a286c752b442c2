"""The README's example and commands, executed or looked up."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import drivekd
from benchmarks.report import fill
from drivekd.cli import main
from drivekd.train import load_recipe
from tests.helpers.toy_models import image_inputs, internvl

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_drop_in_example_trains_the_student():
    (example,) = blocks("python")
    student, teacher = internvl(layers=3), internvl(layers=5).eval().requires_grad_(False)
    student.train()
    batch = image_inputs()
    batch["labels"] = batch["input_ids"].clone()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    names = {
        "drivekd": drivekd,
        "torch": torch,
        "student": student,
        "teacher": teacher,
        "loader": [batch, batch],
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "weights": drivekd.BalancedWeights({"perception": 0.1}),
    }
    exec(compile(example, "README.md", "exec"), names)
    changed = [n for n, value in student.state_dict().items() if not torch.equal(value, before[n])]
    assert changed
    assert torch.isfinite(names["ce"])
    assert names["perception"](names["s"], names["t"], names["tokens"]) > 0


def test_commands_of_the_first_screen_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    first_screen = README[: README.index("## ")]
    commands = re.findall(r"^make (\S+)", first_screen, flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    for command in commands:
        assert re.search(rf"^{command}: setup$", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^drivekd (\w+)", README, re.M))))
def test_every_drivekd_command_named_exists(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_commands_for_own_records_work_on_the_record_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (record,) = blocks("json")
    Path("front").mkdir()
    for name, colour in (("0001", "red"), ("0002", "blue")):
        picture = Image.new("RGB", (8, 8), colour)
        picture.putpixel((0, 0), (255, 255, 255))
        picture.save(f"front/{name}.jpg")
    Path("test.jsonl").write_text(record)
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A road."}]
    llava = {"image": "front/0002.jpg", "conversations": turns}
    Path("llava.json").write_text(json.dumps([llava]))
    commands = re.findall(r"^drivekd (data (?:convert|check) \S+ (?:--|test).*)$", README, re.M)
    assert len(commands) == 2
    for command in commands:
        assert main(command.split()) == 0, capsys.readouterr()


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path).distill.signals


def test_links_to_files_of_the_repository_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md", "kernels/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_results_are_what_the_script_makes_of_the_committed_report():
    assert fill(README) == README, "run python -m benchmarks.report"
