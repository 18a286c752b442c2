"""How many bytes of storage a computation holds at once, on any device."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a call of the fused loss may take beside its inputs and results, as a part of one bfloat16
# map of all heads of both models (1B from 8B), of which the eager way holds several at once: a
# chunk's workspaces (6 bytes a cell, 288 MiB at most), dq and dk in float32, and planes of dk.
EXTRA_PART = {2048: 1 / 7, 8192: 1 / 20}


def extra_bound(num_tokens: int) -> float:
    """Bytes that a call with 14 and 28 heads may take, see `EXTRA_PART`."""
    return EXTRA_PART[num_tokens] * 2 * (14 + 28) * num_tokens**2


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside, as they come and go: `peak` and `largest`, in bytes.

    A mode does not see into custom ops; `bodies` maps those to look into to their Python bodies.
    """

    def __init__(self, bodies=None):
        super().__init__()
        self._bodies = bodies or {}
        self.live = self.peak = self.largest = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        if func in self._bodies:
            with self:
                result = self._bodies[func](*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage(), given)
        return result

    def _note(self, storage, given):
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        if key in self._known:
            self._known.discard(key)
            self.live -= size
