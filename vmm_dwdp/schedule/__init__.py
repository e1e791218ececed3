"""Time: which layer is in which slot, what is copied next, and what waits for what."""
