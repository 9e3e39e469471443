"""Token ids and block hashes: the same bytes in every process."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.blocks import BLOCK_SIZE_TOKENS, HASH_BYTES, block_hash, hash_chain, join_hashes, split_hashes, tenant_salt
from shared.tokens import count, pack, unpack

ids = st.lists(st.integers(0, 2**32 - 1), max_size=80)
SALT = bytes(16)


@given(ids)
def test_ids_survive_packing_at_four_bytes_each(tokens):
    packed = pack(tokens)
    assert unpack(packed) == tokens
    assert count(packed) == len(tokens) and len(packed) == 4 * len(tokens)


def test_ids_are_little_endian():
    assert pack([1, 258, 2**32 - 1]) == b"\x01\0\0\0\x02\x01\0\0\xff\xff\xff\xff"


@pytest.mark.parametrize("wrong", [[-1], [2**32]])
def test_what_is_no_id_is_refused(wrong):
    with pytest.raises(OverflowError):
        pack(wrong)


def test_part_of_an_id_is_refused():
    with pytest.raises(ValueError):
        unpack(b"\0\0\0\0\0")


@given(ids, ids, st.integers(1, 20))
def test_two_prompts_share_as_many_hashes_as_full_blocks(first, second, size):
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    one, two = hash_chain(first, SALT, size), hash_chain(second, SALT, size)
    assert len(one) == len(first) // size
    equal = [a == b for a, b in zip(one, two, strict=False)]
    assert equal == [block < shared // size for block in range(len(equal))]


@given(ids, st.integers(1, 8), st.integers(0, 10))
def test_a_chain_can_be_continued(tokens, size, blocks):
    whole = hash_chain(tokens, SALT, size)
    cut = min(blocks, len(whole))
    rest = hash_chain(tokens[cut * size:], SALT, size, parent=whole[cut - 1] if cut else b"")
    assert whole[:cut] + rest == whole


def test_a_block_elsewhere_in_a_prompt_has_another_hash():
    tokens = [7] * (3 * BLOCK_SIZE_TOKENS)
    assert len(set(hash_chain(tokens, SALT))) == 3


def test_tenants_and_meshes_share_no_hash():
    tokens = list(range(BLOCK_SIZE_TOKENS))
    salts = [tenant_salt(secret, tenant) for secret in (b"one", b"two") for tenant in ("a", "b", "")]
    assert all(len(salt) == HASH_BYTES for salt in salts)
    assert len({hash_chain(tokens, salt)[0] for salt in salts}) == 6


@given(st.lists(st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES)))
def test_hashes_survive_joining(hashes):
    assert split_hashes(join_hashes(hashes)) == hashes


KNOWN_SALT = "528336ab875ab70890849693f931099c"
KNOWN_CHAIN = ["ba8550928ca439148bb0f2e9dabec93c", "7249b95a1ee35053df59ad8558864bd5"]


def test_hashes_are_those_of_every_other_version():
    salt = tenant_salt(b"tokenmill", "default")
    assert salt.hex() == KNOWN_SALT
    assert [one.hex() for one in hash_chain(range(32), salt)] == KNOWN_CHAIN
    assert block_hash(b"", range(16), salt).hex() == KNOWN_CHAIN[0]


def test_hashes_are_the_same_in_another_process_with_another_hash_seed():
    code = ("from shared.blocks import *; "
            "print(*[h.hex() for h in hash_chain(range(32), tenant_salt(b'tokenmill', 'default'))])")
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          cwd=Path(__file__).parents[2], env={"PYTHONHASHSEED": "123"}).stdout
    assert said.split() == KNOWN_CHAIN
