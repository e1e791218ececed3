"""Pictures of plans."""

from __future__ import annotations

from pathlib import Path

from vmm_dwdp.observe.figures import new_figure
from vmm_dwdp.planning.estimate import Estimate


def plot_estimate(estimate: Estimate, path: Path) -> None:
    """Pass times of both kinds of parallelism over tokens, and the memory of one GPU, as a PNG."""
    figure = new_figure(11, 4.5)
    times, memory = figure.subplots(1, 2, width_ratios=(2, 1))
    tokens = [2**exponent for exponent in range(8, 18)]
    estimates = [estimate.with_tokens(count) for count in tokens]
    times.loglog(tokens, [e.dwdp_seconds * 1e3 for e in estimates], marker="o", label="this group")
    times.loglog(tokens, [e.expert_parallel_seconds * 1e3 for e in estimates], marker="s", label="expert parallel")
    if estimate.pays_from:
        times.axvline(estimate.pays_from, color="grey", linestyle=":", label=f"pays from {estimate.pays_from:,} tokens")
    times.set(
        xlabel="tokens of one rank's forward pass",
        ylabel="forward pass, ms",
        title=f"{estimate.model.name}, {estimate.config.group_size} x {estimate.gpu.name}",
    )
    times.legend()
    times.grid(visible=True, which="both", alpha=0.2)
    used = estimate.memory
    parts = {
        "all but routed experts": used.replicated,
        "resident experts": used.experts.resident,
        "slots": used.experts.staged,
        "activations": used.activations,
        "left for KV cache": used.left,
    }
    bottom = 0.0
    for name, nbytes in parts.items():
        memory.bar(0, nbytes / 1e9, bottom=bottom, label=name)
        bottom += nbytes / 1e9
    memory.set(ylabel="GB", title="memory of one GPU", xlim=(-0.6, 2.2), xticks=[])
    memory.legend(loc="upper right")
    figure.savefig(path, dpi=120)
