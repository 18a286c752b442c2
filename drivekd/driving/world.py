"""Scenes: a four-lane road round the ego vehicle, simulated for one second with highway-env.

**This is a cartoon.** The picture (``drivekd.driving.picture``) gives relative speed away by the
tint of a vehicle's body and by a trail from where the vehicle was one second earlier; a camera
shows neither. The ego vehicle always drives at 16 m/s, because its speed cannot be seen in the
picture. What a model learns here says that it reads pixels, not that it can drive.

A scene is a pure function of (seed, split, frame index): frames can be made in any order and by any
number of processes. Vehicles outside the window (30 m behind to 50 m ahead) are dropped from the
scene after the simulation, so no answer can depend on what the picture does not show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

LANES = 4
LANE_WIDTH = 4.0  # m
VEHICLE_LENGTH = 5.0  # m
VEHICLE_WIDTH = 2.0  # m
BEHIND = 30.0  # m, rear end of the window
AHEAD = 50.0  # m, front end of the window
EGO_SPEED = 16.0  # m/s

_STEPS, _STEP_SECONDS = 5, 0.2
_START = 200.0  # m along the road; the road runs far beyond the window on both sides
_SPAWN_GAP = 9.0  # m between centres in one lane
_MAX_ATTEMPTS = 100


@dataclass(frozen=True)
class VisibleVehicle:
    """A vehicle in the window.

    Args:
        x: Position of its centre ahead of the ego vehicle's, m.
        lane: 0 is the leftmost lane.
        dv: Its speed minus the ego vehicle's, m/s.
        previous_x: The same as ``x`` one second earlier, m.
    """

    x: float
    lane: int
    dv: float
    previous_x: float


@dataclass(frozen=True)
class Scene:
    """What the picture shows: the ego vehicle's lane and the visible vehicles, sorted by ``x``."""

    ego_lane: int
    vehicles: tuple[VisibleVehicle, ...]

    def to_meta(self) -> dict[str, object]:
        """Give the scene as JSON values."""
        return {"ego_lane": self.ego_lane, "vehicles": [asdict(v) for v in self.vehicles]}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Scene:
        """Rebuild a scene from the ``meta`` of a generated record.

        Raises:
            KeyError: If the record does not come from this world.
        """
        return cls(meta["ego_lane"], tuple(VisibleVehicle(**v) for v in meta["vehicles"]))


def simulate_scene(seed: int, split: str, frame: int) -> Scene:
    """Make one scene.

    Vehicles are spawned round the ego vehicle and driven for one second by highway-env's
    Intelligent Driver Model. A scene in which any vehicle crashed, or none is visible, is replaced
    by the next attempt for the same frame.

    Args:
        seed: Seed of the data set, >= 0.
        split: Name of the split; splits never share a random stream.
        frame: Index of the frame in the split, >= 0.

    Returns:
        The scene; lengths and speeds are rounded to a millimetre (per second).

    Raises:
        ImportError: If highway-env is not installed.
        ValueError: If ``seed`` or ``frame`` is negative.
        RuntimeError: If no attempt gave a usable scene.
    """
    if seed < 0 or frame < 0:
        raise ValueError(f"seed and frame must be >= 0, got seed={seed}, frame={frame}")
    stream = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big")
    for attempt in range(_MAX_ATTEMPTS):
        rng = np.random.default_rng([seed, stream, frame, attempt])
        scene = _attempt(rng)
        if scene is not None and scene.vehicles:
            return scene
    raise RuntimeError(f"frame {frame} of {split!r}: {_MAX_ATTEMPTS} attempts gave no usable scene")


def highway_env() -> Any:
    """Give highway-env's road and vehicle classes, or say how to get them."""
    try:
        from highway_env.road.road import Road, RoadNetwork
        from highway_env.vehicle.behavior import IDMVehicle
        from highway_env.vehicle.controller import ControlledVehicle
    except ImportError as error:
        raise ImportError(
            "the simulated driving world needs highway-env; install it with "
            "`pip install drivekd[demo]`"
        ) from error
    return SimpleNamespace(
        Road=Road,
        RoadNetwork=RoadNetwork,
        IDMVehicle=IDMVehicle,
        ControlledVehicle=ControlledVehicle,
    )


def lane_position(lane: int, x: float) -> list[float]:
    """Give the road coordinates (m) of a point ``x`` ahead of the ego vehicle's start."""
    return [_START + x, lane * LANE_WIDTH]


def empty_road(rng: np.random.Generator | None = None) -> Any:
    """Give a straight road of ``LANES`` lanes without vehicles."""
    env = highway_env()
    network = env.RoadNetwork.straight_road_network(LANES, speed_limit=30.0)
    return env.Road(network=network, np_random=rng)


def _attempt(rng: np.random.Generator) -> Scene | None:
    """Spawn, simulate one second, and keep what is visible; None after a crash."""
    env = highway_env()
    road = empty_road(rng)
    ego_lane = int(rng.integers(LANES))
    ego = env.ControlledVehicle(road, lane_position(ego_lane, 0.0), speed=EGO_SPEED)
    road.vehicles = [ego]
    for lane, x, dv in _spawn(rng, ego_lane):
        vehicle = env.IDMVehicle(
            road, lane_position(lane, x), speed=EGO_SPEED + dv, enable_lane_change=False
        )
        # Short headways: with the default ones nearly everybody would be braking.
        vehicle.TIME_WANTED = rng.uniform(0.2, 1.2)
        vehicle.DISTANCE_WANTED = rng.uniform(6.0, 9.0)
        road.vehicles.append(vehicle)
    others = road.vehicles[1:]
    before = [float(v.position[0] - ego.position[0]) for v in others]
    for _ in range(_STEPS):
        road.act()
        road.step(_STEP_SECONDS)
    if any(v.crashed for v in road.vehicles):
        return None
    visible = []
    for vehicle, previous_x in zip(others, before, strict=True):
        x = float(vehicle.position[0] - ego.position[0])
        if -BEHIND <= x < AHEAD:
            lane = round(float(vehicle.position[1]) / LANE_WIDTH)
            dv = float(vehicle.speed - ego.speed)
            visible.append(VisibleVehicle(round(x, 3), lane, round(dv, 3), round(previous_x, 3)))
    return Scene(ego_lane, tuple(sorted(visible, key=lambda v: (v.x, v.lane))))


def _spawn(rng: np.random.Generator, ego_lane: int) -> list[tuple[int, float, float]]:
    """Choose lane, position (m) and relative speed (m/s) of the other vehicles.

    A lead and a following vehicle in the ego lane are drawn first, with their relative speed in one
    of three bands, so that each answer about them is common enough.
    """
    taken: list[list[float]] = [[] for _ in range(LANES)]
    taken[ego_lane].append(0.0)
    spawned = []

    def place(lane: int, x: float, dv: float) -> None:
        if all(abs(x - other) > _SPAWN_GAP for other in taken[lane]):
            taken[lane].append(x)
            spawned.append((lane, x, dv))

    bands = ((-8.0, -1.5), (-1.0, 1.0), (1.5, 8.0))
    nothing_ahead = rng.random() < 0.08
    if rng.random() < 0.75 and not nothing_ahead:
        place(ego_lane, rng.uniform(10.0, 50.0), rng.uniform(*bands[rng.integers(3)]))
    if rng.random() < 0.6:
        band = bands[rng.choice(3, p=(0.2, 0.3, 0.5))]  # followers brake while they are simulated
        place(ego_lane, -rng.uniform(10.0, 34.0), rng.uniform(*band))
    others = [lane for lane in range(LANES) if lane != ego_lane]
    for _ in range(int(rng.integers(1, 9))):
        near = rng.random() < 0.4
        x = rng.uniform(-24.0, 24.0) if near else rng.uniform(-38.0, 58.0)
        if x < -VEHICLE_LENGTH or not nothing_ahead:
            place(others[rng.integers(len(others))], x, rng.uniform(-8.0, 8.0))
    return spawned
