"""What a benchmark has found so far, for those that are cut before their end (cuts.py)."""

from __future__ import annotations

import time
from typing import Any

from common import Row, seen


class Findings:
    """Rows, and why others are not there.

    Attributes:
        rows: what is printed; of who is not done, as far as it is known.
        left_out: by who, the reason.
        wanted: by who, the numbers of tokens of which there are to be rows.
    """

    def __init__(self, left_out: dict[str, str]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.left_out = left_out
        self.wanted: dict[str, list[int]] = {}
        self._begin = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """One that is measured; it goes to stderr as well, with the seconds since these were begun."""
        self.rows.append(row)
        seen({**row, "after s": round(time.monotonic() - self._begin, 1)})

    def cut(self) -> None:
        """Leave out what is not there, by this reason."""
        there = {(row["who"], row["tokens"]) for row in self.rows}
        for who, tokens in self.wanted.items():
            missing = [str(each) for each in tokens if (who, each) not in there]
            if missing and who not in self.left_out:
                self.left_out[who] = f"the run was cut before its passes of {', '.join(missing)} tokens"

    def tables(self, title: str) -> dict[str, list[Row]]:
        """As `report` takes them."""
        left_out: list[Row] = [{"who": who, "why": why} for who, why in self.left_out.items()]
        tables: dict[str, list[Row]] = {title: [*self.rows], "left out": left_out}
        return {name: rows for name, rows in tables.items() if rows}
