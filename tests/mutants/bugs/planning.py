"""In the planner: what decoding comes to."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_DECODING = ("tests/unit/planning/test_decoding.py",)
_REPLAY = ("tests/unit/project/test_recorded_routing.py", "tests/unit/planning/test_decoding.py")
_POLICIES = ("tests/unit/planning/test_cache_policies.py",)
_FILE = "vmm_dwdp/planning/decoding.py"

BUGS: Final = (
    Bug("what hits crosses the link", _FILE, "experts * (1 - self.uses.hits) *", "experts *", _DECODING),
    Bug("links add up", _FILE, "max(self.link_seconds.values()) +", "sum(self.link_seconds.values()) +", _DECODING),
    Bug("own experts cross a link", _FILE, "if expert not in own]", "if expert >= 0]", _DECODING),
    Bug(
        "own experts take room in the bank",
        _FILE,
        "prefill[..., crossing], decode[..., crossing]",
        "prefill, decode",
        _DECODING,
    ),
    Bug("sequences share no experts", _FILE, "lanes(decode, self.sequences)", "lanes(decode)", _DECODING),
    Bug(
        "ranks do not share the memory of their host",
        _FILE,
        "self.gpu.host_limit_rate / self.config.group_size",
        "self.gpu.host_limit_rate",
        _DECODING,
    ),
    Bug("the KV cache of one sequence is read", _FILE, "cached = self.sequences * ", "cached = ", _DECODING),
    Bug(
        "a trace of other numbers of experts is taken",
        _FILE,
        "if trace is not None and (trace.num_experts, trace.top_k)",
        "if trace is None and (0, 0)",
        _DECODING,
    ),
    Bug(
        "in the replay of a bank, a newcomer's own use counts",
        "vmm_dwdp/planning/caches.py",
        "np.where(held, worth, self._before)",
        "np.where(held, worth, worth)",
        _POLICIES,
    ),
    Bug(
        "in the replay of a bank, copies are not paid for",
        "vmm_dwdp/planning/caches.py",
        "        self._credit -= USES_A_COPY * left\n",
        "        self._credit -= 0 * left\n",
        _POLICIES,
    ),
    Bug(
        "in the replay of a bank, any number of copies is saved for later",
        "vmm_dwdp/planning/caches.py",
        "np.minimum(self._credit + now.sum(-1), USES_A_COPY * self._room)",
        "self._credit + now.sum(-1)",
        _POLICIES,
    ),
    Bug(
        "what comes into a bank is counted with what stays",
        "vmm_dwdp/planning/caches.py",
        "        copies[step] = (kept & ~held).sum(-1)\n",
        "        copies[step] = kept.sum(-1)\n",
        _POLICIES,
    ),
    Bug(
        "the prompts' tokens count as decoded",
        "vmm_dwdp/planning/caches.py",
        "Replay(*(part[len(prefill) :] for part in done))",
        "done",
        _REPLAY,
    ),
)
