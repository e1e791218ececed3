"""In the product of tokens with the experts that they chose, and in the benchmark of a whole model."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_KERNEL = ("tests/unit/kernels/test_chosen.py::test_triton_multiplies_and_reads_every_number_that_is_chosen_once",)
_TORCH = ("tests/unit/kernels/test_chosen.py::test_every_token_has_its_products",)
_MODEL = ("tests/unit/project/test_whole_model.py",)

BUGS: Final = (
    Bug(
        "chosen: an expert is read for each token that chose it",
        "kernels/triton/chosen.py",
        "    if tl.min(tl.where(same, pairs, PAIRS), 0) < pair:\n",
        "    if tl.min(tl.where(same, pairs, PAIRS), 0) < 0:\n",
        _KERNEL,
    ),
    Bug(
        "chosen: only one token of those who chose an expert gets its product",
        "kernels/triton/chosen.py",
        "        pair = tl.min(tl.where(same & (pairs > pair), pairs, PAIRS), 0)\n",
        "        pair = PAIRS + 0 * pair\n",
        _KERNEL,
    ),
    Bug(
        "chosen: all blocks of a row have the scale of the first",
        "kernels/triton/chosen.py",
        "in_row * 16 // 128",
        "in_row * 16 // 4096",
        _KERNEL,
    ),
    Bug(
        "chosen: all programs take the scales of the first rows",
        "kernels/triton/chosen.py",
        "stride + first + chunk, mask, 0))",
        "stride + chunk, mask, 0))",
        _KERNEL,
    ),
    Bug(
        "chosen: on the CPU whoever names no expert gets the last one's product",
        "kernels/chosen.py",
        "        if 0 <= row < len(weight):\n",
        "        if row < len(weight):\n",
        _TORCH,
    ),
    Bug(
        "whole model: states are not compared",
        "benchmarks/whole_model.py",
        'if not torch.equal(state, states["gpu"]) or',
        "if False or",
        _MODEL,
    ),
    Bug(
        "whole model: the bound takes all bytes for missed ones",
        "benchmarks/whole_model.py",
        'all_gb * (1 - shares["hits"])',
        "all_gb * (1 - 0)",
        _MODEL,
    ),
    Bug(
        "whole model: all layers replay one sequence",
        "benchmarks/whole_model.py",
        "(turn + number // trace.num_layers)",
        "turn",
        _MODEL,
    ),
    Bug(
        "whole model: memory of the host that layers share is not given back",
        "benchmarks/repeated_layers.py",
        "        if self._holders[handle] <= 0:\n",
        "        if self._holders[handle] < 0:\n",
        _MODEL,
    ),
    Bug(
        "whole model: a rate above the memory's is printed",
        "benchmarks/whole_model.py",
        "> load_gpu(name).memory_bandwidth",
        "> 9 * load_gpu(name).memory_bandwidth",
        _MODEL,
    ),
)
