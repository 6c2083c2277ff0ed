"""Seeds made of seeds."""

import hashlib


def derive(*numbers: int) -> int:
    """A seed from ``numbers``: unrelated ones for neighbours, the same on every machine."""
    text = " ".join(map(str, numbers)).encode()
    # PyTorch's generator for the CPU looks at 32 bits of its seed
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest())
