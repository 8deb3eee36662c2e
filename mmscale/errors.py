"""Every error a user can meet. One leaf per kind of failure; the command line maps the kind to an exit code.

A message has four parts: what was expected, what was found (with its unit), where, and what to do.
"""


class MmscaleError(Exception):
    """Base of all errors that mmscale raises on purpose; the command line prints its text without a traceback."""

    exit_code = 1


class ConfigError(MmscaleError):
    """A configuration, command line or environment that cannot work; refused before any training (exit code 2)."""

    exit_code = 2


class DataError(MmscaleError):
    """Shards, indexes or samples that are damaged, changed, missing, or bad beyond the allowed rate (exit code 1)."""


class RefusedInputError(DataError):
    """Input data that is refused before any work starts, such as a missing file or a duplicate shard (exit code 2)."""

    exit_code = 2


class ParallelError(MmscaleError):
    """A process group or parallel layout that cannot work, or ranks that disagree (exit code 1)."""


class CheckpointError(MmscaleError):
    """A checkpoint that is incomplete, damaged or does not fit the model (exit code 2: never restart from zero)."""

    exit_code = 2


class SaveError(CheckpointError):
    """A checkpoint that the disk refuses: full, read-only, over quota (exit code 1); the ones before it are untouched."""

    exit_code = 1


class MissingExtraError(ConfigError):
    """An optional package is needed and not installed; the text names the extra to install."""

    def __init__(self, package: str, extra: str, needed_for: str, cause: BaseException | None = None) -> None:
        found = f"import failed with {type(cause).__name__}: {cause}" if cause is not None else "it is not installed"
        super().__init__(
            f"{needed_for} needs the package '{package}', but {found}; run: pip install 'mmscale[{extra}]'"
        )


class DivergedError(MmscaleError):
    """Training whose loss or gradient is not finite any more (exit code 1); the last good checkpoint stays the newest."""


class FencedError(MmscaleError):
    """A newer attempt owns the run directory (exit code 1); this one has stopped without writing anything more."""


class BadSampleError(DataError):
    """One sample that cannot be used. Caught where samples are counted; never stops a run by itself.

    `reason` is a short fixed word by which skips are counted (`decode_image`, `media_count`, ...); `detail` says what was
    found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)
