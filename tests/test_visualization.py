"""What the pictures show: visible pixels as they were, targets un-normalised, curves that are not cut."""

import matplotlib.image
import pytest
import torch

from green_swin_hf.modeling_green_swin import patchify, unit_statistics, unpatchify
from green_swin_hf.visualization import (
    accuracy_figure,
    loss_figure,
    masked_images,
    paste_reconstruction,
    reconstruction_figure,
    save_figure,
    to_display,
)

UNIT, GRID = 4, (2, 3)


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def images(request):
    return torch.randn(2, request.param, GRID[0] * UNIT, GRID[1] * UNIT)


@pytest.fixture
def masks():
    return torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()


def pixel_is_masked(masks):
    """`[B, 1, H, W]`, in the plainest way."""
    pixels = torch.zeros(len(masks), 1, GRID[0] * UNIT, GRID[1] * UNIT, dtype=torch.bool)
    for image, unit in masks.nonzero().tolist():
        row, column = divmod(unit, GRID[1])
        pixels[image, 0, row * UNIT : (row + 1) * UNIT, column * UNIT : (column + 1) * UNIT] = True
    return pixels


def test_masked_units_are_painted_over_and_visible_pixels_stay(images, masks):
    shown = masked_images(images, masks, UNIT, fill=9.0)
    masked = pixel_is_masked(masks).expand_as(images)
    assert (shown[masked] == 9.0).all()
    assert torch.equal(shown[~masked], images[~masked])


def test_visible_pixels_are_pasted_and_perfect_predictions_give_the_image_back(images, masks):
    units = patchify(images, UNIT)
    mean, std = unit_statistics(units)
    perfect = unpatchify((units - mean) / std, GRID, UNIT)
    pasted = paste_reconstruction(images, perfect, masks, UNIT, norm_pix_loss=True)
    torch.testing.assert_close(pasted, images, atol=1e-5, rtol=0)
    visible = ~pixel_is_masked(masks).expand_as(images)
    wrong = paste_reconstruction(images, perfect + 1, masks, UNIT, norm_pix_loss=True)
    assert torch.equal(wrong[visible], images[visible])
    assert (wrong[~visible] != images[~visible]).all()
    plain = paste_reconstruction(images, images + 1, masks, UNIT, norm_pix_loss=False)
    assert torch.equal(plain[~visible], images[~visible] + 1)


def test_display_undoes_the_normalisation_of_each_channel_and_clips():
    pixels = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    normalised = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(to_display(normalised, mean, std), pixels)
    assert to_display(normalised + 100, mean, std).max() == 1


def test_the_panel_shows_the_pixels_in_their_places(masks, tmp_path):
    """Three flat images of known brightness, found again in the file left to right."""
    flat = [torch.full((1, 1, 8, 12), value) for value in (0.2, 0.5, 0.8)]
    save_figure(reconstruction_figure(*flat), tmp_path / "panel.png", dpi=100)
    picture = matplotlib.image.imread(tmp_path / "panel.png")
    height, width = picture.shape[:2]
    row = picture[height * 2 // 3, :, 0]
    shown = [row[int(width * place)] for place in (0.18, 0.5, 0.82)]
    assert shown == pytest.approx([0.2, 0.5, 0.8], abs=0.01)
    assert (picture[:3] == 1).all()  # white margin
    assert [path.name for path in tmp_path.iterdir()] == ["panel.png"]


def test_the_curve_holds_all_points_and_names_the_reference():
    log = [{"step": s, "epoch": s / 4, "loss": 1 / s, "learning_rate": 1e-3 * s} for s in range(1, 41)]
    log.insert(3, {"step": 4, "epoch": 1.0, "validation_loss": 0.5})
    figure = loss_figure([*log, {"epoch": 11, "loss": None, "learning_rate": 0}], mean_prediction_loss=0.9,
                         validation=[(1.0, 0.5)])  # fmt: skip
    upper, lower = figure.axes
    logged, smoothed, held_out, reference = upper.lines
    assert list(logged.get_ydata()) == [1 / s for s in range(1, 41)]
    assert len(smoothed.get_ydata()) == 40
    assert list(held_out.get_ydata()) == [0.5]
    assert set(reference.get_ydata()) == {0.9}
    assert "0.900" in reference.get_label()
    low, high = upper.get_ylim()
    assert low < 1 / 40
    assert high > 0.9
    assert list(lower.lines[0].get_ydata()) == pytest.approx([1e-3 * s for s in range(1, 41)])


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_curve_of_hardly_any_points_is_drawn(length, tmp_path):
    log = [{"epoch": float(s), "loss": 1.0, "learning_rate": 0.1} for s in range(length)]
    save_figure(loss_figure(log), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_probes_have_a_panel_of_their_own_with_their_errors():
    log = [{"epoch": float(s), "loss": 1.0, "learning_rate": 0.1} for s in range(10)]
    upper, middle, lower = loss_figure(log, probes=[(0.0, 0.5, 0.1), (9.0, 0.75, 0.05)]).axes
    assert list(middle.lines[0].get_ydata()) == [0.5, 0.75]
    ends = [segment[:, 1].tolist() for segment in middle.collections[0].get_segments()]
    assert ends == [pytest.approx([0.4, 0.6]), pytest.approx([0.7, 0.8])]
    assert "k-NN" in middle.get_title(loc="left")
    assert lower.get_xlabel() == "epoch"
    assert upper.get_ylabel() == "loss"


@pytest.mark.parametrize("names", [["one"], ["raw pixels", "random\nlast stage", "a/model\nlast stage"]])
def test_bars_have_their_lengths_errors_and_names(names, tmp_path):
    values = [(0.25 * (index + 1), 0.05) for index in range(len(names))]
    figure = accuracy_figure(names, {"k-NN": values, "linear": [(0.5, 0.0)] * len(names)}, chance=0.1, title="title")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches[: len(names)]] == [value for value, _ in values]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    heights = [bar.get_y() for bar in axes.patches]
    assert len(set(heights)) == 2 * len(names)  # none hides another
    assert axes.yaxis_inverted()  # the first on top
    save_figure(figure, tmp_path / "bars.png")
    assert matplotlib.image.imread(tmp_path / "bars.png").shape[1] > 500
