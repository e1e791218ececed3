"""Models with an expert that every token uses, beside those that are spread: each rank has it whole.

With random weights. GLM-4-MoE, Qwen2-MoE and DeepSeek-V2 have a whole engine; of Llama 4, whose experts SGLang does not
compute on the CPU, the shared expert alone is computed.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import engine_process
import families
import pytest
import torch
from answers import TWO_RANKS, generate
from ports import free_port
from test_plugin import sentence
from torch.nn import functional

from vmm_dwdp.testing import RankFailed, run_group

pytestmark = pytest.mark.timeout(900)  # engines start slowly beside other tests

INTERPRETED = {"TRITON_INTERPRET": "1"}
WITH_ONE = ("Glm4Moe", "DeepseekV2", "Qwen2Moe", "Llama4")


# -- the layers of two ranks -------------------------------------------------------------------------------------------
def block(family: str) -> torch.nn.Module:
    """SGLang's MoE block of a family, in a list of layers as its model has it."""
    from sglang.srt.models import deepseek_v2, glm4_moe, llama4, qwen2_moe

    constructors: dict[str, Any] = {
        "Glm4Moe": partial(glm4_moe.Glm4MoeSparseMoeBlock, layer_id=1),
        "DeepseekV2": partial(deepseek_v2.DeepseekV2MoE, layer_id=2),
        "Qwen2Moe": partial(qwen2_moe.Qwen2MoeSparseMoeBlock, layer_id=3),
        "Llama4": partial(llama4.Llama4MoE, layer_id=4),
    }
    model = torch.nn.Module()
    made = constructors[family](config=families.config(family), prefix="layers.0.mlp")
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": made})])
    return model


def compute(rank: int, *, port: int, environment: dict[str, str]) -> dict[str, Any]:
    """By family, the width of the shared expert that a rank has, and how far it is from what torch computes; then what
    is said to a model that keeps a part, and to one that adds up over ranks."""
    os.environ.update(environment)
    engine_process.start(rank, 2, port)
    apart_from_routed = engine_process.server_args(tp_size=2, dwdp_size=2, disable_shared_experts_fusion=True)
    engine_process.publish(apart_from_routed, rank)
    from sglang.srt.distributed import tensor_model_parallel_all_reduce
    from sglang.srt.layers.linear import RowParallelLinear

    from vmm_dwdp.integrations.sglang.shared_experts import require_whole

    torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device="cpu").manual_seed(rank)
    found: dict[str, Any] = {}
    for family in WITH_ONE:
        model = block(family)
        mlp = model.layers[0]["mlp"]
        shared = getattr(mlp, "shared_experts", None) or mlp.shared_expert
        gate_up, down = shared.gate_up_proj.weight, shared.down_proj.weight
        for weight in (gate_up, down):
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
        hidden = torch.randn(5, gate_up.shape[1], generator=generator)
        gate, up = (hidden @ gate_up.T).chunk(2, dim=1)
        apart = shared(hidden.clone()) - (functional.silu(gate) * up) @ down.T
        found[family] = (down.shape[1], float(apart.abs().max()))
        found["refused"] = sentence(partial(require_whole, model))
    model.layers[0]["o_proj"] = RowParallelLinear(256, 256, prefix="layers.0.o_proj")
    found["a part"] = sentence(partial(require_whole, model))
    found["a sum"] = sentence(partial(tensor_model_parallel_all_reduce, torch.ones(2)))
    return found


def test_each_rank_has_them_whole() -> None:
    widths = {"Glm4Moe": 1024, "DeepseekV2": 2048, "Qwen2Moe": 1024, "Llama4": 1024}
    for found in run_group(partial(compute, port=free_port(), environment={}), 2):
        assert {family: found[family][0] for family in WITH_ONE} == widths
        assert all(found[family][1] < 1e-4 for family in WITH_ONE)
        assert found["refused"] == "nothing was raised"
        assert found["a part"].startswith("ConfigError: Module cuts layers.0.o_proj over --tp-size, but with")
        assert found["a sum"].startswith("ConfigError: the model adds up over --tp-size, but with --dwdp-size")


def test_sglang_itself_cuts_them() -> None:
    """With its own DWDP, which skips the sum of the parts as well: half of the width on each of two ranks."""
    for found in run_group(partial(compute, port=free_port(), environment={"VMM_DWDP_DISABLE": "1"}), 2):
        widths = {"Glm4Moe": 512, "DeepseekV2": 1024, "Qwen2Moe": 512, "Llama4": 512}
        assert {family: found[family][0] for family in WITH_ONE} == widths
        assert "mlp.shared_expert" in found["refused"]


# -- whole engines -----------------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "environment", "attention"),
    [
        ("Glm4Moe", {}, "torch_native"),
        ("Qwen2Moe", INTERPRETED, "torch_native"),  # the gate of its shared expert is a Triton kernel
        ("DeepseekV2", INTERPRETED, "triton"),  # the plain one knows no latent attention
    ],
)
def test_engines_give_the_same_tokens(family: str, environment: dict[str, str], attention: str, tmp_path: Path) -> None:
    """Over two ranks, and with experts in host memory on one."""
    folder, config = tmp_path / "checkpoint", tmp_path / "dwdp.yaml"
    run_group(partial(families.write, family=family, folder=folder), 1)
    config.write_text("group_size: 1\nhost_experts: 3\n")
    ask = partial(generate, checkpoint=folder, attention=attention)

    [(tokens, _)] = run_group(partial(ask, size=1, environment=environment), 1)
    assert len({token for answer in tokens for token in answer}) > 8
    assert run_group(partial(ask, size=2, environment=environment | TWO_RANKS, dwdp_size=2), 1) == [(tokens, 2)]
    in_host_memory = environment | {"VMM_DWDP_CONFIG": str(config)}
    assert run_group(partial(ask, size=1, environment=in_host_memory), 1) == [(tokens, 1)]


@pytest.mark.long
def test_a_model_without_attention_data_parallel_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Mixtral: SGLang cuts its attention over all ranks, whose tokens differ."""
    folder = tmp_path / "checkpoint"
    run_group(partial(families.write, family="Mixtral", folder=folder), 1)
    with pytest.raises(RankFailed):
        run_group(partial(generate, checkpoint=folder, size=2, environment=TWO_RANKS, dwdp_size=2), 1)
    told = capfd.readouterr()
    assert "MixtralForCausalLM cuts model.layers.0.self_attn.o_proj over --tp-size" in told.out + told.err
