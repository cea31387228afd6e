"""What a compiled program sends between devices."""

import math
import re
from collections import Counter

_KINDS = "all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-[a-z]+"


def collectives(program):
    """The kind and the number of entries of every array that results from a collective, counted.

    What an all-reduce sends is as large as its results are. It has several where XLA has combined several.
    """
    sent = Counter()
    for line in program.as_text().splitlines():
        if found := re.search(rf" = (.*) ({_KINDS})(-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            assert shapes, line
            for shape in shapes:
                sent[found[2], math.prod(map(int, filter(None, shape.split(","))))] += 1
    return sent
