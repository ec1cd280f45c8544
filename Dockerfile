# One image for every job: on this machine, on Kubernetes, and with Apptainer or Charliecloud on Slurm. `make image`.
#
# Every shell finds everything: `python` and `ray` are in /usr/local/bin, `lib` is on Python's path. Nothing relies on
# ENTRYPOINT, USER, WORKDIR or ENV, which Apptainer and Charliecloud partly ignore, or on PATH, which a login shell resets.
# Only DATA_URL is missing there: set it, or give --data.
#
# Build arguments:
#   BASE                 another Python image, such as the same one by its digest
#   PIP_EXTRA_INDEX_URL  https://download.pytorch.org/whl/cpu makes an image without CUDA, a third of the size
#   BACKBONE_WEIGHTS     URL of a .safetensors or .pth file, which becomes /opt/weights/FILE, for --init
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# All packages that requirements.txt needs, in five lists. Each becomes a layer of at most 2 GB. Layers are pulled in
# parallel, and a change of one list leaves the other layers in the cache. triton (0.9 GB) is left out; without it
# `train --compile auto` says that it does not compile, and continues.
FROM ${BASE} AS pins
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG PIP_EXTRA_INDEX_URL
WORKDIR /pins
COPY requirements.txt constraints.txt ./
RUN touch cuda.txt nvidia.txt torch.txt large.txt others.txt \
    && pip install --no-cache-dir --dry-run --ignore-installed --quiet --report report.json \
        --constraint constraints.txt -r requirements.txt \
    && python -c 'import json; found = json.load(open("report.json"))["install"]; \
        print(*("{name}=={version}".format(**each["metadata"]) for each in found), sep="\n")' \
    | sed -e '/^triton==/d' | sort \
    | awk '{ print > ((/-cu[0-9]+==/ ? "nvidia" : /^(cuda|nvidia)-/ ? "cuda" : /^torch/ ? "torch" \
        : /^(ray|openvino|onnxruntime.*|opencv-python|pyarrow|pandas|scipy|numpy)==/ ? "large" : "others") ".txt") }'

FROM ${BASE} AS weights
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG BACKBONE_WEIGHTS=
RUN mkdir /opt/weights; if [ -n "$BACKBONE_WEIGHTS" ]; then \
        python -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' \
            "$BACKBONE_WEIGHTS" "/opt/weights/${BACKBONE_WEIGHTS##*/}"; fi

FROM ${BASE} AS system
# OpenCV's wheel links against these two. Debian decides their versions.
# hadolint ignore=DL3008
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends libgl1 libglib2.0-0 > /dev/null \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home faces \
    && mkdir --mode 1777 /data \
    && echo /app > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/conv-facenet.pth"

# One stage per list, so that a builder that keeps every step twice on disk can build them one after the other.
FROM system AS cuda
ARG PIP_EXTRA_INDEX_URL
ARG PIP_ROOT_USER_ACTION=ignore
COPY --from=pins /pins/cuda.txt /pins/
RUN pip install --no-cache-dir --no-deps -r /pins/cuda.txt

FROM cuda AS nvidia
ARG PIP_EXTRA_INDEX_URL
ARG PIP_ROOT_USER_ACTION=ignore
COPY --from=pins /pins/nvidia.txt /pins/
RUN pip install --no-cache-dir --no-deps -r /pins/nvidia.txt

FROM nvidia AS torch
ARG PIP_EXTRA_INDEX_URL
ARG PIP_ROOT_USER_ACTION=ignore
COPY --from=pins /pins/torch.txt /pins/
RUN pip install --no-cache-dir --no-deps -r /pins/torch.txt

FROM torch AS large
ARG PIP_EXTRA_INDEX_URL
ARG PIP_ROOT_USER_ACTION=ignore
COPY --from=pins /pins/large.txt /pins/
RUN pip install --no-cache-dir --no-deps -r /pins/large.txt

FROM large AS environment
ARG PIP_EXTRA_INDEX_URL
ARG PIP_ROOT_USER_ACTION=ignore
COPY --from=pins /pins/others.txt /pins/
RUN pip install --no-cache-dir --no-deps -r /pins/others.txt

FROM environment
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="conv-facenet" \
      org.opencontainers.image.description="Photos become aligned faces, and these a face-embedding model" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=weights /opt/weights /opt/weights
COPY LICENSE README.md /app/
COPY jobs /app/jobs
COPY lib /app/lib
# For a read-only root and any user id: files that libraries write go to /tmp.
ENV DATA_URL=/data \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /app
CMD ["jobs/preprocess.py"]
