"""Every family of transformers that has experts: a tiny random model of each, whole and spread over real processes.

    python tests/families.py                        all of them, some minutes
    python tests/families.py qwen3_moe jetmoe       these families
    python tests/families.py --group-size 3 --host-experts 1
    python tests/families.py --group-size 1 --host-experts 6 --expert-bank 16777216     in place, looked up in a bank

Each is saved by `save_pretrained`, loaded whole by transformers, and loaded by each rank; every bit of their logits is
compared with the whole model's.

identical        as they are
by alignment     once the whole model's experts start where torch would put them: transformers leaves those that need no
                 conversion in the mapped file, at any address, where kernels of a CPU may round otherwise
refused          by a sentence, which is printed
not tried        transformers itself does not run it with tokens alone in this environment; what it said is printed
no experts       though its family has
DIFFERENT        and an exit status of 1
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from support.every_family import heads, tiny_config
from support.groups import PAGE
from support.moe_models import prompt
from torch import Tensor
from transformers import PreTrainedModel

from vmm_dwdp import ConfigError, DWDPConfig
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import from_pretrained
from vmm_dwdp.integrations.transformers.experts import align_experts
from vmm_dwdp.testing import run_group

IDENTICAL, ALIGNED, REFUSED, UNTRIED, DIFFERENT = "identical", "by alignment", "refused", "not tried", "DIFFERENT"
WITHOUT = "no experts"
Outcome = tuple[str, str]  # one of these, and what was said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="a folder of transformers/models (default: all)")
    parser.add_argument("--group-size", type=int, default=2)
    parser.add_argument("--host-experts", type=int, default=0, help="of seven")
    parser.add_argument("--expert-bank", type=int, default=0, help="bytes; experts are read in place then")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # each rank's too: a thread more and a sum may be another
    asked = [head for head in heads() if not options.families or head[0] in options.families]
    if unknown := set(options.families) - {family for family, _ in asked}:
        parser.error(f"transformers {transformers.__version__} has no experts in: {', '.join(sorted(unknown))}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {model.__name__: _whole(model, Path(folder) / model.__name__) for _, model in asked}
        saved = [name for name, outcome in outcomes.items() if outcome is None]
        config = DWDPConfig(
            group_size=options.group_size,
            host_experts=options.host_experts,
            mode="in_place" if options.expert_bank else "staged",
            expert_bank=options.expert_bank,
        )
        ranks = run_group(
            functools.partial(_spread, folder=Path(folder), names=saved, config=config), config.group_size
        )
    outcomes |= {name: _worst([rank[name] for rank in ranks]) for name in saved}
    return _report([(family, model.__name__) for family, model in asked], outcomes, time.monotonic() - began)


def _whole(kind: type[PreTrainedModel], folder: Path) -> Outcome | None:
    """Save a random model, and its logits as it is loaded and with aligned experts. An outcome if it does not run."""
    try:
        torch.manual_seed(0)
        model = kind(tiny_config(kind.config_class)).eval()
        if not _experts(model):
            return WITHOUT, "although its family has"
        for weight in _experts(model):
            weight.data.normal_(0, 0.2)
        model.save_pretrained(folder)
        loaded = kind.from_pretrained(folder).eval()
        mapped = any(map(_is_mapped, _experts(loaded)))
        whole = _logits(loaded)
        with contextlib.suppress(ConfigError):  # it has no stacked experts: ranks will refuse it
            align_experts(loaded)
        torch.save({"as loaded": whole, "aligned": _logits(loaded), "mapped": mapped}, folder / "logits")
    except Exception as error:  # whatever transformers raises
        return UNTRIED, f"{type(error).__name__}: {error}"
    return None if whole.isfinite().all() else (UNTRIED, "its logits are not finite")


def _experts(model: PreTrainedModel) -> list[Tensor]:
    modules = [module for module in model.modules() if "Experts" in type(module).__name__]
    return [parameter for module in modules for parameter in module.parameters()]


def _is_mapped(weight: Tensor) -> bool:
    """Whether it lies in a file of the checkpoint: transformers had nothing to convert."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, _, last = line.partition(" ")[0].partition("-")
        if int(first, 16) <= weight.data_ptr() < int(last, 16):
            return line.endswith(".safetensors")
    return False


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(1)  # a diffusion model draws its first canvas
    tokens: dict[str, Any] = {"input_ids": prompt()}
    if model.config.is_encoder_decoder:
        tokens["decoder_input_ids"] = prompt()
    logits: Tensor = model(**tokens, use_cache=False).logits
    return logits


def _spread(rank: int, folder: Path, names: list[str], config: DWDPConfig) -> dict[str, Outcome]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return {name: _one(folder / name, config, rank) for name in names}


def _one(folder: Path, config: DWDPConfig, rank: int) -> Outcome:
    whole = torch.load(folder / "logits")
    load: Callable[..., PreTrainedModel] = functools.partial(from_pretrained, driver=HostDriver(PAGE), timeout=60)
    try:
        model = load(folder, config, rank=rank, device="cpu", rendezvous=folder / "group")
    except ConfigError as error:
        return REFUSED, str(error)
    with model.dwdp:
        logits = _logits(model)
        said = f"{len(model.dwdp.stats().layers)} layers" + ", in the mapped file" * whole["mapped"]
    if torch.equal(logits, whole["as loaded"]):
        return IDENTICAL, said
    return (ALIGNED if torch.equal(logits, whole["aligned"]) else DIFFERENT), said


def _worst(outcomes: list[Outcome]) -> Outcome:
    """Of the ranks: all have to be identical, and where one refuses all have to."""
    kinds = {kind for kind, _ in outcomes}
    if REFUSED in kinds and len(kinds) > 1:
        return DIFFERENT, "a rank refuses what another takes"
    return max(outcomes, key=lambda outcome: (DIFFERENT, ALIGNED, IDENTICAL, REFUSED).index(outcome[0]) * -1)


def _report(asked: list[tuple[str, str]], outcomes: dict[str, Outcome | None], seconds: float) -> int:
    counted: Counter[str] = Counter()
    for family, name in asked:
        kind, said = outcomes[name] or (DIFFERENT, "no outcome")
        counted[kind] += 1
        print(f"{kind:<13}{family:<24}{name:<52}{' '.join(said.split())[:240]}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {len(asked)} heads of ", end="")
    print(f"{len({family for family, _ in asked})} families in {seconds:.0f} s: ", end="")
    print(", ".join(f"{number} {kind}" for kind, number in counted.items()))
    return 1 if counted[DIFFERENT] else 0


if __name__ == "__main__":
    sys.exit(main())
