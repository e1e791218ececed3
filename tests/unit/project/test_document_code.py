"""Every piece of code and every command in the documents is run, or where it takes a machine of its own, looked up."""

import argparse
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vmm_dwdp import DWDPConfig, cli
from vmm_dwdp.integrations.sglang import settings

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
LANGUAGES = {"python", "yaml", "sh"}  # are run or looked up here
SHOWN_ONLY = {
    "text": "what first-steps.md says that README's last script prints, as AROUND has it too",
    "promql": "looked up by test_metrics.py",
}
TESTED_ELSEWHERE = {"model-runners.md": "tests/unit/project/test_model_runners.py"}

MODEL = """
import os
from pathlib import Path
import torch, transformers, vmm_dwdp
path, rank = Path(vmm_dwdp.__file__).parent / "models/bytes-moe", int(os.environ["RANK"])
text = "My dear sister,"
def tokenizer(text, return_tensors):
    ids = torch.tensor([list(text.encode())])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
"""
SPREAD = """
from vmm_dwdp import DWDPConfig
from vmm_dwdp.integrations.transformers import from_pretrained
config = DWDPConfig(group_size=1, host_experts=4, mode="auto")
model = from_pretrained(path, config, rank=rank, device="cpu", rendezvous="group", dtype="auto")
"""
RUNTIME = """
import torch
from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
runtime = DWDPRuntime(DWDPConfig(group_size=1, host_experts=2), 0, "cpu", "group")
runtime.add_layer(0, {"w": WeightSpec((4, 8, 8), torch.float32)})
for owner in runtime.held_owners:
    runtime.local_shard(0, "w", owner).zero_()
runtime.publish()
with runtime.layer(0):
    pass
"""
OPERANDS = """
import torch
x, weight, offsets = torch.randn(6, 16), torch.randn(3, 8, 16), torch.tensor([1, 4, 6], dtype=torch.int32)
weights = [weight[:1], weight[1:]]
"""


INIT = 'init_process_group("gloo", "file://" + os.path.abspath("store"), rank=int(os.environ["RANK"]), world_size=2)'
CUDA = "f\"cuda:{os.environ['LOCAL_RANK']}\""


class Around(NamedTuple):
    """What a piece of code needs to be a program, and what the program prints; as it stands it is one already."""

    before: str = ""
    after: str = ""
    instead: tuple[
        tuple[str, str], ...
    ] = ()  # parts that need other hardware or a fixed port, and what stands for them
    ranks: int = 1
    printed: tuple[str, ...] = ()


AROUND = {
    ("README.md", 0): Around(ranks=2, printed=("0 b'My dear sister,",)),
    ("README.md", 1): Around(printed=("[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]",)),
    ("first-steps.md", 0): Around(ranks=2, printed=("rank 0 has range(0, 32), used all: [256, 512]",)),
    ("decode.md", 0): Around(
        f"{RUNTIME}\nlayer, x = 0, torch.zeros(3, 8)",
        "print(list(weights['w'].shape), config.mode); runtime.release(0); runtime.close()",
        printed=("[4, 8, 8] in_place",),
    ),
    ("decode.md", 1): Around(
        RUNTIME.replace("host_experts=2", "host_experts=4, mode='in_place', resident_cache=4 << 20")
        + "layer, x, chosen = 0, torch.zeros(3, 8), torch.zeros(3, 1, dtype=torch.long)",
        "print(runtime.stats().cache.used_bytes); runtime.close()",
        instead=(("runtime.refresh_cache()", "runtime.release(layer); runtime.refresh_cache()"),),
        printed=("2097152",),
    ),
    ("decode.md", 2): Around(
        RUNTIME.replace("host_experts=2", "host_experts=4, mode='in_place', expert_bank=8 << 20")
        + "layer, x, chosen = 0, torch.zeros(3, 8), torch.tensor([[3], [0], [3]])",
        "print(rows.tolist(), len(weights['w'])); runtime.close()",
        printed=("[[1], [0], [1]] 8",),
    ),
    ("kernels.md", 0): Around(
        before=OPERANDS,
        after="torch.testing.assert_close(out[0], weight[0] @ x[0]); print(len(providers()) > 5, Scales.__name__)",
        printed=("True Scales",),
    ),
    ("observing.md", 1): Around(RUNTIME, "runtime.close()", printed=("1 hits, 0 misses, waited",)),
    ("observing.md", 2): Around(
        RUNTIME,
        "runtime.close(); print(float(REGISTRY.get_sample_value('vmm_dwdp_hits_total', {'rank': '0', 'layer': '0'})))",
        instead=(("9400 + runtime.rank", "0"),),
        printed=("1.0",),
    ),
    ("planning.md", 0): Around(
        RUNTIME,
        "runtime.close(); from pathlib import Path; print(Path('trace.json').exists(), Path('trace.png').exists())",
        instead=(("    ...", "    with runtime.layer(0): pass"),),
        printed=("True True",),
    ),
    ("several-gpus.md", 0): Around(
        instead=(
            ('"gloo"', '"gloo", "file://" + os.path.abspath("store"), rank=int(os.environ["RANK"]), world_size=2'),
            ('torch.device("cuda", int(os.environ["LOCAL_RANK"]))', '"cpu"'),
            ("eth0", "lo"),
        ),
        ranks=2,
        printed=("rank 0 sees experts of ranks [0, 1]",),
    ),
    ("several-nodes.md", 0): Around(
        before=MODEL,
        after="print(tokens.shape[0], model.dwdp.stats().node_wait_s > 0)",
        instead=(("init_process_group()", INIT), ('"cuda"', '"cpu"'), (CUDA, '"cpu"'), ("=32", "=2")),
        ranks=2,
        printed=("1 True",),
    ),
    ("several-nodes.md", 1): Around(
        before="import os",
        instead=(("init_process_group()", INIT), ('"cuda"', '"cpu"')),
        ranks=2,
        printed=("node 0 of 2, ",),
    ),
    ("transformers.md", 0): Around(
        before=MODEL,
        after="print(tokens.shape[0])",
        instead=(("cuda:0", "cpu"), ("group_size=4", "group_size=2"), ("**tokenizer", "max_new_tokens=2, **tokenizer")),
        ranks=2,
        printed=("1",),
    ),
    ("transformers.md", 1): Around(
        before=f"{MODEL}{SPREAD}",
        after="expected = model.generate(ids, do_sample=False, max_new_tokens=32)\n"
        "print(torch.cat([ids, *made], 1).equal(expected))",
        instead=(
            ("cuda:0", "cpu"),
            ("    graph = torch.cuda.CUDAGraph()\n", ""),
            (", torch.cuda.graph(graph)", ""),
            ("graph.replay()", "step()"),
            (
                "        step()\n    for _ in range(30)",
                "        step()\n    made.append(token.clone())\n    for _ in range(29)",
            ),
        ),
        printed=("True",),
    ),
}  # by page, and number of the piece among the page's Python


def blocks(language: str) -> Iterator[tuple[Path, int, str]]:
    for page in PAGES:
        found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        yield from ((page, number, block) for number, block in enumerate(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_piece_of_code_is_missed(page: Path) -> None:
    """As one would be that is indented or in another language."""
    fences = re.findall(r"^(.*)(?:```|~~~)(\w+)$", page.read_text(), re.MULTILINE)

    assert [fence for fence in fences if fence[0] or fence[1] not in LANGUAGES | SHOWN_ONLY.keys()] == []


@pytest.mark.parametrize(
    ("page", "number", "code"), [pytest.param(*block, id=f"{block[0].stem}-{block[1]}") for block in blocks("python")]
)
def test_python(page: Path, number: int, code: str, tmp_path: Path) -> None:
    if page.name in TESTED_ELSEWHERE:
        assert page.name in (ROOT / TESTED_ELSEWHERE[page.name]).read_text()
        return
    if "transformers" in code:
        pytest.importorskip("transformers")
    if "prometheus" in code:
        pytest.importorskip("prometheus_client")
    if ".plot(" in code:
        pytest.importorskip("matplotlib")
    around = AROUND.get((page.name, number), Around())
    for shown, run in around.instead:
        assert shown in code
        code = code.replace(shown, run)
    (tmp_path / "program.py").write_text(f"{around.before}\n{code}\n{around.after}\n")
    ranks = [
        subprocess.Popen(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(around.ranks), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(around.ranks)
    ]
    printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * around.ranks, printed
    assert [text for text in around.printed if text not in printed[0]] == []


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, _, text in blocks("yaml")])
def test_yaml_is_a_config(page: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "dwdp.yaml"
    path.write_text(text)
    if page.name.startswith("sglang"):  # whose plugin takes more
        settings.read(str(path))
    else:
        DWDPConfig.from_yaml(path)


SHOWN = sorted({line for _, _, block in blocks("sh") for line in block.splitlines()})
MENTIONED = sorted(
    {
        command
        for page in PAGES
        for command in re.findall(
            r"`((?:vmm-dwdp|make|python|pip|pytest|torchrun|tests/[\w/.]+) [^`]+)`", page.read_text()
        )
    }
)


@pytest.mark.parametrize("line", SHOWN)
def test_shown_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    look_up(words)
    if words[0] == "vmm-dwdp":
        monkeypatch.chdir(tmp_path)  # which has no file of a checkout
        assert cli.main([str(ROOT / word) if (ROOT / word).is_file() else word for word in words[1:]]) == 0


RUN_WHEREVER_MENTIONED = {
    "vmm-dwdp demo --mode auto": "transformers",
    "vmm-dwdp doctor --calibrate": None,
    "vmm-dwdp trace --group-size 3 --layers 6 --passes 2 --plot docs/trace.png": "matplotlib",
    "python benchmarks/memory_versus_sglang.py": None,
    "python benchmarks/multi_gpu.py --only predicted --preset h200 --gpus 4": None,
}  # and what each needs; others need a GPU or take minutes, have tests of their own, or are not whole


@pytest.mark.parametrize(("command", "needed"), RUN_WHEREVER_MENTIONED.items())
def test_mentioned_command_runs(command: str, needed: str | None, tmp_path: Path) -> None:
    assert command in {*SHOWN, *MENTIONED}
    if needed:
        pytest.importorskip(needed)
    (tmp_path / "docs").mkdir()
    program, *options = shlex.split(command)
    words = ["-m", "vmm_dwdp", *options] if program == "vmm-dwdp" else [str(ROOT / options[0]), *options[1:]]

    subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=240
    )


@pytest.mark.parametrize("command", MENTIONED)
def test_mentioned_command(command: str) -> None:
    look_up(shlex.split(command))


def look_up(words: list[str]) -> None:
    """That the command exists with these options; a script of ours also takes their values."""
    while "=" in words[0]:  # of the environment
        assert words[0].partition("=")[0] in (ROOT / "docs/public-api.md").read_text()
        words = words[1:]
    if ">" in words:
        words = words[: words.index(">")]
    match words:
        case ["vmm-dwdp", name, *options]:
            known = help_of(name)
            assert [option for option in options if option.startswith("--") and option not in known] == []
        case ["make", target, *arguments]:
            look_up_make(target, [word.removeprefix("ARGS=") for word in arguments if not word.startswith("PYTHON=")])
        case ["pip", "install", what]:
            extras = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", what)))
            assert set(extras) <= set(
                tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            )
        case ["pytest", *named] | ["python", "-m", "pytest", *named]:
            assert [name for name in named if name.startswith("tests") and not (ROOT / name).exists()] == []
        case ["python", ("first.py" | "-m"), *_] | ["torchrun", *_]:
            pass  # a file that the page has the reader make, and programs of others
        case ["python", script, *options]:
            parse(ROOT / script if (ROOT / script).exists() else ROOT / "benchmarks" / script, options)
        case ["tests/gpu/run.sh", _, *steps]:
            known = (ROOT / words[0]).read_text()
            assert os.access(ROOT / words[0], os.X_OK)
            assert set(steps) <= set(re.findall(r"^(?:step|race) (\S+)", known, re.MULTILINE))
        case [script, *options] if script.endswith(".py"):
            parse(ROOT / script, options)
        case _:
            pytest.fail(f"nothing here says how to test {shlex.join(words)}")


def look_up_make(target: str, arguments: list[str]) -> None:
    """That there is the target; and where it passes arguments on, that what it runs takes them."""
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    script = re.search(r"^\t@?(tests/\S+) \$\(ARGS\)$", rule[1], re.MULTILINE)
    if script is not None:
        assert [word for word in arguments if f"== {word} " not in (ROOT / script[1]).read_text()] == []
    elif arguments:
        command = re.search(r"^\t@?\$\(VENV\)/bin/(.*) \$\(ARGS\)$", rule[1], re.MULTILINE)
        assert command is not None
        look_up(shlex.split(" ".join([command[1], *arguments])))


class Parsed(Exception):
    """Raised where a script would begin its work."""


def parse(script: Path, options: list[str]) -> None:
    """Run ``script`` until it has parsed ``options``."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser) -> None:
        parse_args(parser)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *options])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.syspath_prepend(script.parent)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


@functools.cache
def help_of(name: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        cli.main([name, "--help"])
    return shown.getvalue()
