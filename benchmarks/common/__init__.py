"""What several benchmarks share: inputs, peers, the description of the machine, and tables."""
