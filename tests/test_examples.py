"""The scripts for large pictures, run as they are on the embedded models."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "args", "sizes"),
    [
        (
            "highres_sd15_linfusion_16k.py",
            ("--model", "shapes-sd", "--height", "128", "--width", "256"),
            [(128, 64), (256, 128)],
        ),
        ("highres_sdxl_hidiffusion.py", ("--model", "shapes-sd", "--size", "192"), [(128, 128), (192, 192)]),
        ("highres_flux_clear.py", ("--model", "shapes-flux", "--steps", "8"), [(128, 128), (256, 256)]),
    ],
)
def test_large_pictures_offline(script, args, sizes, tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *args, "--device", "cpu", "--output", tmp_path],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = sorted(tmp_path.glob("stage-*.png"))
    assert [Image.open(path).size for path in found] == sizes
    assert run.stdout.splitlines()[-1].startswith(f"{found[-1]}: ")
