"""Vector of one user at a time, as fast as a request needs it. `Towers.user_vectors` is the slow twin.

A server holds the inputs of all published users and the towers' rows. Of the visits it computes the newest state alone:
the last block has one query. The arrays are small, so numpy's calls cost less than torch's.
Shape letters: U users, R rows, D dim, V visits, W width, P width of the other inputs.
"""

import math
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.table.admission import Admission
from models.towers.inputs import tower_inputs
from models.towers.network import GAPS, TowerNetwork
from models.towers.shape import USER
from models.towers.towers import Towers

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_EPS, _ROOT_HALF = np.float32(nn.LayerNorm(1).eps), np.float32(math.sqrt(0.5))


class OneUser:
    """Computes users' vectors, one at a time.

    Args:
        towers: The towers.
        users: (U) published users with `Towers.user_columns`.
        rows: (R, D) rows of the towers' range.
    """

    def __init__(self, towers: Towers, users: pl.DataFrame, rows: Floats) -> None:
        self._towers, self._rows = towers, rows
        self._admission = Admission(towers.sketch, towers.schema.admission)
        self._published = self._inputs(users)
        self._newest = _NewestState(towers.network, towers.width, towers.length)
        rest = towers.network.user.rest
        self._rest: Floats | None = None if rest is None else _array(rest.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the held inputs."""
        return self._published.nbytes

    def vector(self, user: int | str, visited: Floats, times: Ints, now: int) -> Floats:
        """Computes the vector (W,) of a user, of unit length; 0 for a user without visits.

        Args:
            user: Number of a published user, or the id of another one.
            visited: (V, W) vectors of the visited items, oldest first; the newest `Towers.length` are read.
            times: (V,) times of the visits.
            now: Time of the request, in the same unit.
        """
        if not len(visited):
            return np.zeros(self._towers.width, dtype=np.float32)
        newest = slice(-self._towers.length, None)
        clock = np.empty(len(visited[newest]) + 1, dtype=np.int64)
        clock[:-1], clock[-1] = times[newest], now
        found: Floats = self._newest(visited[newest], _buckets(clock[1:] - clock[:-1])) + self._own(user)
        found /= np.float32(max(math.sqrt(found @ found), 1e-12))
        return found

    def _own(self, user: int | str) -> Floats:
        """Returns the part of a user's vector that the visits do not decide, (W,)."""
        if isinstance(user, int):
            own, rest = self._published.parts(user, self._rows)
        else:
            own, rest = self._inputs(pl.DataFrame({"user_id": [user]})).parts(0, self._rows)
        found: Floats = own if self._rest is None else own + self._rest @ rest
        return found

    def _inputs(self, users: pl.DataFrame) -> "_HeldInputs":
        inputs = tower_inputs(self._towers.schema, "user", users, self._admission, start=0)
        columns = [(one.name, one.rows, one.lengths, one.mean) for one in inputs.columns]
        return _HeldInputs(columns, inputs.numbers)


class _HeldInputs:
    """Inputs of U users, read one user at a time.

    Args:
        columns: Of each column its name, rows (n, c), their numbers (U,), and True for their mean.
        numbers: (U, Q) numbers.
    """

    def __init__(self, columns: list[tuple[str, Ints, Ints, bool]], numbers: Floats) -> None:
        self._columns = [
            (name, rows, np.concatenate([[0], np.cumsum(lengths)]), mean) for name, rows, lengths, mean in columns
        ]
        self._numbers = numbers

    @property
    def nbytes(self) -> int:
        """Bytes of rows, ends and numbers."""
        return self._numbers.nbytes + sum(rows.nbytes + ends.nbytes for _, rows, ends, _ in self._columns)

    def parts(self, number: int, table: Floats) -> tuple[Floats, Floats]:
        """Returns the pooled rows of a user's id, (W,), and those of the other columns with the numbers, (P,)."""
        own, rest = np.zeros(0, dtype=np.float32), []
        for name, rows, ends, mean in self._columns:
            values = table[rows[ends[number] : ends[number + 1]]]
            pooled = (values.mean(axis=0) if mean and len(values) else values.sum(axis=0)).reshape(-1)
            if name == USER:
                own = pooled
            else:
                rest.append(pooled)
        return own, np.concatenate([*rest, self._numbers[number]])


class _NewestState:
    """State after the newest visit; `TowerNetwork.states` is the twin that gives all states.

    Args:
        network: Trained dense part.
        width: W.
        length: Largest number of visits.
    """

    def __init__(self, network: TowerNetwork, width: int, length: int) -> None:
        self._scale, self._gaps = np.float32(math.sqrt(width)), _array(network.gaps.weight)
        self._blocks = [_FastBlock(block, length) for block in network.blocks]
        self._weight, self._bias = _array(network.last.weight), _array(network.last.bias)

    def __call__(self, visited: Floats, gaps: Ints) -> Floats:
        """Returns the state (W,) after visits (V, W) with gaps (V,)."""
        found = visited * self._scale + self._gaps[gaps]
        for block in self._blocks[:-1]:
            found = block(found)
        if self._blocks:
            found = self._blocks[-1](found, newest=True)
        state: Floats = _standardised(found[-1:])[0] * self._weight + self._bias
        return state


class _FastBlock:
    """Block of self-attention over one user's visits; `TowerNetwork` has the twin."""

    def __init__(self, block: Any, length: int) -> None:
        with torch.no_grad():
            self._bias = _array(block._bias(length)[0])
        heads, width = len(self._bias), len(block.before.weight)
        # Queries are scaled here, and the half of the GELU is in the last layer.
        scale = torch.ones(3 * width)
        scale[:width] = 1 / math.sqrt(width // heads)
        self._reads = _Affine(block.reads, after=block.before, scale=scale)
        self._writes = _Affine(block.writes)
        self._first, self._second = _Affine(block.inner[0], after=block.between), _Affine(block.inner[3], half=True)

    def __call__(self, states: Floats, *, newest: bool = False) -> Floats:
        """Returns the states (V, W) after the block, or the newest one alone, (1, W)."""
        count, width = states.shape
        query, key, value = (
            self._reads(_standardised(states)).reshape(count, 3, len(self._bias), -1).transpose(1, 2, 0, 3)
        )
        bias = self._bias[:, :count, :count]
        if newest:
            query, bias, states = query[:, -1:], bias[:, -1:], states[-1:]
        weights = query @ key.transpose(0, 2, 1)
        weights += bias
        weights -= np.maximum.reduce(weights, axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        sums: Any = np.add.reduce(weights, axis=-1, keepdims=True)
        seen: Floats = (weights @ value) / sums
        states = states + self._writes(seen.transpose(1, 0, 2).reshape(-1, width))
        inner = self._first(_standardised(states))
        inner *= torch.erf(torch.from_numpy(inner * _ROOT_HALF)).numpy() + 1
        found: Floats = states + self._second(inner)
        return found


class _Affine:
    """Linear layer on rows (V, W), with the weights of the norm before it.

    Args:
        layer: The layer.
        after: Norm before the layer, whose rows arrive standardised; None without one.
        scale: Factors of the outputs; by default 1.
        half: True halves the inputs.
    """

    def __init__(
        self, layer: nn.Linear, *, after: nn.LayerNorm | None = None, scale: Tensor | None = None, half: bool = False
    ) -> None:
        with torch.no_grad():
            weight, bias = layer.weight.double(), layer.bias.double()
            if after is not None:
                weight, bias = weight * after.weight.double(), bias + weight @ after.bias.double()
            if scale is not None:
                weight, bias = weight * scale.double()[:, None], bias * scale.double()
            weight = (weight / 2 if half else weight).T.contiguous()
            self._weight, self._bias = _array(weight.float()), _array(bias.float())

    def __call__(self, rows: Floats) -> Floats:
        found: Floats = rows @ self._weight
        found += self._bias
        return found


def _standardised(rows: Floats) -> Floats:
    """Returns rows (V, W) with mean 0 and standard deviation 1."""
    width = rows.shape[1]
    mean: Any = np.add.reduce(rows, axis=1, keepdims=True) / np.float32(width)
    centred: Floats = rows - mean
    variance = np.einsum("ij,ij->i", centred, centred) / np.float32(width)
    centred /= np.sqrt(variance + _EPS)[:, None]
    return centred


def _buckets(gaps: Ints) -> Ints:
    """Returns the buckets (V,) of times (V,) between visits; `gap_buckets` is the twin."""
    exponents: Ints = np.frexp(np.maximum(gaps, 0).astype(np.float64))[1].astype(np.int64)
    return np.minimum(exponents, GAPS - 1)


def _array(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().numpy()
    return found
