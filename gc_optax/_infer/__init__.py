"""Reads the fan-in of every parameter off what a model computes.

Take `loss = sum(tanh(x @ w.T) + b)`. JAX writes it down as a jaxpr, one primitive after the other:

    a = transpose w;  c = dot_general x a;  d = tanh c;  e = add d b;  f = reduce_sum e

First it is read forwards, for what each array is made of (`_origins`): `w`, `b` and `a` of parameters, `x` of
data, and everything from `c` on is an activation, data. Then it is read backwards, for how each array is
used (`_uses`), in the way that a gradient comes back. `f` is returned, so `e`, `d` and `c` are activations.
`add` puts `b` beside one: it is a bias. `dot_general` contracts dimension 1 of the data `x` with dimension 0
of `a`, so the dimensions of `a` have the labels (`in`, `out`). To undo the `transpose` is to move the labels:
those of `w` are (`out`, `in`), and its fan-in is axis 1 (`_infer_axes`).

`_walk` goes through the jaxpr, `_program` shows it. What a primitive means stands in a rule of its own, in
`_moves`, `_entrywise` or `_contractions` (`_rules`). What no rule reads is left alone, with a warning.
"""

from . import _contractions as _contractions
from . import _entrywise as _entrywise
from . import _moves as _moves
from ._infer_axes import infer_axes as infer_axes
