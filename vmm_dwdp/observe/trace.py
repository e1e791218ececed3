"""What a rank did and when, as spans on tracks: for chrome://tracing and Perfetto, and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vmm_dwdp.errors import StateError
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import in_words
from vmm_dwdp.observe.figures import new_figure
from vmm_dwdp.observe.tracer import Mark

COMPUTE: Final = "compute"
WAITING: Final = "waiting for copies"
NODES: Final = "waiting for other nodes"
COLOURS: Final = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Attributes:
        track: ``"compute"``, ``"waiting for copies"``, ``"waiting for other nodes"`` or ``"copies from ..."``.
        layer: the model's own number of the layer; ``None`` for compute between two layers' experts.
        slot: of the layer.
        start_s, seconds: on the device's clock; 0 is when the trace began.
        nbytes: copied; 0 for others.
    """

    track: str
    layer: int | None
    slot: int | None
    start_s: float
    seconds: float
    nbytes: int = 0


@dataclass
class Trace:
    """What `DWDPRuntime.trace` records; empty until it ends.

    Attributes:
        rank: in its group.
        began: seconds since the epoch when the trace began, by which traces of several ranks are put side by side.
        spans: in the order in which they ended.
    """

    rank: int
    began: float
    spans: list[Span] = field(default_factory=list)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write this trace alone; see `write_traces`."""
        write_traces([self], path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw this trace alone; see `plot_traces`."""
        plot_traces([self], path)


def spans_of(marks: Iterable[Mark], layers: Sequence[Layer], num_slots: int) -> list[Span]:
    """The spans between ``marks`` of one rank with these layers and slots. One whose start is unknown is left out."""
    slots = {layer.number: index % num_slots for index, layer in enumerate(layers)}
    streams = {layer.number: layer.plan.streams for layer in layers}
    spans: list[Span] = []
    began: dict[tuple[str, int, int], float] = {}  # by what, layer and lane
    released: float | None = None
    for what, layer, lane, seconds in marks:
        slot = slots[layer]
        if what == "copies end":
            if (start := began.pop(("copies begin", layer, lane), None)) is not None:
                copies = streams[layer][lane]
                owners = sorted({in_words(piece.owner) for piece in copies})
                nbytes = sum(len(piece.bytes) for piece in copies)
                spans.append(Span(f"copies from {', '.join(owners)}", layer, slot, start, seconds - start, nbytes))
            continue
        began[what, layer, lane] = seconds
        if what in ("arrived", "exchange begins") and released is not None:
            spans.append(Span(COMPUTE, None, None, released, seconds - released))
        elif what == "resumed" and (start := began.get(("arrived", layer, lane))) is not None:
            spans.append(Span(WAITING, layer, slot, start, seconds - start))
        elif what == "exchange ends" and (start := began.get(("exchange begins", layer, lane))) is not None:
            spans.append(Span(NODES, layer, slot, start, seconds - start))
            released = seconds  # compute goes on
        elif what == "released":
            released = seconds
            if (start := began.get(("resumed", layer, lane))) is not None:
                spans.append(Span(COMPUTE, layer, slot, start, seconds - start))
    return spans


def write_traces(traces: Sequence[Trace], path: str | os.PathLike[str]) -> None:
    """Write the Trace Event format, which Perfetto and chrome://tracing open: a process a rank, a thread a track.

    Raises:
        StateError: a trace has not ended yet.
    """
    events: list[Mapping[str, Any]] = []
    for trace, origin in _aligned(traces):
        tracks = {track: number for number, track in enumerate(_tracks(trace))}
        events.append(_named("process_name", trace.rank, 0, f"rank {trace.rank}"))
        events += [_named("thread_name", trace.rank, number, track) for track, number in tracks.items()]
        for span in trace.spans:
            events.append(
                {
                    "name": "between layers" if span.layer is None else f"layer {span.layer}",
                    "ph": "X",
                    "pid": trace.rank,
                    "tid": tracks[span.track],
                    "ts": (origin + span.start_s) * 1e6,
                    "dur": span.seconds * 1e6,
                    "args": {"slot": span.slot, "bytes": span.nbytes},
                }
            )
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def plot_traces(traces: Sequence[Trace], path: str | os.PathLike[str]) -> None:
    """Draw a line a track, and a bar a span in the colour of its slot, as a PNG.

    Raises:
        ConfigError: matplotlib is missing.
        StateError: a trace has not ended yet.
    """
    lines = [(trace, origin, track) for trace, origin in _aligned(traces) for track in _tracks(trace)]
    figure = new_figure(14, 1 + 0.32 * len(lines))
    axes = figure.subplots()
    for height, (trace, origin, track) in enumerate(lines):
        for span in trace.spans:
            if span.track == track:
                colour = "lightgrey" if span.slot is None else COLOURS[span.slot % len(COLOURS)]
                colour = {WAITING: "tab:red", NODES: "gold"}.get(track, colour)
                bar = [((origin + span.start_s) * 1e3, span.seconds * 1e3)]
                axes.broken_barh(bar, (height - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(lines)), [f"rank {trace.rank}: {track}" for trace, _, track in lines])
    axes.invert_yaxis()
    title = "A colour a slot; grey: between two layers' experts; red: waiting for copies"
    if any(track == NODES for _, _, track in lines):
        title += "; yellow: for other nodes"
    axes.set(xlabel="ms", title=title)
    figure.savefig(Path(path), dpi=110, format="png")


def _aligned(traces: Sequence[Trace]) -> list[tuple[Trace, float]]:
    """Each trace and when it began, in seconds since the first one did."""
    if any(not trace.spans for trace in traces):
        raise StateError(
            "a trace has no spans before it ends, and none if no layer was acquired and released meanwhile"
        )
    first = min(trace.began for trace in traces)
    return [(trace, trace.began - first) for trace in traces]


def _tracks(trace: Trace) -> list[str]:
    found = {span.track for span in trace.spans}
    return [COMPUTE, WAITING, *sorted(found & {NODES}), *sorted(found - {COMPUTE, WAITING, NODES})]


def _named(what: str, process: int, thread: int, name: str) -> Mapping[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
