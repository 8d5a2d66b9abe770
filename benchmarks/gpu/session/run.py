"""The session of `make gpu`: build, check, test, time and sanitize, all results in one folder, within ten minutes.

It needs no network and no virtual environment. torch, Triton and a compiler must be installed; other packages may come
as wheels in a folder. Each step is a process with its own time limit. If one fails or is late, the summary records it and
the next step runs. Results are in the folder as soon as they are known: summary.json, log.txt, first.csv, tests.csv,
benchmark.csv, targets.txt, forms.csv, stages.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common import environment
from gpu import backends
from gpu.exits import SOLVING, WRONG
from gpu.session.jobs import GRACE, TAIL, Job, Step
from gpu.session.steps import QUICK, QUICK_SECONDS, SECONDS, SELECTABLE, Plan, python_path, steps

PAUSE = 0.05  # seconds between two looks at the processes
LEAST = 2.0  # seconds: with less time left, no step starts


class Session:
    """Runs steps one after the other, beside at most one in the background, and keeps the summary up to date."""

    def __init__(self, out: Path, work: Path, variables: dict[str, str], seconds: float) -> None:
        self.out, self.work, self.environment = out, work, variables
        self.begin, self.until = time.monotonic(), time.monotonic() + seconds
        self.about = {"commit": environment.commit(), "date": environment.date(), "arguments": sys.argv[1:]}
        self.entries: list[dict[str, object]] = []
        self.optional: set[str] = set()  # steps that may be refused by the machine
        self.job: Job | None = None
        self.background: Job | None = None
        self.signal = ""  # the name of a signal that ends the session
        (out / "log.txt").write_text("")

    def run(self, todo: Iterable[Step]) -> None:
        """Run the steps, and leave no process behind."""
        try:
            self.run_all(list(todo))
        finally:
            for job in filter(None, (self.job, self.background)):
                job.stop("stopped: the session failed")

    def run_all(self, waiting: list[Step]) -> None:
        """While a step is in the background, those that need not wait for it come first."""
        while waiting and not self.signal:
            step = next((step for step in waiting if not (step.waits and self.background)), None)
            if step is None:
                self.look()
            else:
                waiting.remove(step)
                self.step(step)
        while self.background:
            self.look()
        for step in waiting:
            self.leave_out(step, f"the session got {self.signal}")

    def step(self, step: Step) -> None:
        gone = backends.left_out(self.environment)
        left = self.until - GRACE - time.monotonic()
        if step.backends and gone.issuperset(step.backends):
            self.leave_out(step, f"without {' and '.join(step.backends)}")
        elif left < LEAST:
            self.leave_out(step, "out of time")
        elif step.background:
            log = self.out / f"{step.name}.txt"
            log.unlink(missing_ok=True)
            self.background = self.start(step, log, min(step.seconds, left))
        else:
            self.job = self.start(step, self.out / "log.txt", min(step.seconds, left))
            while self.job:
                self.look()

    def start(self, step: Step, log: Path, seconds: float) -> Job:
        print(f"{step.label} ... (at most {seconds:.0f} s)", flush=True)
        job = Job(step, log, self.work, self.environment, seconds)
        self.save(running=step.label)
        return job

    def look(self) -> None:
        """Take down which steps have ended, after a pause. A signal to the session stops them."""
        time.sleep(PAUSE)
        for job in filter(None, (self.job, self.background)):
            if self.signal:
                job.stop(f"stopped: the session got {self.signal}")
            if job.ended() and job is self.job:
                self.job = None
                self.record(job)
            elif job.ended() and not self.job:  # its output is not put in the middle of another step's
                self.background = None
                self.record(job)

    def record(self, job: Job) -> None:
        step, entry, lines = job.step, job.entry(), job.output()[-TAIL:]
        if job.log != self.out / "log.txt":
            with job.log.open("rb") as own, (self.out / "log.txt").open("ab") as log:
                shutil.copyfileobj(own, log)
            job.log.unlink()
        if step.first_look and shows_no_end(job):
            self.environment |= backends.without(self.environment, *step.backends)
        if step.refusals:
            self.optional.add(step.label)
        self.entries.append(entry)
        self.save()
        print(*(f"    {text}" for text in lines), line(entry), sep="\n", flush=True)

    def leave_out(self, step: Step, reason: str) -> None:
        self.entries.append({"step": step.label, "outcome": f"left out: {reason}"})
        self.save()
        print(line(self.entries[-1]), flush=True)

    def save(self, running: str = "") -> None:
        """Write the summary. The file is complete at any time."""
        steps = [*self.entries, *([{"step": running, "outcome": "running"}] if running else [])]
        seconds = round(time.monotonic() - self.begin, 1)
        new = self.out / "summary.json.new"
        new.write_text(json.dumps({**self.about, "seconds": seconds, "steps": steps}, indent=1) + "\n")
        os.replace(new, self.out / "summary.json")

    @property
    def green(self) -> bool:
        """Whether all steps passed, except those that this machine refuses to run."""
        return all(
            str(entry["outcome"]).startswith("passed")
            or (entry["step"] in self.optional and str(entry["outcome"]).startswith("cannot run"))
            for entry in self.entries
        )


@contextmanager
def signals(session: Session) -> Iterator[None]:
    """In the block, a signal that would end this process ends the session's steps instead, and then the session."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

    def note(number: int, _: object) -> None:
        session.signal = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shows_no_end(job: Job) -> bool:
    """Whether a backend cannot be used further. A first look that was stopped before it solved anything does not tell."""
    if job.code is None:
        return any(text.startswith(SOLVING) for text in job.output())
    return job.code not in (0, WRONG)


def line(entry: dict[str, object]) -> str:
    took = f", {entry['seconds']} s" if "seconds" in entry else ""
    return f"{entry['step']}: {entry['outcome']}{took}"


def selected(todo: Iterable[Step], names: Iterable[str]) -> list[Step]:
    """The steps with these names, and those that prepare them."""
    return [step for step in todo if step.name in names or step.name not in SELECTABLE]


def step_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SELECTABLE:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(SELECTABLE)}, got {name!r}")
    return names


def listed(todo: Iterable[Step]) -> str:
    lines = [
        f"{step.label:<20} at most {step.seconds:4.0f} s" + ", in the background" * step.background for step in todo
    ]
    return "\n".join(lines)


def variables(plan: Plan) -> dict[str, str]:
    """The environment of all steps."""
    found = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": python_path(plan)}
    # The extension of another installation in this Python does not fit these Python files.
    found["OTALIGN_EXT_DIR"] = str(plan.site / "otalign")
    found.pop("TRITON_INTERPRET", None)
    return found | ({"TRITON_INTERPRET": "1"} if plan.dry else {})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks session", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where logs and results go")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, through Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="a few steps, within three minutes")
    parser.add_argument("--steps", type=step_names, help=f"some of {', '.join(SELECTABLE)}, separated by commas")
    parser.add_argument("--seconds", type=float, help=f"at most, for all steps ({SECONDS:g}, quick: {QUICK_SECONDS:g})")
    parser.add_argument("--list", action="store_true", help="print the steps with their time limits")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    work = Path(tempfile.mkdtemp(prefix="otalign-gpu-"))
    plan = Plan(out, work / "site", args.wheels and args.wheels.resolve(), args.dry, args.quick)
    try:
        names = args.steps or (QUICK if args.quick else SELECTABLE)
        todo = selected(steps(plan), names)
        absent = set(args.steps or ()).difference(step.name for step in todo)
        if absent:
            parser.error(f"--steps: a quick or dry session has no {', '.join(sorted(absent))}")
        if args.list:
            print(listed(todo))
            return 0
        out.mkdir(parents=True, exist_ok=True)
        for name in {name for step in todo for name in step.writes}:
            (out / name).unlink(missing_ok=True)  # its rows belong to an earlier session
        session = Session(out, work, variables(plan), args.seconds or (QUICK_SECONDS if args.quick else SECONDS))
        with signals(session):
            session.run(todo)
        print("---", *map(line, session.entries), sep="\n")
        if (out / "targets.txt").exists():
            print((out / "targets.txt").read_text())
        return int(not session.green)
    finally:
        shutil.rmtree(work, ignore_errors=True)
