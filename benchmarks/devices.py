"""GPUs as predictions and floors see them: by name, or as `on_gpu.sh ceilings` measured one.

Everything is stated for one SM clock. `Device.at` restates products for another; EX2 and programs'
starts are counted in clocks anyway, and bandwidths are taken not to depend on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

Heads = tuple[int, int, int]  # query heads, key heads, head dim
_LAUNCH_US = {"eager": 3.0, "graph": 1.5}


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: of the product.
        arch: 80, 90 or 100, its compute capability.
        sms: multiprocessors.
        clock_ghz: of them, under load.
        mma_tflops: 16-bit matrix products at that clock.
        l2_tbps: reading what the L2 cache holds.
        hbm_tbps: of a copy, bytes read and written.
        l2_bytes: capacity that workspaces may count on.
        exp2_per_clock: of a multiprocessor.
        start_clocks: of a program before its first product.
        launch_us: of every launch, "eager" and in a "graph".
        assumed: names of those above that were not measured.
    """

    name: str
    arch: int
    sms: int
    mma_tflops: float
    l2_tbps: float
    hbm_tbps: float
    l2_bytes: int
    clock_ghz: float = 1.755
    exp2_per_clock: float = 16
    start_clocks: float = 1000
    launch_us: Mapping[str, float] = field(default_factory=_LAUNCH_US.copy)
    assumed: tuple[str, ...] = (
        "clock_ghz", "l2_tbps", "exp2_per_clock", "start_clocks", "launch_us",
    )  # fmt: skip

    def at(self, clock_ghz: float) -> Device:
        """The same at another SM clock."""
        tflops = self.mma_tflops * clock_ghz / self.clock_ghz
        return replace(self, clock_ghz=clock_ghz, mma_tflops=tflops)

    def exp2_ps(self) -> float:
        """Picoseconds of one exp2, all multiprocessors at work."""
        return 1e3 / (self.exp2_per_clock * self.sms * self.clock_ghz)

    def product_ps(self, head_dim: int) -> float:
        """Picoseconds of one 16-bit product over head dims."""
        return 2 * head_dim / self.mma_tflops


# Reported as measured: products and copies of an H200 and an H100. The other rows are data sheets
# times the H200's shares; L2 bandwidths are guesses throughout.
DEVICES = {
    each.name: each
    for each in (
        Device("A100", 80, 108, 312 * 788 / 989, 4.0, 1.8, 40 * 2**20),
        Device("H200", 90, 132, 788.0, 5.5, 4.3, 60 * 2**20),
        Device("H100", 90, 132, 798.0, 5.5, 3.0, 50 * 2**20),
        Device("B200", 100, 148, 2250 * 788 / 989, 8.0, 7.0, 126 * 2**20),
    )
}

# Ceilings that a device is made of; the others in the file are there to be read.
NEEDED = ("copy", "l2-16", "product", "exp2", "start", "launch-many", "launch-graph", "pass")


@dataclass(frozen=True)
class Ceiling:
    """One measurement of `ceilings.json`.

    Attributes:
        facts: as they are in the file: `amount` of what a call does, `rounds_ms` of a call in each
            round, `sm_mhz` during each round.
    """

    facts: Mapping[str, Any]

    @property
    def milliseconds(self) -> float:
        """Of a call."""
        return median(self.facts["rounds_ms"])

    @property
    def rate(self) -> float:
        """Amount a second."""
        return float(self.facts["amount"] / self.milliseconds * 1e3)

    @property
    def clock_ghz(self) -> float:
        """Of a multiprocessor while it ran."""
        return float(median(self.facts["sm_mhz"])) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """What one GPU can do at most."""

    machine: Mapping[str, Any]
    measured: Mapping[str, Ceiling]

    def device(self) -> Device:
        """All of it, at the clock of a pass.

        Raises:
            ValueError: something is missing, since the stage was cut off.
        """
        missing = [name for name in NEEDED if name not in self.measured]
        if missing:
            raise ValueError(
                f"the ceilings of {self.machine['gpu']} lack {', '.join(missing)}; "
                "run `benchmarks/on_gpu.sh ceilings` again"
            )
        sms, product, exp2 = self.machine["sms"], self.measured["product"], self.measured["exp2"]
        as_measured = Device(
            name=self.machine["gpu"],
            arch=self.machine["arch"],
            sms=sms,
            mma_tflops=product.rate / 1e12,
            l2_tbps=self.measured["l2-16"].rate / 1e12,
            hbm_tbps=self.measured["copy"].rate / 1e12,
            l2_bytes=self.machine["l2_bytes"],
            clock_ghz=product.clock_ghz,
            exp2_per_clock=exp2.rate / (sms * exp2.clock_ghz * 1e9),
            start_clocks=median(self.measured["start"].facts["start_clocks"]),
            launch_us={
                "eager": 1e6 / self.measured["launch-many"].rate,
                "graph": 1e6 / self.measured["launch-graph"].rate,
            },
            assumed=(),
        )
        return as_measured.at(self.measured["pass"].clock_ghz)


def load_ceilings(path: Path) -> Ceilings:
    """A file of `on_gpu.sh ceilings`.

    Raises:
        ValueError: it comes from a dry run, whose numbers mean nothing.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["dry"]:
        raise ValueError(f"{path} comes from a dry run (DRIVEKD_DRY=1); measure on a GPU")
    measured = {name: Ceiling(facts) for name, facts in content["measured"].items()}
    return Ceilings(content["machine"], measured)


def device_of(folder: Path, gpu: str) -> Device:
    """That of a results folder: its measured ceilings, else the named GPU's, else an H200's.

    Args:
        folder: may hold `ceilings.json`.
        gpu: name of the product, as the driver tells it.
    """
    if (folder / "ceilings.json").exists():
        return load_ceilings(folder / "ceilings.json").device()
    return named_device(gpu) or DEVICES["H200"]


def named_device(gpu: str) -> Device | None:
    """The one whose name the driver's name of a product contains."""
    return next((each for name, each in DEVICES.items() if name in gpu), None)


def pass_floor_ps(device: Device, products: int, head_dim: int) -> float:
    """Picoseconds of each visible cell and head at least: one exp2, or some products."""
    return max(device.exp2_ps(), products * device.product_ps(head_dim))


def pair_floor_ps(device: Device, student: Heads, teacher: Heads) -> float:
    """Picoseconds of each visible cell at least: loss and both gradients of a layer pair.

    Per pass the larger of one exp2 and its products: log-sum-exp and map have one, of both models;
    dq two (scores again, and dS k), dk two. dq has to know delta: the kernels make it on the way,
    with a third product that is no part of this floor.
    """
    (H_s, _, D_s), (H_t, _, D_t) = student, teacher
    of_student = 2 * pass_floor_ps(device, 1, D_s) + 2 * pass_floor_ps(device, 2, D_s)
    return H_s * of_student + H_t * 2 * pass_floor_ps(device, 1, D_t)
