"""Predicted time of a launch. Nothing here was timed on a GPU.

A program's work is counted, not estimated: tiles that it visits (geometry.py) times what the
compiled loop issues per tile (compiled.py), plus what is outside of loops. From it, per program,
clocks of a multiprocessor's pipes:

    MMA      multiply-adds of the matrix instructions at mma_tflops (TF32: half)
    EX2      32 x warps per instruction, exp2_per_clock (16) a clock
    issue    warps per instruction, 4 a clock
    LSU      warps per load or store of up to 4 bytes a lane, 1 a clock; 8 and 16 bytes 2 and 4 (at
             least: lanes that touch many lines take longer); and the operands that matrix
             instructions read from shared memory, 128 bytes a clock
    L2       bytes of every tile of q, k, W, maps that the source loads or stores, at l2_tbps / SMs

A row of W that packed query heads share counts once for each load instruction of a warp that reads
it (lanes of one instruction that name the same bytes are one request), or once where the tile is
loaded through L1 (plain LDG). Latency of loads that are not pipelined is not modelled.

Overlap: one program alone runs its products and its other instructions one after the other, MMA +
max(EX2, issue, LSU); r programs on one multiprocessor share the pipes. So a program that is one of
r takes start_clocks + max(r x largest pipe, MMA + max(EX2, issue, LSU)): with r = 1 the sum, from
r = 2 on mostly the pipe. At most as many are resident as registers, shared memory and warps allow.
Programs are given in their order to multiprocessors with a free place, and the rest speed up as
others end: the last one to end is the launch's time, never less than its HBM bytes take. HBM bytes
are compulsory: q, k, results once per launch; workspaces only if a chunk's do not fit in L2. Every
launch costs launch_us more (eager, or in a CUDA graph).

The floor of a pass is the larger of MMA and EX2 for the cells that must be visited (kl's map: also
its 9 float instructions at 4 x 32 lanes; it has no shorter form in the source; row losses: every
map read once, W written once, at L2 bandwidth; given targets: T written once).

A device (benchmarks/devices.py) has the constants: reported and assumed, or measured on it.
"""

from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.devices import DEVICES, Device
from benchmarks.offline.compiled import Compiled, exp2_needed
from benchmarks.offline.geometry import Work
from benchmarks.offline.record import Launch


@dataclass(frozen=True)
class Prediction:
    """Of one launch; times in milliseconds, without the launch itself."""

    ms: float
    bound: str
    floor_ms: float
    cells: int
    visible: int
    l2_bytes: float
    hbm_bytes: float


def explain(devices: tuple[Device, ...] = tuple(DEVICES.values())) -> str:
    """The model in words, and its constants."""
    return "\n".join([__doc__ or "", *(str(asdict(each)) for each in devices)])


def predict(
    launch: Launch,
    compiled: Compiled,
    work: Work,
    device: Device,
    *,
    workspace_in_l2: bool,
    region: float = 1.0,
) -> Prediction:
    """Time of one launch.

    Args:
        launch: what is launched.
        compiled: its binary.
        work: tiles of its programs.
        device: of the architecture that it is compiled for.
        workspace_in_l2: whether a chunk's maps and W stay in L2.
        region: share of the keys that belong to the region: W is read for these only.
    """
    clock = device.clock_ghz * 1e9
    mma, exp2, issue, lsu, operands = _pipes(compiled, work, device)
    traffic = _l2_bytes(launch, compiled, work, region)
    l2 = traffic / (device.l2_tbps * 1e12 / device.sms / clock)
    others = np.maximum.reduce([exp2, issue, lsu])
    serial = np.maximum(np.maximum(mma, operands) + others, l2)
    largest = np.maximum.reduce([mma, exp2, issue, lsu + operands, l2])
    if compiled.resident == 0:
        raise ValueError(f"{launch.name}: no program fits on a multiprocessor of {device.name}")
    clocks = _makespan(serial, largest, device, compiled.resident)
    busy = clocks / clock * 1e3

    maps = _map_bytes(launch, work)
    hbm = _compulsory_bytes(launch) + (0 if workspace_in_l2 else maps)
    hbm_ms = hbm / device.hbm_tbps / 1e9
    pipes = {"MMA": mma, "EX2": exp2, "issue": issue, "LSU": lsu + operands, "L2": l2}
    totals = {name: float(each.sum()) for name, each in pipes.items()}
    bound = max(totals, key=lambda name: totals[name])
    even = totals[bound] / device.sms
    if clocks > 1.15 * even:
        live = max(1, int(work.live.sum()))
        if live < 2 * device.sms:
            bound = "MMA+" + max(("EX2", "issue", "LSU"), key=lambda name: totals[name])
        bound += ", tail"
    if device.start_clocks * work.live.size > 0.5 * clocks * device.sms:
        bound = "start"
    if hbm_ms > busy:
        bound = "HBM"
    return Prediction(
        ms=max(busy, hbm_ms),
        bound=bound,
        floor_ms=_floor(launch, compiled, work, device) * 1e3,
        cells=work.cells,
        visible=work.visible,
        l2_bytes=float(traffic.sum()),
        hbm_bytes=float(hbm),
    )


def _pipes(compiled: Compiled, work: Work, device: Device):
    """Clocks of the MMA, EX2, issue and LSU pipes and of operands, for each program."""
    exp2_clocks = 32 * compiled.warps / device.exp2_per_clock
    issue_clocks = compiled.warps / 4
    macs_a_clock = device.mma_tflops * 1e12 / 2 / device.sms / (device.clock_ghz * 1e9)
    straight = compiled.code.straight
    if compiled.main is None:  # row losses: every loop is a sweep; given targets: see Work
        exp2 = np.full(work.masked.shape, straight.counts["EX2"] * exp2_clocks)
        issue = np.full(work.masked.shape, straight.total * issue_clocks)
        lsu = np.full(work.masked.shape, float(straight.lsu * compiled.warps))
        for loop in compiled.code.loops:
            if loop.mix.counts["LOAD"] or loop.mix.counts["STORE"]:
                reads_given = compiled.name == "largest" and loop.mix.counts["LOAD"]
                trips = work.whole if reads_given else work.masked
                exp2 += trips * loop.own.counts["EX2"] * exp2_clocks
                issue += trips * loop.own.total * issue_clocks
                lsu += trips * loop.own.lsu * compiled.warps
        none = np.zeros_like(issue)
        return none, *(each * work.live for each in (exp2, issue, lsu)), none
    mma = np.zeros(work.whole.shape)
    exp2 = np.full(work.whole.shape, straight.counts["EX2"] * exp2_clocks)
    issue = np.full(work.whole.shape, straight.total * issue_clocks)
    lsu = np.full(work.whole.shape, float(straight.lsu * compiled.warps))
    operands = np.zeros(work.whole.shape)
    for loop, tiles, outer in (
        (compiled.main, work.whole, work.whole_outer),
        (compiled.masked, work.masked, work.masked_outer),
    ):
        trips = tiles / compiled.tiles_in(loop)
        mma += tiles * _macs(compiled, loop) / macs_a_clock
        exp2 += trips * loop.mix.counts["EX2"] * exp2_clocks
        issue += trips * loop.mix.total * issue_clocks
        lsu += trips * loop.mix.lsu * compiled.warps
        operands += trips * loop.mix.operands * compiled.warps
        around = compiled.code.parent(loop)
        if around is not None:
            exp2 += outer * around.own.counts["EX2"] * exp2_clocks
            issue += outer * around.own.total * issue_clocks
            lsu += outer * around.own.lsu * compiled.warps
    return tuple(each * work.live for each in (mma, exp2, issue, lsu, operands))


def _macs(compiled: Compiled, loop) -> float:
    """Multiply-adds of matrix instructions for one tile, those of half rate twice.

    As compiled: with too many warps for a tile some are done more than once.
    """
    if loop.mix.macs:
        issued = loop.mix.macs + loop.mix.half_rate
        return issued * compiled.warps / compiled.tiles_in(loop)
    if not loop.mix.matrix:
        return 0.0
    return compiled.products * compiled.block_q * compiled.block_k * compiled.block_d


def _l2_bytes(launch: Launch, compiled: Compiled, work: Work, region: float):
    """Bytes that each program loads and stores."""
    values = launch.values
    q, k, d = values["BLOCK_Q"], values["BLOCK_K"], compiled.block_d
    tiles = work.whole + work.masked
    outer = work.whole_outer + work.masked_outer
    if launch.name == "rectangle":
        return work.live * q * k * (4 + values["values_ptr"].element_size())
    if launch.name == "largest":
        given = values["values_ptr"].element_size() + values["indices_ptr"].element_size()
        return work.masked * q * k * 4 + work.live * q * values["num_given"] * (2 * given + 4)
    if launch.name in ("cosine", "kl"):
        maps = 1 + _members(launch)
        sweeps = 3 if launch.name == "cosine" and values["w_ptr"] is not None else 2
        w = values["w_ptr"].element_size() if values["w_ptr"] is not None else 0
        return tiles * (q * k * region * (4 * maps * sweeps + w))
    size = values["q_ptr"].element_size()
    if launch.name == "lse":
        return work.live * (q * d * size + 4 * q) + tiles * (k * d * size)
    if launch.name in ("map", "mse"):
        cell = 4 if launch.name == "map" else 4 * _members(launch) + _w_size(launch)
        inner = q * d * size + 4 * q
        return tiles * inner + outer * (k * d * size) + work.live * (q * k * cell)
    cells = q * k * region * (_w_size(launch) + (4 if values["log_ptr"] is not None else 0))
    if launch.name == "dk":
        inner = q * d * size + 8 * q
        return tiles * inner + outer * cells + work.runs * (k * d * (size + 8))
    pack = values["PACK"]
    if compiled.main.mix.plain:
        cells /= pack
    else:
        rows = max(1, 32 * 16 // (k * _w_size(launch)))  # of one load instruction of a warp
        cells *= (1 + (rows - 1) / pack) / rows
    fixed = q * d * (size + (4 if launch.name == "dq" else 0))
    return work.live * fixed + tiles * (k * d * size + cells)


def _map_bytes(launch: Launch, work: Work) -> float:
    """Bytes of the workspaces' cells that a launch touches, each once a sweep."""
    heads = launch.values.get("H", 1)
    cells = work.cells / heads
    if launch.name == "lse":
        return 0.0
    if launch.name in ("map", "rectangle", "largest"):
        return cells * 4
    if launch.name == "mse":
        return cells * (4 * _members(launch) + _w_size(launch))
    if launch.name in ("cosine", "kl"):
        sweeps = 3 if launch.name == "cosine" else 2
        return cells * (4 * (1 + _members(launch)) * sweeps + _w_size(launch))
    return cells * (_w_size(launch) + (4 if launch.values["log_ptr"] is not None else 0))


def workspace_bytes(launch: Launch, work: Work) -> float:
    """What a chunk's maps and W take, of the cells that are touched; from its mse or row loss."""
    if launch.name not in ("mse", "cosine", "kl"):
        return 0.0
    cells = work.cells / launch.values.get("H", 1)
    own = 4 if launch.name != "mse" else 0
    return cells * (own + 4 * _members(launch) + _w_size(launch))


def _members(launch: Launch) -> int:
    return (launch.values["members"].bit_count() + launch.values["more_members"].bit_count()) or 1


def _w_size(launch: Launch) -> int:
    w = launch.values["w_ptr"]
    return 0 if w is None else w.element_size()


def _compulsory_bytes(launch: Launch) -> float:
    """q and k of the launch's rows and keys read once, results in q and k written once."""
    values = launch.values
    if "values_ptr" in values:
        rows = min(values["num_slots"] / values["values_ptr"].shape[1], 1.0)
        parts = (values["values_ptr"], values.get("indices_ptr"))
        return rows * sum(each.numel() * each.element_size() for each in parts if each is not None)
    if "q_ptr" not in values:
        return 0.0
    q, k = values["q_ptr"], values["k_ptr"]
    rows = min(values.get("num_slots", q.shape[2]), q.shape[2])
    total = q.shape[0] * q.shape[1] * rows * (q.shape[3] * q.element_size() + 4)
    total += k.numel() * k.element_size()
    if launch.name == "dq":
        total += q.shape[0] * q.shape[1] * rows * q.shape[3] * 4
    if launch.name == "dk":
        total += 2 * values["planes_ptr"].numel() * 4
    return float(total)


def _floor(launch: Launch, compiled: Compiled, work: Work, device: Device) -> float:
    """Seconds below which the pass cannot come, see the module."""
    clock = device.clock_ghz * 1e9
    if launch.name in ("rectangle", "largest"):
        return work.visible * 4 / (device.l2_tbps * 1e12)
    if compiled.main is None:
        cells = work.visible * (4 * (1 + _members(launch)) + _w_size(launch))
        return cells / (device.l2_tbps * 1e12)
    D = launch.values["D"]
    mma = compiled.products * 2 * D / (device.mma_tflops * 1e12)
    if launch.values["q_ptr"].element_size() == 4:  # FFMA, 128 a clock
        mma = compiled.products * D / (128 * device.sms * clock)
    exp2 = exp2_needed(launch)[0] / (device.exp2_per_clock * device.sms * clock)
    floats = 9 / (128 * device.sms * clock) if launch.values.get("LOG") else 0.0
    return work.visible * max(mma, exp2, floats)


def _makespan(serial, largest, device: Device, resident: int) -> float:
    """Clocks until the last program ends: programs in order, each to a place that is free.

    A program among m on its multiprocessor takes start_clocks + max(serial, m x largest) if that
    does not change on the way; when one ends, the others go on faster.
    """
    count = serial.size
    program = np.full((device.sms, resident), -1)
    left = np.zeros((device.sms, resident))  # share of the program that is still to do
    following, now = 0, 0.0
    while True:
        free = np.argwhere(program.T < 0)[:, ::-1]  # first every multiprocessor's first place
        free = free[np.argsort((program >= 0).sum(1)[free[:, 0]], kind="stable")]
        taken = free[: count - following]
        program[taken[:, 0], taken[:, 1]] = np.arange(following, following + len(taken))
        left[taken[:, 0], taken[:, 1]] = 1.0
        following += len(taken)
        busy = program >= 0
        if not busy.any():
            return now
        sharing = busy.sum(1, keepdims=True)
        lasts = device.start_clocks + np.maximum(serial[program], sharing * largest[program])
        to_do = np.where(busy, left * lasts, np.inf)
        step = to_do.min()
        # What ends within a fraction of a start ends together.
        ended = to_do <= step + 0.05 * device.start_clocks
        left = np.where(busy, left - step / lasts, left)
        program[ended] = -1
        now += step
