"""Samples answers by a hash of the request's id, and appends their records to the log behind the requests.

All servers and shadows that know a request's id take the same decision, and no decision is stored.
"""

import time
from dataclasses import dataclass

from features.errors import TesseraError
from features.hashing import fingerprint, splitmix64
from serving.metrics import Metrics
from serving.ranking.answer import RankingAnswer
from serving.sink import Sink
from serving.skew.record import encode, record_of
from serving.traffic.recorder import Appender

# A waiting answer holds the vectors of its rows, about 1 MB for 2,000 candidates.
_MOST, _BATCH = 64, 16
_SPACE = 1 << 64


def is_sampled(request: str, rate: float) -> bool:
    """Returns whether a request is in the sample.

    Args:
        request: Id of the request.
        rate: Share of the requests to sample, 0 to 1. A sample of a smaller rate is part of a sample of a larger rate.
    """
    # Mixed again, so that the sample is independent of other uses of the hash.
    return int(splitmix64(fingerprint([request]))[0]) < rate * _SPACE


@dataclass(frozen=True)
class _Answered:
    id: str
    time_ms: int
    answer: RankingAnswer


class SkewSampler:
    """Takes the sampled answers of a server and appends their records to the topic `skew`.

    A request pays for one hash, and a sampled request for a place in a queue. A thread encodes and appends the records.
    While the log is unavailable, 64 answers wait, and further answers are dropped and counted.

    Args:
        sink: Appends to the log.
        metrics: Counts appended and dropped records.
        rate: Share of the requests to sample, above 0 and at most 1.

    Raises:
        TesseraError: The rate is out of range.
    """

    def __init__(self, sink: Sink, metrics: Metrics, rate: float) -> None:
        if not 0 < rate <= 1:
            raise TesseraError(f"rate of the skew sample: {rate:g}, expected more than 0 and at most 1")
        self._rate = rate
        self._appender: Appender[_Answered] = Appender(
            sink, "skew", _message, metrics, counter=metrics.skew_records, most=_MOST, batch=_BATCH
        )

    @property
    def waiting(self) -> int:
        """Number of answers that wait for the log."""
        return self._appender.waiting

    def offer(self, request: str, answer: RankingAnswer) -> None:
        """Queues an answer if its request is sampled. Returns at once.

        Args:
            request: Id of the request.
            answer: The answer. An answer without a candidate has no inputs and is skipped.
        """
        if answer.inputs is not None and is_sampled(request, self._rate):
            self._appender.put(_Answered(request, time.time_ns() // 1_000_000, answer))

    def close(self) -> None:
        """Appends the queued records and ends the thread. If the log is unavailable, they are dropped and counted."""
        self._appender.close()


def _message(answered: _Answered) -> tuple[bytes, bytes]:
    answer = answered.answer
    assert answer.inputs is not None
    record = record_of(
        answer.inputs,
        id=answered.id,
        time_ms=answered.time_ms,
        bundle=answer.bundle,
        retrieved=answer.retrieved,
        known_user=answer.known_user,
        stale=answer.stale,
    )
    return record.id.encode(), encode(record)
