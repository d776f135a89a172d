"""What all scripts share: errors in one sentence, torchrun's environment, files written as a whole.

Nothing here imports PyTorch, so prepare.py, which does not need it, starts in half a second.
"""
import codecs
import contextlib
import ctypes
import errno
import fcntl
import gzip
import io
import os
import re
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO, cast

# --------------------------------------------------------------------------------------------------
# Errors that a user can mend. Each is one sentence that names a file, a row or a flag.

class DataError(Exception):
    """Input that cannot be used; its text is the whole message that the user sees."""


class ImageError(DataError):
    """An image that the manifest lists but that cannot be read. Only one process meets it."""


@contextlib.contextmanager
def errors_in_one_sentence(script: str, out: str | Path, speaks: bool = True,
                           afterwards: str = "") -> Iterator[None]:
    """If the user can mend an error, end the script with one sentence and a non-zero exit code.

    out: the folder that is written. It is named if the operating system names no file.
    speaks: True for the first process of a machine. The same input is wrong for all processes and
    should be reported once. Errors that one process may meet alone are always reported: those of
    an image or of the operating system. Ctrl-C exits with 130, as shells expect.
    FloatingPointError means that training diverges. Other exceptions pass through.
    afterwards: what the same command does after Ctrl-C, if it does not resume."""
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit(f"{script}: the folder that {script} was started in was deleted: go to another")
    try:
        yield
        if sys.stdout:                  # None if a caller wants nothing printed
            sys.stdout.flush()          # raises if the disk is full
    except (DataError, FloatingPointError) as error:
        sys.exit(f"{script}: {error}" if speaks or isinstance(error, ImageError) else 1)
    except OSError as error:            # a full disk, a folder without permission to write
        sys.exit(f"{script}: {error.strerror or error}: {error.filename or _blamed(error, out)}")
    except UnicodeEncodeError as error:     # this locale cannot spell a file's name
        sys.exit(f"{script}: {error.object!a} cannot be spelled in {error.encoding}: rename it, or "
                 "try again after `export PYTHONUTF8=1`")
    except KeyboardInterrupt:
        if speaks:
            afterwards = afterwards or f"goes on from what is in {out}"
            print(f"{script}: interrupted; the same command {afterwards}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _blamed(error: OSError, out: str | Path) -> str | Path:
    """What an error of the operating system is about if it names no file: standard output, the
    locks of multiprocessing, or else `out`, which is being written."""
    # An error of standard output is raised in a line that prints.
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if "print(" in line or "stdout" in line:
        with contextlib.suppress(OSError):      # else Python would write again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "standard output (the terminal, pipe or file that this prints to)"
    frame = error.__traceback__
    while frame:
        if frame.tb_frame.f_globals.get("__name__") == "multiprocessing.synchronize":
            return ("/dev/shm, where Python's multiprocessing must be able to write its locks; "
                    "--workers 1 (of predict.py --threads 1) needs none")
        frame = frame.tb_next
    return out


def begin_script() -> None:
    """To be called first in a script's main().

    A character that the terminal's encoding lacks is printed as an escape, such as \\u80ba, so
    that no name ends a run. A Ctrl-C that a library dropped while it was loaded is raised now."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):        # not a notebook's stream
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is _interrupt_while_loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _dropped:
            raise KeyboardInterrupt


_dropped = []       # Ctrl-C while libraries were loaded, none of which has ended the process


def _interrupt_while_loading(number, frame) -> None:
    """Ctrl-C before the script begins. Some libraries drop all exceptions while they are loaded."""
    _dropped.append(number)
    raise KeyboardInterrupt


def _report_uncaught(kind, error, traceback) -> None:
    """Report an uncaught exception as Python does, but Ctrl-C without a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: interrupted before it began", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


def _interrupt_again(unraisable) -> None:
    """Send Ctrl-C again, a little later, if it came in a destructor or a weak reference's callback:
    Python drops every exception there."""
    if unraisable.exc_type is KeyboardInterrupt:
        main = threading.main_thread().ident or 0
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def end_with_parent(sign: int, parent: int | None = None) -> None:
    """Have the kernel send a signal to this process when the process that started it dies.

    parent: its id, if that is known. If it is dead already, the signal would never come, and this
    process exits."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sign)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _open_streams() -> None:
    """If a daemon or cron has closed standard input, output or error, open it as /dev/null. Else
    the next file that is opened would get its number and everything that is printed, and a
    progress bar would find no stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)    # the lowest free number
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


# Nothing else in the project runs at import. A script loads PyTorch for seconds before its main()
# is called. This file is imported before that, because only these hooks answer Ctrl-C until then.
sys.excepthook, sys.unraisablehook = _report_uncaught, _interrupt_again
if (threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, _interrupt_while_loading)
_open_streams()
# A script that is started from a notebook inherits the notebook's MPLBACKEND, which may not be
# installed here. If the notebook itself imports this file, it keeps its backend.
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "Agg"
# If torchrun is killed by SIGKILL, it cannot stop its processes. They would run on unseen and keep
# the run folder locked, or wait for torchrun forever.
if "TORCHELASTIC_RUN_ID" in os.environ:
    end_with_parent(signal.SIGTERM)


def restart_in_utf8() -> None:
    """If the locale's encoding is not UTF-8, restart the script in Python's UTF-8 mode.

    File names are bytes. A Latin-1 locale, for example, would read them, and write them into the
    data folder, as another text than the manifest has. To be called before anything else."""
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# --------------------------------------------------------------------------------------------------
# The processes that torchrun started.

class Place(NamedTuple):
    """A process's number among those of torchrun, and how many: on all machines, on its own."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


ALONE = Place()
# Environment variables that torchrun sets. The last two say where the processes meet.
NUMBERS, MEETING_POINT = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")


def read_place() -> Place:
    """This process's place, from the environment; ALONE if torchrun has set nothing.

    DataError if only some variables are set. Variables left from something else would make this
    process wait for others that never come, or print nothing as though it were not the first."""
    variables = os.environ
    present = [name for name in NUMBERS if name in variables]
    if not present:  # many job scripts set the meeting point, for a torchrun
        return ALONE
    advice = ("start the processes with torchrun, or this one alone after `unset "
              f"{' '.join(name for name in (*NUMBERS, *MEETING_POINT) if name in variables)}`")
    missing = [name for name in (*NUMBERS, *MEETING_POINT) if name not in variables]
    if missing:
        raise DataError(f"the environment has {', '.join(present)} but not {', '.join(missing)}, "
                        f"as torchrun would set: {advice}")
    try:
        rank, world_size, local_rank = (int(variables[name]) for name in NUMBERS)
        local_world_size = int(variables.get("LOCAL_WORLD_SIZE", 1))
        int(variables["MASTER_PORT"])
    except ValueError as error:
        raise DataError(f"a variable of torchrun's is no number ({error}): {advice}") from None
    if not (0 <= rank < world_size and 0 <= local_rank and local_world_size >= 1):
        values = ", ".join(f"{name}={variables[name]}" for name in NUMBERS)
        raise DataError(f"the environment has {values}, which cannot be: {advice}")
    return Place(rank, world_size, local_rank, local_world_size)


# --------------------------------------------------------------------------------------------------
# Files.

@contextlib.contextmanager
def whole_file(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which is renamed to `path` after everything is written.

    So `path` always has the whole old content or the whole new content. With `sync` that is
    true even after a power cut; without it, thousands of small files are written much faster."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # else a full disk would stay full


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file as a whole, in UTF-8. Bytes of file names that are not UTF-8 stay."""
    with whole_file(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def open_text(path: str | Path) -> TextIO:
    """A text file to read, whatever the locale: UTF-8, or UTF-16 if its byte-order mark says so.

    The byte-order mark is not part of the text, and line ends stay as they are. A file packed by
    gzip is decompressed, whatever its name. Reading raises UnicodeDecodeError for other
    encodings. DataError for a pipe: it can be read only once, and without a writer never."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{path} is no file, but a pipe or a device: save its text in a file")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    opener = gzip.open if packed or str(path).lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if utf16 else "utf-8-sig"
    return cast(TextIO, opener(path, "rt", encoding=encoding, newline=""))


def read_text(path: str | Path) -> str:
    """A whole text file, as open_text reads it. DataError if it has another encoding.

    If files were joined, the second one's byte-order mark becomes a line end."""
    try:
        with open_text(path) as file:
            text = file.read()
    except (UnicodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path} is not text in UTF-8 (it holds zero bytes): save it as UTF-8")
    return re.sub(r"\n?\ufeff", "\n", text)


def write_csv(path: str | Path, rows: Iterable[Iterable]) -> None:
    """Replace a CSV file as a whole, in UTF-8, one row a line; csv.reader reads the same rows.

    Some versions of Python's csv.writer do not quote a carriage return in a name, and csv.reader
    would end the row there. Bytes of file names that are not UTF-8 are escaped, because lists of
    rejected files must be readable as text."""
    text = io.StringIO()
    for row in rows:
        text.write(",".join(csv_cell(str(cell)) for cell in row) + "\n")
    with whole_file(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def csv_cell(text: str) -> str:
    """The text of a CSV cell, in quotes if it has a comma, a quote or a line end."""
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def plain_name(text: str, most: int = 200) -> str:
    """Text that can be part of a file's name: the last `most` bytes, as file systems allow 255."""
    plain = re.sub(r"[^\w.-]+", "-", text)
    return plain.encode()[-most:].decode(errors="ignore")


def printable(text: str) -> str:
    """Text in one line, with characters escaped that are not printable: control characters, and
    blanks other than the space."""
    return "".join(character if character.isprintable() else repr(character)[1:-1]
                   for character in text)


def valid_unicode(text: str) -> str:
    """Text in which bytes of file names that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def lock(file) -> bool:
    """Try to lock an open file for this process until the file is closed; False if another has it.

    Some storage has no locks: Lustre mounted without them, NFS without its lock service, some
    FUSE systems. Then the answer is True, after a warning that names the folder."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):        # another process has it
            return False
        print(f"warning: the storage of {Path(file.name).parent} has no file locks "
              f"({error.strerror}): nothing stops a second run from writing there at the same "
              "time, so start only one", file=sys.stderr, flush=True)
    return True
