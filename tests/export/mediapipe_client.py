"""Classifies images with MediaPipe Tasks; run by `test_metadata.py` in MediaPipe's environment.

    python mediapipe_client.py MODEL.tflite IMAGES.npy MAX_RESULTS

Prints a JSON list: of every image its `[index, score, name]`, best first.
"""

import json
import sys

import mediapipe
import numpy as np
from mediapipe.tasks.python import BaseOptions, vision

model, images, max_results = sys.argv[1:]
options = vision.ImageClassifierOptions(
    base_options=BaseOptions(model_asset_path=model), max_results=int(max_results)
)
found = []
with vision.ImageClassifier.create_from_options(options) as classifier:
    for image in np.load(images):
        frame = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image)
        [scores] = classifier.classify(frame).classifications
        found.append([(each.index, each.score, each.category_name) for each in scores.categories])
print(json.dumps(found))
