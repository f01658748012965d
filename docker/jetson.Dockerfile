# Builds and verifies engines on a Jetson Orin with JetPack 6 (L4T r36, TensorRT 10.3, Python 3.10), from an exported ONNX file.
#   docker build -f docker/jetson.Dockerfile -t slope-compile:jetson .        # on the Jetson
# No PyTorch: build, verify and inspect need none.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

LABEL org.opencontainers.image.title="slope-compile" \
      org.opencontainers.image.description="From an ONNX file to a verified TensorRT engine (Jetson, JetPack 6)" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-pip=22.0.2* \
 && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY slope_compile /src/slope_compile
COPY cli /src/cli

# Without the [tensorrt] extra: TensorRT comes from the base image, and PyPI has none for JetPack 6.
# The devices of an integrated GPU belong to the group video.
RUN python3 -m pip install --no-cache-dir /src \
 && useradd --no-log-init --create-home --uid 10001 --groups video slope \
 && install --directory --owner=slope /runs

USER 10001
WORKDIR /runs

HEALTHCHECK --interval=5m --timeout=60s --start-period=30s CMD ["slope-compile", "doctor"]
ENTRYPOINT ["slope-compile"]
CMD ["--help"]
