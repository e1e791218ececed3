"""What the demo runs: which models, how a prompt becomes tokens, and how it is continued."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from vmm_dwdp.cli.demo_decoding import Capture, Decoding, has_static_cache
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.layout.placement import ExpertPlacement
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.temporary import temporary_folder

LARGE_WEIGHT: Final = 64 << 20  # bytes per weight and layer from which a group's shares fill pages on any GPU


@dataclass(frozen=True)
class Generated:
    """What one prompt was continued with."""

    prompt: str
    text: str
    logits: npt.NDArray[np.float32]  # [new tokens, vocabulary]: of every generated token, as `generate` saw them
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return round(len(self.logits) / self.seconds, 1)

    def same(self, other: Generated) -> bool:
        return self.text == other.text and self.logits.tobytes() == other.logits.tobytes()


def continue_by_the_whole(path: Path, device: str, prompts: tuple[str, ...], new_tokens: int) -> list[Generated]:
    """What the whole model makes of each prompt."""
    import transformers

    from vmm_dwdp.integrations.transformers.experts import align_experts

    with _named(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
    align_experts(model)
    text = Text.of(path, model)
    return [Continuation(model, text, prompt, new_tokens).generate() for prompt in prompts]


class Text:
    """Text to tokens and back: the model's own tokenizer, or bytes modulo the vocabulary where it has none."""

    def __init__(self, vocabulary: int, tokenizer: Any | None) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, path: Path, model: Any) -> Text:
        import transformers

        has_tokenizer = any(path.glob("tokenizer*")) or (path / "vocab.json").exists()
        with _named(path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path) if has_tokenizer else None
        return cls(model.config.get_text_config().vocab_size, tokenizer)

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return [byte % self._vocabulary for byte in text.encode()]
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return bytes(token % 256 for token in tokens).decode(errors="replace")
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Continuation:
    """A prompt that a model continues as its generation config says, as often as it is asked, from a fixed seed.

    By a loop of our own where the model has a static cache, else by transformers' own.

    Args:
        new_tokens: the most that are asked for.
    """

    def __init__(self, model: Any, text: Text, prompt: str, new_tokens: int) -> None:
        tokens = text.encode(prompt)
        if not tokens:
            raise ConfigError("the prompt is empty")
        self._model, self._text, self._prompt, self._new_tokens = model, text, prompt, new_tokens
        self._inputs = torch.tensor([tokens], device=model.device)
        self._decoding = Decoding(model, len(tokens) + new_tokens) if has_static_cache(model) else None

    def generate(self, new_tokens: int | None = None) -> Generated:
        """By exactly ``new_tokens``, or by the most."""
        new_tokens = new_tokens or self._new_tokens
        torch.manual_seed(0)
        start = time.monotonic()
        output = self._model.generate(
            self._inputs,
            attention_mask=torch.ones_like(self._inputs),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            num_beams=1,
            custom_generate=self._decoding,
            return_dict_in_generate=True,
            output_logits=True,
        )
        made = output.sequences[0, self._inputs.shape[1] :].tolist()  # waits for the device
        seconds = time.monotonic() - start
        logits = torch.cat(output.logits).float().cpu().numpy()
        return Generated(self._prompt, self._text.decode(made), logits, seconds)

    def capture(self, capture: Capture) -> None:
        """Generate by replays of what ``capture`` makes of a step from now on; something was generated before.

        Raises:
            StateError: the model has no static cache, or a step of it cannot be captured. It generates as before.
        """
        if self._decoding is None:
            raise StateError(f"transformers has no static cache for {type(self._model).__name__}")
        try:
            self._decoding.capture(capture)
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            raise StateError(f"a step of {type(self._model).__name__} cannot be captured: {first}") from error


@contextmanager
def models_to_run(model: Path, config: DWDPConfig, device: str) -> Iterator[tuple[Path, ...]]:
    """The folders to run: on a GPU, beside a model with small experts, a random one with large ones."""
    if _largest_weight(model, config) >= LARGE_WEIGHT or device == "cpu":
        yield (model,)
        return
    with temporary_folder() as folder:
        random = folder / "random weights"
        _save_random_model(random, device)
        yield (model, random)


def _largest_weight(path: Path, config: DWDPConfig) -> int:
    """Bytes of the largest expert weight of a layer. Reads no weights.

    Raises `ConfigError` if the model has no experts, or if ``config`` cannot spread them.
    """
    import transformers

    from vmm_dwdp.integrations.transformers.experts import find_experts

    with _named(path), torch.device("meta"):
        model_config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=model_config.dtype)
    weights: list[WeightSpec] = [spec for experts in find_experts(model) for spec in experts.weights.values()]
    for spec in weights:
        ExpertPlacement(spec.num_experts, config)
    return max(spec.num_experts * spec.expert_nbytes for spec in weights)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What transformers raises over a folder becomes one sentence that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"transformers cannot load {path}: {str(error).strip().partition(chr(10))[0]}") from error


def _save_random_model(folder: Path, device: str) -> None:
    """A Qwen3-MoE of 4 layers whose smaller expert weight, ``down_proj``, takes `LARGE_WEIGHT` bytes a layer."""
    import transformers

    hidden, experts = 1024, 16
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=LARGE_WEIGHT // (experts * hidden * torch.bfloat16.itemsize),
        norm_topk_prob=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def quiet_transformers() -> None:
    """Progress bars and advice would be printed by every rank. Raises `ConfigError` if transformers is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("the demo needs transformers: pip install 'vmm-dwdp[hf]'") from error

    logging.getLogger("vmm_dwdp").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that older ones want
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
