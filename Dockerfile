# Deepy with everything it needs for GPUs; the host provides the driver (580 or newer) and NVIDIA's container toolkit.
#   docker build -t deepy .
#   docker run --gpus all --shm-size=8g --user "$(id -u):$(id -g)" --env HOME=/tmp \
#       --volume "$PWD/data:/deepy/data" --volume "$PWD/checkpoints:/deepy/checkpoints" deepy ./deepy.py train.py configs
# See docs/container.md.

# The CUDA that torch's wheel is built with: DeepSpeed and flash-attn compile with this image's nvcc.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Python with its headers, for torch.compile; ssh, pdsh and ip for jobs on several nodes. Their versions are Ubuntu's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        git g++ iproute2 openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 deepy && install --directory --owner=deepy /deepy
USER 10001
WORKDIR /deepy
ENV PATH=/deepy/.venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Packages first, so that they stay cached when only the code changes.
COPY --chown=10001 requirements requirements
RUN python3 -m venv .venv \
    && pip install -r requirements/build.txt \
    && pip install --no-build-isolation -r requirements/run.txt
# flash-attn is compiled, which takes long and needs about 4 GB of memory per job: only on request, for Ampere.
ARG FLASH_ATTENTION=0
ARG MAX_JOBS=4
RUN test "$FLASH_ATTENTION" = 0 \
    || MAX_JOBS=$MAX_JOBS pip install --no-build-isolation -r requirements/flash.txt

COPY --chown=10001 . .
RUN pip install --no-build-isolation --constraint requirements/dev.txt --editable ".[logging,corpora,eval,convert,serve,constrain]"

# serve.py listens here, at serve_host 0.0.0.0
EXPOSE 8000
CMD ["./deepy.py", "--help"]
