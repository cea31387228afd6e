"""How a generated program stores a kernel, and what it does to it before it is used.

A preparation is given the kernel that it has to leave, and returns the kernel that it needs together with
the step from the one to the other, or None where it has no place. A storage is given the kernel that it has
to supply, and returns what makes it of the parameters.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from program_parts import PREPARATIONS, STORAGES, Builder, Kernel, part

Prepared = tuple[Kernel, Any] | None


def along(kernel: Kernel, axis: int, vector: Any) -> Any:
    """A vector, shaped so that it multiplies a kernel along one axis."""
    return vector.reshape([-1 if n == axis else 1 for n in range(len(kernel.shape))])


def cut(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(start, stop))


# Preparations that leave every axis what it is.


def entry_by_entry(name: str, *, entrywise: bool = True) -> Any:
    """Registers a function of one array, which keeps its shape, as a preparation."""

    def register(step: Any) -> Any:
        part(PREPARATIONS, name, entrywise=entrywise)(lambda b, kernel: (kernel, lambda v, w: step(w)))
        return step

    return register


@jax.custom_jvp
def with_own_tangent(w):
    return w * 1.0


with_own_tangent.defjvp(lambda primals, tangents: (with_own_tangent(*primals), tangents[0]))


@jax.custom_vjp
def with_own_cotangent(w):
    return w * 1.0


with_own_cotangent.defvjp(lambda w: (with_own_cotangent(w), None), lambda _, g: (g,))

entry_by_entry("scaled")(lambda w: w * 0.7)
entry_by_entry("negated, halved")(lambda w: -w / 2)
entry_by_entry("tanh")(jnp.tanh)
entry_by_entry("jit")(jax.jit(lambda w: w * 3))
entry_by_entry("remat")(jax.checkpoint(lambda w: jnp.sin(w)))
entry_by_entry("custom_jvp")(with_own_tangent)
entry_by_entry("custom_vjp")(with_own_cotangent)
entry_by_entry("bfloat16")(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32))
entry_by_entry("reduce_precision")(lambda w: lax.reduce_precision(w, 8, 10))
entry_by_entry("optimization_barrier")(lambda w: lax.optimization_barrier(w))
entry_by_entry("real part")(lambda w: (w * (1 + 2j)).real)
entry_by_entry("fori_loop")(lambda w: lax.fori_loop(0, 3, lambda _, u: u * 0.9, w))
entry_by_entry("while_loop", entrywise=False)(
    lambda w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.9), (0, w))[1]
)
entry_by_entry("straight through")(lambda w: w + lax.stop_gradient(jnp.round(w * 8) / 8 - w))
entry_by_entry("ravel and reshape")(lambda w: w.ravel().reshape(w.shape))
entry_by_entry("transposed twice")(lambda w: w.T.T)
entry_by_entry("lax.map")(lambda w: lax.map(lambda u: u * 2, w))
entry_by_entry("vmap")(lambda w: jax.vmap(jnp.sin)(w))
entry_by_entry("norm of all", entrywise=False)(lambda w: w / jnp.linalg.norm(w))
entry_by_entry("lax.map of norms", entrywise=False)(
    lambda w: lax.map(lambda u: u / jnp.sqrt(jnp.sum(u**2)), w)
)
entry_by_entry("fake quantization", entrywise=False)(
    lambda w: w + lax.stop_gradient(jnp.round(w / jnp.abs(w).max() * 127) * jnp.abs(w).max() / 127 - w)
)
entry_by_entry("pruned by size", entrywise=False)(lambda w: w * (jnp.abs(w) > jnp.mean(jnp.abs(w))))


@part(PREPARATIONS, "weight norm")
def weight_norm(b: Builder, kernel: Kernel) -> Prepared:
    axes = tuple(kernel.axes("i"))
    return kernel, lambda v, w: w / jnp.sqrt(jnp.sum(w**2, axes, keepdims=True) + 1e-6)


@part(PREPARATIONS, "weight norm with a gain")
def weight_norm_with_gain(b: Builder, kernel: Kernel) -> Prepared:
    outs = kernel.axes("o")
    if not outs or kernel.is_mixed:
        return None
    axis, axes = b.random.choice(outs), tuple(kernel.axes("i"))
    gain = b.alone(kernel.shape[axis])
    return (
        kernel,
        lambda v, w: w / jnp.sqrt(jnp.sum(w**2, axes, keepdims=True)) * along(kernel, axis, v[gain]),
    )


def matrix_norm_axes(kernel: Kernel) -> tuple[int, int] | None:
    return (0, 1) if kernel.roles in ("io", "oi") else None


@part(PREPARATIONS, "spectral norm")
def spectral_norm(b: Builder, kernel: Kernel) -> Prepared:
    if matrix_norm_axes(kernel) is None:
        return None
    u, stopped = b.floats(1, kernel.shape[1]), b.chance(0.5)

    def step(v, w):
        left = v[u] @ w.T
        left = left / jnp.linalg.norm(left)
        right = left @ w
        right = right / jnp.linalg.norm(right)
        if stopped:
            left, right = lax.stop_gradient((left, right))
        return w / (left @ w @ right.T)[0, 0]

    return kernel, step


@part(PREPARATIONS, "standardized")
def standardized(b: Builder, kernel: Kernel) -> Prepared:
    axes = tuple(kernel.axes("i")) if b.chance(0.7) else None
    return kernel, lambda v, w: (w - w.mean(axes, keepdims=True)) / (w.std(axes, keepdims=True) + 1e-3)


@part(PREPARATIONS, "masked by a constant")
def masked_by_constant(b: Builder, kernel: Kernel) -> Prepared:
    mask = np.float32([b.chance(0.8) for _ in range(math.prod(kernel.shape))]).reshape(kernel.shape)
    if b.chance(0.5):
        return kernel, lambda v, w: jnp.where(mask > 0, w, 0.0)
    return kernel, lambda v, w: w * mask


@part(PREPARATIONS, "masked by jnp.tril")
def lower_triangle(b: Builder, kernel: Kernel) -> Prepared:
    if len(kernel.shape) != 2 or min(kernel.shape) < 2:
        return None
    return kernel, lambda v, w: jnp.tril(w)


@part(PREPARATIONS, "masked by an argument")
def masked_by_argument(b: Builder, kernel: Kernel) -> Prepared:
    mask = b.floats(*kernel.shape)
    return kernel, lambda v, w: w * v[mask]


@part(PREPARATIONS, "dropped weights")
def dropped(b: Builder, kernel: Kernel) -> Prepared:
    key = b.key()
    return kernel, lambda v, w: w * jax.random.bernoulli(v[key], 0.8, w.shape)


@part(PREPARATIONS, "noise added")
def noisy(b: Builder, kernel: Kernel) -> Prepared:
    key = b.key()
    return kernel, lambda v, w: w + 0.1 * jax.random.normal(v[key], w.shape)


@part(PREPARATIONS, "constant added", entrywise=True)
def shifted(b: Builder, kernel: Kernel) -> Prepared:
    constant = b.constant(*kernel.shape)
    return kernel, lambda v, w: w + constant


@part(PREPARATIONS, "scaled by an argument")
def scaled_by_argument(b: Builder, kernel: Kernel) -> Prepared:
    scale = b.floats()
    return kernel, lambda v, w: w * v[scale]


@part(PREPARATIONS, "scaled by another network")
def hypernetwork(b: Builder, kernel: Kernel) -> Prepared:
    axis, size = b.random.choice(kernel.axes("io")), b.size()
    style = b.floats(size)
    weight = b.parameter(Kernel((size, kernel.shape[axis]), "io"))
    return kernel, lambda v, w: w * along(kernel, axis, 1 + v[style] @ v[weight])


@part(PREPARATIONS, "cond")
def conditional(b: Builder, kernel: Kernel) -> Prepared:
    flag = b.flag()
    return kernel, lambda v, w: lax.cond(v[flag], lambda: w, lambda: 2 * w)


# Preparations that move entries.


@part(PREPARATIONS, "transposed", entrywise=True)
def transposed(b: Builder, kernel: Kernel) -> Prepared:
    order = list(range(len(kernel.shape)))
    b.random.shuffle(order)
    back = np.argsort(order)
    before = kernel.replace(
        shape=tuple(kernel.shape[n] for n in order), roles="".join(kernel.roles[n] for n in order)
    )
    return before, lambda v, w: w.transpose(back)


@part(PREPARATIONS, "axis split", entrywise=True)
def split_axis(b: Builder, kernel: Kernel) -> Prepared:
    """Two neighbours of one role are one axis before."""
    pairs = [n for n in range(len(kernel.shape) - 1) if kernel.roles[n] == kernel.roles[n + 1]]
    if not pairs:
        return None
    axis = b.random.choice(pairs)
    before = kernel.without(axis).resized(axis, kernel.shape[axis] * kernel.shape[axis + 1])
    return before, lambda v, w: w.reshape(kernel.shape)


@part(PREPARATIONS, "axes joined", entrywise=True)
def join_axes(b: Builder, kernel: Kernel) -> Prepared:
    """An axis is two neighbours before."""
    axes = [axis for axis in kernel.axes() if kernel.shape[axis] in (4, 6, 8)]
    if not axes or len(kernel.shape) > 4:
        return None
    axis = b.random.choice(axes)
    before = kernel.replace(
        shape=(*kernel.shape[:axis], 2, kernel.shape[axis] // 2, *kernel.shape[axis + 1 :]),
        roles=kernel.roles[:axis] + kernel.roles[axis] + kernel.roles[axis:],
    )
    return before, lambda v, w: w.reshape(kernel.shape)


@part(PREPARATIONS, "flipped", entrywise=True)
def flipped(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    return kernel, lambda v, w: jnp.flip(w, axis)


@part(PREPARATIONS, "rolled", entrywise=True)
def rolled(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    return kernel, lambda v, w: jnp.roll(w, 1, axis)


@part(PREPARATIONS, "permuted by a constant", entrywise=True)
def permuted(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    order = list(range(kernel.shape[axis]))
    b.random.shuffle(order)
    b.needs_arguments = True
    index = np.array(order)
    if b.chance(0.5):
        return kernel, lambda v, w: jnp.take(w, index, axis)
    return kernel, lambda v, w: w[(*[slice(None)] * axis, index)]


@part(PREPARATIONS, "repeated by a constant index", entrywise=True)
def repeated(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("obs" if b.entrywise else "iobs", 3)
    if not axes or not kernel.has_axes:
        return None
    axis = b.random.choice(axes)
    size = kernel.shape[axis] - 1
    index = np.array([*range(size), b.random.randrange(size)])
    b.needs_arguments = True
    return kernel.resized(axis, size), lambda v, w: jnp.take(w, index, axis)


@part(PREPARATIONS, "padded", entrywise=True)
def padded(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("io", 4)
    if not axes:
        return None
    axis = b.random.choice(axes)
    widths = [(0, 1) if n == axis else (0, 0) for n in range(len(kernel.shape))]
    return kernel.resized(axis, kernel.shape[axis] - 1), lambda v, w: jnp.pad(w, widths)


@part(PREPARATIONS, "outputs tiled", entrywise=True)
def tiled(b: Builder, kernel: Kernel) -> Prepared:
    axes = [axis for axis in kernel.axes("o", 2) if kernel.shape[axis] % 2 == 0]
    if not axes:
        return None
    axis = b.random.choice(axes)
    counts = [2 if n == axis else 1 for n in range(len(kernel.shape))]
    return kernel.resized(axis, kernel.shape[axis] // 2), lambda v, w: jnp.tile(w, counts)


@part(PREPARATIONS, "part of the outputs", entrywise=True)
def part_of_outputs(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("o")
    if not axes:
        return None
    axis, start = b.random.choice(axes), b.random.choice([0, 1])
    kept = cut(axis, start, start + kernel.shape[axis])
    return kernel.resized(axis, kernel.shape[axis] + 2), lambda v, w: w[kept]


@part(PREPARATIONS, "part of the inputs")
def part_of_inputs(b: Builder, kernel: Kernel) -> Prepared:
    """No axes can say that only these rows are a weight vector."""
    axes = kernel.axes("i", 2)
    if not axes:
        return None
    axis, start = b.random.choice(axes), b.random.choice([0, 1])
    kept = cut(axis, start, start + kernel.shape[axis])
    before = kernel.resized(axis, kernel.shape[axis] + 2).replace(has_axes=False)
    return before, lambda v, w: w[kept]


@part(PREPARATIONS, ".at[].set", entrywise=True)
def first_set(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("io", 4)
    if not axes:
        return None
    axis = b.random.choice(axes)
    return kernel, lambda v, w: w.at[cut(axis, 0, 1)].set(0.0)


@part(PREPARATIONS, ".at[].multiply", entrywise=True)
def first_multiplied(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    return kernel, lambda v, w: w.at[cut(axis, 0, 1)].multiply(2.0)


# Preparations that take a kernel apart and put it together again.


def slices_of(w: Any, axis: int, order: list[int]) -> list[Any]:
    return [lax.index_in_dim(w, n, axis, keepdims=False) for n in order]


@part(PREPARATIONS, "restacked", entrywise=True)
def restacked(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    order = list(range(kernel.shape[axis]))
    return kernel, lambda v, w: jnp.stack(slices_of(w, axis, order), axis)


@part(PREPARATIONS, "restacked, normed")
def restacked_and_normed(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    order = list(range(kernel.shape[axis]))
    return kernel, lambda v, w: jnp.stack(
        [u / jnp.sqrt(jnp.sum(u**2)) for u in slices_of(w, axis, order)], axis
    )


@part(PREPARATIONS, "restacked, permuted", entrywise=True)
def restacked_and_permuted(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    order = list(range(kernel.shape[axis]))
    b.random.shuffle(order)
    return kernel, lambda v, w: jnp.stack(slices_of(w, axis, order), axis)


@part(PREPARATIONS, "restacked, mirrored")
def restacked_and_mirrored(b: Builder, kernel: Kernel) -> Prepared:
    """Of a kernel of which a part is used, the other half may be used as a whole."""
    axes = kernel.axes("iobs", 3)
    if not axes or not kernel.has_axes:
        return None
    axis = b.random.choice(axes)
    half = list(range((kernel.shape[axis] + 1) // 2))
    order = half + half[: kernel.shape[axis] // 2][::-1]
    return kernel.resized(axis, len(half)), lambda v, w: jnp.stack(slices_of(w, axis, order), axis)


@part(PREPARATIONS, "unstacked and stacked", entrywise=True)
def unstacked(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    return kernel, lambda v, w: jnp.stack(jnp.unstack(w, axis=axis), axis)


@part(PREPARATIONS, "concatenated of w[k][None]", entrywise=True)
def concatenated(b: Builder, kernel: Kernel) -> Prepared:
    if b.chance(0.3) and len(kernel.shape) == 2:
        return kernel, lambda v, w: jnp.vstack([w[k] for k in range(len(w))])
    return kernel, lambda v, w: jnp.concatenate([w[k][None] for k in range(len(w))])


@part(PREPARATIONS, "split and concatenated", entrywise=True)
def split_and_concatenated(b: Builder, kernel: Kernel) -> Prepared:
    axis = b.random.choice(kernel.axes())
    return kernel, lambda v, w: jnp.concatenate(jnp.split(w, w.shape[axis], axis), axis)


@part(PREPARATIONS, "beside zeros", entrywise=True)
def beside_zeros(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("io", 4)
    if not axes:
        return None
    # Where the data are made by the function, zeros that it makes may be data.
    b.needs_arguments = True
    axis = b.random.choice(axes)
    shape = kernel.resized(axis, 1).shape

    def step(v, w):
        return jnp.concatenate([w, jnp.zeros(shape)], axis)

    return kernel.resized(axis, kernel.shape[axis] - 1), step


@part(PREPARATIONS, "joined to another kernel", entrywise=True)
def joined(b: Builder, kernel: Kernel) -> Prepared:
    """Along the inputs as well: each of the two has its own part of every weight vector."""
    axes = kernel.axes("iobs", 2)
    if not axes or not kernel.has_axes:
        return None
    axis = b.random.choice(axes)
    size = b.random.randrange(1, kernel.shape[axis])
    other = b.parameter(kernel.resized(axis, size))
    first = b.chance(0.5)

    def step(v, w):
        return jnp.concatenate([w, v[other]] if first else [v[other], w], axis)

    return kernel.resized(axis, kernel.shape[axis] - size), step


# Preparations with constant matrices, and with corrections.


def times_matrix(w: Any, matrix: Any, axis: int) -> Any:
    return jnp.moveaxis(jnp.moveaxis(w, axis, -1) @ matrix, -1, axis)


@part(PREPARATIONS, "constant matrix on the outputs")
def matrix_on_outputs(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("ob")
    if not axes:
        return None
    axis, size = b.random.choice(axes), b.size()
    matrix = b.constant(size, kernel.shape[axis])
    return kernel.resized(axis, size).replace(is_mixed=True), lambda v, w: times_matrix(w, matrix, axis)


@part(PREPARATIONS, "constant matrix on the inputs")
def matrix_on_inputs(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("i", 2)
    if not axes:
        return None
    axis, size = b.random.choice(axes), b.size()
    matrix = b.constant(size, kernel.shape[axis])
    return kernel.resized(axis, size), lambda v, w: times_matrix(w, matrix, axis)


@part(PREPARATIONS, "Hadamard matrix made inside")
def hadamard(b: Builder, kernel: Kernel) -> Prepared:
    axes = kernel.axes("io", 2)
    if not axes:
        return None
    axis = b.random.choice(axes)
    size = kernel.shape[axis]
    b.needs_arguments = True
    mixed = kernel.is_mixed or kernel.roles[axis] == "o"
    return kernel.replace(is_mixed=mixed), lambda v, w: times_matrix(
        w, jnp.ones((size, size)) - 2 * jnp.eye(size), axis
    )


def low_rank(b: Builder, kernel: Kernel) -> tuple[str, str]:
    rank = b.random.choice([2, 3])
    down = b.parameter(Kernel((kernel.shape[0], rank), "io"))
    return down, b.parameter(Kernel((rank, kernel.shape[1]), "io"))


@part(PREPARATIONS, "low-rank correction")
def lora(b: Builder, kernel: Kernel) -> Prepared:
    if kernel.roles != "io" or not kernel.has_axes or min(kernel.shape) < 2:
        return None
    down, up = low_rank(b, kernel)
    scale = b.random.choice([1.0, 0.5])
    return kernel, lambda v, w: w + scale * (v[down] @ v[up])


# Storages.


@part(STORAGES, "a parameter", entrywise=True)
def own(b: Builder, kernel: Kernel) -> Any:
    name = b.parameter(kernel)
    return lambda v: v[name]


@part(STORAGES, "one of a stack", entrywise=True)
def stacked(b: Builder, kernel: Kernel) -> Any:
    count = b.random.choice([2, 3])
    axis = b.random.choice([0, 0, len(kernel.shape)])
    chosen = b.random.randrange(count)
    name = b.parameter(
        kernel.replace(
            shape=(*kernel.shape[:axis], count, *kernel.shape[axis:]),
            roles=kernel.roles[:axis] + "b" + kernel.roles[axis:],
        )
    )
    if b.chance(0.3):
        return lambda v: lax.dynamic_index_in_dim(v[name], chosen, axis, keepdims=False)
    return lambda v: v[name][(*[slice(None)] * axis, chosen)]


@part(STORAGES, "one vector", entrywise=True)
def flat(b: Builder, kernel: Kernel) -> Any:
    """Only where all axes are inputs is the vector one."""
    wide = [axis for axis in kernel.axes() if kernel.shape[axis] > 1]
    only_inputs = all(kernel.roles[axis] == "i" for axis in wide)
    name = b.parameter(Kernel((math.prod(kernel.shape),), "i", kernel.has_axes and only_inputs))
    return lambda v: v[name].reshape(kernel.shape)


@part(STORAGES, "slices", entrywise=True)
def slices(b: Builder, kernel: Kernel) -> Any:
    """Each slice is a parameter; of a kernel that is used in part, one may be used as a whole."""
    if not kernel.has_axes:
        return own(b, kernel)
    axis = b.random.choice(kernel.axes())
    names = [b.parameter(kernel.without(axis)) for _ in range(kernel.shape[axis])]
    return lambda v: jnp.stack([v[name] for name in names], axis)


@part(STORAGES, "fused along the outputs", entrywise=True)
def fused(b: Builder, kernel: Kernel) -> Any:
    outs = kernel.axes("o")
    if not outs:
        return own(b, kernel)
    axis = b.random.choice(outs)
    size, extra = kernel.shape[axis], b.size()
    name = b.parameter(kernel.resized(axis, size + extra))
    return lambda v: jnp.split(v[name], [size], axis)[0]


@part(STORAGES, "with ones as axes", entrywise=True)
def with_ones(b: Builder, kernel: Kernel) -> Any:
    axis = b.random.randrange(len(kernel.shape) + 1)
    name = b.parameter(
        kernel.replace(
            shape=(*kernel.shape[:axis], 1, *kernel.shape[axis:]),
            roles=kernel.roles[:axis] + "o" + kernel.roles[axis:],
        )
    )
    return lambda v: jnp.squeeze(v[name], axis)
