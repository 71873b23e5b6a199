"""The memory that text encoders take in `prepare`, and what it reads of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dbtrain.doctor.case import Case, Finding, ok
from dbtrain.models import encoder_plan
from dbtrain.models.encoder_plan import Room, peak, plans_of, to_read
from dbtrain.runtime import dist
from dbtrain.runtime.memory import GIB, size


def text_encoders(case: Case) -> Iterator[Finding]:
    """What each encoder weighs, and whether it runs whole or layer by layer. Reads no weights.

    Raises ConfigError if a single layer needs more memory than there is.
    """
    base, dtype = case.base, case.base.family.text_dtype
    card = case.gib * GIB if case.gib else None
    if card is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(dist.device()).total_memory
    room = Room.here(case.cfg.prepare.memory_gib if case.cfg.prepare else None, card)
    sizes = encoder_plan.sizes(base, dtype)
    each = ", ".join(f"{name} {size(count)}" for name, count in sizes.items())
    if sum(sizes.values()) <= room.whole:
        yield ok(f"{each}: prepare loads them one at a time, into RAM and then onto the device")
        return
    plans = plans_of(base, dtype)
    yield ok(f"{each}, more than {size(room.whole)}: prepare runs them layer by layer, with "
             f"{size(peak(plans, room.layers))} of weights on the device and hardly any in RAM, and "
             f"reads {size(to_read(plans))} from disk")  # fmt: skip
