"""What XLA makes of the update on an accelerator, read from the program, which needs no such device.

JAX compiles for a GPU or a TPU that is described to it. The update with AdamW is compiled for every single
tensor of `overhead.py`, and for some whose inputs are the last axes, as in PyTorch's layout. By how much its
temporary memory is above the plain update's shows whether a centralized copy of the gradient is written.

    pip install 'jax[cuda12]'; JAX_PLATFORMS=cpu python benchmarks/ahead_of_time.py h100 [--json PATH]
    pip install libtpu;        JAX_PLATFORMS=cpu python benchmarks/ahead_of_time.py v5e [--json PATH]
"""

import argparse
import json
import math
import os

import jax
import jax.numpy as jnp
from harness import MEGABYTE, writable
from jax.experimental import topologies
from overhead import OPTIMIZERS, PLAIN, TENSORS, WAYS, compile_update, tensor_case
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

# The data sheet of an H100 SXM, in the words of XLA's GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
INPUTS_LAST = {(16384, 1024): (1,), (32000, 512): (1,), (512, 512, 3, 3): (1, 2, 3)}


def device(target: str) -> jax.Device:
    """A description of one device of a kind."""
    if target == "h100":
        topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    else:
        # The compiler looks for the machine that it is on, unless it is told.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
        os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    return topology.devices[0]


def main() -> None:
    """Compiles everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=["h100", "v5e"])
    parser.add_argument("--json", type=writable, help="also write the bytes to this file")
    arguments = parser.parse_args()

    console = Console()
    target = device(arguments.target)
    others = [way for way in WAYS if way != PLAIN]
    table = Table(
        title=f"{target.device_kind}: temporary memory of the AdamW update, MB above the plain one",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("tensor", "inputs", "dtype", "gradient", *others):
        table.add_column(heading, justify="left" if heading in ("tensor", "inputs", "dtype") else "right")
    runs = []
    shapes = (TENSORS | INPUTS_LAST).items()
    cases = [(shape, fan_in, dtype) for shape, fan_in in shapes for dtype in ("float32", "bfloat16")]
    for shape, fan_in, dtype in track(cases, description="compiling", transient=True, console=console):
        case = tensor_case(shape, fan_in, jnp.dtype(dtype))
        memory = {
            name: compile_update(case, OPTIMIZERS["adamw"], way, target).memory_analysis().temp_size_in_bytes
            for name, way in WAYS.items()
        }
        runs.append({"shape": shape, "fan_in": fan_in, "dtype": dtype, "temporary_bytes": memory})
        gradient = math.prod(shape) * jnp.dtype(dtype).itemsize / MEGABYTE
        above = (f"{(memory[way] - memory[PLAIN]) / MEGABYTE:+.2f}" for way in others)
        table.add_row(str(shape), str(fan_in), dtype, f"{gradient:.1f}", *above)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"target": target.device_kind, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
