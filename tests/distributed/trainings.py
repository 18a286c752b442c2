"""Short runs of the trainer on two ranks; `test_trainings.py` holds them against one process."""

import os
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import torch
import transformers

from drivekd.data import Collator, Message
from drivekd.errors import NonFiniteLossError, TrainingMemoryError
from drivekd.train import DistillConfig, DistillTrainer, ProjectionConfig, SignalConfig
from tests.helpers import toy_data, toy_models

# In the second step one rank has no sample of "fold", in the first neither has any of "wash".
TYPES = ("sort", "fold", "sort", "fold", "sort", "wash", "sort", "fold")
MAPS = {"student_layers": (0, 1), "teacher_layers": (0, 1), "region": "full", "weight": 100.0}
SIGNALS = {
    "sort": SignalConfig(name="sort", teacher="t", **MAPS | {"region": "text_to_vision"}),
    "fold": SignalConfig(name="fold", teacher="t", **MAPS),
    "wash": SignalConfig(name="wash", teacher="t", kind="logits", weight=0.5),
    "hidden": SignalConfig(
        name="fold", teacher="t", kind="hidden", student_layers=0, teacher_layers=1, weight=0.1
    ),
}
AGP = DistillConfig(
    signals=[SIGNALS["sort"], SIGNALS["fold"], SIGNALS["wash"]],
    projection=ProjectionConfig(method="agp", every="step", ce_multiplicity="official"),
)
PLAIN = DistillConfig(
    signals=[SIGNALS["sort"], SIGNALS["fold"], SIGNALS["wash"]],
    weighting="static",
    projection=ProjectionConfig(method="none"),
)
HIDDEN = DistillConfig(
    signals=[SIGNALS["sort"], SIGNALS["hidden"]],
    weighting="static",
    projection=ProjectionConfig(method="agp", every="step"),
)
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}


def student():
    return toy_models.internvl(layers=2, hidden=32, seed=1)


def trainer_of(model, config, output, text_alone=(), broken=None, **settings):
    root = Path(tempfile.mkdtemp())
    records = [
        record
        if record.question_type not in text_alone
        else replace(record, images=(), messages=(Message("user", "w7 w8 w9"), record.messages[1]))
        for record in toy_data.records(root, TYPES)
    ]
    arguments = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "report_to": "none",
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        **settings,
    }
    teacher = toy_models.internvl(layers=2, hidden=32, seed=2)
    if broken == int(os.environ.get("RANK", "0")):
        teacher.model.language_model.layers[1].self_attn.q_proj.weight.data.fill_(float("nan"))
    collator = Collator(toy_data.encoder(root), model.config, pad_token_id=toy_data.PAD)
    return DistillTrainer(
        model,
        {"t": teacher},
        config,
        args=transformers.TrainingArguments(**arguments),
        data_collator=collator,
        train_dataset=records,
    )


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def trained(config, output, *, resume=None, lora=False, **settings):
    """Weights and log of a run."""
    model = student()
    if lora:
        torch.manual_seed(0)
        targets = r".*language_model.*\.(q_proj|k_proj)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    try:
        trainer = trainer_of(model, config, output, **settings)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
    finally:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    helpers = {} if trainer.plan is None else trainer.plan.helpers.state_dict()
    return {
        "weights": {name: whole(own) for name, own in model.state_dict().items()},
        "helpers": {name: own.clone() for name, own in helpers.items()},
        "log": trainer.state.log_history,
        "sharded": any(hasattr(own, "full_tensor") for own in model.parameters()),
    }


def run_folder(name):
    return Path(sys.argv[2]) / name


def both_engines(config, name, **settings):
    return {
        "ddp": trained(config, run_folder(f"{name}-ddp"), **settings),
        "fsdp2": trained(config, run_folder(f"{name}-fsdp2"), **settings, **FSDP2),
    }


def case_plain():
    """Only the second step has a log row, and a backward for each loss; the last one has none."""
    return both_engines(PLAIN, "plain", logging_steps=2, max_steps=3)


def case_hidden():
    """Layers are run again in every backward."""
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return both_engines(HIDDEN, "hidden", gradient_checkpointing=True, **options)


def case_agp():
    """Two micro-batches of one record on each rank; "wash" is in one of them."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    return both_engines(AGP, "agp", **settings)


def case_text_alone():
    """Half of the batches of a rank have no image at all."""
    fused = {"optim": "adamw_torch_fused"}  # Trainer's own choice: takes no mixture of shards
    return both_engines(
        AGP, "text_alone", per_device_train_batch_size=1, text_alone=("fold",), **fused
    )


def case_resumed():
    """From the first of two steps, also under the other engine; helpers have optimizer state."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    done = both_engines(HIDDEN, "resumed", **settings)
    for engine, extra in (("ddp", {}), ("fsdp2", FSDP2)):
        for source in ("ddp", "fsdp2"):
            resume = str(run_folder(f"resumed-{source}") / "checkpoint-1")
            folder = run_folder(f"{engine}-from-{source}")
            done[engine, source] = trained(HIDDEN, folder, resume=resume, **settings, **extra)
    return done


def case_bf16():
    """Float32 weights throughout; also with parts that FSDP2 leaves alone."""
    done = both_engines(AGP, "bf16", bf16=True)
    settings = {"bf16": True, "per_device_train_batch_size": 1, "text_alone": ("fold",)}
    return {**done, "partly": trained(AGP, run_folder("partly"), **settings, **FSDP2)}


def case_lora():
    settings = {"lora": True, "save_strategy": "steps", "save_steps": 1}
    done = both_engines(AGP, "lora", **settings)
    resume = str(run_folder("lora-fsdp2") / "checkpoint-1")
    done["fsdp2", "fsdp2"] = trained(
        AGP, run_folder("lora-resumed"), resume=resume, **settings, **FSDP2
    )
    return done


def case_fsdp1():
    with warnings.catch_warnings(action="ignore"):
        trained(AGP, run_folder("fsdp1"), fsdp=True, fsdp_config={"version": 1})


def case_parameters_on_the_host():
    settings = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": True}}
    trained(AGP, run_folder("host"), **settings)


def case_images_on_one_rank():
    """Without signals nothing is kept whole, and the towers of FSDP2 would wait for each other."""
    settings = {"per_device_train_batch_size": 1, "text_alone": ("fold",)}
    trained(DistillConfig(), run_folder("one_rank"), **settings, **FSDP2)


def case_not_finite():
    """The second rank's teacher has a weight that is not."""
    raised = {}
    for engine, extra in (("ddp", {}), ("fsdp2", FSDP2)):
        try:
            trained(PLAIN, run_folder("nan"), broken=1, **extra)
        except NonFiniteLossError as error:
            raised[engine] = str(error)
    return raised


def last():
    """The second rank runs out of memory in the middle of FSDP2's forward, and ends."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model, rank = student(), int(os.environ["RANK"])
    trainer = trainer_of(model, AGP, run_folder("full"), **FSDP2)
    if rank == 1:
        model.model.language_model.layers[1].mlp.forward = full
    begin = time.monotonic()
    try:
        trainer.train()
    except TrainingMemoryError as error:
        text = f"{time.monotonic() - begin}\n{error}"
        (run_folder("full") / f"{rank}.txt").write_text(text)
