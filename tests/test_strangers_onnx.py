"""ONNX files that somebody else made: SECURITY.md, held to its word."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from divqat import cli
from divqat._util.files import file_fingerprint
from divqat.victim import Victim, onnx_file

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, FLOAT, INT64 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
IMAGES = torch.zeros(2, 1, 2, 2)


def write_onnx(path, nodes, weights=(), batch="batch", functions=()):
    """A model of images [batch, 1, 2, 2]; ``nodes`` make ``logits`` of ``image``."""
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("image", FLOAT, [batch, 1, 2, 2])],
        [helper.make_tensor_value_info("logits", FLOAT, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("theirs", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def elsewhere(location):
    """A weight [4, 4] that lies in another file."""
    tensor = onnx.TensorProto(name="weight", data_type=FLOAT, dims=[4, 4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    return tensor


FLAT = helper.make_node("Flatten", ["image"], ["flat"])
PRODUCT = helper.make_node("MatMul", ["flat", "weight"], ["logits"])


def in_the_graph(tensor):
    return {"nodes": [FLAT, PRODUCT], "weights": [tensor]}


def in_a_node(tensor):
    return {"nodes": [helper.make_node("Constant", [], ["weight"], value=tensor), FLAT, PRODUCT]}


def in_a_branch(tensor):
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])], "inner", [],
        [helper.make_tensor_value_info("out", FLOAT, [4, 4])], [tensor],
    )  # fmt: skip
    inner.initializer[0].name = "inner"
    yes = helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True])
    branch = helper.make_node("If", ["yes"], ["weight"], then_branch=inner, else_branch=inner)
    return {"nodes": [FLAT, branch, PRODUCT], "weights": [yes]}


def in_a_function(tensor):
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    opset = [helper.make_opsetid("", 17)]
    function = helper.make_function("theirs", "f", [], ["w"], [constant], opset)
    return {
        "nodes": [FLAT, helper.make_node("f", [], ["weight"], domain="theirs"), PRODUCT],
        "functions": [function],
    }


@pytest.mark.parametrize("place", [in_the_graph, in_a_node, in_a_branch, in_a_function])
@pytest.mark.parametrize("kind", ["above", "absolute", "link", "device"])
def test_weights_lie_in_the_folder_of_the_file(tmp_path, place, kind):
    outside = tmp_path / "outside.bin"
    outside.write_bytes(np.eye(4, dtype=np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(outside)
    location = {"above": "../outside.bin", "absolute": str(outside), "link": "link.bin",
                "device": "/dev/zero"}[kind]  # fmt: skip
    file = write_onnx(folder / "model.onnx", **place(elsewhere(location)))
    with pytest.raises(ValueError, match=rf"{file} refers to weights outside its folder, in /"):
        Victim(file)


def test_weights_beside_the_file_are_read(tmp_path):
    (tmp_path / "model.onnx.data").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    file = write_onnx(tmp_path / "model.onnx", **in_the_graph(elsewhere("model.onnx.data")))
    images = torch.arange(4.0).view(1, 1, 2, 2)
    assert torch.equal(Victim(file)(images), images.flatten(1).softmax(1))
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx\.data"):
        Victim(file)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "model.onnx.data")
        with pytest.raises(ValueError, match=r"onnx\.data: wanted a file, got a pipe"):
            Victim(file)


@pytest.mark.parametrize("content", [b"", b"no ONNX \x1b[2J", b"\x08\xff\xff\xff\xff"])
def test_what_is_no_onnx_file(tmp_path, capsys, content):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}"):
        Victim(file)
    command = f"evaluate --victim {file} --dataset digits --query-set noise --out {tmp_path}/out"
    assert cli.main([*command.split(), "--query-limit", "10"]) == 1
    error = capsys.readouterr().err
    assert str(file) in error and "\x1b" not in error and error.count("\n") == 1


def test_files_that_are_larger(tmp_path):
    with open(tmp_path / "model.onnx", "wb") as file:
        file.truncate(2**40)  # it takes no room on the disk
    for read in (Victim, file_fingerprint):
        with pytest.raises(ValueError, match=rf"model\.onnx: wanted at most {2**31} bytes, got"):
            read(tmp_path / "model.onnx")


def test_operators_that_nobody_knows(tmp_path, capfd):
    file = write_onnx(
        tmp_path / "model.onnx",
        [helper.make_node("Evil", ["image"], ["logits"], domain="theirs", name="\x1b[2J")],
    )
    with pytest.raises(ValueError, match=rf"ONNX Runtime cannot open {file}: .*theirs:Evil"):
        Victim(file)
    assert capfd.readouterr().err == ""  # the runtime's own log would show its names


def huge(path, gigabytes):
    shape = onnx.numpy_helper.from_array(np.array([gigabytes << 28], dtype=np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=1),
        FLAT,
        helper.make_node("Add", ["flat", "sum"], ["logits"]),
    ]
    return write_onnx(path, nodes, [shape])


BOUNDED = """
import resource, sys, torch
from divqat.victim import Victim
from divqat.victim import onnx_file
onnx_file.free_memory = lambda device: 2**29
limits = resource.getrlimit(resource.RLIMIT_AS)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    try:
        Victim(file)(torch.zeros(2, 1, 2, 2))
    except Exception as error:
        print(error)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="free memory is known on Linux")
def test_a_small_file_takes_no_gigabytes(tmp_path):
    """ONNX Runtime 1.23 computes both sums when it opens the file, 1.32 that of four gigabytes when
    it runs it. In a process of its own: the bound is for all files of a process."""
    files = [str(huge(tmp_path / f"{size}.onnx", size)) for size in (1, 4)]
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *files], capture_output=True, text=True, check=True
    )
    assert len(re.findall("Available memory|bad_alloc", done.stdout)) == 2 and done.stderr == ""


def test_a_fixed_batch_takes_no_gigabytes(tmp_path):
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    file = write_onnx(tmp_path / "model.onnx", [FLAT, PRODUCT], [weight], batch=2**27)
    with pytest.raises(ValueError, match=r"'image' wants 134217728 images at a time"):
        Victim(file)(IMAGES)


def test_the_memory_is_bounded_once():
    assert onnx_file._bound_memory() is onnx_file._bound_memory()
