"""What a compiled program sends between devices."""

import math
import re
from collections import Counter

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def collectives(program):
    """The kind and the number of entries of every array that a compiled program sends, counted."""
    sent = Counter()
    # A collective that was combined from several has a tuple of results.
    for result, kind in re.findall(rf"= (\([^)]*\)|\S+) ({_KINDS})(?:-start)?\(", program.as_text()):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            sent[kind, math.prod(map(int, filter(None, shape.split(","))))] += 1
    return sent
