"""A table per named shape: what every pass costs, and what bounds it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import DEVICES, Device
from benchmarks.offline import model
from benchmarks.offline.compiled import Compiled, compile_launch
from benchmarks.offline.geometry import Seen, work
from benchmarks.offline.record import Call, Launch, record
from benchmarks.shapes import GPU_PAIRS, Pair


@dataclass
class Pass:
    """All launches of one kernel of one model in a call, times in milliseconds."""

    name: str
    tile: str
    compiled: Compiled
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    bounds: dict[str, float] = field(default_factory=dict)
    ms: float = 0.0
    floor_ms: float = 0.0
    cells: int = 0
    visible: int = 0
    l2_bytes: float = 0.0
    hbm_bytes: float = 0.0

    def add(self, launch: Launch, predicted: model.Prediction) -> None:
        self.grids.append(launch.grid)
        self.bounds[predicted.bound] = self.bounds.get(predicted.bound, 0.0) + predicted.ms
        for name in ("ms", "floor_ms", "cells", "visible", "l2_bytes", "hbm_bytes"):
            setattr(self, name, getattr(self, name) + getattr(predicted, name))

    @property
    def bound(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    def to_json(self) -> dict[str, Any]:
        one = self.compiled
        loops = {"main": one.main, "masked": one.masked}
        return {
            "pass": self.name,
            "tile": self.tile,
            "launches": len(self.grids),
            "grid": self.grids[0],
            "registers": one.registers,
            "stack": one.stack,
            "shared": one.shared,
            "resident": one.resident,
            "loops": {
                name: {"tiles": one.tiles_in(loop), **vars(loop.mix)}
                for name, loop in loops.items()
                if loop is not None
            },
            "bound": self.bounds,
            **{
                name: getattr(self, name)
                for name in ("ms", "floor_ms", "cells", "visible", "l2_bytes", "hbm_bytes")
            },
        }


@dataclass(frozen=True)
class Report:
    """A call of a named shape."""

    shape: str
    device: Device
    loss: str
    passes: list[Pass]
    other_ops: int  # of torch, that run something on the device; their time is not modelled

    @property
    def launches(self) -> int:
        return sum(len(each.grids) for each in self.passes)

    @property
    def kernel_ms(self) -> float:
        return sum(each.ms for each in self.passes)

    @property
    def floor_ms(self) -> float:
        return sum(each.floor_ms for each in self.passes)

    def total_ms(self, mode: str) -> float:
        """Kernels and what launching costs, torch's operations too; "eager" or "graph"."""
        return self.kernel_ms + (self.launches + self.other_ops) * self.device.launch_us[mode] / 1e3

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "device": self.device.name,
            "loss": self.loss,
            "launches": self.launches,
            "other_ops": self.other_ops,
            "kernel_ms": self.kernel_ms,
            "floor_ms": self.floor_ms,
            "total_ms": {mode: self.total_ms(mode) for mode in self.device.launch_us},
            "passes": [each.to_json() for each in self.passes],
        }


def report(
    shape: str,
    *,
    device: Device = DEVICES["H200"],
    loss: str = "mse",
    dtype: torch.dtype,
    lse: bool = False,
    given: bool = False,
) -> Report:
    """Record, compile and predict one call of a named shape."""
    call = record(GPU_PAIRS[shape], loss, dtype, arch=device.arch, lse=lse, given=given)
    passes = list(_passes(call, device))
    return Report(shape, device, loss, passes, call.other_ops)


def _passes(call: Call, device: Device) -> Iterator[Pass]:
    seen = Seen(call.tokens)
    region = float(seen.region.mean())
    capacity = device.l2_bytes
    works = [work(launch, seen) for launch in call.launches]
    largest = max(
        (model.workspace_bytes(*each) for each in zip(call.launches, works, strict=True)), default=0
    )
    grouped: dict[str, Pass] = {}
    for launch, tiles in zip(call.launches, works, strict=True):
        compiled = compile_launch(launch, device.arch)
        name = role(launch, call.pair)
        row = grouped.setdefault(name, Pass(name, _tile(launch), compiled))
        predicted = model.predict(
            launch, compiled, tiles, device, workspace_in_l2=largest <= capacity, region=region
        )
        row.add(launch, predicted)
    yield from grouped.values()


def role(launch: Launch, pair: Pair) -> str:
    """Name of the pass, and whose it is where both models have one."""
    query = launch.values.get("q_ptr")
    if query is None or launch.name not in ("lse", "map"):
        return launch.name
    heads = (query.shape[1], query.shape[3])
    of = [
        who
        for who, (H, _, D) in (("student", pair.student), ("teacher", pair.teacher))
        if heads == (H, D)
    ]
    return f"{launch.name} {of[0]}" if len(of) == 1 else launch.name


def _tile(launch: Launch) -> str:
    values = launch.values
    text = f"{values['BLOCK_Q']}x{values['BLOCK_K']}w{launch.warps}s{values.get('STAGES', 1)}"
    return text + (f"p{values['PACK']}" if "PACK" in values else "")


HEADER = (
    f"{'pass':<12} {'tile':>14} {'n':>4} {'grid':>14} {'regs':>4} {'spill':>5} {'shared':>6} "
    f"{'CTA':>3} {'i/el':>5} {'mask':>5} {'EX2':>4} {'MMA':>3} {'LSU':>5} {'L2 B':>6} {'ms':>8} "
    f"{'floor':>8} {'x':>6}  bound"
)


def show(result: Report) -> str:
    """The table as text; per element and head of the main loop: i/el, EX2, LSU clocks, L2 bytes."""
    of = f"sm_{result.device.arch} ({result.device.name})"
    lines = [f"{result.shape}, {result.loss}, {of}, predicted", HEADER]
    for each in result.passes:
        one = each.compiled
        main = one.main
        reads = main.mix.lsu + main.mix.operands if main else float("nan")
        lsu = reads / one.tiles_in(main) / one.elements / 32 if main else reads
        lines.append(
            f"{each.name:<12} {each.tile:>14} {len(each.grids):>4} "
            f"{'x'.join(map(str, each.grids[0])):>14} {one.registers:>4} {one.stack:>5} "
            f"{one.shared:>6} {one.resident:>3} {one.per_element('total'):>5.1f} "
            f"{one.per_element('total', one.masked):>5.1f} {one.per_element('EX2'):>4.2f} "
            f"{main.mix.matrix if main else 0:>3} {lsu:>5.3f} "
            f"{each.l2_bytes / max(each.cells, 1):>6.2f} {each.ms:>8.4f} {each.floor_ms:>8.4f} "
            f"{each.ms / each.floor_ms if each.floor_ms else float('nan'):>6.2f}  {each.bound}"
        )
    lines.append(
        f"kernels {result.kernel_ms:.3f} ms, floor {result.floor_ms:.3f} ms "
        f"({result.kernel_ms / result.floor_ms:.2f}x); with {result.launches} launches and "
        f"{result.other_ops} torch ops: eager {result.total_ms('eager'):.3f} ms, "
        f"graph {result.total_ms('graph'):.3f} ms"
    )
    return "\n".join(lines)


_MARKS = ("<!-- predictions: begin -->", "<!-- predictions: end -->")
_ORDER = ("lse teacher", "lse student", "map teacher", "mse", "dq", "dk")


def markdown(results: list[Report]) -> str:
    """A table: what a call takes, and each pass as a multiple of its floor."""
    head = ["shape", "kernels, ms", "floor, ms", "ratio", "in a graph, ms", *_ORDER]
    rows = [head, ["---"] * len(head)]
    for each in results:
        passes = {one.name: one for one in each.passes}
        ratios = [
            f"{passes[name].ms / passes[name].floor_ms:.2f}" if name in passes else ""
            for name in _ORDER
        ]
        rows.append(
            [
                each.shape,
                f"{each.kernel_ms:.3f}",
                f"{each.floor_ms:.3f}",
                f"{each.kernel_ms / each.floor_ms:.2f}",
                f"{each.total_ms('graph'):.3f}",
                *ratios,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def put_into(page: Path, results: list[Report]) -> None:
    """Replace the table between the page's marks."""
    begin, end = _MARKS
    text = page.read_text()
    before, rest = text.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{markdown(results)}\n{end}{after}")


def summary(results: list[Report]) -> str:
    """One line per shape."""
    lines = [f"{'shape':<34} {'launches':>8} {'kernels':>9} {'floor':>9} {'x':>5} {'graph ms':>9}"]
    lines += [
        f"{each.shape:<34} {each.launches:>8} {each.kernel_ms:>9.3f} {each.floor_ms:>9.3f} "
        f"{each.kernel_ms / each.floor_ms:>5.2f} {each.total_ms('graph'):>9.3f}"
        for each in results
    ]
    return "\n".join(lines)
