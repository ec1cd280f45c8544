"""The first centres of a run that starts from a model of faces: that model knows the people already.

People of the earlier run keep its centres. Others start at the mean of their embeddings (Qi et al. 2018, Low-Shot
Learning with Imprinted Weights, equation 5). Random centres would first pull the embeddings apart.

Shape suffixes: R identities of this worker, S sub-centres of each, M rows of a batch, D dimensions.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional

from lib import storage
from lib.recognition.model import EmbeddingModel
from lib.recognition.spec import INIT_NAMES, SPEC_NAME, WEIGHTS_SUFFIXES, ModelSpec
from lib.training import checkpoint_parts, checkpoints, collective
from lib.training.centre_store import CentreStore
from lib.training.embedding_passes import EmbeddingPass
from lib.training.face_cache import FaceCache

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.integer]

APART = 0.3
"""Distance of the second and later sub-centres of a person from the mean, as a share of its length."""


def start_centres(
    centres: CentreStore, init: str, spec: ModelSpec, cache: FaceCache, embedding: EmbeddingPass, model: EmbeddingModel
) -> str:
    """Set this worker's centres if `--init` is a model with the same head; return a line for the user.

    Raises:
        UserError: centres of the earlier run are damaged.
    """
    if not _is_of_this_head(init, spec):
        return ""
    names = cache.identities[centres.identities.start : centres.identities.stop]
    is_kept_R = _take_earlier(centres, init, names)
    own = np.arange(centres.identities.start, centres.identities.stop)[~is_kept_R]
    sums_RD = np.zeros((len(names), spec.embedding_dim))
    is_there_N = np.isin(cache.labels_N, own)
    if cache.held is not None:
        is_there_N &= cache.held.rows_N  # others keep their first centre
    rows = np.flatnonzero(is_there_N)
    for batch in embedding.over(rows, cache, model):
        whole_M = ~batch.failed_M
        vectors_MD = batch.embeddings_MD[whole_M].astype(np.float64)
        vectors_MD /= np.linalg.norm(vectors_MD, axis=1, keepdims=True).clip(1e-12)
        np.add.at(sums_RD, cache.labels_N[batch.rows_M[whole_M]] - centres.identities.start, vectors_MD)
    _set_means(centres, torch.from_numpy(sums_RD))
    num_kept, num_new = collective.summed(np.array([is_kept_R.sum(), len(own)])).tolist()
    return (
        f"centres: {num_kept:,} people keep those of {storage.redacted(init)}, {num_new:,} start as the mean of their "
        "embeddings"
    )


def _is_of_this_head(init: str, spec: ModelSpec) -> bool:
    if init in INIT_NAMES or init.endswith(WEIGHTS_SUFFIXES):
        return False
    for folder in (init, storage.join(init, "model")):
        url = storage.join(folder, SPEC_NAME)
        if storage.exists(url):
            earlier = ModelSpec.from_json(storage.read_json(url), url)
            return earlier.backbone == spec.backbone and earlier.layer_widths == spec.layer_widths
    return False


def _take_earlier(centres: CentreStore, init: str, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Copy the centres that the earlier run has of these people; return which they are [R]."""
    is_kept_R = np.zeros(len(names), bool)
    run_url = next((url for url in (init, init.rstrip("/").rpartition("/")[0]) if url and _has_centres(url)), None)
    if run_url is None:
        return is_kept_R
    progress = checkpoints.newest_progress(run_url)
    known = checkpoints.read_identities(run_url)
    if progress is None or len(known) != progress.num_centres:
        return is_kept_R
    place_R = pc.fill_null(pc.index_in(pa.array(names, pa.string()), known), -1).to_numpy()
    if not (place_R >= 0).any():
        return is_kept_R
    wanted = range(int(place_R[place_R >= 0].min()), int(place_R.max()) + 1)
    for start, tensors in checkpoint_parts.read_centres(run_url, progress, wanted):
        earlier_CSD = tensors["centres"]
        here = np.flatnonzero((place_R >= start) & (place_R < start + len(earlier_CSD)) & ~is_kept_R)
        if earlier_CSD.shape[1:] != centres.centres_RSD.shape[1:]:
            logger.warning("the centres of %s are of another shape: they start anew", storage.redacted(run_url))
            return is_kept_R
        taken_CSD = earlier_CSD[torch.from_numpy(place_R[here] - start)]
        centres.centres_RSD[torch.from_numpy(here)] = taken_CSD.to(centres.centres_RSD.device)
        is_kept_R[here] = True
    return is_kept_R


def _has_centres(url: str) -> bool:
    return storage.exists(storage.join(url, checkpoints.FOLDER, checkpoints.IDENTITIES_NAME))


def _set_means(centres: CentreStore, sums_RD: torch.Tensor) -> None:
    """Set the centres of the people whose sum of embeddings is not zero."""
    here = torch.from_numpy(np.flatnonzero(sums_RD.abs().sum(dim=1).numpy()))
    means_CD = functional.normalize(sums_RD[here], dim=1).float().to(centres.centres_RSD.device)
    started_CSD = centres.centres_RSD[here] * APART + means_CD[:, None]
    started_CSD[:, 0] = means_CD
    centres.centres_RSD[here] = functional.normalize(started_CSD, dim=2)
