"""Trains a mixture of 128 experts, top 8, on text of eight kinds, and records which experts tokens choose.

Once for each weight of the balancing loss; recorded on text of each kind that was held out, in prefill and decode.

    python training/mixed_corpus.py build/mixed.tar.xz
    python training/train_routing.py build/mixed.tar.xz OUTPUT --seconds 540        # on a GPU

Each model begins with the same weights and sees the same text in the same order. ``--seconds`` bounds the whole run:
compiling, training (the time that is left, shared evenly) and recording. Of each weight, as soon as it is done:
OUTPUT/routing-WEIGHT.npz, the traces (``traces.py`` says in which form), and OUTPUT/routing-WEIGHT.json, the losses and
what the model writes. ``--save FOLDER`` keeps the models too.
"""

import argparse
import copy
import json
import math
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from grouped_experts import grouped_experts
from recorder import record, windows
from tokenizers import Tokenizer
from traces import save_trace
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

WARM_UP = 0.03  # of the training time
RESERVED = 45  # seconds, after each training, for losses and traces
TEMPERATURE = 0.8
CONFIG = Qwen3MoeConfig(
    hidden_size=512,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=128,
    norm_topk_prob=True,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
SMALL = {  # --small
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 64,
}

ALL_EXPERTS_FUNCTIONS.register("grouped_experts", grouped_experts)


class Corpus(NamedTuple):
    train: torch.Tensor  # int32 [tokens], on the device
    held_out: dict[str, torch.Tensor]  # by kind, likewise
    bytes_per_token: dict[str, float]  # of what is held out, by kind
    tokenizer: Tokenizer


def read_corpus(archive: Path, device: str) -> Corpus:
    """What ``mixed_corpus.py`` wrote."""
    with tarfile.open(archive) as opened:
        members = {member.name: opened.extractfile(member).read() for member in opened}
    about = json.loads(members["about.json"])

    def on_device(name: str) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(members[name], dtype="<u2").astype(np.int32)).to(device)

    held_out = {kind: on_device(f"held_out/{kind}.u16") for kind in about}
    per_token = {kind: facts["held_out_bytes"] / facts["held_out_tokens"] for kind, facts in about.items()}
    return Corpus(on_device("train.u16"), held_out, per_token, Tokenizer.from_str(members["tokenizer.json"].decode()))


def imbalance(router_logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """The sum over layers of the auxiliary loss of Switch Transformers (arXiv 2101.03961, equation 4), over the batch:
    experts x sum over experts of (share of the choices) x (mean probability). A layer that uses all alike adds 1."""
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, logits.topk(top_k, dim=-1).indices, 1 / top_k)
        total = total + logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum()
    return total


def keep_logits(router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
    """A hook. transformers' own recording of router logits breaks the graph of a compiled layer."""
    router.logits = output[0]


def model_with_logits(config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_experts")
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(keep_logits)
    return model


def losses(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats per token, and ``imbalance``."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        output = model(input_ids=tokens[:, :-1], use_cache=False)
    loss = F.cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    logits = [layer.mlp.gate.logits for layer in model.model.layers]
    return loss, imbalance(logits, model.config.num_experts_per_tok)


def compile_layers(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> None:
    """Compiles one layer for all of them, before any clock starts; where that fails, says why and stays eager."""
    start = time.monotonic()
    for layer in model.model.layers:
        layer.compile()
    try:
        sum(losses(model, tokens)).backward()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"not compiled: {type(error).__name__}: {str(error)[:2000]}", flush=True)
        for layer in model.model.layers:
            layer._compiled_call_impl = None
    model.zero_grad()
    print(f"{time.monotonic() - start:.0f} s until the first step", flush=True)


def train(
    model: Qwen3MoeForCausalLM, text: torch.Tensor, weight: float, seconds: float, batch: int, peak: float
) -> list[dict[str, float]]:
    """Trains in place for that many seconds of the clock; returns what was seen on the way, the last step last."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    random = torch.Generator(text.device).manual_seed(0)
    layers, context = model.config.num_hidden_layers, model.config.max_position_embeddings
    seen = []
    step, start = 0, time.monotonic()
    while (done := (time.monotonic() - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = peak * min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
        loss, balance = losses(model, windows(text, batch, context + 1, random))
        (loss + weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 100 == 0 or step == 10:
            seen.append(progress(step, step * batch * context, time.monotonic() - start, loss, balance / layers))
            if not math.isfinite(seen[-1]["loss"]):
                raise SystemExit(f"the loss is no number any more after {step} steps")
    seen.append(progress(step, step * batch * context, time.monotonic() - start, loss, balance / layers))
    return seen


def progress(step: int, tokens: int, seconds: float, loss: torch.Tensor, balance: torch.Tensor) -> dict[str, float]:
    values = {"seconds": seconds, "step": step, "tokens": tokens, "loss": loss.item(), "imbalance": balance.item()}
    print("  ".join(f"{name} {value:.6g}" for name, value in values.items()), flush=True)
    return values


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, text: torch.Tensor) -> float:
    """Nats per token over up to 64 windows as long as the model's context, each beginning without context."""
    context = model.config.max_position_embeddings
    count = min(64, (len(text) - 1) // context)
    inputs = text[: count * context].view(count, context).long()
    targets = text[1 : count * context + 1].view(count, context).long()
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        logits = model(input_ids=x, use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.numel()


def continuations(tokenizer: Tokenizer, kinds: list[str], written: torch.Tensor) -> dict[str, str]:
    """Of each kind the end of its first prompt, which is half of what was written, and how it goes on."""
    half = written.shape[1] // 2
    texts = {}
    for kind in dict.fromkeys(kinds):
        row = written[kinds.index(kind)].tolist()
        before, after = row[max(0, half - 48) : half], row[half : half + 160]
        texts[kind] = f"{tokenizer.decode(before)} >>> {tokenizer.decode(after)}"
    return texts


def finish(model: Qwen3MoeForCausalLM, corpus: Corpus, arguments: argparse.Namespace, facts: dict, name: str) -> None:
    """Writes losses, texts and traces of a trained model, of its weights in bfloat16 and of layers not compiled."""
    device = corpus.train.device
    saved = Qwen3MoeForCausalLM._from_config(model.config, dtype=torch.bfloat16).to(device).eval()
    saved.load_state_dict(model.state_dict())
    loss = {kind: held_out_loss(saved, text) for kind, text in corpus.held_out.items()}
    half = saved.config.max_position_embeddings // 2
    phases, kinds, written = record(saved, corpus.held_out, arguments.sequences, half, TEMPERATURE)
    texts = continuations(corpus.tokenizer, kinds, written)
    config = saved.config
    facts |= {
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "temperature": TEMPERATURE,
        "held_out_nats_per_token": loss,
        "held_out_bits_per_byte": {k: v / corpus.bytes_per_token[k] / math.log(2) for k, v in loss.items()},
    }
    save_trace(arguments.output / f"{name}.npz", phases, kinds, facts)
    (arguments.output / f"{name}.json").write_text(json.dumps(facts | {"texts": texts}, indent=1, ensure_ascii=False))
    print(f"held out, bits per byte: {facts['held_out_bits_per_byte']}")
    for kind, text in texts.items():
        print(f"--- {kind}: {text[:600]}", flush=True)
    if arguments.save:
        saved.save_pretrained(arguments.save / name)


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="what mixed_corpus.py wrote")
    parser.add_argument("output", type=Path, help="folder for traces and results")
    parser.add_argument("--seconds", type=float, default=540, help="of compiling, training and recording together")
    parser.add_argument("--balance", type=float, nargs="+", default=[0.01, 0.001], help="weights of the balancing loss")
    parser.add_argument("--batch", type=int, default=32, help="windows of the model's context a step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--sequences", type=int, default=8, help="of each kind, recorded")
    parser.add_argument("--save", type=Path, help="folder for the models")
    parser.add_argument("--small", action="store_true", help="a tiny model: the same program in seconds, without a GPU")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    corpus = read_corpus(arguments.corpus, device)
    config = copy.deepcopy(CONFIG)
    config.vocab_size = corpus.tokenizer.get_vocab_size()
    for name, value in SMALL.items() if arguments.small else ():
        setattr(config, name, value)  # as a dictionary the config has other names for some
    model = model_with_logits(config).to(device)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if device == "cuda":
        random = torch.Generator(device).manual_seed(2)
        compile_layers(model, windows(corpus.train, arguments.batch, config.max_position_embeddings + 1, random))
    left = begun + arguments.seconds - time.monotonic()
    seconds = max(left / len(arguments.balance) - (0 if arguments.small else RESERVED), 0.1)
    for weight in arguments.balance:
        print(f"balancing weight {weight}: {seconds:.0f} s", flush=True)
        model.load_state_dict(first)
        seen = train(model, corpus.train, weight, seconds, arguments.batch, arguments.learning_rate)
        facts = {
            "balancing_weight": weight,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "training": seen,
        }
        finish(model, corpus, arguments, facts, f"routing-{weight}")


if __name__ == "__main__":
    main()
