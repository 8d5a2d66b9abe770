"""The place of the Triton kernels, installed as `otalign.triton_kernels`.

This version has none: `backend="triton"` raises a `RuntimeError` that says so.
"""
