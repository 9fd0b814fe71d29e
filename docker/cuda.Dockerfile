# The four commands on NVIDIA GPUs. From the repository's root, with the NVIDIA container toolkit on the host:
#   docker build -f docker/cuda.Dockerfile -t gpt2:cuda .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/data" gpt2:cuda \
#     torchrun --standalone --nproc_per_node=8 -m gpt2_train --recipe 124M --data data/fineweb-edu --out runs/a
# Not from nvidia/cuda: torch's wheels bring the CUDA libraries that they were built with, and the image would have
# them twice; the driver comes from the host in any case. This one also has the headers of its Python, which Triton
# compiles against.
FROM python:3.11-slim

# Triton, for torch.compile, needs a C compiler where it runs.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# Versions, also of what pip builds with, are those of constraints.txt. torch is a layer of its own, which a change of
# the packages leaves as it is.
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
