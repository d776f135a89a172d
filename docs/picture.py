"""The README's picture: what the demo looks at, and what it learns from that.

    python pretrain.py --demo
    python -m docs.picture runs/demo docs/demo.png
"""
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from checkpoint import load_checkpoint
from dali_pipeline import Augmentation, Preprocessing, train_loader
from manifest import Manifest, read_manifest
from model import MEAN, STD

INK, FAINT, BLUE, RED = "#1f2933", "#8a94a0", "#1f6fb4", "#c0392b"


def examples(manifest: Manifest) -> np.ndarray:
    """One training image of each label: the first that has this label and no other, (L,)."""
    train = manifest.images("train")
    single = train[(manifest.labels[train] == 1).sum(1) == 1]
    return np.array([single[manifest.labels[single, i] == 1][0]
                     for i in range(len(manifest.label_names))])


def two_views(manifest: Manifest, images: np.ndarray, config: dict) -> list[Tensor]:
    """Two views of each image, drawn as the run of `config` draws them, (n, S, S) each, 0 to 1."""
    augmentation = Augmentation(**{name: config[name] for name in (
        "crop_area", "rotation", "blur", "flip", "brightness", "contrast")})
    preprocessing = Preprocessing(config["image_size"], config["normalize"], config["clahe"])
    loader = train_loader(manifest, images, len(images), range(1), 2, augmentation, preprocessing,
                          config["seed"], "cpu")
    *views, index = next(iter(loader))
    order = [index.tolist().index(i) for i in images]           # the loader has shuffled them
    return [(view[order, 0] * STD + MEAN).clamp(0, 1) for view in views]


def draw_image(axes: Axes, pixels: np.ndarray, title: str = "", side: str = "") -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_ylabel(side, fontsize=9, color=INK)


def draw_curve(axes: Axes, points: list[tuple[float, float]], color: str, title: str,
               reference: float, meaning: str) -> None:
    """A curve over epochs and the dashed line that it has to leave."""
    axes.plot(*zip(*points), color=color, lw=2, marker="o" if len(points) < 9 else "")
    axes.axhline(reference, color=FAINT, lw=1, ls="--")
    axes.annotate(meaning, (1, reference), xycoords=("axes fraction", "data"), fontsize=9,
                  xytext=(0, -4), textcoords="offset points", color=FAINT, ha="right", va="top")
    epoch, value = points[-1]
    axes.annotate(f"{value:.3f}" if value < 1 else f"{value:.2f}", (epoch, value), fontsize=10,
                  xytext=(0, 6), textcoords="offset points", color=color, ha="center",
                  va="bottom", weight="bold")
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.margins(y=0.2)


def main(run: str, file: str) -> None:
    config = load_checkpoint(Path(run) / "encoder.pt")["config"]
    manifest = read_manifest(config["data"])
    images = examples(manifest)
    view1, view2 = two_views(manifest, images, config)
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    loss = [(line["epoch"], line["loss"]) for line in lines if "loss" in line]
    chance = next(line["chance"] for line in lines if "chance" in line)
    auroc = [(line["epoch"], line["probe/auroc"]) for line in lines if "probe/auroc" in line]

    figure = Figure(figsize=(12, 4.6), dpi=100, layout="constrained", facecolor="white")
    left, right = figure.subfigures(            # pyright: ignore[reportGeneralTypeIssues]
        1, 2, width_ratios=(1.75, 1))
    # Left: a column for each label.
    grid = left.subplots(3, len(images))
    for column, i in enumerate(images):
        with Image.open(manifest.folder / manifest.paths[i]) as image:
            pixels = np.asarray(image) / 255
        name = manifest.label_names[column].replace("Enlarged ", "Enlarged\n")
        first = column == 0
        draw_image(grid[0, column], pixels, name, "radiograph" if first else "")
        draw_image(grid[1, column], view1[column].numpy(), side="view 1" if first else "")
        draw_image(grid[2, column], view2[column].numpy(), side="view 2" if first else "")
    # Right: what pre-training is asked, and what it is for.
    above, below = right.subplots(2, 1, sharex=True)
    draw_curve(above, auroc, BLUE, "Mean AUROC on val, by nearest neighbours",
               auroc[0][1], "untrained encoder")
    draw_curve(below, loss, RED, "SimCLR loss: which views belong together?",
               chance, "chance")
    below.set_xlabel("epoch of training without labels", fontsize=9, color=INK)
    figure.savefig(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
