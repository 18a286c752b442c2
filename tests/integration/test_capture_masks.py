"""4D masks: what a layout expresses is captured and gives the model's own maps; the rest raises.

Only the diagonal above the main one was looked at: position biases, holes and prefixes passed, and
maps of the captured queries and keys differed from the model's by 0.2 to 0.5. An ordinary causal
mask of -1e4 was refused as one of both directions.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drivekd.capture import capture_attention, masks
from drivekd.errors import CaptureError
from tests.helpers.maps import TOLERANCE, eager_attentions, head_mean_map
from tests.helpers.toy_models import NUM_TOKENS, qwen2, text_inputs
from tests.helpers.traces import traces

N = NUM_TOKENS
CAUSAL = torch.ones(2, N, N, dtype=torch.bool).tril()
ALL = torch.ones(2, N, dtype=torch.bool)
NO_SEGMENTS = torch.zeros(2, N, dtype=torch.long)


@pytest.fixture(params=[2**24, 100], ids=["whole", "chunks"])
def chunk(request, monkeypatch):
    """The mask in one go, and two or three rows at a time."""
    monkeypatch.setattr(masks, "_CHUNK", request.param)


def padded(side):
    valid = ALL.clone()
    valid[-1, slice(0, 5) if side == "left" else slice(-5, None)] = False
    return valid


def additive(visible, hidden, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, hidden)[:, None]


def given(mask):
    return {"input_ids": text_inputs()["input_ids"], "attention_mask": mask}


def assert_own_maps(mask, valid=ALL, segments=NO_SEGMENTS, *, sliding_window=None):
    """With the model's own attentions; a float mask, since eager attention adds it."""
    model = qwen2(sliding_window=sliding_window, first_sliding_layer=0)
    with torch.no_grad():
        expected = eager_attentions(model, given(mask)).attentions[1].double().mean(1)
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            with capture_attention(model, [1]) as captured:
                model(**given(mask), use_cache=False)
            got = head_mean_map(captured[1], valid, segments)
            torch.testing.assert_close(got[valid], expected[valid], atol=TOLERANCE, rtol=0)


def refuses(mask, match, **model):
    model = qwen2(**model)
    before = traces(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with (
            pytest.raises(NotImplementedError, match=match),
            torch.no_grad(),
            capture_attention(model, [1]),
        ):
            model(**given(mask), use_cache=False)
    assert traces(model) == before


# --- what a layout expresses --------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_causal_mask_may_hide_by_any_large_number(hidden):
    assert_own_maps(additive(CAUSAL, hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [-1e4, None])
def test_also_as_16_bits_round_it(dtype, hidden):
    mask = additive(CAUSAL, torch.finfo(dtype).min if hidden is None else hidden, dtype)
    assert masks.unexplained(mask, None, 2, N, mask.device) is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["keys", "rows too", "they see themselves"])
def test_padding(side, kind, chunk):
    valid = padded(side)
    visible = CAUSAL & valid[:, None]
    if kind != "keys":
        visible &= valid[:, :, None]
    if kind == "they see themselves":
        visible |= torch.eye(N, dtype=torch.bool)
    assert_own_maps(additive(visible, -1e9), valid)


def test_packed_sequences(chunk):
    lengths = torch.tensor([[9, 15], [4, 20]])
    segments = torch.stack([torch.arange(2).repeat_interleave(each) for each in lengths])
    visible = CAUSAL & (segments[:, :, None] == segments[:, None])
    assert_own_maps(additive(visible, -1e9), segments=segments)


@pytest.mark.parametrize("window", [None, 3, 7])
def test_segments_that_interleave_and_padding_between_within_a_window(window, chunk):
    generator = torch.Generator().manual_seed(0)
    segments = torch.randint(0, 3, (2, N), generator=generator)
    valid = torch.rand(2, N, generator=generator) > 0.3
    token = torch.arange(N)
    visible = CAUSAL & (segments[:, :, None] == segments[:, None]) & valid[:, None]
    if window is not None:
        visible &= token[:, None] - token < window
    assert_own_maps(additive(visible, -1e9), valid, segments, sliding_window=window)


def test_a_mask_for_all_samples_and_for_more_keys_than_there_are():
    mask = torch.nn.functional.pad(additive(CAUSAL[:1], -1e9), (0, 3), value=-1e9)
    assert masks.unexplained(mask, None, 2, N, mask.device) is None
    assert masks.unexplained(mask.expand(2, 4, N, N + 3), None, 2, N, mask.device) is None
    assert masks.unexplained(CAUSAL[:, None], None, 2, N, mask.device) is None


# --- what it does not ---------------------------------------------------------------------------


def test_a_position_bias_is_refused():
    bias = torch.linspace(-3, 0, N)
    refuses(additive(CAUSAL, -1e9) + bias, "neither 0 nor hide a token.*: a position bias")
    refuses(additive(CAUSAL, -1e9) - 50.0 * torch.eye(N), "a position bias")
    refuses(additive(CAUSAL, -500.0), "a position bias")
    not_a_number = additive(CAUSAL, torch.nan)
    assert "position bias" in masks.unexplained(not_a_number, None, 2, N, bias.device)


def test_a_mask_that_differs_between_heads_is_refused():
    heads = CAUSAL[:, None].repeat(1, 4, 1, 1)
    heads[1, 2, 20, 3] = False
    refuses(additive(heads, -1e9)[:, 0], "differs between heads")


@pytest.mark.parametrize("place", [(9, 1), (12, 12), (23, 22), (23, 0)])
def test_a_hole_is_refused(place, chunk):
    """One pair: a token that does not see itself is no padding if another sees it."""
    visible = CAUSAL.clone()
    visible[1, *place] = False
    if place == (12, 12):
        visible[:, 12, :12] = False
    refuses(additive(visible, -1e9), "hides some earlier tokens from some later ones.*no sliding")


def test_a_key_that_late_tokens_alone_do_not_see_is_refused(chunk):
    visible = CAUSAL.clone()
    visible[:, 10:, 1] = False
    refuses(additive(visible, -1e9), "hides some earlier tokens from some later ones")


def test_tokens_that_do_not_see_themselves_are_refused(chunk):
    refuses(additive(CAUSAL.tril(-1), -1e9), "hides some earlier tokens from some later ones")


@pytest.mark.parametrize("ahead", [1, 2, 20])
def test_seeing_ahead_by_any_distance_is_refused(ahead, chunk):
    visible = CAUSAL.clone()
    visible[1, 0, ahead] = visible[1, 1, 1 + ahead] = True
    refuses(additive(visible, -1e9), "lets tokens see later ones")


def test_a_mask_that_hides_keys_alone_is_refused():
    mask = additive(padded("left")[:, None], -1e9)
    assert "later ones (image" in masks.unexplained(mask, None, 2, N, mask.device)


def test_a_window_that_the_layer_does_not_have_and_one_that_the_mask_has_not_are_refused(chunk):
    token = torch.arange(N)
    visible = CAUSAL & (token[:, None] - token < 5)
    refuses(additive(visible, -1e9), "no sliding window")
    shown = {"sliding_window": 5, "first_sliding_layer": 0}
    refuses(additive(CAUSAL, -1e9), "a sliding window of 5 tokens", **shown)
    assert_own_maps(additive(visible, -1e9), sliding_window=5)


def test_one_mask_for_layers_with_and_without_a_window_is_looked_at_for_both():
    model = qwen2(sliding_window=5, first_sliding_layer=2)
    with (
        pytest.raises(NotImplementedError, match=r"layer 2's .* hides .* of 5 tokens"),
        capture_attention(model, [0, 2]),
    ):
        model(**given(additive(CAUSAL, -1e9)), use_cache=False)


def test_packing_that_positions_tell_and_a_mask_of_large_numbers_does_not_keep_is_refused():
    packed = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, N)
    segments = (torch.arange(N) >= 9).expand(2, N)
    apart = CAUSAL & (segments[:, :, None] == segments[:, None])
    model = qwen2()
    with capture_attention(model, [0]):
        model(**given(additive(apart, -1e4)), position_ids=packed, use_cache=False)
    with pytest.raises(CaptureError, match="position_ids pack"), capture_attention(model, [0]):
        model(**given(additive(CAUSAL, -1e4)), position_ids=packed, use_cache=False)


# --- block masks of flex attention --------------------------------------------------------------


def test_block_masks_are_looked_at_whole(chunk):
    from torch.nn.attention.flex_attention import create_block_mask

    segments = (torch.arange(N) >= 9).long().expand(2, N)

    def fault(rule, window=None):
        mask = create_block_mask(rule, 2, None, N, N, device="cpu")
        return masks.unexplained(mask, window, 2, N, segments.device)

    assert fault(lambda b, h, q, k: q >= k) is None
    assert fault(lambda b, h, q, k: (q >= k) & (segments[b, q] == segments[b, k])) is None
    assert fault(lambda b, h, q, k: (q >= k) & (q - k < 4), window=4) is None
    assert "of 5 tokens" in fault(lambda b, h, q, k: (q >= k) & (q - k < 4), window=5)
    assert "hides" in fault(lambda b, h, q, k: (q >= k) & ~((k == 1) & (q > 9)))
    assert "later ones (image" in fault(lambda b, h, q, k: (q >= k) | ((q == 3) & (k == 5)))


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left"])
def test_one_value_is_read_back_for_all_layers(padding, chunk):
    """As before, when one diagonal was looked at; none where transformers makes no mask."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.split("::")[1]
            assert name not in ("nonzero", "is_nonzero", "masked_select", "equal")
            self.count += name == "_local_scalar_dense"
            return function(*args, **(kwargs or {}))

    with Reads() as reads:
        assert masks.unexplained(None, None, 2, N, ALL.device) is None
    assert reads.count == 0
    mask = CAUSAL[:, None] if padding is None else additive(CAUSAL & padded("left")[:, None], -1e9)
    with Reads() as reads:
        assert masks.unexplained(mask, None, 2, N, mask.device) is None
    assert reads.count == 1


def test_a_mask_is_looked_at_once_a_forward(monkeypatch):
    seen = []
    real = masks.unexplained
    monkeypatch.setattr(
        "drivekd.capture.forward.unexplained", lambda *a: (seen.append(a[1]), real(*a))[1]
    )
    model = qwen2(sliding_window=5, first_sliding_layer=2)
    with torch.no_grad(), capture_attention(model, [0, 1, 2, 3]):
        model(**text_inputs(padding="left"), use_cache=False)
        model(**text_inputs(padding="left"), use_cache=False)
    assert seen == [None, 5] * 2
