"""Use a classifier of finetune.py: probabilities of new radiographs, and where they come from.

    python predict.py runs/finetune/classifier.pt data/new
    python predict.py runs/finetune/classifier.pt data/new --explain 8      and eight overlays

DIR is a data folder made by prepare.py, any folder with images or DICOM files in it, at any
depth, or one such file. Files are found, read and made smaller by the functions of prepare.py,
written as the JPEGs that it would write, and only then given to the network, by the loader that
stages 1 and 2 use: the network sees of a new image what it saw of those it learned from. The
JPEGs need room in the output folder until the end. The images of a data folder are there
already. Where that was made with other flags than --size (--stretch, --quality), make a data
folder of the new images in the same way, and give that.

The output folder (--out) gets predictions.csv, a row for each image and a column for each label;
rejected.csv, a row for each file that could not be read, and the reason (its rows are in no other
file, and the exit code is 1); and explained/, Grad-CAM overlays of the first images, each for the
label that lies most above its threshold. Every DIR has an output folder of its own beside the
classifier, so that the predictions of one do not replace those of another. Files that are no
images are passed over and counted.
"""
import contextlib
import csv
import functools
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import run  # first: it answers Ctrl-C while PyTorch loads
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from archive import Archive, Member
from checkpoint import (
    MALFORMED, PREPROCESSING, CheckpointError, load_checkpoint, settings_of)
from common import DataError, whole_file, write_text
from dali_pipeline import Loader, Preprocessing, eval_loader
from dicom import is_dicom, read_radiograph
from labels import to_probabilities
from manifest import Manifest, read_manifest
from model import MEAN, STD, Classifier, build_encoder, extract_features
from prepare import Conversion, convert, count_notes, write_csv
from radiograph import (
    EXTENSIONS, FORMATS, MIN_SIDE, ImageSettings, Reading, find_files, in_parallel, read_image,
    reason)
from run import Compute, flag, positional
from sources import Item

# What a classifier.pt holds.
CLASSIFIER = {"arch", "encoder", "config", "classifier", "labels", "kind", "thresholds"}
RESULTS = ("predictions.csv", "rejected.csv", "explained/*.png")


@dataclass
class Config:
    """Which classifier looks at what, and where its answers go."""
    classifier: str = positional("made by finetune.py", "CLASSIFIER.pt")
    data: str = positional("a data folder, any folder of images or DICOM files, or one such file",
                           "DIR")
    explain: int = flag(0, "overlay the first N images with their Grad-CAM", 0, metavar="N",
                        may_differ=True)
    out: str = flag("", "output folder (default: predictions/ and the name of DIR, beside the "
                    "classifier)", may_differ=True)
    overwrite: bool = flag(False, "replace the predictions of another classifier or folder",
                           may_differ=True)

    size: int | None = flag(None, "shorter side in pixels to which images are made smaller, as "
                            "prepare.py --size (default: 256, or the classifier's image size "
                            "where that is more)", MIN_SIDE, 9999, section="how files are read")
    modality: tuple[str, ...] = flag(("CR", "DX"), "of the DICOM files to take; none: files "
                                     "without one")

    batch_size: int = flag(64, "images", 1, 2**16, section="how it computes", may_differ=True)
    precision: str = flag(**run.PRECISION)
    threads: int | None = flag(**run.THREADS)

    def __post_init__(self):
        if not self.out:
            name = Path(self.data).resolve().name
            self.out = str(Path(self.classifier).parent / "predictions" / name)


# --------------------------------------------------------------------------------------------------
# The classifier.

def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """The network of a classifier.pt, in evaluation mode, and the checkpoint.

    CheckpointError where the file is no classifier.pt."""
    state = load_checkpoint(path)
    if not (CLASSIFIER <= state.keys() and PREPROCESSING <= state["config"].keys()):
        raise CheckpointError(f"{path} is not a classifier.pt of finetune.py")
    labels, thresholds = state["labels"], state["thresholds"]
    if not (isinstance(labels, list) and isinstance(thresholds, list)
            and len(labels) == len(thresholds) > 0
            and all(isinstance(name, str) for name in labels)
            and all(isinstance(value, int | float) for value in thresholds)):
        raise CheckpointError(f"{path} has no threshold for each of its labels")
    if not PREPROCESSING <= settings_of(state).keys():
        raise CheckpointError(f"{path} says of no image size, normalize and clahe that can be")
    try:
        encoder = build_encoder(state["arch"], str(path))
        outputs = len(labels) * {"binary": 1, "three-way": 3, "exclusive": 1}[state["kind"]]
        net = Classifier(encoder, outputs)
        net.head.load_state_dict(state["classifier"])
    except MALFORMED as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} holds a head that does not fit: {reason}") from None
    return net.eval(), state


# --------------------------------------------------------------------------------------------------
# From files to the images that prepare.py would have made of them.

class Inputs(NamedTuple):
    """The files that are to be looked at."""
    folder: Path
    paths: list[str]                    # relative to the folder
    passed_over: list[str]              # the folder's other files
    listed: bool                        # by the manifest of a data folder
    archive: Archive | None = None      # where that has an images.tar


def find_inputs(data: Path) -> Inputs:
    """The images of a data folder, those of another folder, or the one file; DataError if none."""
    if (data / "manifest.csv").exists():
        manifest = read_manifest(data)
        return Inputs(data, manifest.paths, [], True, manifest.archive)
    if data.is_file():
        return Inputs(data.parent, [data.name], [], listed=False)
    if not data.is_dir():
        raise DataError(f"{data} is not a folder or a file")
    found = find_files(data)
    paths = [path for path in found.files if is_input(data / path)]
    if not paths:
        raise DataError(f"{data} has no manifest.csv and no image ({', '.join(EXTENSIONS)}) or "
                        "DICOM file")
    passed_over = sorted({*found.files, *found.special} - {*paths})
    return Inputs(data, paths, passed_over, listed=False)


def is_input(file: Path) -> bool:
    """Whether a file of a folder claims to be an image. A DICOMDIR lists others."""
    return file.suffix.lower() in EXTENSIONS or file.name != "DICOMDIR" and is_dicom(file)


def read_any(file: Path, settings: ImageSettings, modalities: Sequence[str]) -> Reading:
    """A file by prepare.py's reader for its kind."""
    if is_dicom(file):
        return read_radiograph(file, settings, modalities)
    return read_image(file, settings)


def make_ready(path: str, conversion: Conversion, listed: bool) -> str:
    """Write the JPEG of an input, named by jpeg_name; "" or the reason why there is none."""
    file, name = conversion.src / path, jpeg_name(path)
    try:
        if is_made_already(file, conversion.settings, listed):
            (conversion.out / name).symlink_to(file.resolve())
            return ""
    except Exception as error:          # a decoder may raise anything on a broken file
        return reason(error)
    return convert(Item(path, name, "", "", ()), conversion)


def unpack(member: Member, target: Path) -> str:
    """The same for an image of an images.tar."""
    file = target / jpeg_name(member.path)
    try:
        content = member.read_bytes()
    except DataError as error:
        return str(error)
    file.write_bytes(content)           # OSError of a full disk ends the run
    try:
        is_made_already(file, ImageSettings(), listed=True)
    except Exception as error:          # a decoder may raise anything on a broken file
        return reason(error)
    return ""


def jpeg_name(path: str) -> str:
    """A name of its own for each path, whatever the path's length and letters."""
    return f"{blake2b(os.fsencode(path), digest_size=16).hexdigest()}.jpg"


def is_made_already(file: Path, settings: ImageSettings, listed: bool) -> bool:
    """Whether an image is one of a data folder (`listed`), or just as prepare.py would write it:
    written again it would differ in the last bit.

    It is decoded, so that the loader meets no broken one. DataError, or whatever a decoder raises,
    where that is impossible."""
    if not listed and (file.suffix.lower() not in (".jpg", ".jpeg") or not file.is_file()):
        return False
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        return False                    # convert will say what it is
    with image:
        if not listed:
            as_written = (
                image.format == "JPEG" and image.mode == "L" and not image.getexif()
                and MIN_SIDE <= min(image.size) <= settings.size
                and quantization(image) == tables_of(settings.quality))
            if not as_written:
                return False
        if image.mode.startswith(("I", "F")):
            raise DataError("more than 8 bits a pixel, in a data folder: `prepare.py folder` "
                            "brings such images to 8")
        image.load()
        return True


def quantization(image: Any) -> dict[int, list[int]]:
    """The tables of a JPEG, from which its quality is known."""
    return image.quantization


@functools.cache
def tables_of(quality: int) -> dict[int, list[int]]:
    """The tables of a gray JPEG of this quality."""
    jpeg = io.BytesIO()
    Image.new("L", (8, 8)).save(jpeg, "JPEG", quality=quality)
    return quantization(Image.open(jpeg))


def make_images(inputs: Inputs, config: Config, image_size: int, workers: int,
                target: Path) -> dict[str, str]:
    """Write the JPEGs of all inputs into the folder `target`; {path: reason} of those that fail."""
    settings = ImageSettings(config.size or max(ImageSettings.size, image_size))
    read = functools.partial(read_any, modalities=config.modality)
    conversion = Conversion(read, inputs.folder, target, settings)
    make = functools.partial(make_ready, conversion=conversion, listed=inputs.listed)
    items: list = inputs.paths
    if inputs.archive:
        make = functools.partial(unpack, target=target)
        items = [inputs.archive.member(i) for i in range(len(inputs.paths))]
    reasons = in_parallel(make, items, workers, "images")
    return {path: why for path, why in zip(inputs.paths, reasons) if why}


def images_folder(out: Path, resources: contextlib.ExitStack) -> Path:
    """An empty folder in `out`, which goes when the run ends, or at latest when the next begins."""
    folder = out / ".images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    resources.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def suffix_counts(paths: list[str]) -> str:
    """`3 files (2 .txt, 1 without a suffix)`."""
    suffixes = [Path(path).suffix.lower() or "without a suffix" for path in paths]
    counts = Counter(suffix.encode("ascii", "backslashreplace").decode() for suffix in suffixes)
    return f"{len(paths):,} files ({', '.join(f'{n:,} {name}' for name, n in counts.items())})"


# --------------------------------------------------------------------------------------------------
# Results.

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
    """Where in the images x (B, 1, S, S) the outputs (B,) of a network
    come from (Selvaraju et al. 2017).

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


def explain(net: Classifier, state: dict[str, Any], paths: list[str], probabilities: np.ndarray,
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
        stem, probability = Path(paths[i]).stem, probabilities[i, label]
        name = f"{stem}_{state['labels'][label]}_{probability:.2f}"
        name = re.sub(r"[^\w.-]+", "-", name)
        name = name.encode()[-200:].decode(errors="ignore")     # file systems take 255 bytes
        with whole_file(folder / f"{i:06d}_{name}.png", sync=False) as file:
            picture.save(file, "PNG")


# --------------------------------------------------------------------------------------------------
# The script.

def predict(config: Config, compute: Compute, resources: contextlib.ExitStack) -> None:
    """Probabilities of every image of a folder. One process does it.

    DataError at the end where files could not be read; the others have their predictions."""
    if compute.rank > 0:
        return
    compute = compute.without_others()

    # The classifier and the files: whatever is wrong with all is found before anything is written.
    net, state = load_classifier(config.classifier)
    preprocessing = Preprocessing(**{name: state["config"][name] for name in PREPROCESSING})
    data, out, labels = Path(config.data), Path(config.out), state["labels"]
    inputs = find_inputs(data)
    if not inputs.listed and data.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"--out {out} must not lie inside {data}: its overlays would be taken for "
                        "radiographs the next time")

    # The output folder remembers whose predictions it holds, and refuses those of others.
    run.open_run(config, "predict", RESULTS, resources,
                 classifier=str(Path(config.classifier).resolve()),
                 data=str(data.resolve()))

    # The images as prepare.py makes them.
    target = images_folder(out, resources)
    rejected = make_images(inputs, config, preprocessing.image_size, compute.threads, target)
    write_csv(out / "rejected.csv", [("file", "reason"), *rejected.items()])
    paths = [path for path in inputs.paths if path not in rejected]
    if inputs.passed_over:
        compute.say(f"passed over, as no images: {suffix_counts(inputs.passed_over)}")
    if not paths:
        raise DataError(f"no image of {data} can be read: {first_of(rejected)}")
    for sentence in count_notes([target / jpeg_name(path) for path in paths], compute.threads):
        compute.say(sentence)

    # Predict, and write the table once all of it is there.
    net = compute.place(net)
    nothing, images = np.empty(0), np.arange(len(paths))
    manifest = Manifest(target, [jpeg_name(path) for path in paths], nothing, nothing, nothing, [],
                        listed=False)
    loader = eval_loader(manifest, images, config.batch_size, preprocessing,
                         **compute.loader_arguments())
    logits = extract_features(net, net.head.out_features, loader, compute.dtype)
    probabilities = to_probabilities(logits, state["kind"])                 # (N, L)
    write_text(out / "predictions.csv", predictions_table(paths, labels, probabilities))
    compute.say(f"{out / 'predictions.csv'}: {len(paths)} images, {', '.join(labels)}")

    # Explain the first images, one by one.
    if config.explain:
        loader = eval_loader(manifest, images[:config.explain], 1, preprocessing,
                             **compute.loader_arguments())
        explain(net, state, paths, probabilities, loader, out / "explained")
    if rejected:
        raise DataError(f"{len(rejected)} of {len(inputs.paths)} images cannot be read and have no "
                        f"row in {out / 'predictions.csv'}: {first_of(rejected)}")


def first_of(rejected: dict[str, str]) -> str:
    """The first file that was rejected and why, and where the others are."""
    path, why = next(iter(rejected.items()))
    return f"{path}: {why}" + (" (all in rejected.csv)" if len(rejected) > 1 else "")


def main(argv: list[str] | None = None) -> None:
    run.main(predict, Config, argv)


if __name__ == "__main__":
    main()
