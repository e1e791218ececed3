"""In the integrations."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_SPREAD = ("tests/unit/integrations/test_spread_tensor.py",)

_SHARED = ("tests/unit/integrations/test_sglang_shared_experts.py",)

_LAYERS = ("tests/unit/integrations/test_sglang_sizes.py",)

_BANK = ("tests/unit/integrations/test_transformers_bank.py",)
_STATIC = ("tests/unit/integrations/test_transformers_static_cache.py",)
_ROWS = ("tests/unit/integrations/test_sglang_bank.py",)
_TOLD = ("tests/unit/integrations/test_sglang_rows.py",)

BUGS: Final = (
    Bug(
        "a bank of SGLang's lacks the tensors that are smaller than a page",
        "vmm_dwdp/integrations/sglang/expert_layer.py",
        "(self.telling is not None or expert_nbytes * self._share >= self._page)",
        "expert_nbytes * self._share >= self._page",
        _ROWS,
    ),
    Bug(
        "SGLang's kernels read a bank's tensor by expert",
        "vmm_dwdp/integrations/sglang/rows.py",
        "routed._replace(topk_ids=rows)",
        "routed",
        _ROWS,
    ),
    Bug(
        "SGLang's layer shows experts where rows of a bank were looked up",
        "vmm_dwdp/integrations/sglang/expert_view.py",
        "        self.views[layer].show(found.weights)\n",
        "",
        _ROWS,
    ),
    Bug(
        "SGLang's layer counts experts where it shows rows",
        "vmm_dwdp/integrations/sglang/expert_view.py",
        "        return self._exchange(made, rows)\n",
        "        return self._exchange(made, self._num_experts)\n",
        _ROWS,
    ),
    Bug(
        "tiles are chosen by rows of a bank",
        "vmm_dwdp/integrations/sglang/manager.py",
        "shape if shape[0] <= num_experts else (num_experts, *shape[1:])",
        "shape",
        _ROWS,
    ),
    Bug(
        "Marlin sorts tokens by rows of a bank",
        "vmm_dwdp/integrations/sglang/rows.py",
        '"marlin": Telling(by_blocks, as_experts=True)',
        '"marlin": Telling(by_ids)',
        _TOLD,
    ),
    Bug(
        "Marlin's blocks are as large as for rows of a bank",
        "vmm_dwdp/integrations/sglang/rows.py",
        "Telling(by_blocks, as_experts=True)",
        "Telling(by_blocks)",
        _TOLD,
    ),
    Bug(
        "a block of Marlin's is told the row of another",
        "vmm_dwdp/integrations/sglang/rows.py",
        "tokens[::block_size].clamp",
        "tokens[: len(experts)].clamp",
        _TOLD,
    ),
    Bug(
        "what stands after Marlin's last block is looked up",
        "vmm_dwdp/integrations/sglang/rows.py",
        "tokens[::block_size].clamp(0, len(awaited.rows) - 1)",
        "tokens[::block_size]",
        _TOLD,
    ),
    Bug(
        "it is not noticed that Marlin's blocks were told no rows",
        "vmm_dwdp/integrations/sglang/rows.py",
        "    if awaited.rows is not None and len(awaited.rows):\n        raise",
        "    if awaited.rows is not None and not len(awaited.rows):\n        raise",
        _TOLD,
    ),
    Bug(
        "rows that Marlin's blocks were not told await the next pass",
        "vmm_dwdp/integrations/sglang/rows.py",
        "        _awaited.reset(before)\n",
        "        pass\n",
        _TOLD,
    ),
    Bug(
        "triton_kernels count slices by rows of a bank",
        "vmm_dwdp/integrations/sglang/rows.py",
        ".scatter_(0, rows, sizes)[:num_experts]",
        ".scatter_(0, rows, sizes)",
        _TOLD,
    ),
    Bug(
        "slices of triton_kernels begin where those of other experts do",
        "vmm_dwdp/integrations/sglang/rows.py",
        ".scatter_(0, rows, slices.slice_offs[:num_experts])",
        ".scatter_(0, rows, slices.slice_offs[1:])",
        _TOLD,
    ),
    Bug(
        "triton_kernels of SGLang 0.5.23 read past the number of blocks",
        "vmm_dwdp/integrations/sglang/rows.py",
        "torch.cat([offsets, offsets[:, -1:].expand(-1, before)], dim=1)",
        "torch.cat([offsets, 0 * offsets[:, -1:].expand(-1, before)], dim=1)",
        _TOLD,
    ),
    Bug(
        "a slice of triton_kernels is called as an expert",
        "vmm_dwdp/integrations/sglang/rows.py",
        "schedule & ~_SLICE | rows.to(schedule.dtype)[schedule & _SLICE]",
        "schedule",
        _TOLD,
    ),
    Bug(
        "a bank is looked up for experts that are not named",
        "vmm_dwdp/integrations/sglang/manager.py",
        "of.telling is None or not self._names_experts(dispatch_output.topk_output)",
        "of.telling is None",
        _TOLD,
    ),
    Bug(
        "it is said in every pass that experts are not named",
        "vmm_dwdp/integrations/sglang/manager.py",
        "            self._bypassed = True\n",
        "",
        _TOLD,
    ),
    Bug(
        "SGLang keeps memory for a bank that no kernel reads",
        "vmm_dwdp/integrations/sglang/manager.py",
        "replace(self._stated.config, expert_bank=0)",
        "replace(self._stated.config)",
        _ROWS,
    ),
    Bug(
        "a bank without room for a token is told in the first pass",
        "vmm_dwdp/integrations/sglang/manager.py",
        "                        runtime.look_up(layer.number, nobody)\n",
        "                        assert len(nobody)\n",
        _ROWS,
    ),
    Bug(
        "transformers counts experts where there are rows of a bank before them",
        "vmm_dwdp/integrations/transformers/experts.py",
        "        self._count_rows(len(next(iter(weights.values()))))\n",
        "",
        _BANK,
    ),
    Bug(
        "a pass waits for the device to tell how many tokens it has",
        "vmm_dwdp/integrations/transformers/routing.py",
        "    tokens = tensors[0].shape[:-1].numel()\n",
        "    tokens = int(torch.ones_like(tensors[0][..., 0]).sum())\n",
        _STATIC,
    ),
    Bug(
        "a module still counts rows of a bank after its pass",
        "vmm_dwdp/integrations/transformers/experts.py",
        "        self._count_rows(self._experts.num_experts)\n\n    def _count",
        "        pass\n\n    def _count",
        _BANK,
    ),
    Bug(
        "eager experts read rows of a bank",
        "vmm_dwdp/integrations/transformers/bank.py",
        "    if implementation not in IMPLEMENTATIONS:\n",
        "    if implementation not in (*IMPLEMENTATIONS, 'eager'):\n",
        _BANK,
    ),
    Bug(
        "a model whose modules cannot read rows of a bank is spread",
        "vmm_dwdp/integrations/transformers/model.py",
        "            found.require_reads_rows()\n",
        "            found.identity\n",
        _BANK,
    ),
    Bug(
        "a part of a shared expert passes for a whole one",
        "vmm_dwdp/integrations/sglang/shared_experts.py",
        "part != whole",
        "part > whole",
        _SHARED,
    ),
    Bug(
        "a shared expert is cut over ranks",
        "vmm_dwdp/integrations/sglang/shared_experts.py",
        "kwargs |= contract.whole(original) or {}",
        "kwargs |= {}",
        _SHARED,
    ),
    Bug(
        "shared experts are whole without DWDP, too",
        "vmm_dwdp/integrations/sglang/shared_experts.py",
        'if _NAME in stated.get("prefix", "") and _each_has_its_tokens():',
        'if _NAME in stated.get("prefix", ""):',
        _SHARED,
    ),
    Bug(
        "tokens of several ranks are added up",
        "vmm_dwdp/integrations/sglang/shared_experts.py",
        "    if _each_has_its_tokens():\n        raise",
        "    if False:\n        raise",
        _SHARED,
    ),
    Bug(
        "what an encoder adds up in its own way is refused",
        "vmm_dwdp/integrations/sglang/shared_experts.py",
        " and _list_of(name) in decoders",
        "",
        _SHARED,
    ),
    Bug(
        "a minute's passes are told again in the next",
        "vmm_dwdp/integrations/sglang/progress.py",
        "        self._told = dict(found.layers)\n",
        "",
        ("tests/unit/integrations/test_sglang_progress.py",),
    ),
    Bug(
        "a placeholder has an address",
        "vmm_dwdp/integrations/spread_tensor.py",
        '*("data_ptr", "untyped_storage"',
        '*("untyped_storage"',
        _SPREAD,
    ),
    Bug(
        "a placeholder takes other bytes",
        "vmm_dwdp/integrations/spread_tensor.py",
        "    def data(self, _: torch.Tensor) -> None:\n        self.refuse()\n",
        "    def data(self, _: torch.Tensor) -> None:\n        pass\n",
        _SPREAD,
    ),
    Bug(
        "SGLang's loader puts a rank's experts where it would put equal shares",
        "vmm_dwdp/integrations/sglang/expert_layer.py",
        "lambda expert_id: places.get(expert_id, -1)",
        "lambda expert_id: expert_id - self.loads[0] if expert_id in places else -1",
        _LAYERS,
    ),
    Bug(
        "host memory gets the first of the experts that a rank loads",
        "vmm_dwdp/integrations/sglang/expert_layer.py",
        "                first = self.loads.index(self._runtime.local_experts(self.number, owner).start)\n",
        "                first = 0\n",
        _LAYERS,
    ),
    Bug(
        "constants of the constructor are lost",
        "vmm_dwdp/integrations/sglang/expert_layer.py",
        "            parameter.data = full.copy_(parameter.data)  # what",
        "            parameter.data = full  # what",
        _LAYERS,
    ),
    Bug(
        "experts share what a layer keeps of its constructor",
        "vmm_dwdp/integrations/sglang/expert_layer.py",
        "        self._set_aside.clear()  # what",
        "        # what",
        _LAYERS,
    ),
    Bug(
        "the KV cache is not left room",
        "vmm_dwdp/integrations/sglang/sizes.py",
        "free - kv_cache - round(",
        "free - round(",
        _LAYERS,
    ),
    Bug(
        "a rank that has no room settles on what others have",
        "vmm_dwdp/group/settle.py",
        "    if without:\n",
        "    if without and len(without) == len(offers):\n",
        ("tests/unit/integrations/test_sglang_sizes.py", "tests/multiprocess/test_settling.py"),
    ),
    Bug(
        "one expert more than needed goes to host memory",
        "vmm_dwdp/layout/auto.py",
        "        host = max(0, self.counts[0] - number * self.config.group_size)\n",
        "        host = max(1, self.counts[0] - number * self.config.group_size)\n",
        ("tests/property/test_auto_experts.py",),
    ),
    Bug(
        "passes of several threads overlap in one model",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            with self._lock:\n",
        "            with threading.RLock():\n",
        (
            "tests/unit/integrations/test_transformers_turns.py::test_no_pass_overlaps_another_whichever_model_of_it_is_called",
        ),
    ),
    Bug(
        "a pass that raised is not given up",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            self._runtime.reset()\n        except DWDPError",
        "            pass\n        except DWDPError",
        ("tests/unit/integrations/test_transformers_turns.py::test_after_a_pass_that_raised_every_thread_begins_anew",),
    ),
    Bug(
        "a pass that could not be given up is forgotten where a capture asks for it",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            self._begin()\n            try:\n",
        "            try:\n                self._begin()\n",
        _STATIC,
    ),
    Bug(
        "after a capture that failed none can begin",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            if not is_captured(self._runtime.device):",
        "            if not torch.jit.is_tracing():",
        _STATIC,
    ),
)
