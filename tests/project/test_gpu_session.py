"""Does the session of `make gpu` keep what it has if a step fails, hangs or is missing? With small programs as steps."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, pathlib, signal, subprocess, sys, time\n{code}"]


def ends(pid: int) -> bool:
    """Whether a process ends within seconds. It has also ended if its parent has not yet waited for it."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
        if not done.stdout.strip() or done.stdout.strip().startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def session(tmp_path):
    """A function that runs steps as a session does, and returns what the summary says of each."""
    from gpu.session import run

    def ran(*todo, seconds=60.0, **variables):
        environment = {name: value for name, value in os.environ.items() if name != "OTALIGN_WITHOUT"}
        found = run.Session(tmp_path, tmp_path, environment | variables, seconds)
        found.run(todo)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["steps"] == found.entries
        return {entry["step"]: entry for entry in summary["steps"]}

    return ran


@pytest.fixture
def step():
    from gpu.session.jobs import Step

    def made(name, code, seconds=20.0, **options):
        return Step(name, python(code), seconds, **options)

    return made


@pytest.fixture
def cmake(tmp_path):
    """A function that makes a program with the name of cmake, and returns the variables under which a build finds it."""

    def made(code: str) -> dict[str, str]:
        program = tmp_path / "bin" / "cmake"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable}\nimport os, pathlib, sys, time\n{code}\n")
        program.chmod(0o755)
        return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}

    return made


# Steps that fail -------------------------------------------------------------------------------------------------------


def test_every_way_to_end_is_recorded(session, step, tmp_path):
    from gpu.session.jobs import Step

    found = session(
        step("good", "print(os.environ['WORD'])", variables={"WORD": "hello"}),
        step("bad", "print('the reason'); sys.exit(3)"),
        step("slow", "time.sleep(60)", 0.3),
        Step("absent", ["/no/such/program"], 1),
        step("odd", r"sys.stdout.buffer.write(b'\xff\xfe not UTF-8')"),
        step("none", "sys.exit(5)", outcomes={5: "passed: there is no such test"}),
        step("errors", "sys.exit(9)", outcomes={9: "errors found"}, refusals="Device not supported.*"),
        step("refused", "print('Error: Device not supported. Sorry'); sys.exit(9)", refusals="Device not supported.*"),
        step("killed", "os.kill(os.getpid(), signal.SIGSEGV)"),
        step("last", "pass"),
    )
    outcomes = {name: entry["outcome"] for name, entry in found.items()}
    assert outcomes.pop("absent").startswith("cannot run: ")
    assert outcomes == {
        "good": "passed",
        "bad": "failed with 3",
        "slow": "stopped after 0.3 s",
        "odd": "passed",
        "none": "passed: there is no such test",
        "errors": "errors found",
        "refused": "cannot run: Device not supported. Sorry",
        "killed": "failed with -11",
        "last": "passed",
    }
    assert found["bad"]["output"] == ["the reason"]
    text = (tmp_path / "log.txt").read_text(errors="replace")
    assert "\nhello\n" in text
    assert all(f"=== {name}: {outcome}" in text for name, outcome in outcomes.items())


@pytest.mark.parametrize(
    ("code", "green"), [("pass", True), ("sys.exit(1)", False), ("print('Device not supported'); sys.exit(1)", True)]
)
def test_a_refused_sanitizer_is_no_failure(tmp_path, step, code, green):
    from gpu.session import run

    found = run.Session(tmp_path, tmp_path, dict(os.environ), 60)
    found.run([step("memcheck", code, refusals="Device not supported.*"), step("next", "pass")])
    assert found.green == green


@pytest.mark.slow
def test_a_step_that_hangs_is_killed_with_its_processes(session, step, tmp_path):
    """It ignores SIGTERM, as a process that waits for a kernel does, and so does the process that it has started."""
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    child = f"import signal, time; {ignoring}; print('ready', flush=True); time.sleep(300)"
    parent = f"""
{ignoring}
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
pathlib.Path("pids").write_text(f"{{os.getpid()}} {{child.pid}}")
time.sleep(300)"""
    found = session(step("hangs", parent, 3), step("next", "pass"))
    assert found["hangs"]["outcome"] == "stopped after 3 s"
    assert found["next"]["outcome"] == "passed"
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(ends, pids))


def test_a_step_leaves_no_process_behind(session, step, tmp_path):
    code = "child = subprocess.Popen(['sleep', '300']); pathlib.Path('pid').write_text(str(child.pid))"
    assert session(step("leaves", code))["leaves"]["outcome"] == "passed"
    assert ends(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_a_stopped_benchmark_closes_its_files(session, step, tmp_path):
    """SIGTERM raises SystemExit in every benchmark, so that files are closed and what has to be written last is written."""
    code = f"""
import runpy
stop = runpy.run_path({str(BENCHMARKS / "__main__.py")!r}, run_name="commands")["stop"]
signal.signal(signal.SIGTERM, stop)
try:
    time.sleep(300)
finally:
    pathlib.Path("targets").write_text("known")"""
    assert session(step("slow", code, 3))["slow"]["outcome"] == "stopped after 3 s"
    assert (tmp_path / "targets").read_text() == "known"


def test_a_step_goes_on_in_a_new_process(session, step, tmp_path):
    """A benchmark asks for one if the GPU has become unusable for its process. It gets the seconds that are left."""
    from gpu.exits import RESTART

    code = f"""
log = pathlib.Path("starts")
starts = log.read_text().split() if log.exists() else []
log.write_text(" ".join([*starts, sys.argv[2]]))
time.sleep(0.3)
sys.exit(0 if len(starts) == 2 else {RESTART})"""
    assert session(step("benchmark", code, 20, spare=5))["benchmark"]["outcome"] == "passed"
    seconds = [float(word) for word in (tmp_path / "starts").read_text().split()]
    assert len(seconds) == 3
    assert 15 >= seconds[0] > seconds[1] > seconds[2] > 5
    assert session(step("benchmark", f"sys.exit({RESTART})", 4))["benchmark"]["outcome"] == f"failed with {RESTART}"


def test_a_summary_names_the_running_step(session, step):
    code = "import json; print([step['outcome'] for step in json.load(open('summary.json'))['steps']])"
    found = session(step("first", "pass"), step("second", code, lines=1))
    assert found["second"]["output"] == ["['passed', 'running']"]


# Time ------------------------------------------------------------------------------------------------------------------


def test_the_session_ends_in_time(session, step):
    from gpu.session.jobs import GRACE

    start = time.monotonic()
    found = session(step("long", "time.sleep(60)"), step("next", "pass"), step("last", "pass"), seconds=GRACE + 3)
    assert time.monotonic() - start < GRACE + 3
    assert found["long"]["outcome"].startswith("stopped after ")
    assert [found[name]["outcome"] for name in ("next", "last")] == ["left out: out of time"] * 2


@pytest.mark.slow
def test_the_background_delays_only_what_needs_it(session, step):
    found = session(
        step("build", "print('built'); time.sleep(2)", background=True, lines=1),
        step("needs it", "pass", waits=True),
        step("other", "pass"),
        step("another", "time.sleep(4); print('one'); print('two')", lines=9),
        step("last", "pass", waits=True),
    )
    assert list(found) == ["other", "another", "build", "needs it", "last"]
    assert {entry["outcome"] for entry in found.values()} == {"passed"}
    assert found["build"]["output"] == ["built"]
    assert found["another"]["output"] == ["one", "two"], "the outputs are not mixed"
    assert found["build"]["seconds"] < 4


@pytest.mark.slow
def test_a_build_that_hangs_is_stopped(session, step):
    """At its own limit, while another step runs."""
    found = session(
        step("build", "time.sleep(300)", 1, background=True),
        step("other", "time.sleep(4)"),
        step("needs it", "pass", waits=True),
    )
    assert found["build"]["seconds"] < 3
    assert [entry["outcome"] for entry in found.values()] == ["passed", "stopped after 1 s", "passed"]


def steps_of(tmp_path, **options):
    from gpu.session import steps

    return list(steps.steps(steps.Plan(tmp_path, tmp_path / "site", **options)))


def test_limits(tmp_path):
    from gpu.session import steps

    quick = [step for step in steps_of(tmp_path, quick=True, wheels=tmp_path) if not step.background]
    assert sum(step.seconds for step in quick) <= 180
    assert steps.QUICK_SECONDS <= 180
    assert steps.SECONDS <= 600
    worth_most = [step for step in steps_of(tmp_path) if step.name in ("files", "doctor", "first", "tests", "times")]
    assert sum(step.seconds for step in worth_most) <= 0.75 * steps.SECONDS, "the others have time even if all are late"
    assert all(step.seconds <= 60 for step in steps_of(tmp_path) if step.name == "first")


def test_the_order_is_that_of_worth(tmp_path):
    labels = [step.label for step in steps_of(tmp_path)]
    assert labels == [
        "files",
        "build",
        "doctor",
        "first: triton",
        "first: cuda",
        "first: cpu",
        "tests: triton",
        "tests: cuda",
        "times",
        "forms",
        "peers",
        "stages",
        "memcheck",
        "racecheck",
        "long-tests: triton",
        "long-tests: cuda",
    ]
    assert [step.label for step in steps_of(tmp_path, quick=True)] == [*labels[:5], *labels[6:9]]
    dry = [step.label for step in steps_of(tmp_path, dry=True)]
    assert dry == [label for label in labels if "cuda" not in label and label != "racecheck"]
    needs_no_build = {step.label for step in steps_of(tmp_path) if not step.waits}
    assert needs_no_build == {"files", "build", "doctor", "first: triton", "tests: triton"}


def test_a_session_leaves_few_files(tmp_path):
    written = {name for step in steps_of(tmp_path) for name in step.writes} | {"summary.json", "log.txt"}
    assert len(written) <= 8
    assert not any("/" in name for name in written)


# Steps that are chosen -------------------------------------------------------------------------------------------------


def test_some_steps(tmp_path, capsys):
    from gpu.session import run

    assert run.main(["--list", "--steps", "first, tests"]) == 0
    names = [line.split()[0].rstrip(":") for line in capsys.readouterr().out.splitlines()]
    assert names == ["files", "build", *["first"] * 3, *["tests"] * 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "first,tset"], "expected some of doctor, first, tests, .*, long-tests, got 'tset'"),
        (["--steps", "peers", "--quick"], "a quick or dry session has no peers"),
    ],
)
def test_unknown_steps(tmp_path, capsys, options, message):
    from gpu.session import run

    with pytest.raises(SystemExit) as error:
        run.main(["--out", str(tmp_path / "out"), *options])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_make_passes_the_choice_on(tmp_path):
    command = ["make", "-n", "gpu", "PYTHON=python3", "STEPS=first,tests", "QUICK=1", f"RESULTS_DIR={tmp_path}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"python3 benchmarks session --out {tmp_path} --quick --steps first,tests" in " ".join(said.split()).replace(
        "\\ ", ""
    ).replace('"', "")


def test_results_of_an_earlier_session_are_not_mixed(tmp_path, monkeypatch):
    from gpu.session import run
    from gpu.session.jobs import Step

    for name in ("first.csv", "tests.csv"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(run, "steps", lambda plan: [Step("tests", python("pass"), 20, writes=("tests.csv",))])
    assert run.main(["--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"first.csv", "log.txt", "summary.json"}


# Backends that do not end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "left_out"),
    [
        ("pass", False),
        ("sys.exit(3)", False),
        ("sys.exit(1)", True),
        ("os.kill(os.getpid(), signal.SIGSEGV)", True),
        ("print('solving costs', flush=True); time.sleep(60)", True),
        ("print('importing', flush=True); time.sleep(60)", False),
    ],
)
def test_a_backend_that_does_not_end_is_left_out(session, step, code, left_out):
    """Wrong results (3) are no reason to leave it out: the tests say more about them. Nor is a slow start of Python."""
    told = "print(os.environ.get('OTALIGN_WITHOUT'))"
    found = session(
        step("first", code, 1, part="cuda", backends=("cuda",), first_look=True),
        step("tests", "pass", backends=("cuda",)),
        step("times", told, backends=("triton", "cuda"), lines=1),
    )
    assert found["times"]["output"] == ["cuda" if left_out else "None"]
    assert found["tests"]["outcome"] == ("left out: without cuda" if left_out else "passed")


def test_nothing_is_measured_without_any_backend(session, step):
    found = session(
        step("first", "sys.exit(1)", part="cuda", backends=("cuda",), first_look=True),
        step("times", "pass", backends=("triton", "cuda")),
        OTALIGN_WITHOUT="triton",
    )
    assert found["times"]["outcome"] == "left out: without triton and cuda"


def test_every_step_leaves_out_the_same_backends(monkeypatch):
    from gpu import backends, providers

    import otalign

    monkeypatch.setattr(otalign.backends, "available", lambda: {"triton": None, "cuda": None, "cpu": None})
    monkeypatch.setenv("OTALIGN_WITHOUT", "cuda, cpu")
    assert backends.usable() == ["triton"]
    assert backends.reason_missing("cpu") == "OTALIGN_WITHOUT names it"
    with pytest.raises(providers.Missing, match="OTALIGN_WITHOUT names it"):
        providers.otalign_backend(None, "cuda")
    monkeypatch.delenv("OTALIGN_WITHOUT")
    assert backends.usable() == ["triton", "cuda"]
    for path in (BENCHMARKS / "gpu").rglob("*.py"):
        if path.name != "backends.py":
            assert "OTALIGN_WITHOUT" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL), path


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_tests_of_one_backend(tmp_path, backend):
    """The command selects tests of this backend only, and runs them with the session's plug-in."""
    from gpu.session import steps

    plan = steps.Plan(tmp_path, ROOT)
    command = [*steps.pytest(plan, "gpu and not slow", backend), "--collect-only", "-p", "no:xdist"]
    command = [word for word in command if word not in ("-n", str(steps.workers()), "--dist", "worksteal")]
    (tmp_path / "tests.csv").touch()  # pytest takes it for a path of tests, and its folder is not in the project
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | steps.test_variables(plan, backend), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 20
    assert all(re.search(rf"\[.*{backend}\b", test) for test in tests), tests
    assert "PytestUnknownMarkWarning" not in done.stdout, "the project's settings of pytest are not in use"


def test_session_runs_every_gpu_test(tmp_path):
    """The session names files, so that imports of other tests cannot fail it. These must be all files with marked tests."""
    from gpu.session import steps

    marked = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^[^\"#]*pytest\.mark\.gpu", path.read_text(), re.M)
    ]
    assert marked
    command = steps.pytest(steps.Plan(tmp_path, tmp_path), "gpu", "triton")
    assert {str(path) for path in marked} <= set(command)


@pytest.mark.parametrize("dry", [False, True])
def test_session_needs_its_tests(tmp_path, monkeypatch, dry):
    """Without a path, pytest would run all tests."""
    from gpu.session import steps

    monkeypatch.setattr(steps, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected test_gpu.*\.py in .*, found none"):
        steps.pytest(steps.Plan(tmp_path, tmp_path, dry=dry), "gpu", "triton")


def test_own_providers_and_few_peers_come_first(tmp_path):
    from gpu import providers
    from gpu.session import steps

    assert steps.OURS == providers.OURS
    assert set(steps.PEERS) < set(providers.PROVIDERS)


# Variables -------------------------------------------------------------------------------------------------------------


def test_variables_of_the_steps(tmp_path, monkeypatch):
    from gpu.session import run, steps

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plan = steps.Plan(tmp_path, tmp_path / "site")
    found = run.variables(plan)
    assert "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(plan.site)
    assert found["OTALIGN_EXT_DIR"] == str(plan.site / "otalign")
    assert run.variables(plan._replace(dry=True))["TRITON_INTERPRET"] == "1"


def test_peers_leave_the_gpu_alone(monkeypatch):
    """POT imports JAX, CuPy and TensorFlow if it may, and JAX takes most of the GPU's memory."""
    from common import peers

    assert peers.QUIET.items() <= os.environ.items()
    folder = importlib.util.find_spec("ot").submodule_search_locations[0]
    source = Path(folder, "backend.py").read_text()
    for library in ("JAX", "CUPY", "TENSORFLOW"):
        name = f"POT_BACKEND_DISABLE_{library}"
        assert peers.QUIET[name] == "1"
        assert f'"{name}"' in source, "POT reads this name"
    assert peers.QUIET["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_architectures_are_those_of_this_machine(tmp_path, monkeypatch):
    """Also if the environment asks for others."""
    from gpu.session import build

    found = []
    capabilities = [(12, 0), (9, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(build, "compiled", lambda folder: found.append(os.environ["TORCH_CUDA_ARCH_LIST"]) or fail())
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")

    def fail():
        raise build.Failed("on purpose")

    assert build.main([str(tmp_path)]) == 1
    assert found == ["9.0a;12.0"]


# The build -------------------------------------------------------------------------------------------------------------

BUILD = f"""
sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu.session import build
build.copy_files(pathlib.Path("site"))
build.build_extension(pathlib.Path("site"))"""
REASON = "import otalign; print(otalign.backends.available()['cpu']); print(otalign.backends.available()['triton'])"


def package_in(site: Path) -> list[str]:
    """What the package in `site` says of its backends cpu and triton."""
    variables = {"PYTHONPATH": str(site), "OTALIGN_EXT_DIR": str(site / "otalign"), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REASON], cwd=site, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_build_that_fails_leaves_the_python_files(session, step, cmake, tmp_path):
    variables = cmake("print('note'); print('kernel.cu(3): error: no such thing'); sys.exit('--build' in sys.argv)")
    assert session(step("build", BUILD, variables=variables))["build"]["outcome"] == "failed with 1"
    cpu, triton = package_in(tmp_path / "site")
    assert cpu == "otalign._C was not built: kernel.cu(3): error: no such thing"
    assert triton == "None"


@pytest.mark.slow
def test_a_build_that_is_killed_leaves_no_half_module(session, step, cmake, tmp_path):
    """It is killed while it writes the module."""
    half = """
folder = [word.partition("=")[2] for word in sys.argv if "LIBRARY_OUTPUT" in word]
if folder:
    os.makedirs(folder[0])
    pathlib.Path(folder[0], "_C.fake.so").write_text("half a mod")
else:
    time.sleep(300)"""
    found = session(step("build", BUILD, 4, variables=cmake(half)), step("next", "pass"))
    assert [entry["outcome"] for entry in found.values()] == ["stopped after 4 s", "passed"]
    assert list((tmp_path / "site").rglob("_C.fake.so")) == [tmp_path / "site" / "build" / "module" / "_C.fake.so"]
    cpu, triton = package_in(tmp_path / "site")
    assert cpu == "otalign._C was not built: its build has not ended"
    assert triton == "None"


def test_a_complete_module_is_put_into_place(session, step, cmake, tmp_path):
    whole = """
folder = [word.partition("=")[2] for word in sys.argv if "LIBRARY_OUTPUT" in word]
if folder:
    os.makedirs(folder[0])
    pathlib.Path(folder[0], "_C.fake.so").write_text("a module")
else:
    assert int(sys.argv[sys.argv.index("--parallel") + 1]) >= 1"""
    assert session(step("build", BUILD, variables=cmake(whole)))["build"]["outcome"] == "passed"
    package = tmp_path / "site" / "otalign"
    assert (package / "_C.fake.so").read_text() == "a module"
    assert "EXTENSION = 'built'" in (package / "_build_info.py").read_text()
    assert (package / "triton_kernels" / "__init__.py").exists()


# Signals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_session_with_a_summary(tmp_path, name):
    busy = "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(300)"
    code = f"""
sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu.session import run
from gpu.session.jobs import Step
pids = [{str(tmp_path / "build")!r}, {str(tmp_path / "busy")!r}]
run.steps = lambda plan: [
    Step("good", [sys.executable, "-c", "pass"], 20),
    Step("build", [*{python(busy)!r}, pids[0]], 200, background=True),
    Step("busy", [*{python(busy)!r}, pids[1]], 200),
    Step("next", [sys.executable, "-c", "pass"], 20),
]
sys.exit(run.main(["--out", {str(tmp_path / "out")!r}]))"""
    process = subprocess.Popen(python(code), stdout=subprocess.DEVNULL)
    files = [tmp_path / "build", tmp_path / "busy"]
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert {entry["step"]: entry["outcome"] for entry in found} == {
        "good": "passed",
        "busy": f"stopped: the session got {name}",
        "build": f"stopped: the session got {name}",
        "next": f"left out: the session got {name}",
    }
    assert all(ends(int(file.read_text())) for file in files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "summary.json"]


# Results of tests, as they come ----------------------------------------------------------------------------------------

TESTS = """
import time, pytest
@pytest.mark.parametrize("size", [1, 2])
def test_good(size): pass
def test_bad(): assert 1 == 2, "on purpose"
def test_hangs():
    open("hangs", "w").close()
    time.sleep(300)
"""


def live(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu.session.live"]
    command += ["--live", str(tmp_path / "tests.csv"), "--live-label", "triton", *options, "test_some.py"]
    variables = {"PYTHONPATH": str(BENCHMARKS)}
    return subprocess.Popen(command, cwd=tmp_path, env=os.environ | variables, stdout=subprocess.DEVNULL, text=True)


def test_stopped_tests_leave_their_results(tmp_path):
    process = live(tmp_path, "-p", "no:xdist")
    until = time.monotonic() + 60
    while not (tmp_path / "hangs").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    found = rows(tmp_path / "tests.csv")
    assert [(row["test"], row["outcome"]) for row in found] == [
        ("test_some.py::test_good[1]", "passed"),
        ("test_some.py::test_good[2]", "passed"),
        ("test_some.py::test_bad", "failed"),
    ]
    assert found[2]["message"].startswith("AssertionError: on purpose")
    assert {row["label"] for row in found} == {"triton"}
    process.terminate()
    process.wait(30)
    assert [row["outcome"] for row in rows(tmp_path / "tests.csv")[3:]] == ["stopped"]
    assert rows(tmp_path / "tests.csv")[3]["test"] == "test_some.py::test_hangs"


@pytest.mark.slow
def test_results_of_workers_and_of_one_variant(tmp_path):
    (tmp_path / "tests.csv").write_text("label,test,outcome,seconds,message\ncuda,one,passed,1,\n")
    assert live(tmp_path, "-n", "2", "--one-variant", "-k", "not hangs").wait(120) == 1
    found = {row["test"]: row["outcome"] for row in rows(tmp_path / "tests.csv")}
    assert found == {"one": "passed", "test_some.py::test_good[1]": "passed", "test_some.py::test_bad": "failed"}


# The benchmark, step by step -------------------------------------------------------------------------------------------


def test_a_benchmark_goes_on_with_what_has_no_row(tmp_path, monkeypatch):
    from gpu import benchmark

    dry = ["--dry", "--append", "--out", str(tmp_path)]
    assert benchmark.main([*dry, "--first", "--providers", "POT"]) == 0
    first = rows(tmp_path / "benchmark.csv")
    assert {row["shape"] for row in first} == {"small", "small, early exit"}
    assert {row["dtype"] for row in first} == {"bf16"}
    assert benchmark.main([*dry, "--providers", "POT", "--seconds", "0"]) == 0
    late = rows(tmp_path / "benchmark.csv")
    assert late[: len(first)] == first
    assert {row["match"] for row in late[len(first) :]} == {"missing: out of time"}
    assert benchmark.main([*dry, "--providers", "POT"]) == 0
    found = rows(tmp_path / "benchmark.csv")
    assert found[: len(first)] == first, "what was measured is not measured again"
    assert {row["match"] for row in found} == {"True"}
    assert len(found) == len(late) == len({(row["shape"], row["dtype"], row["mode"]) for row in found})
    assert benchmark.main([*dry[:1], *dry[2:], "--first", "--providers", "FlashSinkhorn"]) == 0
    assert {row["provider"] for row in rows(tmp_path / "benchmark.csv")} == {"FlashSinkhorn"}, "without --append: anew"


def test_a_case_without_a_truth_has_rows(tmp_path, monkeypatch):
    from gpu import benchmark

    def prepared(bench, case):
        if case.tol:
            raise torch.OutOfMemoryError("on purpose")
        return right(bench, case)

    right = benchmark.Bench.prepared
    monkeypatch.setattr(benchmark.Bench, "prepared", prepared)
    benchmark.main(["--dry", "--first", "--out", str(tmp_path), "--providers", "POT"])
    matches = {row["shape"]: row["match"] for row in rows(tmp_path / "benchmark.csv")}
    assert matches == {"small": "True", "small, early exit": "failed: OutOfMemoryError: on purpose"}


@pytest.mark.slow
def test_a_provider_that_never_ends_has_rows(tmp_path):
    """It waits in C, where no Python signal handler runs. The others are measured in a new process."""
    from gpu.exits import RESTART

    code = f"""
sys.path.insert(0, {str(BENCHMARKS)!r})
import ctypes
from gpu import benchmark, providers
benchmark.PATIENCE_DRY, benchmark.STUCK = 0.5, 0.5
missing = providers.PROVIDERS["FlashSinkhorn"]
def hangs(task):
    if task.tol:
        return missing(task)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # another thread takes the signal
    ctypes.CDLL(None).sleep(300)
providers.PROVIDERS["GeomLoss"] = hangs
sys.exit(benchmark.main(["--dry", "--append", "--first", "--out", "out", "--providers", "GeomLoss", "FlashSinkhorn"]))"""
    codes = [subprocess.run(python(code), cwd=tmp_path, timeout=120).returncode for _ in range(2)]
    assert codes == [RESTART, 0]
    matches = {(row["shape"], row["provider"]): row["match"] for row in rows(tmp_path / "out" / "benchmark.csv")}
    assert matches == {
        ("small", "GeomLoss"): "failed: did not end within 1.0 s",
        ("small", "FlashSinkhorn"): "missing: flash-sinkhorn is not installed",
        ("small, early exit", "GeomLoss"): "missing: flash-sinkhorn is not installed",
        ("small, early exit", "FlashSinkhorn"): "missing: flash-sinkhorn is not installed",
    }
    assert (tmp_path / "out" / "targets.txt").exists()


def test_an_unusable_gpu_asks_for_a_new_process(monkeypatch):
    from gpu import benchmark
    from gpu.exits import RESTART

    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench = object.__new__(benchmark.Bench)
    bench.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit) as ended:
        bench.restart_if_lost()
    assert ended.value.code == RESTART
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    bench.restart_if_lost()


def test_a_backend_that_fails_leaves_the_stages_of_the_other(tmp_path, monkeypatch):
    from gpu import backends, stages

    def few(batch, backend, iterations, repeats):
        if backend == "triton":
            raise RuntimeError("on purpose")
        return [("cost_kernel", [1.0, 2.0])]

    monkeypatch.setattr(backends, "usable", lambda: ["triton", "cuda"])
    monkeypatch.setattr(stages, "stages", few)
    assert stages.main(["--dry", "--out", str(tmp_path)]) == 1
    found = {(row["dtype"], row["backend"]): row["kernel"] for row in rows(tmp_path / "stages.csv")}
    for dtype in ("bf16", "fp32"):
        assert found[dtype, "triton"] == "failed: RuntimeError: on purpose"
        assert found[dtype, "cuda"] == "cost_kernel"


# The first look --------------------------------------------------------------------------------------------------------


def test_the_first_look_is_right_and_timed(tmp_path):
    from gpu.session import first_look

    for backend in ("triton", "cpu"):
        assert first_look.main([backend, "--dry", "--out", str(tmp_path)]) == 0
    found = rows(tmp_path / "first.csv")
    assert [(row["backend"], row["problem"], row["match"]) for row in found] == [
        (backend, problem, "True") for backend in ("triton", "cpu") for problem in ("costs", "loss")
    ]
    for row in found:
        assert float(row["error"]) < 1e-4
        assert float(row["gradient_error"]) < 1e-3
        assert bool(row["median_us"]) == (row["problem"] == "loss")
        assert row["commit"]
        assert "dry run" in row["device"]


@pytest.mark.parametrize("wrong", ["loss", "gradient", "plan", "gradient of costs", "fails", "fails everywhere"])
def test_the_first_look_finds_faults(tmp_path, monkeypatch, wrong):
    """A wrong result has no time, and the rest is looked at. A backend that solves nothing is left out (1)."""
    from gpu.session import first_look

    import otalign

    loss, solve_cost = otalign.sinkhorn_loss, otalign.solve_cost

    def spoilt_loss(*arguments, **options):
        if wrong.startswith("fails"):
            raise RuntimeError("on purpose")
        right = loss(*arguments, **options)
        value, slope = 1 + 0.01 * (wrong == "loss"), 0.1 * (wrong == "gradient")
        return value * right + slope * (right - right.detach())

    def spoilt_costs(C, *, backend, **options):
        if wrong == "fails everywhere":
            raise RuntimeError("on purpose")
        result = solve_cost(C, backend=backend, **options)
        if backend == "reference":
            return result
        plan, cost = 1 + 0.01 * (wrong == "plan"), 1 + 0.01 * (wrong == "gradient of costs")
        return SimpleNamespace(value_linear=cost * result.value_linear, plan=lambda: plan * result.plan())

    monkeypatch.setattr(otalign, "sinkhorn_loss", spoilt_loss)
    monkeypatch.setattr(otalign, "solve_cost", spoilt_costs)
    assert first_look.main(["cpu", "--dry", "--out", str(tmp_path)]) == (1 if wrong == "fails everywhere" else 3)
    found = {row["problem"]: row for row in rows(tmp_path / "first.csv")}
    places = {"plan": ["costs"], "gradient of costs": ["costs"], "fails everywhere": ["costs", "loss"]}
    spoilt = places.get(wrong, ["loss"])
    expected = "failed: RuntimeError: on purpose" if wrong.startswith("fails") else "False"
    for problem, row in found.items():
        assert row["match"] == (expected if problem in spoilt else "True")
        assert bool(row["median_us"]) == (problem == "loss" and problem not in spoilt)


def test_a_missing_backend_is_left_out(tmp_path, capsys):
    from gpu.session import first_look

    assert first_look.main(["cuda", "--out", str(tmp_path)]) == 1
    assert "cuda is missing: " in capsys.readouterr().out


# All together ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # `make gpu DRY=1` as a whole
def test_a_rehearsal_without_an_extension(tmp_path, cmake):
    """The build fails, and what needs no extension is looked at and kept."""
    command = [
        sys.executable,
        str(BENCHMARKS),
        "session",
        "--dry",
        "--steps",
        "doctor,first",
        "--out",
        str(tmp_path / "out"),
    ]
    variables = cmake("print('error: no compiler'); sys.exit(1)")
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = {entry["step"]: entry for entry in summary["steps"]}
    assert {name: entry["outcome"] for name, entry in found.items()} == {
        "files": "passed",
        "doctor": "passed",
        "build": "failed with 1",
        "first: triton": "passed",
        "first: cpu": "failed with 1",
    }, done.stdout
    assert "the extension was not built: error: no compiler" in found["build"]["output"]
    assert found["first: cpu"]["output"] == ["cpu is missing: otalign._C was not built: error: no compiler"]
    assert any(line.split()[:2] == ["backend", "triton"] for line in found["doctor"]["output"])
    assert summary["commit"]
    assert {row["backend"] for row in rows(tmp_path / "out" / "first.csv")} == {"triton"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first.csv", "log.txt", "summary.json"]
