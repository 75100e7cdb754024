"""The commands that look at attention and edit pictures, on a tiny model and on the embedded one."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffusion_attn import shapes
from diffusion_attn.cli.main import main
from diffusion_attn.editing.inversion import Inversion
from diffusion_attn.pipelines import PromptToPromptPipeline
from diffusion_attn.shapes.models import CLIP, IP_ADAPTER
from tests import tiny

ADAPTER = str(CLIP / IP_ADAPTER)
OTHER = str(CLIP / "model.safetensors")
SOURCE = "a red star above a blue ring on a white background"
TARGET = SOURCE.replace("star", "square")
STEM = "a-red-star-above-a-blue-ring-on-a-white-background"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    first = shapes.Shape("star", "red", None, 0.3, 0.28, 0.2)
    second = shapes.Shape("ring", "blue", None, 0.35, 0.72, 0.18)
    shapes.render(shapes.Scene((first, second), "white", "above"), 64).save(path)
    return str(path)


@pytest.fixture
def edit(model, photo, tmp_path):
    def run(*args, image=photo, source=SOURCE, target=(TARGET,)):
        common = ("--model", model, "--steps", "3", "--device", "cpu", "--output", str(tmp_path / "out"), "--quiet")
        return main(["edit", image, "--source", source, "--target", *target, *map(str, args), *common])

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_maps_of_words_beside_the_picture(model, tmp_path):
    common = ["--model", model, "--steps", "2", "--device", "cpu", "--quiet"]
    assert main(["attention-map", SOURCE, "--words", "star", "ring", "--output", str(tmp_path), *common]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{STEM}-seed0{end}.png" for end in ("-maps", "-ring", "-star", "")]
    assert main(["generate", SOURCE, "--output", str(tmp_path / "plain"), *common]) == 0
    [plain] = (tmp_path / "plain").glob("*.png")
    difference = pixels(plain).astype(int) - pixels(tmp_path / f"{STEM}-seed0.png")
    assert abs(difference).max() <= 1
    assert len(set(map(tuple, pixels(tmp_path / f"{STEM}-seed0-star.png").reshape(-1, 3)))) > 50


@pytest.mark.parametrize("method", ["p2p", "direct", "null-text", "dpl"])
def test_every_method_edits(edit, method, tmp_path):
    words = ("--words", "star", "ring") if method == "dpl" else ()
    assert edit("--method", method, *words, target=(TARGET, SOURCE.replace("blue", "large blue"))) == 0
    out = tmp_path / "out"
    pictures = sorted(path for path in out.glob("0*.png"))
    assert len(pictures) == 2 and (out / f"comparison-{method}.png").is_file()
    record = json.loads(pictures[0].with_suffix(".json").read_text())
    assert record["target"] == TARGET and record["method"] == method and record["oracle"]["judgement"]
    stages = {"null-text": {"ddim", "null_text"}, "dpl": {"ddim", "dynamic_prompts"}}.get(method, {"ddim"})
    assert record["cost"].keys() == stages and record["cost"]["ddim"]["unet_calls"] == 3
    assert not np.array_equal(*map(pixels, pictures))


def test_an_inversion_is_kept_and_used_again(edit, tmp_path, capsys):
    path = tmp_path / "inversion.safetensors"
    assert edit("--method", "null-text", "--inversion", path) == 0
    written = path.stat().st_mtime_ns
    first = {p.name: pixels(p) for p in (tmp_path / "out").glob("0*.png")}
    assert Inversion.load(path).finished
    assert edit("--method", "null-text", "--inversion", path) == 0
    assert path.stat().st_mtime_ns == written
    assert all(np.array_equal(pixels(tmp_path / "out" / name), before) for name, before in first.items())
    other = tmp_path / "other.png"
    Image.fromarray(255 - pixels(next((tmp_path / "out").glob("0*.png")))).save(other)
    assert edit("--method", "null-text", "--inversion", path, image=str(other)) == 2
    assert edit("--method", "direct", "--inversion", path) == 2
    assert "name another file" in capsys.readouterr().err


def test_interrupted_and_gone_on_with(model, photo, tmp_path):
    path = tmp_path / "inversion.safetensors"
    command = [sys.executable, "-m", "diffusion_attn", "edit", photo, "--source", SOURCE, "--target", TARGET]
    command += ["--method", "null-text", "--inversion", str(path), "--steps", "10", "--model", model]
    command += ["--output", str(tmp_path / "out"), "--device", "cpu"]

    def listen():  # where the tests run in the background of a shell, SIGINT is ignored, and that is inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    until = time.monotonic() + 120
    while not path.is_file() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    done = len(Inversion.load(path).null_embeds)
    assert 0 < done < 10 and not list((tmp_path / "out").glob("0*"))
    assert main([*command[3:], "--quiet"]) == 0
    assert Inversion.load(path).finished and list((tmp_path / "out").glob("0*.png"))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("--method", "dpl"), {}, "name them with --words"),
        (("--words", "star"), {}, "--words is for --method dpl"),
        (("--method", "dpl", "--words", "cat"), {}, f"--words 'cat' is not a word of '{SOURCE}'"),
        (("--blend", "star", "cat"), {}, f"--blend 'cat' is not a word of '{TARGET}'"),
        (("--cross", "40"), {}, "--cross 40.0: expected a share of the steps"),
        (("--inversion", "/proc/nowhere/x.safetensors"), {}, "--inversion in '/proc/nowhere' cannot be written"),
        (("--weights", "square"), {}, "--weights 'square': expected WORD=FACTOR"),
        (("--weights", "cat=2"), {}, "--weights 'cat' is not a word"),
        (("--size", "63"), {}, "multiples of"),
        ((), {"image": "nowhere.png"}, "'nowhere.png' was not found"),
        ((), {"image": __file__}, "cannot be read as a picture"),
        (("--model", "shapes-flux"), {}, "edit takes Stable Diffusion 1, 2 or XL"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(photo, model, tmp_path, capsys, args, options, message):
    given = {"image": photo, **options}
    common = [] if "--model" in args else ["--model", model]
    command = ["edit", given["image"], "--source", SOURCE, "--target", TARGET, *args, *common]
    assert main([*command, "--output", str(tmp_path / "out"), "--device", "cpu", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_a_word_that_is_not_in_the_prompt_has_no_map(capsys):
    assert main(["attention-map", SOURCE, "--words", "leopard"]) == 2
    assert "--words 'leopard' is not a word of the prompt" in capsys.readouterr().err
    assert main(["attention-map", " "]) == 2
    assert "give one with words" in capsys.readouterr().err


def test_the_embedded_model_swaps_a_shape_and_keeps_the_rest(photo, tmp_path):
    common = ["--cross", "0.4", "--self", "0.2", "--steps", "20", "--guidance", "3", "--device", "cpu", "--quiet"]
    command = ["edit", photo, "--source", SOURCE, "--target", TARGET, "--output", str(tmp_path), *common]
    assert main(command) == 0
    [path] = tmp_path.glob("0*.png")
    assert json.loads(path.with_suffix(".json").read_text())["oracle"]["judgement"]["exact"]
    ring = np.s_[36:, :]
    difference = pixels(path)[ring].astype(float) - pixels(photo)[ring]
    assert (difference**2).mean() < 0.004 * 255**2


# ---- ViMAEdit


def test_vimaedit_needs_no_inversion_and_edits_do_not_know_each_other(edit, tmp_path):
    targets = (TARGET, SOURCE.replace("blue", "large blue"))
    out = tmp_path / "out"
    assert edit("--method", "vimaedit", "--seed", 3, target=targets) == 0
    together = [pixels(path) for path in sorted(out.glob("0*.png"))]
    record = json.loads(sorted(out.glob("0*.json"))[0].read_text())
    assert (record["method"], record["cross"], record["self"], record["cost"]) == ("vimaedit", 0.4, 0.6, {})
    for path in out.iterdir():
        path.unlink()
    assert edit("--method", "vimaedit", "--seed", 3, target=targets[1:]) == 0
    [alone] = out.glob("0*.png")
    assert abs(pixels(alone).astype(int) - together[1]).max() <= 1


def test_outside_of_a_mask_the_picture_stays_what_the_autoencoder_makes_of_it(photo, tmp_path):
    mask = np.repeat(np.uint8([[255] * 32 + [0] * 32]), 64, 0).T
    Image.fromarray(mask).save(tmp_path / "mask.png")  # where the star is
    target = SOURCE.replace("red star", "green square").replace("ring", "circle")
    args = ["--method", "vimaedit", "--mask", str(tmp_path / "mask.png"), "--ip-scale", "0", "--steps", "8"]
    args += ["--cross", "0", "--self", "0", "--output", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    assert main(["edit", photo, "--source", SOURCE, "--target", target, *args]) == 0
    edited = pixels(next((tmp_path / "out").glob("0*.png"))).astype(int)
    pipe = PromptToPromptPipeline.from_pipe(shapes.load_pipeline())
    plain = np.asarray(pipe.decode_latents(pipe.encode_image(Image.open(photo)), "pil")[0]).astype(int)
    changed = abs(edited - plain).mean((1, 2))  # of each row
    assert changed[44:].max() < 4 and changed[16:30].min() > 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "vimaedit", "--inversion", "x"), "--inversion 'x' is not for --method vimaedit"),
        (("--mask", "PHOTO"), "is not for --method direct"),
        (("--method", "vimaedit", "--mask", "/nowhere"), "'/nowhere' was not found"),
        (("--method", "vimaedit", "--ip-adapter", "nowhere"), "OWNER/NAME/FOLDER/FILE.safetensors"),
        (("--method", "vimaedit", "--ip-adapter", "PHOTO"), "is not a safetensors file"),
        (("--method", "vimaedit", "--ip-adapter", OTHER), "holds other weights than an IP-Adapter's"),
        (
            ("--method", "vimaedit", "--ip-adapter", ADAPTER, "--ip-clip", "nowhere"),
            "could not be loaded",
        ),
        (("--method", "vimaedit", "--blend", "star", "lion"), "--blend 'lion' is not a word"),
    ],
)
def test_what_does_not_go_with_vimaedit_is_refused(edit, photo, capsys, args, message):
    assert edit(*(photo if arg == "PHOTO" else arg for arg in args)) == 2
    assert message in capsys.readouterr().err
