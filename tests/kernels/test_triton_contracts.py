"""What the triton backend promises beside numbers: memory, no host reads, no recompilation."""

import os
from dataclasses import replace

import pytest
import torch

from drivekd.functional import attention_map_loss, layerwise_attention_map_loss
from drivekd.ops import attention_map as loss_op
from drivekd.ops import dispatch
from drivekd.tokens import TokenLayout
from tests.helpers.host_reads import NoHostRead
from tests.helpers.memory import EXTRA_PART, LiveBytes, extra_bound

pytest.importorskip("triton")
pytest.importorskip("drivekd_kernels.launch")

from drivekd.ops.attention_inputs import (
    AttentionLayer,
    AttentionLayout,
    AttentionMapLossInputs,
    GivenTarget,
)
from drivekd.ops.triton_backend import attention_map as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ["mse", "cosine", "kl"]


@pytest.fixture
def idle(monkeypatch):
    """Kernels are launched, and do nothing: what is left is the work around them."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches = []

    def run(self, *args, grid, warmup=False, **kwargs):
        launches.append((self, args, kwargs, grid))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    return launches


def make_inputs(
    *,
    num_samples=1,
    num_tokens=64,
    dtype=torch.float16,
    loss="mse",
    num_layers=1,
    num_teachers=1,
    num_vision=0,
    padded=False,
    packed=False,
    given=False,
    apart=0,
):
    """One layer of 14 heads or more; rows of queries and keys lie `apart` elements apart."""
    B, N = num_samples, num_tokens

    def layer(heads, kv_heads, dim):
        q, k = (
            torch.empty(B, N, h, dim + apart, dtype=dtype)[..., :dim].transpose(1, 2)
            for h in (heads, kv_heads)
        )
        return AttentionLayer(q, k, dim**-0.5, None)

    is_vision = torch.zeros(B, N, dtype=torch.bool)
    is_vision[:, 3 : 3 + num_vision] = True
    valid = None
    if padded:
        valid = torch.ones(B, N, dtype=torch.bool)
        valid[:, -2:] = False
    segment_ids = (torch.arange(N) * 3 // N).expand(B, N) if packed else None
    tokens = TokenLayout.from_masks(is_vision, valid=valid, segment_ids=segment_ids)
    inside = num_vision > 0
    per_group = num_teachers - num_layers + 1

    def target():
        shape = (B, N - num_vision, num_vision) if inside else (B, N, min(64, N))
        values, exponents = torch.empty(shape, dtype=dtype), torch.zeros(shape[:2]).short()
        if inside:
            return GivenTarget(values, exponents, None, None)
        return GivenTarget(values, exponents, torch.zeros(shape).int(), torch.zeros(B, N))

    return AttentionMapLossInputs(
        student=tuple(layer(14, 2, 64) for _ in range(num_layers)),
        teacher=() if given else tuple(layer(28, 4, 128) for _ in range(num_teachers)),
        given=tuple(target() for _ in range(num_layers)) if given else (),
        groups=tuple(tuple(range(i, i + per_group)) for i in range(num_layers)),
        windows=(None,) * num_layers,
        layout=AttentionLayout(
            batch_size=B,
            num_tokens=N,
            device=torch.device("cpu"),
            causal=True,
            valid=valid,
            segment_ids=segment_ids,
            is_text=tokens.is_text if inside else None,
            is_vision=tokens.is_vision if inside else None,
        ),
        loss=loss,
        needs_dq=(True,) * num_layers,
        needs_dk=(True,) * num_layers,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_vision", [0, 30])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_nothing_is_read_back(idle, loss, num_vision, padded, packed, given):
    inputs = make_inputs(
        num_samples=2, loss=loss, num_vision=num_vision, padded=padded, packed=packed, given=given
    )
    with NoHostRead():
        backend.attention_map_loss(inputs)
    assert {each[0].__name__ for each in idle} >= {"lse_kernel", "dq_kernel", "dk_kernel"}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("given", [False, True])
def test_no_tensor_holds_a_map_and_the_extra_memory_is_small(idle, loss, given):
    """Extra memory against one (H, N, N) float32 tensor of the teacher, at N = 4096.

    A chunk holds up to 9/16 of the cells of T, of W and, but for mse, of P: 4 bytes each a cell, of
    112, which is 1/25 (1/17) of it. The rest is planes of dk: 24 MB here, enough that all
    multiprocessors of an H200 have work (with 8 planes it would be 18 MB and half of them idle).
    """
    inputs = make_inputs(num_tokens=4096, loss=loss, given=given)
    with LiveBytes() as memory:
        _, dq, dk = backend.attention_map_loss(inputs)
    assert memory.largest < 4096 * 4096 * 4
    extra = memory.peak - sum(x.untyped_storage().nbytes() for x in (*dq, *dk))
    assert extra < 28 * 4096 * 4096 * 4 / (18 if loss == "mse" else 13), extra


@pytest.mark.parametrize("num_tokens", sorted(EXTRA_PART))
def test_extra_memory_of_forward_and_backward(idle, num_tokens, monkeypatch):
    """What test_triton_gpu.py measures; there the bound is a promise, here it is arithmetic."""
    entry = dispatch._Entry(backend.attention_map_loss, None, None)  # CPU tensors, not interpreted
    monkeypatch.setitem(dispatch._REGISTRY, ("attention_map_loss", "triton"), entry)
    inputs = make_inputs(num_tokens=num_tokens, dtype=torch.bfloat16)
    monkeypatch.setattr(backend, "_INTERPRETED", False)  # or bfloat16 is refused
    ((q, k),) = [(x.query.requires_grad_(), x.key.requires_grad_()) for x in inputs.student]
    ((q_t, k_t),) = [(x.query, x.key) for x in inputs.teacher]
    bodies = {torch.ops.drivekd.attention_map_loss.default: loss_op.attention_map_loss._init_fn}
    with LiveBytes(bodies) as memory:
        loss = attention_map_loss(q, k, q_t, k_t, backend="triton")
        idle.clear()  # it keeps workspaces alive
        grads = torch.autograd.grad(loss, (q, k))
    results = sum(x.untyped_storage().nbytes() for x in (loss, *grads))
    extra = memory.peak - results
    assert 0.5 * extra_bound(num_tokens) < extra <= 0.98 * extra_bound(num_tokens), extra


def test_teacher_maps_of_overlapping_groups_are_made_once_and_their_room_is_reused(idle):
    inputs = make_inputs(num_layers=4, num_teachers=6)
    backend.attention_map_loss(inputs)
    names = [each[0].__name__ for each in idle]
    assert names.count("map_kernel") == 6  # one chunk
    assert names.count("spans_kernel") == 1  # of all four layers
    targets = {args[3].data_ptr() for kernel, args, _, _ in idle if kernel.__name__ == "map_kernel"}
    assert len(targets) == 3  # as many as one group has members


def test_more_maps_at_once_than_two_words_name_are_refused(idle):
    with pytest.raises(NotImplementedError, match="63 teacher maps"):
        backend.attention_map_loss(make_inputs(num_tokens=4, num_teachers=63))


def test_gradients_that_nobody_wants_are_not_computed(idle):
    inputs = replace(make_inputs(), needs_dq=(False,), needs_dk=(False,))
    _, dq, dk = backend.attention_map_loss(inputs)
    assert dq == [None] and dk == [None]
    launched = {each[0].__name__ for each in idle} - {"tokens_kernel"}
    assert launched == {"lse_kernel", "map_kernel", "mse_kernel"}


@pytest.mark.parametrize("num_vision", [0, 3000])
def test_making_targets_holds_a_chunk_of_maps(idle, num_vision):
    """Of a full map also a chunk's mean, and that without its largest cells."""
    inputs = replace(
        make_inputs(num_tokens=4096, num_teachers=2, num_vision=num_vision),
        student=(), needs_dq=(), needs_dk=(),
    )  # fmt: skip
    with LiveBytes() as memory:
        backend.attention_map_targets(inputs, None if num_vision else 64)
    assert memory.largest < 2 * 4096 * 4096 * 4  # one workspace of two maps
    kept = 1096 * 3000 * 4 if num_vision else 0
    assert memory.peak - kept < 28 * 4096 * 4096 * 4 / 10, memory.peak


@pytest.mark.parametrize("num_vision", [0, 30])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_given_target_costs_one_launch_where_a_teacher_costs_its_maps(idle, loss, num_vision):
    """And it is read where it lies: nothing of its size is made."""
    names = {}
    for given in (False, True):
        inputs = make_inputs(loss=loss, num_vision=num_vision, given=given)
        names[given] = launched(idle, lambda x=inputs: backend.attention_map_loss(x))
    reader = "rectangle_kernel" if num_vision else "largest_kernel"
    live = list(names[False])
    live.remove("lse_kernel")  # the teacher's
    live[live.index("map_kernel")] = reader
    assert sorted(names[True]) == sorted(live)
    (place,) = (i for i, each in enumerate(idle) if each[0].__name__ == reader)
    kernel, arguments, *_ = idle[place]
    passed = dict(zip(kernel.arg_names, arguments, strict=False))
    (target,) = inputs.given
    assert passed["values_ptr"] is target.values
    assert passed.get("indices_ptr") is target.indices


def launched(idle, call):
    """Names of the kernels that a call launches, in order."""
    idle.clear()
    call()
    return [each[0].__name__ for each in idle]


def public(needed="qk", *, loss="mse", num_layers=2, **settings):
    """A call of the public function with two layers, the second of which needs no gradient."""
    B, N = 2, 40

    def heads(count, dim, grad):
        made = torch.randn(B, N, count, dim, dtype=torch.float16, device=DEVICE).transpose(1, 2)
        return made.requires_grad_(grad)

    student = [
        (heads(4, 16, "q" in needed and i == 0), heads(2, 16, "k" in needed and i == 0))
        for i in range(num_layers)
    ]
    teacher = [(heads(2, 32, False), heads(2, 32, False))]
    is_vision = torch.zeros(B, N, dtype=torch.bool)
    is_vision[:, :9] = True
    return layerwise_attention_map_loss(
        student, teacher, [[0]] * num_layers, TokenLayout.from_masks(is_vision).to(DEVICE),
        loss=loss, backend="triton", **settings,
    )  # fmt: skip


GRADIENT_KERNELS = {"delta_kernel", "dq_kernel", "dk_kernel", "spans_kernel"}
needs_launches = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="backend='triton' takes CPU tensors only with TRITON_INTERPRET=1",
)


@needs_launches
@pytest.mark.parametrize("loss", LOSSES)
def test_only_what_needs_a_gradient_gets_one(idle, loss):
    both = launched(idle, lambda: public("qk", loss=loss))
    assert both.count("dq_kernel") == both.count("dk_kernel") == 1  # the other layer has none
    for needed, missing in (("q", {"dk_kernel", "spans_kernel"}), ("k", {"dq_kernel"})):
        names = launched(idle, lambda needed=needed: public(needed, loss=loss))
        assert not missing & set(names), needed
        assert set(both) - set(names) <= missing
    names = launched(idle, lambda: public("", loss=loss))
    assert not GRADIENT_KERNELS & set(names)
    with torch.no_grad():
        assert launched(idle, lambda: public("qk", loss=loss)) == names


@needs_launches
def test_each_student_layer_costs_a_gradient_pass_and_no_more(idle):
    """Of two layers only the first needs gradients: the second one's W is not written either."""
    names = launched(idle, public)
    passed = [dict(zip(each[0].arg_names, each[1], strict=False)) for each in idle]
    with_w = [
        arguments["w_ptr"] is not None
        for name, arguments in zip(names, passed, strict=True)
        if name == "mse_kernel"
    ]
    assert names.count("mse_kernel") == 2
    assert with_w == [True, False]


@needs_launches
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", ["full", "text_to_vision"])
def test_reduction_weights_and_denominators_launch_nothing_extra(idle, loss, region):
    plain = launched(idle, lambda: public(loss=loss, region=region))
    for settings in (
        {"reduction": "none"},
        {"sample_weight": torch.tensor([0.5, 2.0], device=DEVICE)},
        {"denominator": "live"},
    ):
        assert launched(idle, lambda s=settings: public(loss=loss, region=region, **s)) == plain


@needs_launches
def test_a_given_log_sum_exp_is_not_computed_again(idle):
    B, H_s, H_t, N = 2, 4, 2, 40
    student = [torch.zeros(B, H_s, N, device=DEVICE), None]
    teacher = [torch.zeros(B, H_t, N, device=DEVICE)]
    assert launched(idle, public).count("lse_kernel") == 3
    assert launched(idle, lambda: public(lse_student=student)).count("lse_kernel") == 2
    both = launched(idle, lambda: public(lse_student=student, lse_teacher=teacher))
    assert both.count("lse_kernel") == 1


def test_a_new_length_or_batch_compiles_nothing_new(run_python):
    """Triton's own launcher compiles as often for one N and B as for others, odd ones too.

    It is told that there is an H200, and its compiler gives back kernels that do nothing.
    """
    code = """
import itertools
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from tests.kernels.test_triton_contracts import backend, make_inputs

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

class Nothing:
    function = packed_metadata = None
    launch_metadata = run = staticmethod(lambda *arguments: None)

compiled = []
def compile(self, key, *others):
    compiled.append((self.__name__, key))
    self.device_caches[0][0][key] = Nothing()
    return Nothing()

triton.runtime.driver.set_active(Driver())
JITFunction._do_compile = compile
shapes = [(1, 64), (2, 333), (3, 1024), (1, 1), (16, 47), (1, 4111)]
shapes += [(1, N) for N in range(1000, 1101, 5)]
for loss, vision, apart, given in itertools.product(
    ("mse", "cosine", "kl"), (0, 17), (0, 3), (False, True)
):
    counts = []
    for B, N in shapes:
        if N < 4 and vision:
            continue
        backend.attention_map_loss(make_inputs(
            num_samples=B, num_tokens=N, loss=loss, num_vision=vision, padded=bool(vision),
            apart=apart, given=given))
        counts.append(len(compiled))
    assert len(set(counts)) == 1, (loss, vision, apart, given, counts)
print(len(compiled))
"""
    assert 20 < int(run_python(code, TRITON_INTERPRET="0")) < 100
