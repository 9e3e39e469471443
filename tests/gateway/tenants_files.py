"""A tenants file for tests: each tenant with one key and whatever else its table has."""

import json
from pathlib import Path

from gateway.tenants import PREFIX_LETTERS, digest, new_key

SECRET = "a secret of the tests, long enough to be one"


def write(path: Path, more_lines: str = "", **tenants: dict[str, object]) -> dict[str, str]:
    """Writes the file and returns each tenant's key."""
    keys = {name: new_key() for name in tenants}
    rewrite(path, keys, more_lines, **tenants)
    return keys


def rewrite(path: Path, keys: dict[str, str], more_lines: str = "", **tenants: dict[str, object]) -> None:
    """The same with these keys."""
    lines = [f"secret = {json.dumps(SECRET)}"]
    for name, table in tenants.items():
        lines += [f"[tenants.{name}]", *(f"{field} = {json.dumps(value)}" for field, value in table.items())]
        if name in keys:
            lines += [f"[[tenants.{name}.keys]]", f'prefix = "{keys[name][:PREFIX_LETTERS]}"',
                      f'sha256 = "{digest(keys[name])}"', more_lines]
    path.write_text("\n".join([*lines, ""]))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
