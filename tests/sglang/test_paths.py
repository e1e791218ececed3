"""Who reads expert weights in SGLang: a new place fails here, until somebody has looked whether it waits for them.

The manager acquires a layer around its quantisation method's `apply`. A module that is not listed here and names
``w13_weight`` may read weights past it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

# Loaders and names of checkpoint tensors: they run before the layers are bound.
LOADING = {
    "models/deepseek_common/deepseek_weight_loader.py",
    "models/deepseek_v2.py",
    "models/gemma4_causal.py",
    "models/gemma4_diffusion.py",
    "models/gemma4_mm.py",
    "models/glm5_next.py",
    "models/gpt_oss.py",
    "models/inkling.py",
    "models/inkling_common/dense_mlp.py",
    "models/inkling_common/moe.py",
    "models/inkling_common/quantization/quant.py",
    "models/interns2_mobius.py",
    "models/iquest_q1.py",
    "models/lfm2_moe.py",
    "models/longcat_flash.py",
    "models/muse_spark.py",
    "models/nemotron_h.py",
    "models/qwen3_5.py",
    "models/qwen3_5_mtp.py",
    "models/qwen3_omni_moe.py",
    "models/qwen3_vl_moe.py",
    "models/step3p5_mtp.py",
    "models/zaya.py",
}
# Quantisation methods and MoE runners: called from `apply`, or not in the table of schemes.
BEHIND_APPLY = ("layers/quantization/", "layers/moe/moe_runner/", "hardware_backend/")
BEHIND_APPLY_MODULES = {
    "layers/moe/fused_moe_native.py",
    "layers/moe/fused_moe_triton/aiter_mxfp4_w4a8_moe.py",
    "layers/moe/fused_moe_triton/layer.py",
}
# Refused: LoRA, offloading and SGLang's own DWDP by their arguments; other all-to-all backends, which `--dwdp-size`
# forces off and which have no runner in the table; models with kernels of their own by the manager. Whoever gets past
# finds tensors without bytes.
REFUSED = ("lora/", "layers/muse_spark/")
REFUSED_MODULES = {
    "layers/moe/dwdp/dwdp_manager.py",
    "layers/moe/ep_moe/layer.py",
    "layers/moe/flashinfer_megamoe.py",
    "layers/moe/mega_moe.py",
    "layers/moe/mega_moe_flydsl.py",
    "layers/moe/mega_moe_sm90.py",
    "layers/moe/qwen4_decode.py",
    "models/beam.py",
    "models/qwen4_exp.py",
    "utils/offloader.py",
}


def test_every_reader_of_expert_weights_is_known() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent / "srt"
    known = LOADING | BEHIND_APPLY_MODULES | REFUSED_MODULES
    readers = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"\bw13_weight\b", path.read_text(encoding="utf-8"))
    }
    assert len(readers) > 50
    assert {reader for reader in readers if not reader.startswith(BEHIND_APPLY + REFUSED)} <= known
