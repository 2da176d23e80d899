# The image of all three roles. Versions are those of requirements.lock.
#
#   docker build --target cpu  -t REGISTRY/tandem:0.1.0-cpu  .
#   docker build --target cuda -t REGISTRY/tandem:0.1.0-cuda .
#   docker build --target cpu --build-arg EXTRAS=ray -t REGISTRY/tandem:0.1.0-cpu-ray .       with Ray, for KubeRay

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY requirements.lock ./
RUN pip install -c requirements.lock pip setuptools wheel

FROM build AS build-cpu
ARG EXTRAS=
RUN pip install -c requirements.lock --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY . .
RUN pip install -c requirements.lock --no-build-isolation ".${EXTRAS:+[$EXTRAS]}" \
 && test -n "$(find /opt/tandem -path '*kernels/cpu/_native*.so')"

FROM build AS build-cuda
ARG EXTRAS=
RUN pip install -c requirements.lock torch
COPY . .
RUN pip install -c requirements.lock --no-build-isolation ".${EXTRAS:+[$EXTRAS]}" \
 && test -n "$(find /opt/tandem -path '*kernels/cpu/_native*.so')"

# tini: as process 1 Python would ignore SIGTERM until a handler is set, which is after loading.
FROM python:${PYTHON}-slim-bookworm AS runtime
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini libgomp1 ibverbs-providers libibverbs1 librdmacm1 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 tandem \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp XDG_CACHE_HOME=/var/cache
WORKDIR /tmp
ENTRYPOINT ["tini", "--"]
CMD ["cluster", "--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/tandem /opt/tandem
USER 10001:10001

# A C compiler: Triton builds its launchers with it.
FROM runtime AS cuda
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/tandem /opt/tandem
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
