"""What one simulated rank copies next: by plans that are fixed ahead, and by the owner that is chosen for each run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, NamedTuple, Protocol

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan, Segment
from vmm_dwdp.layout.placement import HOST, Owner
from vmm_dwdp.layout.turns import LEAD_NS, MOST_UNDER_WAY, SMALLEST_RUN, choose_of_two, cut_runs, run_bytes
from vmm_dwdp.planning.links import Flow

ENGINE_TURN: Final = 32 << 20  # bytes that a copy engine is taken to move for one stream before it turns to the next
GAP: Final = 6.4e-6  # seconds between two runs of a rank: the median on four H200, see docs/validation.md
LEAD: Final = LEAD_NS * 1e-9  # seconds


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Ranks that choose the owner of each run: [Note: Turns] in ``layout/turns.py``. The defaults are the runtime's.

    Attributes:
        run_bytes: the longest run; ``None``: as the runtime cuts a layer.
        gap: seconds from the moment at which a run can have ended to the start of the next; none for a rank that pulls
            while no other does, which has two runs under way.
        native: by the thread that needs no interpreter: the next run is chosen `LEAD` before the one under way can end,
            if nobody slows it, and one layer ahead is looked at. Without: by one that waits until it has ended.
        sees: ranks of one node, who see each other's lines: so many in the order of their numbers; ``None``: all.

    Raises:
        ConfigError: a value cannot be.
    """

    run_bytes: int | None = None
    gap: float = GAP
    native: bool = True
    sees: int | None = None

    def __post_init__(self) -> None:
        if self.run_bytes is not None and self.run_bytes < SMALLEST_RUN:
            raise ConfigError(f"a run has at least {SMALLEST_RUN} bytes, not {self.run_bytes}")
        if self.gap < 0:
            raise ConfigError(f"the gap between two runs must be at least 0, not {self.gap} s")
        if self.sees is not None and self.sees < 1:
            raise ConfigError(f"a rank sees at least itself, not {self.sees} ranks")

    def longest(self, plan: LayerPlan) -> int:
        """How long the runs of a layer may be."""
        return run_bytes(plan) if self.run_bytes is None else self.run_bytes


AS_THE_RUNTIME: Final = Turns()


class Given(NamedTuple):
    """A copy, the lane that it goes in, and when it begins to move, in seconds."""

    lane: int
    flow: Flow
    begins: float


class Pulls(Protocol):
    """The copies of one rank, layer after layer. Each lane has at most one under way.

    Attributes:
        look: when `give` is to be called again, though nothing happened: in seconds, ``inf`` for never.
    """

    look: float

    @property
    def lanes(self) -> int: ...

    def begin(self) -> None:
        """One layer more is to be copied, after those before: its slot is free."""

    def give(self, now: float) -> list[Given]:
        """The copies that are given now. To be called after `begin`, after `end`, and at `look`."""

    def end(self, lane: int, now: float) -> int:
        """The lane's copy has ended; how many layers are complete by that, in their order."""


class Planned:
    """Streams of copies in a fixed order, each with ``in_flight`` lanes; one layer at a time."""

    def __init__(self, streams: Sequence[Sequence[Flow]], in_flight: int) -> None:
        self.look = inf
        self._streams = streams
        self._in_flight = in_flight
        self._begun = [0] * len(streams)
        self._idle = [True] * self.lanes
        self._open = 0  # copies of the layer that have not ended
        self._waiting = 0  # layers after it

    @property
    def lanes(self) -> int:
        return len(self._streams) * self._in_flight

    def begin(self) -> None:
        self._waiting += 1

    def give(self, now: float) -> list[Given]:
        if not self._open and self._waiting:
            self._waiting -= 1
            self._begun = [0] * len(self._streams)
            self._open = sum(map(len, self._streams))
        given = []
        for lane in range(self.lanes):
            stream = lane // self._in_flight
            begun = self._begun[stream]
            if self._open and self._idle[lane] and begun < len(self._streams[stream]):
                self._idle[lane] = False
                self._begun[stream] += 1
                given.append(Given(lane, self._streams[stream][begun], now))
        return given

    def end(self, lane: int, now: float) -> int:
        self._idle[lane] = True
        self._open -= 1
        return int(not self._open)


class Page:
    """What the lines of all ranks say; a rank sees those of its own node."""

    def __init__(self, ranks: int, sees: int | None) -> None:
        self._sees = sees or ranks
        nodes = -(-ranks // self._sees)
        self._under_way = [[0] * ranks for _ in range(ranks)]  # by rank and owner
        self._pulled = [[0] * ranks for _ in range(nodes)]  # by node and owner: ranks that have some under way
        self._pulling: list[set[int]] = [set() for _ in range(nodes)]

    def pulled(self, rank: int) -> list[int]:
        """What `pullers` says to ``rank``."""
        of_node, own = self._pulled[rank // self._sees], self._under_way[rank]
        return [ranks - (runs > 0) for ranks, runs in zip(of_node, own, strict=True)]

    def is_alone(self, rank: int) -> bool:
        return self._pulling[rank // self._sees] <= {rank}

    def claim(self, rank: int, owner: int, change: int) -> None:
        """``rank`` has one run more from ``owner`` under way, or one fewer."""
        before = self._under_way[rank][owner]
        self._under_way[rank][owner] += change
        self._pulled[rank // self._sees][owner] += (before + change > 0) - (before > 0)

    def pull(self, rank: int, pulls: bool) -> None:
        pulling = self._pulling[rank // self._sees]
        (pulling.add if pulls else pulling.discard)(rank)


class _Layer:
    """The copies of one layer, of which some may be under way."""

    def __init__(self, runs: Sequence[Sequence[Flow]], left: Sequence[int], host: Sequence[Flow]) -> None:
        self.left = list(left)  # by owner: bytes that are not given
        self.runs = [list(owned) for owned in runs]  # by owner: that are not given
        self.host = list(host)
        self.open = sum(map(len, runs)) + len(host)  # that have not ended


@dataclass
class _Flight:
    """A run that was given. ``can_end``: when it has ended if nobody slows it, in seconds."""

    layer: _Layer
    owner: int
    lane: int
    nbytes: float
    can_end: float


class Chosen:
    """Runs, each from the owner that `choose_of_two` names when it is given, and host memory's copies in a lane beside.

    As in ``allocator/_pulls.c``: there is one run under way, or a second one where nobody else pulls, and where the
    first takes longer than it can, as somebody else pulls from its owner.

    Args:
        rate: bytes a second of a run that nobody slows.
    """

    def __init__(self, plan: LayerPlan, rank: int, ranks: int, turns: Turns, page: Page, rate: float) -> None:
        self.look = inf
        self._rank, self._turns, self._page, self._rate = rank, turns, page, rate
        cut = cut_runs(plan, ranks, turns.longest(plan))
        self._left = cut.nbytes
        self._runs = [[Flow({run.owner: 1.0}, run.nbytes) for run in owned] for owned in cut.by_owner]
        self._host = [Flow({HOST: 1.0}, len(piece.bytes)) for piece in cut.host]
        self._layers: deque[_Layer] = deque()  # that are not complete
        self._flights: list[_Flight] = []  # the earliest first
        self._hosted: _Layer | None = None  # whose copy from host memory is under way
        self._ended = -inf  # the latest run

    @property
    def lanes(self) -> int:
        return MOST_UNDER_WAY + bool(self._host)

    def begin(self) -> None:
        self._layers.append(_Layer(self._runs, self._left, self._host))
        self._page.pull(self._rank, any(self._left))

    def give(self, now: float) -> list[Given]:
        given = []
        hosted = next((layer for layer in self._layers if layer.host), None)
        if hosted is not None and self._hosted is None:
            self._hosted = hosted
            given.append(Given(MOST_UNDER_WAY, hosted.host.pop(0), now))
        layers = [layer for layer in self._layers if any(layer.left)]
        while layers and self._next(now) <= now:
            given.append(self._give_run(layers, now))
            layers = [layer for layer in layers if any(layer.left)]
        self.look = self._next(now) if layers else inf
        return given

    def _next(self, now: float) -> float:
        """When the next run may be given."""
        if len(self._flights) == MOST_UNDER_WAY:
            return inf
        if self._page.is_alone(self._rank):
            return now
        if not self._turns.native:
            return inf if self._flights else self._ended + self._turns.gap
        return self._flights[0].can_end - LEAD if self._flights else now

    def _give_run(self, layers: Sequence[_Layer], now: float) -> Given:
        ahead = layers[1].left if self._turns.native and len(layers) > 1 else None
        which, owner = choose_of_two(self._rank, layers[0].left, ahead, self._page.pulled(self._rank))
        layer = layers[which]
        flow = layer.runs[owner].pop(0)
        layer.left[owner] -= int(flow.nbytes)
        self._page.claim(self._rank, owner, 1)
        begins = now
        if self._turns.native and not self._page.is_alone(self._rank):
            begins = max(now, self._flights[0].can_end if self._flights else now) + self._turns.gap
        lane = 1 if any(flight.lane == 0 for flight in self._flights) else 0
        self._flights.append(_Flight(layer, owner, lane, flow.nbytes, begins + flow.nbytes / self._rate))
        return Given(lane, flow, begins)

    def end(self, lane: int, now: float) -> int:
        if lane == MOST_UNDER_WAY:
            layer, self._hosted = self._hosted, None
        else:
            layer = self._end_run(lane, now)
        assert layer is not None
        layer.open -= 1
        complete = 0
        while self._layers and not self._layers[0].open:
            self._layers.popleft()
            complete += 1
        if not self._layers:
            self._page.pull(self._rank, False)
        return complete

    def _end_run(self, lane: int, now: float) -> _Layer:
        (ended,) = (flight for flight in self._flights if flight.lane == lane)
        self._flights.remove(ended)
        self._page.claim(self._rank, ended.owner, -1)
        self._ended = now
        for flight in self._flights:  # as if it had not moved beside the other
            flight.can_end = now + self._turns.gap + flight.nbytes / self._rate
        return ended.layer


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
