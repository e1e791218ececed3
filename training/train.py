"""Trains the byte-level mixture of experts of the demo, and saves it as any Hugging Face model is saved.

    python training/corpus.py build/corpus
    python training/train.py build/corpus vmm_dwdp/models/bytes-moe --seconds 130        # on a GPU

The learning rate follows the clock: it has fallen to zero when the seconds are over, however fast the machine is.
The report printed last (also written to ``--report FILE``) is what the card cites.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

CONTEXT = 512  # bytes
WARM_UP = 0.03  # of the whole time
PROMPTS = (
    "It is a truth universally acknowledged, that",
    "She had been walking for some time when",
    '"I cannot imagine," said Mr. Knightley,',
    "HAMLET\n",
)
CONFIG = Qwen3MoeConfig(
    vocab_size=256,  # a token is a byte
    hidden_size=240,  # with 40, no expert's weights fill whole pages of 4 KiB: shards get edges
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=40,
    norm_topk_prob=True,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def every_expert_on_every_token(
    experts: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The sum over the chosen experts as two dense products: at this size faster than gathering tokens by expert."""
    count = experts.num_experts
    weights = torch.zeros(len(hidden), count, dtype=hidden.dtype, device=hidden.device)
    weights = weights.scatter(1, top_k_index, top_k_weights.to(hidden.dtype))
    gate, up = F.linear(hidden, experts.gate_up_proj.flatten(0, 1)).view(len(hidden), count, 2, -1).unbind(2)
    inner = experts.act_fn(gate) * up * weights.unsqueeze(-1)
    return inner.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


ALL_EXPERTS_FUNCTIONS.register("every_expert_on_every_token", every_expert_on_every_token)


def windows(text: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` random runs of CONTEXT + 1 bytes, int64 ``[count, CONTEXT + 1]``."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), device=text.device)
    return text[starts + torch.arange(CONTEXT + 1, device=text.device)].long()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, text: torch.Tensor) -> float:
    """Nats per byte over the whole text, in windows of CONTEXT bytes that share only one byte."""
    whole = (len(text) - 1) // CONTEXT
    inputs = text[: whole * CONTEXT].view(whole, CONTEXT).long()
    targets = text[1 : whole * CONTEXT + 1].view(whole, CONTEXT).long()
    total = 0.0
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        logits = model(input_ids=x, use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.numel()


def losses(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats per byte, and the balance: ``num_experts_per_tok`` if all experts are used alike."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        output = model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    return loss, load_balancing_loss_func(output.router_logits, CONFIG.num_experts, CONFIG.num_experts_per_tok)


def train(model: Qwen3MoeForCausalLM, text: torch.Tensor, seconds: float, batch: int, peak: float) -> int:
    """Trains in place for that many seconds of the clock and returns the number of steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=text.is_cuda)
    step, start = 0, time.monotonic()
    while (done := (time.monotonic() - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = peak * min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
        loss, balance = losses(model, windows(text, batch))
        # Without the balance the router settles on a few experts and the others are never trained.
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 100 == 0 or step == 10:
            elapsed = time.monotonic() - start
            print(f"{elapsed:6.1f} s  step {step:5d}  loss {loss.item():.4f}  balance {balance.item():.3f}", flush=True)
    return step


@torch.no_grad()
def expert_shares(model: torch.nn.Module, text: torch.Tensor) -> list[float]:
    """For each layer the least used expert's share of the choices, over the uniform share: 1 is perfect balance."""
    tokens = text[: 64 * CONTEXT].view(64, CONTEXT).long()
    logits = model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    least = []
    for layer in logits:
        chosen = layer.topk(CONFIG.num_experts_per_tok, dim=-1).indices
        counts = torch.bincount(chosen.flatten(), minlength=CONFIG.num_experts).float()
        least.append(round((counts / counts.mean()).min().item(), 3))
    return least


@torch.no_grad()
def continuation(model: Qwen3MoeForCausalLM, prompt: str, length: int) -> str:
    tokens = torch.tensor([list(prompt.encode())], device=model.device)
    torch.manual_seed(0)
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length)
    return bytes(made[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with train.txt and held_out.txt")
    parser.add_argument("output", type=Path, help="folder the model is saved to")
    parser.add_argument("--seconds", type=float, default=130, help="time spent in training steps")
    parser.add_argument("--batch", type=int, default=128, help=f"windows of {CONTEXT} bytes a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--report", type=Path, help="JSON file")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    texts = {
        name: torch.frombuffer(bytearray((arguments.corpus / f"{name}.txt").read_bytes()), dtype=torch.uint8).to(device)
        for name in ("train", "held_out")
    }
    model = Qwen3MoeForCausalLM._from_config(CONFIG, experts_implementation="every_expert_on_every_token").to(device)
    if device == "cuda":
        for layer in model.model.layers:  # one layer is compiled once, for all
            layer.compile()
        sum(losses(model, windows(texts["train"], arguments.batch))).backward()  # compiles before the clock starts
        model.zero_grad()
    steps = train(model, texts["train"], arguments.seconds, arguments.batch, arguments.learning_rate)

    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    saved = Qwen3MoeForCausalLM.from_pretrained(arguments.output, dtype="auto").to(device).eval()
    report = {
        "parameters": sum(p.numel() for p in saved.parameters()),
        "file_bytes": (arguments.output / "model.safetensors").stat().st_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "steps": steps,
        "bytes_seen": steps * arguments.batch * CONTEXT,
        "held_out_nats_per_byte": held_out_loss(saved, texts["held_out"]),
        "train_nats_per_byte": held_out_loss(saved, texts["train"][: len(texts["held_out"])]),
        "least_used_expert": expert_shares(saved, texts["held_out"]),
        "continuations": [continuation(saved, prompt, 240) for prompt in PROMPTS],
    }
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=1))
    for name, value in report.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
