"""Who a client is, as far as limits for one client go."""

from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any

UNKNOWN = "unknown"


def client_of(address: Sequence[Any] | None) -> str:
    """Return one word for all addresses that one client may have.

    Args:
        address: A peer's address, the host first; None where it is not known.

    Returns:
        The address itself for IPv4, its network of 64 bits for IPv6 (a client is given as much),
        and one and the same word for whatever has no address.
    """
    if not address:
        return UNKNOWN
    try:
        found = ip_address(address[0])
    except ValueError:
        return UNKNOWN
    if not isinstance(found, IPv6Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return f"{IPv6Address(int(found) >> 64 << 64)}/64"
