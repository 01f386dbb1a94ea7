"""Runs that are killed at random moments: `python -m tests.kills --help` for a long campaign."""
