# The four commands for NVIDIA GPUs. In the repository's root, with the NVIDIA container toolkit on the host:
#   docker build -f docker/cuda.Dockerfile -t gpt2:cuda .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/data" gpt2:cuda \
#     torchrun --standalone --nproc_per_node=8 -m gpt2_train --recipe 124M --data data/fineweb-edu --out runs/a
# The base is not nvidia/cuda: torch's wheels include their CUDA libraries, and the host provides the driver. This image
# also has the headers of its Python, which Triton needs.
FROM python:3.11-slim

# Triton, for torch.compile, needs a C compiler at run time.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# constraints.txt pins all versions, also of the tools that pip builds with. torch has its own layer, so that a change
# to the packages does not reinstall it.
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1
COPY constraints.txt /src/
# hadolint ignore=DL3013
RUN pip install torch

COPY LICENSE /src/
COPY packages /src/packages
WORKDIR /src/packages
RUN pip install ./gpt2-model './gpt2-data[fast]' ./gpt2-eval ./gpt2-train

RUN useradd --create-home --uid 1000 gpt2 && install -d -o gpt2 -g gpt2 /data
USER 1000
WORKDIR /data
CMD ["gpt2-train", "--help"]
