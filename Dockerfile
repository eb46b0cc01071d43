# Deepy with everything it needs for GPUs: torch's wheels bring CUDA, the host brings the driver.
#   docker build -t deepy .
#   docker run --gpus all --shm-size=8g -v "$PWD/data:/deepy/data" -v "$PWD/checkpoints:/deepy/checkpoints" \
#       deepy ./deepy.py train.py configs
# NCCL exchanges data between the GPUs of a machine through /dev/shm: Docker's default of 64 MB is too little.
FROM python:3.12-slim-bookworm

# a C++ compiler for torch.compile; ssh and pdsh for jobs on several nodes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make git openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /deepy
ENV PATH=/deepy/.venv/bin:$PATH PYTHONUNBUFFERED=1

# packages first: a change of the code does not fetch them again
COPY Makefile pyproject.toml README.md LICENSE ./
COPY requirements requirements
RUN mkdir megatron && touch megatron/__init__.py && make install

COPY . .
RUN useradd --create-home deepy && chown -R deepy /deepy
USER deepy
CMD ["./deepy.py", "train.py", "--help"]
