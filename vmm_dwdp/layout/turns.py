"""From which owner a rank takes its next bytes when every rank pulls at once. Pure integers.

[Note: Turns]
An owner's link is shared by those who pull from it, so ranks that meet at one owner are slow while other owners idle.
An order that is chosen once a layer does not avoid that: ranks drift. So what a rank fetches from the other ranks is
cut into runs, and the owner of the next run is chosen when the run before it ends, by what every rank says of itself in
a line:

    line of rank 0   pulls, under way   0 1 0 0      one run, from rank 1
    line of rank 2   pulls, under way   0 0 0 1      one run, from rank 3
    line of rank 3   idle,  under way   0 0 0 0
                                        ---------
    what rank 1 counts (`pullers`)      0 1 0 1      so it takes its next run from rank 0 or rank 2

`choose` takes the owner with the fewest pullers; of these the one with most bytes left; of these the next higher rank.
Two ranks that choose at the same time do not see each other. So a rank claims (writes its line, then a fence), reads
the lines again, and asks `settle`: of two ranks that have claimed one owner at once, the one further from it moves.

Where every owner of a layer is pulled from by somebody, and an owner of the next layer by fewer, the run is of that
layer, if its slot is free (`choose_of_two`): else ranks that have drained one owner would have to meet at another.

Lines are advice. They may be late, torn, or of a rank that died; whatever they say, the choice is an owner with bytes
left. All of it is integers: bytes fit into 64 bits, ranks and counts into 32.

[Note: How long a run is]
Between two runs a copy engine loses some microseconds, so they are not short; and a rank is with its owner for as long
as a run takes, so they are not long (``benchmarks/pull_policies.py`` simulates both). They have `RUN_BYTES`; but a
layer that is short has a few of each owner all the same, or there would be nothing to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from vmm_dwdp.config import COPY_ALIGNMENT, DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan, Segment
from vmm_dwdp.layout.placement import HOST, Owner

NOBODY: Final = -1  # no owner has bytes left
MAX_RANKS: Final = 128  # that choose
MOST_UNDER_WAY: Final = 2  # runs of a rank
LEAD_NS: Final = 20_000  # before a run can end, the next is chosen and given; not by a thread of Python's
RUN_BYTES: Final = 128 << 20  # see [Note: How long a run is]
SHORTEST_RUN: Final = 32 << 20
RUNS: Final = 8  # of one owner and layer, at least, unless they would be shorter than the shortest
SMALLEST_RUN: Final = 4096  # bytes; borders between runs are moved by less than `COPY_ALIGNMENT`


def chooses(config: DWDPConfig) -> bool:
    """Whether ranks that see each other's lines choose the owners of runs: nothing else is stated, and they can."""
    wanted = config.slice_bytes == "auto" and config.prefetch_depth > 0
    return wanted and 2 < config.group_size <= MAX_RANKS


class Line(NamedTuple):
    """What one rank says of itself; only it writes this.

    Attributes:
        pulls: not 0 from its first run of a layer to the end of its last one, so also between two runs.
        under_way: by owner, how many of its runs were given to the driver and have not ended.
    """

    pulls: int
    under_way: Sequence[int]


def pullers(rank: int, lines: Sequence[Line], alive: Sequence[bool]) -> list[int]:
    """By owner, how many ranks besides ``rank`` pull from it just now.

    Args:
        lines: by rank, as long as the group.
        alive: by rank, whether its line counts: not that of a rank that died, or that is on another node.
    """
    counts = [0] * len(lines)
    for other, line in enumerate(lines):
        if other != rank and alive[other]:
            for owner, runs in enumerate(line.under_way):
                counts[owner] += runs != 0
    return counts


def choose(rank: int, left: Sequence[int], pulled: Sequence[int]) -> int:
    """The owner of the next run: fewest pullers, then most bytes left, then the next higher rank, cyclically.

    Args:
        left: by owner, the bytes of its runs that ``rank`` has not given to the driver; 0 for ``rank`` itself.
        pulled: of `pullers`; the same length.

    Returns:
        A rank with bytes left, or `NOBODY`.
    """
    best = NOBODY
    for step in range(1, len(left)):
        owner = (rank + step) % len(left)
        if left[owner] <= 0:
            continue
        if best == NOBODY or (pulled[owner], -left[owner]) < (pulled[best], -left[best]):
            best = owner
    return best


def choose_of_two(
    rank: int, first: Sequence[int], second: Sequence[int] | None, pulled: Sequence[int]
) -> tuple[int, int]:
    """The layer of the next run, 0 or 1, and its owner: of the second where the first's is pulled from by more.

    Args:
        first: by owner, the bytes left of the layer that is needed first, some; ``second``: of the one after it, if its
            slot is free. pulled: of `pullers`.
    """
    owner = choose(rank, first, pulled)
    if second is None or not pulled[owner]:
        return 0, owner
    other = choose(rank, second, pulled)
    return (1, other) if other != NOBODY and pulled[other] < pulled[owner] else (0, owner)


def settle(
    rank: int, owner: int, left: Sequence[int], before: int, lines: Sequence[Line], alive: Sequence[bool]
) -> int:
    """After ``rank`` claimed ``owner`` and read all lines again: the owner to take the run from. To be asked once.

    If no more ranks pull from the owner than when it was chosen, or of all who do ``rank`` is the nearest before it in
    cyclic order, it stays. Else it takes what it would choose now, if fewer pull from there.

    Args:
        before: the pullers of ``owner`` when it was chosen.
        lines: what ``rank``'s own says does not count.
    """
    now = pullers(rank, lines, alive)
    if now[owner] <= before or not _has_nearer(rank, owner, lines, alive):
        return owner
    other = choose(rank, left, now)
    return other if other != NOBODY and now[other] < now[owner] else owner


def _has_nearer(rank: int, owner: int, lines: Sequence[Line], alive: Sequence[bool]) -> bool:
    """Whether a rank that is nearer to ``owner`` than ``rank`` pulls from it: between them in cyclic order."""
    size = len(lines)
    for step in range(1, (owner - rank) % size):
        other = (rank + step) % size
        if alive[other] and lines[other].under_way[owner] != 0:
            return True
    return False


def is_alone(rank: int, lines: Sequence[Line], alive: Sequence[bool]) -> bool:
    """Whether no other rank pulls. Then ``rank`` may have two runs under way, so that its link never rests."""
    return not any(alive[other] and other != rank and line.pulls != 0 for other, line in enumerate(lines))


@dataclass(frozen=True)
class Run:
    """Bytes of one owner that are given to the driver as one batch.

    Attributes:
        pieces: of one or several weights, in the order of the plan.
        nbytes: of all pieces.
    """

    owner: int
    pieces: tuple[Segment, ...]
    nbytes: int


@dataclass(frozen=True)
class LayerRuns:
    """The copies of one rank for one layer, for a rank that chooses as it goes.

    Attributes:
        by_owner: for each rank of the group, its runs in the order in which they are taken; none for the rank itself.
        host: copies from host memory, which is no rank's link: they go beside the runs, and nothing is chosen.
    """

    by_owner: tuple[tuple[Run, ...], ...]
    host: tuple[Segment, ...]

    @property
    def nbytes(self) -> list[int]:
        """By owner, the bytes of all its runs: what is left before the first is taken."""
        return [sum(run.nbytes for run in runs) for runs in self.by_owner]


def cut_runs(plan: LayerPlan, group_size: int, run_bytes: int) -> LayerRuns:
    """The fetches of ``plan`` in runs of at most ``run_bytes``, every byte in one of them.

    The runs of an owner are as long as each other, but for what keeps their borders at multiples of `COPY_ALIGNMENT`;
    so none is short, and the gap after it is worth it. Small weights, such as scales, are in a run with others.

    Raises:
        ConfigError: ``run_bytes`` is below `SMALLEST_RUN`.
    """
    if run_bytes < SMALLEST_RUN:
        raise ConfigError(f"a run has at least {SMALLEST_RUN} bytes, not {run_bytes}")
    fetched: list[list[Segment]] = [[] for _ in range(group_size)]
    host: list[Segment] = []
    for piece in (piece for stream in plan.streams for piece in stream):
        (host if piece.owner == HOST else fetched[piece.owner]).append(piece)
    by_owner = tuple(
        tuple(Run(owner, pieces, _nbytes(pieces)) for pieces in _cut(segments, run_bytes))
        for owner, segments in enumerate(fetched)
    )
    return LayerRuns(by_owner, tuple(host))


def run_bytes(plan: LayerPlan) -> int:
    """How long the runs of a layer may be; see [Note: How long a run is]."""
    fetched: dict[Owner, int] = {}
    for piece in (piece for stream in plan.streams for piece in stream):
        if piece.owner != HOST:
            fetched[piece.owner] = fetched.get(piece.owner, 0) + len(piece.bytes)
    return min(RUN_BYTES, max(SHORTEST_RUN, -(-max(fetched.values(), default=0) // RUNS)))


def _nbytes(pieces: Sequence[Segment]) -> int:
    return sum(len(piece.bytes) for piece in pieces)


def _cut(segments: Sequence[Segment], run_bytes: int) -> list[tuple[Segment, ...]]:
    """One owner's segments in as few runs as there can be; one more where moved borders make one too long."""
    total = _nbytes(segments)
    count = -(-total // run_bytes)
    while True:
        runs = _cut_evenly(segments, total, count)
        if all(_nbytes(pieces) <= run_bytes for pieces in runs):
            return runs
        count += 1


def _cut_evenly(segments: Sequence[Segment], total: int, count: int) -> list[tuple[Segment, ...]]:
    #  segments, end to end     |--- w13 ---|-- w2 --|s|s|
    #  borders                        ^           ^           every total / count, moved down to the alignment
    runs: list[tuple[Segment, ...]] = []
    pieces: list[Segment] = []
    position = 0  # of the piece's start, end to end
    for segment in segments:
        start = segment.bytes.start
        while len(runs) < count - 1:
            border = (len(runs) + 1) * total // count - position  # from the segment's own start
            if border >= len(segment.bytes):
                break
            cut = max(start, (segment.bytes.start + border) // COPY_ALIGNMENT * COPY_ALIGNMENT)
            if cut > start:
                pieces.append(segment._replace(bytes=range(start, cut)))
            runs.append(tuple(pieces))
            pieces, start = [], cut
        pieces.append(segment._replace(bytes=range(start, segment.bytes.stop)))
        position += len(segment.bytes)
    return [*filter(None, runs), *([tuple(pieces)] if pieces else [])]
