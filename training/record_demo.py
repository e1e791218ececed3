"""Records which experts the demo's model chooses, on the ends of novels and plays, which it was not trained on.

    python training/record_demo.py OUTPUT/routing-demo.npz

Runs without a GPU. Downloads the texts as ``corpus.py`` does.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from corpus import HELD_OUT, novels, plays
from recorder import record
from traces import save_trace
from transformers import Qwen3MoeForCausalLM

MODEL = Path(__file__).parents[1] / "vmm_dwdp/models/bytes-moe"
TEMPERATURE = 0.8


def unseen(works: list[str]) -> torch.Tensor:
    """What ``corpus.py`` writes into held_out.txt of these works, a byte a token."""
    ends = "\n\n\n".join(work[round(len(work) * (1 - HELD_OUT)) :] for work in works)
    return torch.frombuffer(bytearray(ends.encode()), dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the trace")
    parser.add_argument("--sequences", type=int, default=16, help="of each kind")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        texts = {"novels": unseen([*novels(Path(downloads))]), "plays": unseen([*plays(Path(downloads))])}
    model = Qwen3MoeForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    config = model.config
    phases, kinds, _ = record(model, texts, arguments.sequences, config.max_position_embeddings // 2, TEMPERATURE)
    facts = {
        "device": "cpu",
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "temperature": TEMPERATURE,
    }
    save_trace(arguments.output, phases, kinds, facts)


if __name__ == "__main__":
    main()
