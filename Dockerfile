# docker build -t twofile .
# docker run --rm -p 127.0.0.1:8080:8080 -v twofile-models:/app/models -e ALLOWED_HOSTS=localhost \
#     twofile
#
# What stands behind the name are the server's flags: docker run ... twofile --model models/x.gguf

# For an NVIDIA GPU both are CUDA images: one has the compiler, the other the libraries. They bring
# no Python, hence PYTHON_PACKAGES. docker-compose.yml has the values, in its service `gpu`.
ARG BUILD_IMAGE=python:3.12-slim
ARG RUN_IMAGE=python:3.12-slim

# ---- compile: the compiler stays behind in this stage ----
FROM ${BUILD_IMAGE} AS builder
ARG PYTHON_PACKAGES=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ${PYTHON_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*

# By default llama.cpp is compiled for the very processor that builds: fastest there, and an illegal
# instruction on an older one. For an image that travels: --build-arg CMAKE_ARGS=-DGGML_NATIVE=OFF
ARG CMAKE_ARGS=""
WORKDIR /build
COPY requirements.txt ./
COPY features/requirements.txt ./features/
# No cache mount: pip finds a wheel in its cache by its version alone, and would take one that was
# compiled with other CMAKE_ARGS.
RUN python3 -m venv /venv && /venv/bin/pip install -r requirements.txt \
    -r features/requirements.txt

# ---- run ----
FROM ${RUN_IMAGE}
ARG PYTHON_PACKAGES=""
# libgomp1 is the one library that llama.cpp needs and the image lacks.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 ${PYTHON_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*

# The number is fixed, so that files given from outside can be made readable for it. All that this
# user may write is the folder for models: the default one is fetched into it at the first start.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin twofile \
    && install -d -o twofile -g twofile /app/models

COPY --from=builder /venv /venv
WORKDIR /app
COPY server.py engine.py config.yaml requirements.txt ./
COPY features ./features/

# These win over config.yaml: inside the container the server must listen where Docker forwards to
# and the health check asks. Choose the address and port outside when publishing: -p 9000:8080.
# pip, which fetches the default model, has no home to keep a cache in.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HOST=0.0.0.0 \
    PORT=8080

USER 10001:10001
EXPOSE 8080
VOLUME /app/models

# 503 while the model is fetched and loads: the start period leaves time for both. /health needs no
# key. A proxy in the environment, meant for fetching, must not be asked for 127.0.0.1.
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as web; \
        web.build_opener(web.ProxyHandler({})).open( \
        'http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=4)"]

# No shell in between: SIGTERM must reach Python, for running requests to finish. That may take
# drain_seconds (30), while Docker kills after 10: docker stop -t 40, or docker-compose.yml.
ENTRYPOINT ["python", "server.py"]
