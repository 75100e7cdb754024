"""Latents and conditions on disk: what is in them, how they are made, and when they are refused."""

import json
import os

import pytest
import safetensors.torch
import torch
from PIL import Image

from diffusion_attn.distill import DataError, cache
from diffusion_attn.distill.cache import CachedData, make_cache
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.data import load_batches
from diffusion_attn.distill.encoding import Encoded
from tests import tiny
from tests.distill.test_trainer import WEIGHTS, state_of


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, three of them wide and two tall."""
    for index in range(10):
        size = (128, 32) if index < 3 else (32, 128) if index < 5 else (32, 32)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.effect_noise(size, index + 1).convert("RGB").save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"number {index}")
    return tmp_path / "pictures"


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


SHAPES = DataConfig(source="shapes", size=32)


def test_training_from_a_float32_cache_is_training_without_one(distil, pipe, folder, tmp_path):
    data = {"source": "folder", "path": str(folder)}
    plain = distil(data=data)
    make_cache(pipe, DataConfig(path=str(folder), size=32), tmp_path / "cache", dtype=torch.float32, batch=1)
    cached = distil(data={"source": "cache", "path": str(tmp_path / "cache")}, run={"output": str(tmp_path / "cached")})
    assert cached.history == plain.history
    (ours, _), (theirs, _) = state_of(cached.output), state_of(plain.output)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (cached.output / WEIGHTS).read_bytes() == (plain.output / WEIGHTS).read_bytes()


def test_sizes_and_crops_of_sdxl_are_kept_exactly(tmp_path, folder):
    make_cache(tiny.sdxl(), DataConfig(path=str(folder), size=32, fit="crop"), tmp_path / "cache")
    data = CachedData(str(tmp_path / "cache"))
    ids = sorted(tuple(data[position].conditions["time_ids"].tolist()) for position in range(10))
    assert ids == sorted([(32, 128, 0, 48, 32, 32)] * 3 + [(128, 32, 48, 0, 32, 32)] * 2 + [(32, 32, 0, 0, 32, 32)] * 5)
    assert data[0].conditions["text_embeds"].dtype == torch.float16
    assert data.empty().keys() == {"encoder_hidden_states", "text_embeds"}


def test_buckets_stay_together(pipe, tmp_path, folder):
    config = DataConfig(path=str(folder), size=64, fit="bucket", max_aspect=4.0)
    make_cache(pipe, config, tmp_path / "cache")
    data = CachedData(str(tmp_path / "cache"), batch=2)
    for workers in (0, 1):
        positions = [range(start, start + 2) for start in range(0, 24, 2)]
        shapes = [{sample.mean.shape for sample in batch} for batch in load_batches(data, positions, workers)]
        assert all(len(batch) == 1 for batch in shapes)
        assert len(set.union(*shapes)) == 3


@pytest.mark.parametrize("shards", [1, 3])
def test_an_interrupted_cache_goes_on(pipe, tmp_path, monkeypatch, shards):
    monkeypatch.setattr(cache, "SHARD", 4)
    make_cache(pipe, SHAPES, tmp_path / "whole", count=13)
    write, calls = cache._write_tensors, []

    def interrupted(path, tensors, dtype):
        calls.append(path)
        if len(calls) > shards:
            raise KeyboardInterrupt
        write(path, tensors, dtype)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "_write_tensors", interrupted)
        make_cache(pipe, SHAPES, tmp_path / "parts", count=13)
    with pytest.raises(DataError, match="not complete"):
        CachedData(str(tmp_path / "parts"))
    make_cache(pipe, SHAPES, tmp_path / "parts", count=13)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 4 + 2


def test_broken_pictures_are_left_out_and_too_many_stop(pipe, tmp_path, folder):
    (folder / "3.png").write_bytes(b"")
    config = DataConfig(path=str(folder), size=32, max_broken=0.1)
    index = make_cache(pipe, config, tmp_path / "cache")
    assert [os.path.basename(name) for name, _ in index.broken] == ["3.png"]
    assert len(CachedData(str(tmp_path / "cache")).order) == 9
    (folder / "4.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 10 .*3.png.*allows 1"):
        make_cache(pipe, config, tmp_path / "again")
    with pytest.raises(DataError, match="allows 1"):  # nor is it complete the second time
        make_cache(pipe, config, tmp_path / "again")


def test_the_empty_caption_is_of_the_same_model(pipe, tmp_path, monkeypatch):
    """A cache that was interrupted before its first shard already belongs to its model."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "_encode_shard", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        make_cache(pipe, SHAPES, tmp_path / "cache", count=3)
    with pytest.raises(DataError, match="another dtype"):
        make_cache(pipe, SHAPES, tmp_path / "cache", count=3, dtype=torch.float32)


def test_a_cache_serves_a_run_in_half_precision_that_draws(pipe, distil, tmp_path):
    make_cache(pipe, SHAPES, tmp_path / "cache", count=3)
    run = {"mixed_precision": "bf16", "steps": 1, "validation_every": 1, "validation_prompts": [""]}
    distil(data={"source": "cache", "path": str(tmp_path / "cache")}, run={**run, "validation_steps": 1})


def test_a_cache_of_other_things_is_refused(pipe, distil, tmp_path):
    make_cache(pipe, SHAPES, tmp_path / "cache", count=4)
    with pytest.raises(DataError, match="another dtype"):
        make_cache(pipe, SHAPES, tmp_path / "cache", count=4, dtype=torch.float32)
    with pytest.raises(DataError, match="another pictures"):
        make_cache(pipe, SHAPES, tmp_path / "cache", count=5)
    data = {"source": "cache", "path": str(tmp_path / "cache")}
    distil(data=data, run={"steps": 1})
    with pytest.raises(DataError, match="another size"):
        distil(data={**data, "size": None}, run={"output": str(tmp_path / "native")})
    with pytest.raises(DataError, match="another fit"):
        distil(data={**data, "fit": "crop"}, run={"output": str(tmp_path / "fit")})
    with pytest.raises(DataError, match="another size"):
        distil(data={**data, "size": 64}, run={"output": str(tmp_path / "size")})
    other = tiny.sd()
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="another model"):
        distil(data=data, model={"name": str(tmp_path / "other")}, run={"output": str(tmp_path / "model")})


def test_damage_is_told(pipe, tmp_path):
    with pytest.raises(DataError, match=r"holds no cache.json"):
        CachedData(str(tmp_path))
    make_cache(pipe, SHAPES, tmp_path / "cache", count=3)
    (tmp_path / "cache" / "shard-000000.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="gone or damaged"):
        CachedData(str(tmp_path / "cache"))[0]
    (tmp_path / "cache" / "cache.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        CachedData(str(tmp_path / "cache"))


def test_a_full_disk_is_told_and_leaves_no_part(pipe, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(DataError, match="No space left"):
            make_cache(pipe, SHAPES, tmp_path / "cache", count=3)
    assert files(tmp_path / "cache").keys() == {"cache.json"}
    make_cache(pipe, SHAPES, tmp_path / "cache", count=3)
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["total"] == 3


def test_what_has_no_end_needs_a_count(pipe, tmp_path):
    with pytest.raises(DataError, match="--count"):
        make_cache(pipe, SHAPES, tmp_path / "cache")


def test_latents_are_the_posteriors(pipe):
    encoded = Encoded(torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 0.5), {})
    assert encoded.latents(torch.full((2, 1, 1, 1), 2.0), 3.0).flatten().tolist() == [6.0, 6.0]
