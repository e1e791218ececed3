"""Know before you run: what a group of GPUs would need and how fast it would be, by the runtime's own placement code."""
