"""Autograd functions, one per differentiable op: what is saved and where gradients go."""
