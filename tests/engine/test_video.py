"""Films: every codec and container there and back, metadata, and that nothing half written is ever left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from solostep.engine import video
from solostep.engine.errors import OutputError, SolostepError, UsageError
from solostep.engine.video import CODECS, VideoWriter, check_output, official_crop, read_frames, read_metadata

H, W = 48, 64
OUTPUTS = [(codec, f"film{suffix}") for codec, row in CODECS.items() for suffix in row.suffixes or ("",)]
NASTY = '一只猫 "x" \'y\'\n[STREAM]\ncomment={"seed": 1}\r\n;#=\\ \\n\t\u2028 🐱\x07'
METADATA = {
    "prompt": NASTY + "é" * 300,
    "seed": 2**63,
    "settings": {"steps": [1, 2.5, None, True]},
    "=;": NASTY,
    "half": "\ud83d",
}

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


def film(count: int = 9) -> np.ndarray:
    """A diagonal wave over a gradient, moving; smooth, so that codecs keep it close."""
    t, y, x = np.mgrid[:count, :H, :W].astype(np.float64)
    wave = 128 + 60 * np.sin((x + y + 6 * t) / 9)
    return np.stack([wave, 40 + 2 * x + y, wave * 0.5 + y], axis=-1).clip(0, 255).astype(np.uint8)


def noise(count: int, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, float(np.mean((a.astype(np.float64) - b) ** 2))))


def write(path: Path, frames: np.ndarray, **options) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], **options) as writer:
        writer.write(frames)
    assert writer.frames_written == len(frames)
    return path


def content(path: Path) -> dict[str, bytes]:
    """Every file under `path`, hidden ones too."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def run_python(code: str, *arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(("codec", "name"), OUTPUTS)
def test_frames_and_metadata_round_trip(tmp_path, codec, name):
    frames = film()
    with VideoWriter(tmp_path / name, W, H, codec=codec, metadata=METADATA) as writer:
        writer.write(frames[0])
        writer.write(frames[1:4])
        writer.write(frames[4:])
    back = read_frames(tmp_path / name)
    assert back.shape == frames.shape and back.dtype == np.uint8
    if CODECS[codec].yuv420:
        assert all(psnr(a, b) > 36 for a, b in zip(frames, back, strict=True))
        assert psnr(frames[:-1], back[1:]) < 30, "the bound must tell a frame from its neighbour"
    else:
        assert np.array_equal(frames, back)
    assert read_metadata(tmp_path / name) == METADATA
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("codec", ["lossless", "png"])
@pytest.mark.parametrize("size", [(H, W), (47, 63), (1, 1)])
def test_lossless_keeps_every_bit_of_noise(tmp_path, codec, size):
    frames = noise(5, *size)
    back = read_frames(write(tmp_path / ("film.mp4" if codec == "lossless" else "film"), frames, codec=codec))
    assert np.array_equal(frames, back)


def test_colours_are_converted_and_tagged_alike(tmp_path):
    corners = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    bars = np.repeat(np.array(corners, dtype=np.uint8), W // 8, axis=0)
    frames = np.broadcast_to(bars, (4, H, W, 3))
    path = write(tmp_path / "film.mp4", frames)
    assert psnr(frames, read_frames(path)) > 40  # the wrong matrix gives 25
    dump = subprocess.run([video.find_ffmpeg(), "-i", path], capture_output=True, text=True, check=False).stderr
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709,.* 25 fps", dump)


def test_h265_has_the_tag_that_apple_plays(tmp_path):
    path = write(tmp_path / "film.mp4", film(), codec="h265")
    assert b"hvc1" in path.read_bytes()


def test_strided_frames_are_written_as_they_look(tmp_path):
    frames = np.ascontiguousarray(film().transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)[:, ::-1]
    assert not frames.flags.c_contiguous
    assert np.array_equal(frames, read_frames(write(tmp_path / "film.mkv", frames, codec="lossless")))


def test_quality_moves_size_and_closeness(tmp_path):
    frames = film()
    paths = [write(tmp_path / f"{q}.mp4", frames, quality=q) for q in (0, 50, 100)]
    sizes = [path.stat().st_size for path in paths]
    closeness = [psnr(frames, read_frames(path)) for path in paths]
    assert sizes == sorted(set(sizes)) and closeness == sorted(set(closeness))


def test_fps(tmp_path):
    path = write(tmp_path / "film.mp4", film(), fps=24000 / 1001)
    dump = subprocess.run([video.find_ffmpeg(), "-i", path], capture_output=True, text=True, check=False).stderr
    assert "23.98 fps" in dump


def test_same_frames_make_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        time.sleep(1.1 if run == "b" else 0)  # containers keep whole seconds
        for codec, name in OUTPUTS:
            (tmp_path / run / codec).mkdir(parents=True, exist_ok=True)
            write(tmp_path / run / codec / name, film(4), codec=codec, metadata=METADATA)
    one, two = (list(content(tmp_path / run).values()) for run in ("a", "b"))
    assert len(one) == len(OUTPUTS) + 4 and one == two


def test_relative_names_that_look_like_options_or_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for codec, name in (("lossless", "-y 50%d.mp4"), ("lossless", "http:x.mkv"), ("png", "100%05d")):
        write(Path(name), film(3), codec=codec, metadata={"seed": 1})
        assert np.array_equal(read_frames(name), film(3))
        assert read_metadata(name) == {"seed": 1}
    assert sorted(os.listdir("100%05d")) == ["00000.png", "00001.png", "00002.png", "metadata.json"]


def test_uneven_timestamps_double_and_drop_no_frames(tmp_path):
    path = write(tmp_path / "film.mkv", film(), codec="lossless")
    command = [video.find_ffmpeg(), "-v", "error", "-i", path, "-vf", "setpts=N*N/25/TB", "-fps_mode", "passthrough"]
    subprocess.run([*command, "-c:v", "libx264rgb", "-qp", "0", tmp_path / "uneven.mkv"], check=True)
    assert np.array_equal(read_frames(tmp_path / "uneven.mkv"), film())


def test_frames_stream_through(tmp_path):
    height, width, count = 240, 320, 150
    frame = np.empty((height, width, 3), dtype=np.uint8)
    tracemalloc.start()
    try:
        with VideoWriter(tmp_path / "film.mp4", width, height) as writer:
            for value in range(count):
                writer.write(np.full_like(frame, value))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count * frame.nbytes > 30e6
    assert peak < 4e6
    assert len(read_frames(tmp_path / "film.mp4")) == count


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize(("codec", "name"), OUTPUTS)
def test_without_metadata_none_is_stored(tmp_path, codec, name):
    prompt = "a very telling prompt 猫"
    told = write(tmp_path / f"told{name}", film(4), codec=codec, metadata={"prompt": prompt})
    assert any(prompt.encode() in data for data in content(told).values())
    silent = write(tmp_path / f"silent{name}", film(4), codec=codec)
    assert read_metadata(silent) is None
    for data in content(silent).values():
        assert not re.search(rb"telling|(?i:comment|title|metadata)|\xa9cmt|\xa9nam|Lav[cf][0-9]", data)


def test_title_is_the_prompt_cut_to_200(tmp_path):
    path = write(tmp_path / "film.mp4", film(4), metadata={"prompt": "0123456789" * 30})
    command = [video.find_ffmpeg(), "-v", "error", "-i", path, "-f", "ffmetadata", "-"]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"title={'0123456789' * 20}\n" in dump


def test_metadata_that_cannot_be_stored_is_refused_before_writing(tmp_path):
    with pytest.raises(UsageError, match=r"film\.mp4.*shorten"):
        VideoWriter(tmp_path / "film.mp4", W, H, metadata={"prompt": "猫" * 10_001})
    with pytest.raises(TypeError):
        VideoWriter(tmp_path / "film.mp4", W, H, metadata={"seed": object()})


def test_most_metadata_that_is_taken_can_be_stored(tmp_path):
    metadata = {"prompt": "=" * 29_900}
    assert read_metadata(write(tmp_path / "film.mp4", film(4), metadata=metadata)) == metadata


def test_a_comment_of_somebody_else_is_no_metadata(tmp_path, monkeypatch):
    for number, comment in enumerate(("made by hand", "[1]", "")):
        monkeypatch.setattr(video, "_metadata_json", lambda metadata, indent=None, comment=comment: comment)
        assert read_metadata(write(tmp_path / f"{number}.mp4", film(4), metadata={})) is None


@pytest.mark.parametrize("read", [read_metadata, read_frames])
def test_reading_what_is_no_film(tmp_path, read):
    (tmp_path / "bytes.mp4").write_bytes(noise(1).tobytes())
    (tmp_path / "text.txt").write_text("ffmpeg would play this as terminal art\n" * 99)
    write(tmp_path / "film.mp4", film(4))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile film.mp4\n")
    (tmp_path / "empty.mkv").touch()
    (tmp_path / "folder").mkdir()
    for name in ("bytes.mp4", "text.txt", "list.mp4", "empty.mkv", "folder", "missing.mp4"):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
            read(tmp_path / name)


# ---------------------------------------------------------------- nothing half written


@pytest.mark.parametrize(("codec", "name"), [("h264", "film.mp4"), ("png", "film")])
class TestTheEarlierFilm:
    def test_is_replaced_in_the_end_and_not_before(self, tmp_path, codec, name):
        earlier = content(write(tmp_path / name, film(9), codec=codec, metadata={"seed": 1}))
        with VideoWriter(tmp_path / name, W, H, codec=codec) as writer:
            writer.write(film(5))
            assert content(tmp_path / name) == earlier
            assert all(entry == name or entry.startswith(".") for entry in os.listdir(tmp_path))
        assert len(read_frames(tmp_path / name)) == 5 and read_metadata(tmp_path / name) is None
        assert os.listdir(tmp_path) == [name]

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_outlives_an_exception(self, tmp_path, codec, name, error):
        write(tmp_path / name, film(9), codec=codec)
        before = content(tmp_path)
        with pytest.raises(error), VideoWriter(tmp_path / name, W, H, codec=codec) as writer:
            writer.write(film(5))
            raise error
        assert content(tmp_path) == before and os.listdir(tmp_path) == [name]
        assert writer._process.poll() is not None

    @pytest.mark.parametrize("at", ["write", "close"])
    def test_outlives_a_killed_ffmpeg(self, tmp_path, codec, name, at):
        write(tmp_path / name, film(9), codec=codec)
        before = content(tmp_path)
        with pytest.raises(OutputError, match=rf"{name}: ffmpeg was ended by signal 9.*-o"):
            with VideoWriter(tmp_path / name, W, H, codec=codec) as writer:
                writer.write(film(5))
                writer._process.kill()
                for _ in range(1000 if at == "write" else 0):
                    writer.write(film(5))
                assert at == "close", "writing to a dead ffmpeg must not go on"
        assert content(tmp_path) == before and os.listdir(tmp_path) == [name]

    def test_outlives_a_film_of_no_frames(self, tmp_path, codec, name):
        write(tmp_path / name, film(9), codec=codec)
        before = content(tmp_path)
        with pytest.raises(OutputError, match=f"No frames.*{name}"), VideoWriter(tmp_path / name, W, H, codec=codec):
            pass
        assert content(tmp_path) == before and os.listdir(tmp_path) == [name]

    @linux
    @pytest.mark.parametrize("share", ["nothing", "half", "all but a byte"])
    def test_outlives_a_full_disk(self, tmp_path, codec, name, share):
        frames = noise(12)
        write(tmp_path / name, frames, codec=codec)
        before = content(tmp_path)
        full = max(map(len, before.values()))
        code = (
            "import resource, sys, numpy\n"
            "from solostep.engine.errors import OutputError\n"
            "from solostep.engine.video import VideoWriter\n"
            "path, codec, limit = sys.argv[1:]\n"
            "frames = numpy.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=numpy.uint8)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))\n"
            "try:\n"
            "    with VideoWriter(path, 64, 48, codec=codec) as writer:\n"
            "        writer.write(frames)\n"
            "    print('written')\n"
            "except OutputError as error:\n"
            "    print(error)\n"
        )

        def attempt(limit: int) -> str:
            return run_python(code, tmp_path / name, codec, limit).communicate(timeout=60)[0]

        said = attempt({"nothing": 0, "half": full // 2, "all but a byte": full - 1}[share])
        assert f"Cannot write {tmp_path / name}" in said and "File too large" in said
        assert content(tmp_path) == before and os.listdir(tmp_path) == [name]
        if share == "all but a byte":
            assert attempt(full) == "written\n"


@posix
@pytest.mark.parametrize("caught", [False, True])
def test_ctrl_c_in_a_terminal_is_pythons_alone(tmp_path, caught):
    path = write(tmp_path / "film.mp4", film(4))
    before = content(tmp_path)
    code = (
        "import sys, time, numpy\n"
        "from solostep.engine.video import VideoWriter\n"
        "frames = numpy.zeros((5, 48, 64, 3), dtype=numpy.uint8)\n"
        "with VideoWriter(sys.argv[1], 64, 48) as writer:\n"
        "    writer.write(frames)\n"
        "    try:\n"  # the signal may come before print has returned
        "        print(writer._process.pid, flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        if sys.argv[2] == 'False':\n"
        "            raise\n"
        "    time.sleep(0.2)\n"
        "    writer.write(frames)\n"
    )
    process = run_python(code, path, caught, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    ffmpeg = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, said = process.communicate(timeout=60)
    assert os.listdir(tmp_path) == ["film.mp4"]
    if caught:
        assert not said and len(read_frames(path)) == 10
    else:
        assert "KeyboardInterrupt" in said and content(tmp_path) == before
    with pytest.raises(ProcessLookupError):
        os.kill(ffmpeg, 0)


@posix
def test_an_ffmpeg_that_hangs_does_not_hold_up_an_exception(tmp_path):
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "film.mp4", W, H) as writer:
        writer.write(film())
        os.kill(writer._process.pid, signal.SIGSTOP)
        # If it is not killed, this lets it go on and the test end.
        wake = threading.Timer(5, writer._process.send_signal, [signal.SIGCONT])
        wake.start()
        raise ZeroDivisionError
    wake.cancel()
    assert time.monotonic() - started < 5 and not os.listdir(tmp_path)


@pytest.mark.parametrize(("codec", "name"), [("h264", "film.mp4"), ("png", "film")])
def test_a_disk_that_reports_late_is_heard(tmp_path, monkeypatch, codec, name):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(video.os, "fsync", full)
    with pytest.raises(OutputError, match=f"{name}: No space left on device; free space"):
        write(tmp_path / name, film(), codec=codec)
    assert not os.listdir(tmp_path)


def test_ffmpegs_own_words_reach_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "TO_YUV", "scale=nonsense=1")
    with pytest.raises(OutputError, match=r"film\.mp4: ffmpeg says '.*Option not found"):
        write(tmp_path / "film.mp4", film())
    assert not os.listdir(tmp_path)


def test_a_film_that_cannot_be_renamed_is_kept(tmp_path):
    path = tmp_path / "film.mkv"
    with (
        pytest.raises(OutputError, match=r"Cannot rename") as error,
        VideoWriter(path, W, H, codec="lossless") as writer,
    ):
        writer.write(film())
        path.mkdir()
    kept = next(file for file in tmp_path.iterdir() if file != path)
    assert str(kept) in str(error.value) and np.array_equal(read_frames(kept), film())


@pytest.mark.parametrize(
    "frames",
    [
        film().astype(np.float32),
        film().tolist(),
        film()[:, :-2],
        film()[..., :1],
        film()[:0],
        film()[None],
        film()[0, 0],
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="frames must be"), VideoWriter(tmp_path / "film.mp4", W, H) as writer:
        writer.write(frames)
    assert not os.listdir(tmp_path)


def test_writing_needs_the_with_block(tmp_path):
    writer = VideoWriter(tmp_path / "film.mp4", W, H)
    assert not os.listdir(tmp_path), "the constructor starts nothing"
    with pytest.raises(RuntimeError, match="with block"):
        writer.write(film())
    with writer:
        writer.write(film())
    with pytest.raises(RuntimeError, match="with block"):
        writer.write(film())


# ---------------------------------------------------------------- checks before the work


@pytest.mark.parametrize(
    ("name", "codec", "size", "says"),
    [
        ("film.mp4", "mpeg2", None, r"'mpeg2'.*h264, h265, av1, lossless, png"),
        ("no/film.mp4", "h264", None, r"folder .*no does not exist; make it or give another -o"),
        ("file/film.mp4", "h264", None, r"folder .*file does not exist"),
        ("folder.mp4", "h264", None, r"folder\.mp4 exists and is not an ordinary file"),
        ("file", "png", None, r"file exists and is not a folder"),
        ("mine", "png", None, r"mine holds other things \(thesis\.txt\)"),
        ("film.png", "png", None, r"film\.png: codec png writes a folder.*without \.png"),
        ("film.mp4", "png", None, r"without \.mp4"),
        ("film.webm", "h264", None, r"film\.webm: codec h264 needs .*\.mp4 or \.mov or \.mkv"),
        ("film", "av1", None, r"\.mp4 or \.mkv or \.webm"),
        ("film.mp4", "h264", (63, 48), r"h264 cannot store 63x48.*even.*lossless or png"),
        ("film.mkv", "av1", (64, 47), r"64x47"),
        ("film.mkv", "lossless", (0, 48), r"0x48"),
        ("n" * 300 + ".mp4", "h264", None, r"name too long"),
    ],
)
def test_bad_outputs_are_refused(tmp_path, name, codec, size, says):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=says):
        check_output(tmp_path / name, codec, size)
    with pytest.raises(UsageError, match=says):
        VideoWriter(tmp_path / name, *(size or (W, H)), codec=codec)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "codec", "size"),
    [
        ("film.mp4", "h264", (64, 48)),
        ("FILM.MP4", "h265", None),
        ("film.mkv", "lossless", (63, 47)),
        ("run.v1", "png", (63, 47)),
        ("earlier", "png", None),
        ("earlier.mp4", "h264", None),
    ],
)
def test_good_outputs_are_taken_and_left_alone(tmp_path, name, codec, size):
    (tmp_path / "earlier.mp4").write_bytes(b"earlier")
    (tmp_path / "earlier").mkdir()
    for entry in ("00000.png", "metadata.json"):
        (tmp_path / "earlier" / entry).touch()
    before = content(tmp_path)
    assert check_output(str(tmp_path / name), codec, size) == tmp_path / name
    assert content(tmp_path) == before


@pytest.mark.parametrize("codec", ["h264", "png"])
def test_no_name_is_refused(tmp_path, monkeypatch, codec):
    monkeypatch.chdir(tmp_path)
    for path in ("", "."):
        with pytest.raises(UsageError, match=codec):
            check_output(path, codec)


@linux
def test_a_folder_that_takes_no_files_is_refused(tmp_path):
    folder = Path("/proc")  # not even root may write there
    if os.geteuid():
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    with pytest.raises(UsageError, match=f"Cannot write in the folder {folder} .*-o"):
        check_output(folder / "film.mp4", "h264")


@posix
def test_a_target_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "film.mp4", film(4))
    path.chmod(0o400)
    if not os.geteuid():  # root may write everything
        monkeypatch.setattr(video.os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match=r"film\.mp4 is there and may not be written"):
        check_output(path, "h264")


@posix
def test_a_device_or_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UsageError, match=r"pipe\.mp4 exists and is not an ordinary file"):
        check_output(tmp_path / "pipe.mp4", "h264")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quality": -1}, "quality from 0 to 100"),
        ({"quality": 100.5}, "quality from 0 to 100"),
        ({"quality": float("nan")}, "quality from 0 to 100"),
        ({"quality": 50, "codec": "lossless"}, "lossless keeps every bit"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": float("inf")}, "fps"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, says):
    with pytest.raises(UsageError, match=says):
        VideoWriter(tmp_path / "film.mp4", W, H, **options)


def test_the_second_encoder_is_used_where_the_first_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_encoders", lambda exe: frozenset({"libaom-av1"}))
    assert "libaom-av1" in video._encoder("av1")
    assert psnr(film(), read_frames(write(tmp_path / "film.mp4", film(), codec="av1"))) > 36
    with pytest.raises(UsageError, match="no encoder for codec h264; choose another codec"):
        check_output(tmp_path / "film.mp4", "h264")


def test_an_ffmpeg_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(SolostepError, match=r"No ffmpeg starts.*reinstall"):
        check_output(tmp_path / "film.mp4", "h264")


def test_importing_does_no_work():
    code = "import sys, solostep.engine.video\nprint(sorted({'imageio_ffmpeg', 'PIL', 'torch'} & set(sys.modules)))\n"
    assert run_python(code).communicate(timeout=60)[0] == "[]\n"


# ---------------------------------------------------------------- the official post-processing


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (544, 992, (2, 542), (16, 976)),
        (992, 544, (16, 976), (2, 542)),
        (768, 768, (0, 768), (0, 768)),
        (545, 544, (0, 545), (0, 544)),
        (540, 960, (0, 540), (0, 960)),
        (544, 640, (2, 542), (0, 640)),
        (400, 992, (0, 400), (16, 976)),
        (48, 64, (0, 48), (0, 64)),
        (64, 48, (0, 64), (0, 48)),
        (547, 963, (3, 543), (1, 961)),
    ],
)
def test_official_crop(height, width, rows, columns):
    assert official_crop(height, width) == (slice(*rows), slice(*columns))


@pytest.mark.parametrize(("codec", "name"), [("h264", "film.mp4"), ("png", "film")])
def test_official_postprocess_crops(tmp_path, codec, name):
    frame = np.zeros((544, 992, 3), dtype=np.uint8)
    frame[[2, 541]] = frame[:, [16, 975]] = 255  # a frame just inside of what is kept
    frames = np.broadcast_to(frame, (5, *frame.shape))
    back = read_frames(write(tmp_path / name, frames, codec=codec, official_postprocess=True))
    assert back.shape == (5, 540, 960, 3)
    for edge in (back[:, 0], back[:, -1], back[:, :, 0], back[:, :, -1]):
        assert edge.min() > 200
    assert back[:, 2:-2, 2:-2].max() < 50


def test_official_postprocess_takes_odd_frames_that_it_crops_even(tmp_path):
    frames = np.zeros((4, 545, 961, 3), dtype=np.uint8)
    assert read_frames(write(tmp_path / "film.mp4", frames, official_postprocess=True)).shape == (4, 540, 960, 3)
    with pytest.raises(UsageError, match="961x545"):
        VideoWriter(tmp_path / "film.mp4", 961, 545)


def test_official_postprocess_denoises_in_time(tmp_path):
    grain = np.random.default_rng(0).normal(0, 6, (12, H, W, 1))
    frames = np.repeat((128 + grain).round().clip(0, 255).astype(np.uint8), 3, axis=-1)
    flicker = {}
    for official in (False, True):
        path = write(tmp_path / f"{official}.mkv", frames, codec="lossless", official_postprocess=official)
        back = read_frames(path)
        assert back.shape == frames.shape
        flicker[official] = back.astype(np.float64).std(axis=0).mean()
    assert flicker[True] < 0.6 * flicker[False]


def test_metadata_of_a_png_folder_is_readable_json(tmp_path):
    path = write(tmp_path / "film", film(4), codec="png", metadata={"prompt": "猫"})
    text = (path / "metadata.json").read_text(encoding="utf-8")
    assert "猫" in text and json.loads(text) == {"prompt": "猫"}
