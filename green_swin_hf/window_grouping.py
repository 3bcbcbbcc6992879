"""Pack windows with different numbers of visible tokens into groups of equal size.

The solver behind group window attention: integers in, integers out, standard library only. A window is a
number of tokens and is never split; a group holds whole windows, at most `capacity` tokens together. What
counts is the number of groups, for every group is padded to the same number of slots. This is bin packing,
solved in well under a millisecond for one image by greedy rules on a histogram of window sizes (sizes are
few and small), and the best of three rules is practically always exact.

Source: "Green Hierarchical Vision Transformer for Masked Image Modeling", arXiv 2205.13515, the sections on
group window attention and on optimal grouping.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# A packing is a list of groups, each a list of window sizes; which windows have those sizes is decided last.
Packing = list[list[int]]


@dataclass(frozen=True)
class WindowGrouping:
    """Windows packed into groups of equal size.

    Example: sizes (3, 0, 2, 4, 1) at capacity 5 give `groups` ((3, 4), (0, 2)): windows 3 and 4 hold 4 + 1
    tokens, windows 0 and 2 hold 3 + 2, window 1 is empty and in no group. `group_size` is 5, `num_tokens` 10,
    `padding` 0.

    Args:
        group_size: slots of every group, the number of tokens in the fullest one.
        groups: for each group the positions of its windows in the `sizes` that were solved.
        num_tokens: tokens of all windows together.
    """

    group_size: int
    groups: tuple[tuple[int, ...], ...]
    num_tokens: int

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_slots(self) -> int:
        return self.num_groups * self.group_size

    @property
    def padding(self) -> int:
        """Slots that hold no token."""
        return self.num_slots - self.num_tokens

    @property
    def padding_ratio(self) -> float:
        """Share of the slots that hold no token, in [0, 1)."""
        return self.padding / self.num_slots if self.num_slots else 0.0

    def cost(self, channels: int) -> int:
        """Ω, the multiply-adds of attention over these groups with `channels` channels."""
        return attention_cost(self.num_groups, self.group_size, channels)

    def report(self, channels: int) -> str:
        """Groups, padding and Ω in lines to read, with Ω of one group holding everything to compare."""
        one_group = attention_cost(1, self.num_tokens, channels)
        return "\n".join(
            (
                f"groups   {self.num_groups} of {self.group_size} slots",
                f"tokens   {self.num_tokens} in {sum(map(len, self.groups))} windows",
                f"padding  {self.padding} of {self.num_slots} slots ({self.padding_ratio:.1%})",
                f"cost     {self.cost(channels):,} multiply-adds at {channels} channels (one group: {one_group:,})",
            )
        )

    def __str__(self) -> str:
        return (
            f"{self.num_groups} groups of {self.group_size} slots: {self.num_tokens} tokens, "
            f"padding {self.padding} ({self.padding_ratio:.1%})"
        )


def attention_cost(num_groups: int, group_size: int, channels: int) -> int:
    """Ω = n_g (4 g_s C² + 2 g_s² C), the multiply-adds of attention over n_g groups of g_s slots.

    The first term is the projections, the second the attention inside each group. Example:
    `attention_cost(2, 3, 10)` = 2 (4·3·100 + 2·9·10) = 2760. Source: the paper's section on optimal grouping.
    """
    return num_groups * (4 * group_size * channels**2 + 2 * group_size**2 * channels)


def solve_subset_sum_grouping(
    sizes: Sequence[int], capacity: int, largest_first: bool = False
) -> list[tuple[int, ...]]:
    """Groups by repeated subset sum: the windows that fill one group best, then the same with the rest.

    Example: sizes (5, 4, 3, 3) at capacity 9 give [(1, 0), (2, 3)]: 4 + 5 = 9, then 3 + 3 = 6.

    Args:
        sizes: tokens in each window, 0 or more.
        capacity: most tokens that a group may hold.
        largest_first: True makes every group take the largest window left, then the rest that fills it best.

    Returns:
        For each group the positions of its windows; windows without tokens are in none.

    Raises:
        ValueError: a size is negative or larger than the capacity, or the capacity is below 1.

    Source: the paper's section on optimal grouping (knapsack with weight = value, one group at a time);
    `largest_first` is ours: large windows are the hard ones to place late.
    """
    positions = _positions_by_size(sizes, capacity)
    packing = _pack_by_subset_sum(_histogram(positions), capacity, largest_first)
    return _place_windows(packing, positions)


def solve_best_fit_grouping(sizes: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Groups by best-fit decreasing: each window, largest first, into the fullest group that has room.

    Example: sizes (2, 4, 3, 1) at capacity 5 give [(1, 3), (2, 0)]: 4 opens a group, 3 another, 2 fits only
    beside 3, 1 beside 4.

    Args:
        sizes: tokens in each window, 0 or more.
        capacity: most tokens that a group may hold.

    Returns:
        For each group the positions of its windows; windows without tokens are in none.

    Raises:
        ValueError: a size is negative or larger than the capacity, or the capacity is below 1.
    """
    positions = _positions_by_size(sizes, capacity)
    return _place_windows(_pack_by_best_fit(_histogram(positions), capacity), positions)


def solve_grouping(sizes: Sequence[int], capacity: int) -> WindowGrouping:
    """The grouping with the fewest groups, then the fewest slots, that three greedy rules find.

    The rules run in the order of their price (best fit, subset sum with the largest window first, subset
    sum) and stop at ceil(tokens / capacity) groups, which no packing can beat. The result depends on nothing
    but the arguments.

    Example: sizes (3, 0, 2, 4, 1) at capacity 5 give 2 groups of 5, windows (3, 4) and (0, 2).

    Args:
        sizes: tokens in each window, 0 or more.
        capacity: most tokens that a group may hold.

    Returns:
        The grouping; its `group_size` is the largest load, at most `capacity`. Zero groups without tokens.

    Raises:
        ValueError: a size is negative or larger than the capacity, or the capacity is below 1.
    """
    positions = _positions_by_size(sizes, capacity)
    num_tokens = sum(sizes)
    if not num_tokens:
        return WindowGrouping(group_size=0, groups=(), num_tokens=0)
    capacity = min(capacity, num_tokens)  # more room says nothing, and costs memory
    packing = _pack(_histogram(positions), capacity, lower_bound=-(-num_tokens // capacity))
    groups = tuple(_place_windows(packing, positions))
    return WindowGrouping(group_size=_largest_load(packing), groups=groups, num_tokens=num_tokens)


def solve_optimal_grouping(sizes: Sequence[int], channels: int) -> WindowGrouping:
    """The grouping of least cost Ω over all capacities from the largest window to all tokens in one group.

    Every candidate is a grouping that exists, found by `solve_grouping`, and is charged for the slots that it
    uses; capacities whose lower bound on Ω cannot win are not solved.

    Example: sizes (4, 3, 3, 2) with 8 channels. Capacity 4 needs 4 groups (Ω 5120), 5 needs 3 (Ω 5040), 6
    needs 2 (Ω 4224), all 12 in one group cost 5376: the answer is 2 groups of 6.

    Args:
        sizes: tokens in each window, 0 or more.
        channels: C in Ω, the width of the stage.

    Raises:
        ValueError: a size is negative.

    Source: the paper's section on optimal grouping.
    """
    num_tokens = sum(sizes)
    smallest = max(1, max(sizes, default=0))
    best = solve_grouping(sizes, smallest)
    for capacity in range(smallest + 1, num_tokens + 1):
        # Without any padding the cost per token is that of a full group, and it grows with the group.
        if num_tokens * attention_cost(1, capacity, channels) // capacity >= best.cost(channels):
            break
        fewest_groups = -(-num_tokens // capacity)
        if attention_cost(fewest_groups, capacity, channels) < best.cost(channels):
            best = min(best, solve_grouping(sizes, capacity), key=lambda grouping: grouping.cost(channels))
    return best


def choose_grouping(
    sizes: Sequence[int],
    group_size: str | int,
    window_area: int,
    channels: int,
) -> WindowGrouping:
    """The grouping for one window partition under a config's `group_size`.

    A capacity above the number of tokens says nothing, so it is limited to it: a pool that fits in one group
    becomes one group without padding. "window" does not look at the cost (the authors find its optimum near
    the window area); "optimal" does, and takes one group for everything where that is cheapest.

    Example: sizes (4, 3, 3, 2) with `window_area` 4 and 8 channels: "window" gives 4 groups of 4 (3 and 3 do
    not fit together), "optimal" 2 groups of 6, and 12 one group of 12.

    Args:
        sizes: tokens in each window, 0 to `window_area`.
        group_size: "window" for the window area, "optimal" for the sweep over capacities, or a number of
            slots, at least `window_area` (then every mask can be grouped).
        window_area: tokens in a full window, rows times columns.
        channels: C in Ω; only "optimal" reads it.

    Raises:
        ValueError: `group_size` is none of these, or a size is negative or larger than `window_area`.
    """
    _check_sizes(sizes, window_area, "window_area")
    if group_size == "optimal":
        return solve_optimal_grouping(sizes, channels)
    slots = window_area if group_size == "window" else group_size
    if not isinstance(slots, int) or isinstance(slots, bool):
        raise ValueError(f'group_size {group_size!r} must be "window", "optimal" or a number of slots')
    if slots < window_area:
        raise ValueError(
            f"group_size {group_size} must be at least the window area {window_area}, since a full window is "
            f'never split: raise it, or use "window" or "optimal"'
        )
    return solve_grouping(sizes, max(1, min(slots, sum(sizes))))


def _check_sizes(sizes: Sequence[int], capacity: int, capacity_name: str = "capacity") -> None:
    if capacity < 1:
        raise ValueError(f"{capacity_name} {capacity} must be at least 1")
    if min(sizes, default=0) < 0:
        raise ValueError(f"sizes must hold no negative number of tokens, found {min(sizes)}")
    if max(sizes, default=0) > capacity:
        raise ValueError(
            f"{capacity_name} {capacity} must be at least the largest window count {max(sizes)}, "
            f"since a window is never split"
        )


def _positions_by_size(sizes: Sequence[int], capacity: int) -> dict[int, list[int]]:
    """For each size that occurs, largest first, the positions of its windows; empty windows are left out."""
    _check_sizes(sizes, capacity)
    positions: dict[int, list[int]] = {size: [] for size in sorted(set(sizes), reverse=True) if size}
    for position, size in enumerate(sizes):
        if size:
            positions[size].append(position)
    return positions


def _histogram(positions: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """The number of windows of each size, in the order of `positions` (largest size first)."""
    return {size: len(windows) for size, windows in positions.items()}


def _place_windows(packing: Packing, positions: Mapping[int, Iterable[int]]) -> list[tuple[int, ...]]:
    """The packing with a window of that size in the place of each size, lowest positions first."""
    windows = {size: iter(of_size) for size, of_size in positions.items()}
    return [tuple([next(windows[size]) for size in group]) for group in packing]


def _largest_load(packing: Packing) -> int:
    return max(map(sum, packing))


def _pack(histogram: Mapping[int, int], capacity: int, lower_bound: int) -> Packing:
    """The packing of fewest groups, then of the smallest largest load, among the rules that were needed."""
    rules: tuple[Callable[[], Packing], ...] = (
        lambda: _pack_by_best_fit(histogram, capacity),
        lambda: _pack_by_subset_sum(histogram, capacity, largest_first=True),
        lambda: _pack_by_subset_sum(histogram, capacity, largest_first=False),
    )
    packings = []
    for rule in rules:
        packings.append(rule())
        if len(packings[-1]) == lower_bound:
            break
    return min(packings, key=lambda packing: (len(packing), _largest_load(packing)))


def _pack_by_best_fit(histogram: Mapping[int, int], capacity: int) -> Packing:
    """Best-fit decreasing over a histogram with its largest size first.

    `groups_with_room[r]` are the groups with r free slots, and bit r of `rooms` says that there are any: the
    fullest group with room for a size is the lowest bit at or above it.
    """
    groups_with_room: list[Packing] = [[] for _ in range(capacity + 1)]
    packing: Packing = []
    rooms = 0
    for size, count in histogram.items():
        for _ in range(count):
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                group = groups_with_room[room].pop()
                if not groups_with_room[room]:
                    rooms ^= 1 << room
            else:
                room, group = capacity, []
                packing.append(group)
            group.append(size)
            groups_with_room[room - size].append(group)
            rooms |= 1 << (room - size)
    return packing


def _pack_by_subset_sum(histogram: Mapping[int, int], capacity: int, largest_first: bool) -> Packing:
    """Repeated subset sum over a histogram with its largest size first.

    A filling that is best now is best again as long as its windows last, so each filling is solved once and
    repeated: the work grows with the number of different sizes, not of windows.
    """
    left = dict(histogram)
    packing: Packing = []
    while left:
        group = _fill_around_largest(left, capacity) if largest_first else _fill_group(left, capacity)
        needed = Counter(group)
        repeats = min(left[size] // count for size, count in needed.items())
        packing += [group] * repeats
        for size, count in needed.items():
            left[size] -= count * repeats
            if not left[size]:
                del left[size]
    return packing


def _fill_around_largest(left: dict[int, int], capacity: int) -> list[int]:
    """The largest size left and the sizes that fill the rest of the group best."""
    largest = next(iter(left))
    left[largest] -= 1
    group = [largest, *_fill_group(left, capacity - largest)]
    left[largest] += 1
    return group


def _fill_group(left: Mapping[int, int], capacity: int) -> list[int]:
    """The sizes that fill one group best, without the smallest ones where they are not needed.

    Bit s of `reachable` says that some of the windows seen so far hold s tokens together. Walking back from
    the largest sum, a window is taken where the sum could not be reached without it.

    Example: sizes 4, 3, 3 at capacity 6: the sums 0; 0, 4; 0, 3, 4; 0, 3, 4, 6 give [3, 3].
    """
    reachable, within = 1, (1 << (capacity + 1)) - 1
    seen: list[tuple[int, int]] = []  # each window's size, and the sums reachable before it
    for size, count in left.items():
        for _ in range(min(count, capacity // size)):
            seen.append((size, reachable))
            reachable |= reachable << size & within
        if reachable >> capacity:
            break
    load = reachable.bit_length() - 1
    group = []
    for size, before in reversed(seen):
        if not before >> load & 1:
            group.append(size)
            load -= size
    return group
