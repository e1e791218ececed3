"""``vmm-dwdp plan``: memory, times and whether it pays, before a machine is rented."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmm_dwdp.cli import plan_decode
from vmm_dwdp.cli.checks import number_or_auto, require_writable, slice_bytes
from vmm_dwdp.cli.console import print_table, size
from vmm_dwdp.config import DWDPConfig, ModeSetting
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.estimate import Estimate, recommend
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.local_experts import LocalExperts, more_experts, settled
from vmm_dwdp.planning.memory import CONTEXT
from vmm_dwdp.planning.models import load_model
from vmm_dwdp.planning.nodes import NDR, Network, Nodes
from vmm_dwdp.planning.presets import preset_names
from vmm_dwdp.planning.pulling import GAP, Turns
from vmm_dwdp.planning.roofline import Batch


def add_group_arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` and `simulate` are both told."""
    models, gpus = ", ".join(preset_names("models")), ", ".join(preset_names("gpus"))
    parser.add_argument("model", help=f"a Hugging Face config.json, a directory with one, or one of {models}")
    parser.add_argument("--gpu", required=True, help=f"a YAML file (see `bench --calibrate`), or one of {gpus}")
    parser.add_argument("--group-size", type=int, required=True, metavar="N", help="ranks that share the experts")
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="nodes of --group-size ranks each, over which the experts are spread; tokens go between them (default: 1)",
    )
    parser.add_argument(
        "--network",
        type=float,
        metavar="GB/S",
        help=f"with --nodes: what each GPU reaches to other nodes (default: {NDR.rate / 1e9:g}, {NDR.name})",
    )
    parser.add_argument("--tokens", type=int, required=True, metavar="T", help="tokens of one rank's forward pass")
    parser.add_argument("--request-tokens", type=int, metavar="T", help="tokens of a request (default: all)")
    parser.add_argument(
        "--local-experts",
        type=number_or_auto,
        metavar="N",
        help="experts that a rank holds, or auto: as many as fit (default: the least)",
    )
    parser.add_argument(
        "--memory-bytes",
        type=int,
        metavar="N",
        help="with --local-experts auto: of a GPU, for experts (default: half of what the rest of the model leaves)",
    )
    parser.add_argument("--host-experts", type=int, default=0, metavar="N", help="experts in host memory (default: 0)")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="layers of room for prefetching (default: 2)")
    parser.add_argument(
        "--slice-bytes", type=slice_bytes, default="auto", metavar="N", help="as in the config: N, auto or streams"
    )
    parser.add_argument(
        "--run-bytes",
        type=int,
        metavar="N",
        help="where owners of runs are chosen: what if they had at most N bytes (default: the runtime's)",
    )
    parser.add_argument(
        "--run-gap", type=float, metavar="US", help=f"microseconds between two of these (default: {GAP * 1e6:g})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def config_from(arguments: argparse.Namespace, mode: ModeSetting = "staged") -> DWDPConfig:
    """The config that the arguments of `add_group_arguments` ask for; raises `ConfigError`."""
    return DWDPConfig(
        group_size=arguments.group_size,
        num_local_experts=arguments.local_experts,
        memory_bytes=arguments.memory_bytes,
        prefetch_depth=arguments.depth,
        slice_bytes=arguments.slice_bytes,
        host_experts=arguments.host_experts,
        mode=mode,
    )


def estimate_from(arguments: argparse.Namespace, imbalance: float = 0.0) -> Estimate:
    """The estimate that the arguments of `add_group_arguments` ask for; raises `ConfigError`."""
    if imbalance < 0:
        raise ConfigError(f"--imbalance must be at least 0, not {imbalance}")
    config = config_from(arguments)
    if arguments.nodes < 1:
        raise ConfigError(f"--nodes must be at least 1, not {arguments.nodes}")
    if arguments.network is not None and arguments.nodes == 1:
        raise ConfigError("--network needs --nodes: within one node nothing goes over it")
    network = NDR if arguments.network is None else Network("as stated", arguments.network * 1e9)
    nodes = Nodes(arguments.nodes, network)
    batch = Batch.of(arguments.tokens, arguments.request_tokens)
    if arguments.slice_bytes != "auto" and (arguments.run_bytes is not None or arguments.run_gap is not None):
        raise ConfigError("--run-bytes and --run-gap need --slice-bytes auto")
    turns = Turns(run_bytes=arguments.run_bytes, gap=GAP if arguments.run_gap is None else arguments.run_gap * 1e-6)
    model, gpu = load_model(arguments.model), load_gpu(arguments.gpu)
    return Estimate(model, gpu, settled(nodes.share(model), gpu, config), batch, imbalance, turns, nodes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_group_arguments(parser)
    parser.add_argument(
        "--imbalance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="by how much the slowest rank's compute exceeds the mean under expert parallelism (default: 0)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw pass times over tokens, and memory")
    plan_decode.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    plan_decode.require_its_own(arguments)
    if arguments.decode:
        return plan_decode.run(config_from(arguments, mode="auto" if arguments.depth else "in_place"), arguments)
    require_writable("--plot", arguments.plot)
    estimate = estimate_from(arguments, arguments.imbalance)
    estimate.require_fit()
    best, more = recommend(estimate), more_experts(estimate)
    if arguments.plot:
        from vmm_dwdp.planning.plots import plot_estimate

        plot_estimate(estimate, arguments.plot)
    if arguments.json:
        print(json.dumps(_as_json(estimate, best, more)))
    else:
        _print(estimate, best, more)
    return 0


def _as_json(estimate: Estimate, best: Estimate | None, more: Sequence[LocalExperts]) -> dict[str, Any]:
    memory = estimate.memory
    return {
        "model": estimate.model.name,
        "gpu": estimate.gpu.name,
        "group_size": estimate.config.group_size,
        "num_local_experts": estimate.config.num_local_experts,
        "tokens": estimate.batch.tokens,
        "memory_bytes": {
            "replicated": memory.replicated,
            "resident_experts": memory.experts.resident,
            "of_which_edges": memory.experts.edges,
            "of_which_padding": memory.experts.padding,
            "slots": memory.experts.staged,
            "activations": memory.activations,
            "context": CONTEXT,
            "left_for_kv_cache": memory.left,
            "host_pool": memory.experts.host,
        },
        "kv_cache_tokens": memory.kv_tokens,
        "layer": {
            "fetched_bytes": estimate.plan.fetched_bytes,
            "prefetch_s": estimate.prefetch_seconds,
            "prefetch_beside_others_s": estimate.copying_seconds,
            "compute_s": estimate.work.seconds,
            "exposed_wait_s": estimate.exposed_seconds,
        },
        "pass": {
            "dwdp_s": estimate.dwdp_seconds,
            "expert_parallel_s": estimate.expert_parallel_seconds,
            "speedup": estimate.speedup,
        },
        "pays_from_tokens": estimate.pays_from,
        "nodes": _nodes_as_json(estimate) if estimate.nodes.count > 1 else None,
        "local_experts": [row._asdict() for row in more],
        "recommended": best
        and {
            "group_size": best.config.group_size,
            "num_local_experts": best.config.num_local_experts,
            "prefetch_depth": best.config.prefetch_depth,
            "speedup": best.speedup,
        },
    }


def _nodes_as_json(estimate: Estimate) -> dict[str, Any]:
    """Bytes are of one rank for a layer."""
    nodes = estimate.nodes
    counts = sorted({nodes.count, *(2**power for power in range(nodes.count.bit_length()))})
    return {
        "ranks": estimate.world_size,
        "network": nodes.network.name,
        "network_bytes_per_s": nodes.network.rate,
        "nodes_that_a_token_goes_to": nodes.visits(estimate.model),
        "one_group_fetched_bytes": estimate.one_group_bytes,
        "one_group_over_fetched": estimate.one_group_bytes / max(1, estimate.plan.fetched_bytes),
        "by_number_of_nodes": [_on_as_json(estimate.on_nodes(count)) for count in counts],
    }


def _on_as_json(estimate: Estimate) -> dict[str, Any]:
    sent = 2 * estimate.nodes.sent_bytes(estimate.model, estimate.batch.tokens)
    return {
        "nodes": estimate.nodes.count,
        "fetched_bytes": estimate.plan.fetched_bytes,
        "network_bytes_sent": sent,
        "network_s": sent / estimate.nodes.network.rate,
        "dwdp_s": estimate.dwdp_seconds,
        "expert_parallel_s": estimate.expert_parallel_seconds,
        "pays_from_tokens": estimate.pays_from,
    }


def _print_nodes(estimate: Estimate) -> None:
    about = _nodes_as_json(estimate)
    print_table(
        f"By number of nodes of {estimate.config.group_size} ranks, a rank's bytes for a layer, and passes",
        ("nodes", "by NVLink", "by network", "network, ms", "pass, ms", "expert parallel, ms", "pays from"),
        [
            (
                str(row["nodes"]),
                size(row["fetched_bytes"]),
                size(row["network_bytes_sent"]),
                _ms(row["network_s"]),
                _ms(row["dwdp_s"]),
                _ms(row["expert_parallel_s"]),
                "never" if row["pays_from_tokens"] is None else f"{row['pays_from_tokens']:,}",
            )
            for row in about["by_number_of_nodes"]
        ],
    )
    print(
        f"One group of all {about['ranks']} ranks would fetch {size(about['one_group_fetched_bytes'])} for a layer, "
        f"{about['one_group_over_fetched']:.2f} times as much. A token goes to "
        f"{about['nodes_that_a_token_goes_to']:.2f} nodes, its own counted. "
        f"The network: {about['network']}, {about['network_bytes_per_s'] / 1e9:g} GB/s."
    )


def _print(estimate: Estimate, best: Estimate | None, more: Sequence[LocalExperts]) -> None:
    model, gpu, memory, config = estimate.model, estimate.gpu, estimate.memory, estimate.config
    experts = memory.experts
    print_table(
        f"Memory of one {gpu.name}, {model.name}, group of {config.group_size}{_on_nodes(estimate)}",
        ("what", "size"),
        [
            ("all but the routed experts", size(memory.replicated)),
            ("resident experts", size(experts.resident)),
            ("  of which neighbours' bytes on shared pages", size(experts.edges)),
            ("  of which padding to whole pages", size(experts.padding)),
            (f"slots, prefetch depth {config.prefetch_depth}", size(experts.staged)),
            (f"activations of {estimate.batch.tokens} tokens", size(memory.activations)),
            ("CUDA context and workspaces (assumed)", size(CONTEXT)),
            (f"left for the KV cache: {memory.kv_tokens:,} tokens", size(memory.left)),
            *([("host memory, once for the group", size(experts.host))] if experts.host else []),
        ],
    )
    if estimate.nodes.count > 1:
        _print_nodes(estimate)
    print_table(
        f"Time, {estimate.batch.tokens} tokens a rank, requests: {len(estimate.batch.lengths)}",
        ("what", "ms"),
        [
            (f"prefetch of a layer, {size(estimate.plan.fetched_bytes)}", _ms(estimate.prefetch_seconds)),
            ("the same while the other ranks pull, too", _ms(estimate.copying_seconds)),
            (
                f"compute of a layer{', and its exchanges' * (estimate.nodes.count > 1)}, alone",
                _ms(estimate.work.seconds),
            ),
            ("from one layer to the next", _ms(estimate.layer_seconds)),
            ("  of which compute waits for copies", _ms(estimate.exposed_seconds)),
            ("forward pass", _ms(estimate.dwdp_seconds)),
            (f"forward pass, expert parallel, imbalance {estimate.imbalance:g}", _ms(estimate.expert_parallel_seconds)),
        ],
    )
    if len(more) > 1:
        _print_more(more)
    stated = ", ".join(f"{name} {value}" for name, value in vars(gpu.efficiency).items())
    print(f"Rates are these shares of the datasheet's peaks: {stated}.")
    print(f"Throughput is {estimate.speedup:.2f} times that of expert parallelism.", end=" ")
    if estimate.pays_from is None:
        print("It pays at no number of tokens.")
    else:
        print(f"It pays from {estimate.pays_from:,} tokens a forward pass.")
    if best is None:
        print("No group leaves room for these tokens' KV cache.")
    else:
        verdict = "Best for these tokens" if best.speedup >= 1 else "No group pays for these tokens; the closest"
        print(
            f"{verdict}: a group of {best.config.group_size}{_on_nodes(best)}, "
            f"{best.config.num_local_experts} experts a rank, prefetch depth {best.config.prefetch_depth}: "
            f"{_ms(best.dwdp_seconds)} ms a forward pass, "
            f"{best.speedup:.2f} times expert parallelism on as many GPUs."
        )


def _on_nodes(estimate: Estimate) -> str:
    return f" on each of {estimate.nodes.count} nodes" if estimate.nodes.count > 1 else ""


def _print_more(more: Sequence[LocalExperts]) -> None:
    """What more experts a rank take and save."""
    print_table(
        "Experts a rank holds of each layer, from an equal share to as many as fit",
        ("experts", "shards and slots", "left for the KV cache", "copies of a layer", "ms", "forward pass, ms"),
        [
            (
                str(row.number),
                size(row.experts_bytes),
                size(row.left_bytes),
                size(row.fetched_bytes),
                _ms(row.copying_s),
                _ms(row.pass_s),
            )
            for row in more
        ],
    )
    first, last = more[0], more[-1]
    steps = last.number - first.number
    takes, saves = last.experts_bytes - first.experts_bytes, first.fetched_bytes - last.fetched_bytes
    print(f"One more expert takes {size(takes // steps)}, and saves {size(saves // steps)} of a layer's copies.")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
