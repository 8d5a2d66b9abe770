"""Steps as processes: each has a time limit, and no way of failing stops the session."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gpu.exits import RESTART

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
TAIL = 8  # lines of output that are shown; the summary keeps them of a step that did not pass


class Step(NamedTuple):
    name: str  # what `--steps` selects; several steps may share it
    command: list[str]
    seconds: float  # at most
    variables: Mapping[str, str] = {}
    part: str = ""  # tells it from others with its name
    backends: tuple[str, ...] = ()  # it is left out if all of these are left out
    first_look: bool = False  # if it does not end well, later steps leave out its backend
    background: bool = False  # later steps start before it has ended
    waits: bool = False  # until no step is in the background
    spare: float = 0  # the command gets `--seconds`, this much less than its limit, and stops by itself
    outcomes: Mapping[int, str] = {}
    refusals: str = ""  # a pattern of output that tells that this machine cannot run the step
    lines: int = 0  # lines of output that the summary keeps
    writes: tuple[str, ...] = ()  # the files of its results

    @property
    def label(self) -> str:
        return f"{self.name}: {self.part}" if self.part else self.name


class Job:
    """A step that runs. Its output is added to a log as it comes."""

    def __init__(self, step: Step, log: Path, work: Path, environment: Mapping[str, str], seconds: float) -> None:
        self.step, self.log, self.work, self.seconds = step, log, work, seconds
        self.environment = {**environment, **step.variables}
        self.start = time.monotonic()
        self.outcome: str | None = None
        self.code: int | None = None
        self.note(" ".join(step.command))
        self.begin = self.log.stat().st_size
        self.launch()

    def launch(self) -> None:
        command = [*self.step.command]
        if self.step.spare:
            command += ["--seconds", f"{max(0.0, self.left() - self.step.spare):.1f}"]
        try:
            with self.log.open("ab") as file:
                self.process = subprocess.Popen(
                    command,
                    cwd=self.work,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self.end(f"cannot run: {error}")

    def left(self) -> float:
        """Seconds until its limit."""
        return self.start + self.seconds - time.monotonic()

    def ended(self) -> bool:
        """Whether the step has ended. A step at its limit is stopped here."""
        if self.outcome is None:
            self.code = self.process.poll()
            if self.code is not None:
                self.kill(signal.SIGKILL)  # processes that it left behind
                if self.code == RESTART and self.left() > GRACE:
                    self.launch()
                else:
                    self.end(self.meaning(self.code))
            elif self.left() <= 0:
                self.stop(f"stopped after {self.seconds:.3g} s")
        return self.outcome is not None

    def meaning(self, code: int) -> str:
        if code != 0 and self.step.refusals:
            found = re.search(self.step.refusals, "\n".join(self.output()))
            if found:
                return f"cannot run: {found[0].strip()}"
        return self.step.outcomes.get(code) or ("passed" if code == 0 else f"failed with {code}")

    def stop(self, outcome: str) -> None:
        """End the process group. SIGTERM lets programs write what they have; what ignores it is killed."""
        if self.outcome is not None:
            return
        self.kill(signal.SIGTERM)
        if not self.gone(GRACE):
            self.kill(signal.SIGKILL)
            if not self.gone(GRACE):  # in the driver, it may be beyond every signal
                outcome += ", but it does not end"
        self.kill(signal.SIGKILL)
        self.end(outcome)

    def gone(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False

    def kill(self, number: signal.Signals) -> None:
        # Not permitted: on macOS, for a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def end(self, outcome: str) -> None:
        self.outcome = outcome
        self.took = time.monotonic() - self.start
        self.note(outcome)

    def note(self, text: str) -> None:
        with self.log.open("a") as file:
            print(f"\n=== {self.step.label}: {text}", file=file)

    def output(self) -> list[str]:
        """Its lines so far, without those that the session adds."""
        with self.log.open("rb") as file:
            file.seek(self.begin)
            text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip() and not line.startswith("=== ")]

    def entry(self) -> dict[str, object]:
        """Its entry in the summary."""
        entry = {"step": self.step.label, "outcome": self.outcome, "seconds": round(self.took, 1)}
        lines = max(self.step.lines, 0 if self.outcome == "passed" else TAIL)
        return entry | ({"output": self.output()[-lines:]} if lines else {})
