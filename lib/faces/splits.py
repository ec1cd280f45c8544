"""Train, val and test by identity: nothing but the identity and the seed decides."""

import hashlib

TRAIN_SHARE, VAL_SHARE = 0.70, 0.05
"""Shares of the identities; what is left, 25 %, is test."""


def split_of(identity: str, seed: int) -> str:
    """Return `train`, `val` or `test`, the same whatever other identities, photos or workers there are."""
    digest = hashlib.blake2b(f"{seed}\0{identity}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < TRAIN_SHARE:
        return "train"
    return "val" if place < TRAIN_SHARE + VAL_SHARE else "test"
