"""What is an address and what a path; and an address without what is secret in it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Query parameters of signed addresses; they change with each signing, and the file stays the same.
_SIGNING = re.compile(
    r"(x-amz-.*|x-goog-.*|awsaccesskeyid|signature|expires|policy|key-pair-id|googleaccessid|token|access_token|"
    r"sv|se|st|sp|sr|sig|skoid|sktid|skt|ske|sks|skv)=",
    re.IGNORECASE,
)
HIDDEN = "…"


def is_command(url: str) -> bool:
    """Whether it is a command whose output is the shard.

    Args:
        url: An address or a path.

    Returns:
        Whether it begins with ``pipe:``.
    """
    return url.startswith("pipe:")


def is_address(url: str) -> bool:
    """Whether it names something else than a file on this machine. An absolute path never does.

    Args:
        url: An address or a path.

    Returns:
        Whether it begins with ``pipe:`` or a scheme such as ``https://``.
    """
    return is_command(url) or _SCHEME.match(url) is not None


def scheme_of(url: str) -> str:
    """The kind of an address.

    Args:
        url: An address or a path.

    Returns:
        E.g. ``"https"``; nothing for paths and commands.
    """
    found = _SCHEME.match(url)
    return found[1].lower() if found is not None else ""


def shown_address(url: str) -> str:
    """An address as it is printed and recorded: without user and password, and without the values of its query.

    Args:
        url: An address or a path.

    Returns:
        The same path; of an address what may be seen.

    Example:
        >>> shown_address("https://me:secret@example.org/x.tar?version=2&sig=ab12")
        'https://example.org/x.tar?version=…&sig=…'
    """
    if not scheme_of(url):
        return url
    place, mark, query = _without_user(url).partition("?")
    return place + mark + re.sub(r"=[^&]*", f"={HIDDEN}", query)


def lasting_address(url: str) -> str:
    """What stays the same of an address when it is signed again, or another user reads it.

    Args:
        url: An address or a path.

    Returns:
        A local path made absolute; an address without user, password and signature.

    Example:
        >>> lasting_address("https://me:secret@example.org/x.tar?version=2&X-Amz-Signature=ab12")
        'https://example.org/x.tar?version=2'
    """
    if not is_address(url):
        return str(Path(url).resolve())
    if is_command(url):
        return url
    place, _, query = _without_user(url).partition("?")
    kept = [part for part in query.split("&") if part and not _SIGNING.match(part)]
    return place + ("?" + "&".join(kept) if kept else "")


def name_of(url: str) -> str:
    """The file's own name, without folders and query.

    Args:
        url: An address or a path.

    Returns:
        E.g. ``"x.tar"``.
    """
    return Path(url.partition("?")[0] if scheme_of(url) else url).name


def _without_user(url: str) -> str:
    try:
        authority = urlsplit(url).netloc
    except ValueError:  # brackets that are no IPv6 address
        authority = url.partition("://")[2].partition("/")[0]
    return url.replace(authority, authority.rpartition("@")[2], 1) if "@" in authority else url
