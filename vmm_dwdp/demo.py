"""``vmm-dwdp demo``: a group of ranks runs a model, each with its own prompt, and is compared with the whole model.

The reference is the unsharded model, run in this process over every rank's prompt with the same seed. Each rank is a
process of its own that holds its share of the experts. Identical means: the logits of every generated token are equal
bit by bit, and so is the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.handles import KINDS
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.console import group_progress, print_table, report_step, size, working
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.placement import ExpertPlacement
from vmm_dwdp.stats import Stats
from vmm_dwdp.testing import run_group
from vmm_dwdp.weight_spec import WeightSpec

MODEL: Final = Path(__file__).parent / "models" / "bytes-moe"
HOST_GRANULARITY: Final = 4 << 10  # the model is smaller than a page of 2 MiB per weight and layer
LARGE_WEIGHT: Final = 64 << 20  # bytes per weight and layer from which a group's shares fill pages on any GPU
NEW_TOKENS: Final = 96
RANDOM_NEW_TOKENS: Final = 16  # of a model with random weights, whose text nobody reads
STEPS: Final = ("starting", "loading", "generating", "done")
PROMPTS: Final = (
    "It is a truth universally acknowledged, that",
    "HAMLET\n",
    "She had been walking for some time when",
    "ROMEO\n",
    "The carriage was at the door, and",
    "KING HENRY V\n",
    "My dear sister,",
    "Enter three Witches",
)


@dataclass(frozen=True)
class Generated:
    """What one prompt was continued with."""

    prompt: str
    text: str
    logits: npt.NDArray[np.float32]  # [new tokens, vocabulary]: of every generated token, as `generate` saw them
    seconds: float

    def same(self, other: Generated) -> bool:
        return self.text == other.text and self.logits.tobytes() == other.logits.tobytes()


@dataclass(frozen=True)
class Job:
    """What a rank is told."""

    model: Path
    config: DWDPConfig
    device: str  # "cpu" or "cuda"
    granularity: int | None
    prompts: tuple[str, ...]  # by rank
    new_tokens: int
    directory: Path  # private to the group


@dataclass(frozen=True)
class RankResult:
    """What a rank returns."""

    device: str
    experts_held: int
    stats: Stats
    generated: Generated
    leaked: dict[str, int]

    def compared(self, rank: int, expected: Generated) -> RankReport:
        return RankReport(
            rank=rank,
            device=self.device,
            experts_held=self.experts_held,
            resident_bytes=self.stats.resident_bytes,
            staged_bytes=self.stats.staged_bytes,
            fetched_bytes=self.stats.fetched_bytes,
            hits=self.stats.hits,
            misses=self.stats.misses,
            exposed_wait_s=round(self.stats.exposed_wait_s, 6),
            tokens_per_s=round(len(self.generated.logits) / self.generated.seconds, 1),
            identical=self.generated.same(expected),
            prompt=self.generated.prompt,
            continuation=self.generated.text,
        )


@dataclass(frozen=True)
class RankReport:
    """One entry of ``ranks`` in what ``--json`` prints."""

    rank: int
    device: str
    experts_held: int  # of every layer
    resident_bytes: int
    staged_bytes: int
    fetched_bytes: int
    hits: int
    misses: int
    exposed_wait_s: float
    tokens_per_s: float
    identical: bool  # to what the whole model makes of the same prompt
    prompt: str
    continuation: str


@dataclass(frozen=True)
class Report:
    """What ``--json`` prints."""

    model: str
    device: str
    driver: str
    group_size: int
    identical: bool
    ranks: list[RankReport]
    leaked: dict[str, int]
    seconds: float

    def problems(self, *, fetching: bool) -> list[str]:
        """What is not as it has to be, a sentence each; with ``fetching`` every rank must have fetched something."""
        found = [f"{self.model}: rank {r.rank} differs from the whole model" for r in self.ranks if not r.identical]
        if fetching:
            idle = [r.rank for r in self.ranks if r.fetched_bytes == 0]
            found += [f"{self.model}: rank {rank} fetched nothing, so nothing was proved" for rank in idle]
        found += [f"{self.model}: {count} {kind} left after close" for kind, count in self.leaked.items() if count]
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a Hugging Face model (%(default)s)")
    parser.add_argument("--config", type=Path, help="YAML file of a DWDPConfig; the options below go before it")
    parser.add_argument("--group-size", type=int, help="number of ranks (4)")
    parser.add_argument("--num-local-experts", type=int, help="experts each rank holds of every layer (just enough)")
    parser.add_argument("--prefetch-depth", type=int, help="layers whose experts are fetched ahead (2)")
    parser.add_argument("--host-experts", type=int, help="experts of every layer that live in host memory (0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--prompt", action="append", help="may be repeated: one for each rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _quiet()
    config = config_from(arguments)
    prompts = tuple(itertools.islice(itertools.cycle(arguments.prompt or PROMPTS), config.group_size))
    reports = []
    with _models(arguments.model, config, device) as models:
        for model in models:
            given = model == arguments.model
            new_tokens = NEW_TOKENS if given else RANDOM_NEW_TOKENS
            report = compare(model, config, device, prompts, new_tokens, shown=not arguments.json)
            reports.append(report)
            if not arguments.json:
                _print(report, with_text=given)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(reports[-1])))
    staged = config.mode == "staged"  # read in place, nothing is fetched
    problems = [p for report in reports for p in report.problems(fetching=staged and report is reports[-1])]
    if not arguments.json:
        print("\n".join(problems) or "identical: the group computed what the whole model computes, bit by bit")
    return 1 if problems else 0


def compare(
    model: Path, config: DWDPConfig, device: str, prompts: tuple[str, ...], new_tokens: int, *, shown: bool
) -> Report:
    """Run the whole model and then the group, each rank with its prompt of ``prompts``.

    Progress is drawn if ``shown``. Nothing stays allocated.
    """
    start = time.monotonic()
    if device == "cpu":
        torch.set_num_threads(1)  # another number rounds sums differently; the ranks take this one over
    driver = open_driver(torch.device(device)).name
    with working("running the whole model", shown=shown):
        expected = _reference(model, device, prompts, new_tokens)
    with tempfile.TemporaryDirectory(prefix="vmm-dwdp-") as folder:
        granularity = HOST_GRANULARITY if device == "cpu" else None
        job = Job(model, config, device, granularity, prompts, new_tokens, Path(folder))
        with group_progress(job.directory, config.group_size, STEPS, shown=shown):
            results = run_group(functools.partial(_run_rank, job), config.group_size, device)
    ranks = [result.compared(rank, expected[rank]) for rank, result in enumerate(results)]
    return Report(
        model=model.name,
        device=device,
        driver=driver,
        group_size=config.group_size,
        identical=all(rank.identical for rank in ranks),
        ranks=ranks,
        leaked={kind: sum(result.leaked[kind] for result in results) for kind in KINDS},
        seconds=round(time.monotonic() - start, 3),
    )


def _run_rank(job: Job, rank: int) -> RankResult:
    """One process of the group: what it saw, what it generated, and what was left open after close."""
    from vmm_dwdp.integrations.transformers import from_pretrained

    _quiet()
    report_step(job.directory, rank, "loading")
    device = f"cuda:{torch.cuda.current_device()}" if job.device == "cuda" else "cpu"
    driver = open_driver(torch.device(device), job.granularity)
    model = from_pretrained(
        job.model, job.config, rank=rank, device=device, rendezvous=job.directory / "group", driver=driver, dtype="auto"
    )
    try:
        report_step(job.directory, rank, "generating")
        generated = _generate(model, _Text.of(job.model, model), job.prompts[rank], job.new_tokens)
        stats = model.dwdp.stats()
        held = len(model.dwdp.local_experts(0))
    finally:
        ledger = model.dwdp.close()
    report_step(job.directory, rank, "done")
    return RankResult(device, held, stats, generated, ledger.counts())


def _reference(path: Path, device: str, prompts: tuple[str, ...], new_tokens: int) -> list[Generated]:
    """What the whole model makes of each prompt."""
    import transformers

    from vmm_dwdp.integrations.transformers_experts import align_experts

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
    align_experts(model)
    text = _Text.of(path, model)
    return [_generate(model, text, prompt, new_tokens) for prompt in prompts]


class _Text:
    """Text to tokens and back: the model's own tokenizer, or bytes modulo the vocabulary where it has none."""

    def __init__(self, vocabulary: int, tokenizer: Any | None) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, path: Path, model: Any) -> _Text:
        import transformers

        has_tokenizer = any(path.glob("tokenizer*")) or (path / "vocab.json").exists()
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


def _generate(model: Any, text: _Text, prompt: str, new_tokens: int) -> Generated:
    """Continue ``prompt`` by exactly ``new_tokens`` as the model's generation config says, from a fixed seed."""
    tokens = text.encode(prompt)
    if not tokens:
        raise ConfigError("the prompt is empty")
    inputs = torch.tensor([tokens], device=model.device)
    torch.manual_seed(0)
    start = time.monotonic()
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    made = output.sequences[0, len(tokens) :].tolist()  # waits for the device
    seconds = time.monotonic() - start
    return Generated(prompt, text.decode(made), torch.cat(output.logits).float().cpu().numpy(), seconds)


def config_from(arguments: argparse.Namespace) -> DWDPConfig:
    """The config file, or the default group of four, with the options that were given in place of its values."""
    config = DWDPConfig.from_yaml(arguments.config) if arguments.config else DWDPConfig(group_size=4)
    names = ("group_size", "num_local_experts", "prefetch_depth", "host_experts")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(config, **given)


@contextmanager
def _models(model: Path, config: DWDPConfig, device: str) -> Iterator[tuple[Path, ...]]:
    """The folders to run: on a GPU, beside a model with small experts, a random one with large ones."""
    if _largest_weight(model, config) >= LARGE_WEIGHT or device == "cpu":
        yield (model,)
        return
    with tempfile.TemporaryDirectory(prefix="vmm-dwdp-") as folder:
        random = Path(folder) / "random weights"
        _save_random_model(random, device)
        yield (model, random)


def _largest_weight(path: Path, config: DWDPConfig) -> int:
    """Bytes of the largest expert weight of a layer. Reads no weights.

    Raises `ConfigError` if the folder holds no model with experts, or if ``config`` cannot spread them.
    """
    import transformers

    from vmm_dwdp.integrations.transformers_experts import find_experts

    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not the folder of a Hugging Face model: it has no config.json")
    model_config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=model_config.dtype)
    weights: list[WeightSpec] = [spec for experts in find_experts(model) for spec in experts.weights.values()]
    for spec in weights:
        ExpertPlacement(spec.num_experts, config)
    return max(spec.num_experts * spec.expert_nbytes for spec in weights)


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


def _quiet() -> None:
    """Progress bars and advice would be printed by every rank."""
    import transformers

    logging.getLogger("vmm_dwdp").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _print(report: Report, *, with_text: bool) -> None:
    title = f"{report.model}: {report.group_size} ranks on {report.device} ({report.driver} driver)"
    columns = ("rank", "on", "experts", "resident", "staged", "fetched", "hits", "misses", "waited", "tokens/s", "same")
    rows = [
        (
            str(r.rank),
            r.device,
            str(r.experts_held),
            size(r.resident_bytes),
            size(r.staged_bytes),
            size(r.fetched_bytes),
            str(r.hits),
            str(r.misses),
            f"{r.exposed_wait_s * 1e3:.1f} ms",
            f"{r.tokens_per_s:.1f}",
            "yes" if r.identical else "NO",
        )
        for r in report.ranks
    ]
    print_table(title, columns, rows)
    for r in report.ranks if with_text else ():
        print(f"\nrank {r.rank}: {r.prompt.strip()} ...")
        print(textwrap.indent(r.continuation.strip(), "    "))
    print()
