"""The wheel and the sdist: what they hold, and that a fresh environment runs a recipe from an empty directory."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = [
    path.relative_to(ROOT).as_posix() for folder in ("configs", "recipes") for path in (ROOT / folder).rglob("*.yaml")
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], check=True)
    return folder


def run(*command, cwd):
    """Run as a user would, without this checkout on any path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def make_environment(folder):
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def test_wheel_and_sdist_hold_the_recipes(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"lightning_faast/{name}" for name in SHIPPED} <= set(names)
    assert "lightning_faast/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "recipes/", "configs/"))]
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SHIPPED, "pyproject.toml", "tests/test_package.py"} <= members


def test_wheel_runs_in_a_fresh_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    binaries = make_environment(tmp_path / "environment")
    run(binaries / "pip", "install", "--quiet", f"lightning-faast[quickstart] @ {wheel.as_uri()}", cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "recipes/vit_cifar.yaml" in run(binaries / "lightning-faast", "--help", cwd=empty)
    output = run(binaries / "python", "-m", "lightning_faast", "fit", "--config", "recipes/quickstart.yaml", cwd=empty)
    name, accuracy = output.strip().splitlines()[-1].split()
    assert name == "test/accuracy"
    assert float(accuracy) >= 0.93
    assert list((empty / "logs/version_0/checkpoints").glob("*.ckpt"))


def test_editable_install_finds_the_recipes_of_the_checkout(tmp_path):
    binaries = make_environment(tmp_path / "environment")
    # no dependencies: the help and the lookup of files need none
    run(binaries / "pip", "install", "--quiet", "--no-deps", "--editable", ROOT, cwd=tmp_path)
    script = "from lightning_faast.cli import find_config; print(find_config('recipes/quickstart.yaml'))"
    assert run(binaries / "python", "-c", script, cwd=tmp_path).strip() == str(ROOT / "recipes/quickstart.yaml")
    assert "recipes/vit_cifar.yaml" in run(binaries / "lightning-faast", "--help", cwd=tmp_path)
