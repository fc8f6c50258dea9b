"""Classify a picture with an exported model, by what the file declares of its input.

    python examples/onnxruntime_classify.py runs/divqat/model.onnx picture.png

It needs numpy, onnxruntime and Pillow, and not divqat.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def main(model, picture):
    session = onnxruntime.InferenceSession(model)
    given = json.loads(session.get_modelmeta().custom_metadata_map["divqat.input"])
    (_, channels, height, width) = session.get_inputs()[0].shape
    image = Image.open(picture).convert("L" if channels == 1 else "RGB").resize((width, height))
    pixels = np.asarray(image).reshape(1, height, width, channels)
    if given["dtype"] == "float32":  # else the model normalizes
        black, white = given["range"]
        scaled = pixels * (white - black) / 255 + black
        pixels = ((scaled - given["mean"]) / given["std"]).astype(np.float32)
    images = pixels.transpose(0, 3, 1, 2)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    best = int(logits[0].argmax())
    return given["classes"][best] if given["classes"] else str(best)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
