"""Run by test_tensorflow.py in its own environment: prints how far Transformers 4 is from the outputs in FOLDERS.

Of a file of the official scripts, the number of tensors.
"""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tensorflow as tf
import torch
import transformers
from safetensors.numpy import load_file


def largest_differences(ours, outputs):
    """By our name of each output that the class has."""
    theirs = {"logits": "logits", "features": "last_hidden_state", "pooled": "pooler_output"}
    return {
        name: float(abs(outputs[theirs[name]].numpy() - value).max())
        for name, value in ours.items()
        if name in theirs and theirs[name] in outputs
    }


def differences(folder):
    """By the class of Transformers."""
    ours = load_file(f"{folder}/ours.safetensors")
    name = "ConvNextV2" + ("ForImageClassification" if "logits" in ours else "Model")
    of_tensorflow = getattr(transformers, f"TF{name}").from_pretrained(folder)
    of_torch = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        found = of_torch(torch.from_numpy(ours["imgs"]))
    return {
        f"TF{name}": largest_differences(ours, of_tensorflow(tf.constant(ours["imgs"]), training=False)),
        name: largest_differences(ours, found),
    }


def tensors(file):
    return len(torch.load(file, weights_only=True)["model"])


print(json.dumps([tensors(path) if path.endswith(".pth") else differences(path) for path in sys.argv[1:]]))
