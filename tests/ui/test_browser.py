"""The page in a real browser."""

import json

from PIL import Image, ImageChops

from diffusion_attn.shapes.oracle import read


def test_draws_plain_and_with_a_method_side_by_side(visit):
    tab = visit("Generate")
    tab.steps(6)
    tab.click("Draw")
    tab.wait("plain: step")
    tab.image("plain").wait_for()  # while it is drawn
    tab.wait()
    plain, settings = tab.download("plain")
    other, others = tab.download("linfusion")
    assert (settings["methods"], settings["steps"], settings["guidance"]) == ({}, 6, 2.0)
    assert others["methods"].keys() == {"linfusion"}
    assert settings["prompt"] == others["prompt"] and settings["seed"] == others["seed"]
    assert ImageChops.difference(plain.convert("RGB"), other.convert("RGB")).getbbox()
    assert tab.panel.get_by_text("shapes").count() >= 2  # what the oracle reads in each
    line = tab.field("The same on the command line").input_value()
    assert "--method linfusion" in line and "--steps 6" in line and line.endswith("--compare")


def test_options_are_those_of_the_method_and_a_new_seed_is_told(visit):
    tab = visit("Generate")
    tab.steps(2)
    tab.choose("Method", "token_merging")
    tab.panel.get_by_role("button", name="Options of the method").click()
    tab.fill("ratio", 0.25)
    tab.panel.get_by_label("a new seed each time").check()
    tab.click("Draw")
    tab.wait()
    _, settings = tab.download("token_merging")
    assert settings["methods"]["token_merging"]["ratio"] == 0.25
    assert settings["seed"] == int(tab.field("Seed").input_value()) != 0


def test_a_run_is_cancelled_and_so_is_one_that_waits_or_whose_visitor_left(visit):
    first, second, third = visit("Generate"), visit("Generate"), visit("Generate")
    for tab in (first, second, third):
        tab.page.bring_to_front()
        tab.fill("Size", 128)
        tab.steps(400)
        tab.choose("Method", "none")
        tab.click("Draw")
        tab.wait("plain: step" if tab is first else "Waiting")
    third.page.close()
    second.click("Cancel")
    second.wait("Cancelled.", 5)
    first.page.bring_to_front()
    first.click("Cancel")
    first.wait("Cancelled.", 15)
    first.fill("Steps", 2)
    first.fill("Size", "")
    first.click("Draw")
    first.wait(seconds=20)  # nothing is left that others wait for


def test_an_error_is_one_sentence_about_the_field(visit):
    tab = visit("Generate")
    for size, remedy in (
        ("<b>*1*", "size '<b>*1*'"),
        ("100", "the nearest such size is 96x96"),
        ("512", "limit of 256 pixels"),
        ("wide", "expected"),
    ):
        tab.fill("Size", size)
        tab.click("Draw")
        status = tab.wait(
            "the size 512x512" if size == "512" else f"size {size}x" if size == "100" else f"size {size!r}"
        )
        assert remedy in status and "--size" not in status and "Traceback" not in status
    tab.fill("Size", "")
    tab.fill("What to draw", "")
    tab.click("Draw")
    tab.wait("'What to draw' is empty")


def test_what_is_refused_before_it_begins_is_told_too(visit, tmp_path):
    tab = visit("High resolution")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tab.panel.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    tab.image("A picture to enlarge; without one, it is drawn").wait_for(state="attached")
    tab.click("Draw")
    tab.wait("That was refused")
    tab = visit("Edit")
    tab.fill("Change only where", "circle")
    tab.click("Edit")
    tab.wait("blend 'circle': expected a word of the source and one of the target")


def test_pressed_again_a_run_can_still_be_cancelled(visit):
    tab = visit("Generate")
    tab.fill("Size", 128)
    tab.steps(400)
    tab.click("Draw")
    tab.wait("plain: step")
    tab.click("Draw")
    tab.page.wait_for_timeout(300)
    tab.click("Cancel")
    tab.wait("Cancelled.", 15)
    tab = visit("Generate")
    tab.steps(2)
    tab.click("Draw")
    tab.wait(seconds=20)  # nothing goes on


def test_a_picture_grows_stage_by_stage_and_an_uploaded_one_too(visit, tmp_path):
    tab = visit("High resolution")
    tab.fill("Size", 128)
    tab.steps(4)
    tab.click("Draw")
    tab.wait()
    assert tab.panel.locator(".grid-container img, .thumbnail-item img").count() == 2
    drawn, settings = tab.download("Result")
    assert drawn.size == (128, 128) and settings["ladder"] == "auto"
    Image.new("RGB", (64, 48), "red").save(tmp_path / "mine.png")
    tab.panel.locator("input[type=file]").first.set_input_files(tmp_path / "mine.png")
    tab.image("A picture to enlarge; without one, it is drawn").wait_for()
    tab.fill("Size", "128x96")
    tab.click("Draw")
    tab.wait("stage")
    tab.wait()
    enlarged, settings = tab.download("Result")
    assert enlarged.size == (128, 96) and settings["image"] == "mine.png"


def test_edits_a_drawn_example_and_shows_where(visit):
    tab = visit("Edit")
    tab.panel.get_by_role("button", name="How far").click()
    tab.click("Edit")
    tab.wait("pass")
    tab.wait()
    edited, settings = tab.download("Edited")
    [shape] = read(edited.convert("RGB")).shapes
    assert settings["target"].split()[2] == shape.kind  # "a cyan square on ..."
    mask, _ = tab.download("Where it could change")
    assert ImageChops.difference(mask.convert("RGB"), edited.convert("RGB")).getbbox()
    assert tab.image("Before and after").is_visible()
    assert (settings["image"], settings["cross"], settings["self"]) == ("image.png", 0.8, 0.4)


def test_another_example_fills_what_it_needs(visit):
    tab = visit("Edit")
    before = tab.field("What it is to show").input_value()
    tab.click("Another drawn example")
    tab.page.wait_for_function(
        "old => ![...document.querySelectorAll('textarea,input')].some(x => x.value == old)", arg=before
    )
    tab.choose("Method", "dpl")
    words = tab.field("Words to learn").input_value().split()
    assert words and set(words) <= set(tab.field("What the picture shows").input_value().split())


def test_a_word_is_clicked_and_its_heat_map_seen(visit):
    tab = visit("Attention")
    tab.steps(3)
    tab.click("Draw and look")
    tab.wait()
    _, settings = tab.download("Heat map")
    assert settings["word"] == "large" and settings["step"] == "all"
    seen = [tab.image("Heat map").get_attribute("src")]

    def changes():
        tab.page.wait_for_function(
            "seen => [...document.querySelectorAll('img')].some(x => x.src.includes('step') && !seen.includes(x.src))",
            arg=seen,
        )
        seen.append(tab.image("Heat map").get_attribute("src"))
        return tab.download("Heat map")[1]

    tab.panel.get_by_label("ring", exact=True).check()
    assert changes()["word"] == "ring"
    tab.choose("Level", "2 times")
    assert changes()["level"].startswith("2 times")
    tab.fill("Step", 2)
    tab.page.keyboard.press("Enter")
    assert changes()["step"] == 2


def test_methods_are_measured_and_the_numbers_downloaded(visit):
    tab = visit("Compare")
    for name in ("linfusion", "clear", "agent", "low_memory", "token_merging"):
        tab.panel.get_by_label(name).uncheck()
    tab.fill("Sizes", "64 96")
    for label, number in (("Rounds", 1), ("Pictures", 1), ("Steps", 2)):
        tab.fill(label, number)
    tab.click("Measure")
    status = tab.wait()
    assert "RAU-Net stays off" in status  # at the native size; what methods have to say is told
    assert tab.panel.locator("table tr").count() == 5
    plot, _ = tab.download("Plot")
    assert plot.width > 1000
    with tab.page.expect_download() as download:
        tab.panel.get_by_text("Numbers as JSON").click()
    assert len(json.loads(download.value.path().read_text())["rows"]) == 4


def test_fits_a_narrow_screen(visit):
    for name, button in (("Generate", "Draw"), ("Edit", "Edit"), ("Attention", "Draw and look")):
        tab = visit(name)
        tab.page.set_viewport_size({"width": 390, "height": 844})
        tab.page.wait_for_timeout(300)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        box = tab.panel.get_by_role("button", name=button, exact=True).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
