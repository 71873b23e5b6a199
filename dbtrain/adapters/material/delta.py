"""What an adapter adds to the weight of one layer, as a product of two factors, whatever its kind.

LoHa and LoKr are such products too: those of their factors (Khatri-Rao, Kronecker). All of it is exact, in
fp64, and costs as much as the rank: the factors' QR leaves an SVD of rank by rank, as the product's own is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from peft.tuners.lokr.layer import make_weight_cp as kronecker_cp
from torch import Tensor

from dbtrain.runtime.errors import ConfigError


@dataclass(frozen=True)
class Delta:
    """The change `up @ down` of a layer's weight, (out, in) or, of a convolution, (out, in, h, w)."""

    up: Tensor  # (out, rank) fp64
    down: Tensor  # (rank, in * h * w) fp64
    tail: tuple[int, ...] | None  # (in,) or (in, h, w); None if the factors do not say

    @classmethod
    def of(cls, change: Tensor) -> Delta:
        """The change of a weight, (out, in) or (out, in, h, w), with as many ranks as it can have."""
        flat = change.double().flatten(1)
        eye = torch.eye(min(flat.shape), dtype=torch.float64)
        up, down = (eye, flat) if flat.shape[0] <= flat.shape[1] else (flat, eye)
        return cls(up, down, tuple(change.shape[1:]))

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def whole(self) -> Tensor:
        """The change itself, shaped like the weight if the factors say how, fp64."""
        return (self.up @ self.down).reshape(len(self.up), *(self.tail or (-1,)))

    def __mul__(self, weight: float) -> Delta:
        return Delta(self.up * weight, self.down, self.tail)

    def __add__(self, other: Delta) -> Delta:
        """The sum, with the ranks of both. Raises ConfigError if it is of layers of different sizes."""
        if self._size != other._size:
            raise ConfigError(f"its weight is {self._size} in one file and {other._size} in another")
        up, down = torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down])
        return Delta(up, down, self.tail or other.tail)

    def __sub__(self, other: Delta) -> Delta:
        return self + other * -1.0

    @property
    def _size(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(left (out, k) and right (in, k) with orthonormal columns, the core between them (k, k))."""
        left, upper = torch.linalg.qr(self.up)
        right, lower = torch.linalg.qr(self.down.T)
        return left, right, upper @ lower.T

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(self._factors[2], full_matrices=False)

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return self._factors[2].norm().item()

    @property
    def singular(self) -> Tensor:
        """The singular values, largest first, as many as the rank allows."""
        return self._svd[1]

    def dot(self, other: Delta) -> float:
        """The sum of the products of the elements of two changes."""
        return ((self.up.T @ other.up) * (self.down @ other.down.T)).sum().item()

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps this share, in (0, 1], of the squared norm; at least 1."""
        kept = self.singular.square().cumsum(0)
        return min(int((kept < energy * kept[-1]).sum()) + 1, len(kept))

    def resized(self, rank: int) -> Delta:
        """The nearest change of at most this rank: Eckart and Young 1936."""
        left, right, _ = self._factors
        u, s, vh = self._svd
        root = s[:rank].sqrt()
        return Delta((left @ u[:, :rank]) * root, (right @ vh[:rank].T * root).T, self.tail)

    def error(self, rank: int) -> float:
        """The norm of what `resized` leaves out."""
        return self.singular[rank:].norm().item()


def delta_of(layer: Mapping[str, Tensor], scale: float) -> Delta:
    """The change that the tensors of a layer make; the tail of a LoHa's or LoKr's may be missing."""
    its = {name: tensor.double() for name, tensor in layer.items()}
    if "lora_A.weight" in its:
        down = its["lora_A.weight"]
        return Delta(its["lora_B.weight"].flatten(1) * scale, down.flatten(1), tuple(down.shape[1:]))
    if "hada_t1" in its:
        names = ("hada_t1", "hada_w1_a", "hada_w1_b"), ("hada_t2", "hada_w2_a", "hada_w2_b")
        one, two = (_cp(*(its[name] for name in three)) for three in names)
        return Delta.of(one * two) * scale
    if "hada_w1_a" in its:
        up = _columns(its["hada_w1_a"], its["hada_w2_a"])
        down = _columns(its["hada_w1_b"].T, its["hada_w2_b"].T).T
        return _narrowed(Delta(up * scale, down, None))
    if "lokr_t2" in its:
        its["lokr_w2"] = kronecker_cp(its["lokr_t2"], its["lokr_w2_a"], its["lokr_w2_b"])
    (up, down), (its_up, its_down) = _pair(its, "lokr_w1"), _pair(its, "lokr_w2")
    found = _narrowed(Delta(torch.kron(up, its_up) * scale, torch.kron(down, its_down), None))
    kernel = its["lokr_w2"].shape[2:] if "lokr_w2" in its else ()
    inputs = found.down.shape[1] // math.prod(kernel)
    return replace(found, tail=(inputs, *kernel) if kernel else None)


def _cp(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """LoHa's factor with a CP decomposition, (out, in, h, w)."""
    return torch.einsum("ijkl, jr, ip -> prkl", core, b, a)


def _columns(one: Tensor, two: Tensor) -> Tensor:
    """The products of each column of one (n, r) with each of the other (n, s): (n, r * s)."""
    return (one[:, :, None] * two[:, None, :]).flatten(1)


def _pair(its: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A factor of LoKr as a product (out, k) x (k, in)."""
    if name not in its:
        return its[f"{name}_a"], its[f"{name}_b"].flatten(1)
    found = Delta.of(its[name])
    return found.up, found.down


def _narrowed(delta: Delta) -> Delta:
    """The same change with no more ranks than its weight has rows or columns."""
    rows, columns = delta.up.shape[0], delta.down.shape[1]
    return delta if delta.rank <= min(rows, columns) else Delta.of(delta.up @ delta.down)


def total(parts: Sequence[tuple[float, Delta]]) -> Delta:
    """The weighted sum, with as many ranks as its parts together, or as the weight can have."""
    found = parts[0][1] * parts[0][0]
    for weight, delta in parts[1:]:
        found += delta * weight
    rows, columns = found.up.shape[0], found.down.shape[1]
    return found if found.rank <= min(rows, columns) else found.resized(min(rows, columns))
