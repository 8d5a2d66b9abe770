"""Prints the largest difference between the values of packed points and those of the same points padded."""

import torch

import otalign


def main() -> None:
    worst = 0.0
    for D in (3, 7, 9, 33, 100):
        n, m = torch.tensor([11, 5, 8, 1, 11]), torch.tensor([9, 3, 1, 7, 9])
        x, y = torch.randn(5, 11, D), torch.randn(5, 9, D)
        packed = [torch.cat([row[:k] for row, k in zip(t, lengths, strict=True)]) for t, lengths in ((x, n), (y, m))]
        ends = [torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) for lengths in (n, m)]
        one = otalign.solve(x, y, n, m, backend="cpu").value
        two = otalign.solve(*packed, cu_seqlens_x=ends[0], cu_seqlens_y=ends[1], backend="cpu").value
        worst = max(worst, float((one - two).abs().max()))
    print(worst)


if __name__ == "__main__":
    main()
