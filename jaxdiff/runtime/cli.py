"""What command lines share: an error of the user is one sentence on stderr and exit code 2."""

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax


def exit_code(command: Callable[[], int | None], smaller: str = "a smaller batch") -> int:
    """Runs `command` and returns its exit code; None counts as 0. What is no user's error is raised as it is.

    Args:
        command: raises ValueError or OSError, in a sentence, for what the user can mend.
        smaller: what to try when memory runs out.
    """
    try:
        return command() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: There is not enough memory; try {smaller}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def check_writable(folder: Path) -> None:
    """Makes the folder, and finds out before the work, not after it, whether files can be written there.

    Raises:
        ValueError: where not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise ValueError(f"{folder} cannot be written to: it is a file, not a folder.") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}.") from error


def part_of(text: str) -> tuple[int, int]:
    """`--part 1/4` -> (0, 4).

    Raises:
        ValueError: where it is written otherwise, or is no part.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part is {text!r}; write it as I/N, from 1/N to N/N.")
    return int(number) - 1, int(count)
