"""What `vmm-dwdp plan` predicts against what a GPU does, with experts in host memory.

The machine is calibrated first, with the shapes of one model; then layers of three models run over the runtime, with
different numbers of tokens, experts in host memory and slots. No prediction is told anything of the run it predicts.

pass      milliseconds of a forward pass: predicted, measured, and their ratio
memory    bytes that the runtime takes of the GPU: predicted, and what the driver says is gone
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import tempfile
import time

import torch
from common import Row, parser, report

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.planning.calibrate import calibrate, preset_of
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.gpus import GpuSpec, load_gpu
from vmm_dwdp.planning.models import ModelSpec, load_model, model_from_config
from vmm_dwdp.planning.roofline import Batch
from vmm_dwdp.planning.torch_layer import TorchLayer, fill

PASSES = 5
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
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(PASSES + 1)]
        hidden = layer.hidden
        for end in ends:
            for index in range(layers):
                attended, routed = layer.before(hidden)
                with runtime.layer(index) as weights:
                    outputs = layer.experts(routed, weights)
                hidden = layer.norm(layer.combine(outputs), attended)
            end.record()
        del weights  # so that the runtime's ranges can go
        torch.cuda.synchronize()
        spans = [start.elapsed_time(end) for start, end in itertools.pairwise(ends)]
        waited = runtime.stats().exposed_wait_s / (PASSES + 1) * 1e3
    measured = statistics.median(spans)
    predicted = estimate.dwdp_seconds * 1e3
    row = {
        "model": name, "in host memory": host_experts, "tokens": tokens, "depth": depth, "layers": layers,
        "copy ms": estimate.prefetch_seconds * 1e3, "compute ms": estimate.work.seconds * 1e3,
        "predicted ms": predicted, "measured ms": measured, "ratio": predicted / measured, "waited ms": waited,
    }  # fmt: skip
    experts = estimate.memory.experts
    planned = experts.resident + experts.staged
    return row, {"model": name, "depth": depth, "predicted": planned, "measured": taken, "ratio": planned / taken}


def say(what: object) -> None:
    """Progress, for who waits."""
    print(f"{time.perf_counter():.1f} {what}", file=sys.stderr, flush=True)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    device = torch.device("cuda", 0)
    base = load_gpu(preset_of(torch.cuda.get_device_name(device)))
    gpu = calibrate(base, load_model("qwen3-30b-a3b"), device)
    say(gpu.efficiency)
    rows = []
    for wanted in RUNS:
        rows.append(run(gpu, *wanted, device))
        say(rows[-1])
    report(
        arguments,
        {
            "efficiencies measured": [dataclasses.asdict(gpu.efficiency)],
            "pass": [row for row, _ in rows],
            "memory": [memory for _, memory in rows],
        },
    )


if __name__ == "__main__":
    main()
