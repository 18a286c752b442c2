"""What processes tell each other, where there is one; `tests/distributed` has two."""

import pytest
import torch

from drivekd.errors import NonFiniteLossError
from drivekd.train import ranks

CPU = torch.device("cpu")


def test_one_process_speaks_to_nobody():
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    assert ranks.union(["a"], ["a", "b"], CPU) == {"a"}
    ranks.raise_together(None, NonFiniteLossError, CPU)
    error = NonFiniteLossError("nan")
    with pytest.raises(NonFiniteLossError) as caught:
        ranks.raise_together(error, NonFiniteLossError, CPU)
    assert caught.value is error
    with pytest.raises(KeyError, match="mine"), ranks.failing_together():
        raise KeyError("mine")


def test_processes_without_a_gpu_share_the_cpu(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.launched() == 1 and not ranks.share_a_cpu()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.launched() == 2
    assert ranks.share_a_cpu() == (not torch.accelerator.is_available())
