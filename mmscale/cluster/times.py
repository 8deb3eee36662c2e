"""Times as SLURM writes them, to seconds and back."""

from __future__ import annotations

import re

from mmscale.errors import ConfigError

UNLIMITED = ("UNLIMITED", "INFINITE")
FORMS = "M, M:S, H:M:S, D-H, D-H:M, D-H:M:S or UNLIMITED"
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


def parse_time(text: str) -> int | None:
    """Seconds in a time limit of SLURM; None = no limit, which SLURM also writes as 0.

    A number alone is minutes, two are minutes and seconds; behind days the first one is hours.

    Raises ConfigError for a text that is no such time.

    Example:
        >>> parse_time("90"), parse_time("48:00:00"), parse_time("2-12"), parse_time("UNLIMITED")
        (5400, 172800, 216000, None)
    """
    if text.strip().upper() in UNLIMITED:
        return None
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"expected a time as SLURM writes it ({FORMS}), found {text!r}; write for example 2-00:00:00")
    days, *clock = (int(part or 0) for part in match.groups())
    starts_with_hours = match[1] is not None or match[4] is not None
    hours, minutes, seconds = clock if starts_with_hours else (0, *clock[:2])
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return total or None


def format_time(seconds: int | None) -> str:
    """The time limit as SLURM prints it; None = no limit.

    Example:
        >>> format_time(5400), format_time(216000), format_time(None)
        ('01:30:00', '2-12:00:00', 'UNLIMITED')
    """
    if seconds is None:
        return UNLIMITED[0]
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}-{clock}" if days else clock


def check_lead(limit_s: float | None, lead_s: float, where: str) -> None:
    """Refuses a job that would be asked to save as soon as it starts. Raises ConfigError.

    Args:
        limit_s: the job's time limit in seconds; None = no limit.
        lead_s: seconds before its end at which the job is asked to save.
        where: where the limit was written, for the error.
    """
    if limit_s is not None and limit_s <= lead_s:
        raise ConfigError(
            f"expected a time limit longer than the {lead_s:g} s before its end at which the job is asked to save, found "
            f"{limit_s:g} s in {where}; give the job more time, or a shorter lead (LEAD_S in site.env or --lead)"
        )
