"""How rows are cut into chunks: from shapes alone, on meta tensors."""

import random

import pytest
import torch

pytest.importorskip("triton")
chunks = pytest.importorskip("drivekd.ops.triton_backend.chunks")

STUDENT, TEACHER = (14, 2, 64), (28, 4, 128)


def cut(num_tokens, *, grows=True, num_samples=1, num_maps=1, student=STUDENT, teacher=TEACHER):
    def layer(heads, kv_heads, dim):
        return tuple(
            torch.empty(num_samples, h, num_tokens, dim, dtype=torch.bfloat16, device="meta")
            for h in (heads, kv_heads)
        )

    models = [layer(*student), layer(*teacher)]
    return chunks.cut(models, learns=True, num_maps=num_maps, region=not grows, grows=grows)


@pytest.mark.parametrize("grows", [True, False])
def test_chunks_hold_every_row_once_and_see_enough_keys(grows):
    pick = random.Random(0)
    for N in [1, 2, 63, 64, 65, 4095, 4096, 4097, *(pick.randrange(1, 30_000) for _ in range(20))]:
        parts = cut(N, grows=grows, num_samples=pick.choice((1, 3)))
        assert [part.first for part in parts] == [
            sum(each.count for each in parts[:i]) for i in range(len(parts))
        ]
        assert sum(part.count for part in parts) == N
        assert all(part.count > 0 for part in parts)
        for part in parts:
            assert part.keys == (part.first + part.count if grows else N), N


@pytest.mark.parametrize("num_maps", [1, 5])
@pytest.mark.parametrize("num_tokens", [4096, 8192, 20_480, 65_536])
def test_workspaces_stay_small(num_tokens, num_maps):
    """Bytes of T (and P) and W of the largest chunk; 1024 rows are taken whatever they take."""
    for part in cut(num_tokens, num_maps=num_maps):
        cells = part.count * part.keys
        assert cells <= 0.5625 * num_tokens**2
        affordable = cells * (4 * num_maps + 2) <= chunks.CHUNK_BYTES
        assert affordable or part.count <= chunks.MIN_ROWS


def test_under_a_causal_mask_chunks_are_fewer_than_rows_of_all_keys_would_take():
    assert len(cut(20_480)) <= 8 < len(cut(20_480, grows=False))


def test_chunks_end_where_maps_fill_the_multiprocessors():
    """Maps of 8192 rows are 8 waves of 264 programs; halves of the rows would take 9."""

    def waves(parts):
        return sum(
            -(
                -sum(-(-min(row + 64, 8192) // 256) for row in range(first, first + count, 64))
                // 264
            )
            for first, count in parts
        )

    assert waves((part.first, part.count) for part in cut(8192)) == 8
    assert waves([(0, 4096), (4096, 4096)]) == 9
