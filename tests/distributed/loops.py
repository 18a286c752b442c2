"""The README's loops on two ranks; `test_loops_on_ranks.py` holds them against one process."""

import tempfile

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
