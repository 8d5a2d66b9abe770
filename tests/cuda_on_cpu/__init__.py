"""The CUDA kernels compiled for the CPU: a shim for the compiler, programs for the sanitizers, and the fixture for Python."""
