"""Video files and AAC sound, as FFmpeg reads and writes them: the one module that imports `av`.

What a file is goes by its content and a short list: FFmpeg's other formats include playlists, which name further files.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from itertools import groupby
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from mmscale.errors import BadSampleError

VIDEO_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "png"))
STILL_CODECS = frozenset(("mjpeg", "png"))
"""Clips whose packets are whole picture files."""

AAC_FORMATS = ("mov", "aac")
"""The containers that sound is read from here: M4A, and bare AAC."""

MAX_FRAMES = 1_000_000
MAX_BYTES = 1 << 32

_MOV_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"))
_DATA_BOXES = frozenset((b"moov", b"moof", b"mdat"))
_MEDIA_BOXES = frozenset((b"mdat", b"free", b"skip", b"wide"))
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
_MAX_BOXES, _MAX_TABLE_BYTES = 10_000, 1 << 28
_AAC_PACKET = 1024
_MAX_AUDIO_S = 1800


class VideoHeader(NamedTuple):
    """Of a clip: pixels as displayed, frames that will be shown, frames per 1000 s (0 = unknown), frames that need no other."""

    width: int
    height: int
    frames: int
    fps_milli: int
    keyframes: int


class _Fact(NamedTuple):
    time: int | None
    is_keyframe: bool


class _Layout(NamedTuple):
    """What the outermost structure of a file says; `turned`: ids of the tracks that are shown lying on their side."""

    format: str
    size: int
    is_fragmented: bool = False
    turned: frozenset[int] = frozenset()


def container_format(head: bytes) -> str | None:
    """FFmpeg's name of the container that starts with `head` (12 bytes): `mov`, `matroska`, `aac`, or None."""
    if head[4:8] in _MOV_BOXES:
        return "mov"
    if head[:4] == _EBML:
        return "matroska"
    is_adts = head[:1] == b"\xff" and head[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9")
    return "aac" if is_adts else None


@contextmanager
def open_video(file: BinaryIO, max_pixels: int = 1 << 28) -> Iterator[VideoFile]:
    """The clip in a seekable file; closed at the end of the block.

    Raises:
        BadSampleError: `decode_video`, from here and from every use of the clip: another kind of file, no picture track, a codec
            that is not decoded here, damaged, or cut off.
    """
    layout = _layout(file, ("mov", "matroska"), "decode_video")
    with _opened(file, layout, "decode_video") as container:
        yield VideoFile(container, layout, max_pixels)


@contextmanager
def _opened(file: BinaryIO, layout: _Layout, reason: str) -> Iterator[av.container.InputContainer]:
    """The container in `file`; whatever FFmpeg refuses inside the block is a BadSampleError with `reason`."""
    file.seek(0)
    try:
        with av.open(file, "r", format=layout.format, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise BadSampleError(reason, f"{layout.size} bytes: {type(error).__name__}: {error.strerror}") from error


def _layout(file: BinaryIO, allowed: Sequence[str], reason: str) -> _Layout:
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(64)
    name = container_format(head)
    if name is None or name not in allowed or size > MAX_BYTES:
        expected = f"a {' or '.join(allowed)} file of at most {MAX_BYTES} bytes"
        raise BadSampleError(reason, f"expected {expected}, found {size} bytes that begin with {head[:12]!r}")
    if name == "matroska" and _segment_end(head) > size:
        raise BadSampleError(reason, f"cut off: {size} bytes of {_segment_end(head)}")
    tables = b"".join(_mov_tables(file, size, reason)) if name == "mov" else b""
    claimed = [struct.unpack_from(">II", tables, m.end()) for m in re.finditer(rb"stsz....(?=.{8})", tables, re.DOTALL)]
    # FFmpeg makes room for all samples that a table names, and would do so for a packed one too
    if any(max(length, 1) * count > size for length, count in claimed) or b"cmov" in tables:
        raise BadSampleError(reason, f"a table of samples that claims more than the file's {size} bytes")
    moov = _boxes(_boxes(tables).get(b"moov", [b""])[0])
    turned = frozenset(track for box in moov.get(b"trak", ()) for track in _turned(_boxes(box).get(b"tkhd", ())))
    return _Layout(name, size, b"mvex" in moov, turned)


def _segment_end(head: bytes) -> int:
    """Where a Matroska file ends by its own words; 0 = it does not say."""
    at = head.find(_SEGMENT) + len(_SEGMENT)
    first = head[at] if len(_SEGMENT) <= at < len(head) else 0
    width = 9 - first.bit_length()  # as many leading zero bits as bytes follow
    value = int.from_bytes(head[at : at + width]) & ((1 << 7 * width) - 1)
    return at + width + value if first and value != (1 << 7 * width) - 1 else 0


def _mov_tables(file: BinaryIO, size: int, reason: str) -> Iterator[bytes]:
    """The outermost boxes of an MP4 or MOV file but for those that hold the media.

    Raises:
        BadSampleError: with `reason`, the file ends inside a box.
    """
    at = 0
    for _ in range(_MAX_BOXES):
        file.seek(at)
        length, kind, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        length = {0: size - at, 1: long_length}.get(length, length)
        if at + length > size and kind in _DATA_BOXES:
            raise BadSampleError(reason, f"cut off: {size} bytes of {at + length}")
        if length < 8:
            break
        if kind not in _MEDIA_BOXES:
            file.seek(at)
            yield file.read(min(length, _MAX_TABLE_BYTES))
        at += length


def _boxes(data: bytes) -> dict[bytes, list[bytes]]:
    """The payloads of the MP4 boxes that stand in `data`, by type."""
    found: dict[bytes, list[bytes]] = {}
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if length < 8:
            break
        found.setdefault(kind, []).append(data[at + 8 : at + length])
        at += length
    return found


def _turned(headers: Sequence[bytes]) -> Iterator[int]:
    """Track ids of the track headers whose matrix turns by a quarter."""
    for header in headers:
        id_at, matrix_at = (20, 52) if header[:1] == b"\1" else (12, 40)
        if len(header) >= matrix_at + 8 and struct.unpack_from(">i", header, matrix_at)[0] == 0:
            yield struct.unpack_from(">I", header, id_at)[0]


class VideoFile:
    """An open clip: the first picture track that is no cover. Its packets can be read once."""

    def __init__(self, container: av.container.InputContainer, layout: _Layout, max_pixels: int) -> None:
        tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not tracks or tracks[0].codec_context is None:
            raise BadSampleError("decode_video", "expected a picture track that can be decoded, found none")
        self._container, self._layout, self._track = container, layout, tracks[0]
        self._decoder = tracks[0].codec_context
        self.codec = self._decoder.codec.canonical_name
        if self.codec not in VIDEO_CODECS:
            raise BadSampleError(
                "decode_video", f"codec {self.codec}, expected one of {', '.join(sorted(VIDEO_CODECS))}"
            )
        self._decoder.thread_count = 1
        # "explode": a damaged frame is an error and not a guess from its neighbours
        self._decoder.options = {"max_pixels": str(max_pixels), "err_detect": "explode"}
        for stream in container.streams:
            if stream.index != self._track.index:
                stream.discard = Discard.all

    def packets(self) -> Iterator[Packet]:
        """The packets of the track in the order of decoding, those included that are decoded but not shown."""
        for number, packet in enumerate(self._container.demux(self._track)):
            if number > MAX_FRAMES:
                raise BadSampleError("video_size", f"more than {MAX_FRAMES} frames")
            if packet.size:
                yield packet

    def header(self, packets: Iterable[Packet]) -> VideoHeader:
        """What is known without decoding.

        A whole MP4 or MOV tells it in its tables; else `packets` (all of the clip) are counted.

        Raises:
            BadSampleError: also when the file is shorter than its container says.
        """
        table = self._table() or [_Fact(p.pts, p.is_keyframe) for p in packets if _is_shown(p)]
        times = [fact.time for fact in table if fact.time is not None]
        width, height = self._track.width, self._track.height
        if self._track.id in self._layout.turned:
            width, height = height, width
        return VideoHeader(width, height, len(table), self._fps_milli(times), sum(fact.is_keyframe for fact in table))

    def _table(self) -> list[_Fact]:
        """The frames by the container's own table; empty when that is not known to name all of them."""
        entries = self._track.index_entries
        is_whole = (
            self._layout.format == "mov" and not self._layout.is_fragmented and len(entries) == self._track.frames
        )
        if not is_whole:  # other containers, fragments, edit lists that leave frames out
            return []
        if any(entry.pos + entry.size > self._layout.size for entry in entries):
            raise BadSampleError(
                "decode_video", f"cut off: the table names frames behind the end at {self._layout.size}"
            )
        return [_Fact(entry.timestamp, entry.is_keyframe) for entry in entries if not entry.is_discard]

    def _fps_milli(self, times: Sequence[int]) -> int:
        """The mean rate by the time stamps."""
        span = (max(times) - min(times)) * (self._track.time_base or 0) if times else 0
        return min(round((len(times) - 1) * 1000 / span), (1 << 32) - 1) if span else 0

    def frames(self, packets: Sequence[Packet], wanted: Sequence[Packet]) -> Iterator[av.VideoFrame]:
        """The decoded frames of the packets `wanted`, some of `display_order(packets)` in that order.

        Only what they need is decoded: from a keyframe on, as far as the wanted frame.

        Raises:
            BadSampleError: also when the decoder does not give a wanted frame, or only its damaged rest.
        """
        shown = display_order(packets)
        times = _times(shown)
        if times is None:
            places = {id(packet): place for place, packet in enumerate(shown)}
            yield from self._decoded(packets, [places[id(packet)] for packet in wanted], by_time=False)
            return
        keyframes = [(p.pts, i) for i, p in enumerate(packets) if p.is_keyframe and p.pts is not None]
        due = [times[id(packet)] for packet in wanted]
        for (first, start), group in groupby(
            due, lambda time: max((k for k in keyframes if k[0] <= time), default=(0, 0))
        ):
            missing = list(group)
            # what is shown before the keyframe may need packets from before it, which are not decoded
            packets_from = [p for p in packets[start:] if not start or p.pts is None or p.pts >= first]
            try:
                for frame in self._decoded(packets_from, tuple(missing)):
                    missing.remove(frame.pts or 0)
                    yield frame
            except av.error.InvalidDataError:
                if not start:
                    raise
                # the keyframe of an "open" group: frames behind it may refer to what came before it
                yield from self._decoded(packets, missing)

    def _decoded(self, packets: Sequence[Packet], due: Sequence[int], by_time: bool = True) -> Iterator[av.VideoFrame]:
        """The frames with the time stamps `due`, or with these places, decoding from the first of `packets` on."""
        self._decoder.flush_buffers()
        place = number = 0
        for packet in (*packets, None):
            for frame in self._decoder.decode(packet):
                if (frame.pts if by_time else place) == due[number] and not frame.is_corrupt:
                    yield frame
                    number += 1
                place += 1
                if number == len(due):
                    return
        raise BadSampleError("decode_video", f"the decoder does not give the whole frame of time stamp {due[number]}")


def display_order(packets: Iterable[Packet]) -> list[Packet]:
    """The packets that become frames on the screen, in the order of display.

    An edit list or the VP8 encoder may hide a packet. Without usable time stamps the order is that of the file.
    """
    shown = [packet for packet in packets if _is_shown(packet)]
    times = _times(shown)
    return shown if times is None else sorted(shown, key=lambda packet: times[id(packet)])


def _times(packets: Sequence[Packet]) -> dict[int, int] | None:
    """The time stamp of each packet by its `id()`; None unless all have one and no two have the same."""
    times = {id(packet): packet.pts for packet in packets if packet.pts is not None}
    return times if len(set(times.values())) == len(packets) else None


def _is_shown(packet: Packet) -> bool:
    is_vp8 = packet.stream.codec_context.name == "vp8"
    return not packet.is_discard and not (is_vp8 and not memoryview(packet)[0] & 0x10)


class RgbConverter:
    """Frames to upright RGB pictures, uint8 [height, width, 3]; one object for the frames of a clip."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """The picture of `frame`, in its own size, turned as it is to be shown."""
        pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def mux_pictures(pictures: Sequence[bytes], codec: str, size: tuple[int, int], fps: Fraction) -> bytes:
    """An MP4 file of whole JPEG (`mjpeg`) or PNG (`png`) files as its frames, unchanged; `size` is (width, height)."""
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_mux_stream(codec, rate=fps, width=size[0], height=size[1])
        for number, picture in enumerate(pictures):
            packet = Packet(picture)
            packet.stream, packet.time_base, packet.is_keyframe = stream, 1 / fps, True
            packet.pts = packet.dts = number
            packet.duration = 1
            container.mux(packet)
    return buffer.getvalue()


def encode_mp4(frames: Iterable[NDArray[np.uint8]], fps: int, size: tuple[int, int]) -> bytes:
    """A small MP4 clip: H.264, or MPEG-4 where FFmpeg is built without x264. `frames` are uint8 [height, width, 3], RGB.

    The same frames give the same bytes with the same build of FFmpeg.
    """
    buffer = BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # with its tree of macroblocks x264 gives small pictures other bytes each time
    options: dict[str, object] = (
        {"x264-params": "mbtree=0:rc-lookahead=0:sync-lookahead=0"} if codec == "libx264" else {}
    )
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=fps, width=size[0], height=size[1], pix_fmt="yuv420p")
        assert isinstance(stream, av.VideoStream), "asked for a video codec"
        stream.codec_context.thread_count, stream.options = 1, options
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", threads=1)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def aac_header(file: BinaryIO) -> tuple[int, int]:
    """(sampling rate in Hz, samples per channel without the encoder's padding) of an AAC or M4A file.

    Plain AAC-LC is counted by its packets; where the decoder may change the rate, the clip is decoded.

    Raises:
        BadSampleError: `decode_audio`, no such file, or damaged.
    """
    layout = _layout(file, AAC_FORMATS, "decode_audio")
    file.seek(0)
    num_blocks = _adts_blocks(file.read()) if layout.format == "aac" else 0
    with _opened(file, layout, "decode_audio") as container:
        track = _aac_track(container)
        rate_hz = track.codec_context.sample_rate
        if track.profile != "LC":
            return rate_hz, sum(frame.samples for frame in _audio_frames(container, track))
        if layout.format == "aac":
            return rate_hz, _AAC_PACKET * num_blocks
        packets = [p for p in container.demux(track) if p.size]
        ticks = sum(packet.duration or 0 for packet in packets)
        return rate_hz, max(0, round(ticks * (track.time_base or 0) * rate_hz) - sum(map(_priming, packets)))


def read_aac(data: bytes) -> tuple[NDArray[np.float32], int]:
    """The clip, float32 [samples], mean over its channels, and its rate in Hz: as many samples as `aac_header` says.

    Raises:
        BadSampleError: `decode_audio`, as `aac_header`, or fewer samples than that.
    """
    rate_hz, num_samples = aac_header(BytesIO(data))
    layout = _layout(BytesIO(data), AAC_FORMATS, "decode_audio")
    with _opened(BytesIO(data), layout, "decode_audio") as container:
        track = _aac_track(container)
        track.codec_context.options = {"err_detect": "explode"}
        blocks = [frame.to_ndarray().mean(axis=0, dtype=np.float32) for frame in _audio_frames(container, track)]
    wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not num_samples <= len(wave) < num_samples + 2 * _AAC_PACKET:
        raise BadSampleError("decode_audio", f"expected {num_samples} samples by the packets, decoded {len(wave)}")
    return wave[:num_samples], rate_hz


def _aac_track(container: av.container.InputContainer) -> av.AudioStream:
    tracks = container.streams.audio
    if not tracks or tracks[0].codec_context is None or tracks[0].codec_context.codec.canonical_name != "aac":
        raise BadSampleError("decode_audio", "expected an AAC track, found none")
    tracks[0].codec_context.thread_count = 1
    return tracks[0]


def _audio_frames(container: av.container.InputContainer, track: av.AudioStream) -> Iterator[av.AudioFrame]:
    """The decoded frames; a clip that is too long ends in an error here and not in a large allocation."""
    num_samples = 0
    for frame in container.decode(track):
        num_samples += frame.samples
        if (
            num_samples > _MAX_AUDIO_S * max(1, frame.sample_rate)
            or frame.sample_rate != track.codec_context.sample_rate
        ):
            raise BadSampleError(
                "audio_size", f"over {_MAX_AUDIO_S} s, or a rate that changes ({frame.sample_rate} Hz)"
            )
        yield frame


def _adts_blocks(data: bytes) -> int:
    """The number of blocks of 1024 samples in a bare AAC file, which must be frame after frame to its end."""
    at = num_blocks = 0
    while at < len(data):
        head = data[at : at + 7]
        length = int.from_bytes(head[3:6]) >> 5 & 0x1FFF
        if container_format(head) != "aac" or length < 7 or at + length > len(data):
            raise BadSampleError(
                "decode_audio", f"expected a whole ADTS frame at byte {at} of {len(data)}, found {head!r}"
            )
        num_blocks += (head[6] & 3) + 1
        at += length
    return num_blocks


def _priming(packet: Packet) -> int:
    """Samples that the container asks to drop at the start and the end of a packet."""
    data = bytes(packet.get_sidedata("skip_samples")) if packet.has_sidedata("skip_samples") else b""
    return sum(struct.unpack_from("<II", data)) if len(data) >= 8 else 0
