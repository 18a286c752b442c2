"""FSDP2's settings for every family; `tests/distributed/test_trainings.py` trains with it."""

from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import fsdp_utils

from drivekd.capture.model import find_decoder
from drivekd.errors import UnsupportedEngineError
from drivekd.train import sharding
from tests.helpers.toy_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_are_groups_of_their_own(family):
    """Accelerate alone refuses models that list classes of layers which they do not have."""
    model = FAMILIES[family].model(layers=2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    sharding.name_layers(plugin, model)
    plugin.set_auto_wrap_policy(model)
    is_group = fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert all(is_group(layer) for layer in find_decoder(model).layers)
    plugin.transformer_cls_names_to_wrap = ["Mine"]
    sharding.name_layers(plugin, model)
    assert plugin.transformer_cls_names_to_wrap == ["Mine"]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_decoder_and_head_can_be_kept_whole(family):
    model = FAMILIES[family].model(layers=2)
    plugin = SimpleNamespace(ignored_modules=None, cpu_ram_efficient_loading=True)
    sharding.replicate_vision(plugin, model)
    kept = {id(own) for module in plugin.ignored_modules for own in module.parameters()}
    head = model.get_output_embeddings()
    for name, own in model.named_parameters():
        sharded = any(
            own is each for part in (find_decoder(model), head) for each in part.parameters()
        )
        # A parameter outside all modules (LLaVA's newline) is sharded with the root.
        assert (id(own) in kept) == (not sharded and "image_newline" not in name), name
    assert bool(kept) == (FAMILIES[family].inputs.__name__ != "text_inputs")
    assert not plugin.cpu_ram_efficient_loading  # they would have no weights


def trainer(**changes):
    settings = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False}
    settings |= {"args": SimpleNamespace(n_gpu=1), "accelerator": SimpleNamespace(is_fsdp2=False)}
    return SimpleNamespace(**settings | changes)


def test_engines_without_gradients_to_project_are_refused_by_name():
    sharding.refuse_engines(trainer())
    with pytest.raises(UnsupportedEngineError, match=r"DeepSpeed.*recipes/launch/fsdp2\.yaml"):
        sharding.refuse_engines(trainer(is_deepspeed_enabled=True))
    with pytest.raises(UnsupportedEngineError, match=r"4 GPUs.*DataParallel.*accelerate launch"):
        sharding.refuse_engines(trainer(args=SimpleNamespace(n_gpu=4)))
