"""Pictures of scenes, drawn with numpy alone: no window, no display, no simulator surface.

168 x 48 pixels: six rows of 8 pixels (shoulder, four lanes, shoulder) and 80 m at 2.1 pixels a
metre, so that a 28 x 8 patch is one lane by 13.3 m. The ego vehicle is white and drives to the
right; the leftmost lane is on top. Two cues carry relative speed, clipped at 6 m/s: the tint of the
body (red slower, green faster, blue alike) and a trail from the position one second earlier (orange
losing ground, cyan gaining).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from drivekd.driving.world import (
    AHEAD,
    BEHIND,
    LANE_WIDTH,
    LANES,
    VEHICLE_LENGTH,
    VEHICLE_WIDTH,
    Scene,
)

WIDTH, HEIGHT = 168, 48
PIXELS_PER_METRE = WIDTH / (BEHIND + AHEAD)  # along the road
LANE_PIXELS = HEIGHT // (LANES + 2)

_ASPHALT, _LANE_MARK = (55, 55, 55), (120, 120, 120)
_GRASS, _EDGE = (60, 110, 60), (200, 200, 200)
_EGO, _LOSING, _GAINING = (255, 255, 255), (255, 160, 0), (0, 220, 220)
_TINT_SPEED = 6.0  # m/s of full tint


def render_scene(scene: Scene, *, scale: int = 1) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: What to draw.
        scale: 1 gives the picture a model sees; more gives a larger one for human eyes.

    Returns:
        (48 * scale, 168 * scale, 3) uint8, RGB.

    Raises:
        ValueError: If ``scale`` is less than 1.
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be an int >= 1")
    image = _road(scale)
    half = VEHICLE_LENGTH / 2
    for vehicle in scene.vehicles:
        low, high = sorted((vehicle.x, vehicle.previous_x))
        colour = _LOSING if vehicle.x < vehicle.previous_x else _GAINING
        _box(image, scale, low - half, high + half, vehicle.lane, VEHICLE_WIDTH / 4, colour)
    for vehicle in scene.vehicles:
        rear, front = vehicle.x - half, vehicle.x + half
        _box(image, scale, rear, front, vehicle.lane, VEHICLE_WIDTH / 2, _tint(vehicle.dv))
    _box(image, scale, -half, half, scene.ego_lane, VEHICLE_WIDTH / 2, _EGO)
    return image


def _road(scale: int) -> npt.NDArray[np.uint8]:
    image = np.full((HEIGHT * scale, WIDTH * scale, 3), _ASPHALT, np.uint8)
    shoulder = LANE_PIXELS * scale
    image[:shoulder], image[-shoulder:] = _GRASS, _GRASS
    image[shoulder - scale : shoulder], image[-shoulder : scale - shoulder] = _EDGE, _EDGE
    dashes = (np.arange(WIDTH * scale) // scale) % 6 == 0
    for lane in range(1, LANES):
        top = (lane + 1) * shoulder
        image[top : top + scale, dashes] = _LANE_MARK
    return image


def _tint(dv: float) -> tuple[int, int, int]:
    share = max(-1.0, min(1.0, dv / _TINT_SPEED))
    slower, faster = max(0.0, -share), max(0.0, share)
    return int(100 + 155 * slower), int(100 + 155 * faster), 255 if abs(dv) <= 1.0 else 120


def _box(
    image: npt.NDArray[np.uint8],
    scale: int,
    rear: float,
    front: float,
    lane: int,
    half_width: float,
    colour: tuple[int, int, int],
) -> None:
    """Fill a rectangle given in metres; what lies outside the window is cut off."""
    along, across = PIXELS_PER_METRE * scale, LANE_PIXELS * scale / LANE_WIDTH
    left = max(0, round((rear + BEHIND) * along))
    right = max(0, round((front + BEHIND) * along))
    centre = (lane + 1.5) * LANE_WIDTH
    top, bottom = round((centre - half_width) * across), round((centre + half_width) * across)
    image[top:bottom, left:right] = colour
