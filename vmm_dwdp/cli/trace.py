"""``vmm-dwdp trace``: run layers of a made-up model in a group, and write down when everything happened."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import cast

import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.cli.checks import require_device, require_writable
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.observe.trace import COMPUTE, WAITING, Trace, plot_traces, write_traces
from vmm_dwdp.planning.models import ModelSpec, model_from_config
from vmm_dwdp.planning.roofline import Batch
from vmm_dwdp.planning.torch_layer import TorchLayer, fill
from vmm_dwdp.runtime import DWDPRuntime
from vmm_dwdp.temporary import temporary_folder
from vmm_dwdp.testing import run_group

# What a CPU computes in milliseconds, and a layer of Qwen3-30B-A3B.
SIZES = {
    "cpu": {"hidden_size": 512, "num_experts": 16, "moe_intermediate_size": 1024, "num_attention_heads": 4},
    "cuda": {"hidden_size": 2048, "num_experts": 128, "moe_intermediate_size": 768, "num_attention_heads": 32},
}
TOKENS = {"cpu": 64, "cuda": 8192}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--group-size", type=int, default=4, metavar="N", help="ranks, each a process (default: 4)")
    parser.add_argument("--device", choices=tuple(SIZES), default=device, help=f"default: {device}")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="MoE layers of a pass (default: 6)")
    parser.add_argument("--passes", type=int, default=3, metavar="N", help="traced, after one that is not (default: 3)")
    parser.add_argument("--tokens", type=int, metavar="T", help=f"of a pass (default: {TOKENS[device]})")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="layers of room for prefetching (default: 2)")
    parser.add_argument("--host-experts", type=int, default=0, metavar="N", help="experts in host memory (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("trace.json"), metavar="FILE", help="default: trace.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, too")


def run(arguments: argparse.Namespace) -> int:
    if arguments.layers < 1 or arguments.passes < 1:
        raise ConfigError("--layers and --passes must be at least 1")
    require_device(arguments.device)
    require_writable("--output", arguments.output)
    require_writable("--plot", arguments.plot)
    sizes = SIZES[arguments.device] | {"num_hidden_layers": arguments.layers}
    model = model_from_config(
        "traced",
        {**sizes, "num_experts_per_tok": 4, "num_key_value_heads": 4, "intermediate_size": 1, "vocab_size": 1},
    )
    config = DWDPConfig(
        group_size=arguments.group_size, prefetch_depth=arguments.depth, host_experts=arguments.host_experts
    )
    batch = Batch.of(TOKENS[arguments.device] if arguments.tokens is None else arguments.tokens)
    with temporary_folder() as folder:
        rank = functools.partial(record, model, config, batch, arguments.passes, arguments.device, folder / "group")
        traces = run_group(rank, config.group_size, arguments.device)
    write_traces(traces, arguments.output)
    print(f"{arguments.output} opens in https://ui.perfetto.dev and in chrome://tracing")
    if arguments.plot:
        plot_traces(traces, arguments.plot)
    for trace in traces:
        shares = {track: sum(s.seconds for s in trace.spans if s.track == track) for track in (COMPUTE, WAITING)}
        copied = sum(span.nbytes for span in trace.spans)
        seconds = sum(span.seconds for span in trace.spans if span.nbytes)
        rate = f"{copied / seconds / 1e9:.1f} GB/s a stream" if seconds else "nothing copied"
        print(
            f"rank {trace.rank}: computed {shares[COMPUTE] * 1e3:.1f} ms, waited {shares[WAITING] * 1e3:.1f} ms, {rate}"
        )
    return 0


def record(
    model: ModelSpec, config: DWDPConfig, batch: Batch, passes: int, device: str, rendezvous: Path, rank: int
) -> Trace:
    """One rank's process: all layers with random weights, one pass to warm up, then the traced ones."""
    torch.set_num_threads(1)
    at = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    # The made-up layers are smaller than a page of 2 MiB per rank and weight where there is no GPU.
    driver = open_driver(at, granularity=4096) if device == "cpu" else None
    layer = TorchLayer(model, batch, at)
    with DWDPRuntime(config, rank, at, rendezvous, driver=driver) as runtime:
        for number in range(model.num_layers):
            runtime.add_layer(number, model.expert_weights)
            for weight in model.expert_weights:
                for owner in runtime.held_owners:
                    fill(runtime.local_shard(number, weight, owner), at)
        runtime.publish()
        _forward(runtime, layer, model)
        with runtime.trace() as trace:
            for _ in range(passes):
                _forward(runtime, layer, model)
    return trace


def _forward(runtime: DWDPRuntime, layer: TorchLayer, model: ModelSpec) -> None:
    hidden = layer.hidden
    for number in range(model.num_layers):
        attended, routed = layer.before(hidden)
        with runtime.layer(number) as weights:
            outputs = layer.experts(routed, cast("dict[str, torch.Tensor]", weights))
        hidden = layer.norm(layer.combine(outputs), attended)
