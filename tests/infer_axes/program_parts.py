"""What a generated program is put together with: the registry of its parts, and the builder that draws them.

A program is a function of parameters and of arguments that is put together at random, and the fan-in of
every parameter is known because the parts say what each axis is for. The truth never comes from reading the
program: `x @ w` is written down as `w` with the roles "io", and a part that transposes `w` beforehand
transposes the roles.
"""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Values = dict[str, Any]  # the arrays of a program, parameters and arguments, by name
Apply = Callable[[Values, Any], Any]

# The kinds of parts. Each part is a function that is registered under its name.
STARTS: dict[str, Callable[..., Any]] = {}
LAYERS: dict[str, Callable[..., Any]] = {}
PREPARATIONS: dict[str, Callable[..., Any]] = {}
STORAGES: dict[str, Callable[..., Any]] = {}
WRAPPERS: dict[str, Callable[..., Any]] = {}
LOSSES: dict[str, Callable[..., Any]] = {}
SOURCES: dict[str, Callable[..., Any]] = {}
# Parts after which one output still sees one weight vector and nothing else, each weight times an input of
# its own: what the gradient says of them is the fan-in (test_against_gradients.py).
ENTRYWISE: set[str] = set()


def part(kind: dict[str, Callable[..., Any]], name: str, *, entrywise: bool = False) -> Callable[..., Any]:
    """Registers the decorated function as a part of a kind, under a name that reports show."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        kind[name] = function
        if entrywise:
            ENTRYWISE.add(name)
        return function

    return register


@dataclasses.dataclass
class Parameter:
    """A parameter with its true fan-in, which is empty where nothing is to be centralized."""

    shape: tuple[int, ...]
    fan_in: tuple[int, ...]
    has_axes: bool  # otherwise it has a fan-in, and no axes can say which
    parts: list[str]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An array on its way from a parameter to the operation that uses it.

    `roles` has a letter for each axis: "i" is summed over together with the data, "o" is none of the data's,
    "b" stands for kernels beside each other, of experts or of layers, and "s" is shared with the data, entry
    by entry. Where a constant matrix acts on such an axis, as in `sum(x[:, k] * (w @ matrix)[k])`, it could
    be said that the rows of the matrix are the inputs, so no program has this.
    """

    shape: tuple[int, ...]
    roles: str
    # Whether a tuple of axes can say the fan-in. `w.reshape(4, 6)` of a vector has one that none can.
    has_axes: bool = True
    # Whether the outputs are mixed later, as in `w @ H`.
    is_mixed: bool = False

    def axes(self, roles: str = "iobs", at_least: int = 1) -> list[int]:
        """The axes that have one of these roles and at least this size."""
        return [n for n, role in enumerate(self.roles) if role in roles and self.shape[n] >= at_least]

    def resized(self, axis: int, size: int) -> "Kernel":
        return self.replace(shape=(*self.shape[:axis], size, *self.shape[axis + 1 :]))

    def without(self, axis: int) -> "Kernel":
        return self.replace(
            shape=self.shape[:axis] + self.shape[axis + 1 :],
            roles=self.roles[:axis] + self.roles[axis + 1 :],
        )

    def replace(self, **changes: Any) -> "Kernel":
        return dataclasses.replace(self, **changes)


class Builder:
    """Draws the parts of one program, and collects its parameters and arguments."""

    def __init__(self, case: str, entrywise: bool = False):
        self.random = random.Random(case)
        self.entrywise = entrywise
        self.batch = self.random.choice([2, 3, 4])
        self.params: dict[str, Parameter] = {}
        self.data: Values = {}  # arguments with the batch as their first axis
        self.side: Values = {}  # other arguments
        self.trail: list[str] = []  # the parts that the next parameter is subject to
        # Where a constant array acts on a weight, data that are constant too could not be told from it.
        self.needs_arguments = False
        self.can_be_vmapped = True
        self.has_frozen = False  # a gradient of its own need not know of `stop_gradient`
        self.table: tuple[str, int] | None = None  # of the tokens, and its channels

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self) -> int:
        return 1 if self.chance(0.03) else self.random.choice([2, 3, 4, 5, 6, 7])

    def draw(self, kind: dict[str, Callable[..., Any]], at: str) -> tuple[str, Callable[..., Any]]:
        """A part of a kind, and its name in reports."""
        names = [name for name in kind if not self.entrywise or name in ENTRYWISE]
        name = self.random.choice(names)
        return f"{at}: {name}", kind[name]

    # Arguments.

    def floats(self, *shape: int) -> str:
        """An argument that is the same for all examples."""
        return self._given(self.side, jax.ShapeDtypeStruct(shape, jnp.float32))

    def flag(self) -> str:
        return self._given(self.side, jax.ShapeDtypeStruct((), jnp.bool_))

    def key(self) -> str:
        return self._given(self.side, jax.random.key(0))

    def batch_of(self, *shape: int, dtype: Any = jnp.float32) -> str:
        """An argument with the batch as its first axis."""
        return self._given(self.data, jax.ShapeDtypeStruct((self.batch, *shape), dtype))

    def integers(self, *shape: int) -> str:
        """Indices or counts that are the same for all examples."""
        return self._given(self.side, jax.ShapeDtypeStruct(shape, jnp.int32))

    def _given(self, where: Values, value: Any) -> str:
        name = f"argument_{len(self.data) + len(self.side)}"
        where[name] = value
        return name

    def constant(self, *shape: int) -> np.ndarray:
        """An array that the program closes over. No entry is zero or one."""
        self.needs_arguments = True
        count = math.prod(shape)
        return np.array([self.random.uniform(1.5, 2.5) for _ in range(count)], np.float32).reshape(shape)

    # Parameters.

    def alone(self, *shape: int) -> str:
        """A parameter that is no weight: a bias, a scale, a table."""
        return self.parameter(Kernel(shape, "o" * len(shape)))

    def parameter(self, kernel: Kernel) -> str:
        """A parameter whose axes have the roles of a kernel."""
        fan_in = tuple(kernel.axes("i"))
        if not kernel.has_axes or math.prod(kernel.shape[axis] for axis in fan_in) < 2:
            fan_in = ()
        name = f"param_{len(self.params)}"
        self.params[name] = Parameter(kernel.shape, fan_in, kernel.has_axes, list(self.trail))
        return name

    def kernel(self, shape: tuple[int, ...], roles: str, steps: int | None = None) -> Callable[[Values], Any]:
        """A kernel of a shape, stored and prepared in a random way: what makes it of the program's arrays.

        The preparations are drawn from the last to the first, each saying what it needs to have before it.
        """
        kernel, prepare = Kernel(shape, roles), []
        before = len(self.trail)
        for _ in range(self.random.choice([0, 0, 1, 1, 2, 3, 4]) if steps is None else steps):
            name, preparation = self.draw(PREPARATIONS, "preparation")
            self.trail.append(name)
            drawn = preparation(self, kernel)
            if drawn is None:
                self.trail.pop()
                continue
            kernel, step = drawn
            prepare.append(step)
        # Half of them are simply a parameter, the first of the storages.
        common = dict([next(iter(STORAGES.items()))])
        name, storage = self.draw(common if self.chance(0.5) else STORAGES, "storage")
        self.trail.append(name)
        stored = storage(self, kernel)
        del self.trail[before:]

        def made(v: Values) -> Any:
            w = stored(v)
            for step in reversed(prepare):
                w = step(v, w)
            assert w.shape == shape, f"{w.shape} is not {shape}"
            return w

        return made

    def matrix(self, rows: int, columns: int) -> Callable[[Values], Any]:
        """The kernel of a dense layer, of shape (rows, columns)."""
        return self.kernel((rows, columns), "io")
