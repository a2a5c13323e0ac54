"""The package as others get it: a wheel used where no checkout is, an editable install whose types resolve."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import DATA

import ctfp8_compile as ctfp8

ROOT = DATA.parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: a build leaves its own folders beside the sources."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "ctfp8_compile", folder / "ctfp8_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The python of an environment with this one's packages behind its own; import hooks of this one's are not in it."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (own / "behind.pth").write_text(sysconfig.get_path("purelib"))
    return python


def install(python: Path, *what: object) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-build-isolation", "--no-index", *map(str, what)])


def run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_works_where_no_checkout_is(source: Path, environment: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)])
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"ctfp8_compile-{ctfp8.__version__}-py3-none-any.whl"
    install(environment, wheel)
    shutil.copytree(ROOT / "examples/models/llama", tmp_path / "llama")
    ctfp8_command = str(environment.parent / "ctfp8")
    assert "LlamaForCausalLM, 1 file" in run([ctfp8_command, "inspect", "llama"], tmp_path)
    code = (
        "import ctfp8_compile, pathlib; from ctfp8_compile.ops.cpu import build; f = pathlib.Path(ctfp8_compile.__file__).parent;"
        "print(f, len(build._SOURCES), len(build._HEADERS), (f / 'py.typed').exists())"
    )
    folder, *counts = run([str(environment), "-c", code], tmp_path).split()
    assert folder.startswith(str(environment.parent.parent))
    csrc = ROOT / "ctfp8_compile/ops/cpu/csrc"
    assert counts == [str(len([*csrc.glob("*.cpp")])), str(len([*csrc.glob("*.h")])), "True"]


@pytest.mark.long  # mypy reads torch: a minute
def test_types_of_an_editable_install_resolve_for_a_users_mypy(source: Path, environment: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    install(environment, "--editable", source)
    user = tmp_path / "user.py"
    user.write_text(
        "import ctfp8_compile as ctfp8\n"
        "report: ctfp8.Report = ctfp8.load('m.pt2').report\n"
        "wrong: int = ctfp8.load('m.pt2')  # line 3\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(environment), "--follow-imports", "silent"]
    done = subprocess.run([*mypy, "user.py"], cwd=tmp_path, capture_output=True, text=True)
    assert [line.split(": ")[0] for line in done.stdout.splitlines() if "error" in line.split(": ")[1:2]] == [
        "user.py:3"
    ]
    assert "Artifact" in done.stdout
