"""Virtual memory of a device: physical pages, address ranges, and what maps one to the other."""
