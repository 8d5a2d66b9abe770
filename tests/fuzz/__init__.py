"""A fuzzer for every backend: see `python -m tests.fuzz --help`, and corpus/ for what it found."""
