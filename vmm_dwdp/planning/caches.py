"""What a cache of experts would have held: policies replayed over recorded routing.

[Note: Replay]
A layer has a bank with room for so many experts. A step is what is decoded together: it uses a set of experts, of which
those in the bank are hits, and the others cross the link, whether they are read in place or copied. Afterwards the bank
holds the experts of the highest scores among those that were there and those that were just used: nothing is fetched
ahead, and a policy may leave out what was just used. Of equal scores the lower number is kept. Layers and sequences
that do not share a bank are lanes, replayed side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.routing import Used

Scores = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[np.int64]

# Of ``used``, bool [steps, lanes, experts]: after each step, scores [lanes, experts]. All but foresight look only at
# the steps so far.
Policy = Callable[[Used], Iterator[Scores]]


class Replay(NamedTuple):
    """By step and lane, int64 ``[steps, lanes]``: experts that were used, and those of them that were in the bank."""

    uses: Counts
    hits: Counts

    def share(self) -> float:
        """Of all uses, those that were hits."""
        return float(self.hits.sum() / self.uses.sum())


def replay(used: Used, room: int, policy: Policy) -> Replay:
    """Replay ``used``, bool ``[steps, lanes, experts]``, in banks that are empty at first; see [Note: Replay].

    Args:
        room: experts that the bank of a lane has room for.

    Raises:
        ConfigError: there is no room.
    """
    experts = used.shape[-1]
    if room < 1:
        raise ConfigError(f"a bank has room for at least one expert, not {room}")
    held = np.zeros(used.shape[1:], np.bool_)
    tie = np.arange(experts) * 1e-9
    hits = np.empty(used.shape[:2], np.int64)
    for step, (now, scores) in enumerate(zip(used, policy(used), strict=True)):
        hits[step] = (now & held).sum(-1)
        held = held | now
        if room < experts:
            ranked = np.where(held, scores - tie, -np.inf)
            held &= ranked >= np.partition(ranked, experts - room, axis=-1)[:, experts - room, None]
    return Replay(used.sum(-1, dtype=np.int64), hits)


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


def least_recently_used(used: Used) -> Iterator[Scores]:
    """What was not used for longest goes."""
    last = np.full(used.shape[1:], -1.0)
    for step, now in enumerate(used):
        last[now] = step
        yield last


def decayed_frequency(half_life: float) -> Policy:
    """What was used least often goes; a use counts half after so many steps."""

    def scores(used: Used) -> Iterator[Scores]:
        # The logarithm of a sum that grows where others shrink: no step changes what was not used in it.
        logarithm = np.full(used.shape[1:], -np.inf)
        for step, now in enumerate(used):
            logarithm[now] = np.logaddexp2(logarithm[now], step / half_life)
            yield logarithm

    return scores


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

    return scores


def foresight(used: Used) -> Iterator[Scores]:
    """What is used again last goes: no policy without fetching ahead has more hits (Belady, IBM Systems Journal 5(2),
    1966; that what was just used may be left out is the variant with bypass)."""
    following = np.full(used.shape, len(used), np.int32)
    for step in range(len(used) - 2, -1, -1):
        following[step] = np.where(used[step + 1], step + 1, following[step + 1])
    for upcoming in following:
        yield -upcoming.astype(np.float64)
