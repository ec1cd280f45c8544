# The image of every job: docker build -t conv-facenet .   (or `make image`)
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS environment
COPY requirements.txt /tmp/requirements.txt
RUN python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check -r /tmp/requirements.txt

FROM ${BASE}
LABEL org.opencontainers.image.title="conv-facenet" \
      org.opencontainers.image.description="Photos become aligned faces, and these a face-embedding model" \
      org.opencontainers.image.licenses="MIT"
# OpenCV's wheel links against these two.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home faces \
    && mkdir /data && chown faces /data
COPY --from=environment /opt/venv /opt/venv
COPY jobs /app/jobs
COPY lib /app/lib
COPY LICENSE README.md /app/
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    DATA_URL=/data
USER faces
WORKDIR /app
CMD ["jobs/preprocess.py"]
