"""Where the vision tokens of a record lie on its pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drivekd.data.encode import Encoder, ProcessorEncoder, SingleTileEncoder


@dataclass(frozen=True)
class View:
    """Vision tokens that cover one picture.

    Attributes:
        image: Index of the picture among the record's.
        name: What it is, such as "tiles" or "thumbnail"; empty where a picture has one view.
        tokens: (rows, columns) places in the sequence, as nested tuples, from the top left on.
    """

    image: int
    name: str
    tokens: tuple[tuple[int, ...], ...]


def find_views(
    encoder: Encoder,
    config: Any,
    encoded: Mapping[str, Tensor],
    sizes: Sequence[tuple[int, int]],
) -> list[View]:
    """The views of a record's pictures.

    InternVL: one tile a picture, or tiles and a thumbnail of all of it. Qwen-VL: one grid a
    picture, as its processor chose it.

    Args:
        encoder: What encoded the record.
        config: The model's.
        encoded: Inputs of the record, without a batch dimension over tokens.
        sizes: (height, width) of its pictures, in pixels.

    Returns:
        Views in the order of the pictures.

    Raises:
        NotImplementedError: It is not known how this family lays its tokens out.
        ValueError: The tokens do not fit the pictures.
    """
    ids = encoded["input_ids"].tolist()
    image_id = getattr(config, "image_token_id", None)
    places = [i for i, token in enumerate(ids) if token == image_id]
    if "image_grid_thw" in encoded and hasattr(config.vision_config, "spatial_merge_size"):
        return _merged_grids(places, encoded["image_grid_thw"], config.vision_config)
    is_tiled = hasattr(config, "image_seq_length") and hasattr(config, "downsample_ratio")
    if is_tiled and isinstance(encoder, SingleTileEncoder | ProcessorEncoder):
        counts = _tile_counts(encoder, places, config.image_seq_length, len(sizes))
        return _tiles(encoder, config, places, counts, sizes)
    raise NotImplementedError(
        f"where the vision tokens of a {getattr(config, 'model_type', type(config).__name__)} lie "
        "on a picture is not known; InternVL and Qwen-VL can be drawn"
    )


def _merged_grids(places: list[int], grids: Tensor, vision: Any) -> list[View]:
    """Qwen-VL: patches are merged in squares, and merged patches run row by row."""
    views, start = [], 0
    for image, (frames, height, width) in enumerate(grids.tolist()):
        rows, columns = height // vision.spatial_merge_size, width // vision.spatial_merge_size
        if frames != 1:
            raise ValueError(f"image {image} has {frames} frames; videos cannot be drawn")
        views.append(View(image, "", _grid(places[start : start + rows * columns], rows, columns)))
        start += rows * columns
    _check_all_used(start, places)
    return views


def _tile_counts(encoder: Encoder, places: list[int], per_tile: int, images: int) -> list[int]:
    """Tiles of each picture: pictures are kept apart by the tokens between them."""
    if isinstance(encoder, SingleTileEncoder):
        return [1] * images
    starts = [i for i, place in enumerate(places) if i == 0 or places[i - 1] != place - 1]
    ends = [*starts[1:], len(places)]
    counts = [(end - start) // per_tile for start, end in zip(starts, ends, strict=True)]
    if len(counts) != images or sum(counts) * per_tile != len(places):
        raise ValueError(
            f"{len(places)} vision tokens in {len(counts)} stretches do not fit {images} images of "
            f"{per_tile} tokens a tile"
        )
    return counts


def _tiles(
    encoder: Encoder,
    config: Any,
    places: list[int],
    counts: Sequence[int],
    sizes: Sequence[tuple[int, int]],
) -> list[View]:
    side = _tile_grid(config)
    per_tile = side[0] * side[1]
    views, start = [], 0
    for image, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        tiles = [
            _grid(places[start + i * per_tile : start + (i + 1) * per_tile], *side)
            for i in range(count)
        ]
        start += count * per_tile
        if count == 1:
            views.append(View(image, "", tiles[0]))
            continue
        columns, rows = _canvas(encoder, size)
        has_thumbnail = count == rows * columns + 1
        if count - has_thumbnail != rows * columns:
            raise ValueError(
                f"image {image} has {count} tiles, which are no {rows} x {columns} with or "
                "without a thumbnail"
            )
        whole = tuple(
            tuple(token for tile in tiles[row * columns : (row + 1) * columns] for token in tile[i])
            for row in range(rows)
            for i in range(side[0])
        )
        views.append(View(image, "tiles", whole))
        if has_thumbnail:
            views.append(View(image, "thumbnail", tiles[-1]))
    _check_all_used(start, places)
    return views


def _tile_grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of an InternVL tile after its pixel shuffle, which needs a square."""
    side = round(config.image_seq_length**0.5)
    if side * side != config.image_seq_length:
        raise ValueError(f"a tile has {config.image_seq_length} tokens, which are no square")
    return side, side


def _canvas(encoder: Encoder, size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) of tiles, as the processor chooses them."""
    images = encoder.processor.image_processor  # type: ignore[attr-defined]
    # Beside the processor's class, with torchvision and without.
    choose = getattr(sys.modules[type(images).__module__], "get_optimal_tiled_canvas", None)
    if choose is None:
        raise NotImplementedError(
            f"how {type(images).__name__} cuts a picture into tiles is not known"
        )
    tile = (images.size["height"], images.size["width"])
    columns, rows = choose(size, tile, images.min_patches, images.max_patches)
    return int(columns), int(rows)


def _grid(places: Sequence[int], rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    if len(places) != rows * columns:
        raise ValueError(f"there are {len(places)} vision tokens for {rows} x {columns} patches")
    return tuple(tuple(places[row * columns : (row + 1) * columns]) for row in range(rows))


def _check_all_used(used: int, places: Sequence[int]) -> None:
    if used != len(places):
        raise ValueError(f"{len(places)} vision tokens, of which the images have {used}")
