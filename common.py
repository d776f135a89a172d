"""What all scripts share without PyTorch: errors in one sentence, torchrun's environment, files
written whole.

prepare.py, which needs no PyTorch, starts in half a second because of that.
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
# Errors that a user can mend. Each is one sentence that names the file, the row or the flag.

class DataError(Exception):
    """Input that cannot be used; its text is the whole message that the user sees."""


class ImageError(DataError):
    """An image that the manifest lists and that cannot be read. One process meets it, alone."""


@contextlib.contextmanager
def errors_in_one_sentence(script: str, out: str | Path, speaks: bool = True,
                           afterwards: str = "") -> Iterator[None]:
    """End the script with one sentence and a non-zero exit code where its user can mend the error.

    out: the folder being written; it is named where the operating system names no file.
    speaks: False on all processes of a machine but the first. The same input is wrong for all of
    them and should be reported once. What one process may meet alone is always reported: an image,
    the operating system. Ctrl-C exits with 130, as shells expect. FloatingPointError is a training
    that diverges. Other exceptions pass through.
    afterwards: what the same command does after Ctrl-C, where it does not go on."""
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit(f"{script}: the folder that {script} was started in was deleted: go to another")
    try:
        yield
        if sys.stdout:                  # None where a caller wants nothing printed
            sys.stdout.flush()          # what is still to be printed may find a full disk
    except (DataError, FloatingPointError) as error:
        sys.exit(f"{script}: {error}" if speaks or isinstance(error, ImageError) else 1)
    except OSError as error:            # a full disk, a folder without permission to write
        sys.exit(f"{script}: {error.strerror or error}: {error.filename or _blamed(error, out)}")
    except UnicodeEncodeError as error:     # a file's name that this locale cannot spell
        sys.exit(f"{script}: {error.object!a} cannot be spelled in {error.encoding}: rename it, or "
                 "try again after `export PYTHONUTF8=1`")
    except KeyboardInterrupt:
        if speaks:
            afterwards = afterwards or f"goes on from what is in {out}"
            print(f"{script}: interrupted; the same command {afterwards}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _blamed(error: OSError, out: str | Path) -> str | Path:
    """What an error of the operating system without a file's name is about: `out`, which is being
    written, unless standard output fails, or it was raised where multiprocessing makes a lock."""
    # Printing raises in the line that prints; only a stream has no file's name to give.
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if "print(" in line or "stdout" in line:
        with contextlib.suppress(OSError):      # else Python would try once more when it ends
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

    No name ends a run because the terminal's encoding lacks a character of it: such a character
    is printed as \\u80ba. A Ctrl-C that a library dropped while it was loaded is raised now."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):        # and not what a notebook put there
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
    """Python's answer to an uncaught exception, but for Ctrl-C no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: interrupted before it began", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


def _interrupt_again(unraisable) -> None:
    """Ctrl-C in a destructor or a weak reference's callback, where Python drops every exception:
    once more, when that has returned."""
    if unraisable.exc_type is KeyboardInterrupt:
        main = threading.main_thread().ident or 0
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _leave_with_torchrun() -> None:
    """Have the kernel send SIGTERM to this process when the one that started it dies.

    A torchrun that is killed by SIGKILL passes nothing on. Its processes would go on unseen and
    keep the run folder locked, or wait for it without end."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _open_streams() -> None:
    """Open what a daemon or cron has closed of standard input, output and error as /dev/null. Else
    the next file that is opened would get their number, and what is printed; and a progress bar
    finds no stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)    # the lowest free number
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


# Nothing else in the project runs at import. A script loads PyTorch for seconds before its main()
# is called, and nothing else can answer Ctrl-C until then; so this file is loaded first.
sys.excepthook, sys.unraisablehook = _report_uncaught, _interrupt_again
if (threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, _interrupt_while_loading)
_open_streams()
# A notebook tells what it starts to draw into it, by a backend that need not be installed here.
# Where the notebook itself imports this, the variable is its own.
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "Agg"
if "TORCHELASTIC_RUN_ID" in os.environ:
    _leave_with_torchrun()


def restart_in_utf8() -> None:
    """Start the script once more in Python's UTF-8 mode, where the locale asks for another one.

    Names of files are bytes. By a locale of Latin-1 they would be read, and written into the data
    folder, as other text than the manifest has. To be called before anything is done."""
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# --------------------------------------------------------------------------------------------------
# The processes that torchrun started.

class Place(NamedTuple):
    """A process among those that torchrun started: of all machines, and of its own."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


ALONE = Place()
# What torchrun tells each process. The latter two say where the processes meet.
NUMBERS, MEETING_POINT = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")


def read_place() -> Place:
    """This process's place, from the environment; the only process's where that says nothing.

    DataError where it says only half: a variable that was left by something else would make
    this process wait for others that never come, or be silent as though it were not the first."""
    variables = os.environ
    present = [name for name in NUMBERS if name in variables]
    if not present:  # the meeting point alone is set for torchrun by many a job script
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
    """A file to write to, which gets its name `path` once everything is written.

    Whoever opens `path` finds the old content or the new content, never a part of it.
    With `sync` that holds after a power cut too; without, it is faster by far for
    thousands of small files."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # half a file on a full disk would keep it full


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file as a whole, in UTF-8. Bytes of file names that are not UTF-8 stay."""
    with whole_file(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def open_text(path: str | Path) -> TextIO:
    """A text file to read, whatever the locale: UTF-8, or UTF-16 where it begins with that mark.

    A byte-order mark is no part of the text, and line ends are left as they are. What is packed
    by gzip, whatever its name, is decompressed. Reading raises UnicodeDecodeError for other text;
    DataError for a pipe, which could be read only once, and without a writer never."""
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
    """A whole text file, as open_text reads it. DataError names a file in another encoding.

    Where files were joined, the byte-order mark of the second begins a line."""
    try:
        with open_text(path) as file:
            text = file.read()
    except (UnicodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path} is not text in UTF-8 (it holds zero bytes): save it as UTF-8")
    return re.sub(r"\n?\ufeff", "\n", text)


def write_csv(path: str | Path, rows: Iterable[Iterable]) -> None:
    """Replace a CSV file as a whole, in UTF-8, one row a line; csv.reader gives the rows back.

    Python's own csv.writer leaves a carriage return in a name unquoted in some versions, and its
    reader ends the row there. Bytes of file names that are not in UTF-8 are escaped: the list of
    what was rejected must be readable as text."""
    text = io.StringIO()
    for row in rows:
        text.write(",".join(csv_cell(str(cell)) for cell in row) + "\n")
    with whole_file(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def csv_cell(text: str) -> str:
    """A cell as it stands in a CSV file: quoted where its text could be taken for anything else."""
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def plain_name(text: str, most: int = 200) -> str:
    """Text as part of a file's name, the last `most` bytes of it: file systems take 255."""
    plain = re.sub(r"[^\w.-]+", "-", text)
    return plain.encode()[-most:].decode(errors="ignore")


def printable(text: str) -> str:
    """Text in one line: what a terminal would take for a command is escaped, and blanks that look
    like others are."""
    return "".join(character if character.isprintable() else repr(character)[1:-1]
                   for character in text)


def valid_unicode(text: str) -> str:
    """Text for those who take no bytes of file names that are not UTF-8: they are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def lock(file) -> bool:
    """Whether this process holds an open file for itself from now on, until the file is closed.

    Some storage has no locks: Lustre mounted without them, NFS without its lock service, some
    FUSE systems. There the answer is True, after a warning that names the folder."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):        # somebody else has it
            return False
        print(f"warning: the storage of {Path(file.name).parent} has no file locks "
              f"({error.strerror}): nothing stops a second run from writing there at the same "
              "time, so start only one", file=sys.stderr, flush=True)
    return True
