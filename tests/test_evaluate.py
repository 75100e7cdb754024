"""``diffusion-attn evaluate``, and the other commands of distillation, as a user calls them."""

import json

import pytest
import torch
from PIL import Image

import diffusion_attn as da
from diffusion_attn.cli.main import main
from diffusion_attn.distill.cache import CachedData
from tests import tiny

pytest.importorskip("torchmetrics")
PROMPTS = [
    "a red star on a white background",
    "a blue ring on a black background",
    "a green cross above a red ring on a white background",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    da.LinFusion.for_model(tiny.sd().unet).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return str(file)


def evaluate(model, tmp_path, *args):
    code = main(
        ["evaluate", "--teacher", model, "--steps", "2", "--output", str(tmp_path / "out"), "--device", "cpu", *args]
    )
    return code, json.loads((tmp_path / "out" / "evaluation.json").read_text()) if code == 0 else None


def test_everything_is_measured(model, student, prompts, clip, tmp_path, capsys):
    args = ("--student", student, "--prompts", prompts, "--batch", "2", "--clip", clip, "--fid", clip)
    code, result = evaluate(model, tmp_path, *args)
    assert code == 0
    for one in result["numbers"].values():
        assert one["seconds_per_step"] > 0 and one["oracle"]["asked"] == 4 and 0 <= one["clip_score"] <= 100
    assert result["likeness"]["psnr"] < 60 and result["likeness"]["ssim"] < 1
    assert result["likeness"]["frechet_distance"] >= 0
    with Image.open(tmp_path / "out" / "evaluation.png") as grid:
        assert grid.size == (3 * 64, 2 * 64)
    table = capsys.readouterr().out
    assert "PSNR" in table and "exact" in table and "CLIP score" in table


def test_pictures_are_those_that_generate_draws(model, student, prompts, tmp_path):
    """Seeds, guidance and sizes are those of the other command, and the teacher's column is the plain model."""
    evaluate(model, tmp_path, "--student", student, "--prompts", prompts, "--batch", "1", "--seed", "5")
    with Image.open(tmp_path / "out" / "evaluation.png") as grid:
        cells = {
            (column, row): grid.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
            for column in range(3)
            for row in range(2)
        }
    for column, prompt in enumerate(PROMPTS):
        for row, method in enumerate(([], ["--method", "linfusion", "--weights", student])):
            out = tmp_path / f"{column}{row}"
            args = ["--model", model, "--steps", "2", "--seed", str(5 + column), "--output", str(out), "--quiet"]
            assert main(["generate", prompt, "--device", "cpu", *args, *method]) == 0
            [file] = out.glob("*.png")
            with Image.open(file) as picture:
                assert list(picture.convert("RGB").getdata()) == list(cells[column, row].convert("RGB").getdata())


@pytest.mark.parametrize("guidance", ["1", "2"])
def test_flux_and_its_students_are_measured(prompts, tmp_path, guidance):
    """The teacher's column is what the pipeline draws: with guidance held against the empty prompt."""
    pipe, folder = tiny.flux(guidance_embeds=False), tmp_path / "flux"
    pipe.tokenizer_2.model_max_length = 16
    pipe.save_pretrained(folder)
    da.Clear.for_model(pipe.transformer, radius=3).save_pretrained(tmp_path / "student")
    args = ("--method", "clear", "--student", str(tmp_path / "student"), "--prompts", prompts, "--size", "48")
    code, result = evaluate(str(folder), tmp_path, *args, "--guidance", guidance)
    assert code == 0 and result["likeness"]["psnr"] < 60
    call = {"height": 48, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}
    guided = {"negative_prompt": [""] * 3, "true_cfg_scale": float(guidance)}
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = pipe(PROMPTS, generator=noise, **call, **guided).images
    with Image.open(tmp_path / "out" / "evaluation.png") as grid:
        for column, image in enumerate(images):
            assert grid.crop((48 * column, 0, 48 * column + 48, 48)).tobytes() == image.tobytes()


def test_each_method_has_a_teacher_of_its_own(monkeypatch, tmp_path):
    """Without ``--teacher``; named before anything is loaded."""
    asked = []
    monkeypatch.setattr("diffusion_attn.cli.models.check_model", lambda model, option: asked.append(model) or 1 / 0)
    for method in ("linfusion", "clear"):
        assert main(["evaluate", "--method", method, "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
    assert asked == ["shapes-sd", "shapes-flux"]


def test_a_student_that_is_the_teacher_is_told_as_such(model, tmp_path, prompts, monkeypatch):
    """With the method's processors out of force, nothing differs."""
    student = tmp_path / "same"
    linfusion = da.LinFusion.for_model(tiny.sd().unet)
    linfusion.save_pretrained(student)
    monkeypatch.setattr("diffusion_attn.cli.evaluate.using", lambda pipe, *methods: torch.no_grad())
    _, result = evaluate(model, tmp_path, "--student", str(student), "--prompts", prompts)
    assert result["likeness"] == {"psnr": 100.0, "ssim": pytest.approx(1.0)}
    assert result["numbers"]["teacher"]["oracle"] == result["numbers"]["student"]["oracle"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "--prompts is needed"),
        (("--prompts", "none.txt"), "none.txt"),
        (("--prompts", "PROMPTS", "--student", "EMPTY"), "config.json"),
        (("--prompts", "PROMPTS", "--clip", "EMPTY"), "could not be loaded as a CLIP model"),
        (("--prompts", "PROMPTS", "--batch", "0"), "--batch 0"),
        (("--prompts", "PROMPTS", "--size", "63"), "--size 63"),
    ],
)
def test_what_is_refused(model, tmp_path, prompts, capsys, args, expected):
    (tmp_path / "empty").mkdir()
    names = {"PROMPTS": prompts, "EMPTY": str(tmp_path / "empty")}
    code, _ = evaluate(model, tmp_path, *(names.get(arg, arg) for arg in args), "--quiet")
    error = capsys.readouterr().err
    assert code == 2 and expected in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("method", ["linfusion", "clear"])
@pytest.mark.parametrize("student", ["/nowhere/student", "./student", "student", "a/b/student"])
def test_a_student_that_is_not_there_is_told_before_any_work(model, tmp_path, prompts, capsys, method, student):
    args = ("--method", method, "--student", student, "--prompts", prompts)
    assert evaluate(model, tmp_path, *args)[0] == 2
    error = capsys.readouterr().err
    assert f"--student {student!r} was not found: there is no such folder or file here; give" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("student", ["owner/name", "misnamed.safetensors"])
def test_a_student_whose_name_does_not_tell_the_radius(model, tmp_path, prompts, capsys, monkeypatch, student):
    """In Python ``radius=`` does; here the remedy is a file's name, and nothing is loaded or asked of the Hub first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "misnamed.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("asked the Hub"))
    for loader in ("evaluate._scorers", "models.load_model"):
        monkeypatch.setattr(f"diffusion_attn.cli.{loader}", lambda *args: pytest.fail("loaded something"))
    args = ("--method", "clear", "--student", student, "--prompts", prompts)
    assert evaluate(model, tmp_path, *args)[0] == 2
    error = capsys.readouterr().err
    assert f"--student {student!r} is neither" in error and "clear_local_16.safetensors" in error
    assert "radius=" not in error


def test_make_data_then_cache_then_distil(model, prompts, tmp_path, capsys):
    """The whole chain of the documentation on a tiny model."""
    data, cached, out = (str(tmp_path / name) for name in ("data", "cached", "out"))
    common = ("--model", model, "--quiet", "--device", "cpu")
    assert (
        main(["distill", "make-data", "--prompts", prompts, "--count", "4", "--steps", "1", "--output", data, *common])
        == 0
    )
    assert main(["distill", "cache", "--data", data, "--output", cached, "--batch", "3", *common]) == 0
    assert len(CachedData(cached).order) == 4
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {model}}}\noptim: {{batch_size: 2, micro_batch: 2}}\nrun: {{steps: 2}}\n")
    assert main(["distill", str(recipe), "--data", cached, "--data.source", "cache", "--output", out, "--quiet"]) == 0
    assert da.LinFusion.from_pretrained(out).layers
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["make-data", "--prompts", "nowhere.txt", "--count", "1", "--output", "x"], "nowhere.txt"),
        (["make-data", "--prompts", "PROMPTS", "--count", "0", "--output", "x"], "--count 0"),
        (["cache", "--data", "nowhere", "--output", "x"], "nowhere"),
        (["cache", "--data.source", "shapes", "--output", "x"], "--count"),
        (["cache", "--output", "x"], "--data FOLDER"),
        (["cache", "--data.source", "shapes", "--count", "2", "--data.size", "63", "--output", "x"], "data.size=63"),
        (["cache", "--data.source", "tars", "--output", "x"], "--data.source 'tars': expected one of folder"),
    ],
)
def test_what_the_other_commands_refuse(model, prompts, tmp_path, monkeypatch, capsys, command, expected):
    monkeypatch.chdir(tmp_path)
    args = [prompts if arg == "PROMPTS" else arg for arg in command]
    assert main(["distill", *args, "--model", model, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert expected in error.strip().splitlines()[-1]
