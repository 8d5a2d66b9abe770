"""Tests of otalign.speech: losses, alignment path, retrieval, metrics, recipes."""
