"""The other ranks: who they are, what they hand over, and what they agree on."""
