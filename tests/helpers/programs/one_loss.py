"""One loss and its gradient by the CPU engine of the installed package, as a test of a wheel."""

import torch

import otalign

x = torch.rand(2, 9, 4, requires_grad=True)
loss = otalign.sinkhorn_loss(x, x[:, :5], backend="cpu")
loss.backward()
assert loss.isfinite() and x.grad.isfinite().all() and x.grad.any()
print(f"{otalign.__file__}: loss {loss.item():.4f}")
