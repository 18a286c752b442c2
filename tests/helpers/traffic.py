"""How many bytes a rank gives to torch.distributed, by the textbook cost of each collective."""

import torch
from torch import distributed

# Bytes sent by one rank of W, as a multiple of the whole buffer (ring algorithms).
COST = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce_scatter_tensor": lambda ranks: (ranks - 1) / ranks,
    "all_gather_into_tensor": lambda ranks: (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
}


class Traffic:
    """Counts calls and bytes of the collectives that are made inside."""

    def __init__(self):
        self.sent = 0.0
        self.calls = {}

    def __enter__(self):
        self._before = {name: getattr(distributed, name) for name in COST}
        # all_gather_object calls the functions of its own module.
        self._home = distributed.distributed_c10d
        for name in COST:
            counted = self._counted(name, self._before[name])
            setattr(distributed, name, counted)
            setattr(self._home, name, counted)
        return self

    def __exit__(self, *_):
        for name, function in self._before.items():
            setattr(distributed, name, function)
            setattr(self._home, name, function)

    def _counted(self, name, function):
        def call(*args, **kwargs):
            tensors = [own for own in args if isinstance(own, torch.Tensor)]
            whole = max(own.numel() * own.element_size() for own in tensors)
            ranks = distributed.get_world_size(kwargs.get("group"))
            self.sent += whole * COST[name](ranks)
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call
