"""A question whose answer shows that two processes hash blocks alike.

Rule: the tokens follow from the worker's id and epoch, so every start is asked something new and nobody has to ask: the
worker puts its answer into its status, and whoever hears it computes its own. Equal answers mean the same packing, the
same chain, the same hash and the same block size.
Pure.
"""

from hashlib import blake2b

from shared.blocks import HASH_BYTES, hash_chain
from shared.tokens import unpack

# four blocks of the usual size and a tail that has no hash
PROBE_TOKENS = 4 * 16 + 3


def probe_tokens(worker: str, epoch: int) -> list[int]:
    """The tokens to hash: all over the 32 bits, since no vocabulary is meant."""
    drawn = b"".join(_draw(worker, epoch, b"tokens%d" % part, 64) for part in range(-(-4 * PROBE_TOKENS // 64)))
    return unpack(drawn[:4 * PROBE_TOKENS])


def probe_salt(worker: str, epoch: int) -> bytes:
    """The salt to hash them with."""
    return _draw(worker, epoch, b"salt", HASH_BYTES)


def expected_answer(worker: str, epoch: int, block_size_tokens: int) -> bytes:
    """What a worker that hashes as we do answers: the last hash of the chain; empty when no block is full."""
    chain = hash_chain(probe_tokens(worker, epoch), probe_salt(worker, epoch), block_size_tokens)
    return chain[-1] if chain else b""


def _draw(worker: str, epoch: int, what: bytes, size: int) -> bytes:
    return blake2b(f"{worker}\0{epoch}".encode(), key=what, digest_size=size, person=b"tokenmill-probe").digest()
