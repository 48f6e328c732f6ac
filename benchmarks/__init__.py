"""Benchmarks of lightning_faast against named peers: ``python -m benchmarks --help``."""
