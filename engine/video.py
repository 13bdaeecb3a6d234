"""Write films with ffmpeg while they are made, and read them and their metadata back.

A film goes as raw frames into one ffmpeg process, which writes to a hidden name beside the target. Only when ffmpeg has
ended without an error is that renamed: the target is either the whole new film or what it was before. imageio_ffmpeg
brings the ffmpeg and reads frames; its writer hides ffmpeg's exit code and messages, and with them a full disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .errors import OutputError, SolostepError, UsageError

_MUXERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
_PNG_NAME = re.compile(r"\d{5,}\.png")
_PNG_METADATA = "metadata.json"
_NO_FILM = "{} is missing or no film that ffmpeg can read; give another file."
# Without such a list ffmpeg plays text files as terminal art and follows playlists to other files.
_READABLE = ["-format_whitelist", "mov,matroska,avi,gif"]
# Windows holds 32767 characters in a command line, Linux 128 KiB in one argument.
_MAX_METADATA_BYTES = 30_000

# BT.709 is converted to and tagged, as players guess an untagged film's matrix by its height, which is not the same for
# 540 and 768 lines. By setparams, because newer ffmpegs ignore -color_trc when the frames say otherwise.
_SCALE = "scale=flags=bicubic+accurate_rnd+full_chroma_int"
_BT709 = "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
TO_YUV = f"{_SCALE}:out_color_matrix=bt709:out_range=tv,format=yuv420p,{_BT709}"
_TO_RGB = f"{_SCALE},format=rgb24"
# The official thresholds: for luma and Cb, while Cr stays at ffmpeg's own.
_DENOISE = "atadenoise=0a=0.1:0b=0.1:1a=0.1:1b=0.1"
# Lines of ffmpeg and its encoders that do not say what went wrong.
_NOISE = re.compile(r"message repeated|Nothing was written|Terminating thread|Conversion failed|^Svt\[[iw]|^x265 \[i")
_PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
# Own session (Windows: process group, no window): Ctrl-C in a terminal reaches Python alone, which then decides about
# ffmpeg. SIGXFSZ stays ignored, so that a limit on file sizes becomes ffmpeg's message and not its silent death.
_APART: dict[str, Any] = {"start_new_session": True, "restore_signals": False}
if sys.platform == "win32":
    _APART = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}


@dataclass(frozen=True)
class Codec:
    """One row of `CODECS`."""

    encoders: tuple[str, ...]  # ffmpeg's names with options, best first: the first that the ffmpeg at hand has is used
    suffixes: tuple[str, ...]  # of the files it can be written to; none for a folder of pictures
    yuv420: bool  # stored as BT.709 yuv420p, of even width and height only; otherwise as the given RGB, bit for bit
    crf: tuple[int, int, int] | None = None  # at quality 0, None and 100, linear from 0 to 100; None: takes no quality


_FILES = (".mp4", ".mov", ".mkv")
_AV1 = ("libsvtav1 -preset 6", "libaom-av1 -cpu-used 6 -row-mt 1 -b:v 0")
# No quality maps to crf 0: it makes x264 switch to a lossless profile that most players refuse.
CODECS: dict[str, Codec] = {
    "h264": Codec(("libx264",), _FILES, True, (51, 17, 1)),
    "h265": Codec(("libx265 -x265-params log-level=error",), _FILES, True, (51, 19, 1)),
    "av1": Codec(_AV1, (".mp4", ".mkv", ".webm"), True, (63, 24, 1)),
    "lossless": Codec(("libx264rgb -qp 0 -preset veryfast",), _FILES, False),
    "png": Codec(("png",), (), False),
}


@lru_cache(maxsize=4)
def _encoders(exe: str) -> frozenset[str]:
    done = subprocess.run([exe, "-encoders"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return frozenset(re.findall(r"^ V\S+ (\S+)", done.stdout.decode(errors="replace"), re.MULTILINE))


def find_ffmpeg() -> str:
    """The path of imageio-ffmpeg's ffmpeg, which starts. SolostepError if there is none."""
    try:
        import imageio_ffmpeg

        exe = str(imageio_ffmpeg.get_ffmpeg_exe())
        _encoders(exe)
    except (ImportError, RuntimeError, OSError) as error:
        raise SolostepError(f"No ffmpeg starts ({error}); reinstall imageio-ffmpeg.") from error
    return exe


def _encoder(codec: str, quality: float | None = None) -> list[str]:
    exe, crf = find_ffmpeg(), CODECS[codec].crf
    if quality is not None and (crf is None or not 0 <= quality <= 100):
        takes = "keeps every bit and takes no quality" if crf is None else "takes a quality from 0 to 100"
        raise UsageError(f"Codec {codec} {takes}, not {quality}; change the codec or the quality.")
    encoder = next((e.split() for e in CODECS[codec].encoders if e.split()[0] in _encoders(exe)), None)
    if encoder is None:
        raise UsageError(f"{exe} has no encoder for codec {codec}; choose another codec or update imageio-ffmpeg.")
    if crf is not None:
        encoder += ["-crf", str(crf[1] if quality is None else round(crf[0] + (crf[2] - crf[0]) * quality / 100))]
    return ["-c:v", *encoder]


def _check_target(path: Path, codec: str, folder: bool) -> None:
    """Whether the rename onto `path` at the end will be possible and hit nothing but an earlier film."""
    # Only trying it gives the right answer on read-only mounts, on Windows and for root.
    with tempfile.TemporaryFile(dir=path.parent, prefix=".solostep-"):
        pass
    if folder and path.is_dir():
        for entry in path.iterdir():
            if entry.name != _PNG_METADATA and not _PNG_NAME.fullmatch(entry.name):
                raise UsageError(f"The folder {path} holds other things ({entry.name}); give another -o.")
    elif path.exists() and (folder or not path.is_file()):
        kind = "a folder" if folder else "an ordinary file"
        raise UsageError(f"{path} exists and is not {kind}, which codec {codec} writes; give another -o.")
    elif path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{path} is there and may not be written; change its rights or give another -o.")


def check_output(path: str | os.PathLike[str], codec: str, size: tuple[int, int] | None = None) -> Path:
    """Check before any long work that a film can be written to `path`, and return it as a Path.

    size is (width, height) of the film in pixels, after any crop. An earlier film at `path` is no error: it will
    be replaced. Raises UsageError, which says what to change.
    """
    if codec not in CODECS:
        raise UsageError(f"There is no codec {codec!r}; choose one of {', '.join(CODECS)}.")
    path, suffixes, suffix = Path(path), CODECS[codec].suffixes, Path(path).suffix.lower()
    if suffixes and suffix not in suffixes:
        raise UsageError(f"{path}: codec {codec} needs a name that ends in {' or '.join(suffixes)}.")
    if not suffixes and (not path.name or suffix in (*_MUXERS, ".png")):
        raise UsageError(f"{path}: codec {codec} writes a folder; give a name for it without {suffix or 'a dot'}.")
    if not os.path.isdir(path.parent):  # unlike Path.is_dir, no error for a folder that may not be looked into
        raise UsageError(f"The folder {path.parent} does not exist; make it or give another -o.")
    try:
        _check_target(path, codec, folder=not suffixes)
    except OSError as error:
        raise UsageError(f"Cannot write in the folder {path.parent} ({error.strerror}); give another -o.") from error
    if size is not None and (min(size) < 1 or (CODECS[codec].yuv420 and any(side % 2 for side in size))):
        hint = "give an even width and height, or use codec lossless or png"
        raise UsageError(f"Codec {codec} cannot store {size[0]}x{size[1]} pixels; {hint}.")
    _encoder(codec)
    return path


def official_crop(height: int, width: int) -> tuple[slice, slice]:
    """The (rows, columns) of frames [height, width] that the official Step-Video post-processing keeps.

    The centre 540 x 960 of a landscape frame, 960 x 540 of a portrait one, all of a square one (halves are compared, so
    545 x 544 is square). An axis shorter than its crop is kept whole: officially, negative indices cut it wrong.
    """
    portrait, landscape = height // 2 > width // 2, height // 2 < width // 2
    rows, columns = (960, 540) if portrait else (540, 960) if landscape else (height, width)
    return _centre(height, rows), _centre(width, columns)


def _centre(length: int, keep: int) -> slice:
    return slice(length // 2 - keep // 2, length // 2 + keep // 2) if keep < length else slice(0, length)


def _metadata_json(metadata: dict[str, Any], indent: int | None = None) -> str:
    # backslashreplace makes half a surrogate pair, which has no UTF-8, into just its JSON escape.
    return json.dumps(metadata, ensure_ascii=False, indent=indent).encode(errors="backslashreplace").decode()


def _metadata_options(path: Path, metadata: dict[str, Any]) -> list[str]:
    comment = _metadata_json(metadata)
    if len(comment.encode()) > _MAX_METADATA_BYTES:
        raise UsageError(
            f"The metadata of {path} is over {_MAX_METADATA_BYTES} bytes of JSON; "
            "shorten the prompt or leave the metadata out (--no-metadata)."
        )
    options = ["-metadata", f"comment={comment}"]
    if "prompt" in metadata:
        title = str(metadata["prompt"])[:200].replace("\0", " ").encode(errors="replace").decode()
        options += ["-metadata", f"title={title}"]
    return options


class VideoWriter:
    """Context manager that writes a film to `path` while its frames are made.

    width, height: of the frames given, in pixels. fps: frames per second. quality: 0 (worst) to 100 (best), see
    `Codec.crf`, or None (visually clean). metadata: whatever JSON can hold, or None; see `read_metadata`.
    official_postprocess: `official_crop` and a temporal denoise in yuv420p, of which lossless and png keep every bit.

    Leaving the `with` normally replaces `path` by the film or raises OutputError; an exception or Ctrl-C leaves `path`
    as it was. The same frames and options make the same bytes. The constructor starts nothing and raises UsageError as
    `check_output` and for a bad fps, quality or too much metadata, TypeError for metadata that JSON cannot hold.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: float = 25.0,
        codec: str = "h264",
        quality: float | None = None,
        metadata: dict[str, Any] | None = None,
        official_postprocess: bool = False,
    ) -> None:
        self._shape = (height, width, 3)
        rows, columns = official_crop(height, width) if official_postprocess else (slice(0, height), slice(0, width))
        self._crop = (rows, columns)
        size = (columns.stop - columns.start, rows.stop - rows.start)
        self.path = check_output(path, codec, size)
        if not 0 < fps <= 1000:
            raise UsageError(f"The fps must be over 0 and at most 1000, not {fps}.")
        self._folder = not CODECS[codec].suffixes
        rate = str(Fraction(fps).limit_denominator(100_000))
        self._input = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", rate, "-i", "-"]
        self._output = self._output_options(codec, quality, official_postprocess)
        self._metadata_text: str | None = None
        if metadata is not None and self._folder:
            self._metadata_text = _metadata_json(metadata, indent=2)
        elif metadata is not None:
            self._output += _metadata_options(self.path, metadata)
        self.frames_written = 0
        self._pipe: Any = None  # ffmpeg's standard input, while in the with block
        self._messages: deque[str] = deque(maxlen=40)

    def _output_options(self, codec: str, quality: float | None, official: bool) -> list[str]:
        yuv420 = CODECS[codec].yuv420
        filters = [TO_YUV] if yuv420 or official else []
        filters += ([_DENOISE] if official else []) + ([] if yuv420 else [_TO_RGB])
        options = ["-an", "-vf", ",".join(filters), *_encoder(codec, quality)]
        options += ["-fflags", "+bitexact"]  # no dates, no random ids, no versions of ffmpeg
        if self._folder:
            return [*options, "-start_number", "0", "-f", "image2"]
        suffix = self.path.suffix.lower()
        if suffix in (".mp4", ".mov"):
            options += ["-movflags", "+faststart"]  # plays in a browser before it is all loaded
            options += ["-tag:v", "hvc1"] if codec == "h265" else []  # else Apple's players refuse it
        return [*options, "-f", _MUXERS[suffix]]

    def __enter__(self) -> VideoWriter:
        # Absolute, so that ffmpeg takes the name neither for an option nor for a protocol.
        self._temporary = self.path.parent.absolute() / f".solostep-{os.urandom(6).hex()}{self.path.suffix}"
        # In the folder itself, because a % in its path would be taken for a part of the pattern.
        target = "%05d.png" if self._folder else str(self._temporary)
        command = [find_ffmpeg(), "-hide_banner", "-v", "error", "-nostdin", "-y", *self._input, *self._output, target]
        try:
            if self._folder:
                self._temporary.mkdir()
            self._process = subprocess.Popen(command, cwd=self._temporary if self._folder else None, **_PIPES, **_APART)
        except OSError as error:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise OutputError(f"Cannot write {self.path}: {error}; give another -o.") from error
        self._pipe = self._process.stdin
        self._reader = threading.Thread(target=self._read_messages, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        return self

    def _read_messages(self, pipe: Any) -> None:
        with pipe:
            for line in pipe:
                self._messages.append(re.sub(r"^\[[^]]* @ [^]]*\] *", "", line.decode(errors="replace").strip()))

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 RGB frames, [n >= 1, height, width, 3] or [height, width, 3]; they can be dropped afterwards.

        Raises ValueError for another dtype or shape and OutputError when ffmpeg has failed.
        """
        if self._pipe is None or self._pipe.closed:
            raise RuntimeError("VideoWriter.write works only inside its with block")
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            raise ValueError(f"frames must be a uint8 array, not {getattr(frames, 'dtype', type(frames).__name__)}")
        if frames.ndim not in (3, 4) or frames.shape[-3:] != self._shape or len(frames) == 0:
            raise ValueError(f"frames must be [n >= 1, {str(self._shape)[1:-1]}], not {list(frames.shape)}")
        for frame in frames if frames.ndim == 4 else frames[None]:
            try:
                self._pipe.write(np.ascontiguousarray(frame[self._crop]).data)
            except OSError:  # a broken pipe, on Windows an invalid argument: ffmpeg is gone
                self._fail()
            self.frames_written += 1

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with ExitStack() as unless_finished:
            unless_finished.callback(self._abort)
            if kind is not None:
                return
            self._finish()
            unless_finished.pop_all()
        self._publish()

    def _finish(self) -> None:
        if self.frames_written == 0:
            raise OutputError(f"No frames were given for {self.path}, so nothing was written; give at least one.")
        try:
            self._pipe.close()
        except OSError:
            self._fail()
        if self._process.wait() != 0:
            self._fail()
        self._reader.join()
        try:
            if self._metadata_text is not None:
                (self._temporary / _PNG_METADATA).write_text(self._metadata_text + "\n", encoding="utf-8")
            # Network disks and quotas may report a lack of space only here.
            for file in self._temporary.iterdir() if self._folder else [self._temporary]:
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        except OSError as error:
            raise OutputError(f"Cannot write {self.path}: {error.strerror}; free space or give another -o.") from error

    def _fail(self) -> NoReturn:
        self._reader.join(timeout=10)  # the pipe can break before the last message
        self._abort()
        code = self._process.returncode
        said = [line for line in self._messages if line and not _NOISE.search(line)]
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"
        reason = f"ffmpeg says '{said[-1]}'" if said else f"ffmpeg {how}"
        raise OutputError(f"Cannot write {self.path}: {reason}; check the space there or give another -o.") from None

    def _abort(self) -> None:
        self._process.kill()
        with suppress(OSError):
            self._pipe.close()
        self._process.wait()
        self._reader.join()
        if self._folder:
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            self._temporary.unlink(missing_ok=True)

    def _publish(self) -> None:
        earlier = self._temporary.with_name(self._temporary.name + "-earlier")
        try:
            if self._folder and self.path.exists():  # no folder with files in it can be replaced in one step
                self.path.rename(earlier)
            os.replace(self._temporary, self.path)
        except OSError as error:
            with suppress(OSError):
                earlier.rename(self.path)
            names = f"{self._temporary} to {self.path} ({error.strerror})"
            raise OutputError(f"Cannot rename the finished film {names}; rename it yourself.") from error
        shutil.rmtree(earlier, ignore_errors=True)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The metadata that `VideoWriter` stored in a film or PNG folder, or None. UsageError if it is no film."""
    path = Path(path)
    if path.is_dir():
        file = _png_files(path)[0].with_name(_PNG_METADATA)
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    else:
        text = _container_comment(path)
    found = None
    with suppress(json.JSONDecodeError):  # no comment, or one that somebody else wrote
        found = json.loads(text)
    return found if isinstance(found, dict) else None


def _container_comment(path: Path) -> str:
    command = [
        find_ffmpeg(),
        "-v",
        "error",
        "-nostdin",
        *_READABLE,
        "-i",
        str(path.absolute()),
        "-f",
        "ffmetadata",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise UsageError(_NO_FILM.format(path))
    # ffmetadata has lines of key=value, where a backslash takes the meaning from the character after it.
    line = r"^((?:\\.|[^\\=\n])*)=((?:\\.|[^\\\n])*)$"
    for key, value in re.findall(line, done.stdout.decode(errors="replace"), re.MULTILINE | re.DOTALL):
        if key.lower() == "comment":  # Matroska has its keys in capitals
            return re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
    return ""


def _png_files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if _PNG_NAME.fullmatch(file.name)]
    if not files:
        raise UsageError(f"The folder {folder} holds no film (00000.png ...); give another one.")
    return sorted(files, key=lambda file: int(file.stem))


def read_frames(path: str | os.PathLike[str]) -> np.ndarray:
    """All frames of a film or PNG folder as uint8 RGB [F, H, W, 3]. UsageError if it is no film or has no frames."""
    path = Path(path)
    if path.is_dir():
        from PIL import Image

        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in _png_files(path)])
    import imageio_ffmpeg

    # passthrough: ffmpeg must not double or drop frames to even out timestamps.
    passthrough = ["-fps_mode", "passthrough"]
    reader = imageio_ffmpeg.read_frames(str(path.absolute()), input_params=[*_READABLE], output_params=passthrough)
    film = bytearray()
    try:
        width, height = next(reader)["size"]
        for frame in reader:
            film += frame
    except (OSError, RuntimeError, LookupError, AttributeError) as error:  # the last two from its header parser
        raise UsageError(_NO_FILM.format(path)) from error
    if not film:
        raise UsageError(_NO_FILM.format(path))
    return np.frombuffer(film, dtype=np.uint8).reshape(-1, height, width, 3)
