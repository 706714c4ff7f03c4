"""Losses: tensors to scalars, over the rows of all processes."""
