"""Errors, exit codes, and how a script ends: a mistake is one line on standard error, never a traceback."""

import atexit
import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

EXIT_OK, EXIT_FAILURE, EXIT_MISTAKE, EXIT_INTERRUPTED = 0, 1, 2, 130


class UserError(ValueError):
    """An error the user can fix: one line that says what is wrong, where, and what to do."""


class RunFailed(RuntimeError):
    """A run that cannot continue although its flags are right: one line that says why and what to do."""


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal and is saved: one line that says at which step. `except Exception` does not catch it."""


def guarded(what: str, action: Callable):
    """Call `action`, library code that reads untrusted files, and convert its errors to UserError, `what` and the reason.

    Such libraries share no base class of errors: tokenizers raises bare Exceptions, and its Rust panics are BaseExceptions.
    """
    try:
        return action()
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = one_line(error)
        if "weights_only" in str(error):  # PyTorch's message recommends to run the file's code
            reason = (
                "its weights are damaged, or contain more than plain tensors, which is never run; "
                "download it again, or take a model with .safetensors"
            )
        elif "trust_remote_code" in str(error):
            reason = "it contains Python code, which is not run; if you trust it, pass --trust_remote_code"
        raise UserError(f"{what}: {reason}") from None


def interruptible(action: Callable, seconds: float | None = None):
    """Return `action()`, native code that may take minutes, from a thread: Ctrl-C ends the wait for it at once.

    Raises TimeoutError if it takes longer than `seconds`.
    """
    result = Future()
    threading.Thread(target=record, args=[result, action], daemon=True).start()
    if not wait([result], seconds).done:
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    return result.result()


def record(result: Future, action: Callable) -> None:
    """Call `action` and keep what it returns or raises, even SystemExit, in `result`."""
    try:
        result.set_result(action())
    except BaseException as error:
        result.set_exception(error)


def one_line(error: BaseException) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def run_script(name: str, main: Callable[[], int | None]) -> None:
    """Run a script's `main()` and exit with its code; a user's mistake is one line on standard error and code 2."""
    codes: list[int] = []
    if "RANK" in os.environ:  # of torchrun
        atexit.register(_leave, codes)  # the first hook is the last that is called
    _open_closed_streams()
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode still shows the rest
    try:
        _check_current_folder()
        code = main() or EXIT_OK
        sys.stdout.flush()
    except UserError as mistake:
        if not getattr(mistake, "reported_by_main_rank", False):
            print_error(f"{name}: error: {' '.join(str(mistake).splitlines())}")
        code = EXIT_MISTAKE
    except RunFailed as failure:
        print_error(f"{name}: failed: {' '.join(str(failure).splitlines())}")
        code = EXIT_FAILURE
    except Interrupted as stop:
        print_error(f"\n{name}: {stop}")
        code = EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print_error(f"\n{name}: interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_OK
    except OSError as error:  # of the system: a full disk behind `>`, a folder that is gone, no permission
        place = os.fsdecode(error.filename) if error.filename else "standard output, or a file of this run"
        print_error(f"{name}: failed: {place}: {error.strerror or one_line(error)}")
        code = EXIT_FAILURE
    try:
        sys.stdout.flush()
    except OSError:  # a closed pipe or a full disk: Python would flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    threading.Thread(target=_exit_at_last, args=[code], daemon=True).start()
    codes.append(code)
    sys.exit(code)


def _leave(codes: list[int]) -> None:
    """End a rank after the other exit hooks, without taking the interpreter apart: a thread of Gloo that is late to let go of a
    tensor would abort it, and torchrun would take a finished run for a failed one (https://github.com/pytorch/pytorch/issues/190489).
    """
    if codes:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(codes[0])


_EXIT_SECONDS = 30


def _exit_at_last(code: int) -> None:
    """Exit some time after the main thread has ended, if an exit hook or a thread of a library still hangs then."""
    threading.main_thread().join()
    time.sleep(_EXIT_SECONDS)
    os._exit(code)


# How file systems and systems refuse a call that they do not have.
UNSUPPORTED = frozenset(
    {
        errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENODEV, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY,
        errno.EOPNOTSUPP, errno.EPERM, errno.EROFS,
    }
)  # fmt: skip
_refused: set[str] = set()


@contextlib.contextmanager
def optional(call: str, lost: str) -> Iterator[None]:
    """The context of a system call that the work does not need: if it is refused, say once what is lost, and continue."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if call not in _refused and os.environ.get("RANK") in (None, "", "0"):
            print_error(f"note: this file system refuses {call} ({error.strerror}): {lost}")
        _refused.add(call)


def _check_current_folder() -> None:
    """Raise UserError if the folder that relative paths start from was deleted: libraries abort the process then."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder no longer exists; change into another one (cd) and run again") from None


def _open_closed_streams() -> None:
    """Open the null device in place of closed standard streams; the next files would get their descriptors otherwise."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115


def print_error(line: str) -> None:
    """Print a line on standard error; ignores write errors."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
