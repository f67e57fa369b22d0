"""Where the node is that a command talks to: as it was told, or the pair that runs from a folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from sippbx.pair import PairDescription


class NoNodeError(Exception):
    """Nothing says where the node is; the text says what could."""


class ApiKeyError(Exception):
    """The node is known, and its key is not, or cannot be one."""


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """A gRPC API.

    `target` is host:port; with the PEM file `ca`, TLS is spoken, and the server must be of that authority.
    """

    target: str
    api_key: str
    ca: Path | None = None


def node_address(target: str | None, api_key: str | None, ca: Path | None, data: Path) -> NodeAddress:
    """The node at `target`, else that of the pair which runs from the folder `data`, which has a key and no TLS.

    Raises:
        NoNodeError: there is no target and no pair.
        ApiKeyError: there is a target without a key, or with one that has no place in a header.
    """
    if target is not None:
        if not api_key:
            raise ApiKeyError("the node wants an API key: give --key or set SIPPBX_API_KEY")
        if not re.fullmatch(r"[!-~]+", api_key):
            raise ApiKeyError("an API key has printable ASCII characters only, and no spaces")
        return NodeAddress(target, api_key, ca)
    pair = PairDescription.read(data)
    if pair is None:
        raise NoNodeError(
            f"no pair runs from {data}: start one with `sippbx run`, name its folder with --data,"
            " or name a node with --target"
        )
    return NodeAddress(pair.grpc_target, pair.api_key)
