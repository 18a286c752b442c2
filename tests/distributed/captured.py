"""Captured attention maps of a transformers model on two ranks; see `test_captured.py`."""

import peft
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import drivekd
from tests.helpers.toy_models import qwen2, text_inputs

LAYERS = [0, 1, 2]


def losses_of(student, teacher, seed, lack=None):
    """Cross-entropy, a shallow loss (first layer) and one of the first three layers.

    Batches of odd seeds lack samples for the shallow one if `lack` is "absent" or, which must come
    to the same, "zero".
    """
    batch = text_inputs(seed=seed)
    batch["labels"] = batch["input_ids"].clone()
    with torch.no_grad(), drivekd.capture_attention(teacher, LAYERS) as t:
        teacher(**batch)
    with drivekd.capture_attention(student, LAYERS) as s:
        ce = student(**batch, use_cache=False).loss
    losses = {"ce": ce}
    for name, layers in (("perception", [0]), ("reasoning", LAYERS)):
        loss = drivekd.AttentionMapLoss(student_layers=layers, teacher_layers=layers, region="full")
        counted = None
        if name == "perception" and lack is not None and seed % 2:
            if lack == "absent":
                continue
            counted = torch.zeros(len(batch["input_ids"]))
        losses[name] = 100.0 * loss(s, t, None, sample_weight=counted)
    return losses


def trained(wrap=lambda student: student, seeds=None, lack=None):
    """Gradients and report of the second of two steps.

    Args:
        wrap: Makes the distributed model.
        seeds: Of the batches whose mean loss is taken; None is this rank's.
        lack: As for `losses_of`.
    """
    student, teacher = qwen2(seed=1), qwen2(seed=2).requires_grad_(False)
    model = wrap(student.train())
    projector = drivekd.GradientProjector(model, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seeds = [distributed.get_rank()] if seeds is None else seeds
    for step in range(2):
        optimizer.zero_grad()
        total = {}
        for seed in seeds:
            for name, loss in losses_of(model, teacher, 10 * step + seed, lack).items():
                total[name] = total.get(name, 0.0) + loss / len(seeds)
        report = projector.backward(dict(sorted(total.items())))
        optimizer.step()
    grads = [own.grad for own in student.parameters()]
    whole = [own.full_tensor() if hasattr(own, "full_tensor") else own for own in grads]
    return {"grads": whole, "report": vars(report)}


def by_layer(student, **options):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in student.get_decoder().layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(student, mesh=mesh, **options)


def case_ddp():
    return trained(DistributedDataParallel)


def case_fsdp():
    return trained(by_layer)


def with_checkpointing(student):
    student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def with_frozen_embeddings(student):
    student.get_input_embeddings().requires_grad_(False)
    return student


def with_tied_weights(student):
    student.lm_head.weight = student.get_input_embeddings().weight
    return student


def with_adapters(student):
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(5)
    return peft.get_peft_model(student, settings)


def case_tied_weights_ddp():
    return trained(lambda student: DistributedDataParallel(with_tied_weights(student)))


def case_tied_weights_fsdp():
    return trained(lambda student: by_layer(with_tied_weights(student)))


def case_adapters_ddp():
    return trained(lambda student: DistributedDataParallel(with_adapters(student)))


def case_adapters_fsdp():
    return trained(lambda student: by_layer(with_adapters(student)))


def case_checkpointing_ddp():
    return trained(lambda student: DistributedDataParallel(with_checkpointing(student)))


def case_checkpointing_fsdp():
    return trained(lambda student: by_layer(with_checkpointing(student)))


def case_frozen_embeddings_fsdp():
    return trained(lambda student: by_layer(with_frozen_embeddings(student)))


def case_lacking_samples_ddp():
    return trained(DistributedDataParallel, lack="absent")


def case_lacking_samples_fsdp():
    return trained(by_layer, lack="zero")


def case_fsdp_without_resharding():
    return trained(lambda student: by_layer(student, reshard_after_forward=False))
