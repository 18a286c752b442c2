import pytest
import torch

from drivekd.errors import RecipeError
from drivekd.train import load_recipe
from drivekd.train.placement import place_teachers

TEACHERS = ("sort", "fold", "wash")
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are some; nothing is put on them."""

    def pretend(count, *, rank=0, processes=1):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: GPU)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return pretend


def placed(placement, student=GPU):
    places = place_teachers(placement, TEACHERS, student)
    return [str(places[name]) for name in TEACHERS]


def test_teachers_are_where_the_student_is_unless_told_otherwise(gpus):
    gpus(3)
    assert placed(None) == ["cuda:0"] * 3
    assert placed("cuda:1") == ["cuda:1"] * 3
    assert placed({"fold": "cuda:2", "wash": "cpu"}) == ["cuda:0", "cuda:2", "cpu"]


@pytest.mark.parametrize(
    ("count", "processes", "rank", "wanted"),
    [
        (4, 1, 0, ["cuda:2", "cuda:1", "cuda:3"]),
        (2, 1, 0, ["cuda:1"] * 3),
        (8, 2, 1, ["cuda:5", "cuda:3", "cuda:7"]),
        (3, 2, 0, ["cuda:2"] * 3),
        (3, 2, 1, ["cuda:1"] * 3),  # none left: its own
        (1, 1, 0, ["cuda:0"] * 3),
    ],
)
def test_auto_spreads_over_gpus_that_nobody_trains_on(gpus, count, processes, rank, wanted):
    """In the order of their names; every process has GPUs of its own."""
    gpus(count, processes=processes, rank=rank)
    assert placed("auto", torch.device("cuda", rank)) == wanted


def test_auto_without_gpus_is_the_students_device():
    assert placed("auto", torch.device("cpu")) == ["cpu"] * 3


@pytest.mark.parametrize(
    ("placement", "error", "message"),
    [
        ({"flod": "cuda:1"}, ValueError, "names the teacher 'flod'.*did you mean 'fold'"),
        ({"fold": "cuda:2"}, ValueError, r"\['fold'\] is 'cuda:2', but this process sees 2"),
        ({"fold": "moon"}, ValueError, r"\['fold'\] is 'moon', which is no device"),
        ("xpu", ValueError, "teacher_device is 'xpu', but .* none of that kind"),
        ("meta", ValueError, "teacher_device is 'meta', but"),
        ({"fold": 1}, TypeError, r"\['fold'\] is 1, wanted the name of a device"),
        (["cuda:1"], TypeError, "teacher_device is a list, wanted a device"),
    ],
)
def test_places_that_do_not_exist_are_refused(gpus, placement, error, message):
    gpus(2)
    with pytest.raises(error, match=message):
        placed(placement)


@pytest.fixture
def recipe(tmp_path):
    text = (
        "student: s\nteachers: {look: a, think: b}\ndata: {train: t}\ntraining: {output_dir: o}\n"
    )

    def read(line, *overrides):
        (tmp_path / "recipe.yaml").write_text(text + line)
        return load_recipe(tmp_path / "recipe.yaml", overrides).teacher_device

    return read


def test_recipes_place_each_teacher(recipe):
    assert recipe("teacher_device: cuda:1") == "cuda:1"
    both = {"look": "cuda:1", "think": "cuda:2"}
    assert recipe("teacher_device: {look: cuda:1, think: cuda:2}") == both
    assert recipe("", "teacher_device.look=cuda:1") == {"look": "cuda:1"}
    assert recipe("teacher_device: null", "teacher_device.look=cpu") == {"look": "cpu"}
    assert recipe("teacher_device: {look: cuda:1}", "teacher_device.think=cuda:2") == both


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("teacher_device: {thnk: cpu}", "'thnk', which teachers does not have; did you mean 'thi"),
        ("teacher_device: {think: 1}", "teacher_device.think is the int 1, wanted a string"),
        ("teacher_device: 1", "teacher_device is the int 1, wanted a string or a mapping or null"),
    ],
)
def test_recipes_refuse_what_is_no_place(recipe, line, message):
    with pytest.raises(RecipeError, match=message):
        recipe(line)
