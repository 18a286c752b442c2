"""What must hold of a call on a GPU: it waits for nothing, repeats to the bit, is captured."""

import torch


def check_captured(call):
    """The call runs without a synchronisation; it, another one and a graph's replay are equal."""
    first = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(first, second, replayed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def loss_and_gradients(loss, inputs):
    """Without the loss's graph: its nodes belong to this call's stream, which a capture awaits."""
    return loss.detach(), *torch.autograd.grad(loss, inputs)
