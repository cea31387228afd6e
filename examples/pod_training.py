"""Trains a transformer on the source of Python's standard library, sharded over all the devices there are.

The script is the same on every kind of machine; only its start differs.

On a laptop, on eight simulated devices:

    python examples/pod_training.py --simulated-devices 8

On one host, on all of its GPUs or TPU chips:

    python examples/pod_training.py

On a TPU pod, or under Slurm or Open MPI, the same on every host; JAX finds the others by itself:

    python examples/pod_training.py --checkpoints gs://bucket/folder

On hosts that nothing else holds together, on each with a process id of its own:

    python examples/pod_training.py --coordinator 10.0.0.1:1234 --processes 2 --process-id 0

The devices form a mesh with two axes: the batch and the parameters are split over `fsdp`, the attention heads
and the hidden layers of the MLPs over `tp`. The state is made, saved and restored in shards, so no device and
no host needs room for all of it. `gc_optax.infer_axes` reads off the loss, from shapes alone, over which axes
to centralize.

The text is read as bytes, and one file in twenty is held out. All processes must read the same text, which is
checked; where their Pythons differ, give them one with `--text`. The loss is measured every now and then. The
state is saved each time if `--checkpoints` names a folder, one that all processes see, and `--resume` goes on
from there after a crash: on the same devices to the very bits that would have been reached without it, since
the text that a step sees depends on nothing but the seed and the step. At the end, process 0 prints a table
and saves a picture of the loss.

    python examples/pod_training.py --simulated-devices 8 --checkpoints run
    python examples/pod_training.py --simulated-devices 8 --checkpoints run --resume --steps 600

Each checkpoint has the checksums of its arrays and of its record, and a run goes on only from one that fits
them. If the last one does not, the error names the last one that does. `--resume-step 550` goes on from that
one, and moves the later ones into a folder beside them, so that nothing is lost. One folder is for one run at
a time: a second one is refused. A bucket has no locks, so there that is up to you.

Ctrl-C ends the run with the table and the picture of what was measured, once a checkpoint that is being saved
is whole. Of several processes it must reach all, as it does where one launcher has started them.
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import contextlib
import errno
import fcntl
import functools
import io
import itertools
import json
import logging
import os
import pathlib
import signal
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from rich.console import Console

import gc_optax

BYTES = 256
WARMUP_STEPS = 20
MEASURED_BATCHES = 4
# What a run must have in common with the checkpoint it resumes from, beside the text.
FIXED = ("seed", "batch_size", "length", "layers", "embed", "heads")
# What it may change, beside the mesh.
CHANGEABLE = ("learning_rate", "no_centralization", "save_every")


class Text(NamedTuple):
    """Bytes to train on, and bytes to measure with."""

    train: np.ndarray
    held_out: np.ndarray


class State(NamedTuple):
    """All that a training step changes."""

    params: optax.Params
    optimizer: optax.OptState


class Measurement(NamedTuple):
    """The mean loss after some steps, in nats per byte."""

    step: int
    train: float
    held_out: float


class CheckpointError(Exception):
    """Why a run cannot go on from a checkpoint."""


class DamagedCheckpointError(CheckpointError):
    """What is in the checkpoint is not what was saved."""


def kernel(*axes: str | None) -> Callable:
    """Flax's initializer of kernels, saying over which mesh axis each of their own is split."""
    return nn.with_partitioning(nn.linear.default_kernel_init, axes)


class Block(nn.Module):
    """A transformer block with pre-normalization: activations (batch, length, embed) to the same."""

    heads: int
    activations: NamedSharding

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """Attends, and applies the MLP."""
        # Each device keeps its part of the batch, and the parameters are gathered for it, layer by layer.
        x = jax.lax.with_sharding_constraint(x, self.activations)
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            use_bias=False,
            kernel_init=kernel("fsdp", "tp", None),
            out_kernel_init=kernel("tp", None, "fsdp"),
            name="attention",
        )
        x = x + attention(nn.LayerNorm(name="norm_0")(x), mask=mask)
        up = nn.Dense(4 * x.shape[-1], kernel_init=kernel("fsdp", "tp"), name="up")
        down = nn.Dense(x.shape[-1], kernel_init=kernel("tp", "fsdp"), name="down")
        return x + down(nn.gelu(up(nn.LayerNorm(name="norm_1")(x)))), None


class Decoder(nn.Module):
    """A language model of bytes: text (batch, length) to logits (batch, length, 256)."""

    layers: int
    embed: int
    heads: int
    activations: NamedSharding

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Predicts the next byte at each position."""
        lookup = nn.with_partitioning(nn.initializers.normal(0.02), (None, "fsdp"))
        x = nn.Embed(BYTES, self.embed, embedding_init=lookup, name="embed")(text)
        x = x + self.param("positions", lookup, (text.shape[1], self.embed))
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = blocks(self.heads, self.activations, name="blocks")(x, nn.make_causal_mask(text))
        head = nn.Dense(BYTES, use_bias=False, kernel_init=kernel("fsdp", None), name="head")
        return head(nn.LayerNorm(name="norm")(x))


def loss(model: Decoder, params: optax.Params, windows: jax.Array) -> jax.Array:
    """The mean cross-entropy of every byte of the windows, given those before it."""
    logits = model.apply({"params": params}, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def join_processes(arguments: argparse.Namespace) -> None:
    """Makes all processes one program. It must come before JAX is asked for its devices."""
    if arguments.simulated_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.simulated_devices)
    if arguments.coordinator:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process_id)
    elif not arguments.simulated_devices:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            # JAX says this where nothing speaks of other hosts. Any other failure must not go unnoticed:
            # each host of a pod would train on its own.
            if "coordinator_address should be defined" not in str(error):
                raise


def make_mesh(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Mesh:
    """All devices as fsdp x tp. Settles the arguments that depend on their number, and checks the sizes."""
    devices = jax.device_count()
    tp = arguments.tensor_parallel or (2 if devices % 4 == 0 else 1)
    if devices % tp:
        parser.error(f"argument --tensor-parallel: {tp} does not divide the {devices} devices")
    if arguments.heads % tp:
        parser.error(f"argument --heads: {arguments.heads} is no multiple of the {tp} devices of axis tp")
    fsdp = devices // tp
    arguments.batch_size = arguments.batch_size or -(-16 // fsdp) * fsdp
    for flag in ("batch-size", "embed"):
        size = getattr(arguments, flag.replace("-", "_"))
        if size % fsdp:
            parser.error(f"argument --{flag}: {size} is no multiple of the {fsdp} devices of axis fsdp")
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))


def read_text(path: pathlib.Path | None, length: int, parser: argparse.ArgumentParser) -> Text:
    """The bytes of a file, of the files in a folder, or of the standard library. A twentieth is held out."""
    if path is None:
        library = pathlib.Path(sysconfig.get_paths()["stdlib"])
        installed = {"site-packages", "dist-packages"}
        files = [
            file for file in library.rglob("*.py") if installed.isdisjoint(file.relative_to(library).parts)
        ]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        files = [path]
    try:
        contents = [np.frombuffer(file.read_bytes(), np.uint8) for file in sorted(files)]
    except OSError as error:
        parser.error(f"argument --text: {error}")
    if len(contents) == 1:
        text = Text(*np.split(contents[0], [len(contents[0]) * 19 // 20]))
    else:
        train = [content for number, content in enumerate(contents) if number % 20]
        nothing = np.empty(0, np.uint8)
        text = Text(np.concatenate([nothing, *train]), np.concatenate([nothing, *contents[::20]]))
    if min(map(len, text)) <= length:
        sizes = f"{len(text.train):,} bytes to train on and {len(text.held_out):,} held out"
        parser.error(f"argument --text: {sizes} are too few for windows of {length + 1} bytes")
    return text


def random_starts(text: np.ndarray, step: int, arguments: argparse.Namespace) -> np.ndarray:
    """Where the windows of a training step begin."""
    generator = np.random.default_rng((arguments.seed, step))
    return generator.integers(len(text) - arguments.length, size=arguments.batch_size)


def even_starts(text: np.ndarray, arguments: argparse.Namespace) -> np.ndarray:
    """Where the windows begin that the loss is measured on, spread over the text: (batches, batch)."""
    count = MEASURED_BATCHES * arguments.batch_size
    starts = np.linspace(0, len(text) - arguments.length - 1, count).astype(int)
    return starts.reshape(MEASURED_BATCHES, arguments.batch_size)


def cut_windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Inputs and targets in one: windows of `length` bytes and the byte after them."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def feed(text: np.ndarray, starts: np.ndarray, length: int, split: NamedSharding) -> jax.Array:
    """A batch of windows: each process cuts only those that its own devices hold."""
    shape = (len(starts), length + 1)
    return jax.make_array_from_callback(
        shape, split, lambda index: cut_windows(text, starts[index[0]], length)
    )


def measure_baselines(text: Text, arguments: argparse.Namespace) -> dict[str, float]:
    """The losses to beat: of models that count bytes and pairs of bytes, on the held-out windows."""
    counts = np.ones(BYTES * BYTES)
    for part in np.array_split(text.train, len(text.train) // 2**22 + 1):
        counts += np.bincount(part[:-1].astype(np.uint16) * BYTES + part[1:], minlength=BYTES * BYTES)
    pairs = counts.reshape(BYTES, BYTES)
    windows = cut_windows(text.held_out, even_starts(text.held_out, arguments).ravel(), arguments.length)
    before, after = windows[:, :-1], windows[:, 1:]
    return {
        "unigram model": -np.log(pairs.sum(0) / pairs.sum())[after].mean(),
        "bigram model": -np.log(pairs / pairs.sum(1, keepdims=True))[before, after].mean(),
    }


def describe_run(arguments: argparse.Namespace, mesh: Mesh, text: Text) -> dict[str, Any]:
    """What a checkpoint says about the run that makes it."""
    return {
        **{name: getattr(arguments, name) for name in FIXED + CHANGEABLE},
        "mesh": f"fsdp {mesh.shape['fsdp']} x tp {mesh.shape['tp']}",
        "text": f"{len(text.train):,} bytes of checksum {zlib.crc32(text.train):08x}",
    }


def make_params(model: Decoder, arguments: argparse.Namespace) -> optax.Params:
    """The first parameters, in boxes that say how they are split."""
    text = jnp.zeros((arguments.batch_size, arguments.length), jnp.int32)
    return model.init(jax.random.key(arguments.seed), text)["params"]


def make_optimizer(
    model: Decoder, arguments: argparse.Namespace, console: Console
) -> optax.GradientTransformation:
    """AdamW, centralized over the axes that the loss shows."""
    # The rate does not depend on how many steps there are to be: any run can be made longer.
    adamw = optax.adamw(optax.warmup_constant_schedule(0.0, arguments.learning_rate, WARMUP_STEPS))
    if arguments.no_centralization:
        return adamw
    shapes = nn.unbox(jax.eval_shape(lambda: make_params(model, arguments)))
    windows = jax.ShapeDtypeStruct((arguments.batch_size, arguments.length + 1), jnp.int32)
    axes = gc_optax.infer_axes(functools.partial(loss, model), shapes, windows)
    comparison.print_summary(console, gc_optax.summarize(shapes, axes))
    # Unlike in optax.chain, the state stays that of AdamW: a checkpoint made without GC fits.
    return gc_optax.centralized(adamw, gc_optax.centralize(axes))


def make_boxed_state(
    model: Decoder, optimizer: optax.GradientTransformation, arguments: argparse.Namespace
) -> State:
    """The state to begin with, in boxes that say how it is split."""
    params = make_params(model, arguments)
    return State(params, optimizer.init(params))


def describe_state(
    model: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, arguments: argparse.Namespace
) -> State:
    """The shapes of the state, and where each of their shards belongs."""
    shapes = jax.eval_shape(lambda: make_boxed_state(model, optimizer, arguments))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(shapes),
        nn.get_sharding(shapes, mesh),
    )


def make_state(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    description: State,
    arguments: argparse.Namespace,
) -> State:
    """The state to begin with, each of its shards made where it belongs."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, description)
    return jax.jit(lambda: nn.unbox(make_boxed_state(model, optimizer, arguments)), out_shardings=shardings)()


def make_step(
    model: Decoder, optimizer: optax.GradientTransformation, state: State
) -> Callable[[State, jax.Array], tuple[State, jax.Array]]:
    """The training step: the next state, split as this one and in its memory, and the loss of this one."""

    def step(state: State, windows: jax.Array) -> tuple[State, jax.Array]:
        value, gradients = jax.value_and_grad(functools.partial(loss, model))(state.params, windows)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state), value

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def lock_checkpoints(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, console: Console
) -> None:
    """Keeps other runs out of the folder of checkpoints until this one is gone, however it ends."""
    folder = arguments.checkpoints
    problem = 0
    if jax.process_index() == 0 and "://" not in folder:
        try:
            if not arguments.resume:
                pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            if pathlib.Path(folder).exists():
                # The file is never closed: the system lets go of the lock when the process is gone.
                file = os.open(pathlib.Path(folder, "lock"), os.O_RDWR | os.O_CREAT)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            problem = error.errno
    problem = int(multihost_utils.broadcast_one_to_all(np.int32(problem)))
    if problem == errno.EWOULDBLOCK:
        parser.error(f"argument --checkpoints: another run is using {folder}")
    if problem in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
        console.print(f"{folder} cannot be locked: no other run must use it", soft_wrap=True)
    elif problem:
        parser.error(f"argument --checkpoints: {folder}: {os.strerror(problem)}")


def one_line(error: Exception) -> str:
    """An error's kind, and as much of what it says as one likes to read."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def open_checkpoints(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> ocp.CheckpointManager:
    """The folder of checkpoints: one without any to begin with, one that has the step to resume from."""
    folder = arguments.checkpoints
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(2),
        create=not arguments.resume,
        cleanup_tmp_directories=True,
    )
    try:
        manager = ocp.CheckpointManager(folder, options=options)
    # A damaged file can make Orbax, TensorStore and json raise anything, and so can a bucket.
    except Exception as error:
        parser.error(f"argument --checkpoints: Orbax cannot open {folder}\n({one_line(error)})")
    steps = sorted(manager.all_steps())
    if not arguments.resume:
        if steps:
            parser.error(f"argument --checkpoints: {folder} has some; go on from them with --resume")
        return manager
    if not steps:
        parser.error(f"argument --resume: there are no checkpoints in {folder}")
    if arguments.resume_step is None:
        arguments.resume_step = steps[-1]
    if arguments.resume_step not in steps:
        there = ", ".join(map(str, steps))
        parser.error(f"argument --resume-step: {folder} has no step {arguments.resume_step}, but {there}")
    if arguments.resume_step >= arguments.steps:
        parser.error(f"argument --steps: the checkpoint is that of step {arguments.resume_step} already")
    return manager


def scramble(words: jax.Array) -> jax.Array:
    """Other words for different words, with no pattern left: the end of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


@jax.jit
def checksum(array: jax.Array) -> jax.Array:
    """A number for the bits of an array and where they are.

    It is a sum over the elements, so it does not depend on how the array is split, and only numbers are sent.
    A change to one element always changes it.
    """
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    return scramble(bits.astype(jnp.uint32) ^ scramble(place)).sum(dtype=jnp.uint32)


def checksums(state: State) -> dict[str, int]:
    """The checksum of every array of the state, by its path."""
    # To wait for each keeps them from queueing up on the devices.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(checksum(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def record_checksum(record: dict[str, Any]) -> int:
    """The checksum of what a checkpoint has beside the state."""
    return zlib.crc32(json.dumps(record).encode())


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Lets Ctrl-C wait for the end of what must not be cut off. Another one does not wait."""
    came = []

    def note(*_: Any) -> None:
        came.append(True)
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        raise KeyboardInterrupt


def save(
    manager: ocp.CheckpointManager, state: State, settings: dict[str, Any], measurements: list[Measurement]
) -> None:
    """Writes a checkpoint in the background, every process its own shards."""
    record = {
        "settings": settings,
        "measurements": measurements,
        "checksums": checksums(state),
    }
    record["checksum"] = record_checksum(record)
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    with ctrl_c_waits():
        manager.save(measurements[-1].step, args=args)


def read_record(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint has beside the state: the settings, all that was measured, and the checksums."""
    record = ocp.JsonCheckpointHandler().restore(folder / "record")
    if record.pop("checksum") != record_checksum(record):
        raise ValueError("the record is not what was saved")
    for name in (*FIXED, "text"):
        saved = record["settings"][name]
        if saved != settings[name]:
            flag = name.replace("_", "-")
            raise CheckpointError(
                f"argument --{flag}: the checkpoints were made with {saved}, not {settings[name]}"
            )
    return record


def restore(
    manager: ocp.CheckpointManager, step: int, description: State, settings: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """The state and the record of a checkpoint. If they are not what was saved, every process raises."""
    folder = manager.directory / str(step)
    # Where one read fails, Orbax leaves others behind, and each prints a traceback when it ends. So after a
    # failure, what is written to stderr is lost. `resume` has kept it for the error.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    stderr, sys.stderr = sys.stderr, io.StringIO()
    problem = ""
    try:
        record = read_record(folder, settings)
        # CheckpointManager.restore would let the other processes wait for one that cannot read its shards.
        args = ocp.args.StandardRestore(description)
        state = ocp.StandardCheckpointHandler().restore(folder / "state", args=args)
        sys.stderr = stderr
    except CheckpointError:
        raise
    except Exception as error:
        problem = one_line(error)
    if multihost_utils.process_allgather(np.array(bool(problem))).any():
        raise DamagedCheckpointError(problem or "another process cannot read it")
    for path, number in checksums(state).items():
        if number != record["checksums"][path]:
            raise DamagedCheckpointError(f"{path} is not what was saved")
    return state, record


def restore_or_advise(
    manager: ocp.CheckpointManager, step: int, description: State, settings: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """The state and the record of a checkpoint, or an error that names another one that is whole."""
    try:
        return restore(manager, step, description, settings)
    except DamagedCheckpointError as error:
        reason = str(error)
    advice = "no other checkpoint there is whole"
    for other in sorted(set(manager.all_steps()) - {step}, reverse=True):
        with contextlib.suppress(DamagedCheckpointError):
            restore(manager, other, description, settings)
            advice = f"that of step {other} is whole: go on from it with --resume-step {other}"
            break
    damage = f"the checkpoint of step {step} in {manager.directory} is damaged"
    raise CheckpointError(f"argument --resume: {damage}; {advice}\n({reason})")


def resume(
    manager: ocp.CheckpointManager,
    description: State,
    settings: dict[str, Any],
    arguments: argparse.Namespace,
    parser: argparse.ArgumentParser,
    console: Console,
) -> tuple[State, list[Measurement]]:
    """The state and the measurements of the checkpoint to go on from."""
    stderr = sys.stderr
    try:
        state, record = restore_or_advise(manager, arguments.resume_step, description, settings)
    except CheckpointError as error:
        with contextlib.redirect_stderr(stderr):
            parser.error(str(error))
    except KeyboardInterrupt:
        sys.stderr = stderr
        raise
    for name in (*CHANGEABLE, "mesh"):
        saved = record["settings"][name]
        if saved != settings[name]:
            line = f"{name.replace('_', ' ')}: {settings[name]}, while the checkpoint was made with {saved}"
            console.print(line, highlight=False, soft_wrap=True)
    set_later_steps_aside(manager, arguments.resume_step, console)
    return state, [Measurement(*row) for row in record["measurements"]]


def set_later_steps_aside(manager: ocp.CheckpointManager, step: int, console: Console) -> None:
    """Moves the checkpoints after a step into a new folder, for Orbax to save in their place."""
    later = [other for other in manager.all_steps() if other > step]
    if not later:
        return
    if jax.process_index() == 0:
        folders = (manager.directory / f"set_aside_{number}" for number in itertools.count(1))
        aside = next(folder for folder in folders if not folder.exists())
        aside.mkdir()
        for other in later:
            (manager.directory / str(other)).rename(aside / str(other))
        console.print(f"The later checkpoints are now in {aside}", soft_wrap=True)
    multihost_utils.sync_global_devices("the later checkpoints are set aside")
    manager.reload()


def train(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    text: Text,
    mesh: Mesh,
    manager: ocp.CheckpointManager | None,
    measurements: list[Measurement],
    parser: argparse.ArgumentParser,
    console: Console,
) -> None:
    """Takes the steps that are left; measures, adds to the measurements and saves every now and then."""
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    model = Decoder(arguments.layers, arguments.embed, arguments.heads, split)
    optimizer = make_optimizer(model, arguments, console)
    description = describe_state(model, optimizer, mesh, arguments)
    if manager is not None and arguments.resume:
        state, earlier = resume(manager, description, settings, arguments, parser, console)
        measurements.extend(earlier)
    else:
        state = make_state(model, optimizer, description, arguments)
    step = make_step(model, optimizer, state)
    evaluate = jax.jit(functools.partial(loss, model))
    samples = [
        [feed(part, starts, arguments.length, split) for starts in even_starts(part, arguments)]
        for part in text
    ]

    def measure(steps: int, params: optax.Params) -> Measurement:
        losses = [[float(evaluate(params, windows)) for windows in sample] for sample in samples]
        return Measurement(steps, *np.mean(losses, axis=1).tolist())

    with comparison.progress_bar(console, arguments.steps, "steps") as (progress, bar):
        if not measurements:
            measurements.append(measure(0, state.params))
        for number in range(measurements[-1].step, arguments.steps):
            starts = random_starts(text.train, number, arguments)
            state, value = step(state, feed(text.train, starts, arguments.length, split))
            # To wait for the loss keeps the bar honest, and keeps steps from queueing up on the devices.
            progress.update(bar, completed=number + 1, description=f"loss {float(value):.3f}")
            if (number + 1) % arguments.save_every == 0 or number + 1 == arguments.steps:
                measurements.append(measure(number + 1, state.params))
                if manager is not None:
                    save(manager, state, settings, measurements)


def report(
    measurements: list[Measurement], baselines: dict[str, float], title: str, console: Console
) -> None:
    """Prints the table: a dozen or so of the measurements, and the losses to beat."""
    rows = []
    for row in sorted(set(np.linspace(0, len(measurements) - 1, 13).astype(int))):
        step, train, held_out = measurements[row]
        rows.append([f"{step:,} steps", f"{train:.3f}", f"{held_out:.3f}"])
    rows += [[name, "-", f"{value:.3f}"] for name, value in baselines.items()]
    comparison.print_table(console, title, ["after", "training text", "held-out text"], rows)
    console.print("mean loss, nats per byte")


def draw(
    measurements: list[Measurement], baselines: dict[str, float], title: str, output: pathlib.Path
) -> None:
    """The loss by step, on text that was trained on and on text that was held out."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps, train, held_out = zip(*measurements, strict=True)
    axes.plot(steps, train, color=comparison.COLORS[0], alpha=0.5, linewidth=4, label="training text")
    axes.plot(steps, held_out, color=comparison.COLORS[1], marker="o", markersize=3, label="held-out text")
    for (name, value), style in zip(baselines.items(), (":", "--"), strict=True):
        axes.axhline(value, color=comparison.COLORS[2], linestyle=style, label=f"held-out text, {name}")
    axes.set(title=title, xlabel="step", ylabel="loss, nats per byte", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=130)


def folder_path(text: str) -> str:
    """A folder in a bucket, or one on this machine, which Orbax wants to be absolute."""
    return text if "://" in text else str(pathlib.Path(text).expanduser().absolute())


def natural_number(text: str) -> int:
    """An argument that numbers something, from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, and those of its errors that show without the devices and the text."""

    def number(
        flag: str, default: float | None, text: str, kind: Callable = comparison.positive_integer
    ) -> None:
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(flag, type=kind, default=default, help=shown, metavar="N")

    number("--steps", 300, "steps in all, with those before --resume")
    number("--batch-size", None, "windows in a step (default: 16, or the next multiple of mesh axis fsdp)")
    number("--length", 128, "bytes in a window")
    number("--layers", 4, "transformer blocks")
    number("--embed", 128, "width of the activations")
    number("--heads", 4, "attention heads")
    number("--learning-rate", 0.003, "of AdamW, after a warm-up", comparison.positive_number)
    number("--seed", 0, "of the first parameters and of the order of the text", natural_number)
    parser.add_argument("--no-centralization", action="store_true", help="AdamW alone, to compare with")
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="PATH", help="a file or a folder (default: the standard library)"
    )
    parser.add_argument(
        "--checkpoints", type=folder_path, metavar="FOLDER", help="where to save the state (default: nowhere)"
    )
    number("--save-every", 25, "steps from one measurement and checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    number("--resume-step", None, "go on from the checkpoint of this step, and set later ones aside")
    number("--tensor-parallel", None, "mesh axis tp (default: 2 if 4 divides the number of devices, else 1)")
    number("--simulated-devices", None, "make this many devices of the CPU, in each process")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens to the others")
    number("--processes", None, "how many processes there are, with --coordinator")
    number("--process-id", None, "which of them this is, from 0 on, with --coordinator", natural_number)
    parser.add_argument(
        "--output",
        type=comparison.picture_path,
        default="pod_training.png",
        metavar="FILE",
        help="where the picture goes (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.embed % arguments.heads:
        parser.error(f"argument --heads: {arguments.heads} does not divide --embed {arguments.embed}")
    arguments.resume = arguments.resume or arguments.resume_step is not None
    if arguments.resume and arguments.checkpoints is None:
        parser.error("argument --resume: --checkpoints must name the folder to resume from")
    manual = (arguments.coordinator, arguments.processes, arguments.process_id)
    if any(value is not None for value in manual) and None in manual:
        parser.error("argument --coordinator: goes together with --processes and --process-id")
    return arguments


def main() -> None:
    """Trains, prints the table and saves the picture."""
    parser = argparse.ArgumentParser(
        description="Trains a language model in shards, with gradient centralization."
    )
    arguments = parse_arguments(parser)
    join_processes(arguments)
    mesh = make_mesh(arguments, parser)
    text = read_text(arguments.text, arguments.length, parser)
    settings = describe_run(arguments, mesh, text)
    checksum = np.uint32(zlib.crc32(json.dumps(settings).encode()))
    multihost_utils.assert_equal(checksum, "the processes have different texts or options")
    console = Console(markup=False, quiet=jax.process_index() > 0)
    manager = None
    if arguments.checkpoints is not None:
        lock_checkpoints(arguments, parser, console)
        manager = open_checkpoints(arguments, parser)

    console.print(
        f"devices: {mesh.size} {jax.default_backend()}, processes: {jax.process_count()}, "
        f"mesh: {settings['mesh']}"
    )
    console.print(f"text: {settings['text']}, and {len(text.held_out):,} held out")
    measurements: list[Measurement] = []
    stopped = False
    try:
        train(arguments, settings, text, mesh, manager, measurements, parser, console)
    except KeyboardInterrupt:
        if not measurements:
            raise
        stopped = True
        # Another one ends the process at once, also where it waits for others that go on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        console.print("Stopped by Ctrl-C. What was measured until then:")
    if jax.process_index() == 0:
        baselines = measure_baselines(text, arguments)
        title = (
            f"{arguments.layers} layers of width {arguments.embed}, "
            f"AdamW {'without' if arguments.no_centralization else 'with'} gradient centralization"
        )
        report(measurements, baselines, title, console)
        draw(measurements, baselines, title, arguments.output)
        console.print(f"The curves are in {arguments.output.absolute()}", soft_wrap=True)
    if manager is not None:
        # It waits for a checkpoint that is being saved. One that another Ctrl-C keeps from being whole has
        # another name, and the next run deletes it.
        manager.close()
        console.print(f"The checkpoints are in {arguments.checkpoints}", soft_wrap=True)
    if stopped:
        if jax.process_count() > 1:
            console.print("Waiting for the other processes. Another Ctrl-C ends without them.")
        raise SystemExit(130)


if __name__ == "__main__":
    main()
