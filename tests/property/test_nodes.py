"""Experts over nodes: every expert has one node and one number there, as even as whole numbers allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_dwdp import ConfigError
from vmm_dwdp.layout.nodes import NodeShare

SHARES = st.builds(NodeShare, st.integers(0, 300), st.integers(1, 20))


@given(SHARES)
def test_nodes_own_runs_that_follow_one_another_and_differ_by_one_at_most(share: NodeShare) -> None:
    runs = [share.experts(node) for node in range(share.num_nodes)]
    assert [expert for run in runs for expert in run] == list(range(share.num_experts))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert share.starts == [run.start for run in runs] + [share.num_experts]


@given(SHARES)
def test_locate_names_the_one_node_and_the_number_there(share: NodeShare) -> None:
    for expert in range(share.num_experts):
        node, number = share.locate(expert)
        assert share.experts(node)[number] == expert
        assert [other for other in range(share.num_nodes) if expert in share.experts(other)] == [node]


def test_what_cannot_be() -> None:
    for experts, nodes in ((4, 0), (-1, 2)):
        with pytest.raises(ConfigError, match=f"{experts} experts cannot be spread over {nodes} nodes"):
            NodeShare(experts, nodes)
    for node in -1, 2:
        with pytest.raises(ConfigError, match=f"there is no node {node} of 2"):
            NodeShare(4, 2).experts(node)
    for expert in -1, 4:
        with pytest.raises(ConfigError, match=f"there is no expert {expert} in a layer of 4"):
            NodeShare(4, 2).locate(expert)
