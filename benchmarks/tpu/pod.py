"""What gradient centralization adds to the AdamW update of a large decoder on a TPU pod. No TPU is needed.

The update (`optax.adamw` and `optax.apply_updates`, parameters and state donated) is compiled ahead of time
by the compiler for TPUs: float32 parameters, gradients and moments, sharded over a mesh of "fsdp" and "tp",
once with every weight of every layer an array of its own and once "scanned", the weights of all layers
stacked. What is printed is read off two programs, the plain one and the centralized one, of one chip:

- HBM traffic of a step, as `traffic.py` counts it. "arrays": that of plain AdamW in sizes of all parameters;
  it reads four and writes three. "ratio": that of the centralized program to it. "floor": the ratio if every
  gradient that is centralized is read once more; it can be less, where a gradient stays on the chip.
  "accessed": the ratio of the compiler's own `bytes accessed`, which counts what is moved on the chip too.
- Collectives, with the bytes of their results. Means are all-reduced where the inputs of a weight vector are
  on several chips.
- Temporary memory in HBM. "spilled": the bytes that the centralized program writes to HBM and the plain one
  does not, which are means, and sums that they are made of, where they find no room on the chip.

    pip install -e '.[tpu]'
    python benchmarks/tpu/pod.py [--models NAME ...] [--topology NAME] [--meshes FSDPxTP ...] [--json PATH]
"""

import os

# Nothing is run, so that JAX needs no devices, the compiler no TPU, and nobody has to wait for another.
os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import importlib.util
import itertools
import math
import pathlib
import platform
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from traffic import collectives, hbm_traffic, parse

import gc_optax

sys.path.append(str(pathlib.Path(__file__).absolute().parent.parent))
import harness

PLAIN, CENTRALIZED = "plain", "centralized"
FSDP, TP = "fsdp", "tp"
# Kernels are (inputs, outputs). Of two that follow each other, "tp" splits the outputs, then the inputs.
COLUMNS, ROWS, WHOLE = P(FSDP, TP), P(TP, FSDP), P()
INPUTS = -2


class Decoder(NamedTuple):
    """The sizes of a decoder with the architecture of Llama 2; `keys` is what all keys of a token take."""

    layers: int
    embed: int
    hidden: int
    keys: int
    vocabulary: int = 32_000


DECODERS = {
    "7B": Decoder(layers=32, embed=4096, hidden=11_008, keys=4096),
    "70B": Decoder(layers=80, embed=8192, hidden=28_672, keys=1024),
    "small": Decoder(layers=2, embed=4096, hidden=11_008, keys=1024, vocabulary=4096),
}


class Weight(NamedTuple):
    """A parameter: its shape, how it is sharded, and the axis of its inputs."""

    shape: tuple[int, ...]
    spec: P
    fan_in: int | None

    def array(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """The parameter on a mesh."""
        return jax.ShapeDtypeStruct(self.shape, jnp.float32, sharding=NamedSharding(mesh, self.spec))

    def means(self) -> "Weight":
        """The means of all weight vectors."""
        kept = [axis for axis in range(-len(self.shape), 0) if axis != self.fan_in]
        return Weight(tuple(self.shape[axis] for axis in kept), P(*(self.spec[axis] for axis in kept)), None)


def is_weight(node: Any) -> bool:
    """Where to stop in a tree of weights."""
    return isinstance(node, Weight)


def weights(decoder: Decoder, scanned: bool) -> dict[str, Any]:
    """All parameters of a decoder."""
    embed, hidden, keys = decoder.embed, decoder.hidden, decoder.keys
    layer = {
        "query": Weight((embed, embed), COLUMNS, INPUTS),
        "key": Weight((embed, keys), COLUMNS, INPUTS),
        "value": Weight((embed, keys), COLUMNS, INPUTS),
        "out": Weight((embed, embed), ROWS, INPUTS),
        "gate": Weight((embed, hidden), COLUMNS, INPUTS),
        "up": Weight((embed, hidden), COLUMNS, INPUTS),
        "down": Weight((hidden, embed), ROWS, INPUTS),
        "attention_norm": Weight((embed,), WHOLE, None),
        "mlp_norm": Weight((embed,), WHOLE, None),
    }
    stacked = {
        name: Weight((decoder.layers, *shape), P(None, *spec), fan_in)
        for name, (shape, spec, fan_in) in layer.items()
    }
    return {
        "embedding": Weight((decoder.vocabulary, embed), ROWS, None),
        "layers": stacked if scanned else [layer] * decoder.layers,
        "norm": Weight((embed,), WHOLE, None),
        "logits": Weight((embed, decoder.vocabulary), COLUMNS, INPUTS),
    }


def local_bytes(parameters: list[Weight], mesh: Mesh) -> int:
    """What a chip has of some parameters."""
    arrays = [weight.array(mesh) for weight in parameters]
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def compile_sharded(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> jax.stages.Compiled:
    """The program of the update, for every chip of the mesh."""
    whole = NamedSharding(mesh, WHOLE)
    state = optax.tree_map_params(
        optimizer,
        lambda moment, param: param,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda count: jax.ShapeDtypeStruct(count.shape, count.dtype, sharding=whole),
    )
    shardings = jax.tree.map(lambda array: array.sharding, (params, state))
    return harness.compile_update(optimizer, params, state, out_shardings=shardings)


def read_off(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What is to be known of a program."""
    program = parse(compiled.as_text())
    return {
        "hbm": hbm_traffic(program)._asdict(),
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"],
        "collectives": collectives(program),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def measure(decoder: Decoder, scanned: bool, mesh: Mesh) -> dict[str, Any]:
    """Compiles both updates of a decoder on a mesh, and reads them."""
    tree = weights(decoder, scanned)
    leaves = jax.tree.leaves(tree, is_leaf=is_weight)
    kernels = [weight for weight in leaves if weight.fan_in is not None]
    params = jax.tree.map(lambda weight: weight.array(mesh), tree, is_leaf=is_weight)
    axes = jax.tree.map(lambda weight: weight.fan_in, tree, is_leaf=is_weight)
    adamw = optax.adamw(1e-3)
    ways = {PLAIN: adamw, CENTRALIZED: optax.chain(gc_optax.centralize(axes), adamw)}
    return {
        "parameters": sum(math.prod(weight.shape) for weight in leaves),
        "kernels": len(kernels),
        "parameter_bytes": local_bytes(leaves, mesh),
        "kernel_bytes": local_bytes(kernels, mesh),
        "mean_bytes": local_bytes([weight.means() for weight in kernels], mesh),
        "programs": {name: read_off(compile_sharded(way, params, mesh)) for name, way in ways.items()},
    }


def megabytes(size: float) -> str:
    """A size for people."""
    return f"{size / harness.MEGABYTE:,.2f}"


def report(runs: list[dict[str, Any]], console: Console) -> None:
    """Prints what centralization adds."""
    names = ["decoder", "mesh"]
    traffic = ["plain, MB", "arrays", "ratio", "floor", "accessed"]
    moved = harness.table("HBM traffic of a chip in a step", names, traffic)
    counts = ["plain", "all-reduces", "MB", "others", "MB"]
    sent = harness.table("Collectives of plain AdamW, and of centralized AdamW by kind", names, counts)
    sizes = ["plain", "added", "spilled", "all means"]
    held = harness.table("Temporary memory in HBM, MB", names, sizes)
    for run in runs:
        plain, centralized = run["programs"][PLAIN], run["programs"][CENTRALIZED]
        name = (run["decoder"], run["mesh"])
        before, after = (sum(program["hbm"].values()) for program in (plain, centralized))
        moved.add_row(
            *name,
            megabytes(before),
            f"{before / run['parameter_bytes']:.3f}",
            f"{after / before:.3f}",
            f"{1 + run['kernel_bytes'] / before:.3f}",
            f"{centralized['bytes_accessed'] / plain['bytes_accessed']:.2f}",
        )
        others = dict(centralized["collectives"])
        count, size = others.pop("all-reduce", (0, 0))
        sent.add_row(
            *name,
            str(sum(count for count, _ in plain["collectives"].values())),
            str(count),
            megabytes(size),
            str(sum(count for count, _ in others.values())),
            megabytes(sum(size for _, size in others.values())),
        )
        held.add_row(
            *name,
            megabytes(plain["temporary_bytes"]),
            megabytes(centralized["temporary_bytes"] - plain["temporary_bytes"]),
            megabytes(centralized["hbm"]["written"] - plain["hbm"]["written"]),
            megabytes(run["mean_bytes"]),
        )
    console.print(moved, sent, held)


def mesh_shape(given: str) -> tuple[int, int]:
    """The sizes of "fsdp" and "tp", for argparse."""
    fsdp, tp = map(int, given.split("x"))
    return fsdp, tp


def main() -> None:
    """Compiles the update of every decoder on every mesh, and prints the tables."""
    parser = harness.command_line(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=DECODERS, default=["7B", "70B"], help="default: 7B 70B"
    )
    parser.add_argument("--topology", default="v5e:16x16", metavar="NAME", help="default: v5e:16x16")
    parser.add_argument(
        "--meshes", nargs="+", type=mesh_shape, default=[(64, 4)], metavar="FSDPxTP", help="default: 64x4"
    )
    arguments = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.error("there is no libtpu here; pip install '.[tpu]'")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    except jax.errors.JaxRuntimeError as error:
        parser.error(f"argument --topology: {error}")
    for shape in arguments.meshes:
        if math.prod(shape) != len(devices):
            asked = "x".join(map(str, shape))
            parser.error(f"argument --meshes: {arguments.topology} has {len(devices)} chips, and not {asked}")

    console = harness.wide_console()
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu", "optax"))
    console.print(f"{arguments.topology}, Python {platform.python_version()}, {versions}")
    cases = list(itertools.product(arguments.models, (False, True), arguments.meshes))
    runs = []
    for model, scanned, shape in track(cases, description="compiling", transient=True, console=console):
        run = measure(DECODERS[model], scanned, Mesh(np.reshape(devices, shape), (FSDP, TP)))
        names = {"decoder": model + ", scanned" * scanned, "mesh": "x".join(map(str, shape))}
        runs.append(names | run)
    report(runs, console)
    harness.save({"topology": arguments.topology, "versions": versions, "runs": runs}, arguments.json)


if __name__ == "__main__":
    main()
