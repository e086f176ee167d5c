"""`./bootstrap` from the outside: what it says, and that it does not get between the user and the job."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def bootstrap(project: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([project / "bootstrap", *arguments], capture_output=True, text=True, env=env)


def test_without_a_job_it_says_what_there_is(project: Path) -> None:
    done = bootstrap(project)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "run",
        "test",
        "bench",
        "soak",
        "fuzz",
        "check",
        "help",
    ]


def test_an_unknown_job_is_a_usage_error(project: Path) -> None:
    done = bootstrap(project, "rum")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("usage: ./bootstrap JOB")


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize("script", ["bootstrap", ".ci/run"])
def test_the_scripts_are_plain_posix_shell(project: Path, shell: str, script: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert (project / script).read_text().startswith("#!/bin/sh\n")
    options = ["--posix"] if shell == "bash" else []
    subprocess.run([shell, *options, "-n", project / script], check=True)


def bare_system(directory: Path) -> dict[str, str]:
    """An environment whose PATH has a shell and its tools but no compiler, no Python, and no way to install any."""
    tools = "sh dirname basename mkdir date tail tr sort cut cat id flock wc find xargs sha256sum sed grep rm".split()
    for tool in tools:
        found = shutil.which(tool)
        assert found is not None, tool
        (directory / tool).symlink_to(found)
    return {"PATH": str(directory), "HOME": str(directory)}


def test_what_is_missing_is_named_where_it_cannot_be_installed(project: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copy2(project / "bootstrap", tree)
    tools = tmp_path / "tools"
    tools.mkdir()
    environment = bare_system(tools)
    done = bootstrap(tree, "test", env={**environment, "PYTHON": "/nonexistent/python3"})
    assert done.returncode == 1
    assert "this system has no apt" in done.stderr
    for package in ("gcc", "libc6-dev", "libpcap-dev", "libssl-dev", "tshark", "tcpdump", "nfdump", "prometheus"):
        assert f" {package} " in f"{done.stderr} ".replace("\n", " ")

    # With apt, but without the right to use it, one command does it all.
    (tools / "apt-get").symlink_to("/bin/true")
    (tools / "id").unlink()
    (tools / "id").write_text("#!/bin/sh\necho 1000\n")
    (tools / "id").chmod(0o755)
    done = bootstrap(tree, "run", env={**environment, "PYTHON": "/nonexistent/python3"})
    assert done.returncode == 1
    assert (
        "please run:  sudo apt-get update && sudo apt-get install --no-install-recommends gcc libc6-dev " in done.stderr
    )


def built(project: Path, tree: Path, extras: str, pyproject: str = "") -> None:
    """A tree with an environment that was built for the jobs `extras`. Its pip only says what it would fetch."""
    programs = tree / ".venv" / "bin"
    programs.mkdir(parents=True)
    (tree / "appliance").mkdir()
    (tree / "pyproject.toml").write_text(pyproject)
    shutil.copy2(project / "bootstrap", tree)
    pip = '[ "$1 $2" != "-m pip" ] || { shift 2; echo "pip $@"; cat build/requirements.txt; exit 0; }'
    (programs / "python").write_text(f'#!/bin/sh\n{pip}\nexec {sys.executable} "$@"\n')
    (programs / "appliance").write_text('#!/bin/sh\necho "$@"\n')
    for check in ("ruff", "cython-lint", "mypy"):
        (programs / check).symlink_to("/bin/true")
    for program in ("python", "appliance"):
        (programs / program).chmod(0o755)
    version = subprocess.run([sys.executable, "-VV"], capture_output=True, check=True).stdout
    sources = f"{hashlib.sha256(pyproject.encode()).hexdigest()}  pyproject.toml\n".encode()
    (tree / ".venv" / "bootstrap.key").write_text(f"{hashlib.sha256(version + sources).hexdigest()} {extras}\n")


def test_an_environment_that_was_made_for_the_tests_runs_the_appliance_without_another_build(
    project: Path, tmp_path: Path
) -> None:
    built(project, tmp_path / "tree", "check test")
    done = bootstrap(tmp_path / "tree", "run", "-c", "x.toml", env={**os.environ, "PYTHON": sys.executable})
    assert (done.returncode, done.stdout) == (0, "run -c x.toml\n"), done.stderr


def test_another_job_of_the_same_sources_fetches_what_it_needs_and_builds_nothing(
    project: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    built(project, tree, "run", '[project.optional-dependencies]\ncheck = ["a-linter>=2"]\ntest = ["a-judge"]\n')
    done = bootstrap(tree, "check", env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    log = (tree / "build" / "bootstrap.log").read_text()
    assert f"pip install -r {tree}/build/requirements.txt\na-linter>=2\n" in log
    assert "building" not in log and "a-judge" not in log
    assert (tree / ".venv" / "bootstrap.key").read_text().split()[1:] == ["check", "run"]
