"""Whose request is answered: not one that a page of another site made a browser send.

Such a page can send a form or plain text anywhere, and whatever it likes to a host whose name its
owner lets lead here. So names of hosts must be known, requests that change something must come from
this server's own page or from no page at all, and bodies must say what they are.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.refusal import Refusal, shown, unsupported

JSON, BINARY, PICTURE = "application/json", "application/octet-stream", "image/*"
# What curl says of a body whose type it was not told.
_FORM = "application/x-www-form-urlencoded"
UNKNOWN = "unknown"  # a client without an address

Headers = Iterable[tuple[bytes, bytes]]


def check_caller(method: str, headers: Headers, hosts: tuple[str, ...]) -> None:
    """Raise `Refusal` for a request of another site, or one of two lengths.

    Args:
        method: GET, POST and so on.
        headers: Names in lower case, and values.
        hosts: Names, beside localhost and every address, by which this server may be called;
            `*.NAME` is every name below one, `*` every name.
    """
    found = {name: value.decode("latin-1") for name, value in headers}
    if b"content-length" in found and b"transfer-encoding" in found:
        words = "the body's length is said twice, by Content-Length and by Transfer-Encoding."
        raise Refusal(400, "framing", words)
    host = found.get(b"host")
    if host is not None and not _is_known(host, hosts):
        raise Refusal(
            421,
            "host",
            f"this server is not called {shown(host)}: use its address, or start it with "
            "--allow-host NAME.",
        )
    if method not in ("GET", "HEAD", "OPTIONS") and not _is_own(found, host):
        raise Refusal(403, "site", "a page of another site may not send this request.")


def called_by(options: CoreOptions, host: str) -> CoreOptions:
    """Return options that allow the name that the server listens on, where it is one."""
    if not host or _is_address(host):
        return options
    return replace(options, allow_hosts=(*options.allow_hosts, host))


@lru_cache(64)  # clients say the same with every request
def _is_known(host: str, hosts: tuple[str, ...]) -> bool:
    try:
        place = urlsplit(f"//{host}")
        name, _ = place.hostname or "", place.port
    except ValueError:
        return False
    if place.netloc != host or any(mark in host for mark in "@,*"):
        return False
    if host.startswith("["):
        return _is_address(name)
    name = name.removesuffix(".")
    known = (each.lower() for each in (*hosts, "localhost"))
    return _is_address(name) or any(fnmatchcase(name, each) for each in known)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_own(headers: dict[bytes, str], host: str | None) -> bool:
    """Whether a request comes from this server's own page, or from no page."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get(b"origin")
    if origin is None:
        return True
    return host is not None and origin.partition("://")[2].lower() == host.lower()


def check_type(headers: Headers, accepted: Collection[str]) -> None:
    """Raise a 415 for a body of another type than those accepted.

    A program that names none is taken at its body; a browser must name one, since it sends bodies
    of no type, forms and plain text to any site without asking that site before.

    Args:
        headers: Names in lower case, and values.
        accepted: Types, one of them perhaps `image/*`.
    """
    found = dict(headers)
    said = found.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if said in accepted or (PICTURE in accepted and said.startswith("image/")):
        return
    if said.startswith("multipart/") and PICTURE in accepted:
        raise unsupported("send the picture's bytes as the whole body, not as a form.")
    program = b"origin" not in found and b"sec-fetch-site" not in found
    if not (program and said in ("", _FORM)):
        wanted = " or ".join(accepted)
        raise unsupported(f"the header Content-Type must be {wanted}: given {shown(said)}.")


def client_of(address: Sequence[Any] | None) -> str:
    """Return one word for all addresses that one client may have.

    Args:
        address: A peer's address, the host first; None where it is not known.

    Returns:
        The address itself for IPv4, its network of 64 bits for IPv6 (a client is given as much),
        and one and the same word for whatever has no address.
    """
    return _network_of(address[0]) if address else UNKNOWN


@lru_cache(1024)
def _network_of(host: str) -> str:
    try:
        found = ip_address(host)
    except ValueError:
        return UNKNOWN
    if not isinstance(found, IPv6Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return f"{IPv6Address(int(found) >> 64 << 64)}/64"
