"""Counter-based normal noise: the same numbers on every device, in any order and any chunking.

Element e of a parameter's direction comes from Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As
Easy as 1, 2, 3; 2011) keyed by the direction's seed, at a counter made of e and a hash of the parameter's name. Pairs
of words become normals by Box and Muller (1958). Logarithm, sine and cosine are the polynomials of Moshier's Cephes,
written in additions, multiplications and square roots only, which IEEE 754 rounds the same way everywhere:
nothing here is left to a device's own mathematical library, and no operation is fused with another.

A group of 1024 elements takes 256 counters: word w of counter 256 g + j belongs to element 1024 g + 256 w + j.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from types import ModuleType

import torch
from torch import Tensor

LANES = 256
GROUP = 4 * LANES
# Elements made at a time by the portable form, which needs about 80 bytes of temporaries for each.
PIECE = {"cpu": 64 * GROUP, "cuda": 256 * GROUP}
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
# Cephes logf on [sqrt(1/2), sqrt(2)], highest power first, and ln 2 in two parts; sinf and cosf on [-pi/4, pi/4].
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LN2_LOW, LN2_HIGH = -2.12194440e-4, 0.693359375
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SQRT_HALF_BITS = 0x3F3504F3
QUARTER_TURN = math.pi / 2 * 2.0**-32
_MASK = 0xFFFFFFFF


def name_key(name: str) -> int:
    """The 64-bit number that stands for a parameter's name in the counters."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def fill(out: Tensor, seed: int, key: int, offset: int) -> None:
    """Write elements [offset, offset + out.numel()) of a direction into `out`: float32, 1-D, contiguous, any device.

    Args:
        seed: of the direction, 64 bits. key: `name_key` of the parameter.
    """
    group, skip = divmod(offset, GROUP)
    fast = compiled() if out.device.type == "cpu" else None
    if fast is not None:
        fast.fill(out.numpy(), *_halves(seed), *_halves(key), group, skip)
        return
    done = 0
    while done < out.numel():
        count = min(PIECE[out.device.type] - skip, out.numel() - done)
        groups = -(-(skip + count) // GROUP)
        out[done : done + count] = _portable(seed, key, group, groups, out.device)[skip : skip + count]
        done += count
        group, skip = group + groups, 0


def add(
    out: Tensor, values: Tensor, noise: Tensor, seed: int, key: int, offset: int, a: float, b: float = 1.0
) -> None:
    """Write values + (direction * a) * b into `out`, which may be `values`; every operation is rounded to float32.

    Args:
        out, values, noise: float32 [n], contiguous. noise may be overwritten. Others: as for `fill`.
    """
    fast = compiled() if out.device.type == "cpu" else None
    if fast is not None:
        fast.add(out.numpy(), values.numpy(), *_halves(seed), *_halves(key), *divmod(offset, GROUP), a, b)
        return
    fill(noise, seed, key, offset)
    torch.add(values, noise.mul_(a).mul_(b), out=out)


def fill_uniform(out: Tensor, seed: int, key: int, offset: int) -> None:
    """The same for numbers evenly spread over [0, 1), multiples of 2**-24."""
    group, skip = divmod(offset, GROUP)
    fast = compiled() if out.device.type == "cpu" else None
    if fast is not None:
        fast.fill_uniform(out.numpy(), *_halves(seed), *_halves(key), group, skip)
        return
    groups = -(-(skip + out.numel()) // GROUP)
    made = _words_of(seed, key, group, groups, out.device)
    parts = torch.stack([((word >> 8).to(torch.float32) * 2.0**-24).view(groups, LANES) for word in made], dim=1)
    out.copy_(parts.view(-1)[skip : skip + out.numel()])


@functools.cache
def compiled() -> ModuleType | None:
    """The form for CPUs that numba compiles, if it is there: the same bits at some 100 times the speed."""
    if importlib.util.find_spec("numba") is None:
        return None
    from offload import zo_jit

    return zo_jit


def words(counter: tuple[int | Tensor, ...], key: tuple[int, int], device: torch.device | str = "cpu") -> list[Tensor]:
    """Philox4x32-10: four words of a counter (ints, or int64 tensors of values below 2**32) under a key of two."""
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product wraps to the signed 64 bits it shares with the unsigned one.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + WEYL[0] & _MASK, k1 + WEYL[1] & _MASK
    return [c0, c1, c2, c3]


def _portable(seed: int, key: int, group: int, groups: int, device: torch.device) -> Tensor:
    """The normals of whole groups, in torch operations: float32 [groups * GROUP]."""
    a, b, c, d = _words_of(seed, key, group, groups, device)
    parts = [*_box_muller(a, b), *_box_muller(c, d)]
    return torch.stack([part.view(groups, LANES) for part in parts], dim=1).view(-1)


def _words_of(seed: int, key: int, group: int, groups: int, device: torch.device) -> list[Tensor]:
    counter = torch.arange(group * LANES, (group + groups) * LANES, dtype=torch.int64, device=device)
    return words((counter & _MASK, counter >> 32, *_halves(key)), _halves(seed), device)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two words: the first gives the radius, the second the angle."""
    uniform = (a >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32
    bits = uniform.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    square = f * f
    y = torch.full_like(f, LOG[0])
    for coefficient in LOG[1:]:
        y = y * f + coefficient
    y = y * f * square + e * LN2_LOW - square * 0.5
    # torch's own float32 root is not always the nearest number; the float64 one, rounded, always is.
    radius = torch.sqrt(((f + y + e * LN2_HIGH) * -2.0).double()).float()

    angle = (b << 2) & _MASK
    v = (angle - ((angle >> 31) << 32)).to(torch.float32) * QUARTER_TURN
    z = v * v
    sine = ((z * SIN[0] + SIN[1]) * z + SIN[2]) * z * v + v
    cosine = ((z * COS[0] + COS[1]) * z + COS[2]) * z * z - z * 0.5 + 1.0
    odd = (b >> 30) & 1 == 1
    radius = torch.where((b >> 31) == 1, -radius, radius)
    return torch.where(odd, -sine, cosine) * radius, torch.where(odd, cosine, sine) * radius


def _halves(value: int) -> tuple[int, int]:
    return value & _MASK, value >> 32 & _MASK
