"""What a runtime tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vmm_dwdp.config import Mode

IssuedBy = Literal["native thread", "thread", "launching thread"]


@dataclass(frozen=True)
class LayerStats:
    """One layer, since publish.

    Attributes:
        hits: how often the layer was in its slot, or on its way there, when it was acquired.
        misses: how often it was not, and had to be fetched then.
        fetched_bytes: bytes that all its fetches moved.
        exposed_wait_s: seconds for which the compute stream stood still because the layer was not there yet. The device
            measures it, in every pass at first and then in one of eight, which stands for all of them; the waits of a
            pass count once `DWDPRuntime.stats` sees them over, or the next that is measured begins. A pass that is
            launched before the latest measured one is over is not measured.
        in_place: how often the layer was acquired to be read in place.
        node_wait_s: seconds that the compute stream spent in exchanges with ranks of other nodes
            (`DWDPRuntime.exchange`), by the device's clock; of an exchange, once it is seen over.
    """

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    exposed_wait_s: float = 0.0
    in_place: int = 0
    node_wait_s: float = 0.0


@dataclass(frozen=True)
class CopyPath:
    """How the copies of a layer get to the driver.

    Attributes:
        plan: ``"slices"``: pieces of at most ``slice_bytes``, the owners taking turns in one stream. ``"streams"``:
            whole segments, a stream for each owner. ``"runs"``: parts of those, each given when the one before is about
            to end, from the owner from which fewest other ranks pull.
        why: what decided it.
        num_streams: copy streams.
        num_copies: of the layer that has most.
        issued_by: ``"native thread"``: one that needs no interpreter, on CUDA, where a C compiler was there when this
            package was installed. Otherwise ``"thread"``: one of Python's, where that takes the launching thread less
            time than to give the copies to the driver itself; or else ``"launching thread"``.
    """

    plan: Literal["slices", "streams", "runs"]
    why: str
    num_streams: int
    num_copies: int
    issued_by: IssuedBy


@dataclass(frozen=True)
class CacheStats:
    """The resident cache, as its latest refresh left it.

    Attributes:
        nbytes: physical memory of it.
        used_bytes: of that, what holds copies of remote experts.
        refreshes: how often it was refreshed.
        served: of the remote bytes that tokens were routed to in place between the last two refreshes, by graphs too,
            the part that was in the cache, each byte counted for every token; ``None`` if there were none.
    """

    nbytes: int
    used_bytes: int
    refreshes: int
    served: float | None


@dataclass(frozen=True)
class BankStats:
    """The banks of experts before what is read in place.

    Attributes:
        nbytes: physical memory of them.
        rows: by layer number, how many experts its bank has room for; layers of which nothing is remote have none.
    """

    nbytes: int
    rows: Mapping[int, int]


class BankCounts(NamedTuple):
    """What the bank of one layer did for `DWDPRuntime.look_up` since publish, by replays of graphs, too.

    Attributes:
        uses: of remote experts, each once a call.
        hits: of these, those that were in the bank.
        copied: experts that were copied into it.
    """

    uses: int
    hits: int
    copied: int


@dataclass(frozen=True)
class ModeChoice:
    """Where the crossover between the modes is, as far as is known.

    Attributes:
        in_place_below: passes of fewer tokens read in place.
        staged_from: passes of so many tokens and more are staged; between the two, the mode that was faster is chosen.
        seconds: what passes between the two took, by the least number of tokens of their bucket, and by mode.
    """

    in_place_below: int
    staged_from: int
    seconds: Mapping[int, Mapping[Mode, float]]


@dataclass(frozen=True)
class Stats:
    """One rank, since publish.

    Attributes:
        resident_bytes: physical memory of the shards that this rank holds, whole pages; the host pool's on the rank
            that created it.
        staged_bytes: physical memory of the slots.
        layers: by layer number, in the order of a pass. Passes that a graph replays are not counted.
        copy_path: ``None`` if nothing is staged.
        advice: what to know if passes are held up by their copies, with numbers; ``None`` if they are not.
        mode_choice: what mode auto goes by; ``None`` if no pass was left to it.
        cache: ``None`` without a resident cache.
        bank: ``None`` without an expert bank.
        node_advice: as ``advice``, if they are held up by exchanges with ranks of other nodes.
    """

    resident_bytes: int
    staged_bytes: int
    layers: Mapping[int, LayerStats]
    copy_path: CopyPath | None
    advice: str | None
    mode_choice: ModeChoice | None
    cache: CacheStats | None = None
    node_advice: str | None = None
    bank: BankStats | None = None

    @property
    def hits(self) -> int:
        """The sum over all layers."""
        return sum(layer.hits for layer in self.layers.values())

    @property
    def misses(self) -> int:
        """The sum over all layers."""
        return sum(layer.misses for layer in self.layers.values())

    @property
    def fetched_bytes(self) -> int:
        """The sum over all layers."""
        return sum(layer.fetched_bytes for layer in self.layers.values())

    @property
    def exposed_wait_s(self) -> float:
        """The sum over all layers."""
        return sum(layer.exposed_wait_s for layer in self.layers.values())

    @property
    def in_place(self) -> int:
        """The sum over all layers."""
        return sum(layer.in_place for layer in self.layers.values())

    @property
    def node_wait_s(self) -> float:
        """The sum over all layers."""
        return sum(layer.node_wait_s for layer in self.layers.values())
