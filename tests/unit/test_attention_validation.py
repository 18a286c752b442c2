"""Bad arguments of the attention functions are refused, by name and with a remedy."""

import math

import pytest
import torch

from drivekd.errors import BackendUnavailableError
from drivekd.functional import attention_map, attention_map_loss, layerwise_attention_map_loss
from drivekd.tokens import TokenLayout

B, N = 2, 5


def heads(count=4, dim=8, samples=B, tokens=N, **options):
    return torch.zeros(samples, count, tokens, dim, **options)


def layout(samples=B, tokens=N):
    return TokenLayout.from_masks(torch.zeros(samples, tokens, dtype=torch.bool))


def call(**changes):
    """A legal call of attention_map_loss, but for the changes."""
    arguments = {
        "q_student": heads(),
        "k_student": heads(2),
        "q_teacher": heads(6, 16),
        "k_teacher": heads(3, 16),
        "tokens": layout(),
    }
    return attention_map_loss(**{**arguments, **changes})


def test_the_call_that_the_others_change_is_legal():
    assert call().item() == 0


CASES = {
    "not a tensor": ({"q_student": [[1.0]]}, TypeError, "q_student is a list"),
    "key not a tensor": ({"k_student": None}, TypeError, "k_student is a NoneType"),
    "teacher not a tensor": ({"q_teacher": 3}, TypeError, "q_teacher is a int"),
    "rank 3": ({"q_student": heads()[0]}, ValueError, r"q_student has shape \(4, 5, 8\)"),
    "rank 5": ({"k_teacher": heads(3, 16)[None]}, ValueError, "k_teacher has shape"),
    "integers": ({"q_student": heads(dtype=torch.int64)}, TypeError, "torch.int64"),
    "complex": ({"k_student": heads(2, dtype=torch.complex64)}, TypeError, "complex64"),
    "sparse": ({"q_student": heads().to_sparse()}, TypeError, "strided"),
    "heads no multiple": ({"k_student": heads(3)}, ValueError, "k_student has 3 heads"),
    "more key heads": ({"k_student": heads(8)}, ValueError, "k_student has 8 heads"),
    "head_dim within a model": ({"k_student": heads(2, 16)}, ValueError, "head_dim 8"),
    "dtype within a model": (
        {"k_student": heads(2, dtype=torch.float16)},
        ValueError,
        "float16",
    ),
    "teacher's dtype within": (
        {"k_teacher": heads(3, 16, dtype=torch.float64)},
        ValueError,
        "k_teacher is torch.float64",
    ),
    "device within a model": ({"k_student": heads(2, device="meta")}, ValueError, "on meta"),
    "device across": (
        {"q_teacher": heads(6, 16, device="meta"), "k_teacher": heads(3, 16, device="meta")},
        ValueError,
        "q_teacher is on meta",
    ),
    "key cache": ({"k_student": heads(2, tokens=9)}, ValueError, "use_cache=False"),
    "batch within": ({"k_student": heads(2, samples=1)}, ValueError, "batch"),
    "batch across": (
        {"q_teacher": heads(6, 16, samples=1), "k_teacher": heads(3, 16, samples=1)},
        ValueError,
        "1 samples of 5 tokens",
    ),
    "tokens across": (
        {"q_teacher": heads(6, 16, tokens=7), "k_teacher": heads(3, 16, tokens=7)},
        ValueError,
        "same tokens",
    ),
    "head_dim 257": (
        {"q_student": heads(4, 257), "k_student": heads(2, 257)},
        NotImplementedError,
        "257",
    ),
    "no tokens": ({"q_student": heads(tokens=0)}, ValueError, "at least 1"),
    "no samples": ({"q_student": heads(samples=0)}, ValueError, "at least 1"),
    "no heads": ({"k_student": heads(0)}, ValueError, "at least 1"),
    "no head_dim": ({"k_student": heads(2, 0)}, ValueError, "at least 1"),
    "region": ({"region": "vision"}, ValueError, "'full', 'text_to_vision'"),
    "region kind": ({"region": None}, TypeError, "region is a NoneType"),
    "loss": ({"loss": "mae"}, ValueError, "'mse', 'cosine', 'kl'"),
    "loss kind": ({"loss": torch.nn.MSELoss()}, TypeError, "loss is a MSELoss"),
    "denominator": ({"denominator": "mean"}, ValueError, "'official', 'live'"),
    "causal kind": ({"causal": 1}, TypeError, "causal is a int"),
    "causal tensor": ({"causal": torch.tensor(True)}, TypeError, "causal is a Tensor"),
    "window 0": ({"window": 0}, ValueError, "window is 0"),
    "window negative": ({"window": -4}, ValueError, "window is -4"),
    "window float": ({"window": 4.0}, TypeError, "window is a float"),
    "window bool": ({"window": True}, TypeError, "window is a bool"),
    "window pair": ({"window": (4, 4)}, TypeError, "window is a tuple"),
    "scale 0": ({"scale_student": 0.0}, ValueError, "scale_student is 0.0"),
    "scale negative": ({"scale_teacher": -1.0}, ValueError, "scale_teacher is -1.0"),
    "scale nan": ({"scale_student": math.nan}, ValueError, "scale_student is nan"),
    "scale inf": ({"scale_teacher": math.inf}, ValueError, "scale_teacher is inf"),
    "scale beyond float32": ({"scale_student": 1e300}, ValueError, "scale_student is 1e\\+300"),
    "scale beyond in bits": ({"scale_student": 3e38}, ValueError, "wanted .* at most 2.36e\\+38"),
    "scale of 400 digits": ({"scale_teacher": 10**400}, ValueError, "scale_teacher is 10{400};"),
    "scale of -400": (
        {"scale_teacher": -(10**400)},
        ValueError,
        "scale_teacher is -10{400};",
    ),
    "scale tensor": ({"scale_student": torch.tensor(1.0)}, TypeError, "scale_student is a Tensor"),
    "scale bool": ({"scale_student": True}, TypeError, "scale_student is a bool"),
    "scale text": ({"scale_student": "auto"}, TypeError, "scale_student is a str"),
    "tokens kind": ({"tokens": torch.ones(B, N)}, TypeError, "TokenLayout"),
    "tokens of another length": ({"tokens": layout(B, 4)}, ValueError, "2 samples of 4 tokens"),
    "tokens of another batch": ({"tokens": layout(1, N)}, ValueError, "1 samples of 5 tokens"),
    "tokens elsewhere": ({"tokens": layout().to("meta")}, ValueError, r"tokens.to\(device\)"),
    "region without tokens": (
        {"region": "text_to_vision", "tokens": None},
        ValueError,
        "tokens is None",
    ),
    "weight kind": ({"sample_weight": [1.0, 1.0]}, TypeError, "sample_weight is a list"),
    "weight dtype": ({"sample_weight": torch.ones(B, dtype=torch.int64)}, TypeError, "int64"),
    "weight shape": ({"sample_weight": torch.ones(3)}, ValueError, r"wanted \(B,\)"),
    "weight rank": ({"sample_weight": torch.ones(B, 1)}, ValueError, r"wanted \(B,\)"),
    "weight elsewhere": ({"sample_weight": torch.ones(B, device="meta")}, ValueError, "on meta"),
    "weight with grad": (
        {"sample_weight": torch.ones(B, requires_grad=True)},
        ValueError,
        "sample_weight requires grad",
    ),
    "teacher with grad": (
        {"q_teacher": heads(6, 16, requires_grad=True)},
        ValueError,
        "q_teacher requires grad.*no_grad",
    ),
    "teacher's keys with grad": (
        {"k_teacher": heads(3, 16, requires_grad=True)},
        ValueError,
        "k_teacher requires grad",
    ),
    "lse shape": ({"lse_student": torch.zeros(B, N)}, ValueError, "lse_student has shape"),
    "lse of key heads": ({"lse_teacher": torch.zeros(B, 3, N)}, ValueError, "lse_teacher"),
    "lse dtype": (
        {"lse_student": torch.zeros(B, 4, N, dtype=torch.float16)},
        TypeError,
        "lse_student has dtype",
    ),
    "lse kind": ({"lse_student": 1.0}, TypeError, "lse_student is a float"),
    "lse elsewhere": ({"lse_student": torch.zeros(B, 4, N, device="meta")}, ValueError, "meta"),
    "lse with grad": (
        {"lse_student": torch.zeros(B, 4, N, requires_grad=True)},
        ValueError,
        "lse.detach",
    ),
    "one list, one tensor": ({"q_teacher": [heads(6, 16)]}, TypeError, "two lists"),
    "one tensor, one list": ({"k_teacher": [heads(3, 16)]}, TypeError, "two lists"),
    "lists of different length": (
        {"q_teacher": [heads(6, 16)] * 2, "k_teacher": [heads(3, 16)]},
        ValueError,
        "2 layers but k_teacher has 1",
    ),
    "empty lists": ({"q_teacher": [], "k_teacher": []}, ValueError, "q_teacher is empty"),
    "second teacher wrong": (
        {"q_teacher": [heads(6, 16), heads(5, 16)], "k_teacher": [heads(3, 16)] * 2},
        ValueError,
        r"k_teacher\[1\] has 3 heads but q_teacher\[1\] has 5",
    ),
    "scales for another number": (
        {"q_teacher": [heads(6, 16)], "k_teacher": [heads(3, 16)], "scale_teacher": [1.0, 1.0]},
        ValueError,
        "scale_teacher has 2 entries",
    ),
    "one lse for a list": (
        {
            "q_teacher": [heads(6, 16)] * 2,
            "k_teacher": [heads(3, 16)] * 2,
            "lse_teacher": torch.zeros(B, 6, N),
        },
        TypeError,
        "lse_teacher is one tensor",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "'auto', 'torch', 'triton', 'native'"),
    "backend kind": ({"backend": None}, TypeError, "backend must be a string"),
    "backend that never has it": ({"backend": "native"}, BackendUnavailableError, "native"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_map_loss_refuses(name):
    changes, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call(**changes)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="temperature"):
        call(temperature=2.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": 1}, TypeError, "q is a int"),
        ({"k": heads(3)}, ValueError, "k has 3 heads"),
        ({"tokens": layout(1)}, ValueError, "tokens describes"),
        ({"causal": None}, TypeError, "causal is a NoneType"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"scale": 0}, ValueError, "scale is 0"),
        ({"backend": "x"}, ValueError, "backend is 'x'"),
    ],
)
def test_attention_map_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        attention_map(**{"q": heads(), "k": heads(2), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_layers": heads()}, TypeError, "student_layers is a Tensor"),
        ({"student_layers": []}, ValueError, "student_layers is empty"),
        ({"student_layers": [heads()] * 2}, TypeError, r"student_layers\[0\] is a Tensor"),
        ({"teacher_layers": [(heads(),)]}, ValueError, r"teacher_layers\[0\] has 1 entries"),
        (
            {"teacher_layers": [(heads(), heads()), (heads(), heads(tokens=2))]},
            ValueError,
            r"teacher_layers\[1\]",
        ),
        (
            {"teacher_layers": [(heads(), heads()), (heads(tokens=2), heads(tokens=2))]},
            ValueError,
            r"teacher_layers\[1\]\[0\] has 2 samples of 2 tokens",
        ),
        ({"groups": 3}, TypeError, "groups is a int"),
        ({"groups": [[0]]}, ValueError, "groups has 1 entries but there are 2"),
        ({"groups": [[0], []]}, ValueError, r"groups\[1\] is empty"),
        ({"groups": [0, 1]}, TypeError, r"groups\[0\] is a int"),
        ({"groups": [[0], [2]]}, ValueError, r"groups\[1\] holds 2; wanted indices from 0 to 1"),
        ({"groups": [[0], [-1]]}, ValueError, r"groups\[1\] holds -1"),
        ({"groups": [[0], [True]]}, TypeError, r"groups\[1\] holds a bool"),
        ({"groups": [[0], [1.0]]}, TypeError, r"groups\[1\] holds a float"),
        ({"groups": ["0", "1"]}, TypeError, r"groups\[0\] is a str"),
        ({"reduction": "sum"}, ValueError, "'mean', 'none'"),
        ({"window": [4]}, ValueError, "window has 1 entries"),
        ({"window": [4, 0]}, ValueError, "window is 0"),
        ({"scale_student": [1.0]}, ValueError, "scale_student has 1 entries"),
        ({"scale_teacher": [1.0, -1.0]}, ValueError, r"scale_teacher\[1\] is -1.0"),
        ({"lse_student": torch.zeros(2)}, TypeError, "lse_student is one tensor"),
        ({"lse_student": [None]}, ValueError, "lse_student has 1 entries"),
        ({"lse_teacher": [None, torch.zeros(1)]}, ValueError, r"lse_teacher\[1\] has shape"),
    ],
)
def test_layerwise_refuses(changes, error, message):
    pairs = [(heads(), heads(2))] * 2
    arguments = {"student_layers": pairs, "teacher_layers": pairs, "groups": [[0], [1]]}
    with pytest.raises(error, match=message):
        layerwise_attention_map_loss(**{**arguments, **changes})


@pytest.mark.parametrize("name", ["q_student", "k_teacher", "sample_weight"])
def test_values_are_checked_only_under_debug(name, monkeypatch):
    good = {"q_student": heads(), "k_teacher": heads(3, 16), "sample_weight": torch.ones(B)}[name]
    bad = good.clone()
    bad.view(-1)[-1] = math.nan
    call(**{name: bad})
    monkeypatch.setenv("DRIVEKD_DEBUG", "1")
    call(**{name: good})
    with pytest.raises(ValueError, match=f"{name} is not finite"):
        call(**{name: bad})
