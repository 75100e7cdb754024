"""Pictures of the page for the book: ``python -m tests.ui.screenshots`` draws in each tab and writes docs/images."""

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from diffusion_attn.ui.page import launch
from diffusion_attn.ui.studio import Studio
from tests.ui.conftest import FLAGS, Tab

IMAGES = Path(__file__).parents[2] / "docs" / "images"
TABS = {
    "Generate": "Draw",
    "High resolution": "Draw",
    "Edit": "Edit",
    "Attention": "Draw and look",
    "Compare": "Measure",
}


def prepare(tab, name):
    """Ask for what shows the tab well."""
    if name == "Generate":
        tab.fill("Size", "192x128")
    if name == "High resolution":
        tab.fill("Size", 128)
        tab.choose("Method", "linfusion")
        tab.panel.locator("input[type=number]").last.fill("0.2")
    if name == "Compare":
        tab.fill("Sizes", "64 128 192")


def take(browser, address, name, width=1280, height=900):
    """Work in a tab and keep what is seen of it."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(address)
    page.get_by_role("tab", name="Generate").wait_for()
    tab = Tab(page, name)
    page.wait_for_timeout(1000)  # for the first example
    prepare(tab, name)
    tab.click(TABS[name])
    tab.wait(seconds=600)
    page.wait_for_timeout(1000)
    narrow = "-narrow" if width < 600 else ""
    page.screenshot(path=IMAGES / f"ui-{name.lower().replace(' ', '-')}{narrow}.png", full_page=True)
    page.close()


def main():
    """Take them all."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        _, address, _ = launch(Studio(Path(folder)), prevent_thread_lock=True, inbrowser=False)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name in TABS:
            take(browser, address, name)
        take(browser, address, "Generate", 390, 844)
        browser.close()


if __name__ == "__main__":
    main()
