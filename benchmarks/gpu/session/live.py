"""A plugin of pytest that writes the result of each test to a CSV file as soon as it is known.

If the tests are stopped, the file has all results so far, and names the tests that had not ended.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gpu.rows import Table

COLUMNS = ("label", "test", "outcome", "seconds", "message")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("live results")
    group.addoption("--live", type=Path, help="the CSV file to which results are added")
    group.addoption("--live-label", default="", help="the text of its first column")
    group.addoption("--one-variant", action="store_true", help="run the first variant of each test")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.live is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Live(config.option.live, config.option.live_label))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.one_variant:
        first: dict[str, pytest.Item] = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0], item)
        others = [item for item in items if item not in first.values()]
        config.hook.pytest_deselected(items=others)
        items[:] = first.values()


class Live:
    def __init__(self, path: Path, label: str) -> None:
        self.table, self.label = Table(path, COLUMNS, keep=lambda row: True), label
        self.running: dict[str, None] = {}
        signal.signal(signal.SIGTERM, self.stopped)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr or "")
            self.write(report.nodeid, report.outcome, f"{report.duration:.2f}", message)

    def write(self, test: str, outcome: str, seconds: str = "", message: str = "") -> None:
        line = message.strip().splitlines()[0][:200] if message.strip() else ""
        row = {"label": self.label, "test": test, "outcome": outcome, "seconds": seconds, "message": line}
        self.table.write(row)

    def stopped(self, *_: object) -> None:
        for test in self.running:
            self.write(test, "stopped")
        os._exit(128 + signal.SIGTERM)  # a worker may never answer: pytest would wait for it
