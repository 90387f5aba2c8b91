"""Whether the Hugging Face hub can be reached, asked before anything waits for it."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def hub_reachable() -> bool:
    """Return whether the hub's address resolves (or a proxy is set); False in offline mode."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
