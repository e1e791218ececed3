"""Model runners that can be given a runtime. Each module imports its runner: import the one that is installed."""
