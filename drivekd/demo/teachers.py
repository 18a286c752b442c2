"""Makes the demo's teachers: `python -m drivekd.demo.teachers`. The weights that ship came from it.

One model learns every kind of question from all training frames; each capability's teacher starts
from it and goes on with the questions of its capability alone. Weights are stored in float16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivekd.data import Record
from drivekd.data.collate import collate_features
from drivekd.demo.data import blanked, load_splits, make_world
from drivekd.demo.evaluation import tally_answers
from drivekd.demo.models import TEACHER, CachedEncoder, build_model, build_tokenizer
from drivekd.demo.settings import CAPABILITIES, World
from drivekd.study.schema import Teacher
from drivekd.study.statistics import micro

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
FACTS = "teachers.json"
JOINT_SEED = 100


@dataclass(frozen=True)
class Facts:
    """How the shipped teachers were made, and how they answer the world's test questions."""

    joint_steps: int
    own_steps: int
    teachers: tuple[Teacher, ...]


def load_teacher(name: str, assets: Path = ASSETS) -> InternVLForConditionalGeneration:
    """A shipped teacher in float32, in evaluation mode, without gradients."""
    import torch
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(assets / name, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def load_tokenizer(assets: Path = ASSETS) -> PreTrainedTokenizerFast:
    """The tokenizer that every model of the demo shares."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "tokenizer")


def read_facts(assets: Path = ASSETS) -> Facts:
    """What was measured when the teachers were made."""
    document = json.loads((assets / FACTS).read_text())
    teachers = tuple(Teacher.from_document(each) for each in document["teachers"])
    return Facts(document["joint_steps"], document["own_steps"], teachers)


def fit(
    model: InternVLForConditionalGeneration,
    records: Sequence[Record],
    encoder: CachedEncoder,
    *,
    pad_token_id: int,
    steps: int,
    learning_rate: float,
    seed: int,
    output: Path,
) -> None:
    """Plain cross-entropy training with `transformers.Trainer`."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        weight_decay=0.05,
        adam_beta2=0.98,
        warmup_steps=60,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        max_grad_norm=1.0,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def collate(batch: Sequence[Record]) -> dict[str, Any]:
        return collate_features([encoder(r) for r in batch], pad_token_id=pad_token_id)

    Trainer(model=model, args=arguments, train_dataset=list(records), data_collator=collate).train()


def make_teachers(
    output: Path, assets: Path, *, workers: int, joint_steps: int = 2400, own_steps: int = 300
) -> None:
    """Train all teachers, measure them on the test split and write them to `assets`."""
    import torch

    torch.set_num_threads(1)  # small models: one thread a process is fastest, and repeatable
    world = World()
    data = output / "data"
    make_world(data, world, workers=workers, progress=lambda *_: None)
    splits = load_splits(data, world)
    tokenizer = build_tokenizer(splits.train)
    encoder = CachedEncoder(tokenizer, splits.root)
    train = partial(fit, encoder=encoder, pad_token_id=tokenizer.pad_token_id, output=output)
    joint = build_model(TEACHER, tokenizer, seed=JOINT_SEED)
    if (output / "joint").exists():
        joint = type(joint).from_pretrained(output / "joint")
    else:
        train(joint, splits.train, steps=joint_steps, learning_rate=1.5e-3, seed=JOINT_SEED)
        joint.save_pretrained(output / "joint")
    facts: dict[str, Any] = {
        "world": asdict(world),
        "joint_steps": joint_steps,
        "own_steps": own_steps,
        "teachers": [],
    }
    shutil.rmtree(assets, ignore_errors=True)
    tokenizer.save_pretrained(assets / "tokenizer")
    state = {key: value.clone() for key, value in joint.state_dict().items()}
    for i, name in enumerate(CAPABILITIES):
        model = build_model(TEACHER, tokenizer, seed=JOINT_SEED)
        model.load_state_dict(state)
        own = [record for record in splits.train if record.question_type == name]
        train(model, own, steps=own_steps, learning_rate=6e-4, seed=JOINT_SEED + 1 + i)
        model.half().save_pretrained(assets / name)
        teacher = load_teacher(name, assets)
        measure = partial(tally_answers, teacher, encoder, tokenizer)
        result = Teacher(
            name=name,
            parameters=sum(p.numel() for p in teacher.parameters()),
            accuracy=measure(splits.test),
            blank=measure(blanked(splits.test)),
        )
        facts["teachers"].append(asdict(result))
        print(name, {c: round(micro(t.values()).accuracy, 3) for c, t in result.accuracy.items()})
    (assets / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m drivekd.demo.teachers", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/teachers"), help="work folder")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the teachers go")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--joint-steps", type=int, default=2400)
    parser.add_argument("--own-steps", type=int, default=300)
    options = parser.parse_args(arguments)
    make_teachers(
        options.output,
        options.assets,
        workers=options.workers,
        joint_steps=options.joint_steps,
        own_steps=options.own_steps,
    )


if __name__ == "__main__":
    main()
