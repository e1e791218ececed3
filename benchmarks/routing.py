"""Which share of experts' reads a cache would save, by policy: recorded routing is replayed, so that no GPU is needed.

    python benchmarks/routing.py

Each trace of benchmarks/traces says which experts the tokens of one model chose; README.md there says whose. A layer
has a bank with room for a part of its experts. Before what is counted, the end of each prompt is replayed as if it had
been decoded. Hits are the share of the experts used in a step that were in the bank; the rest crosses the link.

hits        by policy and room, one sequence at a time; and copied: the share of the experts used that came into the
            bank. Static lists have the experts that most tokens chose in other sequences of the same kind of text, or
            of another kind (the mean over all other kinds). Foresight knows what comes, but fetches nothing ahead: more
            hits than that no policy has.
against     the same where experts are not chosen by a model, but all in turn; in pairs of steps, of half of them, again
            and again; or by adversary.py; a token's in a step, with room for a quarter, from the 193rd step on
together    by sequences that are decoded together, of all kinds, with room for a quarter of the experts
topic       after a sequence of the same kind of text, and of another, with room for a quarter, by tokens since
reuse       tokens from one use of an expert to the next, by layer: as recorded, and with a sequence's tokens shuffled;
            if each layer chose evenly, the median would be the one "by chance"
owners      the busiest owner's link over the mean of all, where each rank of a group decodes some sequences and reads
            experts in place: of one step and layer, the mean; of each layer over all steps; the same if each sequence
            were of one kind, the mean; if routing were even; and with experts dealt out by what the prompts used,
            instead of in order
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from adversary import BEFORE, ROUND, in_turn, none_hits
from common import Row, parser, report, seen

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning import locality
from vmm_dwdp.planning.caches import (
    Policy,
    Replay,
    bank_policy,
    decayed_frequency,
    first_uses,
    foresight,
    lanes,
    least_recently_used,
    most_frequent,
    random_victims,
    replay,
    replay_decoding,
)
from vmm_dwdp.planning.routing import PHASES, Used, read_trace, used_experts

TRACES = Path(__file__).parent / "traces"
ROOMS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of a layer's experts
QUARTER = 1 / 4
POLICIES: dict[str, Policy] = {
    "least recently used": least_recently_used,
    **{f"decayed frequency, half-life {steps}": decayed_frequency(steps) for steps in (4, 16, 64)},
    "the bank's": bank_policy,
    "random": random_victims(seed=0),
    "foresight": foresight,
}
WINDOWS = (0, 8, 32, 128)  # tokens after a change of topic
RANKS = {2: (1, 4, 16), 4: (1, 4, 8), 8: (1, 2, 4)}  # and sequences that each decodes


class Recorded(NamedTuple):
    """A trace whose sequences are sorted so that neighbours are of different kinds.

    ``prefill`` and ``decode``: bool ``[tokens, sequences, layers, experts]``. ``kinds``: numbers ``[sequences]``.
    """

    name: str
    prefill: Used
    decode: Used
    kinds: npt.NDArray[np.int64]
    about: Row

    @property
    def experts(self) -> int:
        return self.decode.shape[-1]


def recorded(path: Path) -> Recorded:
    trace = read_trace(path)
    names = list(dict.fromkeys(trace.kinds))
    if len({trace.kinds.count(name) for name in names}) > 1 or not 1 < len(names) < len(trace.kinds):
        raise ConfigError(
            f"{path} cannot be compared by kinds of text: it needs two kinds or more, with equally many sequences of "
            "each, two or more"
        )
    trace = trace.mixed()
    kinds = np.array([names.index(kind) for kind in trace.kinds])
    about = {
        "trace": path.stem,
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top k": trace.top_k,
        "kinds": len(names),
        "sequences": len(kinds),
        **{f"tokens in {phase}": getattr(trace, phase).shape[1] for phase in PHASES},
    }
    return Recorded(path.stem, trace.used("prefill"), trace.used("decode"), kinds, about)


def warm(trace: Recorded, room: float, policy: Policy, together: int = 1) -> Replay:
    """The steps of decoding, after those of the prompts."""
    return replay_decoding(trace.prefill, trace.decode, round(room * trace.experts), policy, together)


def chosen_often(trace: Recorded) -> npt.NDArray[np.int64]:
    """How many tokens of each sequence chose each expert, ``[sequences, layers, experts]``."""
    return np.concatenate([trace.prefill, trace.decode]).sum(0, dtype=np.int64)


def static_lists(trace: Recorded, room: float) -> dict[str, float]:
    counts = chosen_often(trace)
    used = trace.decode.sum(0, dtype=np.int64)
    own, other = [], []
    for sequence, kind in enumerate(trace.kinds):
        for learned_on in range(trace.kinds.max() + 1):
            by = (trace.kinds == learned_on) & (np.arange(len(counts)) != sequence)
            held = most_frequent(counts[by].sum(0), round(room * trace.experts))
            share = used[sequence][held].sum() / used[sequence].sum()
            (own if learned_on == kind else other).append(share)
    return {"static, the same kind": float(np.mean(own)), "static, another kind": float(np.mean(other))}


def traces(trace: Recorded) -> Iterator[Row]:
    used = lanes(np.concatenate([trace.prefill, trace.decode]))
    forced = first_uses(used)[len(trace.prefill) :].sum() / used[len(trace.prefill) :].sum()
    yield {**trace.about, "never used before": float(forced)}


def hits(trace: Recorded) -> Iterator[Row]:
    for room in ROOMS:
        found = {name: warm(trace, room, policy) for name, policy in POLICIES.items()}
        shares = {name: (done.share(), done.copied()) for name, done in found.items()}
        listed = {name: (share, 0.0) for name, share in static_lists(trace, room).items()}
        for name, (share, copied) in {**shares, **listed}.items():
            yield {"trace": trace.name, "room": room, "policy": name, "hits": share, "copied": copied}


def against(trace: Recorded) -> Iterator[Row]:
    experts, top_k = trace.experts, int(trace.about["top k"])  # type: ignore[call-overload]
    steps = BEFORE + ROUND
    chosen = {
        "all in turn": in_turn(experts, top_k, steps),
        "half of them, in pairs": in_turn(experts // 2, top_k, steps).repeat(2, 0)[:steps],
        "chosen against the bank": none_hits(experts, top_k, 1, passes=steps)[:, 0],
    }
    for routing, ids in chosen.items():
        used = used_experts(ids.astype(np.uint16), experts)[:, None]
        for name, policy in POLICIES.items():
            found = Replay(*(part[BEFORE:] for part in replay(used, round(QUARTER * experts), policy)))
            row = {"routing": routing, "policy": name, "hits": found.share(), "copied": found.copied()}
            yield {"trace": trace.name, **row}


def together(trace: Recorded) -> Iterator[Row]:
    for sequences in (several for several in (1, 2, 4, 8, 16, 32) if several <= len(trace.kinds)):
        for name, policy in POLICIES.items():
            found = warm(trace, QUARTER, policy, sequences)
            used = float(found.uses.mean() / trace.experts)
            yield {
                "trace": trace.name,
                "sequences": sequences,
                "experts used": used,
                "policy": name,
                "hits": found.share(),
                "copied": found.copied(),
            }


def topic(trace: Recorded) -> Iterator[Row]:
    """Each sequence's decoding after another's: neighbours are of different kinds, which come round."""
    kinds = trace.kinds.max() + 1
    before = {
        "after the same kind": np.roll(trace.decode, kinds, axis=1),
        "after another kind": np.roll(trace.decode, 1, axis=1),
    }
    for name, policy in POLICIES.items():
        found = {}
        for which, first in before.items():
            found[which] = replay_decoding(first, trace.decode, round(QUARTER * trace.experts), policy)
        for start, end in itertools.pairwise([window for window in WINDOWS if window <= len(trace.decode)]):
            shares = {which: Replay(*(part[start:end] for part in done)).share() for which, done in found.items()}
            yield {"trace": trace.name, "policy": name, "tokens since": f"{start + 1} to {end}", **shares}


def reuse(trace: Recorded) -> Iterator[Row]:
    used = np.concatenate([trace.prefill, trace.decode])
    shuffled = np.random.default_rng(0).permutation(used, axis=0)
    chance = np.log(0.5) / np.log1p(-trace.about["top k"] / trace.experts)  # type: ignore[operator]
    layers = used.shape[2]
    for layer in (None, *range(layers)):
        which = slice(None) if layer is None else slice(layer, layer + 1)
        now, mixed = (locality.reuse_distances(lanes(each[:, :, which])) for each in (used, shuffled))
        again = (used[1:, :, which] & used[:-1, :, which]).sum() / used[1:, :, which].sum()
        yield {
            "trace": trace.name,
            "layer": "all" if layer is None else layer,
            "of the next token's": float(again),
            "median": float(np.median(now)),
            "9 of 10 within": float(np.percentile(now, 90)),
            "shuffled median": float(np.median(mixed)),
            "by chance": float(np.ceil(chance)),
        }


def given(used: Used, ranks: int, together: int, owners: locality.Owners) -> npt.NDArray[np.int64]:
    """Experts that each owner gives, ``[steps, layers, ranks]``: groups of ranks that decode so many sequences each."""
    tokens, _, layers, experts = used.shape
    by_lane = lanes(used, together).reshape(tokens, -1, layers, experts)
    groups = by_lane.shape[1] // ranks
    found = [
        locality.asked([by_lane[:, group * ranks + rank] for rank in range(ranks)], owners) for group in range(groups)
    ]
    return np.concatenate(found)


def even(trace: Recorded) -> Used:
    """As many tokens, each of which chooses evenly at random."""
    chance = np.random.default_rng(0).random(trace.decode.shape, dtype=np.float32)
    top_k = int(trace.about["top k"])  # type: ignore[call-overload]
    return used_experts(chance.argpartition(top_k, axis=-1)[..., :top_k].astype(np.uint16), trace.experts)


def owners(trace: Recorded) -> Iterator[Row]:
    used, evenly = trace.decode, even(trace)
    layers = used.shape[2]
    prompts = trace.prefill.sum((0, 1), dtype=np.int64)
    of_kind = [used[:, trace.kinds == kind].sum((0, 1), dtype=np.int64) for kind in range(trace.kinds.max() + 1)]
    for ranks, several in RANKS.items():
        placed = locality.in_order(layers, trace.experts, ranks)
        dealt = locality.dealt_by_load(prompts, ranks)
        loads = [np.stack([np.bincount(o, w, ranks) for o, w in zip(placed, load, strict=True)]) for load in of_kind]
        for sequences in (each for each in several if each * ranks <= len(trace.kinds)):
            found, best, chance = (
                given(which, ranks, sequences, by) for which, by in ((used, placed), (used, dealt), (evenly, placed))
            )
            whole = locality.busiest(found.sum(0))
            yield {
                "trace": trace.name,
                "ranks": ranks,
                "sequences a rank": sequences,
                "a step": float(locality.busiest(found).mean()),
                "even routing, a step": float(locality.busiest(chance).mean()),
                "dealt, a step": float(locality.busiest(best).mean()),
                "all steps": float(whole.mean()),
                "all steps, worst layer": float(whole.max()),
                "one kind, all steps": float(np.mean([locality.busiest(load) for load in loads])),
                "dealt, all steps": float(locality.busiest(best.sum(0)).mean()),
            }


TABLES = {
    "traces": traces,
    "hits": hits,
    "against": against,
    "together": together,
    "topic": topic,
    "reuse": reuse,
    "owners": owners,
}


def tables(paths: Sequence[Path], only: Sequence[str]) -> dict[str, list[Row]]:
    found = [recorded(path) for path in paths]
    return {name: [seen(row) for trace in found for row in TABLES[name](trace)] for name in only}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", choices=TABLES, default=list(TABLES))
    options.add_argument("--traces", nargs="+", type=Path, default=sorted(TRACES.glob("*.npz")), help="other traces")
    given = options.parse_args()
    try:
        report(given, tables(given.traces, given.only))
    except ConfigError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
