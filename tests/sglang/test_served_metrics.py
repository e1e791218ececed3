"""What SGLang's server shows at ``/metrics`` with ``--enable-metrics``: this library's figures beside its own."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from urllib.request import urlopen

import pytest
from answers import PROMPTS, TWO_RANKS, Tokens
from prometheus_client.parser import text_string_to_metric_families
from test_server import LONGEST, Server, environment, servers

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
ENOUGH = 300  # requests; each rank writes when a pass begins, once a second at most


def scraped(server: Server) -> tuple[dict[tuple[str, str], int], float]:
    """How often experts of a layer were read since the server started, by rank and layer; and the tokens of prompts by
    SGLang's own count."""
    with urlopen(f"{server.address}/metrics", timeout=LONGEST) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples]
    read: dict[tuple[str, str], int] = defaultdict(int)
    for sample in samples:
        if sample.name in ("vmm_dwdp_hits_total", "vmm_dwdp_misses_total", "vmm_dwdp_in_place_total"):
            read[sample.labels["rank"], sample.labels["layer"]] += int(sample.value)
    return read, sum(sample.value for sample in samples if sample.name == "sglang:prompt_tokens_total")


def test_our_counters_stand_beside_sglangs(checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    options = f"--model-path {checkpoint} --tp-size 2 --dwdp-size 2 --enable-metrics"
    with servers((options, environment(TWO_RANKS), tmp_path / "log")) as [server]:
        before, _ = scraped(server)
        for _ in range(ENOUGH):
            assert server.tokens(PROMPTS, 8, LONGEST) == ordinary
            read, prompt_tokens = scraped(server)
            if {rank for rank, layer in read if read[rank, layer] > before[rank, layer]} == {"0", "1"}:
                break
    assert sorted(read) == [(rank, layer) for rank in "01" for layer in "012"]
    for rank in "01":
        [passes] = {read[rank, layer] for layer in "012"}  # each has every layer
        assert passes > before[rank, "0"]
    assert prompt_tokens >= sum(map(len, PROMPTS))
