"""In the demo: what continues a prompt, and what is compared."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_DECODING = ("tests/unit/cli/test_demo_decoding.py",)
_REPORT = ("tests/unit/cli/test_demo_report.py",)

BUGS: Final = (
    Bug(
        "a prompt follows what was continued before",
        "vmm_dwdp/cli/demo_decoding.py",
        "        self._cache.reset()\n",
        "",
        _DECODING,
    ),
    Bug(
        "a window of the demo's cache is counted in Python",
        "vmm_dwdp/cli/demo_decoding.py",
        'getattr(layer, "is_sliding", False)',
        "False",
        _DECODING,
    ),
    Bug(
        "logits that a replay gave are overwritten by the next",
        "vmm_dwdp/cli/demo_decoding.py",
        "found.to(torch.float32, copy=True)",
        "found.float()",
        _DECODING,
    ),
    Bug(
        "a replay is given the token of the step that was captured",
        "vmm_dwdp/cli/demo_decoding.py",
        "self._token.copy_(token)",
        "self._token = token",
        _DECODING,
    ),
    Bug(
        "the demo samples nothing",
        "vmm_dwdp/cli/demo_decoding.py",
        "if generation_config.do_sample:",
        "if False:",
        _DECODING,
    ),
    Bug(
        "every model is given a static cache",
        "vmm_dwdp/cli/demo_decoding.py",
        "return bool(model._can_compile_fullgraph)",
        "return True",
        _DECODING,
    ),
    Bug(
        "figures of the demo count what is captured",
        "vmm_dwdp/cli/demo_group.py",
        '    return generated, stats, continuation.generate(), ""\n',
        '    return generated, model.dwdp.stats(), continuation.generate(), ""\n',
        _DECODING,
    ),
    Bug(
        "replays are compared with the same rank's eager steps",
        "vmm_dwdp/cli/demo_group.py",
        "self.replayed.same(expected)",
        "self.replayed.same(self.generated)",
        _REPORT,
    ),
    Bug(
        "replays that differ are no problem",
        "vmm_dwdp/cli/demo_group.py",
        "if r.replays and not r.replays.identical]",
        "if r.replays and not r.identical]",
        _REPORT,
    ),
)
