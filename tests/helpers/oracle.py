"""Gradient centralization and adaptive clipping in float64 NumPy, as the papers define them."""

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


def clip(gradient, weights, clipping, fan_in, eps=1e-3):
    """Brock et al.'s clipping (equation 3 of the paper) of every weight vector, or of all entries as one."""
    gradient, weights = (np.asarray(given).astype(np.float64) for given in (gradient, weights))
    inputs = fan_in or range(gradient.ndim)
    others = [size for axis, size in enumerate(gradient.shape) if axis not in inputs]
    clipped = gradient.copy()
    for index in np.ndindex(*others):
        remaining = iter(index)
        vector = tuple(slice(None) if axis in inputs else next(remaining) for axis in range(gradient.ndim))
        most = clipping * max(np.sqrt(np.sum(weights[vector] ** 2)), eps)
        length = np.sqrt(np.sum(gradient[vector] ** 2))
        if length >= most:
            clipped[vector] = gradient[vector] * (most / max(length, 1e-6))
    return clipped
