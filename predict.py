"""Use a classifier of finetune.py: probabilities of new radiographs, and where they come from.

    python predict.py runs/finetune/classifier.pt data/new
    python predict.py runs/finetune/classifier.pt data/new --explain 8      and eight overlays
    python predict.py runs/finetune/classifier.pt may/ june/ one.dcm        several at once

DIR is a data folder made by prepare.py, any folder with images or DICOM files in it, at any
depth, or one such file. The functions of prepare.py find the files, read them, make them smaller
and write them as JPEGs; then the loader of stages 1 and 2 feeds these to the network. So new
images are treated like those that the network learned from. How those were made (--size,
--stretch and --quality of prepare.py) is in classifier.pt, if their data folder recorded it. The
JPEGs need room in the output folder until the end. The images of a data folder are JPEGs already,
and are taken as they are.

The output folder (--out) gets predictions.csv, a row for each image and a column for each label;
rejected.csv, a row with the reason for each file that could not be read (these have no row in
predictions.csv, and the exit code is 1); and explained/, Grad-CAM overlays of the first images,
each for the label that lies most above its threshold. Every DIR has an output folder of its own,
by default beside the classifier, so that predictions do not replace each other. Files that are
not images are skipped and counted.
"""
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import launch  # first: it answers Ctrl-C while PyTorch loads
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

import run_folder
from archive import Archive, Member
from checkpoint import (
    MALFORMED, PREPROCESSING, CheckpointError, last_line, load_checkpoint, settings_of)
from classifier import Classifier, image_flags, rebuild_projector
from common import DataError, plain_name, restart_in_utf8, whole_file, write_csv
from dali_pipeline import Loader, Preprocessing, eval_loader
from dicom import is_dicom, read_radiograph
from flags import PRECISION, THREADS, differing_flags, flag, positional
from labels import to_probabilities
from manifest import Manifest, read_manifest
from model import MEAN, STD, build_encoder, num_features
from probe import extract_features
from prepare import Conversion, convert, count_notes, look_back_at
from radiograph import (
    EXTENSIONS, FORMATS, MIN_SIDE, ImageSettings, Reading, blank_reason, find_files, in_parallel,
    read_image, reason, refuse_mask, unread_suffix, what_it_is)
from run import Compute
from sources import Item

# What every classifier.pt holds.
CLASSIFIER = {"arch", "encoder", "config", "classifier", "labels", "kind", "thresholds"}
RESULTS = ("predictions.csv", "rejected.csv", "explained/*.png")


@dataclass
class Config:
    """Which classifier predicts which images, and where the results go."""

    classifier: str = positional("made by finetune.py", "CLASSIFIER.pt")
    data: tuple[str, ...] = positional(
        "a data folder, any folder of images or DICOM files, or one such file", "DIR")
    explain: int = flag(0, "overlay the first N images with their Grad-CAM", 0, metavar="N",
                        may_differ=True)
    out: str = flag("", "output folder, of several DIR with a folder for each of them (default: "
                    "predictions/ and the name of DIR, beside the classifier)", may_differ=True)
    overwrite: bool = flag(False, "replace the predictions of another classifier or folder",
                           may_differ=True)

    size: int | None = flag(None, "shorter side in pixels to which images are made smaller, as "
                            "prepare.py --size (default: as the classifier's own were; if it "
                            "does not know, 256, or its image size where that is more)",
                            MIN_SIDE, 9999, section="how files are read")
    stretch: tuple[float, ...] = flag(
        (), "percentiles that become black and white, as prepare.py --stretch (default: as the "
        "classifier's own)", 0, 100, metavar=("LOW", "HIGH"))
    modality: tuple[str, ...] = flag(("CR", "DX"), "of the DICOM files to take; none: files "
                                     "without one")

    batch_size: int = flag(64, "images", 1, 2**16, section="how it computes", may_differ=True)
    precision: str = flag(**PRECISION)
    threads: int | None = flag(**THREADS)

    def __post_init__(self):
        # A DIR that is given twice counts once. Output folders have the names of their DIRs.
        self.data = tuple(dict.fromkeys(self.data))
        names = [Path(data).resolve().name for data in self.data]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two of DIR are called {twice.pop()}, as their output folders would "
                             "be: give one at a time, with an --out of its own")
        if self.stretch and not is_stretch(self.stretch):
            raise ValueError("--stretch takes two percentiles, 0 <= LOW < HIGH <= 100")
        if not self.out:
            folder = Path(self.classifier).parent / "predictions"
            self.out = str(folder / names[0] if len(names) == 1 else folder)

    def for_each(self) -> list["Config"]:
        """A Config for each DIR alone."""
        if len(self.data) == 1:
            return [self]
        return [dataclasses.replace(self, data=(data,),
                                    out=str(Path(self.out) / Path(data).resolve().name))
                for data in self.data]


# --------------------------------------------------------------------------------------------------
# The classifier.

def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """The network of a classifier.pt, in evaluation mode, and the checkpoint.

    CheckpointError if the file is not a classifier.pt."""
    # The file may come from anybody: check that every entry is there and makes sense.
    state = load_checkpoint(path)
    if not (CLASSIFIER <= state.keys() and PREPROCESSING <= state["config"].keys()):
        raise CheckpointError(f"{path} is not a classifier.pt of finetune.py")
    labels, thresholds = state["labels"], state["thresholds"]
    if not (isinstance(labels, list) and isinstance(thresholds, list)
            and len(labels) == len(thresholds) > 0
            and all(isinstance(name, str) for name in labels)
            and all(isinstance(value, int | float) and 0 <= value <= 1 for value in thresholds)):
        raise CheckpointError(f"{path} has no threshold for each of its labels")
    if not PREPROCESSING <= settings_of(state).keys():
        raise CheckpointError(f"{path} says of no image size, normalize and clahe that can be")
    if not are_image_flags(state["config"].get("images", {})):
        raise CheckpointError(f"{path} says of no --size, --quality and --stretch that can be")

    # The network itself. A three-way label has three outputs: absent, present and uncertain.
    try:
        encoder = build_encoder(state["arch"], str(path))
        outputs = len(labels) * {"binary": 1, "three-way": 3, "exclusive": 1}[state["kind"]]
        projector = rebuild_projector(state.get("projector", {}), num_features(encoder))
        net = Classifier(encoder, outputs, projector)
        net.head.load_state_dict(state["classifier"])
    except MALFORMED as error:
        raise CheckpointError(
            f"{path} holds a head that does not fit: {last_line(error)}") from None
    return net.eval(), state


def are_image_flags(flags: Any) -> bool:
    """Whether these can come from `image_flags`, {} included, which means unknown."""
    if flags == {}:
        return True
    return (isinstance(flags, dict) and flags.keys() == {"size", "quality", "stretch"}
            and type(flags["size"]) is int and MIN_SIDE <= flags["size"] <= 9999
            and type(flags["quality"]) is int and 1 <= flags["quality"] <= 100
            and (flags["stretch"] is None or is_stretch(flags["stretch"])))


def is_stretch(percentiles: Any) -> bool:
    """Whether these are two percentiles, the lower one first."""
    return (isinstance(percentiles, list | tuple) and len(percentiles) == 2
            and all(isinstance(value, int | float) for value in percentiles)
            and 0 <= percentiles[0] < percentiles[1] <= 100)


# --------------------------------------------------------------------------------------------------
# From files to the images that prepare.py would have made from them.

class Inputs(NamedTuple):
    """The files of one DIR."""
    folder: Path
    paths: list[str]                    # the images, relative to the folder
    passed_over: list[str]              # the folder's other files
    listed: bool                        # by the manifest of a data folder
    archive: Archive | None = None      # the data folder's images.tar, if any
    hidden: int = 0                     # hidden files and folders, which are passed over too


def find_inputs(data: Path) -> Inputs:
    """The images of a data folder or another folder, or the one file; DataError if none."""
    # If an image is missing that the manifest lists, only its row is lost, as for a broken image.
    if (data / "manifest.csv").exists():
        manifest = read_manifest(data, check_files=False)
        return Inputs(data, manifest.paths, [], True, manifest.archive)
    if data.is_file():
        return Inputs(data.parent, [data.name], [], listed=False)
    if not data.is_dir():
        raise DataError(f"{data} is not a folder or a file")
    # Take every file that claims to be an image, and pass over the rest.
    found = find_files(data)
    paths = [path for path in found.files if is_input(data / path)]
    if not paths:
        raise DataError(f"{data} has no manifest.csv and no image ({', '.join(EXTENSIONS)}) or "
                        "DICOM file")
    passed_over = sorted({*found.files, *found.special} - {*paths})
    return Inputs(data, paths, passed_over, listed=False, hidden=len(found.hidden))


def is_input(file: Path) -> bool:
    """Whether a file claims to be an image, if only one that cannot be read. A DICOMDIR is DICOM,
    but only lists other files."""
    if file.suffix.lower() in EXTENSIONS or unread_suffix(file.name):
        return True
    return file.name != "DICOMDIR" and is_dicom(file)


def image_settings(config: Config, state: dict[str, Any]) -> ImageSettings:
    """How files are read: by the flags, else like the images that the classifier learned from."""
    flags = state["config"].get("images", {})
    size = config.size or flags.get("size")
    stretch = config.stretch or flags.get("stretch")
    return ImageSettings(
        # If nothing is known, no smaller than the network's input.
        size=size or max(ImageSettings.size, state["config"]["image_size"]),
        quality=flags.get("quality", ImageSettings.quality),
        stretch=(stretch[0], stretch[1]) if stretch else None)


def say_how_read(config: Config, inputs: Inputs, settings: ImageSettings, state: dict[str, Any],
                 say: Callable) -> None:
    """Say whether images are read like those that the classifier learned from, how they differ, or
    that the classifier does not tell."""
    own, made = state["config"].get("images", {}), image_flags(inputs.folder)
    # A data folder's images are JPEGs that prepare.py has already made.
    if inputs.listed:
        if config.size or config.stretch or config.modality != Config.modality:
            say(f"the images of {inputs.folder}, a data folder, are taken as they are: --size, "
                "--stretch and --modality change nothing")
        if own and made and (difference := differing_flags(own, made)):
            say("warning: the classifier's own images were made with other flags than those of "
                f"{inputs.folder}, here: {difference}")
        return
    # Other files will be made into such JPEGs.
    as_own = image_settings(dataclasses.replace(config, size=None, stretch=()), state)
    how = f"--size {settings.size}, --quality {settings.quality}"
    if settings.stretch:
        how += ", --stretch {:g} {:g}".format(*settings.stretch)
    if not own:
        say(f"images are read with {how}: how the classifier's own were made is not known")
    elif settings == as_own:
        say(f"images are read as the classifier's own: {how}")
    else:
        difference = differing_flags(dataclasses.asdict(as_own), dataclasses.asdict(settings))
        say(f"warning: images are read by other flags than the classifier's own: {difference}")


def read_any(file: Path, settings: ImageSettings, modalities: Sequence[str]) -> Reading:
    """Read a file by prepare.py's reader for its kind."""
    if is_dicom(file):
        return read_radiograph(file, settings, modalities)
    return read_image(file, settings)


def make_ready(path: str, conversion: Conversion, listed: bool) -> str:
    """Put the JPEG of an input, named by jpeg_name, into the conversion's folder: a link if the
    input can be taken as it is, else a new file. Returns "", or the reason why this failed."""
    file, name = conversion.src / path, jpeg_name(path)
    try:
        ready = decodes(file) if listed else is_as_written(file, conversion.settings)
        if ready:
            (conversion.out / name).symlink_to(file.resolve())
            return ""
    except Exception as error:          # a decoder may raise anything on a broken file
        return reason(error, file)
    return convert(Item(path, name, "", "", ()), conversion)


def unpack(member: Member, target: Path) -> str:
    """Write an image of an images.tar as a file, named by jpeg_name. Returns "", or the reason why
    this failed."""
    file = target / jpeg_name(member.path)
    try:
        content = member.read_bytes()
    except DataError as error:
        return str(error)
    file.write_bytes(content)           # if the disk is full, OSError ends the run
    try:
        return "" if decodes(file) else f"cannot identify the image: {what_it_is(file)}"
    except Exception as error:          # a decoder may raise anything on a broken file
        return reason(error)


def jpeg_name(path: str) -> str:
    """A different file name for each path, whatever its length and letters. It ends like the path,
    for messages about the file."""
    digest = blake2b(os.fsencode(path), digest_size=16).hexdigest()
    return f"{digest}-{plain_name(path, 100)}.jpg"


def open_if_image(file: Path) -> Image.Image | None:
    """The opened image, or None if the first bytes are not an image's."""
    with contextlib.suppress(Image.UnidentifiedImageError):
        return Image.open(file, formats=FORMATS)


def decodes(file: Path) -> bool:
    """Whether a file that a data folder lists can be decoded, and so be taken as it is. False if
    its first bytes are not an image's. DataError, or whatever a decoder raises, if it is missing,
    broken, or has more than 8 bits a pixel: the loader could not read it."""
    if not file.is_file():
        raise DataError("no file, but a folder, a named pipe, a socket or a device"
                        if file.exists() else "missing on disk")
    if not (image := open_if_image(file)):
        return False
    with image:
        if image.mode.startswith(("I", "F")):
            raise DataError("more than 8 bits a pixel, in a data folder: `prepare.py folder` "
                            "brings such images to 8")
        image.load()
    return True


def is_as_written(file: Path, settings: ImageSettings) -> bool:
    """Whether a file is a JPEG as prepare.py would write it. It is then taken as it is, because
    writing it again would change its pixels a little. Other files need prepare.py's readers.
    DataError, or whatever a decoder raises, if it is such a JPEG but broken, a mask or blank."""
    # With --stretch there is no such file: a JPEG does not tell whether it was stretched.
    is_jpeg = file.suffix.lower() in (".jpg", ".jpeg") and file.is_file()
    if settings.stretch or not is_jpeg or not (image := open_if_image(file)):
        return False
    with image:
        # A JPEG does not record its quality, but its tables follow from it.
        as_written = (
            image.format == "JPEG" and image.mode == "L" and not image.getexif()
            and MIN_SIDE <= min(image.size) <= settings.size
            and quantization(image) == tables_of(settings.quality))
        if as_written:
            image.load()
            refuse_mask(image)
            # A blank image is not a radiograph, whatever its format.
            if why := blank_reason(image):
                raise DataError(why)
    return as_written


def quantization(image: Any) -> dict[int, list[int]]:
    """The quantization tables of a JPEG."""
    return image.quantization


@functools.cache
def tables_of(quality: int) -> dict[int, list[int]]:
    """The quantization tables of a gray JPEG of this quality."""
    jpeg = io.BytesIO()
    Image.new("L", (8, 8)).save(jpeg, "JPEG", quality=quality)
    return quantization(Image.open(jpeg))


def make_images(inputs: Inputs, config: Config, settings: ImageSettings, workers: int,
                target: Path) -> dict[str, str]:
    """Write the JPEGs of all inputs to the folder `target`; returns {path: reason} of failures."""
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
    """An empty folder in `out`. It is deleted when the run ends, or else when the next begins."""
    folder = out / ".images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    resources.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def suffix_counts(paths: list[str]) -> str:
    """`3 files (2 .txt, 1 without a suffix)`."""
    # A suffix may have any letters, and some terminals print only ASCII.
    suffixes = [Path(path).suffix.lower() or "without a suffix" for path in paths]
    counts = Counter(suffix.encode("ascii", "backslashreplace").decode() for suffix in suffixes)
    return f"{len(paths):,} files ({', '.join(f'{n:,} {name}' for name, n in counts.items())})"


# --------------------------------------------------------------------------------------------------
# Explanation of a prediction.

def grad_cam(net: Classifier, x: Tensor, outputs: Tensor) -> Tensor:
    """How much the regions of each image x (B, 1, S, S) contribute to one of the network's outputs
    (Selvaraju et al. 2017). outputs (B,): the number of that output for each image.

    Returns maps (B, S, S), 0 to 1. Their cells are 32 x 32 pixels, so a map is coarse below 224
    pixels. It is 0 everywhere if no cell speaks for the output."""
    # The map is a sum of the last feature maps, weighted by the output's mean gradient for each.
    maps = []
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
    """A network's input x (1, S, S) in gray, overlaid with heat (S, S), 0 to 1, in colour."""
    gray = (x[0] * STD + MEAN).clamp(0, 1).cpu().numpy()[..., None]         # (S, S, 1)
    opacity = 0.5 * heat.cpu().numpy()[..., None]                           # (S, S, 1)
    colour = colormaps["jet"](heat.cpu().numpy())[..., :3]                  # (S, S, 3)
    pixels = gray * (1 - opacity) + colour * opacity
    return Image.fromarray((255 * pixels).astype(np.uint8))


def explain(net: Classifier, state: dict[str, Any], paths: list[str], probabilities: np.ndarray,
            loader: Loader, folder: Path) -> None:
    """Write an overlay to `folder` for each image of the loader, whose batches have one image.

    The file's name has the label that is explained, and its probability."""
    folder.mkdir(exist_ok=True)
    # A three-way label has outputs for absent, present and uncertain: explain the second one.
    width, present = (3, 1) if state["kind"] == "three-way" else (1, 0)
    for x, index in loader:
        # The label that lies most above its threshold, or least below it.
        i, x = int(index), x.float()                                        # (1, 1, S, S)
        label = int((probabilities[i] - state["thresholds"]).argmax())
        output = torch.tensor([label * width + present], device=x.device)
        picture = overlay(x[0], grad_cam(net, x, output)[0])
        # A label may have letters that a file's name must not have.
        stem, probability = Path(paths[i]).stem, probabilities[i, label]
        name = plain_name(f"{stem}_{state['labels'][label]}_{probability:.2f}")
        with whole_file(folder / f"{i:06d}_{name}.png", sync=False) as file:
            picture.save(file, "PNG")


# --------------------------------------------------------------------------------------------------
# The script.

def predict(config: Config, compute: Compute, resources: contextlib.ExitStack) -> None:
    """Predict every image of each DIR, in one process.

    DataError at the end if files could not be read; the others have their predictions."""
    if compute.rank > 0:
        return
    compute = compute.without_others()

    # Read the classifier and find the files before anything is written.
    net, state = load_classifier(config.classifier)
    configs = config.for_each()
    inputs = [find_inputs(Path(data)) for data in config.data]
    check_outs(configs, inputs)

    # One DIR after the other. An error in one does not stop the others.
    net, problems = compute.prepare(net), []
    for config_of_one, inputs_of_one in zip(configs, inputs):
        try:
            with contextlib.ExitStack() as until_next:
                predict_one(config_of_one, inputs_of_one, net, state, compute, until_next)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))


def check_outs(configs: list[Config], inputs: list[Inputs]) -> None:
    """DataError if an output folder lies in a folder that is searched for images."""
    # Each output folder against each DIR. Data folders are not searched: they have a manifest.
    for config, (folder_config, searched) in itertools.product(configs, zip(configs, inputs)):
        out, data = Path(config.out), Path(folder_config.data[0])
        if not searched.listed and data.resolve() in (out.resolve(), *out.resolve().parents):
            raise DataError(f"--out {out} must not lie inside {data}: its overlays would be taken "
                            "for radiographs the next time")


def predict_one(config: Config, inputs: Inputs, net: Classifier, state: dict[str, Any],
                compute: Compute, resources: contextlib.ExitStack) -> None:
    """Write predictions and overlays of one DIR to its output folder; DataError as in `predict`."""
    data, out, labels = Path(config.data[0]), Path(config.out), state["labels"]
    settings = image_settings(config, state)
    preprocessing = Preprocessing(**{name: state["config"][name] for name in PREPROCESSING})

    # An output folder refuses predictions of another classifier or DIR. An inherited --stretch is
    # not compared, because it comes with the classifier.
    run_folder.open_run(
        config, "predict", RESULTS, resources, classifier=str(Path(config.classifier).resolve()),
        data=str(data.resolve()), stretch=list(config.stretch) or None)

    # Make the images as prepare.py does.
    say_how_read(config, inputs, settings, state, compute.say)
    target = images_folder(out, resources)
    rejected = make_images(inputs, config, settings, compute.threads, target)
    # Delete earlier predictions first: they do not match the new list of rejected files, and may
    # come from another training of the classifier.
    for old in (*out.glob("predictions.csv"), *out.glob("explained/*.png")):
        old.unlink()
    write_csv(out / "rejected.csv", [("file", "reason"), *rejected.items()])
    paths = [path for path in inputs.paths if path not in rejected]
    if inputs.passed_over:
        compute.say(f"passed over, as no images: {suffix_counts(inputs.passed_over)}")
    if inputs.hidden:
        compute.say(f"passed over, as hidden files or folders: {inputs.hidden:,}")

    if not paths:
        raise DataError(f"no image of {data} can be read: {first_of(rejected)}")
    written = look_back_at([target / jpeg_name(path) for path in paths], compute.threads)
    for sentence in count_notes(written):
        compute.say(sentence)

    # Predict all images, then write the table.
    nothing, images = np.empty(0), np.arange(len(paths))
    manifest = Manifest(target, [jpeg_name(path) for path in paths], nothing, nothing, nothing, [],
                        listed=False)
    loader = eval_loader(manifest, images, config.batch_size, preprocessing,
                         **compute.loader_arguments())
    logits = extract_features(net, net.head.out_features, loader, compute.dtype)
    bad = np.flatnonzero(~logits.isfinite().all(1).cpu().numpy())
    if len(bad):
        raise DataError(f"the predictions of {len(bad)} images are not finite, of "
                        f"{paths[bad[0]]} first; --precision fp32 may help")
    probabilities = to_probabilities(logits, state["kind"])                 # (N, L)
    write_csv(out / "predictions.csv", [
        ("path", *labels),
        *((path, *(f"{p:.6f}" for p in row)) for path, row in zip(paths, probabilities))])
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
    """The first rejected file and the reason, and where the others are listed."""
    path, why = next(iter(rejected.items()))
    return f"{path}: {why}" + (" (all in rejected.csv)" if len(rejected) > 1 else "")


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        restart_in_utf8()
    launch.main(predict, Config, argv, afterwards="begins anew")


if __name__ == "__main__":
    main()
