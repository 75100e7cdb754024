"""Nothing loads a pickle: not the sources, and not the loaders that they call."""

import ast
import json
import pickle

import pytest
import torch
from transformers import AutoModel, CLIPModel

import diffusion_attn as da
from diffusion_attn.cli import models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.vimaedit import _check_file
from diffusion_attn.core.loading import MODEL_ONLY, WEIGHTS_ONLY
from diffusion_attn.distill.teacher import load_teacher
from diffusion_attn.metrics.networks import load
from tests import tiny
from tests.test_architecture import FOLDERS, PACKAGE, ROOT

PLACES = (PACKAGE, *FOLDERS.values(), ROOT / "examples", ROOT / "benchmarks")
SOURCES = sorted(path for folder in PLACES for path in folder.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pandas"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.jit.load",
    "torch.package",
    "torch.hub.load",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "tarfile.extractall",
}
OWN = {"cls", "method", "base", "LinFusion", "Clear", "da.LinFusion", "da.Clear", "_method(args)"}
"""What our own ``from_pretrained`` is called on."""


def calls_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_sources_name_nothing_that_runs_data():
    assert len(SOURCES) > 150
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not MODULES & {name.split(".")[0] for name in names}, path
        for name, node in calls_of(path):
            assert name not in CALLS, f"{path}:{node.lineno} calls {name}"
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert told.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
            assert told.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
            assert told.get("use_safetensors", "True") == "True", f"{path}:{node.lineno}"


def test_loaders_of_others_are_told_so_wherever_they_are_called():
    found = 0
    for path in SOURCES:
        if path.name.startswith("train_"):
            continue  # they load what they have written
        for name, node in calls_of(path):
            owner, _, called = name.rpartition(".")
            if called == "from_pretrained" and owner not in OWN:
                found += 1
                given = [ast.unparse(keyword) for keyword in node.keywords]
                told = ("WEIGHTS_ONLY", "NO_CODE", "**options", "**weights", "use_safetensors=True")
                assert any(each in words for words in given for each in told), f"{path}:{node.lineno}"
    assert found >= 12


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "a pickle was run"


def test_the_payload_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


@pytest.fixture
def pickled(tmp_path, marker):
    """A diffusers folder whose UNet is there as a pickle only; it holds weights, and runs something besides."""
    pipe = tiny.sd()
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipe.unet.state_dict(), tmp_path / "model/unet/diffusion_pytorch_model.bin")
    return tmp_path / "model"


def test_models_of_pickles_are_refused_even_where_they_are_harmless(pickled, marker):
    with pytest.raises(CommandError, match="safetensors"):
        models.load_model(str(pickled), torch.float32, "cpu")
    with pytest.raises(da.DiffusionAttnError, match="safetensors"):
        load_teacher(str(pickled))
    torch.save({"x": Payload(marker)}, pickled / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(CommandError, match="safetensors"):
        models.load_model(str(pickled), torch.float32, "cpu")


def test_networks_of_pickles_are_refused(tmp_path, marker):
    tiny.clip(tmp_path / "clip")
    (tmp_path / "clip/model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, tmp_path / "clip/pytorch_model.bin")
    with pytest.raises(da.DiffusionAttnError, match="safetensors"):
        load(CLIPModel, str(tmp_path / "clip"), "CLIP model", **MODEL_ONLY)


@pytest.mark.parametrize("kind", [AutoModel, CLIPModel])
def test_adapters_are_not_looked_for(tmp_path, marker, kind):
    tiny.clip(tmp_path / "clip")
    adapter = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    (tmp_path / "clip/adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"x": Payload(marker)}, tmp_path / "clip/adapter_model.bin")
    with pytest.raises(Exception, match=r"adapter_model|base_model_name_or_path"):  # peft is here, and would load it
        kind.from_pretrained(tmp_path / "clip", **WEIGHTS_ONLY)
    assert not kind.from_pretrained(tmp_path / "clip", **MODEL_ONLY)._hf_peft_config_loaded


def test_weights_of_methods_are_never_pickles(tmp_path, marker):
    for name in ("diffusion_pytorch_model.safetensors", "clear_local_8.safetensors", "model.bin"):
        torch.save({"x": Payload(marker)}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"modules_list": [["a", 8, 1]]}')
    with pytest.raises(da.CheckpointFormatError, match="safetensors"):
        da.LinFusion.from_pretrained(tmp_path)
    with pytest.raises(da.CheckpointFormatError, match="safetensors"):
        da.Clear.from_pretrained(tmp_path / "clear_local_8.safetensors")
    with pytest.raises(CommandError, match="not a safetensors file by its name"):
        _check_file(tmp_path / "model.bin")
