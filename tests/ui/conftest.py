"""A running page, and a browser that looks at it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from diffusion_attn.cli.files import TEXT_KEY

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """``diffusion-attn ui`` in a process of its own: its ``address``, and the file of what it has ``said``."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("ui")
    said = folder / "said.txt"
    command = [sys.executable, "-m", "diffusion_attn", "ui", "--no-browser", "--max-side", "256", "--max-steps", "400"]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "PYTHONUNBUFFERED": "1"}
    command += ["--output", folder / "pictures"]
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said.read_text())):
            assert process.poll() is None, f"the page did not start: {said.read_text()}"
            time.sleep(0.1)
        yield SimpleNamespace(address=found[0], said=said)
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def browser():
    """Chromium: the one that is installed, or the one that playwright has brought."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield started
        started.close()


class Tab:
    """One tab of the page, as a visitor has it."""

    def __init__(self, page, name):
        self.page = page
        page.get_by_role("tab", name=name, exact=True).click()
        self.panel = page.get_by_role("tabpanel").filter(visible=True)

    def fill(self, label, text):
        """Write into a field."""
        self.field(label).fill(str(text))

    def field(self, label):
        """The field, or the first of a choice, that a label names."""
        block = self.panel.locator(".block", has=self.page.locator("span", has_text=re.compile(rf"^\s*{label}\s*$")))
        return block.last.locator("input, textarea").first

    def choose(self, label, text):
        """Take one of a list."""
        self.field(label).click()
        self.page.get_by_role("option", name=text).first.click()

    def steps(self, number):
        """Write how many steps, which are folded away."""
        self.panel.get_by_role("button", name="Steps and guidance").click()
        self.fill("Steps", number)

    def click(self, button):
        """Press a button."""
        self.panel.get_by_role("button", name=button, exact=True).click()

    @property
    def status(self):
        """How far it is."""
        return self.panel.locator(".status").last.inner_text().strip()

    def wait(self, text="Done.", seconds=60):
        """Wait until the status begins with ``text``; returns it."""
        end = time.monotonic() + seconds
        while not (status := self.status).startswith(text):
            assert time.monotonic() < end, f"{text!r} was awaited, and the page says {status!r}"
            self.page.wait_for_timeout(50)
        return status

    def image(self, label):
        """The picture under a label."""
        place = self.panel.locator(".block", has=self.page.locator("label", has_text=re.compile(rf"^\s*{label}\s*$")))
        return place.last.locator("img").first

    def download(self, label):
        """The picture under a label and the settings in its file, as a visitor gets them."""
        response = self.page.request.get(self.image(label).get_attribute("src"))
        assert response.ok
        picture = Image.open(io.BytesIO(response.body()))
        return picture, json.loads(picture.text[TEXT_KEY])


@pytest.fixture
def visit(server, browser):
    """Open a tab, ``visit("Edit")``; scripts that fail, and requests to anywhere else, fail the test."""
    errors = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})

    def open_tab(name):
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda made: made.url.startswith((server.address, "data:", "blob:")) or errors.append(made.url)
        )
        page.goto(server.address)
        page.get_by_role("tab", name="Generate").wait_for()
        return Tab(page, name)

    yield open_tab
    context.close()
    assert not errors
