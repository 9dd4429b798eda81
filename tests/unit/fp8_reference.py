"""FP8 in numpy, from the bits: every number of a format written down, and the nearest one found by search."""

import numpy as np

FORMATS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
"""Exponent bits, mantissa bits, exponent bias."""


def numbers(name: str) -> np.ndarray:
    """All finite numbers that are not negative, ascending; position = code."""
    exponent_bits, mantissa_bits, bias = FORMATS[name]
    found = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        if name == "e4m3" and code == 127:
            continue  # the only NaN; e4m3 has no infinity
        if name == "e5m2" and exponent == 31:
            continue  # infinity and NaN, as in IEEE 754
        if exponent == 0:
            found.append(mantissa * 2.0 ** (1 - bias - mantissa_bits))
        else:
            found.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
    return np.array(found)


def round_to(name: str, values: np.ndarray) -> np.ndarray:
    """Nearest numbers, ties to the even code; what is too large becomes the largest."""
    table = numbers(name)
    size = np.minimum(np.abs(values.astype(np.float64)), table[-1])
    upper = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    lower = upper - 1
    below, above = size - table[lower], table[upper] - size
    takes_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(takes_upper, table[upper], table[lower]) * np.sign(values)


def fake_quantize(name: str, values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Round `values` with a scale, in float32 where the kernels are."""
    scale = np.float32(scale) if np.isscalar(scale) else scale.astype(np.float32)
    scaled = values.astype(np.float32) * scale
    return round_to(name, scaled).astype(np.float32) * (np.float32(1) / scale)
