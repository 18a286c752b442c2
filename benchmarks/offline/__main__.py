"""`python -m benchmarks.offline`: see benchmarks/README.md."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.devices import DEVICES, Device, load_ceilings
from benchmarks.offline import model, report, sweep
from benchmarks.shapes import GPU_PAIRS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=__doc__)
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--device", default="H200", choices=sorted(DEVICES))
    of.add_argument("--ceilings", type=Path, help="of a GPU: a file of `on_gpu.sh ceilings`")
    parser.add_argument("--loss", default="mse", choices=("mse", "cosine", "kl"))
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--shape", action="append", help="a name or a part of it; default: all")
    parser.add_argument("--lse", action="store_true", help="log-sum-exps come from flash forwards")
    parser.add_argument("--given", action="store_true", help="targets are given, from a cache")
    parser.add_argument("--json", type=Path, help="write everything to a file")
    parser.add_argument(
        "--readme", action="store_true", help="put a table into benchmarks/README.md"
    )
    parser.add_argument("--explain", action="store_true", help="print the model and stop")
    group = parser.add_argument_group("sweep")
    group.add_argument("--sweep", nargs=2, metavar=("PASS", "D"), help="rank tiles of one pass")
    group.add_argument("--tiles", help="candidates, e.g. 64x128w4s3,64x64w4s2p2")
    group.add_argument("--heads", help="query and key heads, e.g. 14,2")
    group.add_argument("--tokens", type=int, default=8192)
    group.add_argument("--vision", type=int, default=0, help="vision keys; 0: the full map")
    chosen = parser.parse_args(arguments)
    device = DEVICES[chosen.device]
    if chosen.ceilings:
        device = load_ceilings(chosen.ceilings).device()
    if chosen.explain:
        print(model.explain((device,) if chosen.ceilings else tuple(DEVICES.values())))
        return 0
    if chosen.sweep:
        return _sweep(chosen, device)
    shapes = [
        name for name in GPU_PAIRS if not chosen.shape or any(each in name for each in chosen.shape)
    ]
    if not shapes:
        parser.error(f"--shape {chosen.shape}: want a part of {', '.join(GPU_PAIRS)}")
    results = []
    for name in shapes:
        results.append(
            report.report(
                name,
                device=device,
                loss=chosen.loss,
                dtype=DTYPES[chosen.dtype],
                lse=chosen.lse,
                given=chosen.given,
            )
        )
        print(report.show(results[-1]) + "\n", flush=True)
    print(report.summary(results))
    if chosen.readme:
        report.put_into(Path(__file__).parents[1] / "README.md", results)
    if chosen.json:
        content = {
            "constants": asdict(device),
            "reports": [r.to_json() for r in results],
        }
        chosen.json.write_text(json.dumps(content, indent=1))
    return 0


def _sweep(chosen: argparse.Namespace, device: Device) -> int:
    name, head_dim = chosen.sweep[0], int(chosen.sweep[1])
    heads = tuple(int(each) for each in chosen.heads.split(",")) if chosen.heads else None
    rows = []
    print(sweep.sweep_header())
    for each in sweep.sweep(
        name,
        head_dim,
        tiles=sweep.parse_tiles(chosen.tiles) if chosen.tiles else None,
        device=device,
        num_tokens=chosen.tokens,
        num_vision=chosen.vision,
        loss=chosen.loss,
        dtype=DTYPES[chosen.dtype],
        heads=heads,
    ):
        rows.append(each)
        print(sweep.sweep_row(each), flush=True)
    print(f"\nranked: no spills first, then predicted ms of {chosen.tokens} tokens, {device.name}")
    for each in sorted(rows, key=_rank):
        print(sweep.sweep_row(each))
    return 0


def _rank(row: sweep.Candidate) -> tuple[bool, bool, float]:
    spills = row.compiled is not None and row.compiled.stack > 0
    return row.compiled is None, spills, row.ms


if __name__ == "__main__":
    sys.exit(main())
