"""The constants of the accelerated solver that the kernel shares with csrc/accelerate.h and csrc/cpu/mixing.h.

FIRST here is kFirst there, and so on; the comments there say what each one means. A test compares the values.
"""

import triton.language as tl

# When plain iterations are left.
FIRST = tl.constexpr(5)
WINDOW = tl.constexpr(3)
AHEAD = tl.constexpr(3.0)

# Mixing.
LINEAR = tl.constexpr(0.25)
WARM = tl.constexpr(3)
FAST = tl.constexpr(0.6)
SLACK = tl.constexpr(0.05)
LEAD = tl.constexpr(0.5)
USELESS = tl.constexpr(0.95)
LONGEST = tl.constexpr(5.0)
DEPTH = tl.constexpr(5)
