"""Batches: the right rows and draws at every position, whatever the ranks, and errors that arrive."""

from __future__ import annotations

import shutil
import sys
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbtrain.data.batch import Batch
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import Order, RankSlice
from dbtrain.data.shards import Manifest
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime import rng
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.inputs import Inputs
from tests.conftest import Make, at

WEIGHTS = {"instance": 1.0, "class": 0.5}


def stream(folder: Path, share: RankSlice, **options: object) -> LatentStream:
    return LatentStream(at(folder), Manifest.read(at(folder)), share, WEIGHTS, seed=7, **options)  # type: ignore[arg-type]


def tensors(batch: Batch) -> list[Tensor]:
    return [*batch.stored.values(), batch.posterior, batch.noise, batch.u, batch.prompt, batch.weight]


def test_a_stream_started_at_step_k_continues_the_first_one(prepared: Path) -> None:
    whole, late = stream(prepared, RankSlice(4, 2)), stream(prepared, RankSlice(4, 2), start=3)
    first = [next(whole) for _ in range(10)]
    for one, other in zip(first[6:], [next(late) for _ in range(4)], strict=True):
        assert all(map(torch.equal, tensors(one), tensors(other)))
    whole.close(), late.close()


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (1, 1), (2, 2), (4, 1)])
def test_ranks_together_see_what_one_rank_sees(prepared: Path, world: int, micro_batch: int) -> None:
    one = stream(prepared, RankSlice(4, 4))
    many = [stream(prepared, RankSlice(4, micro_batch, rank, world)) for rank in range(world)]
    for _ in range(3):
        whole = next(one)
        parts = [next(s) for s in many for _ in range(s.share.micro_batches)]
        for role in range(2):  # instance rows, then class rows, in every micro-batch
            rows = slice(role * micro_batch, (role + 1) * micro_batch)
            for field in range(len(tensors(whole))):
                together = torch.cat([tensors(part)[field][rows] for part in parts])
                assert torch.equal(together, tensors(whole)[field][role * 4 : role * 4 + 4])
    for s in (one, *many):
        s.close()


def test_rows_weigh_their_role_s_mean(prepared: Path) -> None:
    batches = stream(prepared, RankSlice(4, 2))
    assert next(batches).weight.tolist() == [0.25, 0.25, 0.125, 0.125]
    batches.close()


def test_draws_are_keyed_by_role_and_position(prepared: Path) -> None:
    batches = stream(prepared, RankSlice(4, 2))
    batch = [next(batches) for _ in range(4)][3]  # step 1, second micro-batch: positions 6 and 7
    for row, (role, position) in enumerate([("instance", 6), ("instance", 7), ("class", 6), ("class", 7)]):
        draws = rng.sample_noise(7, role, position, (4, 8, 8), 0.0)
        assert torch.equal(batch.noise[row], draws.noise)
        assert torch.equal(batch.posterior[row], draws.posterior)
        assert torch.equal(batch.u[row], draws.u)
    assert len({float(u) for u in batch.u}) == 4
    batches.close()


def test_noise_offset_shifts_channels_and_leaves_the_other_draws() -> None:
    plain, offset = (rng.sample_noise(0, "instance", 3, (4, 8, 8), value) for value in (0.0, 0.1))
    difference = offset.noise - plain.noise
    assert torch.allclose(difference, difference[:, :1, :1].expand(4, 8, 8), atol=1e-6)
    assert difference.abs().min() > 0
    assert torch.equal(plain.u, offset.u)
    assert torch.equal(plain.posterior, offset.posterior)


def test_prompts_follow_their_rows(prepared: Path) -> None:
    batches = stream(prepared, RankSlice(4, 2))
    for _ in range(4):
        assert next(batches).prompt.tolist() == [0, 0, 1, 1]
    batches.close()


def test_a_small_cache_gives_the_same_batches_and_reads_more(prepared: Path) -> None:
    rich, poor = stream(prepared, RankSlice(4, 4)), stream(prepared, RankSlice(4, 4), cache_gib=1e-9)
    for _ in range(12):
        assert all(map(torch.equal, tensors(next(rich)), tensors(next(poor))))
    rich.close(), poor.close()
    assert max(rich.cache.reads.values()) == 1
    assert max(poor.cache.reads.values()) > 1


def test_a_rank_reads_only_what_its_positions_need(prepared: Path) -> None:
    manifest = Manifest.read(at(prepared))
    order = Order(manifest.rows("class"), 2, 7, "class")
    assert order.columns == 2
    ranks = [stream(prepared, RankSlice(2, 1, rank, 2)) for rank in range(2)]
    for s in ranks:
        for _ in range(12):
            next(s)
        s.close()
    read = [{name for name in s.cache.reads if name.startswith("class")} for s in ranks]
    assert read[0] and read[1] and not read[0] & read[1]


def test_an_image_is_named_while_the_reading_thread_reads(prepared: Path) -> None:
    """As metrics do, of the image that a loss without a number came from: both use one cache."""
    batches = stream(prepared, RankSlice(4, 2), cache_gib=1e-9)
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for step in range(30):
            next(batches)
            for role, position in product(WEIGHTS, range(step, step + 4)):
                assert batches.source(role, position)
    finally:
        sys.setswitchinterval(often)
        batches.close()


def test_the_reading_thread_ends(prepared: Path) -> None:
    batches = stream(prepared, RankSlice(4, 1))
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t is batches.thread]


def test_draws_do_not_depend_on_the_default_dtype() -> None:
    """Libraries change it for all threads while they load a model, and a thread draws ahead meanwhile."""
    draws = rng.sample_noise(0, "instance", 3, (4, 8, 8), 0.1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        others = rng.sample_noise(0, "instance", 3, (4, 8, 8), 0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(draws, others, strict=True))
    assert {draw.dtype for draw in others} == {torch.float32}


def test_some_rows_lose_their_prompt_by_their_position(make: Make, tmp_path: Path, prepared: Path) -> None:
    """On any ranks and micro-batches. `prepare` adds the empty prompt to shards that lack it, and no more."""
    folder = Path(shutil.copytree(prepared, tmp_path / "shards"))
    cfg = make(data__prompt_dropout=0.25)
    with pytest.raises(ConfigError, match=r"is 0\.25, but .* without the empty prompt; rerun: dbtrain"):
        Inputs.find(cfg)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    prepare(cfg)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert Inputs.find(make()).manifest.prompts.texts[2:] == ("",)  # which needs none of it

    def prompts(share: float, ranks: int, micro_batch: int) -> dict[tuple[int, float], int]:
        """(role, position) -> prompt, over 100 steps."""
        found = {}
        for rank in range(ranks):
            slots = RankSlice(4, micro_batch, rank, ranks)
            rows = LatentStream(at(folder), Manifest.read(at(folder)), slots, {"instance": 1.0, "class": 1.0},
                                seed=3, prompt_dropout=share)  # fmt: skip
            for step, micro in product(range(100), range(slots.micro_batches)):
                batch = rows.micro_batch(step, micro)
                assert batch.prompt.tolist() == list(batch.prompts)
                places = batch.position.tolist()
                for number, (place, prompt) in enumerate(zip(places, batch.prompts, strict=True)):
                    found[number // micro_batch, place] = prompt
            rows.close()
        return found

    one, two, none = prompts(0.25, 1, 4), prompts(0.25, 2, 1), prompts(0.0, 1, 4)
    assert one == two
    for role in (0, 1):
        mine = [prompt for (its, _), prompt in one.items() if its == role]
        assert 0.17 < mine.count(2) / len(mine) < 0.33 and set(mine) == {role, 2}
    assert all(prompt in (none[row], 2) for row, prompt in one.items()) and 2 not in none.values()
