"""The Triton kernels of `backend="triton"`, installed as `otalign.triton_kernels`: costs, iterations, plans, gradients.

`launch.py` is what the package calls. Importing this folder loads no Triton; its modules do.
"""
