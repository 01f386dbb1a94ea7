"""Runs whose calls to the system fail or are their last: `python -m tests.faults --help` for a long campaign."""
