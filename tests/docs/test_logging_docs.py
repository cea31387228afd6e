"""What docs/logging.md writes is in the file that TensorBoard reads."""

import pathlib
import re
import struct
import tempfile

import jax
import pytest

from gc_optax import removed_fraction

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "logging.md"


def read_scalars(file):
    """The scalars of an event file, (tag, step, value): records with their length in front and checksums."""
    data, scalars = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return scalars


def test_the_shares_of_the_kernels_are_written_at_their_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    page = {"__name__": "page"}
    setup, loop = re.findall(r"^```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    exec(setup, page)
    first = page["params"]
    exec(loop, page)

    (file,) = tmp_path.glob("*/events.out.tfevents.*")
    written = read_scalars(file)
    names = [f"removed_fraction/params/layers_{layer}/kernel" for layer in (0, 2)]
    assert [(name, step) for name, step, _ in written] == [
        (name, step) for step in range(0, 100, 10) for name in names
    ]
    assert all(0 < value <= 1 for _, _, value in written)
    gradients = jax.grad(page["loss"])(first, page["x"], page["y"])
    expected = removed_fraction(gradients, page["axes"])["params"]
    shares = [float(expected[layer]["kernel"]) for layer in ("layers_0", "layers_2")]
    assert [value for _, _, value in written[:2]] == pytest.approx(shares, rel=1e-4)
