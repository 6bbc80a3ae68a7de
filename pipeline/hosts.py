"""Hosts: how a name may be written, which names a list allows, and which addresses are public."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

USUAL_PORTS = (80, 443)

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)

_PRIVATE = tuple(
    ipaddress.ip_network(network)
    for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "::1", "fc00::/7")
)
# What answers with a cloud machine's credentials, and ranges that some versions of Python take for public.
_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in ("168.63.129.16", "100.100.100.200", "fd00:ec2::254", "192.0.0.0/24", "192.88.99.0/24",
                    "2001::/32", "3fff::/20", "fec0::/10")
)  # fmt: skip
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


@dataclass(frozen=True, slots=True)
class HostRule:
    """An entry of an allow-list.

    Attributes:
        name: a host, or with `is_wildcard` the domain that it must be under.
        port: the only port, or None for the usual ones.
    """

    name: str
    port: int | None
    is_wildcard: bool

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """Read `img.shop.example`, `*.cdn.shop.example`, `img.shop.example:8080`, `10.0.0.7` or `[fd00::7]`.

        Raises:
            ValueError: it is none of these; a wildcard over a whole top-level domain is none.
        """
        is_wildcard = text.startswith("*.")
        found = split_authority(text.removeprefix("*."))
        if found is None or (is_wildcard and ("." not in found[0] or is_address(found[0]))):
            raise ValueError(
                f"{text!r} is no host; write img.shop.example, *.cdn.shop.example or img.shop.example:8080"
            )
        return cls(*found, is_wildcard)

    def covers(self, host: str, port: int) -> bool:
        """Whether the entry allows a host, as `split_authority` gives it, and a port."""
        is_named = host.endswith(f".{self.name}") if self.is_wildcard else host == self.name
        return is_named and (port in USUAL_PORTS if self.port is None else port == self.port)


def split_authority(text: str) -> tuple[str, int | None] | None:
    """Host and port of `host` or `host:port`, or None where another reader could take it for another host.

    A name is ASCII labels in lower case, an address is in its canonical form without brackets. User names, escapes,
    zone ids, a trailing dot and numbers that are no dotted quad (`2130706433`, `0x7f.1`, `127.1`, `0177.0.0.1`) are
    not read at all.
    """
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        return None
    host, port = match[1].lower(), int(match[2]) if match[2] else None
    if port is not None and not 0 < port < 65536:
        return None
    try:
        if host.startswith("["):
            return str(ipaddress.IPv6Address(host[1:-1])), port
        if _NUMBER.fullmatch(host.rpartition(".")[2]):
            return str(ipaddress.IPv4Address(host)), port
    except ValueError:
        return None
    is_name = len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.split("."))
    return (host, port) if is_name else None


def is_address(host: str) -> bool:
    """Whether the host is an address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def address_fault(text: str, *, may_be_private: bool = False) -> str | None:
    """Why an address must not be connected to, or None.

    An IPv4 address inside an IPv6 one counts as itself: mapped, NAT64, 6to4, ISATAP. Teredo is refused altogether.

    Args:
        text: as a resolver gives it.
        may_be_private: whether private and loopback addresses will do; link-local ones and cloud metadata never do.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return "no IP address"
    if isinstance(address, ipaddress.IPv6Address):
        number = int(address)
        is_isatap = number >> 32 & 0xFFFFFFFF in _ISATAP
        last = ipaddress.IPv4Address(number & 0xFFFFFFFF)
        if address.ipv4_mapped is not None or address in _NAT64:
            return address_fault(str(last), may_be_private=may_be_private)
        inner = address.sixtofour or (last if is_isatap else None)
        if inner is not None and (fault := address_fault(str(inner))):
            return fault
        if address.is_site_local:
            return "a site-local address"
    if address.is_link_local:
        return "a link-local address"
    if any(address in network for network in _NEVER if network.version == address.version):
        return "a special address"
    if any(address in network for network in _PRIVATE if network.version == address.version):
        return None if may_be_private else "a private or loopback address"
    if address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global:
        return "no public address"
    return None
