"""Puts this folder on the path: benchmarks import each other as `common`, `cpu`, `gpu`, `codegen` and `methods`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
