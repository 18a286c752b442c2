"""Operator layer: `torch.library` schemas, fake functions and the choice of a backend."""
