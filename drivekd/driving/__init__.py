"""The driving domain: a simulated world, its questions, and the scoring of answers.

The world is a cartoon: a vehicle's relative speed is painted as a tint and a trail (see
``drivekd.driving.world``). highway-env is imported only when scenes are made.
"""

from drivekd.driving.dataset import generate_dataset, sample_frames
from drivekd.driving.picture import render_scene
from drivekd.driving.questions import QUESTIONS, Question, answer_questions
from drivekd.driving.world import Scene, VisibleVehicle, simulate_scene

__all__ = [
    "QUESTIONS",
    "Question",
    "Scene",
    "VisibleVehicle",
    "answer_questions",
    "generate_dataset",
    "render_scene",
    "sample_frames",
    "simulate_scene",
]
