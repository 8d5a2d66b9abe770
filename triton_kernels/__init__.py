"""The Triton kernels of `backend="triton"`, and of `backend="cuda"` for all but its iterations.

Installed as `otalign.triton_kernels`. From the outside in:

- `launch`: what the package calls: solve a batch, gradients, plans, projections, assignments
- `batch`: a batch as the kernels take it
- `heuristics`: block sizes, warps and programs, from sizes and types
- `runtime`: compiled kernels that are kept, and what a device can do
- `interpreter`: Triton's interpreter with every NumPy 2
- `cost`, `sinkhorn`, `outputs`, `adjoint`, `gradients`: the kernels
- `addressing`, `exchange`, `math`: functions that kernels share

Importing this package loads no Triton; all its modules but `heuristics` do.
"""
