"""What two ranks with whole models do; `test_replicas.py` holds it against one process."""

import warnings

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from drivekd.projection import GradientProjector, replicas
from drivekd.reweighting import BalancedWeights, OnlineWeights
from tests.helpers.memory import LiveBytes
from tests.helpers.students import WEIGHTS, Student
from tests.helpers.traffic import Traffic

METHODS = ("agp", "stage1", "stage2", "pcgrad", "none")


class Replica(Student):
    """The student with its losses as outputs, as a wrapper wants them."""

    def forward(self, seed, names=None):
        losses = self.losses(seed)
        return {name: losses[name] for name in names or losses}


def replica(dtype=torch.float64):
    torch.manual_seed(3)
    return Replica(dtype)


def wrapped(dtype=torch.float64, **options):
    model = replica(dtype)
    return model, DistributedDataParallel(model, **options)


def rank():
    return distributed.get_rank()


def grads_of(model):
    return [None if own.grad is None else own.grad.clone() for own in model.parameters()]


def told(report):
    return vars(report)


def after_one(names=None, dtype=torch.float64, call=None, **settings):
    """The gradients and the report after one backward (and step) of this rank's batch."""
    model, ddp = wrapped(dtype)
    projector = GradientProjector(model.parameters(), **settings)
    report = projector.backward(ddp(rank() + 1, names), **(call or {}))
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
    return after_one(dtype=torch.float32, call={"weights": WEIGHTS})


def case_bf16():
    return after_one(dtype=torch.bfloat16, call={"weights": WEIGHTS})


def case_mixed_dtypes():
    model = replica()
    model.first.to(torch.float32)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank() + 1))
    shallow = model.first(x).tanh()
    deep = model.second(shallow.double()).tanh()
    losses = {"ce": model.head(deep).square().mean(), "perception": (1.5 - shallow).square().mean()}
    GradientProjector(model.parameters()).backward(losses)
    return grads_of(model)


def case_loss_on_one_rank():
    return after_one(["ce", "reasoning"] if rank() else ["ce", "perception", "planning"])


def case_anchor_on_one_rank():
    return after_one(["ce", "reasoning"] if rank() else ["perception"])


def case_rank_without_losses():
    model, ddp = wrapped()
    projector = GradientProjector(model.parameters())
    report = projector.backward(ddp(1) if rank() == 0 else {}, weights=WEIGHTS)
    return {"grads": grads_of(model), "report": told(report)}


def case_no_losses_anywhere():
    GradientProjector(replica().parameters()).backward({})


def case_different_reach():
    """A loss that reaches the head on rank 1 only."""
    model, ddp = wrapped()
    losses = ddp(rank() + 1)
    if rank() == 0:
        losses["ce"] = losses["reasoning"] + losses["planning"]
    GradientProjector(model.parameters(), missing="official").backward(losses)
    return grads_of(model)


def case_frozen_and_present_grads():
    model, ddp = wrapped()
    model.head.requires_grad_(False)
    model.first.weight.grad = torch.full_like(model.first.weight, 2.0)
    GradientProjector(model.parameters()).backward(ddp(rank() + 1), scale=0.25)
    return grads_of(model)


def case_tensor_weights_are_averaged():
    weights = {name: torch.tensor(w * (1.0 + rank())) for name, w in WEIGHTS.items()}
    return after_one(call={"weights": weights})


def case_scaler():
    return after_one(
        dtype=torch.float32,
        call={"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)},
    )


def case_max_norm():
    return after_one(every="step", max_norm=1e-2, call={"weights": WEIGHTS})


def case_not_finite():
    model, ddp = wrapped()
    losses = ddp(rank() + 1)
    if rank():
        losses["reasoning"] = losses["reasoning"] * float("nan")
    report = GradientProjector(model.parameters()).backward(losses)
    return {"grads": grads_of(model), "report": told(report)}


def train(make_weights, steps=4, **settings):
    model, ddp = wrapped()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    projector = GradientProjector(ddp.parameters(), method="agp", **settings)
    weights = make_weights()
    reports = []
    for step in range(steps):
        names = ("ce", "perception", "reasoning", "planning")
        if step == 2:
            names = ("ce", "perception") if rank() else ("ce", "reasoning")
        report = projector.backward(ddp(2 * step + rank(), names), weights=weights)
        if settings.get("every") == "step":
            report = projector.step()
        reports.append(told(report))
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": [own.detach().clone() for own in model.parameters()], "reports": reports}


def case_training_balanced():
    return train(lambda: BalancedWeights(0.1))


def case_training_online():
    return train(lambda: OnlineWeights(WEIGHTS, learning_rate=0.05, alpha=1.0), every="step")


def case_accumulation():
    model, ddp = wrapped()
    projector = GradientProjector(model.parameters(), every="step")
    for number in range(3):
        with ddp.no_sync():
            losses = ddp(2 * number + rank())
            if number == 1 and rank():
                del losses["planning"]
            projector.backward(losses, weights=WEIGHTS, scale=1 / 3)
    report = projector.step()
    return {"grads": grads_of(model), "report": told(report)}


def case_a_resumed_projector():
    model, ddp = wrapped()
    projector = GradientProjector(model.parameters(), method="pcgrad", seed=4)
    projector.backward(ddp(rank()))
    other = GradientProjector(model.parameters(), method="pcgrad", seed=4)
    other.load_state_dict(projector.state_dict())
    both = []
    for own in (projector, other):
        model.zero_grad()
        own.backward(ddp(rank()))
        both.append(grads_of(model))
    return both


def case_a_group_of_one_rank_trains_alone():
    groups = [distributed.new_group([own]) for own in range(distributed.get_world_size())]
    return after_one(process_group=groups[rank()])


def case_a_group_without_this_rank():
    group = distributed.new_group([0])
    if rank():
        GradientProjector(replica().parameters(), process_group=group)


def case_seed_differs():
    after_one(seed=rank())


def case_state_differs():
    model, ddp = wrapped()
    projector = GradientProjector(model.parameters(), seed=1)
    if rank():
        projector.load_state_dict(GradientProjector(model.parameters(), seed=2).state_dict())
    projector.backward(ddp(1))


def case_settings_differ():
    after_one(method="stage1" if rank() else "agp")


def case_scale_differs():
    after_one(call={"scale": 1.0 + rank()})


def case_weights_differ():
    after_one(call={"weights": {**WEIGHTS, "planning": 0.1 + rank()}})


def case_kinds_of_weights_differ():
    after_one(call={"weights": WEIGHTS if rank() else None})


def case_parameters_differ():
    model, ddp = wrapped()
    GradientProjector(list(model.parameters())[rank() :]).backward(ddp(1))


def case_anchor_nowhere():
    after_one(["reasoning", "planning"])


def case_per_task_syncing_is_refused():
    model, ddp = wrapped(find_unused_parameters=True)
    GradientProjector(model.parameters()).backward(ddp(1, ["ce", "perception"]))


def case_a_static_graph_is_refused():
    model, ddp = wrapped(static_graph=True)
    GradientProjector(model.parameters()).backward(ddp(1))


def case_fsdp1_is_refused():
    return [refused_fsdp1(own) for own in (True, False)]


def refused_fsdp1(use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings(action="ignore"):
        model = FullyShardedDataParallel(
            replica(torch.float32), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        projector = None
        try:
            projector = GradientProjector(model)
            projector.backward(model(1))
        except NotImplementedError as error:
            return projector is None, str(error)


def case_an_ordinary_backward_between():
    """DDP's own reduction still works in steps that do not project."""
    model = replica()
    # DDP would wait for its gradient.
    model.unused.requires_grad_(False)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    projector = GradientProjector(ddp, seed=2)
    for step in range(5):
        losses = ddp(2 * step + rank())
        if step % 2:
            losses["ce"].backward()
        else:
            projector.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
    return [own.detach().clone() for own in model.parameters()]


def case_per_task_syncing_works_under_no_sync():
    model, ddp = wrapped(find_unused_parameters=True)
    with ddp.no_sync():
        GradientProjector(model.parameters()).backward(ddp(rank() + 1))
    return grads_of(model)


def case_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    GradientProjector(table.parameters()).backward({"ce": table(torch.tensor([1])).sum()})


def case_wrong_parameters():
    GradientProjector([nn.Parameter(torch.ones(3))]).backward(replica()(1))


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(257, 301), nn.Tanh(), nn.Linear(301, 99))


def wide_losses(model, number=4):
    out = model(torch.randn(3, 257, generator=torch.Generator().manual_seed(rank())))
    return {n: (out * (i - 1.5)).square().mean() for i, n in enumerate(list(WEIGHTS)[:number])}


def case_traffic():
    """Bytes that this rank gives to collectives, for K losses and for one all-reduce."""
    sent = {}
    for number in (1, 2, 4):
        model = wide()
        projector = GradientProjector(model.parameters())
        with Traffic() as traffic:
            projector.backward(wide_losses(model, number))
        sent[number] = (traffic.sent, dict(traffic.calls))
    size = sum(own.numel() for own in wide().parameters())
    flat = torch.zeros(size)
    with Traffic() as traffic:
        distributed.all_reduce(flat)
    return {"sent": sent, "all_reduce": traffic.sent}


def case_memory():
    """Peak bytes beyond the parameters and an old .grad, in units of the parameters' size."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    projector = GradientProjector(model.parameters())
    before, replicas._BUCKET_ELEMENTS = replicas._BUCKET_ELEMENTS, 64 * 64
    x = torch.randn(3, 64)
    peaks = []
    for _ in range(2):
        out = model(x)
        losses = {name: (out * (i - 1.5)).square().mean() for i, name in enumerate(WEIGHTS)}
        with LiveBytes() as live:
            projector.backward(losses)
        peaks.append(live.peak / (20 * 64 * 64 * 4))
    replicas._BUCKET_ELEMENTS = before
    return peaks
