"""What is installed, what was built, and which backend each op would use here, and why."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from drivekd.errors import BackendUnavailableError
from drivekd.ops import dispatch

# Lowest versions that drivekd supports, as in pyproject.toml.
REQUIRED = {
    "torch": (2, 11),
    "transformers": (5, 17),
    "accelerate": (1, 10),
    "numpy": (1, 26),
}
OPTIONAL = {
    "triton": "Triton kernels on a GPU",
    "highway-env": "the demo's simulated world (pip install 'drivekd[demo]')",
}
VARIABLES = {
    "DRIVEKD_BACKEND": "default for backend='auto': torch, triton or native",
    "DRIVEKD_BUILD": "at installation: 0 builds no extension, 1 makes a failed build an error",
    "DRIVEKD_DEBUG": "1 checks values (finite? right log-sum-exp?) at the price of a sync",
}
_ISA_NAMES = {0: "generic", 1: "AVX2", 2: "AVX-512"}


@dataclass(frozen=True)
class Diagnosis:
    """The state of this installation.

    Attributes:
        versions: package -> version, or None where it is not installed.
        devices: what computations can run on.
        extension: `path` of the compiled extension, its `isa` (the instruction set that it picked
            on this processor), `cuda`, the toolkit that its CUDA kernels were compiled with, and
            `reason`, why it cannot be used; None where it does not apply.
        backends: op -> {backend: "available" or why not, "auto on cpu": name, ...}.
        environment: variable -> value, or None where it is not set.
        problems: what keeps drivekd from working here; empty when it is usable.
    """

    versions: dict[str, str | None]
    devices: tuple[str, ...]
    extension: dict[str, str | None]
    backends: dict[str, dict[str, str]]
    environment: dict[str, str | None]
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this interpreter, its packages, the machine and the environment."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in ("drivekd", *REQUIRED, *OPTIONAL)}
    problems = _version_problems(versions)
    backends: dict[str, dict[str, str]] = {}
    try:
        backends = dispatch.backend_info()
    except (BackendUnavailableError, ValueError) as error:  # a bad DRIVEKD_BACKEND
        wanted = os.environ.get("DRIVEKD_BACKEND")
        problems.append(f"{error} (DRIVEKD_BACKEND is {wanted!r})" if wanted else str(error))
    return Diagnosis(
        versions=versions,
        devices=_devices(),
        extension=_extension(),
        backends=backends,
        environment={name: os.environ.get(name) for name in VARIABLES},
        problems=tuple(problems),
    )


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """The whole diagnosis as text for a terminal."""
    lines = ["Versions"]
    for name, version in diagnosis.versions.items():
        purpose = f"; it is for {OPTIONAL[name]}" if name in OPTIONAL else ""
        source = ", run from its source tree" if name == "drivekd" else ""
        lines.append(f"  {name:14} {version or 'not installed' + purpose + source}")
    lines += ["", "Devices", *(f"  {device}" for device in diagnosis.devices)]
    lines += ["", "Compiled extension", *(f"  {line}" for line in _extension_lines(diagnosis))]
    lines += ["", "Backends", *(f"  {line}" for line in _backend_lines(diagnosis))]
    lines += ["", "Environment"]
    for name, value in diagnosis.environment.items():
        shown = "not set" if value is None else repr(value)
        lines.append(f"  {name:16} {shown} ({VARIABLES[name]})")
    lines += ["", *_verdict(diagnosis)]
    return "\n".join(lines)


def format_build(diagnosis: Diagnosis) -> str:
    """One or two lines about what an installation built."""
    lines = [f"drivekd: compiled extension {line}" for line in _extension_lines(diagnosis)]
    return "\n".join([*lines, *diagnosis.problems])


def _extension_lines(diagnosis: Diagnosis) -> list[str]:
    extension = diagnosis.extension
    if extension["reason"] is not None:
        return [f"not in use: {extension['reason']}"]
    isa = f", instruction set {extension['isa']}" if extension["isa"] else ""
    cuda = f", CUDA {extension['cuda']}" if extension["cuda"] else ", without CUDA kernels"
    return [f"{extension['path']}{isa}{cuda}"]


def _backend_lines(diagnosis: Diagnosis) -> list[str]:
    """For each op what auto picks, then each reason once with the ops that it holds for."""
    lines: list[str] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    width = max(map(len, diagnosis.backends), default=0)
    for op, row in diagnosis.backends.items():
        choices = [f"{name}: {row[name]}" for name in row if name.startswith("auto on ")]
        lines.append(f"{op:{width}} {', '.join(choices)}")
        for backend in dispatch.BACKENDS:
            if row[backend] != "available":
                reasons.setdefault((backend, row[backend].replace(op, "it")), []).append(op)
    for (backend, reason), ops in reasons.items():
        lines.append(f"not {backend} for {', '.join(ops)}: {reason}")
    return lines or ["unknown, see below"]


def _verdict(diagnosis: Diagnosis) -> list[str]:
    if not diagnosis.problems:
        return ["drivekd is usable here."]
    return ["drivekd is not usable here:", *(f"  - {problem}" for problem in diagnosis.problems)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _version_problems(versions: dict[str, str | None]) -> list[str]:
    problems = []
    for name, lowest in REQUIRED.items():
        wanted = f"pip install '{name}>={'.'.join(map(str, lowest))}'"
        version = versions[name]
        if version is None:
            problems.append(f"{name} is not installed; {wanted}")
        elif tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < lowest:
            problems.append(f"{name} is {version}, which is too old; {wanted}")
    return problems


def _devices() -> tuple[str, ...]:
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {capability}"
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return (cpu, f"cuda: none (torch is built with {build})")
    return (cpu, *(_cuda_device(i) for i in range(torch.cuda.device_count())))


def _cuda_device(index: int) -> str:
    properties: Any = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return (
        f"cuda:{index}: {properties.name}, compute capability {properties.major}."
        f"{properties.minor}, {memory:.0f} GiB (torch is built with CUDA {torch.version.cuda})"
    )


def _extension() -> dict[str, str | None]:
    reason = dispatch.unavailable_reason("native")
    spec = importlib.util.find_spec("drivekd._C")
    path = None if spec is None else spec.origin
    return {
        "path": path,
        "isa": None if reason else _isa(),
        "cuda": None if reason else _cuda(),
        "reason": reason,
    }


def _isa() -> str:
    """The instruction set that the extension's CPU kernels chose."""
    return _ISA_NAMES[torch.ops.drivekd_native.cpu_isa()]


def _cuda() -> str | None:
    """The toolkit that the extension's CUDA kernels were compiled with."""
    if not hasattr(torch.ops.drivekd_native, "cuda_version"):
        return None
    version = int(torch.ops.drivekd_native.cuda_version())
    return f"{version // 1000}.{version % 1000 // 10}"
