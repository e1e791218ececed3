"""A model scored twice: whole, and with its experts spread over a group. The scores must be equal, to the last bit.

text     of a text cut into windows, each without context: nats a token, and the share of tokens that the model thinks
         most likely. The windows are dealt to the ranks. Equal is asked of every window's loss. Without ``--text`` the
         text is the beginning of Alice's Adventures in Wonderland, which the demo's model has not seen.
gsm8k    with ``--gsm8k FOLDER``, which has train.jsonl and test.jsonl: exact match by lm-eval's task of that name, on
         the whole model and on rank 0. Needs the package lm-eval, and a model with a tokenizer.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
import yaml
from common import Row, parser, report

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.cli.demo import MODEL
from vmm_dwdp.cli.demo_group import HOST_GRANULARITY
from vmm_dwdp.cli.demo_models import Text, quiet_transformers
from vmm_dwdp.integrations.transformers import from_pretrained
from vmm_dwdp.integrations.transformers.experts import align_experts
from vmm_dwdp.testing import run_group

ALICE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do:
once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and
what is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid),
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her.
"""


class Task(NamedTuple):
    """What a process is told."""

    model: Path
    device: str
    text: str
    window: int  # tokens
    gsm8k: Path | None
    limit: int | None  # questions


class Scores(NamedTuple):
    """Of some windows, and of all questions."""

    nats: list[float]  # of each window, the sum over its tokens
    right: int  # tokens
    tokens: int
    exact_match: float | None


def score(model: Any, task: Task, first: int, step: int) -> Scores:
    """Every ``step``-th window, from the ``first`` on; the questions where ``first`` is 0."""
    tokens = Text.of(task.model, model).encode(task.text)
    windows = [tokens[i : i + task.window] for i in range(0, len(tokens) - 1, task.window)][first::step]
    nats, right, counted = [], 0, 0
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window], device=model.device)
            logits, expected = model(ids).logits[0, :-1].float(), ids[0, 1:]
            nats.append(F.cross_entropy(logits, expected, reduction="sum").item())
            right += int((logits.argmax(-1) == expected).sum())
            counted += len(expected)
    return Scores(nats, right, counted, gsm8k(model, task) if task.gsm8k and first == 0 else None)


def gsm8k(model: Any, task: Task) -> float:
    """The share of answers that match, as lm-eval takes them out of what the model writes."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    assert task.gsm8k is not None
    files = {split: str((task.gsm8k / f"{split}.jsonl").resolve()) for split in ("train", "test")}
    task_of_lm_eval = Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml"
    questions = {"include": str(task_of_lm_eval), "task": "gsm8k", "dataset_path": "json", "dataset_name": None}
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as stated:
        yaml.safe_dump(questions | {"dataset_kwargs": {"data_files": files}}, stated)
        stated.flush()
        lm = HFLM(model, tokenizer=tokenizer, batch_size=1)
        evaluated = lm_eval.simple_evaluate(lm, tasks=[stated.name], limit=task.limit)
    return float(evaluated["results"]["gsm8k"]["exact_match,flexible-extract"])


def score_whole(task: Task) -> Scores:
    model = transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype="auto").to(task.device).eval()
    align_experts(model)
    return score(model, task, 0, 1)


def score_rank(task: Task, config: DWDPConfig, rendezvous: str, rank: int) -> Scores:
    quiet_transformers()
    driver = open_driver(torch.device(task.device), HOST_GRANULARITY if task.device == "cpu" else None)
    model = from_pretrained(
        task.model, config, rank=rank, device=driver.device, rendezvous=rendezvous, driver=driver, dtype="auto"
    )
    with model.dwdp:
        return score(model, task, rank, config.group_size)


def merged(ranks: list[Scores]) -> Scores:
    """The windows of all ranks in the order of the text."""
    count = sum(len(scores.nats) for scores in ranks)
    nats = [ranks[i % len(ranks)].nats[i // len(ranks)] for i in range(count)]
    right, tokens = (sum(getattr(scores, name) for scores in ranks) for name in ("right", "tokens"))
    return Scores(nats, right, tokens, ranks[0].exact_match)


def row(what: str, scores: Scores) -> Row:
    shown: dict[str, object] = {
        "model": what,
        "windows": len(scores.nats),
        "tokens": scores.tokens,
        "nats a token": sum(scores.nats) / scores.tokens,
        "right": scores.right / scores.tokens,
    }
    return shown if scores.exact_match is None else shown | {"gsm8k": scores.exact_match}


def main() -> int:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--model", type=Path, default=MODEL, help="folder of a Hugging Face model (the demo's)")
    arguments_of.add_argument("--group-size", type=int, default=2, help="ranks (default: 2)")
    arguments_of.add_argument("--host-experts", type=int, default=0, help="experts in host memory (default: 0)")
    arguments_of.add_argument("--text", type=Path, help="a file of text")
    arguments_of.add_argument("--window", type=int, default=128, help="tokens of a window (default: 128)")
    arguments_of.add_argument("--gsm8k", type=Path, metavar="FOLDER", help="with train.jsonl and test.jsonl")
    arguments_of.add_argument("--limit", type=int, help="questions of gsm8k (default: all)")
    arguments = arguments_of.parse_args()
    quiet_transformers()
    text = ALICE if arguments.text is None else arguments.text.read_text()
    task = Task(arguments.model, arguments.device.type, text, arguments.window, arguments.gsm8k, arguments.limit)
    config = DWDPConfig(group_size=arguments.group_size, host_experts=arguments.host_experts)
    whole = score_whole(task)
    with tempfile.TemporaryDirectory() as rendezvous:
        rank = functools.partial(score_rank, task, config, rendezvous)
        spread = merged(run_group(rank, config.group_size, arguments.device))
    identical = whole == spread
    report(arguments, {"text": [row("whole", whole), row("spread", spread)], "compared": [{"identical": identical}]})
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
