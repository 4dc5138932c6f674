# SPDX-License-Identifier: Apache-2.0
"""spatial-pe doctor and inspect: what they print, how they fail. The demo has a file of its own."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest
import torch

import spatial_pe
from spatial_pe import backends, cli
from spatial_pe._utils import environment
from spatial_pe.backends import cpu
from spatial_pe.ops import composed

EXTRAS = ("transformers", "onnx", "onnxruntime", "skimage", "matplotlib")


@pytest.fixture
def run(capsys):
    """main(...) -> exit code, stdout, stderr."""

    def call(*argv: str) -> SimpleNamespace:
        code = cli.main(list(argv))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def missing(monkeypatch):
    """Make packages (or spatial_pe._C) impossible to find."""

    def hide(*names: str) -> None:
        found, number = importlib.util.find_spec, environment.version

        def version(package):
            if package in names:
                raise PackageNotFoundError(package)
            return number(package)

        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else found(name, *a))
        monkeypatch.setattr(environment, "version", version)

    return hide


# -------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_reports_this_machine(run):
    result = run("doctor")
    assert result.code == 0, result.err
    assert result.err == ""
    threads = f"torch uses {torch.get_num_threads()} threads"
    for text in (torch.__version__.split("+")[0], threads, environment.cpu_name()):
        assert text in result.out
    for name, why in backends():
        expected = f"missing: {why}" if why else "available, agrees with the reference"
        assert any(line.split()[:1] == [name] and expected in line for line in result.out.splitlines()), result.out


def test_doctor_without_the_extension_says_why_and_succeeds(run, missing, monkeypatch):
    missing("spatial_pe._C")
    monkeypatch.setattr(cpu, "EXTENSION", "there is no compiler here")
    result = run("doctor")
    assert result.code == 0
    assert "extension    not built" in result.out
    assert "missing: there is no compiler here" in result.out
    assert max(map(len, result.out.splitlines())) <= 100
    assert "auto       float32 on the CPU: composed\n" in result.out
    assert result.out.count("no compiler") == 1


def test_doctor_without_transformers_names_the_extra(run, missing):
    missing("transformers")
    result = run("doctor")
    assert result.code == 0
    assert "pip install spatial_pe[hf]" in result.out


def test_doctor_imports_no_extra():
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"  # None: an import of it raises
    code = f"{block}; from spatial_pe.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "composed" in done.stdout


def test_doctor_reports_an_extension_that_does_not_work(run, monkeypatch):
    broken = ModuleType("spatial_pe._C")
    broken.__spec__ = SimpleNamespace(name="spatial_pe._C")  # found, but without the functions it must have
    monkeypatch.setitem(sys.modules, "spatial_pe._C", broken)
    result = run("doctor")
    assert result.code == 1
    assert "the compiled extension does not work" in result.err
    assert "cpu_features" in result.err


@pytest.mark.parametrize(
    "wrong", [lambda call: torch.zeros_like(call.q), lambda call: torch.full_like(call.q, torch.nan)]
)
def test_doctor_finds_a_backend_that_computes_something_else(run, monkeypatch, wrong):
    monkeypatch.setattr(composed, "attention", wrong)
    result = run("doctor")
    assert result.code == 1
    assert 'BROKEN: backend "composed": error' in result.err
    assert "composed   available, BUT WRONG" in result.out


def test_doctor_goes_on_after_a_backend_that_raises(run, monkeypatch):
    def fails(call):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(composed, "attention", fails)
    result = run("doctor")
    assert result.code == 1
    assert "RuntimeError: no such instruction" in result.err
    assert "reference  available, agrees" in result.out


# ------------------------------------------------------------------------------------------------------------- inspect

TOWER = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A hub id fails at once, and in the same way, with and without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_inspect_needs_only_the_configuration(run, tmp_path, form):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit", **TOWER}))
    result = run("inspect", str(tmp_path if form == "folder" else tmp_path / "config.json"))
    assert result.code == 0, result.err
    assert "\nmodel (DINOv3ViTModel)\n" in result.out
    (row,) = [line.split("  ") for line in result.out.splitlines() if "DINOv3ViTAttention" in line]
    cells = [cell.strip() for cell in row if cell.strip()]
    assert cells[:2] == ["DINOv3ViTAttention", "3"]
    assert float(cells[4]) < 1e-5, "the proof ran, on lent weights"


def test_inspect_takes_a_model_type_and_little_memory(run, monkeypatch):
    """The default Qwen2.5-VL has 8 billion parameters, 32 GB: only one layer of its tower is really there."""
    from spatial_pe import towers

    models, original = [], towers.inspect
    monkeypatch.setattr(towers, "inspect", lambda model: models.append(model) or original(model))
    result = run("inspect", "qwen2_5_vl")
    assert result.code == 0, result.err
    assert "Qwen2_5_VLVisionAttention" in result.out
    parameters = list(models[0].parameters())
    assert sum(p.numel() for p in parameters) > 5e9
    assert 0 < sum(p.numel() for p in parameters if not p.is_meta) < 1e8


def test_inspect_reports_the_backend_of_this_machine(run):
    """On the meta device no fused kernel would serve."""
    if dict(backends())["cpu"] is not None:
        pytest.skip(f"the cpu backend is missing: {dict(backends())['cpu']}")
    result = run("inspect", "dinov2")
    assert "  cpu  " in result.out


def test_inspect_lists_what_it_found_where_nothing_can_be_patched(run):
    result = run("inspect", "bert")
    assert result.code == 2
    assert "nothing in this model can be patched" in result.err
    assert "BertEncoder" in result.err
    assert "not inside a vision tower" in result.out


def test_inspect_reports_a_failed_proof_as_such(run, monkeypatch):
    def fails(model):
        raise RuntimeError("layer 0 computes something else when patched")

    monkeypatch.setattr("spatial_pe.towers.inspect", fails)
    result = run("inspect", "dinov2")
    assert result.code == 1
    assert "layer 0 computes something else" in result.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dino", "model types like it: .*dinov2"),
        ("zzz", "no file or folder, no model type of transformers and no hub id"),
        ("a/b/c", "no file or folder"),
        ("owner/name", "no configuration of 'owner/name'"),
    ],
)
def test_inspect_of_an_unknown_name(run, name, message):
    result = run("inspect", name)
    assert result.code == 2
    assert result.out == ""
    assert re.search(message, result.err), result.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json (found: weights.bin)"),
        ("not json", "is not valid"),
        ('{"model_type": "no_such_type"}', "is not valid"),
        (json.dumps({"model_type": "dinov2", "hidden_size": -1}), "no model could be built from this 'dinov2'"),
    ],
)
def test_inspect_of_a_folder_without_a_usable_configuration(run, tmp_path, content, message):
    (tmp_path / "weights.bin").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    result = run("inspect", str(tmp_path))
    assert result.code == 2
    assert message in result.err


def test_inspect_without_transformers(run, missing):
    missing("transformers")
    result = run("inspect", "dinov2")
    assert result.code == 2
    assert "pip install 'spatial_pe[hf]'" in result.err


@pytest.mark.parametrize(("program", "code"), [("spatial-pe", 1), ("notebook", 1)])
def test_without_torch(program, code):
    """One line with the command, and no traceback where a command was called."""
    hide = "import sys; sys.argv = [sys.argv[1]]; sys.modules['torch'] = None; import spatial_pe"
    done = subprocess.run([sys.executable, "-c", hide, program], capture_output=True, text=True)
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-1]
    assert "spatial_pe needs torch, which is missing: pip install torch" in last
    assert ("Traceback" in done.stderr) == (program == "notebook")


# -------------------------------------------------------------------------------------------------------------- parser


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["inspect"], ["demo", "--batch", "two"]])
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert "usage: spatial-pe" in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "spatial_pe.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"spatial_pe {spatial_pe.__version__}\n"


# ---------------------------------------------------------------------------------------------------------------- tune


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests/backends/gpu tunes on it")
def test_tune_without_a_gpu_says_so(run, monkeypatch):
    from spatial_pe.backends.triton import backend as triton

    monkeypatch.setattr(triton, "INTERPRETED", False)
    done = run("tune", "--quick")
    assert done.code == 2 and done.err.startswith("spatial-pe tune: nothing to tune: ")
    assert done.err.count("no GPU that torch can use") == 1
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    done = run("tune", "--device", "cuda:0")
    assert done.code == 2 and done.err.startswith("spatial-pe tune: --device cuda:0: ")


def test_tune_needs_triton_or_the_cuda_kernels(run, monkeypatch):
    from spatial_pe.backends import cuda
    from spatial_pe.backends.triton import backend as triton

    monkeypatch.setattr(triton, "unavailable", lambda: "triton is not installed")
    monkeypatch.setattr(cuda, "unavailable", lambda: "the CUDA kernels are not built")
    done = run("tune")
    assert done.code == 2 and "the CUDA kernels are not built; triton is not installed" in done.err
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    done = run("tune", "--device", "cuda:99")
    assert done.code == 2 and done.err.startswith("spatial-pe tune: --device cuda:99: ")


@pytest.mark.parametrize("command", [["bench"], ["spatial", "run", "--study", "encodings", "--out", "x.json"]])
def test_a_device_that_fails_without_a_message(command, run, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "empty", fail)
    done = run(*command, "--device", "cuda:0")
    assert (done.code, done.err.splitlines()[-1].split(": ", 1)[1]) == (2, "--device cuda:0: AssertionError")


def test_tune_with_no_time(run):
    done = run("tune", "--seconds", "0")
    assert (done.code, done.err) == (2, "spatial-pe tune: --seconds must be positive, got 0\n")


def test_tune_saves_and_prints(run, monkeypatch, tmp_path):
    """The command around the measuring, which tests/backends/triton/test_tune.py tests."""
    from spatial_pe.backends.triton import backend as triton

    pytest.importorskip("triton")
    from spatial_pe import tuning
    from spatial_pe.backends.triton import tuning_store

    rows = {"bfloat16 D=64 N<=256": {"query": None}}
    asked = []
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(
        tuning, "tune", lambda problems, device, *rest, copy: asked.append((problems, *rest, copy)) or rows
    )
    monkeypatch.setattr(tuning_store, "path", lambda device: tmp_path / "kept.json")
    out = tmp_path / "deep" / "out.json"
    done = run("tune", "--quick", "--seconds", "60", "--device", "cuda:0", "--out", str(out))
    assert (done.code, done.err) == (0, "") and asked == [(tuning.QUICK, 60.0, out)]
    assert "NVIDIA H200" in done.out and "1 shapes measured" in done.out and "kept.json" in done.out


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"SPATIAL_PE_CACHE": "~/x"}, "home/x"),
        ({"SPATIAL_PE_CACHE": "", "XDG_CACHE_HOME": "~/y"}, "home/y/spatial_pe"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/spatial_pe"),
    ],
)
def test_weights_and_what_was_tuned_are_kept_in_one_folder(variables, folder, monkeypatch, tmp_path):
    from spatial_pe.backends.triton import tuning_store
    from spatial_pe.lab.checkpoints import assets

    for name, value in {"HOME": str(tmp_path / "home"), **variables}.items():
        monkeypatch.setenv(name, value)
    if "SPATIAL_PE_CACHE" not in variables:
        monkeypatch.delenv("SPATIAL_PE_CACHE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert tuning_store.path(torch.device("cuda", 0)).parent == assets.cache_folder() == tmp_path / folder
