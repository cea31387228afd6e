"""`infer_axes` on programs that are put together at random, with the truth by construction (programs.py)."""

import collections

import pytest
from programs import build, read

PROGRAMS, CHUNK = 1000, 100
SEED = 20


@pytest.mark.parametrize("start", range(0, PROGRAMS, CHUNK))
def test_no_answer_is_wrong(start):
    verdicts, wrong = collections.Counter(), []
    for number in range(start, start + CHUNK):
        case = f"{SEED}:{number}"
        answers, _ = read(build(case))
        verdicts.update(answer.verdict for answer in answers.values())
        wrong += [f"--case {case}, {name}: {a}" for name, a in answers.items() if a.verdict == "wrong"]
    assert not wrong, "\n".join(wrong)
    assert verdicts["right"] > 0.6 * verdicts.total()


def test_a_warning_names_what_it_is_about_and_nothing_that_has_an_answer():
    warned = 0
    for number in range(200):
        answers, warning = read(build(f"{SEED}:{number}"))
        for name, answer in answers.items():
            assert not (answer.fan_in and f"['{name}']" in warning)
            warned += answer.verdict == "warned"
        assert bool(warning) == any(f"['{name}'], shape" in warning for name in answers)
    assert warned


def test_a_case_is_the_same_program_again():
    first, again = build("1:5"), build("1:5")
    assert (first.params, first.parts) == (again.params, again.parts)
