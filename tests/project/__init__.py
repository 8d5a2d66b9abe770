"""Tests of how the package is used and made: environment, command line, plots, documentation, examples, packaging, benchmarks."""
