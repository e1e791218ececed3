"""What from_pretrained and attach read: transformers' own choice of files, the same on every rank, not quantised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.groups import PAGE, in_threads
from support.moe_models import logits, tiny_diffusion, tiny_model
from torch import nn
from transformers import PreTrainedModel

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.checkpoint import INDEX_FILE, SINGLE_FILE
from vmm_dwdp.integrations.transformers import attach, from_pretrained

ALONE = DWDPConfig(group_size=1, host_experts=3)
Change = Callable[[Path], object]


def load(directory: Path, config: DWDPConfig = ALONE, rank: int = 0, **kwargs: Any) -> PreTrainedModel:
    place: dict[str, Any] = {"rendezvous": directory / "rendezvous", **kwargs}
    return from_pretrained(directory, config, rank=rank, device="cpu", driver=HostDriver(PAGE), **place)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def times(directory: Path, factor: float) -> None:
    """Other weights of the same shapes."""
    tensors = load_file(directory / SINGLE_FILE)
    save_file({name: tensor * factor for name, tensor in tensors.items()}, directory / SINGLE_FILE, {"format": "pt"})


def describe(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


# -- the files that transformers reads -------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("named_by", ["config.json", "variant"])
def test_experts_come_from_the_file_that_transformers_chooses(saved: Path, named_by: str, beside: bool) -> None:
    """Whether an older file of the ordinary name lies beside it or not."""
    name = "model.new.safetensors"
    shutil.copy(saved / SINGLE_FILE, saved / name)
    times(saved, 0.5)
    if not beside:
        (saved / SINGLE_FILE).unlink()
    if named_by == "config.json":
        describe(saved, lambda config: config.update(transformers_weights=name))
    kwargs = {"variant": "new"} if named_by == "variant" else {}
    model = load(saved, **kwargs)
    with model.dwdp:
        assert torch.equal(logits(model), logits(tiny_model("qwen3_moe")))


def test_of_a_tensor_in_two_files_both_take_the_same(saved: Path) -> None:
    """A shard that was left over: transformers goes by files, and not by the index."""
    tensors = load_file(saved / SINGLE_FILE)
    (saved / SINGLE_FILE).unlink()
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, saved / "a.safetensors", {"format": "pt"})
    save_file(tensors, saved / "b.safetensors", {"format": "pt"})
    first = next(iter(tensors))
    weight_map = {name: "b.safetensors" if name == first else "a.safetensors" for name in tensors}
    (saved / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole = type(tiny_model("qwen3_moe")).from_pretrained(saved)
    model = load(saved)
    with model.dwdp:
        assert torch.allclose(logits(model), logits(whole), atol=1e-5)
        assert torch.equal(logits(model), logits(tiny_model("qwen3_moe")))


def as_pickle(directory: Path) -> None:
    torch.save(load_file(directory / SINGLE_FILE), directory / "pytorch_model.bin")


def only_as_pickle(directory: Path) -> None:
    as_pickle(directory)
    (directory / SINGLE_FILE).unlink()


def cut(directory: Path) -> None:
    file = directory / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])


def quantised_inside(directory: Path) -> None:
    describe(directory, lambda config: config.update(part={"quantization_config": {"quant_method": "fp8"}}))


def with_scales(dtype: torch.dtype, scale: str) -> Change:
    def change(directory: Path) -> None:
        tensors = load_file(directory / SINGLE_FILE)
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name.replace(".weight", scale)] = torch.ones(1)
            tensors[name] = tensors[name].to(dtype)
        save_file(tensors, directory / SINGLE_FILE, {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("spoil", "kwargs", "named"),
    [
        (as_pickle, {"use_safetensors": False}, r"pytorch_model\.bin"),
        (only_as_pickle, {}, r"pytorch_model\.bin"),
        (lambda directory: None, {"variant": "fp16"}, r"model\.fp16\.safetensors"),
        (cut, {}, SINGLE_FILE),
        (lambda directory: (directory / "adapter_config.json").write_text("{}"), {}, "adapter"),
        (quantised_inside, {}, "quantised"),
        (with_scales(torch.float8_e4m3fn, ".weight_scale_inv"), {}, r"config\.json does not say how.*_scale_inv"),
        (with_scales(torch.int8, ".weight_scale"), {}, r"I8 and has .*\.weight_scale beside"),
        (with_scales(torch.float8_e5m2, ".scales"), {}, "F8_E5M2"),
        (lambda directory: None, {"subfolder": "x"}, "subfolder"),
        (lambda directory: None, {"adapter_kwargs": {"revision": "x"}}, "adapter_kwargs"),
        (lambda directory: None, {"gguf_file": "x.gguf"}, "gguf_file"),
    ],
)
@pytest.mark.usefixtures("open_descriptors")
def test_what_would_mix_or_misread_weights_is_refused(
    saved: Path, spoil: Change, kwargs: dict[str, Any], named: str
) -> None:
    spoil(saved)
    with pytest.raises(ConfigError, match=named):
        load(saved, **kwargs)


@pytest.mark.parametrize(
    ("change", "kwargs"),
    [
        (lambda directory: describe(directory, lambda config: config.update(quantization_config=None)), {}),
        (lambda directory: None, {"device_map": None, "quantization_config": None, "output_loading_info": False}),
        (lambda directory: None, {"use_safetensors": True, "weights_only": True, "revision": "main"}),
    ],
)
def test_what_says_nothing_is_not_refused(saved: Path, change: Change, kwargs: dict[str, Any]) -> None:
    change(saved)
    model = load(saved, **kwargs)
    with model.dwdp:
        assert torch.equal(logits(model), logits(tiny_model("qwen3_moe")))


def test_eight_bits_without_scales_are_numbers_like_others(saved: Path) -> None:
    tensors = load_file(saved / SINGLE_FILE)
    eight = {name: t.to(torch.float8_e4m3fn) if ".experts." in name else t for name, t in tensors.items()}
    save_file(eight, saved / SINGLE_FILE, {"format": "pt"})
    whole = tiny_model("qwen3_moe")
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if ".experts." in name:
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
    model = load(saved)
    with model.dwdp:
        assert torch.equal(logits(model), logits(whole))


def test_two_threads_load_one_after_the_other(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While transformers loads, no model of the process ties its weights."""
    model_class = type(tiny_model("qwen3_moe"))
    own_load, ties = model_class._load_pretrained_model, PreTrainedModel.tie_weights
    inside: list[int] = []
    most: list[int] = []

    def load(*args: object) -> object:
        inside.append(1)
        most.append(len(inside))
        try:
            return own_load(*args)
        finally:
            inside.pop()

    monkeypatch.setattr(model_class, "_load_pretrained_model", staticmethod(load))
    config = DWDPConfig(group_size=1)
    models = in_threads(
        lambda rank: from_pretrained(saved, config, rank=0, device="cpu", rendezvous=tmp_path / str(rank)), 4
    )
    for model in models:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.dwdp.close()
    assert most == [1] * 4
    assert PreTrainedModel.tie_weights is ties


# -- ranks that were given different weights -------------------------------------------------------------------------

GROUP = DWDPConfig(group_size=2)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_attached_models_must_be_equal(tmp_path: Path, factor: float) -> None:
    models = [tiny_model("qwen3_moe") for _ in range(2)]
    with torch.no_grad():
        models[1].get_parameter("model.layers.2.mlp.experts.down_proj").mul_(factor)

    def spread(rank: int) -> bool:
        with DWDPRuntime(GROUP, rank, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
            try:
                attach(models[rank], runtime, timeout=30)
            except ExchangeError as error:
                return "differ" not in str(error)
            return True

    assert in_threads(spread, 2) == [factor == 1.0] * 2


# -- experts that two modules share ----------------------------------------------------------------------------------


def experts_of(model: PreTrainedModel) -> dict[int, int]:
    """Bytes of the whole model's experts, by parameter: one that is tied is there once."""
    named = model.named_parameters()
    return {id(p): p.numel() * p.element_size() for name, p in named if name.endswith(("gate_up_proj", "down_proj"))}


@torch.no_grad()
def canvas(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(1)  # the model draws its first canvas
    out: torch.Tensor = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
    return out


@pytest.mark.parametrize("how", ["from_pretrained", "attach"])
def test_tied_experts_are_spread_once(tmp_path: Path, how: str) -> None:
    whole = tiny_diffusion()
    config = DWDPConfig(group_size=1, prefetch_depth=1)
    if how == "from_pretrained":
        whole.save_pretrained(tmp_path)
        model = load(tmp_path, config)
    else:
        model = tiny_diffusion()
        attach(model, DWDPRuntime(config, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE)))
    with model.dwdp as runtime:
        sizes = experts_of(whole).values()
        assert len(runtime.stats().layers) == len(sizes) // 2
        assert runtime.stats().resident_bytes == sum(-(-size // PAGE) * PAGE for size in sizes)
        assert torch.equal(canvas(model), canvas(whole))


def test_experts_that_are_tied_and_yet_differ_are_spread_apart(tmp_path: Path) -> None:
    """As transformers does: of two that the checkpoint has, it ties none."""
    whole = tiny_diffusion()
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    own = {name: t for name, t in tensors.items() if "decoder" in name and name.endswith(("gate_up_proj", "down_proj"))}
    tensors.update({name.replace("decoder", "encoder.language_model"): tensor * 0.5 for name, tensor in own.items()})
    assert len(own) > 0
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    ordinary = type(whole).from_pretrained(tmp_path)
    for parameter in ordinary.parameters():
        parameter.data = parameter.data.clone()
    model = load(tmp_path)
    with model.dwdp:
        assert len(model.dwdp.stats().layers) == len(own)
        assert torch.equal(canvas(model), canvas(ordinary))
        assert not torch.equal(canvas(model), canvas(whole))


# -- adapters --------------------------------------------------------------------------------------------------------


class BaseTunerLayer:
    """What peft's adapters derive from."""


class Adapter(nn.Module, BaseTunerLayer):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


class Bystander(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.fixture
def model(saved: Path) -> Any:
    model = load(saved)
    with model.dwdp:
        yield model


def test_an_adapter_over_experts_is_refused_when_it_is_put_on(model: PreTrainedModel) -> None:
    wanted = logits(model)
    layer = model.get_submodule("model.layers.1")
    with pytest.raises(StateError, match=r"model\.layers\.1\.mlp\.experts cannot be adapted"):
        Adapter(layer.mlp.experts)
    assert Adapter(layer.self_attn.q_proj) is not None
    layer.mlp.experts = Bystander(layer.mlp.experts)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("experts", [False, True])
def test_lora_of_peft(model: PreTrainedModel, experts: bool) -> None:
    peft = pytest.importorskip("peft")

    def adapted(each: PreTrainedModel) -> Any:
        torch.manual_seed(3)
        parameters = {"target_parameters": ["mlp.experts.down_proj"]} if experts else {}
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **parameters)
        return peft.get_peft_model(each, config).eval()

    if experts:
        with pytest.raises(StateError, match="cannot be adapted"):
            adapted(model)
    else:
        assert torch.equal(logits(adapted(model)), logits(adapted(tiny_model("qwen3_moe"))))


def test_a_parametrisation_of_experts_gets_the_sentence(model: PreTrainedModel) -> None:
    with pytest.raises(StateError, match=r"model\.layers\.0\.mlp\.experts\.down_proj is spread over the group"):
        nn.utils.parametrizations.weight_norm(model.get_submodule("model.layers.0.mlp.experts"), "down_proj")
