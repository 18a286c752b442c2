"""Questions about a scene, and their answers.

Every answer is a function of the scene alone, that is of what the picture shows. Perception counts
and locates; reasoning compares speeds and applies a gap and time-to-collision rule to a lane
change; planning asks highway-env's Intelligent Driver Model (IDM) and lane-change model (MOBIL),
which see only the visible vehicles, each assumed to want the speed it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drivekd.driving.world import (
    EGO_SPEED,
    LANES,
    VEHICLE_LENGTH,
    Scene,
    empty_road,
    highway_env,
    lane_position,
)

LETTERS = "ABCDE"

_MIN_GAP = 10.0  # m between centres
_MIN_TTC = 3.0  # s
_SAME_SPEED = 1.0  # m/s
_DESIRED_GAIN = 3.0  # m/s that the ego vehicle would like to drive faster
_WINDOW = "from 30 m behind to 50 m ahead"
_NUMBERS = ("zero", "one", "two", "three", "four or more")
_SPEEDS = ("slower", "same speed", "faster")
_SAFETY = ("safe", "unsafe ahead", "unsafe behind")


@dataclass(frozen=True)
class Question:
    """A kind of question: its capability, text, and options in a fixed order."""

    qid: str
    capability: str
    text: str
    options: tuple[str, ...]


QUESTIONS = {
    q.qid: q
    for q in (
        Question("count", "perception", "How many vehicles are within 50 m ahead?", _NUMBERS),
        Question(
            "nearest",
            "perception",
            "Where is the nearest vehicle within 50 m ahead?",
            ("left", "same lane", "right"),
        ),
        Question(
            "egolane",
            "perception",
            "Which lane from the left is the ego vehicle in?",
            ("first", "second", "third", "fourth"),
        ),
        Question(
            "leftocc",
            "perception",
            f"Does the next lane on the left hold vehicles {_WINDOW}?",
            ("yes", "no"),
        ),
        Question(
            "rightocc",
            "perception",
            f"Does the next lane on the right hold vehicles {_WINDOW}?",
            ("yes", "no"),
        ),
        Question(
            "safe_left",
            "reasoning",
            f"How safe is the lane change to the left with vehicles {_WINDOW}?",
            _SAFETY,
        ),
        Question(
            "safe_right",
            "reasoning",
            f"How safe is the lane change to the right with vehicles {_WINDOW}?",
            _SAFETY,
        ),
        Question("lead", "reasoning", "How fast is the lead vehicle within 50 m ahead?", _SPEEDS),
        Question(
            "follow", "reasoning", "How fast is the following vehicle within 30 m behind?", _SPEEDS
        ),
        Question(
            "action",
            "planning",
            f"What should the ego vehicle do with vehicles {_WINDOW}?",
            ("accelerate", "keep speed", "brake", "change left", "change right"),
        ),
        Question(
            "speed",
            "planning",
            "How should the ego vehicle change speed in this lane with vehicles within 50 m ahead?",
            ("speed up", "hold speed", "slow down", "brake hard"),
        ),
    )
}


def answer_questions(scene: Scene) -> dict[str, str]:
    """Answer every question that makes sense in a scene.

    Left out: a lane that is not there, a lead or following vehicle that is not visible, the nearest
    vehicle ahead when there is none, and a lane change that is unsafe both ahead and behind.

    Args:
        scene: The scene.

    Returns:
        Question id -> answer, one of the question's options.

    Raises:
        ImportError: If highway-env is not installed.
    """
    answers = dict(_perception(scene))
    answers.update(_reasoning(scene))
    answers.update(_planning(scene))
    return answers


def _perception(scene: Scene) -> Iterator[tuple[str, str]]:
    ahead = [v for v in scene.vehicles if v.x > 0]
    yield "count", _NUMBERS[min(len(ahead), 4)]
    if ahead:
        offset = min(ahead, key=lambda v: v.x).lane - scene.ego_lane
        yield "nearest", "left" if offset < 0 else "right" if offset > 0 else "same lane"
    yield "egolane", QUESTIONS["egolane"].options[scene.ego_lane]
    for qid, lane in (("leftocc", scene.ego_lane - 1), ("rightocc", scene.ego_lane + 1)):
        if 0 <= lane < LANES:
            yield qid, "yes" if any(v.lane == lane for v in scene.vehicles) else "no"


def _reasoning(scene: Scene) -> Iterator[tuple[str, str]]:
    for qid, lane in (("safe_left", scene.ego_lane - 1), ("safe_right", scene.ego_lane + 1)):
        if 0 <= lane < LANES:
            ahead, behind = _unsafe(scene, lane)
            if not (ahead and behind):
                yield qid, "unsafe ahead" if ahead else "unsafe behind" if behind else "safe"
    front, rear = _neighbours(scene, scene.ego_lane)
    for qid, neighbour in (("lead", front), ("follow", rear)):
        if neighbour is not None:
            dv = neighbour[1]
            yield (
                qid,
                "slower" if dv < -_SAME_SPEED else "faster" if dv > _SAME_SPEED else "same speed",
            )


def _neighbours(
    scene: Scene, lane: int
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Give (distance, relative speed) of the nearest vehicles ahead and behind in a lane."""
    front = [(v.x, v.dv) for v in scene.vehicles if v.lane == lane and v.x >= 0]
    rear = [(-v.x, v.dv) for v in scene.vehicles if v.lane == lane and v.x < 0]
    return min(front, default=None), min(rear, default=None)


def _unsafe(scene: Scene, lane: int) -> tuple[bool, bool]:
    """Say whether moving into a lane is unsafe ahead, and behind."""
    front, rear = _neighbours(scene, lane)
    return (
        front is not None and _too_close(front[0], -front[1]),
        rear is not None and _too_close(rear[0], rear[1]),
    )


def _too_close(distance: float, closing_speed: float) -> bool:
    if distance < _MIN_GAP:
        return True
    return closing_speed > 0 and distance - VEHICLE_LENGTH < _MIN_TTC * closing_speed


def _planning(scene: Scene) -> Iterator[tuple[str, str]]:
    ego = _planner(scene)
    front, rear = ego.road.neighbour_vehicles(ego, ego.lane_index)
    acceleration = float(ego.acceleration(ego, front_vehicle=front, rear_vehicle=rear))
    if acceleration >= 0.6:
        yield "action", "accelerate"
        yield "speed", "speed up"
        return
    if acceleration >= -0.5:
        yield "action", "keep speed"
        yield "speed", "hold speed"
        return
    yield "action", _way_out(scene, ego)
    yield "speed", "slow down" if acceleration >= -3.0 else "brake hard"


def _way_out(scene: Scene, ego: Any) -> str:
    """Change to a lane that is safe and that MOBIL recommends, the left one first, or brake."""
    for name, lane in (("left", scene.ego_lane - 1), ("right", scene.ego_lane + 1)):
        if 0 <= lane < LANES and not any(_unsafe(scene, lane)):
            start, end, _ = ego.lane_index
            if ego.mobil((start, end, lane)):
                return f"change {name}"
    return "brake"


def _planner(scene: Scene) -> Any:
    """Give an IDM vehicle in the ego vehicle's place, on a road with the visible vehicles only."""
    env = highway_env()
    road = empty_road()
    ego = env.IDMVehicle(
        road,
        lane_position(scene.ego_lane, 0.0),
        speed=EGO_SPEED,
        target_speed=EGO_SPEED + _DESIRED_GAIN,
    )
    road.vehicles = [ego] + [
        env.IDMVehicle(road, lane_position(v.lane, v.x), speed=EGO_SPEED + v.dv)
        for v in scene.vehicles
    ]
    return ego
