"""Cuts a recorded trace down to what is worth keeping: some sequences of each kind, the end of each prompt, the start
of what follows, and each token's experts in ascending order.

    python training/cut_trace.py OUTPUT/routing-0.01.npz benchmarks/traces/mixed-0.01.npz
"""

import argparse
import json
from pathlib import Path

import numpy as np
from traces import save_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recorded", type=Path)
    parser.add_argument("cut", type=Path)
    parser.add_argument("--sequences", type=int, default=4, help="of each kind, the first")
    parser.add_argument("--prefill", type=int, default=48, help="tokens of each prompt, the last")
    parser.add_argument("--decode", type=int, default=128, help="tokens of what follows, the first")
    given = parser.parse_args()
    with np.load(given.recorded) as trace:
        kinds, facts = trace["kinds"], json.loads(trace["facts"].item())
        kept = np.concatenate([np.flatnonzero(kinds == kind)[: given.sequences] for kind in dict.fromkeys(kinds)])
        phases = {
            "prefill": np.sort(trace["prefill"][kept, -given.prefill :], axis=-1),
            "decode": np.sort(trace["decode"][kept, : given.decode], axis=-1),
        }
    save_trace(given.cut, phases, kinds[kept].tolist(), facts)
    print(f"{given.cut}: {len(kept)} sequences, {given.cut.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
