"""Training steps of networks of torchvision and ultralytics as these define them, where they are installed: as in bench_training.py."""

from functools import partial
from importlib.util import find_spec

from bench_training import NETWORKS, QUICK_SHAPE, case
from harness import arguments, run

# isort: split
from models.catalogue import torchvision, ultralytics

SHAPE = (8, 3, 128, 128)
NAMES = {torchvision: ("resnet50", "regnet_y_1_6gf", "densenet121", "mobilenet_v3_large", "efficientnet_b0"), ultralytics: ("yolov8n",)}

if __name__ == "__main__":
    options = arguments(__doc__)
    libraries = [library for library in NAMES if find_spec(library.__name__)]
    found = {f"{library.__name__} {name}": partial(library, name) for library in libraries for name in NAMES[library]}
    NETWORKS.update(found)
    cases = [partial(case, name, SHAPE) for name in found]
    if options.quick:
        cases = [partial(case, name, QUICK_SHAPE, profiled_steps=1) for name in [*found][:1]]
    if cases:
        run("training steps of networks of torchvision and ultralytics", cases, options)
    else:
        print("bench_networks: neither torchvision nor ultralytics is installed here, so that nothing is measured")
