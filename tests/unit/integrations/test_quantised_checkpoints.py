"""Quantised checkpoints: what a rank reads and keeps of them, what is said of it, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import transformers
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.groups import PAGE, same_bytes
from support.moe_models import NUM_EXPERTS, logits, tiny_model
from support.mxfp4_kernels import KERNELS, StridedLayout, keeping_mxfp4
from support.quantised_models import BLOCK, CHECKPOINTS, E2M1, GROUP, keeping_fp8, save, tensors_of, whole_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import hub_kernels
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp import checkpoint as checkpoint_module
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.checkpoint import INDEX_FILE
from vmm_dwdp.integrations.transformers import attach, from_pretrained
from vmm_dwdp.integrations.transformers.quantization import require_spreadable
from vmm_dwdp.integrations.transformers.routing import routing_of

ALONE = DWDPConfig(group_size=1, host_experts=3)
FP8, MXFP4 = "qwen3_moe fp8", "gpt_oss mxfp4"


def load(folder: Path, config: DWDPConfig = ALONE, rank: int = 0, **kwargs: Any) -> PreTrainedModel:
    place: dict[str, Any] = {"rendezvous": folder / "rendezvous", "driver": HostDriver(PAGE), "dtype": "auto", **kwargs}
    return from_pretrained(folder, config, rank=rank, device="cpu", **place)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for name in (FP8, MXFP4):
        save(name, root / name)
    return root


def copied(runtime: DWDPRuntime, layer: int) -> dict[str, Tensor]:
    """A layer's assembled weights, of which nothing is held."""
    with runtime.layer(layer) as weights:
        return {name: weight.clone() for name, weight in weights.items() if isinstance(weight, Tensor)}


# -- where transformers dequantises ----------------------------------------------------------------------------------


def expert_of_fp8(stored: dict[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
    def dequantised(matrix: str) -> Tensor:
        name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
        scales = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return (stored[name].float() * scales).to(torch.bfloat16)

    gate_up = torch.cat([dequantised("gate_proj"), dequantised("up_proj")])
    return {"gate_up_proj": gate_up, "down_proj": dequantised("down_proj")}


def expert_of_mxfp4(stored: dict[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
    def dequantised(matrix: str) -> Tensor:
        name = f"model.layers.{layer}.mlp.experts.{matrix}"
        blocks, scales = stored[f"{name}_blocks"][expert], stored[f"{name}_scales"][expert]
        nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        values = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
        assert values.shape[-1] == GROUP
        return (values * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(-2).T.to(torch.bfloat16)

    return {matrix: dequantised(matrix) for matrix in ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize(("name", "expert_of"), [(FP8, expert_of_fp8), (MXFP4, expert_of_mxfp4)])
def test_an_expert_is_what_its_format_says(
    published: Path,
    name: str,
    expert_of: Callable[[dict[str, Tensor], int, int], dict[str, Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored = tensors_of(published / name)
    with caplog.at_level(logging.WARNING, "vmm_dwdp"):
        model = load(published / name)
    method = name.rpartition(" ")[2]
    assert [record.getMessage() for record in caplog.records if record.name == "vmm_dwdp"] == [
        f"{published / name}: experts in {method} become bfloat16, as transformers dequantises here"
    ]
    with model.dwdp as runtime:
        for layer in range(model.config.num_hidden_layers):
            weights = copied(runtime, layer)
            for expert in range(NUM_EXPERTS):
                for weight, wanted in expert_of(stored, layer, expert).items():
                    assert same_bytes(weights[weight][expert], wanted), (layer, expert, weight)


class Counted:
    """What `safe_open` gives, and every byte of a tensor that is taken from it."""

    def __init__(self, opened: Any, taken: dict[str, int]) -> None:
        self._opened = opened
        self._taken = taken

    def __enter__(self) -> Counted:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def get_tensor(self, name: str) -> Tensor:
        return self._count(name, self._opened.get_tensor(name))

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self._opened.get_slice(name), lambda tensor: self._count(name, tensor))

    def _count(self, name: str, tensor: Tensor) -> Tensor:
        self._taken[name] = self._taken.get(name, 0) + tensor.nbytes
        return tensor


class CountedSlice:
    def __init__(self, whole: Any, count: Callable[[Tensor], Tensor]) -> None:
        self._whole = whole
        self._count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._count(self._whole[index])


@pytest.mark.parametrize(("rank", "own"), [(0, {0, 1, 2, 3, 5, 6}), (1, {1, 2, 3, 4})])
@pytest.mark.parametrize(
    ("name", "keeping"),
    [(FP8, nullcontext), (MXFP4, nullcontext), (MXFP4, keeping_mxfp4)],
    ids=["fp8", "mxfp4", "kept"],
)
def test_of_the_experts_a_rank_reads_its_own_and_each_once(
    published: Path,
    name: str,
    keeping: Callable[[], AbstractContextManager[None]],
    rank: int,
    own: set[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Counted where safetensors hands bytes out, to transformers and to this library. Rank 0 reads the host pool's."""
    taken: dict[str, int] = {}

    def counting(*arguments: Any, **keywords: Any) -> Counted:
        return Counted(safe_open(*arguments, **keywords), taken)

    monkeypatch.setattr(checkpoint_module, "safe_open", counting)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", counting)
    config = DWDPConfig(group_size=2, num_local_experts=4, host_experts=2)
    with keeping(), pytest.raises(ExchangeError, match=f"rank {1 - rank}"):
        load(published / name, config, rank, timeout=0.1, rendezvous=tmp_path / "group")
    stored = tensors_of(published / name)
    assert taken.keys() <= stored.keys()
    for tensor, whole in stored.items():
        number = re.search(r"\.experts\.(\d+)\.", tensor)
        if number:
            share = float(int(number[1]) in own)
        elif ".experts." in tensor:
            share = len(own) / NUM_EXPERTS
        else:
            share = 1.0
        assert taken.get(tensor, 0) == pytest.approx(share * whole.nbytes), tensor


# -- where it keeps FP8 ------------------------------------------------------------------------------------------------


def test_a_whole_model_in_fp8_is_spread(published: Path, tmp_path: Path) -> None:
    with keeping_fp8():
        model = whole_model(published / FP8)
        wanted = logits(model)
        attach(model, DWDPRuntime(ALONE, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)))
        with model.dwdp:
            assert torch.equal(logits(model), wanted)


# -- where it keeps MXFP4 ----------------------------------------------------------------------------------------------


def test_a_whole_model_in_mxfp4_is_spread(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with keeping_mxfp4():
        model = whole_model(published / MXFP4)
        wanted = logits(model)
        dequantised = logits(whole_model(published / MXFP4, quantization_config=transformers.Mxfp4Config(True)))
        torch.testing.assert_close(wanted, dequantised, rtol=0.05, atol=0.05)  # so the kernels compute what they should
        attach(model, DWDPRuntime(ALONE, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)))
        with model.dwdp:
            assert torch.equal(logits(model), wanted)
    assert "become" not in caplog.text, "nothing is dequantised"


def test_what_kernels_hold_of_a_spread_model(published: Path) -> None:
    """Between passes their objects have no bytes to give, and they keep none of a pass, which would keep it mapped."""
    with keeping_mxfp4():
        model = load(published / MXFP4)
        experts = model.model.layers[1].mlp.experts
        held = [experts.gate_up_proj.storage, experts.down_proj_precision_config.weight_scale.storage]
        for _ in range(2):
            for storage in held:
                assert storage.data.dtype == torch.uint8
                with pytest.raises(StateError, match=r"layers\.1\.mlp\.experts\.\w+ is spread over the group"):
                    storage.data.sum()
            logits(model)
        with pytest.raises(StateError, match="in no state dict"):
            model.state_dict()
        assert not model.dwdp.close().open()


def test_the_routing_that_kernels_want_tells_which_experts_are_chosen() -> None:
    of_token = torch.tensor([[4, 1], [1, 0], [2, 4]])
    scores = torch.zeros(3, 5).scatter(1, of_token, torch.tensor([[3.0, 2.0]]).expand(3, 2))
    data, gather, scatter = KERNELS.routing.routing(scores, 2)
    tokens, top_k, chosen = routing_of((torch.zeros(3, 8), data, gather), {"scatter_idx": scatter}, counted=True)
    assert (tokens, top_k) == (3, 2)
    assert chosen is not None
    assert torch.equal(chosen, of_token)
    assert routing_of((torch.zeros(3, 8), data, gather, scatter), {}, counted=False) == (3, 2, None)


# -- what is refused -------------------------------------------------------------------------------------------------


def describe(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def by(method: str) -> Callable[[Path], None]:
    return lambda folder: describe(folder, lambda config: config["quantization_config"].update(quant_method=method))


def hidden_in_a_part(folder: Path) -> None:
    def move(config: dict[str, Any]) -> None:
        config["audio_config"] = {"quantization_config": config.pop("quantization_config")}

    describe(folder, move)


def without_a_scale(folder: Path) -> None:
    lost = "model.layers.1.mlp.experts.4.up_proj.weight_scale_inv"
    index = json.loads((folder / INDEX_FILE).read_text())
    file = folder / index["weight_map"].pop(lost)
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (by("gptq"), "quantised by gptq; supported here are fp8, mxfp4, compressed-tensors"),
        (by("bitsandbytes"), "quantised by bitsandbytes"),
        (hidden_in_a_part, "part of config.json in which transformers does not look"),
        (without_a_scale, r"has no model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight_scale_inv"),
    ],
)
@pytest.mark.usefixtures("open_descriptors")
def test_a_checkpoint_that_cannot_be_spread(tmp_path: Path, spoil: Callable[[Path], None], named: str) -> None:
    spoil(save(FP8, tmp_path / "model"))
    with pytest.raises(ConfigError, match=named):
        load(tmp_path / "model")


def test_mxfp4_whose_kernels_cannot_be_had(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_kernel(*_: Any, **__: Any) -> NoReturn:
        raise HTTPError("Name or service not known")

    with keeping_mxfp4():
        monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
        with pytest.raises(ConfigError, match=r"something of Hugging Face's hub.*\(Name or service not known\)"):
            load(published / MXFP4)
        config = transformers.Mxfp4Config(dequantize=True)
        model = load(published / MXFP4, quantization_config=config)
        with model.dwdp:
            assert torch.equal(logits(model), logits(whole_model(published / MXFP4, quantization_config=config)))


def test_mxfp4_on_another_device_than_its_kernels(tmp_path: Path) -> None:
    stated = SimpleNamespace(dequantize=False, quant_method="mxfp4")
    quantizer = SimpleNamespace(pre_quantized=True, quantization_config=stated)
    with pytest.raises(ConfigError, match=r"here, not for meta.*Mxfp4Config\(dequantize=True\)"):
        require_spreadable(tmp_path, {}, quantizer, torch.device("meta"))


class MixingLayout(StridedLayout):
    """Experts side by side in every row."""

    def swizzle_data(self, data: Tensor) -> Tensor:
        return data.movedim(0, -1).contiguous().movedim(-1, 0)


def test_kernels_in_whose_layout_experts_are_not_apart(published: Path) -> None:
    layout = SimpleNamespace(
        StridedLayout=StridedLayout, make_default_matmul_mxfp4_w_layout=lambda mx_axis: (MixingLayout, {})
    )
    kernels = SimpleNamespace(**{**vars(KERNELS), "tensor_details": SimpleNamespace(layout=layout)})
    with keeping_mxfp4(kernels), pytest.raises(ConfigError, match="the bytes of an expert are not together"):
        load(published / MXFP4)


def test_a_model_is_not_quantised_while_it_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="is not quantised"):
        load(tmp_path / "model", quantization_config=transformers.FineGrainedFP8Config())


def test_there_are_four_families() -> None:
    assert len({family for family, *_ in CHECKPOINTS.values()}) == 4


def test_compressed_tensors_that_would_be_decompressed_in_a_pass(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = save("qwen3_moe int4", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"CompressedTensorsConfig\(dequantize=True\)"):
        load(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=False))
