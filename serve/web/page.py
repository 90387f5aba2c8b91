"""The page at `/`: one file, no resource from elsewhere, and a policy that keeps it so."""

import base64
import hashlib
import re
from importlib.resources import files


def read_page() -> tuple[str, str]:
    """Return the page and its Content-Security-Policy.

    The policy lets the page's own script and style run, by their hashes, and lets it talk to this
    server only.
    """
    text = files("mdpd_deploy.serve.web").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src blob: data:; "
        f"script-src {_hashes(text, 'script')}; style-src {_hashes(text, 'style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hashes(text: str, element: str) -> str:
    bodies = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digests = (hashlib.sha256(body.encode()).digest() for body in bodies)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
