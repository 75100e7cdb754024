"""Whatever is in a file, its reader takes it or tells by the library's own errors that it does not."""

import copy
import dataclasses
import json
import struct
import tarfile
from contextlib import suppress
from io import BytesIO

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import diffusion_attn as da
from benchmarks.report import write_page
from diffusion_attn.bench.plot import plot
from diffusion_attn.bench.table import bench_table, notes
from diffusion_attn.cli.bench import _earlier
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.evaluate_pie_bench import _known, as_table, by_kind, summarise
from diffusion_attn.cli.request import parse_size, read_prompts
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.reading import parse_json
from diffusion_attn.distill import ConfigError, DistillConfig
from diffusion_attn.distill.cache import Index
from diffusion_attn.distill.checkpoints import TrainState
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.sources import find_in_folder, find_in_tars
from diffusion_attn.editing.inversion import Inversion
from diffusion_attn.metrics import pie_bench
from diffusion_attn.metrics.machine import changed as changed_settings
from diffusion_attn.pipelines.ladder import Stage
from diffusion_attn.pipelines.stage_files import StageFiles
from tests import tiny

often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6
)


@st.composite
def changed(draw, good):
    """``good`` with something in it taken out, put in the place of something else, or replaced by any value."""
    content = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        here, key = {"": content}, ""
        while isinstance(here[key], (dict, list)) and here[key] and draw(st.integers(0, 3)):
            here = here[key]
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here, dict) and key and draw(st.booleans()):
            del here[key]
        else:
            here[key] = draw(values)
            content = here[key] if key == "" else content
    return content


@st.composite
def damaged(draw, good):
    """The bytes ``good``, cut off, with some overwritten, or with some put in."""
    place = draw(st.integers(0, min(len(good), 2000)))
    more = draw(st.binary(max_size=8))
    return draw(
        st.sampled_from(
            [good[:place], good[:place] + more + good[place + len(more) :], good[:place] + more + good[place:]]
        )
    )


def as_safetensors(tensors, header):
    """A file with the data of ``tensors`` and a header of one's own."""
    plain = save(tensors)
    length = struct.unpack("<Q", plain[:8])[0]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + plain[8 + length :]


def header_of(tensors):
    plain = save(tensors)
    return json.loads(plain[8 : 8 + struct.unpack("<Q", plain[:8])[0]])


def readable(tensors):
    """What may stand in a safetensors file of ``tensors``: damaged bytes, or another header before the same data."""
    return damaged(save(tensors)) | changed(header_of(tensors)).map(lambda header: as_safetensors(tensors, header))


# ---- weights of methods


UNET = tiny.unet()
LINFUSION = da.LinFusion.for_model(UNET)
LAYERS = [vars(layer) for layer in LINFUSION.layers]


@often
@given(data=st.data())
def test_linfusion(tmp_path, data):
    LINFUSION.save_pretrained(tmp_path)
    if data.draw(st.booleans()):
        config = data.draw(changed({"modules_list": LAYERS[:2]}) | values)
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        small = {"0.to_q.weight": torch.zeros(2, 2), "0.to_out.0.bias": torch.zeros(2)}
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(data.draw(readable(small)))
    with suppress(DiffusionAttnError):
        da.LinFusion.from_pretrained(tmp_path)


CLEAR = {
    "transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2),
    "transformer_blocks.0.attn.spatial_weight": torch.zeros(1, 1, 1, 2, 1, 2, 1),
}


@often
@given(
    readable(CLEAR)
    | st.dictionaries(
        st.sampled_from([*CLEAR, "a", "", "x.0.attn.to_q.weight"]),
        st.lists(st.integers(0, 3), max_size=7).map(torch.zeros),
    ).map(save)
)
def test_clear(tmp_path, content):
    (tmp_path / "clear_local_8.safetensors").write_bytes(content)
    with suppress(DiffusionAttnError):
        da.Clear.from_pretrained(tmp_path / "clear_local_8.safetensors")


@pytest.mark.parametrize(
    "layers", [[["a", 10**15, 1]], [["a", 10**30, 1]], [["a", 8, 1, 10**18]], [["a", 8, 1]] * 10**5]
)
def test_linfusion_of_any_size_is_refused_before_it_is_built(tmp_path, layers):
    (tmp_path / "config.json").write_text(json.dumps({"modules_list": layers}))
    with pytest.raises(da.CheckpointFormatError, match="modules_list"):
        da.LinFusion.from_pretrained(tmp_path)


# ---- what a run left


def train_state():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    return TrainState(
        {"run": {"seed": 0}}, [parameter], optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), step=1
    )


@often
@given(data=st.data())
def test_checkpoints_of_a_run(tmp_path, data):
    train_state().save(tmp_path)
    train_state().load(tmp_path)
    good = json.loads((tmp_path / "state.json").read_text())
    if data.draw(st.booleans()):
        (tmp_path / "state.json").write_text(json.dumps(data.draw(changed(good) | values)))
    else:
        small = {
            "weights/0": torch.zeros(2, 3),
            "optimizer/0/step": torch.zeros(()),
            "optimizer/0/exp_avg": torch.zeros(2, 3),
        }
        (tmp_path / "state.safetensors").write_bytes(data.draw(readable(small)))
    with suppress(DiffusionAttnError):
        train_state().load(tmp_path)


INDEX = {
    "made_of": {"size": 8},
    "total": 2,
    "shards": {"shard-000000.safetensors": [[0, 1, 1]]},
    "broken": [["a.png", "truncated"]],
}


@often
@given(changed(INDEX) | values)
@example({**INDEX, "shards": {"../x.safetensors": [[0, 1, 1]]}})
def test_indices_of_caches(tmp_path, content):
    (tmp_path / "cache.json").write_text(json.dumps(content))
    with suppress(DiffusionAttnError):
        index = Index.read(tmp_path)
        assert index.complete in (True, False) and all("/" not in name for name in index.shards)


STAGES = {
    "settings": {"prompt": "a"},
    "stages": {"1": {"methods": ["clear"], "seconds": 1.5, "peak_memory_bytes": 3}},
}


@often
@given(
    changed(STAGES) | values, damaged(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x08\0\0\0\x08\x08\2\0\0\0K") | st.just(b"")
)
def test_stages_of_a_run(tmp_path, content, picture):
    (tmp_path / "stages.json").write_text(json.dumps(content))
    stage = Stage(8, 8)
    with suppress(DiffusionAttnError):
        files = StageFiles(tmp_path, {"prompt": "a"}, resume=True)
        files.path(1, stage, 0).write_bytes(picture)
        files.load(1, stage, 1)


@often
@given(readable({"latents": torch.zeros(1, 4, 1, 1)}))
def test_latents_of_a_run(tmp_path, content):
    (tmp_path / "base.safetensors").write_bytes(content)
    latents = StageFiles(tmp_path, {}, resume=False).load_latents()
    assert latents is None or latents.ndim == 4


INVERSION = Inversion(
    latents=torch.zeros(3, 1, 4, 1, 1),
    timesteps=torch.tensor([2, 1]),
    prompt="a star",
    prompt_embeds=torch.zeros(1, 2, 3),
    words=("star",),
    word_embeds=torch.zeros(2, 1, 3),
    settings={"inversion": {"steps": 2}},
    model=(0.5,),
)


@often
@given(data=st.data())
def test_inversions(tmp_path, data):
    path = tmp_path / "x.safetensors"
    INVERSION.save(path)
    good = path.read_bytes()
    header = json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])
    rest = json.loads(header["__metadata__"]["inversion"])
    kind = data.draw(st.integers(0, 2))
    if kind == 0:
        path.write_bytes(data.draw(damaged(good)))
    else:
        header = data.draw(changed(header)) if kind == 1 else header
        if kind == 2:
            header["__metadata__"]["inversion"] = json.dumps(data.draw(changed(rest) | values))
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + struct.unpack("<Q", good[:8])[0] :])
    with suppress(DiffusionAttnError):
        inversion = Inversion.load(path)
        assert inversion.size == (1, 1) or inversion.latents.ndim == 5


@pytest.mark.parametrize("part", ["null_embeds", "word_embeds"])
@pytest.mark.parametrize("count", [1, 3])
def test_inversions_of_other_lengths_are_refused_or_not_finished(tmp_path, part, count):
    dataclasses.replace(INVERSION, **{part: torch.zeros(count, 1, 3)}).save(tmp_path / "x.safetensors")
    if (part, count) == ("null_embeds", 1):
        assert not Inversion.load(tmp_path / "x.safetensors").finished
    else:
        with pytest.raises(da.CheckpointFormatError, match=part):
            Inversion.load(tmp_path / "x.safetensors")


ROW = {"method": "p2p", "item": "a", "type": 1, "note": None, **dict.fromkeys(pie_bench.COLUMNS, 1.0), "mse": "nan"}
KNOWN = {"settings": {}, "row": ROW | {"exact": True, "iou": None, "seconds": 1.0, "peak_mb": 1.0}}


@often
@given(changed(KNOWN) | values)
def test_results_of_an_earlier_run(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with suppress(CommandError):
        row = _known(tmp_path / "x.json")["row"]
        as_table(table := summarise([row], [row["method"]]))
        by_kind(table)


BENCH_ROW = {
    "method": "plain",
    "size": [64, 64],
    "seconds_per_step": 0.1,
    "relative_time": 1.0,
    "rounds": [0.1],
    "peak_bytes": 1,
    "relative_peak": None,
    "flops_per_step": 1e9,
    "pictures": 1,
    "exact": 1.0,
    "psnr": None,
}
BENCH = {
    "settings": {"model": "shapes-sd", "quality": 1, "clock": "wall"},
    "machine": {"torch": "2"},
    "rows": [BENCH_ROW],
    "skipped": {"clear at 64x64": "too small"},
    "commands": ["diffusion-attn bench"],
}


@often
@given(changed(BENCH) | values)
@example({**BENCH, "rows": [{"method": "plain", "size": [64, 64]}]})
def test_results_of_an_earlier_bench(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with suppress(CommandError):
        found = _earlier(tmp_path / "x.json", "shapes-sd")
        changed_settings(BENCH, found)
        assert "\n".join([bench_table(found), *notes(found), *found["commands"]])
        plot(found)


@often
@given(changed(BENCH) | values)
def test_results_that_a_page_is_written_from(tmp_path, content):
    (tmp_path / "bench-x.json").write_text(json.dumps(content))
    with suppress(SystemExit):
        write_page("bench", tmp_path)


# ---- data


ITEM = {
    "image_path": "a.png",
    "original_prompt": "a [red] star",
    "editing_prompt": "a [blue] star",
    "editing_instruction": "",
    "editing_type_id": "6",
    "blended_word": "star star",
    "mask": [3, 2, 7, 1],
}


@often
@given(changed({"a": ITEM}) | values)
@example({"a": {**ITEM, "editing_type_id": "²"}})
@example({"a": {**ITEM, "mask": [0, 2**70]}})
def test_pie_bench(tmp_path, content):
    (tmp_path / "annotation_images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "annotation_images/a.png")
    (tmp_path / "mapping_file.json").write_text(json.dumps(content))
    with suppress(DiffusionAttnError):
        for item in pie_bench.load(tmp_path):
            assert item.mask((8, 8)).shape == (8, 8) and item.image().size == (8, 8)


@given(st.lists(st.integers() | st.integers(0, 70)), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_masks(code, size, border):
    if len(code) % 2 or min(code, default=0) < 0:
        with pytest.raises(ValueError, match="pairs"):
            pie_bench.decode_mask(code, size, border)
        return
    expected = torch.zeros(size[0] * size[1])
    for start, length in zip(code[::2], code[1::2], strict=True):
        for cell in range(min(start, len(expected)), min(start + length, len(expected))):
            expected[cell] = 1
    mask = pie_bench.decode_mask(code, size, False)
    assert torch.equal(mask.flatten(), expected)
    assert torch.equal(pie_bench.decode_mask(pie_bench.encode_mask(mask), size, False), mask)


@often
@given(
    st.binary(max_size=60) | damaged(b'{"file_name": "a.png", "text": "a star"}\n'),
    st.sampled_from(["metadata.jsonl", "captions.csv"]),
)
@example(b"[" * 100_000, "metadata.jsonl")
@example(b"file_name,text\na," + b"x" * 200_000, "captions.csv")
def test_captions(tmp_path, content, name):
    for other in ("metadata.jsonl", "captions.csv"):
        (tmp_path / other).unlink(missing_ok=True)
    (tmp_path / name).write_bytes(content)
    with suppress(DiffusionAttnError):
        find_in_folder(str(tmp_path), DataConfig())


def tar():
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in (("a.png", b"x"), ("a.json", b'{"text": "a star"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return file.getvalue()


@often
@given(
    damaged(tar())
    | values.map(lambda value: tar().replace(b'{"text": "a star"}', json.dumps(value).encode()[:18].ljust(18)))
)
@pytest.mark.timeout(60)
def test_tars(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with suppress(DiffusionAttnError):
        pictures = find_in_tars(str(tmp_path), DataConfig())
        for index in range(len(pictures)):
            pictures.open(index).read()


RECIPE = {
    "model": {"name": "shapes-sd", "guidance": None},
    "method": {"name": "linfusion", "mid_divisor": 1},
    "loss": {"layers": "a"},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.99]},
    "run": {"steps": 3, "trackers": ["tensorboard"], "validation_prompts": ["a"]},
}


@settings(often, max_examples=40)
@given(changed(RECIPE).map(yaml.safe_dump) | values.map(yaml.safe_dump) | st.text(max_size=40))
@example("run: {steps: " + ":".join(["59"] * 3000) + "}")
@example("run: {seed: " + ":".join(["59"] * 3000) + "}")
@example("optim: {lr: .nan}")
@example("2001-99-99: 1")
def test_recipes(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8", errors="replace")
    with suppress(ConfigError):
        DistillConfig.load(tmp_path / "recipe.yaml").save(tmp_path / "saved.yaml")


# ---- the command line


@given(st.text(max_size=12) | st.from_regex(r"\d{0,8}x?\d{0,8}", fullmatch=True))
@example("٣x٣")
def test_sizes(text):
    with suppress(CommandError):
        assert all(0 < side < 10**6 for side in parse_size(text))


@often
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="replace")))
def test_prompts(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    with suppress(CommandError):
        assert all(prompt == prompt.strip() != "" for prompt in read_prompts(str(tmp_path / "prompts.txt")))


@given(values.map(json.dumps) | st.text())
def test_json(text):
    with suppress(ValueError):
        parse_json(text)
