"""Times of single launches, gone through on the CPU, and beside them what was predicted."""

import dataclasses
import json

import pytest

from benchmarks import predicted, report
from benchmarks.devices import DEVICES
from benchmarks.shapes import GPU_MODELS
from tests.helpers.stages import ROOT, stage

pytest.importorskip("triton", reason="the stages measure Triton kernels")

FULL = "internvl3-1b-from-8b/full-8192"
CASES = {
    *((f"{model}/{kind}", "mse") for model in GPU_MODELS
      for kind in ("full-2048", "full-8192", "full-20480", "t2v-6")),
    (FULL, "cosine"), (FULL, "kl"), ("gradients-494m", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels")
    done = stage(out, "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "kernels.json").read_text())


def test_every_launch_of_every_case_is_kept(dry):
    assert dry["failed"] == {}
    found = {(case["shape"], case["loss"]): case["launches"] for case in dry["cases"]}
    assert set(found) == CASES
    for launches in found.values():
        assert all(len(each["rounds_ms"]) == 2 for each in launches)
    names = [each["name"] for each in found[FULL, "mse"]]
    chunk = ["map teacher", "mse", "dq", "dk"]
    passes = [name for name in names if name in predicted.PASSES]
    assert passes == ["lse teacher", "lse student", *chunk, *chunk]
    assert {"tokens", "spans", "aten::sum"} <= set(names)
    assert [each["name"] for each in found["gradients-494m", ""] if each["grid"]] == [
        "gram", "fold", "combine",
    ]  # fmt: skip


def test_a_round_that_launches_something_else_is_an_error(run_python):
    said = run_python(
        "from benchmarks import kernel_times\n"
        "from benchmarks.ceilings import kernels\n"
        "kernel_times._FLUSH_BYTES = 1\n"
        "grids = iter(range(1, 99))\n"
        "launch = lambda: kernels.empty_kernel[(next(grids),)](1, num_warps=4)\n"
        "try:\n"
        "    kernel_times.time_launches(launch, None)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n",
        TRITON_INTERPRET="0",
        DRIVEKD_DRY="1",
    )
    assert said.startswith("a round launched")


# ---- beside predictions, of files with the schema of a real run


def passes(**milliseconds):
    return {
        name.replace("_", " "): {"ms": ms, "floor_ms": ms / 1.25, "bound": "L2"}
        for name, ms in milliseconds.items()
    }


def case(shape, loss, **milliseconds):
    return {"shape": shape, "loss": loss, "passes": passes(**milliseconds)}


def launches(**milliseconds):
    """Each pass in two launches, a third round disturbed."""
    return [
        {"name": name.replace("_", " "), "grid": [1, 1, 1], "rounds_ms": [ms / 2, ms / 2, 5 * ms]}
        for name, ms in milliseconds.items()
        for _ in range(2)
    ]


@pytest.fixture
def results(tmp_path):
    named = {
        "H100": {"cases": [case(FULL, "mse", lse_teacher=0.4, dq=0.3, dk=0.2)]},
        "H200": {"cases": [case(FULL, "mse", dq=77.0)]},
    }
    (tmp_path / "predictions.json").write_text(json.dumps(named))
    content = {
        "dry": False,
        "machine": {"gpu": "NVIDIA H100 80GB HBM3"},
        "empty_ms": [0.002, 0.003, 0.002],
        "cases": [
            {"shape": FULL, "loss": "mse", "sm_mhz": 1700.0,
             "launches": launches(lse_teacher=0.44, dq=0.6, dk=0.1, tokens=0.01)},
            {"shape": "internvl3-1b-from-8b/full-20480", "loss": "mse", "sm_mhz": 1900.0,
             "launches": launches(dq=1.0)},
        ],
    }  # fmt: skip
    (tmp_path / "some-h100").mkdir()
    (tmp_path / "some-h100" / "kernels.json").write_text(json.dumps(content))
    return tmp_path


def test_passes_are_joined_with_what_was_predicted_for_that_gpu(results):
    found = {
        (row.shape, row.name): row
        for row in predicted.rows(results / "some-h100", results / "predictions.json")
    }
    assert found[FULL, "lse teacher"].ratio == pytest.approx(1.1)
    assert not found[FULL, "lse teacher"].far
    assert found[FULL, "dq"].ratio == pytest.approx(2.0)
    assert found[FULL, "dq"].far and found[FULL, "dk"].far  # too slow, and too fast
    assert found[FULL, "dq"].of_floor == pytest.approx(0.6 / (0.3 / 1.25))
    assert found[FULL, "others"].ratio is None
    assert found["internvl3-1b-from-8b/full-20480", "dq"].ratio is None


def test_predictions_from_measured_ceilings_replace_the_named_ones(results):
    device = dataclasses.asdict(DEVICES["H100"].at(1.8))
    own = {"device": device, "cases": [case(FULL, "mse", dq=0.5)]}
    (results / "some-h100" / "predictions.json").write_text(json.dumps(own))
    rows = {
        row.name: row
        for row in predicted.rows(results / "some-h100", results / "predictions.json")
        if row.shape == FULL
    }
    assert rows["dq"].ratio == pytest.approx(1.2) and rows["dq"].before == 0.3
    assert rows["lse teacher"].ratio == pytest.approx(1.1)  # not predicted anew
    assert "1.800 GHz during a pass, 818 TFLOP/s at that clock" in predicted.section(results)


def test_tables_mark_differences_and_name_the_slowest(results):
    page = predicted.section(results)
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {FULL} mse"))
    assert "| 0.440 (1.10) | **0.600 (2.00)** | **0.100 (0.50)** | 0.010 |" in row
    assert f"| dq | {FULL} mse | 0.300 | 0.300 | 0.600 | 2.00 | 2.50 | L2 |" in page
    assert "SM clock during these calls 1700-1900 MHz; an empty kernel timed so: 2.0 us" in page
    assert f"Slowest in units of their floors: dq of {FULL} mse (2.50x), lse teacher" in page


def test_a_dry_run_is_no_result(results, dry):
    (results / "some-h100" / "kernels.json").write_text(json.dumps(dry))
    with pytest.raises(ValueError, match="dry run"):
        predicted.section(results)


def test_committed_predictions_cover_every_case():
    content = json.loads((predicted.RESULTS / "predictions.json").read_text(encoding="utf-8"))
    assert set(content) == set(predicted.NAMED)
    for each in content.values():
        assert {(one["shape"], one["loss"]) for one in each["cases"]} == CASES
        assert len(each["commit"]) == 40
        for one in each["cases"]:
            for facts in one["passes"].values():
                assert facts["ms"] >= 0.99 * facts["floor_ms"] > 0


def test_the_page_of_benchmarks_is_what_the_script_makes_of_the_committed_files():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert report.fill(page, report.OF_BENCHMARKS) == page, "run python -m benchmarks.report"
