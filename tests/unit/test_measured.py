"""The benchmarks for a GPU, gone through on the CPU, and what is made of their files."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, measured, measured_tables, report
from benchmarks.devices import DEVICES, pair_floor_ps
from benchmarks.shapes import GPU_MODELS, GPU_PAIRS, GPU_STEPS
from tests.helpers.stages import QUICK, ROOT, stage

pytest.importorskip("pytest_benchmark")

SOME = {"fused", "sdpa"}
WAYS = {
    "t2v-1": SOME | {"eager", "chunked", "fused-lse"},
    "t2v-6": SOME | {"eager", "chunked", "fused-lse"},
    "full-2048": SOME | {"eager", "chunked", "compiled"},
    "full-8192": SOME | {"eager", "chunked", "compiled"},
    "full-20480": SOME | {"chunked"},
    "full-65536": SOME | {"eager"},
}
STEP_WAYS = ["drivekd", "plain", "public", "plain-ce"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Files of a dry run of two stages, and of the benchmark of gradients."""
    out = tmp_path_factory.mktemp("dry")
    for arguments in (("loss", "internvl3-1b", "t2v"), ("step",)):
        done = stage(out, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not list(out.glob("*.jsonl"))
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
        if facts["way"] not in ("fused", "drivekd"):
            assert len(facts["beside_ms"]) == len(facts["rounds_ms"])
        if facts.get("mode") and facts["way"] != "sdpa":
            assert facts["loss_error"] < 0.05
        found.setdefault((facts["shape"], facts.get("mode")), []).append(facts["way"])
    for kind in ("t2v-1", "t2v-6"):
        assert set(found[f"internvl3-1b-from-8b/{kind}", "both"]) == WAYS[kind]
        assert found[f"internvl3-1b-from-8b/{kind}", "forward"] == ["fused"]
    assert found["gradients-494m", None] == ["gram", "combination", "projection", "public"]
    for shape in GPU_STEPS:
        assert found[shape, None] == STEP_WAYS


def test_a_dry_step_agrees_with_the_public_procedure_in_float32(dry):
    facts = [each for each in facts_of(dry) if "update_error" in each and each["way"] == "public"]
    steps = [each for each in facts if each["shape"] in GPU_STEPS]
    assert len(steps) == 2
    for each in steps:
        assert each["dtype"] == "float32" and each["apart"] == {}
        assert each["update_error"] < 1e-5
        assert set(each["loss_errors"]) == {"ce", "perception", "reasoning", "planning"}


def test_a_dry_projection_reads_nothing_back(dry):
    (facts,) = [each for each in facts_of(dry) if each["way"] == "projection"]
    assert facts["host_sync"] == ""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stage_that_is_ended_keeps_what_it_has(tmp_path, how):
    """An interrupted one in pytest-benchmark's file, a killed one in lines."""
    lines, whole = tmp_path / "loss.jsonl", tmp_path / "loss.json"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "full",
            f"--benchmark-json={whole}", "benchmarks/bench_attention_map_loss_gpu.py",
        ],
        cwd=ROOT, env={**QUICK, "DRIVEKD_ROUNDS": str(lines)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not lines.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=60)
    if how == signal.SIGINT:
        assert len(json.loads(whole.read_text())["benchmarks"]) >= 1
    whole.unlink(missing_ok=True)
    text = lines.read_text().replace('"dry": true', '"dry": false')
    lines.write_text(text + '{"shape": "cut o')
    (tmp_path / "machine.json").write_text('{"gpu": "a GPU"}')
    found = measured.load(tmp_path)
    first = found.get("internvl3-1b-from-8b/full-8192", "fused")
    assert len(first.facts["rounds_ms"]) == 3


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


def test_every_named_shape_is_run_and_what_targets_need_first():
    assert set(GPU_PAIRS) == {f"{model}/{kind}" for model in GPU_MODELS for kind in WAYS}
    code = (
        "from benchmarks.bench_attention_map_loss_gpu import CASES; print(*[c.id for c in CASES])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    ids = done.stdout.split()
    wanted = {
        f"{model}/{kind}-both-{way}" for model in GPU_MODELS for kind in WAYS for way in WAYS[kind]
    }
    forward = {f"{shape}-forward-fused" for shape in GPU_PAIRS if "65536" not in shape}
    assert set(ids) == wanted | forward and len(ids) == len(set(ids))
    for model in GPU_MODELS:
        full = [each for each in ids if each.startswith(f"{model}/full")]
        assert full[0] == f"{model}/full-8192-both-fused"
        assert full[5] == f"{model}/full-8192-both-compiled"
        t2v = [each for each in ids if each.startswith(f"{model}/t2v")]
        assert t2v[:2] == [f"{model}/t2v-6-both-{way}" for way in ("fused", "sdpa")]


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


# In units of the fused way, drivekd's step, and its projection.
TIMES = {"fused": 1.0, "fused-lse": 0.5, "eager": 12.0, "compiled": 4.0, "chunked": 3.0,
         "sdpa": 1.25, "gram": 1.0, "combination": 1.0, "projection": 1.1, "drivekd": 1.0,
         "plain": 0.95, "plain-ce": 1.1, "public": 60.0}  # fmt: skip
# The clock halves after two rounds: ratios within a round do not mind.
UNIT = [2.0, 2.0, 4.0, 4.0, 4.0]


def as_on_a_gpu(facts):
    """Facts of a dry run with the numbers of a real one."""
    facts |= {"dry": False, "clocks": "1755 MHz, 2619 MHz, 400 W, 50"}
    facts["rounds_ms"] = [TIMES[facts["way"]] * each for each in UNIT]
    if "beside_ms" in facts:
        facts["beside_ms"] = UNIT
    return facts


def pretend(dry, folder, change=lambda facts: facts):
    """Results as a GPU would leave them: all shapes; ways at fixed multiples of the fused one."""
    folder.mkdir()
    machine = json.loads((dry / "machine.json").read_text())
    machine |= {"gpu": "Some GPU", "driver": "555.1", "commit": "0123456789abcdef"}
    machine["changed_files"] = 0
    (folder / "machine.json").write_text(json.dumps(machine))
    loss = json.loads((dry / "loss-internvl3-1b-t2v.json").read_text())
    models = [
        each
        for each in loss["benchmarks"]
        if each["extra_info"]["shape"] == "internvl3-1b-from-8b/t2v-1"
    ]
    (eager,) = [each for each in models if each["extra_info"]["way"] == "eager"]
    compiled = copy.deepcopy(eager)
    compiled["extra_info"]["way"] = "compiled"
    benchmarks = []
    for shape in GPU_PAIRS:
        for each in copy.deepcopy([*models, compiled]):
            facts = as_on_a_gpu(each["extra_info"] | {"shape": shape})
            facts["extra_peak_bytes"] = 2**20 * (60 if facts["way"] == "eager" else 1)
            if facts["mode"] == "forward":
                facts["rounds_ms"] = [each / 4 for each in facts["rounds_ms"]]
            if "gradient_error" in facts:
                facts["gradient_error"] = 1e-3
            each["extra_info"] = change(facts)
            benchmarks.append(each)
    benchmarks.append({"extra_info": {"device": "cpu"}})  # of the CPU: left out
    benchmarks.append({"extra_info": {"outcome": "measured", "dry": False}})  # beside the targets
    (folder / "loss-all.json").write_text(json.dumps({**loss, "benchmarks": benchmarks}))
    gram = json.loads((dry / "gram.json").read_text())
    for each in gram["benchmarks"]:
        facts = as_on_a_gpu(each["extra_info"])
        if facts["way"] in ("gram", "combination"):
            facts |= {"rounds_ms": [1.0, 2.0], "beside_ms": [0.9, 1.8]}
        facts["extra_peak_bytes"] = facts["gradient_bytes"] * (7 if facts["way"] == "public" else 0)
        each["extra_info"] = change(facts)
    (folder / "gram.json").write_text(json.dumps(gram))
    step = json.loads((dry / "step.json").read_text())
    for each in step["benchmarks"]:
        facts = as_on_a_gpu(each["extra_info"])
        facts["extra_peak_bytes"] = 2**30 * (40 if facts["way"] == "public" else 10)
        assert "student" in facts["phases_ms"]
        facts["phases_ms"] = {"student": 7.0, "projection": 9.0}
        each["extra_info"] = change(facts)
    (folder / "step.json").write_text(json.dumps(step))


def lines(page, start):
    return [line for line in page.splitlines() if line.startswith(f"| {start}")]


def test_tables_are_made_of_the_rounds(dry, tmp_path):
    pretend(dry, tmp_path / "some-gpu")
    page = measured_tables.section(tmp_path, where="results")
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
    page = measured_tables.section(tmp_path, where="results")
    assert "12x met | 12x met | 12x met" in lines(page, "faster than eager, N = 2048")[0]
    assert lines(page, "less extra memory, N = 8192")[0].count("60x met") == 3
    assert "0.8x met" in lines(page, "time of sdpa, N = 8192")[0]
    assert "0.4x met" in lines(page, "time of sdpa, 6 views, lse given")[0]
    assert "90 % met" in lines(page, "gram of 4")[0]
    assert "60x met" in lines(page, "AGP faster than the public")[0]
    assert "5 met" in lines(page, "buffers of AGP")[0]
    assert "0 met" in lines(page, "host syncs of AGP")[0]
    assert "1.05x met" in lines(page, "time of the plain step")[0]
    assert lines(page, "gram |")[0].endswith("| 90 % |  |")
    assert lines(page, "projection |")[0] == "| projection | 4.4 (2.2-4.4) | 91 % | 5 |"
    assert lines(page, "public |")[0] == "| public | 240 (120-240) |  | 12 |"
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
    page = measured_tables.section(tmp_path, where="results")
    assert "eager is out of memory" in lines(page, "faster than eager, N = 8192")[0]
    assert "| out of memory | - |" in lines(page, "internvl3-1b-from-8b/full-8192")[0]
    assert lines(page, "faster than row-chunked")[0].count("0.25x **missed**") == 3
    assert lines(page, "faster than torch.compile")[0].count("not measured yet") == 3
    assert "not measured yet" in lines(page, "internvl3-1b-from-8b/full-20480")[0]


def test_steps_are_told_with_their_memory_and_how_far_apart_they_are(dry, tmp_path):
    pretend(dry, tmp_path / "some-gpu")
    page = measured_tables.section(tmp_path, where="results")
    rows = {
        tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines(page, "step-")
    }
    assert set(rows) == {(shape, way) for shape in GPU_STEPS for way in STEP_WAYS}
    cells = [cell.strip() for cell in rows["step-6-views", "public"].split("|")[3:-1]]
    assert cells[:4] == ["240 (120-240)", "40", "60x", "student 7, projection 9"]
    assert len(cells[4].split(", ")) == 4 and cells[5] == "1.0000"
    assert [cell.strip() for cell in rows["step-6-views", "drivekd"].split("|")[3:-1]] == [
        "4 (2-4)", "10", "1x", "student 7, projection 9", "", ""
    ]  # fmt: skip


def test_missed_targets_of_training_are_said(dry, tmp_path):
    def change(facts):
        if facts["shape"] in GPU_STEPS and facts["way"] == "public":
            return {**facts, "outcome": "out of memory", "apart": {"update": 0.5}}
        if facts["way"] in ("plain", "public"):
            return {**facts, "beside_ms": [2 * each for each in facts["rounds_ms"]]}
        if facts["way"] == "projection":
            return {**facts, "extra_peak_bytes": facts["gradient_bytes"], "host_sync": "called a"}
        return facts

    pretend(dry, tmp_path / "some-gpu", change)
    page = measured_tables.section(tmp_path, where="results")
    assert "2x **missed**" in lines(page, "time of the plain step")[0]
    assert "0.5x **missed**" in lines(page, "AGP faster than the public")[0]
    assert "6 **missed**" in lines(page, "buffers of AGP")[0]
    assert "**missed**: called a" in lines(page, "host syncs of AGP")[0]
    assert "out of memory | - | - | - |" in lines(page, "step-6-views | public")[0]
    assert "**too far**" in lines(page, "step-6-views | public")[0]


def test_targets_of_training_without_a_run_are_not_measured(dry, tmp_path):
    pretend(dry, tmp_path / "some-gpu")
    for name in ("step", "gram"):
        (tmp_path / "some-gpu" / f"{name}.json").unlink()
    page = measured_tables.section(tmp_path, where="results")
    for what in ("time of the plain", "AGP faster", "buffers of AGP", "host syncs", "gram of 4"):
        assert "not measured yet" in lines(page, what)[0]
    assert "Training steps" not in page


def test_a_picture_is_drawn(dry, tmp_path):
    pytest.importorskip("matplotlib")
    pretend(dry, tmp_path / "some-gpu")
    measured_tables.plot(measured.load(tmp_path / "some-gpu"), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_without_results_the_page_says_so(tmp_path, monkeypatch):
    assert "not measured yet" in measured_tables.section(tmp_path, where="results")
    assert report.gpu_section() in (ROOT / "README.md").read_text(encoding="utf-8")
