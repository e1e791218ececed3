"""transformers models whose experts are spread over a group, the models' own code unchanged."""

from vmm_dwdp.integrations.transformers.across_nodes import join_pass
from vmm_dwdp.integrations.transformers.model import attach, from_pretrained

__all__ = ["attach", "from_pretrained", "join_pass"]
