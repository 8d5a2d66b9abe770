"""A fuzzer for every backend: see `python -m tests.fuzz --help`, and docs/promises.md for what it found."""
