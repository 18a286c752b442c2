"""The README's loops on two ranks; `test_loops_on_ranks.py` holds them against one process."""

import os
import tempfile
import warnings

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.loops import run_loop


def case_plain_ddp():
    return run_loop("plain", None, wrap=DistributedDataParallel)


def case_plain_fsdp():
    return run_loop("plain", None, wrap=fully_shard)


def case_accelerate():
    return run_loop("accelerate", None)


def case_accelerate_with_accumulation():
    return run_loop("accelerate", None, rows=1, accumulation=2)


def case_trainer():
    with tempfile.TemporaryDirectory() as folder:
        return run_loop("trainer", folder)


def case_accelerate_fsdp():
    """Last: Accelerate shards on GPUs only, so that its state is told that these are some."""
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

    def sharding(**settings):
        del settings["cpu"]
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        accelerator = Accelerator(fsdp_plugin=plugin, **settings)
        assert accelerator.is_fsdp2
        return accelerator

    with warnings.catch_warnings(action="ignore"):
        try:
            return run_loop("accelerate", None, rows=1, accumulation=2, accelerator=sharding)
        finally:
            del os.environ["ACCELERATE_USE_FSDP"]
