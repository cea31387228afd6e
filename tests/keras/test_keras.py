"""`gc_optax.keras`: optimizers for `model.compile`, and the axes of Keras models."""

import copy
import json
import operator
import os
import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers, optimizers

from gc_optax import WeightAxes, conv_only, out_first, out_last
from gc_optax.keras import centralized, infer_axes

X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(32, 1)).astype(np.float32)
IMAGES = np.random.default_rng(2).normal(size=(16, 8, 8, 3)).astype(np.float32)

PLAIN = {
    name: getattr(optimizers, name)
    for name in dir(optimizers)
    if isinstance(getattr(optimizers, name), type)
    and issubclass(getattr(optimizers, name), optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
}


def mlp(**kwargs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(6, "relu"), layers.Dense(4, "relu"), layers.Dense(1)]
    )
    model.compile(loss="mse", **kwargs)
    return model


def cnn():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, (3, 2), activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )


def all_but_the_last(gradient):
    """The rule that everybody knows, in NumPy."""
    if gradient.ndim < 2:
        return gradient
    return gradient - gradient.mean(tuple(range(gradient.ndim - 1)), keepdims=True)


def variables_and_gradients(dtype="float32"):
    rng = np.random.default_rng(3)
    shapes = {"kernel": (5, 4), "conv2d": (3, 3, 2, 4), "bias": (4,)}
    values = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    variables = [keras.Variable(value, name=name) for name, value in values.items()]
    return variables, [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes.values()]


AXES = [0, (0, 1, 2), None]


def weights(variables):
    return [np.asarray(variable.value) for variable in variables]


# What it does to each optimizer


@pytest.mark.parametrize("name", PLAIN)
def test_every_optimizer_sees_centralized_gradients_and_keeps_its_variables(name):
    variables, gradients = variables_and_gradients()
    others, _ = variables_and_gradients()
    plain = PLAIN[name](learning_rate=0.01, name="it")
    optimizer = centralized(PLAIN[name](learning_rate=0.01, name="it"), AXES)
    for scale in (1.0, -0.5, 2.0):
        scaled = [scale * gradient for gradient in gradients]
        plain.apply(
            [jnp.asarray(all_but_the_last(np.asarray(each, np.float64)), jnp.float32) for each in scaled],
            others,
        )
        optimizer.apply(scaled, variables)
    assert isinstance(optimizer, PLAIN[name])
    # Nadam has a variable to which Keras gives a number.
    paths = [[v.path.rstrip("_0123456789") for v in each.variables] for each in (optimizer, plain)]
    assert paths[0] == paths[1]
    for variable, other in zip(variables + optimizer.variables, others + plain.variables, strict=True):
        np.testing.assert_allclose(np.asarray(variable), np.asarray(other), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("decay", [None, 0.1])
@pytest.mark.parametrize("name", PLAIN)
def test_updates_of_every_optimizer_keep_the_sums_decay_included(name, decay):
    variables, gradients = variables_and_gradients()
    others, _ = variables_and_gradients()
    before = weights(variables)
    extra = {} if decay is None else {"weight_decay": decay}
    plain = PLAIN[name](learning_rate=0.01, **extra)
    optimizer = centralized(PLAIN[name](learning_rate=0.01, **extra), AXES, where="updates")
    plain.apply(gradients, others)
    optimizer.apply(gradients, variables)
    for old, variable, other in zip(before, variables, others, strict=True):
        expected = old + all_but_the_last(np.asarray(other) - old)
        np.testing.assert_allclose(np.asarray(variable), expected, atol=1e-6)
        assert np.abs(np.asarray(variable) - old).max() > 1e-5
    for one, other in zip(optimizer.variables, plain.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("name", PLAIN)
def test_the_configuration_is_that_of_the_optimizer_and_makes_it_again(name):
    plain = PLAIN[name](learning_rate=0.02, clipnorm=1.5, use_ema=True, name="mine")
    optimizer = centralized(plain, AXES, where="updates")
    config = optimizer.get_config()
    assert config.pop("centralization")["where"] == "updates"
    assert config == plain.get_config()
    serialized = json.loads(json.dumps(optimizers.serialize(optimizer)))
    again = optimizers.deserialize(serialized)
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()


# How it goes with what Keras does besides


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_fit_of_a_dense_and_of_a_convolutional_model_follows_the_well_known_rule(where):
    for model, inputs, targets in ((mlp(), X, Y), (cnn(), IMAGES, np.ones((16, 2), np.float32))):
        other = keras.models.clone_model(model)
        other.set_weights(model.get_weights())
        model.compile(
            centralized(optimizers.SGD(0.05, momentum=0.9), infer_axes(model, inputs), where=where), "mse"
        )
        other.compile(optimizers.SGD(0.05, momentum=0.9), "mse")
        start = model.get_weights()
        model.fit(inputs, targets, batch_size=len(inputs), epochs=3, verbose=0)
        plain = optimizers.SGD(0.05, momentum=0.9)
        for _ in range(3):
            step_by_hand(other, plain, inputs, targets)
        for one, another, old in zip(model.get_weights(), other.get_weights(), start, strict=True):
            np.testing.assert_allclose(one, another, rtol=1e-3, atol=1e-5)
            if one.ndim > 1:
                axes = tuple(range(one.ndim - 1))
                np.testing.assert_allclose(one.sum(axes), old.sum(axes), atol=1e-5)
                assert np.abs(one - old).max() > 1e-4


def step_by_hand(model, optimizer, inputs, targets):
    trainable, fixed = (
        [v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)
    )

    def loss(trainable):
        outputs, new = model.stateless_call(trainable, fixed, inputs, training=True)
        return jnp.mean((outputs - targets) ** 2), new

    gradients, new = jax.grad(loss, has_aux=True)(trainable)
    gradients = [jnp.asarray(all_but_the_last(np.asarray(gradient))) for gradient in gradients]
    optimizer.apply(gradients, model.trainable_variables)
    for variable, value in zip(model.non_trainable_variables, new, strict=True):
        variable.assign(value)


def test_accumulated_gradients_are_centralized_and_clipped_afterwards():
    runs = []
    for kwargs in ({}, {"gradient_accumulation_steps": 2}):
        variables, gradients = variables_and_gradients()
        optimizer = centralized(optimizers.SGD(0.1, clipnorm=0.5, **kwargs), AXES)
        for _ in range(2 if kwargs else 1):
            optimizer.apply(gradients, variables)
        runs.append(weights(variables))
    for one, accumulated in zip(*runs, strict=True):
        np.testing.assert_allclose(one, accumulated, atol=1e-6)
    variables, gradients = variables_and_gradients()
    start = weights(variables)
    for old, new, gradient in zip(start, runs[0], gradients, strict=True):
        kept = all_but_the_last(np.asarray(gradient))
        np.testing.assert_allclose(new, old - 0.1 * kept * min(1, 0.5 / np.linalg.norm(kept)), atol=1e-6)


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_a_loss_scale_changes_nothing_but_the_scale(where):
    runs = []
    for scale in (None, "inside", "outside"):
        model = mlp()
        plain = optimizers.Adam(0.01)
        axes = infer_axes(model, X)
        if scale == "inside":
            optimizer = optimizers.LossScaleOptimizer(
                centralized(plain, axes, where=where), initial_scale=8.0
            )
        elif scale == "outside":
            optimizer = centralized(
                optimizers.LossScaleOptimizer(plain, initial_scale=8.0), axes, where=where
            )
            assert type(optimizer) is optimizers.LossScaleOptimizer
            assert optimizer.initial_scale == 8.0
        else:
            optimizer = centralized(plain, axes, where=where)
        model.compile(optimizer, loss="mse")
        model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        runs.append(model.get_weights())
    for alone, inside, outside in zip(*runs, strict=True):
        np.testing.assert_allclose(alone, inside, atol=1e-6)
        np.testing.assert_array_equal(inside, outside)


def test_a_float16_model_is_centralized_behind_its_loss_scale():
    keras.utils.set_random_seed(0)
    policy = keras.DTypePolicy("mixed_float16")
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(6, dtype=policy), layers.Dense(1, dtype=policy)]
    )
    model.compile(centralized("sgd", infer_axes(model, X)), loss="mse")
    before = model.get_weights()
    model.fit(X, Y, epochs=2, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        if new.ndim == 2:
            np.testing.assert_allclose(new.sum(0), old.sum(0), atol=1e-3)
            assert np.abs(new - old).max() > 1e-3


def test_a_schedule_of_ones_own_that_keras_cannot_load_is_kept():
    class Halving(optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.5 ** keras.ops.cast(step + 1, "float32")

    schedule = Halving()
    optimizer = centralized(optimizers.SGD(schedule), AXES)
    variables, gradients = variables_and_gradients()
    start = weights(variables)
    optimizer.apply(gradients, variables)
    np.testing.assert_allclose(variables[2], start[2] - 0.5 * np.asarray(gradients[2]), atol=1e-6)
    optimizer = centralized(optimizers.SGD(lambda: 0.25), AXES)
    assert optimizer.learning_rate == 0.25


def test_callbacks_set_the_learning_rate():
    model = mlp(optimizer=centralized("adam"))
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[schedule])
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)


def test_constraints_and_moving_averages_see_what_is_left():
    kernel = keras.Variable(np.ones((4, 2), np.float32), name="kernel")
    kernel.constraint = keras.constraints.MaxNorm(1.5, axis=0)
    optimizer = centralized(optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), [0], where="updates")
    gradient = jnp.arange(8.0).reshape(4, 2)
    optimizer.apply([gradient], [kernel])
    moved = 1 - 0.1 * all_but_the_last(np.asarray(gradient))
    np.testing.assert_allclose(optimizer._model_variables_moving_average[0], moved, atol=1e-6)
    norms = np.linalg.norm(moved, axis=0, keepdims=True)
    np.testing.assert_allclose(kernel, moved * np.minimum(1, 1.5 / norms), atol=1e-5)


def test_what_has_no_gradient_and_what_is_overwritten_by_it_pass():
    variables, gradients = variables_and_gradients()
    variables[0].overwrite_with_gradient = True
    before = weights(variables)
    optimizer = centralized("sgd", AXES)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([gradients[0], None, gradients[2]], variables)
    np.testing.assert_array_equal(variables[0], gradients[0])
    np.testing.assert_array_equal(variables[1], before[1])


def test_frozen_layers_stay_and_the_axes_are_those_of_the_others():
    model = mlp()
    model.layers[0].trainable = False
    axes = infer_axes(model, X)
    assert len(axes) == 4
    model.compile(centralized("sgd", axes), loss="mse")
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    moved = [np.abs(new - old).max() > 0 for new, old in zip(model.get_weights(), before, strict=True)]
    assert moved == [False, False, True, True, True, True]
    model.layers[0].trainable = True
    model.compile(centralized("sgd", axes), loss="mse")
    with pytest.raises(
        ValueError, match=r"axes has no entry for these trainable variables:\n.*/kernel'\]\n.*bias"
    ):
        model.fit(X, Y, verbose=0)
    axes = infer_axes(model, X)
    model.layers[0].trainable = False
    model.compile(centralized("sgd", axes), loss="mse")
    model.fit(X, Y, verbose=0)


class Twins(keras.Model):
    """Two layers of one name, and of different layouts."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one = layers.Dense(4, name="twin")
        self.other = layers.EinsumDense("bi,oi->bo", output_shape=(2,), name="twin")

    def call(self, inputs):
        return self.other(keras.ops.relu(self.one(inputs)))


def test_variables_that_share_a_path_are_kept_apart():
    model = Twins(name="twins")
    model(X)
    assert [v.path for v in model.trainable_variables].count("twins/twin/kernel") == 2
    axes = infer_axes(model, X)
    assert {path: weight.fan_in for path, weight in axes.items()} == {
        "twins/twin/kernel/0": (0,),
        "twins/twin/bias": (),
        "twins/twin/kernel/1": (1,),
    }
    model.compile(centralized("sgd", axes), loss="mse")
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    for old, new, axis in zip(before, model.get_weights(), (0, None, 1), strict=True):
        assert np.abs(new - old).max() > 0
        if axis is not None:
            np.testing.assert_allclose(new.sum(axis), old.sum(axis), atol=1e-5)


def nothing(params):
    return dict.fromkeys(params)


def test_an_optimizer_that_has_taken_steps_goes_on_where_it_was_and_so_does_its_copy():
    model, other = mlp(optimizer=optimizers.Adam(0.01)), mlp()
    model.fit(X, Y, epochs=2, shuffle=False, verbose=0)
    other.set_weights(model.get_weights())
    other.compile(centralized(model.optimizer, nothing), loss="mse")
    for each in (other, model):
        each.fit(X, Y, epochs=2, shuffle=False, verbose=0)
    for group in ("trainable_variables", "optimizer.variables"):
        one, another = (operator.attrgetter(group)(each) for each in (model, other))
        for variable, copied in zip(one, another, strict=True):
            np.testing.assert_array_equal(variable, copied)


def test_the_state_inside_of_a_loss_scale_is_kept():
    variables, gradients = variables_and_gradients()
    inner = optimizers.Adam(0.1)
    for _ in range(3):
        inner.apply(gradients, variables)
    scaled = optimizers.LossScaleOptimizer(inner)
    for is_built in (False, True):
        if is_built:
            scaled.build(variables)
        twin = centralized(scaled, AXES)
        assert int(twin.iterations) == 3
        for one, other in zip(twin.variables, scaled.variables, strict=True):
            np.testing.assert_array_equal(one, other)
    unbuilt = optimizers.SGD(0.1)
    unbuilt.iterations.assign(7)
    assert int(centralized(unbuilt).iterations) == 7


class Leaky(optimizers.Optimizer):
    """Leaves out of its configuration what it is given, as one need not for `fit`."""

    def __init__(self, learning_rate=0.1, share=0.5, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.share = share
        self.shares = [share, {"half": share / 2}]

    def update_step(self, gradient, variable, learning_rate):
        variable.assign_sub(learning_rate * self.share * gradient)


def test_what_a_configuration_leaves_out_is_kept():
    optimizer = centralized(Leaky(0.1, share=0.25), AXES)
    assert (optimizer.share, optimizer.shares[1]) == (0.25, {"half": 0.125})
    variables, gradients = variables_and_gradients()
    start = weights(variables)
    for _ in range(2):  # it can be built again
        optimizer.build(variables)
    optimizer.apply(gradients, variables)
    expected = start[0] - 0.025 * all_but_the_last(np.asarray(gradients[0]))
    np.testing.assert_allclose(variables[0], expected, atol=1e-6)
    others, _ = variables_and_gradients()
    optimizer.build(others)
    optimizer.apply(gradients, others)
    np.testing.assert_allclose(others[0], expected, atol=1e-6)


def test_a_configuration_that_makes_another_class_is_refused():
    class Stubborn(optimizers.SGD):
        @classmethod
        def from_config(cls, config, custom_objects=None):
            return Stubborn(**config)

    with pytest.raises(TypeError, match="from_config of Stubborn must make an object of the class"):
        centralized(Stubborn(0.1))


@pytest.mark.parametrize(
    "again", [lambda given: pickle.loads(pickle.dumps(given)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_an_optimizer_is_copied_and_pickled(again):
    optimizer = centralized(optimizers.Adam(0.02), AXES)
    made = again(optimizer)
    assert type(made) is type(optimizer)
    assert made.get_config() == optimizer.get_config()


def test_excluded_from_decay_stays_excluded():
    plain = optimizers.AdamW(0.01, weight_decay=0.5)
    plain.exclude_from_weight_decay(var_names=["kernel"])
    variables, gradients = variables_and_gradients()
    others, _ = variables_and_gradients()
    centralized(plain, [None, None, None]).apply(gradients, variables)
    plain.apply(gradients, others)
    for one, other in zip(weights(variables), weights(others), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not hasattr(optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_the_optimizers_for_parts_of_a_model_are_centralized_each(where):
    model = mlp()
    axes, head = infer_axes(model, X), model.layers[-1].name
    rest, of_head = (centralized(kind(0.01), axes, where=where) for kind in (optimizers.SGD, optimizers.Lion))
    multi = optimizers.MultiOptimizer(optimizers.OptimizerMap(rest, {f".*{head}.*": of_head}))
    with pytest.raises(TypeError, match="a MultiOptimizer is made of optimizers"):
        centralized(multi)
    model.compile(multi, loss="mse")
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    for number in (0, 2, 4) if where == "updates" else (0, 2):
        old, new = before[number], model.get_weights()[number]
        assert np.abs(new - old).max() > 0
        np.testing.assert_allclose(new.sum(0), old.sum(0), atol=1e-6)


def test_a_sharded_model_trains_as_a_whole_one():
    runs = []
    for distribution in (
        None,
        keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu")[:4]),
    ):
        keras.distribution.set_distribution(distribution)
        try:
            model = mlp()
            model.compile(centralized("adam", infer_axes(model, X)), loss="mse")
            model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
            runs.append(model.get_weights())
        finally:
            keras.distribution.set_distribution(None)
    for one, sharded in zip(*runs, strict=True):
        np.testing.assert_allclose(one, sharded, atol=1e-5)


# Saving


@pytest.mark.parametrize(
    "axes",
    [None, out_last, out_first, conv_only(out_last), "read", "in order"],
    ids=["default", "out_last", "out_first", "conv_only", "read", "in order"],
)
@pytest.mark.parametrize("trained", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_saved_model_goes_on_as_it_would_have(axes, trained, tmp_path):
    model = mlp()
    given = {"read": infer_axes(model, X), "in order": list(infer_axes(model, X).values())}
    model.compile(centralized(optimizers.Adam(0.01), given.get(axes, axes)), loss="mse")
    if trained:
        model.fit(X, Y, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        if (
            not trained
        ):  # Keras says of any optimizer that has taken no steps that its variables are not there
            warnings.simplefilter("ignore", UserWarning)
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    for each in (model, loaded):
        each.fit(X, Y, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(weights(model.variables), weights(loaded.variables), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(
        weights(model.optimizer.variables), weights(loaded.optimizer.variables), strict=True
    ):
        np.testing.assert_array_equal(one, other)


LOAD = """
import keras, sys, numpy as np
import gc_optax.keras
model = keras.models.load_model(sys.argv[1])
print(type(model.optimizer).__name__, int(model.optimizer.iterations))
model.fit(np.ones((8, 8), np.float32), np.ones((8, 1), np.float32), verbose=0)
"""


@pytest.mark.slow
def test_another_process_loads_it_after_one_import(tmp_path):
    model = mlp()
    model.compile(centralized("adam", infer_axes(model, X)), loss="mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOAD, str(tmp_path / "model.keras")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["CentralizedAdam", "1"], done.stderr


def test_a_model_that_is_called_otherwise_when_it_is_loaded_keeps_its_axes(tmp_path):
    @keras.saving.register_keras_serializable("test")
    class Unnamed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs)

        def get_config(self):
            return {}

    model = Unnamed()
    model(X)
    model.compile(centralized("sgd", infer_axes(model, X)), loss="mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.trainable_variables[0].path != model.trainable_variables[0].path
    before = loaded.get_weights()
    loaded.fit(X, Y, verbose=0)
    np.testing.assert_allclose(loaded.get_weights()[0].sum(0), before[0].sum(0), atol=1e-5)


@keras.saving.register_keras_serializable("test")
class Adapted(keras.layers.Layer):
    """Its second weight comes first once it is loaded."""

    def __init__(self, is_adapted=False, **kwargs):
        super().__init__(**kwargs)
        self.is_adapted = is_adapted

    def build(self, shape):
        if self.is_adapted:
            self.adapt()
        self.wide = self.add_weight(shape=(8, 8), name="wide")

    def adapt(self):
        self.transposed = self.add_weight(shape=(8, 8), name="transposed")
        self.is_adapted = True

    def call(self, inputs):
        outputs = inputs @ self.wide
        return outputs @ keras.ops.transpose(self.transposed) if self.is_adapted else outputs

    def get_config(self):
        return {**super().get_config(), "is_adapted": self.is_adapted}


def test_axes_find_their_variables_where_a_loaded_model_has_them_in_another_order(tmp_path):
    model = keras.Sequential([keras.Input((8,)), Adapted(is_adapted=False, name="adapted")])
    model.layers[0]._tracker.unlock()
    model.layers[0].adapt()
    axes = infer_axes(model, X)
    assert [weight.fan_in for weight in axes.values()] == [(0,), (1,)]
    model.compile(centralized(optimizers.SGD(0.1), axes), loss="mse")
    model.fit(X, X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [v.name for v in loaded.trainable_variables] == ["transposed", "wide"]
    assert list(loaded.optimizer._fan_in.values()) == [(1,), (0,)]


def test_the_checkpoint_of_a_plain_optimizer_is_that_of_a_centralized_one(tmp_path):
    model = mlp(optimizer=optimizers.Adam(0.01))
    model.fit(X, Y, epochs=2, verbose=0)
    model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    loaded.compile(centralized(loaded.optimizer), loss="mse")
    for one, other in zip(
        weights(model.optimizer.variables), weights(loaded.optimizer.variables), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    store, back = {}, {}
    model.optimizer.save_own_variables(store)
    loaded.optimizer.save_own_variables(back)
    assert store.keys() == back.keys()
    loaded.optimizer.load_own_variables(store)


def named():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6, name="one"), layers.Dense(1, name="two")])
    model.compile(loss="mse")
    return model


def test_axes_of_one_model_fit_another_that_is_built_alike():
    model, other = named(), named()
    assert model.trainable_variables[0].path != other.trainable_variables[0].path
    other.compile(centralized("sgd", infer_axes(model, X)), loss="mse")
    other.fit(X, Y, verbose=0)
    model, other = mlp(), mlp()
    axes = infer_axes(model, X)
    other.compile(centralized("sgd", list(axes.values())), loss="mse")
    other.fit(X, Y, verbose=0)
    other.compile(centralized("sgd", axes), loss="mse")
    with pytest.raises(ValueError, match="axes has no entry for these trainable variables"):
        other.fit(X, Y, verbose=0)


def test_the_first_step_of_a_path_is_only_left_out_where_it_is_that_of_a_model():
    named, typo = (
        keras.Sequential([keras.Input((8,)), layers.Dense(4, name=name)], name="model")
        for name in ("one", "two")
    )
    with pytest.raises(ValueError, match="axes has no entry"):
        centralized("sgd", infer_axes(named, X)).build(typo.trainable_variables)
    inputs = keras.Input((8,))
    one, two = (keras.Model(inputs, layers.Dense(4, name=name)(inputs)) for name in ("one", "two"))
    with pytest.raises(ValueError, match="axes has no entry"):
        centralized("sgd", infer_axes(one, X)).build(two.trainable_variables)


def test_a_function_of_ones_own_is_loaded_if_keras_knows_it():
    @keras.saving.register_keras_serializable("test")
    def first_axis(params):
        return {path: 0 if leaf.ndim == 2 else None for path, leaf in params.items()}

    optimizer = centralized("sgd", first_axis)
    again = optimizers.deserialize(optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()

    def unknown(params):
        return first_axis(params)

    with pytest.raises(TypeError, match="Could not locate function 'unknown'"):
        optimizers.deserialize(optimizers.serialize(centralized("sgd", unknown)))


# What is refused, and what is warned of


def test_the_default_reads_the_names_of_layers_and_warns_of_what_it_cannot_settle():
    inputs = keras.Input((8, 8, 3))
    outputs = layers.DepthwiseConv2D(3)(layers.Conv2D(4, (3, 2))(inputs))
    outputs = layers.MultiHeadAttention(2, 3)(*2 * [layers.Reshape((-1, 4))(outputs)])
    optimizer = centralized("sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.build(keras.Model(inputs, layers.Dense(2)(outputs)).trainable_variables)
    mend = "gc_optax.keras.centralized(optimizer, gc_optax.keras.infer_axes(model, inputs))"
    for layer in (
        layers.Conv2DTranspose(4, 3, name="conv_1"),
        layers.DepthwiseConv2D(3, depth_multiplier=2, name="conv_b"),
        layers.Conv2DTranspose(4, 1, name="dec_conv"),
        layers.Conv2D(4, 3, name="stem"),
        layers.EinsumDense("bhwi,hio->bhwo", output_shape=(8, 8, 4)),
    ):
        model = keras.Model(inputs, layer(inputs))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            centralized("sgd").build(model.trainable_variables)
        (warning,) = [each for each in caught if "gc_optax" in str(each.message)]
        assert mend in str(warning.message)
        assert f"{layer.name}/kernel" in str(warning.message)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (ValueError, 'where must be "gradients" or "updates"', ("sgd",), {"where": "weights"}),
        (TypeError, "optimizer must be an optimizer of Keras or its name", (3,), {}),
        (
            TypeError,
            "optimizer must be an optimizer of Keras or its name, got <class",
            (optimizers.SGD,),
            {},
        ),
        (
            ValueError,
            "Could not deserialize|Could not interpret|Could not locate",
            ("no such optimizer",),
            {},
        ),
        (TypeError, "axes must be a dict with the paths", ("sgd", 0), {}),
        (TypeError, "axes must be a dict with the paths", ("sgd", layers.Dense(1)), {}),
        (TypeError, "the keys of axes must be paths of variables, got 0", ("sgd", {0: 0}), {}),
        (TypeError, r"axes for \['dense/kernel'\] must be a WeightAxes", ("sgd", {"dense/kernel": "0"}), {}),
        (TypeError, r"axes for \[1\] must be a WeightAxes", ("sgd", [0, 1.5]), {}),
    ],
)
def test_misuse_is_refused(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        centralized(*args, **kwargs)


def test_misuse_of_a_built_optimizer_is_refused_before_it_has_variables():
    variables, gradients = variables_and_gradients()
    for axes, message in (
        ([0, 0], "axes does not have the structure"),
        ({"a": 0, "b": 0, "c": None}, "axes has no entry"),
        ([7, 0, None], "axis 7 is out of range for rank 2"),
        ([WeightAxes((0,)), (0, 0), None], "an axis is repeated"),
    ):
        optimizer = centralized("sgd", axes)
        with pytest.raises(ValueError, match=message):
            optimizer.apply(gradients, variables)
        assert not optimizer.built
    optimizer = centralized("sgd", AXES)
    with pytest.raises(ValueError, match="must already be built"):
        optimizer.apply(gradients)
    optimizer.build(variables)
    optimizer.apply([])  # does nothing in Keras
    with pytest.raises(ValueError, match="there are 2 gradients for 3 variables"):
        optimizer.apply(gradients[:2])
    with pytest.raises(ValueError, match="there are 2 gradients for 3 variables"):
        optimizer.apply(gradients[:2], variables)
    with pytest.raises(ValueError, match="there are 3 gradients for 1 variables"):
        optimizer.apply(gradients, variables[:1])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply(gradients[:1], [keras.Variable(np.ones((5, 4)))])


def test_twice_is_refused():
    once = centralized("sgd")
    with pytest.raises(ValueError, match="centralized already"):
        centralized(once)
    with pytest.raises(ValueError, match="centralized already"):
        centralized(optimizers.LossScaleOptimizer(once))


def test_an_optimizer_that_goes_its_own_way_is_refused():
    class Own(optimizers.SGD):
        def stateless_apply(self, optimizer_variables, grads, trainable_variables):
            return trainable_variables, optimizer_variables

    with pytest.raises(TypeError, match="Own has a `stateless_apply` of its own"):
        centralized(Own(0.1))

    class Halved(optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            super().apply([gradient / 2 for gradient in grads], trainable_variables)

    variables, gradients = variables_and_gradients()
    start = weights(variables)
    centralized(Halved(0.1), AXES).apply(gradients, variables)
    expected = start[0] - 0.05 * all_but_the_last(np.asarray(gradients[0]))
    np.testing.assert_allclose(variables[0], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "message"),
    [("torch", "torch"), ("numpy", "here it runs on numpy")],
)
def test_another_backend_is_refused_with_what_to_do(backend, message, tmp_path):
    environment = os.environ | {"KERAS_BACKEND": backend, "KERAS_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "import gc_optax.keras"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert message in last
    assert "set the environment variable KERAS_BACKEND to jax" in last
