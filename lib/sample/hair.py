"""Draws the hair and the beard of a person.

Lengths are in face coordinates (lib/sample/drawing.py). Shape suffixes: N points.
"""

import numpy as np

from lib.sample.drawing import BLACK, WHITE, Pen, curve, ellipse, mirrored, mix
from lib.sample.people import Person


def draw_hair_behind(pen: Pen, person: Person) -> None:
    """Draw a bun and long hair behind the head."""
    if person.hair_bun:
        bun = ellipse(
            0.0, -person.crown - person.hair_volume - 0.4 * person.hair_bun, 1.3 * person.hair_bun, person.hair_bun
        )
        pen.fill(bun, mix(person.hair, BLACK, 0.15), flat=True)
    if not person.hair_length:
        return
    width, low = person.head_width + 0.5 * person.hair_volume, person.hair_length
    shape = mirrored(
        [(0.0, -1.2), (width, -0.6), (width + 0.12, 0.3 * low), (width + 0.05, 0.8 * low), (0.8, low), (0.0, low)]
    )
    pen.fill(curve(shape, closed=True), mix(person.hair, BLACK, 0.3), flat=True)


def draw_hair_in_front(pen: Pen, person: Person) -> None:
    """Draw the hair from the hairline, which turns with the face, to the outer edge, which does not turn."""
    width, rise, part = person.head_width, person.hair_volume, person.hair_part
    side_end = 0.95 if person.hair_length else 0.1
    line = person.hairline + person.hair_fringe
    hairline = curve(
        [
            (-width * 1.02, side_end),
            (-width * 0.9, -0.35),
            (-width * 0.72, line + 0.3 - 0.1 * part),
            (-0.3, line + 0.05),
            (0.5 * part, line - 0.14 * (person.hair_fringe == 0)),
            (0.45, line + 0.06),
            (width * 0.72, line + 0.3 + 0.1 * part),
            (width * 0.9, -0.35),
            (width * 1.02, side_end),
        ]
    )
    angle_N = np.linspace(0.0, np.pi, 40)
    bumps_N = 1 + person.hair_curl * np.abs(np.sin(7.5 * angle_N))
    low = 0.75 * side_end
    outer = np.column_stack(
        [
            (width + 0.06 + 0.35 * rise) * np.cos(angle_N) * bumps_N,
            low - (person.crown + rise + low) * np.sin(angle_N) ** 0.8 * bumps_N,
        ]
    )
    turned = pen.turned(hairline)
    turned = np.clip(turned, (-width - 0.02, 0.05 - person.crown), (width + 0.02, np.inf))
    inner_pixels, outer_pixels = pen.to_pixels(turned), pen.placed(outer, flat=True)
    pen.fill_pixels(np.concatenate([inner_pixels, outer_pixels]), person.hair)
    inner, far = inner_pixels, outer_pixels[::-1]
    for i, share in enumerate(np.linspace(0.08, 0.92, 9)):
        start, end = inner[int(share * len(inner))], far[int((share + 0.1 * part * (1 - share) * share) * len(far))]
        bend = 0.5 * (start + end) + np.array((0.12 * part, -0.12)) * pen.size
        ink = mix(person.hair, WHITE if i % 2 else BLACK, 0.06 if i % 2 else 0.14)
        pen.stroke_pixels(curve([start, bend, 0.06 * start + 0.94 * end]), 0.045, ink)


def draw_beard(pen: Pen, person: Person) -> None:
    """Draw beard and moustache."""
    ink = mix(person.skin, mix(person.hair, BLACK, 0.15), 0.22 + 0.3 * person.beard)
    if person.beard:
        outer = [
            (person.head_width * 0.98, 0.35),
            (0.5 * person.jaw_width + 0.42 * person.head_width, person.chin * 0.62),
            (0.8 * person.jaw_width, person.chin * 0.86),
            (person.chin_width, person.chin),
            (0.0, person.chin + 0.12 * person.beard),
        ]
        inner = [
            (0.0, person.mouth + 0.2),
            (0.3, person.mouth + 0.16),
            (0.6, person.mouth - 0.05),
            (person.head_width * 0.85, 0.45),
        ]
        half = np.concatenate([curve(outer), curve(inner)])
        pen.fill(half, ink, flat=True)
        pen.fill(half * (-1, 1), ink, flat=True)
    if person.moustache:
        wide, y = person.mouth_width * 1.05, person.mouth - person.upper_lip
        shape = mirrored(
            [(0.0, y - 0.16), (0.6 * wide, y - 0.08), (0.95 * wide, y + 0.1), (0.7 * wide, y + 0.05), (0.0, y + 0.02)]
        )
        pen.fill(curve(shape, closed=True), ink, lift=0.1)
