"""A demo for a Hugging Face Space: what masked pretraining hides, what the model makes of it, and what grouping does.

MODEL_ID=path/to/pretrained python hub_cards/space/app.py
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import gradio as gr
from demonstration import demonstrate

HERE = Path(__file__).resolve().parent
TITLE = "GreenSwin: masked pretraining on visible patches only"
INTRODUCTION = f"""# {TITLE}
A Swin Transformer is shown a part of a picture and predicts the rest. Only the visible patches are computed: the
windows that they fall in, more or less full, are packed into **groups** of equal size, and attention stays inside
each window."""
ABOUT_GROUPS = """Each window carries the number and colour of its group. A bar is what attention computes at once; a
segment is one window with its number of visible tokens, hatching is padding. The cost is that of attention with its
projections, as the paper counts it."""
MOST_STAGES = 4
THEME = gr.themes.Default(primary_hue="green", font=["system-ui", "sans-serif"])
# On a phone the wide drawing is scrolled sideways instead of being shrunk until its numbers cannot be read.
CSS = """
.drawing { overflow-x: auto; background: white; border-radius: 8px; padding: 6px; }
.drawing img { display: block; width: 100%; min-width: 660px; }
.caption p { font-size: min(13px, 2.8vw); margin-bottom: -10px; }
#message p { margin: 0.2em 0; }
#message.problem { border-left: 4px solid #D55E00; padding-left: 0.8em; }
#message.problem p { font-weight: 600; }
"""


def example_photos() -> list[str]:
    """Photographs beside this file on a Space, or those of the repository."""
    in_repository = HERE.parents[1] / "examples" / "data" / "photos" if len(HERE.parents) > 1 else HERE
    folder = HERE / "photos" if (HERE / "photos").is_dir() else in_repository
    return sorted(str(path) for path in folder.glob("*.*") if path.suffix in (".jpg", ".png"))


def show(
    picture: str | None, model: str, ratio: float | None, seed: float | None, stage: int, shifted: bool
) -> list[Any]:
    """The outputs of the interface: pictures, the choice of stages, the drawing, the message."""
    try:
        shown = demonstrate(picture, model or "", ratio, seed, stage, shifted)
    except ValueError as error:
        message = gr.Markdown(str(error), elem_classes=["problem"])
        return [None, None, None, gr.skip(), "", message]
    # The value is sent only where it must change: another one may have been chosen meanwhile.
    value = {} if shown.stage == stage else {"value": shown.stage}
    stages = gr.Radio(choices=list(range(1, shown.num_stages + 1)), **value)
    message = gr.Markdown(shown.text, elem_classes=[])
    return [shown.masked, shown.reconstruction, shown.original, stages, as_html(shown.drawing), message]


def as_html(drawing: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(drawing).decode()}"
    return f'<div class="drawing"><img alt="Windows and groups" src="{source}"></div>'


def picture_input(value: str | None) -> gr.Image:
    """An image to upload that hands on its path, so that a file that is no image gets a message of ours."""
    picture = gr.Image(value=value, label="Picture", sources=["upload", "clipboard"], height=230)
    picture.preprocess = lambda upload: upload.path if upload else None
    return picture


def share_input() -> gr.Slider:
    """The share that is masked. What is typed beside the slider is handed on as it is, again for a message of ours."""
    share = gr.Slider(0.05, 0.95, value=0.75, step=0.05, label="Share that is masked")
    share.preprocess = lambda value: value
    return share


def model_input() -> gr.State | gr.Textbox:
    """The model that `MODEL_ID` names, which no visitor can change, or without it a field to name one."""
    given = os.environ.get("MODEL_ID", "").strip()
    if given:
        return gr.State(given)  # kept by the server: what a page or a program sends in its place counts for nothing
    return gr.Textbox(
        label="Model", placeholder="Hub id or folder", info="a pretrained GreenSwin; press Enter to load it"
    )


def output_picture(caption: str) -> gr.Image:
    return gr.Image(
        label=caption, show_label=False, format="png", buttons=[], interactive=False, elem_classes=["result"]
    )


def build_interface() -> gr.Blocks:
    """The page, in its order from top to bottom."""
    photos = example_photos()
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                picture = picture_input(photos[0] if photos else None)
                if photos:
                    gr.Examples(photos, picture, label="Examples")
                ratio = share_input()
                seed = gr.Number(0, label="Seed of the mask")
                model = model_input()
            with gr.Column(scale=3, min_width=320):
                message = gr.Markdown(elem_id="message")
                pictures = []
                with gr.Row():
                    for caption in ("Masked", "Reconstruction", "Original"):
                        with gr.Column(min_width=90):
                            gr.Markdown(f"**{caption}**", elem_classes=["caption"])
                            pictures.append(output_picture(caption))
                with gr.Row():
                    stage = gr.Radio(list(range(1, MOST_STAGES + 1)), value=2, label="Windows and groups of stage")
                    shifted = gr.Checkbox(label="Shifted windows", info="those of every second block")
                drawing = gr.HTML(elem_id="drawing", padding=False)
                gr.Markdown(ABOUT_GROUPS)
        named = [model.submit] if isinstance(model, gr.Textbox) else []
        gr.on(
            [page.load, picture.change, ratio.change, seed.change, *named, stage.input, shifted.input],
            show,
            [picture, model, ratio, seed, stage, shifted],
            [*pictures, stage, drawing, message],
            show_progress="minimal",
            show_progress_on=pictures[1],
            trigger_mode="always_last",
            api_name="show",
        )
    return page


if __name__ == "__main__":
    build_interface().launch(css=CSS, theme=THEME, ssr_mode=False, run_history=False)
