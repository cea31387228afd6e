"""Trains a small Flax NNX transformer on Python source, with and without gradient centralization.

The text is the source of Python's standard library, byte by byte, so nothing is downloaded; `--text` takes a
file of yours. One library file in ten (of one file of yours, the last tenth) is held out. The same decoder is
trained two ways, from the same initializations and on the same windows of text in the same order:

- AdamW alone, with a warm-up and a cosine decay of the learning rate,
- the same with `gc_optax.centralize(axes)` before it.

`gc_optax.nnx.infer_axes` reads the axes off the loss. The table of them comes first: the kernels of the
attention have three axes, and the embedding, which is also the output layer, is left alone. The same tree
gives AdamW its mask, so that weights are decayed, and biases, scales and the embedding are not.

At the end there are a table of the perplexity per byte, a picture of it with the perplexity of counting pairs
of bytes to compare with, and a few lines that the model has written. Both ways have the same learning rate,
which was chosen for neither. With the defaults the seeds show no difference. Three seeds of a model this
small are no evidence for others.

    python examples/nnx_language_model.py [--text FILE] [--steps 250] [--seeds 3] [--output FILE]
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import gc_optax.nnx

BYTES = 256
HEADS = 4
WEIGHT_DECAY = 0.1
HELD_OUT_WINDOWS = 256
SAMPLE_BYTES = 300
TEMPERATURE = 0.7
# Folders of the standard library: what was installed, what not every Python has, and tables of characters.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings"}


class Text(NamedTuple):
    """Bytes to train on and bytes that are held out."""

    train: np.ndarray
    held_out: np.ndarray


class Block(nnx.Module):
    """Causal attention and an MLP, with pre-normalization: activations (batch, length, width) to the same."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, width, use_bias=False, decode=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds what the attention and the MLP make of the activations."""
        causal = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.attention_norm(x), mask=causal)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Decoder(nnx.Module):
    """A language model of bytes with tied embeddings: text (batch, length) to logits (batch, length, 256)."""

    def __init__(self, layers: int, width: int, length: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, width, rngs=rngs)
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (length, width)))
        self.blocks = nnx.Sequential(*(Block(width, rngs) for _ in range(layers)))
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Predicts the byte after each position."""
        x = self.embed(text) + self.positions[...]
        return self.embed.attend(self.norm(self.blocks(x)))


def read_library() -> Text:
    """The source of Python's standard library, with one file in ten held out."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [file for file in library.rglob("*.py") if LEFT_OUT.isdisjoint(file.relative_to(library).parts)]
    contents = [file.read_bytes() for file in sorted(files)]
    train = b"".join(content for number, content in enumerate(contents) if number % 10)
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(b"".join(contents[::10]), np.uint8))


def read_file(path: pathlib.Path) -> Text:
    """The bytes of a file, with the last tenth held out."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    return Text(*np.split(content, [len(content) * 9 // 10]))


def cut_windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Windows of `length` bytes, each with the byte after it: (windows, length + 1)."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def cut_held_out(text: Text, length: int) -> np.ndarray:
    """Windows spread evenly over the held-out text."""
    starts = np.linspace(0, len(text.held_out) - length - 1, HELD_OUT_WINDOWS).astype(int)
    return cut_windows(text.held_out, starts, length)


def bigram_perplexity(text: Text, windows: np.ndarray) -> float:
    """The perplexity of counting the pairs of bytes in the training text, each of them once more."""
    pairs = text.train[:-1].astype(np.int32) * BYTES + text.train[1:]
    counts = 1 + np.bincount(pairs, minlength=BYTES * BYTES).reshape(BYTES, BYTES)
    probabilities = counts / counts.sum(1, keepdims=True)
    return np.exp(-np.log(probabilities[windows[:, :-1], windows[:, 1:]]).mean())


def loss(model: Decoder, windows: jax.Array) -> jax.Array:
    """The mean cross-entropy of each byte, given those before it in its window."""
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


evaluate = nnx.jit(loss)


@nnx.jit
def step(model: Decoder, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    """Trains on a batch of windows, and gives their loss before it."""
    value, gradients = nnx.value_and_grad(loss)(model, windows)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def write_on(model: Decoder, context: jax.Array) -> jax.Array:
    """Draws the bytes after a context that is as long as a window: each one from the window before it."""

    def draw_next(context: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        byte = jax.random.categorical(key, model(context[None])[0, -1] / TEMPERATURE)
        return jnp.append(context[1:], byte), byte

    _, written = jax.lax.scan(draw_next, context, jax.random.split(jax.random.key(0), SAMPLE_BYTES))
    return written


def make_optimizers(
    arguments: argparse.Namespace, console: Console
) -> dict[str, optax.GradientTransformation]:
    """The two ways to train. The axes are read off the loss from shapes alone: nothing is computed."""
    model = nnx.eval_shape(lambda: Decoder(arguments.layers, arguments.width, arguments.length, nnx.Rngs(0)))
    windows = jax.ShapeDtypeStruct((arguments.batch_size, arguments.length + 1), jnp.int32)
    axes = gc_optax.nnx.infer_axes(loss, model, windows)
    comparison.print_summary(console, gc_optax.summarize(nnx.state(model, nnx.Param), axes))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, arguments.learning_rate, warmup_steps=arguments.steps // 10, decay_steps=arguments.steps
    )
    adamw = optax.adamw(schedule, weight_decay=WEIGHT_DECAY, mask=gc_optax.decay_mask(axes))
    return {"AdamW alone": adamw, "AdamW with GC": optax.chain(gc_optax.centralize(axes), adamw)}


def make_start(
    transformation: optax.GradientTransformation, arguments: argparse.Namespace
) -> Callable[[jax.Array], tuple[Decoder, nnx.Optimizer]]:
    """The function that makes a model of a random key, and its optimizer: compiled, not array by array."""

    @nnx.jit
    def start(key: jax.Array) -> tuple[Decoder, nnx.Optimizer]:
        model = Decoder(arguments.layers, arguments.width, arguments.length, nnx.Rngs(key))
        return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)

    return start


def train(
    model: Decoder,
    optimizer: nnx.Optimizer,
    seed: int,
    text: Text,
    points: list[int],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, float]]:
    """Trains the model, and measures it after as many steps as each of the points says."""
    held_out = cut_held_out(text, arguments.length)
    order = np.random.default_rng(seed)
    taken = 0
    for point in points:
        losses = []
        for _ in range(taken, point):
            starts = order.integers(len(text.train) - arguments.length, size=arguments.batch_size)
            losses.append(step(model, optimizer, cut_windows(text.train, starts, arguments.length)))
        taken = point
        yield {
            "training perplexity": np.exp(np.mean(losses)),
            "held-out perplexity": np.exp(evaluate(model, held_out)),
        }


def as_shown(written: np.ndarray) -> str:
    """Bytes as text that any terminal shows, with a dot for each that is not printable ASCII."""
    printable = ((written >= ord(" ")) & (written <= ord("~"))) | (written == ord("\n"))
    return bytes(np.where(printable, written, ord(".")).tolist()).decode("ascii")


def existing_file(text: str) -> pathlib.Path:
    """A file that can be read."""
    path = pathlib.Path(text)
    try:
        path.open("rb").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from error
    return path


def parse_arguments() -> tuple[argparse.Namespace, Text]:
    """The command line, and the text that it names."""
    parser = comparison.make_parser(
        "Trains a small Flax NNX transformer on Python source, with and without gradient centralization.",
        output="nnx_language_model.png",
        seeds=3,
    )
    count = comparison.positive_integer
    parser.add_argument(
        "--text",
        type=existing_file,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="what to train on (default: the source of Python's standard library)",
    )
    parser.add_argument("--steps", type=count, default=250, help="training steps")
    parser.add_argument("--measure-every", type=count, default=25, help="steps between measurements")
    parser.add_argument("--batch-size", type=count, default=32, help="windows of text in a step")
    parser.add_argument("--length", type=count, default=64, help="bytes in a window")
    parser.add_argument("--layers", type=count, default=2, help="transformer blocks")
    parser.add_argument("--width", type=count, default=96, help="of the activations")
    parser.add_argument(
        "--learning-rate", type=comparison.positive_number, default=3e-3, help="of AdamW, after the warm-up"
    )
    arguments = parser.parse_args()
    if arguments.width % HEADS:
        parser.error(f"argument --width: {arguments.width} is no multiple of the {HEADS} attention heads")
    path = getattr(arguments, "text", None)
    text = read_library() if path is None else read_file(path)
    if min(map(len, text)) <= arguments.length:
        sizes = f"{len(text.train):,} bytes to train on and {len(text.held_out):,} held out"
        parser.error(f"argument --text: {sizes} are too few for windows of {arguments.length} and one more")
    arguments.text = "the standard library" if path is None else path.name
    return arguments, text


def main() -> None:
    """Trains, prints the table, saves the picture, and lets the model write."""
    arguments, text = parse_arguments()
    console = Console(markup=False)
    console.print(f"{len(text.train):,} bytes to train on, {len(text.held_out):,} bytes held out")
    optimizers = make_optimizers(arguments, console)
    points = [*range(arguments.measure_every, arguments.steps, arguments.measure_every), arguments.steps]
    title = (
        f"Decoder of {arguments.layers} x {arguments.width} on {arguments.text}: "
        f"AdamW at {arguments.learning_rate:g}, batches of {arguments.batch_size} x {arguments.length} bytes"
    )
    runs = comparison.Comparison(title, list(optimizers), seeds=arguments.seeds, points=points, unit="steps")
    with runs.measuring(console):
        starts = {name: make_start(tx, arguments) for name, tx in optimizers.items()}
        for seed in range(arguments.seeds):
            for name, start in starts.items():
                model, optimizer = start(jax.random.key(seed))
                for measured in train(model, optimizer, seed, text, points, arguments):
                    runs.add(name, seed, measured)
    runs.report(
        console, {"training perplexity": 3, "held-out perplexity": 3}, compare=["held-out perplexity"]
    )
    pairs = bigram_perplexity(text, cut_held_out(text, arguments.length))
    console.print(f"Counting pairs of bytes gives a held-out perplexity of {pairs:.2f}.")
    runs.draw(
        ["training perplexity", "held-out perplexity"],
        arguments.output,
        levels={"held-out perplexity": {"counting pairs of bytes": pairs}},
    )
    if not runs.stopped:
        console.print(f"After {arguments.length} held-out bytes, the last model ({name}) writes:\n")
        written = np.asarray(write_on(model, text.held_out[: arguments.length].astype(np.int32)))
        console.print(as_shown(written), highlight=False, soft_wrap=True)
        console.print()
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
