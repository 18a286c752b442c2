"""A small student with four losses in conflict that reach different parameters."""

import torch
from torch import nn

NAMES = ("ce", "perception", "reasoning", "planning")
WEIGHTS = {"ce": 1.0, "perception": 0.7, "reasoning": 2.0, "planning": 0.3}


class Student(nn.Module):
    """Two layers and two heads, so that losses reach different parameters."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.second = nn.Linear(7, 7, dtype=dtype)
        self.head = nn.Linear(7, 3, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(4, dtype=dtype))

    def losses(self, seed=1):
        """Four losses in conflict: a shallow one, two through both layers, and one of all."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 5, generator=generator).to(self.first.weight.dtype)
        shallow = self.first(x).tanh()
        deep = self.second(shallow).tanh()
        return {
            "ce": self.head(deep).square().mean() + deep.mean(),
            "perception": (1.5 - shallow).square().mean(),
            "reasoning": (0.5 + deep).square().mean(),
            "planning": (0.3 - deep).abs().mean(),
        }


def student(dtype=torch.float64):
    torch.manual_seed(3)
    return Student(dtype)


def grads_of(model):
    return [parameter.grad for parameter in model.parameters()]


class Recorded:
    """A reweighting that records what it was told."""

    def __init__(self):
        self.calls = []
        self.observed = []

    def observe(self, losses):
        self.observed.append(losses)

    def weights(self, names, norms, anchor):
        self.calls.append((names, norms, anchor))
        return torch.tensor([WEIGHTS[name] for name in names], dtype=torch.float64)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
