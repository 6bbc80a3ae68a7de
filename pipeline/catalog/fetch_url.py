"""URLs of images, taken apart strictly: what two readers could read in two ways is refused."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from pipeline.errors import ImageRejected
from pipeline.hosts import split_authority
from pipeline.records import Reason

_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_UNSEEN = re.compile(r"[\x00-\x1f\x7f\\]")
_IN_PATHS = "!$%&'()*+,/:;=?@[]~"


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was taken apart and found plain."""

    is_tls: bool
    host: str
    port: int
    authority: str
    path: str

    @property
    def url(self) -> str:
        """The whole URL, less its fragment."""
        return f"http{'s' * self.is_tls}://{self.authority}{self.path}"

    @property
    def told(self) -> str:
        """For sentences: without the query, which may hold a signature."""
        return shortened(self.url.partition("?")[0])


def parse_url(url: str) -> Target:
    """Take an http(s) URL apart; its path and query are escaped where they have to be.

    Raises:
        ImageRejected: `fetch_refused`: another scheme, or a host that is not written plainly.
    """
    match = _URL.fullmatch(url)
    if match is None or _UNSEEN.search(url):
        raise refused(f"{shortened(url)} is no http(s) URL, or holds control characters")
    found = split_authority(match[2])
    if found is None:
        raise refused(
            f"{shortened(url)} does not name its host plainly: a name in ASCII letters (xn-- for others) or an IP "
            "address, without user, escapes or trailing dot"
        )
    is_tls = match[1].lower() == "https"
    host, port = found[0], found[1] or (443 if is_tls else 80)
    authority = f"[{host}]" if ":" in host else host
    if port != (443 if is_tls else 80):
        authority += f":{port}"
    path = quote(match[3], safe=_IN_PATHS, errors="replace")
    return Target(is_tls, host, port, authority, path if path.startswith("/") else f"/{path}")


def redirected(source: Target, location: str) -> Target:
    """Where a redirect leads.

    Raises:
        ImageRejected: `fetch_refused`: not to http(s), or from https to http.
    """
    try:
        target = parse_url(urljoin(source.url, quote(location, safe=string.punctuation, encoding="latin-1")))
    except (ImageRejected, ValueError) as error:
        raise refused(f"{source.told} redirects to {shortened(location)}, which is no plain http(s) URL") from error
    if source.is_tls and not target.is_tls:
        raise refused(f"{source.told} redirects from https to {target.told}")
    return target


def refused(detail: str) -> ImageRejected:
    """The rejection of a reference that is not followed."""
    return ImageRejected(Reason.FETCH_REFUSED, detail)


def shortened(reference: str) -> str:
    """A reference as sentences quote it."""
    return repr(reference if len(reference) <= 200 else f"{reference[:200]}...")
