"""Two gloo ranks under DDP and FSDP2 against one process that accumulates over their batches.

The ranks run in `trainings.py`, started once for all tests here.
"""

import json

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from drivekd.train import distill, load_recipe
from tests.distributed import trainings
from tests.distributed.reference import returned
from tests.distributed.trainings import AGP, HIDDEN, PLAIN, trained
from tests.helpers.killed_runs import CLOCK
from tests.helpers.ranks import ROOT, Raised, free_port, run_ranks, start_ranks
from tests.helpers.recipes import write_recipe

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks("tests.distributed.trainings", folder)


def update(run):
    """What training changed, flat."""
    start = trainings.student().state_dict()
    weights = run["weights"]
    if not start.keys() <= weights.keys():  # adapters are in there
        return torch.cat([own.flatten() for name, own in sorted(weights.items())])
    return torch.cat([(weights[name] - start[name]).flatten() for name in sorted(start)])


def check_same_run(ranks, case, one):
    """Weights, helpers and log of both engines and ranks are those of one process."""
    want = update(one)
    assert want.abs().max() > 1e-3
    results = returned(ranks, case)
    for engine in ENGINES:
        first, second = (own[engine] for own in results)
        assert first["sharded"] == (engine == "fsdp2")
        assert torch.equal(update(first), update(second))
        # Measured: 0 or one rounding of the largest weight (1.2e-7); float32 sums over ranks and
        # over micro-batches are added up in different orders, and Adam divides what is left.
        error = (update(first) - want).abs().max()
        assert error <= 1e-4 * want.abs().max(), (engine, error)
        for name, own in one["helpers"].items():
            torch.testing.assert_close(first["helpers"][name], own, rtol=1e-5, atol=1e-6)
        check_same_log(first["log"], one["log"], all_keys=case != "plain")


def check_same_log(got, wanted, *, all_keys=True):
    """Gradients are compared by micro-batch unless projected by step: other pairs meet in them."""
    for row, want in zip(got, wanted, strict=True):
        if all_keys:
            assert row.keys() == want.keys()
        for key, value in want.items():
            is_clock = any(clock in key for clock in CLOCK)
            if not is_clock and (all_keys or "loss" in key or key in ("ce", "grad_norm")):
                assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    ("case", "config", "settings"),
    [
        ("agp", AGP, {"gradient_accumulation_steps": 4}),
        ("plain", PLAIN, {"logging_steps": 2, "max_steps": 3}),
        ("hidden", HIDDEN, {}),
        ("lora", AGP, {"lora": True}),
        ("text_alone", AGP, {"text_alone": ("fold",)}),
    ],
)
def test_two_ranks_train_as_one_process(ranks, tmp_path, case, config, settings):
    """Ranks without samples of a signal, clipping, a scheduler, signals that no rank has."""
    rows = 1 if case in ("agp", "text_alone") else 2
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": rows} | settings
    one = trained(config, tmp_path / "run", **settings)
    check_same_run(ranks, case, one)
    if case == "agp":
        names = [{key.split("/")[0] for key in row if key.endswith("/loss")} for row in one["log"]]
        assert names[:2] == [{"sort", "fold"}, {"sort", "fold", "wash"}]


@pytest.mark.parametrize(
    ("case", "engine", "source"),
    [("resumed", own, other) for own in ENGINES for other in ENGINES]
    + [("lora", "fsdp2", "fsdp2")],
)
def test_resumed_run_is_the_same_to_the_bit(ranks, case, engine, source):
    """Also from a checkpoint of the other engine, whose log may differ in the last digit."""
    (results, _) = returned(ranks, case)
    resumed, whole = results[engine, source], results[engine]
    assert resumed["sharded"] == (engine == "fsdp2")
    for kind in ("weights", "helpers"):
        for name, own in whole[kind].items():
            assert torch.equal(resumed[kind][name], own), name
    check_same_log(resumed["log"], whole["log"])
    if engine == source:
        rows = [
            [{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in log]
            for log in (resumed["log"], whole["log"])
        ]
        assert rows[0] == rows[1]


def test_checkpoints_are_those_of_one_process(ranks, folder):
    """Plain safetensors for from_pretrained, one optimizer state, the same files either way."""
    (results, _) = returned(ranks, "resumed")
    files, weights = {}, {}
    for engine in ENGINES:
        checkpoint = folder / f"resumed-{engine}" / "checkpoint-2"
        files[engine] = {own.name for own in checkpoint.iterdir()}
        weights[engine] = load_file(checkpoint / "model.safetensors")
        model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)
        assert type(model) is type(trainings.student())
        for name, own in model.state_dict().items():
            assert own.dtype == torch.float32
            assert torch.equal(own, results[engine]["weights"][name]), name
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert {type(value) for own in state.values() for value in own.values()} == {torch.Tensor}
    assert files["ddp"] == files["fsdp2"]
    # Tied weights once, under the names that the family's checkpoints have.
    assert weights["ddp"].keys() == weights["fsdp2"].keys()


def test_bf16_keeps_float32_weights_and_losses(ranks, tmp_path):
    """Also where a part of the student is beside FSDP2's shards, under autocast."""
    (results, _) = returned(ranks, "bf16")
    exact = {
        "ddp": trained(AGP, tmp_path / "run", gradient_accumulation_steps=2),
        "partly": trained(
            AGP,
            tmp_path / "partly",
            gradient_accumulation_steps=2,
            per_device_train_batch_size=1,
            text_alone=("fold",),
        ),
    }
    exact["fsdp2"] = exact["ddp"]
    for name, run in results.items():
        assert all(own.dtype == torch.float32 for own in run["weights"].values())
        error = (update(run) - update(exact[name])).norm() / update(exact[name]).norm()
        # bf16 has 8 bits: gradients are off by some percent, and Adam divides by their size.
        assert 1e-4 < error < 0.15, (name, error)
        loss = torch.tensor(run["log"][0]["ce"])
        assert loss.bfloat16() != loss, "rounded to bf16"


def test_loss_that_is_not_finite_on_one_rank_stops_all_with_its_name(ranks):
    first, second = returned(ranks, "not_finite")
    assert first == second and first.keys() == set(ENGINES)
    for message in first.values():
        assert message.startswith("rank 1: step 1: losses are not finite: 'sort' is nan, student")
        assert "records sort-2" in message and "rank 0" not in message


@pytest.mark.parametrize(
    ("case", "kind", "parts"),
    [
        ("fsdp1", "UnsupportedEngineError", ("FSDP1", "fsdp_version: 2", "fsdp_config.version=2")),
        ("parameters_on_the_host", "UnsupportedEngineError", ("fsdp_offload_params: false",)),
        ("images_on_one_rank", "DataError", ("images", "must run on all ranks", "DDP")),
    ],
)
def test_all_ranks_refuse_what_cannot_work(ranks, case, kind, parts):
    for own in ranks:
        assert isinstance(own[case], Raised), case
        assert own[case].kind == kind, own[case].where
        assert all(part in own[case].message for part in parts), own[case].message


def test_out_of_memory_on_one_rank_stops_all_with_the_same_error(ranks, folder):
    """In the middle of FSDP2's forward, while the other rank waits for a layer's shards."""
    (seconds, other), (_, own) = (
        (folder / "full" / f"{rank}.txt").read_text().split("\n", 1) for rank in (0, 1)
    )
    assert float(seconds) < 25  # the time-out of the ranks' group is 30 seconds
    assert "2.00 GiB" in own and "per_device_train_batch_size=1" in own
    assert other == f"rank 1: {own}"


def test_launch_configs_are_for_ddp_and_fsdp2():
    configs = {
        name: load_config_from_file(str(ROOT / "recipes" / "launch" / f"{name}.yaml"))
        for name in ENGINES
    }
    assert configs["ddp"].distributed_type == "MULTI_GPU"
    assert configs["fsdp2"].distributed_type == "FSDP"
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    # The recipe decides over mixed precision.
    assert {config.mixed_precision for config in configs.values()} == {"no"}


@pytest.mark.parametrize("tuning", [(), ("lora.rank=2", "lora.targets=[q_proj,v_proj]")])
def test_accelerate_launch_shards_a_recipe(tmp_path, tuning):
    """The shipped config and the module form, on CPUs, with Accelerate's loading of one rank alone:
    the other gets the student's weights from it, and reads its teachers itself. Adapters are merged
    into the student that is saved, as one process does it."""
    file = write_recipe(
        tmp_path,
        ("sort", "fold", "sort", "fold"),
        layers=(0, 0),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    by_step = ["distill.projection.every=step", *tuning]
    one = distill(load_recipe(file, by_step))
    changes = [*by_step, "training.gradient_accumulation_steps=1"]
    changes.append(f"training.output_dir={tmp_path / 'two'}")
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", str(ROOT / "recipes" / "launch" / "fsdp2.yaml")]
    launch += ["--fsdp_cpu_ram_efficient_loading", "true", "--main_process_port", str(free_port())]
    start_ranks([*launch, "-m", "drivekd", "distill", str(file), *changes], 1, timeout=200)
    weights = [
        load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two/student")
    ]
    start = load_file(tmp_path / "student" / "model.safetensors")
    moved = max((weights[0][name] - start[name]).abs().max() for name in start)
    error = max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0])
    # As in check_same_run.
    assert moved > 1e-5 and error <= 1e-3 * moved
    rows = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("run", "two")
    ]
    check_same_log(rows[1], rows[0])
