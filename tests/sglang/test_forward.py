"""The forward pass of real `FusedMoE` layers over assembled weights equals that over ordinary weights, bit for bit.

On a GPU these are SGLang's own kernels for each kind of weights that Hopper can run, and the ranks share the GPU;
elsewhere its plain PyTorch path, for bf16. Marlin adds parts of a sum in the order in which they come, on Hopper: so no
two passes are the same, and it is told to add them in one order here. With AWQ's zero points a pass strays now and then
even so, with this library and without: there the bits count that most of several passes have.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import engine_process
import experts
import numpy as np
import pytest
import test_loading
import torch
from ports import free_port

from vmm_dwdp.testing import run_group

ON_A_GPU = {
    **{kind: runner for kind, runner in test_loading.KINDS.items() if kind != "nvfp4"},
    "mxfp4 for marlin": "marlin",
    "nvfp4 for marlin": "marlin",
}
pytestmark = pytest.mark.timeout(900)  # on a GPU kernels are compiled first
KINDS = ON_A_GPU if torch.cuda.is_available() else {"bf16": ON_A_GPU["bf16"]}
NUM_TOKENS = (1, 33, 200)
PASSES = {"awq": 9}  # with the same tokens, where one is not enough: up to 4 in 10 strayed on an H200
NUM_EXPERTS, TOP_K = 16, 4
SCALE = 2 if torch.cuda.is_available() else 1  # a share of every kind is to have more than a page of a GPU's
CONFIGS = (
    "host_experts: 5",
    f"host_experts: {NUM_EXPERTS}",
    f"host_experts: {NUM_EXPERTS}\nmode: in_place\nprefetch_depth: 0",
    f"host_experts: {NUM_EXPERTS}\nmode: auto",
    "host_experts: 5\nmode: in_place\nprefetch_depth: 0",  # from two owners
)

UNEQUAL = "num_local_experts: 7\nhost_experts: 5"
GROUPS = ("mode: in_place\nprefetch_depth: 0", UNEQUAL)

Outputs = dict[str, list[np.ndarray] | str]  # by kind of weights; how its kernels failed, where they did


def forward(rank: int, *, size: int, port: int, configs: list[str | None], kinds: list[str]) -> list[Outputs]:
    """For each config, two passes with every number of tokens."""
    engine_process.start(rank, size, port)
    if engine_process.DEVICE == "cuda":
        add_in_one_order()
    found = []
    for config in configs:
        if config is not None:
            os.environ["VMM_DWDP_CONFIG"] = config
        found.append({kind: outputs_or_why_not(kind, rank, size) for kind in kinds})
    return found


def outputs_or_why_not(kind: str, rank: int, size: int) -> list[np.ndarray] | str:
    """So that kernels that cannot be had here fail the test of their kind alone."""

    try:
        return outputs(kind, rank, size)
    except Exception:
        return traceback.format_exc()
    finally:
        engine_process.end_of_model()


def outputs(kind: str, rank: int, size: int) -> list[np.ndarray]:
    engine_process.use_runner(KINDS[kind], rank, size)
    model = experts.model(kind, NUM_EXPERTS, TOP_K, scale=SCALE)
    experts.load(model)
    dtype = torch.float16 if kind.startswith("gptq") else torch.bfloat16  # of its scales
    manager = engine_process.init_dwdp(model)
    generator = torch.Generator(device="cpu").manual_seed(1)
    passes = PASSES.get(kind, 1)
    found = []
    for num_tokens in NUM_TOKENS * 2:
        hidden = torch.randn(num_tokens, experts.HIDDEN * SCALE, generator=generator, device="cpu")
        logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator, device="cpu")
        hidden, logits = hidden.to(engine_process.DEVICE, dtype), logits.to(engine_process.DEVICE)
        routed = route(KINDS[kind], logits)
        found.append(usual([one_pass(model, manager, hidden, routed) for _ in range(passes)]))
    if manager is not None:
        mode, counts = manager.runtime.config.mode, manager.runtime.stats().layers.values()
        if mode == "staged":
            assert all(layer.hits == len(found) * passes + 1 for layer in counts)
        if mode == "auto":  # one token is read in place, and one layer was when it was bound; more are staged
            wanted = 4 * passes, 1 + 2 * passes
            assert all((layer.hits + layer.misses, layer.in_place) == wanted for layer in counts)
    return found


def one_pass(model: Any, manager: Any, hidden: torch.Tensor, routed: Any) -> np.ndarray:
    if manager is not None:
        manager.prefetch_first_layers()
    for layer in model.layers:
        hidden = torch.nn.functional.rms_norm(hidden + layer.forward_impl(hidden.clone(), routed), hidden.shape[1:])
    assert hidden.isfinite().all()
    return hidden.float().cpu().numpy()


def usual(passes: list[np.ndarray]) -> np.ndarray:
    """What most of them are, to the bit."""
    [(bits, _)] = Counter(output.tobytes() for output in passes).most_common(1)
    return np.frombuffer(bits, passes[0].dtype).reshape(passes[0].shape)


def add_in_one_order() -> None:
    """Let Marlin's programs wait for each other where they add to the same sum."""
    module = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe")
    multiply = module.moe_wna16_marlin_gemm
    in_one_order = {"use_atomic_add": False}
    module.moe_wna16_marlin_gemm = lambda *tensors, **given: multiply(*tensors, **given | in_one_order)


def route(runner: str, logits: torch.Tensor) -> Any:
    """The experts of each token, in the form that the runner takes."""
    from sglang.srt.layers.moe import topk

    if runner == "triton_kernel":
        return topk.TritonKernelTopKOutput(*topk.routing(logits, TOP_K))
    weights, chosen = logits.softmax(dim=-1).topk(TOP_K)
    return topk.StandardTopKOutput(weights.float(), chosen.to(torch.int32), logits)


@pytest.fixture(scope="module")
def kinds(request: pytest.FixtureRequest) -> list[str]:
    """Those that are asked for, in one run of processes for all of them."""
    asked = {item.callspec.params.get("kind") for item in request.session.items if hasattr(item, "callspec")}
    return [kind for kind in KINDS if kind in asked]


@pytest.fixture(scope="module")
def one_process(kinds: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Outputs]:
    """Without DWDP twice, then with each config."""
    paths: list[str | None] = [None, None]
    for config in CONFIGS:
        path = Path(tmp_path_factory.mktemp("config"), "dwdp.yaml")
        path.write_text(f"group_size: 1\n{config}\n")
        paths.append(str(path))
    [found] = run_group(
        partial(forward, size=1, port=free_port(), configs=paths, kinds=kinds), 1, engine_process.DEVICE
    )
    return found


@pytest.fixture(scope="module")
def two_ranks(one_process: list[Outputs], tmp_path_factory: pytest.TempPathFactory) -> list[list[Outputs]]:
    """Of both ranks, in equal shares; then read in place; then in shares that overlap, and host memory: the kinds that
    run without DWDP."""
    configs: list[str | None] = [None]
    for config in GROUPS:
        path = Path(tmp_path_factory.mktemp("config"), "dwdp.yaml")
        path.write_text(f"group_size: 2\n{config}\n")
        configs.append(str(path))
    kinds = [kind for kind, found in one_process[0].items() if not isinstance(found, str)]
    run = partial(forward, size=2, port=free_port(), configs=configs, kinds=kinds)
    return run_group(run, 2, engine_process.DEVICE)


def ordinary(kind: str, one_process: list[Outputs]) -> list[np.ndarray]:
    if KINDS[kind] == "deep_gemm":
        pytest.importorskip("deep_gemm")
    found, again = (outputs[kind] for outputs in one_process[:2])
    assert not isinstance(found, str), f"without this library, too: {found}"
    assert not differences(again, found), "without this library passes differ from one another"
    assert all(output.std() > 0.1 for output in found)
    return found


def differences(found: list[np.ndarray], wanted: list[np.ndarray]) -> list[str]:
    """Of each pass whose bits are not those wanted."""
    return [
        f"pass {number} of {len(wanted)}: {(a != b).mean():.2%} of the numbers, by {np.abs(a - b).max()} at most"
        for number, (a, b) in enumerate(zip(found, wanted, strict=True))
        if not np.array_equal(a, b)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_host_memory(kind: str, one_process: list[Outputs]) -> None:
    wanted = ordinary(kind, one_process)
    for config, found in zip(CONFIGS, one_process[2:], strict=True):
        assert not isinstance(found[kind], str), found[kind]
        assert not differences(found[kind], wanted), config


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_experts_spread_over_two_ranks(kind: str, one_process: list[Outputs], two_ranks: list[list[Outputs]]) -> None:
    """Elsewhere test_engine.py has two ranks."""
    wanted = ordinary(kind, one_process)
    for rank in two_ranks:
        for config, found in zip(("", *GROUPS), rank, strict=True):
            if config == UNEQUAL and kind.startswith("mxfp4"):  # gpt-oss cuts out equal shares itself
                assert "there can be no host_experts and no num_local_experts" in found[kind]
                continue
            assert not isinstance(found[kind], str), found[kind]
            assert not differences(found[kind], wanted), config
