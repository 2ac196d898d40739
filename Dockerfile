# docker build --build-arg PIP_EXTRA_INDEX_URL=ADDRESS -t meristem .
# ADDRESS is where the CPU build of torch is, as pytorch.org shows it; docs/deployment.md says how to run the image.
# For NVIDIA GPUs: docker build --build-arg LOCK=requirements-cuda.txt -t meristem:cuda .
FROM python:3.11-slim AS build
WORKDIR /src
# Compiles the native core; the image itself is without it.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends g++
RUN python -m venv /opt/meristem
ARG LOCK=requirements.txt
COPY docker docker
# pip reads it from the environment.
ARG PIP_EXTRA_INDEX_URL
RUN /opt/meristem/bin/python -m pip install --no-cache-dir --require-hashes -r docker/$LOCK
COPY pyproject.toml setup.py README.md LICENSE ./
COPY native native
COPY src src
# With the locked setuptools, so that nothing without a hash is fetched.
RUN /opt/meristem/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /data meristem
COPY --from=build /opt/meristem /opt/meristem
ENV PATH=/opt/meristem/bin:$PATH XDG_DATA_HOME=/data PYTHONDONTWRITEBYTECODE=1
USER 10001
VOLUME /data
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=9)"]
ENTRYPOINT ["meristem"]
CMD ["serve", "--host", "0.0.0.0"]
