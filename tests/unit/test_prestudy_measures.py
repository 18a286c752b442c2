"""The pre-study's pure functions, against loops in float64 numpy."""

import math

import numpy as np
import pytest
import torch

from drivekd.functional import attention_map, attention_map_loss
from drivekd.study.prestudy.measures import (
    MAP_BINS,
    MARGIN_BINS,
    SINK_FRACTION,
    VISION_BINS,
    MapSums,
    PairCosines,
    along_answer,
    bin_shares,
    generalized_margin,
)
from drivekd.tokens import TokenLayout


@pytest.mark.parametrize(("count", "bins"), [(1, 10), (7, 10), (10, 10), (64, 8), (1537, 64)])
def test_tokens_are_shared_out_to_bins_without_loss(count, bins):
    shares = bin_shares(count, bins)
    torch.testing.assert_close(shares.sum(1), torch.ones(count, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(0), torch.full((bins,), count / bins).double())
    if count == bins:
        torch.testing.assert_close(shares, torch.eye(bins).double())
    assert (shares >= 0).all()
    assert (shares[0].nonzero()[0] == 0).all() and shares[-1, -1] > 0


@pytest.mark.parametrize("tau", [0.25, 1.0, 3.0])
def test_margin_is_logit_minus_log_sum_exp_of_the_others(tau):
    logits, labels = torch.randn(5, 11).double() * 8, torch.tensor([0, 10, 3, 3, 7])
    found = generalized_margin(logits, labels, tau=tau)
    for row, label, value in zip(logits.numpy(), labels.tolist(), found.tolist(), strict=True):
        others = np.delete(row, label)
        top = others.max()
        wanted = row[label] - top - tau * math.log(np.exp((others - top) / tau).sum())
        assert value == pytest.approx(wanted, rel=1e-12)


def test_margin_at_tau_one_is_the_log_odds_and_at_small_tau_the_gap_to_the_best_other():
    logits, labels = torch.randn(4, 9).double(), torch.tensor([1, 0, 8, 4])
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(generalized_margin(logits, labels), (p / (1 - p)).log())
    gap = logits.gather(1, labels[:, None])[:, 0] - logits.scatter(
        1, labels[:, None], -torch.inf
    ).amax(1)
    torch.testing.assert_close(generalized_margin(logits, labels, tau=1e-3), gap, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="tau is 0"):
        generalized_margin(logits, labels, tau=0)


def test_margins_along_an_answer_keep_their_mean_and_short_answers_are_flat():
    one = along_answer(torch.tensor([2.5]))
    torch.testing.assert_close(one, torch.full((MARGIN_BINS,), 2.5).double())
    values = torch.randn(37)
    assert along_answer(values).mean() == pytest.approx(values.mean().item(), abs=1e-6)
    rising = along_answer(torch.arange(25.0))
    assert (rising.diff() > 0).all()


def random_maps(layers, num_tokens, seed):
    """(L, N, N) causal maps, rows summing to 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, num_tokens, num_tokens, generator=generator).double() * 2
    hidden = torch.ones(num_tokens, num_tokens).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def two_pictures():
    """34 tokens: text, 6 of a picture, text, 5 of another, text, and one that is neither."""
    is_vision = torch.zeros(34, dtype=torch.bool)
    is_vision[4:10] = is_vision[13:18] = True
    is_text = ~is_vision
    is_text[20] = False
    return is_vision, is_text


def plain_features(maps, is_vision, is_text):
    """The same by loops."""
    vision, text = np.flatnonzero(is_vision), np.flatnonzero(is_text)
    asking = [i for i in text if i > vision.max()]
    few = math.ceil(len(vision) / SINK_FRACTION)
    groups = [(vision, 0), (text, MAP_BINS)]
    made = []
    for layer in maps.numpy():
        rows = [layer[i, vision] / layer[i, vision].sum() for i in asking]
        mean = np.mean(rows, axis=0)
        distribution = np.zeros(VISION_BINS)
        for r, value in enumerate(mean):
            for b in range(VISION_BINS):
                low = max(r / len(vision), b / VISION_BINS)
                high = min((r + 1) / len(vision), (b + 1) / VISION_BINS)
                distribution[b] += value * max(0, high - low) * len(vision)
        pooled = np.zeros((2 * MAP_BINS, 2 * MAP_BINS))
        for rows_of, a in groups:
            of_rows = bin_shares(len(rows_of), MAP_BINS).numpy()
            for keys_of, c in groups:
                of_keys = bin_shares(len(keys_of), MAP_BINS).numpy()
                block = of_rows.T @ layer[np.ix_(rows_of, keys_of)] @ of_keys
                pooled[a : a + MAP_BINS, c : c + MAP_BINS] = block / of_rows.sum(0)[:, None]
        made.append(
            (
                distribution,
                pooled.ravel(),
                np.mean([layer[i, vision].sum() for i in asking]),
                np.sort(mean)[::-1][:few].sum(),
                np.mean([np.sort(row)[::-1][:few].sum() for row in rows]),
            )
        )
    return [np.array(part) for part in zip(*made, strict=True)]


@pytest.mark.parametrize("height", [1, 5, 34])
def test_features_of_maps_are_those_of_loops_however_rows_are_cut(height):
    maps = random_maps(3, 34, seed=1)
    is_vision, is_text = two_pictures()
    sums = MapSums(is_vision, is_text, 3)
    for row in range(0, 34, height):
        rows = slice(row, min(row + height, 34))
        sums.add(rows, maps[:, rows])
    found = sums.result()
    wanted = plain_features(maps, is_vision, is_text)
    names = ("vision", "pooled", "vision_mass", "sink_share", "row_share")
    for name, values in zip(names, wanted, strict=True):
        np.testing.assert_allclose(getattr(found, name).numpy(), values, rtol=1e-10, err_msg=name)
    assert found.sink_floor == pytest.approx(1 / 11)
    assert (found.row_share >= found.sink_share).all()


def test_a_sink_that_all_rows_share_is_told_from_rows_that_each_look_elsewhere():
    num_vision, num_text = 128, 64
    num_tokens = num_vision + num_text
    is_vision = torch.arange(num_tokens) < num_vision
    shared, own = torch.zeros(2, num_tokens, num_tokens)
    for i in range(num_text):
        shared[num_vision + i, 17] = shared[num_vision + i, 90] = 0.5
        own[num_vision + i, 2 * i] = 1.0
    sums = MapSums(is_vision, ~is_vision, 2)
    sums.add(slice(0, num_tokens), torch.stack([shared, own]))
    found = sums.result()
    assert found.sink_share[0] == pytest.approx(1) and found.row_share[0] == pytest.approx(1)
    assert found.sink_share[1] == pytest.approx(2 / 64) and found.row_share[1] == pytest.approx(1)
    assert found.sink_floor == 2 / 128


def test_rows_that_see_no_vision_are_left_out():
    """Behind the end of a window: half of the asking rows see nothing of the picture."""
    is_vision = torch.arange(12) < 4
    map_ = torch.zeros(12, 12)
    map_[4:8, :4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    map_[8:, 8] = 1.0
    sums = MapSums(is_vision, ~is_vision, 1)
    sums.add(slice(0, 12), map_[None])
    found = sums.result()
    assert found.vision.sum() == pytest.approx(1)
    assert found.vision_mass.item() == pytest.approx(0.5)
    assert found.sink_share.item() == pytest.approx(0.4)


def test_pair_cosines_are_one_minus_the_losses_cosine():
    """The pairing is told by what the training loss measures."""
    is_vision, _ = two_pictures()
    tokens = TokenLayout.from_masks(is_vision[None])
    own, other = (
        [(torch.randn(1, h, 34, d).double(), torch.randn(1, k, 34, d).double()) for _ in range(n)]
        for n, h, k, d in ((2, 4, 2, 8), (3, 6, 3, 12))
    )
    pairs = PairCosines(is_vision, ~is_vision, (2, 3))
    maps = [torch.cat([attention_map(q, k, tokens) for q, k in layers]) for layers in (own, other)]
    for rows in (slice(0, 7), slice(7, 34)):
        pairs.add(rows, *(each[:, rows] for each in maps))
    for region, found in pairs.result().items():
        for s, student in enumerate(own):
            for t, teacher in enumerate(other):
                loss = attention_map_loss(
                    *student, *teacher, tokens, region=region, loss="cosine"
                ).item()
                assert 1 - found[s, t].item() == pytest.approx(loss, abs=1e-12)


def test_pair_cosines_of_tiny_probabilities_do_not_underflow():
    is_vision = torch.arange(6) < 3
    tiny = torch.zeros(1, 6, 6)
    tiny[0, 3:, :3] = torch.tensor([1e-30, 2e-30, 2e-30])
    pairs = PairCosines(is_vision, ~is_vision, (1, 1))
    pairs.add(slice(0, 6), tiny, tiny.roll(1, -1))
    rolled = np.array([0.0, 1, 2])  # what is rolled out of the region does not count
    wanted = np.array([1, 2, 2]) @ rolled / 3 / math.sqrt(5)
    assert pairs.result()["text_to_vision"].item() == pytest.approx(wanted, rel=1e-6)
