"""Kernels that are cut to pieces and put together in any order, against the indices of their entries."""

import itertools
import math
import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import f32

from gc_optax import infer_axes

SHAPES = [(4, 6), (2, 3, 4), (4, 4), (2, 2, 2), (3, 4), (8,)]


def divisors(size):
    return [d for d in range(1, size + 1) if size % d == 0]


def transposed(rng, w):
    axes = rng.sample(range(w.ndim), w.ndim)
    return lambda w: jnp.transpose(w, axes)


def flipped(rng, w):
    axis = rng.randrange(w.ndim)
    return lambda w: jnp.flip(w, axis)


def rolled(rng, w):
    axis = rng.randrange(w.ndim)
    return lambda w: jnp.roll(w, 1, axis)


def reshaped(rng, w):
    first = rng.choice(divisors(w.size))
    second = rng.choice(divisors(w.size // first))
    return lambda w: w.reshape(first, second, -1)


def sliced(rng, w):
    axis = rng.randrange(w.ndim)
    start = rng.randrange(w.shape[axis])
    stop = rng.randrange(start, w.shape[axis]) + 1
    return lambda w: jax.lax.slice_in_dim(w, start, stop, axis=axis)


def taken_apart(rng, w):
    """One by one along an axis, in any order, side by side along any axis or along a new one."""
    axis = rng.randrange(w.ndim)
    order = rng.choices(range(w.shape[axis]), k=w.shape[axis]) if rng.random() < 0.3 else range(w.shape[axis])
    put_together = jnp.stack if w.ndim == 1 or rng.random() < 0.5 else jnp.concatenate
    target = rng.randrange(w.ndim if put_together is jnp.stack else w.ndim - 1)
    return lambda w: put_together([jax.lax.index_in_dim(w, n, axis, False) for n in order], target)


def halved(rng, w):
    """Two halves, side by side along any axis or along a new one."""
    axis, target, order = rng.randrange(w.ndim), rng.randrange(w.ndim), rng.choice([1, -1])
    put_together = rng.choice([jnp.stack, jnp.concatenate])
    return None if w.shape[axis] % 2 else lambda w: put_together(jnp.split(w, 2, axis)[::order], target)


STEPS = [transposed, flipped, rolled, reshaped, sliced, taken_apart, halved]


def rearranged(rng, shape):
    """Steps that rearrange the entries of an array, and the indices of the entries where they put them."""
    indices, steps = jnp.arange(math.prod(shape)).reshape(shape), []
    for _ in range(rng.randrange(1, 5)):
        if step := rng.choice(STEPS)(rng, indices):
            indices = step(indices)
            steps.append(step)
    return steps, np.asarray(indices)


def says(indices, fan_in, shape):
    """Whether what is summed for one output is, for every output, all along these axes and nothing else."""
    for of_one in indices.T:
        summed = set(of_one.tolist())
        places = [np.unravel_index(entry, shape) for entry in summed]
        others = [axis for axis in range(len(shape)) if axis not in fan_in]
        vectors = {tuple(place[axis] for axis in others) for place in places}
        if len(vectors) != 1 or len(summed) != math.prod(shape[axis] for axis in fan_in):
            return False
    return True


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(50, 400, 50))]
)
def test_kernels_that_are_put_together_from_pieces(seed):
    for number in range(seed, seed + 50):
        rng = random.Random(number)
        shape = rng.choice(SHAPES)
        steps, indices = rearranged(rng, shape)
        inputs = indices.shape[: rng.randrange(1, indices.ndim + 1)]
        columns = indices.reshape(math.prod(inputs), -1)

        def product(w, x, steps=steps, inputs=inputs):
            for step in steps:
                w = step(w)
            return jnp.tensordot(x, w, len(inputs))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            axes = infer_axes(product, f32(*shape), f32(3, *inputs))
        several = [axis for axis in range(len(shape)) if shape[axis] > 1]
        truths = [
            fan_in
            for count in range(1, len(several) + 1)
            for fan_in in itertools.combinations(several, count)
            if says(columns, fan_in, shape)
        ]
        answer = tuple(axis for axis in axes.fan_in if shape[axis] > 1)
        assert answer in truths or (not answer and (caught or not truths)), (number, shape, axes, truths)
