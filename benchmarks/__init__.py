"""Benchmarks: ``python -m benchmarks run`` writes one JSON per case, ``plot`` reads them.

A module of this package that defines ``cases() -> list[Case]`` is a benchmark. It may define
``figure(records) -> matplotlib Figure`` for its own picture; records are the JSON files of its
cases, nothing else. ``benchmarks.harness`` says what a case must bring.
"""
