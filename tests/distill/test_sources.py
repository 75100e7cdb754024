"""Tar files and datasets in Hugging Face's format; folders are in test_data."""

import io
import json
import tarfile

import pytest
from PIL import Image

from diffusion_attn.distill import DataError
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.data import PictureData, load_batches
from diffusion_attn.distill.sources import find_pictures


def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (grey,) * 3).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def entries(**config):
    pictures = find_pictures(DataConfig(**config))
    return [
        (pictures.caption(i), Image.open(pictures.open(i)).convert("RGB").getpixel((0, 0))[0])
        for i in range(len(pictures))
    ]


@pytest.fixture
def tars(tmp_path):
    write_tar(
        tmp_path / "train-0.tar",
        {
            ".": None,
            "./a/0.png": png(10),
            "./a/0.txt": b"ten\n",
            "a/._0.png": b"left by macOS",
            "a/1.jpg": png(20),
            "a/1.json": b'{"caption": "twenty"}',
            "a/5.png": png(60),
            "a/5.json": b'{"caption": null}',
        },
    )
    write_tar(tmp_path / "train-1.tar", {"2.seg.png": png(1), "2.png": png(30), "2.txt": b"thirty", "3.png": png(40)})
    write_tar(tmp_path / "other.tar", {"4.png": png(50), "4.txt": b"fifty"})
    return tmp_path


def test_tar_files_in_the_layout_of_webdataset(tars):
    config = {"source": "webdataset", "caption_column": "caption"}
    three = [("ten", 10), ("twenty", 20), ("thirty", 30)]
    assert entries(path=str(tars / "train-*.tar"), **config) == three
    assert entries(path=str(tars), **config) == [("fifty", 50), *three]
    assert entries(path=str(tars / "other.tar"), **config) == [("fifty", 50)]


def test_tar_files_are_read_by_worker_processes(tars):
    config = DataConfig(source="webdataset", path=str(tars / "train-*.tar"), caption_column="caption")
    data = PictureData(find_pictures(config), config, 8)
    for workers in (0, 2):
        batches = load_batches(data, [range(0, 3), range(3, 6)], workers)
        assert [[sample.caption for sample in batch] for batch in batches] == [
            [data[position].caption for position in positions] for positions in (range(3), range(3, 6))
        ]


@pytest.mark.parametrize(
    ("members", "mode", "expected"),
    [
        ({"0.png": png(0), "0.json": b'{"words": "x"}'}, "w", "KeyError"),
        ({"0.png": png(0), "0.json": b"{"}, "w", "JSONDecodeError"),
        ({"0.png": png(0), "0.txt": b"x"}, "w:gz", "uncompressed"),
        ({"0.png": png(0)}, "w", "no pictures with captions"),
    ],
)
def test_tar_files_that_cannot_be_used(tmp_path, members, mode, expected):
    path = write_tar(tmp_path / "x.tar", members, mode)
    with pytest.raises(DataError, match=expected):
        find_pictures(DataConfig(source="webdataset", path=str(path)))


def test_no_tar_file(tmp_path):
    with pytest.raises(DataError, match="there is none here"):
        find_pictures(DataConfig(source="webdataset", path=str(tmp_path / "*.tar")))


@pytest.fixture
def dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "picture": [{"bytes": png(10), "path": None}, {"bytes": b"not a picture", "path": None}],
        "words": ["ten", "none"],
    }
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


HUB = {"source": "hub", "image_column": "picture", "caption_column": "words"}


def test_datasets_in_hugging_faces_format(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    dataset.to_parquet(tmp_path / "files" / "train.parquet")
    for path in ("saved", "files"):
        config = DataConfig(path=str(tmp_path / path), **HUB)
        pictures = find_pictures(config)
        assert [pictures.caption(i) for i in range(2)] == ["ten", "none"]
        data = PictureData(pictures, config, 8)
        samples = [data[0], data[1]]
        assert [sample.caption for sample in samples] == ["ten", "ten"]
        assert [name for sample in samples for name, _ in sample.broken] == [f"{tmp_path / path}[1]"]


def test_datasets_with_several_captions_a_picture(dataset, tmp_path):
    several = dataset.remove_columns("words").add_column("words", [["first", "second"], ["third"]])
    several.save_to_disk(tmp_path / "several")
    assert find_pictures(DataConfig(path=str(tmp_path / "several"), **HUB)).caption(0) == "first"


def test_rows_without_a_caption_are_left_out_and_those_without_a_picture_are_broken(dataset, tmp_path):
    picture, words = [None, {"bytes": png(10), "path": None}, None], ["a", None, "b"]
    rows = dataset.from_dict({"picture": picture, "words": words}, features=dataset.features)
    rows.save_to_disk(tmp_path / "gaps")
    config = DataConfig(path=str(tmp_path / "gaps"), **HUB)
    pictures = find_pictures(config)
    assert [pictures.caption(i) for i in range(len(pictures))] == ["a", "b"]
    with pytest.raises(DataError, match="none of 2"):
        PictureData(pictures, config, 8)[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"caption_column": "text"}, "'text'"), ({"image_column": "image"}, "'image'"), ({"path": "nobody/none"}, "none")],
)
def test_datasets_that_cannot_be_used(dataset, tmp_path, change, expected):
    dataset.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=expected):
        find_pictures(DataConfig(**{"path": str(tmp_path / "saved"), **HUB, **change}))


def test_tars_and_caches_are_named_where_a_folder_has_no_pictures(tars):
    with pytest.raises(DataError, match=r"--data\.source"):
        find_pictures(DataConfig(path=str(tars)))


def test_texts_that_are_no_text(tmp_path):
    (tmp_path / "0.png").write_bytes(png(10))
    (tmp_path / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"0\.txt' cannot be read .* save it as UTF-8"):
        entries(path=str(tmp_path))


def test_captions_that_are_null_are_left_out(tmp_path):
    (tmp_path / "0.png").write_bytes(png(10))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": null}')
    with pytest.raises(DataError, match="no pictures with captions"):
        entries(path=str(tmp_path))


def test_captions_under_another_name(tmp_path):
    (tmp_path / "0.png").write_bytes(png(10))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "words": "ten"}))
    assert entries(path=str(tmp_path), caption_column="words") == [("ten", 10)]
    with pytest.raises(DataError, match=r"--data.caption_column"):
        entries(path=str(tmp_path))
