"""Draws a person into a picture, from back to front.

Lengths are in face coordinates (lib/sample/drawing.py). Shape suffixes: N points, 2 coordinates (x y), 5 landmarks.
"""

import numpy as np

from lib.sample.drawing import BLACK, WHITE, Pen, colour, curve, ellipse, mirrored, mix
from lib.sample.hair import draw_beard, draw_hair_behind, draw_hair_in_front
from lib.sample.people import Moment, Person


def draw_person(
    picture: np.ndarray, mask: np.ndarray, person: Person, moment: Moment, eyes_2: np.ndarray, size: float
) -> np.ndarray:
    """Draw head, neck and shoulders and return the landmarks [5, 2] in pixels, in the order of the faces table.

    `eyes_2` is the position of the point between the eyes and `size` the length of a face unit, both in pixels;
    `mask` is set to 255 where the person is.
    """
    pen = Pen(picture, mask, eyes_2, size, moment.roll, moment.yaw, moment.pitch)
    outline_N2 = _head_outline(person)
    draw_hair_behind(pen, person)
    _draw_body(pen, person, moment, outline_N2)
    _draw_skin(pen, person, outline_N2)
    draw_beard(pen, person)
    eyes_22 = np.array([[-person.eye_spacing / 2, 0.0], [person.eye_spacing / 2, 0.0]])
    for side in (-1, 1):
        _draw_eye(pen, person, moment, side)
    _draw_nose(pen, person)
    corners_22 = _draw_mouth(pen, person, moment)
    draw_hair_in_front(pen, person)
    if person.glasses:
        _draw_glasses(pen, person)
    tip_12 = np.array([[0.0, person.nose_length - 0.03]])
    return np.concatenate([pen.placed(eyes_22), pen.placed(tip_12, lift=_NOSE_LIFT), pen.placed(corners_22)])


_NOSE_LIFT = 0.3


def _head_outline(person: Person) -> np.ndarray:
    width, crown, chin = person.head_width, person.crown, person.chin
    return curve(
        mirrored(
            [
                (0.0, -crown),
                (width * 0.72, -crown * 0.8),
                (width, -0.45),
                (width * 0.97, 0.4),
                (0.5 * person.jaw_width + 0.42 * width, chin * 0.62),
                (0.78 * person.jaw_width, chin * 0.85),
                (person.chin_width, chin * 0.98),
                (0.0, chin),
            ]
        ),
        closed=True,
    )


def _draw_body(pen: Pen, person: Person, moment: Moment, outline_N2: np.ndarray) -> None:
    """Draw neck and shoulders, which follow the head's roll by a third."""
    base_2 = pen.placed(np.array([[0.0, person.chin + 0.35]]), flat=True)[0]
    body = Pen(pen.picture, pen.mask, base_2, pen.size, moment.roll / 3, 0.0, 0.0)
    throat = pen.placed(np.array([(0.54, 0.8), (-0.54, 0.8)]), flat=True)
    neck = body.placed(np.array([(-0.56, 0.0), (-0.8, 0.3), (0.0, 0.6), (0.8, 0.3), (0.56, 0.0)]), flat=True)
    shoulders = curve(mirrored([(0.0, 0.32), (0.62, 0.06), (1.3, 0.34), (2.1, 0.62), (2.6, 1.6), (2.8, 9.0)]))
    depth, corner = ((0.6, 0.5), (1.0, 0.3), (0.4, 0.55))[moment.collar]
    opening = curve(mirrored([(0.0, depth), (corner, depth * 0.62), (0.66, 0.0)]))
    body.fill(shoulders, moment.clothes, flat=True)
    body.stroke(np.array([(-1.75, 1.3), (-1.55, 2.2), (-1.6, 6.0)]), 0.05, mix(moment.clothes, BLACK, 0.25), flat=True)
    body.stroke(np.array([(1.75, 1.3), (1.55, 2.2), (1.6, 6.0)]), 0.05, mix(moment.clothes, BLACK, 0.25), flat=True)
    body.fill(opening, person.skin, flat=True)
    body.stroke(opening, 0.07, mix(moment.clothes, WHITE, 0.25), flat=True)
    pen.fill_pixels(np.concatenate([throat, neck]), mix(person.skin, BLACK, 0.06))
    # The head's shadow on the neck.
    pen.fill(outline_N2 * (0.62, 1.0) + (0.0, 0.16), mix(person.skin, colour("5a2a1c"), 0.32), flat=True)


def _draw_skin(pen: Pen, person: Person, outline_N2: np.ndarray) -> None:
    dark = mix(person.skin, colour("7a3a26"), 0.25)
    for side in (-1, 1):
        ear_x = side * (person.head_width + 0.02) - 0.25 * np.sin(pen.yaw)
        pen.fill(ellipse(ear_x, 0.25, 0.16, person.ear), dark, flat=True)
        pen.fill(ellipse(ear_x, 0.23, 0.09, 0.7 * person.ear), mix(dark, BLACK, 0.15), flat=True)
    pen.fill(outline_N2, person.skin, flat=True)
    spacing, width = person.eye_spacing / 2, person.head_width
    shadow, blush, light = (-0.14, -0.13, -0.08), (-0.07, -0.08, 0.02), (0.07, 0.07, 0.06)
    deep, tired = mix(BLACK, shadow, 3.0), mix(BLACK, shadow, 1.2 * person.age)
    blobs = [
        (0.0, -0.7, 0.7, 0.4, light),
        (0.0, person.mouth + 0.25, 0.4, 0.08, deep),
        (0.0, person.chin - 0.2, 0.25, 0.16, light),
    ]
    for side in (-1, 1):
        blobs += [
            (side * spacing, -0.12, 0.36, 0.2, deep),
            (side * spacing, 0.26, 0.3, 0.1, tired),
            (side * 0.72, 0.72, 0.34, 0.28, blush),
            (side * 0.55, 0.48, 0.26, 0.16, light),
            (side * width, 0.3, 0.22, 1.2, deep),
            (side * person.jaw_width, person.chin * 0.8, 0.3, 0.4, deep),
            (side * person.nose_width, person.nose_length - 0.1, 0.12, 0.26, deep),
            (side * 0.2, 0.15, 0.11, 0.4, deep),
        ]
    pen.shade(blobs, outline_N2)
    fold = mix(person.skin, dark, 0.9 * person.age)
    for side in (-1, 1):
        crease = curve([(0.34, person.nose_length - 0.08), (0.5, person.mouth - 0.12), (0.53, person.mouth + 0.1)])
        pen.stroke(crease * (side, 1), 0.035, fold)
    if person.age > 0.4:
        for y in (-0.72, -0.86):
            pen.stroke(curve([(-0.45, y + 0.03), (0.0, y), (0.45, y + 0.03)]), 0.03, fold)
    for x, y in person.moles:
        pen.fill(ellipse(x, y, 0.028, 0.028, 10), mix(person.skin, colour("2e1510"), 0.7))
    if person.freckles:
        for x, y in _FRECKLES_N2:
            pen.fill(ellipse(x, y, 0.022, 0.02, 6), mix(person.skin, colour("8a4b2a"), 0.45 * person.freckles))


_FRECKLES_N2 = np.array(
    [
        (side * (0.25 + 0.13 * i), 0.42 + 0.16 * ((2 * i + j) % 3) + 0.1 * j)
        for side in (-1, 1)
        for i in range(5)
        for j in range(2)
    ]
)


def _draw_eye(pen: Pen, person: Person, moment: Moment, side: int) -> None:
    half, centre = person.eye_width, side * person.eye_spacing / 2
    opened = person.eye_height * moment.eyes_open * (1 - 0.2 * max(0.0, moment.smile))
    across_N = np.linspace(-1.0, 1.0, 13)
    slope_N = -side * person.eye_tilt * across_N
    upper_N = slope_N - opened * (1 - np.abs(across_N) ** 2.2) ** 0.8
    lower_N = slope_N + 0.72 * opened * (1 - across_N**2)
    x_N = centre + half * across_N
    lid, under = np.column_stack([x_N, upper_N]), np.column_stack([x_N, lower_N])
    pen.fill(np.concatenate([lid, under[::-1]]), colour("f1ece8"))
    radius, gaze = 0.152, centre + moment.gaze * 0.25 * half
    for part, ink in ((1.0, mix(person.iris, BLACK, 0.45)), (0.82, person.iris), (0.45, colour("120d0c"))):
        disc = ellipse(gaze, 0.0, part * radius, part * radius, 16)
        disc[:, 1] = np.clip(disc[:, 1], np.interp(disc[:, 0], x_N, upper_N), np.interp(disc[:, 0], x_N, lower_N))
        pen.fill(disc, ink)
    pen.fill(ellipse(gaze - 0.04, -0.04, 0.028, 0.028, 8), WHITE)
    lash = mix(colour("2a1a15"), person.hair, 0.3)
    pen.stroke(lid, 0.058, lash)
    pen.stroke(under[2:-2], 0.02, mix(person.skin, lash, 0.45))
    fold = np.column_stack([x_N, 1.15 * upper_N - person.lid_fold])[1:-1]
    pen.stroke(fold, 0.025, mix(person.skin, colour("5a2a1c"), 0.5))
    _draw_brow(pen, person, moment, side)


def _draw_brow(pen: Pen, person: Person, moment: Moment, side: int) -> None:
    t_N = np.linspace(0.0, 1.0, 7)
    x_N = person.eye_spacing / 2 - 0.5 * person.brow_length + person.brow_length * t_N + 0.03
    y_N = -person.brow_gap - moment.brows_raised - person.brow_arch * np.sin(2.2 * t_N) + person.brow_tilt * (t_N - 0.5)
    thick_N = 0.5 * person.brow_thickness * (1 - t_N**3) + 0.008
    brow = np.concatenate([np.column_stack([x_N, y_N - thick_N]), np.column_stack([x_N, y_N + thick_N])[::-1]])
    pen.fill(brow * (side, 1), mix(mix(person.hair, BLACK, 0.3), mix(person.skin, BLACK, 0.8), 0.6))


def _draw_nose(pen: Pen, person: Person) -> None:
    length, wide = person.nose_length, person.nose_width
    dark, shine = mix(person.skin, colour("5a2a1c"), 0.4), mix(person.skin, WHITE, 0.3)
    pen.stroke(np.array([(0.0, 0.12), (0.0, length - 0.2)]), 0.05, mix(person.skin, shine, 0.5), lift=0.2)
    pen.fill(ellipse(0.0, length, 0.1, 0.08), shine, lift=_NOSE_LIFT)
    for side in (-1, 1):
        wing = curve([(wide * 0.85, length - 0.1), (wide * 1.02, length + 0.07), (wide * 0.7, length + 0.16)])
        pen.stroke(wing * (side, 1), 0.04, dark, lift=0.12)
        pen.fill(ellipse(side * wide * 0.48, length + 0.16, 0.3 * wide, 0.045, 12), mix(dark, BLACK, 0.45), lift=0.15)
    pen.stroke(
        curve([(-0.25 * wide, length + 0.18), (0.0, length + 0.2), (0.25 * wide, length + 0.18)]), 0.03, dark, lift=0.2
    )


def _draw_mouth(pen: Pen, person: Person, moment: Moment) -> np.ndarray:
    """Draw lips, and teeth between them; return the corners [2, 2] in face coordinates."""
    y, half = person.mouth, person.mouth_width * (1 + 0.18 * moment.smile)
    lifted, gap = 0.09 * moment.smile, 0.16 * moment.mouth_open
    t_N = np.linspace(-1.0, 1.0, 17)
    round_N = 1 - t_N**2
    middle_N = y - lifted * t_N**2
    bow_N = person.upper_lip * (round_N**0.8 * (1 + 0.35 * np.abs(t_N)) - 0.22 * np.exp(-((t_N / 0.16) ** 2)))
    rows = (
        middle_N - bow_N - 0.3 * gap * round_N,
        middle_N - 0.3 * gap * round_N,
        middle_N + 0.7 * gap * round_N + 0.01 * round_N,
        middle_N + 0.7 * gap * round_N + person.lower_lip * round_N**0.7,
    )
    lip_top, mouth_top, mouth_bottom, lip_bottom = (np.column_stack([half * t_N, row_N]) for row_N in rows)
    red = mix(person.lips, mix(person.skin, BLACK, 0.6), 0.25)
    pen.fill(np.concatenate([lip_top, mouth_bottom[::-1]]), mix(red, BLACK, 0.14))
    pen.fill(np.concatenate([mouth_bottom, lip_bottom[::-1]]), red)
    pen.fill(
        ellipse(0.0, rows[3][8] - 0.55 * person.lower_lip, 0.3 * half, 0.18 * person.lower_lip, 12),
        mix(red, WHITE, 0.25),
    )
    if gap > 0.02:
        pen.fill(np.concatenate([mouth_top, mouth_bottom[::-1]]), colour("3a1113"))
        teeth = np.column_stack([0.9 * half * t_N, np.minimum(rows[1] + 0.09 * round_N**0.5, rows[2])])
        pen.fill(np.concatenate([mouth_top * (0.9, 1.0), teeth[::-1]]), colour("f2eee6"))
    pen.stroke(mouth_top, 0.03, mix(red, BLACK, 0.55))
    return np.array([(-half, y - lifted), (half, y - lifted)])


def _draw_glasses(pen: Pen, person: Person) -> None:
    wide, high = 0.42, 0.24 + 0.12 * person.glasses
    square = 1.0 if person.glasses > 0.65 else 0.6
    angle_N = np.linspace(0, 2 * np.pi, 33)
    rim = np.column_stack(
        [
            np.sign(np.cos(angle_N)) * np.abs(np.cos(angle_N)) ** square,
            np.sign(np.sin(angle_N)) * np.abs(np.sin(angle_N)) ** square,
        ]
    )
    ink = mix(colour("1d1a1c"), colour("7a3b22"), person.glasses)
    for side in (-1, 1):
        pen.stroke(rim * (wide, high) + (side * person.eye_spacing / 2, 0.06), 0.035, ink, lift=0.12)
        temple = np.array([(person.eye_spacing / 2 + wide, -0.02), (person.head_width, 0.0)])
        pen.stroke(temple * (side, 1), 0.05, ink)
    inner = person.eye_spacing / 2 - wide
    pen.stroke(curve([(-inner, 0.02), (0.0, -0.04), (inner, 0.02)]), 0.05, ink, lift=0.2)
