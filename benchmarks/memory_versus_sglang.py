"""Expert memory per rank, in GiB: this library's own layouts beside those of SGLang's DWDP (0.5.17 and 0.5.23).

Needs neither a GPU nor SGLang. Ours: tensors of at least a page per rank are spread. SGLang's: w13 and w2 are spread,
with slots of 16 MiB pages for each side of each weight, two slots; scales and biases are whole on every rank.
"""

from __future__ import annotations

import torch
from common import parser, report

from vmm_dwdp import DWDPConfig, WeightSpec
from vmm_dwdp.layout.layer import Layer, describe_layer
from vmm_dwdp.layout.slots import divide

GRANULARITY = 2 << 20
POOL_PAGE = 16 << 20  # of SGLang's slots
SPREAD_BY_SGLANG = ("w13", "w2")

Specs = dict[str, WeightSpec]

MODELS: dict[str, tuple[int, Specs]] = {  # number of MoE layers, and the tensors of one
    "DeepSeek-R1, NVFP4": (
        58,
        {
            "w13": WeightSpec((256, 4096, 3584), torch.uint8),
            "w13_scale": WeightSpec((256, 4096, 448), torch.float8_e4m3fn),
            "w2": WeightSpec((256, 7168, 1024), torch.uint8),
            "w2_scale": WeightSpec((256, 7168, 128), torch.float8_e4m3fn),
        },
    ),
    "gpt-oss-120b, MXFP4": (
        36,
        {
            "w13": WeightSpec((128, 5760, 1440), torch.uint8),
            "w13_scale": WeightSpec((128, 5760, 90), torch.uint8),
            "w13_bias": WeightSpec((128, 5760), torch.bfloat16),
            "w2": WeightSpec((128, 2880, 1440), torch.uint8),
            "w2_scale": WeightSpec((128, 2880, 90), torch.uint8),
            "w2_bias": WeightSpec((128, 2880), torch.bfloat16),
        },
    ),
}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    rows = [row(model, group_size) for model in MODELS for group_size in (2, 4, 8)]
    report(arguments, {"GiB per rank, the rank that needs most": rows})


def row(model: str, group_size: int) -> dict[str, object]:
    num_layers, specs = MODELS[model]
    ours = max(ours_nbytes(num_layers, specs, group_size, rank) for rank in range(group_size))
    theirs = max(sglang_nbytes(num_layers, specs, group_size, rank) for rank in range(group_size))
    whole = num_layers * sum(nbytes(spec) for spec in specs.values())
    described = {"whole": whole, "ours": ours, "SGLang": theirs, "saved": theirs - ours}
    return {"model": model, "ranks": group_size, **{name: round(value / 2**30, 2) for name, value in described.items()}}


def nbytes(spec: WeightSpec) -> int:
    return spec.num_experts * spec.expert_nbytes


def ours_nbytes(num_layers: int, specs: Specs, group_size: int, rank: int) -> int:
    """Shards and slots of the spread tensors, and the small ones whole."""
    config = DWDPConfig(group_size=group_size)
    spread = {name: spec for name, spec in specs.items() if nbytes(spec) >= GRANULARITY * group_size}
    layer = describe_layer(0, spread, config, rank, GRANULARITY)
    resident = sum(len(layout.resident_bytes(rank)) for layout in layer.layouts.values())
    small = sum(nbytes(spec) for name, spec in specs.items() if name not in spread)
    return num_layers * (resident + small) + config.prefetch_depth * slot_nbytes(layer, rank)


def slot_nbytes(layer: Layer, rank: int) -> int:
    pages = [len(region) // GRANULARITY for layout in layer.layouts.values() for region in layout.staged_bytes(rank)]
    return sum(divide([pages], large=1).sizes) * GRANULARITY


def sglang_nbytes(num_layers: int, specs: Specs, group_size: int, rank: int) -> int:
    """By the formulas of ``PageAlignedLayout`` and ``PagePool`` in ``sglang/srt/layers/moe/dwdp``."""
    shard, slot, whole = 0, 0, 0
    for name, spec in specs.items():
        if name not in SPREAD_BY_SGLANG:
            whole += nbytes(spec)
            continue
        per_rank = nbytes(spec) // group_size
        start, stop = per_rank * rank, per_rank * (rank + 1)
        first, last = start // GRANULARITY * GRANULARITY, up(stop, GRANULARITY)
        shard += last - first
        slot += up(first, POOL_PAGE) + up(up(nbytes(spec), GRANULARITY) - last, POOL_PAGE)
    return num_layers * (shard + whole) + 2 * slot


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


if __name__ == "__main__":
    main()
