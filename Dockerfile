# The repository in an environment with the versions of requirements.lock.
#
#   docker build -t cropr .                                CUDA libraries included; runs on a CPU as well
#   docker build -t cropr --build-arg BUILD=+cpu --build-arg PIP_EXTRA_INDEX_URL=... .     CPU alone, smaller: name the
#                                                          address of PyTorch's own CPU builds
#   docker run --rm --shm-size 8g -v "$PWD/results:/cropr/results" cropr snakemake --cores all
#   docker run --rm --shm-size 8g --gpus all -v /data:/data:ro cropr python -m cropr doctor
#
# Apptainer, for clusters:
#   docker save cropr -o cropr.tar && apptainer build cropr.sif docker-archive://cropr.tar
#   apptainer exec --nv --bind /data cropr.sif python -m cropr doctor
#
# Neither was built where this was written.
FROM python:3.11-slim-bookworm

ARG BUILD=""
ARG PIP_EXTRA_INDEX_URL=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /cropr
COPY requirements.lock .
RUN sed -E "s/^(torch|torchvision)==([^ ;]+)/\\1==\\2$BUILD/; ${BUILD:+/^(triton|nvidia-|cuda-)/d}" requirements.lock > locked.txt \
    && pip install -r locked.txt
COPY . .
RUN pip install --no-deps --no-build-isolation --editable .
