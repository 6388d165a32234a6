"""Run by test_tensorflow.py in its own environment: prints how far Transformers 4 is from the outputs in FOLDER."""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import transformers
from safetensors.numpy import load_file

folder = sys.argv[1]
ours = load_file(f"{folder}/ours.safetensors")
kind = "ForImageClassification" if "logits" in ours else "Model"


def largest_differences(outputs):
    """By our name of each output that the class has."""
    theirs = {"logits": "logits", "features": "last_hidden_state", "pooled": "pooler_output"}
    return {
        name: float(abs(outputs[theirs[name]].numpy() - value).max())
        for name, value in ours.items()
        if name in theirs and theirs[name] in outputs
    }


def tensorflow_outputs():
    import tensorflow as tf

    model = getattr(transformers, f"TFConvNextV2{kind}").from_pretrained(folder)
    return model(tf.constant(ours["imgs"]), training=False)


def torch_outputs():
    import torch

    model = getattr(transformers, f"ConvNextV2{kind}").from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ours["imgs"]))


result = {
    f"TFConvNextV2{kind}": largest_differences(tensorflow_outputs()),
    f"ConvNextV2{kind}": largest_differences(torch_outputs()),
}
print(json.dumps(result))
