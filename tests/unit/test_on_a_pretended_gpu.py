"""What the stages of on_gpu.sh do on a GPU only; see tests/helpers/pretended_gpu.py."""

import json

import pytest
import torch

from tests.helpers.pretended_gpu import Event, pretended_gpu

pytest.importorskip("triton", reason="the stages measure Triton kernels")

from benchmarks import counters, kernel_times, warm
from benchmarks.ceilings import measure
from benchmarks.kernel_times import Case

__all__ = ["pretended_gpu"]
SHAPE = "internvl3-1b-from-8b/t2v-1"


def test_launches_and_operations_of_torch_are_timed(pretended_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_times, "CASES", (Case(SHAPE, "mse"), Case(SHAPE, "kl")))
    assert kernel_times.measure_all(tmp_path / "kernels.json") == 0
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["dry"] is False and content["machine"]["gpu"] == "NVIDIA H100"
    assert content["empty_ms"] == [40.0] * kernel_times.ROUNDS
    for case in content["cases"]:
        names = [each["name"] for each in case["launches"]]
        assert {"lse teacher", "map teacher", "dq", "dk", "aten::sum"} <= set(names)
        assert all(each["rounds_ms"] == [40.0] * 10 for each in case["launches"])
        assert case["sm_mhz"] == 0.0  # no time passes here


def test_a_round_in_which_the_host_was_late_is_thrown_away(pretended_gpu, monkeypatch):
    call = Case(SHAPE, "mse").call(torch.zeros, "cpu")
    monkeypatch.setattr(Event, "late", 2)
    rows = kernel_times.time_launches(call, None)
    assert all(len(each["rounds_ms"]) == kernel_times.ROUNDS for each in rows)
    first = pretended_gpu[0]
    assert pretended_gpu == [first, 2 * first, *[4 * first] * kernel_times.ROUNDS]


def test_every_ceiling_is_measured(pretended_gpu, tmp_path, monkeypatch):
    small = {"COPIED": 2**12, "READ": 2**24, "L2_READ": 2**24, "PRODUCT": 16, "LAUNCHES": 3}
    for name, value in small.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "captured", lambda call: call)
    ceilings = {name: each for name, each in measure.CEILINGS.items() if name != "pass"}
    monkeypatch.setattr(measure, "CEILINGS", ceilings)
    assert measure.measure_all(tmp_path / "ceilings.json") == 0
    content = json.loads((tmp_path / "ceilings.json").read_text())
    assert set(content["measured"]) == set(ceilings)
    for facts in content["measured"].values():
        assert len(facts["rounds_ms"]) == len(facts["sm_mhz"]) == measure.ROUNDS
    assert len(content["measured"]["start"]["start_clocks"]) == measure.ROUNDS


def test_the_profiler_is_open_around_the_last_launch_of_each_chosen_pass(pretended_gpu, tmp_path):
    counters.run(tmp_path, SHAPE, "mse", ["lse teacher", "dk"])
    assert pretended_gpu == ["start", "stop"] * 2
    content = json.loads((tmp_path / "ncu.json").read_text())
    assert content["dry"] is False
    assert [each["pass"] for each in content["launches"]] == ["lse teacher", "dk"]


def test_workers_share_all_binaries(pretended_gpu, monkeypatch):
    compiled = []

    def run(self, *args, grid, warmup, **options):
        compiled.append(self.__name__)
        if self.__name__ == "dq_kernel":
            raise RuntimeError("does not compile")

    cases = [Case(SHAPE, "mse"), Case(SHAPE, "mse")]
    launches = warm.distinct(cases, 90)
    names = [launch.kernel.__name__ for launch in launches]
    assert len(names) == len({launch.key for launch in launches})
    monkeypatch.setattr(type(launches[0].kernel), "run", run)
    failed = [warm.compile_share(launches, worker, 3) for worker in range(3)]
    assert sorted(compiled) == sorted(names)
    assert sum(failed) == names.count("dq_kernel")
