# The four commands on CPUs. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t gpt2:cpu .
#   docker run --rm -v "$PWD:/data" gpt2:cpu gpt2-data build pydocs
# One stage: the packages are pure Python, so that a second one would save nothing.
FROM python:3.11-slim

# Generation (engine.c) and torch.compile compile on the machine where they run.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# Versions, also of what pip builds with, are those of constraints.txt. torch is a layer of its own, which a change of
# the packages leaves as it is; it comes from pytorch.org, since the package index's brings CUDA, several GB.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1
COPY constraints.txt /src/
# hadolint ignore=DL3013
RUN pip install --index-url "$TORCH_INDEX" torch

COPY LICENSE /src/
COPY packages /src/packages
WORKDIR /src/packages
RUN pip install ./gpt2-model './gpt2-data[fast]' ./gpt2-eval ./gpt2-train

RUN useradd --create-home --uid 1000 gpt2 && install -d -o gpt2 -g gpt2 /data
USER 1000
WORKDIR /data
CMD ["gpt2-train", "--help"]
