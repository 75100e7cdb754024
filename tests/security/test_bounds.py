"""Files that are made to take up memory or time are refused before they do."""

import json
import struct
import tarfile
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

import diffusion_attn as da
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.request import read_prompts
from diffusion_attn.core.reading import DEEPEST, LARGEST_JSON, LARGEST_YAML, parse_json, read_json, read_yaml
from diffusion_attn.core.tensors import LARGEST_HEADER, MOST_TENSORS, read_tensors
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.sources import DataError, find_in_folder, find_in_tars


def tensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FOUR = b"\0\0\0\0"
HEADERS = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "a huge length": tensors({}, length=2**63),
    "a length beyond the file": tensors({}, length=1000),
    "a length above the bound": tensors({}, length=LARGEST_HEADER + 1),
    "no JSON": tensors(b"{"),
    "no object": tensors([]),
    "no UTF-8": tensors(b'{"\xff": 1}'),
    "deep": tensors(b"[" * 100_000),
    "offsets outside": tensors({"a": entry(offsets=(0, 2**40), shape=(2**38,))}, FOUR),
    "offsets backwards": tensors({"a": entry(offsets=(4, 0))}, FOUR),
    "negative offsets": tensors({"a": entry(offsets=(-4, 0))}, FOUR),
    "overlapping": tensors({"a": entry(), "b": entry()}, FOUR),
    "a shape that overflows": tensors({"a": entry(shape=(2**62, 2**62))}, FOUR),
    "a shape of another size": tensors({"a": entry(shape=(2,))}, FOUR),
    "a shape of NaN": tensors(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', FOUR),
    "a negative shape": tensors({"a": entry(shape=(-1,))}, FOUR),
    "an unknown dtype": tensors({"a": entry(dtype="F33")}, FOUR),
    "two of a name": tensors(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), FOUR),
    "a million tensors": tensors({str(i): entry(shape=(0,), offsets=(0, 0)) for i in range(MOST_TENSORS + 1)}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_bounded(tmp_path, case):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HEADERS[case])
    tracemalloc.start()
    with pytest.raises(da.CheckpointFormatError, match="cannot be read as safetensors"):
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(HEADERS[case]) + 2**20


def test_good_files_are_read(tmp_path):
    save_file({"a": torch.arange(3.0), "b": torch.zeros(0, 2)}, tmp_path / "x.safetensors", {"c": "d"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert found["a"].tolist() == [0, 1, 2] and found["b"].shape == (0, 2)


def test_json_is_bounded_in_depth_and_size(tmp_path):
    path = tmp_path / "x.json"
    nested = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(nested) == json.loads(nested)
    for text in (f"[{nested}]", "[" * 10**6, '{"a":' * 10**5 + "1" + "}" * 10**5):
        with pytest.raises(ValueError, match="nested more than 64"):
            parse_json(text)
    with path.open("wb") as file:
        file.truncate(LARGEST_JSON + 1)  # a hole: nothing is on the disk
    with pytest.raises(ValueError, match=f"more than {LARGEST_JSON} bytes"):
        read_json(path)
    with pytest.raises(ValueError, match="more than 9 bytes"):
        read_json("/dev/zero", 9)
    path.write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="utf-8"):
        read_json(path)


@pytest.mark.parametrize("text", [r'"\ud800"', r'{"a": ["\uDFFF x"]}', r'{"\ud800": 1}'])
def test_json_of_half_characters_is_refused(text):
    assert parse_json(r'["\ud83d\ude00", "\ud55c"]') == ["😀", "한"]
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(text)


LINES = [f"{'bcdefghi'[i]}: &{'bcdefghi'[i]} [{', '.join([f'*{name}'] * 9)}]" for i, name in enumerate("abcdefgh")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x]\n" + "\n".join(LINES), "line 2 has an alias"),
        ("a: &a {b: *a}", "has an alias"),
        ("[" * 10**5, "nested more than 64"),
        ("a: " * 10**4, "not allowed"),
        ("- " * 10**5, "nested more than 64"),
        ("#" * LARGEST_YAML + "\n", f"more than {LARGEST_YAML} bytes"),
        ("a: !!python/object:os.system {}", "constructor"),
        ("? [a, b]\n: 1\n? {a: 1}\n: 2", "unhashable|constructing"),
        ("2001-99-99", "month"),
        (r'a: "\ud800"', "surrogates"),
        ("a: \x00", "special characters"),
    ],
)
def test_yaml_is_bounded_in_depth_size_and_aliases(tmp_path, text, says):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.timeout(60)
def test_masks_are_decoded_in_the_time_of_their_picture():
    assert da.metrics.pie_bench.decode_mask([0, 2**62] * 100_000).all()  # painted one by one they take minutes


def member(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


END = b"\0" * 1024
TARS = {
    "a long name of 4 EiB": member("@LongLink", 2**62, tarfile.GNUTYPE_LONGNAME) + END,
    "a long name of more": member("@LongLink", 2**80, tarfile.GNUTYPE_LONGNAME) + END,
    "attributes of 4 EiB": member("x", 2**62, tarfile.XHDTYPE) + END,
    "names of names": (member("@LongLink", 4, tarfile.GNUTYPE_LONGNAME) + b"abc".ljust(512, b"\0")) * 3000 + END,
    "a member that ends where it begins": member("a.txt", 0) + member("b.png", -512) + END,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", TARS)
def test_tars_are_bounded(tmp_path, case):
    (tmp_path / "x.tar").write_bytes(TARS[case])
    with pytest.raises(DataError, match="cannot be read"):
        find_in_tars(str(tmp_path), DataConfig())


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "a.txt"])
def test_captions_are_bounded(tmp_path, name):
    (tmp_path / "a.png").touch()
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**32)  # a hole: nothing is on the disk
    tracemalloc.start()
    with pytest.raises(DataError, match="cannot be read"):
        find_in_folder(str(tmp_path), DataConfig())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_prompts_are_bounded(tmp_path):
    with (tmp_path / "prompts.txt").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(CommandError, match=r"--prompts .* more than"):
        read_prompts(str(tmp_path / "prompts.txt"))
