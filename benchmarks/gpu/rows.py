"""CSV files of GPU results, of which every row is on disk as soon as it is known."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

Row = dict[str, object]


class Table:
    """A CSV file to which rows are added. `keep`: go on with the rows that it has, if this function is true for them."""

    def __init__(self, path: Path, columns: Sequence[str], keep: Callable[[Row], bool] | None = None) -> None:
        self.rows: list[Row] = [row for row in read(path) if keep(row)] if keep else []
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")  # replaced at once: a process that is killed here loses no row
        self.file = new.open("w", newline="")
        self.writer = csv.DictWriter(self.file, columns, restval="")
        self.writer.writeheader()
        self.writer.writerows(self.rows)
        self.file.flush()
        os.replace(new, path)

    def write(self, row: Mapping[str, object]) -> None:
        self.rows.append(dict(row))
        self.writer.writerow(row)
        self.file.flush()

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def read(path: Path) -> list[Row]:
    """The rows of a file; none if it is missing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]
