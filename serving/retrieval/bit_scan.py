"""Shortlists by bits: each item is the signs of its rotated vector, and a float query is multiplied with all signs.

The products come from faiss' fast scan: a product quantizer of four dimensions a part, whose 16 centroids are the 16
patterns of signs, holds a bit code as it is. Sixteen sums are looked up by one instruction. faiss rounds the sums to a
byte, so the scan orders a shortlist and never an answer: stored rows put the shortlist in order.

Its slow twin is `features.content.bits.asymmetric`. Shape letters: N items, D dim, B bits, W = B / 8 bytes, S items
with a vector, M matches, R shortlist, k neighbours.
"""

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from features.content.bits import BitCode
from models.encoder.bits import fit_itq, index_bits
from models.table.column_rows import Growable
from serving.retrieval.matches import NEIGHBOURS, RECALL, SHARES, FilterTrial, Matches
from serving.retrieval.rows import Floats, Ints, StoredVectors

# The library's types lack the methods that its Python layer adds.
faiss: Any = untyped_faiss
Codes = NDArray[np.uint8]
_FITTED = 5_000  # vectors that the rotation is fitted on
_BLOCK = 32  # codes that faiss stores together
_MOST_LISTED = 64 * NEIGHBOURS
_AT_ONCE = 10_000
_SPACE = "index"  # an index holds vectors of one space, and refuses others before they come here
# Patterns of four signs: value c has the sign of bit t at dimension t.
_PATTERNS = np.where(np.arange(16)[:, None] >> np.arange(4) & 1, 1.0, -1.0).astype(np.float32)


class PackedCodes:
    """Codes by position, in the order of bytes that the scan reads.

    Args:
        codes: (S, W) uint8.
        space: Positions to keep space for; at least S.
    """

    def __init__(self, codes: Codes, space: int = 0) -> None:
        self._width = int(codes.shape[1])
        self._space = -(-max(space, len(codes), 1) // _BLOCK) * _BLOCK
        padded = np.zeros((self._space, self._width), dtype=np.uint8)
        padded[: len(codes)] = codes
        self._index = self._pack(padded)
        self.resize(len(codes))

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the space behind them."""
        return self._space * self._width

    @property
    def space(self) -> int:
        """Positions that have space."""
        return self._space

    def resize(self, count: int) -> None:
        """Sets the number of positions that are scanned."""
        self._index.ntotal, self._index.ntotal2 = count, -(-count // _BLOCK) * _BLOCK

    def write(self, blocks: Ints, codes: Codes) -> None:
        """Writes blocks (T,) of 32 codes each, (32 T, W)."""
        # The arrays are the memory of these indexes, which must outlive them.
        fresh = self._pack(codes)
        _bytes(self._index).reshape(-1, _BLOCK * self._width)[blocks] = _bytes(fresh).reshape(len(blocks), -1)

    def stored(self) -> Codes:
        """Returns a copy of the bytes that the scan reads."""
        return _bytes(self._index).copy()

    def best(self, queries: Floats, count: int) -> tuple[Ints, Floats]:
        """Returns the positions (Q, R) of the codes with the largest products, best first, and the products.

        Args:
            queries: (Q, B) projected queries.
            count: R, at most the positions that are scanned.

        The scan leaves out codes whose rounded product is the least possible; their places, the last, hold -1.
        """
        # A byte holds its first bit highest, and faiss numbers dimensions from the lowest bit.
        turned = np.ascontiguousarray(queries.reshape(len(queries), -1, 8)[:, :, ::-1]).reshape(queries.shape)
        products, positions = self._index.search(turned, count)
        return positions, products

    def _pack(self, codes: Codes) -> Any:
        parts = 2 * self._width
        plain = faiss.IndexPQ(8 * self._width, parts, 4, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(np.tile(_PATTERNS, (parts, 1)).ravel(), plain.pq.centroids)
        plain.is_trained = True
        faiss.copy_array_to_vector(np.ascontiguousarray(codes).ravel(), plain.codes)
        plain.ntotal = len(codes)
        return faiss.IndexPQFastScan(plain, _BLOCK)


class BitScan:
    """Bit codes of the items that have a vector, by number, and the shortlists that give the recall.

    Args:
        rows: Vectors by number. A code is that of the stored row, so codes can always be made again from the rows.
        numbers: (S,) numbers with a vector, ascending.
        seed: Decides the sample and the first rotation of the fit.
        code: Fitted code; None: fits one to the rows.
    """

    def __init__(self, rows: StoredVectors, numbers: Ints, *, seed: int = 0, code: BitCode | None = None) -> None:
        self.code = code or _fitted(rows, numbers, seed)
        self._centre, self._turn = self.code.centre, self.code.turn.tensors["matrix"].astype(np.float32)
        self._rows = rows
        self._codes: Growable[np.uint8] = Growable(np.zeros((len(rows), self.code.bits // 8), dtype=np.uint8))
        for start in range(0, len(numbers), _AT_ONCE):
            self._encode(numbers[start : start + _AT_ONCE])
        # Number of each position, and position of each number; -1 for a number without a vector.
        self._numbers: Growable[np.int32] = Growable(numbers.astype(np.int32))
        self._count = len(numbers)
        self._positions: Growable[np.int32] = Growable(np.full(len(rows), -1, dtype=np.int32))
        self._positions.array[numbers] = np.arange(len(numbers))
        self._packed = PackedCodes(self._codes.array[numbers])
        # Packed codes of the filters that were used last.
        self._parts: OrderedDict[Matches, PackedCodes] = OrderedDict()
        # Searches of filters whose codes are not packed.
        self._asked: WeakKeyDictionary[Matches, int] = WeakKeyDictionary()
        self._shortlists: dict[float, float] = {}
        self._lengths: dict[float, float] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, packed codes, numbers and positions."""
        parts = sum(packed.nbytes for packed in self._parts.values())
        small = self._codes.array.nbytes + self._positions.array.nbytes + 4 * self._count
        return small + self._packed.nbytes + parts

    def codes(self, numbers: Ints) -> Codes:
        """Returns the codes (M, W) of numbers that have a vector."""
        return self._codes.array[numbers]

    def put(self, numbers: Ints, present: NDArray[np.bool_]) -> None:
        """Codes the stored rows of distinct numbers (M,); `present` (M,) is False if a number lost its vector."""
        missing = len(self._rows) - len(self._positions.array)
        if missing > 0:
            self._positions.extend(np.full(missing, -1, dtype=np.int32))
            self._codes.extend(np.zeros((missing, self._codes.array.shape[1]), dtype=np.uint8))
        self._encode(numbers[present])
        touched = np.concatenate([self._remove(numbers[~present]), self._add(numbers[present])])
        self._parts.clear()
        self._write(touched)

    def shortlist(self, query: Floats, count: int, matches: Matches | None = None) -> tuple[Ints, Floats]:
        """Returns the numbers (≤ R,) with the largest products of a query (D,), of `matches` or of all, best first.

        The products are those of the query with the signs, as the scan rounds them.
        """
        numbers: NDArray[Any] = self._numbers.array[: self._count] if matches is None else matches.numbers
        if not len(numbers):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        packed = self._packed if matches is None else self._part(matches)
        positions, products = packed.best((query @ self._turn)[None], min(count, len(numbers)))
        found = positions[0] >= 0
        return numbers[positions[0][found]].astype(np.int64), products[0][found]

    def unpacked(self, matches: Matches) -> float:
        """Returns the share of the cost of packing that a search among these matches has to bear.

        The more often a filter comes, the less each search bears, so that a filter that stays is packed once.
        """
        if matches in self._parts:
            return 0.0
        self._asked[matches] = times = self._asked.get(matches, 0) + 1
        return 1.0 / times

    def measure(self, trial: FilterTrial) -> None:
        """Measures the shortlist that keeps the recall if a share of the items matches."""
        self._shortlists[trial.share] = self._needed(trial)

    def needed(self, share: float, k: int) -> float:
        """Returns the shortlist R that keeps the recall of k neighbours if such a share matches; infinite if none does.

        k neighbours of more than 50 need a shortlist that is longer by as much.
        """
        if (length := self._lengths.get(share)) is None:
            if len(self._lengths) > 1_000:
                self._lengths.clear()
            length = self._lengths[share] = self._interpolated(share)
        return float(np.ceil(length * max(1.0, k / NEIGHBOURS)))

    def _interpolated(self, share: float) -> float:
        lengths = np.array([self._shortlists[measured] for measured in SHARES[::-1]])
        if not np.isfinite(lengths[SHARES[::-1].index(min(one for one in SHARES if one >= min(share, 1.0)))]):
            return float("inf")
        usable, shares = np.isfinite(lengths), np.log(np.array(SHARES[::-1]))
        return float(np.exp(np.interp(np.log(max(share, SHARES[-1])), shares[usable], np.log(lengths[usable]))))

    def _needed(self, trial: FilterTrial) -> float:
        wanted = trial.truth.shape[1]
        if not wanted:
            return 1.0
        numbers = trial.matches.numbers
        listed = min(_MOST_LISTED, len(numbers))
        packed = PackedCodes(self._codes.array[numbers])
        positions, _ = packed.best(trial.queries @ self._turn, listed)
        ranks = np.full(trial.truth.shape, np.inf)
        orders = np.where(positions < 0, -1, numbers[positions])
        for row, (order, truth) in enumerate(zip(orders, trial.truth, strict=True)):
            # The query finds itself first, and it is not asked for.
            order = order[order != trial.excluded[row]]
            sorter = np.argsort(order, kind="stable")
            place = np.minimum(np.searchsorted(order, truth, sorter=sorter), len(order) - 1)
            ranks[row] = np.where(order[sorter[place]] == truth, sorter[place] + 1.0, np.inf)
        return float(max(np.quantile(ranks, RECALL, method="inverted_cdf"), wanted))

    def _encode(self, numbers: Ints) -> None:
        if len(numbers):
            self._codes.array[numbers] = self.code.code(self._rows.take(numbers), space=_SPACE)

    def _add(self, numbers: Ints) -> Ints:
        """Gives positions to numbers without one. Returns the positions of all numbers."""
        new = numbers[self._positions.array[numbers] < 0]
        positions = np.arange(self._count, self._count + len(new))
        spare = len(self._numbers.array) - self._count
        self._numbers.extend(np.zeros(max(0, len(new) - spare), dtype=np.int32))
        self._numbers.array[positions] = new
        self._positions.array[new] = positions
        self._count += len(new)
        found: Ints = self._positions.array[numbers].astype(np.int64)
        return found

    def _remove(self, numbers: Ints) -> Ints:
        """Moves the last positions into those of removed numbers. Returns the positions that were written."""
        gone = self._positions.array[numbers]
        gone = gone[gone >= 0]
        self._positions.array[numbers] = -1
        self._count -= len(gone)
        holes = gone[gone < self._count].astype(np.int64)
        behind = self._numbers.array[self._count : self._count + len(gone)]
        moved = behind[self._positions.array[behind] >= 0]
        self._numbers.array[holes] = moved
        self._positions.array[moved] = holes
        return holes

    def _write(self, positions: Ints) -> None:
        """Packs the blocks of changed positions again."""
        if self._count > self._packed.space:
            self._packed = PackedCodes(self._codes.array[self._numbers.array[: self._count]], self._count * 5 // 4)
            return
        self._packed.resize(self._count)
        blocks = np.unique(positions[positions < self._count] // _BLOCK)
        if len(blocks):
            rows = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
            inside = np.minimum(rows, self._count - 1)
            self._packed.write(blocks, self._codes.array[self._numbers.array[inside]])

    def _part(self, matches: Matches) -> PackedCodes:
        """Returns the packed codes of matches. Those of the filters used last are kept, in the bytes of all codes."""
        if matches in self._parts:
            self._parts.move_to_end(matches)
            return self._parts[matches]
        packed = PackedCodes(self._codes.array.take(matches.numbers, axis=0))
        self._parts[matches] = packed
        while len(self._parts) > 1 and sum(one.nbytes for one in self._parts.values()) > self._packed.nbytes:
            self._parts.popitem(last=False)
        return packed


def _bytes(index: Any) -> Codes:
    """Returns the memory of an index's codes. It is valid while the index lives."""
    memory: Codes = faiss.rev_swig_ptr(index.codes.get(), index.codes.size())
    return memory


def _fitted(rows: StoredVectors, numbers: Ints, seed: int) -> BitCode:
    sample = numbers
    if len(numbers) > _FITTED:
        sample = np.sort(np.random.default_rng([seed, 29]).choice(numbers, _FITTED, replace=False))
    return fit_itq(rows.take(sample), index_bits(rows.width), space=_SPACE, seed=seed)
