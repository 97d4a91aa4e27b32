"""Who may use the server: whoever has the key, or without a key whoever calls it by the name of this machine.

A web page in a browser of this machine can send requests to a loopback address too, under a name of its own that it has
pointed there. It cannot choose the Host header, and a body of JSON needs a permission that this server gives to none.
"""

import hmac
import ipaddress
from dataclasses import dataclass

from fastapi import Request

from verl.errors import UserError
from verl.serve.errors import ApiError

KEY_VARIABLE = "GRACE_API_KEY"


@dataclass(frozen=True)
class Access:
    """The check of a request."""

    key: str | None
    """What clients send as `Authorization: Bearer KEY`; None = nothing is asked for."""
    own_names_only: bool
    """Whether the Host header must be a loopback address or localhost."""

    async def check(self, request: Request) -> None:
        """Let a request pass.

        Raises:
            ApiError: 401, or 403 for a foreign name.
        """
        if self.own_names_only and not is_loopback(_host_of(request)):
            raise ApiError(403, "this server answers to localhost and loopback addresses only", code="wrong_host")
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def choose_access(host: str, flag: str | None, variable: str | None, no_auth: bool) -> Access:
    """The check for a server that listens on `host`.

    Args:
        flag, variable: the key as --api_key and as the environment variable; the flag wins.
        no_auth: whether --no_auth was given.

    Raises:
        UserError: other machines could use the server, and neither a key nor --no_auth was given; or both were; or the
            key cannot be sent in a header.
    """
    key = variable if flag is None else flag
    if key is not None and no_auth:
        raise UserError(f"--no_auth, and a key by --api_key or {KEY_VARIABLE}: give one of them")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UserError(
            f"the key of --api_key or {KEY_VARIABLE} must be one or more printable ASCII characters, without a space "
            "at its ends"
        )
    local = is_loopback(host)
    if key is None and not no_auth and not local:
        raise UserError(
            f"--host {host} lets other machines use this server; set {KEY_VARIABLE} (or --api_key, which other users "
            "of this machine see in the list of processes), or give --no_auth if everyone who reaches it may use it"
        )
    return Access(key, own_names_only=local and key is None)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own and reached from it alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(request: Request) -> str:
    """The host of the Host header, without a port and brackets."""
    host = request.headers.get("host", "")
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
