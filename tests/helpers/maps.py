"""Maps from captured queries and keys beside those that eager attention returns."""

import torch

# The eager maps are a float32 softmax over float32 scores; ours are float64 on the same q, k.
TOLERANCE = 1e-6


def scores(record, valid, segment_ids=None):
    """(B, H, N, N) scaled scores in float64, -inf where a token does not see another."""
    query, key = record.query.double(), record.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    values = record.scale * query @ key.transpose(-1, -2)
    tokens = torch.arange(query.shape[2])
    distance = tokens[:, None] - tokens[None]
    visible = (distance >= 0)[None] & valid[:, None, :]
    if record.window is not None:
        visible = visible & (distance < record.window)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return values.masked_fill(~visible[:, None], -torch.inf)


def head_mean_map(record, valid, segment_ids=None):
    """(B, N, N) map by a plain softmax: causal, window, padding and segments, in float64."""
    return scores(record, valid, segment_ids).softmax(-1).nan_to_num(0.0).mean(1)


def eager_attentions(model, inputs, **options):
    model.set_attn_implementation("eager")
    return model(**inputs, output_attentions=True, use_cache=False, **options)


def assert_maps_equal(captured, attentions, valid):
    for layer in captured.layers:
        expected = attentions[layer].double().mean(1)
        got = head_mean_map(captured[layer], valid)
        assert expected.max() > 0.9, "the toy maps should be far from uniform"
        torch.testing.assert_close(got[valid], expected[valid], atol=TOLERANCE, rtol=0)


def gradients(model, loss):
    """Gradients of all parameters that have one, by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def map_loss(maps, valid):
    """Unequal weights, so that no gradient cancels within a softmax row."""
    weights = torch.linspace(-1.0, 2.0, maps.numel(), dtype=maps.dtype).view_as(maps)
    return 0.7 * (weights * maps**2)[valid].sum()


def loss_gradients(model, maps, valid):
    return gradients(model, sum(map_loss(m, valid) for m in maps))


def assert_gradients_equal(got, expected, *, more_than=20):
    assert got.keys() == expected.keys()
    assert len(got) > more_than
    for name, grad in expected.items():
        # float32 forwards that sum in another order; relative to each tensor's largest entry.
        atol = 2e-5 * grad.abs().max().item() + 1e-9
        torch.testing.assert_close(
            got[name], grad, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_records(first, second, layers):
    """Whether two captures hold the same queries and keys, to the bit."""
    return all(
        torch.equal(getattr(first[i], name), getattr(second[i], name))
        for i in layers
        for name in ("query", "key")
    )
