# Python with penstock[serve], at the versions that the tests ran with, and the examples. It starts nothing by itself: the
# command is yours, such as a script that calls `serve.start(...)`. Redis is not in it; compose.yaml runs a cluster of it.
#
# PYTHON_IMAGE may have a digest (python:3.12-slim@sha256:…). PACKAGES are those that the served code needs.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
COPY . /src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM ${PYTHON_IMAGE}
COPY --from=build /wheel /wheel
COPY constraints.txt /wheel/
ARG PACKAGES=""
# In a read-only file system each start of a process would compile what is not compiled here, Python's own modules too. A
# module that is written for another version of Python does not compile, and is no error.
RUN python -m pip install --no-cache-dir --no-compile --constraint /wheel/constraints.txt \
        "$(ls /wheel/*.whl)[serve]" ${PACKAGES} \
    && { python -m compileall -q -j 0 -x '/tests?/' \
        $(python -c 'import sysconfig as s; print(*{s.get_path(name) for name in ("stdlib", "purelib", "platlib")})') || true; } \
    && echo 'penstock:x:10001:10001::/app:/bin/sh' >> /etc/passwd \
    && echo 'penstock:x:10001:' >> /etc/group
COPY examples /app/examples
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1
USER penstock
WORKDIR /app
CMD ["python"]
