"""Models whose experts are looked up in a bank on a GPU: every bit of transformers' own model, prefill and decoding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.banked_models import decoded, require_same_bits, with_rows
from support.moe_models import NUM_EXPERTS, prompt, tiny_model
from support.quantised_models import keeping_fp8, save
from transformers import AutoModelForCausalLM

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.integrations.transformers import from_pretrained

pytestmark = pytest.mark.gpu

# Experts of 1.5 and 0.75 MiB in bf16: page borders fall inside of them.
SIZES: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 768, "intermediate_size": 768, "head_dim": 128}
IN_PLACE = DWDPConfig(group_size=1, host_experts=NUM_EXPERTS - 1, mode="in_place", prefetch_depth=0)
ROWS = 3  # fewer experts than two sequences use in a step
# So many pairs of a token and an expert that torch's grouped GEMM takes larger tiles for seven groups than for ten.
LONG = torch.arange(500).remainder(61).add(3).view(1, 500)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "fp8"])
def test_every_step_has_the_bits_of_the_whole_model(family: str, implementation: str, tmp_path: Path) -> None:
    if (family, implementation) == ("fp8", "batched_mm"):
        pytest.skip("torch's operations stand for the grouped kernel only")
    keeping: AbstractContextManager[None] = nullcontext()
    if family == "fp8":
        keeping, folder = keeping_fp8(), save("qwen3_moe fp8", tmp_path / "model")
    else:
        folder = tmp_path / "model"
        tiny_model(family, max_position_embeddings=1024, **SIZES).to(torch.bfloat16).save_pretrained(folder)
    stated: dict[str, Any] = {"dtype": "auto", "experts_implementation": implementation}
    with keeping:
        whole = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cuda"}, **stated)
        prompts = [prompt("cuda")] if family == "fp8" else [prompt("cuda"), LONG.cuda()]
        expected = [decoded(whole, each) for each in prompts]
        config = with_rows(IN_PLACE, whole, ROWS, open_driver(torch.device("cuda")).granularity())
        model = from_pretrained(folder, config, rank=0, device="cuda", rendezvous=tmp_path / "group", **stated)
        for given, wanted in zip(prompts, expected, strict=True):
            require_same_bits(model, given, wanted, leave=family != "fp8")  # whose experts all fit in a page
        assert model.dwdp.close().open() == []
