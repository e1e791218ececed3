"""What a walk knows of its group, and the calls of a single rank's passes, judged by what the documents say."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from support.drivers import NativeDriver
from support.groups import PAGE
from support.ranks import Bytes, InProcess, InThread, Outcome, Shape, Side, digest
from support.room import Counted
from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator.native import HAS_NATIVE

NUMBERS: Final = {"uint8": 1, "bfloat16": 2, "float32": 4}  # bytes an element


class Wrong(AssertionError):
    """The group did what the documentation does not say."""


@dataclass
class Rank:
    """What is known of one rank.

    Attributes:
        acquired: by layer, the mode that was asked for: which one ``auto`` chose is not known.
        barred: whether it must refuse to read, because an update broke off.
        kept: whether somebody holds a tensor.
        acquires: that succeeded since it was published.
    """

    number: int
    there: InThread | InProcess
    state: str = "set-up"  # then "running", then "closed" or "dead", and "gone" at the end
    acquired: dict[int, str] = field(default_factory=dict)
    barred: bool = False
    kept: bool = False
    acquires: int = 0


class WalkedGroup:
    """One group, as far as it is known; calls of one rank, and its passes.

    Attributes:
        directory: where the ranks meet; set by whoever enters it.
        ranks: likewise.
    """

    directory: str
    ranks: list[Rank]

    def __init__(self, seed: int, *, processes: bool = False) -> None:
        self.chance = random.Random(seed)
        self.seed = seed
        self.processes = processes
        self.steps: list[str] = []
        self.config, self.layers, number = self._group()
        self.placed = replace(self.config, num_local_experts=number, memory_bytes=None)
        self.numbers = list(self.layers)
        self.model = self._bytes(list(self._weights()))
        self.candidates: list[Bytes] = [self.model]  # one of these; several after an update that broke off
        self.moved = False  # whether experts may be in other rows than those of their numbers
        self.native = HAS_NATIVE and not processes and self.chance.random() < 0.3

    # -- what is drawn -------------------------------------------------------------------------------------------------
    def _group(self) -> tuple[DWDPConfig, dict[int, dict[str, Shape]], int | None]:
        """The config, the layers, and how many experts a rank holds."""
        chance = self.chance
        size = chance.randint(2, 4) if self.processes else chance.randint(1, 4)
        assembly: Any = "vmm" if self.processes or chance.random() < 0.85 else "tensor_list"
        experts = chance.randint(1, 9)
        hosted = chance.randint(0, experts) if assembly == "vmm" and chance.random() < 0.7 else 0
        least = -(-(experts - hosted) // size)
        mode: Any = chance.choice(["staged", "in_place", "auto"]) if assembly == "vmm" else "staged"
        in_place = mode != "staged"
        banked = in_place and chance.random() < 0.4
        config = DWDPConfig(
            group_size=size,
            prefetch_depth=chance.randint(0 if mode == "in_place" else 1, 3),
            slice_bytes=chance.choice(["auto", "streams", 256, 4096]),
            host_experts=hosted,
            assembly=assembly,
            mode=mode,
            resident_cache=chance.choice([0, 4, 50]) * PAGE if in_place and not banked else 0,
            expert_bank=chance.choice([50, 400]) * PAGE if banked else 0,  # at least a row of each layer
            checksums=chance.random() < 0.6,
            movable_experts=in_place and not banked and chance.random() < 0.8,
        )
        weights = {
            f"w{i}": (chance.randint(1, 2600), chance.choice(list(NUMBERS))) for i in range(chance.randint(1, 2))
        }
        growth = chance.choice([0, 0, 301])
        layers = {
            3 * index + 1: {
                name: ((experts, count + index * growth), dtype) for name, (count, dtype) in weights.items()
            }
            for index in range(chance.randint(1, 5))
        }
        number = chance.randint(least, experts - hosted)
        if chance.random() < 0.7:
            number = chance.choice([None, number])
            return replace(config, num_local_experts=number), layers, number  # type: ignore[return-value]
        auto = replace(config, num_local_experts="auto", memory_bytes=1 << 30)
        if assembly == "tensor_list":  # which takes no pages
            return auto, layers, experts - hosted  # type: ignore[return-value]
        nbytes = [(experts, tuple(s[1] * NUMBERS[d] for s, d in weights.values())) for weights in layers.values()]
        kept = config.resident_cache + config.expert_bank
        counted = Counted(nbytes, size, config.prefetch_depth, PAGE, hosted, kept)
        room = max(1, *(counted.takes(rank, number) for rank in range(size)))
        offers = [counted.most(rank, room, room) for rank in range(size)]
        settled = None if "equal" in offers else min(offers)
        return replace(auto, memory_bytes=room), layers, settled  # type: ignore[return-value]

    def _weights(self) -> list[tuple[int, str]]:
        return [(number, name) for number, weights in self.layers.items() for name in weights]

    def _bytes(self, keys: list[tuple[int, str]]) -> Bytes:
        """Random ones."""

        def nbytes(shape: tuple[int, ...], dtype: str) -> int:
            return shape[0] * shape[1] * NUMBERS[dtype]

        return {(number, name): self.chance.randbytes(nbytes(*self.layers[number][name])) for number, name in keys}

    def __str__(self) -> str:
        """How it came to this."""
        tail = "\n  ".join(self.steps[-12:])
        return f"seed {self.seed}, {len(self.steps)} steps, {self.config}, layers {self.layers}; the latest:\n  {tail}"

    def _side(self, number: int) -> Side:
        return Side(self.config, number, self.directory, self.layers, NativeDriver if self.native else None)

    def _enter(self, number: int) -> Rank:
        side = self._side(number)
        return Rank(number, InProcess(side) if self.processes else InThread(side))

    def _abandon(self, rank: Rank) -> None:
        if rank.state != "gone":
            if rank.state != "dead":
                rank.there.begin("forget")()
                rank.there.begin("close")()
            rank.there.end()
            rank.state = "gone"

    def _begin(self, rank: Rank, command: str, *arguments: Any, **options: Any) -> Callable[[], Outcome]:
        stated = [repr(each) for each in arguments if not isinstance(each, dict)]
        stated += [f"{name}={value!r}" for name, value in options.items() if value is not None]
        step = f"rank {rank.number}: {command}({', '.join(stated)})"
        self.steps.append(step)
        place = len(self.steps) - 1
        begun = rank.there.begin(command, *arguments, **options)

        def result() -> Outcome:
            outcome = begun()
            self.steps[place] = f"{step} -> {outcome.kind} {str(outcome.told)[:300]}"
            if outcome.kind == "raw":
                raise Wrong(f"{step} ended in an exception that is none of the library's:\n{outcome.told}")
            return outcome

        return result

    def tell(self, rank: Rank, command: str, *arguments: Any, **options: Any) -> Outcome:
        return self._begin(rank, command, *arguments, **options)()

    def _must(self, outcome: Outcome, *kinds: str) -> Any:
        """What it returned or was refused by, if it ended in one of these ways."""
        if outcome.kind not in kinds:
            raise Wrong(f"expected {' or '.join(kinds)}, not {outcome.kind}: {outcome.told}")
        return outcome.told

    def _done(self, rank: Rank, command: str, *arguments: Any, **options: Any) -> Any:
        return self._must(self.tell(rank, command, *arguments, **options), "done")

    # -- passes --------------------------------------------------------------------------------------------------------
    def _modes(self) -> list[str]:
        return ["staged"] * bool(self.config.prefetch_depth) + ["in_place"] * (self.config.mode != "staged")

    def _offered(self, mode: str) -> bool:
        return mode in self._modes() or (mode == "auto" and len(self._modes()) == 2)

    def _pass(self, rank: Rank) -> None:
        order = list(self.numbers)
        if self.chance.random() < 0.4:
            order = self.chance.choices(order, k=self.chance.randint(1, 2 * len(order)))
        mode = self.chance.choice([None, *self._modes()])
        tokens = self.chance.choice([1, 3, 50, 400])
        for layer in order:
            if self._acquired(rank, layer, mode, tokens=tokens, chosen=self._chosen()):
                self._must(self.tell(rank, "release", layer), "done")
                del rank.acquired[layer]

    def _stated_pass(self, rank: Rank) -> None:
        """The mode and the tokens are stated once; afterwards nothing is acquired, however it ended."""
        mode = self.chance.choice([None, *self._modes(), "in_place"])
        order = self.numbers[: self.chance.randint(0, len(self.numbers))]
        raises = self.chance.random() < 0.3
        outcome = self.tell(rank, "stated_pass", order, raises, mode=mode, tokens=self.chance.choice([1, 300]))
        if rank.acquired or rank.barred:
            self._must(outcome, "StateError", "ConfigError")
            return
        if not self._offered(mode or self.config.mode):
            self._must(outcome, "ConfigError")
            return
        told = self._must(outcome, "DWDPError" if raises else "done")
        for layer, found in zip(order, ast.literal_eval(told) if raises else told, strict=True):
            self._compare(layer, found)
            rank.acquires += 1

    def _look_up(self, rank: Rank) -> None:
        """Layers of which some experts are looked up, in a bank if there is one; by many tokens nothing comes there."""
        mode = self.chance.choice([None, *self._modes()])
        experts = next(iter(self.layers.values()))["w0"][0][0]
        favourites = self.chance.choices(range(experts), k=3)
        for layer in self.chance.choices(self.numbers, k=4):
            chosen = self.chance.choices([*favourites, *range(experts)], k=self.chance.choice([1, 3, 40]))
            outcome = self.tell(rank, "looked_up", layer, chosen, mode=mode, tokens=len(chosen))
            found = self._must(outcome, *self._allowed(rank, layer, mode or self.config.mode, len(chosen)))
            if outcome.kind == "done":
                self._compare(layer, found, chosen)
                rank.acquires += 1

    def _chosen(self) -> Any:
        experts = next(iter(self.layers.values()))["w0"][0][0]
        if self.chance.random() < 0.5:
            return None
        favourite = self.chance.randrange(experts)
        return [[self.chance.choice([favourite, -1, self.chance.randrange(experts)])] for _ in range(20)]

    def _acquire(self, rank: Rank) -> None:
        layer = self.chance.choice(self.numbers * 4 + [99, -1, None])
        mode = self.chance.choice([None, None, "staged", "in_place", "auto", "fast"])
        tokens = self.chance.choice([None, 0, 1, 30, 500])
        top_k = self.chance.choice([None, None, 0, 1, 2, 100])
        keep = self.chance.random() < 0.02
        self._acquired(rank, layer, mode, tokens=tokens, top_k=top_k, chosen=self._chosen(), keep=keep)

    def _acquired(self, rank: Rank, layer: Any, mode: str | None, **options: Any) -> bool:
        """Acquire, judged; whether it succeeded."""
        outcome = self.tell(rank, "acquire", layer, mode=mode, **options)
        asked = mode or self.config.mode
        kinds = self._allowed(rank, layer, asked, options.get("tokens"))
        found = self._must(outcome, *kinds)
        if outcome.kind != "done":
            return False
        self._compare(layer, found)
        rank.acquired[layer] = asked
        rank.acquires += 1
        rank.kept |= bool(options.get("keep"))
        return True

    def _allowed(self, rank: Rank, layer: Any, asked: str, tokens: int | None) -> set[str]:
        """How an acquire may end."""
        if rank.barred:
            return {"StateError"} if layer in self.numbers else {"ConfigError", "StateError"}
        if layer not in self.numbers:
            return {"ConfigError"}
        refusals = set()
        if not self._offered(asked):
            refusals.add("ConfigError")
        if asked == "auto" and tokens is None and self.numbers.index(layer) == 0:
            refusals.add("ConfigError")
        if layer in rank.acquired:
            refusals.add("StateError")
        depth = min(self.config.prefetch_depth, len(self.numbers))
        unsure = False
        if depth and asked != "in_place":
            slot = self.numbers.index(layer) % depth
            for other, mode in rank.acquired.items():
                if other != layer and self.numbers.index(other) % depth == slot and mode != "in_place":
                    if "auto" in (mode, asked):
                        unsure = True
                    else:
                        refusals.add("StateError")
        if unsure:
            return {*refusals, "StateError"} | (set() if refusals else {"done"})
        return refusals or {"done"}

    def _compare(self, layer: int, found: dict[str, str], experts: list[int] | None = None) -> None:
        """Every byte, of some ``experts`` or of all, with what the candidates have."""

        def read(whole: bytes, of: int) -> bytes:
            each = len(whole) // of
            return whole if experts is None else b"".join(whole[at * each : (at + 1) * each] for at in experts)

        shapes = self.layers[layer].items()
        fitting = [
            model
            for model in self.candidates
            if found == {name: digest(read(model[layer, name], shape[0])) for name, (shape, _) in shapes}
        ]
        if not fitting:
            raise Wrong(f"layer {layer} has other bytes than the model")

    def _release(self, rank: Rank) -> None:
        layer = self.chance.choice(list(rank.acquired) * 3 + [*self.numbers, 99])
        kinds = ["done"] if layer in rank.acquired else ["StateError"] if layer in self.numbers else ["ConfigError"]
        if rank.barred:
            kinds.append("StateError")
        if self.tell_kind(self.tell(rank, "release", layer), kinds) == "done":
            del rank.acquired[layer]

    def tell_kind(self, outcome: Outcome, kinds: list[str]) -> str:
        self._must(outcome, *kinds)
        return outcome.kind

    def _reset(self, rank: Rank) -> None:
        self._done(rank, "call", "reset")
        rank.acquired.clear()

    def _abandoned(self, rank: Rank) -> None:
        """A forward pass that fails inside ``with runtime.layer``: its own exception, and the layer is released."""
        layer = self.chance.choice(self.numbers)
        outcome = self.tell(rank, "abandoned", layer, tokens=5)
        allowed = self._allowed(rank, layer, self.config.mode, 5)
        if outcome.kind == "DWDPError":
            if "done" not in allowed:
                raise Wrong("layer() began, which acquire must refuse")
            rank.acquires += 1
        else:
            self._must(outcome, *(allowed - {"done"}))
