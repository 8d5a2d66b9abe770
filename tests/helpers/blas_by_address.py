"""A BLAS whose results depend on where its matrices lie in memory."""

import ctypes
import zlib

import numpy as np


def by_address(real: type):
    """A Fortran gemm whose results depend on the position of its matrices in a cache line, and on their strides."""
    integer, number, letter = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(real), ctypes.c_char_p

    def matrix(address: int, columns: int, rows: int, stride: int) -> np.ndarray:
        memory = (real * ((columns - 1) * stride + rows)).from_address(address)
        size = ctypes.sizeof(real)
        return np.lib.stride_tricks.as_strided(np.frombuffer(memory, real), (columns, rows), (stride * size, size)).T

    def gemm(trans_a, trans_b, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc):
        m, n, k, lda, ldb, ldc = (pointer[0] for pointer in (m, n, k, lda, ldb, ldc))
        a = matrix(A, m, k, lda).T if trans_a == b"T" else matrix(A, k, m, lda)
        b = matrix(B, k, n, ldb).T if trans_b == b"T" else matrix(B, n, k, ldb)
        c = matrix(C, n, m, ldc)
        position = ([address % 64 for address in (A, B, C)], lda, ldb, ldc)
        error = 1 + 1e-4 * (zlib.crc32(repr(position).encode()) % 1000) / 1000
        product = (
            a.copy() @ b.copy()
        )  # NumPy computes the product of a matrix and its own transpose differently, unless they are copies
        c[:] = alpha[0] * product * error + (beta[0] * c if beta[0] else 0)

    arguments = (letter, letter, integer, integer, integer, number, ctypes.c_void_p, integer, ctypes.c_void_p, integer,
                 number, ctypes.c_void_p, integer)  # fmt: skip
    return ctypes.CFUNCTYPE(None, *arguments)(gemm)
