"""The supported string formats of JSON Schema, as regular expressions.

Each matches texts that the format's own standard, jsonschema and pydantic all accept: dates that exist, no leap
seconds, host names of moderate length. Formats that no pattern can check (a regular expression, an existing file) are
refused.
"""

from __future__ import annotations

from functools import lru_cache

from fastsample.integrations.grammar.regex import Node, parse

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|"
    f"02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_IN_DAY = "(?:[0-9]{1,4}H(?:[0-9]{1,4}M)?(?:[0-9]{1,4}S)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?|[0-9]{1,4}S)"
_DAYS = "(?:[0-9]{1,3}Y(?:[0-9]{1,3}M)?(?:[0-9]{1,3}D)?|[0-9]{1,3}M(?:[0-9]{1,3}D)?|[0-9]{1,3}D)"
_LABEL = "[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20}){0,2}"
_HOST = rf"(?:{_LABEL}\.){{0,3}}[A-Za-z]{{1,20}}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_H = "[0-9a-fA-F]{1,4}"
_IPV6 = (
    f"(?:(?:{_H}:){{7}}{_H}|(?:{_H}:){{1,7}}:|"
    + "|".join(f"(?:{_H}:){{1,{7 - n}}}(?::{_H}){{1,{n}}}" for n in range(1, 7))
    + f"|:(?::{_H}){{1,6}}|::)"
)
_HEX = "[0-9a-fA-F]"
_PATH = (
    r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*(?:\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?(?:#[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?"
)
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"


def _uuid(version: str) -> str:
    return f"{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}"


PATTERNS: dict[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_DAYS}(?:T{_IN_DAY})?|T{_IN_DAY}|[0-9]{{1,4}}W)",
    "email": rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@(?:{_LABEL}\.){{1,3}}[A-Za-z]{{2,20}}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": f"(?:{_IPV4}|{_IPV6})",
    "uri": rf"[a-z][a-z0-9+.-]{{0,15}}://{_HOST}(?::[1-9][0-9]{{0,3}})?{_PATH}",
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    **{f"uuid{version}": _uuid(str(version)) for version in (1, 3, 4, 5, 6, 7, 8)},
    "json-pointer": "(?:/(?:[^/~]|~[01])*)*",
    "base64": "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?",
    "base64url": "(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-][AQgw]==|[A-Za-z0-9_-]{2}[AEIMQUYcgkosw048]=)?",
    "path": r"[^\0]+",
}
"""By name. The same pattern checks a finished text, besides jsonschema's own check of the format."""
PATTERNS |= {"byte": PATTERNS["base64"], "idn-email": PATTERNS["email"], "idn-hostname": PATTERNS["hostname"]}

ANY_STRING = frozenset({"binary", "password"})
"""Formats that do not constrain the string's characters."""

INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (1 - 2**53, 2**53 - 1)}
"""OpenAPI's integer formats and their bounds; those of int64 are narrowed to what float64 holds exactly."""

ANY_NUMBER = frozenset({"float", "double"})


@lru_cache(maxsize=64)
def tree(name: str) -> Node:
    """The tree of a format in PATTERNS."""
    return parse(PATTERNS[name])
