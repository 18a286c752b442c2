"""The doctor: what it finds, what it says, and when it calls an installation unusable."""

import json
import re
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drivekd import doctor
from drivekd.doctor import diagnose, format_build, format_diagnosis
from drivekd.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_finds_this_installation_usable():
    diagnosis = diagnose()
    assert diagnosis.problems == ()
    assert torch.__version__.startswith(diagnosis.versions["torch"])  # "+cu130" is its own
    assert diagnosis.devices[0].startswith("cpu: ")
    assert "drivekd is usable here." in format_diagnosis(diagnosis)


def test_the_lowest_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(re.fullmatch(r"([\w-]+)>=(.+)", d).groups() for d in project["dependencies"])
    for name, lowest in doctor.REQUIRED.items():
        assert ".".join(map(str, lowest)) == wanted[name]


def test_shows_for_each_op_what_auto_picks_and_why_not_the_others():
    diagnosis = diagnose()
    assert diagnosis.backends == dispatch.backend_info()
    text = format_diagnosis(diagnosis)
    for op, row in diagnosis.backends.items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{op} ")]
        assert f"auto on cpu: {row['auto on cpu']}" in line
        for backend in dispatch.BACKENDS:
            if row[backend] != "available":
                lines = [x for x in text.splitlines() if x.startswith(f"  not {backend} for ")]
                assert any(re.search(rf"\b{op}\b", x) for x in lines), (op, backend)


def test_a_reason_shared_by_ops_is_said_once():
    row = {"torch": "available", "triton": "no GPU", "native": "available", "auto on cpu": "torch"}
    diagnosis = replace(diagnose(), backends={"one": row, "two": row})
    assert format_diagnosis(diagnosis).count("no GPU") == 1
    assert "not triton for one, two: no GPU" in format_diagnosis(diagnosis)


def test_an_extension_that_is_not_built_says_so(monkeypatch):
    reasons = {"torch": None, "native": "no native, build it", "triton": "no triton"}
    monkeypatch.setattr(dispatch, "unavailable_reason", reasons.__getitem__)
    diagnosis = diagnose()
    assert diagnosis.extension["reason"] == "no native, build it"
    assert diagnosis.extension["isa"] is None
    assert format_build(diagnosis) == "drivekd: compiled extension not in use: no native, build it"


@pytest.mark.parametrize(("level", "shown"), [(2, "AVX-512"), (1, "AVX2"), (0, "generic")])
def test_a_built_extension_shows_its_file_and_instruction_set(monkeypatch, level, shown):
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda backend: None)
    spec = SimpleNamespace(origin="somewhere/_C.so")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    namespace = SimpleNamespace(cpu_isa=lambda: level)
    monkeypatch.setattr(torch.ops, "drivekd_native", namespace, raising=False)
    diagnosis = diagnose()
    built = {"path": "somewhere/_C.so", "isa": shown, "cuda": None, "reason": None}
    assert diagnosis.extension == built
    line = f"somewhere/_C.so, instruction set {shown}, without CUDA kernels"
    assert line in format_build(diagnosis)
    namespace.cuda_version = lambda: 13010
    assert f"instruction set {shown}, CUDA 13.1" in format_build(diagnose())


@pytest.mark.parametrize("version", [None, "2.10.1", "1.13.0+cu118"])
def test_a_missing_or_old_package_is_a_problem_with_its_remedy(monkeypatch, version):
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == "torch" else found(n))
    (problem,) = diagnose().problems
    assert "pip install 'torch>=2.11'" in problem


@pytest.mark.parametrize("version", ["2.11.0", "3.0", "2.14.0a0+git12", "2.13.0+cpu"])
def test_a_new_enough_package_is_none(monkeypatch, version):
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == "torch" else found(n))
    assert diagnose().problems == ()


def test_a_missing_optional_package_is_no_problem(monkeypatch):
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n in doctor.OPTIONAL else found(n))
    diagnosis = diagnose()
    assert diagnosis.problems == ()
    assert "not installed; it is for the demo's simulated world" in format_diagnosis(diagnosis)


def test_a_wrong_environment_variable_is_a_problem(monkeypatch):
    monkeypatch.setenv("DRIVEKD_BACKEND", "cuda")
    diagnosis = diagnose()
    assert any("DRIVEKD_BACKEND" in problem for problem in diagnosis.problems)
    assert diagnosis.environment["DRIVEKD_BACKEND"] == "cuda"
    assert "drivekd is not usable here:" in format_diagnosis(diagnosis)


def test_a_backend_asked_for_that_cannot_run_is_a_problem(monkeypatch):
    reasons = {"torch": None, "native": "no native, build it", "triton": "no triton"}
    monkeypatch.setattr(dispatch, "unavailable_reason", reasons.__getitem__)
    monkeypatch.setenv("DRIVEKD_BACKEND", "native")
    (problem,) = diagnose().problems
    assert "no native, build it" in problem
    assert "DRIVEKD_BACKEND is 'native'" in problem


def test_shows_the_environment_as_it_is(monkeypatch):
    monkeypatch.setenv("DRIVEKD_DEBUG", "1")
    text = format_diagnosis(diagnose())
    assert re.search(r"DRIVEKD_DEBUG +'1' \(", text)
    assert re.search(r"DRIVEKD_BUILD +not set \(", text)


def test_the_diagnosis_is_json():
    diagnosis = diagnose()
    document = json.loads(json.dumps(asdict(diagnosis)))
    assert document["backends"] == diagnosis.backends
    assert document["problems"] == []
