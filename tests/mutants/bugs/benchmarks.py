"""In the benchmarks of SGLang's engines and servers, and against what others offload with."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_FIGURES = ("tests/unit/project/test_sglang_multi_gpu.py",)
_DECODE = ("tests/unit/project/test_decode_over_links.py",)
_DECODE_RUN = ("tests/multiprocess/test_multi_gpu_benchmark.py", "-k", "decoding")
_OFFLOADERS = ("tests/unit/project/test_versus_offloaders.py",)
_CHECKPOINTS = ("tests/unit/project/test_sglang_checkpoints.py",)

BUGS: Final = (
    Bug(
        "one wrong token over nodes is not seen",
        "benchmarks/nodes.py",
        ' and row[f"{way} error, a token"] <= MOST_OF_A_TOKEN',
        "",
        ("tests/multiprocess/test_nodes_benchmark.py",),
    ),
    Bug(
        "an offloader's wrong weights are timed",
        "benchmarks/versus_offloaders.py",
        "(each in self.ours or not close(y, expected))",
        "each in self.ours",
        _OFFLOADERS,
    ),
    Bug(
        "an offloader that fails ends the command",
        "benchmarks/versus_offloaders.py",
        "            except Exception as error:  # of another's package, in one of many ways\n",
        "            except KeyError as error:\n",
        _OFFLOADERS,
    ),
    Bug(
        "what hits the bank is counted as moved",
        "benchmarks/versus_offloaders.py",
        "counts.uses - counts.hits for counts",
        "counts.uses for counts",
        _OFFLOADERS,
    ),
    Bug(
        "nothing misses the bank",
        "benchmarks/versus_offloaders.py",
        "each.missed() - missed if each.missed else 0",
        "0",
        _OFFLOADERS,
    ),
    Bug(
        "a pass that is too short is printed",
        "benchmarks/versus_offloaders.py",
        "<= ms * LINK_TOLERANCE and moved",
        "<= ms * 2 and moved",
        _OFFLOADERS,
    ),
    Bug(
        "prompts are not what fills the bank",
        "benchmarks/versus_offloaders.py",
        "ids[-steps - FILLING : -steps], ids[-steps:]",
        "ids[:0], ids[:steps]",
        _OFFLOADERS,
    ),
    Bug(
        "a run that is cut tells nothing",
        "benchmarks/versus_offloaders.py",
        "            findings.cut()\n            tell(findings)\n",
        "            findings.cut()\n",
        _OFFLOADERS,
    ),
    Bug(
        "what was measured is not kept",
        "benchmarks/versus_offloaders.py",
        "            findings.add(self.row(setting, contender))\n",
        "            self.row(setting, contender)\n",
        _OFFLOADERS,
    ),
    Bug(
        "ours have rows although others alone were asked for",
        "benchmarks/versus_offloaders.py",
        " if OURS in whose else {}",
        "",
        _OFFLOADERS,
    ),
    Bug(
        "who was cut is not named",
        "benchmarks/findings.py",
        "if missing and who not in self.left_out:",
        "if len(missing) == len(tokens) and who not in self.left_out:",
        _OFFLOADERS,
    ),
    Bug(
        "what is told when a run is cut is cut again",
        "benchmarks/cuts.py",
        "            signal.signal(each, signal.SIG_IGN)\n",
        "            pass\n",
        _OFFLOADERS,
    ),
    Bug(
        "a figure above the peaks is printed",
        "benchmarks/sglang_multi_gpu.py",
        "            if took < least:\n",
        "            if took < 0:\n",
        _FIGURES,
    ),
    Bug(
        "ranks that drift are in step",
        "benchmarks/sglang_mixes.py",
        'pair[:: -1 if mix == "drifting" and rank % 2 else 1]',
        "pair[::1]",
        _FIGURES,
    ),
    Bug(
        "ranks that drift have other prompts",
        "benchmarks/sglang_mixes.py",
        'name.replace("drifting", "in step").encode()',
        "name.encode()",
        _FIGURES,
    ),
    Bug(
        "the least time leaves out attention's scores",
        "benchmarks/sglang_mixes.py",
        "(scores + rest) / gpu",
        "rest / gpu",
        _FIGURES,
    ),
    Bug(
        "an engine's step may take no time at all",
        "benchmarks/sglang_engine.py",
        'if found.get("decode ms/step", least) < least:',
        'if 0 < found.get("decode ms/step", least) < least:',
        ("tests/unit/project/test_sglang_engine_benchmark.py",),
    ),
    Bug(
        "weights of four bits are read in one",
        "benchmarks/sglang_mixes.py",
        "* bits / 8 /",
        "* bits / 32 /",
        ("tests/unit/project/test_sglang_engine_benchmark.py",),
    ),
    Bug(
        "the best rank is compared with one GPU",
        "benchmarks/sglang_multi_gpu.py",
        "min(_of_each(ours, one))",
        "max(_of_each(ours, one))",
        _FIGURES,
    ),
    Bug(
        "an answer whose prompt was in a cache is timed",
        "benchmarks/sglang_variants.py",
        'about["prompt_tokens"] - about["cached_tokens"]',
        'about["prompt_tokens"]',
        _FIGURES,
    ),
    Bug(
        "prompts go to any rank",
        "benchmarks/sglang_variants.py",
        '{"routed_dp_rank": rank} if variant.has_queues else {}',
        "{}",
        _FIGURES,
    ),
    Bug(
        "zero points of AWQ are 7",
        "benchmarks/sglang_quantised.py",
        "-0x77777778, dtype",
        "0x77777777, dtype",
        _CHECKPOINTS,
    ),
    Bug(
        "scales of MXFP4 are of a product's square",
        "benchmarks/sglang_gpt_oss.py",
        "math.log2(SPREAD * columns**0.5)",
        "math.log2(SPREAD * columns)",
        _CHECKPOINTS,
    ),
    Bug(
        "decoding over links: other bits are printed",
        "benchmarks/decode_over_links.py",
        'if row["identical"] is False:',
        "if False:",
        _DECODE,
    ),
    Bug(
        "decoding over links: what hits is counted as moved",
        "benchmarks/decode_over_links.py",
        "BANKED: 1 - (share or 0.0)}",
        "BANKED: 1.0}",
        _DECODE_RUN,
    ),
    Bug(
        "decoding over links: the bank begins empty",
        "benchmarks/decode_over_links.py",
        "                for _ in range(2 * len(table)):\n                    way.once()\n",
        "",
        _DECODE_RUN,
    ),
    Bug(
        "chosen against a bank: so few come to their end that others are copied",
        "benchmarks/adversary.py",
        "IN_A_ROW: Final = 6",
        "IN_A_ROW: Final = 8",
        _DECODE,
    ),
    Bug(
        "chosen against a bank: experts come to their end between two copies",
        "benchmarks/adversary.py",
        "(np.arange(passes)[:, None] + apart * (places // ranks))",
        "(np.arange(passes)[:, None] + places // ranks)",
        _DECODE,
    ),
    Bug(
        "decoding over links: the bound leaves out the step in own memory",
        "benchmarks/decode_over_links.py",
        '(each["GB"] / link * 1e3 + own)',
        '(each["GB"] / link * 1e3 + 0 * own or 1.0)',
        _DECODE,
    ),
    Bug(
        "decoding over links: all ranks decode the same sequences",
        "benchmarks/decode_steps.py",
        "steps_of(trace, shape, batch, rank)",
        "steps_of(trace, shape, batch, 0)",
        _DECODE,
    ),
    Bug(
        "chosen against a bank: what is used is of one rank after another",
        "benchmarks/adversary.py",
        ".reshape(ranks, -1).T.ravel()",
        "",
        _DECODE,
    ),
    Bug(
        "decoding over links: a rank's experts are taken for others",
        "benchmarks/decode_steps.py",
        "row_of[rank * each : (rank + 1) * each] = ",
        "row_of[:each] = ",
        _DECODE_RUN,
    ),
    Bug(
        "decoding over links: states of one way are taken for another's",
        "benchmarks/decode_steps.py",
        '        self.kept.fill_(float("nan"))\n',
        "",
        _DECODE,
    ),
)
