"""What the page may do, and what it leaves behind."""

import json
import shlex
import time
import urllib.error
import urllib.request
from threading import Lock, Thread

import pytest

pytest.importorskip("gradio")

import gradio as gr
import torch

from diffusion_attn.cli import edit, generate
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.main import main, parse
from diffusion_attn.methods import METHODS
from diffusion_attn.ui.jobs import Cancelled, Job
from diffusion_attn.ui.options import MethodChooser
from diffusion_attn.ui.parts import command_line
from diffusion_attn.ui.studio import Studio


@pytest.fixture
def studio(tmp_path):
    return Studio(tmp_path, device="cpu", max_side=256, max_steps=50)


def test_only_folders_that_it_was_started_with_are_loaded(studio, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(CommandError, match="none of this page"):
        studio.load(str(folder))
    with pytest.raises(CommandError, match="none of this page"):
        studio.check_model("no such model")
    Studio(tmp_path, folders=[str(folder)]).check_model(str(folder))


@pytest.mark.parametrize(
    ("size", "steps", "said"), [((512, 64), 10, "512x64 .* limit of 256"), ((64, 64), 51, "51 steps .* limit of 50")]
)
def test_limits_are_named_with_what_raises_them(studio, size, steps, said):
    with pytest.raises(CommandError, match=said + ".*--max-"):
        studio.check_limits(size, steps)
    studio.check_limits((256, 256), 50)


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "/proc/self/environ"])
def test_files_outside_its_folders_are_not_given(server, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.address}/gradio_api/file={path}")
    assert refused.value.code in (403, 404)


def test_files_outside_its_folders_are_not_edited(server, tmp_path):
    """A picture is named in the request by its path; one that was not uploaded is refused."""
    outside = tmp_path / "private.png"
    outside.write_bytes(b"no upload")
    config = json.load(urllib.request.urlopen(f"{server.address}/config"))
    labels = {part["id"]: part["props"].get("label") for part in config["components"]}
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    [picture] = [name for name, label in labels.items() if label == "Mask: white where it may change"]
    [run] = [each for each in config["dependencies"] if picture in each["inputs"]]
    data = [values[name] for name in run["inputs"]]
    data[run["inputs"].index(picture)] = {"path": str(outside), "meta": {"_type": "gradio.FileData"}}
    body = {"data": data, "fn_index": run["id"], "session_hash": "visitor"}
    asked = urllib.request.Request(
        f"{server.address}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(asked).read()
    events = urllib.request.urlopen(f"{server.address}/gradio_api/queue/data?session_hash=visitor", timeout=30)
    for line in events:
        event = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
        if event.get("msg") == "process_completed":
            break
    assert not event["success"]
    assert f"Cannot move {outside} to the gradio cache" in server.said.read_text()


def test_widgets_are_the_flags_of_the_command(capsys):
    with gr.Blocks():
        chooser = MethodChooser()
    given = [
        "clear",
        *(7 if (option.method, option.field) == ("clear", "radius") else option.default for option in chooser.options),
    ]
    read = chooser.read(given)
    assert read == {"method": ["clear"], "clear": {"radius": 7}}
    main(["generate", "--help"])
    flags = {word.strip(",[]") for word in capsys.readouterr().out.split() if word.startswith("--") and "." in word}
    named = {f"--{option.method}.{option.field}" for option in chooser.options}
    assert named == {flag for flag in flags if flag[2:].split(".")[0] in METHODS}


def test_the_command_that_is_shown_asks_for_the_same(studio):
    asked = {"model": "shapes-sd", "size": "128", "guidance": 0.0, "seed": 3, "compare": True, "steps": None}
    asked |= {"method": ["hidiffusion"], "hidiffusion": {"window_attention": False}}
    line = command_line("generate", ["a red star's ring"], asked)
    assert line == (
        "diffusion-attn generate 'a red star'\"'\"'s ring' --model shapes-sd --size 128 --guidance 0.0 --seed 3 "
        "--compare --method hidiffusion --hidiffusion.window_attention false"
    )
    args = studio.arguments(generate, prompt=["a red star's ring"], **asked)
    assert (args.seed, args.guidance, args.hidiffusion.window_attention) == (3, 0.0, False)


def test_what_begins_with_a_dash_is_no_option_in_the_command_that_is_shown():
    asked = {"model": "shapes-sd", "words": ["ring"], "output": "-folder", "steps": 2}
    line = command_line("attention-map", ["-3 degrees"], asked)
    args = parse(shlex.split(line)[1:])[1]["attention-map"]
    assert (args.prompt, args.words, args.output, args.steps) == ("-3 degrees", ["ring"], "-folder", 2)


def test_a_job_has_ended_when_nobody_listens_any_more():
    turn = Lock()
    job, going = Job(turn), []

    def work():
        while True:
            going.append(1)
            job.tell(len(going))

    told = job.run(work)
    assert [next(told), next(told)] == [1, 2]
    told.close()
    turn.acquire(timeout=10)  # which the work gives back when it has ended
    before = len(going)
    time.sleep(0.05)
    assert before == len(going)
    with pytest.raises(Cancelled):
        next(job.run(work))  # not begun any more


def test_jobs_of_one_turn_do_not_work_at_the_same_time():
    turn, working, most = Lock(), [], []

    def work():
        working.append(1)
        most.append(len(working))
        time.sleep(0.02)
        working.pop()

    threads = [Thread(target=lambda: list(Job(turn).run(work))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_a_second_run_waits_for_the_first_to_be_over(studio):
    studio.ask("visitor", "Edit")
    with pytest.raises(CommandError, match="not over"):
        studio.ask("visitor", "Edit")
    with studio.job("visitor", "Edit"):
        assert not studio.drop("visitor", "Edit") and not studio.cancel("visitor", "Edit")
    studio.ask("visitor", "Edit")
    studio.ask("visitor", "Attention")
    studio.leave("visitor")
    with pytest.raises(Cancelled), studio.job("visitor", "Edit"):
        pass
    studio.ask("visitor", "Edit")


@pytest.mark.parametrize("name", ["~nosuchuser", "/etc/passwd", "x" * 300, "../..", "file:///etc", "a/b/c"])
def test_the_model_field_tells_nothing_of_the_disk(studio, name):
    with pytest.raises(CommandError, match="none of this page"):
        studio.check_model(name)


def test_an_edit_with_an_image_adapter_leaves_the_model_as_it_was(studio):
    pipe = studio.load("shapes-sd")

    def draw():
        return pipe("a red star", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].tobytes()

    before, processors = draw(), {name: type(each) for name, each in pipe.unet.attn_processors.items()}
    args = studio.arguments(
        edit,
        image="docs/images/demo.png",
        source="a red star",
        target=["a red ring"],
        method="vimaedit",
        model="shapes-sd",
        steps=3,
        blend=["star", "ring"],
    )
    edited = edit.perform(pipe, edit.read_request(args))
    assert edited.result.blend_mask is not None
    assert {name: type(each) for name, each in pipe.unet.attn_processors.items()} == processors
    assert draw() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--folder", "/nowhere"], "--folder '/nowhere' is no diffusers pipeline"),
        (["--max-steps", "0"], "--max-steps 0"),
        (["--device", "teapot"], "--device 'teapot'"),
        (["--port", "99999"], "--host 127.0.0.1 --port 99999: the page cannot be there"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: the page cannot be there"),
    ],
)
def test_wrong_starts_are_one_sentence(tmp_path, capsys, given, said):
    assert main(["ui", "--no-browser", "--output", str(tmp_path / "out"), *given]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.strip().splitlines()) == 1


def test_the_loaded_model_is_kept_until_another_is_asked_for(studio):
    first = studio.load("shapes-sd")
    assert studio.load("shapes-sd") is first
    other = studio.load("shapes-flux")
    assert other is not first and studio.load("shapes-sd") is not first
