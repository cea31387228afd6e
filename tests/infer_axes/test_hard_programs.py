"""Programs that are hard to read: right, or a warning names the parameter; never silent."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALONE, Case, conv, f32, named
from jax import lax

from gc_optax import infer_axes

batch = f32(5, 4)
sequences = f32(2, 9, 8)
images = f32(2, 9, 9, 4)
rotation = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)


def conv1d(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


def reflected(w):
    """A kernel with its outputs reflected, by a matrix that is computed."""
    size = w.shape[-1]
    return w @ (jnp.ones((size, size)) - 2 * jnp.eye(size))


def normed(w):
    return w / jnp.linalg.norm(w)


def heads_projected(x, w):
    return jnp.einsum("nhd,hde->ne", x, w)


def swapped_first(w):
    return w[np.array([1, 0, 3, 2])]


# Kernels that are taken apart and put together again.

heads, heads_of_data = f32(12, 64, 768), f32(5, 12, 64)
RESTACKED = [
    Case("taps stacked", lambda w, x: conv1d(x, jnp.stack([*w])), f32(3, 8, 16), (sequences,), (0, 1)),
    Case(
        "rows of an image's kernel stacked",
        lambda w, x: conv(x, jnp.stack([*w])),
        f32(3, 3, 4, 16),
        (images,),
        (0, 1, 2),
    ),
    Case(
        "taps mirrored",
        lambda w, x: conv(x, jnp.stack([w[0], w[1], w[0]])),
        f32(2, 3, 4, 16),
        (images,),
        (0, 1, 2),
    ),
    Case(
        "inputs unstacked and stacked",
        lambda w, x: conv(x, jnp.stack(jnp.unstack(w, axis=2), 2)),
        f32(3, 3, 4, 16),
        (images,),
        (0, 1, 2),
    ),
    Case(
        "heads normed one by one",
        lambda w, x: heads_projected(x, jnp.stack([normed(head) for head in w])),
        heads,
        (heads_of_data,),
        (0, 1),
    ),
    Case(
        "heads in a row",
        lambda w, x: heads_projected(x, jnp.concatenate([head[None] for head in w])),
        heads,
        (heads_of_data,),
        (0, 1),
    ),
    Case("rows stacked", lambda w, x: x @ jnp.vstack([*w]), f32(4, 6), (batch,), (0,)),
    Case(
        "rows in a row",
        lambda w, x: x @ jnp.concatenate([w[row : row + 1] for row in range(4)]),
        f32(4, 6),
        (batch,),
        (0,),
    ),
]

# Constant indices.

PERMUTED = [
    Case(
        "channels permuted",
        lambda w, x: conv(x, w[:, :, np.array([1, 0, 3, 2])]),
        f32(3, 3, 4, 16),
        (images,),
        (0, 1, 2),
    ),
    Case(
        "taps repeated",
        lambda w, x: conv(x, w[np.array([0, 1, 0])]),
        f32(2, 3, 4, 16),
        (images,),
        (0, 1, 2),
    ),
    Case(
        "heads permuted",
        lambda w, x: heads_projected(x, swapped_first(w)),
        f32(4, 6, 8),
        (f32(5, 4, 6),),
        (0, 1),
    ),
    Case("outputs permuted", lambda w, x: x @ w[:, np.array([2, 0, 1])], f32(4, 3), (batch,), (0,)),
    Case("inputs permuted", lambda w, x: x @ w[np.array([2, 0, 1, 3])], f32(4, 3), (batch,), (0,)),
]

# A matrix that is computed, on the side of the outputs.


def quarot(p, x):
    return x @ jnp.concatenate([reflected(p[0]), reflected(p[1]), p[2]], -1)


def steerable(w, x):
    """A kernel in four directions, from a basis of filters."""
    basis = np.ones((5, 3, 3), np.float32)
    kernel = jnp.einsum("bhw,bio->hwio", basis, w)
    return conv(x, jnp.concatenate([jnp.rot90(kernel, turns) for turns in range(4)], -1))


def flexible_patches(w, x):
    """Patches of another size than the kernel was trained for."""
    kernel = jax.image.resize(w, (6, 6, 3, 8), "bilinear")
    return conv(x, jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0))))


narrow = f32(4, 3)
COMPUTED = [
    Case("reflected", lambda w, x: x @ reflected(w), narrow, (batch,), (0,)),
    Case(
        "reflected and padded",
        lambda w, x: x @ jnp.pad(reflected(w), ((0, 2), (0, 0))),
        narrow,
        (f32(5, 6),),
        (0,),
    ),
    Case("reflected and rolled", lambda w, x: x @ jnp.roll(reflected(w), 1, 0), narrow, (batch,), (0,)),
    Case("reflected, a row set to zero", lambda w, x: x @ reflected(w).at[0].set(0), narrow, (batch,), (0,)),
    Case("reflected and sorted", lambda w, x: x @ jnp.sort(reflected(w), 0), narrow, (batch,), (0,)),
    Case("reflected, in tanh", lambda w, x: x @ jnp.tanh(reflected(w)), narrow, (batch,), (0,)),
    Case(
        "reflected and stacked",
        lambda p, x: jnp.einsum("ni,hio->nho", x, jnp.stack([reflected(p[0]), reflected(p[1])])),
        [narrow, narrow],
        (batch,),
        [(0,), (0,)],
    ),
    Case("some of a row reflected", quarot, [f32(4, 4)] * 3, (batch,), [(0,)] * 3),
    Case("steerable", steerable, f32(5, 4, 8), (images,), (0, 1)),
    Case("patches resized", flexible_patches, f32(4, 4, 3, 8), (f32(2, 14, 14, 3),), (0, 1, 2)),
]

# A matrix that is closed over, on the side of the outputs.


def carried(w, x):
    def step(carry, _):
        kernel, _ = carry
        return (kernel, jnp.tanh(x @ kernel)), None

    return lax.scan(step, (w @ rotation, jnp.zeros((5, 3))), length=2)[0][1]


CLOSED_OVER = [
    Case(
        "rotated, a product and a sum",
        lambda w, x: jnp.sum((w @ rotation)[None] * x[:, :, None], 1),
        narrow,
        (batch,),
        (0,),
    ),
    Case("rotated, in tanh", lambda w, x: x @ jnp.tanh(w @ rotation), narrow, (batch,), (0,)),
    Case(
        "rotated, a real part",
        lambda w, x: jnp.abs(x @ lax.complex(w @ rotation, w)),
        narrow,
        (batch,),
        (0,),
    ),
    Case("rotated and carried along", carried, narrow, (batch,), (0,)),
]

# Products entry by entry that are added up.

SUMMED = [
    Case("a product and a sum", lambda w, x: jnp.sum(x * w, 1), f32(4, 5), (f32(3, 4, 5),), (0,)),
    Case(
        "rolled taps",
        lambda w, x: sum(jnp.roll(x, tap, 1) * w[tap] for tap in range(4)),
        f32(4, 5),
        (f32(3, 9, 5),),
        (0,),
    ),
    Case(
        "columns times rows",
        lambda w, x: sum(x[:, k, None] * w[k] for k in range(4)),
        f32(4, 5),
        (batch,),
        (0,),
    ),
]

PROGRAMS = [*RESTACKED, *PERMUTED, *COMPUTED, *CLOSED_OVER, *SUMMED]
# What is read today. A program that can be read from now on is to be added.
RIGHT = {
    "taps stacked",
    "rows of an image's kernel stacked",
    "taps mirrored",
    "inputs unstacked and stacked",
    "heads normed one by one",
    "heads in a row",
    "rows stacked",
    "rows in a row",
    "channels permuted",
    "taps repeated",
    "heads permuted",
    "outputs permuted",
    "inputs permuted",
    "a product and a sum",
    "rolled taps",
    "columns times rows",
}


def read(case):
    """The fan-in of each parameter, those with a true one, and what the warning says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        axes = infer_axes(case.fn, case.params, *case.args)
    places = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: hasattr(leaf, "why"))
    truths = case.fan_in if isinstance(case.fan_in, list) else [case.fan_in]
    said = "".join(str(warning.message) for warning in caught)
    return [(path, leaf.fan_in, truth) for (path, leaf), truth in zip(places, truths, strict=True)], said


@pytest.mark.parametrize("case", PROGRAMS, ids=named)
def test_an_answer_is_right_or_a_warning_names_the_parameter(case):
    leaves, said = read(case)
    is_read = all(fan_in == truth for _, fan_in, truth in leaves)
    for path, fan_in, truth in leaves:
        assert fan_in == truth or (fan_in == ALONE and jax.tree_util.keystr(path) in said)
    assert is_read == (case.name in RIGHT)


def test_each_program_has_a_name_of_its_own_and_what_is_right_is_among_them():
    names = [case.name for case in PROGRAMS]
    assert len(names) == len(set(names)) == 30
    assert set(names) >= RIGHT
