"""Data folder -> tensors on the device: manifest, sampling, views, and the DALI graphs that make them.

A view is a function, not a stream. Which images form batch `step`, and every augmentation parameter of every image in
it, follow from (seed, epoch, image index, view) alone, by counter-based random numbers. DALI is handed those numbers
and does what is heavy: it reads the file, decodes it once, and resizes, rotates, blurs and normalises each view. No
random operator runs inside DALI, so a run can be resumed at any step, or spread over any number of processes, and sees
the very same views.

    manifest = read_manifest("data/demo")
    loader = train_loader(manifest, manifest.images("train"), batch_size=64, steps=range(100), views=2,
                          augmentation=Augmentation(), preprocessing=Preprocessing(224), seed=0, device="cpu")
    for view1, view2, index in loader:        # (64, 1, 224, 224) twice, and (64,) rows of the manifest
        ...
"""
import csv
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from model import MEAN, STD

SPLITS = ("train", "val", "test")
LABEL_VALUES = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0, "": np.nan}


class DataError(Exception):
    """Bad input, told in one sentence that names the file, row or flag."""


class ImageError(DataError):
    """An image that the manifest lists and nobody can read: found by one process, on its way."""


# ----------------------------------------------------------------------------------------------------------------------
# The manifest: path, patient, split, then one column a label (1 present, 0 absent, -1 uncertain, empty not mentioned).

@dataclass(frozen=True)
class Manifest:
    """The rows of a data folder's manifest.csv; row i is image index i everywhere in the project."""
    folder: Path
    paths: list[str]                # relative to the folder
    patients: np.ndarray            # (N,) str
    splits: np.ndarray              # (N,) str: train, val or test
    labels: np.ndarray              # (N, L) float32: 1, 0, -1 or NaN for an empty cell
    label_names: list[str]          # L of them, none for an unlabelled folder

    def images(self, split: str) -> np.ndarray:
        """Image indices of a split, (n,) int64, in manifest order; DataError where there is none."""
        index = np.flatnonzero(self.splits == split)
        if not len(index):
            raise DataError(f"{self.folder / 'manifest.csv'} has no image in the {split} split")
        return index


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder`/manifest.csv; DataError names the file, the row (the header is row 1) and the column."""
    file = Path(folder) / "manifest.csv"
    if not file.is_file():
        raise DataError(f"{folder} is not a data folder: {file} is missing (python prepare.py --help makes one)")
    with open(file, newline="", encoding="utf-8-sig") as f:
        try:
            header, *rows = csv.reader(f)
        except (ValueError, csv.Error) as error:                 # no line at all, bytes that are no text, a NUL
            raise DataError(f"{file} is empty or not a CSV file ({error})") from None
    for column, name in enumerate(("path", "patient", "split")):
        if header[column:column + 1] != [name]:
            raise DataError(f"{file}, row 1: column {column + 1} must be '{name}', the header is {','.join(header)!r}")
    label_names = header[3:]
    for name in label_names:
        if not name or header.count(name) > 1:
            raise DataError(f"{file}, row 1: label column {name!r} is {'there twice' if name else 'without a name'}")
    while rows and not rows[-1]:                                        # blank lines at the end
        rows.pop()
    if not rows:
        raise DataError(f"{file} lists no image")

    first_row, split_of = {}, {}
    labels = np.empty((len(rows), len(label_names)), np.float32)
    for i, row in enumerate(rows):
        where = f"{file}, row {i + 2}"
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} cells where the header has {len(header)}")
        path, patient, split, *cells = row
        if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"{where}, column path: {path!r} must be a path inside {folder}")
        if first_row.setdefault(path, i) != i:
            raise DataError(f"{where}, column path: {path} is already in row {first_row[path] + 2}")
        if not patient:
            raise DataError(f"{where}, column patient: empty")
        if split not in SPLITS:
            raise DataError(f"{where}, column split: {split!r} is none of {', '.join(SPLITS)}")
        if split_of.setdefault(patient, split) != split:
            raise DataError(f"{where}, column patient: {patient} is in {split} and in {split_of[patient]}")
        for column, cell in enumerate(cells):
            if cell not in LABEL_VALUES:
                raise DataError(f"{where}, column {label_names[column]}: {cell!r} is none of 1, 0, -1 or empty")
            labels[i, column] = LABEL_VALUES[cell]
    paths = [row[0] for row in rows]
    missing = [i for i, path in enumerate(paths) if not os.path.exists(os.path.join(folder, path))]
    if missing:
        raise DataError(f"{file}, row {missing[0] + 2}: {paths[missing[0]]} is missing on disk"
                        f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}")
    patients, splits = (np.array([row[column] for row in rows]) for column in (1, 2))
    return Manifest(Path(folder), paths, patients, splits, labels, label_names)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and augmentation as pure functions. Philox maps (key, counter) to numbers: the key holds the seed and the
# purpose, the counter says whose numbers they are, and nothing depends on what was drawn before.

SHUFFLE, VIEW = 0, 1                # purposes, so that the two never share a number


@dataclass(frozen=True)
class Augmentation:
    """How far two views of one radiograph may differ; the defaults are the published chest X-ray recipe's.

    Its hue, saturation and random grayscale do nothing to a gray image and are left out."""
    crop_area: tuple[float, float] = (0.8, 1.0)      # fraction of the image's area; aspect ratio 3/4 to 4/3
    rotation: float = 10.0                           # degrees, to either side; the corners turn black
    blur: tuple[float, float] = (0.1, 2.0)           # sigma of the Gaussian, pixels of the view
    flip: float = 0.5                                # probability of a horizontal flip
    brightness: float = 0.4                          # factor drawn from 1 - this to 1 + this
    contrast: float = 0.4                            # likewise


def batch_at(step: int, batch_size: int, images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (B,) and image indices (B,) of the global batch at `step`.

    Batches are cut from the endless sequence of the epochs' shuffles: every epoch shows each of `images` once, whatever
    the batch size, and a batch across the seam of two epochs belongs to both."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(images))
    return epochs, np.array([images[_shuffle(len(images), seed, epoch)[place]]
                             for epoch, place in zip(epochs.tolist(), places.tolist())])


@functools.lru_cache(maxsize=4)
def _shuffle(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, SHUFFLE], counter=[0, 0, 0, epoch])).permutation(n)


def view_parameters(augmentation: Augmentation, seed: int, epochs: np.ndarray, images: np.ndarray,
                    view: int) -> dict[str, np.ndarray]:
    """What makes view number `view` of each of B images, by the names of the DALI arguments they become. Where there is
    no rotation, or no blur, there is no angle, or no sigma.

    roi_start, roi_end (B, 2): the crop window, (y, x) as fractions of the image.
    angle (B,): degrees, counter-clockwise.    sigma (B,): blur, pixels.    mirror (B,): 0 or 1.
    mean, std (B,): of gray levels 0 to 255; they normalise, and apply brightness b and contrast c on the way. With
    m, s = MEAN, STD and x in [0, 1], contrast about m of brightened x is c (b x - m) + m, and normalised that is
    (x - m / b) / (s / (b c)). (torchvision's contrast pivots on the image's own mean, and clips.)
    """
    u = np.array([np.random.Generator(np.random.Philox(key=[seed, VIEW], counter=[0, view, image, epoch])).random(9)
                  for epoch, image in zip(epochs.tolist(), images.tolist())]).T                   # (9, B) in [0, 1)

    def uniform(low, high, u):
        return low + (high - low) * u

    area = uniform(*augmentation.crop_area, u[0])
    # Log-uniform in 3/4 to 4/3, as far as the window fits. The aspect ratio is relative to the image's own, because
    # evaluation, too, maps the whole image, tall or wide, onto the square: nothing at the lungs' edges is cut off.
    widest = np.minimum(np.log(4 / 3), -np.log(area))
    aspect = np.exp(uniform(-widest, widest, u[1]))
    window = np.sqrt([area / aspect, area * aspect])                                      # (2, B): height, width
    start = (1 - window) * u[2:4]
    b = uniform(1 - augmentation.brightness, 1 + augmentation.brightness, u[7])
    c = uniform(1 - augmentation.contrast, 1 + augmentation.contrast, u[8])
    parameters = {"roi_start": start.T, "roi_end": (start + window).T.clip(max=1),
                  "angle": uniform(-augmentation.rotation, augmentation.rotation, u[4]),
                  "sigma": uniform(*augmentation.blur, u[5]), "mirror": u[6] < augmentation.flip,
                  "mean": 255 * MEAN / b, "std": 255 * STD / (b * c)}
    if not augmentation.rotation:
        del parameters["angle"]
    if not max(augmentation.blur):
        del parameters["sigma"]
    return {name: np.ascontiguousarray(value, np.int32 if name == "mirror" else np.float32)
            for name, value in parameters.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The DALI graphs. On a GPU the JPEG decoder works on both sides ("mixed") and everything after it runs on the device;
# with device="cpu" the same graph needs neither GPU nor driver.

@dataclass(frozen=True)
class Preprocessing:
    """What turns a decoded radiograph into the network's input; later stages inherit it from the checkpoint."""
    image_size: int = 224               # pixels, the side of the square input
    normalize: str = "fixed"            # by MEAN and STD, or first each "image" to that mean and deviation
    clahe: bool = False                 # contrast-limited adaptive histogram equalisation, 8 x 8 tiles, clip limit 2


@pipeline_def(exec_dynamic=True)        # the executor whose outputs live for as long as somebody holds them
def _graph(source, views, names, preprocessing, device, half):
    size = (preprocessing.image_size, preprocessing.image_size)
    parameter_types = [types.INT32 if name == "mirror" else types.FLOAT for name in names]
    path, index, *parameters = fn.external_source(source, num_outputs=2 + views * len(names), batch=True,
                                                  dtype=[types.UINT8, types.INT64] + views * parameter_types)
    image = fn.decoders.image(fn.io.file.read(path), device="mixed" if device.type == "cuda" else "cpu",
                              output_type=types.GRAY)                                             # (H, W, 1) uint8
    if preprocessing.clahe:
        image = fn.clahe(image, tiles_x=8, tiles_y=8, clip_limit=2.0)
    if preprocessing.normalize == "image":      # epsilon, a variance of one gray level: a blank image stays finite
        image = fn.normalize(image, axes=(0, 1), shift=255 * MEAN, scale=255 * STD, epsilon=1.0, dtype=types.FLOAT)

    def tensor(image, mean, std, mirror=0):                                                       # (1, S, S)
        return fn.crop_mirror_normalize(image, mean=mean, std=std, mirror=mirror, output_layout="CHW",
                                        dtype=types.FLOAT16 if half else types.FLOAT)

    if not views:
        return tensor(fn.resize(image, size=size, antialias=True), [255 * MEAN], [255 * STD]), index
    outputs = []
    for view in range(views):
        p = dict(zip(names, parameters[view * len(names):]))
        x = fn.resize(image, size=size, antialias=True,
                      roi_start=p["roi_start"], roi_end=p["roi_end"], roi_relative=True)
        if "angle" in p:
            x = fn.rotate(x, angle=p["angle"], keep_size=True, fill_value=0)
        if "sigma" in p:                        # no window size: DALI picks one an image, far faster than one for all
            x = fn.gaussian_blur(x, sigma=p["sigma"])
        outputs.append(tensor(x, p["mean"], p["std"], p["mirror"]))
    return *outputs, index


class Loader:
    """Iterates over batches of one data folder; each iteration starts from the first batch again.

    Yields torch tensors on `device`: `views` tensors (B, 1, S, S), float32 or with `half` float16, or one unaugmented
    one where views is 0, and last the image indices (B,) int64 on the CPU. ImageError names an image that fails."""

    def __init__(self, manifest: Manifest, batches: Callable[[], Iterator[tuple[np.ndarray, list]]], batch_size: int,
                 views: int, names: list[str], preprocessing: Preprocessing, device: torch.device | str, threads: int,
                 half: bool):
        self.manifest, self.batches, self.device = manifest, batches, torch.device(device)
        self.pipeline = functools.partial(
            _graph, views=views, names=names, preprocessing=preprocessing, device=self.device, half=half,
            batch_size=batch_size, num_threads=threads, prefetch_queue_depth=2,
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        batches, handed_over = self.batches(), []       # the images that DALI was given and has not returned yet

        def source():
            images, parameters = next(batches)          # its StopIteration is what DALI expects at the end
            handed_over.extend(images)
            paths = (os.fsencode(self.manifest.folder / self.manifest.paths[i]) for i in images)
            return [[np.frombuffer(path, np.uint8) for path in paths], images, *parameters]

        pipeline = self.pipeline(source)
        while True:
            try:
                # On PyTorch's stream, so that neither side waits for the other, nor frees what the other still reads.
                outputs = pipeline.run(torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None)
            except StopIteration:
                return
            except RuntimeError as error:
                _raise_culprit(self.manifest, handed_over, error)
                raise
            batch = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            del handed_over[:len(batch[-1])]
            yield batch


def _raise_culprit(manifest: Manifest, images: list[int], error: RuntimeError) -> None:
    """Name the image: DALI's own message often does not, so read those in flight again, one by one."""
    listed = manifest.splits is not None                                # and not just a folder of images
    for i in images:
        try:
            with Image.open(manifest.folder / manifest.paths[i]) as image:
                if listed and image.format != "JPEG":
                    raise OSError(f"a {image.format}, where prepare.py writes JPEG")
                image.load()
        except Exception as reason:                                     # a broken file may raise anything
            where = f" (row {i + 2} of manifest.csv)" if listed else ""
            raise ImageError(f"{manifest.folder / manifest.paths[i]}{where} cannot be read: {reason}") from error


def train_loader(manifest: Manifest, images: np.ndarray, batch_size: int, steps: range, views: int,
                 augmentation: Augmentation, preprocessing: Preprocessing, seed: int, device: torch.device | str,
                 rank: int = 0, world_size: int = 1, threads: int = 2, half: bool = False) -> Loader:
    """Augmented batches of `images` at `steps`; process `rank` gets its slice of each global batch of `batch_size`."""
    share = batch_size // world_size
    names = list(view_parameters(augmentation, seed, np.zeros(1, int), np.zeros(1, int), 0))

    def batches():
        for step in steps:
            epochs, index = (a[rank * share:(rank + 1) * share] for a in batch_at(step, batch_size, images, seed))
            yield index, [values for view in range(views)
                          for values in view_parameters(augmentation, seed, epochs, index, view).values()]

    return Loader(manifest, batches, share, views, names, preprocessing, device, threads, half)


def eval_loader(manifest: Manifest, images: np.ndarray, batch_size: int, preprocessing: Preprocessing,
                device: torch.device | str, rank: int = 0, world_size: int = 1, threads: int = 2,
                half: bool = False) -> Loader:
    """Every one of `images` once, whole and unaugmented, in order and without padding; process `rank` of `world_size`
    gets images[rank::world_size], which may be none."""
    mine = np.ascontiguousarray(images[rank::world_size])               # DALI takes no strides

    def batches():
        return ((mine[i:i + batch_size], []) for i in range(0, len(mine), batch_size))

    loader = Loader(manifest, batches, batch_size, 0, [], preprocessing, device, threads, half)
    table = manifest.folder / "manifest.csv"                    # rewritten whenever an image is
    written = table.stat().st_mtime_ns if table.exists() else 0
    loader.fingerprint = f"{manifest.folder.resolve()} {written} {preprocessing} {mine.tolist()}"
    return loader
