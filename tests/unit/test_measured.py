"""The benchmarks for a GPU, gone through on the CPU, and what is made of their files."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, measured, report
from benchmarks.devices import DEVICES, pair_floor_ps
from benchmarks.shapes import GPU_MODELS, GPU_PAIRS
from tests.helpers.stages import QUICK, ROOT, stage

pytest.importorskip("pytest_benchmark")

FULL = {"both": ("fused", "fused-lse", "eager", "compiled", "chunked", "sdpa"),
        "forward": ("fused", "eager", "chunked", "sdpa")}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Files of a dry run of one stage, and of the benchmark of gradients."""
    out = tmp_path_factory.mktemp("dry")
    done = stage(out, "loss", "internvl3-1b", "t2v")
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            f"--benchmark-json={out}/gram.json", "benchmarks/bench_gradient_gram_gpu.py",
        ],
        cwd=ROOT, env=QUICK, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def facts_of(folder):
    for path in sorted(folder.glob("*.json")):
        if path.name != "machine.json":
            yield from (each["extra_info"] for each in json.loads(path.read_text())["benchmarks"])


def test_every_way_is_gone_through_and_every_round_kept(dry):
    found = {}
    for facts in facts_of(dry):
        assert facts["outcome"] == "measured"
        assert facts["dry"] is True
        assert len(facts["rounds_ms"]) == 3
        if facts["way"] != "fused":
            assert len(facts["beside_ms"]) == len(facts["rounds_ms"])
        if facts["way"] not in ("sdpa", "gram", "combination"):
            assert facts["loss_error"] < 0.05
        found.setdefault((facts["shape"], facts.get("mode")), []).append(facts["way"])
    for shape in ("internvl3-1b-from-8b/t2v-1", "internvl3-1b-from-8b/t2v-6"):
        for mode, ways in FULL.items():
            assert tuple(found[shape, mode]) == ways
    assert found["gradients-494m", None] == ["gram", "combination"]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels on the CPU: TRITON_INTERPRET=1"
)
def test_the_fused_way_is_gone_through_with_the_kernels_themselves(tmp_path):
    chosen = "qwen2.5-vl-3b-from-7b/t2v-1-both-fused or qwen2.5-vl-3b-from-7b/full-2048-forward"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen,
            f"--benchmark-json={tmp_path}/loss.json",
            "benchmarks/bench_attention_map_loss_gpu.py",
        ],
        cwd=ROOT, env={**QUICK, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {facts["dtype"] for facts in facts_of(tmp_path)} == {"float16"}


def test_the_machine_is_told(dry):
    machine = json.loads((dry / "machine.json").read_text())
    assert machine["torch"] == torch.__version__
    assert set(machine) >= {"gpu", "driver", "cuda", "triton", "commit", "changed_files", "date"}


def test_dry_runs_are_no_results(dry):
    with pytest.raises(ValueError, match="dry run"):
        measured.load(dry)


def test_an_unknown_stage_says_so(tmp_path):
    done = stage(tmp_path, "everything")
    assert done.returncode == 2
    assert "no stage 'everything'" in done.stderr


def test_every_named_shape_has_every_way():
    kinds = {"t2v-1", "t2v-6", "full-2048", "full-8192", "full-20480", "full-65536"}
    assert set(GPU_PAIRS) == {f"{model}/{kind}" for model in GPU_MODELS for kind in kinds}
    code = (
        "from benchmarks.bench_attention_map_loss_gpu import CASES; print(*[c.id for c in CASES])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    wanted = {f"{s}-{mode}-{way}" for s in GPU_PAIRS for mode, ways in FULL.items() for way in ways}
    assert set(done.stdout.split()) == wanted


# ---- timing


class Fixture:
    """What `measure` uses of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info, self.name, self.seconds = {}, "bench", []

    def pedantic(self, call, rounds):
        for _ in range(rounds):
            begin = gpu.PLAYBACK()
            call()
            self.seconds.append(gpu.PLAYBACK() - begin)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "DRY", True)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "ROUNDS", (4, 4))


@pytest.mark.usefixtures("on_cpu")
def test_two_ways_run_in_turn_within_a_round():
    order, fixture = [], Fixture()
    gpu.measure(fixture, lambda: order.append("own"), beside=lambda: order.append("fused"), way="x")
    rounds = order[-8:]
    assert [sorted(rounds[i : i + 2]) for i in range(0, 8, 2)] == [["fused", "own"]] * 4
    assert rounds[0] != rounds[2]  # who goes first alternates
    assert fixture.extra_info["way"] == "x"
    # pytest-benchmark's own table shows the rounds that count.
    assert fixture.seconds == [pytest.approx(ms / 1e3) for ms in fixture.extra_info["rounds_ms"]]


@pytest.mark.usefixtures("on_cpu")
def test_running_out_of_memory_is_a_result():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More advice.")

    fixture = Fixture()
    gpu.measure(fixture, greedy, way="eager", shape="s")
    assert fixture.extra_info["outcome"] == "out of memory"
    assert fixture.extra_info["way"] == "eager"
    assert "out of memory" in fixture.name


# ---- the report, of files with the schema of a real run


def pretend(dry, folder, change=lambda facts: facts):
    """Results as a GPU would leave them: all shapes; ways at fixed multiples of the fused one."""
    times = {"fused": 1.0, "fused-lse": 0.5, "eager": 12.0, "compiled": 4.0, "chunked": 3.0,
             "sdpa": 1.25, "gram": 1.0, "combination": 1.0}  # fmt: skip
    folder.mkdir()
    machine = json.loads((dry / "machine.json").read_text())
    machine |= {"gpu": "Some GPU", "driver": "555.1", "commit": "0123456789abcdef"}
    machine["changed_files"] = 0
    (folder / "machine.json").write_text(json.dumps(machine))
    loss = json.loads((dry / "loss-internvl3-1b-t2v.json").read_text())
    benchmarks = []
    for shape in GPU_PAIRS:
        for each in loss["benchmarks"]:
            if each["extra_info"]["shape"] != "internvl3-1b-from-8b/t2v-1":
                continue
            each = copy.deepcopy(each)
            facts = each["extra_info"]
            facts |= {"shape": shape, "dry": False, "clocks": "1755 MHz, 2619 MHz, 400 W, 50"}
            facts["extra_peak_bytes"] = 2**20 * (60 if facts["way"] == "eager" else 1)
            # The clock halves after two rounds: ratios within a round do not mind.
            unit = [2.0, 2.0, 4.0, 4.0, 4.0]
            facts["rounds_ms"] = [times[facts["way"]] * each for each in unit]
            if facts["mode"] == "forward":
                facts["rounds_ms"] = [each / 4 for each in facts["rounds_ms"]]
            if "beside_ms" in facts:
                facts["beside_ms"] = unit
            if "gradient_error" in facts:
                facts["gradient_error"] = 1e-3
            each["extra_info"] = change(facts)
            benchmarks.append(each)
    benchmarks.append({"extra_info": {"device": "cpu"}})  # of the CPU: left out
    (folder / "loss-all.json").write_text(json.dumps({**loss, "benchmarks": benchmarks}))
    gram = json.loads((dry / "gram.json").read_text())
    for each in gram["benchmarks"]:
        each["extra_info"] |= {"dry": False, "rounds_ms": [1.0, 2.0], "beside_ms": [0.9, 1.8]}
    (folder / "gram.json").write_text(json.dumps(gram))


def lines(page, start):
    return [line for line in page.splitlines() if line.startswith(f"| {start}")]


def test_tables_are_made_of_the_rounds(dry, tmp_path):
    pretend(dry, tmp_path / "some-gpu")
    page = measured.section(tmp_path, where="results")
    assert "Some GPU, driver 555.1" in page and "commit 0123456789" in page
    assert "SM clock under load 1755-1755 MHz" in page
    (row,) = lines(page, "qwen2.5-vl-3b-from-7b/full-8192")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["1 (0.5-1)", "3", "4 (2-4)", "1"]
    assert cells[5:] == ["12x", "4x", "3x", "0.8x"]
    (row,) = lines(page, "internvl3-2b-from-38b/t2v-6")
    assert row.endswith("0.8x | 0.5x |")


def test_targets_are_judged(dry, tmp_path):
    pretend(dry, tmp_path / "some-gpu")
    page = measured.section(tmp_path, where="results")
    assert "12x met | 12x met | 12x met" in lines(page, "faster than eager, N = 2048")[0]
    assert lines(page, "less extra memory, N = 8192")[0].count("60x met") == 3
    assert "0.8x met" in lines(page, "time of sdpa, N = 8192")[0]
    assert "0.4x met" in lines(page, "time of sdpa, 6 views, lse given")[0]
    assert "90 % met" in lines(page, "gram of 4")[0]
    (row,) = lines(page, "time of its floor")
    for pair in GPU_MODELS.values():
        floor = 1e-9 * 65536 * 65537 / 2 * pair_floor_ps(DEVICES["H200"], *pair)
        assert f"{4 / floor:.3g}x met" in row


def test_the_floor_is_made_of_measured_ceilings_where_there_are_any(dry, tmp_path, monkeypatch):
    pretend(dry, tmp_path / "some-gpu")
    before = measured.load(tmp_path / "some-gpu")
    slow = DEVICES["H200"].at(DEVICES["H200"].clock_ghz / 2)
    monkeypatch.setattr(measured, "device_of", lambda folder, gpu: slow)
    after = measured.load(tmp_path / "some-gpu")
    for model in GPU_MODELS:
        ratio = measured._floor(before, model) / measured._floor(after, model)
        assert ratio == pytest.approx(2)


def test_files_of_other_stages_are_no_benchmarks(dry, tmp_path):
    pretend(dry, tmp_path / "some-gpu")
    (tmp_path / "some-gpu" / "kernels.json").write_text(json.dumps({"dry": False, "cases": []}))
    assert measured.load(tmp_path / "some-gpu").records


def test_missed_targets_and_missing_or_too_large_runs_are_said(dry, tmp_path):
    def change(facts):
        if facts["way"] == "eager" and facts["shape"].endswith("full-8192"):
            return {**facts, "outcome": "out of memory", "reason": "40 GiB of 80 GiB"}
        if facts["way"] == "chunked":
            return {**facts, "beside_ms": [4 * each for each in facts["rounds_ms"]]}
        if facts["shape"].endswith("full-20480") or facts["way"] == "compiled":
            return {"of": "a stage that was not run"}
        return facts

    pretend(dry, tmp_path / "some-gpu", change)
    page = measured.section(tmp_path, where="results")
    assert "eager is out of memory" in lines(page, "faster than eager, N = 8192")[0]
    assert "| out of memory | - |" in lines(page, "internvl3-1b-from-8b/full-8192")[0]
    assert lines(page, "faster than row-chunked")[0].count("0.25x **missed**") == 3
    assert lines(page, "faster than torch.compile")[0].count("not measured yet") == 3
    assert "not measured yet" in lines(page, "internvl3-1b-from-8b/full-20480")[0]


def test_a_picture_is_drawn(dry, tmp_path):
    pytest.importorskip("matplotlib")
    pretend(dry, tmp_path / "some-gpu")
    measured.plot(measured.load(tmp_path / "some-gpu"), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_without_results_the_page_says_so(tmp_path, monkeypatch):
    assert "not measured yet" in measured.section(tmp_path, where="results")
    assert report.gpu_section() in (ROOT / "README.md").read_text(encoding="utf-8")
