"""The noise: Philox against its published answers, chunking, the compiled form, and that it is standard normal."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from offload import zo, zo_noise
from offload.zo_formats import Float8, Format, Quantized

# Known answers of Random123 (kat_vectors, philox 4x32 10): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert tuple(int(word) for word in zo_noise.words(counter, key)) == expected


def test_any_order_and_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = zo.noise(3, "a.weight", 0, 10_000)
    edges = [0, 1, 63, 64, 1023, 1024, 1025, 4096, 9_999, 10_000]
    for start, stop in reversed(list(itertools.pairwise(edges))):
        assert torch.equal(zo.noise(3, "a.weight", start, stop - start), whole[start:stop])
    assert torch.equal(zo.noise(3, "a.weight", 0, (100, 100)), whole.view(100, 100))
    far = 1 << 40  # past 32 bits of the counter
    assert torch.equal(zo.noise(3, "a.weight", far + 5, 700)[95:], zo.noise(3, "a.weight", far + 100, 605))
    monkeypatch.setattr(zo_noise, "compiled", lambda: None)
    assert torch.equal(zo.noise(3, "a.weight", 0, 10_000), whole)
    assert torch.equal(zo.noise(3, "a.weight", 500, 3000), whole[500:3500])


@pytest.mark.skipif(zo_noise.compiled() is None, reason="numba is not installed")
@pytest.mark.parametrize("fill", [zo_noise.fill, zo_noise.fill_uniform])
def test_the_compiled_form_has_the_same_bits(fill: object, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for form in (zo_noise.compiled(), None):
        monkeypatch.setattr(zo_noise, "compiled", lambda form=form: form)
        out = torch.empty(300_000)
        fill(out, 2**63 - 1, zo_noise.name_key("layers.0.weight"), 2**33 + 77)  # type: ignore[operator]
        results.append(out)
    assert torch.equal(*results)


def test_adding_a_direction_rounds_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    values, key = torch.randn(5000, generator=torch.Generator().manual_seed(0)), zo_noise.name_key("w")
    z = zo.noise(5, "w", 777, 5000)
    expected = values + z * 0.37 * -1e-3
    for compiled in (zo_noise.compiled, lambda: None):
        monkeypatch.setattr(zo_noise, "compiled", compiled)
        out, noise, there = torch.empty(5000), torch.empty(5000), values.clone()
        zo_noise.add(out, values, noise, 5, key, 777, 0.37, -1e-3)
        zo_noise.add(there, there, noise, 5, key, 777, 0.37, -1e-3)
        assert torch.equal(out, expected)
        assert torch.equal(there, expected)


def test_standard_normal_and_independent() -> None:
    n = 1 << 20
    z = zo.noise(1, "w", 0, n).double()
    others = [zo.noise(2, "w", 0, n), zo.noise(1, "v", 0, n), z.float().roll(1), z.float().roll(256), z.float().roll(4)]
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**moment).mean().item() - expected) < 5 * math.sqrt(variance / n)
    for other in others:
        assert abs((z * other.double()).mean().item()) < 5 / math.sqrt(n)
    ordered = z.sort().values
    normal = torch.erf(ordered / math.sqrt(2)) / 2 + 0.5
    assert (normal - torch.linspace(0, 1, n, dtype=torch.float64)).abs().max() < 2 / math.sqrt(n)  # Kolmogorov-Smirnov
    assert 4.5 < z.abs().max() < 6.8


# ---- formats ----


@pytest.mark.parametrize(
    "format", [Format(torch.bfloat16, True), Format(torch.float16, True), Float8(stochastic=True)], ids=str
)
def test_stochastic_rounding_keeps_the_mean(format: Format) -> None:
    """Small updates survive on average; values that can be stored stay as they are."""
    torch.manual_seed(0)
    values = torch.randn(4096) * 0.02
    nearest = values.clone()
    format.round(nearest, None)
    stored = nearest.clone()
    format.round(stored, torch.rand(4096))
    assert torch.equal(stored, nearest)
    total = torch.zeros(4096, dtype=torch.float64)
    for i in range(400):
        rounded = values.clone()
        uniform = torch.empty(4096)
        zo_noise.fill_uniform(uniform, 5, i, 0)
        format.round(rounded, uniform)
        total += rounded
    step = 2 * (nearest - values).abs().max().item()
    assert (total / 400 - values).mean().abs() < step / 100
    assert (total / 400 - values).abs().max() < 0.15 * step


def test_float8_scales_by_powers_of_two() -> None:
    torch.manual_seed(0)
    values = torch.randn(64 * 20) * torch.logspace(-6, 3, 20).repeat_interleave(64)
    values[:64] = 0
    parts = {"param": torch.zeros(1280, dtype=torch.float8_e4m3fn), "scale": torch.zeros(20, dtype=torch.uint8)}
    rounded = values.clone()
    format = Float8()
    format.round(rounded, None)
    format.write(parts, slice(0, 1280), rounded)
    assert torch.equal(format.read(parts, slice(0, 1280), torch.empty(1280)), rounded)
    largest = values.view(20, 64).abs().amax(1).repeat_interleave(64)
    assert ((rounded - values).abs() <= torch.maximum(values.abs() / 16, largest / 2**16)).all()


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_quantized_weights(bits: int, top: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(640)
    values[:64] = 0
    format = Quantized(bits=bits)
    integers, scales = format.quantize(values.clone())
    assert integers.numel() * 8 == values.numel() * bits and scales.numel() == 10
    parts = {"param": integers, "scale": scales}
    weights = format.weights(parts, slice(0, 640), scales)
    assert ((weights - values).abs().view(10, 64).amax(1) <= scales / 2 * 1.0001).all()
    whole = format.integers(parts, slice(0, 640))
    assert whole.abs().max() == top and torch.equal(whole, whole.round())
    assert torch.equal(format.integers(parts, slice(128, 200)), whole[128:200])
