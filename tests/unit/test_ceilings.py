"""What a GPU can do at most: gone through on the CPU, and what is made of the file."""

import json
import time

import pytest
import torch

from benchmarks.devices import (
    DEVICES,
    device_of,
    load_ceilings,
    named_device,
    pair_floor_ps,
)
from benchmarks.shapes import GPU_MODELS
from tests.helpers.stages import stage

pytest.importorskip("triton", reason="the stages measure Triton kernels")

from benchmarks.ceilings import clocks, measure
from benchmarks.offline.__main__ import main as offline

GPU = {"gpu": "NVIDIA H100 80GB HBM3", "arch": 90, "sms": 100, "l2_bytes": 50 * 2**20}


def ceiling(amount, ms, mhz):
    """Rounds of which one was disturbed."""
    return {"amount": amount, "rounds_ms": [ms, ms, 9 * ms], "sm_mhz": [mhz, mhz, mhz / 2]}


def pretend(**changes):
    """A file as a GPU would leave it."""
    measured = {
        "copy": ceiling(3e9, 1.0, 1900.0),
        "l2-16": ceiling(6e9, 1.0, 1900.0),
        "product": ceiling(8e11, 1.0, 1600.0),
        "exp2": ceiling(15 * 100 * 1.98e6, 1.0, 1980.0),
        "launch-many": ceiling(1000, 20.0, 1980.0),
        "launch-graph": ceiling(1000, 1.2, 1980.0),
        "start": {**ceiling(100, 1.0, 1980.0), "start_clocks": [900.0, 700.0, 800.0]},
        "pass": ceiling(1, 1.0, 1700.0),
    }
    measured = {name: facts for name, facts in (measured | changes).items() if facts is not None}
    return {"dry": False, "machine": GPU, "measured": measured, "failed": {}}


def written(folder, content):
    path = folder / "ceilings.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("ceilings")
    done = stage(out, "ceilings")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "ceilings.json").read_text())


def test_every_ceiling_is_gone_through_and_every_round_kept(dry):
    assert list(dry["measured"]) == list(measure.CEILINGS)
    assert dry["failed"] == {}
    for facts in dry["measured"].values():
        assert len(facts["rounds_ms"]) == len(facts["sm_mhz"]) == 2
        assert facts["amount"] > 0 and facts["smi"] == []


def test_dry_runs_are_no_ceilings(dry, tmp_path):
    with pytest.raises(ValueError, match="dry run"):
        load_ceilings(written(tmp_path, dry))


def test_one_ceiling_that_fails_costs_no_other(tmp_path, monkeypatch):
    def fails(clock):
        raise RuntimeError("no such instruction")

    def works(clock):
        return {"amount": 1, "unit": "B", "rounds_ms": [1.0] * 9, "sm_mhz": [1.0] * 9}

    class Stopped(BaseException):
        pass

    def stopped(clock):
        raise Stopped

    monkeypatch.setattr(measure, "DRY", True)
    monkeypatch.setattr(clocks, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "CEILINGS", {"copy": works, "exp2": fails, "l2-16": works})
    assert measure.measure_all(tmp_path / "one.json") == 1
    content = json.loads((tmp_path / "one.json").read_text())
    assert list(content["measured"]) == ["copy", "l2-16"]
    assert content["failed"] == {"exp2": "RuntimeError: no such instruction"}
    # The end of the stage's time takes nothing that was measured.
    monkeypatch.setattr(measure, "CEILINGS", {"copy": works, "exp2": stopped, "l2-16": works})
    with pytest.raises(Stopped):
        measure.measure_all(tmp_path / "two.json")
    assert list(json.loads((tmp_path / "two.json").read_text())["measured"]) == ["copy"]


# ---- clocks


def test_the_clock_is_that_of_multiprocessors_seen_twice():
    before = torch.tensor([[0, 1_000, 50], [1, 9_000_000, 50], [2, 0, 50]])
    after = torch.tensor([[1, 9_000_000 + 1_755_000, 1_000_050], [0, 1_756_000, 1_000_050]])
    assert clocks.clock_between(before, after) == pytest.approx(1755)
    assert clocks.clock_between(before, before) == 0.0
    assert clocks.clock_between(before[:1], after[:1]) == 0.0


def test_nvidia_smi_is_asked_while_something_runs(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\nwhile :; do echo "1755 MHz, 2619 MHz, 400 W, 50"; sleep .05; done'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with clocks.Watch() as watch:
        limit = time.monotonic() + 20
        while not watch.since(0.0) and time.monotonic() < limit:
            time.sleep(0.05)
        assert watch.since(0.0)[0] == "1755 MHz, 2619 MHz, 400 W, 50"
        assert watch.since(time.monotonic() + 60) == []
    assert watch._process.poll() is not None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with clocks.Watch() as watch:
        assert watch.since(0.0) == []


def test_a_program_starts_when_the_one_before_has_left_its_place():
    """Two places on each of two multiprocessors; 70 clocks from an end to the next beginning."""
    noted = []
    for sm, zero in ((0, 10_000), (1, 777)):
        free = [(zero, 0), (zero + 500, 1)]
        for number in range(8):
            begin, place = free.pop(0)
            end = begin + 1_000
            noted.append([sm, begin, begin + 300 + number % 2, end])
            free.append((end + 70, place))
            free.sort()
    assert measure.start_clocks(torch.tensor(noted)[torch.randperm(16)]) == (70.0, 300.0)


# ---- a device of them


def test_a_device_is_stated_for_the_clock_of_a_pass(tmp_path):
    device = load_ceilings(written(tmp_path, pretend())).device()
    assert device.clock_ghz == pytest.approx(1.7)
    assert device.mma_tflops == pytest.approx(800 * 1.7 / 1.6)
    assert device.exp2_per_clock == pytest.approx(15)
    assert (device.hbm_tbps, device.l2_tbps) == pytest.approx((3.0, 6.0))
    assert device.start_clocks == 800
    assert device.launch_us == pytest.approx({"eager": 20.0, "graph": 1.2})
    assert (device.sms, device.arch, device.assumed) == (100, 90, ())
    assert device.at(1.6).mma_tflops == pytest.approx(800)


@pytest.mark.parametrize("name", ["pass", "exp2", "start"])
def test_what_was_not_measured_is_named(tmp_path, name):
    path = written(tmp_path, pretend(**{name: None}))
    with pytest.raises(ValueError, match=f"lack {name}; run"):
        load_ceilings(path).device()


def test_without_a_file_the_device_is_known_by_name(tmp_path):
    assert device_of(tmp_path, "NVIDIA H100 80GB HBM3") == DEVICES["H100"]
    assert device_of(tmp_path, "Some GPU") == DEVICES["H200"]
    assert named_device("Some GPU") is None
    written(tmp_path, pretend())
    assert device_of(tmp_path, "NVIDIA H200").sms == 100


def test_floors_follow_the_clock_as_their_passes_are_bound():
    device = DEVICES["H200"]
    exp2, product = device.exp2_ps(), device.product_ps(128)
    assert exp2 == pytest.approx(0.270, abs=1e-3)
    assert product == pytest.approx(0.325, abs=1e-3)
    student, teacher = GPU_MODELS["internvl3-1b-from-8b"]
    # 14 heads of 64: exp2 bounds log-sum-exp and map, two products of 64 bound dq and dk.
    wanted = 14 * (2 * exp2 + 2 * product) + 28 * 2 * product
    assert pair_floor_ps(device, student, teacher) == pytest.approx(wanted)
    faster = pair_floor_ps(device.at(2 * device.clock_ghz), student, teacher)
    assert faster == pytest.approx(wanted / 2)
    (H, _, _), (H_t, _, _) = student, teacher = GPU_MODELS["internvl3-2b-from-38b"]
    wanted = (6 * H + 2 * H_t) * product
    assert pair_floor_ps(device, student, teacher) == pytest.approx(wanted)


def test_the_laboratory_takes_measured_ceilings(tmp_path, capsys):
    path = written(tmp_path, pretend())
    assert offline(["--ceilings", str(path), "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "'exp2_per_clock': 15.0" in shown and "H200" not in shown.split("'name'")[1]
    with pytest.raises(SystemExit):
        offline(["--ceilings", str(path), "--device", "H100"])
