"""What CONTRIBUTING.md says to do works, and what it names is there."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()

# In a process of its own: a rule that is registered stays.
WORKED_CASE = """
import sys, warnings

sys.path.insert(0, sys.argv[1])
import pytest, test_moves
from gc_optax._infer import _moves

cases, rule = sys.argv[2:]
names = dict(vars(test_moves))
exec(cases, names)
cases = names["RESHAPED"][1:]
warnings.simplefilter("error")
for case in cases:
    with pytest.raises(UserWarning, match="cumsum: what became of it cannot be read"):
        test_moves.check(case)
exec(rule, vars(_moves))
for case in cases:
    test_moves.check(case)
print(len(cases))
"""


def test_the_worked_case_works():
    cases, rule, _ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    command = [sys.executable, "-c", WORKED_CASE, ROOT / "tests" / "infer_axes", cases, rule]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2\n", done.stderr


def test_the_files_and_the_commands_that_are_named_are_there():
    pages = TEXT + (ROOT / "docs" / "inside.md").read_text()
    named = re.findall(r"(?<![\w/.])((?:tests|gc_optax|examples|docs|benchmarks)/[\w/]*\w\.\w+)", pages)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [
        name for line in re.findall(r"`make ([^`]+)`", pages) for name in line.split() if "=" not in name
    ]
    assert len(commands) > 8
    assert [name for name in commands if name not in targets] == []
