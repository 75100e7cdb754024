"""What comes with a model or a recipe is read, never run."""

import json
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from diffusion_attn.cli import models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.core.errors import DiffusionAttnError, UnsupportedModelError
from diffusion_attn.core.loading import MODEL_ONLY
from diffusion_attn.distill import ConfigError, DistillConfig
from diffusion_attn.distill.teacher import load_teacher
from diffusion_attn.metrics.networks import load
from diffusion_attn.pipelines import ViMAEditPipeline
from diffusion_attn.planning.layouts import load_layout
from tests import tiny


@pytest.fixture
def code(tmp_path):
    """The text of a module that leaves a file when it is imported, which is looked for in the end."""
    marker = tmp_path / "ran"
    yield f"open({str(marker)!r}, 'w').close()\n"
    assert not marker.exists(), "code from a downloaded file was run"


@pytest.fixture
def model(tmp_path):
    """A folder of a diffusers pipeline, and a function that changes its index."""
    folder = tmp_path / "model"
    tiny.sd().save_pretrained(folder)

    def change(**parts):
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))

    return folder, change


def refused(folder):
    with pytest.raises(CommandError, match="could not be loaded"):
        models.load_model(str(folder), torch.float32, "cpu")
    with pytest.raises(DiffusionAttnError, match="could not be loaded"):
        load_teacher(str(folder))


def test_a_custom_pipeline_is_refused(model, code):
    folder, change = model
    body = f"from diffusers import StableDiffusionPipeline\nclass Mine(StableDiffusionPipeline):\n    pass\n{code}"
    for name in ("pipeline.py", "mine.py", "None.py"):
        (folder / name).write_text(body)
    change(_class_name=["mine", "Mine"])
    refused(folder)


def test_a_custom_component_is_refused(model, code):
    folder, change = model
    (folder / "unet/mine.py").write_text(f"from diffusers import UNet2DConditionModel as Mine\n{code}")
    change(unet=["mine", "Mine"])
    refused(folder)


def test_an_index_cannot_have_modules_imported(model, code, monkeypatch):
    folder, change = model
    (folder / "elsewhere.py").write_text(f"from diffusers import UNet2DConditionModel as Mine\n{code}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "elsewhere", raising=False)
    change(unet=["elsewhere", "Mine"])
    refused(folder)


def test_code_that_lies_beside_a_good_model_lies_there_still(model, code):
    folder, _ = model
    for name in ("pipeline.py", "unet/unet.py", "__init__.py", "diffusers.py"):
        (folder / name).write_text(code)
    assert models.load_model(str(folder), torch.float32, "cpu").unet is not None


def test_adapters_that_lie_beside_a_model_are_refused(model, tmp_path):
    """Where peft is installed transformers loads them unasked, with the modules that their configuration names."""
    folder, _ = model
    tiny.clip(tmp_path / "clip")
    adapter = {"peft_type": "LORA", "target_modules": ["q_proj"], "megatron_config": {}, "megatron_core": "elsewhere"}
    for place in (folder / "text_encoder", tmp_path / "clip"):
        (place / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(CommandError, match=r"text_encoder/adapter_config\.json"):
        models.load_model(str(folder), torch.float32, "cpu")
    with pytest.raises(DiffusionAttnError, match=r"text_encoder/adapter_config\.json"):
        load_teacher(str(folder))
    with pytest.raises(DiffusionAttnError, match=r"adapter_config\.json"):
        load(AutoModel, str(tmp_path / "clip"), "network", **MODEL_ONLY)
    with pytest.raises(DiffusionAttnError, match=r"adapter_config\.json"):
        ViMAEditPipeline.from_pipe(tiny.sd()).load_clip(str(tmp_path / "clip"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"unet": 5}),
        ("model_index.json", {"unet": ["diffusers", ["UNet2DConditionModel"]]}),
        ("unet/config.json", {"_class_name": "utils"}),
        ("unet/config.json", {"_class_name": "StableDiffusionPipeline"}),
        ("unet/config.json", {"_class_name": ["UNet2DConditionModel"]}),
        ("unet/config.json", {"layers_per_block": "a"}),
        ("unet/config.json", {"cross_attention_dim": "a"}),
        ("vae/config.json", {"_class_name": "utils"}),
        ("vae/config.json", {"block_out_channels": None}),
    ],
)
def test_plans_are_made_of_known_classes_only(model, file, changes):
    folder, _ = model
    good = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(good | changes))
    with pytest.raises(UnsupportedModelError):
        load_layout(str(folder)).denoiser(torch.float32)


@pytest.mark.parametrize("kind", [AutoModel, AutoTokenizer])
def test_networks_and_tokenizers_with_code_are_refused(tmp_path, code, kind, monkeypatch):
    folder = tmp_path / "network"
    folder.mkdir()
    (folder / "mine.py").write_text(f"class Mine:\n    pass\n{code}")
    names = {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked, or what they answer does not count
    options = MODEL_ONLY if kind is AutoModel else {}
    with pytest.raises(DiffusionAttnError, match="could not be loaded"):
        load(kind, str(folder), "network", **options)


@pytest.mark.parametrize(
    "recipe",
    [
        "model:\n  class_path: elsewhere.Mine\n",
        "model: {class_path: elsewhere.Mine, init_args: {name: shapes-sd}}\n",
        "class_path: elsewhere.Mine\n",
        "method:\n  name:\n    class_path: elsewhere.Mine\n",
        "run:\n  trackers:\n    - class_path: elsewhere.Mine\n",
        "model: !!python/name:elsewhere.Mine\n",
        "model: !!python/object/apply:importlib.import_module [elsewhere]\n",
    ],
)
def test_recipes_import_nothing(tmp_path, code, monkeypatch, recipe):
    (tmp_path / "elsewhere.py").write_text(f"from diffusion_attn.distill.config import ModelConfig as Mine\n{code}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "elsewhere", raising=False)
    with pytest.raises(ConfigError):
        DistillConfig.load(tmp_path / "recipe.yaml")


def test_recipes_do_not_name_other_files(tmp_path):
    (tmp_path / "other.yaml").write_text("name: shapes-sd")
    (tmp_path / "recipe.yaml").write_text(f"model: {tmp_path / 'other.yaml'}")
    with pytest.raises(ConfigError, match="model is '"):
        DistillConfig.load(tmp_path / "recipe.yaml")
