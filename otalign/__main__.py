"""`python -m otalign`: a report of the installation, alignments and scores of saved states, and timings."""

from __future__ import annotations

import io
import sys

from otalign.cli import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # tokens that the terminal cannot show
    sys.exit(main())
