"""Gradient centralization in float64 NumPy, written from the paper's projection matrix."""

import numpy as np


def centralize(gradient, fan_in):
    """Applies `P = I - e e^T`, with `e = 1 / sqrt(n)`, to every weight vector (equation 3 of the paper)."""
    gradient = np.asarray(gradient)
    wide = gradient.astype(np.complex128 if np.iscomplexobj(gradient) else np.float64)
    fan_in = tuple(axis % wide.ndim for axis in fan_in)
    inputs_first = np.moveaxis(wide, fan_in, range(len(fan_in)))
    n = int(np.prod(inputs_first.shape[: len(fan_in)]))
    e = np.full((n, 1), 1 / np.sqrt(n))
    projected = (np.eye(n) - e @ e.T) @ inputs_first.reshape(n, -1)
    return np.moveaxis(projected.reshape(inputs_first.shape), range(len(fan_in)), fan_in)
