"""Gradient centralization for Keras 3 on JAX. The only module of gc_optax that imports Keras."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from ._arithmetic import subtract_mean
from ._axes import PyTree, WeightAxes, of_rank
from ._centralize import Where
from ._conventions import conv_only, convolutions_of, out_first, out_last
from ._infer import infer_axes as _infer_axes
from ._resolve import as_weight_axes, settle
from ._text import Wording, at, describe, joined_lines

_NEEDS_JAX = "set the environment variable KERAS_BACKEND to jax before Keras is imported for the first time"
try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError("gc_optax.keras needs Keras: pip install keras") from error
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
            path, they are `path/0`, `path/1` and so on, in the order of `model.trainable_variables`. The name
            of the model, with which the paths of some begin, need not be the same, and entries for what is
            not trained count for nothing. Or a list in that order, which fits whatever layers are called. An
            entry is what `gc_optax.centralize` takes for a leaf. Or a function from a dict of arrays to one
            of axes. By default it is the convention `out_last`, with a warning of what it cannot settle: from
            rank 3 on, all that does not have the name that Keras gives its layer.
        where: `"gradients"` centralizes what goes into the optimizer. `"updates"` centralizes the change of
            each variable, weight decay included, before constraints and moving averages: the sum of every
            weight vector stays where it is, up to the rounding of the weights.

    Returns:
        The centralized optimizer.

    Raises:
        ValueError: if `where` is neither of the two, or if `optimizer` is centralized already. From `build`,
            which `fit` and `load_model` call, if `axes` has no entry for a variable, or as the `init` of
            `gc_optax.centralize`. From `apply`, if the gradients are not as many as the variables.
        TypeError: if `optimizer` or `axes` is none of the above; for a `keras.optimizers.MultiOptimizer`, in
            which each optimizer can be centralized; for an optimizer with a `stateless_apply` or a
            `from_config` of its own that leaves no place for centralization, and with `where="updates"` for
            one with an `apply` of its own.
        ImportError: when this module is imported without Keras, or with Keras on another backend than JAX.

    Examples:
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
    if not isinstance(optimizer, str | keras.optimizers.Optimizer):
        raise TypeError(
            f"optimizer must be an optimizer of Keras or its name, got {describe(optimizer)}; "
            "for one of optax there is gc_optax.centralized"
        )
    given = _Centralization(_checked(axes), where)
    return _centralized_copy(keras.optimizers.get(optimizer), given)


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
        TypeError: if `model` is no layer of Keras, or an input is a symbolic tensor of Keras.
        ImportError: when this module is imported without Keras, or with Keras on another backend than JAX.

    Examples:
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
    for leaf in jax.tree.leaves((args, kwargs)):
        if isinstance(leaf, keras.KerasTensor):
            raise TypeError(
                "the inputs must be arrays or jax.ShapeDtypeStruct, with a size for the batch too: "
                f"jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32) for example; got {describe(leaf)}"
            )
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
    # Whether a dict has the order of the variables too: once the optimizer is built, and when it is loaded.
    is_in_order: bool = False


@keras.saving.register_keras_serializable(_PACKAGE, "Centralized")
class _Centralized(keras.optimizers.Optimizer):  # type: ignore[misc]
    """What a centralized optimizer does otherwise than the class that it inherits from besides."""

    _centralization: _Centralization
    _fan_in: dict[int, tuple[int, ...]]
    _original: dict[str, Any]  # the class of the optimizer, as Keras writes it into a configuration

    def build(self, variables: Sequence[Any]) -> None:
        """Settles the axes of the model's variables, and makes those of the optimizer."""
        if self.built and [id(variable) for variable in variables] == list(self._fan_in):
            return
        given = self._centralization
        if variables and isinstance(given.axes, dict):
            axes = _by_path(given.axes, list(_named(variables)), given.is_in_order)
            given = dataclasses.replace(given, axes=axes, is_in_order=True)
        # Keras builds the optimizer of a file in its older format on no variables.
        self._fan_in = _fan_in(variables, given.axes) if variables else {}
        self._centralization = given
        super().build(variables)

    def apply(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Takes a step: all gradients come by here before anything else happens to them."""
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if trainable_variables and not self.built:
                with keras.name_scope(self.name, caller=self):
                    self.build(trainable_variables)
        # Without variables Keras refuses to go on, and without gradients it does nothing.
        if len(grads) and self.built and self._centralization.where == "gradients":
            grads = self._without_means(grads, trainable_variables)
        super().apply(grads, trainable_variables, *args, **kwargs)

    def _without_means(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> list[Any]:
        fan_in = self._fan_in
        # Keras refuses a variable that it does not know.
        every = list(fan_in.values()) if variables is None else [fan_in.get(id(v), ()) for v in variables]
        if len(every) != len(grads):
            raise ValueError(f"there are {len(grads)} gradients for {len(every)} variables")
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
        written = {
            "axes": _encoded(given.axes),
            "where": given.where,
            "is_in_order": given.is_in_order,
            "optimizer": self._original,
        }
        return {**super().get_config(), _CONFIG: written}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """The centralized optimizer, whatever class it is of: Keras knows all of them by one name."""
        config = dict(config)
        given = config.pop(_CONFIG)
        original = keras.saving.deserialize_keras_object(
            {**given["optimizer"], "config": config}, custom_objects=custom_objects
        )
        axes = _decoded(given["axes"], custom_objects)
        return _centralized_copy(original, _Centralization(axes, given["where"], given["is_in_order"]))

    def __reduce__(self) -> Any:
        _, arguments = super().__reduce__()
        # A pickle finds no class that is made while a program runs, and Keras reads the class off its file.
        return _Centralized._unpickle_model, arguments


def _checked(axes: Any) -> Any:
    """The axes that a user gave, with a `WeightAxes` in each entry; those of a function come later."""
    if isinstance(axes, Mapping):
        if unnamed := [key for key in axes if not isinstance(key, str)]:
            raise TypeError(f"the keys of axes must be paths of variables, got {describe(unnamed[0])}")
        return {path: as_weight_axes(leaf, at(f"[{path!r}]")) for path, leaf in axes.items()}
    if isinstance(axes, list):
        return [as_weight_axes(leaf, at(f"[{number}]")) for number, leaf in enumerate(axes)]
    if axes is None or (callable(axes) and not isinstance(axes, keras.Layer)):
        return axes
    raise TypeError(
        "axes must be a dict with the paths of the model's trainable variables, as "
        "gc_optax.keras.infer_axes(model, inputs) returns, a list in their order, a function or None, "
        f"got {describe(axes)}"
    )


def _centralized_copy(optimizer: Any, given: _Centralization) -> Any:
    """A centralized optimizer with the configuration, the attributes and the state of `optimizer`."""
    kind: Any = type(optimizer)
    if isinstance(optimizer, _Centralized):
        raise ValueError(f"{describe(optimizer)} is centralized already")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        config = optimizer.get_config()
        config["inner_optimizer"] = _centralized_copy(optimizer.inner_optimizer, given)
        copy = kind(**config)
    else:
        _require_a_place(kind, given.where)
        config, original = _configuration(optimizer)
        copy = super(_Centralized, _class_of(kind)).from_config(config)
        if not isinstance(copy, _Centralized):
            raise TypeError(
                f"the from_config of {kind.__name__} must make an object of the class that it is called on, "
                f"and it makes a {type(copy).__name__}, in which there is no place for centralization"
            )
        copy._centralization, copy._original = given, original
        # What a class of one's own leaves out of its configuration, and what is no part of one in Keras: the
        # variables without weight decay.
        for name, value in vars(optimizer).items():
            is_state = name in ("built", "_built")
            if not is_state and _is_plain(value) and repr(value) != repr(getattr(copy, name, None)):
                setattr(copy, name, value)
    if optimizer.built:
        copy.build(optimizer._trainable_variables)
    for variable, of_original in zip(copy.variables, optimizer.variables, strict=True):
        # `fit` gives its arrays away, so each optimizer needs some of its own.
        variable.assign(jnp.copy(of_original.value))
    return copy


def _is_plain(value: Any) -> bool:
    """Whether an attribute is made of numbers and text, and holds no variable of Keras for example."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return _is_plain([*value.keys(), *value.values()])
    return value is None or isinstance(value, bool | int | float | complex | str | re.Pattern)


def _configuration(optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of an optimizer, and its class as Keras writes it.

    A schedule is taken as it is: one that somebody has written need have no configuration.
    """
    learning_rate = getattr(optimizer, "_learning_rate", None)
    is_schedule = learning_rate is not None and not isinstance(learning_rate, keras.Variable)
    if is_schedule:
        optimizer._learning_rate = 0.0
    try:
        config, serialized = optimizer.get_config(), keras.optimizers.serialize(optimizer)
    finally:
        if is_schedule:
            optimizer._learning_rate = learning_rate
    if is_schedule and "learning_rate" in config:
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
    if kind is getattr(keras.optimizers, "MultiOptimizer", None):
        raise TypeError(
            "a MultiOptimizer is made of optimizers, each of which can be centralized: "
            "MultiOptimizer(OptimizerMap(centralized(optimizer, axes), {pattern: centralized(other, axes)}))"
        )
    ours = ["stateless_apply"]
    if where == "updates":
        ours += ["apply", "_backend_apply_gradients"]
    for name in ours:
        if getattr(kind, name) is not getattr(keras.optimizers.Optimizer, name):
            raise TypeError(
                f'{kind.__name__} has a `{name}` of its own, which leaves no place for where="{where}"'
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


def _fan_in(variables: Sequence[Any], axes: Any) -> dict[int, tuple[int, ...]]:
    """The axes to average over, by the `id` of each variable and in the order of the variables.

    Keras takes some gradients for the next value of the variable: the scales of float8.
    """
    named = _named(variables)
    if isinstance(axes, list):
        settled = settle(list(named.values()), axes, None)
    else:
        # JAX sorts the keys of a dict.
        in_its_order = settle(named, axes, None, wording=_WORDING, of_keras=True)
        by_name = dict(zip(sorted(named), in_its_order, strict=True))
        settled = [by_name[name] for name in named]
    return {
        id(variable): () if getattr(variable, "overwrite_with_gradient", False) else weight.fan_in
        for variable, weight in zip(variables, settled, strict=True)
    }


def _by_path(axes: dict[str, WeightAxes], paths: list[str], is_in_order: bool) -> dict[str, WeightAxes]:
    """The entry of `axes` for each path, in the order of the paths.

    In a model that is loaded, layers without a name of their own may have other names than they had. There
    the order decides, as long as kernels meet kernels and biases meet biases.
    """
    for theirs, ours in (
        (axes, paths),
        (_below_the_model(axes), paths),
        (axes, _below_the_model(paths)),
        (_below_the_model(axes), _below_the_model(paths)),
    ):
        known = dict(zip(theirs, axes.values(), strict=True))
        if known.keys() >= set(ours):
            return {path: known[name] for path, name in zip(paths, ours, strict=True)}
    last_steps = [[path.rpartition("/")[2] for path in each] for each in (axes, paths)]
    if is_in_order and last_steps[0] == last_steps[1]:
        return dict(zip(paths, axes.values(), strict=True))
    missing = [f"  {at(f'[{path!r}]')}" for path in paths if path not in axes]
    raise ValueError(
        f"axes has no entry for these trainable variables:\n{joined_lines(missing)}\n"
        "Read them with gc_optax.keras.infer_axes(model, inputs) from the model as it is trained, with the "
        "same layers frozen. A model that is loaded can be compiled anew: load_model(..., compile=False)"
    )


def _below_the_model(paths: Iterable[str]) -> list[str]:
    """The paths without their first step, where that is the name of a model: all have it in common."""
    steps = [path.split("/") for path in paths]
    is_model = len({each[0] for each in steps}) == 1 and all(len(each) > 2 for each in steps)
    return ["/".join(each[1:] if is_model else each) for each in steps]


def _encoded(axes: Any) -> Any:
    """Axes as a part of a configuration, which is JSON."""
    if axes is None:
        return None
    if isinstance(axes, dict):
        return {"by_path": [[path, _fields_of(weight)] for path, weight in axes.items()]}
    if isinstance(axes, list):
        return {"in_order": [_fields_of(weight) for weight in axes]}
    if isinstance(axes, functools.partial) and axes.func is convolutions_of:
        return {"conv_only": _encoded(axes.args[0])}
    return {"function": keras.saving.serialize_keras_object(axes)}


def _fields_of(axes: WeightAxes) -> dict[str, Any]:
    notes = {name: getattr(axes, name) for name in ("op", "why", "role", "rank")}
    return {"fan_in": list(map(int, axes.fan_in)), "fan_out": list(map(int, axes.fan_out)), **notes}


def _decoded(encoded: Any, custom_objects: dict[str, Any] | None) -> Any:
    """The axes that `_encoded` wrote."""
    if encoded is None:
        return None
    [(kind, content)] = encoded.items()
    if kind == "by_path":
        return {path: _axes_of(**fields) for path, fields in content}
    if kind == "in_order":
        return [_axes_of(**fields) for fields in content]
    if kind == "conv_only":
        return conv_only(_decoded(content, custom_objects))
    return keras.saving.deserialize_keras_object(content, custom_objects=custom_objects)


def _axes_of(fan_in: list[int], fan_out: list[int], rank: int | None, **notes: Any) -> WeightAxes:
    return of_rank(WeightAxes(tuple(fan_in), tuple(fan_out), **notes), rank)
