"""The solver against brute force on small inputs and against CP-SAT on the windows of real masks."""

import random
from itertools import combinations, combinations_with_replacement

import pytest
from benchmarking import grouping as grouping_benchmark
from hypothesis import given, settings
from hypothesis import strategies as st

from green_swin_hf.window_grouping import (
    WindowGrouping,
    attention_cost,
    choose_grouping,
    solve_best_fit_grouping,
    solve_grouping,
    solve_optimal_grouping,
    solve_subset_sum_grouping,
)

SOLVERS = {
    "best fit": solve_best_fit_grouping,
    "subset sum": solve_subset_sum_grouping,
    "largest first": lambda sizes, capacity: solve_subset_sum_grouping(sizes, capacity, largest_first=True),
    "best of them": lambda sizes, capacity: solve_grouping(sizes, capacity).groups,
}
each_solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
deterministic = settings(max_examples=150, derandomize=True, deadline=None)


@st.composite
def sizes_and_capacity(draw, max_windows=40):
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(0, capacity), max_size=max_windows)), capacity


def count_groups_by_search(sizes, capacity):
    """The fewest groups of any packing, by trying every group for every window."""
    windows = sorted((size for size in sizes if size), reverse=True)

    def place(index, loads, best):
        if len(loads) >= best:
            return best
        if index == len(windows):
            return len(loads)
        for load in set(loads):
            if load + windows[index] <= capacity:
                others = list(loads)
                others.remove(load)
                best = place(index + 1, [*others, load + windows[index]], best)
        return place(index + 1, [*loads, windows[index]], best)

    return place(0, [], len(windows) + 1)


def best_sum_by_search(sizes, capacity):
    sums = (sum(chosen) for count in range(len(sizes) + 1) for chosen in combinations(sizes, count))
    return max(total for total in sums if total <= capacity)


def small_multisets(max_capacity, max_windows):
    for capacity in range(1, max_capacity + 1):
        for count in range(1, max_windows + 1):
            for sizes in combinations_with_replacement(range(1, capacity + 1), count):
                yield sizes, capacity


class TestEveryPacking:
    @each_solver
    @given(case=sizes_and_capacity())
    @deterministic
    def test_every_window_is_in_one_group_that_has_room(self, solve, case):
        sizes, capacity = case
        groups = solve(sizes, capacity)
        placed = [position for group in groups for position in group]
        assert sorted(placed) == [position for position, size in enumerate(sizes) if size]
        assert all(0 < sum(sizes[position] for position in group) <= capacity for group in groups)

    @each_solver
    @given(case=sizes_and_capacity())
    @deterministic
    def test_the_same_input_gives_the_same_groups(self, solve, case):
        sizes, capacity = case
        assert solve(list(sizes), capacity) == solve(tuple(sizes), capacity)

    @each_solver
    @pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0)], ids=str)
    def test_no_tokens_make_no_groups(self, solve, sizes):
        assert len(solve(sizes, 4)) == 0

    @each_solver
    def test_what_cannot_be_packed_is_an_error(self, solve):
        with pytest.raises(ValueError, match="capacity 4 must be at least the largest window count 5"):
            solve([1, 5, 2], 4)
        with pytest.raises(ValueError, match="no negative number of tokens, found -2"):
            solve([1, -2], 4)
        with pytest.raises(ValueError, match="capacity 0 must be at least 1"):
            solve([0], 0)


class TestSubsetSum:
    @given(case=sizes_and_capacity(max_windows=10))
    @deterministic
    def test_each_group_is_the_best_filling_of_the_windows_left(self, case):
        sizes, capacity = case
        left = [size for size in sizes if size]
        for group in solve_subset_sum_grouping(sizes, capacity):
            assert sum(sizes[position] for position in group) == best_sum_by_search(left, capacity)
            for position in group:
                left.remove(sizes[position])

    @given(case=sizes_and_capacity(max_windows=10))
    @deterministic
    def test_largest_first_fills_each_group_best_around_the_largest_window_left(self, case):
        sizes, capacity = case
        left = [size for size in sizes if size]
        for group in solve_subset_sum_grouping(sizes, capacity, largest_first=True):
            largest = max(left)
            left.remove(largest)
            loads = [sizes[position] for position in group]
            assert sum(loads) == largest + best_sum_by_search(left, capacity - largest)
            loads.remove(largest)
            for size in loads:
                left.remove(size)

    def test_docstring_example(self):
        assert solve_subset_sum_grouping([5, 4, 3, 3], 9) == [(1, 0), (2, 3)]


class TestBestFit:
    @given(case=sizes_and_capacity())
    @deterministic
    def test_equals_the_rule_written_out(self, case):
        sizes, capacity = case
        loads = []
        for size in sorted((size for size in sizes if size), reverse=True):
            fitting = [index for index, load in enumerate(loads) if load + size <= capacity]
            if fitting:
                loads[max(fitting, key=lambda index: loads[index])] += size
            else:
                loads.append(size)
        groups = solve_best_fit_grouping(sizes, capacity)
        assert sorted(sum(sizes[position] for position in group) for group in groups) == sorted(loads)

    def test_docstring_example(self):
        assert solve_best_fit_grouping([2, 4, 3, 1], 5) == [(1, 3), (2, 0)]


class TestSolveGrouping:
    @given(case=sizes_and_capacity())
    @deterministic
    def test_is_never_worse_than_one_rule_and_never_below_the_bound(self, case):
        sizes, capacity = case
        grouping = solve_grouping(sizes, capacity)
        assert -(-sum(sizes) // capacity) <= grouping.num_groups
        assert grouping.num_groups <= len(solve_best_fit_grouping(sizes, capacity))
        assert grouping.num_groups <= len(solve_subset_sum_grouping(sizes, capacity))
        assert grouping.num_groups <= len(solve_subset_sum_grouping(sizes, capacity, largest_first=True))

    @given(case=sizes_and_capacity())
    @deterministic
    def test_counts_what_it_packed(self, case):
        sizes, capacity = case
        grouping = solve_grouping(sizes, capacity)
        loads = [sum(sizes[position] for position in group) for group in grouping.groups]
        assert grouping.num_tokens == sum(loads) == sum(sizes)
        assert grouping.group_size == max(loads, default=0)
        assert grouping.num_slots == grouping.num_groups * grouping.group_size
        assert grouping.padding == sum(grouping.group_size - load for load in loads)

    def test_equals_brute_force_on_all_small_inputs(self):
        """Exactly equal for every multiset of up to 7 windows and every capacity up to 9."""
        for sizes, capacity in small_multisets(max_capacity=9, max_windows=7):
            grouping = solve_grouping(sizes, capacity)
            if grouping.num_groups > -(-sum(sizes) // capacity):
                assert grouping.num_groups == count_groups_by_search(sizes, capacity), (sizes, capacity)

    @given(case=sizes_and_capacity(max_windows=9))
    @deterministic
    def test_is_at_most_one_group_above_brute_force(self, case):
        sizes, capacity = case
        exact = count_groups_by_search(sizes, capacity)
        assert exact <= solve_grouping(sizes, capacity).num_groups <= exact + 1

    def test_docstring_example(self):
        grouping = solve_grouping([3, 0, 2, 4, 1], 5)
        assert grouping == WindowGrouping(group_size=5, groups=((3, 4), (0, 2)), num_tokens=10)

    def test_largest_first_finds_what_the_other_rules_miss(self):
        sizes = [12, 11, 7, 7, 6, 4, 3, 3, 2, 2, 2, 1]
        assert {rule: len(solve(sizes, 12)) for rule, solve in SOLVERS.items()} == {
            "best fit": 6,
            "subset sum": 6,
            "largest first": 5,
            "best of them": 5,
        }

    def test_equal_windows_fill_groups_without_padding(self):
        grouping = solve_grouping([7] * 2240, 49)
        assert (grouping.num_groups, grouping.padding) == (320, 0)


def partition_id(partition):
    shifted = "-shifted" if partition.offset else ""
    return f"grid{partition.grid_size}-window{partition.window_size}{shifted}"


PARTITIONS = [
    partition
    for window_size in (7, 14)
    for partition in grouping_benchmark.build_partitions(224, window_size)
    if partition.stage <= 3
]
UNITS_PER_SIDE = 7


def draw_window_counts(partition, num_masks, seed=0):
    generator = random.Random(seed)
    masks = [grouping_benchmark.sample_visible_units(224, 0.75, generator) for _ in range(num_masks)]
    return [grouping_benchmark.count_visible_tokens(mask, UNITS_PER_SIDE, partition) for mask in masks]


class TestAgainstExactBinPacking:
    @given(case=sizes_and_capacity(max_windows=7))
    @settings(max_examples=40, derandomize=True, deadline=None)
    def test_the_oracle_equals_brute_force(self, case):
        sizes, capacity = case
        windows = sum(size > 0 for size in sizes)
        assert grouping_benchmark.count_groups_exactly(sizes, capacity, windows) == count_groups_by_search(
            sizes, capacity
        )

    @pytest.mark.parametrize("capacity_of", [None, max], ids=["window area", "largest count"])
    @pytest.mark.parametrize("partition", PARTITIONS, ids=partition_id)
    def test_mean_excess_on_real_masks(self, partition, capacity_of):
        excess = []
        for sizes in draw_window_counts(partition, num_masks=100):
            capacity = capacity_of(sizes) if capacity_of else min(partition.window_area, sum(sizes))
            groups = solve_grouping(sizes, capacity).num_groups
            assert groups == min(len(solve(sizes, capacity)) for solve in SOLVERS.values())
            excess.append(groups - grouping_benchmark.count_groups_exactly(sizes, capacity, upper_bound=groups))
        assert min(excess) >= 0
        assert sum(excess) / len(excess) <= 0.05

    def test_pool_of_images_is_within_a_thousandth_of_the_bound(self):
        partition = grouping_benchmark.build_partitions(224, 7)[0]
        sizes = [size for counts in draw_window_counts(partition, num_masks=64) for size in counts]
        grouping = solve_grouping(sizes, partition.window_area)
        assert sum(sizes) == 64 * 12 * 64
        assert grouping.num_groups <= -(-sum(sizes) // partition.window_area) * 1.001

    def test_window_counts_by_hand(self):
        regular = grouping_benchmark.Partition(stage=1, grid_size=4, window_size=3, offset=0)
        shifted = grouping_benchmark.Partition(stage=1, grid_size=4, window_size=3, offset=2)
        assert grouping_benchmark.count_visible_tokens([0], 2, regular) == [4]
        assert grouping_benchmark.count_visible_tokens([0], 2, shifted) == [1, 1, 1, 1]


class TestCost:
    def test_by_hand(self):
        assert attention_cost(2, 3, 10) == 2760
        assert solve_grouping([3, 2, 1], 3).cost(10) == 2760

    def test_report_names_groups_padding_and_cost(self):
        grouping = solve_grouping([3, 0, 2], 3)
        assert (grouping.padding, grouping.padding_ratio) == (1, 1 / 6)
        assert str(grouping) == "2 groups of 3 slots: 5 tokens, padding 1 (16.7%)"
        assert grouping.report(channels=10) == (
            "groups   2 of 3 slots\n"
            "tokens   5 in 2 windows\n"
            "padding  1 of 6 slots (16.7%)\n"
            "cost     2,760 multiply-adds at 10 channels (one group: 2,500)"
        )

    def test_an_empty_grouping_has_no_padding(self):
        grouping = solve_grouping([0, 0], 3)
        assert (grouping.padding, grouping.padding_ratio, grouping.cost(8)) == (0, 0.0, 0)


class TestChooseGrouping:
    def test_docstring_example(self):
        sizes = [4, 3, 3, 2]
        chosen = {rule: choose_grouping(sizes, rule, 4, 8) for rule in ("window", "optimal", 12)}
        shapes = {rule: (grouping.num_groups, grouping.group_size) for rule, grouping in chosen.items()}
        assert shapes == {"window": (4, 4), "optimal": (2, 6), 12: (1, 12)}

    @pytest.mark.parametrize("channels", [1, 8, 64])
    @given(sizes=st.lists(st.integers(0, 8), max_size=7))
    @settings(max_examples=60, derandomize=True, deadline=None)
    def test_optimal_equals_a_sweep_with_exact_packing(self, channels, sizes):
        total = sum(sizes)
        costs = [
            attention_cost(count_groups_by_search(sizes, capacity), capacity, channels)
            for capacity in range(max(sizes, default=1), total + 1)
        ]
        assert choose_grouping(sizes, "optimal", 8, channels).cost(channels) == min(costs, default=0)

    @pytest.mark.parametrize("partition", PARTITIONS, ids=partition_id)
    def test_optimal_equals_an_unpruned_sweep_on_real_masks(self, partition):
        channels = 32 * 2**partition.stage
        for sizes in draw_window_counts(partition, num_masks=5):
            sweep = [solve_grouping(sizes, capacity) for capacity in range(max(sizes), sum(sizes) + 1)]
            cheapest = min(grouping.cost(channels) for grouping in sweep)
            assert solve_optimal_grouping(sizes, channels).cost(channels) == cheapest
            assert cheapest <= choose_grouping(sizes, "window", partition.window_area, channels).cost(channels)

    @pytest.mark.parametrize("rule", ["window", "optimal", 49, 60], ids=str)
    @pytest.mark.parametrize("sizes", [(), (0, 0)], ids=str)
    def test_no_tokens_make_no_groups(self, sizes, rule):
        assert choose_grouping(sizes, rule, 49, 128).num_groups == 0

    @pytest.mark.parametrize("rule", ["window", 49, 1000], ids=str)
    def test_a_pool_smaller_than_the_group_is_one_group_without_padding(self, rule):
        grouping = choose_grouping([5, 4, 3], rule, 49, 128)
        assert (grouping.num_groups, grouping.group_size, grouping.padding) == (1, 12, 0)

    @pytest.mark.parametrize(
        ("sizes", "rule", "message"),
        [
            ([3], 48, "group_size 48 must be at least the window area 49"),
            ([3], 0, "group_size 0 must be at least the window area 49"),
            ([3], "best", 'group_size \'best\' must be "window", "optimal" or a number of slots'),
            ([3], 49.5, "group_size 49.5 must be"),
            ([50], "window", "window_area 49 must be at least the largest window count 50"),
            ([50], "optimal", "window_area 49 must be at least the largest window count 50"),
            ([-1], "optimal", "no negative number of tokens, found -1"),
        ],
        ids=["below the area", "zero", "unknown", "fraction", "large", "large swept", "negative swept"],
    )
    def test_errors_name_field_value_and_rule(self, sizes, rule, message):
        with pytest.raises(ValueError, match=message):
            choose_grouping(sizes, rule, 49, 128)


def test_a_capacity_beyond_all_tokens_takes_no_memory_for_the_rest():
    """Found by tests/fuzz.py: there was an entry for each slot."""
    assert solve_grouping([3, 0, 2], 10**12) == solve_grouping([3, 0, 2], 5)


def test_a_truth_is_no_number_of_slots():
    """Found by tests/fuzz.py."""
    with pytest.raises(ValueError, match="group_size True must be"):
        choose_grouping([1], True, 1, 8)
