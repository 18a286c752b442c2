"""Signals, toy losses by hand, and comparisons for tests of the trainer."""

import torch

from drivekd.capture import capture_attention
from drivekd.data import Collator
from drivekd.losses import AttentionMapLoss
from drivekd.train import ProjectionConfig, SignalConfig
from tests.helpers import toy_data

TYPES = ("sort", "fold", "sort", "wash", "fold", "sort", "wash", "fold")


SIGNALS = (
    SignalConfig(
        name="sort",
        teacher="a",
        student_layers="first",
        teacher_layers="first",
        region="text_to_vision",
    ),
    SignalConfig(
        name="fold", teacher="b", student_layers="0..-2", teacher_layers="0..-2", region="full"
    ),
    SignalConfig(
        name="wash",
        teacher="c",
        student_layers="penultimate",
        teacher_layers="penultimate",
        region="text_to_vision",
    ),
)


LOGITS = SignalConfig(name="words", teacher="a", kind="logits", weight=2.0)


# TrainingArguments of a few plain steps in order.
SETTINGS = {
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
    "dataloader_pin_memory": False,
}


NO_PROJECTION = ProjectionConfig(method="none")


def make_collator(root, config):
    return Collator(toy_data.encoder(root), config, pad_token_id=toy_data.PAD)


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    different = [name for name in got if not torch.equal(got[name], wanted[name])]
    assert not different, different[:5]


def assert_close(got, wanted, before, *, relative):
    """Largest difference of two updates against the largest update."""
    moved = max((wanted[name] - before[name]).abs().max().item() for name in wanted)
    assert moved > 0
    error = max((got[name] - wanted[name]).abs().max().item() for name in wanted)
    assert error <= relative * moved, (error, moved)


def model_inputs(batch, rows):
    return {
        "input_ids": batch["input_ids"][rows],
        "attention_mask": batch["attention_mask"][rows],
        "pixel_values": batch["pixel_values"][rows],
    }


def plain_losses(models, batch, weights=None):
    """The three signals of SIGNALS by hand: every teacher whole, on its rows."""
    losses = {}
    specs = {
        "sort": ("a", [0], [0], "text_to_vision"),
        "fold": ("b", [0, 1], [0, 1, 2, 3], "full"),
        "wash": ("c", [1], [2], "text_to_vision"),
    }
    with capture_attention(models["student"], [0, 1]) as student:
        inputs = model_inputs(batch, slice(None))
        output = models["student"](**inputs, labels=batch["labels"], use_cache=False)
    for name, (teacher, own, theirs, region) in specs.items():
        rows = [i for i, kind in enumerate(batch["question_types"]) if kind == name]
        if not rows:
            continue
        with torch.no_grad(), capture_attention(models[teacher], theirs) as captured:
            models[teacher](**model_inputs(batch, rows), use_cache=False)
        loss = AttentionMapLoss(student_layers=own, teacher_layers=theirs, region=region)
        weight = None if weights is None else torch.full((len(rows),), weights[name])
        losses[name] = loss(student.select(rows), captured, batch["tokens"].select(rows), weight)
    return {"ce": output.loss, **losses}, output


def batches(root, config, size):
    records = toy_data.records(root, TYPES)
    collator = make_collator(root, config)
    return [collator(records[i : i + size]) for i in range(0, len(records), size)]


class Forwards:
    """Counts a model's calls and the samples in them."""

    def __init__(self, model):
        self.samples = []
        self.layers = 0
        model.register_forward_pre_hook(self._call, with_kwargs=True)
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(self._layer)

    def _call(self, module, args, kwargs):
        self.samples.append(len(kwargs["input_ids"]))

    def _layer(self, module, args):
        self.layers += 1
