"""Every family beside transformers, on tiny random models: `python -m tests.parity` prints the table."""
