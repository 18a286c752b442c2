import dataclasses

import pytest

from drivekd.train import DistillConfig, ProjectionConfig, SignalConfig


def make_signal(name="look", **changes):
    settings = {
        "teacher": "t",
        "student_layers": "first",
        "teacher_layers": "first",
        "region": "full",
    }
    return SignalConfig(name=name, **(settings | changes))


def test_mixing_by_default_takes_the_type_of_the_signals_name_else_all():
    config = DistillConfig(signals=(make_signal("sort"), make_signal("smell")))
    assert config.resolve_mixing(["sort", "fold", "wash", "sort"]) == {
        "sort": {"sort": 1.0},
        "smell": {"fold": 1.0, "sort": 1.0, "wash": 1.0},
    }


def test_mixing_table_decides_alone():
    config = DistillConfig(
        signals=(make_signal("sort"), make_signal("smell")),
        mixing={"sort": {"smell": 0.5, "sort": 0}, "fold": {"sort": 2}},
    )
    resolved = config.resolve_mixing(["sort", "fold", "wash"])
    assert resolved == {"sort": {"fold": 2.0}, "smell": {"sort": 0.5}}


def test_mixing_of_a_type_that_the_data_lack_is_refused():
    config = DistillConfig(signals=(make_signal(),), mixing={"foold": {"look": 1}})
    with pytest.raises(
        ValueError, match="'foold', which the data do not have; did you mean 'fold'"
    ):
        config.resolve_mixing(["fold", "wash"])


def test_signal_without_question_type_is_refused():
    config = DistillConfig(signals=(make_signal(),), mixing={"fold": {"look": 0}})
    with pytest.raises(ValueError, match="gives the signal 'look' no question type"):
        config.resolve_mixing(["fold"])


def test_no_signals_is_plain_training():
    assert DistillConfig().resolve_mixing(["anything"]) == {}


def test_projected_runs_are_comparable_with_sums_by_default():
    assert ProjectionConfig().ce_multiplicity == "once"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_signal(share="much"), TypeError, "share is 'much'"),
        (lambda: make_signal(share=0), ValueError, "share is 0, wanted a finite number above 0"),
        (lambda: make_signal(weight=float("nan")), ValueError, "weight is nan"),
        (lambda: make_signal(weight=True), TypeError, "weight is True"),
        (lambda: make_signal(temperature=0), ValueError, "temperature is 0"),
        (lambda: make_signal(name=""), ValueError, "name is ''"),
        (lambda: make_signal(name="a/b"), ValueError, "name is 'a/b'"),
        (lambda: make_signal(loss="msee"), ValueError, "did you mean 'mse'"),
        (lambda: make_signal(kind="logit"), ValueError, "did you mean 'logits'"),
        (lambda: make_signal(denominator="all"), ValueError, "denominator is 'all'"),
        (lambda: ProjectionConfig(every="epoch"), ValueError, "every is 'epoch'"),
        (lambda: ProjectionConfig(seed=1.0), TypeError, "seed is 1.0"),
        (lambda: ProjectionConfig(seed=2**64), ValueError, "seed is 18446744073709551616, wanted"),
        (lambda: make_signal(share=10**400), ValueError, "share is 10{400}, wanted a finite"),
        (lambda: make_signal(weight=10**400), ValueError, "weight is 10{400}, wanted a finite"),
        (
            lambda: make_signal(student_layers=[]),
            ValueError,
            r"student_layers is \[\], which names",
        ),
        (lambda: make_signal(student_layers={1}), TypeError, "student_layers is a set; wanted"),
        (lambda: make_signal(teacher_layers=b"0"), TypeError, "teacher_layers is a bytes; wanted"),
        (lambda: make_signal(teacher_layers=[True]), TypeError, "teacher_layers holds a bool"),
        (lambda: make_signal(teacher_layers="lst"), ValueError, "teacher_layers is 'lst'; wanted"),
        (lambda: DistillConfig(signals=None), TypeError, "signals is a NoneType, wanted a list"),
        (lambda: DistillConfig(signals=make_signal()), TypeError, "signals is a SignalConfig"),
        (lambda: DistillConfig(mixing=[1]), TypeError, r"mixing is \[1\], wanted a mapping"),
        (lambda: DistillConfig(mixing=[]), TypeError, r"mixing is \[\], wanted a mapping"),
        (
            lambda: DistillConfig(mixing={"a": "x"}),
            TypeError,
            r"mixing\['a'\] is 'x', wanted a map",
        ),
        (lambda: DistillConfig(weighting_options=5), TypeError, "weighting_options is 5, wanted a"),
        (
            lambda: DistillConfig(small_share_warning=10**400),
            ValueError,
            "small_share_warning is 10{400}",
        ),
        (
            lambda: DistillConfig(signals=[make_signal()], mixing={"a": {"look": 10**400}}),
            ValueError,
            r"mixing\['a'\]\['look'\] is 10{400}",
        ),
        (lambda: DistillConfig(weighting="none"), ValueError, "weighting is 'none'"),
        (lambda: DistillConfig(signals=("look",)), TypeError, "signals holds a str"),
        (lambda: DistillConfig(projection="agp"), TypeError, "projection is 'agp'"),
        (
            lambda: DistillConfig(signals=(make_signal(),), mixing={"a": {"look": -1}}),
            ValueError,
            r"mixing\['a'\]\['look'\] is -1",
        ),
    ],
)
def test_illegal_setting_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_settings_cannot_be_changed():
    mixing = {"fold": {"look": 1.0}}
    config = DistillConfig(signals=[make_signal()], mixing=mixing)
    mixing["fold"]["look"] = 5.0
    assert config.mixing["fold"]["look"] == 1.0
    with pytest.raises(TypeError):
        config.mixing["fold"]["look"] = 5.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.signals = ()
