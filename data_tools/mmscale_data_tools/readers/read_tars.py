"""Foreign tars: plain WebDataset (also `.tar.gz`, `.tar.zst`), img2dataset's output, folders with a wids index, and SAM.

A tar is scanned whole before its samples are taken, by the same rules as when it is indexed; nothing is unpacked to disk
but a compressed tar, one at a time. Samples keep their keys, unless new ones are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from mmscale.data_tools.readers.captions import TarCaptions, place_name, wids_key
from mmscale.data_tools.readers.decompress import SUFFIXES, plain_tar
from mmscale.data_tools.readers.items import Item, Source, refuse_twice
from mmscale.data_tools.readers.media_refs import is_inside
from mmscale.errors import BadSampleError, DataError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.index import build_index
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.shards import Shard
from mmscale.streaming.strict_json import JsonFault, parse_json
from mmscale.streaming.tar import scan_tar, split_name

log = get_logger(__name__)

WIDS_NAME = "wids-meta.json"
Members = list[tuple[str, bytes]]
_Recaption = Callable[[str, Members], Members]


class _Tar(NamedTuple):
    """A tar, its path relative to the data folder (for sidecars and messages), and its samples as told elsewhere."""

    path: Path
    name: str
    expected: int | None = None
    told_by: str = ""


def read_webdataset(source: Source) -> Iterator[Item]:
    """The samples of tars, or of all tars below folders sorted by path.

    Raises:
        RefusedInputError: a path is missing, or a folder has no tars.
    """
    for tar in [tar for path in source.paths for tar in _tars(path)]:
        yield from tar_items(tar, source)


def read_img2dataset(source: Source) -> Iterator[Item]:
    """The samples of img2dataset's output folders: `00000.tar` with `00000_stats.json`.

    Raises:
        RefusedInputError: a tar without its stats file (not finished; taken with `unfinished`), or with another number of
            samples than the stats file says.
    """
    for tar in [_with_stats(tar, source) for path in source.paths for tar in _tars(path)]:
        yield from tar_items(tar, source)


def read_wids(source: Source) -> Iterator[Item]:
    """The samples of folders with `wids-meta.json` (VILA's and upstream's kinds), in the order of its list.

    Raises:
        RefusedInputError: the list is missing or unusable, names remote shards or files outside the folder, or a tar has
            another size or number of samples than it says.
    """
    for tar in [tar for path in source.paths for tar in _listed_tars(path)]:
        yield from tar_items(tar, source)


def read_sam(source: Source) -> Iterator[Item]:
    """The images of SAM's tars with captions from sidecars; the tars themselves have none.

    Raises:
        RefusedInputError: no caption folder is given.
    """
    if not source.captions:
        raise RefusedInputError(
            "SAM's tars hold no captions, found no --captions; give the folder of caption files (sa_000000.tar.json, ...), "
            "a second --captions for long descriptions"
        )
    yield from read_webdataset(source)


def raw_items(source: Source) -> Iterator[Item]:
    """The samples of tars as they are: their rows are not looked at. Raises like `read_webdataset`."""
    for tar in [tar for path in source.paths for tar in _tars(path)]:
        yield from tar_items(tar, source, raw=True)


def tar_items(tar: _Tar, source: Source, raw: bool = False) -> Iterator[Item]:
    """The samples of one tar, then one skipped item for each that is refused. A damaged tar is one skipped item.

    Raises:
        RefusedInputError: it has another number of samples than was told.
        DataError: it changed while its samples were read.
    """
    plain = tar.path
    with ExitStack() as stack:
        try:
            plain = stack.enter_context(plain_tar(tar.path, source.scratch))
            index = build_index(plain)
        except DataError as e:
            found = str(e).replace(str(plain), str(tar.path))  # not the temporary file
            yield Item({"file": tar.name}, skip=BadSampleError("damaged_shard", found))
            return
        _check_count(tar, len(index) + sum(index.skipped.values()))
        recaption = _recaption(tar, plain, source.captions)
        shard = Shard.at(plain, index)
        stack.callback(shard.close)
        for i in range(len(shard)):
            yield _item(tar, shard, i, recaption, source.rename, raw)
        for reason, count in index.skipped.items():
            skip = BadSampleError(reason, "refused when the tar was scanned")
            yield from [Item({"file": tar.name}, skip=skip)] * count


def _check_count(tar: _Tar, found: int) -> None:
    if tar.expected is not None and found != tar.expected:
        raise RefusedInputError(
            f"{tar.path}: {found} samples, {tar.told_by} says {tar.expected}; the tar is cut off or changed: get it again, or "
            "take it as it is with --from webdataset"
        )


def _item(tar: _Tar, shard: Shard, i: int, recaption: _Recaption, rename: bool, raw: bool) -> Item:
    key = shard.key(i)
    where: dict[str, str | int] = {"file": tar.name, "key": key}
    members = shard.members(i)
    try:
        if not raw:
            members = recaption(key, _with_text(members))
            parse_sample(f"{tar.name}:{key}", members)
    except BadSampleError as skip:
        return Item(where, skip=skip)
    return Item(where, dict(members), key="" if rename else key.removeprefix("./"))


def _with_text(members: Members) -> Members:
    """The members with a `.txt` made of the metadata's `caption` where there is no other text (Panda-70M)."""
    if any(ext == "txt" for ext, _ in members):
        return members
    row = _metadata(members)
    if "conversations" in row or "text" in row or not isinstance(row.get("caption"), str):
        return members
    return [*members, ("txt", row["caption"].encode())]


def _metadata(members: Members) -> Mapping[str, Any]:
    """The `.json` of a sample; empty when there is none that is an object."""
    try:
        row = parse_json(next((data for ext, data in members if ext == "json"), b"{}"))
    except JsonFault:  # `parse_sample` will name it
        return {}
    return row if isinstance(row, dict) else {}


def _recaption(tar: _Tar, plain: Path, folders: Sequence[Path]) -> _Recaption:
    """What gives a sample its caption from the sidecars."""
    if not folders:
        return lambda key, members: members
    sidecar = TarCaptions(folders, tar.name)
    # The number by which wids counts: every key of the tar, also those that are refused.
    numbers = {key: i for i, key in enumerate(dict.fromkeys(split_name(m.name)[0] for m in scan_tar(plain).members))}

    def recaption(key: str, members: Members) -> Members:
        url = _metadata(members).get("url")
        names = [*([url] if isinstance(url, str) else []), wids_key(key), key, place_name(numbers[key])]
        caption = sidecar.caption(names).encode()
        return [*((ext, data) for ext, data in members if ext != "txt"), ("txt", caption)]

    return recaption


def _tars(path: Path) -> list[_Tar]:
    """The tars of one argument: itself, or all below it."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise RefusedInputError(
                f"{path}: expected {', '.join(SUFFIXES)}, found another file; convert it by its own kind"
            )
        return [_Tar(path, path.name)]
    if not path.is_dir():
        raise RefusedInputError(f"{path}: expected a tar or a folder of tars, found none; check the path")
    below = sorted(path.rglob("*"))
    # A link to nothing stays in the list: it ends the run when its turn comes, for its samples must not be lost in silence.
    found = [tar for tar in below if tar.name.endswith(SUFFIXES) and (tar.is_file() or tar.is_symlink())]
    for link in (place for place in below if place.is_symlink() and place.is_dir()):
        log.warning("%s is a link to a folder and is not entered; name that folder too if it belongs to the data", link)
    if not found:
        raise RefusedInputError(f"{path}: expected tars ({', '.join(SUFFIXES)}) below it, found none; check the path")
    return [_Tar(tar, tar.relative_to(path).as_posix()) for tar in found]


def _with_stats(tar: _Tar, source: Source) -> _Tar:
    stats = tar.path.with_name(f"{tar.path.name.partition('.')[0]}_stats.json")
    if not stats.is_file():
        if source.unfinished:
            return tar
        raise RefusedInputError(
            f"{tar.path}: no {stats.name} beside it, img2dataset had not finished this tar; run img2dataset again, or take "
            "what is there with --unfinished"
        )
    try:
        successes = json.loads(stats.read_bytes())["successes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        successes = None
    if not isinstance(successes, int):
        raise RefusedInputError(f"{stats}: expected an object with the number `successes`; restore the file")
    return tar._replace(expected=successes, told_by=stats.name)


def _listed_tars(folder: Path) -> list[_Tar]:
    path = folder / WIDS_NAME if folder.is_dir() else folder
    try:
        content = parse_json(path.read_bytes())
        base = path.parent / content.get("base_path", "")
        shards = content.get("shardlist") or [s for part in content["datasets"] for s in part["shardlist"]]
        listed = [(str(shard["url"]), int(shard["nsamples"]), shard.get("filesize")) for shard in shards]
    except OSError as e:
        raise RefusedInputError(f"{path}: {e.strerror}; give the folder that has {WIDS_NAME}") from None
    except (JsonFault, ValueError, KeyError, TypeError, AttributeError) as e:
        raise RefusedInputError(
            f"{path}: not a usable wids index ({e!r}); write it again, or use --from webdataset"
        ) from None
    tars = [_listed_tar(path, base, *entry) for entry in listed]
    refuse_twice([tar.path for tar in tars])
    return tars


def _listed_tar(path: Path, base: Path, url: str, samples: int, size: object) -> _Tar:
    tar = base / url
    if ":" in url.partition("/")[0] or not tar.name.endswith(SUFFIXES) or not is_inside(tar, path.parent):
        raise RefusedInputError(
            f"{path}: the shard {url!r} is not a tar in this folder; fetch it and list its relative path"
        )
    if not tar.is_file():
        raise RefusedInputError(f"{path}: the shard {url!r} is missing; restore it")
    if isinstance(size, int) and tar.stat().st_size != size:
        raise RefusedInputError(
            f"{tar}: {tar.stat().st_size} bytes, {path.name} says {size}; the tar is cut off or changed: get it again"
        )
    return _Tar(tar, url, samples, path.name)
