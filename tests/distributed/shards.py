"""What two ranks with an FSDP2 model do; `test_shards.py` holds it against one process."""

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from drivekd.projection import GradientProjector
from drivekd.projection.pending import Pending
from drivekd.reweighting import BalancedWeights
from tests.distributed.replicas import METHODS, rank, replica, told
from tests.helpers.students import WEIGHTS
from tests.helpers.traffic import Traffic


def sharded(dtype=torch.float64, *, ignored=(), mesh=None, freeze=False, **options):
    """A student of which every layer is a group of its own."""
    model = replica(dtype)
    if freeze:
        model.first.weight.requires_grad_(False)
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    kept = {model.get_parameter(name) for name in ignored}
    # A list and not its generator: fully_shard of a linear layer alone must see its own weights.
    for layer in (model.first, model.second, model.head):
        fully_shard(layer, mesh=mesh, ignored_params=kept, **options)
    fully_shard(model, mesh=mesh, ignored_params=kept, **options)
    return model


def whole(tensor):
    if tensor is None:
        return None
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def grads_of(model):
    return [whole(own.grad) for own in model.parameters()]


def after_one(model=None, call=None, names=None, **settings):
    model = model or sharded()
    projector = GradientProjector(model, **settings)
    report = projector.backward(model(rank() + 1, names), **(call or {}))
    if settings.get("every") == "step":
        report = projector.step()
    return {"grads": grads_of(model), "report": told(report)}


def case_methods():
    return {
        (method, missing, every): after_one(
            method=method, missing=missing, every=every, seed=5, call={"weights": WEIGHTS}
        )
        for method in METHODS
        for missing in ("zero", "official")
        for every in ("microbatch", "step")
    }


def case_fp32():
    return after_one(sharded(torch.float32), call={"weights": WEIGHTS})


def case_without_resharding():
    return after_one(sharded(reshard_after_forward=False), call={"weights": WEIGHTS})


def case_replicated_shards():
    """HSDP: both ranks hold every shard; each must count once in norms and inner products."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return after_one(sharded(mesh=mesh), call={"weights": WEIGHTS})


def case_parameters_beside_the_shards():
    """Ignored by FSDP2, so whole on every rank and averaged by nobody else."""
    model = sharded(ignored=("second.weight", "head.bias"))
    model.second.weight.grad = torch.full_like(model.second.weight, 2.0)
    return after_one(model, call={"weights": WEIGHTS}, missing="official")


def case_frozen():
    return after_one(sharded(freeze=True), call={"weights": WEIGHTS})


def case_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return after_one(sharded(torch.float32, mp_policy=policy), call={"weights": WEIGHTS})


def case_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return after_one(sharded(torch.float32), call={"scaler": scaler})


def case_max_norm():
    return after_one(every="step", max_norm=1e-2, call={"weights": WEIGHTS})


def case_fewer_losses():
    return after_one(names=("ce", "perception"))


def case_not_finite():
    model = sharded()
    losses = model(rank() + 1)
    losses["reasoning"] = losses["reasoning"] * (float("nan") if rank() else 1.0)
    report = GradientProjector(model).backward(losses)
    return {"grads": grads_of(model), "report": told(report)}


def case_training():
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector, weights = GradientProjector(model), BalancedWeights(0.1)
    reports = []
    for step in range(3):
        for micro in range(2):
            # What Accelerate does in all but the last micro-batch.
            model.set_requires_gradient_sync(micro == 1)
            losses = model(4 * step + 2 * micro + rank())
            reports.append(told(projector.backward(losses, weights=weights, scale=0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": [whole(own) for own in model.parameters()], "reports": reports}


def case_an_ordinary_backward_afterwards():
    """The switches of FSDP2 are as they were: gradients are reduced, parameters are fresh."""
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientProjector(model).backward(model(rank() + 1))
    optimizer.step()
    optimizer.zero_grad()
    model(rank() + 1)["ce"].backward()
    return {"weights": [whole(own) for own in model.parameters()], "grads": grads_of(model)}


def case_gathers():
    """What the backwards of four losses send."""
    model = sharded()
    losses = model(rank() + 1)
    with Traffic() as traffic:
        GradientProjector(model).backward(losses)
    return traffic.calls


def case_modules_without_a_common_root():
    """Two that fully_shard took on their own, one of which does not run."""
    model = nn.ModuleList([replica(), replica()])
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for own in model:
        fully_shard(own, mesh=mesh)
    projector = GradientProjector(model, method="stage1")
    projector.backward(model[0](rank() + 1), weights=WEIGHTS)
    first = grads_of(model)
    model.zero_grad()
    both = model[0](rank() + 1), model[1](rank() + 3)
    projector.backward({name: both[0][name] + both[1][name] for name in both[0]})
    return first, grads_of(model)


def case_a_loss_on_one_rank():
    after_one(names=("ce", "reasoning") if rank() else ("ce", "perception"))


def case_seed_differs():
    after_one(seed=rank())


def case_parameters_without_their_module():
    GradientProjector(sharded().parameters())


def case_made_before_sharding():
    model = replica()
    projector = GradientProjector(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    projector.backward(model(rank() + 1))


def case_optimizer_in_backward():
    model = sharded()
    next(model.parameters()).register_post_accumulate_grad_hook(lambda own: None)
    after_one(model)


def distributed_linear(mesh, placements):
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, placements))
    return model


def case_tensor_parallel():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    GradientProjector(distributed_linear(mesh, [Shard(0)]))


def case_tensor_parallel_beside_fsdp():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "model"))
    model = nn.Sequential(distributed_linear(mesh["model"], [Shard(1)]), nn.Linear(4, 4))
    fully_shard(model, mesh=mesh["dp"])
    GradientProjector(model)


def case_context_parallel_by_the_name_of_its_mesh():
    GradientProjector(sharded(mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp_cp",))))


def case_a_layer_on_one_rank():
    """FSDP2 itself would hang here; whatever comes out of it must not hang in the projector."""
    projector = GradientProjector(sharded())
    engine, model = projector._engine, projector._module
    losses = model(1)
    ((_, grads),) = engine.differentiate([("ce", losses["ce"])], torch.ones_like)
    if rank():
        grads[3] = None
    statement = projector._statement(Pending(), ["ce"], 1.0)
    engine.reduce({"ce": grads}, statement, {}, {})


def case_two_meshes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model[1], mesh=hybrid)
    GradientProjector(model)


def case_a_group_other_than_the_mesh():
    groups = [distributed.new_group([own]) for own in range(distributed.get_world_size())]
    GradientProjector(sharded(), process_group=groups[rank()])


def case_copies_that_fsdp_did_not_make():
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(distributed_linear(mesh, [Replicate()]), nn.Linear(4, 4))
    fully_shard(model[1], mesh=mesh)
    GradientProjector(model)
