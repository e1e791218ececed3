"""Whether a pass is staged or reads in place: by the number of its tokens, and by what passes took so far.

[Note: The crossover]
A staged pass copies all remote experts, beside the compute; in place, those cross the link that tokens are routed to.
So few tokens are faster in place, many are faster staged, and there is one crossover between them. Numbers of tokens
are told apart by buckets, eight to a doubling. Two borders enclose the crossover: below the lower one passes are in
place, from the upper one on they are staged, and a bucket between them is tried in both modes. What is measured there
moves the borders, so few buckets are tried. Now and then the slower mode of such a bucket is tried again, because the
routing may have changed. Where all passes are beyond the borders, nothing would tell: so what is known is forgotten
after some hundred passes, and the borders are again where they were at first.

    tokens     1              lower             crossover            upper
               |-- in place --|-- tried: in place --|-- tried: staged --|-- staged --->

The device's clock times a pass, from the acquire of its first layer to the release of its last. It counts only if the
pass before it was of the same mode, chosen or asked for: after one of the other, the first layers are in their slots
already, or the link is still busy with them. A pass whose first layer is refused was none.

Before anything was measured, the crossover is supposed to be where the experts that are expected to be used, at the
rate of reading in place, take as long as all experts take at the rate of copies. ``T`` tokens that choose ``k`` of
``E`` experts evenly are expected to use ``E * (1 - (1 - k / E)**T)`` of them. Of what is in a resident cache nothing
crosses the link, so there are two supposed crossovers then, with the cache empty and with it full.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Final, get_args

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.allocator.handles import Ledger, Owned
from vmm_dwdp.config import Mode, ModeSetting
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.observe.stats import ModeChoice
from vmm_dwdp.observe.timing import Span

DOUBLING: Final = 8  # buckets
SAMPLES: Final = 3  # passes that make a measurement: the fastest of the latest ones
TRIAL: Final = 16  # passes of a bucket, after which it is not tried further for now: none was timed
RETRY: Final = 256  # passes of a bucket, after which it is tried again, if none was timed
RETRY_TRIED: Final = 32  # passes of a bucket, at least, after which its slower mode is tried again
TRIALS: Final = 0.01  # of the time: what trying slower modes again may cost, while routing stays
FORGET: Final = 2 * RETRY  # passes of other buckets, after which what is known of a bucket moves no border any more
SUPPOSED_TOP_K: Final = 8  # where the caller does not tell
SUPPOSED_RATE: Final = 0.8  # of the rate of copies: at what kernels were seen to read in place over PCIe
SUPPOSED_WITHIN: Final = 2 * DOUBLING  # buckets from the supposed crossover to the first borders


def crossover(num_experts: int, top_k: int, in_place_rate: float) -> float:
    """Tokens a pass from which staging is expected to be faster; see [Note: The crossover].

    Args:
        top_k: experts that each token uses.
        in_place_rate: at which kernels read over the link, as a part of the rate of copies.
    """
    unused = max(1 - top_k / num_experts, 1e-9)  # the part of the experts that one token leaves alone
    return math.log(max(1 - in_place_rate, 1e-9)) / math.log(unused)


class _Bucket:
    """Passes of about the same number of tokens."""

    def __init__(self) -> None:
        self.seconds: dict[Mode, deque[float]] = {mode: deque(maxlen=SAMPLES) for mode in get_args(Mode)}
        self.passes = 0  # since a trial began
        self.latest = 0  # of all passes, the number of the latest that was timed

    @property
    def fastest(self) -> dict[Mode, float]:
        """What the fastest pass of each mode took, in those that were timed."""
        samples = {mode: tuple(seconds) for mode, seconds in self.seconds.items()}
        return {mode: min(seconds) for mode, seconds in samples.items() if seconds}

    @property
    def untried(self) -> list[Mode]:
        return [mode for mode, seconds in self.seconds.items() if len(seconds) < SAMPLES]

    @property
    def by_speed(self) -> list[Mode]:
        """The faster mode first, once both are tried."""
        return sorted(self.seconds, key=lambda mode: min(self.seconds[mode]))

    @property
    def retry(self) -> float:
        """Passes after which the slower mode is tried again: the more it loses, the more, so that trials cost `TRIALS`
        of the time however slow it is, and near the crossover a change of the routing is noticed soon."""
        if self.untried:
            return RETRY
        faster, slower = (min(self.seconds[mode]) for mode in self.by_speed)
        lost = (SAMPLES + 1) * (slower / faster - 1)  # passes; the first one of a trial does not count
        return max(RETRY_TRIED, lost / TRIALS)


class ModeChooser(Owned):
    """Chooses the mode of one pass after another. Nothing here waits for the device.

    Layers are numbered by their place in a pass. The first one begins it, and its mode is that of the others.
    """

    def __init__(self, driver: Driver, ledger: Ledger, num_experts: int, num_layers: int, cached: float = 0.0) -> None:
        """``num_experts``: of the layer that has most. ``cached``: for what part of the remote bytes the resident cache
        has room."""
        self._driver = driver
        self._num_experts = num_experts
        self._last_layer = num_layers - 1
        self._remote = max(1 - cached, 1e-9)  # the part that crosses the link when the cache is full
        self._crossovers: tuple[float, float] | None = None  # supposed ones, as buckets; known when top_k is
        self._borders = self._first_borders = 0.0, 0.0
        self._buckets: dict[int, _Bucket] = {}
        self._passes = 0
        self._latest = 0  # of all passes, the number of the latest that was timed
        self._mode: Mode = "staged"  # of the pass in progress, or the latest
        self._chosen: int | None = None  # the bucket of the pass that may begin, if it is to be timed
        self._bucket: int | None = None  # of the pass in progress, if it is timed
        self._timed: tuple[int, Mode] = 0, "staged"  # bucket and mode of the pass that was timed and not read yet
        self._span = Span(driver, ledger, "pass")

    def choose(self, index: int, asked: ModeSetting, tokens: int | None, top_k: int | None, stream: StreamId) -> Mode:
        """The mode of layer ``index``, which may still be refused. Where it was not ``asked`` for, and ``stream`` is
        captured, it is the one supposed or known to be faster.

        Raises `ConfigError` if a pass of mode auto is to begin and ``tokens`` is not told.
        """
        if index > 0:
            return self._mode if asked == "auto" else asked
        self._chosen = self._bucket = None
        if asked != "auto":
            return asked
        if tokens is None:
            raise ConfigError("mode auto goes by the number of tokens: tell it when the first layer is acquired")
        bucket = math.floor(DOUBLING * math.log2(max(tokens, 1)))
        if self._crossovers is None:
            empty, full = (
                DOUBLING * math.log2(crossover(self._num_experts, top_k or SUPPOSED_TOP_K, rate))
                for rate in (SUPPOSED_RATE, SUPPOSED_RATE / self._remote)
            )
            self._crossovers = empty, full
            self._borders = self._first_borders = _borders(self._crossovers, [], [])
        if self._driver.capture(stream):
            return self._best(bucket)
        self._read()
        mode = self._next(bucket)
        if mode == self._mode and self._is_tried(bucket) and not self._span.pending:
            self._span.start(stream)
            self._chosen = bucket
        return mode

    def acquired(self, index: int, mode: Mode) -> None:
        """Layer ``index`` was not refused."""
        if index == 0:
            self._passes += 1
            self._mode, self._bucket = mode, self._chosen

    def release(self, index: int, stream: StreamId) -> None:
        """Layer ``index`` of the pass has been read by the work given to ``stream``."""
        if index == self._last_layer and self._bucket is not None:
            self._span.stop(stream)
            self._timed, self._bucket = (self._bucket, self._mode), None

    def choice(self) -> ModeChoice | None:
        """What is known so far; None before the first pass."""
        if self._crossovers is None:
            return None
        lower, upper = map(_least_tokens, self._borders)
        buckets = sorted(self._buckets.items())  # at once, as passes may go on in another thread
        seconds = {_least_tokens(number): bucket.fastest for number, bucket in buckets}
        return ModeChoice(lower, upper, seconds)

    def _is_tried(self, bucket: int) -> bool:
        return self._borders[0] <= bucket < self._borders[1]

    def _supposed(self, bucket: int) -> Mode:
        return "in_place" if bucket < sum(self._borders) / 2 else "staged"

    def _best(self, bucket: int) -> Mode:
        tried = self._buckets.get(bucket)
        if tried is None or tried.untried or not self._is_tried(bucket):
            return self._supposed(bucket)
        return tried.by_speed[0]

    def _next(self, bucket: int) -> Mode:
        """The best mode, or one that is to be tried."""
        if not self._is_tried(bucket):
            return self._supposed(bucket)
        tried = self._buckets.setdefault(bucket, _Bucket())
        tried.passes += 1
        if tried.passes > tried.retry:
            tried.passes = 1
            if not tried.untried:
                tried.seconds[tried.by_speed[1]].clear()
        supposed = self._supposed(bucket)
        if not tried.untried:
            return tried.by_speed[0]
        if tried.passes > TRIAL or supposed in tried.untried:
            return supposed
        return tried.untried[0]

    def _read(self) -> None:
        """Take over what was measured, if the device is past it."""
        seconds = self._span.read()
        if seconds is None:
            if self._passes - self._latest > FORGET:
                self._borders = self._first_borders
            return
        number, mode = self._timed
        bucket = self._buckets[number]
        bucket.seconds[mode].append(seconds)
        bucket.latest = self._latest = self._passes
        won: dict[Mode, list[int]] = {"in_place": [], "staged": []}
        for number, bucket in self._buckets.items():
            if not bucket.untried and self._passes - bucket.latest <= FORGET:
                won[bucket.by_speed[0]].append(number)
        assert self._crossovers is not None
        self._borders = _borders(self._crossovers, won["in_place"], won["staged"])

    def close(self) -> None:
        self._span.close()


def _borders(crossovers: tuple[float, float], in_place: Sequence[int], staged: Sequence[int]) -> tuple[float, float]:
    """The borders around ``crossovers``, as the buckets in which either mode was faster move them."""
    lower, upper = crossovers[0] - SUPPOSED_WITHIN, crossovers[1] + SUPPOSED_WITHIN
    if in_place:
        lower = max(in_place)
        upper = max(upper, lower + DOUBLING + 1)
    if staged:
        upper = min(staged) + 1
        lower = min(lower, min(staged) - (0 if in_place else DOUBLING))
    return lower, max(upper, *(number + 1.0 for number in in_place)) if in_place else upper


def _least_tokens(bucket: float) -> int:
    return math.ceil(2 ** (bucket / DOUBLING))
