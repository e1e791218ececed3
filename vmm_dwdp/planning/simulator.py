"""A group of ranks, event by event: compute, slots, copies and the links that they share.

What a rank copies, from whom and in which order is the runtime's own `describe_layer`, or chosen by the runtime's own
rule (`layout/turns.py`); when it copies is the runtime's schedule: a layer is fetched at the release of the layer that
holds its slot, and its experts wait until it is there. Between two events every rate is constant, so nothing is
computed there, and an event changes the rates only of those who share a link with it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.turns import chooses
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.planning.contention import reached_by_all
from vmm_dwdp.planning.links import CopyLinks, FetchLinks, Flow, Links, Rates
from vmm_dwdp.planning.pulling import AS_THE_RUNTIME, Chosen, Page, Planned, Pulls, Turns, fetch_flows, planned_flows


@dataclass(frozen=True)
class Phase:
    """A stretch of a layer's compute.

    Attributes:
        seconds: with no copy under way.
        slowdown: how many times longer it takes while the rank's own copies use all of its link; by less where they
            use less, so that what copies cost depends on their bytes and not on how long they take.
        meets: it begins when the ranks of the same number on all nodes have come to it.
    """

    seconds: float
    slowdown: float = 1.0
    meets: bool = False


@dataclass(frozen=True)
class LayerWork:
    """One layer's compute on one rank: what comes before its experts are acquired, and what reads them."""

    before: tuple[Phase, ...]
    experts: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """Without copies and without waiting."""
        return sum(phase.seconds for phase in self.before + self.experts)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is simulated.

    Attributes:
        weights: of one MoE layer; all ``num_layers`` are alike.
        turns: how owners are chosen as copies go, where the config has them chosen.
        in_flight: how many copies of one stream are under way at once: a batch's copies are not ordered.
        resolution: follow every copy, or every fetch as one; see `links`.
        start: when each rank begins, in seconds; all at 0 by default.
        nodes: of ``config.group_size`` ranks each, a group and links of its own; ranks are numbered node after node.
            ``weights`` are one node's.
        stops: a rank begins a pass only when all its copies have ended, those for the next pass too, as where the host
            waits for the device between passes; a pass ends then.
    """

    config: DWDPConfig
    weights: Mapping[str, WeightSpec]
    num_layers: int
    granularity: int
    rates: Rates
    turns: Turns = AS_THE_RUNTIME
    in_flight: int = 1
    resolution: Literal["copies", "fetches"] = "copies"
    start: Sequence[float] | None = None
    nodes: int = 1
    stops: bool = False

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.config.group_size

    def plan(self, rank: int) -> LayerPlan:
        """What ``rank`` of a node copies for a layer."""
        return describe_layer(0, self.weights, self.config, rank, self.granularity).plan


@dataclass
class Outcome:
    """What a simulation saw, in seconds.

    Attributes:
        pass_end: ``[ranks, passes]``: when each pass ended, from time 0.
        exposed: ``[ranks, layers]``: time that compute waited for a layer, over all passes.
        meeting: ``[ranks]``: time that compute waited for ranks of other nodes.
        copying: ``[ranks]``: time during which the rank's copies ran.
        pulls: of each copy, when it began and how many others read from the same owner then; none for ``"fetches"``.
    """

    pass_end: NDArray[np.float64]
    exposed: NDArray[np.float64]
    meeting: NDArray[np.float64]
    copying: NDArray[np.float64]
    pulls: list[tuple[float, int]] = field(default_factory=list)

    def meetings(self, begin: float = 0.0, end: float = inf) -> Counter[int]:
        """By k, how many copies began between ``begin`` and ``end`` with k others at the same owner."""
        return Counter(others for when, others in self.pulls if begin <= when < end)

    @property
    def seconds_per_pass(self) -> float:
        """Mean over ranks and passes, the first pass of each left out where there are more."""
        first = 1 if self.pass_end.shape[1] > 1 else 0
        lengths = np.diff(self.pass_end, axis=1, prepend=0.0)
        return float(lengths[:, first:].mean())


def simulate(group: Group, work: Sequence[Sequence[LayerWork]]) -> Outcome:
    """Run ``work[rank][pass]``, every layer of a pass alike, and say what happened.

    Raises:
        ConfigError: ``work`` is not for every rank, or ranks that meet do not meet equally often.
    """
    size = group.config.group_size
    if len(work) != group.ranks:
        raise ConfigError(f"there is work for {len(work)} ranks, but the group has {group.ranks}")
    for rail in range(size):
        if len({tuple(map(_meetings, passes)) for passes in work[rail::size]}) > 1:
            raise ConfigError(f"the ranks of number {rail} do not meet equally often on all nodes")
    return _Simulation(group, work).run()


def _meetings(work: LayerWork) -> int:
    return sum(phase.meets for phase in work.before + work.experts)


class _Rank:
    """The state of one rank."""

    def __init__(self, index: int, pulls: Pulls, work: Sequence[LayerWork], depth: int, start: float) -> None:
        self.index = index
        self.work = work
        self.pass_index = 0
        self.layer = 0
        self.phases: tuple[Phase, ...] = ()
        self.phase = 0
        self.remaining = 0.0  # seconds of the phase, without copies
        self.computed_until = start  # when `remaining` was brought up to date
        self.waiting_since: float | None = None
        self.meeting_since: float | None = None
        self.compute_version = 0  # an event on the heap with an older one is void

        self.pulls = pulls
        self.holds = [-1] * depth  # what is in each slot: pass * layers + layer
        self.queue: deque[int] = deque()  # what is being fetched or to be fetched: the slots are free
        self.copying_since: float | None = None
        self.looks = inf  # when its pulls are to look again
        self.link_share = 0.0  # of its link, used by its copies now


class _Simulation:
    def __init__(self, group: Group, work: Sequence[Sequence[LayerWork]]) -> None:
        config = group.config
        size = config.group_size
        self._layers = group.num_layers
        self._stops = group.stops
        self._depth = min(config.prefetch_depth, group.num_layers)
        self._size = size
        starts = group.start or [0.0] * group.ranks
        pages = [Page(size, group.turns.sees) for _ in range(group.nodes)]
        self._ranks = [
            _Rank(rank, _pulls(group, rank % size, pages[rank // size]), work[rank], self._depth, starts[rank])
            for rank in range(group.ranks)
        ]
        self._exact = group.resolution == "copies"
        self._lanes = max(1, *(rank.pulls.lanes for rank in self._ranks))
        self._links: list[Links] = [_links(group, self._lanes) for _ in range(group.nodes)]
        passes, ranks = max(len(passes) for passes in work), group.ranks
        self._outcome = Outcome(
            np.full((ranks, passes), np.nan), np.zeros((ranks, self._layers)), np.zeros(ranks), np.zeros(ranks)
        )
        self._phase_ends: list[tuple[float, int, int]] = []  # time, rank, version
        self._planned: list[tuple[float, int, Callable[[float], None]]] = []  # of copies: when, a number, what
        self._numbers = itertools.count()

    def run(self) -> Outcome:
        for rank in self._ranks:
            # Ranks begin at different times, and the links must see them in order.
            heapq.heappush(self._phase_ends, (rank.computed_until, rank.index, 0))
        phase_ends, planned = self._phase_ends, self._planned
        now = 0.0
        while True:
            copy_end, lane = self._next_end()
            for node, links in enumerate(self._links):
                for index, share in links.changes().items():
                    self._disturb(self._ranks[node * self._size + index], share, now)
            if planned and planned[0][0] <= min(copy_end, phase_ends[0][0] if phase_ends else inf):
                now, _, action = heapq.heappop(planned)
                action(now)
            elif phase_ends and phase_ends[0][0] <= copy_end:
                now, index, version = heapq.heappop(phase_ends)
                rank = self._ranks[index]
                if version == rank.compute_version:
                    self._end_phase(rank, now)
            elif lane >= 0:
                now = copy_end
                self._end_copy(lane, now)
            else:
                return self._outcome

    def _next_end(self) -> tuple[float, int]:
        """When the next copy of all nodes ends, and its lane."""
        first, lane = inf, -1
        for node, links in enumerate(self._links):
            when, of_node = links.next_end()
            if when < first:
                first, lane = when, node * self._size * self._lanes + of_node
        return first, lane

    def _links_of(self, lane: int) -> tuple[Links, int]:
        """The links of a lane's node, and the lane's number there."""
        node, own = divmod(lane, self._size * self._lanes)
        return self._links[node], own

    # -- compute -----------------------------------------------------------------------------------------------------
    def _begin_layer(self, rank: _Rank, now: float) -> None:
        work = rank.work[rank.pass_index]
        rank.phases = work.before + work.experts
        rank.phase = 0
        self._begin_phase(rank, now)

    def _begin_phase(self, rank: _Rank, now: float) -> None:
        acquires = rank.phase == len(rank.work[rank.pass_index].before)
        if acquires and rank.holds[rank.layer % self._depth] != rank.pass_index * self._layers + rank.layer:
            rank.waiting_since = now
            return
        if not rank.phases[rank.phase].meets:
            self._begin_compute(rank, now)
            return
        rank.meeting_since = now
        rail = self._ranks[rank.index % self._size :: self._size]
        if all(other.meeting_since is not None for other in rail):
            for other in rail:
                self._outcome.meeting[other.index] += now - (other.meeting_since or 0.0)
                other.meeting_since = None
                self._begin_compute(other, now)

    def _begin_compute(self, rank: _Rank, now: float) -> None:
        rank.remaining = rank.phases[rank.phase].seconds
        rank.computed_until = now
        self._schedule_phase(rank)

    def _schedule_phase(self, rank: _Rank) -> None:
        rank.compute_version += 1
        end = rank.computed_until + rank.remaining * _slowdown(rank)
        heapq.heappush(self._phase_ends, (end, rank.index, rank.compute_version))

    def _end_phase(self, rank: _Rank, now: float) -> None:
        if not rank.phases:  # the rank begins
            for fetch in range(self._depth):
                self._begin_fetch(rank, fetch, now)
            self._begin_layer(rank, now)
            return
        rank.phase += 1
        if rank.phase < len(rank.phases):
            self._begin_phase(rank, now)
            return
        self._release(rank, now)
        rank.layer += 1
        if rank.layer == self._layers and self._stops and rank.queue:
            return  # until the last copy ends
        self._go_to_layer(rank, now)

    def _go_to_layer(self, rank: _Rank, now: float) -> None:
        if rank.layer == self._layers:
            self._outcome.pass_end[rank.index, rank.pass_index] = now
            rank.layer = 0
            rank.pass_index += 1
            if rank.pass_index == len(rank.work):
                return
        self._begin_layer(rank, now)

    def _release(self, rank: _Rank, now: float) -> None:
        """Fetch the next layer, in cyclic order, that uses the slot of the layer that ends."""
        following = rank.layer + self._depth
        if following >= self._layers:
            following = self._layers + rank.layer % self._depth
        fetch = rank.pass_index * self._layers + following
        if following - self._layers == rank.layer:  # it is the only one
            rank.holds[rank.layer] = fetch
        elif fetch < len(rank.work) * self._layers:
            self._begin_fetch(rank, fetch, now)

    # -- copies ------------------------------------------------------------------------------------------------------
    def _begin_fetch(self, rank: _Rank, fetch: int, now: float) -> None:
        """Its slot is free: it is fetched after what is in the queue already, or beside the last of it."""
        rank.queue.append(fetch)
        if not rank.pulls.lanes:
            self._end_fetch(rank, now)
            return
        if rank.copying_since is None:
            rank.copying_since = now
        rank.pulls.begin()
        self._give(rank, now)

    def _give(self, rank: _Rank, now: float) -> None:
        for lane, flow, begins in rank.pulls.give(now):
            begin = partial(self._begin_copy, rank.index * self._lanes + lane, flow)
            if begins > now:
                self._at(begins, begin)
            else:
                begin(now)
        if rank.pulls.look != rank.looks:
            rank.looks = rank.pulls.look
            if rank.looks < inf:
                self._at(rank.looks, partial(self._look, rank))

    def _look(self, rank: _Rank, now: float) -> None:
        if now == rank.looks:  # else it was to look at another time meanwhile
            rank.looks = inf
            self._give(rank, now)

    def _at(self, when: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._planned, (when, next(self._numbers), action))

    def _begin_copy(self, lane: int, flow: Flow, now: float) -> None:
        links, of_node = self._links_of(lane)
        others = links.start(of_node, flow, now)
        if self._exact:
            self._outcome.pulls.append((now, others))

    def _end_copy(self, lane: int, now: float) -> None:
        index, own = divmod(lane, self._lanes)
        rank = self._ranks[index]
        links, of_node = self._links_of(lane)
        links.stop(of_node, now)
        for _ in range(rank.pulls.end(own, now)):
            self._end_fetch(rank, now)
        self._give(rank, now)

    def _end_fetch(self, rank: _Rank, now: float) -> None:
        fetch = rank.queue.popleft()
        rank.holds[fetch % self._layers % self._depth] = fetch
        if not rank.queue and rank.copying_since is not None:
            self._outcome.copying[rank.index] += now - rank.copying_since
            rank.copying_since = None
        if rank.layer == self._layers and not rank.queue:
            self._go_to_layer(rank, now)
        if rank.waiting_since is not None and fetch == rank.pass_index * self._layers + rank.layer:
            self._outcome.exposed[rank.index, rank.layer] += now - rank.waiting_since
            rank.waiting_since = None
            self._begin_phase(rank, now)

    def _disturb(self, rank: _Rank, share: float, now: float) -> None:
        """Copies use another share of the link from now on: the phase under way goes on at another speed."""
        idle = rank.layer == self._layers or rank.pass_index == len(rank.work) or not rank.phases
        computes = rank.waiting_since is None and rank.meeting_since is None and not idle
        if not computes or rank.phases[rank.phase].slowdown == 1.0:
            rank.link_share = share
            return
        rank.remaining = max(0.0, rank.remaining - (now - rank.computed_until) / _slowdown(rank))
        rank.computed_until = now
        rank.link_share = share
        self._schedule_phase(rank)


def _slowdown(rank: _Rank) -> float:
    return 1 + (rank.phases[rank.phase].slowdown - 1) * rank.link_share


def _links(group: Group, lanes: int) -> Links:
    """Of one node, at the resolution that is wanted."""
    if group.resolution == "copies":
        return CopyLinks(group.config.group_size, lanes, group.rates)
    reached = reached_by_all(group.plan(0), group.config, group.turns, group.rates)
    return FetchLinks(group.config.group_size, group.rates, reached)


def _pulls(group: Group, rank: int, page: Page) -> Pulls:
    """What ``rank`` copies for a layer."""
    plan = group.plan(rank)
    if group.resolution == "fetches":
        return Planned(fetch_flows(plan), 1)
    if chooses(group.config):
        return Chosen(plan, rank, group.config.group_size, group.turns, page, group.rates.alone)
    return Planned(planned_flows(plan, group.rates.switched), group.in_flight)
