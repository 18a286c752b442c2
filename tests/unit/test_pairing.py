"""Layer names and teacher groups."""

import pytest

from drivekd.pairing import match_layer_groups, resolve_layers


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "groups"),
    [
        (1, 1, [[0]]),
        (3, 3, [[0], [1], [2]]),
        (3, 5, [[0, 1, 2], [1, 2, 3], [2, 3, 4]]),
        (1, 4, [[0, 1, 2, 3]]),
        (4, 2, [[0], [1], [1], [1]]),
    ],
)
def test_groups_slide(num_student, num_teacher, groups):
    assert match_layer_groups(num_student, num_teacher) == groups


@pytest.mark.parametrize("num_student", range(1, 9))
@pytest.mark.parametrize("num_teacher", range(1, 12))
def test_groups_are_legal_and_reach_the_last_teacher_layer(num_student, num_teacher):
    groups = match_layer_groups(num_student, num_teacher)
    assert len(groups) == num_student
    assert {len(group) for group in groups} == {max(1, num_teacher - num_student + 1)}
    assert all(0 <= index < num_teacher for group in groups for index in group)
    if num_student <= num_teacher:
        assert groups[-1][-1] == num_teacher - 1
        assert {index for group in groups for index in group} == set(range(num_teacher))


@pytest.mark.parametrize(
    ("counts", "error"), [((0, 1), ValueError), ((1, -1), ValueError), ((1.0, 1), TypeError),
                          ((True, 1), TypeError), ((1, "2"), TypeError)],
)  # fmt: skip
def test_groups_refuse(counts, error):
    with pytest.raises(error, match="num_"):
        match_layer_groups(*counts)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("first", [0]),
        ("penultimate", [4]),
        ("last", [5]),
        (0, [0]),
        (-2, [4]),
        ([3, 0, -1], [3, 0, 5]),
        ((1,), [1]),
        ("0..-2", [0, 1, 2, 3, 4]),
        ("-3..5", [3, 4, 5]),
        ("2..2", [2]),
    ],
)
def test_layers_of_a_model_of_six(spec, layers):
    assert resolve_layers(spec, 6) == layers


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("middle", ValueError, "'penultimate'"),
        ("0:-2", ValueError, "0:-2"),
        ("4..1", ValueError, "names no layer"),
        ([], ValueError, "names no layer"),
        (6, ValueError, "layer 6 does not exist"),
        (-7, ValueError, "layer -7 does not exist"),
        ("0..6", ValueError, "layer 6"),
        ([1, 1], ValueError, "twice"),
        ([5, -1], ValueError, "twice"),
        (1.0, TypeError, "float"),
        (True, TypeError, "bool"),
        ([1, True], TypeError, "bool"),
        (["first"], TypeError, "str"),
        (None, TypeError, "NoneType"),
    ],
)
def test_layers_refuse(spec, error, message):
    with pytest.raises(error, match=message):
        resolve_layers(spec, 6)


def test_a_model_of_one_layer_has_no_penultimate():
    with pytest.raises(ValueError, match="layer -2"):
        resolve_layers("penultimate", 1)
