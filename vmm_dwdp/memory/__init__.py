"""Pages: what turns the shards of all owners into the tensors that a layer's forward pass reads."""
