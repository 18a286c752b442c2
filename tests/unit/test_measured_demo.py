"""What a GPU's run of the demo leaves, and what the page makes of it."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import demo_gpu
from benchmarks.measured_demo import demo_part, with_demos
from drivekd.study.report import load_study

CPU = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo"


def pretend(folder, *, arms=("ce", "multi+agp"), **changes):
    """Files as a GPU would leave them: the CPU's runs of two arms, ten times as fast."""
    study = load_study(CPU)
    runs = tuple(
        replace(run, wall_seconds=run.cpu_seconds / 10) for run in study.runs if run.arm in arms
    )
    study = replace(
        study,
        arms=tuple(arm for arm in study.arms if arm.name in arms),
        runs=runs,
        comparisons=(),
        settings={**study.settings, "runs at a time": 12},
    )
    (folder / "demo").mkdir(parents=True)
    (folder / "demo" / "report.json").write_text(study.to_json())
    facts = {"dry": False, "wall_s": 143.4, "planned": 6, "runs": [{}] * len(runs), **changes}
    (folder / "demo" / "demo.json").write_text(json.dumps(facts))


def test_wall_time_and_accuracies_stand_beside_the_cpu(tmp_path):
    pretend(tmp_path)
    said, table = demo_part(tmp_path, CPU, where="results/some-gpu")
    assert "wall time 143 s for 6 of 6 runs, 12 at a time" in said
    assert "[report](results/some-gpu/demo/report.md)" in said
    assert "stopped" not in said
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[:4]]
    assert rows[0] == ["", "seeds", "wall s a run", "accuracy, GPU", "accuracy, CPU", "CPU s a run"]
    assert rows[2] == ["CE only", "3", "16", "59.4 ± 0.8", "59.4 ± 0.8", "165"]
    assert rows[3] == ["three teachers, AGP", "3", "42", "81.7 ± 0.6", "81.7 ± 0.6", "420"]
    assert "# " not in table


def test_a_demo_that_was_stopped_says_so(tmp_path):
    pretend(tmp_path, planned=33)
    assert "6 of 33 runs" in demo_part(tmp_path, CPU, where="")[0]
    assert "**stopped when its time was over**" in demo_part(tmp_path, CPU, where="")[0]


def test_dry_runs_are_refused_and_no_run_is_no_part(tmp_path):
    assert demo_part(tmp_path, CPU, where="") == []
    pretend(tmp_path, dry=True)
    with pytest.raises(ValueError, match="comes from a dry run"):
        demo_part(tmp_path, CPU, where="")


def test_demos_of_all_machines_follow_the_other_numbers(tmp_path):
    (tmp_path / "demo").symlink_to(CPU)
    assert with_demos("page", tmp_path, where="results") == "page"
    pretend(tmp_path / "some-gpu")
    page = with_demos("page", tmp_path, where="results")
    assert page.startswith("page\n\n**some-gpu**: The demo (`drivekd demo`) on this GPU: wall time")
    assert "(results/some-gpu/demo/report.md)" in page
    assert "| CE only | 3 |" in page


def test_what_was_cut_off_leaves_its_archive(tmp_path, monkeypatch, capsys):
    world = tmp_path / "made" / "world.json"
    world.parent.mkdir()
    world.write_text("{}")
    with tarfile.open(tmp_path / "world.tar.gz", "w:gz") as archive:
        archive.add(world.parent, "made")
    monkeypatch.setattr(demo_gpu, "DRY", True)
    monkeypatch.setattr("benchmarks.gpu.DRY", True)
    line = [str(tmp_path / "world.tar.gz"), "--output", str(tmp_path / "out"), "--seconds", "31"]
    assert demo_gpu.main([*line, "--arms", "ce", "--workers", "1", "--seeds", "4"]) == 1
    assert "0 of 1 runs in " in capsys.readouterr().out
    with tarfile.open(tmp_path / "out" / "demo.tar.gz") as archive:
        facts = json.load(archive.extractfile("demo/demo.json"))
        assert "demo/demo.log" in archive.getnames()
    assert (facts["planned"], facts["runs"], facts["dry"]) == (1, [], True)
    assert facts["exit_code"] != 0
    assert 0 < facts["wall_s"] < 31


def test_calls_into_one_folder_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.DRY", True)
    assert demo_gpu.write_facts(tmp_path, {"planned": 3}, 10.0) == 0
    (tmp_path / "report.json").write_text((CPU / "report.json").read_text())
    assert demo_gpu.write_facts(tmp_path, {"planned": 3}, 5.0) == 33
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert facts["wall_s"] == 15.0
    assert facts["runs"][0]["accuracy"].keys() == {"perception", "reasoning", "planning"}


def test_an_archive_without_a_data_set_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(__file__, "x.py")
    with pytest.raises(ValueError, match=r"holds no world\.json"):
        demo_gpu.unpack(tmp_path / "a.tar", tmp_path / "to")
