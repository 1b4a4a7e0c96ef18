"""What users install: a wheel in another folder, with its prompts and the bundled model."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_built_wheel_brings_prompts_and_the_demo(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import autointerp\n"
        "from autointerp.prompts import load_prompt\n"
        "from autointerp.demo import bundled\n"
        "print(autointerp.__file__)\n"
        "print(load_prompt('score/detection').prompt_id, (bundled('model') / 'model.safetensors').exists())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True).stdout.splitlines()
    assert out[0].startswith(str(tmp_path)) and out[1].endswith(" True")
    here = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=True).stdout.splitlines()
    assert here[0].startswith(str(ROOT)) and here[1] == out[1]  # the editable install reads the checkout's prompts
