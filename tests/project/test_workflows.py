"""Do the workflows call what exists, with pinned actions, few permissions and a limit of time?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
SUPPORTED = SpecifierSet(re.search(r'requires-python = "(.+)"', PYPROJECT)[1])
MAKE = re.compile(r"\bmake((?: +[\w-]+)+)")


def read(workflow: Path) -> dict[Any, Any]:
    return yaml.safe_load(workflow.read_text())


def jobs(workflow: Path) -> Iterator[dict[str, Any]]:
    yield from read(workflow)["jobs"].values()


def steps(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(workflow):
        yield from job["steps"]


def targets_of(command: str) -> list[str]:
    """The targets in a shell command that calls make."""
    return [target for call in MAKE.findall(command) for target in call.split()]


def pythons(workflow: Path) -> Iterator[str]:
    """The versions that jobs ask for; those of a matrix are under the key `python`."""
    for job in jobs(workflow):
        yield from (row["python"] for row in job.get("strategy", {}).get("matrix", {}).get("include", []))
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version", "")
            if version and not version.startswith("${{"):
                yield version


def test_what_is_checked_where():
    assert [workflow.stem for workflow in WORKFLOWS] == ["gpu", "tests", "wheels"]
    called = {w.stem: {t for step in steps(w) for t in targets_of(step.get("run", ""))} for w in WORKFLOWS}
    assert called == {"gpu": {"gpu"}, "tests": {"lint", "docs", "test"}, "wheels": set()}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_make_targets_exist(workflow):
    for step in steps(workflow):
        for target in targets_of(step.get("run", "")):
            assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), f"make has no target {target}"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_versions_of_python_are_supported(workflow):
    for version in pythons(workflow):
        assert isinstance(version, str), f"YAML reads {version} as a number: quote it"
        assert f"{version}.99" in SUPPORTED


def test_wheels_are_for_versions_that_are_supported():
    wheels = re.search(r"^\[tool\.cibuildwheel\]\nbuild = \[(.+)\]", PYPROJECT, re.MULTILINE)[1]
    versions = re.findall(r'"cp3(\d+)-\*"', wheels)
    assert len(versions) == wheels.count(",") + 1
    assert all(f"3.{minor}.99" in SUPPORTED for minor in versions)
    assert f"3.{int(versions[0]) - 1}.99" not in SUPPORTED, "the oldest has a wheel"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned(workflow):
    for step in steps(workflow):
        assert re.search(r"@[0-9a-f]{40}$", step.get("uses", "@" + "0" * 40)), step["uses"]
    text = workflow.read_text()
    assert len(re.findall(r"uses: .+@.+ # v\d", text)) == text.count("uses:"), "the version stands behind the commit"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_jobs_may_little_and_end(workflow):
    assert read(workflow)["permissions"] == {"contents": "read"}
    assert "concurrency" in read(workflow)
    for job in jobs(workflow):
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90


def test_gpu_job_keeps_the_results_of_a_failed_session():
    (job,) = jobs(ROOT / ".github/workflows/gpu.yml")
    assert job["runs-on"] == ["self-hosted", "gpu"]
    *_, session, upload = job["steps"]
    assert session["run"] == "make gpu"
    assert upload["if"] == "always()"
    assert upload["with"]["path"] == re.search(r"^RESULTS_DIR \?= (.+)$", MAKEFILE, re.MULTILINE)[1]
    for variable in session.get("env", ()):
        assert f"$({variable})" in MAKEFILE


def test_gpu_job_runs_no_code_of_strangers():
    """A pull request runs on the GPU machine only with a label, and only from a branch of this repository."""
    (job,) = jobs(ROOT / ".github/workflows/gpu.yml")
    assert "labels.*.name, 'gpu')" in job["if"]
    assert "head.repo.full_name == github.repository" in job["if"]
