"""Runs a loop of the README on a small student, in one process or in several."""

from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from torch import nn

import drivekd
import drivekd.train
from tests.helpers.readme import loops

ROWS = 8


class Net(nn.Module):
    """Maps (B, 5) to (B, 3) and keeps its hidden layer for a second loss."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=torch.float64)
        self.second = nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, x):
        hidden = self.first(x).tanh()
        return self.second(hidden), hidden


def losses_of(model, batch):
    output, hidden = model(batch["x"])
    return {
        "ce": output.square().mean() + hidden.mean(),
        "perception": (1.5 - hidden).square().mean(),
    }


def records():
    generator = torch.Generator().manual_seed(1)
    return [{"x": row} for row in torch.randn(ROWS, 5, dtype=torch.float64, generator=generator)]


class PlainMixin(drivekd.train.DistillMixin):
    """The mixin with a plain sum."""

    def __init__(self, *arguments, **settings):
        projector = Plain.GradientProjector(settings["model"])
        super().__init__(*arguments, projector=projector, **settings)


class Plain:
    """A namespace in which the projector is a plain sum."""

    train = SimpleNamespace(DistillMixin=PlainMixin)

    @staticmethod
    def GradientProjector(parameters):  # noqa: N802
        return drivekd.GradientProjector(parameters, method="none")


def run_loop(
    name,
    folder,
    *,
    which="after",
    rows=2,
    accumulation=1,
    library=drivekd,
    wrap=None,
    accelerator=Accelerator,
):
    """The student's weights after the loop.

    Args:
        name: "plain", "accelerate" or "trainer".
        folder: For what the trainer writes.
        which: "before" or "after".
        rows: Rows of a micro-batch of one process.
        accumulation: Micro-batches per optimizer step.
        library: What `drivekd` is.
        accelerator: Makes the Accelerator.
        wrap: What the plain loop's model is wrapped in; its batches are then those of this rank.
    """
    torch.manual_seed(0)
    student = Net()
    loader = torch.utils.data.DataLoader(records(), batch_size=rows)
    names = {
        "drivekd": library,
        "torch": torch,
        "transformers": transformers,
        "losses_of": losses_of,
        "student": student,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "loader": loader,
        "records": records(),
    }
    if wrap is not None:
        names["student"] = wrap(student)
        names["optimizer"] = torch.optim.SGD(names["student"].parameters(), lr=0.1)
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        names["loader"] = list(loader)[rank::ranks]
    if name == "accelerate":
        names["accelerator"] = accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    if name == "trainer":
        names["arguments"] = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
    exec(compile(getattr(loops()[name], which), f"README.md ({name})", "exec"), names)
    trained = [own.detach() for own in student.parameters()]
    return [own.full_tensor() if hasattr(own, "full_tensor") else own.clone() for own in trained]
