"""What tests of finished merges share: the merges by name, what a folder holds and reports."""

import json

import safetensors

from ot_merge_jax.reports import schema

CROSS = [
    "paper llama<-qwen2",
    "paper qwen2<-llama",
    "barycentric llama<-qwen2",
    "barycentric qwen2<-llama",
]
ALL = [*CROSS, "delta llama<-llama"]


def report_of(folder):
    """The report of a published folder."""
    return schema.read(folder / "ot_merge" / "report.json")


def assert_nothing_is_lost(folder):
    """Every key of a report, with its kind of number, is one of the schema."""
    text = (folder / "ot_merge" / "report.json").read_text(encoding="utf-8")
    again = report_of(folder)
    wanted = json.loads(text)
    assert wanted["version"] == schema.VERSION
    for value in (json.loads(again.to_json()), again.to_dict()):
        assert json.dumps(value) == json.dumps(wanted)  # 1 is not 1.0, and the order is the same
    assert again.to_json() == text


def of_a_later_version(folder):
    """Changes a published folder as if a later version had written its report."""
    path = folder / "ot_merge" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}), encoding="utf-8")


def tensors(folder):
    """All tensors of a folder, name -> (dtype, array); bfloat16 as its bits."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                array = file.get_tensor(name)
                found[name] = (str(array.dtype), array)
    return found


def moved(merge):
    """Names of the tensors that differ from the target's."""
    before, after = tensors(merge.target), tensors(merge.out)
    return {name for name in before if before[name][1].tobytes() != after[name][1].tobytes()}


#: What no two runs share.
OF_THE_PROCESS = ("wall_seconds", "peak_memory_bytes")


def files_of(folder):
    """Every file of a published folder, but for what belongs to the process alone."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = json.loads(files["ot_merge/provenance.json"])
    files["ot_merge/provenance.json"] = {
        key: value for key, value in record.items() if key not in OF_THE_PROCESS
    }
    lines = files["ot_merge/report.html"].splitlines()
    files["ot_merge/report.html"] = [line for line in lines if b'class="process"' not in line]
    return files
