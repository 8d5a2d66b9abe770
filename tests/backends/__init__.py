"""Tests of the backends: agreement with the reference, operators, torch.compile, bits, BLAS, memory, Triton, CUDA, GPUs."""
