# The images of the two planes: docker build --target control . and docker build --target dataplane .
#
# Both hold the same virtual environment, so that a node stores it once. They run as user 10001 on a read-only root and
# write to /run/sippbx (the planes' socket), /var/lib/sippbx (the control plane's data) and /tmp alone.

ARG PYTHON_IMAGE=python:3.12-slim

# -------------------------------------------------------------------------------------------------------------- builder

FROM ${PYTHON_IMAGE} AS builder

WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# pip and the build back end stay behind in an environment of their own.
COPY requirements-build.lock requirements-runtime.lock ./
RUN python3 -m venv /opt/build \
 && python3 -m venv --without-pip /opt/sippbx \
 && /opt/build/bin/pip install --no-deps --require-hashes -r requirements-build.lock \
 && /opt/build/bin/pip --python /opt/sippbx/bin/python install --no-deps --require-hashes -r requirements-runtime.lock

COPY pyproject.toml README.md LICENSE ./
COPY control control
COPY dataplane dataplane
COPY sippbx sippbx
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && /opt/build/bin/pip --python /opt/sippbx/bin/python install --no-deps --no-index dist/*.whl \
 && /opt/sippbx/bin/python -P -c "import control.app, dataplane.app, sippbx.cli"

# -------------------------------------------------------------------------------------------------------------- runtime

FROM ${PYTHON_IMAGE} AS runtime

RUN install -d -o 10001 -g 10001 -m 0750 /run/sippbx /var/lib/sippbx
COPY --from=builder /opt/sippbx /opt/sippbx

ENV PATH=/opt/sippbx/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /
STOPSIGNAL SIGTERM

# ------------------------------------------------------------------------------------------------------------ dataplane

FROM runtime AS dataplane

LABEL org.opencontainers.image.title="sip-pbx data plane" \
      org.opencontainers.image.description="Relays the RTP of calls as the control plane tells it" \
      org.opencontainers.image.licenses="MIT"
# /metrics, /livez and /readyz. Media ports are those of media.port_range in the settings.
EXPOSE 9091/tcp
ENTRYPOINT ["/opt/sippbx/bin/python", "-m", "dataplane", "--supervise", "--config", "/etc/sippbx/dataplane.yaml"]

# -------------------------------------------------------------------------------------------------------------- control

FROM runtime AS control

LABEL org.opencontainers.image.title="sip-pbx control plane" \
      org.opencontainers.image.description="A SIP back-to-back user agent; also holds the sippbx command" \
      org.opencontainers.image.licenses="MIT"
# SIP, the HTTP API, the gRPC API, and /metrics, /livez and /readyz.
EXPOSE 5060/udp 8080/tcp 50051/tcp 9090/tcp
ENTRYPOINT ["/opt/sippbx/bin/python", "-m", "control", "--supervise", "--config", "/etc/sippbx/control.yaml"]
