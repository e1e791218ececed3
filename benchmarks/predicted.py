"""What `vmm-dwdp plan` predicts against what a GPU does, with experts in host memory.

The machine is calibrated first, with the shapes of each of three models; then layers of these models run over the
runtime, with different numbers of tokens, experts in host memory and slots. No prediction is told anything of the run
it predicts.

pass      milliseconds of a forward pass: predicted, measured, and their ratio. Measured as the machine was calibrated:
          passes follow one another for 0.6 s, as in serving, and the median of the second half counts. Each of them
          is printed to stderr.
memory    bytes that the runtime takes of the GPU: predicted, and what the driver says is gone; the last row is a
          group of four processes that share the GPU. Nobody else may use it meanwhile.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from multiprocessing.synchronize import Barrier

import torch
from common import Row, parser, report

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.planning.calibrate import Part, calibrate, preset_of, settled, sustained
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.gpus import GpuSpec, load_gpu
from vmm_dwdp.planning.memory import expert_memory
from vmm_dwdp.planning.models import ModelSpec, model_from_config
from vmm_dwdp.planning.roofline import Batch
from vmm_dwdp.planning.torch_layer import TorchLayer, fill
from vmm_dwdp.testing import run_group

GROUP_SIZE, GROUP_LAYERS = 4, 4  # of the group whose memory is measured
REQUEST = 4096  # tokens


def small(name: str, layers: int, **sizes: int) -> ModelSpec:
    """A model of so many layers, in bf16."""
    config = {"num_hidden_layers": layers, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1, **sizes}
    return model_from_config(name, config)


MODELS = {
    "128 experts of 2048 x 768": {
        "hidden_size": 2048, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 768,
    },
    "64 experts of 2048 x 2048": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 4,
        "moe_intermediate_size": 2048, "intermediate_size": 2048,
    },
    "8 experts of 4096 x 8192": {
        "hidden_size": 4096, "num_attention_heads": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8192, "intermediate_size": 8192,
    },
}  # fmt: skip

# model, experts in host memory, tokens, prefetch depth
RUNS = [
    ("128 experts of 2048 x 768", 32, 4096, 2),
    ("64 experts of 2048 x 2048", 8, 16384, 3),
    ("8 experts of 4096 x 8192", 1, 8192, 2),
    ("128 experts of 2048 x 768", 16, 32768, 2),
    ("64 experts of 2048 x 2048", 8, 16384, 1),
    ("128 experts of 2048 x 768", 16, 8192, 2),
    ("8 experts of 4096 x 8192", 1, 16384, 2),
    ("64 experts of 2048 x 2048", 16, 8192, 2),
    ("64 experts of 2048 x 2048", 8, 12288, 2),
    ("128 experts of 2048 x 768", 24, 20480, 2),
]


def run(gpu: GpuSpec, name: str, host_experts: int, tokens: int, depth: int, device: torch.device) -> tuple[Row, Row]:
    layers = 2 * depth if depth > 1 else 4
    model = small(name, layers, **MODELS[name])
    config = DWDPConfig(group_size=1, host_experts=host_experts, prefetch_depth=depth)
    estimate = Estimate(model, gpu, config, Batch.of(tokens, REQUEST))
    layer = TorchLayer(model, estimate.batch, device)
    torch.cuda.empty_cache()
    free_before = torch.cuda.mem_get_info(device)[0]
    with tempfile.TemporaryDirectory() as rendezvous, DWDPRuntime(config, 0, device, rendezvous) as runtime:
        for index in range(layers):
            runtime.add_layer(index, model.expert_weights)
            for weight in model.expert_weights:
                for owner in runtime.held_owners:
                    fill(runtime.local_shard(index, weight, owner), device)
        runtime.publish()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken = free_before - torch.cuda.mem_get_info(device)[0]

        parts = [part for index in range(layers) for part in layer_parts(layer, runtime, index)]
        spans = sustained(parts, layer.hidden)
        hidden = layer.hidden
        for _, part in parts:
            hidden = part(hidden)
        if not hidden.isfinite().all():
            raise SystemExit("a pass gave values that are not finite: products of such take another time")
    milliseconds = [sum(span.values()) * 1e3 for span in spans]
    say(f"ms of each pass, from rest on: {' '.join(f'{each:.2f}' for each in milliseconds)}")
    settled_at = settled(spans)
    measured = sum(settled_at.values()) * 1e3
    predicted = estimate.dwdp_seconds * 1e3
    row = {
        "model": name, "in host memory": host_experts, "tokens": tokens, "depth": depth, "layers": layers,
        "copy ms": estimate.prefetch_seconds * 1e3, "compute ms": estimate.work.seconds * 1e3,
        "predicted ms": predicted, "measured ms": measured, "ratio": predicted / measured,
        "waited ms": settled_at["wait"] * 1e3,
    }  # fmt: skip
    experts = estimate.memory.experts
    return row, memory_row(name, config, experts.resident + experts.staged, taken)


def layer_parts(layer: TorchLayer, runtime: DWDPRuntime, index: int) -> list[Part]:
    """One layer of a pass: what runs before its weights are needed, the wait for them, and what reads them."""

    def acquire(routed: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        return routed, runtime.acquire(index)

    def compute(acquired: tuple[torch.Tensor, Mapping[str, torch.Tensor]]) -> torch.Tensor:
        outputs = layer.experts(*acquired)
        runtime.release(index)
        return layer.combine(outputs)

    return [("compute", lambda hidden: layer.before(hidden)[1]), ("wait", acquire), ("compute", compute)]


def memory_row(name: str, config: DWDPConfig, planned: int, taken: int) -> Row:
    return {
        "model": name, "ranks": config.group_size, "depth": config.prefetch_depth,
        "predicted": planned, "measured": taken, "ratio": planned / taken,
    }  # fmt: skip


def group_rank(model: ModelSpec, config: DWDPConfig, rendezvous: str, barrier: Barrier, rank: int) -> tuple[int, int]:
    """Bytes that are free before the group takes its memory, and while it has it."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.ones(1, device=device)  # this process's context
    barrier.wait()
    before = torch.cuda.mem_get_info(device)[0]
    barrier.wait()
    with DWDPRuntime(config, rank, device, rendezvous) as runtime:
        for index in range(model.num_layers):
            runtime.add_layer(index, model.expert_weights)
        runtime.publish()
        torch.cuda.synchronize()
        barrier.wait()
        after = torch.cuda.mem_get_info(device)[0]
        barrier.wait()
    return before, after


def group_memory(granularity: int) -> Row:
    """What a group of processes on one GPU takes, beside the sum of its ranks' plans."""
    name = "64 experts of 2048 x 2048"
    model, config = small(name, GROUP_LAYERS, **MODELS[name]), DWDPConfig(group_size=GROUP_SIZE)
    planned = 0
    for rank in range(GROUP_SIZE):
        layer = describe_layer(0, model.expert_weights, config, rank, granularity)
        memory = expert_memory(layer, GROUP_LAYERS, rank, config.prefetch_depth)
        planned += memory.resident + memory.staged
    barrier = multiprocessing.get_context("spawn").Barrier(GROUP_SIZE)
    with tempfile.TemporaryDirectory() as rendezvous:
        found = run_group(partial(group_rank, model, config, rendezvous, barrier), GROUP_SIZE, "cuda")
    taken = max(before for before, _ in found) - min(after for _, after in found)
    return memory_row(name, config, planned, taken)


def say(what: object) -> None:
    """Progress, for who waits."""
    print(f"{time.perf_counter():.1f} {what}", file=sys.stderr, flush=True)


def main() -> None:
    arguments_of = parser(__doc__)
    arguments = arguments_of.parse_args()
    if arguments.device.type != "cuda":
        arguments_of.error("predictions are compared with a GPU, and there is none here")
    device = torch.device("cuda", 0)
    base = load_gpu(preset_of(torch.cuda.get_device_name(device)))
    gpus = {}
    for name, sizes in MODELS.items():
        gpus[name] = calibrate(base, small(name, 1, **sizes), device)
        say(gpus[name].efficiency)
    rows = []
    for wanted in RUNS:
        rows.append(run(gpus[wanted[0]], *wanted, device))
        say(rows[-1])
    torch.cuda.empty_cache()
    report(
        arguments,
        {
            "efficiencies measured": [
                {"model": name} | dataclasses.asdict(gpu.efficiency) for name, gpu in gpus.items()
            ],
            "pass": [row for row, _ in rows],
            "memory": [*(memory for _, memory in rows), group_memory(base.granularity)],
        },
    )


if __name__ == "__main__":
    main()
