"""The addresses of clients, as limits count them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

IPV6_PREFIX = 64  # bits: what one customer of a provider has at least


def counted(address: str) -> str:
    """The address or network that limits count: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        parsed = unmapped(address)
    except ValueError:  # a name, such as that of a Unix socket
        return address
    if isinstance(parsed, IPv4Address):
        return str(parsed)
    return f"{IPv6Address(int(parsed) >> IPV6_PREFIX << IPV6_PREFIX)}/{IPV6_PREFIX}"


def unmapped(address: str) -> IPv4Address | IPv6Address:
    """An address, as IPv4 if it is an IPv4 address written as IPv6. Raises ValueError."""
    parsed = ip_address(address)
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, IPv6Address) else parsed
