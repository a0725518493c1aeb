"""Colours of the report: one hue whose lightness says how much, and colours of groups that the colour-blind can tell apart.

Shades run through OKLCH (Ottosson, 2020), where equal steps look equally far apart; read by lightness alone, they are the same to
every kind of colour vision and in grey print. Text on every shade has a contrast of 4.5 or more (WCAG 2.2, 1.4.3).
"""

from __future__ import annotations

import math

LEVELS = 33
HUE = 250.0  # degrees
# (lightness, chroma) at no weight and at the most.
_ENDS = {"light": ((0.985, 0.004), (0.37, 0.135)), "dark": ((0.235, 0.012), (0.875, 0.085))}
INKS = {"light": "#1c2024", "dark": "#e9eaec"}
# Okabe and Ito's palette, and the same hues lighter for a dark page; the last one stands for its yellow and its black.
GROUPS = {
    "light": ("#0072b2", "#c44e00", "#00805c", "#b0568f", "#9c6f00", "#2f86b5", "#1c2024", "#707880"),
    "dark": ("#66b8f0", "#ff9857", "#3fcfa2", "#f0a3d0", "#f0bd4f", "#9bd6f7", "#e9eaec", "#9aa3ab"),
}


def shades(scheme: str) -> list[tuple[str, str]]:
    """(background, text) of every level, from none to most, for a `light` or `dark` page."""
    (l0, c0), (l1, c1) = _ENDS[scheme]
    result = []
    for level in range(LEVELS):
        share = level / (LEVELS - 1)
        background = _hex(l0 + (l1 - l0) * share, c0 + (c1 - c0) * math.sin(share * math.pi / 2), HUE)
        inks = (INKS[scheme], "#000000", "#ffffff")
        text = inks[0] if contrast(background, inks[0]) >= 4.5 else max(inks, key=lambda ink: contrast(background, ink))
        result.append((background, text))
    return result


def contrast(one: str, other: str) -> float:
    """Of two colours, 1 to 21 (WCAG 2.2)."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(lightness: float, chroma: float, hue: float) -> str:
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    channels = [min(max(c, 0.0), 1.0) for c in linear]
    encoded = [12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in channels]
    return "#" + "".join(f"{round(c * 255):02x}" for c in encoded)
