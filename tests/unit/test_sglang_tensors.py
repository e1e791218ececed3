"""The parts of the SGLang plugin that need no SGLang: per-expert tensors, the table of schemes, and the environment."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang import settings
from vmm_dwdp.integrations.sglang.expert_tensor import ExpertBlocks, find, replace
from vmm_dwdp.integrations.sglang.schemes import scheme_of, supported


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(24.0).view(2, 3, 4).transpose(1, 2),
        torch.arange(24.0).view(2, 1, 3, 4).permute(0, 3, 1, 2),
        torch.arange(5, dtype=torch.float32),
        torch.arange(24.0).view(2, 3, 4).to(torch.float8_e4m3fn),
    ],
    ids=["contiguous", "transposed", "permuted", "a number each", "fp8"],
)
def test_bytes_of_experts_and_back(tensor: torch.Tensor) -> None:
    block = ExpertBlocks.of("w", tensor)
    written = block.to_bytes(tensor)

    assert written.shape == (tensor.shape[0], block.nbytes)
    assert written.data_ptr() == tensor.data_ptr()
    copied = block.from_bytes(written.clone())
    assert copied.stride() == tensor.stride()
    assert copied.tolist() == tensor.tolist()
    assert block.from_bytes(written[1:])[0].tolist() == tensor[1].tolist()


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.empty(2, 3, 8)[:, :, :4], "w has gaps between its elements"),
        (torch.empty(3, 2, 4).transpose(0, 1), "w has gaps between its elements"),
        (torch.empty(2, 8, 4)[:, :4], "the experts of w are not one after the other"),
    ],
)
def test_experts_that_are_not_dense_blocks_are_refused(tensor: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ExpertBlocks.of("w", tensor)


def test_a_parameter_stays_the_same_object() -> None:
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight

    replace(layer, "weight", torch.ones(4, 4))

    assert layer.weight is weight
    assert weight.shape == (4, 4)


def test_a_tensor_inside_other_objects_is_found_by_either_name() -> None:
    storage = SimpleNamespace(data=torch.zeros(2, 3))
    config = SimpleNamespace(old_scale=SimpleNamespace(storage=storage, shape=[2, 3], shape_max=[2, 3]))
    layer: Any = SimpleNamespace(method=config)
    name = "method.new_scale|old_scale.storage.data"

    assert find(layer, name) is not None
    assert find(layer, "method.new_scale.storage.data") is None
    replace(layer, name, torch.ones(8, 3))
    assert storage.data.shape == (8, 3)
    assert config.old_scale.shape == [8, 3]


def _layer(method: str, runner: str, **attributes: Any) -> SimpleNamespace:
    quant_method = type(method, (), attributes)()
    return SimpleNamespace(
        quant_method=quant_method, runner=SimpleNamespace(runner_backend=SimpleNamespace(value=runner))
    )


def test_a_layer_has_the_scheme_of_its_method_and_runner() -> None:
    stated = SimpleNamespace(is_checkpoint_fp8_serialized=True)
    fp8 = {"use_mxfp8": False, "is_fp4_expert": False, "quant_config": stated}

    assert "w13_weight_scale_inv" in scheme_of(_layer("Fp8MoEMethod", "triton", block_quant=True, **fp8)).tensors
    assert "w13_weight_scale" in scheme_of(_layer("Fp8MoEMethod", "triton", block_quant=False, **fp8)).tensors
    assert len(supported()) == 9


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (_layer("GPTQMarlinMoEMethod", "marlin"), "experts of GPTQMarlinMoEMethod with the MoE runner marlin"),
        (_layer("Mxfp4MoEMethod", "deep_gemm"), r"experts of Mxfp4MoEMethod \(mxfp4\) with the MoE runner deep_gemm"),
        (SimpleNamespace(quant_method=object()), "experts of object with the MoE runner none"),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_name(layer: SimpleNamespace, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"DWDP cannot spread {sentence}; it can: bf16 with triton"):
        scheme_of(layer)


@pytest.mark.parametrize(
    ("written", "dwdp_size", "sentence"),
    [
        (
            "group_size: 1\nhost_experts: 4\nmode: in_place\nresident_cache: 4194304",
            1,
            "states resident_cache, but SGLang's layers do not tell which experts tokens use",
        ),
        ("group_size: 1", 1, "states group_size 1 and no host_experts, so there is nothing to spread"),
        ("group_size: 4", 2, "states group_size 4, but --dwdp-size is 2"),
        ("group_size: 2\nhost_experts: 1", 2, "states host_experts, but with --dwdp-size SGLang itself"),
        ("group_size: 2\nnum_local_experts: 5", 2, "states num_local_experts, but with --dwdp-size SGLang itself"),
        ("group_size: 2\nassembly: tensor_list", 2, "SGLang's kernels need assembly: vmm"),
    ],
)
def test_configs_that_sglang_cannot_have(
    written: str, dwdp_size: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dwdp.yaml"
    path.write_text(written)
    monkeypatch.setenv(settings.CONFIG, str(path))

    with pytest.raises(ConfigError, match=sentence):
        settings.config(dwdp_size)


def test_the_config_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.CONFIG, raising=False)

    assert settings.config(4).group_size == 4
    assert not settings.wanted(1)
