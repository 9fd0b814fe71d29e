# The four commands for CPUs. In the repository's root:
#   docker build -f docker/cpu.Dockerfile -t gpt2:cpu .
#   docker run --rm -v "$PWD:/data" gpt2:cpu gpt2-data build pydocs
FROM python:3.11-slim

# Generation (engine.c) and torch.compile need a C compiler at run time.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# constraints.txt pins all versions, also of the tools that pip builds with. torch has its own layer, so that a change
# to the packages does not reinstall it. It comes from pytorch.org: the package index's build includes CUDA (several GB).
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
