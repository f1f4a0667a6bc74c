"""What every command line does with an error of its user: one sentence on stderr and exit code 2."""

import signal
import sys
from collections.abc import Callable

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
