"""Plans and masks: every token where it belongs, nothing forbidden allowed, nothing allowed forbidden."""

import dataclasses
import itertools
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import windows_of_grid
from tiny import seeded, tiny_config
from torch import Tensor

from green_swin_hf import GreenSwinConfig, SparseGeometry, SparsePlan, build_sparse_plan, sample_masks
from green_swin_hf.sparse_plan import GroupingPlan, StageGeometry, num_masked_units, unit_masks, unit_patch_offsets

quick = settings(max_examples=60, deadline=None)


@st.composite
def geometries(draw: st.DrawFn) -> SparseGeometry:
    """Up to three stages, windows odd and even, images of the config's own size or of another, squares or not."""
    num_stages, window = draw(st.sampled_from([3, 2, 1])), draw(st.sampled_from([3, 2, 5, 4, 1, 7, 6, 9]))
    own_units, units = (draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in range(2))
    if draw(st.sampled_from([True, True, False])):
        units = own_units
    unit = 2 * 2 ** (num_stages - 1)
    config = GreenSwinConfig(
        image_size=[side * unit for side in own_units],
        patch_size=2,
        embed_dim=4,
        depths=[1] * num_stages,
        num_heads=[1] * num_stages,
        window_size=window,
        group_size=draw(st.sampled_from(["window", "optimal", window**2, window**2 + 7, 200])),
    )
    return SparseGeometry.from_config(config, (units[0] * unit, units[1] * unit))


@st.composite
def mask_batches(draw: st.DrawFn, geometry: SparseGeometry) -> Tensor:
    """[1 to 3, units] bool, any pattern that leaves a unit visible in each row."""
    units = geometry.num_units
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.lists(st.booleans(), min_size=units, max_size=units))
        row[draw(st.integers(0, units - 1))] = False
        rows.append(row)
    return torch.tensor(rows)


@st.composite
def batches(draw: st.DrawFn) -> tuple[SparseGeometry, Tensor]:
    geometry = draw(geometries())
    return geometry, draw(mask_batches(geometry))


def mask_rows(masks: Tensor) -> list[list[bool]]:
    """One row where all are the same."""
    rows = masks.tolist()
    return rows[:1] if all(row == rows[0] for row in rows) else rows


def expected_tokens(geometry: SparseGeometry, masks: Tensor, stage: int) -> list[tuple[int, int, int]]:
    """(image, row, column) of each visible token of the pool, in order."""
    side = 2 ** (len(geometry.stages) - 1 - stage)
    columns = geometry.unit_grid_size[1]
    return [
        (image, unit // columns * side + row, unit % columns * side + column)
        for image, mask in enumerate(mask_rows(masks))
        for unit, is_masked in enumerate(mask)
        if not is_masked
        for row, column in quarter_by_quarter(side)
    ]


def quarter_by_quarter(side: int) -> list[tuple[int, int]]:
    """Tokens of a square: its top left quarter, bottom left, top right, bottom right, each in the same order."""
    if side == 1:
        return [(0, 0)]
    half = quarter_by_quarter(side // 2)
    corners = [(0, 0), (side // 2, 0), (0, side // 2), (side // 2, side // 2)]
    return [(top + row, left + column) for top, left in corners for row, column in half]


def slots_and_tokens(plan: GroupingPlan, num_tokens: int) -> tuple[Tensor, Tensor]:
    """[G, S] int64 token of each slot, -1 for a pad; and [T] int64 slot of each token."""
    num_slots = plan.num_groups * plan.group_size
    if plan.gather_index is None:
        assert plan.scatter_index is None
        assert plan.num_groups * plan.group_size == num_tokens
        slot_of_token = torch.arange(num_tokens)
    else:
        assert plan.gather_index.shape == (num_slots,)
        assert plan.scatter_index.shape == (num_tokens,)
        slot_of_token = plan.scatter_index.long()
    token_of_slot = torch.full((num_slots,), -1)
    for token, slot in enumerate(slot_of_token.tolist()):
        assert 0 <= slot < num_slots
        assert token_of_slot[slot] == -1, "two tokens in one slot"
        token_of_slot[slot] = token
    return token_of_slot.view(plan.num_groups, plan.group_size), slot_of_token


# What holds for every plan


@quick
@given(batches())
def test_tokens_stand_in_the_order_of_the_pool(batch):
    geometry, masks = batch
    plan = build_sparse_plan(masks, geometry)
    assert len(plan.stages) == len(geometry.stages)
    for index, (stage, sizes) in enumerate(zip(plan.stages, geometry.stages, strict=True)):
        assert stage.grid_size == sizes.grid_size
        rows_columns = [(row, column) for _, row, column in expected_tokens(geometry, masks, index)]
        assert stage.position.tolist() == [row * sizes.grid_size[1] + column for row, column in rows_columns]


@quick
@given(batches())
def test_merged_siblings_are_the_next_stage(batch):
    geometry, masks = batch
    stages = build_sparse_plan(masks, geometry).stages
    for stage, following in itertools.pairwise(stages):
        siblings = stage.position.view(-1, 4)
        rows, columns = siblings // stage.grid_size[1], siblings % stage.grid_size[1]
        # row and column of the siblings in their square: 00, 10, 01, 11
        assert (rows % 2 == torch.tensor([0, 1, 0, 1])).all()
        assert (columns % 2 == torch.tensor([0, 0, 1, 1])).all()
        parents = torch.stack(
            [row // 2 * following.grid_size[1] + column // 2 for row, column in zip(rows.T, columns.T, strict=True)]
        )
        assert (parents == following.position).all()


@quick
@given(batches())
def test_scatter_inverts_gather_and_every_token_has_one_slot(batch):
    geometry, masks = batch
    for stage in build_sparse_plan(masks, geometry).stages:
        tokens = torch.randn(len(stage.position), 3)
        for partition in (stage.regular, stage.shifted):
            token_of_slot, _ = slots_and_tokens(partition, len(tokens))
            assert sorted(token_of_slot[token_of_slot >= 0].tolist()) == list(range(len(tokens)))
            if partition.gather_index is None:
                continue
            gathered = tokens[partition.gather_index.long()]  # pads repeat a real token
            assert torch.equal(gathered[partition.scatter_index.long()], tokens)


@quick
@given(batches())
def test_tokens_attend_to_all_of_their_window_and_to_nothing_else(batch):
    geometry, masks = batch
    plan = build_sparse_plan(masks, geometry)
    for index, (stage, sizes) in enumerate(zip(plan.stages, geometry.stages, strict=True)):
        tokens = torch.tensor(expected_tokens(geometry, masks, index))
        for partition, shift in ((stage.regular, 0), (stage.shifted, sizes.shift_size)):
            check_attention(partition, tokens, sizes, shift)


def check_attention(plan: GroupingPlan, tokens: Tensor, sizes: StageGeometry, shift: int) -> None:
    """Rows of the position table for pairs in one window of one image, the row after the table's last for others."""
    number = torch.empty(sizes.grid_size, dtype=torch.int64)
    for window, members in enumerate(windows_of_grid(sizes.grid_size, sizes.window_size, shift)):
        for row, column in members:
            number[row, column] = window
    image, row, column = tokens.T
    window = image * 10**6 + number[row, column]
    token_of_slot, _ = slots_and_tokens(plan, len(tokens))
    reach = sizes.table_window_size - 1
    forbidden = (2 * reach + 1) ** 2
    assert plan.relative_position_index.shape == (plan.num_groups, plan.group_size, plan.group_size)
    for slots, actual in zip(token_of_slot, plan.relative_position_index.long(), strict=True):
        is_token = slots >= 0
        of_slot = slots.clamp(min=0)
        expected = (
            (row[of_slot, None] - row[of_slot] + reach) * (2 * reach + 1)
            + column[of_slot, None]
            - column[of_slot]
            + reach
        )
        allowed = (window[of_slot, None] == window[of_slot]) & is_token[:, None] & is_token
        assert torch.equal(actual[allowed], expected[allowed])
        assert (actual[allowed] < forbidden).all()
        # A pad attends to itself, so that no softmax is empty; what it reads there is thrown away.
        alone = torch.eye(len(slots), dtype=torch.bool) & ~is_token[:, None]
        assert (actual[alone] < forbidden).all()
        assert (actual[~allowed & ~alone] == forbidden).all()
        # The whole window stands in this group.
        visible_in_window = (window[of_slot, None] == window).sum(1)
        assert torch.equal(allowed.sum(1)[is_token], visible_in_window[is_token])


@quick
@given(batches())
def test_pool_and_images_are_inverse(batch):
    geometry, masks = batch
    plan, batch_size = build_sparse_plan(masks, geometry), len(masks)
    counts = (~masks).sum(1).tolist()
    assert plan.is_shared == (len(mask_rows(masks)) == 1)
    assert plan.has_equal_counts == (len(set(counts)) == 1)
    assert plan.num_masked == sum(map(sum, mask_rows(masks)))
    assert torch.equal(plan.bool_masked_pos, masks[: len(mask_rows(masks))])

    rows = batch_size if plan.is_shared else 1
    last = torch.randn(rows, sum(counts) // rows, 5)
    by_image = plan.to_images(last, batch_size)
    assert by_image.shape == (batch_size, max(counts), 5)
    assert torch.equal(plan.to_pool(by_image), last)
    token_mask = plan.token_mask(batch_size)
    assert token_mask.tolist() == [[place < count for place in range(max(counts))] for count in counts]
    assert torch.equal(by_image[token_mask], last.flatten(0, 1))
    assert not by_image[~token_mask].any()

    first = torch.randn(rows, len(plan.stages[0].position), 2)  # all tokens of a unit move together
    tokens_per_unit = 4 ** (len(plan.stages) - 1)
    assert torch.equal(
        plan.to_images(first, batch_size)[token_mask.repeat_interleave(tokens_per_unit, 1)], first.flatten(0, 1)
    )


@quick
@given(batches())
def test_unit_indices_name_the_units_of_the_pool(batch):
    geometry, masks = batch
    plan = build_sparse_plan(masks, geometry)
    flat = [masked for row in mask_rows(masks) for masked in row]
    assert plan.visible_unit_index.tolist() == [unit for unit, masked in enumerate(flat) if not masked]
    assert plan.masked_unit_index.tolist() == [unit for unit, masked in enumerate(flat) if masked]
    if not plan.is_shared:
        assert plan.image_index.tolist() == [unit // geometry.num_units for unit in plan.visible_unit_index.tolist()]


@quick
@given(batches())
def test_patch_masks_make_the_same_plan(batch):
    geometry, masks = batch
    side = geometry.patches_per_unit_side
    grids = masks.view(len(masks), *geometry.unit_grid_size)
    patches = grids.repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1)
    for given_masks in (patches, patches.long(), patches.float(), masks.to(torch.uint8)):
        assert_same_plan(build_sparse_plan(given_masks, geometry), build_sparse_plan(masks, geometry))


# Examples that can be checked by hand

ROW_OF_FOUR = SparseGeometry((1, 4), (StageGeometry((1, 4), 2, 0, table_window_size=2, channels=4),), "window")


def test_the_example_of_a_grouping_plan_in_one_group():
    plan = build_sparse_plan(torch.tensor([[False, True, False, False]]), ROW_OF_FOUR).stages[0].regular
    assert (plan.num_groups, plan.group_size, plan.gather_index, plan.scatter_index) == (1, 3, None, None)
    assert plan.relative_position_index.tolist() == [[[4, 9, 9], [9, 4, 3], [9, 5, 4]]]


def test_the_example_of_a_grouping_plan_in_two_groups(monkeypatch):
    from green_swin_hf import sparse_plan
    from green_swin_hf.window_grouping import WindowGrouping

    # No group size of a config makes groups smaller than a window's area, so the grouping is handed in, as one that
    # chose its own number of slots.
    monkeypatch.setattr(sparse_plan, "choose_grouping", lambda *_: WindowGrouping(2, ((1,), (0,)), 3))
    monkeypatch.setattr(sparse_plan, "_groups_in_order", lambda *_: None)
    geometry = dataclasses.replace(ROW_OF_FOUR, group_size="optimal")
    plan = build_sparse_plan(torch.tensor([[False, True, False, False]]), geometry).stages[0].regular
    assert (plan.num_groups, plan.group_size) == (2, 2)
    assert plan.gather_index.tolist() == [1, 2, 0, 0]
    assert plan.scatter_index.tolist() == [2, 0, 1]
    assert plan.relative_position_index.tolist() == [[[4, 3], [5, 4]], [[4, 9], [9, 4]]]


def test_images_that_fit_into_a_group_stand_there_as_in_the_pool():
    geometry = SparseGeometry.from_config(GreenSwinConfig.from_variant("tiny"))
    plan = build_sparse_plan(sample_masks(6, (7, 7), 0.75, seeded()), geometry)
    shapes = [(stage.regular.num_groups, stage.regular.group_size) for stage in plan.stages]
    assert shapes[2:] == [(6, 48), (2, 36)]  # 48 tokens of an image; 12 of each of three images (four do not divide 6)
    for stage in plan.stages[2:]:
        assert stage.regular.gather_index is stage.regular.scatter_index is stage.shifted.gather_index is None
    for stage in plan.stages[:2]:
        assert stage.regular.group_size == 49
        assert stage.regular.gather_index is not None


def test_the_shift_cuts_windows_at_the_border():
    geometry = SparseGeometry((1, 4), (StageGeometry((1, 4), 2, 1, table_window_size=2, channels=4),), 4)
    stage = build_sparse_plan(torch.zeros(1, 4), geometry).stages[0]
    assert stage.regular.relative_position_index.tolist() == [[[4, 3, 9, 9], [5, 4, 9, 9], [9, 9, 4, 3], [9, 9, 5, 4]]]
    assert stage.shifted.relative_position_index.tolist() == [[[4, 9, 9, 9], [9, 4, 3, 9], [9, 5, 4, 9], [9, 9, 9, 4]]]


def test_the_first_of_odd_windows_is_cut_to_the_shift():
    geometry = SparseGeometry((1, 7), (StageGeometry((1, 7), 3, 1, table_window_size=3, channels=4),), 9)
    index = build_sparse_plan(torch.zeros(1, 7), geometry).stages[0].shifted.relative_position_index[0]
    window_of_column = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    assert torch.equal(index < 25, window_of_column[:, None] == window_of_column)


def test_patches_of_a_unit_go_from_coarse_to_fine():
    for side in (1, 2, 4, 8):
        rows, columns = unit_patch_offsets(side)
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == quarter_by_quarter(side)


def test_geometry_at_the_size_of_the_config_and_at_others():
    config = GreenSwinConfig(window_size=14)
    assert [
        (stage.grid_size, stage.window_size, stage.shift_size) for stage in SparseGeometry.from_config(config).stages
    ] == [
        ((56, 56), 14, 7),
        ((28, 28), 14, 7),
        ((14, 14), 14, 0),
        ((7, 7), 7, 0),
    ]
    larger = SparseGeometry.from_config(config, (320, 224))
    assert larger.unit_grid_size == (10, 7)
    assert [(stage.window_size, stage.shift_size) for stage in larger.stages] == [(14, 7), (14, 7), (14, 0), (7, 0)]
    smaller = SparseGeometry.from_config(config, 64)
    assert [(stage.window_size, stage.table_window_size) for stage in smaller.stages] == [
        (14, 14),
        (8, 14),
        (4, 14),
        (2, 7),
    ]


# Plans as values


def assert_same_plan(actual: object, expected: object) -> None:
    assert type(actual) is type(expected)
    for entry in dataclasses.fields(expected):
        ours, theirs = getattr(actual, entry.name), getattr(expected, entry.name)
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), entry.name
        elif dataclasses.is_dataclass(theirs):
            assert_same_plan(ours, theirs)
        elif isinstance(theirs, tuple) and theirs and dataclasses.is_dataclass(theirs[0]):
            for one, other in zip(ours, theirs, strict=True):
                assert_same_plan(one, other)
        else:
            assert ours == theirs, entry.name


def tensors_of(value: object) -> list[Tensor]:
    """All tensors of a plan, also those of plans inside."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, entry.name) for entry in dataclasses.fields(value))
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, tuple) else []


PLAN_MASKS = {
    "shared": torch.eye(16, dtype=torch.bool)[:1],
    "mask per image": torch.eye(16, dtype=torch.bool)[:3],
    "unequal": torch.ones(16, 16, dtype=torch.bool).triu(1)[:3],
}


@pytest.fixture(params=PLAN_MASKS.values(), ids=PLAN_MASKS.keys())
def plan(request) -> SparsePlan:
    return build_sparse_plan(request.param, SparseGeometry.from_config(tiny_config()))


def test_moving_makes_a_new_plan_with_equal_values(plan):
    for moved in (
        plan.to("cpu"),
        plan.to(torch.device("cpu")),
        plan.to(device="cpu", non_blocking=True),
    ):
        assert moved is not plan
        assert moved.stages[0] is not plan.stages[0]
        assert_same_plan(moved, plan)
    with pytest.raises(TypeError):
        plan.to(torch.float16)  # indices have the types that they need


def test_moving_moves_every_tensor(plan):
    dtypes = [tensor.dtype for tensor in tensors_of(plan)]
    moved = tensors_of(plan.to("meta"))
    assert [(tensor.device.type, tensor.dtype) for tensor in moved] == [("meta", dtype) for dtype in dtypes]
    assert {tensor.device.type for tensor in tensors_of(plan)} == {"cpu"}


def test_plans_are_frozen(plan):
    for record in (plan, plan.stages[0], plan.stages[0].regular):
        for entry in dataclasses.fields(record):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, entry.name, None)


def test_plans_survive_pickling(plan):
    assert_same_plan(pickle.loads(pickle.dumps(plan)), plan)


def test_geometries_survive_pickling_and_compare_by_value():
    geometry = SparseGeometry.from_config(tiny_config())
    assert pickle.loads(pickle.dumps(geometry)) == geometry
    assert hash(pickle.loads(pickle.dumps(geometry))) == hash(geometry)
    assert geometry != SparseGeometry.from_config(tiny_config(), 64)


def test_equal_rows_share_a_plan():
    geometry, row = SparseGeometry.from_config(tiny_config()), PLAN_MASKS["shared"]
    one, many = build_sparse_plan(row, geometry), build_sparse_plan(row.expand(5, -1), geometry)
    assert_same_plan(one, many)
    assert one.is_shared
    for batch_size in (1, 2, 7):
        one.check_batch(batch_size, geometry)
        assert one.token_mask(batch_size).shape == (batch_size, 15)


def test_a_plan_does_not_keep_the_callers_mask():
    mask = PLAN_MASKS["mask per image"].clone()
    plan = build_sparse_plan(mask, SparseGeometry.from_config(tiny_config()))
    mask.fill_(True)
    assert torch.equal(plan.bool_masked_pos, PLAN_MASKS["mask per image"])


# Sampling


@quick
@given(st.integers(1, 5), st.integers(1, 9), st.integers(2, 9), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_masks_have_exactly_the_asked_count(num_masks, rows, columns, ratio, seed):
    masks = sample_masks(num_masks, (rows, columns), ratio, seeded(seed))
    assert masks.shape == (num_masks, rows * columns)
    assert masks.dtype == torch.bool
    expected = num_masked_units(rows * columns, ratio)
    assert masks.sum(1).tolist() == [expected] * num_masks
    assert 1 <= expected <= rows * columns - 1
    assert abs(expected - ratio * rows * columns) <= 1


@given(st.integers(2, 400), st.data())
def test_a_ratio_that_is_a_whole_number_of_units_masks_that_number(num_units, data):
    masked = data.draw(st.integers(1, num_units - 1))
    assert num_masked_units(num_units, masked / num_units) == masked


def test_masked_counts_of_the_paper_and_at_the_limits():
    table = {
        (49, 0.75): 37,
        (16, 0.75): 12,
        (10, 0.9): 9,
        (16, 0.99): 15,
        (16, 0.001): 1,
        (2, 0.999): 1,
        (100, 0.29): 29,
    }
    assert {given: num_masked_units(*given) for given in table} == table


def test_masks_are_uniform():
    """Counts of each unit, and of each pair of units, against those of uniform draws without replacement."""
    draws, units, masked = 20000, 12, 5
    masks = sample_masks(draws, (3, 4), masked / units, seeded(1)).double()
    together = masks.T @ masks
    share, pair_share = masked / units, masked * (masked - 1) / (units * (units - 1))
    # Sums of squared standard scores. Of 12 units (11 free) and 66 pairs (65 free): far tails of chi-square.
    scores = (together.diag() - draws * share) / (draws * share * (1 - share)) ** 0.5
    assert (scores.square() * (units - 1) / units).sum() < 35
    upper = together[tuple(torch.triu_indices(units, units, 1))]
    pair_scores = (upper - draws * pair_share) / (draws * pair_share * (1 - pair_share)) ** 0.5
    assert pair_scores.abs().max() < 4.5
    assert pair_scores.square().sum() < 66 * 2


def test_masks_of_a_batch_are_drawn_apart():
    masks = sample_masks(64, (7, 7), 0.75, seeded())
    assert len({tuple(mask) for mask in masks.tolist()}) == 64


def test_a_generator_decides_the_masks():
    first, again, other = (sample_masks(4, (7, 7), 0.75, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = seeded(3)
    assert not torch.equal(sample_masks(4, (7, 7), 0.75, generator), sample_masks(4, (7, 7), 0.75, generator))


def test_the_global_generator_is_used_only_without_another():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sample_masks(4, (7, 7), 0.75, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    first = sample_masks(4, (7, 7), 0.75)
    torch.manual_seed(1)
    assert torch.equal(sample_masks(4, (7, 7), 0.75), first)


# Input that cannot be


@pytest.mark.parametrize(
    ("image_size", "named"),
    [(36, "36x36"), ((32, 20), "32x20"), (0, "0x0"), ((32, 4), "32x4")],
)
def test_image_sizes_off_the_unit_grid_raise(image_size, named):
    message = rf"image_size {named} must be a multiple of mask_unit_size 8 .*resize or crop the images"
    with pytest.raises(ValueError, match=message):
        SparseGeometry.from_config(tiny_config(), image_size)


WRONG_MASKS = {
    "one dimension": (torch.zeros(16), r"shape \(16,\).*\(batch, 16\) for mask units.*\(batch, 256\) for patches.*4x4"),
    "three dimensions": (torch.zeros(1, 4, 4), r"shape \(1, 4, 4\).*must be \(batch, 16\)"),
    "wrong length": (torch.zeros(2, 64), r"shape \(2, 64\).*must be \(batch, 16\) for mask units or \(batch, 256\)"),
    "other numbers": (torch.full((1, 16), 2), "0 (visible) and 1 (masked) only"),
    "fractions": (torch.full((1, 16), 0.5), "0 (visible) and 1 (masked) only"),
    "not a number": (torch.full((1, 16), float("nan")), "0 (visible) and 1 (masked) only"),
    "changes inside a unit": (
        torch.zeros(2, 256).index_fill_(1, torch.tensor([37]), 1),
        "changes inside a mask unit: mask squares of a multiple of 4x4 patches",
    ),
    "nothing visible": (
        torch.cat([torch.zeros(2, 16), torch.ones(1, 16)]),
        "masks every unit of image 2; leave at least one visible",
    ),
    # found by tests/fuzz.py
    "no rows": (torch.zeros(0, 16), "shape (0, 16); it must be (batch, 16)"),
    "nothing at all": (None, "bool_masked_pos is NoneType; it must be a tensor"),
    "a list": ([[0] * 16], "bool_masked_pos is list; it must be a tensor"),
    "sparse": (torch.zeros(1, 16).to_sparse(), "bool_masked_pos is torch.sparse_coo; it must be a dense tensor"),
    "without values": (torch.zeros(1, 16, device="meta"), "bool_masked_pos is on the meta device"),
    "nothing visible, patches": (torch.ones(1, 256), "masks every unit of image 0"),
}


@pytest.mark.parametrize(("masks", "message"), WRONG_MASKS.values(), ids=WRONG_MASKS.keys())
def test_wrong_masks_raise(masks, message):
    geometry = SparseGeometry.from_config(tiny_config())
    message = message if "\\" in message else re.escape(message)
    for function in (unit_masks, build_sparse_plan):
        with pytest.raises(ValueError, match=message):
            function(masks, geometry)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_ratios_outside_of_0_and_1_raise(ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {ratio} must be greater than 0 and less than 1"):
        num_masked_units(16, ratio)
    with pytest.raises(ValueError, match=f"mask_ratio {ratio} must be"):
        sample_masks(1, (4, 4), ratio)


@pytest.mark.parametrize("grid_size", [(1, 1), (0, 4)])
def test_too_few_units_raise(grid_size):
    units = grid_size[0] * grid_size[1]
    with pytest.raises(ValueError, match=f"num_units {units} must be at least 2 .*use larger images"):
        sample_masks(1, grid_size, 0.75)


def test_a_plan_for_other_images_raises():
    geometry = SparseGeometry.from_config(tiny_config())
    shared, per_image = (build_sparse_plan(PLAN_MASKS[kind], geometry) for kind in ("shared", "mask per image"))
    per_image.check_batch(3, geometry)
    for batch_size in (1, 2, 4):
        with pytest.raises(ValueError, match=f"masks of 3 images, pixel_values has {batch_size}; build one plan"):
            per_image.check_batch(batch_size, geometry)
    for image_size, units in (((40, 32), "5x4"), ((64, 64), "8x8"), ((16, 64), "2x8")):  # the last: as many units
        other = SparseGeometry.from_config(tiny_config(), image_size)
        with pytest.raises(
            ValueError, match=f"4x4 mask units, pixel_values have {units}; build it with SparseGeometry"
        ):
            per_image.check_batch(3, other)
        with pytest.raises(
            ValueError, match=f"4x4 mask units, pixel_values have {units}; build it with SparseGeometry"
        ):
            shared.check_batch(1, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": 5},
        {"embed_dim": 16},
        {"depths": (2, 2), "num_heads": (1, 2), "patch_size": 4},
        {"image_size": 16},  # other position tables
    ],
    ids=str,
)
def test_a_plan_for_another_model_raises(changes):
    plan = build_sparse_plan(PLAN_MASKS["shared"], SparseGeometry.from_config(tiny_config()))
    with pytest.raises(ValueError, match=r"sparse_plan was built for a model with .*build it with SparseGeometry"):
        plan.check_batch(1, SparseGeometry.from_config(tiny_config(**changes), 32))


def test_a_plan_serves_models_that_group_differently():
    plan = build_sparse_plan(PLAN_MASKS["shared"], SparseGeometry.from_config(tiny_config()))
    plan.check_batch(1, SparseGeometry.from_config(tiny_config(group_size="optimal")))


def test_a_huge_group_size_costs_no_more_time_than_one_that_holds_the_batch():
    """Found by tests/fuzz.py: it counted down from the number."""
    plan = build_sparse_plan(torch.zeros(1, 16), SparseGeometry.from_config(tiny_config(group_size=2**31 - 1)))
    assert [stage.regular.num_groups for stage in plan.stages] == [1, 1, 1]
