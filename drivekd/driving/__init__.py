"""The driving domain: a simulated world, its questions, and the scoring of answers.

The world is a cartoon: a vehicle's relative speed is painted as a tint and a trail (see
``drivekd.driving.world``). highway-env is imported only when scenes are made.
"""

from drivekd.driving.dataset import generate_dataset, sample_frames
from drivekd.driving.extraction import extract_choice
from drivekd.driving.picture import render_scene
from drivekd.driving.questions import QUESTIONS, Question, answer_questions
from drivekd.driving.scoring import Scores, Tally, read_choice, score
from drivekd.driving.world import Scene, VisibleVehicle, simulate_scene

__all__ = [
    "QUESTIONS",
    "Question",
    "Scene",
    "Scores",
    "Tally",
    "VisibleVehicle",
    "answer_questions",
    "extract_choice",
    "generate_dataset",
    "read_choice",
    "render_scene",
    "sample_frames",
    "score",
    "simulate_scene",
]
