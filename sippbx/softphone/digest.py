"""The client's half of digest authentication: MD5 and SHA-256 with qop=auth (RFC 8760, RFC 7616 section 3.4)."""

import hashlib
import re
import secrets
from collections.abc import Sequence

from sippbx.softphone.errors import MalformedError

_PARAMETER = re.compile(r'(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')
_HASHES = {"SHA-256": hashlib.sha256, "MD5": hashlib.md5}


def authorization(
    challenges: Sequence[str],
    *,
    method: str,
    uri: str,
    user: str,
    password: str,
    algorithms: Sequence[str] = ("SHA-256", "MD5"),
    nonce_count: int = 1,
) -> str:
    """The Authorization value that answers the first challenge whose algorithm is allowed.

    Raises:
        MalformedError: no challenge is a digest challenge with such an algorithm.
    """
    for challenge in challenges:
        scheme, _, rest = challenge.partition(" ")
        given = {name.lower(): quoted or token for name, quoted, token in _PARAMETER.findall(rest)}
        algorithm = given.get("algorithm", "MD5").upper()
        if scheme.lower() == "digest" and algorithm in algorithms and "nonce" in given and "realm" in given:
            break
    else:
        raise MalformedError(f"no digest challenge with one of {', '.join(algorithms)} among {list(challenges)}")

    def digest(text: str) -> str:
        return _HASHES[algorithm](text.encode()).hexdigest()

    secret = digest(f"{user}:{given['realm']}:{password}")
    fields = [
        f'username="{user}"',
        f'realm="{given["realm"]}"',
        f'nonce="{given["nonce"]}"',
        f'uri="{uri}"',
        f"algorithm={algorithm}",
    ]
    subject = digest(f"{method}:{uri}")
    if "auth" in [option.strip() for option in given.get("qop", "").split(",")]:
        cnonce, count = secrets.token_hex(8), f"{nonce_count:08x}"
        answer = digest(f"{secret}:{given['nonce']}:{count}:{cnonce}:auth:{subject}")
        fields += ["qop=auth", f"nc={count}", f'cnonce="{cnonce}"']
    else:
        answer = digest(f"{secret}:{given['nonce']}:{subject}")
    if "opaque" in given:
        fields.append(f'opaque="{given["opaque"]}"')
    return f'Digest {", ".join(fields)}, response="{answer}"'
