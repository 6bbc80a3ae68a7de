from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import FetchConfig, load_config
from pipeline.errors import ConfigError
from pipeline.hosts import HostRule, address_fault, split_authority

REFUSED = (
    "127.0.0.1", "127.8.9.10", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "100.64.0.1", "169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254",
    "fec0::1", "ff02::1", "2001:db8::1", "3fff::1", "5f00::1", "4000::1", "100::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:7f00:1", "::127.0.0.1", "::ffff:0:7f00:1",
    "64:ff9b::7f00:1", "64:ff9b::169.254.169.254", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "2001:0:7f00:1::1", "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:7f00:1",
    "", "localhost", "2130706433", "0x7f.1",
)  # fmt: skip
PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "93.184.215.14",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
)


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_that_is_not_public(address: str) -> None:
    assert address_fault(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address(address: str) -> None:
    assert address_fault(address) is None


def test_a_private_host_may_be_private_and_nothing_else() -> None:
    for address in ("127.0.0.1", "::1", "10.1.2.3", "192.168.0.9", "fd12::1", "::ffff:127.0.0.1", "8.8.8.8"):
        assert address_fault(address, may_be_private=True) is None, address
    for address in ("169.254.169.254", "fe80::1", "fd00:ec2::254", "100.100.100.200", "0.0.0.0", "::", "224.0.0.1",
                    "::ffff:169.254.169.254", "168.63.129.16", "2002:7f00:1::"):  # fmt: skip
        assert address_fault(address, may_be_private=True), address


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "64:ff9b::", "::", "::ffff:0:0:0"]))
def test_an_inner_address_is_never_better_than_itself(address: ipaddress.IPv4Address, prefix: str) -> None:
    outer = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | int(address))
    sixtofour = ipaddress.IPv6Address(0x2002 << 112 | int(address) << 80 | 1)
    if address_fault(str(address)):
        assert address_fault(str(outer))
        assert address_fault(str(sixtofour))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Img.Shop.Example", ("img.shop.example", None)),
        ("img.shop.example:8080", ("img.shop.example", 8080)),
        ("xn--bcher-kva.example", ("xn--bcher-kva.example", None)),
        ("a_b-c.example", ("a_b-c.example", None)),
        ("10.0.0.7", ("10.0.0.7", None)),
        ("[FD00:0::7]:443", ("fd00::7", 443)),
        ("1password.example", ("1password.example", None)),
    ],
)
def test_a_plain_host(text: str, found: tuple[str, int | None]) -> None:
    assert split_authority(text) == found


@pytest.mark.parametrize(
    "text",
    ["", ".", "a..b", "shop.example.", "127.0.0.1.", "2130706433", "0177.0.0.1", "0x7f.1", "0x7f000001", "127.1",
     "127.0.1", "1.2.3.4.5", "127.0.0.01", "256.1.1.1", "user@shop.example", "good.example@127.0.0.1", "u:p@b.example",
     "a b", "127%2e0.0.1", "%6cocalhost", "shop.example:", "shop.example:0", "shop.example:65536", "shop.example:８０",
     "a:1:2", "１２７.0.0.1", "ⓛocalhost", "bücher.example", "127。0。0。1", "[::1", "::1", "[fe80::1%25eth0]",
     "[127.0.0.1]", "-a.example", "a-.example", "x" * 64, "a." * 127 + "example", "a.example\n", "a\\@x", "a,b", "0x"],
)  # fmt: skip
def test_a_host_that_could_be_read_in_two_ways(text: str) -> None:
    assert split_authority(text) is None


def test_what_an_entry_allows() -> None:
    exact, under, other = (HostRule.parse(text) for text in ("shop.example", "*.cdn.shop.example", "shop.example:8080"))
    assert [exact.covers("shop.example", port) for port in (80, 443, 8080, 22)] == [True, True, False, False]
    assert [other.covers("shop.example", port) for port in (80, 443, 8080)] == [False, False, True]
    assert under.covers("a.cdn.shop.example", 443)
    assert under.covers("a.b.cdn.shop.example", 443)
    for host in ("cdn.shop.example", "xcdn.shop.example", "cdn.shop.example.evil.example", "shop.example"):
        assert not under.covers(host, 443), host
    assert not exact.covers("a.shop.example", 443)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            ["fetch.http=true"],
            "fetch.http=true needs the hosts that may be asked: fetch.allow_hosts=['img.shop.example']",
        ),
        (["fetch.allow_hosts=['*']"], "'*' is no host"),
        (["fetch.allow_hosts=['*.example']"], "'*.example' is no host"),
        (["fetch.allow_hosts=['*.0.0.1']"], "is no host"),
        (["fetch.allow_hosts=['https://shop.example']"], "is no host; write img.shop.example"),
        (["fetch.allow_hosts=['a.*.example']"], "is no host"),
        (["fetch.allow_private_hosts=['*.shop.example']"], "single hosts without wildcard or port"),
        (["fetch.allow_private_hosts=['10.0.0.7:80']"], "single hosts without wildcard or port"),
        (["fetch.timeout_s=0"], "from 0.1"),
        (["fetch.per_host=0"], "from 1"),
    ],
)
def test_a_bad_setting_is_one_sentence(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, sets)
    assert said in str(caught.value)


def test_http_is_off_unless_it_is_said() -> None:
    assert load_config().fetch == FetchConfig(http=False, allow_hosts=(), allow_private_hosts=())
    config = load_config(None, ["fetch.http=true", "fetch.allow_hosts=['*.cdn.shop.example','[fd00::7]:8080']"])
    assert config.fetch.allow_hosts == ("*.cdn.shop.example", "[fd00::7]:8080")
