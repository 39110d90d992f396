"""Which proxy leads where, by the variables that nodes have."""

from __future__ import annotations

import pytest

from crio_native.errors import InvalidArgument
from crio_native.images.proxies import proxy_for

BOTH = {"HTTP_PROXY": "http://plain:1", "HTTPS_PROXY": "http://tls:2"}


@pytest.mark.parametrize(
    ("url", "environment", "proxy"),
    [
        ("https://r.com/x", BOTH, "http://tls:2"),
        ("http://r.com/x", BOTH, "http://plain:1"),
        ("https://r.com/x", {"https_proxy": "p:3"}, "http://p:3"),
        ("https://r.com/x", {}, ""),
        ("https://localhost:5000/x", BOTH, ""),
        ("https://127.0.0.1:5000/x", BOTH, ""),
        ("https://[::1]:5000/x", BOTH, ""),
        ("https://r.com/x", BOTH | {"NO_PROXY": "*"}, ""),
        ("https://r.com/x", BOTH | {"NO_PROXY": "a.com, r.com"}, ""),
        ("https://a.r.com/x", BOTH | {"NO_PROXY": "r.com"}, ""),
        ("https://ar.com/x", BOTH | {"NO_PROXY": "r.com"}, "http://tls:2"),
        ("https://r.com/x", BOTH | {"NO_PROXY": ".r.com"}, "http://tls:2"),
        ("https://a.r.com/x", BOTH | {"no_proxy": "*.r.com"}, ""),
        ("https://R.COM/x", BOTH | {"NO_PROXY": "r.com"}, ""),
        ("https://r.com/x", BOTH | {"NO_PROXY": "r.com:443"}, ""),
        ("https://r.com:5000/x", BOTH | {"NO_PROXY": "r.com:443"}, "http://tls:2"),
        ("https://10.1.2.3/x", BOTH | {"NO_PROXY": "10.0.0.0/8"}, ""),
        ("https://11.1.2.3/x", BOTH | {"NO_PROXY": "10.0.0.0/8,nonsense/x"}, "http://tls:2"),
        ("https://10.1.2.3/x", BOTH | {"NO_PROXY": "10.1.2.3"}, ""),
        ("https://[fd00::1]/x", BOTH | {"NO_PROXY": "fd00::/8"}, ""),
        ("https://[fd00::1]:80/x", BOTH | {"NO_PROXY": "[fd00::1]:80"}, ""),
    ],
)
def test_the_way_to_a_host(url: str, environment: dict[str, str], proxy: str) -> None:
    assert proxy_for(url, environment) == proxy


@pytest.mark.parametrize("value", ["socks5://p:1", "http://", "ftp://p"])
def test_a_proxy_that_cannot_be_used_is_named(value: str) -> None:
    with pytest.raises(InvalidArgument, match="HTTPS_PROXY"):
        proxy_for("https://r.com/x", {"HTTPS_PROXY": value})


def test_a_proxys_password_is_not_shown() -> None:
    with pytest.raises(InvalidArgument) as error:
        proxy_for("https://r.com/x", {"HTTPS_PROXY": "socks5://me:secret@p:1"})
    assert "secret" not in str(error.value)
