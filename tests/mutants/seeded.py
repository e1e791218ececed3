"""What a seeded bug is."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """What to put in the place of ``old``, which occurs once in ``file``; ``tests`` as pytest takes them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
