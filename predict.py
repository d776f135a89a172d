"""Use a classifier of finetune.py: probabilities of new radiographs, and where they come from.

    python predict.py runs/finetune/classifier.pt data/new
    python predict.py runs/finetune/classifier.pt data/new --explain 8      and eight overlays

DIR is a data folder made by prepare.py, or any folder with JPEG and PNG images in it.
Images are prepared as the classifier's training images were, by what the classifier
says of them.

The output folder (--out) gets predictions.csv, a row for each image and a column for
each label; and explained/, Grad-CAM overlays of the first images, each for the label
that lies most above its threshold. Every DIR has an output folder of its own beside
the classifier, so that the predictions of one do not replace those of another.
"""
import contextlib
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run                              # first: from here on Ctrl-C is one sentence
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from dali_pipeline import Loader, Preprocessing, eval_loader
from labels import to_probabilities
from manifest import DataError, Manifest, read_manifest, whole_file, write_text
from model import MEAN, PREPROCESSING, STD, Classifier, extract_features, load_classifier
from run import Compute, flag, positional

IMAGES = (".jpg", ".jpeg", ".png")
RESULTS = ("predictions.csv", "explained/*.png")


@dataclass
class Config:
    """Which classifier looks at what, and where its answers go."""
    classifier: str = positional("made by finetune.py", "CLASSIFIER.pt")
    data: str = positional("a data folder, or any folder of images", "DIR")
    explain: int = flag(0, "overlay the first N images with their Grad-CAM", 0, metavar="N",
                        may_differ=True)
    out: str = flag("", "output folder (default: predictions/ and the name of DIR, beside the "
                    "classifier)", may_differ=True)
    overwrite: bool = flag(False, "replace the predictions of another classifier or folder",
                           may_differ=True)

    batch_size: int = flag(64, "images", 1, 2**16, section="how it computes", may_differ=True)
    precision: str = flag(**run.PRECISION)
    threads: int | None = flag(**run.THREADS)

    def __post_init__(self):
        if not self.out:
            name = Path(self.data).resolve().name
            self.out = str(Path(self.classifier).parent / "predictions" / name)


def list_images(folder: Path) -> Manifest:
    """The images of a data folder, or all that lie in another folder; DataError if none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    if (folder / "manifest.csv").exists():
        return read_manifest(folder)
    files = [file for file in folder.rglob("*") if file.suffix.lower() in IMAGES]
    paths = sorted(str(file.relative_to(folder)) for file in files if file.is_file())
    if not paths:
        raise DataError(f"{folder} has no manifest.csv and no image ({', '.join(IMAGES)})")
    for path in paths:
        # A file that is no image is passed over here: the loader will name it.
        with contextlib.suppress(OSError), Image.open(folder / path) as image:
            if image.mode.startswith("I"):
                raise DataError(f"{folder / path} has 16 bits a pixel: `prepare.py folder` brings "
                                "such images to 8")
    nothing = np.empty(0)
    return Manifest(folder, paths, nothing, nothing, nothing, [], listed=False)


def predictions_table(paths: list[str], labels: list[str], probabilities: np.ndarray) -> str:
    """The text of predictions.csv: a row for each image, a column for each label."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["path", *labels])
    for path, row in zip(paths, probabilities):
        table.writerow([path, *(f"{p:.6f}" for p in row)])
    return text.getvalue()


# --------------------------------------------------------------------------------------------------
# Explanation of a prediction.

def grad_cam(net: Classifier, x: Tensor, outputs: Tensor) -> Tensor:
    """Where in the images x (B, 1, S, S) the outputs (B,) of a network come from
    (Selvaraju et al. 2017).

    Returns (B, S, S), 0 to 1. The map is made of cells of 32 x 32 pixels, so that it
    is coarse below 224 pixels, and it is 0 where no cell speaks for the output."""
    maps = []                           # the last feature maps, of which the map is a mean
    hook = net.encoder.layer4.register_forward_hook(
        lambda module, inputs, output: maps.append(output))
    logits = net(x)                                                         # (B, G * K)
    hook.remove()
    features = maps[0]                                                      # (B, C, h, w)
    gradient, = torch.autograd.grad(logits.gather(1, outputs[:, None]).sum(), features)
    weights = gradient.mean((2, 3), keepdim=True)                           # (B, C, 1, 1)
    cam = F.relu((weights * features).sum(1, keepdim=True))                 # (B, 1, h, w)
    cam = F.interpolate(cam, x.shape[2:], mode="bilinear")[:, 0]            # (B, S, S)
    return (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)).detach()


def overlay(x: Tensor, heat: Tensor) -> Image.Image:
    """A network's input x (1, S, S) in gray, and over it heat (S, S), 0 to 1, in colour."""
    gray = (x[0] * STD + MEAN).clamp(0, 1).cpu().numpy()[..., None]         # (S, S, 1)
    opacity = 0.5 * heat.cpu().numpy()[..., None]                           # (S, S, 1)
    colour = colormaps["jet"](heat.cpu().numpy())[..., :3]                  # (S, S, 3)
    pixels = gray * (1 - opacity) + colour * opacity
    return Image.fromarray((255 * pixels).astype(np.uint8))


def explain(net: Classifier, state: dict[str, Any], manifest: Manifest, probabilities: np.ndarray,
            loader: Loader, folder: Path) -> None:
    """Write an overlay of each image of a loader of single images into `folder`.

    Its file's name says for which label it is, and that label's probability."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):    # of another classifier, perhaps
        old.unlink()
    # Of a three-way label's outputs absent, present and uncertain, the second one is explained.
    width, present = (3, 1) if state["kind"] == "three-way" else (1, 0)
    for x, index in loader:
        i, x = int(index), x.float()                                        # (1, 1, S, S)
        label = int((probabilities[i] - state["thresholds"]).argmax())
        output = torch.tensor([label * width + present], device=x.device)
        picture = overlay(x[0], grad_cam(net, x, output)[0])
        stem, probability = Path(manifest.paths[i]).stem, probabilities[i, label]
        name = f"{stem}_{state['labels'][label]}_{probability:.2f}"
        name = re.sub(r"[^\w.-]+", "-", name)
        with whole_file(folder / f"{i:06d}_{name}.png", sync=False) as file:
            picture.save(file, "PNG")


# --------------------------------------------------------------------------------------------------
# The script.

def predict(config: Config, compute: Compute, resources: contextlib.ExitStack) -> None:
    """Probabilities of every image of a folder. One process does it."""
    if compute.rank > 0:
        return
    compute = compute.without_others()

    # The classifier and the images: whatever is wrong is found before anything is written.
    net, state = load_classifier(config.classifier)
    net = compute.place(net)
    preprocessing = Preprocessing(**{name: state["config"][name] for name in PREPROCESSING})
    manifest = list_images(Path(config.data))
    images, labels = np.arange(len(manifest.paths)), state["labels"]

    # The output folder remembers whose predictions it holds, and refuses those of others.
    out = Path(config.out)
    run.open_run(config, "predict", RESULTS, resources,
                 classifier=str(Path(config.classifier).resolve()),
                 data=str(Path(config.data).resolve()))

    # Predict, and write the table once all of it is there.
    loader = eval_loader(manifest, images, config.batch_size, preprocessing,
                         **compute.loader_arguments())
    logits = extract_features(net, net.head.out_features, loader, compute.dtype)
    probabilities = to_probabilities(logits, state["kind"])                 # (N, L)
    write_text(out / "predictions.csv", predictions_table(manifest.paths, labels, probabilities))
    compute.say(f"{out / 'predictions.csv'}: {len(images)} images, {', '.join(labels)}")

    # Explain the first images, one by one.
    if config.explain:
        loader = eval_loader(manifest, images[:config.explain], 1, preprocessing,
                             **compute.loader_arguments())
        explain(net, state, manifest, probabilities, loader, out / "explained")


def main(argv: list[str] | None = None) -> None:
    run.main(predict, Config, argv)


if __name__ == "__main__":
    main()
