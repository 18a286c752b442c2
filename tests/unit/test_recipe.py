from pathlib import Path

import pytest
import yaml

from drivekd.errors import RecipeError
from drivekd.train import load_recipe
from drivekd.train.signals import SignalPlan
from drivekd.train.weighting import build_reweighting
from tests.helpers import toy_models

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
# Files that start with _ hold settings which recipes share, those in launch/ are accelerate's.
RECIPES = sorted(
    file
    for file in FOLDER.rglob("*.yaml")
    if not file.name.startswith("_") and file.parent.name != "launch"
)


def path_of(file):
    return file.relative_to(FOLDER).with_suffix("").as_posix()


# Not about driving: two capabilities of an assistant that reads charts and recipes.
CHARTS = {
    "student": "small",
    "teachers": {"axis-reader": "large", "cook": "larger"},
    "data": {"train": "charts.json", "root": "pictures"},
    "distill": {
        "signals": [
            {
                "name": "read_axis",
                "teacher": "axis-reader",
                "student_layers": [0, 2],
                "teacher_layers": "0..-2",
                "region": "text_to_vision",
                "loss": "cosine",
                "share": 0.2,
            },
            {"name": "taste", "teacher": "cook", "kind": "logits", "temperature": 3},
        ],
        "mixing": {"axis": {"read_axis": 1, "taste": 0.5}, "soup": {"taste": 1.0}},
        "weighting": "balance",
        "projection": {"method": "pcgrad", "seed": 3},
    },
    "training": {"output_dir": "out", "learning_rate": 0.001, "max_steps": 3},
}


@pytest.fixture
def write(tmp_path):
    def write(tree, **changes):
        file = tmp_path / "recipe.yaml"
        text = tree if isinstance(tree, str) else yaml.safe_dump(tree | changes)
        file.write_text(text)
        return file

    return write


def test_reads_a_recipe_about_anything(write):
    recipe = load_recipe(write(CHARTS))
    read_axis, taste = recipe.distill.signals
    assert recipe.teachers == {"axis-reader": "large", "cook": "larger"}
    assert read_axis.student_layers == (0, 2) and read_axis.teacher_layers == "0..-2"
    assert (read_axis.loss, read_axis.share) == ("cosine", 0.2)
    assert (taste.kind, taste.temperature) == ("logits", 3.0)
    assert recipe.distill.mixing == {"axis": {"read_axis": 1, "taste": 0.5}, "soup": {"taste": 1}}
    assert recipe.distill.projection.method == "pcgrad"
    assert recipe.training["learning_rate"] == 0.001
    assert recipe.data.root == "pictures" and recipe.data.eval is None


@pytest.fixture(scope="module")
def tiny():
    """Student and teacher of both families, the teacher deeper."""
    families = {"internvl": toy_models.internvl, "qwen2_5_vl": toy_models.qwen2_5_vl}
    return {name: (make(layers=4), make(layers=6)) for name, make in families.items()}


@pytest.mark.parametrize("file", RECIPES, ids=path_of)
def test_shipped_recipe_is_valid_and_builds_its_signals(file, tiny):
    recipe = load_recipe(file)
    types = {"perception", "reasoning", "planning"}
    family = "qwen2_5_vl" if "Qwen2.5-VL-3B" in recipe.student else "internvl"
    assert (family == "qwen2_5_vl") == ("qwen2_5_vl" in path_of(file))
    assert recipe.training["output_dir"] == f"runs/{path_of(file)}"
    student, teacher = tiny[family]
    plan = SignalPlan(recipe.distill, student, dict.fromkeys(recipe.teachers, teacher), types)
    assert [signal.config.name for signal in plan.signals] == list(recipe.distill.names)
    assert bool(plan.signals) == (file.stem != "ce")
    build_reweighting(recipe.distill)


def test_both_model_pairs_have_the_same_recipes():
    paths = {path_of(file) for file in RECIPES}
    other = {path.removeprefix("qwen2_5_vl/") for path in paths if path.startswith("qwen2_5_vl/")}
    assert other == {path for path in paths if not path.startswith("qwen2_5_vl/")}


# Rows of Table 3: kind, student layers, region and loss of each signal; projection.
MIDDLE = "0..-2"
TABLE3 = {
    "ce": ([], "none"),
    "full_first": ([("attention", "first", "full", "mse")], "none"),
    "text_to_vision_middle": ([("attention", MIDDLE, "text_to_vision", "mse")], "none"),
    "text_to_vision_middle_inner": ([("attention", "1..-3", "text_to_vision", "mse")], "none"),
    "full_penultimate": ([("attention", "penultimate", "full", "mse")], "none"),
    "cosine_first": ([("attention", "first", "text_to_vision", "cosine")], "none"),
    "cosine_middle": ([("attention", MIDDLE, "full", "cosine")], "none"),
    "cosine_penultimate": ([("attention", "penultimate", "text_to_vision", "cosine")], "none"),
}
SINGLE = {
    "perception": ("attention", "first", "text_to_vision", "mse"),
    "reasoning": ("attention", MIDDLE, "full", "mse"),
    "planning": ("attention", "penultimate", "text_to_vision", "mse"),
}
for capability, (_, layers, _, _) in SINGLE.items():
    TABLE3[f"logit_kl_{capability}"] = ([("logits", None, None, "mse")], "none")
    TABLE3[f"hidden_{capability}"] = ([("hidden", layers, None, "mse")], "none")
    TABLE3[f"single_{capability}"] = ([SINGLE[capability]], "none")
for name, method in {"none": "none", "stage1": "stage1", "stage2": "stage2", "agp": "agp"}.items():
    TABLE3[f"multi_{name}"] = (list(SINGLE.values()), method)


def test_table_3_has_a_recipe_for_every_row():
    assert set(TABLE3) == {file.stem for file in RECIPES if path_of(file).startswith("table3/")}


@pytest.mark.parametrize("name", TABLE3)
def test_recipes_of_table_3_hold_their_rows_and_the_public_settings(name):
    recipe = load_recipe(FOLDER / "table3" / f"{name}.yaml")
    distill, training = recipe.distill, recipe.training
    signals = [(s.kind, s.student_layers, s.region, s.loss) for s in distill.signals]
    assert (signals, distill.projection.method) == TABLE3[name]
    assert distill.weighting == "online" and {s.weight for s in distill.signals} <= {1.0}
    batch = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    assert batch == (1, 4) and training["learning_rate"] == 5e-5
    if name.startswith("multi"):
        assert distill.mixing["planning"] == {"perception": 0.1, "reasoning": 0.1, "planning": 0.8}


def test_multi_recipe_holds_the_public_layers():
    file = next(file for file in RECIPES if path_of(file) == "multi")
    signals = {signal.name: signal for signal in load_recipe(file).distill.signals}
    layers = {name: (s.student_layers, s.teacher_layers, s.region) for name, s in signals.items()}
    assert layers == {
        "perception": ("first", "first", "text_to_vision"),
        "reasoning": ("0..-2", "0..-2", "full"),
        "planning": ("penultimate", "penultimate", "text_to_vision"),
    }


def test_overrides_reach_every_depth(write):
    recipe = load_recipe(
        write(CHARTS),
        [
            "student=other",
            "training.learning_rate=2e-5",
            "training.bf16=true",
            "distill.signals.0.share=0.05",
            "distill.signals.taste.temperature=1",
            "distill.mixing.soup={taste: 0.25}",
            "encoder.image_size=[32, 64]",
        ],
    )
    assert recipe.student == "other"
    assert recipe.training["learning_rate"] == 2e-5 and recipe.training["bf16"] is True
    assert [s.share for s in recipe.distill.signals] == [0.05, 0.1]
    assert recipe.distill.signals[1].temperature == 1.0
    assert recipe.distill.mixing["soup"] == {"taste": 0.25}
    assert recipe.encoder.image_size == (32, 64)


def test_signals_can_be_overridden_away(write):
    assert load_recipe(write(CHARTS), ["distill={}"]).distill.signals == ()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_exponents_are_numbers(write, text):
    recipe = load_recipe(write(CHARTS), [f"training.learning_rate={text}"])
    assert recipe.training["learning_rate"] == 1e-4


@pytest.mark.parametrize("word", ["no", "off", "yes", "y"])
def test_only_true_and_false_are_booleans(write, word):
    """YAML 1.1 reads eval_strategy: no as false."""
    assert load_recipe(write(CHARTS), [f"student={word}"]).student == word


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnt=x", "unknown key studnt; did you mean 'student'"),
        ("data.trian=x", "unknown key data.trian; did you mean 'train'"),
        ("distill.weigthing=static", "unknown key distill.weigthing; did you mean 'weighting'"),
        (
            "distill.signals.0.regoin=full",
            "distill.signals.read_axis.regoin; did you mean 'region'",
        ),
        ("training.lerning_rate=1", "unknown key training.lerning_rate; did you mean 'learning_r"),
        (
            "training.learning_rate=fast",
            "training.learning_rate is the string 'fast', wanted a num",
        ),
        ("training.max_steps=1.5", "training.max_steps is the float 1.5, wanted an integer"),
        ("training.bf16=1", "training.bf16 is the int 1, wanted true or false"),
        ("training={max_steps: 1}", "training needs output_dir"),
        ("student=3", "student is the int 3, wanted a string"),
        ("data.root=[1]", "data.root is a list"),
        ("teachers=large", "teachers is the string 'large', wanted a mapping"),
        ("teachers.cook=null", "teachers.cook is null, wanted a string"),
        ("dtype=float3", "dtype is 'float3', wanted one of .*did you mean 'float32'"),
        ("distill.projection.method=apg", "did you mean 'agp'"),
        ("distill.signals.taste.teacher=cooc", "teacher 'cooc'.*did you mean 'cook'"),
        ("distill.signals.taste.name=ce", "name is 'ce'"),
        ("distill.signals.taste.name=read_axis", "every name may occur once"),
        ("distill.signals.taste.region=full", "compares logits"),
        ("distill.signals.0.region=null", "needs student_layers, teacher_layers and region"),
        ("distill.signals.0.share=-1", "share is -1.0"),
        ("distill.signals.tast.share=1", "no entry 'tast' among 2; did you mean 'taste'"),
        ("distill.mixing.soup={tasty: 1}", "signal 'tasty', which does not exist; did you mean"),
        ("encoder.image_size=[1, 2, 3]", "encoder.image_size has 3 entries, wanted 2"),
        ("student.path=x", "student is the string 'small' and has no 'path'"),
        (
            f"distill.signals.0.share={'9' * 400}",
            "read_axis.share is an int of 1329 bits, which",
        ),
        (f"distill.mixing.soup.taste=-{'9' * 400}", "soup.taste is an int of 1329 bits"),
        (f"distill.projection.seed={'9' * 400}", "projection.seed is an int of 1329 bits"),
        (f"training.learning_rate={'9' * 400}", "training.learning_rate is an int of 1329 bits"),
        (f"training.max_steps=0x{'F' * 5000}", "training.max_steps is an int of 20000 bits"),
        ("student={? [1, 2] : 3}", "the value is not YAML: a key is a list, wanted a name"),
        ("student=2026-13-45", "the value is not YAML: month must be in"),
        (f"student={'9' * 5000}", "the value is not YAML: Exceeds the limit"),
        ("student=" + "[" * 10_000, "the value is not YAML: maximum recursion depth"),
        ("student", "is not of the form KEY.KEY=VALUE"),
        ("training.bf16=[", "the value is not YAML"),
    ],
)
def test_mistake_is_named_with_file_and_key(write, override, message):
    file = write(CHARTS)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(file, [override])
    assert str(file) in str(caught.value)


def test_missing_key_is_named(write):
    with pytest.raises(RecipeError, match="data is missing"):
        load_recipe(write({key: value for key, value in CHARTS.items() if key != "data"}))


def test_key_given_twice_is_refused(write):
    with pytest.raises(RecipeError, match="'student' is given twice"):
        load_recipe(write("student: a\nstudent: b\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "holds a list"),
        ("a: [", "cannot be read as YAML"),
        ("", "holds null"),
        ("? [1, 2]\n: 3\n", r"a key is a list, wanted a name\n.*line 1"),
        ("a: 1\n? {b: 1}\n: 3\n", r"a key is a mapping, wanted a name\n.*line 2"),
    ],
)
def test_file_that_is_no_recipe_is_refused(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"absent.yaml cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


def test_base_is_merged_key_by_key(tmp_path):
    files = {
        "base": CHARTS,
        "other": {"student": "other", "teachers": {"cook": "chef"}},
        "recipe": {
            "base": ["base.yaml", "other.yaml"],
            "distill": {
                "signals": {"taste": {"temperature": 1.5}, 0: {"share": 0.3}},
                "mixing": None,
            },
            "training": {"max_steps": 9},
        },
    }
    for name, tree in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.learning_rate=1"])
    assert recipe.student == "other"
    assert recipe.teachers == {"axis-reader": "large", "cook": "chef"}
    read_axis, taste = recipe.distill.signals
    assert (taste.temperature, read_axis.share, read_axis.loss) == (1.5, 0.3, "cosine")
    assert recipe.distill.mixing is None
    assert recipe.training == {"output_dir": "out", "learning_rate": 1, "max_steps": 9}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"base": "recipe.yaml"}, "is its own base: recipe.yaml"),
        ({"base": "absent.yaml"}, "absent.yaml cannot be read"),
        ({"base": 3}, "base is the int 3, wanted a path or a list of paths"),
        ({"base": "charts.yaml", "distill": {"signals": {"tast": {}}}}, "did you mean 'taste'"),
        ({"base": "charts.yaml", "studnt": "x"}, "unknown key studnt; did you mean 'student'"),
    ],
)
def test_mistake_in_a_base_is_named(tmp_path, tree, message):
    (tmp_path / "charts.yaml").write_text(yaml.safe_dump(CHARTS))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert str(tmp_path) in str(caught.value)


def test_fsdp_is_switched_on_by_true():
    """transformers annotates it as the string that older versions took."""
    file = FOLDER / "multi.yaml"
    recipe = load_recipe(file, ["training.fsdp=true", "training.fsdp_config.version=2"])
    assert recipe.training["fsdp"] is True and recipe.training["fsdp_config"] == {"version": 2}
    with pytest.raises(RecipeError, match=r"training\.fsdp is the int 1"):
        load_recipe(file, ["training.fsdp=1"])
