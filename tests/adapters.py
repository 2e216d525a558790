"""What is in the folder of an exported LoRA adapter."""

import json

from safetensors.torch import load_file


def config_of(out):
    return json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))


def tensors_of(out):
    return load_file(out / "adapter_model.safetensors")
