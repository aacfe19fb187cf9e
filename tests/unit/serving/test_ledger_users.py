"""A ledger loses the ids of forgotten users, and none of its figures."""

import contextlib
from pathlib import Path

import pytest

from features.lock import locked
from features.shown.message import Impression, Outcome
from features.value.forgotten import Forgotten, ForgottenUsers, hashed
from serving.rollout.experiment import CHALLENGER, CONTROL
from serving.rollout.guardrails import Sums
from serving.rollout.ledger import Ledger
from serving.rollout.ledger_users import hide_in_ledgers
from tests.unit.serving.test_ledger import fold, shown, users

SALT = "ab" * 16
GONE, STAYS = "secret-user", "staying-user"
NAME = hashed(GONE, SALT)
MESSAGES = [
    shown(1, GONE, CONTROL),
    shown(2, GONE, CHALLENGER, ms=9.0),
    shown(3, STAYS, CONTROL, items=["x"], scores=[0.5]),
    Outcome("r1", "x", 2_000),
]


def forgotten(at_ms: int) -> ForgottenUsers:
    return ForgottenUsers([Forgotten(NAME, SALT, 1_000 * at_ms)])


def sums(ledger: Ledger) -> list[Sums]:
    return [tally.sums() for tally in ledger.arms("e@1", 1).values()]


def named(users_: ForgottenUsers, message: Impression) -> Impression:
    """The impression as a judge folds it."""
    return shown(
        int(message.id[1:]), users_.alias(message.user, 1_000 * message.time_ms), message.arms["e@1"], ms=message.ms
    )


def test_ids_leave_the_file_and_no_figure_changes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with contextlib.closing(Ledger(path)) as ledger:
        fold(ledger, MESSAGES).keep({("impressions", 0): 3})
        assert b"secret" in b"".join(file.read_bytes() for file in tmp_path.glob("ledger.sqlite*"))
        before, arms = sums(ledger), users(ledger)
        ledger.hide(forgotten(5_000))
        assert sums(ledger) == before
        assert users(ledger)[CONTROL] == {NAME: arms[CONTROL][GONE], STAYS: arms[CONTROL][STAYS]}
        # An outcome that arrives later counts for the hash.
        ledger.note(Outcome("r2", "x", 3_000))
        ledger.keep({})
        assert users(ledger)[CHALLENGER].keys() == {NAME}
        assert sums(ledger)[1].rate.outcomes == 1
    raw = b"".join(file.read_bytes() for file in tmp_path.glob("ledger.sqlite*"))
    assert b"secret" not in raw
    assert NAME.encode() in raw
    assert STAYS.encode() in raw


def test_a_new_life_is_another_user_until_it_is_forgotten_too() -> None:
    with contextlib.closing(Ledger()) as ledger:
        fold(ledger, MESSAGES).hide(forgotten(5_000))
        fold(
            ledger, [named(forgotten(5_000), shown(4, GONE, CONTROL)), named(forgotten(5_000), shown(6, GONE, CONTROL))]
        )
        # The same request is applied once, so it leaves the new life.
        ledger.hide(forgotten(5_000))
        requests = {user: row[0] for user, row in users(ledger)[CONTROL].items()}
        assert requests == {NAME: 2.0, GONE: 1.0, STAYS: 1.0}
        before = ledger.arms("e@1", 1)[CONTROL].requests
        ledger.hide(forgotten(9_000))
        assert {user: row[0] for user, row in users(ledger)[CONTROL].items()} == {NAME: 3.0, STAYS: 1.0}
        assert ledger.arms("e@1", 1)[CONTROL].requests == before


@pytest.mark.parametrize("held", [False, True], ids=["free", "held by a judge"])
def test_ledgers_without_a_judge_are_changed_and_a_held_one_is_named(tmp_path: Path, held: bool) -> None:
    path = tmp_path / "one.sqlite"
    with contextlib.closing(Ledger(path)) as ledger:
        fold(ledger, MESSAGES).keep({})
    with locked(path, wait_s=0) if held else contextlib.nullcontext():
        assert hide_in_ledgers(tmp_path, forgotten(5_000)) == ((0, [path]) if held else (1, []))
    with contextlib.closing(Ledger(path)) as ledger:
        assert users(ledger)[CHALLENGER].keys() == {GONE if held else NAME}
    assert (b"secret" in path.read_bytes()) == held
