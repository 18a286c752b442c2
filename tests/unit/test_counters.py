"""Hardware counters: which launches are looked at, and the short table of what ncu says."""

import json

import pytest

from benchmarks import counters
from tests.helpers.stages import stage

pytest.importorskip("triton", reason="the stage looks at Triton kernels")

NAMES = (
    "ID", "Kernel Name", "Grid Size", "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "l1tex__t_requests_pipe_lsu_mem_local_op_ld.sum",
    "l1tex__t_requests_pipe_lsu_mem_local_op_st.sum",
    "launch__registers_per_thread",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",
)  # fmt: skip
UNITS = ("", "", "", "ns", "%", "%", "%", "%", "", "", "register/thread", "inst", "inst", "inst",
         "inst")  # fmt: skip
DQ = ("0", "dq_kernel", "(2, 463, 1)", "269,700", "71.25", "0", "55.5", "61.0", "1,024", "512",
      "227", "0.9", "2.1", "0.1", "1.0")  # fmt: skip
DK = ("1", "dk_kernel", "(264, 1, 1)", "170,800", "60", "0", "44", "50", "0", "0", "255", "1", "2",
      "3", "4")  # fmt: skip


def listing(*rows):
    quoted = [",".join(f'"{cell}"' for cell in row) for row in (NAMES, UNITS, *rows)]
    return "\n".join(["==PROF== Connected to process 7", *quoted, ""])


@pytest.fixture
def folder(tmp_path):
    launches = [
        {"pass": name, "grid": [1, 1, 1], "shape": "internvl3-1b-from-8b/full-8192", "loss": "mse"}
        for name in ("dq", "dk")
    ]
    (tmp_path / "ncu.json").write_text(json.dumps({"dry": False, "launches": launches}))
    (tmp_path / "ncu.csv").write_text(listing(DQ, DK))
    return tmp_path


def cells(table, name):
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {name} "))
    head = table.splitlines()[0]
    return dict(zip(*([x.strip() for x in line.strip("|").split("|")] for line in (head, row)),
                    strict=True))  # fmt: skip


def test_a_short_table_is_made_of_ncus(folder):
    found = cells(counters.short_table(folder), "dq")
    assert found["call"] == "internvl3-1b-from-8b/full-8192 mse"
    assert found["time"] == "0.270 ms"
    assert found["SM %"] == "71.2"
    assert found["tensor %"] == "55.5"  # the larger of both kinds of instruction
    assert found["MUFU %"] == "61"
    assert found["local"] == "1536"  # loads and stores
    assert found["registers"] == "227"
    assert found["warps stalled for"] == "long_scoreboard 2.10, selected 1.00, wait 0.90"
    assert found["L2 %"] == "-"  # not in this listing


def test_launches_that_do_not_fit_are_an_error(folder):
    (folder / "ncu.csv").write_text(listing(DQ))
    with pytest.raises(ValueError, match="ncu saw 1 launches, not 2"):
        counters.short_table(folder)
    (folder / "ncu.csv").write_text("==ERROR== The user does not have permission\n")
    with pytest.raises(ValueError, match="left no table"):
        counters.short_table(folder)


def test_the_stage_is_gone_through_and_takes_the_last_launch_of_a_pass(tmp_path):
    done = stage(tmp_path, "ncu")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "ncu.json").read_text())
    assert [each["pass"] for each in content["launches"]] == ["dq", "dk"]
    assert content["launches"][0]["grid"] == [2, 463, 1]  # of the second chunk, not the first
    with pytest.raises(ValueError, match="dry run"):
        counters.short_table(tmp_path)


def test_unknown_passes_are_named(tmp_path):
    done = stage(tmp_path, "ncu", "internvl3-1b-from-8b/full-8192", "mse", "dq", "cosine")
    assert done.returncode != 0
    assert "passes ['cosine']" in done.stderr and "lse teacher" in done.stderr
    with pytest.raises(ValueError, match="shape 'everything'"):
        counters.run(tmp_path, "everything", "mse", ["dq"])
