"""Rows of a parquet file, a small batch at a time. The only module that imports pyarrow."""

from __future__ import annotations

import base64
import datetime
import decimal
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from mmscale.data_tools.readers.json_rows import Row
from mmscale.errors import MissingExtraError, RefusedInputError
from mmscale.streaming.rows import MEDIA_FIELDS
from mmscale.streaming.strict_json import JsonFault

BATCH_ROWS = 64
_MEDIA_COLUMNS = frozenset(name for names in MEDIA_FIELDS.values() for name in names) | {"frames"}


def iter_parquet(path: Path) -> Iterator[Row]:
    """The rows of a file in order, as dictionaries. An empty cell (null, or NaN in a column of numbers) is an absent field.

    Dates become ISO text, decimals text, and bytes of columns that hold no media base64 text: what JSON can carry.

    Raises:
        RefusedInputError: no such file, or not parquet.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise MissingExtraError("pyarrow", "parquet", "reading parquet", e) from e
    if not path.is_file():
        raise RefusedInputError(f"{path}: expected a parquet file, found none; check the path")
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
            for number, row in enumerate(row for batch in batches for row in _rows(batch)):
                if isinstance(row, JsonFault):
                    yield Row(number, 0, None, row)
                else:
                    yield Row(number, 0, {k: _plain(k, v) for k, v in row.items() if not _is_empty(v)})
    except (pa.ArrowException, OSError) as e:  # damage is an OSError of the library's too
        raise RefusedInputError(f"{path}: not a readable parquet file ({e}); copy it again") from None


def _rows(batch: Any) -> list[dict[str, Any] | JsonFault]:
    """The rows of a batch, or why one cannot be had: dates beyond Python's, text that is not UTF-8."""
    try:
        return cast("list[dict[str, Any] | JsonFault]", batch.to_pylist())
    except (ValueError, OverflowError) as e:
        if batch.num_rows == 1:
            return [JsonFault("json_fields", f"a cell that cannot be read: {e}")]
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(column: str, value: Any) -> Any:
    """A value that JSON can carry; media columns keep their bytes."""
    if isinstance(value, dict):
        return {k: _plain(column, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(column, v) for v in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if isinstance(value, bytes) and column not in _MEDIA_COLUMNS:
        return base64.b64encode(value).decode()
    return value
