"""Clips: exactly the planned frames, whatever the codec and container; damaged, lying and too large ones are refused."""

import io
import itertools
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mmscale.errors import BadSampleError
from mmscale.streaming.containers import encode_mp4, open_video
from mmscale.streaming.decode.image import open_pixels
from mmscale.streaming.decode.resize import to_square
from mmscale.streaming.decode.video import BLACK, decode_video, frame_indices, mux_frames, planned_frames
from mmscale.streaming.media import Lengths, probe
from mmscale.types import ImageSpec, VideoSpec

WIDTH, HEIGHT = 96, 64
IMAGE = ImageSpec(size=64, tokens=4)
PIXELS = 1_000_000


def numbered(number, width=WIDTH, height=HEIGHT):
    """A picture that says its number: eight black or white columns, each 8 pixels wide or more."""
    bits = np.array([255 * (number >> bit & 1) for bit in range(8)], np.uint8)
    return np.broadcast_to(np.repeat(bits, width // 8)[None, :, None], (height, width, 3)).copy()


def number_of(frame):
    """The number in a decoded frame, uint8 [3, height, width]."""
    columns = frame.float().mean((0, 1)).view(8, -1).mean(1) > 127
    return sum(int(bit) << i for i, bit in enumerate(columns))


def clip(frames=30, codec="libx264", container="mp4", gop=10, fps=10, options=None, times=None, rotation=None):
    """A clip of numbered frames; `times`: their time stamps in units of 1 / fps."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps, width=WIDTH, height=HEIGHT)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        stream.options = options or {}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = i if times is None else times[i], Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def remux(data, container="mp4", shift=0, options=None):
    """The same packets in another container, `shift` time stamps later."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container, options=options or {}) as out:
        track = source.streams.video[0]
        stream = out.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                out.mux(packet)
    return buffer.getvalue()


def numbers(data, ext, spec):
    """The numbers of the frames taken, after checking that their count was planned."""
    header = probe(ext, data)
    frames = decode_video(data, spec, IMAGE, PIXELS)
    assert frames.dtype == torch.uint8 and frames.shape == (planned_frames(header, spec), 3, 64, 64)
    return [number_of(frame) for frame in frames]


@pytest.mark.parametrize(
    ("num_frames", "fps_milli", "spec", "expected"),
    [
        (10, 0, VideoSpec(frames=4), [0, 3, 6, 9]),
        (11, 0, VideoSpec(frames=5), [0, 2, 5, 8, 10]),  # 2.5 and 7.5: a half goes to the even one
        (240, 30_000, VideoSpec(frames=8), [0, 34, 68, 102, 137, 171, 205, 239]),
        (3, 0, VideoSpec(frames=8), [0, 1, 2]),
        (100, 0, VideoSpec(frames=1), [0]),
        (100, 25_000, VideoSpec(frames=8, mode="fps", fps=1.0), [0, 25, 50, 75]),
        (100, 25_000, VideoSpec(frames=8, mode="fps", fps=1.5), [0, 16, 33, 50, 66, 83]),
        (60, 29_995, VideoSpec(frames=8, mode="fps", fps=1.0), [0, 29]),  # Matroska rounds times to 1 ms
        (
            100,
            25_000,
            VideoSpec(frames=3, mode="fps", fps=1.0),
            [0, 50, 99],
        ),  # the cap: over the whole clip, not its head
        (4, 10_000, VideoSpec(frames=8, mode="fps", fps=30.0), [0, 1, 2, 3]),
        (5, 10_000, VideoSpec(frames=8, mode="fps", fps=0.1), [0]),
        (5, 0, VideoSpec(frames=3, mode="fps"), [0, 2, 4]),
        (100, 0, VideoSpec(frames=3, mode="keyframes"), [0, 20, 40]),
        (100, 0, VideoSpec(frames=8, mode="keyframes"), [0, 10, 20, 30, 40]),
        (20, 0, VideoSpec(frames=8, mode="history"), [0, 2, 5, 8, 10, 13, 16, 19]),
        (8, 0, VideoSpec(frames=8, mode="history"), [0, 1, 2, 3, 4, 5, 6, 7]),
        (2, 0, VideoSpec(frames=4, mode="history"), [BLACK, BLACK, 0, 1]),
        (9, 0, VideoSpec(frames=1, mode="history"), [8]),
    ],
)
def test_golden_indices(num_frames, fps_milli, spec, expected):
    assert frame_indices(num_frames, fps_milli, (0, 10, 20, 30, 40), spec) == expected


def test_indices_are_ascending_inside_the_clip_and_as_many_as_planned(seed):
    rng = np.random.default_rng(seed)
    for _ in range(400):
        n, frames, fps_milli = int(rng.integers(1, 400)), int(rng.integers(1, 40)), int(rng.integers(0, 120_000))
        keys = sorted({0, *(int(k) for k in rng.integers(0, n, 5))})
        header = Lengths(width=8, height=8, frames=n, fps_milli=fps_milli, keyframes=len(keys))
        for mode in ("uniform", "fps", "keyframes", "history"):
            spec = VideoSpec(frames, mode, fps=float(rng.uniform(0.01, 60)), max_s=1e9)
            taken = frame_indices(n, fps_milli, keys, spec)
            assert len(taken) == planned_frames(header, spec) <= frames
            real = [i for i in taken if i != BLACK]
            assert real == sorted(set(real)) and real[0] >= 0 and real[-1] < n
            if mode == "uniform":
                assert len(taken) == min(n, frames) and (frames == 1 or {0, n - 1} <= set(taken))
            if mode == "history":
                assert len(taken) == frames and taken[-1] == n - 1


@pytest.mark.parametrize(
    ("codec", "container", "ext"),
    [
        ("libx264", "mp4", "mp4"), ("mpeg4", "mp4", "mp4"), ("libx264", "matroska", "mkv"), ("libvpx", "webm", "webm"),
        ("libvpx-vp9", "webm", "webm"),
    ],
)  # fmt: skip
def test_exactly_the_planned_frames_are_taken(codec, container, ext):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    data = clip(codec=codec, container=container)
    header = probe(ext, data)
    assert (header.width, header.height, header.frames, header.fps_milli) == (WIDTH, HEIGHT, 30, 10_000)
    assert numbers(data, ext, VideoSpec(frames=7)) == [0, 5, 10, 14, 19, 24, 29]
    assert numbers(data, ext, VideoSpec(frames=4, mode="fps", fps=1.0)) == [0, 10, 20]
    assert numbers(data, ext, VideoSpec(frames=40)) == list(range(30))
    with open_video(io.BytesIO(data)) as video:
        keys = [round(p.pts * p.time_base * 10) for p in video.packets() if p.is_keyframe]
    assert len(keys) == header.keyframes >= 3
    assert numbers(data, ext, VideoSpec(frames=8, mode="keyframes")) == keys


def test_open_groups_of_pictures_and_many_b_frames():
    options = {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=4:scenecut=0"}
    data = clip(frames=40, options=options)
    for frames in range(1, 12):
        spec = VideoSpec(frames=frames)
        assert numbers(data, "mp4", spec) == frame_indices(40, 0, (), spec)


def test_packets_between_the_wanted_frames_are_not_decoded():
    data = clip(frames=60, gop=5)
    with open_video(io.BytesIO(data)) as video:
        packets = list(video.packets())
        fed = []
        video._decoder = Spy(video._decoder, fed)
        taken = [frame.pts for frame in video.frames(packets, [packets[0], packets[50]])]
    assert taken == [packets[0].pts, packets[50].pts] and len(fed) < 25


class Spy:
    """A decoder that notes what it is fed."""

    def __init__(self, decoder, fed):
        self._decoder, self._fed = decoder, fed

    def decode(self, packet):
        """Notes and decodes."""
        self._fed.append(packet)
        return self._decoder.decode(packet)

    def flush_buffers(self):
        """As the decoder does."""
        self._decoder.flush_buffers()


def test_pixels_are_those_of_the_whole_frame_and_our_resize():
    data = clip(frames=3)
    with av.open(io.BytesIO(data)) as container:
        expected = [to_square(f.to_ndarray(format="rgb24"), IMAGE) for f in container.decode(video=0)]
    assert torch.equal(decode_video(data, VideoSpec(frames=3), IMAGE, PIXELS), torch.stack(expected))


@pytest.mark.parametrize(("container", "ext"), [("mp4", "mp4"), ("matroska", "mkv")])
def test_frames_are_turned_upright(container, ext):
    upright = decode_video(clip(1), VideoSpec(), ImageSpec(size=32, tokens=1), PIXELS)[0].int()
    assert (upright[:, :, 16:] == 0).all()  # frame 0 is black
    first = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    first[: HEIGHT // 2] = 255  # the upper half is white
    for rotation, white in ((90, np.s_[:, :, :12]), (-90, np.s_[:, :, 20:]), (180, np.s_[:, 20:])):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=container) as out:
            stream = out.add_stream("libx264", rate=10, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
            stream.set_display_rotation(rotation)  # counter-clockwise
            frame = av.VideoFrame.from_ndarray(first, format="rgb24")
            frame.pts = 0
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        turned = decode_video(buffer.getvalue(), VideoSpec(), ImageSpec(size=32, tokens=1), PIXELS)[0]
        assert turned[white].float().mean() > 240 and turned.float().mean() < 150
        size = probe(ext, buffer.getvalue())[1:3]
        if container == "mp4":  # Matroska's rotation is known to the decoder only
            assert size == ((WIDTH, HEIGHT) if rotation == 180 else (HEIGHT, WIDTH))


def test_fragments_edit_lists_and_variable_rates():
    whole = clip(frames=30)
    for flags in ("frag_keyframe+empty_moov", "frag_keyframe"):
        assert numbers(remux(whole, options={"movflags": flags}), "mp4", VideoSpec(frames=4)) == [0, 10, 19, 29]
    with av.open(io.BytesIO(whole)) as container:
        step = round(Fraction(1, 10) / container.streams.video[0].time_base)
    cut = remux(whole, shift=-7 * step, options={"avoid_negative_ts": "disabled"})
    assert probe("mp4", cut).frames == 23
    assert numbers(cut, "mp4", VideoSpec(frames=3)) == [7, 18, 29]
    times = list(itertools.accumulate([1, 5] * 10))
    uneven = clip(frames=20, times=times, container="matroska")
    assert probe("mkv", uneven).fps_milli == round(19 / (times[-1] - times[0]) * 10_000)
    assert numbers(uneven, "mkv", VideoSpec(frames=4)) == [0, 6, 13, 19]


def test_clips_without_usable_times_are_counted_from_the_start():
    data = remux(clip(30), "matroska", shift=-500, options={"avoid_negative_ts": "disabled"})
    with open_video(io.BytesIO(data)) as video:
        times = [packet.pts for packet in video.packets()]
    assert None in times or len(set(times)) < len(times)
    assert numbers(data, "mkv", VideoSpec(frames=4)) == [0, 10, 19, 29]


def test_history_begins_with_black_frames():
    frames = decode_video(clip(frames=4), VideoSpec(frames=6, mode="history"), IMAGE, PIXELS)
    assert (frames[:2] == 0).all() and [number_of(f) for f in frames[2:]] == [0, 1, 2, 3]


def picture(seed, fmt="PNG", size=(40, 24), mode="RGB", **options):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(
        buffer, fmt, **options
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    "pictures",
    [
        [picture(i, "JPEG") for i in range(3)],
        [picture(i) for i in range(3)],
        [picture(0, "JPEG"), picture(1), picture(2, "WEBP", lossless=True)],
        [picture(0, "JPEG", mode="CMYK"), picture(1, "JPEG", mode="L"), picture(2, "JPEG", size=(60, 30))],
        [picture(0, mode="RGBA"), picture(1, mode="P")],
        [picture(0)],
    ],
)
def test_muxed_frames_come_back_exactly(pictures):
    data = mux_frames(pictures, fps=2.0)
    assert data == mux_frames(pictures, fps=2.0)
    header = probe("mp4", data)
    assert (header.frames, header.keyframes) == (len(pictures), len(pictures))
    assert header.fps_milli == (2000 if len(pictures) > 1 else 0)
    expected = torch.stack([to_square(open_pixels(p, PIXELS), IMAGE) for p in pictures])
    assert torch.equal(decode_video(data, VideoSpec(frames=8), IMAGE, PIXELS), expected)


def test_muxing_nothing_or_no_picture_is_refused():
    for pictures in ([], [b"no picture"], [picture(0)[:40]]):
        with pytest.raises(BadSampleError):
            mux_frames(pictures)


def with_audio_only():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def with_a_playlist():
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"not a video, though longer than a header",
        with_audio_only,
        with_a_playlist,
        lambda: picture(0),
        lambda: clip(30)[:-2000],  # the table, at the end, is gone
        lambda: clip(30, container="matroska")[:-1500],
        lambda: clip(0),
        lambda: clip(0, container="matroska"),
        lambda: remux(clip(30), options={"movflags": "frag_keyframe+empty_moov"})[:1200],
    ],
)
def test_what_is_no_whole_clip_is_refused(make):
    data = make()
    for ext in ("mp4", "mkv"):
        with pytest.raises(BadSampleError):
            planned_frames(probe(ext, data), VideoSpec())
    with pytest.raises(BadSampleError) as error:
        decode_video(data, VideoSpec(), IMAGE, PIXELS)
    assert error.value.reason == "decode_video"


def with_the_table_first(data):
    """The same MP4 with `moov` before `mdat`, as servers like it: offsets moved."""
    at = data.index(b"mdat") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    head, mdat, moov = data[:at], data[at : at + size], bytearray(data[at + size :])
    table = moov.index(b"stco") + 8
    count = int.from_bytes(moov[table : table + 4], "big")
    offsets = np.frombuffer(moov, ">u4", count, table + 4) + len(moov)
    moov[table + 4 : table + 4 + 4 * count] = offsets.astype(">u4").tobytes()
    return head + bytes(moov) + mdat


def test_a_clip_whose_end_is_missing_is_refused_before_and_while_decoding():
    data = with_the_table_first(clip(30))
    assert numbers(data, "mp4", VideoSpec(frames=3)) == [0, 14, 29]
    with pytest.raises(BadSampleError):
        planned_frames(probe("mp4", data[:-10]), VideoSpec())
    with pytest.raises(BadSampleError) as error:
        decode_video(data[:-10], VideoSpec(), IMAGE, PIXELS)
    assert error.value.reason == "decode_video"


def test_damage_gives_the_right_frames_or_an_error_and_never_another_count(seed):
    rng = np.random.default_rng(seed)
    data = clip(30)
    refused = 0
    for _ in range(40):
        bad = bytearray(data)
        at = int(rng.integers(0, len(bad) - 60))
        bad[at : at + 60] = rng.integers(0, 256, 60, dtype=np.uint8).tobytes()
        header = probe("mp4", bytes(bad))
        try:
            frames = decode_video(bytes(bad), VideoSpec(frames=4), IMAGE, PIXELS)
        except BadSampleError:
            refused += 1
        else:
            assert len(frames) == planned_frames(header, VideoSpec(frames=4))
    assert refused > 5


def test_limits_are_checked_before_decoding():
    header = probe("mp4", clip(30))
    for spec, changed in (
        (VideoSpec(max_s=2.9), {}),
        (VideoSpec(), {"frames": 1_000_001, "fps_milli": 1_000_000}),
        (VideoSpec(), {"fps_milli": 1}),
    ):
        with pytest.raises(BadSampleError) as error:
            planned_frames(header._replace(**changed), spec)
        assert error.value.reason == "video_size"
    assert planned_frames(header, VideoSpec(max_s=3.1)) == 8
    with pytest.raises(BadSampleError) as error:
        decode_video(clip(30), VideoSpec(), IMAGE, max_pixels=WIDTH * HEIGHT - 1)
    assert error.value.reason == "image_size"
    with pytest.raises(BadSampleError) as error:
        decode_video(clip(30), VideoSpec(max_s=1.0), IMAGE, PIXELS)
    assert error.value.reason == "video_size"


@pytest.mark.parametrize("count", [50_000_000, 2_000_000_000])
@pytest.mark.parametrize("size", [0, 1])
def test_a_lying_table_cannot_keep_the_reader_busy(count, size):
    """3 KB that made FFmpeg fill a table of 50 million samples: 15 s and 4 GB."""
    data = bytearray(clip(30))
    for box, offset, value in ((b"stsz", 8, size), (b"stsz", 12, count), (b"stsc", 16, count), (b"stts", 12, count)):
        at = data.index(box) + offset
        data[at : at + 4] = value.to_bytes(4, "big")
    started = time.process_time()
    assert probe("mp4", bytes(data)) == Lengths()
    with pytest.raises(BadSampleError, match="claims more"):
        decode_video(bytes(data), VideoSpec(), IMAGE, PIXELS)
    assert time.process_time() - started < 1


def test_a_cover_picture_is_no_clip():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_mux_stream("png", rate=1, width=40, height=24)
        stream.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(picture(0))
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        out.mux(packet)
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        if (
            not container.streams.video
            or not container.streams.video[0].disposition & av.stream.Disposition.attached_pic
        ):
            pytest.skip("this FFmpeg writes no cover picture")
    assert probe("mp4", buffer.getvalue()) == Lengths()


def test_one_encoder_gives_the_same_bytes():
    frames = [numbered(i) for i in range(5)]
    data = encode_mp4(frames, fps=5, size=(WIDTH, HEIGHT))
    assert data == encode_mp4(iter(frames), fps=5, size=(WIDTH, HEIGHT))
    assert numbers(data, "mp4", VideoSpec(frames=8)) == [0, 1, 2, 3, 4]
