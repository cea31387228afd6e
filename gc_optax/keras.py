"""Gradient centralization for Keras 3 on JAX. The only module of gc_optax that imports Keras."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax

from ._arithmetic import subtract_mean
from ._axes import PyTree, WeightAxes
from ._centralize import Where
from ._conventions import conv_only, is_convention, out_first, out_last
from ._infer import infer_axes as _infer_axes
from ._resolve import as_weight_axes, settle
from ._text import Wording, at, describe

_NEEDS_JAX = "set the environment variable KERAS_BACKEND to jax before Keras is imported for the first time"
try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError("gc_optax.keras needs Keras: pip install 'gc_optax[keras]'") from error
    raise ImportError(f"Keras could not import its backend ({error}): {_NEEDS_JAX}") from error
if keras.backend.backend() != "jax":
    raise ImportError(
        f"gc_optax.keras needs Keras on JAX, and here it runs on {keras.backend.backend()}: {_NEEDS_JAX}"
    )

_WORDING = Wording(
    "gc_optax.keras.centralized(optimizer, {})",
    "mean",
    "nothing is centralized",
    "gc_optax.keras.infer_axes(model, inputs)",
)
_PACKAGE = "gc_optax"
_CONFIG = "centralization"
_NOTES = ("op", "why", "role")

for convention in (out_last, out_first):
    keras.saving.register_keras_serializable(_PACKAGE)(convention)


def centralized(
    optimizer: Any,
    axes: Mapping[str, Any] | list[Any] | Callable[[PyTree], PyTree] | None = None,
    *,
    where: Where = "gradients",
) -> Any:
    """An optimizer of Keras with gradient centralization built in, for `model.compile`.

    Its class inherits from that of `optimizer`, and it has the same name, configuration and variables with
    the same values: callbacks find what they look for, and a checkpoint of one is a checkpoint of the other.
    `optimizer` itself stays as it is. Gradients are centralized as they come from the model, in front of
    accumulation, clipping and the moments.

    A saved model is loaded by `keras.models.load_model` after `import gc_optax.keras`, without
    `custom_objects`. A function of your own for `axes` must be registered with Keras for that, as one for a
    learning rate must.

    Args:
        optimizer: any optimizer of Keras, or its name. It may have been built and have taken steps. Of a
            `LossScaleOptimizer`, the optimizer inside is centralized, which sees the gradients unscaled.
        axes: which axes are the inputs of a weight vector. What `gc_optax.keras.infer_axes` returns, or
            another dict with an entry for each trainable variable under its `path`; where several have one
            path, they are `path/0`, `path/1` and so on, in the order of `model.trainable_variables`. The
            first step of the paths, the name of the model, need not be the same. Or a list in that order,
            which fits whatever layers are called. An entry is what
            `gc_optax.centralize` takes for a leaf. Or a function from a dict of arrays to one of axes. By
            default it is the convention `out_last`, which reads the names of Keras's layers, with a warning
            of what it cannot settle.
        where: `"gradients"` centralizes what goes into the optimizer. `"updates"` centralizes the change of
            each variable, weight decay included, before constraints and moving averages: the sum of every
            weight vector stays where it is, up to the rounding of the weights.

    Returns:
        The centralized optimizer.

    Raises:
        ValueError: if `where` is neither of the two, or if `optimizer` is centralized already. From `build`,
            which `fit` calls, if `axes` does not have the paths of the variables, or as the `init` of
            `gc_optax.centralize`.
        TypeError: if `optimizer` or `axes` is none of the above; for an optimizer with a `stateless_apply` of
            its own, in which there is no place for centralization; and with `where="updates"` for one with an
            `apply` of its own, as `keras.optimizers.MultiOptimizer` has.
        ImportError: when this module is imported without Keras, or with Keras on another backend than JAX.

    Example:
        >>> import gc_optax.keras
        >>> import keras
        >>> import numpy as np
        >>> layers = [keras.Input((8,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(1)]
        >>> model = keras.Sequential(layers)
        >>> x, y = np.ones((64, 8), np.float32), np.ones((64, 1), np.float32)
        >>> axes = gc_optax.keras.infer_axes(model, x)
        >>> model.compile(gc_optax.keras.centralized(keras.optimizers.Adam(1e-2), axes), loss="mse")
        >>> history = model.fit(x, y, epochs=2, verbose=0)
        >>> type(model.optimizer).__name__, isinstance(model.optimizer, keras.optimizers.Adam)
        ('CentralizedAdam', True)

    References:
        Yong et al., ECCV 2020, https://arxiv.org/abs/2004.01461; https://keras.io/api/optimizers/
    """
    if not isinstance(where, str) or where not in get_args(Where):
        raise ValueError(f'where must be "gradients" or "updates", got {describe(where)}')
    if isinstance(axes, Mapping):
        axes = {key: as_weight_axes(leaf, at(f"[{key!r}]")) for key, leaf in axes.items()}
    elif isinstance(axes, list):
        axes = [as_weight_axes(leaf, at(f"[{number}]")) for number, leaf in enumerate(axes)]
    elif not (axes is None or callable(axes)):
        raise TypeError(
            "axes must be a dict with the paths of the model's trainable variables, as "
            "gc_optax.keras.infer_axes(model, inputs) returns, a list in their order, a function or None, "
            f"got {describe(axes)}"
        )
    if not isinstance(optimizer, str | keras.optimizers.Optimizer):
        raise TypeError(
            f"optimizer must be an optimizer of Keras or its name, got {describe(optimizer)}; "
            "for one of optax there is gc_optax.centralized"
        )
    optimizer = keras.optimizers.get(optimizer)
    copy = _centralized_copy(optimizer, axes, where)
    if optimizer.built:
        copy.build(optimizer._trainable_variables)
        for variable, original in zip(copy.variables, optimizer.variables, strict=True):
            variable.assign(original)
    return copy


def infer_axes(model: Any, *args: Any, **kwargs: Any) -> dict[str, WeightAxes]:
    """The fan-in of every trainable variable of a Keras model, read off what the model computes.

    This is `gc_optax.infer_axes` for `model(*args, **kwargs)`. Everything in the model that is not trained
    counts as data: frozen layers, batch statistics, seeds. The model stays as it is. Read the axes again
    after you have frozen or thawed layers.

    Args:
        model: a model or a layer, which has been built.
        *args: its inputs, arrays or `jax.ShapeDtypeStruct`s; nothing is computed from them.
        **kwargs: its further arguments by name, `training=True` for example.

    Returns:
        A `WeightAxes` for each variable by its `path`, in the order of `model.trainable_variables`. Where
        several have one path, they are `path/0`, `path/1` and so on. `list(axes.values())` is a tree of axes
        for the gradients in a `train_step`.

    Raises:
        ValueError: if `model` has not been built, or has no trainable variables.
        TypeError: if `model` is no layer of Keras.
        ImportError: when this module is imported without Keras, or with Keras on another backend than JAX.

    Example:
        >>> import gc_optax.keras
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import keras
        >>> images = keras.Input((28, 28, 1))
        >>> features = keras.layers.Flatten()(keras.layers.Conv2D(16, (5, 3), name="stem")(images))
        >>> model = keras.Model(images, keras.layers.Dense(10, name="head")(features))
        >>> axes = gc_optax.keras.infer_axes(model, jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32))
        >>> {path: weight.fan_in for path, weight in axes.items()}
        {'stem/kernel': (0, 1, 2), 'stem/bias': (), 'head/kernel': (0,), 'head/bias': ()}

    References:
        `Layer.stateless_call`, https://keras.io/api/layers/base_layer/
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"model must be a model or a layer of Keras, got {describe(model)}; "
            "it comes first: infer_axes(model, inputs)"
        )
    if not model.built:
        raise ValueError(f"{model.name} has no variables yet: call it on a batch, or build it, before")
    if not model.trainable_variables:
        raise ValueError(f"{model.name} has no trainable variables")
    params = _named(model.trainable_variables)
    fixed = [variable.value for variable in model.non_trainable_variables]

    def outputs_of(params: dict[str, Any], fixed: Any, args: Any, kwargs: Any) -> Any:
        outputs, _ = model.stateless_call([params[name] for name in names], fixed, *args, **kwargs)
        return outputs

    names = list(params)
    axes = _infer_axes(outputs_of, params, fixed, args, kwargs)
    return {name: axes[name] for name in names}


@dataclasses.dataclass(frozen=True)
class _Centralization:
    """What `centralized` was given; Keras would wrap a dict or a list that is an attribute by itself."""

    axes: dict[str, WeightAxes] | list[WeightAxes] | Callable[[PyTree], PyTree] | None
    where: Where
    original: dict[str, Any]  # the optimizer's class, as Keras writes it into a configuration


@keras.saving.register_keras_serializable(_PACKAGE, "Centralized")
class _Centralized(keras.optimizers.Optimizer):  # type: ignore[misc]
    """What a centralized optimizer does otherwise than the class that it inherits from besides."""

    _centralization: _Centralization

    def build(self, variables: Sequence[Any]) -> None:
        """Settles the axes of the model's variables, and makes those of the optimizer."""
        if not self.built:
            given = self._centralization
            settled = _settle(variables, given.axes)
            self._fan_in = _fan_in(variables, settled)
            if isinstance(given.axes, dict):
                # In a model that is loaded, layers without a name of their own may have other names.
                self._centralization = dataclasses.replace(given, axes=settled)
        super().build(variables)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Takes a step: all gradients come by here before anything else happens to them."""
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if trainable_variables and not self.built:
                with keras.name_scope(self.name, caller=self):
                    self.build(trainable_variables)
        # Without variables Keras refuses to go on.
        if self.built and self._centralization.where == "gradients":
            grads = self._without_means(grads, trainable_variables)
        super().apply(grads, trainable_variables)

    def _without_means(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> list[Any]:
        fan_in = self._fan_in
        every = fan_in.values() if variables is None else [fan_in.get(id(each), ()) for each in variables]
        if len(every) != len(grads):
            return list(grads)  # which Keras refuses
        return [
            subtract_mean(gradient, axes) if axes and gradient is not None else gradient
            for gradient, axes in zip(grads, every, strict=True)
        ]

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        # With `where="updates"` decay is a part of the update.
        if self._centralization.where == "gradients":
            super()._apply_weight_decay(variables)

    def _backend_update_step(
        self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any
    ) -> None:
        if self._centralization.where == "gradients":
            super()._backend_update_step(grads, variables, learning_rate)
            return
        before = [variable.value for variable in variables]
        super()._apply_weight_decay(variables)
        super()._backend_update_step(grads, variables, learning_rate)
        for variable, old in zip(variables, before, strict=True):
            if axes := self._fan_in[id(variable)]:
                variable.assign(old + subtract_mean(variable.value - old, axes))

    def get_config(self) -> dict[str, Any]:
        """The configuration of the optimizer, and what `centralized` was given."""
        given = self._centralization
        written = {"axes": _encoded(given.axes), "where": given.where, "optimizer": given.original}
        return {**super().get_config(), _CONFIG: written}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """The centralized optimizer, whatever class it is of: Keras knows all of them by one name."""
        config = dict(config)
        given = config.pop(_CONFIG)
        original = keras.saving.deserialize_keras_object(
            {**given["optimizer"], "config": config}, custom_objects=custom_objects
        )
        return centralized(original, _decoded(given["axes"], custom_objects), where=given["where"])


def _centralized_copy(optimizer: Any, axes: Any, where: Where) -> Any:
    """A centralized optimizer with the configuration of `optimizer`, which has not been built."""
    kind: Any = type(optimizer)
    if isinstance(optimizer, _Centralized):
        raise ValueError(f"{describe(optimizer)} is centralized already")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        config = optimizer.get_config()
        config["inner_optimizer"] = _centralized_copy(optimizer.inner_optimizer, axes, where)
        return kind(**config)
    _require_a_place(kind, where)
    config, original = _configuration(optimizer)
    copy = super(_Centralized, _class_of(kind)).from_config(config)
    copy._centralization = _Centralization(axes, where, original)
    for name, value in vars(optimizer).items():
        if name.startswith("_exclude_from_weight_decay"):  # no part of the configuration
            setattr(copy, name, value)
    return copy


def _configuration(optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of an optimizer, and its class as Keras writes it.

    A schedule is taken as it is: one that somebody has written need have no configuration.
    """
    learning_rate = getattr(optimizer, "_learning_rate", None)
    if learning_rate is None or isinstance(learning_rate, keras.Variable):
        config, serialized = optimizer.get_config(), keras.optimizers.serialize(optimizer)
    else:
        optimizer._learning_rate = 0.0
        try:
            config, serialized = optimizer.get_config(), keras.optimizers.serialize(optimizer)
        finally:
            optimizer._learning_rate = learning_rate
        config["learning_rate"] = learning_rate
    del serialized["config"]
    return config, serialized


@functools.cache
def _class_of(kind: Any) -> Any:
    """The class of a centralized `kind`."""
    new = type(f"Centralized{kind.__name__}", (_Centralized, kind), {"__doc__": kind.__doc__})
    return keras.saving.register_keras_serializable(_PACKAGE, "Centralized")(new)


def _require_a_place(kind: Any, where: Where) -> None:
    """Raises an error if an optimizer of this kind would go past the place where it is centralized."""
    ours = ["stateless_apply"]
    if where == "updates":
        ours += ["apply", "_backend_apply_gradients"]
    for name in ours:
        if getattr(kind, name) is not getattr(keras.optimizers.Optimizer, name):
            raise TypeError(
                f'{kind.__name__} has a `{name}` of its own, which leaves no place for where="{where}". '
                "If it wraps optimizers, centralize each of these before they are wrapped"
            )


def _named(variables: Sequence[Any]) -> dict[str, jax.Array]:
    """The values of variables by their paths; where several have one path, their numbers tell them apart."""
    count = collections.Counter(variable.path for variable in variables)
    seen: collections.Counter[str] = collections.Counter()
    named = {}
    for variable in variables:
        path = variable.path
        named[path if count[path] == 1 else f"{path}/{seen[path]}"] = variable.value
        seen[path] += 1
    return named


def _settle(variables: Sequence[Any], axes: Any) -> list[WeightAxes]:
    """The axes of each variable."""
    named = _named(variables)
    if isinstance(axes, list):
        return settle(list(named.values()), axes, None)
    if isinstance(axes, dict):
        axes = _under_paths(axes, list(named))
    # JAX sorts the keys of a dict.
    settled = dict(zip(sorted(named), settle(named, axes, None, wording=_WORDING), strict=True))
    return [settled[name] for name in named]


def _under_paths(axes: dict[str, WeightAxes], paths: list[str]) -> dict[str, WeightAxes]:
    """`axes` by the paths of the variables, of which the first step may be another.

    It is the name of the model: "sequential" for the first, "sequential_1" for a second that is built alike,
    and left out when it is loaded.
    """
    readings: tuple[Callable[[str], str], ...] = (str, _below_the_first_step)
    for theirs, ours in itertools.product(readings, repeat=2):
        known = {theirs(path): weight for path, weight in axes.items()}
        wanted = [ours(path) for path in paths]
        if len(known) == len(axes) and len(known) == len(wanted) and known.keys() == set(wanted):
            return {path: known[ours(path)] for path in paths}
    return axes  # which has no entry for some path, or one too many


def _below_the_first_step(path: str) -> str:
    return path.partition("/")[2]


def _fan_in(variables: Sequence[Any], settled: list[WeightAxes]) -> dict[int, tuple[int, ...]]:
    """The axes to average over, by the `id` of each variable and in the order of the variables.

    Keras takes some gradients for the next value of the variable: the scales of float8.
    """
    return {
        id(variable): () if getattr(variable, "overwrite_with_gradient", False) else weight.fan_in
        for variable, weight in zip(variables, settled, strict=True)
    }


def _encoded(axes: Any) -> Any:
    """Axes as a part of a configuration, which is JSON."""
    if axes is None:
        return None
    if isinstance(axes, dict):
        return {"by_path": {path: _fields_of(weight) for path, weight in axes.items()}}
    if isinstance(axes, list):
        return {"in_order": [_fields_of(weight) for weight in axes]}
    if isinstance(axes, functools.partial) and is_convention(axes):
        return {"conv_only": _encoded(axes.args[0])}
    return {"function": keras.saving.serialize_keras_object(axes)}


def _fields_of(axes: WeightAxes) -> dict[str, Any]:
    notes = {name: getattr(axes, name) for name in _NOTES}
    return {"fan_in": list(axes.fan_in), "fan_out": list(axes.fan_out), **notes}


def _decoded(encoded: Any, custom_objects: dict[str, Any] | None) -> Any:
    """The axes that `_encoded` wrote."""
    if encoded is None:
        return None
    [(kind, content)] = encoded.items()
    if kind == "by_path":
        return {path: _axes_of(fields) for path, fields in content.items()}
    if kind == "in_order":
        return [_axes_of(fields) for fields in content]
    if kind == "conv_only":
        return conv_only(_decoded(content, custom_objects))
    return keras.saving.deserialize_keras_object(content, custom_objects=custom_objects)


def _axes_of(fields: dict[str, Any]) -> WeightAxes:
    return WeightAxes(tuple(fields["fan_in"]), tuple(fields["fan_out"]), *(fields[name] for name in _NOTES))
