"""What Dockerfile and compose file ask for, command by command, without a container: no builder is at hand in tests."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
import tiny
import yaml
from scripting import ROOT, free_port

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", "")
LINES = [line.partition(" ") for line in DOCKERFILE.splitlines() if line and line[0] not in "# "]


def arguments(name):
    """What stands behind each line of that name."""
    return [rest for first, _, rest in LINES if first == name]


def test_torch_is_installed_in_the_version_that_was_tested():
    asked = re.search(r"\$\((grep .+? constraints\.txt)\)", DOCKERFILE)[1]
    assert re.fullmatch(r"torch==[\d.]+\n", subprocess.check_output(asked, shell=True, text=True, cwd=ROOT))


def test_the_services_are_locked_in():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] == "10001:10001"
        assert all(volume.endswith(":ro") for volume in service["volumes"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert arguments("USER") == ["10001"]


@pytest.mark.slow
def test_the_endpoint_answers_from_what_is_copied_and_ends_when_told(tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    for line in arguments("COPY"):
        *sources, _ = line.split()
        for source in sources:
            shutil.copytree(ROOT / source, app / source) if (ROOT / source).is_dir() else shutil.copy(ROOT / source, app)
    tiny.llama(app / "models" / "smollm2-135m")
    port = str(free_port())
    asked = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["endpoint"]["command"]
    asked = [re.sub(r"\$\{(\w+):[-?](.*)\}", lambda one: "key" if one[1] == "API_KEY" else one[2], word) for word in asked]
    entry = [sys.executable if word == "python" else word for word in json.loads(arguments("ENTRYPOINT")[0])]
    entry[entry.index("7860")] = port
    own = dict(pair.split("=") for pair in arguments("ENV")[0].split())
    env = {"PATH": os.environ["PATH"]} | own | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    check = json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])
    check = [sys.executable, *(word.replace("7860", port) for word in check[1:])]
    with subprocess.Popen([*entry, *asked], cwd=app, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        try:
            until = time.monotonic() + 300
            while subprocess.run(check, capture_output=True, check=False).returncode:
                assert time.monotonic() < until and running.poll() is None, running.stdout.read()
                time.sleep(1)
            body = {"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "你好"}]}
            address, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Authorization": "Bearer key"}
            request = urllib.request.Request(address, json.dumps(body).encode(), headers | {"Content-Type": "application/json"})
            assert json.load(urllib.request.urlopen(request))["choices"][0]["message"]["role"] == "assistant"
        finally:
            running.terminate()
        running.communicate(timeout=120)
    assert running.returncode == 0
    copied = {name for line in arguments("COPY") for name in line.split()[:-1]}
    assert {file.name for file in app.iterdir()} == copied | {"models"}  # nothing was written beside /tmp
