"""From how many tokens on prefetching is no slower than other parallelisms, of measured or predicted passes."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

Row = dict[str, Any]


def spread_tokens(count: int, per_rank: list[int]) -> dict[tuple[int, str], list[int]]:
    """By the mean of a rank and how they are spread, the tokens of each rank."""
    spreads = {}
    for tokens in per_rank:
        spreads[tokens, "equal"] = [tokens] * count
        # Half as many on the first rank and half as many more on the last: the same work in all.
        spreads[tokens, "unequal"] = [int(tokens * (0.5 + rank / max(1, count - 1))) for rank in range(count)]
    return spreads


def crossovers(rows: list[Row]) -> list[Row]:
    """From how many tokens on DWDP is no slower, and its time over that of the others, by mean tokens of a rank.

    The time is the mean over ranks: those that prefetch do not wait for each other, and the others all take as long.
    """
    found = []
    for name, spread in dict.fromkeys((row["stack"], row["spread"]) for row in rows):
        cases = [row for row in rows if (row["stack"], row["spread"]) == (name, spread)]
        result: Row = {"stack": name, "spread": spread}
        for other in ("expert parallel", "tensor parallel"):
            for source in ("", "predicted "):
                columns = [f"{source}{column} ms" for column in ("dwdp staged", other)]
                if not all(column in cases[0] for column in columns):
                    continue
                ratios = {}
                for tokens in dict.fromkeys(row["mean tokens"] for row in cases):
                    of = [row for row in cases if row["mean tokens"] == tokens]
                    ours, theirs = (statistics.mean(row[column] for row in of) for column in columns)
                    ratios[tokens] = ours / theirs
                result[f"{source}over {other}"] = {tokens: round(ratio, 3) for tokens, ratio in ratios.items()}
                result[f"{source}no slower than {other} from"] = _crossing(ratios)
        found.append(result)
    return found


def _crossing(ratios: dict[int, float]) -> str:
    """Where a ratio that falls with the tokens comes to 1, over logarithms."""
    tokens = sorted(ratios)
    if ratios[tokens[0]] <= 1:
        return f"at most {tokens[0]}"
    for low, high in itertools.pairwise(tokens):
        if ratios[low] > 1 >= ratios[high]:
            part = math.log(ratios[low]) / math.log(ratios[low] / ratios[high])
            return f"{low * (high / low) ** part:.0f}"
    return f"more than {tokens[-1]}"
