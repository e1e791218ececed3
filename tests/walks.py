"""Random walks over everything that a group can be told, for a long time.

    python tests/walks.py --seconds 3600
    python tests/walks.py --seed 17 --walks 1 --processes     one of them again
    python tests/walks.py --seed 17 --steps 80                its beginning: the shortest that fails says most

Every byte is compared, and nothing may be left at the end of a walk. The first one that goes wrong ends it, with its
seed and its latest steps.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from support.walk import Walk, Wrong

PROCESSES = 8  # walks, of which one is of ranks in processes of their own, which die and come back


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="go on for so long, instead of for so many walks")
    parser.add_argument("--walks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first walk; the next has the next")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", action="store_true", help="all of them with processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    walked = 0
    while walked < options.walks if options.seconds is None else time.monotonic() - start < options.seconds:
        seed = options.seed + walked
        processes = options.processes or (options.seconds is not None and seed % PROCESSES == 0)
        try:
            Walk(seed, processes=processes).run(options.steps)
        except Wrong as wrong:
            again = f"python tests/walks.py --seed {seed} --steps {options.steps}" + " --processes" * processes
            print(f"{wrong}\n\n{again}", file=sys.stderr)
            return 1
        walked += 1
    print(f"{walked} walks in {time.monotonic() - start:.0f} s: nothing went wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
