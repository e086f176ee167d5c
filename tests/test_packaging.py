"""What `pip install .` brings, and that it runs where no source is."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree, as a fresh clone would build it: nothing compiled lies about."""
    pytest.importorskip("Cython", reason="the build tools are not installed; ./bootstrap test brings them")
    tree = tmp_path_factory.mktemp("tree")
    left_out = ["--exclude=*.so", "--exclude=appliance/*.c", "--exclude=__pycache__", "--exclude=*.egg-info"]
    tops = ["appliance", "workers", "config", "systemd", "pyproject.toml", "README.md"]
    present = [top for top in tops if (project / top).exists()]
    pack = ["tar", "-C", str(project), *left_out, "-cf", "-", *present]
    archive = subprocess.run(pack, capture_output=True, check=True)
    subprocess.run(["tar", "-C", tree, "-xf", "-"], input=archive.stdout, check=True)
    # What is looked at is what is in the wheel, so the compiler need not try hard.
    pyproject = tree / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"-O3"', '"-O0"'))
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def declared(project: Path) -> Mapping[str, list[str]]:
    tables = tomllib.loads((project / "pyproject.toml").read_text())
    return {
        "packages": tables["tool"]["setuptools"]["packages"],
        "extensions": [module["name"] for module in tables["tool"]["setuptools"]["ext-modules"]],
    }


def test_every_package_of_the_tree_is_declared(project: Path, declared: Mapping[str, list[str]]) -> None:
    found = {
        ".".join(path.parent.relative_to(project).parts)
        for top in ("appliance", "workers")
        for path in (project / top).rglob("__init__.py")
    }
    assert set(declared["packages"]) == found


def test_every_compiled_module_is_declared_and_has_its_interface_described(
    project: Path, declared: Mapping[str, list[str]]
) -> None:
    sources = sorted((project / "appliance").rglob("*.pyx"))
    assert sorted(".".join(path.relative_to(project).with_suffix("").parts) for path in sources) == sorted(
        declared["extensions"]
    )
    # For Python, or for other compiled modules alone.
    undescribed = [
        path for path in sources if not any(path.with_suffix(suffix).exists() for suffix in (".pyi", ".pxd"))
    ]
    assert undescribed == []


def test_a_wheel_holds_the_modules_and_their_types_and_no_sources_of_compiled_code(
    wheel: zipfile.ZipFile, declared: Mapping[str, list[str]], project: Path
) -> None:
    names = wheel.namelist()
    for module in declared["extensions"]:
        start = module.replace(".", "/") + "."
        assert [name for name in names if name.startswith(start) and name.endswith(".so")], module
    for top in ("appliance", "workers"):
        sources = [*(project / top).rglob("*.py"), *(project / top).rglob("*.pyi")]
        assert {path.relative_to(project).as_posix() for path in sources} <= set(names)
    assert {"appliance/py.typed", "workers/py.typed"} <= set(names)
    assert [name for name in names if name.endswith((".pyx", ".pxd", ".c", ".h"))] == []
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("capture_appliance-")} == {"appliance", "workers"}


def test_a_wheel_brings_the_commands_the_configuration_and_the_service_files(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    data = {name.split(".data/data/", 1)[1] for name in names if ".data/data/" in name}
    assert data == {
        "share/capture-appliance/config/appliance.toml",
        "share/capture-appliance/config/quickstart.toml",
        "lib/systemd/system/appliance.service",
        "lib/sysusers.d/appliance.conf",
        "lib/tmpfiles.d/appliance.conf",
    }
    (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(entry_points).decode())
    assert dict(scripts["console_scripts"]) == {
        "appliance": "appliance.start:main",
        "mtracecap": "appliance.mtracecap:main",
    }


def test_what_was_installed_runs_without_the_tree(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    site = tmp_path / "site"
    wheel.extractall(site)
    program = """
import importlib, pkgutil, sys
import appliance, workers
for package in (appliance, workers):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        assert module.module_finder.path.startswith(sys.argv[1]), module
        importlib.import_module(module.name)
"""
    done = subprocess.run(
        [os.path.abspath(sys.executable), "-P", "-c", program, str(site)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
