"""Given targets through the triton backend: the float64 twin, the live teacher, and contracts."""

import os
from dataclasses import dataclass, replace

import pytest
import torch

from drivekd import TokenLayout, backend_info
from drivekd.errors import BackendUnavailableError
from drivekd.functional import (
    attention_map_target_loss,
    attention_map_targets,
    layerwise_attention_map_target_loss,
)
from tests.helpers.attention import Heads, assert_close, make_case, run
from tests.helpers.given import change_parts, make_target, run_given, run_given_twin, whole_map
from tests.helpers.random_attention import Call, draw_call, excess

pytest.importorskip("triton")
pytest.importorskip("drivekd_kernels.launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
HALF = torch.float16
LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
everything = pytest.mark.parametrize(
    ("loss", "region"), [(loss, region) for loss in LOSSES for region in REGIONS]
)

# The interpreter's own: masked cells may be inf - inf, and numpy would have it read scalars anew.
pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def small_case(**settings):
    drawing = {"num_samples": 2, "num_tokens": 45, "dtype": torch.float32, "weighted": True}
    heads = {"student": Heads(2, 1, 16), "teacher": Heads(1, 1, 16), "vision": (0.05, 0.5)}
    return make_case(**{**drawing, **heads, **settings}).but(backend="triton")


def assert_matches_twin(case, target, upstream=1.7):
    actual = run_given(case, target, upstream, DEVICE)
    assert_close(actual, run_given_twin(case, target, upstream), case.dtype)


@everything
@pytest.mark.parametrize(
    ("padding", "segments", "window", "causal"),
    [("left", None, None, True), ("right", 3, None, True), ("left", 2, 5, False),
     (None, 3, 9, True), (None, None, 7, False)],
)  # fmt: skip
def test_padding_packing_and_windows(loss, region, padding, segments, window, causal):
    case = small_case(
        padding=padding, segments=segments, window=window, causal=causal, loss=loss, region=region
    )
    assert_matches_twin(case, make_target(case))


@everything
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 63])
def test_odd_lengths_and_dtypes_of_targets(loss, region, dtype, num_tokens):
    """Float16 students here; the twin reads the target's rounded values."""
    case = make_case(
        num_samples=1, num_tokens=num_tokens, dtype=HALF, student=Heads(3, 1, 16),
        teacher=Heads(2, 1, 24), loss=loss, region=region, backend="triton",
    )  # fmt: skip
    assert_matches_twin(case, make_target(case, dtype), 1.7 * 2**14)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("top_k", [1, None])
def test_more_rows_and_cells_than_a_tile_holds(region, top_k):
    case = small_case(num_samples=1, num_tokens=161, region=region, vision=(0.0, 0.85))
    assert_matches_twin(case, make_target(case, HALF, top_k=top_k))


def test_segments_and_padding_with_gaps():
    """Tokens of one segment need not stand together: how many a row sees is counted, not taken."""
    valid = torch.ones(1, 150, dtype=torch.bool)
    valid[:, 5:9] = valid[:, 70:100] = False
    segment_ids = torch.arange(150)[None] // 11 % 2
    is_vision = (torch.arange(150)[None] % 3 == 0) & valid
    tokens = TokenLayout.from_masks(is_vision, valid=valid, segment_ids=segment_ids)
    for region in REGIONS:
        case = small_case(num_samples=1, num_tokens=150, weighted=False, region=region, loss="kl")
        case = case.with_tokens(tokens)
        assert_matches_twin(case, make_target(case))


@everything
def test_many_chunks(loss, region, monkeypatch):
    from drivekd.ops.triton_backend import chunks

    case = small_case(num_tokens=150, padding="left", loss=loss, region=region)
    for name, value in (("MIN_ROWS", 64), ("CHUNK_BYTES", 1)):
        monkeypatch.setattr(chunks, name, value)
    target = make_target(case)
    assert_matches_twin(case, target)
    made = make_target(case, layers=torch.float32, backend="triton")
    assert_same_map(case, made, target)


@dataclass(frozen=True)
class GivenCall(Call):
    """A random call whose teachers gave their targets before, rounded to some dtype."""

    targets: tuple = ()

    def run(self, backend, device="cpu", *, exact=False):
        leaves = [
            tuple(
                x.to(device).detach().requires_grad_()
                for x in (layer.exact if exact else layer.given)
            )
            for layer in self.student
        ]

        def to(x):
            return None if x is None else x.to(device)

        targets = self.targets
        if exact:
            targets = [
                change_parts(each, lambda name, x: x.double() if x.is_floating_point() else x)
                for each in targets
            ]
        losses = layerwise_attention_map_target_loss(
            leaves,
            [each.to(device) for each in targets],
            self.tokens.to(device),
            reduction="none",
            loss=self.loss,
            denominator=self.denominator,
            causal=self.causal,
            sample_weight=to(self.sample_weight),
            scale_student=[layer.scale for layer in self.student],
            lse_student=None if exact else [
                to(layer.lse(self._seen(window)))
                for layer, window in zip(self.student, self.windows, strict=True)
            ],
            backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(
            (losses * self.upstream.to(losses)).sum(), [x for pair in leaves for x in pair]
        )
        return losses.detach().cpu(), [grad.cpu() for grad in grads]

    def run_twin(self):
        """The torch backend in float64, which tests/unit holds to the twin."""
        return self.run("torch", exact=True)


def draw_given_call(seed):
    call = draw_call(seed, max_tokens=90)
    pick = torch.Generator().manual_seed(seed)
    dtype = (torch.float32, HALF, torch.bfloat16)[int(torch.randint(3, (), generator=pick))]
    top_k = (None, 1, 5, 20)[int(torch.randint(4, (), generator=pick))]
    targets = [
        attention_map_targets(
            [call.teacher[index].exact for index in group],
            [list(range(len(group)))],
            call.tokens,
            region=call.region,
            top_k=top_k if call.region == "full" else None,
            dtype=dtype,
            causal=call.causal,
            window=window,
            scale_teacher=[call.teacher[index].scale for index in group],
        )[0]
        for group, window in zip(call.groups, call.windows, strict=True)
    ]
    return GivenCall(**vars(call), targets=tuple(targets))


# A GPU compiles the kernels of every pair of head counts, head dims and dtypes.
@pytest.mark.parametrize("seed", range(700, 716 if DEVICE == "cpu" else 704))
def test_random_calls_match_the_torch_backend_in_float64(seed):
    call = draw_given_call(seed)
    worst = excess(call, *call.run("triton", DEVICE))
    assert max(worst.values()) <= 1, f"{worst}; {call}"


@everything
def test_a_kept_float32_target_is_the_live_teacher(loss, region):
    """Not to the bit: kept cells are 2^(log2 P - e), and rows of full maps are divided by sums.

    Each is a rounding or two of float32, relative to a cell; so is the loss, which here is far from
    0, and the gradient of a student that is not its teacher.
    """
    case = small_case(padding="left", segments=2, loss=loss, region=region, num_teachers=2)
    target = make_target(case, top_k=None, layers=torch.float32, backend="triton")
    given, live = run_given(case, target, 1.7, DEVICE), run(case, 1.7, DEVICE)
    for got, want in zip(given, live, strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()


def assert_same_map(case, made, wanted, bound=2e-6):
    """Cells to float32, beside the largest of them."""
    assert made.values.shape == wanted.values.shape and made.exponents.dtype == torch.int16
    made = made.to("cpu")
    got, want = whole_map(case, made), whole_map(case, wanted)
    assert (got - want).abs().max() <= bound * want.max()
    if wanted.indices is None:  # rows have their own unit, however small they are
        tops = want.amax(-1)
        assert ((got - want).abs().amax(-1) <= bound * tops).all()
        assert (got > 0).equal(want > 0)
        top = made.values.amax(-1)
        assert ((top >= 0.5 - 1e-6) & (top <= 1 + 1e-6) | (top == 0)).all()


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(
    ("padding", "segments", "window", "causal"),
    [("left", None, None, True), ("right", 3, None, True), (None, 2, 5, False)],
)
def test_targets_are_made_as_the_torch_backend_makes_them(
    region, padding, segments, window, causal
):
    case = small_case(
        padding=padding, segments=segments, window=window, causal=causal, region=region,
        num_teachers=3, num_tokens=150,
    )  # fmt: skip
    case = replace(case, tokens=case.tokens.to("cpu"))
    made = make_target(case, layers=torch.float32, backend="triton")
    assert_same_map(case, made, make_target(case))


@pytest.mark.parametrize("region", REGIONS)
def test_groups_share_their_maps(region):
    case = small_case(num_teachers=4, padding="left")
    groups = [[0, 1], [1, 2, 2], [3], [0, 3]]
    settings = {"region": region, "top_k": 5 if region == "full" else None}
    layers = [tuple(each.float().to(DEVICE) for each in pair) for pair in case.teachers]
    tokens = case.tokens.to(DEVICE)
    together = attention_map_targets(layers, groups, tokens, backend="triton", **settings)
    for group, target in zip(groups, together, strict=True):
        wanted = attention_map_targets(case.teachers, [group], case.tokens, **settings)[0]
        assert_same_map(case, target, wanted)


def test_a_row_that_underflows_keeps_its_unit():
    """A sink takes all but 2^-200 of the attention; rows of the rectangle stay exact."""
    case = small_case(num_samples=1, weighted=False, region="text_to_vision", loss="kl")
    for q, k in (case.student, *case.teachers):
        q[..., 0], k[..., 0], k[:, :, 0] = 24.0, 0.0, 0.0
        k[:, :, 0, 0] = 24.0
    made = make_target(case, layers=torch.float32, backend="triton").to("cpu")
    assert made.exponents[made.values.amax(-1) > 0].max() < -150
    # Scores of 200 and logarithms of that size are rounded to 2^-17.
    assert_same_map(case, made, make_target(case), bound=2**-15)
    actual = run_given(case, made, 1.7, DEVICE)
    assert_close(actual, run_given_twin(case, made), case.dtype, (2e-5, 1e-4, 1e-3))


@everything
def test_what_stands_at_padding_and_behind_a_sample_does_not_matter(loss, region):
    case = small_case(padding="left", num_tokens=24, loss=loss, region=region)
    hidden = ~case.tokens.valid[:, None, :, None]
    target = make_target(case)
    expected = run_given(case, target, 1.7, DEVICE)
    tokens = case.tokens
    if region == "full":
        is_row = tokens.valid
        is_cell = is_row[..., None] & (target.indices >= 0)
    else:
        rows, keys = ((each & tokens.valid).sum(1) for each in (tokens.is_text, tokens.is_vision))
        is_row = torch.arange(target.values.shape[1]) < rows[:, None]
        is_column = torch.arange(target.values.shape[2]) < keys[:, None]
        is_cell = is_row[..., None] & is_column[:, None]
        assert not is_cell.all()

    def spoil(name, part):
        if name in ("indices", "exponents"):
            there = is_row if name == "exponents" else is_row[..., None]
            return part.masked_fill(~there, 30_000)
        return part.masked_fill(~(is_cell if name == "values" else is_row), torch.nan)

    spoilt = case.map_tensors(lambda x: x.masked_fill(hidden, torch.nan))
    actual = run_given(spoilt, change_parts(target, spoil), 1.7, DEVICE)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


@everything
def test_any_memory_order_of_a_target_and_any_integers(loss, region):
    case = small_case(padding="right", loss=loss, region=region)
    target = make_target(case, HALF)
    expected = run_given(case, target, 1.7, DEVICE)

    def moved(name, part):
        if name in ("exponents", "indices"):
            part = part.to(torch.int64 if name == "exponents" else torch.int16)
        wide = part.new_zeros([2 * size + 1 for size in part.shape]).mT
        place = wide[tuple(slice(1, None, 2) for _ in part.shape)].mT
        return place.copy_(part)

    odd = change_parts(target, moved)
    assert not odd.values.is_contiguous() and odd.values.stride(-1) != 1
    for _ in range(2):  # bitwise repeatable, too
        for got, want in zip(run_given(case, odd, 1.7, DEVICE), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("loss", LOSSES)
def test_samples_without_vision_or_text_count_as_in_the_twin(loss):
    case = small_case(num_samples=3, num_tokens=17, loss=loss, region="text_to_vision")
    vision = case.tokens.is_vision.clone()
    vision[0], vision[1] = False, True
    case = case.with_tokens(TokenLayout.from_masks(vision))
    assert_matches_twin(case, make_target(case))
    none = case.with_tokens(TokenLayout.from_masks(torch.zeros_like(vision)))
    target = make_target(none, layers=torch.float32, backend="triton")
    value, dq, dk = run_given(none, target, 1.7, DEVICE)
    assert value == 0 and not dq.any() and not dk.any()


def test_a_given_log_sum_exp_is_used():
    case = small_case(num_samples=1, weighted=False)
    q, k = (each.double() for each in case.student)
    scores = q @ k.repeat_interleave(2, dim=1).mT * q.shape[-1] ** -0.5
    seen = torch.ones(45, 45, dtype=torch.bool).tril()
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(dim=-1).float().to(DEVICE)
    target = make_target(case)
    assert_matches_twin(case.but(lse_student=lse), target)
    wrong, right = (run_given(case.but(lse_student=x), target, 1.7, DEVICE) for x in (lse + 1, lse))
    assert wrong[0] != right[0]


@everything
def test_opcheck(loss, region):
    case = small_case(num_samples=1, num_tokens=12, padding="right", weighted=False, region=region)
    q, k = (each.to(DEVICE, torch.float32) for each in case.student)
    target, tokens = make_target(case, HALF).to(DEVICE), case.tokens.to(DEVICE)
    masks = (tokens.is_text, tokens.is_vision) if region != "full" else (None, None)
    arguments = (
        [q, q], [k, k], [target.values] * 2, [target.exponents] * 2,
        [target.indices] * 2 if region == "full" else [],
        [target.rest] * 2 if region == "full" else [], [None, None], tokens.valid, None, *masks,
        None, [0.5, 0.5], [0, 3], True, loss, "official", [True, False], [True, True], "triton",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.drivekd.attention_map_target_loss.default, arguments)


# torch.compile itself makes an instance of the Function, against torch's own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("region", REGIONS)
def test_compiles_without_a_graph_break(region):
    case = small_case(num_samples=1, num_tokens=12, region=region)
    q, k = (each.to(DEVICE, torch.float32).requires_grad_() for each in case.student)
    target, tokens = make_target(case).to(DEVICE), case.tokens.to(DEVICE)

    def step(q, k):
        return attention_map_target_loss(1.0 * q, k.sin(), target, tokens, backend="triton") * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outputs = []
    for function in (step, compiled):
        value = function(q, k)
        outputs.append((value, *torch.autograd.grad(value, (q, k))))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-12)


def test_float64_is_refused_by_name_and_auto_takes_torch():
    case = small_case(num_samples=1, num_tokens=9)
    q, k = (each.to(DEVICE, torch.float32) for each in case.student)
    for info in (backend_info()[f"attention_map_target{x}"] for x in ("_loss", "s")):
        assert info["triton"] == info["torch"] == "available"
        assert info["native"].endswith("use backend='auto' or 'torch'")
        assert DEVICE == "cpu" or info["auto on cuda"] == "triton"
    double = make_target(case, torch.float64).to(DEVICE)
    with pytest.raises(BackendUnavailableError, match=r"attention_map_target_loss.*float64"):
        attention_map_target_loss(q, k, double, backend="triton")
    assert attention_map_target_loss(q, k, double).dtype == torch.float64
    layers = [tuple(each.double().to(DEVICE) for each in case.teachers[0])]
    with pytest.raises(BackendUnavailableError, match=r"attention_map_targets.*float64"):
        attention_map_targets(layers, [[0]], backend="triton")
