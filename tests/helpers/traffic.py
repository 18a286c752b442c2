"""How many bytes a rank gives to torch.distributed, by the textbook cost of each collective."""

import torch
from torch import distributed

# Bytes sent by one rank of W, as a multiple of the whole buffer (ring algorithms).
COST = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "gather": lambda ranks: (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
}
# torch 2.13 renamed these two.
NAMES = {
    "all_reduce": ("all_reduce",),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter_single"),
    "gather": ("all_gather_into_tensor", "all_gather_single"),
    "all_gather": ("all_gather",),
}


class Traffic:
    """Counts calls and bytes of the collectives that are made inside."""

    def __init__(self):
        self.sent = 0.0
        self.calls = {}
        self._inside = False

    def __enter__(self):
        kinds = {name: kind for kind, names in NAMES.items() for name in names}
        self._before = {n: getattr(distributed, n) for n in kinds if hasattr(distributed, n)}
        # all_gather_object calls the functions of its own module.
        self._home = distributed.distributed_c10d
        for name in self._before:
            counted = self._counted(kinds[name], self._before[name])
            setattr(distributed, name, counted)
            setattr(self._home, name, counted)
        return self

    def __exit__(self, *_):
        for name, function in self._before.items():
            setattr(distributed, name, function)
            setattr(self._home, name, function)

    def _counted(self, kind, function):
        def call(*args, **kwargs):
            if self._inside:
                return function(*args, **kwargs)
            tensors = [own for own in (*args, *kwargs.values()) if isinstance(own, torch.Tensor)]
            whole = max(own.numel() * own.element_size() for own in tensors)
            ranks = distributed.get_world_size(kwargs.get("group"))
            self.sent += whole * COST[kind](ranks)
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call
