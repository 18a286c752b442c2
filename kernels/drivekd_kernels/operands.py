"""What launchers hand to kernels: tokens, heads, chunks of rows, maps in workspaces.

Vectors about tokens are int32 (B, N), contiguous. Maps of a chunk of rows live in workspaces
(maps, B, slots, keys), slots and keys padded to whole tiles (`map_shape`).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2E = 1 / math.log(2)
MAP_ALIGN = 16  # elements; rows of workspaces start at multiples of it
MAP_ROWS, MAP_KEYS = 128, 128  # workspaces hold whole tiles of so many slots and keys
MAX_MAPS = 62  # bits of the two words that name the members of a group


@dataclass(frozen=True)
class Tokens:
    """What rows see, and which rows and keys a region has; see `tiles.py`.

    Attributes:
        first: first key that a token sees; N where it sees none.
        last: last key that it sees; -1 where it sees none.
        row_first: first token that sees a key; N where none does.
        row_last: last token that sees it; -1 where none does.
        tags: a token sees only keys of its own tag, -1 is padding; None: all are equal.
        rows: (B, N) tokens of the region's rows, in order; None: all tokens.
        slots: (B, N + 1) how many of `rows` come before each token; None with `rows`.
        num_rows: (B,) length of each sample's `rows`; None with `rows`.
        vision: (B, N) int8, keys of the region; None: all.
        before: (B, N + 1) how many keys of the region come before each token; None with `vision`.
        num_tokens: N.
        batch_size: B.
    """

    first: Tensor
    last: Tensor
    row_first: Tensor
    row_last: Tensor
    tags: Tensor | None
    rows: Tensor | None
    slots: Tensor | None
    num_rows: Tensor | None
    vision: Tensor | None
    before: Tensor | None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.first.shape[0]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.first.shape[1]

    @property
    def has_region(self) -> bool:
        """Whether keys of the region are told from others."""
        return self.vision is not None

    @property
    def seen(self) -> tuple[Tensor | None, ...]:
        """What the rows are, and which keys they see: `first, last, tags, rows, num_rows`."""
        return self.first, self.last, self.tags, self.rows, self.num_rows


@dataclass(frozen=True)
class Heads:
    """Queries and keys of one layer, their softmax's scale, and the log-sum-exp in base 2."""

    query: Tensor  # (B, H, N, D), stride 1 along D
    key: Tensor  # (B, H_kv, N, D), stride 1 along D
    scale: float
    lse2: Tensor  # (B, H, N) float32

    @property
    def num_heads(self) -> int:
        """H."""
        return self.query.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of queries, then of keys, as `strides` gives them."""
        return *strides(self.query), *strides(self.key)


@dataclass(frozen=True)
class Chunk:
    """Slots [first, first + count) of every sample, whose rows see none but the first `keys` keys.

    Workspaces of a chunk are as wide as that.
    """

    first: int
    count: int
    keys: int


@dataclass(frozen=True)
class Group:
    """Maps whose mean is a target: their indices into a workspace."""

    maps: tuple[int, ...]

    @property
    def words(self) -> tuple[int, int]:
        """Bits of the members, 31 to a word."""
        bits = sum(1 << index for index in self.maps)
        return bits & (2**31 - 1), bits >> 31


def map_shape(num_rows: int, num_tokens: int) -> tuple[int, int]:
    """Slots and keys of a workspace."""
    return ceil_div(num_rows, MAP_ROWS) * MAP_ROWS, ceil_div(num_tokens, MAP_KEYS) * MAP_KEYS


def map_strides(maps: Tensor) -> tuple[int, ...]:
    """Strides of maps if there are several, of samples and of slots, in units of MAP_ALIGN."""
    return tuple(each // MAP_ALIGN for each in maps.stride()[:-1])


def align_of(tensor: Tensor) -> int:
    """Elements of 16 bytes if rows start at multiples of that, else 1."""
    elements = 16 // tensor.element_size()
    aligned = all(stride % elements == 0 for stride in tensor.stride()[:3])
    return elements if aligned else 1


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of samples, heads and tokens in units of `align_of`."""
    align = align_of(tensor)
    b, h, n = (stride // align for stride in tensor.stride()[:3])
    return b, h, n


def ceil_div(value: int, step: int) -> int:
    """How many steps reach the value."""
    return -(-value // step)


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, whatever the current one is."""
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield
