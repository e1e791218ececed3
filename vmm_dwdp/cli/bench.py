"""``vmm-dwdp bench``: the benchmarks that suit this machine in one table, or its rates for ``plan --gpu``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from vmm_dwdp.cli.checks import require_writable
from vmm_dwdp.cli.console import print_table
from vmm_dwdp.errors import ConfigError

BENCHMARKS: Final = Path(__file__).parents[2] / "benchmarks"
# By the number of GPUs that they need: what to run, and with which arguments, in a few minutes in all.
SUITES: Final[Mapping[int, Mapping[str, tuple[str, ...]]]] = {
    0: {"allocator": ("--scale", "1024", "--repeats", "3"), "assembly": ("--group-size", "2", "--passes", "3")},
    1: {"allocator": (), "copy_calls": (), "assembly": (), "prefetch": ("--layers", "4")},
    2: {"multi_gpu": ()},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this GPU's rates, and write the YAML that `plan --gpu` takes"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu.yaml"), metavar="FILE", help="default: gpu.yaml")
    parser.add_argument("--base", metavar="GPU", help="preset with the GPU's peaks (default: by its name)")
    parser.add_argument(
        "--model", default="qwen3-30b-a3b", help="whose shapes are measured, in bf16 (default: qwen3-30b-a3b)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.calibrate:
        require_writable("--output", arguments.output)
        _calibrate(arguments)
        return 0
    if not BENCHMARKS.is_dir():
        raise ConfigError(f"the benchmarks come with the source, not with the package: {BENCHMARKS} is not there")
    gpus = torch.cuda.device_count()
    suite = SUITES[max(needed for needed in SUITES if needed <= min(gpus, 2))]
    paths = [str(BENCHMARKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    reports, failures = {}, {}
    for name, options in suite.items():
        print(f"running benchmarks/{name}.py {' '.join(options)}", file=sys.stderr, flush=True)
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            failures[name] = (done.stderr.strip() or "no message").splitlines()[-1]
        else:
            reports[name] = json.loads(done.stdout)
    if arguments.json:
        print(json.dumps({"reports": reports, "failures": failures}))
    else:
        rows = [row for name, report in reports.items() for row in _rows(name, report)]
        rows += [(name, "failed", sentence) for name, sentence in failures.items()]
        print_table("Benchmarks that suit this machine", ("benchmark", "table", "figures"), rows)
    return 1 if failures else 0


def _rows(name: str, report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A line for each row of each table; the machine is this one."""
    for table, rows in report.items():
        if table != "machine":
            for row in rows:
                yield name, table, ", ".join(f"{column} {_text(value)}" for column, value in row.items())


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _calibrate(arguments: argparse.Namespace) -> None:
    from vmm_dwdp.planning.calibrate import calibrate, preset_of
    from vmm_dwdp.planning.gpus import load_gpu, write_gpu
    from vmm_dwdp.planning.models import load_model

    if not torch.cuda.is_available():
        raise ConfigError("calibration measures a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    product = torch.cuda.get_device_name(device)
    gpu = calibrate(load_gpu(arguments.base or preset_of(product)), load_model(arguments.model), device)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = f"measured on {product}, {today}, torch {torch.__version__}, with the shapes of {arguments.model}"
    write_gpu(gpu, arguments.output, {"efficiency": source})
    print(f"{arguments.output}: {', '.join(f'{name} {share}' for name, share in vars(gpu.efficiency).items())}")
