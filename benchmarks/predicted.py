"""Predictions of benchmarks/offline against what `on_gpu.sh kernels` measured, pass by pass.

    python -m benchmarks.predicted            # predict; needs triton, no GPU; minutes

writes `results/predictions.json`, with the constants that are reported or assumed for an H200 and
an H100, and beside every measured `ceilings.json` a `predictions.json` with those. Both name the
commit whose kernels they are of. `python -m benchmarks.report` makes tables of these files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.devices import (
    DEVICES,
    Device,
    load_ceilings,
    pair_floor_ps,
    pass_floor_ps,
)
from benchmarks.measured import NOT_MEASURED
from benchmarks.measured_tables import table
from benchmarks.shapes import GPU_MODELS

RESULTS = Path(__file__).parent / "results"
NAMED = ("H200", "H100")
FAR = 1.3  # measured over predicted, or the inverse: more is to be explained
SLOWEST = 2
PASSES = (
    "lse teacher", "lse student", "map teacher", "mse", "map student", "cosine", "kl", "delta",
    "dq", "dk", "gram", "combine",
)  # fmt: skip


# ---- predicting


def predict_all(device: Device) -> dict[str, Any]:
    """Every case of `on_gpu.sh kernels`: milliseconds, floor and what bounds each pass."""
    from benchmarks.kernel_times import CASES

    cases = []
    for case in CASES:
        passes = _of_gradients(device) if case.pair is None else _of_loss(device, case)
        cases.append({"shape": case.shape, "loss": case.loss, "passes": passes})
        print(f"{device.name}: {case.name}", flush=True)
    head = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(head, capture_output=True, text=True, check=True, cwd=RESULTS)
    return {"commit": done.stdout.strip(), "device": asdict(device), "cases": cases}


def _of_loss(device: Device, case: Any) -> dict[str, Any]:
    import torch

    from benchmarks.offline.report import report

    result = report(case.shape, device=device, loss=case.loss, dtype=torch.bfloat16)
    return {
        each.name: {"ms": each.ms, "floor_ms": each.floor_ms, "bound": each.bound}
        for each in result.passes
    }


def _of_gradients(device: Device) -> dict[str, Any]:
    import torch

    from benchmarks.offline.gradients import binary, predict, record
    from benchmarks.shapes import MODEL_GRADIENTS

    passes = {}
    for launch in record(MODEL_GRADIENTS.sizes, MODEL_GRADIENTS.tasks, torch.bfloat16):
        if launch.name == "fold":
            continue
        pipes = predict(binary(launch, device.arch), device, MODEL_GRADIENTS.elements).pipes
        bound = max(pipes, key=lambda name, pipes=pipes: pipes[name])
        passes[launch.name] = {"ms": pipes[bound], "floor_ms": pipes["HBM"], "bound": bound}
    return passes


# ---- comparing


@dataclass(frozen=True)
class Row:
    """One pass of one case, in milliseconds; None where it is not known."""

    shape: str
    loss: str
    name: str
    measured: float
    before: float | None  # predicted with reported and assumed constants
    predicted: float | None  # with measured ceilings, else as before
    floor: float | None
    bound: str

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return None if self.predicted is None else self.measured / self.predicted

    @property
    def far(self) -> bool:
        """Whether prediction and measurement differ so much that it is to be explained."""
        return self.ratio is not None and not 1 / FAR <= self.ratio <= FAR

    @property
    def of_floor(self) -> float:
        """Measured over floor."""
        return self.measured / self.floor if self.floor else 0.0


def rows(folder: Path, named: Path = RESULTS / "predictions.json") -> Iterator[Row]:
    """All passes of a results folder's `kernels.json`.

    Raises:
        ValueError: the file comes from a dry run, whose numbers mean nothing.
    """
    path = folder / "kernels.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["dry"]:
        raise ValueError(f"{path} comes from a dry run (DRIVEKD_DRY=1); measure on a GPU")
    before = _predictions(named, content["machine"]["gpu"])
    own = folder / "predictions.json"
    after = _passes(json.loads(own.read_text(encoding="utf-8"))) if own.exists() else {}
    for case in content["cases"]:
        for name, measured in _by_pass(case["launches"]).items():
            key = case["shape"], case["loss"], name
            known = after.get(key) or before.get(key) or {}
            yield Row(
                *key,
                measured=measured,
                before=before.get(key, {}).get("ms"),
                predicted=known.get("ms"),
                floor=known.get("floor_ms"),
                bound=known.get("bound", ""),
            )


def _predictions(path: Path, gpu: str) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """Of the named device whose name the GPU's contains; none for others."""
    if not path.exists():
        return {}
    for name, content in json.loads(path.read_text(encoding="utf-8")).items():
        if name in gpu:
            return _passes(content)
    return {}


def _passes(content: Mapping[str, Any]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {
        (case["shape"], case["loss"], name): facts
        for case in content["cases"]
        for name, facts in case["passes"].items()
    }


def _by_pass(launches: list[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of each pass: the median over rounds of the sum of its launches."""
    rounds: dict[str, list[list[float]]] = {}
    for each in launches:
        name = each["name"] if each["name"] in PASSES else "others"
        rounds.setdefault(name, []).append(each["rounds_ms"])
    return {
        name: median(sum(one) for one in zip(*own, strict=True)) for name, own in rounds.items()
    }


def slowest(all_rows: list[Row]) -> list[Row]:
    """The two passes that take the longest in units of their floors, at 8192 tokens and more.

    Shorter calls are launches rather than work. Each pass of a model pair counts once.
    """
    large = [row for row in all_rows if row.shape.endswith(("full-8192", "full-20480"))]
    found: dict[tuple[str, str, str], Row] = {}
    for row in sorted(large, key=lambda row: -row.of_floor):
        found.setdefault((row.shape.split("/")[0], row.loss, row.name), row)
    return list(found.values())[:SLOWEST]


# ---- tables


def section(results: Path = RESULTS) -> str:
    """Tables of all machines for benchmarks/README.md."""
    folders = sorted(path.parent for path in results.glob("*/kernels.json"))
    if not folders:
        return (
            f"Time of each kernel: **{NOT_MEASURED}**. `benchmarks/on_gpu.sh kernels` measures, "
            "`python -m benchmarks.predicted` predicts, `python -m benchmarks.report` compares."
        )
    return "\n\n".join(_machine(folder, results / "predictions.json") for folder in folders)


def floors(results: Path = RESULTS) -> str:
    """Picoseconds of each visible cell at least, of named and of measured devices, a clock each."""
    devices = [DEVICES[name] for name in NAMED]
    devices += [load_ceilings(path).device() for path in sorted(results.glob("*/ceilings.json"))]
    head = ["device", "clock", "1 product, D = 64", "2", "1 product, D = 128", "2", *GPU_MODELS]
    body = [
        [
            device.name + (", assumed" if device.assumed else ", measured"),
            f"{device.clock_ghz:.3f} GHz",
            *(f"{pass_floor_ps(device, n, D):.3f}" for D in (64, 128) for n in (1, 2)),
            *(f"{pair_floor_ps(device, *pair):.1f}" for pair in GPU_MODELS.values()),
        ]
        for device in devices
    ]
    return table(head, body)


def _machine(folder: Path, named: Path) -> str:
    content = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    all_rows = list(rows(folder, named))
    names = [name for name in (*PASSES, "others") if any(row.name == name for row in all_rows)]
    cells = {(row.shape, row.loss, row.name): row for row in all_rows}
    body = [
        [f"{shape} {loss}".strip(), *(_cell(cells.get((shape, loss, name))) for name in names)]
        for shape, loss in dict.fromkeys((row.shape, row.loss) for row in all_rows)
    ]
    clocks = [case["sm_mhz"] for case in content["cases"]]
    parts = [
        f"**{folder.name}**, predicted with {_constants(folder)}. Milliseconds measured (and in "
        "units of the prediction; bold where they differ by more than 30 %). `others`: kernels "
        "about tokens and operations of torch, not predicted. SM clock during these calls "
        f"{min(clocks):.0f}-{max(clocks):.0f} MHz; an empty kernel timed so: "
        f"{1e3 * median(content['empty_ms']):.1f} us.",
        table(["call", *names], body),
        f"Differences over 30 %:\n\n{_differences(all_rows)}",
    ]
    worst = [
        f"{row.name} of {row.shape} {row.loss} ({row.of_floor:.2f}x)" for row in slowest(all_rows)
    ]
    if worst:
        parts.append(f"Slowest in units of their floors: {', '.join(worst)}.")
    return "\n\n".join(parts)


def _constants(folder: Path) -> str:
    """What a machine's predictions are made of."""
    path = folder / "predictions.json"
    if not path.exists():
        return "reported and assumed constants; not with its ceilings"
    device = json.loads(path.read_text(encoding="utf-8"))["device"]
    return (
        f"its ceilings: {device['clock_ghz']:.3f} GHz during a pass, {device['mma_tflops']:.0f} "
        f"TFLOP/s at that clock, L2 {device['l2_tbps']:.2f} TB/s, copy {device['hbm_tbps']:.2f} "
        f"TB/s, {device['exp2_per_clock']:.1f} EX2 a clock and multiprocessor, "
        f"{device['start_clocks']:.0f} clocks a start"
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    ratio = "" if row.ratio is None else f" ({row.ratio:.2f})"
    return f"**{row.measured:.3f}{ratio}**" if row.far else f"{row.measured:.3f}{ratio}"


def _differences(all_rows: list[Row]) -> str:
    head = ["pass", "call", "before, ms", "predicted, ms", "measured, ms", "ratio", "of floor",
            "predicted to be bound by"]  # fmt: skip
    body = [
        [row.name, f"{row.shape} {row.loss}".strip(), _ms(row.before), _ms(row.predicted),
         _ms(row.measured), f"{row.ratio:.2f}", f"{row.of_floor:.2f}", row.bound]
        for row in sorted(all_rows, key=lambda row: -row.measured)
        if row.far
    ]  # fmt: skip
    return table(head, body) if body else "none."


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> int:
    """Write all predictions."""
    named = {name: predict_all(DEVICES[name]) for name in NAMED}
    _write(RESULTS / "predictions.json", named)
    for path in sorted(RESULTS.glob("*/ceilings.json")):
        _write(path.parent / "predictions.json", predict_all(load_ceilings(path).device()))
    return 0


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
