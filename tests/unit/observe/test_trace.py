"""Traces: spans between marks, files that viewers open, and a runtime that records while it runs."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from vmm_dwdp import DWDPConfig, DWDPRuntime, StateError, WeightSpec
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.observe.trace import COMPUTE, WAITING, Span, Trace, plot_traces, spans_of, write_traces
from vmm_dwdp.observe.tracer import READ_AFTER, Mark, Tracer

PAGE, LAYERS = 4096, 4
WEIGHTS = {"w": WeightSpec((4, PAGE), torch.uint8)}
CONFIG = DWDPConfig(group_size=2, prefetch_depth=2)


def test_spans_lie_between_their_marks() -> None:
    layers = [describe_layer(number, WEIGHTS, CONFIG, 0, PAGE) for number in (10, 20)]
    marks = [
        Mark("arrived", 10, 0, 1.0),
        Mark("resumed", 10, 0, 1.5),
        Mark("copies end", 20, 0, 1.6),  # begun before the trace
        Mark("released", 10, 0, 2.0),
        Mark("copies begin", 10, 0, 2.1),
        Mark("arrived", 20, 0, 2.75),
        Mark("resumed", 20, 0, 2.75),
        Mark("copies end", 10, 0, 3.1),
        Mark("released", 20, 0, 4.0),
    ]

    assert spans_of(marks, layers, 2) == [
        Span(WAITING, 10, 0, 1.0, 0.5),
        Span(COMPUTE, 10, 0, 1.5, 0.5),
        Span(COMPUTE, None, None, 2.0, 0.75),
        Span(WAITING, 20, 1, 2.75, 0.0),
        Span("copies from rank 1", 10, 0, 2.1, 1.0, 2 * PAGE),
        Span(COMPUTE, 20, 1, 2.75, 1.25),
    ]


def run_traced(tmp_path: Path, passes: int) -> Trace:
    """One rank whose other half is in host memory."""
    config = DWDPConfig(group_size=1, host_experts=2)
    driver = open_driver(torch.device("cpu"), granularity=PAGE)
    with DWDPRuntime(config, 0, "cpu", tmp_path / "group", driver=driver) as runtime:
        for number in range(LAYERS):
            runtime.add_layer(number, WEIGHTS)
        runtime.publish()
        with runtime.trace() as trace:
            assert trace.spans == []
            with pytest.raises(StateError, match="already"), runtime.trace():
                pass
            for _, number in itertools.product(range(passes), range(LAYERS)):
                with runtime.layer(number) as weights:
                    assert len(weights) == 1
            del weights
        events = len([label for label in runtime.ledger.open() if "trace" in str(label)])
        assert events == 0, "the trace's events are given back when it ends"
        with runtime.trace() as again, runtime.layer(0):
            pass
        assert len([span for span in again.spans if span.track == COMPUTE]) == 1
    return trace


def test_a_runtime_records_every_layer_of_every_pass(tmp_path: Path) -> None:
    passes = 2 * READ_AFTER // (3 * LAYERS)  # enough marks to use events again
    trace = run_traced(tmp_path, passes)

    kernels = [span for span in trace.spans if span.track == COMPUTE and span.layer is not None]
    assert [span.layer for span in kernels] == list(range(LAYERS)) * passes
    assert all(before.start_s + before.seconds <= after.start_s for before, after in itertools.pairwise(kernels))
    copies = [span for span in trace.spans if span.track == "copies from host memory"]
    assert len(copies) >= LAYERS * passes - 2
    assert {span.nbytes for span in copies} == {2 * PAGE}
    # A layer is copied into its slot after the layer that held it is released.
    for slot in range(2):
        released = [span.start_s + span.seconds for span in kernels if span.slot == slot]
        assert all(any(end <= span.start_s for end in released) for span in copies if span.slot == slot)


def test_a_trace_is_a_file_that_viewers_open(tmp_path: Path) -> None:
    traces = [
        Trace(0, 100.0, [Span(COMPUTE, 7, 1, 0.5, 0.25)]),
        Trace(1, 100.5, [Span("copies from rank 0", 8, 0, 0.0, 1.0, 64)]),
    ]

    write_traces(traces, tmp_path / "trace.json")

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["pid"], e["ts"], e["dur"]) for e in spans] == [
        ("layer 7", 0, 0.5e6, 0.25e6),
        ("layer 8", 1, 0.5e6, 1e6),
    ]
    assert [names[event["pid"], event["tid"]] for event in spans] == [COMPUTE, "copies from rank 0"]
    assert spans[1]["args"] == {"slot": 0, "bytes": 64}


def test_a_trace_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    plot_traces([Trace(0, 0.0, [Span(COMPUTE, 7, 1, 0.5, 0.25)])], tmp_path / "trace.png")

    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="before it ends"):
        Trace(0, 0.0).write(tmp_path / "trace.json")


def test_events_are_used_again(ledger: Ledger) -> None:
    driver = open_driver(torch.device("cpu"))
    with Tracer(driver, ledger, driver.current_stream()) as tracer:
        for number in range(4 * READ_AFTER):
            tracer.mark("arrived", number, 0, driver.current_stream())
        assert len(ledger.open()) <= READ_AFTER + 1

        marks = tracer.finish()
        tracer.mark("arrived", 0, 0, driver.current_stream())  # by a thread that has not heard of the end

    assert [mark.layer for mark in marks] == list(range(4 * READ_AFTER))
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(marks))


@pytest.mark.gpu
def test_a_gpu_gives_the_times(tmp_path: Path) -> None:
    nbytes = 64 << 20
    config = DWDPConfig(group_size=1, host_experts=1)
    with DWDPRuntime(config, 0, "cuda:0", tmp_path / "group") as runtime:
        for number in range(LAYERS):
            runtime.add_layer(number, {"w": WeightSpec((2, nbytes), torch.uint8)})
        runtime.publish()
        with runtime.trace() as trace:
            for _, number in itertools.product(range(3), range(LAYERS)):
                with runtime.layer(number):
                    torch.cuda._sleep(1_000_000)
        copies = [span for span in trace.spans if span.nbytes]

    assert {span.nbytes for span in copies} == {nbytes}
    assert all(1e9 < span.nbytes / span.seconds < 1e12 for span in copies)
    assert sum(span.seconds for span in trace.spans if span.track == COMPUTE and span.layer is not None) > 0
