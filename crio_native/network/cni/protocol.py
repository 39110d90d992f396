"""What plugins say: results and errors of all versions of the CNI specification, as one form of each.

A result is kept as a plain object of the newest form (`ips` without `version`); `emit` writes it for an older list,
because a plugin must find `prevResult` in the version that it is run at.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any

from crio_native.errors import StepFailed, Unavailable
from crio_native.network.process import Ended, text

Result = dict[str, Any]

MAX_ITEMS = 1024  # interfaces, addresses or routes of one result
_TRY_AGAIN, _NOT_AVAILABLE, _LIMITED = 11, 50, 51
_WORDS = {
    1: "incompatible CNI version",
    2: "unsupported field in the network configuration",
    3: "container unknown or does not exist",
    4: "invalid necessary environment variables",
    5: "I/O failure",
    6: "failed to decode content",
    7: "invalid network configuration",
    _TRY_AGAIN: "try again later",
    _NOT_AVAILABLE: "the plugin is not available",
    _LIMITED: "the plugin is not available, and connectivity of its containers may be limited",
}


class PluginFailed(StepFailed):
    """A plugin told of an error, or ended without telling.

    code, message, details: the specification's error object, as the plugin printed it; code 0 when it printed none.
    """

    def __init__(self, step: str, plugin: str, code: int, message: str, details: str = "") -> None:
        word = _WORDS.get(code, "")
        said = ": ".join(part for part in (word, message, details) if part)
        super().__init__(step, 0, plugin, f"code {code}: {said}" if code else said)
        self.code, self.message, self.details = code, message, details


class PluginUnavailable(PluginFailed, Unavailable):
    """The plugin cannot serve now (codes 11, 50, 51); trying again may help."""


def failure(step: str, plugin: str, ended: Ended) -> PluginFailed:
    """The error of a plugin that ended with a status other than 0."""
    try:
        told = json.loads(ended.output)
        code, message = told["code"], told.get("msg", "")
        if isinstance(code, bool) or not isinstance(code, int):
            raise TypeError
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        how = f"ended with status {ended.code}" if ended.code >= 0 else f"was ended by signal {-ended.code}"
        said = text(ended.messages or ended.output)
        return PluginFailed(step, plugin, 0, f"it {how} and printed no error object", said and f"it said: {said}")
    kind = PluginUnavailable if code in (_TRY_AGAIN, _NOT_AVAILABLE, _LIMITED) else PluginFailed
    return kind(step, plugin, code, text(str(message).encode()), text(str(told.get("details") or "").encode()))


def parse_result(step: str, plugin: str, output: bytes) -> Result:
    """The result of an ADD in the newest form.  Raises PluginFailed, with the field's path, for what is none."""
    if not output.strip():
        raise PluginFailed(step, plugin, 0, "it ended well but printed no result")
    try:
        data = json.loads(output)
    except (ValueError, RecursionError) as error:
        raise PluginFailed(
            step, plugin, 0, f"what it printed is not JSON ({error})", f"it begins with {output[:80]!r}"
        ) from None
    try:
        return checked_result(data)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise PluginFailed(step, plugin, 0, f"its result is wrong: {error}") from None


def checked_result(data: Any) -> Result:
    """A result of any version in the newest form.  Raises ValueError, TypeError, AttributeError or LookupError."""
    result = _modern(data)
    _check(result)
    return result


def emit(result: Result, version: str) -> Result:
    """The result as version `version` of the specification writes it."""
    if version in ("0.1.0", "0.2.0"):
        return _oldest(result, version)
    ips = result.get("ips", [])
    if version.startswith("0."):
        ips = [{"version": str(ipaddress.ip_interface(item["address"]).version), **item} for item in ips]
    return {**result, "cniVersion": version, "ips": ips}


def _modern(data: Any) -> Result:
    if not isinstance(data, dict):
        raise ValueError("it must be an object")
    if "ip4" not in data and "ip6" not in data:
        ips = [{key: value for key, value in item.items() if key != "version"} for item in _items(data, "ips")]
        return {**data, "ips": ips}
    # 0.1.0 and 0.2.0: at most one address a family, its routes beside it, and no interfaces.
    result: Result = {"ips": [], "routes": [], "dns": data.get("dns") or {}}
    for family in ("ip4", "ip6"):
        if (config := data.get(family)) is not None:
            gateway = {"gateway": config["gateway"]} if config.get("gateway") else {}
            result["ips"].append({"address": config["ip"], **gateway})
            result["routes"] += _items(config, "routes")
    return result


def _oldest(result: Result, version: str) -> Result:
    old: Result = {"cniVersion": version, "dns": result.get("dns") or {}}
    for item in result.get("ips", []):
        number = ipaddress.ip_interface(item["address"]).version
        routes = [route for route in result.get("routes", []) if ipaddress.ip_network(route["dst"]).version == number]
        gateway = {"gateway": item["gateway"]} if item.get("gateway") else {}
        old.setdefault(f"ip{number}", {"ip": item["address"], **gateway, "routes": routes})
    return old


def _check(result: Result) -> None:
    """What we and other plugins rely on.  Raises ValueError and the like, with the field's path."""
    interfaces = _items(result, "interfaces")
    for index, item in enumerate(interfaces):
        for key in ("name", "mac", "sandbox"):
            if not isinstance(item.get(key, ""), str):
                raise ValueError(f"interfaces[{index}].{key}: {item[key]!r} is no text")
    for index, item in enumerate(_items(result, "ips")):
        try:
            ipaddress.ip_interface(item["address"])
            ipaddress.ip_address(item.get("gateway") or "0.0.0.0")
        except (ValueError, KeyError) as error:
            raise ValueError(f"ips[{index}]: {error}") from None
        number = item.get("interface")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(interfaces)):
            raise ValueError(f"ips[{index}].interface: {number!r} is no index of one of {len(interfaces)} interfaces")
    for index, item in enumerate(_items(result, "routes")):
        try:
            ipaddress.ip_network(item["dst"], strict=False)
            ipaddress.ip_address(item.get("gw") or "0.0.0.0")
        except (ValueError, KeyError) as error:
            raise ValueError(f"routes[{index}]: {error}") from None


def _items(data: Any, key: str) -> list[dict[str, Any]]:
    """The objects of a list that may be absent or null."""
    items = data.get(key) or []
    if not isinstance(items, list) or len(items) > MAX_ITEMS or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{key}: must be a list of at most {MAX_ITEMS} objects")
    return items
