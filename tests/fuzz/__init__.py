"""Structured mutation of the text files that are parsed: run `python -m tests.fuzz --help` for a long campaign."""
