"""The count of what a compiled program moves."""

import importlib
import pathlib
import textwrap

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
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
          %on = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(2,128)S(1)}, s32[]{:S(2)}) slice-update(%go)
          ROOT %in = f32[2,128]{1,0:T(2,128)S(1)} slice-done(%on)
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

        %outer (a: f32[8,128], b: f32[8,128], d: f32[8,128], i: s32[]) -> (f32[8,128], f32[8,128]) {
          %b = f32[8,128]{1,0:T(8,128)} parameter(1)
          %a = f32[8,128]{1,0:T(8,128)} parameter(0)
          %d = f32[8,128]{1,0:T(8,128)} parameter(2)
          %i = s32[] parameter(3)
          %same = f32[8,128]{1,0:T(8,128)} bitcast(%b)
          %row = f32[1,128]{1,0:T(1,128)} fusion(%same, %i), kind=kLoop, calls=%inner
          %zero = s32[] constant(0)
          %new = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%d, %row, %i, %zero)
          %twice = f32[8,128]{1,0:T(8,128)} add(%a, %a)
          ROOT %both = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%twice, %new)
        }

        ENTRY %main (a: f32[8,128], b: f32[8,128], d: f32[8,128], i: s32[]) -> (f32[8,128], f32[8,128]) {
          %a = f32[8,128]{1,0:T(8,128)} parameter(0)
          %b = f32[8,128]{1,0:T(8,128)} parameter(1)
          %d = f32[8,128]{1,0:T(8,128)} parameter(2)
          %i = s32[]{:S(2)} parameter(3)
          ROOT %f = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%a, %b, %d, %i), calls=%outer
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
