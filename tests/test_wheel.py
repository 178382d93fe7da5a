"""What is installed from the wheel works on its own, away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from small_runs import SMALL, VIT, read_json

PROJECT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def shell(*command: str, cwd: Path, **env: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shell(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(PROJECT), cwd=folder)
    (built,) = folder.glob("prune_tell-*.whl")
    return built


def test_the_wheel_holds_every_config_and_nothing_of_the_checkout(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {path.relative_to(PROJECT) for path in (PROJECT / "configs").rglob("*.yaml")}
    assert {f"prune_tell/{path}" for path in configs} <= names
    sources = {path.relative_to(PROJECT / "src") for path in (PROJECT / "src").rglob("*.py")}
    assert set(map(str, sources)) <= names
    assert not [name for name in names if "test" in name.split("/")[0] or name.endswith((".pyc", ".pt"))]


def test_prune_tell_train_runs_from_the_wheel(wheel, tmp_path):
    """Installed apart, run from another directory: code and configs come from the wheel."""
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    shell(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=here
    )
    where = "from prune_tell.config import config_dir; print(config_dir())"
    assert Path(shell(sys.executable, "-c", where, cwd=here, PYTHONPATH=str(site)).strip()) == (
        site / "prune_tell" / "configs"
    )
    script = site / "bin" / "prune-tell"
    overrides = (*VIT, *SMALL, "trainer.max_steps=2", "prune_ratio=0.3", "run_dir=run")
    shell(str(script), "train", *overrides, cwd=here, PYTHONPATH=str(site))
    assert read_json(here / "run" / "summary.json")["kept_tokens"] == 7
    told = shell(str(script), "train", "debug=tiny", "--cfg", "job", cwd=here, PYTHONPATH=str(site))
    assert "max_images: 64" in told
