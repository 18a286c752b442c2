"""The contrast that untrained teachers show: `python -m benchmarks.untrained_contrast DATA`.

`drivekd prestudy` calls nothing clear below a contrast of `UNTRAINED`. This measures what that must
be: teachers of the demo's size with random weights know nothing, so whatever contrast at equal
wording they show comes of words and architecture. `UNTRAINED` is to be above the largest one of 19
in 20 of them, and none of them is to be called clear. DATA is what `drivekd demo --prepare` made.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from drivekd.data import Collator, Record, load_records
from drivekd.demo.data import shuffled
from drivekd.demo.models import TEACHER, CachedEncoder, build_model
from drivekd.demo.teachers import load_tokenizer
from drivekd.study.prestudy import Prestudy, prestudy
from drivekd.study.prestudy.measures import REGIONS
from drivekd.study.prestudy.suggest import CLEAR, UNTRAINED

CAPABILITIES = ("perception", "reasoning")  # planning's one question is told from wording at once
RESULTS = Path(__file__).parent / "results" / "untrained_contrast.json"


def choose(records: Sequence[Record], count: int, *, seed: int) -> list[Record]:
    """Records of each capability, in a seeded random order.

    Raises:
        ValueError: there are too few.
    """
    chosen = []
    for capability in CAPABILITIES:
        own = [each for each in shuffled(records, seed=seed) if each.question_type == capability]
        if len(own) < count:
            raise ValueError(f"{len(own)} records of {capability}, wanted {count}")
        chosen += own[:count]
    return chosen


def study_untrained(root: Path, records: Sequence[Record], *, seed: int) -> Prestudy:
    """The pre-study of one teacher with random weights."""
    tokenizer = load_tokenizer()
    teacher = build_model(TEACHER, tokenizer, seed=seed).eval().requires_grad_(False)
    encoder = CachedEncoder(tokenizer, root)
    collator = Collator(encoder, teacher.config, pad_token_id=tokenizer.pad_token_id)
    batches = (collator([each]) | {"pictures": [each.images]} for each in records)
    return prestudy(teacher, batches, capabilities=CAPABILITIES, seed=seed)


def row_of(study: Prestudy, seed: int) -> dict[str, Any]:
    """Contrasts at equal wording by capability and region, one number a layer; what was said."""
    contrasts = {
        each.name: {
            region: [round(value, 4) for value in each.similarity[region].beyond_words.value]
            for region in REGIONS
        }
        for each in study.capabilities
    }
    return {
        "seed": seed,
        "largest": max(max(own) for regions in contrasts.values() for own in regions.values()),
        "evidence": {each.capability: each.evidence for each in study.suggestions},
        "contrasts": contrasts,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if `UNTRAINED` is too low."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.untrained_contrast", description=__doc__
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--teachers", type=int, default=60)
    parser.add_argument("--records", type=int, default=60, help="of each capability")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    records = load_records(options.data / "test.json")
    rows = []
    for seed in range(options.teachers):
        chosen = choose(records, options.records, seed=seed)
        rows.append(row_of(study_untrained(options.data, chosen, seed=seed), seed))
        print(f"teacher {seed}: largest contrast {rows[-1]['largest']:.2f}", flush=True)
    evidence = Counter(each for row in rows for each in row["evidence"].values())
    document = {
        "size": asdict(TEACHER),
        "records": options.records,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "largest_of_19_in_20": float(np.quantile([row["largest"] for row in rows], 0.95)),
        "evidence": dict(evidence.most_common()),
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(document, indent=1)[:-2]
    options.output.write_text(f'{head},\n "teachers": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    floor = document["largest_of_19_in_20"]
    print(f"19 in 20 stay below {floor:.2f}; UNTRAINED is {UNTRAINED}; said: {dict(evidence)}")
    return 0 if floor < UNTRAINED and not evidence[CLEAR] else 1


if __name__ == "__main__":
    sys.exit(main())
