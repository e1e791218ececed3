"""What a cache of experts would have held: policies replayed over recorded routing.

[Note: Replay]
A layer has a bank with room for so many experts. A step is what is decoded together: it uses a set of experts, of which
those in the bank are hits, and the others cross the link, whether they are read in place or copied. Afterwards the bank
holds the experts of the highest scores among those that were there and those that were just used: nothing is fetched
ahead, and a policy may leave out what was just used. Of equal scores the lower number is kept. Layers and sequences
that do not share a bank are lanes, replayed side by side.

The rule by which the device plans a bank is more careful about who comes: [Note: The planner] in kernels/bank_table.py.
It is replayed here in numbers that are not rounded, and without a limit of the tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels.bank_table import HALF_LIFE, USES_A_COPY
from vmm_dwdp.planning.routing import Used

Scores = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[np.int64]

# Of ``used``, bool [steps, lanes, experts]: after each step, scores [lanes, experts]. All but foresight look only at
# the steps so far.
Scoring = Callable[[Used], Iterator[Scores]]


class Policy(NamedTuple):
    """Which experts a bank holds.

    Attributes:
        scoring: which experts stay.
        sparing: of those just used only those come that the device's rule lets come. Then ``scoring`` gives what was
            used 0 at least, and changes no score of what a step does not use.
    """

    scoring: Scoring
    sparing: bool = False


class Replay(NamedTuple):
    """By step and lane, int64 ``[steps, lanes]``: experts that were used, those of them that were in the bank, and
    those that came into it."""

    uses: Counts
    hits: Counts
    copies: Counts

    def share(self) -> float:
        """Of all uses, those that were hits."""
        return float(self.hits.sum() / self.uses.sum())

    def copied(self) -> float:
        """Of all uses, those that brought the expert into the bank."""
        return float(self.copies.sum() / self.uses.sum())


def replay(used: Used, room: int, policy: Policy) -> Replay:
    """Replay ``used``, bool ``[steps, lanes, experts]``, in banks that are empty at first; see [Note: Replay].

    Args:
        room: experts that the bank of a lane has room for.

    Raises:
        ConfigError: there is no room.
    """
    if room < 1:
        raise ConfigError(f"a bank has room for at least one expert, not {room}")
    held = np.zeros(used.shape[1:], np.bool_)
    sparing = _Sparing(held.shape, room) if policy.sparing else None
    tie = np.arange(used.shape[-1]) * 1e-9
    hits, copies = (np.empty(used.shape[:2], np.int64) for _ in range(2))
    for step, (now, scores) in enumerate(zip(used, policy.scoring(used), strict=True)):
        hits[step] = (now & held).sum(-1)
        newcomers, worth = now & ~held, scores - tie
        if sparing:
            newcomers, worth = sparing.let(now, held, worth)
        kept = _best(worth, held | newcomers, room)
        copies[step] = (kept & ~held).sum(-1)
        if sparing:
            sparing.pay((held & ~kept).sum(-1))
        held = kept
    return Replay(used.sum(-1, dtype=np.int64), hits, copies)


class _Sparing:
    """The part of the device's rule that is about newcomers."""

    def __init__(self, shape: tuple[int, ...], room: int) -> None:
        self._room = room
        self._before = np.full(shape, -1.0) - np.arange(shape[-1]) * 1e-9
        self._credit = np.zeros(shape[0], np.int64)

    def let(self, now: Used, held: Used, worth: Scores) -> tuple[Used, Scores]:
        """The newcomers that take part, and what all are worth: newcomers what they were worth before this step, and
        what is read now more than anything."""
        self._credit = np.minimum(self._credit + now.sum(-1), USES_A_COPY * self._room)
        stated = np.where(now & held, np.inf, np.where(held, worth, self._before))
        self._before = np.maximum(self._before, worth)
        most = self._room - held.sum(-1) + self._credit // USES_A_COPY
        return _best(stated, now & ~held, most[:, None]), stated

    def pay(self, left: Counts) -> None:
        """For so many who left."""
        self._credit -= USES_A_COPY * left


def _best(worth: Scores, among: Used, most: Counts | int) -> Used:
    """``most`` of those ``among`` which there are, that are worth most."""
    place = np.where(among, -worth, np.inf).argsort(-1, kind="stable").argsort(-1, kind="stable")
    best: Used = among & (place < most)
    return best


def lanes(used: Used, together: int = 1) -> Used:
    """A lane for each layer of so many neighbouring sequences, which are decoded together.

    Args:
        used: bool ``[tokens, sequences, layers, experts]``; sequences that are left over are left out.

    Returns:
        bool ``[tokens, lanes, experts]``: what any of a lane's sequences used.
    """
    tokens, sequences, layers, experts = used.shape
    groups = sequences // together
    kept = used[:, : groups * together].reshape(tokens, groups, together, layers, experts)
    return kept.any(2).reshape(tokens, -1, experts)


def replay_decoding(prefill: Used, decode: Used, room: int, policy: Policy, together: int = 1) -> Replay:
    """The steps of decoding so many sequences together, after those of the ends of their prompts, replayed as if they
    had been decoded, too.

    Args:
        prefill, decode: bool ``[tokens, sequences, layers, experts]``.
    """
    done = replay(lanes(np.concatenate([prefill, decode]), together), room, policy)
    return Replay(*(part[len(prefill) :] for part in done))


def first_uses(used: Used) -> Counts:
    """By step and lane, experts that no step before had used: what misses in an empty bank of any size."""
    before = np.logical_or.accumulate(used, axis=0)
    first: Counts = np.concatenate([used[:1], used[1:] & ~before[:-1]]).sum(-1, dtype=np.int64)
    return first


def _last_use(used: Used) -> Iterator[Scores]:
    last = np.full(used.shape[1:], -1.0)
    for step, now in enumerate(used):
        last[now] = step
        yield last


least_recently_used: Final = Policy(_last_use)  # what was not used for longest goes


def decayed_frequency(half_life: float, *, sparing: bool = False) -> Policy:
    """What was used least often goes; a use counts half after so many steps."""

    def scores(used: Used) -> Iterator[Scores]:
        # The logarithm of a sum that grows where others shrink: no step changes what was not used in it.
        logarithm = np.full(used.shape[1:], -np.inf)
        for step, now in enumerate(used):
            logarithm[now] = np.logaddexp2(logarithm[now], step / half_life)
            yield logarithm

    return Policy(scores, sparing)


bank_policy: Final = decayed_frequency(HALF_LIFE, sparing=True)  # the device's


def most_frequent(frequency: npt.NDArray[Any], room: int) -> Used:
    """A static list: of each lane the ``room`` experts of highest frequency, bool ``[lanes, experts]``."""
    order = np.argsort(-frequency.astype(np.float64), axis=-1, kind="stable")
    held = np.zeros(frequency.shape, np.bool_)
    np.put_along_axis(held, order[:, :room], True, axis=-1)
    return held


def random_victims(seed: int) -> Policy:
    """What was just used stays, as far as there is room, and of the others any may go."""

    def scores(used: Used) -> Iterator[Scores]:
        chance = np.random.default_rng(seed)
        for now in used:
            yield chance.random(now.shape) + now

    return Policy(scores)


def _next_use(used: Used) -> Iterator[Scores]:
    following = np.full(used.shape, len(used), np.int32)
    for step in range(len(used) - 2, -1, -1):
        following[step] = np.where(used[step + 1], step + 1, following[step + 1])
    for upcoming in following:
        yield -upcoming.astype(np.float64)


# What is used again last goes: no policy without fetching ahead has more hits (Belady, IBM Systems Journal 5(2), 1966;
# that what was just used may be left out is the variant with bypass).
foresight: Final = Policy(_next_use)
