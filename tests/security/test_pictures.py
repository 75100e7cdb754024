"""Pictures of strangers are decoded by few readers, within bounds, and damage is told in the library's own errors."""

import json
import os
import random
import struct
import zlib
from contextlib import suppress
from io import BytesIO

import pytest
from PIL import Image

from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.files import open_picture
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.data import PictureData
from diffusion_attn.distill.sources import DataError, find_in_folder
from diffusion_attn.metrics import pie_bench

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


@pytest.fixture
def openers(tmp_path):
    """Every way to a stranger's picture: functions that open one of these bytes."""
    (tmp_path / "annotation_images").mkdir()
    entry = {"image_path": "a.png", "original_prompt": "a", "editing_prompt": "a", "editing_type_id": 1, "mask": []}
    (tmp_path / "mapping_file.json").write_text(json.dumps({"a": entry}))
    (tmp_path / "a.txt").write_text("a star")

    def from_training(path):
        return PictureData(find_in_folder(str(tmp_path), DataConfig()), DataConfig(), 8).read(0)

    ways = [
        ("a.png", CommandError, lambda path: open_picture(str(path))),
        ("annotation_images/a.png", DiffusionAttnError, lambda path: pie_bench.load(tmp_path)[0].image()),
        ("a.png", DataError, from_training),
    ]

    def of(content):
        for name, error, way in ways:
            (tmp_path / name).write_bytes(content)
            yield error, lambda way=way, name=name: way(tmp_path / name)

    return of


def test_good_pictures_are_opened(openers):
    for suffix in ("png", "jpeg", "webp", "bmp", "tiff", "gif"):
        file = BytesIO()
        Image.effect_noise((16, 16), 50).convert("RGB").save(file, suffix)
        for _, opened in openers(file.getvalue()):
            assert opened()


def test_no_program_is_started_for_a_picture(openers, tmp_path, monkeypatch):
    ghostscript = tmp_path / "bin/gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\n: > {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    for error, opened in openers(POSTSCRIPT):
        with pytest.raises(error):
            opened()
        assert not (tmp_path / "ran").exists()


def test_small_files_of_huge_pictures_are_refused(openers):
    for error, opened in openers(png(2**15, 2**14)):
        with pytest.raises(error, match=f"32768x16384 pixels, and {2**28} in all is the most"):
            opened()


def test_damage_is_told(openers):
    pick = random.Random(0)
    for suffix in ("png", "jpeg", "webp", "bmp", "tiff", "gif"):
        file = BytesIO()
        Image.effect_noise((16, 16), 50).convert("RGB").save(file, suffix)
        for _ in range(30):
            content = bytearray(file.getvalue())
            for _ in range(8):
                content[pick.randrange(min(len(content), 200))] = pick.randrange(256)
            for error, opened in openers(bytes(content[: pick.randrange(30, 2 * len(content))])):
                with suppress(error):
                    opened()
