"""Settings that every test shares, and the parser that runs the Python blocks of README.md and of docs/."""

import atexit
import os
import shutil
import tempfile

import hypothesis
import jax
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# Keras chooses its backend, and writes its configuration, when it is first imported.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-")
atexit.register(shutil.rmtree, os.environ["KERAS_HOME"])

# Tests are about programs for the CPU unless JAX_PLATFORMS says otherwise, also those in other processes.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
# Enough devices for a mesh. What is not about devices runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes most of an example's time, so its duration says nothing; the same examples on every
# machine make a failure one that anybody can repeat.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()
