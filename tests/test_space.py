"""The demo of a Space: its functions, and the page in a headless Chromium as a visitor uses it."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import randomised, tiny_config
from transformers import SwinConfig, SwinModel

from green_swin_hf import GreenSwinForImageClassification, GreenSwinForMaskedImageModeling
from green_swin_hf.image_processing_green_swin import GreenSwinImageProcessor

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parents[1]
SPACE, PHOTOS = ROOT / "hub_cards" / "space", ROOT / "examples" / "data" / "photos"
CAT, CUP = str(PHOTOS / "chelsea.png"), str(PHOTOS / "coffee.png")


def load_demonstration():
    spec = importlib.util.spec_from_file_location("demonstration", SPACE / "demonstration.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demonstration"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demonstration = load_demonstration()


def save_pretrained_model(
    folder, channels=3, with_processor=True, model_class=GreenSwinForMaskedImageModeling, **changes
):
    randomised(model_class(tiny_config(num_channels=channels, **changes))).save_pretrained(folder)
    if with_processor:
        size = {"height": 32, "width": 32}
        mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.3, 0.4][:channels]
        GreenSwinImageProcessor(size=size, image_mean=mean, image_std=std).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory):
    return save_pretrained_model(tmp_path_factory.mktemp("colour"), norm_pix_loss=False)


@pytest.fixture(scope="session")
def grey_model(tmp_path_factory):
    return save_pretrained_model(tmp_path_factory.mktemp("grey"), channels=1)


def demonstrate(picture=CAT, model="", ratio=0.5, seed=0, stage=1, shifted=False):
    return demonstration.demonstrate(picture, model, ratio, seed, stage, shifted)


def units_of(picture, unit):
    rows, columns = picture.shape[0] // unit, picture.shape[1] // unit
    return [picture[r * unit : (r + 1) * unit, c * unit : (c + 1) * unit] for r in range(rows) for c in range(columns)]


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_masked_units_are_hidden_and_reconstructed_and_the_visible_ones_stay(kind, grey_model, colour_model):
    shown = demonstrate(model=grey_model if kind == "grey" else colour_model)
    assert shown.original.shape == (256, 256) if kind == "grey" else (256, 256, 3)
    assert shown.original.dtype == np.uint8
    unit = 256 // 4  # 4x4 mask units, each pixel of the model's 32 shown as 8x8
    triples = list(zip(*(units_of(p, unit) for p in (shown.original, shown.masked, shown.reconstruction)), strict=True))
    hidden = [not np.array_equal(original, masked) for original, masked, _ in triples]
    assert sum(hidden) == 8
    for is_hidden, (original, masked, reconstruction) in zip(hidden, triples, strict=True):
        if is_hidden:
            assert (masked == masked.flat[0]).all()
            assert not np.array_equal(original, reconstruction)
        else:
            assert np.abs(original.astype(int) - reconstruction).max() <= 1  # there and back through normalisation


def test_what_a_reconstruction_takes_from_the_true_pixels_is_said(grey_model, colour_model):
    assert "were taken from the true pixels" in demonstrate(model=grey_model).text
    assert "predictions as they are" in demonstrate(model=colour_model).text


def test_the_mask_follows_seed_and_ratio(colour_model):
    first, again, other = (demonstrate(model=colour_model, seed=seed).masked for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    grey = [int((demonstrate(model=colour_model, ratio=ratio).masked == 191).all(-1).sum()) for ratio in (0.25, 0.75)]
    assert grey[1] == 3 * grey[0] > 0


def test_without_a_model_windows_are_drawn_and_no_reconstruction_is_made_up():
    shown = demonstrate(stage=2, shifted=True)
    assert shown.reconstruction is None
    assert "MODEL_ID" in shown.text
    assert shown.masked.shape == (224, 224, 3)
    assert (shown.stage, shown.num_stages) == (2, 4)
    assert matplotlib.image.imread(io.BytesIO(shown.drawing), format="png").shape[1] > 900
    assert shown.drawing != demonstrate(stage=2).drawing


def test_a_model_with_fewer_stages_gets_its_last_one_which_has_no_shift(colour_model):
    shown = demonstrate(model=colour_model, stage=4, shifted=True)
    assert (shown.stage, shown.num_stages) == (3, 3)
    assert "Stage 3 has no shifted windows" in shown.text


def small_picture(folder):
    Image.new("RGB", (40, 12)).save(folder / "small.png")
    return folder / "small.png"


def damaged_picture(folder):
    (folder / "damaged.jpg").write_bytes((PHOTOS / "rocket.jpg").read_bytes()[:2000])
    return folder / "damaged.jpg"


def no_picture_at_all(folder):
    (folder / "text.png").write_text("no picture")
    return folder / "text.png"


def stock_swin(folder):
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    SwinModel(config).save_pretrained(folder)
    return folder


def classifier(folder):
    return save_pretrained_model(folder, model_class=GreenSwinForImageClassification)


def cut_off(folder):
    save_pretrained_model(folder)
    os.truncate(folder / "model.safetensors", 5000)
    return folder


WRONG = {
    "no picture": (lambda folder: {"picture": None}, "No picture: upload one"),
    "a small picture": (lambda folder: {"picture": str(small_picture(folder))}, "40x12 px; give one of at least 16x16"),
    "a damaged picture": (lambda folder: {"picture": str(damaged_picture(folder))}, "cannot be read .*upload another"),
    "a text": (lambda folder: {"picture": str(no_picture_at_all(folder))}, r"cannot be read \(cannot identify"),
    "ratio 0": (lambda folder: {"ratio": 0}, "masked share 0 must be greater than 0"),
    "ratio 1": (lambda folder: {"ratio": 1.0}, "masked share 1.0 must be .*less than 1"),
    "ratio NaN": (lambda folder: {"ratio": float("nan")}, "masked share nan"),
    "no ratio": (lambda folder: {"ratio": None}, "masked share None"),
    "no seed": (lambda folder: {"seed": None}, "seed None must be a whole number"),
    "a negative seed": (lambda folder: {"seed": -1}, "seed -1 must be"),
    "half a seed": (lambda folder: {"seed": 0.5}, "seed 0.5 must be"),
    "an endless seed": (lambda folder: {"seed": float("inf")}, "seed inf must be"),
    "stage 0": (lambda folder: {"stage": 0}, "stage 0 must be 1 to 4"),
    "no such folder": (
        lambda folder: {"model": str(folder / "none")},
        "neither a folder with a model nor one on the Hub",
    ),
    "stock Swin": (lambda folder: {"model": str(stock_swin(folder))}, "is of type swin; give a GreenSwin"),
    "a classifier": (
        lambda folder: {"model": classifier(folder)},
        r"no pretraining decoder \(saved as GreenSwinForImageClassification\)",
    ),
    "no processor": (lambda folder: {"model": save_pretrained_model(folder, with_processor=False)}, "cannot be loaded"),
    "weights cut off": (lambda folder: {"model": str(cut_off(folder))}, "cannot be loaded"),
    "four channels": (lambda folder: {"model": save_pretrained_model(folder, channels=4)}, "4 channels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_that_names_it(case, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        demonstrate(**make(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_card_and_the_requirements_agree_with_the_package():
    card = yaml.safe_load(re.match(r"---\n(.*?)---\n", (SPACE / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1])
    assert (card["sdk"], card["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60  # the Hub's limit
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"gradio>={card["sdk_version"].rpartition(".")[0]}"' in project
    lines = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        assert f'"{line}"' in project, line


# In a browser


def find_chromium():
    """A Chromium of the system, or the one that playwright installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            found = playwright.chromium.executable_path
    return found if Path(found).exists() else None


@pytest.fixture(scope="module")
def chromium():
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed; pip install -e ".[browser]"')
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium found; install one, or: playwright install chromium")
    return path


@pytest.fixture(scope="module")
def space(chromium, grey_model, tmp_path_factory):
    """Address of the demo with the model of its environment."""
    with running_space(tmp_path_factory.mktemp("space"), {"MODEL_ID": grey_model}) as address:
        yield address


@pytest.fixture(scope="module")
def open_space(chromium, tmp_path_factory):
    """Address of the demo where visitors name the model."""
    with running_space(tmp_path_factory.mktemp("open_space"), {}) as address:
        yield address


@contextlib.contextmanager
def running_space(tmp_path, variables):
    """The demo run as a Space runs it: package and photographs beside app.py, in a process of its own."""
    folder = tmp_path / "demo"
    shutil.copytree(SPACE, folder)
    shutil.copytree(PHOTOS, folder / "photos")
    shutil.copytree(ROOT / "green_swin_hf", folder / "green_swin_hf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MODEL_ID")},
        **variables,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = (tmp_path / "app.log").open("w+")
    process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield wait_for(f"http://127.0.0.1:{port}", process, log)
        log.seek(0)
        assert "Traceback" not in log.read()
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


def wait_for(address, process, log, seconds=400):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=60):
            return address
        time.sleep(0.5)
    log.seek(0)
    raise AssertionError(f"the demo did not start: {log.read()}")


class Visitor:
    """The page, and what a visitor does and sees there."""

    def __init__(self, page, address):
        self.page = page
        self.errors = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.set_default_timeout(120_000)
        page.goto(address)
        self.page.locator("#message", has_text=re.compile("How to read|No reconstruction")).wait_for()

    def message(self, text):
        """Wait until the message holds this text."""
        self.page.locator("#message", has_text=text).wait_for()

    def drawing(self):
        return self.page.locator("#drawing img").get_attribute("src")

    def changed(self, before):
        """Wait for another drawing."""
        self.page.wait_for_function(
            "before => { const i = document.querySelector('#drawing img'); return i && i.src && i.src !== before }",
            arg=before,
        )
        return self.drawing()

    def pictures(self):
        return self.page.locator(".result img").count()

    def remove_picture(self):
        self.page.get_by_role("button", name="Remove Image").first.click()
        self.message("No picture")

    def choose_picture(self, path):
        self.page.locator("input[type=file]").first.set_input_files(str(path))

    def set_model(self, name):
        box = self.page.get_by_label("Model")
        box.fill(name)
        box.press("Enter")


@pytest.fixture
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.browser
def test_a_visitor_sees_masked_picture_reconstruction_and_groups(space, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    visitor = Visitor(page, space)
    first = visitor.drawing()
    assert visitor.pictures() == 3

    visitor.choose_picture(CUP)
    drawing = visitor.changed(first)
    page.get_by_role("slider").first.focus()
    page.keyboard.press("Home")  # the least share
    drawing = visitor.changed(drawing)
    page.get_by_label("Seed of the mask").fill("7")
    drawing = visitor.changed(drawing)
    assert page.get_by_role("radio").count() == 3
    page.get_by_role("radio", name="1").check()
    drawing = visitor.changed(drawing)
    page.get_by_label("Shifted windows").check()
    page.get_by_role("radio", name="2").check()  # while the first change is still being computed
    visitor.changed(drawing)
    assert visitor.pictures() == 3
    assert visitor.errors == []


@pytest.mark.browser
def test_a_visitor_cannot_name_another_model_than_that_of_the_space(space, browser):
    """Neither on the page nor as a program: what is sent in the place of the model counts for nothing."""
    visitor = Visitor(browser.new_page(), space)
    assert visitor.page.get_by_label("Model").count() == 0
    with urllib.request.urlopen(f"{space}/gradio_api/info", timeout=30) as answer:
        names = [entry["parameter_name"] for entry in json.load(answer)["named_endpoints"]["/show"]["parameters"]]
    assert "picture" in names
    assert "model" not in names
    sent = {"data": [None, "no/such-model", 0.5, 0, 1, False], "session_hash": "somebody"}
    request = urllib.request.Request(
        f"{space}/gradio_api/run/show", json.dumps(sent).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = answer.read()
    assert b"No picture" in said  # which comes after loading the model
    assert b"no/such-model" not in said


@pytest.mark.browser
def test_a_visitor_of_a_space_without_a_model_names_one(open_space, browser, colour_model):
    visitor = Visitor(browser.new_page(), open_space)
    visitor.message("No reconstruction: no model is given")
    assert visitor.pictures() == 2
    assert visitor.page.get_by_role("radio").count() == 4  # those of Swin-T
    assert visitor.page.get_by_role("radio", name="2").is_checked()
    visitor.set_model(colour_model)
    visitor.message("How to read")
    assert visitor.pictures() == 3
    assert visitor.page.get_by_role("radio").count() == 3
    assert visitor.errors == []


@pytest.mark.browser
def test_a_visitor_is_told_in_one_line_what_is_wrong(open_space, browser, tmp_path):
    visitor = Visitor(browser.new_page(), open_space)
    visitor.set_model("no/such-model")
    visitor.message("neither a folder with a model nor one on the Hub")
    assert visitor.pictures() == 0
    assert visitor.page.locator("#drawing img").count() == 0
    visitor.set_model("")
    visitor.message("No reconstruction")
    visitor.remove_picture()
    for make, message in ((small_picture, "40x12 px"), (no_picture_at_all, "cannot be read")):
        visitor.choose_picture(make(tmp_path))
        visitor.message(message)
    visitor.choose_picture(CAT)
    visitor.message("No reconstruction")
    visitor.page.get_by_label("Seed of the mask").fill("")
    visitor.message("seed None must be a whole number")
    visitor.page.get_by_label("Seed of the mask").fill("3")
    visitor.message("No reconstruction")
    visitor.page.locator("input[type=number]").first.fill("5")
    visitor.message("masked share 5 must be")
    assert "Traceback" not in visitor.page.content()


@pytest.mark.browser
def test_a_phone_shows_the_page_without_scrolling_sideways_but_the_drawing(space, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    visitor = Visitor(page, space)
    visitor.page.wait_for_selector("#drawing img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = page.locator("#drawing img").bounding_box()
    assert shown["width"] >= 650  # its numbers stay legible
