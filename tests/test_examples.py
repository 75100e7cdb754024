"""The scripts for large pictures, run as they are on the embedded models."""

import runpy
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
        (
            "highres_flux_clear.py",
            ("--model", "shapes-flux", "--steps", "3", "--size", "512"),
            [(128, 128), (256, 256), (512, 512)],
        ),
    ],
)
def test_large_pictures_offline(script, args, sizes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *args, "--device", "cpu", "--output", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    found = sorted(tmp_path.glob("stage-*.png"))
    assert [Image.open(path).size for path in found] == sizes
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{found[-1]}: ")
