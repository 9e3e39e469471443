"""Chained block hashes: the names of KV-cache blocks, the same in every process of the mesh.

Rule: a hash names a block *and everything before it*, so equal hashes mean equal prefixes.
Pure. BLAKE2b keyed by the tenant's salt (design law 10: tenants do not share cache), 16 bytes a hash.
"""

from collections.abc import Sequence
from hashlib import blake2b

from shared.tokens import pack

BLOCK_SIZE_TOKENS = 16
HASH_BYTES = 16
LONGEST_SALT = 64  # bytes; what BLAKE2b takes as a key


def tenant_salt(secret: bytes, tenant: str) -> bytes:
    """The 16-byte salt of one tenant's cache, derived here and never passed through from a client."""
    return blake2b(tenant.encode(), key=secret[:64], digest_size=HASH_BYTES, person=b"tokenmill-salt").digest()


def hash_chain(tokens: Sequence[int], salt: bytes, block_size_tokens: int = BLOCK_SIZE_TOKENS,
               parent: bytes = b"") -> list[bytes]:
    """Hash each full block of `tokens` together with all that stands before it.

    Two prompts share the first n hashes exactly when they share the first n blocks and the salt.
    A trailing part block has no hash. Stable across processes and machines.
    `parent` continues a chain: pass the last hash of what stands before `tokens`.
    """
    hashes = []
    for start in range(0, len(tokens) - block_size_tokens + 1, block_size_tokens):
        parent = block_hash(parent, tokens[start:start + block_size_tokens], salt)
        hashes.append(parent)
    return hashes


def block_hash(parent: bytes, tokens: Sequence[int], salt: bytes) -> bytes:
    """The hash of one full block behind `parent` (empty for the first block)."""
    return blake2b(parent + pack(tokens), key=salt, digest_size=HASH_BYTES).digest()


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    """Hashes laid end to end, as messages carry them."""
    return b"".join(hashes)


def split_hashes(data: bytes) -> list[bytes]:
    """The hashes behind `join_hashes`."""
    return [data[i:i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def fold(data: bytes) -> int:
    """The digest of a set of hashes laid end to end: all of them XORed.

    The order does not matter, and one hash more or less is one XOR: a rolling digest of any size costs O(change).
    """
    folded = int.from_bytes(data, "little")
    count = len(data) // HASH_BYTES
    while count > 1:  # halve: a few XORs of long integers instead of one per hash
        half = (count + 1) // 2
        folded = (folded >> 8 * HASH_BYTES * half) ^ (folded & (1 << 8 * HASH_BYTES * half) - 1)
        count = half
    return folded
