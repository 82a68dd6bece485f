# moba-train with CUDA: docker build -t moba-train . && docker run --gpus all --ipc=host moba-train +exp=quickstart
#
# torch's wheels bring CUDA, cuDNN and NCCL, so the image needs no CUDA of its own; the driver comes from the host, by
# NVIDIA's container toolkit. gcc is for Triton, which compiles a small launcher for its kernels, g++ for torch.compile on
# a CPU. flash-attn is left out: it needs a CUDA toolchain, and torch's own flash kernels take its place.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc=4:12.* g++=4:12.* libc6-dev=2.36-* \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

# First what changes seldom: the dependencies, which pip reads from pyproject.toml, then the code.
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
RUN python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
        > requirements.txt \
    && pip install --no-cache-dir -r requirements.txt
COPY conf conf
COPY data data
COPY evals evals
COPY launch launch
COPY moba moba
COPY train train
RUN pip install --no-cache-dir --no-deps .

# Runs, caches and relative paths lie here: mount a folder over runs/ to keep them.
WORKDIR /app
ENTRYPOINT ["moba-train"]
CMD ["--help"]
