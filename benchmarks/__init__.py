"""Proofs that take longer than a test: each one command, its results in `results/`."""
