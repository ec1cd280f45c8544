"""Small sets in the format of IJB, of drawn people, and figures of templates by loops from their description."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.sample.sample_job import SamplePlan, draw_photo

PHOTOS_EACH = 6


@dataclass
class HandMade:
    """A set on disk.

    Attributes:
        rows: image, template, media.
        points: ten coordinates and a score of each image.
        pairs: template, template, label.
        galleries, probes: template and subject.
    """

    folder: Path
    name: str = "ijbc"
    rows: list[tuple[str, int, int]] = field(default_factory=list)
    points: dict[str, list[float]] = field(default_factory=dict)
    pairs: list[tuple[int, int, int]] = field(default_factory=list)
    galleries: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    probes: list[tuple[int, str]] = field(default_factory=list)

    def write(self) -> "HandMade":
        """Write the text files."""
        meta = self.folder / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        self._lines(meta / f"{self.name}_face_tid_mid.txt", self.rows)
        self._lines(
            meta / f"{self.name}_name_5pts_score.txt",
            [(image, *(f"{value:.4f}" for value in values)) for image, values in self.points.items()],
        )
        self._lines(meta / f"{self.name}_template_pair_label.txt", self.pairs)
        for key, enrolled in self.galleries.items():
            self._csv(meta / f"{self.name}_1N_gallery_{key}.csv", enrolled)
        if self.probes:
            self._csv(meta / f"{self.name}_1N_probe_mixed.csv", self.probes)
        return self

    def _lines(self, path: Path, rows: Sequence[tuple]) -> None:
        path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))

    def _csv(self, path: Path, enrolled: list[tuple[int, str]]) -> None:
        """Write a line for each image of a template, as IJB has them."""
        images = {template: [image for image, of, _ in self.rows if of == template] for template, _ in enrolled}
        lines = [f"{template},{subject},{image},1,2" for template, subject in enrolled for image in images[template]]
        path.write_text("\n".join(["TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X,FACE_Y", *lines, ""]))


def hand_made(folder: Path, num_subjects: int = 12) -> HandMade:
    """Draw a set: each subject has template 10 s + 1 in a gallery, and 10 s + 2 and 10 s + 3 among the probes.

    The images of the second template are of one media, those of the third share one with another template.
    """
    made = HandMade(folder)
    (folder / "loose_crop").mkdir(parents=True)
    plan = SamplePlan(identities=4 * num_subjects, photos_per_identity=2 * PHOTOS_EACH, seed=3)
    rng = np.random.default_rng(1)
    subjects = 0
    for identity in range(plan.identities):
        photos = range(identity * plan.photos_per_identity, (identity + 1) * plan.photos_per_identity)
        single = [photo for photo in photos if plan.special(photo) == ("one", "jpeg")][:PHOTOS_EACH]
        if len(single) < PHOTOS_EACH or subjects == num_subjects:
            continue
        for number, photo in enumerate(single):
            data, (row,) = draw_photo(plan, photo)
            image = f"{subjects * PHOTOS_EACH + number + 1}.jpg"
            (folder / "loose_crop" / image).write_bytes(data)
            made.points[image] = [*np.asarray(row["landmarks"]).tolist(), rng.uniform(0.5, 1.0)]
            template = 10 * subjects + 1 + number // 2
            media = (7 if number in (2, 3) else number if number < 5 else 0) + 100 * subjects
            made.rows.append((image, template, media))
        first = made.rows[-PHOTOS_EACH][0]
        made.rows.append((first, 10 * subjects + 3, 100 * subjects))  # an image of two templates
        subjects += 1
    assert subjects == num_subjects
    templates = sorted({template for _, template, _ in made.rows})
    made.pairs = [
        (a, b, int(a // 10 == b // 10)) for n, a in enumerate(templates) for b in templates[n + 1 :] if (a + b) % 7
    ]
    half = num_subjects // 2
    for key, those in (("G1", range(half)), ("G2", range(half, num_subjects))):
        made.galleries[key] = [(10 * subject + 1, f"S{subject}") for subject in those]
    made.probes = [(10 * subject + kind, f"S{subject}") for subject in range(num_subjects) for kind in (2, 3)]
    rng.shuffle(made.rows)
    return made.write()


def hand_made_again(folder: Path) -> HandMade:
    """Return what was written into a folder, read line by line."""
    meta = folder / "meta"
    rows = [line.split() for line in (meta / "ijbc_face_tid_mid.txt").read_text().splitlines()]
    points = [line.split() for line in (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()]
    pairs = [line.split() for line in (meta / "ijbc_template_pair_label.txt").read_text().splitlines()]

    def enrolled(name: str) -> list[tuple[int, str]]:
        lines = [line.split(",") for line in (meta / f"ijbc_1N_{name}.csv").read_text().splitlines()[1:]]
        return list(dict.fromkeys((int(line[0]), line[1]) for line in lines))

    return HandMade(
        folder,
        rows=[(image, int(template), int(media)) for image, template, media in rows],
        points={name: [float(value) for value in values] for name, *values in points},
        pairs=[(int(a), int(b), int(label)) for a, b, label in pairs],
        galleries={key: enrolled(f"gallery_{key}") for key in ("G1", "G2")},
        probes=enrolled("probe_mixed"),
    )


def template_reference(made: HandMade, vector_of: dict[str, np.ndarray], *, by_score: bool) -> dict[int, np.ndarray]:
    """Return the vector of each template that has an image with a vector."""
    templates: dict[int, dict[int, list[np.ndarray]]] = {}
    for image, template, media in made.rows:
        if image in vector_of:
            score = made.points[image][10] if by_score else 1.0
            templates.setdefault(template, {}).setdefault(media, []).append(vector_of[image].astype(np.float64) * score)
    sums = {
        template: sum(np.mean(images, axis=0) for images in medias.values()) for template, medias in templates.items()
    }
    return {template: total / np.linalg.norm(total) for template, total in sums.items()}


def tar_reference(cosines: Sequence[float], same: Sequence[int], far: float) -> float:
    """Return the highest share of same pairs above a threshold that at most so many of the different pairs reach."""
    best = 0.0
    different = [cosine for cosine, label in zip(cosines, same, strict=True) if not label]
    alike = [cosine for cosine, label in zip(cosines, same, strict=True) if label]
    for threshold in cosines:
        if np.mean([cosine >= threshold for cosine in different]) <= far:
            best = max(best, float(np.mean([cosine >= threshold for cosine in alike])))
    return best


def search_reference(
    vectors: dict[int, np.ndarray], gallery: list[tuple[int, str]], probes: list[tuple[int, str]]
) -> list[tuple[float | None, int, float]]:
    """Return for each probe the similarity to its subject (None: not there), the rank of that, and the best other."""
    found = []
    for probe, subject in probes:
        cosines = {whose: float(vectors[template] @ vectors[probe]) for template, whose in gallery}
        others = [cosine for whose, cosine in cosines.items() if whose != subject]
        mate = cosines.get(subject)
        rank = 0 if mate is None else 1 + sum(cosine >= mate for cosine in others)
        found.append((mate, rank, max(others)))
    return found
