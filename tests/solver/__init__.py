"""Tests of what is computed, on every backend: closed forms, properties, gradients, layouts, weights, priors, invalid input."""
