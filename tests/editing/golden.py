"""What the official code computes, the cases of ``tests/golden/dpl`` and ``vimaedit``: see their manifests."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.golden.seeded import seeded_tensor

FOLDER = Path(__file__).parents[1] / "golden"


class Golden:
    """The cases of one folder by name, and the numbers that came out."""

    def __init__(self, folder, outputs, key):
        self.manifest = manifest = json.loads((FOLDER / folder / "manifest.json").read_text())
        self.cases = {case[key]: case for case in manifest["cases"]}
        self._outputs = load_file(FOLDER / folder / outputs)

    def named(self, prefix):
        names = [name for name in self.cases if name.startswith(prefix)]
        assert names, prefix
        return pytest.mark.parametrize("name", names)

    def expected(self, name, output):
        return self._outputs[self.cases[name]["outputs"][output]["key"]]

    def close(self, actual, name, output):
        expected, tolerance = self.expected(name, output), self.cases[name]["tolerance"]
        if isinstance(tolerance, dict):
            limits = {"atol": tolerance.get("atol", 0.0), "rtol": tolerance.get("rtol", 0.0)}
        else:
            limits = {
                "atol": tolerance * max(1.0, float(expected.abs().amax() if expected.numel() else 0)),
                "rtol": 0.0,
            }
        torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float32), expected, **limits)


DPL = Golden("dpl", "outputs.safetensors", key="id")
VIMAEDIT = Golden("vimaedit", "vimaedit.safetensors", key="name")


def drawn(expression):
    """An input of the DPL cases, which are expressions."""
    return eval(expression, {"T": seeded_tensor, "torch": torch, "F": F, "softmax": torch.softmax})
