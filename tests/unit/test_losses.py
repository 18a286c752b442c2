"""AttentionMapLoss: what it reads of two captures, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from drivekd.errors import TokenMismatchError
from drivekd.functional import (
    attention_map_loss,
    attention_map_targets,
    layerwise_attention_map_loss,
)
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout

B, N = 2, 7
VISION = torch.tensor([[False, True, True, True, False, False, False]] * B)
TOKENS = TokenLayout.from_masks(VISION)
IDS = torch.arange(B * N).view(B, N)


class Records:
    """A capture as the losses see it."""

    def __init__(self, heads, dim, *, num_layers=4, tokens=N, grad=False, ids=IDS, windows=None):
        windows = windows or [None] * num_layers
        self.input_ids = ids
        self.num_layers = num_layers
        self.records = [
            SimpleNamespace(
                query=torch.randn(B, heads, tokens, dim).requires_grad_(grad),
                key=torch.randn(B, heads, tokens, dim).requires_grad_(grad),
                scale=0.3 + layer,
                lse=None,
                window=windows[layer],
            )
            for layer in range(num_layers)
        ]

    def __getitem__(self, layer):
        return self.records[layer]


def captures(**options):
    return Records(2, 4, grad=True, **options), Records(3, 6)


def planning(**settings):
    defaults = {"student_layers": [-2], "teacher_layers": [-2], "region": "text_to_vision"}
    return AttentionMapLoss(**{**defaults, **settings})


@pytest.mark.parametrize("region", ["full", "text_to_vision"])
def test_kept_targets_stand_for_the_teacher(region):
    student, teacher = captures(windows=[None, 5, N, N + 3])
    loss = planning(region=region, student_layers=[2, 1], teacher_layers=[2, 0, 3])
    layers = [teacher[layer] for layer in loss.teacher_layers]
    pairs = [(each.query, each.key) for each in layers]
    scales = [each.scale for each in layers]
    targets = [
        attention_map_targets(
            pairs, [group], TOKENS, region=region, window=window, scale_teacher=scales
        )[0]
        for group, window in zip(loss.groups, (N + 1, 5), strict=True)  # N and more: all tokens
    ]
    weight = torch.tensor([0.5, 2.0])
    value = loss.with_targets(student, targets, TOKENS, weight, reduction="none")
    want = layerwise_attention_map_loss(
        [(student[i].query, student[i].key) for i in loss.student_layers],
        pairs,
        loss.groups,
        TOKENS,
        reduction="none",
        region=region,
        window=[None, 5],
        sample_weight=weight,
        scale_student=[student[i].scale for i in loss.student_layers],
        scale_teacher=scales,
    )
    torch.testing.assert_close(value, want, rtol=1e-5, atol=0)


def test_kept_targets_of_another_kind_are_refused():
    student, teacher = captures(windows=[None, 5, None, None])
    pairs = [(teacher[2].query, teacher[2].key)]
    (full,) = attention_map_targets(pairs, [[0]], TOKENS)
    with pytest.raises(ValueError, match="target of student layer -2 is of region 'full'"):
        planning().with_targets(student, [full], TOKENS)
    for targets, error, message in (
        ([], ValueError, "targets has 0 entries but the loss has 1 student layers"),
        ([full, full], ValueError, "targets has 2 entries but the loss has 1 student layers"),
        ([None], TypeError, r"targets\[0\] is a NoneType; wanted a drivekd.functional.Attention"),
        (full, TypeError, "targets is a AttentionMapTarget; wanted a list of targets"),
        (None, TypeError, "targets is a NoneType; wanted a list of targets"),
    ):
        with pytest.raises(error, match=message):
            planning().with_targets(student, targets, None)
    loss = planning(region="full", student_layers=[1])
    with pytest.raises(NotImplementedError, match="within a window of 5 tokens but its target wi"):
        loss.with_targets(student, [full], TOKENS)


@pytest.mark.parametrize("loss", ["mse", "cosine", "kl"])
def test_it_is_the_functional_on_the_captured_layers(loss):
    student, teacher = captures()
    weight = torch.tensor([0.5, 2.0])
    value = planning(loss=loss, denominator="live")(student, teacher, TOKENS, weight)
    s, t = student[2], teacher[2]
    want = attention_map_loss(
        s.query, s.key, t.query, t.key, TOKENS, region="text_to_vision", loss=loss,
        denominator="live", sample_weight=weight, scale_student=s.scale, scale_teacher=t.scale,
    )  # fmt: skip
    assert torch.equal(value, want)
    value.backward()
    assert s.query.grad.any()
    assert student[1].query.grad is None


def test_unequal_lists_are_matched_by_sliding_groups():
    student, teacher = captures()
    reasoning = AttentionMapLoss(
        student_layers=[0, 1], teacher_layers=[0, 1, 2], region="full", loss="kl"
    )
    assert reasoning.groups == [[0, 1], [1, 2]]
    losses = reasoning(student, teacher, TOKENS, reduction="none")
    want = layerwise_attention_map_loss(
        [(student[i].query, student[i].key) for i in (0, 1)],
        [(teacher[i].query, teacher[i].key) for i in (0, 1, 2)],
        [[0, 1], [1, 2]],
        TOKENS,
        reduction="none",
        loss="kl",
        scale_student=[student[i].scale for i in (0, 1)],
        scale_teacher=[teacher[i].scale for i in (0, 1, 2)],
    )
    assert torch.equal(losses, want)
    assert torch.equal(reasoning(student, teacher, TOKENS), want.mean())


def test_equal_lists_are_matched_one_to_one_and_groups_may_be_given():
    layers = {"student_layers": [0, 1], "teacher_layers": [2, 3], "region": "full"}
    assert AttentionMapLoss(**layers).groups == [[0], [1]]
    assert AttentionMapLoss(**layers, groups=[[0, 1], (1,)]).groups == [[0, 1], [1]]


def test_captured_lse_is_used():
    student, teacher = captures()
    want = planning()(student, teacher, TOKENS)
    for capture in (student, teacher):
        record = capture[2]
        scores = record.scale * record.query.detach() @ record.key.detach().transpose(-1, -2)
        hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        record.lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(planning()(student, teacher, TOKENS), want)
    teacher[2].lse = teacher[2].lse + 1
    assert not torch.isclose(planning()(student, teacher, TOKENS), want)


def test_sliding_windows_are_used():
    student, teacher = captures(windows=[None, None, 3, None])
    teacher[2].window = 3
    s, t = student[2], teacher[2]
    want = attention_map_loss(
        s.query, s.key, t.query, t.key, TOKENS, window=3, region="text_to_vision",
        scale_student=s.scale, scale_teacher=t.scale,
    )  # fmt: skip
    assert torch.equal(planning()(student, teacher, TOKENS), want)


def test_a_window_that_covers_all_tokens_is_none():
    student, teacher = captures(windows=[None, None, 4096, None])
    assert planning()(student, teacher, TOKENS).isfinite()


def test_different_windows_are_refused():
    student, teacher = captures(windows=[None, None, 3, None])
    with pytest.raises(NotImplementedError, match=r"window of 3 tokens.*None"):
        planning()(student, teacher, TOKENS)


def test_layers_on_several_devices_meet_on_that_of_the_first():
    """A model spread by layers; the second device has no memory, so that devices are looked at."""
    student, teacher = captures(ids=None)
    for name in ("query", "key"):
        setattr(student[0], name, getattr(student[0], name).detach().to("meta"))
    teacher[3].lse = torch.zeros(B, 3, N)
    settings = AttentionMapLoss(student_layers=[0, 1], teacher_layers=[2, 3], region="full")
    value = settings(student, teacher, TOKENS.to("meta"))
    assert value.device.type == "meta"
    assert value.requires_grad  # through the copy of layer 1


def test_different_token_counts_are_refused():
    student, teacher = Records(2, 4), Records(3, 6, tokens=N + 1, ids=None)
    with pytest.raises(TokenMismatchError, match=r"2 samples of 7 tokens.*2 of 8"):
        planning()(student, teacher, TOKENS)


def test_different_ids_are_refused_with_sample_and_position():
    other = IDS.clone()
    other[1, 4] = 99
    student, teacher = Records(2, 4), Records(3, 6, ids=other)
    with pytest.raises(TokenMismatchError, match=r"sample 1, position 4 is 11 .* 99"):
        planning()(student, teacher, TOKENS)


def test_ids_of_other_shape_are_refused():
    student, teacher = Records(2, 4), Records(3, 6, ids=IDS[:, :-1])
    with pytest.raises(TokenMismatchError, match=r"\(2, 7\).*\(2, 6\)"):
        planning()(student, teacher, TOKENS)


def test_ids_at_padding_may_differ():
    other = IDS.clone()
    other[:, -1] = 99
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[:, -1] = False
    tokens = TokenLayout.from_masks(VISION, valid=valid)
    student, teacher = Records(2, 4), Records(3, 6, ids=other)
    assert planning()(student, teacher, tokens).isfinite()
    with pytest.raises(TokenMismatchError):
        planning()(student, teacher, TOKENS)


def test_ids_unknown_to_one_capture_are_not_compared():
    student, teacher = Records(2, 4), Records(3, 6, ids=None)
    assert planning()(student, teacher, TOKENS).isfinite()


def test_a_teacher_with_grad_is_refused():
    with pytest.raises(ValueError, match="no_grad"):
        planning()(Records(2, 4), Records(3, 6, grad=True), TOKENS)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"student_layers": []}, ValueError, "student_layers is empty"),
        ({"student_layers": 0}, TypeError, "student_layers is a int"),
        ({"teacher_layers": "last"}, TypeError, "teacher_layers is a str"),
        ({"teacher_layers": [0.0]}, TypeError, "teacher_layers holds a float"),
        ({"region": "all"}, ValueError, "'full', 'text_to_vision'"),
        ({"loss": "l1"}, ValueError, "'mse', 'cosine', 'kl'"),
        ({"denominator": "x"}, ValueError, "'official', 'live'"),
        ({"groups": [[1]]}, ValueError, r"groups\[0\] holds 1"),
        ({"groups": [[0], [0]]}, ValueError, "groups has 2 entries"),
    ],
)
def test_settings_are_checked_when_it_is_built(settings, error, message):
    with pytest.raises(error, match=message):
        planning(**settings)


def test_it_prints_its_settings():
    assert "student_layers=[-2]" in repr(planning(loss="kl"))
    assert "loss='kl'" in repr(planning(loss="kl"))
