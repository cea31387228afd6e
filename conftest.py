"""Settings that every test shares, and the parser that runs the Python blocks of README.md and of docs/."""

import atexit
import os
import re
import shutil
import signal
import tempfile
from importlib import metadata

import hypothesis
import jax
import pytest
from packaging.requirements import Requirement
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# Keras chooses its backend, and writes its configuration, when it is first imported.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-")
atexit.register(shutil.rmtree, os.environ["KERAS_HOME"])

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts. The tests that press
# it need a program that does not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests are about programs for the CPU unless JAX_PLATFORMS says otherwise, also those in other processes.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
# Enough devices for a mesh. What is not about devices runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes most of an example's time, so its duration says nothing; the same examples on every
# machine make a failure one that anybody can repeat.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """Keeps what is compiled for the other processes and for the next run, in `.pytest_cache`.

    Compiling takes most of the time of the tests. JAX looks a program up by all that it is compiled from, the
    version of XLA included, so what has changed is compiled anew.
    """
    if cache := getattr(config, "cache", None):
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()


def pytest_report_header():
    """The versions under test: of what pyproject.toml names, as far as it is installed, and of jaxlib."""
    named = {re.match(r"[\w-]+", line)[0] for line in metadata.requires("gc_optax")} - {"gc_optax"}
    installed = {found.name for found in metadata.distributions()}
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(named & installed | {"jaxlib"}))


# What these docstrings show is newer than the oldest version that gc_optax itself runs with.
SHOWN_SINCE = {
    "gc_optax._axes.WeightAxes.to_galore": "optax>=0.2.7",
    "gc_optax._report.removed_fraction": "optax>=0.2.7",
    "gc_optax.nnx.infer_axes": "flax>=0.12.7",
}


def pytest_collection_modifyitems(items):
    """Leaves out the examples that the installed versions are too old for."""
    for item in items:
        if item.name in SHOWN_SINCE:
            needed = Requirement(SHOWN_SINCE[item.name])
            if metadata.version(needed.name) not in needed.specifier:
                item.add_marker(pytest.mark.skip(reason=f"the example is for {needed}"))
