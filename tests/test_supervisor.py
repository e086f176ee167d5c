"""Decisions of the supervisor that need no process: pauses."""

from __future__ import annotations

from appliance.supervisor import BACKOFF_MAX_S, backoff_s


def test_the_first_new_life_begins_at_once_and_the_pauses_double_up_to_a_limit() -> None:
    assert [backoff_s(deaths) for deaths in range(1, 6)] == [0, 0.1, 0.2, 0.4, 0.8]
    assert backoff_s(100) == BACKOFF_MAX_S
