# syntax=docker/dockerfile:1

#   docker build -t understudy .                              for CPUs
#   docker build -t understudy --build-arg VARIANT=cuda .     for NVIDIA GPUs (docker run --gpus all)
#   docker run --rm -p 8080:8080 understudy
#
# Models of your own: -v DIR:/models:ro -e UNDERSTUDY_MODELS=/models
# Experiments and votes, kept over new images: -v understudy-data:/var/lib/understudy
# A Hub model, kept over restarts: -v understudy-hub:/var/cache/huggingface -e UNDERSTUDY_DEFAULT_MODEL=owner/name
# Any user id will do (group 0 may write where 10001 may), and so will --read-only and --cap-drop ALL.

ARG VARIANT=cpu
ARG DEBIAN_IMAGE=debian:bookworm-slim
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn
ARG RUST_IMAGE=rust:1.95.0-slim-bookworm

# What the program is built in, and what it runs on: the same distribution, for the same libc.
FROM ${RUST_IMAGE} AS rust
FROM ${DEBIAN_IMAGE} AS build-cpu
ENV FEATURES= CARGO_TARGET_DIR=/target/cpu
FROM ${CUDA_IMAGE}-devel-ubuntu24.04 AS build-cuda
ENV FEATURES=cuda CARGO_TARGET_DIR=/target/cuda
FROM ${DEBIAN_IMAGE} AS run-cpu
FROM ${CUDA_IMAGE}-runtime-ubuntu24.04 AS run-cuda

FROM build-${VARIANT} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=rust /usr/local/rustup /usr/local/rustup
COPY --from=rust /usr/local/cargo /usr/local/cargo
ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo PATH=/usr/local/cargo/bin:$PATH
WORKDIR /source
COPY . .
# The GPU generation that kernels are compiled for; docker build sees none to ask.
ARG CUDA_COMPUTE_CAP=80
# Crates and what was compiled stay in the builder's cache, whatever changes in the source.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/target \
    cargo build --release --locked --bin understudy --features "$FEATURES" \
    && cp "$CARGO_TARGET_DIR/release/understudy" /understudy

FROM run-${VARIANT}
RUN groupadd --gid 10001 understudy \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin understudy \
    && install --directory --owner=10001 --group=0 --mode=0775 /var/cache/huggingface /var/cache/understudy /var/lib/understudy
WORKDIR /opt/understudy
COPY --from=build /understudy ./
# Found beside the executable.
COPY models/zoo models/zoo
# Experiments are kept in /var/lib/understudy. It is the default folder, not a named one: where it cannot be written,
# images are served all the same, and whoever begins an experiment is told why there is none.
ENV UNDERSTUDY_HOST=0.0.0.0 XDG_STATE_HOME=/var/lib XDG_CACHE_HOME=/var/cache HF_HOME=/var/cache/huggingface
# By number: Kubernetes' runAsNonRoot believes no name.
USER 10001:10001
EXPOSE 8080
VOLUME /var/cache/huggingface /var/lib/understudy
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["/opt/understudy/understudy", "health"]
ENTRYPOINT ["/opt/understudy/understudy"]
CMD ["serve"]
