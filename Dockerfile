# Python with penstock[serve], at the versions that the tests ran with. It starts nothing by itself: the command is
# yours, such as a script that calls `serve.start(...)`. Redis is not in it; see compose.yaml.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
COPY . /src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM ${PYTHON_IMAGE}
COPY --from=build /wheel /wheel
COPY constraints.txt /wheel/
RUN python -m pip install --no-cache-dir --constraint /wheel/constraints.txt "$(ls /wheel/*.whl)[serve]" \
    && useradd --create-home --home-dir /app penstock
USER penstock
WORKDIR /app
CMD ["python"]
