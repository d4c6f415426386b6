# Page and endpoint, on a CPU by default: docker build -t dreamergpt . ; see docker-compose.yml
# For NVIDIA cards: docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t dreamergpt .
FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY generate.py ./
COPY utils utils
COPY templates templates
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dreamer && python -m compileall -q utils
USER 10001
# All that is written goes to /tmp, which the compose file makes a file system in memory.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 GRADIO_TEMP_DIR=/tmp/gradio PYTHONDONTWRITEBYTECODE=1
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
ENTRYPOINT ["python", "generate.py", "--server_name", "0.0.0.0", "--server_port", "7860"]
CMD ["--help"]
