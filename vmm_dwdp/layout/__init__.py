"""Integers: which expert is whose, where its bytes are, and what is copied from where. Knows no memory."""
