"""The mode in which `calls.py` runs: it sees into custom ops and refuses what a GPU waits for."""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drivekd.ops import attention_map, attention_target, gradient

aten = torch.ops.aten
drivekd = torch.ops.drivekd
BODIES = {
    drivekd.attention_map.default: attention_map.attention_map._init_fn,
    drivekd.attention_map_loss.default: attention_map.attention_map_loss._init_fn,
    drivekd.attention_map_target_loss.default: attention_target.attention_map_target_loss._init_fn,
    drivekd.gradient_gram.default: gradient._gradient_gram,
    drivekd.combine_gradients.default: gradient._combine_gradients,
}
# They wait for the device, and a FakeTensor does not mind.
WAITING = ("equal", "is_nonzero", "masked_select", "unique", "linalg_eig", "multinomial")
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


class WouldWaitError(Exception):
    """Something that synchronises with a GPU, or that a CUDA graph cannot hold."""


class AsOnAGpu(TorchDispatchMode):
    """Refuses what would synchronise, or would copy from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self._kept: list[torch.Tensor] = []  # so that no other gets the id of one

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note that a tensor of the host is page-locked."""
        self.pinned.add(id(tensor))
        self._kept.append(tensor)
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in BODIES:
            with self:
                return BODIES[func](*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "to":  # a composite op, which arrives whole inside the body of another
            with self:
                return func.decompose(*args, **kwargs)
        if name.startswith(WAITING):
            raise WouldWaitError(f"{func} waits for the device")
        if name == "_pin_memory":
            return self.pin(aten.clone.default(args[0]))
        pins = kwargs.pop("pin_memory", None)
        on_host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if on_host and not any(
            isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))
        ):
            with unset_fake_temporarily():  # what is on the host has data
                result = func(*args, **kwargs)
        elif name == "_to_copy" and not on_host and args[0].device.type == "cpu":
            dtype = kwargs.get("dtype") or args[0].dtype
            result = aten.empty.memory_format(args[0].shape, dtype=dtype, device=kwargs["device"])
        else:
            result = func(*args, **kwargs)
        if pins:
            self.pin(result)
        self._check_copy(func, name, args, kwargs, result)
        self._check_indices(func, name, args)
        return result

    def _check_copy(self, func, name, args, kwargs, result) -> None:
        if name == "_to_copy":
            source, target, asynchronous = args[0], result, kwargs.get("non_blocking", False)
        elif name == "copy_":
            asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            target, source = args[:2]
        else:
            return
        if source.device.type == target.device.type:
            return
        if not asynchronous:
            raise WouldWaitError(f"{func} from {source.device} to {target.device} waits")
        if target.device.type == "cuda" and id(source) not in self.pinned:
            raise WouldWaitError(f"{func} to {target.device} from memory that is not pinned")
        if target.device.type == "cpu":
            raise WouldWaitError(f"{func} to the host, which nobody may read before it is there")

    def _check_indices(self, func, name, args) -> None:
        if (
            not name.startswith(("index.", "index_put", "_index_put", "_unsafe_index"))
            and name != "index"
        ):
            return
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                raise WouldWaitError(f"{func} with a mask waits for the number of its cells")
            if index is not None and index.device != args[0].device:
                raise WouldWaitError(f"{func} copies its index from {index.device}")


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[AsOnAGpu]:
    """Inside, tensors are fake, `cuda` is a device, and launches are checked only."""
    from transformers import masking_utils
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    mode = AsOnAGpu()
    replaced = [
        (torch.Tensor, "data_ptr", lambda self: 4096 + 16 * (id(self) % 2**32)),
        (torch.Tensor, "pin_memory", lambda self: mode.pin(self.clone())),
        (torch.cuda, "device", contextlib.nullcontext),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "get_device_properties", lambda device=None: _H200),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        # Transformers makes masks that it need not where tensors are fake, and reads one value.
        (masking_utils, "is_tracing", lambda tensor=None: False),
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        (JITFunction, "run", _launch),
        (InterpretedFunction, "run", _launch),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mode)
        yield mode


class _H200:
    multi_processor_count = 132
    total_memory = 141 * 2**30
    major, minor = 9, 0


def _launch(self, *args, grid, warmup=False, **options) -> None:
    """What a launch needs: every tensor on the GPU, and a grid that a GPU takes."""
    for leaf in tree_leaves((args, options)):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != "cuda":
            raise RuntimeError(f"{self.__name__} is given a tensor on {leaf.device}")
    values = dict(zip(self.arg_names, args, strict=False)) | options
    x, y, z = (*(grid(values) if callable(grid) else grid), 1, 1)[:3]
    assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (self.__name__, x, y, z)
