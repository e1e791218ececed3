"""Arguments of an engine with which its experts cannot be spread.

SGLang resolves its arguments step by step, and some set others. So they are checked where it looks at its own DWDP's,
which is early, once more when they are final, and where the first layer is constructed, however that came about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from vmm_dwdp.checkpoint import revision_of
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang import contract
from vmm_dwdp.integrations.sglang.schemes import NotServedError, require_served

# With these, expert weights would move, be shared out otherwise, come by another way or be read by another path. Here
# with the value, besides None and "none", with which they do nothing; what a user states comes before what follows.
_EXCLUDED: Final[dict[str, Any]] = {
    "lora_paths": None,
    "enable_lora": False,
    "enable_eplb": False,
    "elastic_ep_backend": None,
    "enable_elastic_expert_backup": False,
    "enable_two_batch_overlap": False,
    "enable_single_batch_overlap": False,
    "enable_memory_saver": False,
    "enable_paged_experts": False,
    "kt_weight_path": None,
    "speculative_algorithm": None,
    "cpu_offload_gb": 0,
    "offload_group_size": -1,
    "pp_size": 1,
    "dcp_size": 1,
    "moe_a2a_backend": None,
    "weight_cache_mode": "off",
    "startup_weight_load_mode": "serial",
    "checkpoint_engine_wait_weights_before_ready": False,
    "remote_instance_weight_loader_start_seed_via_transfer_engine": False,
    "enable_nvidia_megakernel": False,
    "enable_amd_monokernel": False,
    "enable_megamoe_for_layernorm_sp": False,
    "enforce_shared_experts_fusion": False,
}

# Those whose loader gives each expert to `FusedMoE.weight_loader`, or fills parameters without reading anything.
_LOAD_FORMATS: Final = frozenset(
    {
        *("auto", "pt", "safetensors", "npcache", "mistral", "dummy"),
        *("fastsafetensors", "instanttensor", "runai_streamer"),
    }
)


def check(server_args: Any, dwdp_size: int) -> None:
    """Raise `ConfigError` if the arguments, as far as they are resolved, leave no place for DWDP."""
    resolved = view(server_args)
    for name, neutral in _EXCLUDED.items():
        value = getattr(resolved, name, None)
        if value not in (neutral, None, "none"):
            raise ConfigError(f"DWDP cannot be used with {name}={value!r}")
    load_format = getattr(resolved.load_format, "value", resolved.load_format)
    if load_format not in _LOAD_FORMATS:
        raise ConfigError(
            f"DWDP cannot be used with load_format={load_format!r}, whose loader does not go by single experts; "
            f"it can with {', '.join(sorted(_LOAD_FORMATS))}"
        )
    if resolved.nnodes > 1:
        raise ConfigError(f"DWDP cannot be used with nnodes={resolved.nnodes}: its ranks map each other's memory")
    if dwdp_size <= 1:
        for name in ("dp_size", "attn_dp_size", "ep_size", "moe_dp_size"):
            if (getattr(resolved, name, 1) or 1) > 1:
                raise ConfigError(f"experts in host memory without --dwdp-size are not for {name} above 1")


def check_graphs(server_args: Any) -> None:
    """Raise `ConfigError` if the final arguments have prefill graphs in pieces, for which some ask by name."""
    prefill = view(server_args).cuda_graph_config.prefill.backend
    backend = getattr(prefill, "value", prefill)
    if backend not in (None, "disabled", "full"):
        raise ConfigError(
            f"DWDP cannot be used with prefill graphs of the backend {backend!r}: they are captured in pieces, and a "
            "pass is captured whole"
        )


def runner_for_gpt_oss(server_args: Any) -> str | None:
    """The MoE runner that SGLang chooses for gpt-oss on one GPU, where with expert parallelism it leaves it open.

    It takes ``--dwdp-size`` for expert parallelism, which this runner does not do; but each rank has all experts then.
    What it would take instead dequantises them to bf16.
    """
    from sglang.srt.utils.common import is_triton_kernels_available

    resolved, config = view(server_args), contract.model_config(server_args)
    in_mxfp4 = "GptOssForCausalLM" in config.hf_config.architectures and config.quantization == "mxfp4"
    left_open = resolved.moe_runner_backend == "auto" and is_triton_kernels_available()
    return "triton_kernel" if in_mxfp4 and left_open else None


def foretold(server_args: Any) -> NotServedError | None:
    """Why the experts will not be served, where the final arguments and the checkpoint's config already say it."""
    resolved, config = view(server_args), contract.model_config(server_args)
    try:
        require_served(resolved.quantization or config.quantization, resolved.moe_runner_backend)
    except NotServedError as not_served:
        return not_served
    return None


def revision(server_args: Any) -> str | None:
    """Of the checkpoint that the engine reads, for `DWDPRuntime.publish`, if that is a folder of safetensors files."""
    resolved = view(server_args)
    folder = Path(resolved.model_path)
    read = getattr(resolved.load_format, "value", resolved.load_format) in ("auto", "safetensors")
    return revision_of(folder) if read and any(folder.glob("*.safetensors")) else None


def static_fraction(server_args: Any) -> float:
    """The part of a GPU's memory that the engine gives to weights and the KV cache; the rest is for activations."""
    return float(view(server_args).mem_fraction_static or 1)


def shows_metrics(server_args: Any) -> bool:
    """Whether the engine's server answers with metrics."""
    return bool(view(server_args).enable_metrics)


def change(server_args: Any, name: str, value: object) -> None:
    """Change an argument before the engine publishes them: later versions record a change instead of making it."""
    try:
        from sglang.srt.arg_groups.overrides import declare_resolution
    except ImportError:  # 0.5.17
        server_args.override("vmm_dwdp", **{name: value})
    else:
        declare_resolution(server_args, "vmm_dwdp", **{name: value})


def view(server_args: Any) -> Any:
    """The arguments as far as they are resolved."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(server_args)
