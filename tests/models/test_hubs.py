"""Base models by name on ModelScope, and Ascend NPUs: what is decided here, with stand-ins for packages that are not."""

import sys
import types

import pytest
import tiny
import torch

from utils.console import UserError
from utils.models import hubs
from utils.models.placement import place
from utils.models.weights import base_folder


@pytest.fixture
def modelscope(monkeypatch, tmp_path):
    """The package as far as it is used: what is fetched, and the folder it comes to."""
    fetched, base = [], tiny.llama(tmp_path / "cache")

    def snapshot_download(name, local_files_only, ignore_file_pattern):
        fetched.append((name, local_files_only, ignore_file_pattern))
        if name != "owner/model":
            raise ConnectionError("no such model")
        return str(base)

    package, inner = types.ModuleType("modelscope"), types.ModuleType("modelscope.hub.snapshot_download")
    package.__spec__ = types.SimpleNamespace()
    inner.snapshot_download = snapshot_download
    modules = {"modelscope": package, "modelscope.hub": types.ModuleType("modelscope.hub"), inner.__name__: inner}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fetched


def test_a_name_on_modelscope_is_looked_up_there_when_asked_for_and_recorded_so(modelscope, tmp_path, monkeypatch, capsys):
    assert hubs.named_on("huggingface", "owner/model") == "owner/model" and not modelscope
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for folder in (str(tmp_path), "models/mine", "./a", "../a", "~/a", "a/b/c", "a"):
        assert hubs.named_on("modelscope", folder) == folder, "a folder is a folder"
    name = hubs.named_on("modelscope", "owner/model")
    assert name == "modelscope:owner/model" == hubs.named_on("modelscope", name) and not modelscope
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda offline=offline: offline)
        assert (base_folder(name) / "config.json").is_file()
    not_weights = ["*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*"]
    assert modelscope == [("owner/model", True, not_weights), ("owner/model", False, not_weights)]
    told = "owner/model: from ModelScope's cache"
    assert capsys.readouterr().out.splitlines() == [told, f"{told}, or fetched from ModelScope"]
    with pytest.raises(UserError, match="modelscope:owner/other: not available from ModelScope now"):
        base_folder("modelscope:owner/other")


def test_a_name_on_the_hugging_face_hub_is_fetched_without_weights_of_other_kinds(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **more: asked.append((*names, more)) or tmp_path)
    assert base_folder("owner/model") == tmp_path and base_folder("model") == tmp_path
    for path in ("no/such/folder", "./model", "/owner/model", "~/model", str(tmp_path / "a")):
        with pytest.raises(UserError, match=f"^{path}: no such folder; check the path of the model$"):
            base_folder(path)
    assert asked == [(name, {"ignore_patterns": hubs.NOT_WEIGHTS}) for name in ("owner/model", "model")]


def test_without_the_package_a_script_says_so_first(script, tmp_path):
    for name, out in (("finetune.py", "--data_path none.json --output_dir out"), ("merge_weights.py", "--output_dir out")):
        refused = script(name, "--base_model", "owner/model", "--hub", "modelscope", *out.split(), cwd=tmp_path)
        assert "the modelscope package is not installed; pip install modelscope" in refused.error
    assert "modelscope" in script("generate.py", "--base_model", "owner/model", "--hub", "modelscope", cwd=tmp_path).error


def test_an_ascend_npu_is_the_device_where_torch_npu_is_found(script, tmp_path, monkeypatch):
    """In a program of its own, since naming torch's extra device is forever."""
    (tmp_path / "torch_npu.py").write_text(
        "import torch, types\n"
        "torch.utils.rename_privateuse1_backend('npu')\n"
        "torch.npu = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, is_bf16_supported=lambda: True)\n"
    )
    (tmp_path / "ask.py").write_text(
        "from utils.models.placement import place\nfrom utils.console import UserError\n"
        "print(place(None, False))\n"
        "for options in ((True, False), (False, True), (None, False, 1)):\n"
        "    try: place(*options)\n"
        "    except UserError as error: print(error)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    if torch.cuda.is_available():
        pytest.skip("a CUDA card comes first")
    told = script(tmp_path / "ask.py").ok()
    assert "npu:0, bfloat16" in told and "not tested on this hardware" in told
    assert (
        "--load_8bit: has no kernels for an Ascend NPU" in told
        and "--load_4bit: has no" in told
        and "--gpu_id 1: this machine" in told
    )


def test_without_torch_npu_nothing_changes():
    assert place(False, False).device.type in ("cpu", "cuda", "mps")
