# The application with every engine, in two stages: the first builds the environment by the same script as `make install`,
# the second carries only the result and runs as an ordinary user. Nothing is compiled, so no compiler is needed.
#
#   docker build -t marketsync .
#   docker run --rm -v "$PWD/market:/market" marketsync sync -c upstream.yml

FROM python:3.11-slim AS build
WORKDIR /app
COPY requirements requirements
COPY scripts scripts
# the lock by itself: this layer stays until a pin changes
RUN python scripts/environment.py --no-project all
COPY pyproject.toml prefect.yaml LICENSE ./
COPY marketsync marketsync
COPY providers providers
COPY storage storage
COPY tasks tasks
COPY flows flows
COPY cli cli
RUN python scripts/environment.py all

FROM python:3.11-slim
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    GX_ANALYTICS_ENABLED=false
COPY --from=build /app /app
COPY scripts/container_user.sh /app/scripts/
RUN sh /app/scripts/container_user.sh
USER marketsync
WORKDIR /market
VOLUME /market
ENTRYPOINT ["marketsync"]
CMD ["--help"]
