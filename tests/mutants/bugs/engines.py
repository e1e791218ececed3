"""In what is hooked of SGLang's engines, and when; in their decode graphs; in what ranks write for `/metrics`."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_HOOKS: Final = "vmm_dwdp/integrations/sglang/hooks.py"
_METRICS: Final = "vmm_dwdp/integrations/sglang/metrics.py"
_WRITTEN = ("tests/unit/integrations/test_sglang_metrics.py",)
_GRAPHS: Final = "vmm_dwdp/integrations/sglang/graphs.py"
_CAPTURED = ("tests/unit/integrations/test_sglang_graphs.py",)
_STANDING = ("tests/unit/integrations/test_sglang_hooks.py",)

BUGS: Final = (
    Bug(
        "an engine without arguments of ours is hooked",
        _HOOKS,
        "    if not settings.wanted(dwdp_size):\n        return\n    _require_known()\n",
        "    _require_known()\n",
        _STANDING,
    ),
    Bug(
        "an engine's first process hooks more than it has to",
        _HOOKS,
        "    if not settings.wanted(dwdp_size):\n        return original(server_args)\n",
        "    _hook({contract.CHECK_FINAL_ARGUMENTS: check_final_arguments})\n"
        "    if not settings.wanted(dwdp_size):\n        return original(server_args)\n",
        _STANDING,
    ),
    Bug(
        "sums over ranks are hooked where experts are in host memory",
        _HOOKS,
        "    if dwdp_size > 1:  # each rank has tokens of its own\n",
        "    if dwdp_size:\n",
        _STANDING,
    ),
    Bug(
        "a second model is hooked once more",
        _HOOKS,
        "            if path not in _standing:\n",
        "            if path:\n",
        _STANDING,
    ),
    Bug(
        "a rank goes on with an SGLang that is not known",
        _HOOKS,
        "    _require_known()\n    hooks: ",
        "    hooks: ",
        _STANDING,
    ),
    Bug(
        "an engine's counters count again what was counted",
        _METRICS,
        "child.inc(sample.value - self._counted.get(series, 0))",
        "child.inc(sample.value)",
        _WRITTEN,
    ),
    Bug(
        "an engine's ranks write figures in every pass",
        _METRICS,
        "        if now - self._written_at < EVERY_S:\n            return\n",
        "",
        _WRITTEN,
    ),
    Bug(
        "an engine's second model cannot write figures",
        _METRICS,
        "return Counter(metric.name, metric.documentation, labels, registry=None)",
        "return Counter(metric.name, metric.documentation, labels)",
        _WRITTEN,
    ),
    Bug(
        "figures of an engine are told by process",
        _METRICS,
        'registry=None, multiprocess_mode="mostrecent"',
        "registry=None",
        _WRITTEN,
    ),
    Bug(
        "an engine writes figures that nobody asked for",
        "vmm_dwdp/integrations/sglang/arguments.py",
        "return bool(view(server_args).enable_metrics)",
        "return True",
        _WRITTEN,
    ),
    Bug(
        "decode graphs choose by the longest batch of all ranks",
        _GRAPHS,
        "int(get_parallel().dwdp_size) > 1 or original(model_runner)",
        "original(model_runner)",
        _CAPTURED,
    ),
    Bug(
        "decode graphs without DWDP go by one rank's batch",
        _GRAPHS,
        "int(get_parallel().dwdp_size) > 1 or original(model_runner)",
        "int(get_parallel().dwdp_size) >= 1 or original(model_runner)",
        _CAPTURED,
    ),
    Bug(
        "decode graphs capture passes that are staged",
        _GRAPHS,
        "config.group_size > 1 and config.reads_in_place and not",
        "config.group_size > 1 and not",
        _CAPTURED,
    ),
    Bug(
        "decode graphs are on although the arguments switch them off",
        _GRAPHS,
        " and not resolved.disable_cuda_graph",
        "",
        _CAPTURED,
    ),
    Bug(
        "decode graphs of SGLang's own DWDP are captured",
        _GRAPHS,
        "cuda_graph_config.decode.backend",
        "cuda_graph_config.prefill.backend",
        _CAPTURED,
    ),
    Bug(
        "decode graphs are switched off by SGLang after ours were decided",
        _HOOKS,
        "    if decode_graphs:\n        arguments.change",
        "    if not decode_graphs:\n        arguments.change",
        _CAPTURED,
    ),
    Bug(
        "decode graphs bring prefill graphs, which are captured in pieces",
        _HOOKS,
        "    if dwdp_size <= 1 or decode_graphs:\n",
        "    if dwdp_size <= 1:\n",
        _CAPTURED,
    ),
)
