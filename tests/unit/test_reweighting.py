"""Loss weights: fixed, balanced shares, and the public code's online rule against a plain twin."""

import math

import pytest
import torch
from torch.nn import functional as F

from drivekd.projection import GradientProjector
from drivekd.reweighting import (
    BalancedWeights,
    LossObserver,
    OnlineWeights,
    Reweighting,
    StaticWeights,
)
from tests.helpers.host_reads import NoHostRead
from tests.helpers.students import student

NAMES = ("ce", "perception", "reasoning")


def norms(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn_norms(steps, names=NAMES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(len(names), generator=generator, dtype=torch.float64) + 0.05
        for _ in range(steps)
    ]


def test_all_rules_are_reweightings():
    for rule in (StaticWeights({"ce": 1}), BalancedWeights(), OnlineWeights({"ce": 1})):
        assert isinstance(rule, Reweighting)
    assert isinstance(OnlineWeights({"ce": 1}), LossObserver)
    assert not isinstance({"ce": 1.0}, Reweighting)


def test_static_weights_follow_the_names():
    rule = StaticWeights({"ce": 1, "planning": 3.5, "reasoning": 0.0})
    got = rule.weights(("planning", "ce"), norms(1, 1), "ce")
    assert got.tolist() == [3.5, 1.0]
    assert got.dtype == torch.float64
    with pytest.raises(ValueError, match="perception"):
        rule.weights(("perception",), norms(1), "ce")
    rule.load_state_dict(rule.state_dict())


def test_balance_starts_at_the_share():
    got = BalancedWeights(0.1).weights(NAMES, norms(2.0, 1e-4, 5.0), "ce")
    torch.testing.assert_close(got, norms(1.0, 0.1 * 2.0 / 1e-4, 0.1 * 2.0 / 5.0))


def test_balance_is_a_moving_average_of_logarithms():
    rule = BalancedWeights({"perception": 0.2, "reasoning": 0.05}, ema=0.75)
    history = drawn_norms(6)
    average = None
    for now in history:
        target = torch.log(norms(0.2, 0.05) * now[0] / now[1:])
        average = target if average is None else 0.75 * average + 0.25 * target
        got = rule.weights(NAMES, now, "ce")
        torch.testing.assert_close(got, torch.cat([norms(1.0), average.exp()]))


def test_balance_without_memory_holds_the_share_exactly():
    rule = BalancedWeights(0.1, ema=0.0)
    for now in drawn_norms(4):
        weighted = rule.weights(NAMES, now, "ce") * now
        torch.testing.assert_close(weighted[1:], 0.1 * weighted[:1].expand(2))


def test_balance_holds_the_share_in_training():
    model = student()
    projector = GradientProjector(model.parameters(), method="none")
    rule = BalancedWeights(0.1, ema=0.5)
    for seed in range(20):
        report = projector.backward(model.losses(seed), weights=rule)
    shares = report.loss_weights * report.norms / report.norms[0]
    assert bool(((shares[1:] > 0.05) & (shares[1:] < 0.2)).all())


def test_an_absent_loss_keeps_its_average():
    rule, twin = BalancedWeights(0.1), BalancedWeights(0.1)
    history = drawn_norms(3)
    rule.weights(NAMES, history[0], "ce")
    twin.weights(NAMES, history[0], "ce")
    rule.weights(("ce", "reasoning"), history[1][[0, 2]], "ce")
    got = rule.weights(NAMES, history[2], "ce")
    want = twin.weights(NAMES, history[2], "ce")
    assert got[1] == want[1]
    assert got[2] != want[2]


@pytest.mark.parametrize("bad", (0.0, math.inf, math.nan))
def test_unusable_norms_leave_the_average_untouched(bad):
    for spoiled in (0, 1):
        rule = BalancedWeights(0.1)
        first, _ = drawn_norms(2)
        before = rule.weights(NAMES, first, "ce")
        now = first * 3.0
        now[spoiled] = bad
        after = rule.weights(NAMES, now, "ce")
        assert after[1] == before[1]
        if spoiled == 0:
            assert after[2] == before[2]


@pytest.mark.parametrize("bad", (0.0, math.inf, math.nan))
def test_before_the_first_usable_norm_the_weight_is_zero(bad):
    rule = BalancedWeights(0.1, ema=0.9)
    assert rule.weights(NAMES, norms(1.0, bad, 2.0), "ce")[1] == 0.0
    got = rule.weights(NAMES, norms(1.0, 4.0, 2.0), "ce")
    assert float(got[1]) == pytest.approx(0.1 / 4.0)


def test_the_anchor_may_stand_anywhere():
    got = BalancedWeights(0.5).weights(("a", "b", "ce"), norms(1.0, 2.0, 4.0), "ce")
    torch.testing.assert_close(got, norms(2.0, 1.0, 1.0))


def test_max_weight_bounds_a_vanishing_gradient():
    rule = BalancedWeights(0.1, max_weight=50.0)
    assert rule.weights(("ce", "perception"), norms(1.0, 1e-9), "ce")[1] == 50.0


def test_balance_resumes():
    history = drawn_norms(6)
    whole, first, second = (BalancedWeights(0.1) for _ in range(3))
    want = [whole.weights(NAMES, now, "ce") for now in history]
    for now in history[:3]:
        first.weights(NAMES, now, "ce")
    second.load_state_dict(first.state_dict())
    for now, expected in zip(history[3:], want[3:], strict=True):
        assert torch.equal(second.weights(NAMES, now, "ce"), expected)
    with pytest.raises(ValueError, match="log_weights"):
        second.load_state_dict({"weights": {}})


class OnlineTwin:
    """The public rule with autograd and torch's own AdamW, one call per optimiser step."""

    def __init__(self, static, learning_rate, alpha=0.0, minimum=1e-6, maximum=1e6, ce=0.6):
        self.static, self.alpha = static, alpha
        self.minimum, self.maximum, self.ce = minimum, maximum, ce
        self.parameters = {
            name: norms(w)[0].clamp(minimum, maximum).expm1().log().requires_grad_()
            for name, w in static.items()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.first_losses = {}

    def current(self, name):
        weight = (F.softplus(self.parameters[name]) + 1e-8).clamp(self.minimum, self.maximum)
        return weight.clamp(min=self.ce) if name == "ce" else weight

    def update(self, mean_norms, mean_losses):
        names = list(mean_norms)
        for name in names:
            self.first_losses.setdefault(name, float(mean_losses[name]))
        weighted = {name: self.current(name) * mean_norms[name] for name in names}
        total = sum(weighted.values())
        ratios = {name: mean_losses[name] / self.first_losses[name] for name in names}
        mean = sum(ratios.values()) / len(names)
        share = sum(self.static[name] for name in names)
        objective = sum(
            (
                weighted[name]
                - self.static[name] / share * total * (ratios[name] / mean) ** self.alpha
            ).abs()
            for name in names
        )
        self.optimizer.zero_grad()
        objective.backward()
        self.optimizer.step()
        with torch.no_grad():
            new = {name: self.current(name) for name in names}
            scale = share / sum(new.values())
            for name, weight in new.items():
                scaled = (weight * scale).clamp(self.minimum, self.maximum)
                if name == "ce":
                    scaled = scaled.clamp(min=self.ce)
                self.parameters[name].copy_(scaled.expm1().log())


STATIC = {"ce": 1.0, "perception": 2.0, "reasoning": 0.5}


@pytest.mark.parametrize("alpha", (0.0, 0.7))
@pytest.mark.parametrize("limits", ({}, {"minimum": 0.45, "maximum": 1.9, "minimum_anchor": 0.98}))
def test_online_rule_matches_the_public_one(limits, alpha):
    rule = OnlineWeights(STATIC, learning_rate=0.05, alpha=alpha, **limits)
    minimum, maximum = limits.get("minimum", 1e-6), limits.get("maximum", 1e6)
    twin = OnlineTwin(STATIC, 0.05, alpha, minimum, maximum, limits.get("minimum_anchor", 0.6))
    for step, now in enumerate(drawn_norms(40)):
        names = NAMES if step % 3 else ("ce", "reasoning")
        values = now[: len(names)]
        losses = {name: values[i] ** 2 + 0.1 * i for i, name in enumerate(names)}
        rule.observe(losses)
        got = rule.weights(names, values, "ce")
        want = torch.stack([twin.current(name).detach() for name in names])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        twin.update(dict(zip(names, values, strict=True)), losses)
    assert not torch.allclose(got, norms(*(STATIC[name] for name in names)), rtol=1e-2)


def test_online_updates_once_per_window_on_means():
    """An absent loss counts as zero in the mean over micro-batches, as in the public code."""
    rule = OnlineWeights(STATIC, learning_rate=0.05, update_every=2)
    twin = OnlineTwin(STATIC, 0.05)
    history = drawn_norms(8)
    for first, second in zip(history[::2], history[1::2], strict=True):
        want = torch.stack([twin.current(name).detach() for name in NAMES])
        got = rule.weights(NAMES, first, "ce")
        torch.testing.assert_close(got, want)
        got = rule.weights(("ce", "reasoning"), second[[0, 2]], "ce")
        torch.testing.assert_close(got, want[[0, 2]])
        means = {"ce": (first[0] + second[0]) / 2, "perception": first[1] / 2}
        means["reasoning"] = (first[2] + second[2]) / 2
        twin.update(means, dict.fromkeys(NAMES, torch.tensor(1.0)))


def test_online_starts_static_and_moves_towards_the_proportions():
    rule = OnlineWeights(dict.fromkeys(NAMES, 1.0), learning_rate=0.02, minimum_anchor=0.0)
    raw = norms(1.0, 0.2, 3.0)
    assert torch.allclose(rule.weights(NAMES, raw, "ce"), torch.ones(3).double(), rtol=1e-6)
    for _ in range(400):
        weights = rule.weights(NAMES, raw, "ce")
    weighted = weights * raw
    assert float(weighted.max() / weighted.min()) < 1.6
    assert float(weights.sum()) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("now", [norms(0, 0, 0), norms(1, math.nan, 1), norms(1, math.inf, 1)])
def test_online_ignores_unusable_norms(now):
    rule, twin = (OnlineWeights(STATIC, learning_rate=0.1) for _ in range(2))
    first, last = drawn_norms(2)
    rule.weights(NAMES, first, "ce")
    twin.weights(NAMES, first, "ce")
    rule.weights(NAMES, now, "ce")
    assert torch.equal(rule.weights(NAMES, last, "ce"), twin.weights(NAMES, last, "ce"))


def test_online_needs_two_losses_to_learn():
    rule = OnlineWeights(STATIC, learning_rate=0.1)
    for _ in range(3):
        assert float(rule.weights(("ce",), norms(2.0), "ce")) == pytest.approx(1.0, rel=1e-7)


def test_online_resumes_in_the_middle_of_a_window():
    def make():
        return OnlineWeights(STATIC, learning_rate=0.05, alpha=0.5, update_every=3)

    def play(rule, history):
        result = []
        for now in history:
            rule.observe(dict(zip(NAMES, now, strict=True)))
            result.append(rule.weights(NAMES, now, "ce"))
        return result

    history = drawn_norms(11)
    whole, first, second = make(), make(), make()
    want = play(whole, history)
    play(first, history[:4])
    second.load_state_dict(first.state_dict())
    for got, expected in zip(play(second, history[4:]), want[4:], strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="about the losses"):
        OnlineWeights({"ce": 1.0}).load_state_dict(first.state_dict())


def test_online_alpha_needs_the_losses():
    rule = OnlineWeights(STATIC, alpha=1.0)
    with pytest.raises(ValueError, match="observe"):
        rule.weights(NAMES, norms(1, 2, 3), "ce")


@pytest.mark.parametrize("bad", (-0.5, math.nan, math.inf))
def test_online_does_not_learn_from_a_loss_without_a_power(bad):
    """(-0.5)^0.5 is NaN: it stayed in the weights for good, and went from there into .grad."""
    rule, twin = (OnlineWeights(STATIC, alpha=0.5, learning_rate=0.1) for _ in range(2))
    good = dict(zip(NAMES, norms(1, 2, 3), strict=True))
    for losses in (good, {**good, NAMES[1]: torch.tensor(bad).double()}, good):
        rule.observe(losses)
        got = rule.weights(NAMES, norms(1, 2, 3), "ce")
    for _ in range(2):
        twin.observe(good)
        want = twin.weights(NAMES, norms(1, 2, 3), "ce")
    assert torch.equal(got, want)


def test_online_gets_the_losses_from_the_projector():
    model = student()
    rule = OnlineWeights(dict.fromkeys(model.losses(), 1.0), alpha=1.0, learning_rate=0.1)
    projector = GradientProjector(model.parameters())
    for seed in range(3):
        report = projector.backward(model.losses(seed), weights=rule)
    assert bool(report.loss_weights.isfinite().all())
    assert not torch.allclose(report.loss_weights, torch.ones(4).double())


@pytest.mark.parametrize(
    "rule",
    [StaticWeights(STATIC), BalancedWeights(0.1), OnlineWeights(STATIC, alpha=1.0)],
    ids=type,
)
def test_reads_nothing_back_to_the_host(rule):
    values = norms(1, 2, 3)
    with NoHostRead():
        for _ in range(2):
            if isinstance(rule, LossObserver):
                rule.observe(dict(zip(NAMES, values.unbind(), strict=True)))
            rule.weights(NAMES, values, "ce")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: StaticWeights([1.0]), TypeError, "weights must map"),
        (lambda: StaticWeights({}), ValueError, "weights is empty"),
        (lambda: StaticWeights({"ce": "1"}), TypeError, r"weights\['ce'\]"),
        (lambda: StaticWeights({"ce": -1}), ValueError, r"weights\['ce'\] is -1"),
        (lambda: StaticWeights({"ce": math.nan}), ValueError, r"weights\['ce'\]"),
        (lambda: BalancedWeights(0.0), ValueError, "shares is 0.0"),
        (lambda: BalancedWeights({"a": -0.1}), ValueError, r"shares\['a'\]"),
        (lambda: BalancedWeights("0.1"), TypeError, "shares"),
        (lambda: BalancedWeights(ema=1.0), ValueError, "ema is 1.0"),
        (lambda: BalancedWeights(ema=True), TypeError, "ema"),
        (lambda: BalancedWeights(max_weight=0), ValueError, "max_weight"),
        (lambda: OnlineWeights({"ce": 1}, learning_rate=-1), ValueError, "learning_rate"),
        (lambda: OnlineWeights({"ce": 1}, minimum=2.0, maximum=1.0), ValueError, "maximum"),
        (lambda: OnlineWeights({"ce": 1}, update_every=0), ValueError, "update_every is 0"),
        (lambda: OnlineWeights({"ce": 1}, update_every=1.5), TypeError, "update_every"),
    ],
)
def test_refuses_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "rule", [StaticWeights(STATIC), BalancedWeights(0.1), OnlineWeights(STATIC)], ids=type
)
def test_refuses_norms_and_names(rule):
    with pytest.raises(TypeError, match="norms must be a float64"):
        rule.weights(NAMES, torch.ones(3), "ce")
    with pytest.raises(TypeError, match="norms must be a float64"):
        rule.weights(NAMES, [1.0], "ce")
    with pytest.raises(ValueError, match="norms has shape"):
        rule.weights(NAMES, norms(1.0), "ce")
    if not isinstance(rule, StaticWeights):
        with pytest.raises(ValueError, match="anchor 'sup' is not among"):
            rule.weights(NAMES, norms(1, 2, 3), "sup")


def test_balance_refuses_unknown_names_and_a_share_of_the_anchor():
    rule = BalancedWeights({"perception": 0.1})
    with pytest.raises(ValueError, match="reasoning"):
        rule.weights(NAMES, norms(1, 2, 3), "ce")
    with pytest.raises(ValueError, match="'perception', the anchor"):
        rule.weights(NAMES[:2], norms(1, 2), "perception")
    with pytest.raises(TypeError, match="state"):
        rule.load_state_dict(None)
