"""Indexes of other projects beside our shards: held against ours where they exist, and written where others want one.

Nothing is read through them: they have no lengths and no digests, so our own scan is always made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.streaming.index import ShardIndex, write_atomic
from mmscale.streaming.manifest import Manifest
from mmscale.streaming.strict_json import JsonFault, parse_json

WIDS_NAME = "wids-meta.json"


def foreign_index_findings(tar: Path, index: ShardIndex) -> list[str]:
    """How another project's index of a shard differs from `index`, one line each; empty when none does or none is there.

    Looks at Energon's `000000.tar.idx` beside the tar, and at `wids-meta.json` in its folder or one above.
    """
    return [*_energon_findings(tar, index), *_wids_findings(tar, index)]


def write_wids(folder: Path, manifest: Manifest) -> Path:
    """Writes the `wids-meta.json` by which VILA and wids read the folder; gives its path. `.tar.zst` shards are left out."""
    shards = [
        {"url": shard.name, "nsamples": shard.samples, "filesize": shard.bytes}
        for shard in manifest.shards
        if shard.name.endswith(".tar")
    ]
    content = {"name": folder.resolve().name, "__kind__": "VILA-WebDataset", "wids_version": 1, "shardlist": shards}
    path = folder / WIDS_NAME
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def _energon_findings(tar: Path, index: ShardIndex) -> list[str]:
    """Energon: u64 offsets, little-endian, of the first header of each sample, then the end of the last."""
    path = tar.with_name(tar.name + ".idx")
    if not path.is_file():
        return []
    data = path.read_bytes()
    if len(data) % 8 or len(data) < 8:
        return [f"{path}: {len(data)} bytes, expected 8 for each sample and 8 more"]
    starts = np.frombuffer(data, "<u8")
    found, expected = len(starts) - 1, len(index) + sum(index.skipped.values())
    findings = []
    if found != expected:
        findings.append(f"{path}: {found} samples, the tar has {expected}; it was made for another version of the tar")
    if len(index):
        # The first member of each of our samples lies in a sample of its own.
        payload = np.minimum.reduceat(index.columns["offset"], index.columns["first"][:-1].astype(np.int64))
        owner = np.searchsorted(starts, payload, side="right") - 1
        outside = (owner < 0) | (owner >= found)
        if outside.any() or len(np.unique(owner)) != len(owner):
            findings.append(f"{path}: its offsets are not those of the samples of {tar.name}")
    return findings


def _wids_findings(tar: Path, index: ShardIndex) -> list[str]:
    for folder in (tar.parent, tar.parent.parent):
        path = folder / WIDS_NAME
        if path.is_file():
            return _wids_differences(path, tar, index)
    return []


def _wids_differences(path: Path, tar: Path, index: ShardIndex) -> list[str]:
    try:
        content = parse_json(path.read_bytes())
    except JsonFault as e:
        return [f"{path}: not strict JSON ({e})"]
    shards = content.get("shardlist") if isinstance(content, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return [f"{path}: no list `shardlist` of objects in it"]
    own = [shard for shard in shards if _is_local(path, shard.get("url"), tar)]
    if not own:
        return [f"{path}: does not list {tar.name}"]
    expected = {"filesize": index.file_size, "nsamples": len(index) + sum(index.skipped.values())}
    return [
        f"{path}: {name} of {tar.name} is {own[0][name]!r}, found {value}"
        for name, value in expected.items()
        if name in own[0] and own[0][name] != value
    ]


def _is_local(path: Path, url: Any, tar: Path) -> bool:
    return isinstance(url, str) and "://" not in url and (path.parent / url).resolve() == tar.resolve()
