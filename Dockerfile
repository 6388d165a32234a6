# docker build -t fcmae .
# docker run --gpus all --shm-size 16g -v /data:/data -v "$PWD":/workspace fcmae pretrain data.path=/data/images
# Several GPUs: docker run ... --entrypoint torchrun fcmae --nproc_per_node=8 -m fcmae.cli pretrain ...
#
# torch's wheels bring CUDA's libraries, so the base image has to bring Python or apt-get only. Without a GPU:
#   docker build -t fcmae --build-arg BASE_IMAGE=docker.io/library/python:3.12-slim \
#       --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
ARG BASE_IMAGE=docker.io/nvidia/cuda:12.8.1-runtime-ubuntu24.04
FROM ${BASE_IMAGE}

# A C compiler and Python's headers are for torch.compile and Triton. python:*-slim has its own Python with headers.
RUN apt-get update \
    && packages="gcc g++ libc6-dev" \
    && if ! command -v python3 >/dev/null || ! python3 -c "import ensurepip" 2>/dev/null; then \
        packages="$packages python3 python3-venv python3-dev"; \
    fi \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/fcmae
ENV PATH=/opt/fcmae/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

# Before the sources, so that a change of them doesn't install torch again.
ARG TORCH_INDEX_URL=
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch torchvision
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY fcmae fcmae
COPY conf conf
COPY launch launch
RUN pip install -c constraints.txt '.[demo,tensorboard,tiff]' && fcmae --version

# --user $(id -u) makes files in a mounted folder your own.
RUN useradd --create-home --uid 10001 fcmae && mkdir -p /workspace && chown fcmae /workspace
USER fcmae
WORKDIR /workspace
ENTRYPOINT ["fcmae"]
CMD ["--help"]
