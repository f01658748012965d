# Builds and verifies engines for the A100 with TensorRT 10, on a machine that has one.
#   docker build -f docker/a100.Dockerfile -t slope-compile:a100 .
# --build-arg EXTRAS=tensorrt,train adds PyTorch: then it trains and exports too.
FROM nvcr.io/nvidia/tensorrt:26.02-py3

ARG EXTRAS=tensorrt

LABEL org.opencontainers.image.title="slope-compile" \
      org.opencontainers.image.description="From a PyTorch model to a verified TensorRT engine (A100, TensorRT)" \
      org.opencontainers.image.licenses="Apache-2.0"

COPY pyproject.toml README.md LICENSE /src/
COPY slope_compile /src/slope_compile
COPY cli /src/cli

# The image brings TensorRT and its Python bindings, which satisfy the extra.
RUN python3 -m pip install --no-cache-dir "/src[${EXTRAS}]" \
 && useradd --no-log-init --create-home --uid 10001 slope \
 && install --directory --owner=slope /runs

USER 10001
WORKDIR /runs

HEALTHCHECK --interval=5m --timeout=60s --start-period=30s CMD ["slope-compile", "doctor"]
ENTRYPOINT ["slope-compile"]
CMD ["--help"]
