"""Reading, checking and changing checkpoint folders with the safetensors library alone, for the
tests of io.
"""

import hashlib
import json
import os

import ml_dtypes
import numpy as np
import safetensors.numpy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def tensors(folder):
    """``{name: (dtype, shape, bytes)}`` of all files, by the library alone."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            found[name] = (array.dtype.name, array.shape, array.tobytes())
    return found


def header(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def recast(folder, choose):
    """Rewrites every file of a folder with the dtype that ``choose(name)`` says."""
    for file in folder.glob("*.safetensors"):
        values = safetensors.numpy.load_file(file)
        cast = {name: array.astype(NUMPY[choose(name)]) for name, array in values.items()}
        safetensors.numpy.save_file(cast, file, metadata={"format": "pt"})
    return folder


def mixed(name):
    """Dtypes that differ inside one stack, between leaves, and where neither holds the other (F16,
    BF16).
    """
    if "norm" in name:
        return "F32"
    if "up_proj" in name:
        return "BF16" if ".0." in name else "F32"
    if "q_proj" in name:
        return "F16" if ".1." in name else "BF16"
    return "BF16"


DTYPES = {
    "F32": lambda name: "F32",
    "F16": lambda name: "F16",
    "BF16": lambda name: "BF16",
    "mixed": mixed,
}


def snapshot(folder):
    """Everything in a folder: names, kinds and contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = path.stat().st_mode
    return found


def body(folder):
    return dict(safetensors.numpy.load_file(folder / SINGLE))


def store(folder, tensors, name=SINGLE):
    safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_tensors(folder, change):
    tensors = body(folder)
    change(tensors)
    store(folder, tensors)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def split_header(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def join_header(path, text, data):
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(folder, change):
    text, data = split_header(folder / SINGLE)
    header = json.loads(text)
    change(header)
    join_header(folder / SINGLE, json.dumps(header).encode(), data)


def shard(folder, parts):
    """Replaces the single file by shards ``{file: [tensor names]}`` and an honest index."""
    tensors = body(folder)
    (folder / SINGLE).unlink()
    for name, chosen in parts.items():
        store(folder, {key: tensors[key] for key in chosen}, name)
    write_index(folder, {key: name for name, chosen in parts.items() for key in chosen})


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_only(folder):
    """One shard of another name, so that the index decides."""
    shard(folder, {"weights.safetensors": sorted(body(folder))})


def halves(folder):
    names = sorted(body(folder))
    first, second = names[::2], names[1::2]
    return {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
