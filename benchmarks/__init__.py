"""Measurements, run by one command: ``make bench`` or ``python -m benchmarks``."""
