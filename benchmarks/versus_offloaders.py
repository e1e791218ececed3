"""Experts in host memory: this library against what others offload with, over the same layers and products.

A pass is a number of MoE layers of a model's shapes, as in bank.py. Its weights are in host memory: ours in the
runtime's pool, theirs wherever their own classes put the weights that they are given (offloaders.py: SGLang, vLLM,
accelerate). For up to 32 tokens routing is recorded, that of the last tokens of a trace, after the 64 before them; the
product is our Triton kernel. For more tokens it is even, and the product is torch's. Ours reads in place, in place with
a bank of a quarter of the experts, or stages. In each step a pass of one of theirs, one of ours, one with everything on
the GPU, and a copy over the link run in turns. Where a pass leaves copies for the next one, it runs twice, and the
second counts. Every output is compared with the one of the GPU: ours must have its bits, and theirs be close. On the
CPU the same runs on the host driver, which says nothing about a link.

Each row goes to stderr when it is measured, with the seconds of the run so far, and so do those in which each of theirs
was set up. SIGTERM, as of `timeout`, or SIGINT ends the run with the rows that there are, and says which are not;
`--rivals` runs those alone.

tokens          of a pass
who             whose classes, or how ours reads
ms              of a pass, the median
gpu ms          of one with everything on the GPU
link            GB/s of a copy from host memory
used GB         of the experts that the tokens chose
moved GB        that cross the link: all, those that were used, or those that missed the bank
over bound      ms over the longer of gpu ms and used GB / link
over own        ms over the longer of gpu ms and moved GB / link
ours ms         with the bank, or staged
ours / it       the median of the ratios of pairs
same bits       as the pass on the GPU
launch ms       of the launching thread's CPU time in a pass
host / weights  bytes of host memory that are gone, per byte of weights
GPU MiB         that it takes for weights, at the most
graph           whether a CUDA graph of a pass gives the right output for other routing, or why not; none was tried
                without a GPU, and of a contender in whose passes the run was cut

Those who compute experts on the CPU (llama.cpp, KTransformers) are not here: a pass of theirs is bound by the bytes of
the experts that it uses over the bandwidth of the RAM, where ours is bound by what misses over the link.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bank import Passes, forget, tokens_of
from common import LINK_TOLERANCE, Row, parser, report, seen
from cuts import Cut, raise_when_cut
from decode import COPIED, SHAPES, Gemm, Shape, copied, our_gemm, published, synchronize, torch_gemm
from findings import Findings
from offloaders import KINDS, DecoderLayer, Moved, Offloaded, Offloader, available
from pass_costs import allocated, free_host_bytes, timed
from torch import Tensor

from vmm_dwdp import DWDPRuntime
from vmm_dwdp.memory.bank import MOST_COPIED

BANK = 0.25  # of the experts
FILLING = 64  # passes before those that are timed: four half-lives of the bank's scores
OURS = "ours"
CLOSE = 0.02  # of the largest value: bf16 has 8 bits, and rounds after each layer


class Setting(NamedTuple):
    """Passes of so many tokens.

    Attributes:
        before: experts ``[passes, layers, tokens, top_k]`` of those that fill the bank.
        steps: the same, of those that are timed.
    """

    tokens: int
    routing: str
    gemm: Gemm
    before: Tensor
    steps: Tensor

    @property
    def decodes(self) -> bool:
        return self.tokens <= MOST_COPIED


class Contender(NamedTuple):
    """A way to run a pass.

    Attributes:
        run: gives what the last layer gives.
        twice: only the second of two passes counts.
        host_bytes: of host memory that is gone for its weights; 0 where that is not known.
        gpu_bytes: of the GPU's memory that it keeps for weights.
    """

    name: str
    run: Callable[[Passes], Tensor]
    moves: Moved
    twice: bool
    host_bytes: int
    gpu_bytes: int
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    missed: Callable[[], int] | None = None  # experts that were not on the GPU, of all so far; None if it keeps none


class Bench:
    """A runtime with all experts in host memory, the same experts on the GPU, and passes over both."""

    def __init__(self, shape: Shape, runtime: DWDPRuntime, host_bytes: int) -> None:
        self.shape, self.runtime, self.device = shape, runtime, runtime.device
        self.whole = copied(shape, runtime)
        with runtime.layer(0, mode="in_place") as weights:
            self.source = weights["w13"].view(-1)[: COPIED // shape.dtype.itemsize]  # type: ignore[union-attr]
        self.copy = partial(torch.empty_like(self.source).copy_, self.source)
        self.expert = sum(weight[0].nbytes for weight in self.whole[0].values())
        self.nbytes = shape.layers * shape.experts * self.expert
        stats = runtime.stats()
        assert stats.bank is not None
        banked, staged = partial(Passes.spread, banked=True), partial(Passes.spread, mode="staged")
        self.ours = [
            Contender("ours, in place", Passes.spread, "used", False, host_bytes, 0),
            Contender("ours, bank", banked, "missed", False, host_bytes, stats.bank.nbytes, missed=self.missed),
            Contender("ours, staged", staged, "all", True, host_bytes, stats.staged_bytes),
        ]

    def best(self, setting: Setting) -> Contender:
        """Of ours, the one that theirs are compared with."""
        return self.ours[1 if setting.decodes else 2]

    def theirs(self, offloader: Offloader) -> Contender:
        """One of theirs, over layers of its own."""
        begin = time.perf_counter()
        gc.collect()  # what was there of another one
        host, gpu = free_host_bytes(), allocated(self.device)
        layers = [DecoderLayer({name: weight.clone() for name, weight in each.items()}) for each in self.whole.values()]
        done: Offloaded = offloader.offload(list(layers))
        synchronize(self.device)

        def run(passes: Passes) -> Tensor:
            x = passes.x
            for number, layer in enumerate(done.layers):
                x = layer(x, passes.chosen[number], passes.gemm)
            return x

        taken, kept = host - free_host_bytes(), allocated(self.device) - gpu
        seen({"who": offloader.name, "set up s": round(time.perf_counter() - begin, 1)})
        return Contender(
            offloader.name, run, offloader.moves, offloader.ahead, taken, kept, done.before, done.after, done.missed
        )

    def row(self, setting: Setting, contender: Contender) -> dict[str, Any]:
        """What is printed of one contender in one setting."""
        passes = Passes(self.shape, self.runtime, self.whole, setting.tokens, setting.gemm)
        best = self.best(setting)
        turns = list(self.turns(setting, passes, contender, best))
        ms = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        used = statistics.mean(used_experts(chosen) for chosen in setting.steps) * self.expert
        missed = statistics.mean(turn["missed"] for turn in turns) * self.expert
        moved = {"all": self.nbytes, "used": used, "missed": missed}[contender.moves]
        link = self.source.nbytes / ms["link"] / 1e6
        row = {
            "tokens": setting.tokens,
            "routing": setting.routing,
            "who": contender.name,
            "ms": ms["it"],
            "gpu ms": ms["gpu"],
            "link": link,
            "used GB": used / 1e9,
            "moved GB": moved / 1e9,
            "over bound": ms["it"] / max(ms["gpu"], used / link / 1e6),
            "over own": ms["it"] / max(ms["gpu"], moved / link / 1e6),
            "ours ms": ms["ours"],
            "ours / it": statistics.median(turn["ours"] / turn["it"] for turn in turns),
            "same bits": all(turn["same"] for turn in turns),
            "launch ms": ms["launch"],
            "host / weights": contender.host_bytes / self.nbytes if self.device.type == "cuda" else None,
            "GPU MiB": (contender.gpu_bytes + max(0.0, ms["more"])) / 2**20,
            "graph": None,
        }
        if self.device.type == "cuda":
            require_possible(row)
        return row

    def turns(
        self, setting: Setting, passes: Passes, contender: Contender, best: Contender
    ) -> Iterator[dict[str, float]]:
        """By step milliseconds of each, what of the launching thread, bytes of the GPU's memory, and what missed."""
        forget(self.runtime)
        order = [("it", contender), ("ours", best)] if contender is not best else [("it", contender)]
        for chosen in setting.before:
            passes.chosen.copy_(chosen)
            for _, each in order:
                if each.missed is not None:
                    each.run(passes)
        for place, chosen in enumerate(setting.steps):
            passes.chosen.copy_(chosen)
            expected = passes.on_gpu()
            turn: dict[str, float] = {}
            for name, each in order if place % 2 else reversed(order):
                missed = each.missed() if each.missed else 0
                self.settle()
                if each.twice:
                    each.run(passes)
                took, launch, peak, y = timed(partial(each.run, passes), self.device)
                same = torch.equal(y, expected)
                if not same and (each in self.ours or not close(y, expected)):
                    raise SystemExit(f"{each.name} gives another output than the layers on the GPU")
                turn[name] = took
                if name == "it":
                    turn |= {"launch": launch, "more": peak, "same": same}
                    turn["missed"] = each.missed() - missed if each.missed else 0
            turn.setdefault("ours", turn["it"])
            self.settle()
            turn["gpu"], _, peak, _ = timed(passes.on_gpu, self.device)
            turn["more"] -= peak
            turn["link"] = timed(self.copy, self.device)[0]
            yield turn

    def missed(self) -> int:
        """Experts that were not in the bank, of all so far."""
        return sum(counts.uses - counts.hits for counts in self.runtime.bank_counts().values())

    def settle(self) -> None:
        """Wait for all copies, those that the driver was not given yet, too."""
        if (staging := self.runtime._schedule._staging) is not None:
            staging.drain()
        synchronize(self.device)

    def measure(
        self, whose: Sequence[str], offloaders: Sequence[Offloader], settings: Sequence[Setting], findings: Findings
    ) -> None:
        """Ours if they are among ``whose``, then theirs; who fails is left out, with the reason."""
        decoding, prefill = ([each for each in settings if each.decodes is few] for few in (True, False))
        ours = dict(zip(self.ours, (decoding, decoding, prefill), strict=True)) if OURS in whose else {}
        theirs = {offloader: settings if offloader.prefills else decoding for offloader in offloaders}
        findings.wanted = {each.name: [s.tokens for s in those] for each, those in [*ours.items(), *theirs.items()]}
        for contender, those in ours.items():
            self.rows(those, contender, findings)
        for offloader, those in theirs.items():
            try:
                self.rows(those, self.theirs(offloader), findings)
            except Exception as error:  # of another's package, in one of many ways
                findings.left_out[offloader.name] = str(error).partition("\n")[0] or type(error).__name__

    def let_go(self) -> None:
        """Of the runtime's memory, which is to be closed."""
        del self.source, self.copy

    def rows(self, settings: Sequence[Setting], contender: Contender, findings: Findings) -> None:
        """Find those of one contender; a capture comes last, since it may leave their modules as they should not be."""
        first = len(findings.rows)
        for setting in settings:
            findings.add(self.row(setting, contender))
        graph = self.graph(settings[0], contender) if settings and self.device.type == "cuda" else None
        seen({"who": contender.name, "graph": graph})
        for row in findings.rows[first:]:
            row["graph"] = graph

    def graph(self, setting: Setting, contender: Contender) -> str:
        """``yes`` if a pass can be captured and replayed with another routing, or why not."""
        passes = Passes(self.shape, self.runtime, self.whole, setting.tokens, setting.gemm)
        try:
            passes.chosen.copy_(setting.steps[0])
            contender.run(passes)
            self.settle()
            contender.before()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = contender.run(passes)
                contender.after()
            for chosen in setting.steps[-2:]:
                passes.chosen.copy_(chosen)
                contender.before()
                graph.replay()
                if not close(y, passes.on_gpu()):
                    return "another output"
        except Exception as error:  # whatever torch or another's package raises of it
            return str(error).partition("\n")[0] or type(error).__name__
        return "yes"


def close(y: Tensor, expected: Tensor) -> bool:
    """Whether they differ by rounding only."""
    return bool((y - expected).abs().max() <= CLOSE * expected.abs().max())


def used_experts(chosen: Tensor) -> int:
    """Of all layers of a pass."""
    return sum(len(of_layer.unique()) for of_layer in chosen)


def require_possible(row: Row) -> None:
    """End the command, before it prints anything, if a pass seems to be shorter than its bytes take over the link.

    Raises:
        SystemExit: with a sentence, so that the exit status is 1.
    """
    ms, moved, link = (float(row[name]) for name in ("ms", "moved GB", "link"))  # type: ignore[arg-type]
    if not 0 < moved / link * 1e3 <= ms * LINK_TOLERANCE and moved:
        raise SystemExit(f"{dict(row)} cannot be: what it moves takes {moved / link * 1e3:.2f} ms over the link")


def settings(shape: Shape, arguments: Any) -> Iterator[Setting]:
    steps, device, trace = arguments.steps, arguments.device, "demo" if arguments.tiny else "mixed-0.01"
    for tokens in arguments.tokens:
        if tokens > MOST_COPIED:
            even = torch.rand(steps, shape.layers, tokens, shape.experts, device=device).topk(shape.top_k).indices
            yield Setting(tokens, "even", torch_gemm, even[:0], even)
        else:
            ids = torch.cat(next(tokens_of(trace, shape, tokens))).to(device)
            yield Setting(tokens, trace, our_gemm, ids[-steps - FILLING : -steps], ids[-steps:])


def measure(shape: Shape, arguments: Any, tell: Callable[[Findings], None]) -> None:
    """Tell what was found, also where the run is cut, while the runtime is there: to close it may take long, or fail.

    Raises:
        Cut: after it was told.
    """
    device = arguments.device
    offloaders, left_out = available([each for each in arguments.rivals if each != OURS], device)
    findings = Findings(left_out)
    synchronize(device)  # the context takes host memory, too
    host = free_host_bytes()
    banked = 2.0 if arguments.tiny else BANK  # tiny experts fill no page
    with published(shape, device, 0.0, banked=banked) as runtime:
        bench = Bench(shape, runtime, host - free_host_bytes())
        try:
            bench.measure(arguments.rivals, offloaders, list(settings(shape, arguments)), findings)
            tell(findings)
        except Cut:
            findings.cut()
            tell(findings)
            raise
        finally:
            bench.let_go()


def main() -> None:
    arguments_of = parser(__doc__)
    add = arguments_of.add_argument
    add("--tiny", action="store_true", help="few small layers")
    add("--tokens", type=int, nargs="+", help="of a pass (default: 1 4 16384)")
    add("--steps", type=int, default=8, help="passes of each that are timed (default: 8)")
    whose = [OURS, *KINDS]
    add("--rivals", nargs="+", choices=whose, default=whose, help="whose rows (default: all); ours run beside theirs")
    add("--rival-path", type=Path, action="append", default=[], help="a folder with a package of theirs, unpacked")
    arguments = arguments_of.parse_args()
    shape = SHAPES["tiny"]._replace(top_k=4) if arguments.tiny else SHAPES["Qwen3-30B-A3B"]
    arguments.tokens = arguments.tokens or ([1, 4, 64] if arguments.tiny else [1, 4, 16384])
    sys.path[:0] = [str(folder.resolve()) for folder in arguments.rival_path]
    about = f"{shape.layers} layers of {shape.experts} experts, {shape.dtype}, all in host memory"
    raise_when_cut()
    measure(shape, arguments, lambda findings: report(arguments, findings.tables(about)))


if __name__ == "__main__":
    main()
