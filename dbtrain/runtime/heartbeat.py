"""Heartbeats: each rank reports its step to a shared store, so that the others can name a rank that died."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PERIOD_S = 1.0
PATIENCE_S = 3.5 * PERIOD_S  # a rank without a beat for this long is gone
LONG_S = 60 * PERIOD_S  # the same for one that works for itself, on a machine that may be overloaded
GAVE_UP = "gave up on another"  # reported by a rank that is not the cause


class Sign(NamedTuple):
    """The last report of a rank."""

    beats: int
    step: int  # 0 before the first step
    end: str  # how it ended; empty while it runs


class Heartbeat:
    """Reports once per period from its own thread, also while the rank computes or waits.

    `store` has `set(key, text)`, `multi_get(keys)` and `add(key, number)`. All raise once its host is gone.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store = store
        self.rank, self.world = rank, world
        self.step = 0
        self.beats = self.barriers = 0
        self.closed = threading.Event()
        self._beat()
        self.thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self.thread.start()

    def _beat(self, end: str = "") -> None:
        self.beats += 1
        self.store.set(str(self.rank), json.dumps(Sign(self.beats, self.step, end)))

    def _run(self) -> None:
        while not self.closed.wait(PERIOD_S):
            try:
                self._beat()
            except Exception:  # the store's host is gone, as `absent` will find out
                return

    def close(self, end: str) -> None:
        """Report to the other ranks how this one ends."""
        self.closed.set()
        self.thread.join(PERIOD_S)  # so that no beat follows this report
        with contextlib.suppress(Exception):  # the store's host is gone
            self._beat(end)

    def barrier(self) -> None:
        """Wait until every rank has called this as often, however long that takes.

        Raises RuntimeError once one of them is gone.
        """
        self.barriers += 1
        name = f"barrier {self.barriers}"
        self.store.add(name, 1)
        seen, since = self._everyone(), time.monotonic()
        while self.store.add(name, 0) < self.world:
            time.sleep(PERIOD_S / 10)
            if time.monotonic() > since + LONG_S:
                now = self._everyone()
                if any(now[rank].beats == sign.beats for rank, sign in seen.items() if rank != self.rank):
                    raise RuntimeError("timed out: a rank is gone")
                seen, since = now, time.monotonic()

    def absent(self, sleep: Callable[[float], None] = time.sleep) -> tuple[str, bool]:
        """A phrase that names the rank that is gone or stuck, and whether that rank reported its own end.

        Takes a few seconds, to see which ranks still beat.
        """
        try:
            before = self._everyone()
            sleep(PATIENCE_S)
            after = self._everyone()
        except Exception:  # DistStoreError, DistNetworkError, RuntimeError, ...
            return "rank 0's node is gone, or cut off from this one", False
        others = [rank for rank in after if rank != self.rank and after[rank].end != GAVE_UP]
        ended = [rank for rank in others if after[rank].end]
        gone = [rank for rank in others if after[rank].beats == before[rank].beats]
        late = [rank for rank in others if after[rank].step < self.step]
        if ended:
            return f"{_listed(ended, after)} ended with {after[ended[0]].end}", True
        if gone:
            return f"{_listed(gone, after)} is gone", False
        if late:
            return f"{_listed(late, after)} is stuck", False
        return "no rank is gone, but one is stuck, or cut off from another", False

    def _everyone(self) -> dict[int, Sign]:
        texts = self.store.multi_get([str(rank) for rank in range(self.world)])
        return {rank: Sign(*json.loads(text)) for rank, text in enumerate(texts)}


def _listed(ranks: list[int], last: dict[int, Sign]) -> str:
    shown = ", ".join(f"rank {rank} (last heard of at step {last[rank].step})" for rank in ranks[:4])
    return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
