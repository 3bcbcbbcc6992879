"""The picture of the groups says what the plan says: windows, groups, padding, cost, and where the borders are."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from tiny import images, seeded, tiny_config

from green_swin_hf import GreenSwinConfig, SparseGeometry, build_sparse_plan, sample_masks
from green_swin_hf.data import EvaluationTransform
from green_swin_hf.grouping_figure import read_groups
from green_swin_hf.image_decoding import decode_image
from green_swin_hf.visualization import grouping_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
# Seven rows and five columns of mask units of 8 px: windows of 3, 4 or 5 tokens cut units apart.
SIZE = (56, 40)


def make_plan(ratio=0.6, seed=0, **changes):
    geometry = SparseGeometry.from_config(tiny_config(image_size=SIZE, **changes))
    mask = sample_masks(1, geometry.unit_grid_size, ratio, seeded(seed))
    return build_sparse_plan(mask, geometry), mask


def visible_tokens(plan, mask, stage):
    """(row, column) of the visible tokens, in the plainest way."""
    grid, side = (
        plan.stages[stage - 1].grid_size,
        plan.stages[stage - 1].grid_size[0] // plan.geometry.unit_grid_size[0],
    )
    across = plan.geometry.unit_grid_size[1]
    cells = ((row, column) for row in range(grid[0]) for column in range(grid[1]))
    return {(row, column) for row, column in cells if not mask[0, row // side * across + column // side]}


def borders(axes):
    """Places of the horizontal and of the vertical lines."""
    segments = [segment for lines in axes.collections for segment in lines.get_segments()]
    rows = {segment[0, 1] for segment in segments if segment[0, 1] == segment[1, 1]}
    columns = {segment[0, 0] for segment in segments if segment[0, 0] == segment[1, 0]}
    return sorted(rows), sorted(columns)


CASES = pytest.mark.parametrize(
    ("stage", "shifted", "window", "group_size"),
    [
        (1, False, 4, "window"),
        (1, True, 5, "window"),
        (1, True, 3, "optimal"),
        (2, True, 3, 20),
        (2, False, 5, "window"),
        (3, False, 4, "window"),
    ],
)


@CASES
def test_groups_are_read_from_the_plan(stage, shifted, window, group_size):
    plan, mask = make_plan(window_size=window, group_size=group_size)
    groups = read_groups(plan, stage, shifted)
    grouping = plan.stages[stage - 1].shifted if shifted else plan.stages[stage - 1].regular
    tokens = list(zip(groups.rows.tolist(), groups.columns.tolist(), strict=True))
    assert set(tokens) == visible_tokens(plan, mask, stage)
    assert len(tokens) == len(set(tokens))
    assert (groups.num_groups, groups.group_size) == (grouping.num_groups, grouping.group_size)
    assert sum(sum(windows.values()) for windows in groups.group_windows) == len(tokens)
    assert max(sum(windows.values()) for windows in groups.group_windows) <= groups.group_size
    in_groups = [window for windows in groups.group_windows for window in windows]
    assert len(in_groups) == len(set(in_groups)) == groups.num_windows  # no window is split
    padded, grouped = groups.padding_shares
    assert padded == pytest.approx(1 - len(tokens) / (groups.num_windows * window**2))
    assert grouped == pytest.approx(float((grouping.slot_window < 0).float().mean()))


@CASES
def test_what_is_drawn_is_the_plan(stage, shifted, window, group_size):
    plan, _ = make_plan(window_size=window, group_size=group_size)
    groups = read_groups(plan, stage, shifted)
    figure = grouping_figure(images(1, rows=SIZE[0], columns=SIZE[1])[0], plan, stage=stage, shifted=shifted)

    # Tokens of one window, and no others, lie between the same borders.
    rows, columns = borders(figure.axes[0])
    cells = [
        (sum(line <= row for line in rows), sum(line <= column for line in columns))
        for row, column in zip(groups.rows.tolist(), groups.columns.tolist(), strict=True)
    ]
    assert len(set(zip(cells, groups.window.tolist(), strict=True))) == len(set(cells)) == groups.num_windows

    # Bars hold all tokens, a segment for each window, and the rest of their slots is hatched.
    bars = ((groups.num_windows, window**2), (groups.num_groups, groups.group_size))
    for axes, (count, slots) in zip(figure.axes[1:], bars, strict=True):
        filled = [patch for patch in axes.patches if patch.get_hatch() is None]
        free = [patch for patch in axes.patches if patch.get_hatch() is not None]
        assert sum(patch.get_width() for patch in filled) == len(groups.window)
        assert len(filled) == groups.num_windows
        assert [patch.get_x() + patch.get_width() for patch in free] == [slots] * count
        assert sum(patch.get_width() for patch in axes.patches) == count * slots

    written = " ".join(text.get_text() for text in figure.texts)
    assert f"Stage {stage}: windows of {window}×{window} tokens" in written
    assert ("shifted" in written) == (shifted and groups.shift > 0)
    assert f"{groups.num_groups} × {groups.group_size}" in written


def test_cost_is_that_of_the_paper_by_windows_padded_one_by_one():
    """Stage 1: 16x16 tokens, windows of 4 and mask units of 4 tokens, so that a window is full or empty."""
    geometry = SparseGeometry.from_config(tiny_config())
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, :3] = False
    groups = read_groups(build_sparse_plan(mask, geometry), 1)
    assert (groups.num_groups, groups.num_windows, groups.relative_cost) == (3, 3, 1.0)
    shifted = read_groups(build_sparse_plan(mask, geometry), 1, shifted=True)
    # Windows begin at row and column 2: the strip of 4 x 12 tokens falls into 2 x 4 windows of 4 or 8 tokens.
    assert sorted(n for windows in shifted.group_windows for n in windows.values()) == [4, 4, 4, 4, 8, 8, 8, 8]
    channels, slots = 8, 16
    one_of_sixteen = 4 * slots * channels**2 + 2 * slots**2 * channels
    assert (shifted.num_groups, shifted.group_size) == (3, 16)
    assert shifted.relative_cost == pytest.approx(3 * one_of_sixteen / (8 * one_of_sixteen))


def test_masked_units_are_grey_and_visible_tokens_have_the_colour_of_their_group(tmp_path):
    plan, mask = make_plan(window_size=5, seed=3)
    groups = read_groups(plan, 2)
    figure = grouping_figure(torch.ones(3, *SIZE), plan, stage=2)
    figure.set_dpi(100)
    save_figure(figure, tmp_path / "groups.png", dpi=100)
    picture = matplotlib.image.imread(tmp_path / "groups.png")
    box = figure.axes[0].get_window_extent()
    rows, columns = groups.stage.grid_size

    def shown(row, column):
        """A place off the middle of a token, where neither border nor number is."""
        x = box.x0 + (column + 0.3) / columns * box.width
        y = box.y1 - (row + 0.3) / rows * box.height
        return picture[round(len(picture) - y), round(x), :3]

    numbered = {(int(text.get_position()[1]), int(text.get_position()[0])) for text in figure.axes[0].texts}
    near = {(row + down, column + right) for row, column in numbered for down in (-1, 0, 1) for right in (-1, 0, 1)}
    visible = visible_tokens(plan, mask, 2)
    masked = {(row, column) for row in range(rows) for column in range(columns)} - visible - near
    assert all(np.ptp(shown(*token)) < 0.01 for token in masked)
    colors = {}
    for row, column, group in zip(groups.rows.tolist(), groups.columns.tolist(), groups.group.tolist(), strict=True):
        if (row, column) not in near:
            colors.setdefault(group, []).append(shown(row, column))
    assert all(np.ptp(np.array(seen), axis=0).max() < 0.01 and np.ptp(seen[0]) > 0.1 for seen in colors.values())
    assert len({tuple(np.round(seen[0], 2)) for seen in colors.values()}) == len(colors) == groups.num_groups > 1


@pytest.mark.parametrize(("channels", "size", "stage"), [(1, 448, 1), (2, 224, 4), (4, 224, 4)])
def test_any_number_of_channels_and_of_groups_is_drawn(channels, size, stage, tmp_path):
    geometry = SparseGeometry.from_config(GreenSwinConfig(image_size=size))
    plan = build_sparse_plan(sample_masks(1, geometry.unit_grid_size, 0.75, seeded()), geometry)
    groups = read_groups(plan, stage)
    assert groups.num_groups > 40 if stage == 1 else groups.num_groups == 1
    figure = grouping_figure(torch.rand(channels, size, size), plan, stage=stage, shifted=True)
    save_figure(figure, tmp_path / "groups.png", dpi=50)
    assert matplotlib.image.imread(tmp_path / "groups.png").ndim == 3


def test_the_picture_of_the_repository_is_current(tmp_path):
    transform = EvaluationTransform(224, mean=(0, 0, 0), std=(1, 1, 1), crop_fraction=1.0)
    photo = transform(decode_image({"path": str(ROOT / "examples/data/photos/coffee.png")}, "RGB"))
    geometry = SparseGeometry.from_config(GreenSwinConfig.from_variant("base"))
    mask = sample_masks(1, geometry.unit_grid_size, mask_ratio=0.75, generator=torch.Generator().manual_seed(8))
    save_figure(grouping_figure(photo, build_sparse_plan(mask, geometry), stage=2), tmp_path / "grouping.png")
    drawn, kept = (
        matplotlib.image.imread(path) for path in (tmp_path / "grouping.png", ROOT / "examples/pictures/grouping.png")
    )
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 0.02  # other versions of matplotlib draw edges a little differently


def test_a_plan_of_several_images_is_refused():
    geometry = SparseGeometry.from_config(tiny_config())
    plan = build_sparse_plan(sample_masks(2, geometry.unit_grid_size, 0.5, seeded()), geometry)
    with pytest.raises(ValueError, match=r"masks of 2 images.*masks\[:1\]"):
        grouping_figure(torch.rand(3, 32, 32), plan)


@pytest.mark.parametrize("stage", [0, 4, -1])
def test_a_stage_that_the_plan_lacks_is_refused(stage):
    plan, _ = make_plan()
    with pytest.raises(ValueError, match=f"stage {stage} must be 1 to 3"):
        grouping_figure(torch.rand(3, *SIZE), plan, stage=stage)


@pytest.mark.parametrize("shape", [(3, 40, 56), (56, 40), (1, 3, 56, 40), (3, 56, 41), (3, 3, 3)])
def test_an_image_that_does_not_fit_the_plan_is_refused(shape):
    plan, _ = make_plan()
    with pytest.raises(ValueError, match="7x5 square mask units"):
        grouping_figure(torch.rand(shape), plan)
