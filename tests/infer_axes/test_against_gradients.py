"""The fan-in that the gradient of one output shows, against the truth of programs.py and the answers.

The derivative of one output of `y = x @ w` by `w` is zero but for one column, and that column is x. So the
axes of `w` along which one output sees more than one index are its fan-in. This needs no knowledge of any
operation, and holds under conditions that the programs here meet:

- There is one layer. Behind a second one every output sees all weights of the first.
- Nothing ties the entries of a weight to each other before it is used: after a norm over them or a product
  with a constant matrix an output sees entries that are no weights of its own.
- What one operation sums is all that is summed (programs.py, on the sum over `x[:, k] @ w[k]`).
- No mask hides all but one index of an axis, and the data are so long that more than one tap of a convolution
  lies on them. Padding hides some at the borders, so what any of the outputs sees counts.

Where no axes are the fan-in, as in a vector that is reshaped to a kernel, an output sees more than one index
of an axis, but no output sees all of them. What no output sees, as a slice that is not used, is left out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import build, read, told_apart

# What looks at the gradients of all the programs takes a minute.
pytestmark = pytest.mark.slow

PROGRAMS, CHUNK = 300, 50
STARTS = range(0, PROGRAMS, CHUNK)


def seen_by_outputs(program, seed):
    """Of every parameter, for every output, which entries have a derivative that is not zero."""
    random = np.random.default_rng(seed)
    params, args = jax.tree.map(
        lambda s: jnp.asarray(random.normal(size=s.shape), jnp.float32), (program.shapes(), program.args)
    )
    jacobian = jax.jit(jax.jacrev(program.fn))(params, *args)
    return {
        name: np.asarray(jacobian[name]).reshape(-1, *parameter.shape) != 0
        for name, parameter in program.params.items()
    }


def axes_seen(entries):
    """The axes along which one output sees more than one index."""
    dims = range(entries.ndim)
    return {axis for axis in dims if entries.any(tuple(n for n in dims if n != axis)).sum() > 1}


def sees_all(entries):
    """Whether one output sees more than one weight, and all that there are along the axes that it sees."""
    seen = axes_seen(entries)
    return bool(seen) and entries.sum() == np.prod([entries.shape[axis] for axis in seen])


@functools.cache
def looked_at(start):
    """For every parameter of a chunk of programs: the case, the parameter, and what each output sees."""
    rows = []
    for number in range(start, start + CHUNK):
        program = build(f"0:{number}", entrywise=True)
        seen = seen_by_outputs(program, number)
        rows += [(f"0:{number} {name}", p, seen[name]) for name, p in program.params.items()]
    return rows


def fan_in_shown(seen):
    return set().union(*map(axes_seen, seen))


@pytest.mark.parametrize("start", STARTS)
def test_the_truth_is_what_the_gradient_shows(start):
    for case, parameter, seen in looked_at(start):
        if not parameter.has_axes:
            assert not any(map(sees_all, seen)), (case, parameter)
        elif seen.any():
            assert told_apart(parameter.shape, parameter.fan_in) == fan_in_shown(seen), (case, parameter)


@pytest.mark.parametrize("start", STARTS)
def test_an_answer_is_what_the_gradient_shows(start):
    rows = iter(looked_at(start))
    answered = 0
    for number in range(start, start + CHUNK):
        answers, _ = read(build(f"0:{number}", entrywise=True))
        for answer in answers.values():
            case, parameter, seen = next(rows)
            if answer.fan_in and seen.any():
                answered += 1
                assert parameter.has_axes, (case, answer)
                assert told_apart(parameter.shape, answer.fan_in) == fan_in_shown(seen), (case, answer)
    assert answered > CHUNK / 2
