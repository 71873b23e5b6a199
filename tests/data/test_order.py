"""Which image a position trains on: permutations, columns, and no dependence on ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from dbtrain.data.order import Order, RankSlice
from dbtrain.runtime.errors import ConfigError


def places(order: Order, start: int, count: int) -> list[tuple[int, int]]:
    return [order.locate(position)[1:] for position in range(start, start + count)]


@pytest.mark.parametrize("shard_rows", [(5,), (4, 4), (7, 7, 6), (25,) * 8, (600, 600, 600)])
@pytest.mark.parametrize("global_batch", [1, 2, 4, 6])
def test_every_epoch_visits_each_row_once(shard_rows: tuple[int, ...], global_batch: int) -> None:
    order = Order(shard_rows, global_batch, seed=3, role="instance")
    rows = [(shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows)]
    seen: dict[tuple[int, int], Counter] = {}
    for position in range(3 * len(rows) * global_batch):
        epoch, shard, row = order.locate(position)
        column = position % global_batch // (global_batch // order.columns)
        seen.setdefault((column, epoch), Counter())[shard, row] += 1
    full = [counts for (_, epoch), counts in seen.items() if epoch < 2]
    assert all(set(counts.values()) == {1} for counts in full)
    for epoch in (0, 1):
        together = [row for (_, e), counts in seen.items() if e == epoch for row in counts]
        assert sorted(together) == sorted(rows)


def test_epochs_differ_and_so_do_seeds_and_roles() -> None:
    order = Order((20,), 2, seed=0, role="instance")
    first, second = places(order, 0, 20), places(order, 20, 20)
    assert first != second
    assert first != places(Order((20,), 2, seed=1, role="instance"), 0, 20)
    assert first != places(Order((20,), 2, seed=0, role="class"), 0, 20)


def test_the_order_is_a_pure_function_of_the_position() -> None:
    order = Order((6, 6, 6, 6), 4, seed=5, role="class")
    straight = places(order, 0, 100)
    assert places(Order((6, 6, 6, 6), 4, seed=5, role="class"), 60, 40) == straight[60:]
    assert [order.locate(position)[1:] for position in reversed(range(100))] == straight[::-1]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """Pinned by `print(places(Order((3, 4), 1, 0, "instance"), 0, 7))`: a change breaks resumes."""
    pinned = [(1, 2), (0, 1), (1, 0), (1, 3), (0, 0), (1, 1), (0, 2)]
    assert places(Order((3, 4), 1, seed=0, role="instance"), 0, 7) == pinned


def test_windows_bound_what_must_be_in_memory() -> None:
    order = Order((256,) * 16, 1, seed=0, role="instance")
    window = {shard for shard, _ in places(order, 0, 1024)}
    assert len(window) == 4


def test_with_as_many_shards_as_ranks_no_shard_is_read_by_every_rank() -> None:
    order, world = Order((6,) * 8, 8, seed=0, role="class"), 4
    read: dict[int, set[int]] = {}
    for rank in range(world):
        share = RankSlice(8, 1, rank, world)
        for step in range(60):
            for micro in range(share.micro_batches):
                for position in share.positions(step, micro):
                    read.setdefault(order.locate(position).shard, set()).add(rank)
    assert set(read) == set(range(8))
    assert all(len(ranks) == 1 for ranks in read.values())


def test_uneven_columns_are_not_used() -> None:
    assert Order((2, 1, 1, 1), 4, 0, "instance").columns == 1
    assert Order((50, 50, 50, 50), 4, 0, "instance").columns == 4
    assert Order((50, 50, 50, 49), 4, 0, "instance").columns == 4
    assert Order((50, 50), 5, 0, "instance").columns == 1


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (1, 2), (2, 4), (4, 2), (8, 1), (2, 1)])
def test_ranks_and_micro_batches_share_out_the_same_positions(world: int, micro_batch: int) -> None:
    shares = [RankSlice(8, micro_batch, rank, world) for rank in range(world)]
    step_3 = [p for s in shares for micro in range(s.micro_batches) for p in s.positions(3, micro)]
    assert step_3 == list(range(24, 32))


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch is 6, .* 4 ranks .* use a multiple of 8"):
        RankSlice(6, 2, rank=0, world=4)


SHARDS = (1, 2, 4, 32, 100, 512, 1000, 4096)
RANKS = (1, 2, 8, 64, 512)


@pytest.mark.parametrize("count", SHARDS)
def test_at_scale(count: int) -> None:
    """Up to 512 simulated ranks and 4,096 shards: every row once, each rank reads its share."""
    each, batch = 4, 512
    order = Order((each,) * count, batch, seed=1, role="class")
    steps = -(-each * count // batch) * 2
    found = [order.locate(position) for position in range(steps * batch)]
    first = [(place.shard, place.row) for place in found if place.epoch == 0]
    assert sorted(first) == [(shard, row) for shard in range(count) for row in range(each)]
    for ranks in RANKS:
        shares = [RankSlice(batch, batch // ranks, rank, ranks) for rank in range(ranks)]
        taken = [[p for step in range(steps) for p in share.positions(step, 0)] for share in shares]
        assert sorted(p for positions in taken for p in positions) == list(range(steps * batch))
        if count >= ranks and not count & (count - 1):  # `prepare` makes powers of two
            read = [len({found[p].shard for p in positions if found[p].epoch == 0}) for positions in taken]
            assert max(read) <= 1.1 * max(1, count / ranks)


def test_prepare_s_uneven_shards_stay_within_a_rank_s_share() -> None:
    """A hundred thousand images over 512 shards: some hold one row more."""
    rows = tuple(100_000 // 512 + (shard < 100_000 % 512) for shard in range(512))
    order = Order(rows, 512, seed=0, role="class")
    assert order.columns == 512
    for rank in (0, 255, 511):
        positions = [p for step in range(196) for p in RankSlice(512, 1, rank, 512).positions(step, 0)]
        assert {order.locate(position).shard for position in positions} == {rank}


REPEATS = ((1, 3, 1, 2), (), (5, 1, 1), (1, 1, 1, 1, 4))


def repeating(global_batch: int, rows: tuple[int, ...] = (4, 7, 3, 5)) -> Order:
    epoch = tuple(sum(repeats) or count for repeats, count in zip(REPEATS, rows, strict=True))
    return Order(epoch, global_batch, seed=3, role="instance", repeats=REPEATS)


@pytest.mark.parametrize(("global_batch", "columns"), [(1, 1), (2, 1), (4, 4)])
def test_an_epoch_has_each_row_as_often_as_it_repeats(global_batch: int, columns: int) -> None:
    order = repeating(global_batch)
    if columns > 1:  # of equal epochs, but for their rows
        order = Order((7,) * 4, global_batch, 3, "instance", ((1, 3, 1, 2), (), (5, 1, 1), (1, 1, 1, 1, 3)))
    assert order.columns == columns
    wanted = Counter({
        (shard, row): count
        for shard, repeats in enumerate(order.repeats)
        for row, count in enumerate(repeats or [1] * order.shard_rows[shard])
    })  # fmt: skip
    epoch = sum(order.shard_rows)
    assert wanted.total() == epoch
    for number in range(3):
        assert Counter(places(order, number * epoch, epoch)) == wanted
    assert places(order, 0, epoch) != places(order, epoch, epoch)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_repeats_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    order = repeating(4)
    shares = [RankSlice(4, 1, rank, world) for rank in range(world)]
    together = [
        order.locate(position)[1:]
        for step in range(10)
        for share in shares
        for micro in range(share.micro_batches)
        for position in share.positions(step, micro)
    ]
    assert together == places(repeating(4), 0, 40)
    for share in shares:
        mine = {order.locate(p).shard for step in range(40) for p in share.positions(step, 0)}
        assert mine <= set(order.shards_of(share))


def test_repeats_of_1_change_nothing_and_others_are_another_order() -> None:
    plain, same = Order((3, 4), 1, 0, "instance"), Order((3, 4), 1, 0, "instance", ((1, 1, 1), (1, 1, 1, 1)))
    assert places(plain, 0, 21) == places(same, 0, 21)
    one, other = (Order((6,), 1, 0, "instance", (repeats,)) for repeats in ((1, 2, 3), (3, 2, 1)))
    assert Counter(places(one, 0, 6)) != Counter(places(other, 0, 6)), "a window of the other was used"
