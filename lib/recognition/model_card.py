"""The card of a model: the Markdown text beside its weights."""

from collections.abc import Mapping
from typing import Any

from lib.recognition.spec import ModelSpec

_LIMITS = """## Intended use and limits

It verifies whether two photos show the same person, and finds likely matches for a person to confirm.
Face embeddings are biometric data: in many places they may be made and kept only with consent or another legal ground,
and they must be protected and deleted like the photos they come from.

Do not let it decide alone about anyone's access, work, benefits or liberty. Error rates differ between groups of
people, ages and cameras, above all between groups that the training photos leave out. Measure them on photos of the
people it will meet, and choose the threshold there. It does not tell a live face from a picture of one.
"""


def _chosen_for(spec: ModelSpec) -> str:
    point = spec.metrics.get("operating_point")
    if not point:
        return ""
    low, high = point["tar_interval"] or (point["tar"], point["tar"])
    return (
        f", chosen for a FAR of {point['at_far']:g}: {100 * point['tar']:.2f} % of the pairs of one person are then "
        f"recognised (95 % interval {100 * low:.2f} to {100 * high:.2f} %)"
    )


def model_card(spec: ModelSpec) -> str:
    """Return the Markdown text that tells people what a model is for, what it was made from, and its limits."""
    side = spec.image_size
    kind = "unit-length" if spec.normalize else "raw"
    mirrored = "\nThe vector is the sum of those of the face and of its mirror image." if spec.flip else ""
    threshold = (
        f"Two faces count as one person at a Euclidean distance of {spec.threshold:.4g} or less{_chosen_for(spec)}."
        if spec.threshold is not None
        else "No threshold has been chosen yet: run jobs/evaluate.py."
    )
    return f"""# Face embedding model: {spec.backbone}

Turns an aligned face ({side}x{side} pixels, RGB) into a {kind} vector of {spec.embedding_dim} numbers.{mirrored}
{threshold}

## Use

On aligned faces:

```python
from lib.recognition.model import embed, load_model
model = load_model("URL of this folder")
embeddings_ND = embed(model, crops_NHWC)  # uint8 RGB faces, aligned as below
```

On photos:

```python
from lib.recognition.recognizer import FaceRecognizer
recognizer = FaceRecognizer.load("URL of this folder")
embedding_D = recognizer.faces("one.jpg")[0].embedding_D
verification = recognizer.verify("one.jpg", "other.jpg")  # same or not, distance, threshold
```

## Verification
{_listed(spec.metrics, "Not measured yet.")}

## Trained on
{_listed(spec.training, "Not trained: these are the initial weights.")}

## Faces it expects
{_listed(spec.fingerprint, "Unknown: the faces carried no fingerprint.")}

Faces that were detected or aligned in another way give embeddings that the threshold does not fit.

{_LIMITS}"""


def _listed(values: Mapping[str, Any], otherwise: str) -> str:
    return "\n" + ("\n".join(f"- {name}: {value}" for name, value in values.items()) or otherwise)
