"""Fashion-MNIST's 70,000 grey photos as WebDataset tars, to try `prepare collect` on.

apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
python scripts/fashion_mnist.py usr/share/datasets/fashion-mnist fashion
python -m jaxdiff.tools.prepare collect fashion --name fashion
"""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("a T-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
         "an ankle boot")  # fmt: skip
PER_TAR = 5000


def read(path: Path, head: int) -> np.ndarray:
    """The bytes of an idx file behind its head."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=head)


def main(source: Path, target: Path) -> None:
    """Writes fashion-00000.tar and so on."""
    target.mkdir(parents=True, exist_ok=True)
    images = np.concatenate([read(source / f"{name}-images-idx3-ubyte.gz", 16) for name in ("train", "t10k")])
    labels = np.concatenate([read(source / f"{name}-labels-idx1-ubyte.gz", 8) for name in ("train", "t10k")])
    for start in range(0, len(labels), PER_TAR):
        with tarfile.open(target / f"fashion-{start // PER_TAR:05}.tar", "w") as tar:
            for i in range(start, min(start + PER_TAR, len(labels))):
                out = io.BytesIO()
                Image.fromarray(images.reshape(-1, 28, 28)[i]).save(out, "PNG")
                for kind, data in (("png", out.getvalue()), ("txt", f"a photo of {NAMES[labels[i]]}".encode())):
                    member = tarfile.TarInfo(f"{i:06}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
