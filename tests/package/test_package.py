"""The package as a user gets it: what it loads, how it is built, what type checkers make of it."""

import hashlib
import json
import os
import pathlib
import pydoc
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import gc_optax

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = pathlib.Path(__file__).with_name("typed_program.py")


def run(*command, **options):
    """Runs a command to its end; what it printed is in the error if it fails."""
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


# What is loaded


def test_every_public_name_is_there_and_is_shown():
    assert set(gc_optax.__all__) < set(dir(gc_optax))
    for name in gc_optax.__all__:
        assert getattr(gc_optax, name).__doc__
    with pytest.raises(AttributeError, match="module 'gc_optax' has no attribute 'infer_axis'"):
        gc_optax.infer_axis  # noqa: B018


def test_a_framework_is_listed_once_it_is_loaded_and_loads_when_it_is_first_used():
    program = (
        "import sys, gc_optax\n"
        "print(*dir(gc_optax))\n"
        "gc_optax.nnx.infer_axes, gc_optax.keras.centralized\n"
        "print(*dir(gc_optax))"
    )
    before, after = (set(line.split()) for line in run(sys.executable, "-c", program, cwd=ROOT).splitlines())
    assert before == {*gc_optax.__all__, "__version__"}
    assert after - before == {"keras", "nnx"}


@pytest.mark.parametrize(("framework", "module"), [("flax", "nnx"), ("keras", "keras")])
def test_without_a_framework_its_module_says_what_to_install_and_help_works(framework, module):
    program = (
        f"import sys; sys.modules[{framework!r}] = None\n"
        "import gc_optax, pydoc\n"
        "pydoc.render_doc(gc_optax)\n"
        f"try:\n    gc_optax.{module}\n"
        "except ImportError as error:\n    print(error)"
    )
    told = run(sys.executable, "-c", program, cwd=ROOT)
    assert told == f"gc_optax.{module} needs {framework.title()}: pip install {framework}\n"


def test_help_describes_the_public_names_only():
    page = pydoc.plain(pydoc.render_doc(gc_optax))
    described = re.findall(r"^ {4}(?:class )?(\w+)\(", page, re.MULTILINE)
    assert sorted(described) == sorted({*gc_optax.__all__} - {"optimizers"})


def test_an_import_loads_neither_what_reads_programs_nor_a_framework():
    loaded = run(sys.executable, "-c", "import sys, optax, gc_optax; print(*sys.modules)", cwd=ROOT).split()
    assert "gc_optax._centralize" in loaded
    for module in ("gc_optax._infer", "gc_optax.nnx", "jax.extend", "flax", "keras", "rich", "equinox"):
        assert module not in loaded
    read = run(
        sys.executable, "-c", "import sys, gc_optax; gc_optax.infer_axes; print(*sys.modules)", cwd=ROOT
    )
    assert "gc_optax._infer" in read.split()


# How it is built


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheel and the source distribution, built twice, by their names."""
    pytest.importorskip("hatchling", reason="what builds the package comes with the extra dev")
    folders = [tmp_path_factory.mktemp("built") for _ in range(2)]
    for folder in folders:
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return [{path.name: path for path in folder.iterdir()} for folder in folders]


@pytest.mark.slow
def test_the_package_is_built_to_the_same_bytes(built):
    first, second = (
        {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        for files in built
    )
    assert sorted(first) == [
        f"gc_optax-{gc_optax.__version__}-py3-none-any.whl",
        f"gc_optax-{gc_optax.__version__}.tar.gz",
    ]
    assert first == second


@pytest.mark.slow
def test_the_wheel_is_the_package_and_the_source_distribution_can_be_tested(built):
    source, wheel = sorted(built[0].values(), key=lambda path: path.suffix)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gc_optax").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == modules | {"gc_optax/py.typed"}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "conftest.py"}
    needed |= {
        "tests/package/test_package.py",
        "docs/variants.md",
        "examples/quickstart.py",
        "benchmarks/overhead.py",
    }
    assert names >= modules | needed
    assert not [name for name in names if name.startswith(".") and name != ".gitignore"]


@pytest.mark.slow
def test_an_index_would_take_the_package(built):
    told = run(sys.executable, "-m", "twine", "check", "--strict", *map(str, built[0].values()))
    assert told.count("PASSED") == 2


# What type checkers make of it


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """An environment with the wheel in it and, after it, all that is installed here."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    packages = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    _, wheel = sorted(built[0].values(), key=lambda path: path.suffix)
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.mark.slow
def test_mypy_refuses_misuse_and_nothing_else(installed, tmp_path):
    options = ["--strict", "--allow-untyped-calls", "--ignore-missing-imports", f"--cache-dir={tmp_path}"]
    python = ["--python-executable", str(installed / "bin" / "python")]
    told = run(sys.executable, "-m", "mypy", *options, *python, str(PROGRAM), cwd=tmp_path)
    assert "Success: no issues found in 1 source file" in told


@pytest.mark.slow
def test_pyright_refuses_misuse_and_nothing_else(installed, tmp_path):
    settings = {"typeCheckingMode": "standard", "reportUnnecessaryTypeIgnoreComment": "error"}
    (tmp_path / "program.py").write_text(PROGRAM.read_text())
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    python = str(installed / "bin" / "python")
    told = run(
        sys.executable,
        "-m",
        "basedpyright",
        "--pythonpath",
        python,
        "program.py",
        cwd=tmp_path,
        env=os.environ,
    )
    assert "0 errors, 0 warnings, 0 notes" in told
