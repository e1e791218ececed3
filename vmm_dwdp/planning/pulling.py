"""What one simulated rank copies next: by plans that are fixed ahead, and by the owner that is chosen for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan, Segment
from vmm_dwdp.layout.placement import HOST, Owner
from vmm_dwdp.layout.turns import SMALLEST_RUN, choose, cut_runs
from vmm_dwdp.planning.links import Flow

ENGINE_TURN: Final = 32 << 20  # bytes that a copy engine is taken to move for one stream before it turns to the next


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Ranks that choose the owner of each run when the run before it ends; see [Note: Turns] in ``layout/turns.py``.

    Attributes:
        run_bytes: the longest run.
        gap: seconds from the end of a run to the start of the next; none for a rank that pulls while no other does,
            which has two runs under way.
        sees: ranks of one node, who see each other's lines: so many in the order of their numbers; ``None``: all.

    Raises:
        ConfigError: a value cannot be.
    """

    run_bytes: int = 128 << 20
    gap: float = 0.0
    sees: int | None = None

    def __post_init__(self) -> None:
        if self.run_bytes < SMALLEST_RUN:
            raise ConfigError(f"a run has at least {SMALLEST_RUN} bytes, not {self.run_bytes}")
        if self.gap < 0:
            raise ConfigError(f"the gap between two runs must be at least 0, not {self.gap} s")
        if self.sees is not None and self.sees < 1:
            raise ConfigError(f"a rank sees at least itself, not {self.sees} ranks")


class Pulls(Protocol):
    """The copies of one rank for a layer. Each lane has at most one under way."""

    @property
    def lanes(self) -> int: ...

    def begin(self) -> None:
        """All copies of a layer are to be made."""

    def pause(self, lane: int) -> float:
        """Seconds until the lane's next copy can begin."""

    def take(self, lane: int) -> Flow | None:
        """The lane's next copy, which begins; ``None`` if it has no more."""

    def end(self, lane: int) -> bool:
        """The lane's copy has ended; whether it was the last of the layer."""

    def rest(self) -> None:
        """There is no layer to fetch."""


class Planned:
    """Streams of copies in a fixed order, each with ``in_flight`` lanes."""

    def __init__(self, streams: Sequence[Sequence[Flow]], in_flight: int) -> None:
        self._streams = streams
        self._in_flight = in_flight
        self._begun = [0] * len(streams)
        self._open = 0  # copies that have not ended

    @property
    def lanes(self) -> int:
        return len(self._streams) * self._in_flight

    def begin(self) -> None:
        self._begun = [0] * len(self._streams)
        self._open = sum(map(len, self._streams))

    def pause(self, lane: int) -> float:
        return 0.0

    def take(self, lane: int) -> Flow | None:
        stream = lane // self._in_flight
        begun = self._begun[stream]
        if begun == len(self._streams[stream]):
            return None
        self._begun[stream] += 1
        return self._streams[stream][begun]

    def end(self, lane: int) -> bool:
        self._open -= 1
        return self._open == 0

    def rest(self) -> None:
        pass


class Page:
    """What the lines of all ranks say, added up for each node; a rank sees its own node's."""

    def __init__(self, ranks: int, sees: int | None) -> None:
        self._sees = sees or ranks
        nodes = -(-ranks // self._sees)
        self._pulled = [[0] * ranks for _ in range(nodes)]
        self._pulling: list[set[int]] = [set() for _ in range(nodes)]

    def pulled(self, rank: int) -> list[int]:
        """What `pullers` says to a rank that has no run under way."""
        return self._pulled[rank // self._sees]

    def is_alone(self, rank: int) -> bool:
        return self._pulling[rank // self._sees] <= {rank}

    def claim(self, rank: int, owner: int, change: int) -> None:
        self._pulled[rank // self._sees][owner] += change

    def pull(self, rank: int, pulls: bool) -> None:
        pulling = self._pulling[rank // self._sees]
        (pulling.add if pulls else pulling.discard)(rank)


class Chosen:
    """Runs in lane 0, each from the owner that `choose` names then; the copies from host memory in lane 1."""

    def __init__(self, plan: LayerPlan, rank: int, ranks: int, turns: Turns, page: Page) -> None:
        self._rank = rank
        self._page = page
        runs = cut_runs(plan, ranks, turns.run_bytes)
        self._all = runs.nbytes
        self._gap = turns.gap if sum(map(bool, runs.by_owner)) > 1 else 0.0  # with one owner there is nothing to choose
        self._runs = [[Flow({run.owner: 1.0}, run.nbytes) for run in owned] for owned in runs.by_owner]
        self._host = [Flow({HOST: 1.0}, len(piece.bytes)) for piece in runs.host]
        self._left = [0] * ranks
        self._taken = [0] * ranks
        self._taken_of_host = 0
        self._owner = rank  # of the run under way
        self._open = 0

    @property
    def lanes(self) -> int:
        return 2 if self._host else 1

    def begin(self) -> None:
        self._left, self._taken, self._taken_of_host = self._all.copy(), [0] * len(self._all), 0
        self._open = sum(map(len, self._runs)) + len(self._host)
        self._page.pull(self._rank, any(self._all))

    def pause(self, lane: int) -> float:
        return 0.0 if lane or self._page.is_alone(self._rank) else self._gap

    def take(self, lane: int) -> Flow | None:
        if lane:
            self._taken_of_host += 1
            return self._host[self._taken_of_host - 1] if self._taken_of_host <= len(self._host) else None
        owner = choose(self._rank, self._left, self._page.pulled(self._rank))
        if owner < 0:
            return None
        run = self._runs[owner][self._taken[owner]]
        self._taken[owner] += 1
        self._left[owner] -= int(run.nbytes)
        self._owner = owner
        self._page.claim(self._rank, owner, 1)
        return run

    def end(self, lane: int) -> bool:
        if not lane:
            self._page.claim(self._rank, self._owner, -1)
        self._open -= 1
        return self._open == 0

    def rest(self) -> None:
        self._page.pull(self._rank, False)


def planned_flows(plan: LayerPlan, switched: bool) -> list[list[Flow]]:
    """Copy by copy, what runs side by side.

    Streams do where every owner has a link of its own to the reader. Through a switch (``switched``), the copy engine
    is taken to move one copy at a time and to turn from stream to stream, so that ranks meet at owners as with slices
    in turn: on four H200, all pulling, copies reached 0.53 to 0.71 of the link with a stream for each owner, and 0.58
    to 0.68 with whole segments in one stream. Host memory has a link and an engine of its own.
    """
    if len(plan.streams) <= 1 or not switched:
        return [[_flow(piece) for piece in stream] for stream in plan.streams]
    linked = [[piece for piece in stream if piece.owner != HOST] for stream in plan.streams]
    host = [piece for stream in plan.streams for piece in stream if piece.owner == HOST]
    rounds = [_in_turns(stream) for stream in linked]
    turns = [stream[n] for n in range(max(map(len, rounds))) for stream in rounds if n < len(stream)]
    return [[_flow(piece) for piece in stream] for stream in (turns, host) if stream]


def fetch_flows(plan: LayerPlan) -> list[list[Flow]]:
    """All copies as one flow from all owners, in proportion to their bytes."""
    by_owner: dict[Owner, float] = {}
    for piece in (piece for stream in plan.streams for piece in stream):
        by_owner[piece.owner] = by_owner.get(piece.owner, 0.0) + len(piece.bytes)
    total = sum(by_owner.values())
    return [[Flow({owner: nbytes / total for owner, nbytes in by_owner.items()}, total)]] if total else []


def _flow(piece: Segment) -> Flow:
    return Flow({piece.owner: 1.0}, float(len(piece.bytes)))


def _in_turns(stream: Sequence[Segment]) -> list[Segment]:
    return [
        piece._replace(bytes=piece.bytes[start : start + ENGINE_TURN])
        for piece in stream
        for start in range(0, len(piece.bytes), ENGINE_TURN)
    ]
