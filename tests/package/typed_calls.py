"""What type checkers that read optax make of `gc_optax`: `make lint` checks this file, and nothing runs it.

An ignored error which is none is an error.
"""

from typing import assert_type

import optax

import gc_optax
from gc_optax.optimizers import adamw


def never_called() -> None:
    projection = gc_optax.centralize()
    assert_type(adamw(1e-3, b1=0.8, weight_decay=0.1), optax.GradientTransformationExtraArgs)
    assert_type(adamw(1e-3, where="updates", weight_decay=0.1), optax.GradientTransformationExtraArgs)
    assert_type(adamw(1e-3, centralization=projection), optax.GradientTransformationExtraArgs)
    assert_type(
        adamw(1e-3, centralization=projection, where="updates"), optax.GradientTransformationExtraArgs
    )
    assert_type(gc_optax.optimizers.muon(1e-3), optax.GradientTransformationExtraArgs)
    adamw()  # type: ignore[call-overload]
    adamw(1e-3, weight_dekay=0.1)  # type: ignore[call-overload]
    adamw(1e-3, b1="large")  # type: ignore[call-overload]
    adamw(1e-3, where="update")  # type: ignore[call-overload]
    gc_optax.centralized(optax.MultiSteps(optax.adam(1e-3), 2))  # type: ignore[arg-type]
    adamw(1e-3, centralization=0)  # type: ignore[call-overload]
    gc_optax.optimizers.adamv  # type: ignore[attr-defined]  # noqa: B018
