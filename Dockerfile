# Written, but not built or run yet.
# The server with the models under /models:
#   docker build -t entrollm . && docker run --rm -p 8000:8000 -v /srv/models:/models:ro entrollm /models/OUT
FROM python:3.13-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --wheel-dir /wheels '/source[serve]'

FROM python:3.13-slim
RUN --mount=from=build,source=/wheels,target=/wheels pip install --no-cache-dir --no-index --find-links /wheels 'entrollm[serve]' \
    && useradd --system --no-create-home entrollm
USER entrollm
EXPOSE 8000
# All addresses: it is the container that decides who can reach the port. Add --api-key-file where others can.
ENTRYPOINT ["entrollm", "serve", "--host", "0.0.0.0"]
