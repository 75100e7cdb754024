"""The bench: rows of every method, what has to hold before they are timed, resuming, and what is written."""

import json
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import ClassVar

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

import diffusion_attn as da
from benchmarks import report
from benchmarks.common import count_flops
from diffusion_attn.bench import OtherSettingsError, ParityError, applicable_methods, plot, run_bench
from diffusion_attn.bench.steps import Steps
from diffusion_attn.cli.bench import file_name, read_request
from diffusion_attn.cli.main import main, parse
from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.method import Plan
from diffusion_attn.methods import METHODS
from diffusion_attn.shapes.models import FOLDER
from tests import tiny
from tests.golden.seeded import seed_parameters

SIZE = (128, 64)
SHALLOW = partial(tiny.sd, layers_per_block=1)
SHORT = {"prompt": tiny.PROMPT, "steps": 3, "repeats": 1}
SD = {
    "hidiffusion": lambda unet: da.HiDiffusion(),
    "linfusion": lambda unet: seed_parameters(da.LinFusion.for_model(unet, mid_dim=4)),
    "agent": lambda unet: da.AgentAttention(),
    "token_merging": lambda unet: da.TokenMerging(),
    "low_memory": lambda unet: da.LowMemory(),
}
FLUX = {"clear": lambda transformer: da.Clear(radius=4), "low_memory": lambda transformer: da.LowMemory()}


def flops_of(pipe, method):
    """FLOPs of a step, as torch counts them in the real run."""
    call = call_arguments(pipe, [tiny.PROMPT])
    steps = Steps.record(pipe, **call, width=SIZE[0], height=SIZE[1], num_inference_steps=SHORT["steps"])
    if method is None:
        return count_flops(steps.take_all) / SHORT["steps"]
    with da.using(pipe, method):
        return count_flops(steps.take_all) / SHORT["steps"]


@pytest.mark.parametrize(("make", "methods"), [(SHALLOW, SD), (tiny.flux, FLUX)], ids=["sd", "flux"])
def test_every_method_gets_a_row_with_the_flops_that_torch_counts(make, methods):
    assert METHODS.keys() == {*SD, *FLUX}
    pipe = make()
    before = tiny.run(pipe, steps=2)
    methods = {name: build(tiny.denoiser(pipe)) for name, build in methods.items()}
    heard = []
    result = run_bench(pipe, methods, [SIZE], **SHORT, quality=1, progress=lambda *told: heard.append(told[:2]))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert heard == [(done, heard[0][1]) for done in range(len(heard))] and heard[-1][0] == heard[-1][1]
    assert torch.equal(tiny.run(pipe, steps=2), before)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["plain", *methods] and not result["skipped"]
    for name, row in rows.items():
        assert row["size"] == [*SIZE] and row["pictures"] == 1 and row["exact"] in (0, 1)
        assert row["relative_time"] == pytest.approx(row["seconds_per_step"] / rows["plain"]["seconds_per_step"])
        if name != "clear":  # whose operation torch does not look into
            assert row["flops_per_step"] == pytest.approx(flops_of(pipe, methods.get(name)), rel=1e-9)
    assert rows["low_memory"]["psnr"] > 40 and rows["plain"]["psnr"] is None
    others = [row["psnr"] for name, row in rows.items() if name not in ("plain", "low_memory")]
    assert max(others) < rows["low_memory"]["psnr"]

    panels = plot(result).axes
    for axis, of in zip(panels, ("relative_time", "relative_peak"), strict=True):
        drawn = {bars.get_label(): list(bars.datavalues) for bars in axis.containers}
        assert drawn == {name: [] if rows[name][of] is None else [rows[name][of]] for name in methods}


def test_what_does_not_serve_is_told_in_a_line():
    serving, others = applicable_methods(tiny.flux())
    assert list(serving) == ["low_memory"] and {*serving, *others} == METHODS.keys()
    assert "UNet" in others["hidiffusion"] and not any("\n" in reason for reason in others.values())
    serving, others = applicable_methods(da.shapes.load_pipeline("shapes-flux"))
    assert list(serving) == ["clear", "low_memory"] and serving["clear"].weights is not None


# ---- parity


@dataclass(frozen=True)
class Tampering:
    """A method that does to the model's output, or to its weights, what it was told to."""

    name: ClassVar[str] = "tampering"
    factor: float = 1.0
    exact: bool = False
    traces: bool = False

    def plan(self, target):
        def install(attachment):
            attachment.after(target.denoiser, lambda module, args, output: (output[0] * self.factor, *output[1:]))
            if self.traces:
                target.denoiser.conv_out.bias.data += 1

        return Plan(["conv_out"], install, reads_steps=False)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Tampering(factor=1.01, exact=True), "is to compute what the plain model does"),
        (Tampering(factor=float("nan")), "not finite"),
        (Tampering(traces=True), "leaves a trace"),
    ],
)
def test_nothing_is_timed_without_parity(method, words):
    kept = []
    with pytest.raises(ParityError, match=words):
        run_bench(SHALLOW(), {"tampering": method}, [(64, 64)], **SHORT, keep=kept.append)
    assert not kept


def test_arguments_are_checked():
    pipe = tiny.sd()
    with pytest.raises(ValueError, match="repeats=0"):
        run_bench(pipe, {}, [SIZE], repeats=0)
    da.enable(pipe, da.TokenMerging())
    with pytest.raises(ValueError, match="'token_merging' is enabled"):
        run_bench(pipe, {}, [SIZE])


# ---- stopped and gone on with


def test_what_progress_raises_ends_it_and_finished_rows_go_on():
    pipe, methods, kept = SHALLOW(), {"token_merging": da.TokenMerging()}, []

    def stop(done, total, what):
        if what.startswith("128x64 token_merging, time"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_bench(pipe, methods, [(64, 64), SIZE], **SHORT, progress=stop, keep=lambda result: kept.append({**result}))
    assert not da.enabled(pipe)
    [*_, half] = kept
    assert [(row["method"], row["size"]) for row in half["rows"]] == [
        ("plain", [64, 64]),
        ("token_merging", [64, 64]),
    ]
    more = {**methods, "low_memory": da.LowMemory()}
    result = run_bench(pipe, more, [(64, 64)], **SHORT, before=half)
    assert [row for row in result["rows"] if row in half["rows"]] == half["rows"]
    assert [(row["method"], row["size"]) for row in result["rows"]] == [(name, [64, 64]) for name in ("plain", *more)]
    with pytest.raises(OtherSettingsError, match="another seed") as error:
        run_bench(pipe, more, [SIZE], **SHORT, seed=1, before=half)
    assert error.value.names == ["seed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    SHALLOW().save_pretrained(folder)
    return str(folder)


def bench(model, folder, *arguments, methods=("token_merging",), sizes=("64", "96x64")):
    short = ["--steps", "2", "--repeats", "1", "--quality", "1", "--device", "cpu", "--sizes", *sizes]
    return main(["bench", "--model", model, *short, "--output", str(folder), "--methods", *methods, *arguments])


def name_of(model):
    torch_, diffusers_ = (version(name).split("+")[0] for name in ("torch", "diffusers"))
    return f"bench-{model}-cpu-float32-torch{torch_}-diffusers{diffusers_}"


def test_the_command_is_interrupted_and_goes_on(model, tmp_path, capsys):
    path = tmp_path / f"{name_of('tiny')}.json"

    def press_ctrl_c(module, args):
        if path.exists():
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells turn off in the background
    handle = register_module_forward_pre_hook(press_ctrl_c)
    try:
        assert bench(model, tmp_path) == 130
    finally:
        handle.remove()
        signal.signal(signal.SIGINT, before)
    first = json.loads(path.read_text())["rows"]
    assert 1 <= len(first) < 4
    capsys.readouterr()

    assert bench(model, tmp_path) == 0
    result = json.loads(path.read_text())
    assert [row for row in result["rows"] if row in first] == first and len(result["rows"]) == 4
    out = capsys.readouterr().out
    assert out.count("| token_merging |") == 2 and "96x64" in out and str(path) in out
    [command] = result["commands"]
    assert command.startswith("diffusion-attn bench --model tiny --methods token_merging --sizes 64 96x64")
    assert str(tmp_path) not in path.read_text() and model not in path.read_text()
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 1000

    report.main(["bench", "--folder", str(tmp_path)])
    page = (tmp_path / "bench.md").read_text()
    assert "## tiny" in page and f"$ {command}" in page and f"({path.stem}.png)" in page

    assert bench(model, tmp_path, "--seed", "1") == 2
    assert "rows made with another seed" in capsys.readouterr().err and json.loads(path.read_text()) == result


def test_a_method_that_is_named_has_to_serve(model, tmp_path, capsys):
    assert bench(model, tmp_path, methods=["clear"]) == 2
    error = capsys.readouterr().err
    assert "--methods 'clear' does not serve --model" in error and error.count("\n") <= 2
    assert not list(tmp_path.iterdir())
    assert bench(model, tmp_path, methods=["all", "clear"]) == 2
    assert "--methods 'all' is not a method" in capsys.readouterr().err


def test_options_of_methods_stay_with_their_rows(model, tmp_path, capsys):
    whole, half = tmp_path / "default", tmp_path / "given"
    run = partial(bench, model, sizes=["64"])
    assert run(whole) == 0 and run(half, "--token_merging.ratio", "0.25") == 0
    plain, given = (json.loads((folder / f"{name_of('tiny')}.json").read_text()) for folder in (whole, half))
    assert (plain["settings"]["options"], given["settings"]["options"]) == ({}, {"token_merging": {"ratio": 0.25}})
    assert (
        "--token_merging.ratio 0.25" in given["commands"][0] and "token_merging: ratio 0.25" in capsys.readouterr().out
    )
    for before, after in zip(plain["rows"], given["rows"], strict=True):
        fewer = before["flops_per_step"] < after["flops_per_step"]
        assert fewer == (before["method"] == "token_merging")

    assert run(half) == 2
    assert "holds rows of 'token_merging' with other options" in capsys.readouterr().err
    assert run(half, methods=["low_memory"]) == 0  # whose rows are not there
    assert json.loads((half / f"{name_of('tiny')}.json").read_text())["settings"] == given["settings"]
    assert run(half, "--hidiffusion.window_attention", "false") == 2
    assert "not enabled; add --methods hidiffusion" in capsys.readouterr().err
    assert run(half, "--token_merging.ratio", "2") == 2
    assert "options of --methods token_merging: ratio=2" in capsys.readouterr().err
    assert run(half, "--weights", "none") == 2
    assert "give exactly one of --methods" in capsys.readouterr().err


def test_weights_of_one_name_are_told_apart(tmp_path):
    def options_of(folder):
        return read_request(parse(["bench", "--methods", "linfusion", "--weights", str(folder)])[1]["bench"]).options

    first, other = tmp_path / "first" / "student", tmp_path / "other" / "student"
    for folder in (first, other):
        shutil.copytree(FOLDER / "shapes-linfusion", folder)
    assert options_of(first) == options_of(other)
    path = other / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).mul_(2)
    save_file(tensors, path)
    named = [options_of(folder)["linfusion"]["weights"] for folder in (first, other)]
    assert named[0] != named[1] and all(name.startswith("student (") for name in named)


def test_a_file_that_is_no_result_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / f"{name_of('shapes-sd')}.json"
    path.write_text("[]")
    assert bench("shapes-sd", tmp_path) == 2
    assert "is no result of a bench" in capsys.readouterr().err and path.read_text() == "[]"


def test_the_file_name_tells_what_changes_numbers():
    assert file_name("shapes-sd", torch.device("cpu"), torch.float32) == f"{name_of('shapes-sd')}.json"
    assert file_name("Owner/Some Model", torch.device("cpu"), torch.float16).startswith(
        "bench-owner-some-model-cpu-float16-torch"
    )
