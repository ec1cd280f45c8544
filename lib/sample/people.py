"""People who do not exist: a `Person` is the same in all pictures, a `Moment` differs from picture to picture.

Lengths are in face coordinates (lib/sample/drawing.py).
"""

from dataclasses import dataclass

import numpy as np

from lib.sample.drawing import Colour, colour

# Few colours, shared by many people, so that colour alone identifies nobody.
SKINS = tuple(map(colour, ("ecc8ae", "e2b593", "cf9c74", "b8845e", "9c6b4f", "80553c")))
HAIRS = tuple(map(colour, ("211a17", "3a2a21", "5f412d", "7d5530", "a67c42", "783824", "86868c")))
IRISES = tuple(map(colour, ("51341f", "6f5433", "4d7355", "4677a3", "667580")))
LIPS = tuple(map(colour, ("b5504e", "a8434f", "c06a62")))
CLOTHES = tuple(
    map(colour, ("27384f", "7b2d34", "e6e1d6", "3f5d4a", "c79a3c", "56607a", "2b2b30", "9c6b57", "7f9fb8", "b8546a"))
)


@dataclass(frozen=True, kw_only=True)
class Person:
    """What stays the same: colours, and lengths in face coordinates."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    head_width: float
    jaw_width: float
    chin_width: float
    chin: float
    crown: float
    eye_spacing: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    lid_fold: float
    brow_gap: float
    brow_length: float
    brow_thickness: float
    brow_arch: float
    brow_tilt: float
    nose_length: float
    nose_width: float
    mouth: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    ear: float
    age: float
    hairline: float
    hair_volume: float
    hair_curl: float
    hair_part: float
    hair_bun: float
    hair_fringe: float
    hair_length: float
    beard: float
    moustache: bool
    glasses: float
    freckles: float
    moles: tuple[tuple[float, float], ...]

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Person":
        """Return a person whose every trait is drawn from `rng`."""
        draw, chance = rng.uniform, rng.random
        bearded, nose_length = chance() < 0.2, draw(0.53, 0.71)
        skin = SKINS[rng.integers(len(SKINS))]
        hairs = [hair for hair in HAIRS if sum(hair) < sum(skin) + 60]
        return cls(
            skin=skin,
            hair=hairs[rng.integers(len(hairs))],
            iris=IRISES[rng.integers(len(IRISES))],
            lips=LIPS[rng.integers(len(LIPS))],
            head_width=draw(1.12, 1.34),
            jaw_width=draw(0.74, 1.12),
            chin_width=draw(0.22, 0.46),
            chin=nose_length + draw(0.94, 1.12),
            crown=draw(1.5, 1.75),
            eye_spacing=draw(0.93, 1.11),
            eye_width=draw(0.22, 0.29),
            eye_height=draw(0.1, 0.16),
            eye_tilt=draw(0.0, 0.07),
            lid_fold=draw(0.03, 0.1),
            brow_gap=draw(0.26, 0.36),
            brow_length=draw(0.48, 0.66),
            brow_thickness=draw(0.035, 0.12),
            brow_arch=draw(0.03, 0.13),
            brow_tilt=draw(-0.07, 0.04),
            nose_length=nose_length,
            nose_width=draw(0.29, 0.4),
            mouth=nose_length + draw(0.36, 0.46),
            mouth_width=draw(0.33, 0.43),
            upper_lip=draw(0.03, 0.1),
            lower_lip=draw(0.06, 0.15),
            ear=draw(0.22, 0.36),
            age=max(0.0, draw(-0.6, 1.0)),
            hairline=draw(-1.2, -0.8),
            hair_volume=draw(0.05, 0.6),
            hair_curl=draw(0.03, 0.1) if chance() < 0.3 else 0.0,
            hair_part=draw(-0.8, 0.8),
            hair_bun=draw(0.3, 0.55) if not bearded and chance() < 0.25 else 0.0,
            hair_fringe=draw(0.2, 0.36) if chance() < 0.2 else 0.0,
            hair_length=0.0 if bearded or chance() < 0.45 else draw(0.8, 2.6),
            beard=draw(0.3, 1.0) if bearded else 0.0,
            moustache=bearded or chance() < 0.08,
            glasses=draw(0.3, 1.0) if chance() < 0.25 else 0.0,
            freckles=draw(0.3, 1.0) if chance() < 0.15 else 0.0,
            moles=tuple((draw(-0.6, 0.6), draw(0.35, 1.2)) for _ in range(rng.integers(3))),
        )


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What changes: pose in radians, expression as shares of the strongest, clothes."""

    roll: float
    yaw: float
    pitch: float
    smile: float
    mouth_open: float
    eyes_open: float
    brows_raised: float
    gaze: float
    clothes: Colour
    collar: int

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Moment":
        """Return a moment drawn from `rng`: roll up to 30 degrees, yaw up to 25."""
        draw = rng.uniform
        return cls(
            roll=float(np.radians(np.clip(rng.laplace(0, 6.5), -30, 30))),
            yaw=float(np.radians(np.clip(rng.normal(0, 6), -25, 25))),
            pitch=draw(-0.05, 0.05),
            smile=draw(-0.25, 1.0),
            mouth_open=max(0.0, draw(-0.7, 1.0)),
            eyes_open=draw(0.62, 1.1),
            brows_raised=draw(-0.04, 0.06),
            gaze=draw(-0.3, 0.3),
            clothes=CLOTHES[rng.integers(len(CLOTHES))],
            collar=int(rng.integers(3)),
        )
