"""What was measured on GPUs, as tables, verdicts on the targets and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measured import (
    BASELINES,
    GRADIENTS,
    NOT_MEASURED,
    TARGETS,
    TRAINING_TARGETS,
    Measurements,
    Record,
    Target,
    machines,
)
from benchmarks.shapes import GPU_MODELS, GPU_PAIRS, GPU_STEPS


def section(results: Path, *, where: str) -> str:
    """Tables of all machines for a page; `where` is the path of `results` on that page."""
    found = machines(results)
    if not found:
        return (
            f"GPU speed and memory: **{NOT_MEASURED}**. `benchmarks/on_gpu.sh` measures, "
            "`python -m benchmarks.report` puts the numbers here."
        )
    return "\n\n".join(_machine_section(each, where) for each in found)


def _machine_section(measured: Measurements, where: str) -> str:
    machine = measured.machine
    clocks = sorted(each.clock for each in measured.records.values() if each.clock)
    about = [
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']} (CUDA "
        f"{machine['cuda']}), triton {machine['triton']}, commit {machine['commit'][:10]}"
        + (f" with {machine['changed_files']} changed files" if machine["changed_files"] else "")
        + f", {machine['date']}."
    ]
    if clocks:
        about.append(f"SM clock under load {clocks[0]}-{clocks[-1]} MHz.")
    parts = [f"**{measured.name}**: " + " ".join(about), _targets_table(measured)]
    for kind, title in (("full", "Full map"), ("t2v", "Text to vision, CUDA graphs")):
        parts.append(f"{title}:\n\n{_speed_table(measured, kind)}")
    parts.append(
        "Medians of rounds with a cold L2 cache (quartiles in brackets); bfloat16, mse. "
        "`gradient` is both less forward. Memory is the peak beyond the inputs and the results. "
        "A ratio is the median over rounds of the ratio within a round, in which both ways ran: "
        "eager, compiled and chunked are so many times slower than the fused way, which takes so "
        "many times as long as sdpa (flash forward and backward of the student, forward of the "
        "teacher). † timed without a CUDA graph."
    )
    if any(shape in GPU_STEPS for shape, *_ in measured.records):
        parts += [f"Training steps:\n\n{_steps_table(measured)}", STEPS_NOTE]
    if any(shape == GRADIENTS for shape, *_ in measured.records):
        parts.append(f"Projection of 4 gradients of 494 M parameters:\n\n{_agp_table(measured)}")
    if (Path(__file__).parent / "results" / measured.name / "speed.png").exists():
        parts.append(f"![time and memory by number of tokens]({where}/{measured.name}/speed.png)")
    return "\n\n".join(parts)


# ---- speed


def _speed_table(measured: Measurements, kind: str) -> str:
    shapes = [name for name in GPU_PAIRS if name.split("/")[1].startswith(kind)]
    head = ["shape", "forward ms", "gradient ms", "both ms", "extra MiB", *BASELINES]
    if kind == "t2v":
        head.append("lse given")
    return table(head, [_speed_row(measured, shape, kind) for shape in shapes])


def _speed_row(measured: Measurements, shape: str, kind: str) -> list[str]:
    fused, forward = measured.get(shape, "fused"), measured.get(shape, "fused", "forward")
    if fused is None:
        return [shape, *[NOT_MEASURED] * (8 if kind == "full" else 9)]
    row = [shape]
    if not fused.measured:
        row += ["out of memory"] * 4
    else:
        known = forward is not None and forward.measured
        row += [
            _milliseconds(forward) if known else "-",
            _number(fused.milliseconds - forward.milliseconds) if known else "-",
            _milliseconds(fused),
            _number(fused.facts["extra_peak_bytes"] / 2**20),
        ]
    row += [_ratio(measured.get(shape, way)) for way in BASELINES]
    if kind == "t2v":
        row.append(_ratio(measured.get(shape, "fused-lse")))
    return row


def _milliseconds(record: Record) -> str:
    first, third = record.quartiles
    mark = " †" if str(record.facts.get("graph", "")).startswith("not captured") else ""
    return f"{_number(record.milliseconds)} ({_number(first)}-{_number(third)}){mark}"


def _ratio(record: Record | None) -> str:
    if record is None:
        return "-"
    if not record.measured:
        return "out of memory"
    ratio = record.times_of_beside
    if record.facts["way"] == "sdpa":
        ratio = 1 / ratio
    mark = " †" if str(record.facts.get("graph", "")).startswith("not captured") else ""
    return f"{_number(ratio)}x{mark}"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- training steps

STEPS_NOTE = (
    "InternVL3-1B from 8B with their vision towers, random weights, bfloat16, one sample of "
    "pictures of 448 x 448 and 512 text tokens; cross-entropy, perception, reasoning and planning "
    "with three teachers (one model in three parts), without optimiser. `plain`: the student's "
    "forward and cross-entropy, the teachers as far as they are needed, and a backward pass for "
    "each task from as deep as it reaches, nothing else; `plain-ce`: each from the cross-entropy. "
    "`public`: eager attention, all maps, projection list by list. Memory is the peak beyond "
    "weights and inputs. The ratio is to drivekd's time in the same rounds; parts are of one more "
    "step that waits between them. Relative errors of the four losses and the cosine of the two "
    "updates are between drivekd and the public procedure."
)


def _steps_table(measured: Measurements) -> str:
    ways = ("drivekd", "plain", "plain-ce", "public")
    head = ["sample", "way", "ms", "peak GiB", "ratio", "parts, ms", "loss errors", "cosine"]
    rows = []
    for shape in GPU_STEPS:
        for way in ways:
            record = measured.get(shape, way, "")
            if record is not None:
                rows.append([shape, way, *_step_cells(record)])
    return table(head, rows)


def _agp_table(measured: Measurements) -> str:
    """Buffers are of the size of one task's gradients, those and the update among them."""
    rows = []
    for way in ("gram", "combination", "projection", "public"):
        record = measured.get(GRADIENTS, way, "")
        if record is not None and record.measured:
            moved = record.facts.get("moved_bytes")
            share = f"{100 / record.times_of_beside:.0f} %" if moved else ""
            whole = _number(record.buffers) if way in ("projection", "public") else ""
            rows.append([way, _milliseconds(record), share, whole])
    return table(["way", "ms", "of copy bandwidth", "buffers alive"], rows)


def _step_cells(record: Record) -> list[str]:
    facts, cells = record.facts, ["out of memory", *["-"] * 3]
    if record.measured:
        ratio = f"{_number(record.times_of_beside)}x" if "beside_ms" in facts else "1x"
        peak = _number(facts["extra_peak_bytes"] / 2**30)
        parts = ", ".join(f"{name} {_number(ms)}" for name, ms in facts["phases_ms"].items())
        cells = [_milliseconds(record), peak, ratio, parts]
    if "apart" not in facts:
        return [*cells, "", ""]
    mark = " **too far**" if facts["apart"] else ""
    errors = ", ".join(_number(error) for error in facts["loss_errors"].values())
    return [*cells, errors + mark, f"{facts['update_cosine']:.4f}"]


# ---- targets


def _targets_table(measured: Measurements) -> str:
    rows = [
        [each.what, each.wanted, *(_verdict(each, measured, model) for model in GPU_MODELS)]
        for each in TARGETS
    ]
    beside = [""] * (len(GPU_MODELS) - 1)
    rows += [
        [each.what, each.wanted, _verdict(each, measured, ""), *beside] for each in TRAINING_TARGETS
    ]
    return table(["target", "wanted", *GPU_MODELS], rows)


def _verdict(target: Target, measured: Measurements, model: str) -> str:
    """The value and whether it is what is wanted."""
    value = target.value(measured, model)
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return value
    return f"{_number(value)}{target.unit} {'met' if target.met(value) else '**missed**'}"


# ---- plots


def plot(measured: Measurements, path: Path) -> None:
    """Time and extra memory of full maps against the number of tokens, a column for each pair."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(GPU_MODELS), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(GPU_MODELS), sharex=True, sharey="row", squeeze=False)
    for column, model in enumerate(GPU_MODELS):
        for way in ("fused", *BASELINES):
            found = [
                (GPU_PAIRS[shape].num_tokens, record)
                for shape in GPU_PAIRS
                if shape.startswith(f"{model}/full-")
                and (record := measured.measured(shape, way)) is not None
            ]
            tokens = [number for number, _ in found]
            style = {"marker": "o", "linewidth": 2.5 if way == "fused" else 1, "label": way}
            axes[0][column].plot(tokens, [record.milliseconds for _, record in found], **style)
            if way != "sdpa":
                memory = [record.facts["extra_peak_bytes"] / 2**20 for _, record in found]
                axes[1][column].plot(tokens, memory, **style)
        axes[0][column].set_title(model, fontsize=10)
        axes[1][column].set_xlabel("tokens")
        for row in axes:
            row[column].set_xscale("log", base=2)
            row[column].set_yscale("log")
            row[column].grid(alpha=0.3)
    axes[0][0].set_ylabel("loss and gradients, ms")
    axes[1][0].set_ylabel("extra memory, MiB")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
