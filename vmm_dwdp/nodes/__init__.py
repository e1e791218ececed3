"""Experts spread over nodes: the tokens that go to them, and what comes back."""
