"""What `mmscale-data build --from` understands; by itself, so that the command line need not load the readers."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What a data set can be built from."""

    llava = "llava"
    sharegpt = "sharegpt"
    openai = "openai"
    jsonl = "jsonl"
    parquet = "parquet"
    folder = "folder"
    webdataset = "webdataset"
    img2dataset = "img2dataset"
    wids = "wids"
    sam = "sam"
    coyo_pkl = "coyo-pkl"
    mmc4_pkl = "mmc4-pkl"


class Placement(StrEnum):
    """Where media tags in user turns end up: as the row has them, or in front of their turn as LLaVA's own code does."""

    keep = "keep"
    front = "front"


HELP = (
    "llava, sharegpt, openai, jsonl, parquet: rows in .json, .jsonl or .parquet files. folder: media with captions. "
    "webdataset: .tar, .tar.gz or .tar.zst. img2dataset, wids, sam: folders of tars. coyo-pkl, mmc4-pkl: pickles."
)
