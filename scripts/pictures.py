"""Draws the documentation's images of tasks again, with the embedded model: `python scripts/pictures.py`.

Each is drawn by the command that docs/sampling.md shows; the others start from the first.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "tasks"
FACE = "smiling face, flat style, on a white background"
# name -> the command's words after `python sample.py`.
PICTURES = {
    "text": f'"{FACE}" --seed 3',
    "image": '"smiling face, 3d style, on a yellow background" --image docs/tasks/text.png --strength 0.6',
    "inpaint": '"smiling face with sunglasses, on a white background" --image docs/tasks/text.png '
    "--mask docs/tasks/mask.png --feather 4",
    "outpaint": f'"{FACE}" --image docs/tasks/text.png --outpaint 8 8 8 8',
    "style": f'"smiling face, flat style, on a blue background" --image docs/tasks/text.png --invert ddim '
    f'--source-prompt "{FACE}" --keep-layout 0.4',
    "regions": '"on a white background" --region "0,0,0.5,1:a red apple, on a white background" '
    '--region "0.5,0,1,1:a green leaf, on a white background"',
    "panorama": '"a green leaf, on a yellow background" --size 192x64 --tile 64',
    "weights": '"a (red:1.3) heart AND smiling face, on a yellow background"',
    "schedule": '"[a sun:smiling face:0.3], on a blue background" --seed 2',
    "variation": f'"{FACE}" --seed 3 --to-seed 11 --mix 0.4',
    "upscale": f'"{FACE}" --image docs/tasks/text.png --upscale 2 --strength 0.2 --guidance 1',
    "way": '"a red apple, on a blue background" --to-prompt "a star, on a black background" --to-seed 5 --frames 8',
    "steps": f'"{FACE}" --seed 3 --steps 8 --trajectory',
}
SHOWN = {"way": "*.gif", "steps": "*-steps.png"}  # what is kept of commands that write several files


def main() -> int:
    """Draws all, or those that are named."""
    OUT.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((8, 12, 56, 34), fill=255)
    mask.save(OUT / "mask.png")
    for name in sys.argv[1:] or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "sample.py", *shlex.split(PICTURES[name]), "--out", folder]
            subprocess.run(command, cwd=ROOT, check=True)
            (made, *_) = sorted(Path(folder).glob(SHOWN.get(name, "*.png")))
            (OUT / f"{name}{made.suffix}").write_bytes(made.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
