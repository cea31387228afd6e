"""The count of what a compiled program moves, and a pod's program that is compiled without a TPU."""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "tpu"


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("traffic")


def entry(body):
    return "ENTRY %main (p: f32[8,128]) -> f32[8,128] {\n" + textwrap.dedent(body) + "}\n"


ARRAY = 4 * 8 * 128


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[8,128]{1,0:T(8,128)}", [(ARRAY, True)]),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", [(ARRAY // 2, False)]),
        ("(f32[8,128]{1,0}, /*index=1*/s32[]{:S(2)})", [(ARRAY, True), (4, False)]),
        ("((pred[8]{0:T(1024)}), s4[16], token[])", [(8, True), (8, True), (0, True)]),
        ("()", []),
    ],
)
def test_the_arrays_of_a_type(traffic, type_, expected):
    assert traffic.arrays(type_) == expected


COUNTED = {
    "operands are read and results are written": (
        (2 * ARRAY, ARRAY),
        """
          %p = f32[8,128]{1,0:T(8,128)} parameter(0)
          %q = f32[8,128]{1,0:T(8,128)} parameter(1)
          ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%p, %q), metadata={op_name="jit(f)/add(x)"}
        """,
    ),
    "names for what is there cost nothing": (
        (0, 0),
        """
          %p = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
          %one = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=0
          %flat = f32[1024]{0:T(1024)} bitcast(%one)
          %zero = f32[] constant(0)
          ROOT %both = (f32[1024]{0:T(1024)}, f32[]) tuple(%flat, %zero)
        """,
    ),
    "on the chip, only the copies there and back count, each once": (
        (ARRAY, ARRAY),
        """
          %p = f32[8,128]{1,0:T(8,128)} parameter(0)
          %go = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
          %in = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%go)
          %twice = f32[8,128]{1,0:T(8,128)S(1)} add(%in, %in)
          %back = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%twice)
          ROOT %out = f32[8,128]{1,0:T(8,128)} copy-done(%back)
        """,
    ),
    "of a slice only the slice is read": (
        (ARRAY // 8 + ARRAY // 4, ARRAY // 8),
        """
          %p = f32[8,128]{1,0:T(8,128)} parameter(0)
          %row = f32[1,128]{1,0:T(1,128)} slice(%p), slice={[0:1], [0:128]}
          %go = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(2,128)S(1)}, s32[]{:S(2)}) slice-start(%p)
          ROOT %in = f32[2,128]{1,0:T(2,128)S(1)} slice-done(%go)
        """,
    ),
    "an update in place reads and writes the update": (
        (ARRAY // 8, ARRAY // 8),
        """
          %p = f32[8,128]{1,0:T(8,128)} parameter(0)
          %row = f32[1,128]{1,0:T(1,128)} parameter(1)
          %i = s32[]{:S(2)} parameter(2)
          ROOT %new = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%p, %row, %i, %i)
        """,
    ),
}


@pytest.mark.parametrize(("expected", "body"), COUNTED.values(), ids=COUNTED)
def test_what_an_instruction_moves(traffic, expected, body):
    assert traffic.hbm_traffic(traffic.parse(entry(body))) == expected


def test_a_fusion_moves_what_it_takes_in_and_gives_out(traffic):
    # Of `a` and of `c` all, of `b` a row by way of a fusion within the fusion; `d` is updated by a row.
    program = """
        HloModule jit_step, is_scheduled=true

        %inner (x: f32[8,128], i: s32[]) -> f32[1,128] {
          %x = f32[8,128]{1,0:T(8,128)} parameter(0)
          %i = s32[] parameter(1)
          %zero = s32[] constant(0)
          ROOT %row = f32[1,128]{1,0:T(1,128)} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={1,128}
        }

        %outer (a: f32[8,128], b: f32[8,128], d: f32[8,128], i: s32[]) -> (f32[8,128], f32[1024]) {
          %b = f32[8,128]{1,0:T(8,128)} parameter(1)
          %a = f32[8,128]{1,0:T(8,128)} parameter(0)
          %d = f32[8,128]{1,0:T(8,128)} parameter(2)
          %i = s32[] parameter(3)
          %same = f32[8,128]{1,0:T(8,128)} bitcast(%b)
          %row = f32[1,128]{1,0:T(1,128)} fusion(%same, %i), kind=kLoop, calls=%inner
          %zero = s32[] constant(0)
          %new = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%d, %row, %i, %zero)
          %twice = f32[8,128]{1,0:T(8,128)} add(%a, %a)
          %flat = f32[1024]{0:T(1024)} bitcast(%new)
          ROOT %both = (f32[8,128]{1,0:T(8,128)}, f32[1024]{0:T(1024)}) tuple(%twice, %flat)
        }

        ENTRY %main (a: f32[8,128], b: f32[8,128], d: f32[8,128], i: s32[]) -> (f32[8,128], f32[1024]) {
          %a = f32[8,128]{1,0:T(8,128)} parameter(0)
          %b = f32[8,128]{1,0:T(8,128)} parameter(1)
          %d = f32[8,128]{1,0:T(8,128)} parameter(2)
          %i = s32[]{:S(2)} parameter(3)
          ROOT %f = (f32[8,128]{1,0:T(8,128)}, f32[1024]{0:T(1024)}) fusion(%a, %b, %d, %i), calls=%outer
        }
    """
    row = ARRAY // 8
    assert traffic.hbm_traffic(traffic.parse(program)) == (ARRAY + row, ARRAY + row)


LOOP = """
    %body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
      %t = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
      %i = s32[]{:S(2)} get-tuple-element(%t), index=0
      %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%t), index=1
      %y = f32[8,128]{1,0:T(8,128)} call(%x), to_apply=%doubled
      ROOT %next = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%i, %y)
    }

    %doubled (x: f32[8,128]) -> f32[8,128] {
      %x = f32[8,128]{1,0:T(8,128)} parameter(0)
      ROOT %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
    }

    ENTRY %main (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
      %t = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
      ROOT %loop = (s32[], f32[8,128]{1,0:T(8,128)}) while(%t), condition=%less, body=%body
    }
"""
TRIPS = ', backend_config={"known_trip_count":{"n":"5"}}'


def test_what_is_in_a_loop_counts_as_often_as_it_is_run(traffic):
    program = traffic.parse(LOOP.replace("body=%body", "body=%body" + TRIPS))
    assert traffic.hbm_traffic(program) == (5 * ARRAY, 5 * ARRAY)
    assert traffic.collectives(program) == {"all-reduce": (5, 5 * ARRAY)}


def test_what_cannot_be_counted_is_no_number(traffic):
    with pytest.raises(ValueError, match=r"how often the body is run is not known: .*%loop"):
        traffic.hbm_traffic(traffic.parse(LOOP))
    branch = """
      %i = s32[] parameter(0)
      ROOT %r = f32[] conditional(%i, %i, %i), branch_computations={%a, %b}
    """
    with pytest.raises(ValueError, match=r"which branch is run is not known: .*%r"):
        traffic.collectives(traffic.parse(entry(branch)))


def test_what_cannot_be_read_is_not_left_out(traffic):
    with pytest.raises(ValueError, match="an instruction that cannot be read: %p = new"):
        traffic.parse(entry("  %p = new syntax\n"))


def test_collectives_are_found_in_fusions_and_where_they_are_done(traffic):
    program = """
        %scatter (x: f32[8,128]) -> f32[4,128] {
          %x = f32[8,128]{1,0:T(8,128)} parameter(0)
          %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%x), to_apply=%add
          ROOT %mine = f32[4,128]{1,0:T(4,128)} slice(%sum), slice={[0:4], [0:128]}
        }

        ENTRY %main (x: f32[8,128]) -> (f32[4,128], f32[16,128]) {
          %x = f32[8,128]{1,0:T(8,128)} parameter(0)
          %one = f32[4,128]{1,0:T(4,128)} fusion(%x), kind=kCustom, calls=%scatter
          %go = (f32[8,128]{1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)S(1)}) all-gather-start(%x), dimensions={0}
          %all = f32[16,128]{1,0:T(8,128)S(1)} all-gather-done(%go)
          %two = (f32[8]{0:T(128)}, f32[2]{0:T(128)}) all-reduce(%p, %q), to_apply=%add
          ROOT %both = (f32[4,128]{1,0:T(4,128)}, f32[16,128]{1,0:T(8,128)S(1)}) tuple(%one, %all)
        }
    """
    expected = {"all-reduce": (2, ARRAY + 4 * (8 + 2)), "all-gather": (1, 2 * ARRAY)}
    assert traffic.collectives(traffic.parse(program)) == expected


@pytest.fixture
def pod(monkeypatch):
    """The benchmark as a module; what it sets in the environment stays in a copy of it."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("pod")


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(("name", "parameters"), [("7B", 6_738_415_616), ("70B", 68_976_648_192)])
def test_the_decoders_are_those_of_llama_2(pod, name, parameters, scanned):
    tree = pod.weights(pod.DECODERS[name], scanned)
    leaves = pod.jax.tree.leaves(tree, is_leaf=pod.is_weight)
    assert sum(math.prod(weight.shape) for weight in leaves) == parameters


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--models", "8B", "argument --models: invalid choice"),
        ("--meshes", "64", "argument --meshes: invalid mesh_shape value"),
        ("--json", "no/such/folder/pod.json", "argument --json: there is no folder"),
    ],
)
def test_bad_arguments_are_refused(pod, monkeypatch, capsys, option, value, message):
    monkeypatch.setattr(sys, "argv", ["pod.py", option, value])
    with pytest.raises(SystemExit, match="2"):
        pod.main()
    assert message in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(pod, monkeypatch, capsys):
    monkeypatch.setattr(pod.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["pod.py"])
    with pytest.raises(SystemExit, match="2"):
        pod.main()
    assert "there is no libtpu here; pip install '.[tpu]'" in capsys.readouterr().err


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="there is no libtpu; `make test-tpu` runs this"
)


def run(*arguments):
    command = [sys.executable, SCRIPTS / "pod.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What is printed and written of a decoder that is too large for the memory on the chips."""
    numbers = tmp_path_factory.mktemp("pod") / "pod.json"
    finished = run("--models", "small", "--topology", "v5e:2x2", "--meshes", "2x2", "--json", numbers)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads(numbers.read_text())


@needs_libtpu
def test_plain_adamw_reads_four_arrays_writes_three_and_sends_nothing(small):
    _, written = small
    for run in written["runs"]:
        plain = run["programs"]["plain"]
        assert plain["hbm"]["read"] == pytest.approx(4 * run["parameter_bytes"], rel=1e-3)
        assert plain["hbm"]["written"] == pytest.approx(3 * run["parameter_bytes"], rel=1e-3)
        assert plain["collectives"] == {}


@needs_libtpu
def test_centralization_reads_the_gradients_once_more_and_sends_the_means(small):
    _, written = small
    assert [run["decoder"] for run in written["runs"]] == ["small", "small, scanned"]
    for run in written["runs"]:
        plain, centralized = run["programs"]["plain"], run["programs"]["centralized"]
        assert sum(centralized["hbm"].values()) <= (8 / 7 + 0.02) * sum(plain["hbm"].values())
        assert centralized["hbm"]["written"] - plain["hbm"]["written"] <= run["mean_bytes"]
        assert set(centralized["collectives"]) == {"all-reduce"}
        count, size = centralized["collectives"]["all-reduce"]
        assert count <= 2
        assert size <= run["mean_bytes"]


@needs_libtpu
def test_what_is_printed_is_what_was_written(small):
    printed, written = small
    for run in written["runs"]:
        plain, centralized = (sum(program["hbm"].values()) for program in run["programs"].values())
        row = rf"{run['decoder']} +2x2 +{plain / 2**20:,.2f} +7\.000 +{centralized / plain:.3f} "
        assert re.search(row, printed), printed


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:2x2", "argument --meshes: v5e:2x2 has 4 chips, and not 4x4"),
        ("v0:2x2", "argument --topology: INVALID_ARGUMENT"),
    ],
)
def test_a_pod_that_is_not_or_has_other_chips_is_refused(topology, message):
    finished = run("--topology", topology, "--meshes", "4x4")
    assert finished.returncode == 2
    assert message in finished.stderr
