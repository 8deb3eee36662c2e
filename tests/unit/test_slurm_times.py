from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.cluster.times import check_lead, format_time, parse_time
from mmscale.errors import ConfigError

MINUTE, HOUR, DAY = 60, 3600, 86400


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1", MINUTE),
        ("90", 90 * MINUTE),
        ("5:30", 5 * MINUTE + 30),
        ("90:00", 90 * MINUTE),
        ("0:05:00", 5 * MINUTE),
        ("48:00:00", 48 * HOUR),
        ("1-0", DAY),
        ("2-12", 2 * DAY + 12 * HOUR),
        ("1-06:30", DAY + 6 * HOUR + 30 * MINUTE),
        ("1-00:00:01", DAY + 1),
        ("0-0:30", 30 * MINUTE),
        (" 7 ", 7 * MINUTE),
        ("UNLIMITED", None),
        ("infinite", None),
        ("0", None),
    ],
)
def test_every_form(text: str, seconds: int | None) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "x", "1:2:3:4", "-5", "1-", "1-2-3", "1:", ":30", "1.5", "2h", "1-0:0:0:0", "1 2", "١"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a time as SLURM writes it"):
        parse_time(text)


@given(st.one_of(st.none(), st.integers(1, 400 * DAY)))
def test_round_trip(seconds: int | None) -> None:
    assert parse_time(format_time(seconds)) == seconds


def test_a_limit_must_be_longer_than_the_lead() -> None:
    check_lead(121, 120, "--time")
    check_lead(None, 120, "--time")
    with pytest.raises(ConfigError, match=r"longer than the 120 s .* found 120 s in --time"):
        check_lead(120, 120, "--time")
