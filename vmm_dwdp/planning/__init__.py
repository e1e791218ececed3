"""Know before you run: what a group of GPUs needs and how fast it is, by the runtime's own placement and plans."""
