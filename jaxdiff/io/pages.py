"""Web pages of one file: what the browser may do with them."""

import base64
import hashlib
import re


def content_policy(page: str, images: str) -> str:
    """A Content-Security-Policy: the page runs its own script and looks as its own style says; nothing comes from
    elsewhere or goes there.

    Args:
        page: its HTML; what stands in <script> and <style> without attributes is its own.
        images: where images may come from, such as "data:".
    """

    def hashed(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    return (f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; img-src {images}; "
            "base-uri 'none'; form-action 'none'")  # fmt: skip
