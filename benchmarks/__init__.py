"""Benchmarks: ``python -m benchmarks`` prints the table, ``benchmarks.gate`` judges it."""
