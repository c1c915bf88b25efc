"""What tests of finished merges share: the merges by name, and the tensors that a folder holds."""

import safetensors

CROSS = [
    "paper llama<-qwen2",
    "paper qwen2<-llama",
    "barycentric llama<-qwen2",
    "barycentric qwen2<-llama",
]
ALL = [*CROSS, "delta llama<-llama"]


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
