# The MONAI Label app in a container; docs/containers.md says how to use it. For a CPU:
#     docker build -t sam2sgp .
# With CUDA:
#     docker build -t sam2sgp --build-arg TORCH_INDEX=https://pypi.org/simple .
FROM python:3.11-slim-bookworm AS build

# Where torch has a build for the CPU, that one is newer than PyPI's of the same version: 2.14.1+cpu > 2.14.1.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/sam2sgp
ENV PATH=/opt/sam2sgp/bin:$PATH

WORKDIR /src
COPY constraints.txt requirements-core.txt requirements-app.txt ./
# The steps of `make setup`, in its order.
RUN pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" setuptools wheel torch torchvision \
    && SAM2_BUILD_CUDA=0 pip install -c constraints.txt --no-build-isolation sam2 \
    && pip install -c constraints.txt -r requirements-core.txt -r requirements-app.txt
COPY . .
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
COPY --from=build /opt/sam2sgp /opt/sam2sgp
# State and logs of the app lie below XDG_DATA_HOME: keep them in a volume.
ENV PATH=/opt/sam2sgp/bin:$PATH XDG_DATA_HOME=/data
RUN useradd --uid 1000 --create-home sam2sgp && install -d -o sam2sgp /data /studies
USER 1000
VOLUME ["/data"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/sam2sgp/health/live', timeout=9)"]
ENTRYPOINT ["sam2sgp"]
CMD ["serve", "/studies", "--host", "0.0.0.0"]
