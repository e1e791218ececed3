"""The parts of the SGLang plugin that need no SGLang: per-expert tensors, the table of schemes, and the environment."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fused_moe import fused_moe, moe_layer, weight
from support.groups import PAGE

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.integrations.sglang import remedies, schemes, settings
from vmm_dwdp.integrations.sglang.expert_layer import ExpertLayer
from vmm_dwdp.integrations.sglang.expert_tensor import ExpertBlocks, find, places, replace
from vmm_dwdp.integrations.sglang.expert_view import ExpertView, ViewedRuntime
from vmm_dwdp.integrations.sglang.schemes import NotServedError, require_served, scheme_of, supported
from vmm_dwdp.integrations.sglang.settings import Stated
from vmm_dwdp.integrations.spread_tensor import SpreadTensor


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


DOCUMENT = Path(__file__).parents[3] / "docs/sglang.md"


def test_a_layer_has_the_scheme_of_its_method_and_runner() -> None:
    stated = SimpleNamespace(is_checkpoint_fp8_serialized=True)
    fp8 = {"use_mxfp8": False, "is_fp4_expert": False, "quant_config": stated}

    assert "w13_weight_scale_inv" in scheme_of(moe_layer("Fp8MoEMethod", "triton", block_quant=True, **fp8)).tensors
    assert "w13_weight_scale" in scheme_of(moe_layer("Fp8MoEMethod", "triton", block_quant=False, **fp8)).tensors
    held = SimpleNamespace(runner=SimpleNamespace(runner_backend=SimpleNamespace(value="marlin")))
    wna16 = type("CompressedTensorsWNA16MoE", (), vars(held))()
    assert "w13_weight_packed" in scheme_of(SimpleNamespace(quant_method=object(), scheme=wna16)).tensors
    awq = type("AWQMoEScheme", (), {"kernel": held})()
    assert "w13_qzeros" in scheme_of(SimpleNamespace(quant_method=object(), scheme=awq)).tensors


IN_WORDS = {
    "bf16": "bf16",
    "FP8, block scales": "fp8 block",
    "FP8, a scale per tensor": "fp8 tensor",
    "FP8, a scale per channel": "fp8 channel",
    "FP8 of compressed-tensors, block scales": "compressed fp8 block",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
    "INT4 or INT8 of compressed-tensors": "wna16",
    "AWQ": "awq",
    "GPTQ": "gptq",
}


def test_the_documented_rows_are_those_of_the_table() -> None:
    lines = re.findall(r"^\| (.+?) \| (`.+?`) \| .+? \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    rows = {
        (IN_WORDS[weights], runner.strip("`")): ran
        for weights, runners, ran in lines
        if weights in IN_WORDS
        for runner in runners.split(", ")
    }
    assert rows.keys() == set(supported())
    assert {row for row, ran in rows.items() if ran != "not run"} == schemes._RAN_ON_A_GPU


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (moe_layer("BlockInt8MoEMethod", "triton"), "experts of BlockInt8MoEMethod with the MoE runner triton"),
        (moe_layer("Mxfp4MoEMethod", "triton"), r"experts of Mxfp4MoEMethod \(mxfp4\) with the MoE runner triton"),
        (SimpleNamespace(quant_method=object()), "experts of object with the MoE runner none"),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_name(layer: SimpleNamespace, sentence: str) -> None:
    with pytest.raises(NotServedError, match=f"DWDP cannot spread {sentence}$"):
        scheme_of(layer)


@pytest.mark.parametrize(
    ("quantization", "runner", "runners"),
    [
        (None, "flashinfer_trtllm", ("triton", "triton_kernel")),
        ("fp8", "cutlass", ("triton",)),
        ("fp8", "deep_gemm", None),
        ("mxfp4", "triton", ("marlin", "triton_kernel")),
        (None, "auto", None),
        ("fp8", "triton", None),
        ("modelopt_fp4", "triton", None),  # where the checkpoint leaves experts in bf16
        ("a quantisation of tomorrow", "triton", None),
    ],
)
def test_what_the_arguments_decide_is_foretold(
    quantization: str | None, runner: str, runners: tuple[str, ...] | None
) -> None:
    told = None
    try:
        require_served(quantization, runner)
    except NotServedError as not_served:
        told = not_served.runners
    assert told == runners


def test_what_to_type_is_said() -> None:
    not_served = NotServedError("DWDP cannot spread these", "cutlass", ("triton", "marlin"))
    runners = "--moe-runner-backend triton or --moe-runner-backend marlin"
    own = "DWDP cannot spread these, so SGLang's own DWDP runs instead of vmm-dwdp"
    assert remedies.fallback(not_served) == f"{own}; vmm-dwdp can with {runners}"
    assert remedies.refusal(not_served, SimpleNamespace()) == f"DWDP cannot spread these; it can with {runners}"

    gpt_oss = NotServedError("DWDP cannot spread these", "triton", ("marlin", "triton_kernel"))
    assert remedies.fallback(gpt_oss).endswith("with --moe-runner-backend auto or --moe-runner-backend marlin")
    gpt_oss = NotServedError("DWDP cannot spread these", "flashinfer_mxfp4", ("marlin", "triton_kernel"))
    assert remedies.fallback(gpt_oss).endswith("vmm-dwdp can with --moe-runner-backend marlin")

    with_none = NotServedError("DWDP cannot spread these", "triton")
    without = "DWDP cannot spread these; start without VMM_DWDP_CONFIG, and with SGLang's own --cpu-offload-gb"
    assert remedies.fallback(with_none) == own
    assert remedies.refusal(with_none, SimpleNamespace()) == without
    paged = SimpleNamespace(enable_paged_experts=False)
    assert remedies.refusal(with_none, paged) == f"{without} or --enable-paged-experts"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    """Of one GPU with all of four experts in host memory."""
    config = DWDPConfig(group_size=1, host_experts=4)
    with DWDPRuntime(config, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
        yield runtime


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"w13_weight": weight(4)}, "layer 3 has no tensor w2_weight, which its kernels read"),
        ({"w13_weight": weight(3), "w2_weight": weight(4)}, "w13_weight of layer 3 has 3 experts, not 4"),
        (
            {"w13_weight": weight(4, 1), "w2_weight": weight(4, 1)},
            "experts of layer 3 are smaller than a page",
        ),
    ],
)
def test_a_layer_that_is_not_as_the_table_says_is_refused(weights: dict[str, torch.Tensor], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ExpertLayer(fused_moe(4, 4, **weights), PAGE)


def test_post_processing_that_the_table_does_not_know_is_refused(runtime: DWDPRuntime) -> None:
    module = fused_moe(4, 4, w13_weight=weight(4), w2_weight=weight(4))
    layer = ExpertLayer(module, PAGE)
    layer.load(runtime)
    module.w13_weight.data = weight(4, 65)
    sentence = "an expert of w13_weight in layer 3 8320 bytes long; it was declared with 8192"
    with pytest.raises(ConfigError, match=sentence):
        layer.finish()
    del module.w13_weight
    with pytest.raises(ConfigError, match="post-processing of layer 3 removed w13_weight"):
        layer.finish()


def test_a_per_expert_tensor_that_the_table_does_not_know_is_not_served() -> None:
    module = fused_moe(4, 2, w13_weight=weight(2), w2_weight=weight(2), w2_luck=torch.zeros(2))
    before = module.w13_weight.data_ptr()
    with pytest.raises(NotServedError, match=r"layer 3 has a per-expert tensor w2_luck that DWDP does not know$"):
        ExpertLayer(module, PAGE)
    assert module.w13_weight.data_ptr() == before


def test_one_that_post_processing_made_is_refused(tmp_path: Path) -> None:
    module = fused_moe(4, 2, w13_weight=weight(2), w2_weight=weight(2))
    sentence = "layer 3 has a per-expert tensor w2_luck that DWDP does not know; start with VMM_DWDP_DISABLE=1"
    with DWDPRuntime(DWDPConfig(group_size=2), 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
        layer = ExpertLayer(module, PAGE)
        layer.load(runtime)
        module.w2_luck = torch.zeros(2)
        with pytest.raises(ConfigError, match=sentence):
            layer.finish()
        del module.w13_weight, module.w2_weight


def _numbered(layer: int, seed: int) -> torch.Tensor:
    return torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(10 * layer + seed)).to(torch.bfloat16)


@pytest.fixture
def viewed(tmp_path: Path) -> Iterator[tuple[ViewedRuntime, list[Any]]]:
    """A published runtime with more layers than slots, and its modules, in which views are."""
    config = DWDPConfig(group_size=1, host_experts=3, prefetch_depth=1, mode="auto")
    with ViewedRuntime(config, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
        modules = []
        layers = []
        for number in range(3):
            module = fused_moe(4, 4, w13_weight=weight(4), w2_weight=weight(4))
            module.layer_id = number
            module.w2_weight.weight_loader = "a loader"
            module.second_name = module.w2_weight  # as post-processing leaves some
            layers.append(ExpertLayer(module, PAGE))
            layers[-1].load(runtime)
            for seed, parameter in enumerate((module.w13_weight, module.w2_weight)):
                parameter.data.copy_(_numbered(number, seed))
            layers[-1].finish()
            modules.append(module)
        runtime.publish()
        for layer in layers:
            runtime.views[layer.number] = ExpertView(layer.module, layer._spread, runtime.device)
        yield runtime, modules
        for view in runtime.views.values():
            view.remove()


def _is_here(module: Any) -> bool:
    """Whether all of a layer's tensors are there, with their own bytes; else there must be none."""
    held = [module.w13_weight, module.w2_weight, module.second_name]
    assert [isinstance(tensor, torch.nn.Parameter) for tensor in held] == [True] * 3
    assert [tuple(tensor.shape) for tensor in held] == [(4, 64, 64)] * 3
    assert module.w2_weight.weight_loader == "a loader"
    if any(isinstance(tensor, SpreadTensor) for tensor in held):
        assert all(isinstance(tensor, SpreadTensor) for tensor in held)
        return False
    number = module.layer_id
    assert all(map(torch.equal, held, (_numbered(number, 0), _numbered(number, 1), _numbered(number, 1))))
    return True


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_layer_has_its_tensors_from_acquire_to_release(mode: Any, viewed: tuple[ViewedRuntime, list[Any]]) -> None:
    runtime, modules = viewed
    for module in modules * 2:
        assert not any(_is_here(each) for each in modules)
        with runtime.layer(module.layer_id, mode=mode):
            assert [_is_here(each) for each in modules] == [each is module for each in modules]
    with pytest.raises(KeyboardInterrupt), runtime.layer(0, mode=mode):
        raise KeyboardInterrupt
    assert not any(_is_here(each) for each in modules)


def test_a_first_pass_in_inference_mode_makes_no_inference_tensors(viewed: tuple[ViewedRuntime, list[Any]]) -> None:
    runtime, modules = viewed
    modes: list[Any] = ["staged", "in_place"]
    for mode in modes:
        with torch.inference_mode(), runtime.layer(0, mode=mode):
            assert not modules[0].w13_weight.is_inference()
    assert not modules[0].w13_weight.is_inference()


def test_a_pass_that_ends_early_leaves_no_tensors(viewed: tuple[ViewedRuntime, list[Any]]) -> None:
    runtime, modules = viewed
    runtime.acquire(0, mode="staged")
    with pytest.raises(StateError, match="acquired"):
        runtime.acquire(0, mode="staged")
    with pytest.raises(StateError, match="not acquired"):
        runtime.release(1)
    assert _is_here(modules[0])

    runtime.reset()

    assert not any(_is_here(each) for each in modules)


def test_what_fails_in_release_leaves_no_tensors(
    viewed: tuple[ViewedRuntime, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, modules = viewed

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for call in (lambda: runtime.release(0), runtime.reset):
        runtime.acquire(0, mode="staged")
        with monkeypatch.context() as patch:
            patch.setattr(DWDPRuntime, "release", fail)
            patch.setattr(DWDPRuntime, "reset", fail)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert not any(_is_here(each) for each in modules)
        runtime.reset()


def test_a_view_that_is_removed_leaves_what_it_found(viewed: tuple[ViewedRuntime, list[Any]]) -> None:
    runtime, modules = viewed
    with runtime.layer(0, mode="staged"):
        pass
    runtime.views[0].remove()

    assert type(modules[0].w13_weight) is torch.nn.Parameter
    assert modules[0].second_name is modules[0].w2_weight
    assert modules[0].w2_weight.shape[0] == 0


def test_a_tensor_that_cannot_be_exchanged_is_refused() -> None:
    class Computed:
        @property
        def data(self) -> torch.Tensor:
            return torch.zeros(4)

    layer: Any = torch.nn.Module()
    layer.storage = Computed()
    with pytest.raises(ConfigError, match=r"storage.data is made anew whenever it is asked for"):
        places(layer, "storage.data")


@pytest.mark.parametrize(
    ("written", "dwdp_size", "sentence"),
    [
        (
            "group_size: 1\nhost_experts: 4\nmode: in_place\nresident_cache: 4194304",
            1,
            "states resident_cache, but SGLang's layers do not tell which experts tokens use",
        ),
        ("group_size: 1\nhost_experts: auto\nnum_local_experts: 4", 1, "which leaves no number to num_local_experts"),
        ("group_size: 1\nnum_local_experts: auto", 1, "states group_size 1 and no host_experts"),
        (
            "group_size: 1\nhost_experts: 4\nkv_cache: 4 GB",
            1,
            "states kv_cache, which needs num_local_experts: auto or",
        ),
        ("group_size: 1\nhost_experts: auto\nkv_cache: 4 Gb", 1, "kv_cache: '4 Gb', which is no size such as 40 GB"),
        ("group_size: 1\nhost_experts: auto\nkv_cache: true", 1, "kv_cache: True, which is no size such as 40 GB"),
        ("group_size: 1\nhost_experts: auto\nkv_cache: 1\nmemory_bytes: 1", 1, "and no memory_bytes"),
        ("group_size: 2\nmode: in_place\nmovable_experts: true", 2, "movable_experts, but SGLang's layers do not map"),
        ("group_size: 1", 1, "states group_size 1 and no host_experts, so there is nothing to spread"),
        ("group_size: 4", 2, "states group_size 4, but --dwdp-size is 2"),
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
        settings.stated(dwdp_size)


def test_the_config_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.CONFIG, raising=False)

    assert settings.stated(4) == Stated(DWDPConfig(group_size=4, mode="auto"))


@pytest.mark.parametrize(
    ("written", "mode"),
    [
        ("group_size: 4", "auto"),
        ("group_size: 4\nassembly: vmm", "auto"),
        ("group_size: 4\nmode: staged", "staged"),
        ("group_size: 4\nmode: in_place\nprefetch_depth: 0", "in_place"),
        ("group_size: 1\nhost_experts: 4", "staged"),
    ],
)
def test_ranks_that_share_experts_choose_the_mode_of_each_pass(written: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "dwdp.yaml"
    path.write_text(written)

    assert settings.read(str(path)).config.mode == mode
    assert not settings.wanted(1)
