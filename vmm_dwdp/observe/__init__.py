"""What a person is told: figures, metrics, traces, and the clocks that they are read from."""
