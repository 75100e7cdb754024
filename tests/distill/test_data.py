"""Folders of pictures and scenes drawn by code."""

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion_attn import shapes
from diffusion_attn.distill import DataError
from diffusion_attn.distill.buckets import bucket_shapes, nearest_shape
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.data import Order, PictureData, ShapesData, fit_picture, load_batches
from diffusion_attn.distill.encoding import encode, encode_nothing
from diffusion_attn.distill.sources import FolderPictures, find_pictures
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    """Eight pictures, each in one grey that is its number times 30."""
    for index in range(8):
        below = tmp_path / ("below" if index % 2 else ".")
        below.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10 + index), (30 * index,) * 3).save(below / f"{index}.png")
        (below / f"{index}.txt").write_text(f"number {index}\n")
    return tmp_path


def data_of(folder, **config):
    config = DataConfig(path=str(folder), **config)
    return PictureData(find_pictures(config), config, 8)


def test_pictures_with_text_files_beside(folder):
    (folder / "alone.png").write_bytes((folder / "0.png").read_bytes())
    data = data_of(folder)
    epochs = [[data[position].caption for position in range(start, start + 8)] for start in (0, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"number {index}" for index in range(8)]
    assert epochs[0] != epochs[1]
    assert [data[position].caption for position in range(8)] == epochs[0]
    sample = data[3]
    number = int(sample.caption.split()[1])
    assert sample.original == (10 + number, 20) and sample.pixels.shape == (3, 8, 8)
    torch.testing.assert_close(sample.pixels, torch.full((3, 8, 8), 30 * number / 127.5 - 1))


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "metadata.csv"])
def test_pictures_with_a_list_of_captions(folder, name):
    if name.endswith("csv"):
        text = '\ufefffile_name,text\n0.png,"zero, nothing"\nbelow/1.png,one\n'
    else:
        text = "\n".join(
            json.dumps({"file_name": f, "text": t}) for f, t in [("0.png", "zero, nothing"), ("below/1.png", "one")]
        )
    (folder / name).write_text(text, encoding="utf-8")
    pictures = find_pictures(DataConfig(path=str(folder)))
    assert [pictures.caption(index) for index in range(len(pictures))] == ["zero, nothing", "one"]


def test_broken_pictures_are_told_and_replaced_by_the_next(folder):
    order = [data_of(folder)[position].caption for position in range(8)]
    broken = [int(text.split()[1]) for text in order[2:4]]
    for index in broken:
        (next(folder.rglob(f"{index}.png"))).write_bytes(b"not a picture" if index % 2 else b"")
    data = data_of(folder, max_broken=0.25)
    sample = data[2]
    assert sample.caption == order[4]
    assert [path.rpartition("/")[2] for path, _ in sample.broken] == [f"{index}.png" for index in broken]
    data.check_broken(2)
    with pytest.raises(DataError, match=r"3 of 8 .*max_broken=0.25 allows 2"):
        data.check_broken(3)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 8"):
        data[0]


def test_a_run_reports_broken_pictures_and_stops_when_they_are_too_many(distil, folder, caplog, tmp_path):
    (folder / "4.png").write_bytes(b"")
    data = {"source": "folder", "path": str(folder), "max_broken": 0.2}
    with caplog.at_level(logging.WARNING):
        distil(data=data)
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(told) == 1 and "4.png" in told[0]
    with pytest.raises(DataError, match="1 of 8"):
        distil(data={**data, "max_broken": 0.1}, run={"output": str(tmp_path / "strict")})


def test_a_crop_keeps_the_shape_of_things_and_says_where_it_is():
    sample = fit_picture(Image.new("RGB", (40, 20)), (8, 8), "crop")
    assert sample.original == (20, 40) and sample.corner == (0, 4) and sample.pixels.shape == (3, 8, 8)
    sample = fit_picture(Image.new("RGB", (9, 33)), (8, 8), "crop")
    assert sample.corner == (10, 0) and sample.pixels.shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_any_mode_is_read(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (9, 9)).save(path)
    assert PictureData(FolderPictures([(path, "")]), DataConfig(), 8)[0].pixels.shape == (3, 8, 8)


def test_shapes_are_scenes_of_the_training_split():
    data = ShapesData(32, 5)
    captions = [data[position].caption for position in range(20)]
    assert len(set(captions)) > 15 and captions == [data[position].caption for position in range(20)]
    assert shapes.parse_caption(captions[0]) and data[0].pixels.shape == (3, 32, 32)
    assert data[0].pixels.min() >= -1 and data[0].pixels.max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_positions_asked_for(folder, workers):
    data = data_of(folder)
    batches = list(load_batches(data, [range(0, 3), range(6, 9)], workers))
    captions = [[sample.caption for sample in batch] for batch in batches]
    assert captions == [[data[position].caption for position in positions] for positions in (range(3), range(6, 9))]


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        (None, {}, "--data FOLDER"),
        ("none", {}, "'none'|none"),
        (".", {}, "no pictures with captions"),
        (".", {"metadata.jsonl": "{"}, "metadata.jsonl' cannot be read"),
        (".", {"captions.csv": "name,words\na.png,b\n"}, "KeyError"),
    ],
)
def test_folders_that_hold_nothing(tmp_path, path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=expected):
        find_pictures(DataConfig(path=path and str(tmp_path / path)))


def test_conditions_are_the_pipelines_own(folder):
    samples = [data_of(folder, fit="crop")[position] for position in range(2)]
    dropped = torch.tensor([False, True])
    for pipe in (tiny.sd(), tiny.sdxl()):
        encoded = encode(pipe, samples, torch.device("cpu"))
        empty = encode_nothing(pipe, torch.device("cpu"))
        given = encoded.arguments(dropped, empty)
        text, nothing, *pooled = pipe.encode_prompt(
            samples[0].caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        torch.testing.assert_close(given["encoder_hidden_states"], torch.cat([text, nothing]))
    added = given["added_cond_kwargs"]
    height, width = samples[1].original
    assert added["time_ids"][1].tolist() == [height, width, *samples[1].corner, 8, 8]
    torch.testing.assert_close(added["text_embeds"], torch.cat(pooled))


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    cells=st.integers(2, 16),
    step=st.sampled_from([8, 64]),
    aspect=st.floats(1, 4),
)
def test_buckets_have_as_many_pixels_and_the_proportions_of_the_picture(height, width, cells, step, aspect):
    shapes = bucket_shapes(cells * step, step, aspect)
    assert (cells * step, cells * step) in shapes
    for shape in shapes:
        assert all(side % step == 0 for side in shape) and shape[::-1] in shapes
        assert max(shape) <= aspect * min(shape)
        assert abs(shape[0] * shape[1] - (cells * step) ** 2) <= step * max(shape) / 2 + step**2
    best = nearest_shape((height, width), shapes)
    assert nearest_shape((width, height), shapes) == best[::-1]


@given(groups=st.lists(st.integers(1, 9), min_size=1, max_size=4), batch=st.integers(1, 4), seed=st.integers(0, 9))
def test_an_epoch_has_every_item_and_batches_of_one_shape(groups, batch, seed):
    shapes = [shape for shape, count in enumerate(groups) for _ in range(count)]
    order = Order(shapes, batch, seed)
    for epoch in range(2):
        taken = [order.index(position) for position in range(epoch * len(order), (epoch + 1) * len(order))]
        assert set(taken) == set(range(len(shapes)))
        if len(groups) > 1:
            for start in range(0, len(taken), batch):
                assert len({shapes[index] for index in taken[start : start + batch]}) == 1
            assert len(taken) < len(shapes) + batch * len(groups)
        else:
            assert len(taken) == len(shapes)
    first = order.index(0)
    same = [index for index in range(len(shapes)) if shapes[index] == shapes[first]]
    assert sorted(order.candidates(0)) == same


def test_pictures_of_a_bucket_are_cropped_to_it(folder):
    data = PictureData(
        find_pictures(DataConfig(path=str(folder))), DataConfig(path=str(folder), fit="bucket"), 32, 8, 2
    )
    for position in range(0, len(data.order), 2):
        one, other = data[position], data[position + 1]
        assert one.pixels.shape == other.pixels.shape
        height, width = one.pixels.shape[1:]
        assert (height, width) == nearest_shape(one.original, bucket_shapes(32, 8, 2.0))


def test_a_broken_picture_is_replaced_by_one_of_its_bucket(folder):
    """Also where no good one has the shape that comes first."""
    config = DataConfig(path=str(folder), fit="bucket")
    (folder / "9.png").write_bytes(b"")
    (folder / "9.txt").write_text("nothing")
    data = PictureData(find_pictures(config), config, 32, 8, 2, quiet=True)
    samples = [data[position] for position in range(len(data.order))]
    assert all(one.pixels.shape == other.pixels.shape for one, other in zip(samples[::2], samples[1::2], strict=True))
    assert sum(bool(sample.broken) for sample in samples) >= 1
    assert {sample.caption for sample in samples} == {f"number {index}" for index in range(8)}


def test_any_damage_is_a_broken_picture(tmp_path):
    """Every byte of the header, one after the other: what is not read is told, and nothing else is raised."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / "0.jpg", exif=exif)
    content = (tmp_path / "0.jpg").read_bytes()
    outcomes = set()
    for fit in ("crop", "bucket"):
        config = DataConfig(path=str(tmp_path), fit=fit)
        for place in range(160):
            (tmp_path / "0.jpg").write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
            try:
                PictureData(FolderPictures([(tmp_path / "0.jpg", "")]), config, 16, quiet=True).read(0)
                outcomes.add("read")
            except DataError:
                outcomes.add("broken")
    assert outcomes == {"read", "broken"}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_cannot_read_is_one_sentence_here(folder, workers):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError) as told:
        list(load_batches(data_of(folder), [range(0, 2)], workers))
    assert str(told.value).startswith("none of 8 pictures") and "Traceback" not in str(told.value)
